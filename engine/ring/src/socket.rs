//! [`Socket`]: a connected stream as whoever serves a connection sees it, on a ring or without one.
//!
//! Buffers go in and come back, as with files: what the kernel may touch is never the caller's meanwhile. One receive and one
//! send may be in flight at a time. What is in flight ends when the socket is [shut down](Socket::shutdown) or dropped.

use std::os::fd::OwnedFd;

use blockyard_storage::{Buffer, LocalFuture};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, sockopt};

/// Parts of one send at most; more are sent by several calls of the kernel.
pub(crate) const PARTS_MAX: usize = 512;

/// What a UNIX socket may hold that its other side has not taken yet, in bytes of data. The system's 208 KiB are less than one reply
/// of 256 KiB: sender and receiver then wait for each other within each of them.
const UNIX_SEND_BYTES: usize = 256 << 10;

/// How much of its room a receive wants to see filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Whatever is there; waits for the first byte.
    Some,
    /// All of it.
    All,
}

/// The end of a receive.
#[derive(Debug)]
pub struct Received {
    /// The caller's buffer.
    pub buffer: Buffer,
    /// How many bytes have come in: fewer than wanted only where the other side has ended. An error number else; what has come
    /// in before is lost.
    pub outcome: Result<usize, i32>,
}

/// One piece of what is sent.
#[derive(Debug)]
pub enum Part {
    /// A few bytes.
    Bytes(Vec<u8>),
    /// All of a buffer.
    Buffer(Buffer),
}

impl Part {
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        match self {
            Part::Bytes(bytes) => bytes,
            Part::Buffer(buffer) => buffer.as_slice(),
        }
    }
}

/// The end of a send.
#[derive(Debug)]
pub struct Sent {
    /// The caller's parts.
    pub parts: Vec<Part>,
    /// Whether the kernel took every byte. An error number else.
    pub outcome: Result<(), i32>,
}

/// A connected stream on one reactor.
pub trait Socket {
    /// Receives into `into[from..]`, which is not empty.
    ///
    /// # Cancel safety
    /// Bytes may be lost: the socket is of no use afterwards but to be shut down.
    fn receive(&self, into: Buffer, from: usize, fill: Fill) -> LocalFuture<'static, Received>;

    /// Sends all parts, one behind the other, but for the first `skip` bytes. A peer that is gone raises no signal.
    ///
    /// # Cancel safety
    /// A part of it may have been sent: the socket is of no use afterwards but to be shut down.
    fn send(&self, parts: Vec<Part>, skip: usize) -> LocalFuture<'static, Sent>;

    /// Ends both directions: whatever is in flight ends, the peer sees the end of the stream.
    fn shutdown(&self);

    /// Whether the peer will say nothing any more: it has ended its direction, is gone, or the connection is broken. What it has
    /// said before may still wait to be received. Asks the kernel and never waits.
    fn peer_has_ended(&self) -> bool;

    /// Leaves the connection open when this is dropped, for somebody who has the descriptor, too. Nothing may be in flight
    /// then.
    fn keep(&self);
}

/// Lets a UNIX socket take more at once, as far as the system allows. Others find their size by themselves.
pub(crate) fn widen(socket: &OwnedFd) {
    let is_unix = sockopt::socket_domain(socket) == Ok(AddressFamily::UNIX);
    // The kernel counts its own bookkeeping as well, and makes what it is told twice as much for that.
    let room = sockopt::socket_send_buffer_size(socket).unwrap_or(0);
    if !is_unix || room >= 2 * UNIX_SEND_BYTES {
        return;
    }
    // Only who administers the network may have more than net.core.wmem_max. It works without, if less well.
    let outcome = sockopt::set_socket_send_buffer_size_force(socket, UNIX_SEND_BYTES)
        .or_else(|_| sockopt::set_socket_send_buffer_size(socket, UNIX_SEND_BYTES));
    if let Err(error) = outcome {
        tracing::debug!(%error, "a socket keeps its room");
    }
}

/// See [`Socket::peer_has_ended`].
pub(crate) fn peer_has_ended(socket: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::RDHUP)];
    // HUP and ERR are always told. What cannot be asked for is found out by the next call.
    matches!(poll(&mut polled, Some(&Timespec::default())), Ok(1..))
}

/// What is left of `parts` behind the first `skip` bytes: at most [`PARTS_MAX`] slices, none of them empty.
pub(crate) fn slices_behind(parts: &[Part], skip: usize) -> Vec<&[u8]> {
    let mut skip = skip;
    let mut slices = Vec::with_capacity(parts.len().min(PARTS_MAX));
    for part in parts {
        let bytes = part.as_slice();
        if skip >= bytes.len() {
            skip -= bytes.len();
            continue;
        }
        if slices.len() == PARTS_MAX {
            break;
        }
        slices.extend(bytes.get(std::mem::take(&mut skip)..));
    }
    slices
}

/// Length of all parts together in bytes.
pub(crate) fn length_of(parts: &[Part]) -> usize {
    parts.iter().map(|part| part.as_slice().len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_been_sent_and_what_is_empty_is_left_out() {
        let parts = [
            Part::Bytes(vec![1, 2]),
            Part::Buffer(Buffer::zeroed(0)),
            Part::Buffer(Buffer::copy_of(&[3, 4, 5])),
        ];
        let all = [1, 2, 3, 4, 5];
        for skip in 0..=5 {
            let slices = slices_behind(&parts, skip);
            assert!(slices.iter().all(|slice| !slice.is_empty()));
            assert_eq!(slices.concat(), all[skip..]);
        }
        let many: Vec<_> = (0..2 * PARTS_MAX).map(|_| Part::Bytes(vec![1])).collect();
        assert_eq!(slices_behind(&many, 3).len(), PARTS_MAX);
        assert_eq!(length_of(&many), 2 * PARTS_MAX);
    }
}
