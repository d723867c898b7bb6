//! [`Buffer`]: owned bytes at a page-aligned address, stable while the kernel holds them, alone or from a
//! [`BufferPool`], which bounds the memory of all transfers of the daemon.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// Address alignment of every buffer, enough for direct I/O on any device.
pub const BUFFER_ALIGNMENT_BYTES: usize = 4096;

/// Largest buffer of a pool in bytes.
pub const BUFFER_SLOT_BYTES: usize = 1 << 20;

/// Up to this length a pool hands out plain memory instead of a slot.
const SMALL_BYTES_MAX: usize = 64 << 10;

/// Owned, page-aligned bytes. Moving a buffer never moves its bytes. Dropping one from a pool gives its memory back.
#[derive(Debug)]
pub struct Buffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
    home: Option<Home>,
}

/// Where a buffer goes back to.
#[derive(Debug)]
struct Home {
    pool: BufferPool,
    slot: Option<u16>,
    charged_bytes: usize,
}

impl Buffer {
    /// A zero-filled buffer of `length` bytes outside any pool.
    pub fn zeroed(length: usize) -> Self {
        let memory = vec![0; length + BUFFER_ALIGNMENT_BYTES];
        let start = memory.as_ptr().align_offset(BUFFER_ALIGNMENT_BYTES);
        Self {
            memory,
            start,
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
        self.memory.len() - self.start
    }

    /// Makes it shorter, or longer within its capacity; bytes that come in hold old content.
    pub fn set_length(&mut self, length: usize) {
        self.length = length.min(self.capacity());
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }

    /// The bytes, to change.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }

    /// The whole slot and its number, if this buffer lives in a slot of `pool`: what a ring registers once and uses
    /// again whenever the slot is handed out.
    pub fn slot_of(&mut self, pool: &BufferPool) -> Option<(u16, &mut [u8])> {
        let home = self.home.as_ref()?;
        let slot = home.slot?;
        let start = self.start;
        Arc::ptr_eq(&home.pool.shared, &pool.shared)
            .then(|| (slot, &mut self.memory[start..start + BUFFER_SLOT_BYTES]))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            home.pool.give_back(&home, std::mem::take(&mut self.memory));
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
    free_slots: Vec<(u16, Vec<u8>)>,
    next_ticket: u64,
    waiters: VecDeque<Waiter>,
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

    /// Slots it will ever have.
    pub fn slots_max(&self) -> usize {
        self.lock().budget_bytes / BUFFER_SLOT_BYTES
    }

    /// A panic while the lock is held leaves counters that are still true, so a poisoned lock is used on.
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hand_out(&self, shared: &mut Shared, length: usize) -> Buffer {
        let charged_bytes = charge_of(length);
        shared.used_bytes += charged_bytes;
        let (slot, memory) = if length <= SMALL_BYTES_MAX {
            (None, vec![0; length + BUFFER_ALIGNMENT_BYTES])
        } else {
            let (slot, memory) = shared.free_slots.pop().unwrap_or_else(|| {
                let slot = shared.slots_made;
                shared.slots_made += 1;
                (slot, vec![0; BUFFER_SLOT_BYTES + BUFFER_ALIGNMENT_BYTES])
            });
            (Some(slot), memory)
        };
        let start = memory.as_ptr().align_offset(BUFFER_ALIGNMENT_BYTES);
        let home = Some(Home {
            pool: self.clone(),
            slot,
            charged_bytes,
        });
        Buffer {
            memory,
            start,
            length,
            home,
        }
    }

    fn give_back(&self, home: &Home, memory: Vec<u8>) {
        let mut shared = self.lock();
        shared.used_bytes -= home.charged_bytes;
        if let Some(slot) = home.slot {
            shared.free_slots.push((slot, memory));
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
        self.used_bytes + charge_of(length) <= self.budget_bytes
    }
}

/// What a buffer counts for.
fn charge_of(length: usize) -> usize {
    if length <= SMALL_BYTES_MAX {
        length.next_multiple_of(BUFFER_ALIGNMENT_BYTES)
    } else {
        BUFFER_SLOT_BYTES
    }
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
        assert_eq!(pool.slots_max(), 2);
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
            let mut buffer = pool.try_take(100_000).expect("free");
            let (slot, memory) = buffer.slot_of(&pool).expect("in a slot");
            assert_eq!((slot, memory.len()), (0, BUFFER_SLOT_BYTES));
            assert!(buffer.slot_of(&BufferPool::new(0)).is_none());
        }
        assert!(pool.try_take(4096).expect("free").slot_of(&pool).is_none());
    }
}
