//! [`Memory`]: where the requests of one connection get buffers from.
//!
//! Clients share a pool, so that memory is bounded however many they are. One that does not take its replies would hold all of
//! it; so each has a little of its own, which nobody can take away, and never holds more than a share of what all have. That
//! little is small, as there may be many of them: whoever goes on with it does so in smaller pieces.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use blockyard_storage::Buffer;
use blockyard_storage::buffer::{BUFFER_SLOT_BYTES, BufferPool};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limits::{CLIENT_OWN_BYTES, CLIENT_SHARE_BYTES};

/// Buffers for one connection.
pub(super) struct Memory {
    /// Of all clients.
    shared: BufferPool,
    /// Bytes of it that this one holds.
    held_bytes: Rc<Cell<usize>>,
    /// Who has the one buffer that is its own, of [`CLIENT_OWN_BYTES`] at most.
    own: Arc<Semaphore>,
}

/// A buffer, and what it counts for.
pub(super) struct Loan {
    /// The buffer.
    pub(super) buffer: Buffer,
    /// Given back when it is dropped.
    pub(super) share: Share,
}

/// What one buffer counts for in the share of its connection.
pub(super) struct Share {
    held_bytes: Rc<Cell<usize>>,
    bytes: usize,
    _own: Option<OwnedSemaphorePermit>,
}

impl Memory {
    /// Nothing is taken yet.
    pub(super) fn new(shared: BufferPool) -> Self {
        Self {
            shared,
            held_bytes: Rc::default(),
            own: Arc::new(Semaphore::new(1)),
        }
    }

    /// A buffer of `length_bytes` from the shared pool, if there is one left and the connection may have more; `None` also for
    /// more than a slot.
    pub(super) fn take_shared(&self, length_bytes: usize) -> Option<Loan> {
        let held_bytes = self.held_bytes.get();
        if length_bytes > BUFFER_SLOT_BYTES || held_bytes + length_bytes > CLIENT_SHARE_BYTES {
            return None;
        }
        let buffer = self.shared.try_take(length_bytes)?;
        let bytes = buffer.capacity();
        self.held_bytes.set(held_bytes + bytes);
        let held_bytes = Rc::clone(&self.held_bytes);
        let share = Share {
            held_bytes,
            bytes,
            _own: None,
        };
        Some(Loan { buffer, share })
    }

    /// A buffer of `length_bytes`, cut to one slot, from the shared pool if there is one left; else the connection's own as soon
    /// as that is free, which may be shorter than what is wanted.
    pub(super) async fn take(&self, length_bytes: usize) -> Loan {
        let length_bytes = length_bytes.min(BUFFER_SLOT_BYTES);
        if let Some(loan) = self.take_shared(length_bytes) {
            return loan;
        }
        // It is never closed.
        let own = Arc::clone(&self.own).acquire_owned().await.ok();
        let share = Share {
            held_bytes: Rc::clone(&self.held_bytes),
            bytes: 0,
            _own: own,
        };
        let buffer = Buffer::zeroed(length_bytes.min(CLIENT_OWN_BYTES));
        Loan { buffer, share }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.held_bytes.set(self.held_bytes.get() - self.bytes);
    }
}

/// Lets others of this thread go on before who awaits it.
pub(super) async fn give_way() {
    let mut first = true;
    poll_fn(|cx| match std::mem::take(&mut first) {
        true => {
            cx.waker().wake_by_ref();
            Poll::Pending
        }
        false => Poll::Ready(()),
    })
    .await;
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    fn poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    const SHARED_MAX: usize = CLIENT_SHARE_BYTES / BUFFER_SLOT_BYTES;

    fn take(memory: &Memory, length: usize) -> Option<Loan> {
        match poll(pin!(memory.take(length))) {
            Poll::Ready(loan) => Some(loan),
            Poll::Pending => None,
        }
    }

    #[test]
    fn one_client_takes_its_share_and_one_buffer_more() {
        let shared = BufferPool::new(4 * CLIENT_SHARE_BYTES);
        let memory = Memory::new(shared.clone());
        let mut held = Vec::new();
        while let Some(loan) = take(&memory, BUFFER_SLOT_BYTES) {
            held.push(loan);
        }
        let lengths: Vec<_> = held.iter().map(|loan| loan.buffer.len()).collect();
        assert_eq!(lengths[..SHARED_MAX], [BUFFER_SLOT_BYTES; SHARED_MAX]);
        assert_eq!(lengths[SHARED_MAX..], [CLIENT_OWN_BYTES]);
        assert_eq!(shared.in_use_bytes(), CLIENT_SHARE_BYTES);
        held.remove(0);
        let again = take(&memory, BUFFER_SLOT_BYTES).expect("given back");
        assert_eq!(again.buffer.len(), BUFFER_SLOT_BYTES);
        drop(again);
        assert!(memory.take_shared(BUFFER_SLOT_BYTES + 1).is_none());
        drop(held);
        assert_eq!(shared.in_use_bytes(), 0);
        assert_eq!(memory.held_bytes.get(), 0);
    }

    #[test]
    fn where_others_hold_everything_its_own_is_left() {
        let shared = BufferPool::new(BUFFER_SLOT_BYTES);
        let (greedy, other) = (Memory::new(shared.clone()), Memory::new(shared));
        let all = take(&greedy, BUFFER_SLOT_BYTES).expect("the pool's");
        let own = take(&greedy, BUFFER_SLOT_BYTES).expect("its own");
        assert!(take(&greedy, 1).is_none());
        let others = take(&other, BUFFER_SLOT_BYTES).expect("its own");
        let mut waiting = pin!(other.take(4096));
        assert!(poll(waiting.as_mut()).is_pending());
        drop(others);
        assert!(poll(waiting.as_mut()).is_ready());
        drop((all, own));
    }
}
