//! [`Outbox`]: what one client has still to read. Bounded, so that a client that does not read costs nothing but itself.
//!
//! Replies and events share it, which keeps them in one order. At [`UNREAD_BYTES_MAX`] the client's requests are no
//! longer read. Events cannot be held back that way: at twice as much the client is cut off, which it notices, while a
//! gap in its events would go unnoticed.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Unread bytes at which no further request of this client is read.
pub const UNREAD_BYTES_MAX: usize = 16 << 20;
/// Unread bytes at which the client is cut off.
const CUT_OFF_BYTES: usize = 2 * UNREAD_BYTES_MAX;

/// Short messages leave together, up to this many bytes: a system call each would cost more than they do.
const TOGETHER_BYTES_MAX: usize = 16 << 10;

/// Messages on their way to one client.
#[derive(Debug, Default)]
pub struct Outbox {
    state: Mutex<State>,
    /// Something was pushed, or the box was closed.
    pushed: Notify,
    /// Something was taken, or the box was closed.
    taken: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Messages, short ones in one piece.
    pieces: VecDeque<Vec<u8>>,
    unread_bytes: usize,
    closed: bool,
    /// Closed, and nothing in it is worth sending any more.
    abandoned: bool,
}

impl Outbox {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a message; it is dropped when the box is closed.
    pub fn push(&self, message: impl AsRef<[u8]> + Into<Vec<u8>>) {
        let mut state = self.state();
        if state.closed {
            return;
        }
        let length = message.as_ref().len();
        state.unread_bytes += length;
        match state.pieces.back_mut() {
            Some(last) if last.len() + length <= TOGETHER_BYTES_MAX => {
                // Where two wait, many do.
                last.reserve_exact(TOGETHER_BYTES_MAX - last.len());
                last.extend_from_slice(message.as_ref());
            }
            _ => state.pieces.push_back(message.into()),
        }
        if state.unread_bytes > CUT_OFF_BYTES {
            tracing::warn!(
                unread_bytes = state.unread_bytes,
                "a client does not read, cutting it off"
            );
            state.abandon();
            self.taken.notify_waiters();
        }
        drop(state);
        self.pushed.notify_one();
    }

    /// Takes no further messages. What is in it can still be taken.
    pub fn close(&self) {
        self.state().closed = true;
        self.pushed.notify_one();
        self.taken.notify_waiters();
    }

    /// Throws everything away: nobody is there to read it.
    pub fn abandon(&self) {
        self.state().abandon();
        self.pushed.notify_one();
        self.taken.notify_waiters();
    }

    /// The next message, together with what follows it if they are short; `None`: the box is closed and empty. For one
    /// taker only.
    ///
    /// # Cancel safety
    /// Nothing is taken unless it is returned.
    pub async fn next(&self) -> Option<Vec<u8>> {
        loop {
            {
                let mut state = self.state();
                if let Some(messages) = state.pieces.pop_front() {
                    return Some(messages);
                }
                if state.closed {
                    return None;
                }
            }
            self.pushed.notified().await;
        }
    }

    /// Tells that what [`next`](Self::next) gave out has left, which makes room for more.
    pub fn sent(&self, messages: &[u8]) {
        let mut state = self.state();
        state.unread_bytes = state.unread_bytes.saturating_sub(messages.len());
        drop(state);
        self.taken.notify_waiters();
    }

    /// Waits until there is room for replies; `false`: the box is closed.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn room(&self) -> bool {
        self.until(|state| state.closed || state.unread_bytes < UNREAD_BYTES_MAX)
            .await;
        !self.state().closed
    }

    /// Waits until the box is closed.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn closed(&self) {
        self.until(|state| state.closed).await;
    }

    /// Waits until nothing in the box is worth sending any more.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn abandoned(&self) {
        self.until(|state| state.abandoned).await;
    }

    async fn until(&self, condition: impl Fn(&State) -> bool) {
        while !condition(&self.state()) {
            let taken = self.taken.notified();
            tokio::pin!(taken);
            taken.as_mut().enable();
            // It may have become true before this was listening.
            if condition(&self.state()) {
                return;
            }
            taken.await;
        }
    }
}

impl State {
    fn abandon(&mut self) {
        self.pieces.clear();
        self.unread_bytes = 0;
        self.closed = true;
        self.abandoned = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(bytes: usize) -> Vec<u8> {
        vec![b'x'; bytes]
    }

    #[tokio::test]
    async fn there_is_no_room_until_something_has_left() {
        let outbox = Outbox::default();
        outbox.push(message(UNREAD_BYTES_MAX));
        let waiting = outbox.room();
        tokio::pin!(waiting);
        assert!(futures_util::poll!(waiting.as_mut()).is_pending());
        let first = outbox.next().await.expect("there is one");
        assert!(
            futures_util::poll!(waiting.as_mut()).is_pending(),
            "taken is not sent"
        );
        outbox.sent(&first);
        assert!(waiting.await);
    }

    #[tokio::test]
    async fn who_never_reads_is_cut_off() {
        let outbox = Outbox::default();
        for _ in 0..3 {
            outbox.push(message(UNREAD_BYTES_MAX));
        }
        assert!(outbox.next().await.is_none());
        outbox.push(message(1));
        assert!(outbox.next().await.is_none());
        assert!(!outbox.room().await);
    }

    #[tokio::test]
    async fn short_messages_leave_together_and_in_order() {
        let outbox = Outbox::default();
        let numbered: Vec<Vec<u8>> = (0..9).map(|n| vec![n; 4 << 10]).collect();
        for one in &numbered {
            outbox.push(&one[..]);
        }
        outbox.close();
        let mut taken = Vec::new();
        let mut times = 0;
        while let Some(some) = outbox.next().await {
            outbox.sent(&some);
            taken.extend_from_slice(&some);
            times += 1;
        }
        assert_eq!(times, 3);
        assert_eq!(taken, numbered.concat());
        assert_eq!(outbox.state().unread_bytes, 0);
    }

    #[tokio::test]
    async fn a_closed_box_gives_out_what_it_holds() {
        let outbox = Outbox::default();
        outbox.push(message(3));
        outbox.close();
        assert_eq!(outbox.next().await, Some(message(3)));
        assert_eq!(outbox.next().await, None);
    }
}
