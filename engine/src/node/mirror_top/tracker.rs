//! [`Tracker`]: what a mirror and the writers above its source know of each other.
//!
//! ```text
//!   a write, copied later:   mark, write the source, mark        the job: clear, look, read the source, write the target
//!   a write to both sides:   its turn, write the source, write the target, clear
//! ```
//! Whoever writes to the source only marks the range behind the write: a copy that began before cleared it before, so it is copied
//! again. Whoever writes to both sides has the range for himself, and nothing of it has to be copied again: a copy reads what is there at
//! its turn. Only zeroes are brought over by what was known before. So the job asks, before it does that, whether somebody has written
//! there since it looked ([`is_overtaken`](Tracker::is_overtaken)), and a write that such a step waits for already marks what it has
//! written. Therefore writes to both sides never keep a job from its end, however many there are.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use blockyard_storage::{ByteRange, LocalFuture};
use tokio::sync::Notify;

use crate::error::NodeError;
use crate::manifest::Recorder;
use crate::node::Node;
use crate::node::dirty_map::DirtyMap;
use crate::node::gate::{Closed, Gate, Way};
use crate::node::turns::{Doing, Turn, Turns};

/// Failed writes to the target that are remembered until the job asks; what they have not written is marked in any case.
const FAILURES_MAX: usize = 16;

/// Writes to both sides that are told apart.
const OVERTAKEN_MAX: usize = 64;

/// Copies a range from the source to the target.
type BringOver = Rc<dyn Fn(ByteRange) -> LocalFuture<'static, Result<(), NodeError>>>;

/// The other side of writes to both sides.
#[derive(Clone)]
pub(crate) struct OtherSide {
    /// The target.
    pub(crate) target: Rc<dyn Node>,
    /// Copies what the source holds.
    pub(crate) bring_over: BringOver,
    /// The target keeps together so many bytes, a power of two, and may miss what is below it yet: it is written in whole units.
    /// 1: it takes anything.
    pub(crate) unit_bytes: u64,
    /// Zeroed ranges may become holes.
    pub(crate) may_unmap: bool,
}

/// What is recorded where only a part of the disk is copied.
struct Recorded {
    recorder: Rc<Recorder>,
    /// Blocks that are recorded already, or will be.
    blocks: DirtyMap,
}

/// What a mirror and the writers above its source know of each other.
pub struct Tracker {
    dirty: RefCell<DirtyMap>,
    turns: Rc<Turns>,
    /// Where writers wait while the job comes to its end.
    pub(super) gate: Rc<Gate>,
    other_side: RefCell<Option<OtherSide>>,
    writes_both: Cell<bool>,
    /// What was written on both sides is copied as well: at once, or when it is asked for.
    copies_again: Cell<bool>,
    /// What has been written on both sides and is copied as well, but not yet.
    again_later: RefCell<Option<DirtyMap>>,
    planned: Cell<ByteRange>,
    /// What the job has looked at, or is looking at.
    looked_at: Cell<ByteRange>,
    /// What has been written on both sides within that since.
    overtaken: RefCell<Vec<ByteRange>>,
    /// Bytes that have changed since the job asked: more, or less.
    change_bytes: Cell<i64>,
    /// Bytes that writers have left to be copied, in all, those again that were copied meanwhile.
    dirtied_bytes: Cell<u64>,
    /// Who records whole blocks of what has changed.
    recorded: RefCell<Option<Recorded>>,
    failures: RefCell<VecDeque<NodeError>>,
    changed: Notify,
    is_over: Cell<bool>,
    /// Where requests go once the target has taken the source's place.
    successor: RefCell<Option<Rc<dyn Node>>>,
}

impl Tracker {
    /// Of a source of this length that nobody has written to, in granules of `granularity_bytes`, a power of two.
    pub fn new(length_bytes: u64, granularity_bytes: u64) -> Self {
        Self {
            dirty: RefCell::new(DirtyMap::new(length_bytes, granularity_bytes)),
            turns: Rc::default(),
            gate: Rc::default(),
            other_side: RefCell::default(),
            writes_both: Cell::new(false),
            copies_again: Cell::new(false),
            again_later: RefCell::default(),
            planned: Cell::default(),
            looked_at: Cell::default(),
            overtaken: RefCell::default(),
            change_bytes: Cell::new(0),
            dirtied_bytes: Cell::new(0),
            recorded: RefCell::default(),
            failures: RefCell::default(),
            changed: Notify::new(),
            is_over: Cell::new(false),
            successor: RefCell::default(),
        }
    }

    /// Bytes of a granule.
    pub fn granularity_bytes(&self) -> u64 {
        self.dirty.borrow().granularity_bytes()
    }

    /// Lets writes reach the other side, if [`set_writes_both`](Self::set_writes_both).
    pub(crate) fn show_other_side(&self, side: OtherSide) {
        *self.other_side.borrow_mut() = Some(side);
    }

    /// Whether writes end when both sides have them.
    pub(crate) fn set_writes_both(&self, both: bool) {
        self.writes_both.set(both);
    }

    /// What is written on both sides from now on is copied all the same: whoever copies has to know what it reads. As the sides are
    /// equal there, it does not have to be copied before [`copy_again_now`](Self::copy_again_now).
    pub(crate) fn copy_again(&self) {
        self.copies_again.set(true);
        let none = self.dirty.borrow().emptied();
        *self.again_later.borrow_mut() = Some(none);
    }

    /// What has been written on both sides has to be copied, and what comes, too.
    pub(crate) fn copy_again_now(&self) {
        let later = self.again_later.borrow_mut().take();
        if let Some(later) = later {
            self.mark_all(&later);
        }
    }

    /// Whether something of `range` has to be copied, now or later.
    pub(crate) fn is_dirty(&self, range: ByteRange) -> bool {
        let later = self.again_later.borrow();
        let later = later.as_ref().and_then(|later| later.run_in(range));
        later.is_some() || self.dirty.borrow().run_in(range).is_some()
    }

    /// The other side, as long as writes go there.
    pub(super) fn other_side(&self) -> Option<OtherSide> {
        match self.writes_both.get() && !self.is_over.get() {
            true => self.other_side.borrow().clone(),
            false => None,
        }
    }

    /// Takes a place in the order of those that write and copy around `range`.
    pub(crate) fn turn(&self, range: ByteRange, doing: Doing) -> Turn {
        self.turns.take(range, doing)
    }

    /// `range` in whole granules, and in whole units of the other side.
    pub(super) fn outward(&self, range: ByteRange) -> ByteRange {
        let unit_bytes = self
            .other_side
            .borrow()
            .as_ref()
            .map_or(1, |side| side.unit_bytes);
        let dirty = self.dirty.borrow();
        dirty.outward(dirty.outward(range).align_outward(unit_bytes))
    }

    /// Only what writers change is copied from now on, and what else is marked is read for its checksums: `blocks`, which have to be
    /// marked, and each block that is written to for the first time.
    pub(crate) fn record(&self, recorder: Rc<Recorder>, blocks: DirtyMap) {
        *self.recorded.borrow_mut() = Some(Recorded { recorder, blocks });
    }

    /// A writer has changed `range`, or is about to.
    fn note_written(&self, range: ByteRange) {
        let mut blocks = None;
        if let Some(recorded) = &mut *self.recorded.borrow_mut() {
            recorded.recorder.copy_too(range);
            if recorded.blocks.mark(range) > 0 {
                blocks = Some(recorded.blocks.outward(range));
            }
        }
        if let Some(blocks) = blocks {
            self.mark(blocks);
        }
    }

    /// A writer has left `range` to be copied, in whole granules.
    pub(super) fn mark_written(&self, range: ByteRange) {
        self.note_written(range);
        let more = self.mark(range);
        let dirtied = self.dirtied_bytes.get();
        self.dirtied_bytes.set(dirtied.saturating_add(more));
    }

    /// Bytes that writers have left to be copied, in all, those again that were copied meanwhile.
    pub(crate) fn dirtied_bytes(&self) -> u64 {
        self.dirtied_bytes.get()
    }

    /// `range` has to be copied, in whole granules. How many bytes more those are.
    pub(crate) fn mark(&self, range: ByteRange) -> u64 {
        if self.is_over.get() || range.is_empty() {
            return 0;
        }
        let more = self.dirty.borrow_mut().mark(range);
        self.count(more, true);
        if more > 0 {
            self.changed.notify_one();
        }
        more
    }

    /// What has changed according to `map` has to be copied.
    pub(crate) fn mark_all(&self, map: &DirtyMap) {
        let more = {
            let mut dirty = self.dirty.borrow_mut();
            let before = dirty.dirty_bytes();
            dirty.merge(map);
            dirty.dirty_bytes() - before
        };
        self.count(more, true);
    }

    /// What may differ between the two sides, but for what is on its way to both: what has to be copied, and what is planned.
    pub(crate) fn unequal(&self) -> DirtyMap {
        let mut unequal = self.dirty.borrow().clone();
        unequal.mark(self.planned.get());
        unequal
    }

    /// The granules that lie in `range` as a whole are equal on both sides.
    fn clear(&self, range: ByteRange) {
        let less = self.dirty.borrow_mut().clear(range);
        self.count(less, false);
    }

    fn count(&self, bytes: u64, more: bool) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        let change = self.change_bytes.get();
        self.change_bytes.set(match more {
            true => change.saturating_add(bytes),
            false => change.saturating_sub(bytes),
        });
    }

    /// `range` has been written on both sides: nothing of it has to be copied.
    pub(super) fn written_on_both(&self, range: ByteRange) {
        self.note_written(range);
        let touched = self.outward(range);
        if self.looked_at.get().overlaps(&touched) {
            self.overtake(touched);
        }
        let has_to_be_copied = match &mut *self.again_later.borrow_mut() {
            Some(later) => {
                later.mark(range);
                false
            }
            None => self.copies_again.get(),
        };
        if has_to_be_copied || self.turns.known_copy_waits(touched) {
            self.mark(range);
        } else if !self.planned.get().overlaps(&touched) {
            self.clear(range);
        }
    }

    fn overtake(&self, range: ByteRange) {
        let mut overtaken = self.overtaken.borrow_mut();
        if overtaken.len() < OVERTAKEN_MAX {
            overtaken.push(range);
            return;
        }
        // More than was written: it is looked at once more for nothing.
        let all = overtaken.drain(..);
        let all = all.fold(range, |all, one| {
            ByteRange::between(all.offset().min(one.offset()), all.end().max(one.end()))
        });
        overtaken.push(all);
    }

    /// Whether something of `range` has been written on both sides since the job looked at it.
    pub(crate) fn is_overtaken(&self, range: ByteRange) -> bool {
        let overtaken = self.overtaken.borrow();
        overtaken.iter().any(|one| one.overlaps(&range))
    }

    /// What has been written of `range` since the job looked at it has to be copied.
    pub(crate) fn mark_overtaken(&self, range: ByteRange) {
        let overtaken = self.overtaken.borrow().clone();
        for one in overtaken {
            self.mark(one.intersection(&range));
        }
    }

    /// A write to the target failed.
    pub(super) fn failed(&self, error: NodeError) {
        let mut failures = self.failures.borrow_mut();
        if failures.len() < FAILURES_MAX {
            failures.push_back(error);
        }
        self.changed.notify_one();
    }

    /// Why a write did not reach the target.
    pub(crate) fn take_failure(&self) -> Option<NodeError> {
        self.failures.borrow_mut().pop_front()
    }

    /// What the job has not taken a turn for yet, and what of that it has looked at, or is about to.
    pub(crate) fn set_planned(&self, planned: ByteRange, looked_at: ByteRange) {
        self.planned.set(planned);
        self.looked_at.set(looked_at);
        let mut overtaken = self.overtaken.borrow_mut();
        overtaken.retain(|one| one.overlaps(&looked_at));
    }

    /// What is looked at anew has not been written since.
    pub(crate) fn looks_again(&self) {
        self.overtaken.borrow_mut().clear();
    }

    /// Whether the job has looked at something that it has not begun to copy.
    #[cfg(test)]
    pub(crate) fn is_planned(&self) -> bool {
        !self.planned.get().is_empty()
    }

    /// Bytes that have to be copied.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.dirty.borrow().dirty_bytes()
    }

    /// How many bytes more have to be copied than when this was asked last, but for what was [taken](Self::take_run).
    pub(crate) fn take_change(&self) -> i64 {
        self.change_bytes.take()
    }

    /// What has to be copied next, at or behind `from` and then from the beginning again: changed granules side by side, of
    /// at most `longest` bytes, in whole units of `unit_bytes`. They have not changed any more; how many bytes they were.
    pub(crate) fn take_run(
        &self,
        from: u64,
        longest: u64,
        unit_bytes: u64,
    ) -> Option<(ByteRange, u64)> {
        let mut dirty = self.dirty.borrow_mut();
        let run = dirty.run_from(from, longest);
        let run = run.or_else(|| dirty.run_from(0, longest))?;
        let whole = dirty.outward(run.align_outward(unit_bytes));
        let taken = dirty.clear(whole);
        Some((whole, taken))
    }

    /// Ends when something has changed since the last call. One caller at a time.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Keeps new writes waiting, and waits until those inside have ended. Their waiting ends with what is returned.
    ///
    /// # Cancel safety
    /// Nobody waits then.
    pub(crate) async fn quiet(&self) -> Quiet {
        Quiet {
            _closed: self.gate.close_again(Way::Write).await,
        }
    }

    /// Whether new writes wait.
    pub(crate) fn is_quiet(&self) -> bool {
        self.gate.is_closed(Way::Write)
    }

    /// Ends once no new write has to wait.
    pub(crate) async fn until_loud(&self) {
        self.gate.until_open(Way::Write).await;
    }

    /// The job has ended: nothing is tracked any more, and no write that comes now goes to the other side.
    pub(crate) fn end(&self) {
        self.is_over.set(true);
        self.other_side.borrow_mut().take();
    }

    /// Waits until nothing of what came before goes to the other side any more.
    pub(crate) async fn other_side_left(&self) {
        let everything = ByteRange::new(0, u64::MAX);
        self.turn(everything, Doing::WriteBoth).come().await;
    }

    /// The target has taken the source's place: requests go there. No write is inside.
    pub(crate) fn go_over_to(&self, target: Rc<dyn Node>) {
        self.end();
        *self.successor.borrow_mut() = Some(target);
    }

    pub(super) fn successor(&self) -> Option<Rc<dyn Node>> {
        self.successor.borrow().clone()
    }
}

/// As long as it is there, no write is inside a filter and new ones wait.
#[must_use = "writes go on when it is dropped"]
pub(crate) struct Quiet {
    _closed: Closed,
}
