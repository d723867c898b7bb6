//! Tests of plans, on chains of random layers: what is copied, skipped and filled, block by block.

use blockyard_simulator::Seed;
use blockyard_storage::Buffer;

use super::*;
use crate::node::chain::tests::{BLOCK, LayerNode};
use crate::node::zeroes::is_zero;

#[test]
fn strides_grow_where_they_are_cheap_and_shrink_where_they_are_not() {
    let mut plan = Plan::new(ByteRange::new(0, u64::MAX), Layers::All, 1);
    for _ in 0..8 {
        plan.took(StepKind::Zero, Duration::from_millis(1), false);
        plan.took(StepKind::Share, Duration::from_secs(1), false);
        plan.took(StepKind::Copy, Duration::from_secs(1), false);
    }
    assert_eq!(plan.zero_stride.now_bytes, ZERO_MAX_BYTES);
    assert_eq!(plan.share_stride.now_bytes, STRIDE_MIN_BYTES);
    plan.took(StepKind::Zero, STRIDE_TIME / 2, false);
    assert_eq!(plan.zero_stride.now_bytes, ZERO_MAX_BYTES);
}

#[test]
fn the_position_is_below_everything_that_came_back() {
    let mut plan = Plan::new(ByteRange::new(0, 1 << 20), Layers::All, 1);
    plan.rest = ByteRange::between(300_000, 1 << 20);
    plan.give_back_unshared(ByteRange::new(100_000, 50_000));
    assert_eq!(plan.position(), 100_000);
    plan.give_back_unshared(ByteRange::new(200_000, 50_000));
    assert_eq!(plan.position(), 100_000);
    assert!(!plan.is_done());
}

fn run<T>(future: impl Future<Output = T>) -> T {
    blockyard_simulator::run(future, || false).expect("waits for nothing")
}

/// Every step of a plan, and whether the source could tell of everything.
fn steps(plan: &mut Plan, source: &Rc<dyn Node>, copy_max_bytes: u64) -> Vec<Step> {
    let mut steps = Vec::new();
    let next = async |plan: &mut Plan| {
        plan.next(source, &**source, copy_max_bytes, false, |longest| longest)
            .await
    };
    while let Some(step) = run(next(plan)) {
        steps.push(step);
    }
    steps
}

#[test]
fn a_plan_of_the_whole_chain_copies_data_and_zeroes_the_rest() {
    for seed in 0..300 {
        let dice = Seed::new(seed);
        let bottom: Rc<dyn Node> = Rc::new(LayerNode::random(&dice, None));
        let middle: Rc<dyn Node> = Rc::new(LayerNode::random(&dice, Some(bottom)));
        let top: Rc<dyn Node> = Rc::new(LayerNode::random(&dice, Some(middle)));
        let all = ByteRange::new(0, top.facts().length_bytes);
        let unit = BLOCK << dice.below(4);
        let longest = unit * (1 + dice.below(3));
        let mut plan = Plan::new(all, Layers::All, unit);
        let mut reached = 0;
        for step in steps(&mut plan, &top, longest) {
            assert_eq!(step.range.offset(), reached, "seed {seed}");
            reached = step.range.end();
            assert!(reached % unit == 0 || reached == all.end(), "seed {seed}");
            let length = usize::try_from(step.range.length()).expect("short");
            let read = run(top.read(step.range.offset(), Buffer::zeroed(length)));
            let zero = is_zero(read.buffer.as_slice());
            match step.kind {
                StepKind::Copy => assert!(length as u64 <= longest && !zero, "seed {seed}"),
                StepKind::Zero => assert!(zero, "seed {seed}"),
                other => panic!("seed {seed}: {other:?}"),
            }
        }
        assert_eq!(reached, all.end());
    }
}

#[test]
fn a_plan_of_the_top_layer_copies_whole_units_that_it_holds_something_of() {
    for seed in 0..300 {
        let dice = Seed::new(seed);
        let bottom: Rc<dyn Node> = Rc::new(LayerNode::random(&dice, None));
        let mut layer = LayerNode::random(&dice, Some(bottom));
        if dice.one_in(4) {
            layer.dumb_at = Some(dice.below(20) as usize);
        }
        let (blocks, dumb_at) = (layer.blocks.clone(), layer.dumb_at);
        let top: Rc<dyn Node> = Rc::new(layer);
        let all = ByteRange::new(0, top.facts().length_bytes);
        let unit_blocks = 1 << dice.below(4);
        let layers = Layers::Top {
            count: 1,
            unit_bytes: unit_blocks as u64 * BLOCK,
        };
        let mut plan = Plan::new(all, layers, 1);
        let mut reached = 0;
        for step in steps(&mut plan, &top, 3 * BLOCK) {
            assert_eq!(step.range.offset(), reached, "seed {seed}");
            reached = step.range.end();
            for piece in step.range.pieces(BLOCK) {
                let block = (piece.offset() / BLOCK) as usize;
                let unit = block - block % unit_blocks;
                let unit = unit..(unit + unit_blocks).min(blocks.len());
                let held = blocks[unit.clone()].iter().any(Option::is_some);
                // What cannot be told may be held.
                let told = dumb_at.is_none_or(|dumb| dumb >= blocks.len());
                assert!(
                    (step.kind != StepKind::Skip) == held || (!told && !held),
                    "seed {seed}: {step:?}"
                );
            }
        }
        assert_eq!(reached, all.end());
    }
}

/// What the block of a layer reads as.
fn byte_at(node: &Rc<dyn Node>, block: usize) -> u8 {
    let offset = block as u64 * BLOCK;
    if offset >= node.facts().length_bytes {
        return 0;
    }
    let read = run(node.read(offset, Buffer::zeroed(BLOCK as usize)));
    read.buffer.as_slice()[0]
}

/// A chain of random layers; the first is the top.
fn chain(dice: &Seed, count: usize) -> Vec<Rc<LayerNode>> {
    let mut layers: Vec<Rc<LayerNode>> = Vec::new();
    for _ in 0..count {
        let below = layers.first().map(|layer| layer.clone() as Rc<dyn Node>);
        let mut layer = LayerNode::random(dice, below);
        if dice.one_in(6) {
            layer.dumb_at = Some(dice.below(30) as usize);
        }
        layers.insert(0, Rc::new(layer));
    }
    layers
}

fn told(layers: &[Rc<LayerNode>]) -> bool {
    let is_dumb = |layer: &Rc<LayerNode>| {
        let within = |at| at < layer.blocks.len();
        layer.dumb_at.is_some_and(within)
    };
    !layers.iter().any(is_dumb)
}

#[test]
fn a_layer_that_is_filled_reads_the_same_without_those_below() {
    let mut kinds = [0; 3];
    for seed in 0..600 {
        let dice = Seed::new(seed);
        let layers = chain(&dice, 2 + dice.below(4) as usize);
        let count = 1 + dice.below(layers.len() as u64) as usize;
        let device: Rc<dyn Node> = layers[0].clone();
        let below = layers.get(count).map(|layer| layer.clone() as Rc<dyn Node>);
        let below_bytes = below.as_ref().map_or(0, |node| node.facts().length_bytes);
        let unit_blocks = 1_usize << dice.below(4);
        let unit = unit_blocks as u64 * BLOCK;
        let all = ByteRange::new(0, device.facts().length_bytes);
        let filled_from = Layers::Below { count, below_bytes };
        let mut plan = Plan::new(all, filled_from, unit);
        let (mut reached, mut blocks) = (0, layers[0].blocks.clone());
        for step in steps(&mut plan, &device, unit * (1 + dice.below(3))) {
            assert_eq!(step.range.offset(), reached, "seed {seed}");
            reached = step.range.end();
            assert!(
                reached.is_multiple_of(unit) || reached == all.end(),
                "seed {seed}: a unit is cut"
            );
            let first = (step.range.offset() / BLOCK) as usize;
            for piece in step.range.pieces(unit) {
                let first = (piece.offset() / BLOCK) as usize;
                let in_unit = first..(first + unit_blocks).min(blocks.len());
                // What the layers between hold of this unit where the first holds nothing.
                let held = in_unit.clone().any(|block| {
                    let mut from_first =
                        layers[..count].iter().map(|layer| layer.blocks.get(block));
                    let decides = from_first.position(|held| held != Some(&None));
                    let Some(depth) = decides.filter(|depth| *depth > 0) else {
                        return false;
                    };
                    let is_data = layers[depth]
                        .blocks
                        .get(block)
                        .is_some_and(|held| *held != Some(0));
                    is_data || below_bytes > block as u64 * BLOCK
                });
                let is_filled = step.kind != StepKind::Skip;
                assert!(is_filled || !held, "seed {seed}: {piece} is left out");
                assert!(!is_filled || held || !told(&layers), "seed {seed}: {piece}");
            }
            let with = match step.kind {
                StepKind::Skip => {
                    kinds[0] += 1;
                    continue;
                }
                StepKind::Fill(with) => with,
                other => panic!("seed {seed}: {other:?}"),
            };
            kinds[1 + usize::from(with == Fill::Zeroes)] += 1;
            let last = (step.range.end() / BLOCK) as usize;
            for (block, held) in blocks.iter_mut().enumerate().take(last).skip(first) {
                let byte = byte_at(&device, block);
                if with == Fill::Zeroes && held.is_none() {
                    assert_eq!(byte, 0, "seed {seed}: zeroes at block {block}");
                }
                held.get_or_insert(byte);
            }
        }
        assert_eq!(reached, all.end(), "seed {seed}");
        let after: Rc<dyn Node> = Rc::new(LayerNode::new(blocks, below));
        for block in 0..layers[0].blocks.len() {
            let (before, after) = (byte_at(&device, block), byte_at(&after, block));
            assert_eq!(before, after, "seed {seed}: block {block}");
        }
    }
    assert!(kinds.iter().all(|count| *count > 100), "{kinds:?}");
}

#[test]
fn a_base_that_gets_what_layers_hold_takes_their_place() {
    let mut kinds = [0; 3];
    for seed in 0..600 {
        let dice = Seed::new(seed);
        let layers = chain(&dice, 2 + dice.below(4) as usize);
        let count = 1 + dice.below(layers.len() as u64 - 1) as usize;
        let top: Rc<dyn Node> = layers[0].clone();
        let length = layers[0].blocks.len();
        let all = ByteRange::new(0, top.facts().length_bytes);
        let copied = Layers::Top {
            count,
            unit_bytes: 512,
        };
        let mut plan = Plan::new(all, copied, 512);
        let mut base = layers[count].blocks.clone();
        // What comes in reads as zeroes, whatever is below.
        let behind = length.saturating_sub(base.len());
        base.extend(std::iter::repeat_n(Some(0), behind));
        let mut reached = 0;
        for step in steps(&mut plan, &top, BLOCK * (1 + dice.below(5))) {
            assert_eq!(step.range.offset(), reached, "seed {seed}");
            reached = step.range.end();
            let blocks = (step.range.offset() / BLOCK) as usize..(reached / BLOCK) as usize;
            for block in blocks {
                let held = layers[..count].iter().any(|layer| {
                    let held = layer.blocks.get(block);
                    held.is_none_or(Option::is_some)
                });
                match step.kind {
                    StepKind::Copy => {
                        base[block] = Some(byte_at(&top, block));
                        kinds[0] += 1;
                        assert!(held || !told(&layers), "seed {seed}: block {block}");
                    }
                    StepKind::Zero => {
                        base[block] = Some(0);
                        kinds[1] += 1;
                        assert!(held, "seed {seed}: block {block}");
                    }
                    StepKind::Skip => {
                        kinds[2] += 1;
                        assert!(!held, "seed {seed}: block {block}");
                    }
                    other => panic!("seed {seed}: {other:?}"),
                }
            }
        }
        assert_eq!(reached, all.end(), "seed {seed}");
        let below = layers.get(count + 1);
        let below = below.map(|layer| layer.clone() as Rc<dyn Node>);
        let base: Rc<dyn Node> = Rc::new(LayerNode::new(base, below));
        for block in 0..length {
            let (before, after) = (byte_at(&top, block), byte_at(&base, block));
            assert_eq!(before, after, "seed {seed}: block {block}");
        }
    }
    assert!(kinds.iter().all(|count| *count > 100), "{kinds:?}");
}
