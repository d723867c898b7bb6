//! The plan of a copy: which ranges, in which order, how. Found out bit by bit while the copy runs, so that its memory
//! follows the window and its time follows the data, never the size of the disk.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use blockyard_storage::ByteRange;

use crate::error::NodeError;
use crate::limits::STATUS_EXTENTS_MAX;
use crate::node::Node;
use crate::node::chain::{ChainExtent, Content, chain_status};

/// Longest range zeroed at once.
const ZERO_MAX_BYTES: u64 = 1 << 30;

/// Longest range shared at once.
const SHARE_MAX_BYTES: u64 = 256 << 20;

/// Longest range zeroed or shared at once before it is known how long that takes.
const STRIDE_START_BYTES: u64 = 4 << 20;

/// No range is cut shorter than this for being slow.
const STRIDE_MIN_BYTES: u64 = 1 << 20;

/// How long one range may take to be zeroed or shared: pause and cancel wait for it.
const STRIDE_TIME: Duration = Duration::from_millis(50);

/// What is done with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StepKind {
    /// Read and write it.
    Copy,
    /// Make the target read as zeroes there.
    Zero,
    /// Let the target share the source's extents.
    Share,
    /// Nothing: the layers that are copied do not hold it.
    Skip,
}

/// Which layers of the source are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layers {
    /// What is seen from the top.
    All,
    /// What the first `count` layers hold, as it is seen from the top.
    Top {
        /// How many.
        count: usize,
        /// A unit of so many bytes (a power of two) is copied as a whole if any of it is held there, so that the target
        /// has nothing to fill up from a backing that it may not have yet.
        unit_bytes: u64,
    },
}

/// One range and what is done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// Which bytes, on both sides.
    pub(crate) range: ByteRange,
    /// What is done with them.
    pub(crate) kind: StepKind,
}

/// Whether extents can be shared between the two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sharing {
    Untried,
    Works,
    Refused,
}

/// Length of the next range of one kind, found out by how long the last ones took.
#[derive(Clone, Copy, Debug)]
struct Stride {
    now_bytes: u64,
    max_bytes: u64,
}

impl Stride {
    fn up_to(max_bytes: u64) -> Self {
        Self {
            now_bytes: STRIDE_START_BYTES,
            max_bytes,
        }
    }

    fn adapt(&mut self, took: Duration) {
        self.now_bytes = if took > STRIDE_TIME {
            (self.now_bytes / 2).max(STRIDE_MIN_BYTES)
        } else if took < STRIDE_TIME / 4 {
            (self.now_bytes * 2).min(self.max_bytes)
        } else {
            self.now_bytes
        };
    }
}

/// The rest of a copy.
pub(crate) struct Plan {
    rest: ByteRange,
    /// Planned after `rest`: what was left of the disk when a range came back.
    later: Vec<ByteRange>,
    known: VecDeque<ChainExtent>,
    layers: Layers,
    /// What the target keeps together, in bytes, a power of two.
    unit_bytes: u64,
    /// What lies ahead within the layers that are copied: a range, and whether it is copied.
    span: (ByteRange, bool),
    zero_stride: Stride,
    share_stride: Stride,
    sharing: Sharing,
}

impl Plan {
    /// A plan for `range`, whose ends are multiples of all units or the end of the disk. Whole units of `unit_bytes`, a power
    /// of two, are copied or zeroed: what the target keeps together is not written in parts.
    pub(crate) fn new(range: ByteRange, layers: Layers, unit_bytes: u64) -> Self {
        let sharing = match layers {
            Layers::All => Sharing::Untried,
            // An extent of a host file tells nothing of layers.
            Layers::Top { .. } => Sharing::Refused,
        };
        Self {
            rest: range,
            later: Vec::new(),
            known: VecDeque::new(),
            layers,
            unit_bytes: unit_bytes.max(1),
            span: (ByteRange::default(), true),
            zero_stride: Stride::up_to(ZERO_MAX_BYTES),
            share_stride: Stride::up_to(SHARE_MAX_BYTES),
            sharing,
        }
    }

    /// Learns how long a step took: zeroing may be a change of metadata or the writing of every byte, sharing may have to
    /// write back the whole source first, and nobody can tell beforehand.
    pub(crate) fn took(&mut self, kind: StepKind, took: Duration) {
        match kind {
            StepKind::Copy | StepKind::Skip => {}
            StepKind::Zero => self.zero_stride.adapt(took),
            StepKind::Share => self.share_stride.adapt(took),
        }
    }

    /// Whether every range was handed out.
    pub(crate) fn is_done(&self) -> bool {
        self.rest.is_empty() && self.later.iter().all(ByteRange::is_empty)
    }

    /// Sharing was refused for `range`, which was handed out before: it is planned anew, and nothing is shared any
    /// more.
    pub(crate) fn give_back_unshared(&mut self, range: ByteRange) {
        self.sharing = Sharing::Refused;
        let rest = std::mem::replace(&mut self.rest, range);
        self.later.push(rest);
        self.forget();
    }

    /// What is known lies elsewhere.
    fn forget(&mut self) {
        self.known.clear();
        self.span = (ByteRange::default(), true);
    }

    /// First byte that was not handed out.
    pub(crate) fn position(&self) -> u64 {
        let later = self.later.iter().map(ByteRange::offset);
        later.fold(self.rest.offset(), u64::min)
    }

    /// The next step, of at most `copy_max_bytes` if it is a copy; `chunk` cuts further by the rate limit, which zeroes
    /// are not subject to if `zeroes_are_free`. `None` when every range was handed out. What the source cannot tell of is
    /// copied.
    pub(crate) async fn next(
        &mut self,
        source: &Rc<dyn Node>,
        target: &dyn Node,
        copy_max_bytes: u64,
        zeroes_are_free: bool,
        chunk: impl Fn(u64) -> u64,
    ) -> Option<Step> {
        while self.rest.is_empty()
            && let Some(later) = self.later.pop()
        {
            self.rest = later;
            self.forget();
        }
        if self.rest.is_empty() {
            return None;
        }
        if self.sharing != Sharing::Refused {
            let (range, after) = self.rest.split_at(chunk(self.share_stride.now_bytes));
            if self.can_share(range, &**source, target).await {
                self.rest = after;
                return Some(Step {
                    range,
                    kind: StepKind::Share,
                });
            }
        }
        let span = self.span_ahead(source, copy_max_bytes).await;
        if let (range, false) = span {
            self.rest = ByteRange::between(range.end(), self.rest.end());
            return Some(Step {
                range,
                kind: StepKind::Skip,
            });
        }
        let ahead = span.0;
        while self
            .known
            .front()
            .is_none_or(|extent| extent.range.end() <= self.rest.offset())
        {
            if self.known.pop_front().is_none() {
                let answer = chain_status(source, None, ahead, STATUS_EXTENTS_MAX).await;
                self.known = answer
                    .map(|extents| merged(&extents))
                    .unwrap_or_else(|error| {
                        tracing::debug!(%error, "what the source holds is not known, it is read");
                        VecDeque::new()
                    });
                if self.known.is_empty() {
                    // Asked again behind the first request: that one part cannot be told says nothing of the rest.
                    let (range, _) = ahead.split_at(copy_max_bytes.max(1));
                    self.known.push_back(ChainExtent {
                        range,
                        content: Content::Data,
                        depth: 0,
                    });
                }
            }
        }
        let (run, kind) = in_whole_units(*self.known.front()?, ahead, self.unit_bytes);
        let longest = match kind {
            StepKind::Zero if zeroes_are_free => self.zero_stride.now_bytes,
            StepKind::Zero => chunk(self.zero_stride.now_bytes),
            _ => chunk(copy_max_bytes),
        };
        // Shorter than a unit where a unit is longer than a request can be.
        let whole = longest - longest % self.unit_bytes.min(longest.max(1));
        let (range, _) = run.split_at(whole.max(1));
        self.rest = ByteRange::between(range.end(), self.rest.end());
        Some(Step { range, kind })
    }

    /// The rest, as far as it is copied or skipped as a whole, and which of the two.
    async fn span_ahead(
        &mut self,
        source: &Rc<dyn Node>,
        copy_max_bytes: u64,
    ) -> (ByteRange, bool) {
        let Layers::Top { count, unit_bytes } = self.layers else {
            return (self.rest, true);
        };
        if self.span.0.end() <= self.rest.offset() {
            self.span = match held_ahead(source, count, unit_bytes, self.rest).await {
                Ok(span) => span,
                Err(error) => {
                    tracing::debug!(%error, "what the source holds is not known, it is read");
                    let (range, _) = self.rest.split_at(copy_max_bytes.max(1));
                    (
                        range.align_outward(unit_bytes).intersection(&self.rest),
                        true,
                    )
                }
            };
        }
        (self.span.0.intersection(&self.rest), self.span.1)
    }

    /// Finds out by trying, with the first range.
    async fn can_share(&mut self, range: ByteRange, source: &dyn Node, target: &dyn Node) -> bool {
        if self.sharing == Sharing::Works {
            return true;
        }
        self.sharing = match source.host_extent(range) {
            Some((file, offset)) => match target.share(file, offset, range).await {
                Ok(()) => Sharing::Works,
                Err(error) => {
                    tracing::debug!(%error, "extents cannot be shared, bytes are copied");
                    Sharing::Refused
                }
            },
            None => Sharing::Refused,
        };
        self.sharing == Sharing::Works
    }
}

/// The front of what is ahead, which begins in `extent`, in whole units, and what is done with it: one that holds anything but
/// zeroes is copied. Ranges end at the end of the disk or of what is copied of it.
fn in_whole_units(extent: ChainExtent, ahead: ByteRange, unit_bytes: u64) -> (ByteRange, StepKind) {
    let (start, end) = (ahead.offset(), extent.range.end().min(ahead.end()));
    let whole_end = match end == ahead.end() {
        true => end,
        false => end - end % unit_bytes,
    };
    match extent.content {
        Content::Zero if whole_end > start => {
            (ByteRange::between(start, whole_end), StepKind::Zero)
        }
        _ => {
            let end = end.max(start + 1).checked_next_multiple_of(unit_bytes);
            let end = end.map_or(ahead.end(), |end| end.min(ahead.end()));
            (ByteRange::between(start, end), StepKind::Copy)
        }
    }
}

/// Neighbours of one content as one, whichever layer they are in.
fn merged(extents: &[ChainExtent]) -> VecDeque<ChainExtent> {
    let mut merged = VecDeque::<ChainExtent>::new();
    for extent in extents {
        match merged.back_mut() {
            Some(last) if last.content == extent.content => {
                last.range = ByteRange::between(last.range.offset(), extent.range.end());
            }
            _ => merged.push_back(*extent),
        }
    }
    merged
}

/// The front of `rest` in whole units that the first `count` layers hold something of, or nothing: which of the two.
///
/// # Errors
/// When a layer cannot tell of the first unit.
async fn held_ahead(
    source: &Rc<dyn Node>,
    count: usize,
    unit_bytes: u64,
    rest: ByteRange,
) -> Result<(ByteRange, bool), NodeError> {
    let mut free_to = rest.offset();
    while free_to < rest.end() {
        let unknown = ByteRange::between(free_to, rest.end());
        for extent in chain_status(source, Some(count), unknown, STATUS_EXTENTS_MAX).await? {
            if extent.content == Content::Unallocated {
                free_to = extent.range.end();
                continue;
            }
            let skipped = ByteRange::between(rest.offset(), free_to - free_to % unit_bytes);
            if !skipped.is_empty() {
                return Ok((skipped, false));
            }
            let end = extent.range.align_outward(unit_bytes).end();
            return Ok((ByteRange::between(rest.offset(), end.min(rest.end())), true));
        }
        let whole = free_to - free_to % unit_bytes;
        if whole > rest.offset() && free_to < rest.end() {
            return Ok((ByteRange::between(rest.offset(), whole), false));
        }
    }
    Ok((rest, false))
}

#[cfg(test)]
mod tests {
    use blockyard_simulator::Seed;
    use blockyard_storage::Buffer;

    use super::*;
    use crate::node::chain::tests::{BLOCK, LayerNode};
    use crate::node::zeroes::is_zero;

    #[test]
    fn strides_grow_where_they_are_cheap_and_shrink_where_they_are_not() {
        let mut plan = Plan::new(ByteRange::new(0, u64::MAX), Layers::All, 1);
        for _ in 0..8 {
            plan.took(StepKind::Zero, Duration::from_millis(1));
            plan.took(StepKind::Share, Duration::from_secs(1));
            plan.took(StepKind::Copy, Duration::from_secs(1));
        }
        assert_eq!(plan.zero_stride.now_bytes, ZERO_MAX_BYTES);
        assert_eq!(plan.share_stride.now_bytes, STRIDE_MIN_BYTES);
        plan.took(StepKind::Zero, STRIDE_TIME / 2);
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
                    StepKind::Share | StepKind::Skip => panic!("seed {seed}: {step:?}"),
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
}
