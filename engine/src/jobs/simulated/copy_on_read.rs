//! Reading through a [`CopyOnReadNode`] on chains of any kind: what is seen stays, what layers down to the bottom hold is in the
//! top afterwards, and nothing else is.

use std::rc::Rc;

use blockyard_simulator::{Fault, Seed};
use blockyard_storage::error::EIO;
use blockyard_storage::{Buffer, ByteRange, Operation as StorageOperation};
use futures_util::future::join4;

use super::chain::{Chain, Nodes};
use crate::error::NodeError;
use crate::limits::STATUS_EXTENTS_MAX;
use crate::node::Node;
use crate::node::chain::{ChainExtent, Content, chain_status};
use crate::node::copy_on_read_node::{CopyOnReadNode, CopyOnReadOptions};
use crate::node::filter_node::{FilterKind, FilterNode};
use crate::node::qcow2::tests::model::Operation;

/// A filter that copies from so many layers, the top included, and the top below it.
fn filter(nodes: &Nodes, layers: usize, below_a_filter: bool) -> CopyOnReadNode {
    let mut top: Rc<dyn Node> = nodes.top.clone();
    if below_a_filter {
        top = Rc::new(FilterNode::new("job".to_owned(), top, FilterKind::Passes));
    }
    let bottom = nodes.all.get(layers - 1).cloned();
    let options = CopyOnReadOptions::default();
    CopyOnReadNode::new("filter".to_owned(), top, bottom, options)
}

async fn read(node: &dyn Node, range: ByteRange) -> Result<Vec<u8>, NodeError> {
    let mut into = Buffer::zeroed(range.length() as usize);
    into.as_mut_slice().fill(0xa5);
    let read = node.read(range.offset(), into).await;
    read.outcome?;
    Ok(read.buffer.as_slice().to_vec())
}

fn random_range(dice: &Seed, size_bytes: u64) -> ByteRange {
    let longest = *dice.pick(&[512, 5000, 70_000, size_bytes]);
    let start = dice.below(size_bytes);
    ByteRange::new(start, 1 + dice.below(longest)).clamp_end(size_bytes)
}

/// What the first layers hold, from the first byte to the last.
fn told(chain: &Chain, nodes: &Nodes, layers: usize) -> Vec<ChainExtent> {
    let top: Rc<dyn Node> = nodes.top.clone();
    let mut rest = ByteRange::new(0, top.facts().length_bytes);
    let mut found = Vec::new();
    while !rest.is_empty() {
        let status = chain_status(&top, Some(layers), rest, STATUS_EXTENTS_MAX);
        let extents = chain.drive(status).expect("told");
        let end = extents.last().expect("one at least").range.end();
        found.extend(extents);
        rest = ByteRange::between(end, rest.end());
    }
    found
}

fn is_below(extent: &&ChainExtent) -> bool {
    extent.depth > 0 && extent.content != Content::Unallocated
}

#[test]
fn what_is_read_is_in_the_top_and_nothing_from_below_the_bottom() {
    let (mut copied, mut left) = (0, 0);
    for seed in 0..300 {
        let chain = Chain::random(seed);
        let dice = Seed::new(seed ^ 0xc0f);
        let nodes = chain.open(&chain.whole());
        let layers = 1 + dice.below(chain.count() as u64) as usize;
        let node = filter(&nodes, layers, dice.one_in(2));
        let before = told(&chain, &nodes, layers);
        let size_bytes = node.facts().length_bytes;
        let what = format!("seed {seed}, {layers} layers");
        let all = ByteRange::new(0, size_bytes);
        let part = random_range(&dice, size_bytes);
        for range in [part, all] {
            let bytes = chain.drive(read(&node, range)).expect("read");
            assert_eq!(bytes, chain.model.slice(range), "{what}: {range}");
            let after = told(&chain, &nodes, layers);
            let in_range = |extent: &&ChainExtent| !extent.range.intersection(&range).is_empty();
            let mut wrong = after.iter().filter(in_range).filter(is_below);
            assert_eq!(wrong.next(), None, "{what}: {range}");
        }
        copied += before.iter().filter(is_below).count();
        // Whole clusters of which nothing was held are not held now.
        let unit = chain.yards[0].setup.cluster_bytes();
        let held = told(&chain, &nodes, 1);
        for extent in &before {
            let whole = extent.range.align_inward(unit);
            if extent.content == Content::Unallocated && !whole.is_empty() {
                let is_held = |now: &ChainExtent| {
                    let inside = now.range.intersection(&whole);
                    now.content != Content::Unallocated && !inside.is_empty()
                };
                assert!(!held.iter().any(is_held), "{what}: {whole}");
                left += 1;
            }
        }
        chain.drive(nodes.top.close()).expect("closed");
        drop((node, nodes));
        chain.assert_holds(&chain.whole(), &what);
        chain.assert_sound(false, &what);
    }
    assert!(copied > 200 && left > 50, "{copied} and {left}");
}

#[test]
fn readers_and_a_writer_see_what_is_there() {
    for seed in 0..200 {
        let mut chain = Chain::random(seed);
        let dice = Seed::new(seed ^ 0xc0e);
        let nodes = chain.open(&chain.whole());
        let layers = 1 + dice.below(chain.count() as u64) as usize;
        let node = filter(&nodes, layers, dice.one_in(2));
        let setup = chain.yards[0].setup.clone();
        for round in 0..12 {
            let operation = Operation::random(&dice, &setup);
            let ranges = [(); 3].map(|()| random_range(&dice, setup.size_bytes));
            let (first, second, third, written) = chain.drive(join4(
                read(&node, ranges[0]),
                read(&node, ranges[1]),
                read(&node, ranges[2]),
                operation.carry_out(&nodes.top),
            ));
            written.expect("written");
            let old = chain.model.clone();
            chain.model.apply(&operation, &setup);
            for (bytes, range) in [first, second, third].into_iter().zip(ranges) {
                let bytes = bytes.expect("read");
                let (old, new) = (old.slice(range), chain.model.slice(range));
                for (place, byte) in bytes.iter().enumerate() {
                    let may_be = *byte == old[place] || *byte == new[place];
                    assert!(may_be, "seed {seed}, round {round}: {range}, byte {place}");
                }
            }
        }
        chain.drive(nodes.top.close()).expect("closed");
        drop((node, nodes));
        let what = format!("seed {seed}, {layers} layers");
        chain.assert_holds(&chain.whole(), &what);
        chain.assert_sound(false, &what);
    }
}

#[test]
fn a_copy_that_cannot_be_written_fails_its_read() {
    let mut failed = 0;
    for seed in 0..80 {
        let chain = Chain::random(seed);
        let nodes = chain.open(&chain.whole());
        let layers = chain.count();
        let node = filter(&nodes, layers, false);
        let copies = told(&chain, &nodes, layers)
            .iter()
            .any(|extent| is_below(&extent));
        let yard = &chain.yards[0];
        for disk in [Some(&yard.image), yard.data.as_ref()]
            .into_iter()
            .flatten()
        {
            let fault = Fault::fails(EIO).of(StorageOperation::Write).from(1);
            yard.world.add_fault(fault.on(disk));
        }
        let all = ByteRange::new(0, node.facts().length_bytes);
        let outcome = chain.drive(read(&node, all));
        match outcome {
            // Zeroes may need nothing but tables, which are written later.
            Ok(bytes) => assert_eq!(bytes, chain.model.bytes, "seed {seed}"),
            Err(error) => {
                assert!(copies, "seed {seed}: {error}");
                assert_eq!(error.errno(), EIO, "seed {seed}");
                failed += 1;
            }
        }
        drop((node, nodes));
        chain.cut_power();
        let what = format!("seed {seed}");
        chain.assert_sound(true, &what);
        chain.assert_holds(&chain.whole(), &what);
    }
    assert!(failed > 20, "{failed}");
}
