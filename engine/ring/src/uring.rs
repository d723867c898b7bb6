//! [`Uring`]: one io_uring, its operations in flight, its registered files and buffers.
//!
//! Everything the kernel may still touch (buffer, descriptor) sits in the in-flight table until its completion has been
//! reaped. A waiting future holds only a number; dropping it abandons the answer and frees nothing.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use blockyard_storage::Buffer;
use blockyard_storage::buffer::BufferPool;
use io_uring::{IoUring, opcode, squeue, types};
use slab::Slab;

use crate::entries::{Direction, Target};
use crate::host_file::HostFile;
use crate::neighbours::{Joint, Neighbours, SHORT_BYTES_MAX, Single};
use crate::ring_socket::Message;
use crate::wake::RemoteWaker;

/// Files that can be registered at once; more work unregistered.
const FILES_MAX: u32 = 1024;

/// A transfer through the page cache is a copy in memory. From this length on, kernel workers make it, so that it uses
/// another core and this thread goes on; below, handing over costs more than it brings.
const COPIED_APART_BYTES: usize = 256 << 10;

/// Once transfers of so many bytes are queued the kernel begins them, so that it works on them while more are being made ready. A
/// system call for each of these is little beside what they move; with less they all wait for the end of the thread's round.
const BEGUN_EARLY_BYTES: u64 = 128 << 10;

/// Marks the completion of the read that listens to the bell.
const BELL: u64 = u64::MAX;

/// io_uring_enter's flag to run completions that wait for the task.
const ENTER_GETEVENTS: u32 = 1;

/// A file's place in the ring's table, if it got one.
pub(crate) struct FileSlot(Option<u32>);

/// Memory that the kernel may touch.
pub(crate) enum Held {
    /// Filled, or written from.
    Buffer(Buffer),
    /// Sent.
    Message(Box<Message>),
    /// The addresses of neighbours, each of which is in flight by itself as well and holds its buffer.
    Joint(Joint),
}

/// One operation the kernel may be working on.
struct InFlight {
    held: Held,
    /// Keeps the descriptor open until the kernel is done with it.
    _file: Arc<OwnedFd>,
    /// The place in the table of files that its entry names.
    file_index: Option<u32>,
    result: Option<i32>,
    waker: Option<Waker>,
    abandoned: bool,
}

/// One ring, on one thread.
pub(crate) struct Uring {
    ring: RefCell<IoUring>,
    in_flight: RefCell<Slab<InFlight>>,
    /// Entries that found the submission queue full.
    backlog: RefCell<VecDeque<squeue::Entry>>,
    waker: RemoteWaker,
    /// Where the kernel puts the bell's count.
    bell_count: Box<Cell<u64>>,
    bell_armed: Cell<bool>,
    /// Transfers that the kernel has not been told of, in bytes.
    untold_bytes: Cell<u64>,
    /// Transfers that are not in the queue yet, as neighbours of them may follow.
    neighbours: RefCell<Neighbours>,
    pool: BufferPool,
    /// Which slots of the pool the ring knows; `None`: buffers cannot be registered here.
    known_slots: RefCell<Option<Vec<bool>>>,
    free_files: RefCell<Vec<u32>>,
    /// Places whose file is gone, but which an entry that the kernel has not seen yet may still name.
    retired_files: RefCell<Vec<u32>>,
}

/// A ring with the best set-up this kernel takes.
///
/// # Errors
/// What io_uring_setup(2) says when it takes none.
pub(crate) fn set_up(depth: u32) -> io::Result<IoUring> {
    let best = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all()
        .setup_no_sqarray()
        .setup_cqsize(depth * 4)
        .build(depth);
    best.or_else(|_| {
        IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .setup_cqsize(depth * 4)
            .build(depth)
    })
    .or_else(|_| {
        IoUring::builder()
            .setup_coop_taskrun()
            .setup_cqsize(depth * 4)
            .build(depth)
    })
    .or_else(|_| IoUring::new(depth))
}

impl Uring {
    /// Opens a ring of `depth` entries on this thread.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn open(depth: u32, pool: BufferPool, waker: RemoteWaker) -> io::Result<Rc<Self>> {
        let ring = set_up(depth)?;
        let submitter = ring.submitter();
        let files = submitter.register_files_sparse(FILES_MAX).is_ok();
        let slots = u32::try_from(pool.slots_max()).unwrap_or(0);
        let buffers = submitter.register_buffers_sparse(slots).is_ok();
        // Buffered writes and the like must not start a thread each.
        let _ = submitter.register_iowq_max_workers(&mut [16, 16]);
        Ok(Rc::new(Self {
            ring: RefCell::new(ring),
            in_flight: RefCell::default(),
            backlog: RefCell::default(),
            waker,
            bell_count: Box::new(Cell::new(0)),
            bell_armed: Cell::new(false),
            untold_bytes: Cell::new(0),
            neighbours: RefCell::default(),
            known_slots: RefCell::new(buffers.then(|| vec![false; pool.slots_max()])),
            pool,
            free_files: RefCell::new(if files {
                (0..FILES_MAX).rev().collect()
            } else {
                Vec::new()
            }),
            retired_files: RefCell::default(),
        }))
    }

    /// Puts a file into the ring's table, if there is room.
    pub(crate) fn register_file(&self, file: &OwnedFd) -> FileSlot {
        let Some(index) = self.free_files.borrow_mut().pop() else {
            return FileSlot(None);
        };
        let ring = self.ring.borrow();
        match ring
            .submitter()
            .register_files_update(index, &[file.as_raw_fd()])
        {
            Ok(_) => FileSlot(Some(index)),
            Err(_) => {
                self.free_files.borrow_mut().push(index);
                FileSlot(None)
            }
        }
    }

    /// Takes a file out of the table. What is in flight on it keeps its place: nobody else's file may come there before
    /// an abandoned entry that names it has reached the kernel.
    pub(crate) fn release_file(&self, slot: &FileSlot) {
        let Some(index) = slot.0 else {
            return;
        };
        if self.names_file(index) {
            self.retired_files.borrow_mut().push(index);
        } else {
            self.free_file(index);
        }
    }

    fn names_file(&self, index: u32) -> bool {
        let table = self.in_flight.borrow();
        let mut unended = table.iter().filter(|(_, op)| op.result.is_none());
        unended.any(|(_, op)| op.file_index == Some(index))
    }

    /// Frees the retired places that no entry names any more.
    fn free_retired(&self) {
        if self.retired_files.borrow().is_empty() {
            return;
        }
        let retired = self.retired_files.take();
        let (named, free): (Vec<u32>, Vec<u32>) = retired
            .into_iter()
            .partition(|index| self.names_file(*index));
        self.retired_files.replace(named);
        for index in free {
            self.free_file(index);
        }
    }

    fn free_file(&self, index: u32) {
        let ring = self.ring.borrow();
        if ring.submitter().register_files_update(index, &[-1]).is_ok() {
            self.free_files.borrow_mut().push(index);
        }
    }

    /// Transfers `buffer[done..]` at `offset + done`, once.
    pub(crate) fn transfer(
        self: &Rc<Self>,
        direction: Direction,
        file: &HostFile,
        slot: &FileSlot,
        offset: u64,
        mut buffer: Buffer,
        done: usize,
    ) -> Operating {
        let index = self.registered_index(&buffer);
        let bytes = &mut buffer.as_mut_slice()[done..];
        let address = bytes.as_mut_ptr();
        let length = u32::try_from(bytes.len()).unwrap_or(!4095_u32);
        let at = offset + done as u64;
        let is_copied_apart = !file.is_direct() && bytes.len() >= COPIED_APART_BYTES;
        let may_be_joined = file.is_direct() && length <= SHORT_BYTES_MAX;
        let file = file.descriptor();
        let target = Target::of(file, slot.0);
        let mut entry = target.entry(direction, address, length, at, index);
        if is_copied_apart {
            entry = entry.flags(squeue::Flags::ASYNC);
        }
        let (number, entry) = self.hold(Held::Buffer(buffer), file.clone(), slot.0, entry);
        if may_be_joined {
            let single = Single {
                number,
                address,
                length,
                offset: at,
                entry,
            };
            let mut neighbours = self.neighbours.borrow_mut();
            let leaving = neighbours.add(direction, file, target, single);
            drop(neighbours);
            if let Some(joint) = leaving {
                self.let_go(joint);
            }
        } else {
            self.queue(entry);
            self.begin_early(u64::from(length));
        }
        self.operating(number)
    }

    /// Queues neighbours as one.
    fn let_go(&self, joint: Joint) {
        let length = joint.length();
        let entry = match joint.alone() {
            Some(single) => single.entry.clone(),
            None => {
                let (entry, file) = (joint.entry(), joint.file().clone());
                // Each of them stands for the file's place in the table.
                self.hold(Held::Joint(joint), file, None, entry).1
            }
        };
        self.queue(entry);
        self.begin_early(length);
    }

    /// Queues what waits for neighbours.
    fn let_all_go(&self) {
        loop {
            let next = self.neighbours.borrow_mut().close_one();
            let Some(joint) = next else {
                return;
            };
            self.let_go(joint);
        }
    }

    /// So many more bytes are queued.
    fn begin_early(&self, length: u64) {
        let untold = self.untold_bytes.get() + length;
        let is_enough = untold >= BEGUN_EARLY_BYTES;
        self.untold_bytes.set(if is_enough { 0 } else { untold });
        if is_enough {
            // What it does not take now, and what it has to say about that, is left for the next turn.
            let _ = self.ring.borrow().submitter().submit();
        }
    }

    /// Queues an entry whose addresses lead into what is `held`, on a file that is at `file_index` of the table, if it is there.
    pub(crate) fn submit(
        self: &Rc<Self>,
        held: Held,
        file: Arc<OwnedFd>,
        file_index: Option<u32>,
        entry: squeue::Entry,
    ) -> Operating {
        let (number, entry) = self.hold(held, file, file_index, entry);
        self.queue(entry);
        self.operating(number)
    }

    /// Keeps what the kernel may touch until `entry` has ended, which has the number of that place from now on.
    fn hold(
        &self,
        held: Held,
        file: Arc<OwnedFd>,
        file_index: Option<u32>,
        entry: squeue::Entry,
    ) -> (usize, squeue::Entry) {
        let number = self.in_flight.borrow_mut().insert(InFlight {
            held,
            _file: file,
            file_index,
            result: None,
            waker: None,
            abandoned: false,
        });
        (number, entry.user_data(number as u64))
    }

    fn operating(self: &Rc<Self>, number: usize) -> Operating {
        Operating {
            uring: self.clone(),
            number: Some(number),
        }
    }

    /// The buffer's index in the ring's table, registering its slot when it is seen for the first time.
    fn registered_index(&self, buffer: &Buffer) -> Option<u16> {
        let mut known = self.known_slots.borrow_mut();
        let slots = known.as_mut()?;
        let slot = buffer.slot_of(&self.pool)?;
        let seen = slots.get_mut(usize::from(slot))?;
        if !*seen {
            let (address, length) = buffer.slot_memory()?;
            let range = libc::iovec {
                iov_base: std::ptr::with_exposed_provenance_mut(address),
                iov_len: length,
            };
            // SAFETY: the slot's memory is there now, as `buffer` is a part of it, and the kernel keeps its pages from here on.
            // A slot is never moved, and none is freed before the pool (of which `self.pool` is a handle) but with its number,
            // which no buffer has after that; so whoever comes with this number means these pages, as long as this ring lives.
            let outcome = unsafe {
                self.ring.borrow().submitter().register_buffers_update(
                    u32::from(slot),
                    &[range],
                    None,
                )
            };
            if outcome.is_err() {
                // Locked memory has run out: everything goes unregistered from now on.
                *known = None;
                return None;
            }
            *seen = true;
        }
        Some(slot)
    }

    fn queue(&self, entry: squeue::Entry) {
        let mut backlog = self.backlog.borrow_mut();
        if !backlog.is_empty() || !self.push(&entry) {
            backlog.push_back(entry);
        }
    }

    fn push(&self, entry: &squeue::Entry) -> bool {
        let mut ring = self.ring.borrow_mut();
        // SAFETY: what the entry points to is owned by the in-flight table (or is the bell's box, owned by `self`) until its
        // completion is reaped; `Drop` waits for that.
        unsafe { ring.submission().push(entry).is_ok() }
    }

    /// Submits everything, waits for a completion, a call or the timeout, and wakes whose operation has ended.
    ///
    /// # Errors
    /// When the ring itself fails.
    pub(crate) fn turn(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.arm_bell();
        self.let_all_go();
        self.untold_bytes.set(0);
        self.refill();
        let nothing_left = self.backlog.borrow().is_empty();
        let may_wait = timeout != Some(Duration::ZERO) && nothing_left && self.waker.fall_asleep();
        let outcome = if may_wait {
            self.enter_and_wait(timeout)
        } else {
            self.enter()
        };
        self.waker.wake_up();
        outcome?;
        self.reap();
        self.free_retired();
        Ok(())
    }

    fn refill(&self) {
        loop {
            let Some(entry) = self.backlog.borrow().front().cloned() else {
                return;
            };
            if !self.push(&entry) {
                return;
            }
            self.backlog.borrow_mut().pop_front();
        }
    }

    fn enter_and_wait(&self, timeout: Option<Duration>) -> io::Result<()> {
        let ring = self.ring.borrow();
        let outcome = match timeout {
            None => ring.submitter().submit_and_wait(1),
            Some(timeout) => {
                let time = types::Timespec::from(timeout);
                let arguments = types::SubmitArgs::new().timespec(&time);
                ring.submitter().submit_with_args(1, &arguments)
            }
        };
        forgive(outcome)
    }

    /// Submits and lets the kernel deliver what has ended, without waiting.
    fn enter(&self) -> io::Result<()> {
        let mut ring = self.ring.borrow_mut();
        let waiting = u32::try_from(ring.submission().len()).unwrap_or(u32::MAX);
        // SAFETY: no signal mask is passed, and every queued entry obeys the contract of `push`.
        let outcome = unsafe {
            ring.submitter()
                .enter::<libc::sigset_t>(waiting, 0, ENTER_GETEVENTS, None)
        };
        forgive(outcome)
    }

    fn reap(&self) {
        loop {
            let completion = {
                let mut ring = self.ring.borrow_mut();
                ring.completion().next()
            };
            let Some(completion) = completion else {
                return;
            };
            if completion.user_data() == BELL {
                self.bell_armed.set(false);
                continue;
            }
            let Ok(number) = usize::try_from(completion.user_data()) else {
                continue;
            };
            self.ended(number, completion.result());
        }
    }

    /// An operation has ended.
    fn ended(&self, number: usize, result: i32) {
        let mut table = self.in_flight.borrow_mut();
        let Some(operation) = table.get_mut(number) else {
            return;
        };
        let is_joint = matches!(operation.held, Held::Joint(_));
        if is_joint || operation.abandoned {
            let ended = table.remove(number);
            drop(table);
            if let Held::Joint(joint) = ended.held {
                self.joint_ended(joint, result);
            }
            return;
        }
        operation.result = Some(result);
        let waker = operation.waker.take();
        drop(table);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Ends what was done whole; the rest goes by itself.
    fn joint_ended(&self, joint: Joint, result: i32) {
        for (single, is_done) in joint.ended(result) {
            match (is_done, i32::try_from(single.length)) {
                (true, Ok(count)) => self.ended(single.number, count),
                _ => self.queue(single.entry),
            }
        }
    }

    /// Keeps a read on the bell in flight, so that a call ends a wait.
    fn arm_bell(&self) {
        if self.bell_armed.replace(true) {
            return;
        }
        let count = self.bell_count.as_ptr().cast::<u8>();
        let entry = opcode::Read::new(types::Fd(self.waker.bell().as_raw_fd()), count, 8).build();
        self.queue(entry.user_data(BELL));
    }
}

impl Drop for Uring {
    /// Waits for everything in flight: the kernel must not write into memory that is gone.
    fn drop(&mut self) {
        // Ends the read on the bell. Nobody arms it again.
        let _ = rustix::io::write(self.waker.bell(), &1_u64.to_le_bytes());
        self.let_all_go();
        let mut patience = 50;
        while patience > 0
            && (self.bell_armed.get()
                || self
                    .in_flight
                    .borrow()
                    .iter()
                    .any(|(_, op)| op.result.is_none()))
        {
            patience -= 1;
            self.refill();
            if self
                .enter_and_wait(Some(Duration::from_millis(100)))
                .is_err()
            {
                break;
            }
            self.reap();
        }
        if self
            .in_flight
            .borrow()
            .iter()
            .any(|(_, op)| op.result.is_none())
        {
            // A disk that still does not answer: its buffers are left alone for good.
            std::mem::forget(self.in_flight.take());
        }
    }
}

/// Interruptions, time-outs and a full completion queue are no failures: the next turn goes on.
fn forgive(outcome: io::Result<usize>) -> io::Result<()> {
    match outcome {
        Ok(_) => Ok(()),
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN)
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

impl Held {
    /// The buffer, where it was one.
    pub(crate) fn into_buffer(self) -> Buffer {
        match self {
            Held::Buffer(buffer) => buffer,
            Held::Message(_) | Held::Joint(_) => Buffer::zeroed(0),
        }
    }
}

/// Waits for one operation. Comes back with what the kernel has held, and its answer: a count, or a negative error number.
pub(crate) struct Operating {
    uring: Rc<Uring>,
    number: Option<usize>,
}

impl Future for Operating {
    type Output = (Held, i32);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<(Held, i32)> {
        let uring = self.uring.clone();
        let mut table = uring.in_flight.borrow_mut();
        let number = self.number.expect("not polled after its end");
        match table[number].result {
            Some(result) => {
                self.number = None;
                Poll::Ready((table.remove(number).held, result))
            }
            None => {
                table[number].waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Operating {
    fn drop(&mut self) {
        let Some(number) = self.number else {
            return;
        };
        let mut table = self.uring.in_flight.borrow_mut();
        if table[number].result.is_some() {
            let ended = table.remove(number);
            drop(table);
            drop(ended);
        } else {
            table[number].abandoned = true;
            table[number].waker = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;
    use crate::host_file::OpenMode;

    #[test]
    fn neighbours_are_one_request_of_the_kernel() {
        let bell = eventfd(0, EventfdFlags::CLOEXEC).expect("made");
        let Ok(uring) = Uring::open(8, BufferPool::new(0), RemoteWaker::new(bell)) else {
            eprintln!("SKIPPED: no io_uring here");
            return;
        };
        let mut file = tempfile::tempfile().expect("made");
        let bytes: Vec<u8> = (0..40_u8).flat_map(|nth| [nth; 4096]).collect();
        file.write_all(&bytes).expect("written");
        let mode = OpenMode {
            direct: true,
            ..OpenMode::default()
        };
        let file = HostFile::from_fd(file.into(), mode).expect("taken over");
        let slot = uring.register_file(file.descriptor());
        let mut reads: Vec<_> = (0..40_u64)
            .map(|nth| {
                let buffer = Buffer::zeroed(4096);
                uring.transfer(Direction::Read, &file, &slot, nth * 4096, buffer, 0)
            })
            .collect();
        uring.let_all_go();
        assert_eq!(uring.in_flight.borrow().len(), 40 + 1);
        let mut cx = Context::from_waker(Waker::noop());
        for (nth, read) in reads.iter_mut().enumerate() {
            let (held, result) = loop {
                match Pin::new(&mut *read).poll(&mut cx) {
                    Poll::Ready(ended) => break ended,
                    Poll::Pending => uring.turn(Some(Duration::from_secs(1))).expect("goes on"),
                }
            };
            assert_eq!(result, 4096);
            let buffer = held.into_buffer();
            assert!(
                buffer
                    .as_slice()
                    .iter()
                    .all(|byte| usize::from(*byte) == nth)
            );
        }
        assert!(uring.in_flight.borrow().is_empty());
    }
}
