//! [`PolledSocket`] and [`Poller`]: sockets where there is no ring. Calls that would wait are tried again when the kernel has
//! told that they would not; the reactor's thread waits for all of them at once.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use blockyard_storage::{Buffer, LocalFuture};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown};
use slab::Slab;

use crate::socket::{Fill, Part, Received, Sent, Socket, length_of, peer_has_ended, slices_behind};

/// What the kernel tells at once.
const EVENTS_MAX: usize = 64;

/// Waits for sockets and for a bell.
pub(crate) struct Poller {
    epoll: OwnedFd,
    sockets: RefCell<Slab<Rc<State>>>,
}

/// One socket.
struct State {
    socket: OwnedFd,
    receiving: Way,
    sending: Way,
}

/// What is known of one direction.
struct Way {
    /// Not known to make a call wait.
    is_open: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

/// A socket without a ring.
pub(crate) struct PolledSocket {
    poller: Rc<Poller>,
    number: usize,
    state: Rc<State>,
    kept: Cell<bool>,
}

impl Poller {
    /// A poller without sockets.
    ///
    /// # Errors
    /// When there is no descriptor for it.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            sockets: RefCell::default(),
        })
    }

    /// Waits until `bell` can be read, a socket can go on, or the timeout is over (`None`: without limit, zero: not at all).
    pub(crate) fn wait(&self, bell: &OwnedFd, timeout: Option<Duration>) {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let has_sockets = !self.sockets.borrow().is_empty();
        let mut ready = [
            PollFd::new(bell, PollFlags::IN),
            PollFd::new(&self.epoll, PollFlags::IN),
        ];
        let watched = if has_sockets { 2 } else { 1 };
        // Interrupted is awake as well.
        let _ = poll(&mut ready[..watched], timeout.as_ref());
        if has_sockets && !ready[1].revents().is_empty() {
            self.look();
        }
        if !ready[0].revents().is_empty() {
            let _ = rustix::io::read(bell, &mut [0_u8; 8]);
        }
    }

    /// Wakes whose socket can go on, without waiting.
    pub(crate) fn look(&self) {
        if self.sockets.borrow().is_empty() {
            return;
        }
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let none = Timespec::default();
        let told = epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            Some(&none),
        );
        if told.is_err() {
            return;
        }
        for event in &events {
            let Ok(number) = usize::try_from(event.data.u64()) else {
                continue;
            };
            let state = self.sockets.borrow().get(number).cloned();
            let Some(state) = state else {
                continue;
            };
            let flags = event.flags;
            let over = EventFlags::HUP | EventFlags::ERR;
            if flags.intersects(EventFlags::IN | EventFlags::RDHUP | over) {
                state.receiving.open();
            }
            if flags.intersects(EventFlags::OUT | over) {
                state.sending.open();
            }
        }
    }
}

impl Way {
    fn new() -> Self {
        Self {
            is_open: Cell::new(true),
            waker: RefCell::default(),
        }
    }

    fn open(&self) {
        self.is_open.set(true);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Tries `call` until it need not wait.
    async fn call<T>(&self, mut call: impl FnMut() -> rustix::io::Result<T>) -> Result<T, i32> {
        poll_fn(|cx: &mut Context<'_>| {
            while self.is_open.get() {
                match call() {
                    Ok(value) => return Poll::Ready(Ok(value)),
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => self.is_open.set(false),
                    Err(error) => return Poll::Ready(Err(error.raw_os_error())),
                }
            }
            self.waker.replace(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await
    }
}

impl PolledSocket {
    /// Lets `poller` wait for `socket`.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub(crate) fn new(poller: Rc<Poller>, socket: OwnedFd) -> io::Result<Self> {
        let state = Rc::new(State {
            socket,
            receiving: Way::new(),
            sending: Way::new(),
        });
        let number = poller.sockets.borrow_mut().insert(state.clone());
        let watched = epoll::add(
            &poller.epoll,
            state.socket.as_fd(),
            EventData::new_u64(number as u64),
            EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET,
        );
        let socket = Self {
            poller,
            number,
            state,
            kept: Cell::new(false),
        };
        watched?;
        Ok(socket)
    }
}

impl Socket for PolledSocket {
    fn receive(&self, into: Buffer, from: usize, fill: Fill) -> LocalFuture<'static, Received> {
        let state = self.state.clone();
        Box::pin(async move {
            let (mut buffer, mut at) = (into, from);
            let outcome = loop {
                let Some(room) = buffer.as_mut_slice().get_mut(at..) else {
                    break Ok(0);
                };
                if room.is_empty() {
                    break Ok(at - from);
                }
                let receive = || {
                    let socket = state.socket.as_fd();
                    rustix::net::recv(socket, &mut *room, RecvFlags::DONTWAIT)
                };
                match state.receiving.call(receive).await {
                    Ok((_, 0)) => break Ok(at - from),
                    Ok((_, count)) => {
                        at += count;
                        if fill == Fill::Some {
                            break Ok(at - from);
                        }
                    }
                    Err(errno) => break Err(errno),
                }
            };
            Received { buffer, outcome }
        })
    }

    fn send(&self, parts: Vec<Part>, skip: usize) -> LocalFuture<'static, Sent> {
        let state = self.state.clone();
        Box::pin(async move {
            let (length, mut sent) = (length_of(&parts), skip);
            while sent < length {
                let send = || {
                    let slices: Vec<_> = slices_behind(&parts, sent)
                        .into_iter()
                        .map(io::IoSlice::new)
                        .collect();
                    rustix::net::sendmsg(
                        state.socket.as_fd(),
                        &slices,
                        &mut SendAncillaryBuffer::default(),
                        SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
                    )
                };
                match state.sending.call(send).await {
                    Ok(count) => sent += count,
                    Err(errno) => {
                        let outcome = Err(errno);
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
        let _ = rustix::net::shutdown(self.state.socket.as_fd(), Shutdown::Both);
    }

    fn peer_has_ended(&self) -> bool {
        peer_has_ended(&self.state.socket)
    }

    fn keep(&self) {
        self.kept.set(true);
    }
}

impl Drop for PolledSocket {
    fn drop(&mut self) {
        if !self.kept.get() {
            self.shutdown();
        }
        let _ = epoll::delete(&self.poller.epoll, self.state.socket.as_fd());
        let gone = self.poller.sockets.borrow_mut().try_remove(self.number);
        drop(gone);
        // What is still waited for ends: nobody tells of this socket any more.
        self.state.receiving.open();
        self.state.sending.open();
    }
}
