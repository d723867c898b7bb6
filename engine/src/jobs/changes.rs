//! [`Changes`]: what a copier that goes on beside writers has to copy again, how far it has to come, and how both count.

use std::rc::Rc;

use blockyard_storage::ByteRange;

use crate::clock::Moment;
use crate::error::NodeError;
use crate::job::context::JobContext;
use crate::job::rates::RateMeter;
use crate::node::mirror_top::Tracker;
use crate::request::CopyMode;

/// Changed bytes that are copied as one plan.
const RUN_MAX_BYTES: u64 = 16 << 20;

/// How often a step is planned that others overtake by writing to both sides.
const LOOKS_MAX: usize = 4;

/// How far a copier has to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Goal {
    /// So much may be left of what has changed.
    pub(crate) left_bytes: u64,
    /// After so many changed bytes it is enough, whatever is left.
    pub(crate) budget_bytes: u64,
    /// Writers wait: neither a pause nor an error is waited for, and nothing is paced.
    pub(crate) holds_writers: bool,
}

impl Goal {
    /// Nothing is left.
    pub(crate) const CLEAN: Self = Self {
        left_bytes: 0,
        budget_bytes: u64::MAX,
        holds_writers: false,
    };
}

/// What has changed on the source since it was copied.
pub(super) struct Changes {
    pub(super) tracker: Rc<Tracker>,
    goal: Goal,
    meter: RateMeter,
    /// Behind the last run.
    position: u64,
}

impl Changes {
    pub(super) fn new(tracker: Rc<Tracker>) -> Self {
        Self {
            tracker,
            goal: Goal::CLEAN,
            meter: RateMeter::default(),
            position: 0,
        }
    }

    pub(super) fn aim(&mut self, goal: Goal) {
        self.goal = goal;
    }

    pub(super) fn holds_writers(&self) -> bool {
        self.goal.holds_writers
    }

    /// Looks at what is new: how writes are treated, and how much there is to do. A write to both sides that has failed.
    pub(super) fn look(&mut self, cx: &JobContext) -> Option<NodeError> {
        let both = cx.orders().copy_mode() == CopyMode::WriteBlocking;
        self.tracker.set_writes_both(both);
        self.count(cx);
        self.measure(cx);
        match cx.must_stop() {
            true => None,
            false => self.tracker.take_failure(),
        }
    }

    /// Measures how fast the source changes and is copied.
    pub(super) fn measure(&mut self, cx: &JobContext) {
        let so_far = (self.tracker.dirtied_bytes(), cx.progress().current_bytes());
        let (rates, now) = (&cx.orders().rates, cx.clock().now());
        self.meter
            .look(rates, now, so_far, self.tracker.dirty_bytes());
    }

    /// When measuring tells something new although nothing happens until then; `None`: never.
    pub(super) fn next_measure(&self, cx: &JobContext) -> Option<Moment> {
        let dirtied_bytes = self.tracker.dirtied_bytes();
        self.meter.next_look(&cx.orders().rates, dirtied_bytes)
    }

    /// What has failed during a pause would only bring the next one; it is copied in any case.
    pub(super) fn forget_failures(&self) {
        while self.tracker.take_failure().is_some() {}
    }

    /// Passes on how much more, or less, there is to do.
    pub(super) fn count(&self, cx: &JobContext) {
        let change = self.tracker.take_change();
        match change < 0 {
            true => cx.progress().decrease_remaining(change.unsigned_abs()),
            false => cx.progress().increase_remaining(change.unsigned_abs()),
        }
    }

    /// Whether the goal is not reached yet.
    pub(super) fn wants_more(&self) -> bool {
        self.tracker.dirty_bytes() > self.goal.left_bytes && self.goal.budget_bytes > 0
    }

    /// What is copied next, in whole units; it counts as something to do already.
    pub(super) fn next_run(&mut self, cx: &JobContext, unit_bytes: u64) -> Option<ByteRange> {
        if !self.wants_more() {
            return None;
        }
        let longest = RUN_MAX_BYTES.min(self.goal.budget_bytes);
        self.count(cx);
        let (run, changed) = self.tracker.take_run(self.position, longest, unit_bytes)?;
        // What is in a unit with it is copied, too.
        let beside = run.length().saturating_sub(changed);
        cx.progress().increase_remaining(beside);
        self.position = run.end();
        self.goal.budget_bytes = self.goal.budget_bytes.saturating_sub(run.length());
        Some(run)
    }

    /// Whether zeroes that were planned for `range` have to be looked at once more, as somebody has written there on both sides since.
    /// After so many looks what was written is copied once more instead.
    pub(super) fn overtake(&self, range: ByteRange, looks: usize) -> bool {
        if !self.tracker.is_overtaken(range) {
            return false;
        }
        if looks == LOOKS_MAX {
            self.tracker.mark_overtaken(range);
            return false;
        }
        self.tracker.looks_again();
        true
    }

    /// A range was not copied, and has to be.
    pub(super) fn give_back(&self, cx: &JobContext, range: ByteRange) {
        cx.progress().decrease_remaining(range.length());
        self.tracker.mark(range);
        self.count(cx);
    }
}
