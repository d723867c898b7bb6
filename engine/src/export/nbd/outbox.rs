//! [`Outbox`]: replies on their way to a client. What is there when the connection can take more goes out in one send.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};

use blockyard_ring::Part;

use super::connection::Slot;
use super::memory::{Loan, Share};
use crate::nbd::channel::Channel;

/// Heads that follow each other become one part up to this length, and small data goes with them: a part costs as much as
/// copying so many bytes.
const MERGED_BYTES_MAX: usize = 64 << 10;
const COPIED_BYTES_MAX: usize = 512;

/// Replies that are not sent yet.
#[derive(Default)]
pub(super) struct Outbox {
    waiting: RefCell<Batch>,
    is_ended: Cell<bool>,
    is_broken: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

/// What is sent in one go, and what is given back then.
#[derive(Default)]
struct Batch {
    parts: Vec<Part>,
    shares: Vec<Share>,
    slots: Vec<Slot>,
}

impl Outbox {
    /// Takes a piece of a reply: bytes of the protocol, then data. With `slot` the reply is complete.
    pub(super) fn push(&self, head: Vec<u8>, data: Option<Loan>, slot: Option<Slot>) {
        if self.is_broken.get() {
            // Nobody will read it.
            return;
        }
        let mut waiting = self.waiting.borrow_mut();
        waiting.bytes(head);
        if let Some(Loan { buffer, share }) = data {
            if buffer.len() <= COPIED_BYTES_MAX {
                waiting.bytes(buffer.as_slice().to_vec());
            } else {
                waiting.parts.push(Part::Buffer(buffer));
                waiting.shares.push(share);
            }
        }
        waiting.slots.extend(slot);
        drop(waiting);
        self.wake();
    }

    /// Nothing comes behind what is there.
    pub(super) fn end(&self) {
        self.is_ended.set(true);
        self.wake();
    }

    /// Whether the client is known to be gone.
    pub(super) fn is_broken(&self) -> bool {
        self.is_broken.get()
    }

    /// Sends what comes until it has [ended](Self::end) and all of it is sent, or the client is gone.
    pub(super) async fn send_all(&self, channel: &Channel) {
        loop {
            let batch = poll_fn(|cx| {
                let batch = self.waiting.take();
                if !batch.parts.is_empty() {
                    return Poll::Ready(Some(batch));
                }
                if self.is_ended.get() {
                    return Poll::Ready(None);
                }
                self.waker.replace(Some(cx.waker().clone()));
                Poll::Pending
            });
            let Some(Batch {
                parts,
                shares,
                slots,
            }) = batch.await
            else {
                return;
            };
            let sent = channel.send(parts).await;
            // The buffers first, then who may want them.
            let outcome = sent.outcome;
            drop((sent.parts, shares));
            drop(slots);
            if let Err(errno) = outcome {
                tracing::debug!(errno, "a client does not take its replies");
                self.is_broken.set(true);
                drop(self.waiting.take());
                channel.shutdown();
                return;
            }
        }
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl Batch {
    fn bytes(&mut self, bytes: Vec<u8>) {
        match self.parts.last_mut() {
            Some(Part::Bytes(last)) if last.len() + bytes.len() <= MERGED_BYTES_MAX => {
                last.extend_from_slice(&bytes);
            }
            _ if bytes.is_empty() => {}
            _ => self.parts.push(Part::Bytes(bytes)),
        }
    }
}
