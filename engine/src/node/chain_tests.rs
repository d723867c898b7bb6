//! Tests of status through chains, against a model that looks at every block by itself.

use std::cell::Cell;

use blockyard_simulator::Seed;
use blockyard_storage::error::EIO;
use blockyard_storage::{Buffer, LocalFuture, Operation, StorageError, ZeroMode};

use super::*;
use crate::node::{NodeFacts, NodeTransfer};

/// Unit in which test layers differ.
pub(crate) const BLOCK: u64 = 4096;

/// A layer that is a list of blocks: nothing, zeroes or one byte again and again.
pub(crate) struct LayerNode {
    pub(crate) blocks: Vec<Option<u8>>,
    pub(crate) backing: Option<Rc<dyn Node>>,
    /// Status of this block cannot be told.
    pub(crate) dumb_at: Option<usize>,
    /// Status covers this many blocks at most.
    pub(crate) status_max: usize,
    /// How often status was asked for.
    pub(crate) asked: Cell<usize>,
}

impl LayerNode {
    pub(crate) fn new(blocks: Vec<Option<u8>>, backing: Option<Rc<dyn Node>>) -> Self {
        Self {
            blocks,
            backing,
            dumb_at: None,
            status_max: usize::MAX,
            asked: Cell::new(0),
        }
    }

    pub(crate) fn random(dice: &Seed, backing: Option<Rc<dyn Node>>) -> Self {
        let length = 1 + dice.below(40) as usize;
        let mut blocks = Vec::new();
        while blocks.len() < length {
            let block = match dice.below(3) {
                0 => None,
                1 => Some(0),
                _ => Some(1 + dice.below(200) as u8),
            };
            blocks.extend(std::iter::repeat_n(block, 1 + dice.below(5) as usize));
        }
        let mut layer = Self::new(blocks, backing);
        layer.status_max = 1 + dice.below(9) as usize;
        layer
    }

    fn error(&self, operation: Operation, range: ByteRange) -> NodeError {
        NodeError {
            node: self.name(),
            source: StorageError::new(operation, range, EIO),
        }
    }
}

impl Node for LayerNode {
    fn name(&self) -> String {
        "layer".to_owned()
    }

    fn facts(&self) -> NodeFacts {
        NodeFacts {
            length_bytes: self.blocks.len() as u64 * BLOCK,
            request_alignment: 1,
            transfer_max_bytes: 1 << 20,
            cluster_size_bytes: None,
            read_only: true,
            unmaps: false,
            fixed_length: true,
        }
    }

    fn status(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>> {
        self.asked.set(self.asked.get() + 1);
        Box::pin(async move {
            assert!(
                range.end() <= self.facts().length_bytes,
                "{range} passes the end"
            );
            let mut extents: Vec<StatusExtent> = Vec::new();
            for piece in range.pieces(BLOCK).take(self.status_max) {
                let index = (piece.offset() / BLOCK) as usize;
                if self.dumb_at == Some(index) {
                    if extents.is_empty() {
                        return Err(self.error(Operation::Allocation, piece));
                    }
                    break;
                }
                let (zero, allocated) = match self.blocks[index] {
                    None => (self.backing.is_none(), false),
                    Some(byte) => (byte == 0, true),
                };
                let full = extents.len() == extents_max;
                match extents.last_mut() {
                    Some(last) if (last.zero, last.allocated) == (zero, allocated) => {
                        last.range = ByteRange::between(last.range.offset(), piece.end());
                    }
                    _ if full => break,
                    _ => extents.push(StatusExtent {
                        range: piece,
                        zero,
                        allocated,
                    }),
                }
            }
            Ok(extents)
        })
    }

    fn read(&self, offset: u64, mut into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, into.len() as u64);
            for piece in range.pieces(BLOCK) {
                let place = (piece.offset() - offset) as usize..(piece.end() - offset) as usize;
                let below = self.backing.as_ref();
                let below = below.filter(|below| piece.end() <= below.facts().length_bytes);
                match (self.blocks[(piece.offset() / BLOCK) as usize], below) {
                    (Some(byte), _) => into.as_mut_slice()[place].fill(byte),
                    (None, None) => into.as_mut_slice()[place].fill(0),
                    (None, Some(below)) => {
                        let part = Buffer::zeroed(place.len());
                        let read = below.read(piece.offset(), part).await;
                        into.as_mut_slice()[place].copy_from_slice(read.buffer.as_slice());
                    }
                }
            }
            NodeTransfer {
                buffer: into,
                outcome: Ok(()),
            }
        })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        let range = ByteRange::new(offset, from.len() as u64);
        let outcome = Err(self.error(Operation::Write, range));
        Box::pin(async move {
            NodeTransfer {
                buffer: from,
                outcome,
            }
        })
    }

    fn zero(&self, range: ByteRange, _: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move { Err(self.error(Operation::Zero, range)) })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move { Err(self.error(Operation::Discard, range)) })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async { Ok(()) })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        let range = ByteRange::new(0, length_bytes);
        Box::pin(async move { Err(self.error(Operation::Resize, range)) })
    }

    fn backing(&self) -> Option<Rc<dyn Node>> {
        self.backing.clone()
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    blockyard_simulator::run(future, || false).expect("waits for nothing")
}

/// What one block is, looked at layer by layer.
fn model(layers: &[Rc<LayerNode>], layers_max: Option<usize>, block: usize) -> (Content, usize) {
    let asked = layers_max.map_or(layers.len(), |max| max.min(layers.len()));
    for (depth, layer) in layers.iter().take(asked).enumerate() {
        match layer.blocks.get(block) {
            None | Some(Some(0)) => return (Content::Zero, depth),
            Some(Some(_)) => return (Content::Data, depth),
            Some(None) => {}
        }
    }
    let content = match layers_max {
        Some(_) => Content::Unallocated,
        None => Content::Zero,
    };
    (content, asked - 1)
}

/// A chain of random layers; the first is the top.
fn chain(dice: &Seed, count: u64) -> Vec<Rc<LayerNode>> {
    let mut layers: Vec<Rc<LayerNode>> = Vec::new();
    for _ in 0..count {
        let below = layers.first().map(|layer| layer.clone() as Rc<dyn Node>);
        layers.insert(0, Rc::new(LayerNode::random(dice, below)));
    }
    layers
}

#[test]
fn every_block_is_what_the_first_layer_that_holds_it_says() {
    for seed in 0..500 {
        let dice = Seed::new(seed);
        let layers = chain(&dice, 1 + dice.below(4));
        let top: Rc<dyn Node> = layers[0].clone();
        let end = top.facts().length_bytes;
        for layers_max in [None, Some(1), Some(2), Some(9)] {
            let extents_max = 1 + dice.below(6) as usize;
            let mut rest = ByteRange::between(dice.below(end), end);
            while !rest.is_empty() {
                let found = run(chain_status(&top, layers_max, rest, extents_max)).expect("told");
                assert!((1..=extents_max).contains(&found.len()), "seed {seed}");
                for extent in &found {
                    assert_eq!(extent.range.offset(), rest.offset(), "seed {seed}");
                    for piece in extent.range.pieces(BLOCK) {
                        let block = (piece.offset() / BLOCK) as usize;
                        let expected = model(&layers, layers_max, block);
                        assert_eq!((extent.content, extent.depth), expected, "seed {seed}");
                    }
                    rest = ByteRange::between(extent.range.end(), rest.end());
                }
            }
        }
    }
}

#[test]
fn a_layer_that_cannot_tell_ends_the_answer_before() {
    let mut below = LayerNode::new(vec![Some(1); 8], None);
    below.dumb_at = Some(5);
    let below: Rc<dyn Node> = Rc::new(below);
    let top: Rc<dyn Node> = Rc::new(LayerNode::new(vec![None; 8], Some(below)));
    let ask = |from: u64| {
        let range = ByteRange::between(from * BLOCK, 8 * BLOCK);
        run(chain_status(&top, None, range, 10))
    };
    let expected = ChainExtent {
        range: ByteRange::new(0, 5 * BLOCK),
        content: Content::Data,
        depth: 1,
    };
    assert_eq!(ask(0), Ok(vec![expected]));
    assert!(ask(5).is_err());
    assert!(ask(6).is_ok());
}

#[test]
fn what_a_shorter_layer_hides_is_not_seen() {
    let bottom: Rc<dyn Node> = Rc::new(LayerNode::new(vec![Some(1); 8], None));
    let short: Rc<dyn Node> = Rc::new(LayerNode::new(vec![None; 3], Some(bottom)));
    let top: Rc<dyn Node> = Rc::new(LayerNode::new(vec![None; 8], Some(short)));
    let all = ByteRange::new(0, 8 * BLOCK);
    let extent = |from: u64, to: u64, content, depth| ChainExtent {
        range: ByteRange::between(from * BLOCK, to * BLOCK),
        content,
        depth,
    };
    assert_eq!(
        run(chain_status(&top, None, all, 10)),
        Ok(vec![
            extent(0, 3, Content::Data, 2),
            extent(3, 8, Content::Zero, 1)
        ])
    );
    assert_eq!(
        run(chain_status(&top, Some(1), all, 10)),
        Ok(vec![extent(0, 8, Content::Unallocated, 0)])
    );
}

#[test]
fn many_short_answers_that_are_all_alike_are_told_in_parts() {
    let mut layer = LayerNode::new(vec![Some(1); 3 * LOOKS_MAX + 7], None);
    layer.status_max = 1;
    let layer = Rc::new(layer);
    let top: Rc<dyn Node> = layer.clone();
    let mut rest = ByteRange::new(0, top.facts().length_bytes);
    for blocks in [LOOKS_MAX, LOOKS_MAX, LOOKS_MAX, 7] {
        let (range, behind) = rest.split_at(blocks as u64 * BLOCK);
        let before = layer.asked.get();
        let found = run(chain_status(&top, None, rest, 256));
        let expected = ChainExtent {
            range,
            content: Content::Data,
            depth: 0,
        };
        assert_eq!(found, Ok(vec![expected]));
        assert!(layer.asked.get() - before <= LOOKS_MAX);
        rest = behind;
    }
}

#[test]
fn each_of_many_layers_is_asked_a_few_times_only() {
    const LAYERS: usize = 200;
    const BLOCKS: usize = 2000;
    let dice = Seed::new(5);
    let owners: Vec<usize> = (0..BLOCKS)
        .map(|_| dice.below(LAYERS as u64) as usize)
        .collect();
    let mut layers: Vec<Rc<LayerNode>> = Vec::new();
    for depth in (0..LAYERS).rev() {
        let below = layers.first().map(|layer| layer.clone() as Rc<dyn Node>);
        let held = owners.iter().map(|owner| (*owner == depth).then_some(1));
        layers.insert(0, Rc::new(LayerNode::new(held.collect(), below)));
    }
    let top: Rc<dyn Node> = layers[0].clone();
    let mut rest = ByteRange::new(0, BLOCKS as u64 * BLOCK);
    let mut questions = 0;
    while !rest.is_empty() {
        let found = run(chain_status(&top, Some(LAYERS), rest, 256)).expect("told");
        for extent in found {
            for piece in extent.range.pieces(BLOCK) {
                let owner = owners[(piece.offset() / BLOCK) as usize];
                assert_eq!((extent.content, extent.depth), (Content::Data, owner));
            }
            rest = ByteRange::between(extent.range.end(), rest.end());
        }
        questions += 1;
    }
    for layer in layers {
        let asked = layer.asked.get();
        assert!(asked <= 8 * questions, "{asked} times for {questions}");
    }
}
