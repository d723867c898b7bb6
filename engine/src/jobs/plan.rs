//! The plan of a copy: which ranges, in which order, how. Found out bit by bit while the copy runs, so that its memory
//! follows the window and its time follows the data, never the size of the disk.

use std::rc::Rc;
use std::time::Duration;

use blockyard_storage::ByteRange;
use blockyard_storage::buffer::{BUFFER_SLOT_BYTES, pooled_bytes};

use crate::limits::STATUS_EXTENTS_MAX;
use crate::node::chain::{ChainExtent, Content, chain_status};
use crate::node::runs::{Known, Runs, Seen};
use crate::node::{Fill, Node};

/// Longest range zeroed at once.
const ZERO_MAX_BYTES: u64 = 1 << 30;

/// Longest range read for its checksums alone at once.
const SUM_MAX_BYTES: u64 = 64 << 20;

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
    /// Some of it reads as zeroes, and stays so; the rest is read and written.
    Parts,
    /// Make the target read as zeroes there.
    Zero,
    /// Let the target share the source's extents.
    Share,
    /// Let the target hold it itself.
    Fill(Fill),
    /// Read it for its checksums: the layers that are copied do not hold it.
    Sum,
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
    /// None of them: the target becomes zeroes.
    Zeroes,
    /// What the second to the `count`-th layer hold and the first does not: for the first to be filled with, so that they can
    /// go. The first is source and target at once; its units are never cut.
    Below {
        /// How many, the first among them.
        count: usize,
        /// Length of what stays below them; 0: nothing does. Behind its end, what the first layer does not hold reads as
        /// zeroes in the end as well, in version 2 of qcow2 too: what does so now needs nothing, whether a layer has
        /// zeroes of its own, ends there, or holds nothing.
        below_bytes: u64,
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

impl Step {
    /// What it counts for among what is in flight: its bytes, if they go through memory, or the memory, which may be longer.
    pub(super) fn counted_bytes(&self) -> u64 {
        match self.kind {
            StepKind::Copy | StepKind::Parts | StepKind::Fill(Fill::Bytes) => {
                let length = self.range.length();
                let held = usize::try_from(length).unwrap_or(usize::MAX);
                length.max(pooled_bytes(held.min(BUFFER_SLOT_BYTES)) as u64)
            }
            StepKind::Zero
            | StepKind::Share
            | StepKind::Fill(Fill::Zeroes)
            | StepKind::Sum
            | StepKind::Skip => 0,
        }
    }
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

    /// Somebody `waited` for the last range, or nobody did.
    fn adapt(&mut self, took: Duration, waited: bool) {
        self.now_bytes = if took > STRIDE_TIME || waited {
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
    /// From a multiple of all units on, or from `rest`.
    known: Runs,
    layers: Layers,
    /// What the target keeps together, in bytes, a power of two.
    unit_bytes: u64,
    /// What lies ahead within the layers that are copied: a range, and whether it is copied.
    span: (ByteRange, bool),
    zero_stride: Stride,
    share_stride: Stride,
    sum_stride: Stride,
    sharing: Sharing,
    /// Nothing is done but in steps, as others write meanwhile.
    beside_writers: bool,
    /// Units of which only parts read as zeroes are told apart.
    tells_parts: bool,
    /// Steps are whole units.
    keeps_units: bool,
    /// What the layers do not hold is read all the same.
    reads_all: bool,
}

impl Plan {
    /// A plan for `range`, whose ends are multiples of all units or the end of the disk. Whole units of `unit_bytes`, a power
    /// of two, are copied or zeroed: what the target keeps together is not written in parts.
    pub(crate) fn new(range: ByteRange, layers: Layers, unit_bytes: u64) -> Self {
        let sharing = match layers {
            Layers::All => Sharing::Untried,
            // An extent of a host file tells nothing of layers.
            Layers::Top { .. } | Layers::Zeroes | Layers::Below { .. } => Sharing::Refused,
        };
        Self {
            rest: range,
            later: Vec::new(),
            known: Runs::default(),
            layers,
            unit_bytes: unit_bytes.max(1),
            span: (ByteRange::default(), true),
            zero_stride: Stride::up_to(ZERO_MAX_BYTES),
            share_stride: Stride::up_to(SHARE_MAX_BYTES),
            sum_stride: Stride::up_to(SUM_MAX_BYTES),
            sharing,
            beside_writers: false,
            tells_parts: false,
            keeps_units: false,
            reads_all: false,
        }
    }

    /// The same for somebody who copies beside writers, in whole units of `unit_bytes`, a multiple of what it is now: the target
    /// changes in steps only. Units of which only parts read as zeroes are told apart where the target keeps less together.
    pub(crate) fn beside_writers(self, unit_bytes: u64) -> Self {
        Self {
            beside_writers: true,
            tells_parts: self.unit_bytes < unit_bytes,
            keeps_units: true,
            unit_bytes,
            ..self
        }
    }

    /// The same in steps of whole units of `unit_bytes`, a power of two, or what it is now where that is longer. Nothing is shared
    /// if all bytes are to be read, and what the layers do not hold is read, too.
    pub(crate) fn in_units(self, unit_bytes: u64, reads_all: bool) -> Self {
        Self {
            tells_parts: self.tells_parts || self.unit_bytes < unit_bytes,
            keeps_units: true,
            unit_bytes: self.unit_bytes.max(unit_bytes),
            sharing: match reads_all {
                true => Sharing::Refused,
                false => self.sharing,
            },
            reads_all,
            ..self
        }
    }

    /// Learns how long a step took: zeroing may be a change of metadata or the writing of every byte, sharing may have to
    /// write back the whole source first, and nobody can tell beforehand.
    /// Where somebody `waited` for the step, the next ones are shorter.
    pub(crate) fn took(&mut self, kind: StepKind, took: Duration, waited: bool) {
        match kind {
            StepKind::Copy | StepKind::Parts | StepKind::Fill(Fill::Bytes) | StepKind::Skip => {}
            StepKind::Zero | StepKind::Fill(Fill::Zeroes) => self.zero_stride.adapt(took, waited),
            StepKind::Share => self.share_stride.adapt(took, waited),
            StepKind::Sum => self.sum_stride.adapt(took, waited),
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

    /// `range`, which was handed out last, is planned anew by what is there now.
    pub(crate) fn look_again(&mut self, range: ByteRange) {
        self.rest = ByteRange::between(range.offset(), self.rest.end());
        self.forget();
    }

    /// One more range, whose ends are multiples of all units or the end of the disk, once every other one was handed out. All
    /// of it is copied from now on, whichever layer holds it.
    pub(crate) fn add(&mut self, range: ByteRange) {
        self.layers = Layers::All;
        self.rest = range;
        self.later.clear();
        self.forget();
    }

    /// Everything that was not handed out is in here.
    pub(crate) fn planned(&self) -> ByteRange {
        let later = self.later.iter().map(ByteRange::end);
        ByteRange::between(self.position(), later.fold(self.rest.end(), u64::max))
    }

    /// What is known of that, or is taken for granted.
    pub(crate) fn looked_at(&self) -> ByteRange {
        match self.layers {
            Layers::Zeroes => self.planned(),
            _ => {
                let start = self.rest.offset();
                ByteRange::between(start, self.known.known_to(start).max(start))
            }
        }
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
            let longest = self.whole_units(chunk(self.share_stride.now_bytes));
            let (range, after) = self.rest.split_at(longest);
            if self.can_share(range, &**source, target).await {
                self.rest = after;
                return Some(Step {
                    range,
                    kind: StepKind::Share,
                });
            }
        }
        if self.layers != Layers::Zeroes {
            self.look_ahead(source, copy_max_bytes).await;
        }
        let (run, kind) = self.front();
        let longest = match kind {
            StepKind::Skip => run.length(),
            // Its parts come one after the other.
            StepKind::Parts => self.unit_bytes,
            StepKind::Sum => chunk(self.sum_stride.now_bytes),
            StepKind::Zero | StepKind::Fill(Fill::Zeroes) => match zeroes_are_free {
                true => self.zero_stride.now_bytes,
                false => chunk(self.zero_stride.now_bytes),
            },
            _ => chunk(copy_max_bytes),
        };
        let whole = match kind {
            StepKind::Skip => longest,
            // A filled unit is widened: what is decided of a part of it would be done to all of it.
            StepKind::Fill(_) => (longest - longest % self.unit_bytes).max(self.unit_bytes),
            // Shorter than a unit where a unit is longer than a request can be.
            _ if self.keeps_units => self.whole_units(longest),
            _ => longest - longest % self.unit_bytes.min(longest.max(1)),
        };
        let (range, _) = run.split_at(whole.max(1));
        self.rest = ByteRange::between(range.end(), self.rest.end());
        Some(Step { range, kind })
    }

    /// As much of `longest` as is whole units, where steps are.
    fn whole_units(&self, longest: u64) -> u64 {
        match self.keeps_units {
            true => (longest - longest % self.unit_bytes).max(self.unit_bytes),
            false => longest,
        }
    }

    /// Finds out what the unit ahead is, and what comes with the same answer.
    async fn look_ahead(&mut self, source: &Rc<dyn Node>, copy_max_bytes: u64) {
        let rest = self.rest;
        self.known.go_on_to(rest.offset());
        let unit_bytes = self.decided_unit_bytes();
        let unit_end = (rest.offset() + 1).checked_next_multiple_of(unit_bytes);
        let wanted_to = unit_end.map_or(rest.end(), |end| end.min(rest.end()));
        while self.known.known_to(rest.offset()) < wanted_to {
            let from = self.known.known_to(rest.offset());
            let ahead = ByteRange::between(from, rest.end());
            let asked = match self.layers {
                Layers::All | Layers::Zeroes => None,
                Layers::Top { count, .. } | Layers::Below { count, .. } => Some(count),
            };
            let answer = chain_status(source, asked, ahead, STATUS_EXTENTS_MAX).await;
            let extents = answer.unwrap_or_else(|error| {
                tracing::debug!(%error, "what the source holds is not known, it is read");
                Vec::new()
            });
            for extent in &extents {
                self.learn(extent);
            }
            if self.known.known_to(from) <= from {
                // Asked again behind the first request: that one part cannot be told says nothing of the rest.
                let (range, _) = ahead.split_at(copy_max_bytes.max(1));
                self.known.push(range, Known::Data);
            }
        }
    }

    /// Adds what has been told.
    fn learn(&mut self, extent: &ChainExtent) {
        let known = match extent.content {
            Content::Unallocated => Known::Nothing,
            Content::Zero => Known::Zero,
            Content::Data => Known::Data,
        };
        let Layers::Below { below_bytes, .. } = self.layers else {
            return self.known.push(extent.range, known);
        };
        let known = match extent.depth {
            0 if known != Known::Nothing => Known::Own,
            _ => known,
        };
        let (above, behind) = match known {
            Known::Zero | Known::Nothing => {
                let above = below_bytes.saturating_sub(extent.range.offset());
                extent.range.split_at(above)
            }
            Known::Data | Known::Own => (extent.range, ByteRange::default()),
        };
        for (range, known) in [(above, known), (behind, Known::Own)] {
            if !range.is_empty() {
                self.known.push(range, known);
            }
        }
    }

    /// What one decision is made for, in bytes.
    fn decided_unit_bytes(&self) -> u64 {
        match self.layers {
            Layers::Top { unit_bytes, .. } => unit_bytes.max(self.unit_bytes),
            Layers::All | Layers::Zeroes | Layers::Below { .. } => self.unit_bytes,
        }
    }

    /// The front of the rest that one thing is done with, and what.
    fn front(&mut self) -> (ByteRange, StepKind) {
        let (rest, unit_bytes, parts) = (self.rest, self.unit_bytes, self.tells_parts);
        match self.layers {
            Layers::Zeroes => (rest, StepKind::Zero),
            Layers::All => self
                .known
                .front_units(rest, unit_bytes, copied_or_zeroed(parts)),
            Layers::Below { .. } => self.known.front_units(rest, unit_bytes, filled),
            Layers::Top { .. } => {
                if self.span.0.end() <= rest.offset() {
                    let decided = self.decided_unit_bytes();
                    self.span = self.known.front_units(rest, decided, Seen::is_held);
                }
                let span = self.span.0.intersection(&rest);
                match self.span.1 {
                    true => {
                        let fate_of = copied_or_zeroed(parts);
                        self.known.front_units(span, unit_bytes, fate_of)
                    }
                    false if self.reads_all => (span, StepKind::Sum),
                    false => (span, StepKind::Skip),
                }
            }
        }
    }

    /// Finds out by trying, with the first range.
    async fn can_share(&mut self, range: ByteRange, source: &dyn Node, target: &dyn Node) -> bool {
        if self.sharing == Sharing::Works {
            return true;
        }
        self.sharing = match source.host_extent(range) {
            // It is tried by the step itself.
            Some(_) if self.beside_writers => return true,
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

/// What is done with a unit of which something is copied; whether its parts are told apart.
fn copied_or_zeroed(tells_parts: bool) -> impl Fn(Seen) -> StepKind {
    move |seen| match seen.is_zero() {
        true => StepKind::Zero,
        false if tells_parts && seen.zero => StepKind::Parts,
        false => StepKind::Copy,
    }
}

/// What is done with a unit of a layer that those below it go away from.
fn filled(seen: Seen) -> StepKind {
    match (seen.data || seen.zero, seen.data || seen.nothing) {
        (false, _) => StepKind::Skip,
        // Where a part comes from a layer that stays, only reading tells what becomes of the rest of the unit.
        (true, true) => StepKind::Fill(Fill::Bytes),
        (true, false) => StepKind::Fill(Fill::Zeroes),
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
