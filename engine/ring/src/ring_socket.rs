//! [`RingSocket`]: a socket through a ring. Memory that a receive fills or a send reads belongs to the ring's table until the
//! kernel is done with it.

use std::cell::Cell;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use blockyard_storage::{Buffer, LocalFuture};
use io_uring::{opcode, types};
use rustix::net::Shutdown;

use crate::socket::{Fill, Part, Received, Sent, Socket, length_of, peer_has_ended, slices_behind};
use crate::uring::{Held, Uring};

/// `EINTR`: interrupted.
const EINTR: i32 = 4;

/// One socket on one ring.
pub(crate) struct RingSocket {
    uring: Rc<Uring>,
    socket: Arc<OwnedFd>,
    kept: Cell<bool>,
}

/// What a send shows the kernel. The addresses lead into `parts` and `slices`, whose bytes stay where they are.
pub(crate) struct Message {
    parts: Vec<Part>,
    slices: Vec<libc::iovec>,
    header: libc::msghdr,
}

impl RingSocket {
    /// Puts `socket` on the ring, which does its waiting: it must not refuse to wait.
    ///
    /// # Errors
    /// When it is no descriptor whose flags can be changed.
    pub(crate) fn new(uring: Rc<Uring>, socket: OwnedFd) -> std::io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&socket)?;
        rustix::fs::fcntl_setfl(&socket, flags - rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self {
            uring,
            socket: Arc::new(socket),
            kept: Cell::new(false),
        })
    }
}

impl Socket for RingSocket {
    fn receive(&self, into: Buffer, from: usize, fill: Fill) -> LocalFuture<'static, Received> {
        let (uring, socket) = (self.uring.clone(), self.socket.clone());
        Box::pin(async move {
            let (mut buffer, mut at) = (into, from);
            let outcome = loop {
                if at >= buffer.len() {
                    break Ok(at.saturating_sub(from));
                }
                let (back, result) = uring.receive(&socket, buffer, at, fill).await;
                buffer = back;
                match result {
                    0 => break Ok(at - from),
                    count if count > 0 => {
                        at += count.unsigned_abs() as usize;
                        if fill == Fill::Some {
                            break Ok(at - from);
                        }
                    }
                    error if -error == EINTR => {}
                    error => break Err(-error),
                }
            };
            Received { buffer, outcome }
        })
    }

    fn send(&self, parts: Vec<Part>, skip: usize) -> LocalFuture<'static, Sent> {
        let (uring, socket) = (self.uring.clone(), self.socket.clone());
        Box::pin(async move {
            let (length, mut sent, mut parts) = (length_of(&parts), skip, parts);
            while sent < length {
                let (back, result) = uring.send(&socket, parts, sent).await;
                parts = back;
                match result {
                    count if count >= 0 => sent += count.unsigned_abs() as usize,
                    error if -error == EINTR => {}
                    error => {
                        let outcome = Err(-error);
                        return Sent { parts, outcome };
                    }
                }
            }
            let outcome = Ok(());
            Sent { parts, outcome }
        })
    }

    fn shutdown(&self) {
        // One that has ended already has nothing to end.
        let _ = rustix::net::shutdown(&*self.socket, Shutdown::Both);
    }

    fn peer_has_ended(&self) -> bool {
        peer_has_ended(&self.socket)
    }

    fn keep(&self) {
        self.kept.set(true);
    }
}

impl Drop for RingSocket {
    fn drop(&mut self) {
        if !self.kept.get() {
            self.shutdown();
        }
    }
}

impl Held {
    /// What was sent, where it was a message.
    fn into_parts(self) -> Vec<Part> {
        match self {
            Held::Message(message) => message.parts,
            Held::Buffer(_) | Held::Joint(_) => Vec::new(),
        }
    }
}

impl Message {
    fn new(parts: Vec<Part>, skip: usize) -> Box<Self> {
        let slices = slices_behind(&parts, skip).into_iter().map(|slice| {
            libc::iovec {
                // The kernel only reads what is sent.
                iov_base: slice.as_ptr().cast_mut().cast(),
                iov_len: slice.len(),
            }
        });
        let slices: Vec<_> = slices.collect();
        // SAFETY: a header of zeroes is one that names nothing.
        let header = unsafe { std::mem::zeroed() };
        let mut message = Box::new(Self {
            parts,
            slices,
            header,
        });
        message.header.msg_iov = message.slices.as_mut_ptr();
        message.header.msg_iovlen = message.slices.len();
        message
    }
}

impl Uring {
    /// Receives into `buffer[from..]`, once. Returns the buffer and the kernel's answer.
    async fn receive(
        self: &Rc<Self>,
        socket: &Arc<OwnedFd>,
        mut buffer: Buffer,
        from: usize,
        fill: Fill,
    ) -> (Buffer, i32) {
        let room = buffer.as_mut_slice().get_mut(from..).unwrap_or_default();
        let (address, length) = (room.as_mut_ptr(), room.len());
        let length = u32::try_from(length).unwrap_or(i32::MAX.unsigned_abs());
        let flags = match fill {
            Fill::Some => 0,
            Fill::All => libc::MSG_WAITALL,
        };
        let descriptor = types::Fd(socket.as_raw_fd());
        let entry = opcode::Recv::new(descriptor, address, length)
            .flags(flags)
            .build();
        let held = Held::Buffer(buffer);
        let (held, result) = self.submit(held, socket.clone(), None, entry).await;
        (held.into_buffer(), result)
    }

    /// Sends `parts` but for the first `skip` bytes, once. Returns them and the kernel's answer.
    async fn send(
        self: &Rc<Self>,
        socket: &Arc<OwnedFd>,
        parts: Vec<Part>,
        skip: usize,
    ) -> (Vec<Part>, i32) {
        let message = Message::new(parts, skip);
        let descriptor = types::Fd(socket.as_raw_fd());
        // The kernel goes on by itself where a socket's queue takes a part only.
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL).unsigned_abs();
        let entry = opcode::SendMsg::new(descriptor, &raw const message.header)
            .flags(flags)
            .build();
        let held = Held::Message(message);
        let (held, result) = self.submit(held, socket.clone(), None, entry).await;
        (held.into_parts(), result)
    }
}
