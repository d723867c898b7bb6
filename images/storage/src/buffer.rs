//! [`Buffer`]: owned bytes at a page-aligned address, stable while the kernel holds them, alone or from a
//! [`BufferPool`], which bounds the memory of all transfers of the daemon.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Buf, BytesMut};

/// Address alignment of every buffer, enough for direct I/O on any device.
pub const BUFFER_ALIGNMENT_BYTES: usize = 4096;

/// Largest buffer of a pool in bytes.
pub const BUFFER_SLOT_BYTES: usize = 1 << 20;

/// Up to this length a pool hands out less than a slot: a power of two, at least a page.
const SMALL_BYTES_MAX: usize = 64 << 10;

/// Buffers of small memory of one kind that a pool keeps for the next ones, at least: as many as one copy has in flight. They are
/// parts of slots, which are theirs.
const SMALL_KEPT: usize = 64;

/// Kinds of small memory, by length.
const SMALL_KINDS: usize = (SMALL_BYTES_MAX / BUFFER_ALIGNMENT_BYTES).trailing_zeros() as usize + 1;

/// Owned, page-aligned bytes. Moving a buffer never moves its bytes. Dropping one from a pool gives its memory back; dropping
/// the last part of one that was [split](Self::split_off) does.
#[derive(Debug)]
pub struct Buffer {
    memory: BytesMut,
    length: usize,
    home: Option<Arc<Home>>,
}

/// Where a buffer goes back to.
#[derive(Debug)]
struct Home {
    pool: BufferPool,
    slot: Option<Slot>,
    charged_bytes: usize,
}

/// Memory of [`BUFFER_SLOT_BYTES`] that has a number for as long as it lives.
#[derive(Clone, Copy, Debug)]
struct Slot {
    number: u16,
    address: usize,
}

/// Small memory, and what it is a part of.
#[derive(Debug)]
struct Small {
    slot: Option<Slot>,
    memory: BytesMut,
}

impl Buffer {
    /// A zero-filled buffer of `length` bytes outside any pool.
    pub fn zeroed(length: usize) -> Self {
        Self {
            memory: aligned(length),
            length,
            home: None,
        }
    }

    /// A buffer outside any pool with a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buffer = Self::zeroed(bytes.len());
        buffer.as_mut_slice().copy_from_slice(bytes);
        buffer
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes it could hold without moving.
    pub fn capacity(&self) -> usize {
        self.memory.len()
    }

    /// Makes it shorter, or longer within its capacity; bytes that come in hold old content.
    pub fn set_length(&mut self, length: usize) {
        self.length = length.min(self.capacity());
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.memory[..self.length]
    }

    /// The bytes, to change.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.memory[..self.length]
    }

    /// Takes everything from `at` on out of it, as a buffer of its own that begins there, aligned as `at` is. No byte moves.
    /// Requests of their own may fill both, or write them. [`join`](Self::join) puts them together again.
    pub fn split_off(&mut self, at: usize) -> Self {
        let at = at.min(self.length);
        let behind = Self {
            memory: self.memory.split_off(at),
            length: self.length - at,
            home: self.home.clone(),
        };
        self.length = at;
        behind
    }

    /// Puts back what [`split_off`](Self::split_off) took out of it. No byte moves. `false`: these are no neighbours, and
    /// `behind` is gone.
    pub fn join(&mut self, mut behind: Self) -> bool {
        let whole = self.length == self.memory.len();
        let end = self.memory.as_ptr_range().end;
        // Small buffers that are neighbours by chance are none.
        let one_home = match (&self.home, &behind.home) {
            (Some(home), Some(other)) => Arc::ptr_eq(home, other),
            (None, None) => true,
            _ => false,
        };
        let neighbours = whole && one_home && end == behind.memory.as_ptr();
        if neighbours {
            self.memory.unsplit(std::mem::take(&mut behind.memory));
            self.length += behind.length;
        }
        neighbours
    }

    /// The number of the slot of `pool` that this buffer, or what it was split from, lives in.
    pub fn slot_of(&self, pool: &BufferPool) -> Option<u16> {
        let home = self.home.as_ref()?;
        let slot = home
            .slot
            .filter(|_| Arc::ptr_eq(&home.pool.shared, &pool.shared))?;
        Some(slot.number)
    }

    /// Where the slot is that this lives in, and its length in bytes: what a ring registers once and uses again whenever a buffer
    /// comes from there. It stays there as long as any buffer, or the pool, has its number.
    pub fn slot_memory(&self) -> Option<(usize, usize)> {
        let slot = self.home.as_ref()?.slot?;
        Some((slot.address, BUFFER_SLOT_BYTES))
    }
}

/// Zeroes of which the first at least `length` are aligned.
fn aligned(length: usize) -> BytesMut {
    let mut memory = BytesMut::zeroed(length + BUFFER_ALIGNMENT_BYTES);
    memory.advance(memory.as_ptr().align_offset(BUFFER_ALIGNMENT_BYTES));
    memory
}

/// As [`aligned`], and no byte more.
fn exactly(length: usize) -> BytesMut {
    let mut memory = aligned(length);
    memory.truncate(length);
    memory
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        if let Some(home) = self.home.take().and_then(Arc::into_inner) {
            home.pool.give_back(&home, memory);
        }
    }
}

/// Where transfer buffers come from: bounded, shared by every thread of the daemon, first come first served.
#[derive(Clone, Debug)]
pub struct BufferPool {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
struct Shared {
    budget_bytes: usize,
    used_bytes: usize,
    slots_made: u16,
    free_slots: Vec<(Slot, BytesMut)>,
    /// By kind.
    free_small: [FreeSmall; SMALL_KINDS],
    next_ticket: u64,
    waiters: VecDeque<Waiter>,
}

/// Free small memory of one kind, all of it parts of slots.
#[derive(Debug, Default)]
struct FreeSmall {
    free: Vec<Small>,
    slots_made: usize,
}

#[derive(Debug)]
struct Waiter {
    ticket: u64,
    waker: Waker,
}

impl BufferPool {
    /// A pool of at most `budget_bytes`, but at least one slot.
    pub fn new(budget_bytes: usize) -> Self {
        let shared = Shared {
            budget_bytes: budget_bytes.max(BUFFER_SLOT_BYTES),
            used_bytes: 0,
            slots_made: 0,
            free_slots: Vec::new(),
            free_small: Default::default(),
            next_ticket: 0,
            waiters: VecDeque::new(),
        };
        Self {
            shared: Arc::new(Mutex::new(shared)),
        }
    }

    /// A buffer of `length_bytes`, cut to one slot. Its content is whatever was there before. Waits in order of arrival
    /// while the budget is used up.
    ///
    /// # Cancel safety
    /// Dropping the future gives the place in the queue up and nothing else.
    pub fn take(&self, length_bytes: usize) -> Take {
        let length = length_bytes.min(BUFFER_SLOT_BYTES);
        Take {
            pool: self.clone(),
            length,
            ticket: None,
        }
    }

    /// A buffer of `length_bytes` if one is free and nobody waits.
    pub fn try_take(&self, length_bytes: usize) -> Option<Buffer> {
        let mut shared = self.lock();
        let length = length_bytes.min(BUFFER_SLOT_BYTES);
        (shared.waiters.is_empty() && shared.has_room(length))
            .then(|| self.hand_out(&mut shared, length))
    }

    /// Bytes handed out now.
    pub fn in_use_bytes(&self) -> usize {
        self.lock().used_bytes
    }

    /// Most bytes it hands out.
    pub fn budget_bytes(&self) -> usize {
        self.lock().budget_bytes
    }

    /// Slots it will ever have, if none is lost.
    pub fn slots_max(&self) -> usize {
        self.lock().budget_bytes / BUFFER_SLOT_BYTES
            + (0..SMALL_KINDS).map(slots_of_kind).sum::<usize>()
    }

    /// A panic while the lock is held leaves counters that are still true, so a poisoned lock is used on.
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hand_out(&self, shared: &mut Shared, length: usize) -> Buffer {
        let charged_bytes = pooled_bytes(length);
        shared.used_bytes += charged_bytes;
        let (slot, memory) = if length <= SMALL_BYTES_MAX {
            let small = shared.small(charged_bytes);
            (small.slot, small.memory)
        } else {
            let free = shared.free_slots.pop();
            let (slot, memory) = free.unwrap_or_else(|| shared.new_slot());
            (Some(slot), memory)
        };
        let home = Some(Arc::new(Home {
            pool: self.clone(),
            slot,
            charged_bytes,
        }));
        let mut buffer = Buffer {
            memory,
            length,
            home,
        };
        if cfg!(debug_assertions) {
            // Whoever takes for zeroes what he has not written is found by tests.
            buffer.as_mut_slice().fill(0xA5);
        }
        buffer
    }

    fn give_back(&self, home: &Home, memory: BytesMut) {
        let mut shared = self.lock();
        shared.used_bytes -= home.charged_bytes;
        // What comes back in parts, because who used them was dropped midway, is gone with its number, or is missing where that
        // stands for more: a ring may know it by that. The next one is made anew.
        match home.slot {
            Some(slot) if memory.len() == BUFFER_SLOT_BYTES => {
                shared.free_slots.push((slot, memory));
            }
            Some(slot) if memory.len() == home.charged_bytes => {
                if let Some(kind) = shared.free_small.get_mut(kind_of(memory.len())) {
                    let slot = Some(slot);
                    kind.free.push(Small { slot, memory });
                }
            }
            _ => {}
        }
        let first = shared.waiters.front().map(|waiter| waiter.waker.clone());
        drop(shared);
        if let Some(waker) = first {
            waker.wake();
        }
    }
}

impl Shared {
    fn has_room(&self, length: usize) -> bool {
        self.used_bytes + pooled_bytes(length) <= self.budget_bytes
    }

    fn new_slot(&mut self) -> (Slot, BytesMut) {
        let mut memory = exactly(BUFFER_SLOT_BYTES);
        let slot = Slot {
            number: self.slots_made,
            address: memory.as_mut_ptr().expose_provenance(),
        };
        self.slots_made = self.slots_made.saturating_add(1);
        (slot, memory)
    }

    /// Small memory of this length: a part of a slot of its kind, which a ring knows; making it costs as much as a request of a
    /// page. When all of those are in use, memory of its own.
    fn small(&mut self, length: usize) -> Small {
        let kind = kind_of(length);
        let known = self.free_small.get(kind);
        let is_short = known
            .is_some_and(|known| known.free.is_empty() && known.slots_made < slots_of_kind(kind));
        if is_short {
            let (slot, mut rest) = self.new_slot();
            let mut parts = Vec::with_capacity(BUFFER_SLOT_BYTES / length);
            while !rest.is_empty() {
                let memory = rest.split_to(length);
                let slot = Some(slot);
                parts.push(Small { slot, memory });
            }
            // Those in front are used first, so that memory is touched as it is needed.
            parts.reverse();
            if let Some(known) = self.free_small.get_mut(kind) {
                known.slots_made += 1;
                known.free = parts;
            }
        }
        let known = self.free_small.get_mut(kind);
        let free = known.and_then(|known| known.free.pop());
        free.unwrap_or_else(|| Small {
            slot: None,
            memory: exactly(length),
        })
    }
}

/// What a buffer of this length, at most a slot, counts for in a pool, and its memory's length, in bytes: above 64 KiB a whole slot.
pub fn pooled_bytes(length: usize) -> usize {
    if length <= SMALL_BYTES_MAX {
        length.next_power_of_two().max(BUFFER_ALIGNMENT_BYTES)
    } else {
        BUFFER_SLOT_BYTES
    }
}

fn kind_of(charged_bytes: usize) -> usize {
    (charged_bytes / BUFFER_ALIGNMENT_BYTES).trailing_zeros() as usize
}

/// Slots whose parts are small memory of a kind.
fn slots_of_kind(kind: usize) -> usize {
    (SMALL_KEPT * (BUFFER_ALIGNMENT_BYTES << kind)).div_ceil(BUFFER_SLOT_BYTES)
}

/// Waits for a buffer.
#[derive(Debug)]
pub struct Take {
    pool: BufferPool,
    length: usize,
    ticket: Option<u64>,
}

impl Future for Take {
    type Output = Buffer;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Buffer> {
        let pool = self.pool.clone();
        let mut shared = pool.lock();
        let place = match self.ticket {
            Some(ticket) => shared
                .waiters
                .iter()
                .position(|waiter| waiter.ticket == ticket),
            None if shared.waiters.is_empty() => Some(0),
            None => None,
        };
        if place == Some(0) && shared.has_room(self.length) {
            if self.ticket.take().is_some() {
                shared.waiters.pop_front();
            }
            let buffer = pool.hand_out(&mut shared, self.length);
            // Whoever is next may fit as well.
            let next = shared.waiters.front().map(|waiter| waiter.waker.clone());
            drop(shared);
            if let Some(waker) = next {
                waker.wake();
            }
            return Poll::Ready(buffer);
        }
        match (self.ticket, place) {
            (Some(_), Some(place)) => shared.waiters[place].waker = cx.waker().clone(),
            _ => {
                let ticket = shared.next_ticket;
                shared.next_ticket += 1;
                shared.waiters.push_back(Waiter {
                    ticket,
                    waker: cx.waker().clone(),
                });
                self.ticket = Some(ticket);
            }
        }
        Poll::Pending
    }
}

impl Drop for Take {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else {
            return;
        };
        let mut shared = self.pool.lock();
        shared.waiters.retain(|waiter| waiter.ticket != ticket);
        let first = shared.waiters.front().map(|waiter| waiter.waker.clone());
        drop(shared);
        if let Some(waker) = first {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    fn poll_once<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn buffers_are_aligned_and_keep_their_address() {
        for length in [1, 511, 4096, 100_000] {
            let buffer = Buffer::zeroed(length);
            let address = buffer.as_slice().as_ptr() as usize;
            assert_eq!(address % BUFFER_ALIGNMENT_BYTES, 0);
            let moved = Box::new(buffer);
            assert_eq!(moved.as_slice().as_ptr() as usize, address);
        }
    }

    #[test]
    fn the_budget_holds_and_waiters_are_served_in_order() {
        let pool = BufferPool::new(2 * BUFFER_SLOT_BYTES);
        let first = pool.try_take(BUFFER_SLOT_BYTES).expect("free");
        let second = pool.try_take(BUFFER_SLOT_BYTES).expect("free");
        assert!(pool.try_take(1).is_none());
        let mut third = pin!(pool.take(BUFFER_SLOT_BYTES));
        let mut small = pin!(pool.take(4096));
        assert!(poll_once(third.as_mut()).is_pending());
        assert!(poll_once(small.as_mut()).is_pending());
        drop(first);
        assert!(
            poll_once(small.as_mut()).is_pending(),
            "the first to come is served first"
        );
        let Poll::Ready(third) = poll_once(third.as_mut()) else {
            panic!("room for the first waiter");
        };
        assert!(poll_once(small.as_mut()).is_pending());
        drop((second, third));
        assert!(poll_once(small.as_mut()).is_ready());
        assert_eq!(pool.slots_max(), 2 + 1 + 1 + 1 + 2 + 4);
    }

    #[test]
    fn a_waiter_that_leaves_makes_room_for_the_next() {
        let pool = BufferPool::new(BUFFER_SLOT_BYTES);
        let only = pool.try_take(BUFFER_SLOT_BYTES).expect("free");
        let mut second = pin!(pool.take(BUFFER_SLOT_BYTES));
        {
            let mut first = pin!(pool.take(BUFFER_SLOT_BYTES));
            assert!(poll_once(first.as_mut()).is_pending());
            assert!(poll_once(second.as_mut()).is_pending());
        }
        drop(only);
        assert!(poll_once(second.as_mut()).is_ready());
        assert_eq!(pool.in_use_bytes(), 0);
    }

    #[test]
    fn slots_come_back_under_their_number() {
        let pool = BufferPool::new(BUFFER_SLOT_BYTES);
        for _ in 0..3 {
            let buffer = pool.try_take(100_000).expect("free");
            assert_eq!(buffer.slot_of(&pool), Some(0));
            let address = buffer.as_slice().as_ptr().expose_provenance();
            assert_eq!(buffer.slot_memory(), Some((address, BUFFER_SLOT_BYTES)));
            assert!(buffer.slot_of(&BufferPool::new(0)).is_none());
        }
    }

    #[test]
    fn small_buffers_of_a_kind_are_parts_of_its_slots_as_long_as_there_is_room() {
        let pool = BufferPool::new(8 << 20);
        for (length, numbers) in [(65536, 0..4), (4096, 4..5)] {
            let fit = numbers.len() * BUFFER_SLOT_BYTES / length;
            let buffers: Vec<_> = (0..fit + 2).map(|_| pool.try_take(length)).collect();
            let buffers: Vec<_> = buffers.into_iter().flatten().collect();
            assert_eq!(buffers.len(), fit + 2);
            let (inside, outside) = buffers.split_at(fit);
            let mut places: Vec<(usize, usize)> = Vec::new();
            for buffer in inside {
                let number = buffer.slot_of(&pool).map(usize::from).expect("a slot");
                let (address, slot_bytes) = buffer.slot_memory().expect("a slot");
                let place = buffer.as_slice().as_ptr().expose_provenance() - address;
                assert!(place + buffer.capacity() <= slot_bytes);
                places.push((number, place));
            }
            places.sort_unstable();
            let fits_in =
                |number| (0..BUFFER_SLOT_BYTES / length).map(move |nth| (number, nth * length));
            assert!(places.into_iter().eq(numbers.flat_map(fits_in)));
            for buffer in outside {
                assert!(buffer.slot_of(&pool).is_none() && buffer.slot_memory().is_none());
            }
        }
        assert_eq!(pool.in_use_bytes(), 0);
        let slots_made = pool.lock().slots_made;
        assert!(usize::from(slots_made) <= pool.slots_max());
    }

    #[test]
    fn neighbours_of_one_slot_are_no_parts_of_one_buffer() {
        let pool = BufferPool::new(8 << 20);
        let mut first = pool.try_take(4096).expect("free");
        let second = pool.try_take(4096).expect("free");
        assert_eq!(
            first.as_slice().as_ptr_range().end,
            second.as_slice().as_ptr()
        );
        assert!(!first.join(second));
        assert_eq!((first.len(), pool.in_use_bytes()), (4096, 4096));
    }

    #[test]
    fn small_memory_is_used_again_by_kind_and_no_more_is_kept_than_may_be() {
        let pool = BufferPool::new(8 << 20);
        for (length, capacity) in [
            (1, 4096),
            (4096, 4096),
            (4097, 8192),
            (40_000, 65536),
            (65536, 65536),
        ] {
            let buffer = pool.try_take(length).expect("free");
            assert_eq!((buffer.len(), buffer.capacity()), (length, capacity));
            assert_eq!(pool.in_use_bytes(), capacity);
            let address = buffer.as_slice().as_ptr();
            drop(buffer);
            let again = pool.try_take(length).expect("free");
            assert_eq!(again.as_slice().as_ptr(), address, "{length} bytes");
        }
        assert_eq!(pool.in_use_bytes(), 0);
        let many: Vec<_> = (0..100).map(|_| pool.try_take(65536)).collect();
        assert!(many.iter().all(Option::is_some));
        drop(many);
        assert_eq!(
            pool.lock().free_small[kind_of(65536)].free.len(),
            SMALL_KEPT
        );
        let mut parts = pool.try_take(8192).expect("free");
        drop(parts.split_off(4096));
        drop(parts);
        assert_eq!(pool.try_take(8192).expect("free").capacity(), 8192);
        assert_eq!(pool.in_use_bytes(), 0);
    }

    #[test]
    fn parts_are_in_place_and_come_together_again() {
        let pool = BufferPool::new(BUFFER_SLOT_BYTES);
        for length in [BUFFER_SLOT_BYTES, 100_000, 9_000] {
            let mut whole = pool.try_take(length).expect("free");
            let address = whole.as_slice().as_ptr();
            let mut third = whole.split_off(8192);
            let mut second = whole.split_off(4096);
            assert_eq!(third.slot_of(&pool), whole.slot_of(&pool));
            assert_eq!(third.slot_memory(), whole.slot_memory());
            for (part, byte) in [(&mut whole, 1), (&mut second, 2), (&mut third, 3)] {
                part.as_mut_slice().fill(byte);
            }
            assert!(second.join(third) && whole.join(second));
            assert!(!whole.join(Buffer::zeroed(1)), "no part of it");
            assert_eq!((whole.as_slice().as_ptr(), whole.len()), (address, length));
            for (at, byte) in [(0, 1), (4095, 1), (4096, 2), (8191, 2), (8192, 3)] {
                assert_eq!(whole.as_slice()[at], byte, "byte {at}");
            }
            assert_eq!(whole.as_slice()[length - 1], 3);
        }
        assert_eq!(pool.in_use_bytes(), 0);
        let again = pool.try_take(BUFFER_SLOT_BYTES).expect("free");
        assert_eq!(again.slot_of(&pool), Some(0), "the same slot as before");
    }

    #[test]
    fn a_slot_comes_back_with_its_last_part_and_is_made_anew_if_parts_were_lost() {
        let pool = BufferPool::new(BUFFER_SLOT_BYTES);
        let mut first = pool.try_take(BUFFER_SLOT_BYTES).expect("free");
        let lost = first.split_off(4096);
        drop(first);
        assert!(pool.try_take(1).is_none(), "a part is in use");
        drop(lost);
        assert_eq!(pool.in_use_bytes(), 0);
        let next = pool.try_take(BUFFER_SLOT_BYTES).expect("free");
        assert_eq!(next.slot_of(&pool), Some(1), "no number stands for two");
    }
}
