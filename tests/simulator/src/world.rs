//! [`World`]: all disks of a test, the operations that wait, the order in which they end, and the power.

use std::cell::{Ref, RefCell};
use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use blockyard_storage::error::{EINVAL, ENOSPC, EXDEV};
use blockyard_storage::{Buffer, ByteRange, Extent, MemoryStorage, Operation, Storage};

use crate::change::{Change, now};
use crate::disk::{Disk, DiskOptions, DiskState};
use crate::faults::{Fault, Verdict, decide};
use crate::seed::Seed;
use crate::storage::Poison;
use crate::trace::{Entry, Happened, Trace};

/// What the buffer of a failed read holds.
const GARBAGE: u8 = 0xee;

/// Disks that share one order of events and one power supply. Clones are the same world. When a test panics, the world
/// prints its seed and its trace.
#[derive(Clone)]
pub struct World(Rc<RefCell<State>>);

struct State {
    seed_number: u64,
    seed: Seed,
    disks: Vec<DiskState>,
    waiting: Vec<Waiting>,
    faults: Vec<Fault>,
    failures: u64,
    steps: u64,
    issued: u64,
    cuts: u64,
    trace: Trace,
}

/// What was asked for, as the trace shows it.
#[derive(Clone, Copy)]
struct Asked {
    number: u64,
    disk: usize,
    operation: Operation,
    range: ByteRange,
}

/// An operation that was issued and has not ended.
struct Waiting {
    asked: Asked,
    task: Task,
    errno: Option<i32>,
    not_before_step: u64,
    answer: Rc<RefCell<Slot>>,
}

/// What an operation does when it ends.
pub(crate) enum Task {
    Read(Buffer),
    Write(Buffer, Change),
    Change(Change),
    Map { extents_max: usize },
    Sync { changes: u64, poison: Poison },
}

impl Task {
    pub(crate) fn write(offset: u64, from: Buffer) -> Self {
        let bytes = from.as_slice().to_vec();
        Task::Write(from, Change::Write { offset, bytes })
    }

    /// What it changes, if it changes anything.
    fn change(&self) -> Option<&Change> {
        match self {
            Task::Write(_, change) | Task::Change(change) => Some(change),
            Task::Read(_) | Task::Map { .. } | Task::Sync { .. } => None,
        }
    }
}

/// How an operation ended.
pub(crate) struct Answer {
    pub(crate) buffer: Option<Buffer>,
    pub(crate) outcome: Result<Vec<Extent>, i32>,
}

impl Answer {
    /// The answer to what was not even tried.
    pub(crate) fn refused(task: Task, errno: i32) -> Self {
        let buffer = match task {
            Task::Read(buffer) | Task::Write(buffer, _) => Some(buffer),
            Task::Change(_) | Task::Map { .. } | Task::Sync { .. } => None,
        };
        Self {
            buffer,
            outcome: Err(errno),
        }
    }
}

#[derive(Default)]
struct Slot {
    answer: Option<Answer>,
    waker: Option<Waker>,
}

/// Waits for the end of an operation. Dropping it abandons the answer; the operation still takes effect.
struct Ticket(Rc<RefCell<Slot>>);

impl Future for Ticket {
    type Output = Answer;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answer> {
        let mut slot = self.0.borrow_mut();
        match slot.answer.take() {
            Some(answer) => Poll::Ready(answer),
            None => {
                slot.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl World {
    /// A world without disks and faults.
    pub fn new(seed: u64) -> Self {
        Self(Rc::new(RefCell::new(State {
            seed_number: seed,
            seed: Seed::new(seed),
            disks: Vec::new(),
            waiting: Vec::new(),
            faults: Vec::new(),
            failures: 0,
            steps: 0,
            issued: 0,
            cuts: 0,
            trace: Trace::default(),
        })))
    }

    /// A new disk, one hole.
    pub fn disk(&self, name: &str, options: DiskOptions) -> Disk {
        let mut state = self.0.borrow_mut();
        state.disks.push(DiskState::new(name, options));
        Disk::new(self.clone(), state.disks.len() - 1)
    }

    /// Something goes wrong from now on.
    pub fn add_fault(&self, fault: Fault) {
        self.0.borrow_mut().faults.push(fault);
    }

    /// Nothing goes wrong any more.
    pub fn heal(&self) {
        self.0.borrow_mut().faults.clear();
    }

    /// Operations that faults made fail so far.
    pub fn failures(&self) -> u64 {
        self.0.borrow().failures
    }

    /// Operations that have ended so far.
    pub fn steps(&self) -> u64 {
        self.0.borrow().steps
    }

    /// Operations that were issued and have not ended, abandoned ones too.
    pub fn in_flight(&self) -> usize {
        self.0.borrow().waiting.len()
    }

    /// Power cuts so far.
    pub fn cuts(&self) -> u64 {
        self.0.borrow().cuts
    }

    /// What happened so far.
    pub fn trace(&self) -> Ref<'_, Trace> {
        Ref::map(self.0.borrow(), |state| &state.trace)
    }

    /// Ends one waiting operation, chosen by the seed; `false`: none waits.
    pub fn step(&self) -> bool {
        let (slot, answer) = {
            let mut state = self.0.borrow_mut();
            let Some(waiting) = state.choose() else {
                return false;
            };
            state.end(waiting)
        };
        let waker = {
            let mut slot = slot.borrow_mut();
            slot.answer = Some(answer);
            slot.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    /// The power goes and comes back: every disk holds its durable bytes and what the seed left of the rest, waiting
    /// operations never end, and storages opened before are dead.
    pub fn cut_power(&self) {
        let mut state = self.0.borrow_mut();
        for index in 0..state.disks.len() {
            let left = state.after_cut(index, &state.seed);
            state.disks[index].restart(left);
        }
        let lost: Vec<Waiting> = state.waiting.drain(..).collect();
        for waiting in &lost {
            state.note(waiting.asked, Happened::Cut);
        }
        state.cuts += 1;
        drop(state);
        // Buffers may wake somebody when they are given back.
        drop(lost);
    }

    pub(crate) fn with_disk<T>(&self, disk: usize, look: impl FnOnce(&mut DiskState) -> T) -> T {
        look(&mut self.0.borrow_mut().disks[disk])
    }

    pub(crate) fn disk_after_cut(&self, disk: usize, seed: &Seed) -> MemoryStorage {
        self.0.borrow().after_cut(disk, seed)
    }

    /// What `to` will hold when it shares the extents of the disk behind `source`.
    pub(crate) fn shared_bytes(
        &self,
        disk: usize,
        source: &Arc<OwnedFd>,
        from: u64,
        to: ByteRange,
    ) -> Result<Vec<u8>, i32> {
        let state = self.0.borrow();
        let is_source = |disk: &&DiskState| {
            let descriptor = disk.descriptor.as_ref();
            descriptor.is_some_and(|descriptor| Arc::ptr_eq(descriptor, source))
        };
        let source = state.disks.iter().find(is_source).ok_or(EXDEV)?;
        if state.disks[disk].descriptor.is_none() {
            return Err(EXDEV);
        }
        let behind_end = from + to.length() > source.visible.facts().length_bytes;
        if behind_end || !(from | to.offset()).is_multiple_of(4096) {
            return Err(EINVAL);
        }
        let buffer = Buffer::zeroed(to.length() as usize);
        Ok(now(source.visible.read(from, buffer))
            .buffer
            .as_slice()
            .to_vec())
    }

    /// Issues an operation and decides what goes wrong with it.
    pub(crate) fn issue(
        &self,
        disk: usize,
        operation: Operation,
        range: ByteRange,
        task: Task,
    ) -> impl Future<Output = Answer> + use<> {
        let mut state = self.0.borrow_mut();
        let State { faults, seed, .. } = &mut *state;
        let Verdict { errno, slow_steps } = decide(faults, disk, operation, seed);
        state.issued += 1;
        let not_before_step = state.steps.saturating_add(slow_steps);
        let answer = Rc::default();
        let asked = Asked {
            number: state.issued,
            disk,
            operation,
            range,
        };
        state.note(asked, Happened::Issued);
        state.waiting.push(Waiting {
            asked,
            task,
            errno,
            not_before_step,
            answer: Rc::clone(&answer),
        });
        Ticket(answer)
    }
}

impl State {
    fn note(&mut self, asked: Asked, happened: Happened) {
        let entry = Entry {
            step: self.steps,
            number: asked.number,
            disk: self.disks[asked.disk].name.clone(),
            operation: asked.operation,
            range: asked.range,
            happened,
        };
        self.trace.push(entry);
    }

    /// One of those whose time has come; of those that are next, if it has for none.
    fn choose(&mut self) -> Option<Waiting> {
        let earliest = self
            .waiting
            .iter()
            .map(|waiting| waiting.not_before_step)
            .min()?;
        let now = self.steps.max(earliest);
        let due = |place: &usize| self.waiting[*place].not_before_step <= now;
        let due: Vec<usize> = (0..self.waiting.len()).filter(due).collect();
        let chosen = *self.seed.pick(&due);
        Some(self.waiting.remove(chosen))
    }

    fn end(&mut self, waiting: Waiting) -> (Rc<RefCell<Slot>>, Answer) {
        let Waiting {
            asked,
            task,
            errno,
            answer,
            ..
        } = waiting;
        self.failures += u64::from(errno.is_some());
        let ended = match task {
            Task::Read(buffer) => self.read(asked, buffer, errno),
            Task::Write(buffer, change) => Answer {
                buffer: Some(buffer),
                outcome: self.change(asked.disk, change, errno),
            },
            Task::Change(change) => Answer {
                buffer: None,
                outcome: self.change(asked.disk, change, errno),
            },
            Task::Map { extents_max } => Answer {
                buffer: None,
                outcome: self.map(asked, extents_max, errno),
            },
            Task::Sync { changes, poison } => Answer {
                buffer: None,
                outcome: self.sync(asked.disk, changes, &poison, errno),
            },
        };
        self.steps += 1;
        let errno = ended.outcome.as_ref().err().copied();
        self.note(asked, Happened::Ended(errno));
        (answer, ended)
    }

    fn read(&self, asked: Asked, mut buffer: Buffer, errno: Option<i32>) -> Answer {
        if let Some(errno) = errno {
            buffer.as_mut_slice().fill(GARBAGE);
            return Answer {
                buffer: Some(buffer),
                outcome: Err(errno),
            };
        }
        let visible = &self.disks[asked.disk].visible;
        let read = now(visible.read(asked.range.offset(), buffer));
        Answer {
            buffer: Some(read.buffer),
            outcome: Ok(Vec::new()),
        }
    }

    fn map(
        &self,
        asked: Asked,
        extents_max: usize,
        errno: Option<i32>,
    ) -> Result<Vec<Extent>, i32> {
        if let Some(errno) = errno {
            return Err(errno);
        }
        let visible = &self.disks[asked.disk].visible;
        now(visible.allocation(asked.range, extents_max)).map_err(|error| error.errno)
    }

    /// Changes a disk; a failure leaves nothing, a part or all of the change behind.
    fn change(
        &mut self,
        disk: usize,
        change: Change,
        errno: Option<i32>,
    ) -> Result<Vec<Extent>, i32> {
        let disk = &mut self.disks[disk];
        if let Some(errno) = errno {
            let pieces = match (&change, self.seed.below(3)) {
                (Change::Resize { .. }, _) | (_, 0) => Vec::new(),
                (_, 1) => change.torn(&self.seed),
                _ => vec![change],
            };
            for piece in pieces {
                // Nor does a failed change take room that is not there.
                if disk.fitting(&piece) == piece.range() {
                    disk.change(piece);
                }
            }
            return Err(errno);
        }
        let fitting = disk.fitting(&change);
        if fitting != change.range() {
            if !fitting.is_empty() {
                disk.change(change.part(fitting));
            }
            return Err(ENOSPC);
        }
        disk.change(change);
        Ok(Vec::new())
    }

    fn sync(
        &mut self,
        disk: usize,
        changes: u64,
        poison: &Poison,
        errno: Option<i32>,
    ) -> Result<Vec<Extent>, i32> {
        let disk = &mut self.disks[disk];
        // Another sync of this storage may have failed meanwhile.
        let Some(errno) = poison.get().or(errno) else {
            disk.make_durable(changes);
            return Ok(Vec::new());
        };
        disk.give_up(changes, &self.seed);
        poison.set(Some(errno));
        Err(errno)
    }

    fn after_cut(&self, disk: usize, seed: &Seed) -> MemoryStorage {
        let in_flight = self
            .waiting
            .iter()
            .filter(|waiting| waiting.asked.disk == disk);
        self.disks[disk].after_cut(in_flight.filter_map(|waiting| waiting.task.change()), seed)
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "the simulated world of seed {}:\n{}",
                self.seed_number, self.trace
            );
        }
    }
}
