//! [`Memory`]: where the requests of one connection get buffers from.
//!
//! Clients share a pool, so that memory is bounded however many they are. One that does not take its replies would hold all of
//! it; so each has a little of its own, which nobody can take away, and never holds more than a share of what all have.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use blockyard_storage::Buffer;
use blockyard_storage::buffer::{BUFFER_SLOT_BYTES, BufferPool};

use crate::limits::CLIENT_SHARE_BYTES;

/// Buffers for one connection.
pub(super) struct Memory {
    /// Of all clients.
    shared: BufferPool,
    /// Bytes of it that this one holds.
    held_bytes: Rc<Cell<usize>>,
    /// One slot.
    own: BufferPool,
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
}

impl Memory {
    /// Nothing is taken yet.
    pub(super) fn new(shared: BufferPool) -> Self {
        Self {
            shared,
            held_bytes: Rc::default(),
            own: BufferPool::new(BUFFER_SLOT_BYTES),
        }
    }

    /// A buffer of `length_bytes`, cut to one slot, from the shared pool if there is one left, else from the connection's own
    /// as soon as that has one.
    pub(super) async fn take(&self, length_bytes: usize) -> Loan {
        if self.held_bytes.get() + length_bytes <= CLIENT_SHARE_BYTES
            && let Some(buffer) = self.shared.try_take(length_bytes)
        {
            let bytes = buffer.capacity();
            self.held_bytes.set(self.held_bytes.get() + bytes);
            return Loan {
                buffer,
                share: Share {
                    held_bytes: Rc::clone(&self.held_bytes),
                    bytes,
                },
            };
        }
        let buffer = self.own.take(length_bytes).await;
        let share = Share {
            held_bytes: Rc::clone(&self.held_bytes),
            bytes: 0,
        };
        Loan { buffer, share }
    }
}

impl Loan {
    /// A buffer that counts for nothing.
    pub(super) fn outside(buffer: Buffer) -> Self {
        let share = Share {
            held_bytes: Rc::default(),
            bytes: 0,
        };
        Self { buffer, share }
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
        assert_eq!(held.len(), CLIENT_SHARE_BYTES / BUFFER_SLOT_BYTES + 1);
        assert_eq!(shared.in_use_bytes(), CLIENT_SHARE_BYTES);
        held.remove(0);
        assert!(take(&memory, BUFFER_SLOT_BYTES).is_some());
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
