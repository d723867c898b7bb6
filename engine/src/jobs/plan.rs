//! The plan of a copy: which ranges, in which order, how. Found out bit by bit while the copy runs, so that its memory
//! follows the window and its time follows the data, never the size of the disk.

use std::collections::VecDeque;
use std::time::Duration;

use blockyard_storage::ByteRange;

use crate::limits::STATUS_EXTENTS_MAX;
use crate::node::{Node, StatusExtent};

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
    known: VecDeque<StatusExtent>,
    zero_stride: Stride,
    share_stride: Stride,
    sharing: Sharing,
}

impl Plan {
    /// A plan for `range`.
    pub(crate) fn new(range: ByteRange) -> Self {
        Self {
            rest: range,
            later: Vec::new(),
            known: VecDeque::new(),
            zero_stride: Stride::up_to(ZERO_MAX_BYTES),
            share_stride: Stride::up_to(SHARE_MAX_BYTES),
            sharing: Sharing::Untried,
        }
    }

    /// Learns how long a step took: zeroing may be a change of metadata or the writing of every byte, sharing may have to
    /// write back the whole source first, and nobody can tell beforehand.
    pub(crate) fn took(&mut self, kind: StepKind, took: Duration) {
        match kind {
            StepKind::Copy => {}
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
        self.known.clear();
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
        source: &dyn Node,
        target: &dyn Node,
        copy_max_bytes: u64,
        zeroes_are_free: bool,
        chunk: impl Fn(u64) -> u64,
    ) -> Option<Step> {
        while self.rest.is_empty()
            && let Some(later) = self.later.pop()
        {
            self.rest = later;
            self.known.clear();
        }
        if self.rest.is_empty() {
            return None;
        }
        if self.sharing != Sharing::Refused {
            let (range, after) = self.rest.split_at(chunk(self.share_stride.now_bytes));
            if self.can_share(range, source, target).await {
                self.rest = after;
                return Some(Step {
                    range,
                    kind: StepKind::Share,
                });
            }
        }
        while self
            .known
            .front()
            .is_none_or(|extent| extent.range.end() <= self.rest.offset())
        {
            if self.known.pop_front().is_none() {
                let answer = source.status(self.rest, STATUS_EXTENTS_MAX).await;
                self.known = answer
                    .unwrap_or_else(|error| {
                        tracing::debug!(%error, "what the source holds is not known, it is read");
                        Vec::new()
                    })
                    .into();
                if self.known.is_empty() {
                    // Asked again behind the first request: that one part cannot be told says nothing of the rest.
                    let (range, _) = self.rest.split_at(copy_max_bytes.max(1));
                    self.known.push_back(StatusExtent {
                        range,
                        zero: false,
                        allocated: true,
                    });
                }
            }
        }
        let extent = self.known.front()?;
        let (kind, longest) = match extent.zero {
            true if zeroes_are_free => (StepKind::Zero, self.zero_stride.now_bytes),
            true => (StepKind::Zero, chunk(self.zero_stride.now_bytes)),
            false => (StepKind::Copy, chunk(copy_max_bytes)),
        };
        let run = ByteRange::between(self.rest.offset(), extent.range.end().min(self.rest.end()));
        let (range, _) = run.split_at(longest.max(1));
        self.rest = ByteRange::between(range.end(), self.rest.end());
        Some(Step { range, kind })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_grow_where_they_are_cheap_and_shrink_where_they_are_not() {
        let mut plan = Plan::new(ByteRange::new(0, u64::MAX));
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
        let mut plan = Plan::new(ByteRange::new(0, 1 << 20));
        plan.rest = ByteRange::between(300_000, 1 << 20);
        plan.give_back_unshared(ByteRange::new(100_000, 50_000));
        assert_eq!(plan.position(), 100_000);
        plan.give_back_unshared(ByteRange::new(200_000, 50_000));
        assert_eq!(plan.position(), 100_000);
        assert!(!plan.is_done());
    }
}
