//! [`TableCache`]: pieces ("slices") of L2 tables or of refcount blocks in memory, as many as its budget allows.
//!
//! Promises: a slice that was changed stays until it has been written; all others may go, those that were used least lately
//! first. Everything but the reading itself happens at once, so that a table that is there costs one look-up.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
use std::rc::Rc;
use std::task::Poll;

use crate::qcow2::units::HostOffset;
use crate::qcow2::waiting::Wakers;

/// Changed bytes are written in multiples of this, or of the slice where that is smaller: a sector of most disks.
const WRITE_UNIT_BYTES: usize = 4096;

/// Fewest slices that a cache holds: several requests need one of their own at the same time.
const SLICES_MIN: usize = 4;

/// Slices of tables of one kind.
pub(super) struct TableCache {
    slice_bytes: usize,
    slices_max: usize,
    state: RefCell<State>,
    /// Wait for a load to end.
    loads: Wakers,
}

#[derive(Default)]
struct State {
    slots: Vec<Slot>,
    places: HashMap<u64, usize, BuildHasherDefault<FoldHasher>>,
    /// Where the search for a slot that may go begins.
    hand: usize,
    /// First bytes of the slices that are being read.
    loading: Vec<u64>,
}

struct Slot {
    at: u64,
    bytes: Rc<Vec<u8>>,
    /// Since the hand passed last.
    used: Cell<bool>,
    /// Since it was written last.
    changed: Option<Range<usize>>,
    /// It was handed out to be written and the answer is not there yet.
    writing: bool,
}

/// What was changed in a slice, as it was at one instant.
pub(super) struct ChangedSlice {
    /// First byte of the slice in the file.
    pub(super) at: HostOffset,
    /// The whole slice.
    pub(super) bytes: Rc<Vec<u8>>,
    /// Which bytes of it were changed.
    pub(super) changed: Range<usize>,
}

/// How a load begins.
pub(super) enum Begin<'a> {
    /// The slice is there, or was being read by somebody else until now.
    Present,
    /// The caller has to read it; room is kept.
    Load(Loading<'a>),
    /// There is no room before something has been written.
    Full,
}

/// A slice that the caller reads. Others who need it wait until this is dropped.
pub(super) struct Loading<'a> {
    cache: &'a TableCache,
    at: HostOffset,
}

impl TableCache {
    /// A cache of slices of `slice_bytes`, a power of two, in about `budget_bytes`.
    pub(super) fn new(slice_bytes: usize, budget_bytes: u64) -> Self {
        let slices = budget_bytes / (slice_bytes as u64).max(1);
        Self {
            slice_bytes,
            slices_max: usize::try_from(slices)
                .unwrap_or(usize::MAX)
                .max(SLICES_MIN),
            state: RefCell::default(),
            loads: Wakers::default(),
        }
    }

    /// Size of a slice in bytes.
    pub(super) const fn slice_bytes(&self) -> usize {
        self.slice_bytes
    }

    /// Looks at the slice that begins at `at`; `None`: it has to be loaded.
    pub(super) fn read<R>(&self, at: HostOffset, look: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let state = self.state.borrow();
        let slot = state.slot(at)?;
        slot.used.set(true);
        Some(look(&slot.bytes))
    }

    /// Changes `range` of the slice that begins at `at`; `None`, and nothing done: it has to be loaded.
    pub(super) fn change<R>(
        &self,
        at: HostOffset,
        range: Range<usize>,
        change: impl FnOnce(&mut [u8]) -> R,
    ) -> Option<R> {
        let mut state = self.state.borrow_mut();
        let slot = state.slot_mut(at)?;
        slot.used.set(true);
        slot.changed = Some(joined(slot.changed.take(), range));
        Some(change(Rc::make_mut(&mut slot.bytes).as_mut_slice()))
    }

    /// Begins to load the slice at `at`, or waits while somebody else does.
    pub(super) async fn begin_load(&self, at: HostOffset) -> Begin<'_> {
        poll_fn(|cx| {
            let mut state = self.state.borrow_mut();
            if state.slot(at).is_some() {
                return Poll::Ready(Begin::Present);
            }
            let others_load = !state.loading.is_empty();
            if state.loading.contains(&at.0) || (!state.make_room(self.slices_max) && others_load) {
                self.loads.add(cx);
                return Poll::Pending;
            }
            if !state.make_room(self.slices_max) {
                return Poll::Ready(Begin::Full);
            }
            state.loading.push(at.0);
            Poll::Ready(Begin::Load(Loading { cache: self, at }))
        })
        .await
    }

    /// Puts a slice of a new table there, all of it changed; `false`, and nothing done, where there is no room.
    #[must_use]
    pub(super) fn put_new(&self, at: HostOffset, bytes: Vec<u8>) -> bool {
        let mut state = self.state.borrow_mut();
        if state.slot(at).is_none() && !state.make_room(self.slices_max) {
            return false;
        }
        let changed = 0..bytes.len();
        state.put(at, bytes, Some(changed));
        true
    }

    /// Forgets what is there of a table of `table_bytes`, changed or not.
    pub(super) fn forget_table(&self, table: HostOffset, table_bytes: u64) {
        let mut state = self.state.borrow_mut();
        for slice in 0..table_bytes / self.slice_bytes as u64 {
            let at = table.plus(slice * self.slice_bytes as u64);
            if let Some(place) = state.places.get(&at.0).copied() {
                state.remove(place);
            }
        }
    }

    /// Everything that was changed, as it is now. It is to be [given back](Self::given_back); until then it stays where it is.
    pub(super) fn take_changed(&self) -> Vec<ChangedSlice> {
        self.take_changed_of(|_| true)
    }

    /// The same of the slices that are `wanted` by their first bytes.
    pub(super) fn take_changed_of(&self, wanted: impl Fn(HostOffset) -> bool) -> Vec<ChangedSlice> {
        let mut state = self.state.borrow_mut();
        let mut taken = Vec::new();
        for slot in &mut state.slots {
            if !wanted(HostOffset(slot.at)) {
                continue;
            }
            if let Some(changed) = slot.changed.take() {
                slot.writing = true;
                taken.push(ChangedSlice {
                    at: HostOffset(slot.at),
                    bytes: Rc::clone(&slot.bytes),
                    changed: widened(changed, self.slice_bytes),
                });
            }
        }
        taken.sort_by_key(|slice| slice.at);
        taken
    }

    /// Slices that were handed out have been written, or maybe not.
    pub(super) fn given_back(&self, slices: &[ChangedSlice], written: bool) {
        for slice in slices {
            match written {
                true => self.written(slice),
                false => self.not_written(slice),
            }
        }
    }

    /// A slice that was handed out has been written.
    fn written(&self, slice: &ChangedSlice) {
        if let Some(slot) = self.state.borrow_mut().slot_mut(slice.at) {
            slot.writing = false;
        }
    }

    /// A slice that was handed out may not have been written: it counts as changed again.
    fn not_written(&self, slice: &ChangedSlice) {
        let mut state = self.state.borrow_mut();
        // A slot that does not wait for an answer belongs to another table that has come to this place.
        if let Some(slot) = state.slot_mut(slice.at).filter(|slot| slot.writing) {
            slot.writing = false;
            slot.changed = Some(joined(slot.changed.take(), slice.changed.clone()));
        }
    }

    /// Whether more than half of the room is taken by what was changed.
    pub(super) fn is_mostly_changed(&self) -> bool {
        let state = self.state.borrow();
        let changed = state.slots.iter().filter(|slot| !slot.may_go());
        changed.count() > self.slices_max / 2
    }

    /// Whether anything was changed and not written yet.
    pub(super) fn has_changes(&self) -> bool {
        let state = self.state.borrow();
        state.slots.iter().any(|slot| slot.changed.is_some())
    }

    /// Gives up what was not used since the last call and needs not be written.
    pub(super) fn drop_unused(&self) {
        let mut state = self.state.borrow_mut();
        let mut place = 0;
        while let Some(slot) = state.slots.get(place) {
            if slot.may_go() && !slot.used.replace(false) {
                state.remove(place);
            } else {
                place += 1;
            }
        }
        state.slots.shrink_to_fit();
    }
}

impl Loading<'_> {
    /// The slice has been read. `new`: it is not in the file yet and has to be written.
    pub(super) fn finish(self, bytes: Vec<u8>, new: bool) {
        let changed = new.then_some(0..bytes.len());
        self.cache.state.borrow_mut().put(self.at, bytes, changed);
    }
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let at = self.at.0;
        self.cache
            .state
            .borrow_mut()
            .loading
            .retain(|other| *other != at);
        self.cache.loads.wake_all();
    }
}

impl Slot {
    fn may_go(&self) -> bool {
        self.changed.is_none() && !self.writing
    }
}

impl State {
    fn slot(&self, at: HostOffset) -> Option<&Slot> {
        self.slots.get(*self.places.get(&at.0)?)
    }

    fn slot_mut(&mut self, at: HostOffset) -> Option<&mut Slot> {
        self.slots.get_mut(*self.places.get(&at.0)?)
    }

    fn put(&mut self, at: HostOffset, bytes: Vec<u8>, changed: Option<Range<usize>>) {
        let slot = Slot {
            at: at.0,
            bytes: Rc::new(bytes),
            used: Cell::new(true),
            changed,
            writing: false,
        };
        match self.slot_mut(at) {
            Some(present) => *present = slot,
            None => {
                self.places.insert(at.0, self.slots.len());
                self.slots.push(slot);
            }
        }
    }

    fn remove(&mut self, place: usize) {
        let gone = self.slots.swap_remove(place);
        self.places.remove(&gone.at);
        if let Some(moved) = self.slots.get(place) {
            self.places.insert(moved.at, place);
        }
    }

    /// Makes room for one more; `false` where everything has to stay.
    fn make_room(&mut self, slices_max: usize) -> bool {
        if self.slots.len() + self.loading.len() < slices_max {
            return true;
        }
        // Twice around: the first time only takes the marks of use away.
        for _ in 0..2 * self.slots.len() {
            self.hand = (self.hand + 1) % self.slots.len().max(1);
            let Some(slot) = self.slots.get(self.hand) else {
                return false;
            };
            if slot.may_go() && !slot.used.replace(false) {
                self.remove(self.hand);
                return true;
            }
        }
        false
    }
}

fn joined(before: Option<Range<usize>>, more: Range<usize>) -> Range<usize> {
    match before {
        Some(before) => before.start.min(more.start)..before.end.max(more.end),
        None => more,
    }
}

fn widened(range: Range<usize>, slice_bytes: usize) -> Range<usize> {
    let unit = WRITE_UNIT_BYTES.min(slice_bytes).max(1);
    range.start / unit * unit..range.end.next_multiple_of(unit).min(slice_bytes)
}

/// Spreads offsets, which end in many zeroes, over the whole of a hash.
#[derive(Default)]
pub(super) struct FoldHasher(u64);

impl Hasher for FoldHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        let product = u128::from(number ^ self.0) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product as u64) ^ ((product >> 64) as u64);
    }
}
