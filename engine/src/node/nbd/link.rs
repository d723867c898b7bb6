//! [`Link`]: requests on one connection, on one data thread. Any number in flight, replies in any order.
//!
//! While there are requests, one task sends whatever is there in one go, another receives. With none in flight nothing waits
//! at the socket, and the connection can be used from elsewhere.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use blockyard_nbd::Mode;
use blockyard_nbd::constants::STATUS_EXTENTS_MAX;
use blockyard_nbd::errors::Violation;
use blockyard_nbd::transmission::{
    Awaited, Extent, Failure, Follows, Incoming, Request, parse_extents,
};
use blockyard_ring::{Fill, Part};
use blockyard_storage::Buffer;

use crate::data::Spawner;
use crate::data::context::HostFiles;
use crate::nbd::channel::Channel;
use crate::node::nbd::NbdConnection;

/// What one receive takes at most, besides data that goes to its place.
const RECEIVE_BYTES: usize = 64 << 10;

/// One connection in use.
pub(super) struct Link {
    channel: Channel,
    connection: Arc<NbdConnection>,
    mode: Mode,
    spawner: Spawner,
    state: RefCell<State>,
    /// Kept between the times when something is received.
    window: RefCell<Option<Window>>,
}

#[derive(Default)]
struct State {
    next_cookie: u64,
    requests: HashMap<u64, InFlight>,
    outgoing: Vec<Outgoing>,
    sending: bool,
    receiving: bool,
    broken: bool,
    answered: bool,
}

/// Something to be sent.
enum Outgoing {
    Head(Vec<u8>),
    /// The data of the write with this cookie.
    Data(u64, Buffer),
}

/// A request whose reply is not whole, or which its caller has not fetched yet.
struct InFlight {
    awaited: Awaited,
    /// What is read into or written from, while nobody else has it.
    buffer: Option<Buffer>,
    /// Data is on its way from it or into it.
    buffer_out: bool,
    extents: Vec<Extent>,
    ended: bool,
    abandoned: bool,
    waker: Option<Waker>,
}

/// How a request ended.
pub(super) struct Ended {
    /// The caller's.
    pub(super) buffer: Option<Buffer>,
    /// What a status request has told.
    pub(super) extents: Vec<Extent>,
    /// Whether the connection took it to its end.
    pub(super) outcome: Outcome,
}

/// Whether a request was answered.
pub(super) enum Outcome {
    /// It was.
    Answered(Result<(), Failure>),
    /// The connection broke before. It may have been carried out or not.
    Broken,
}

impl Link {
    /// Requests on `connection`, on this thread.
    ///
    /// # Errors
    /// When the socket cannot be used here.
    pub(super) fn new(
        connection: Arc<NbdConnection>,
        files: &Rc<dyn HostFiles>,
        spawner: Spawner,
    ) -> io::Result<Rc<Self>> {
        let socket = files.socket(connection.socket()?)?;
        let channel = match connection.encryption() {
            Some(encryption) => Channel::encrypted(socket, encryption.clone()),
            None => Channel::plain(socket),
        };
        Ok(Rc::new(Self {
            channel,
            mode: connection.agreement().mode,
            connection,
            spawner,
            state: RefCell::default(),
            window: RefCell::default(),
        }))
    }

    /// Whether a new request can be tried on it: it is not broken, and no other thread has requests on the connection.
    pub(super) fn enter(&self) -> bool {
        let idle = {
            let state = self.state.borrow();
            if state.broken {
                return false;
            }
            state.is_idle()
        };
        !idle || self.connection.occupy()
    }

    /// Requests in flight.
    pub(super) fn depth(&self) -> usize {
        self.state.borrow().requests.len()
    }

    /// The server has answered something.
    pub(super) fn has_answered(&self) -> bool {
        self.state.borrow().answered
    }

    pub(super) fn is_broken(&self) -> bool {
        self.state.borrow().broken
    }

    /// Sends a request, which gets its cookie here, and waits for its reply. Data is sent from `buffer` or read into it.
    /// [`Self::enter`] has just said that it can be tried.
    ///
    /// # Cancel safety
    /// The request takes its course, and what it needs stays until then.
    pub(super) async fn call(self: &Rc<Self>, request: Request, buffer: Option<Buffer>) -> Ended {
        let cookie = self.begin(request, buffer);
        let guard = Abandon { link: self, cookie };
        let ended = poll_fn(|cx| {
            let mut state = self.state.borrow_mut();
            let broken = state.broken;
            let Some(request) = state.requests.get_mut(&cookie) else {
                // Only its caller takes it away.
                return Poll::Ready(None);
            };
            if (request.ended || broken) && !request.buffer_out {
                return Poll::Ready(state.requests.remove(&cookie));
            }
            request.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
        drop(guard);
        self.rest();
        match ended {
            Some(request) => Ended {
                outcome: match request.ended {
                    true => Outcome::Answered(request.awaited.outcome()),
                    false => Outcome::Broken,
                },
                buffer: request.buffer,
                extents: request.extents,
            },
            None => Ended {
                buffer: None,
                extents: Vec::new(),
                outcome: Outcome::Broken,
            },
        }
    }

    fn begin(self: &Rc<Self>, request: Request, buffer: Option<Buffer>) -> u64 {
        let mut state = self.state.borrow_mut();
        let cookie = state.next_cookie;
        state.next_cookie += 1;
        let request = Request { cookie, ..request };
        let mut head = Vec::with_capacity(32);
        request.put_head(self.mode, &mut head);
        state.send_head(head);
        let (buffer, buffer_out) = match buffer {
            Some(buffer) if request.payload_bytes > 0 => {
                state.outgoing.push(Outgoing::Data(cookie, buffer));
                (None, true)
            }
            buffer => (buffer, false),
        };
        let context = self.connection.agreement().context;
        state.requests.insert(
            cookie,
            InFlight {
                awaited: Awaited::new(request, context),
                buffer,
                buffer_out,
                extents: Vec::new(),
                ended: false,
                abandoned: false,
                waker: None,
            },
        );
        if !std::mem::replace(&mut state.sending, true) {
            let link = Rc::clone(self);
            self.spawner
                .spawn(Box::pin(async move { link.send().await }));
        }
        if !std::mem::replace(&mut state.receiving, true) {
            let link = Rc::clone(self);
            self.spawner
                .spawn(Box::pin(async move { link.receive().await }));
        }
        cookie
    }

    /// Sends what is there, until there is nothing.
    async fn send(self: Rc<Self>) {
        loop {
            let outgoing = {
                let mut state = self.state.borrow_mut();
                if state.outgoing.is_empty() || state.broken {
                    state.sending = false;
                    break;
                }
                std::mem::take(&mut state.outgoing)
            };
            let mut owners = Vec::new();
            let mut parts = Vec::with_capacity(outgoing.len());
            for item in outgoing {
                match item {
                    Outgoing::Head(bytes) => {
                        owners.push(None);
                        parts.push(Part::Bytes(bytes));
                    }
                    Outgoing::Data(cookie, buffer) => {
                        owners.push(Some(cookie));
                        parts.push(Part::Buffer(buffer));
                    }
                }
            }
            let sent = self.channel.send(parts).await;
            {
                let mut state = self.state.borrow_mut();
                for (owner, part) in owners.into_iter().zip(sent.parts) {
                    if let (Some(cookie), Part::Buffer(buffer)) = (owner, part) {
                        state.give_back(cookie, buffer);
                    }
                }
            }
            if let Err(errno) = sent.outcome {
                self.break_off(&format!("sending failed with error {errno}"));
            }
        }
        self.rest();
    }

    /// Receives replies as long as any is awaited.
    async fn receive(self: Rc<Self>) {
        let kept = self.window.take();
        let mut window = kept.unwrap_or_else(Window::new);
        loop {
            if !self.state.borrow_mut().goes_on() {
                break;
            }
            if let Err(violation) = self.take_reply(&mut window).await {
                self.break_off(&violation.text);
            }
        }
        if !window.bytes().is_empty() {
            self.break_off("the server answers what nobody has asked");
        }
        self.window.replace(Some(window));
        self.rest();
    }

    /// Takes one reply, or one chunk of one.
    async fn take_reply(&self, window: &mut Window) -> Result<(), Violation> {
        let incoming = loop {
            if let Some((incoming, taken)) = Incoming::parse(self.mode, window.bytes())? {
                window.take(taken);
                break incoming;
            }
            window.more(&self.channel).await?;
        };
        let cookie = incoming.cookie();
        let (follows, last) = {
            let mut state = self.state.borrow_mut();
            state.answered = true;
            let request = state.requests.get_mut(&cookie);
            let request = request.filter(|request| !request.ended);
            let request = request.ok_or_else(unasked)?;
            request.awaited.accept(incoming, self.mode)?
        };
        match follows {
            Follows::Nothing => {}
            Follows::Zeroes { from, length } => {
                let mut state = self.state.borrow_mut();
                let request = state.requests.get_mut(&cookie).ok_or_else(unasked)?;
                let buffer = request.buffer.as_mut().map(Buffer::as_mut_slice);
                let place = buffer.and_then(|bytes| bytes.get_mut(from..from + length));
                place.ok_or_else(unasked)?.fill(0);
            }
            Follows::Data { from, length } => {
                self.take_data(window, cookie, from, length).await?;
            }
            Follows::Extents {
                payload_bytes,
                wide,
            } => {
                self.take_extents(window, cookie, payload_bytes, wide)
                    .await?;
            }
        }
        if last {
            self.state.borrow_mut().end(cookie);
        }
        Ok(())
    }

    /// Brings data to its place: from the window what is there, the rest straight from the socket.
    async fn take_data(
        &self,
        window: &mut Window,
        cookie: u64,
        from: usize,
        length: usize,
    ) -> Result<(), Violation> {
        let taken = {
            let mut state = self.state.borrow_mut();
            let request = state.requests.get_mut(&cookie).ok_or_else(unasked)?;
            request.buffer_out = true;
            request.buffer.take()
        };
        let mut buffer = taken.ok_or_else(unasked)?;
        let here = window.bytes();
        let here = here.get(..here.len().min(length)).unwrap_or_default();
        let copied = here.len();
        let place = buffer.as_mut_slice().get_mut(from..from + copied);
        let filled = match place {
            Some(place) => {
                place.copy_from_slice(here);
                window.take(copied);
                Ok(())
            }
            None => Err(unasked()),
        };
        let filled = match filled {
            Ok(()) if copied < length => {
                let mut middle = buffer.split_off(from + copied);
                let behind = middle.split_off(length - copied);
                let received = self.channel.receive(middle, 0, Fill::All).await;
                let whole = received.outcome == Ok(length - copied);
                let mut middle = received.buffer;
                let joined = middle.join(behind) && buffer.join(middle);
                match (whole, joined) {
                    (true, true) => Ok(()),
                    (false, true) => Err(Violation {
                        text: "the connection ended within data".to_owned(),
                    }),
                    (_, false) => Err(unasked()),
                }
            }
            filled => filled,
        };
        self.state.borrow_mut().give_back(cookie, buffer);
        filled
    }

    async fn take_extents(
        &self,
        window: &mut Window,
        cookie: u64,
        payload_bytes: u32,
        wide: bool,
    ) -> Result<(), Violation> {
        let mut left = usize::try_from(payload_bytes).unwrap_or(usize::MAX);
        while left > 0 {
            let bytes = window.bytes();
            let bytes = bytes.get(..bytes.len().min(left)).unwrap_or_default();
            let (extents, taken) = parse_extents(wide, bytes)?;
            window.take(taken);
            left -= taken;
            {
                let mut state = self.state.borrow_mut();
                let request = state.requests.get_mut(&cookie).ok_or_else(unasked)?;
                let room = STATUS_EXTENTS_MAX.saturating_sub(request.extents.len());
                request.extents.extend(extents.into_iter().take(room));
            }
            if left > 0 && taken == 0 {
                window.more(&self.channel).await?;
            }
        }
        Ok(())
    }

    /// The connection is of no use any more: everybody who waits hears of it.
    fn break_off(&self, why: &str) {
        let wakers: Vec<_> = {
            let mut state = self.state.borrow_mut();
            if std::mem::replace(&mut state.broken, true) {
                return;
            }
            for item in std::mem::take(&mut state.outgoing) {
                if let Outgoing::Data(cookie, buffer) = item {
                    state.give_back(cookie, buffer);
                }
            }
            let requests = state.requests.values_mut();
            requests
                .filter_map(|request| request.waker.take())
                .collect()
        };
        tracing::warn!(why, "an NBD connection is lost");
        self.connection.give_up();
        self.channel.shutdown();
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Lets others have the connection if nothing is in flight.
    fn rest(&self) {
        let mut state = self.state.borrow_mut();
        if state.broken {
            state.requests.retain(|_, request| !request.abandoned);
            return;
        }
        if state.is_idle() {
            self.connection.release();
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let state = self.state.borrow();
        if !state.broken && state.is_idle() {
            self.channel.keep();
        } else {
            self.connection.give_up();
        }
    }
}

impl State {
    fn is_idle(&self) -> bool {
        self.requests.is_empty() && !self.sending && !self.receiving
    }

    /// Whether a reply is awaited; else the task that receives has ended.
    fn goes_on(&mut self) -> bool {
        let goes_on = !self.broken && self.requests.values().any(|request| !request.ended);
        self.receiving = goes_on;
        goes_on
    }

    /// Heads that follow each other are sent as one part.
    fn send_head(&mut self, head: Vec<u8>) {
        match self.outgoing.last_mut() {
            Some(Outgoing::Head(bytes)) => bytes.extend(head),
            _ => self.outgoing.push(Outgoing::Head(head)),
        }
    }

    /// Nobody else has the buffer of a request any more.
    fn give_back(&mut self, cookie: u64, buffer: Buffer) {
        if let Some(request) = self.requests.get_mut(&cookie) {
            request.buffer = Some(buffer);
            request.buffer_out = false;
            if let Some(waker) = request.waker.take() {
                waker.wake();
            }
            self.forget_abandoned(cookie);
        }
    }

    /// The reply is whole.
    fn end(&mut self, cookie: u64) {
        if let Some(request) = self.requests.get_mut(&cookie) {
            request.ended = true;
            if let Some(waker) = request.waker.take() {
                waker.wake();
            }
            self.forget_abandoned(cookie);
        }
    }

    fn forget_abandoned(&mut self, cookie: u64) {
        let over = |request: &InFlight| request.abandoned && request.ended && !request.buffer_out;
        if self.requests.get(&cookie).is_some_and(over) {
            self.requests.remove(&cookie);
        }
    }
}

/// Nobody waits for a request any more.
struct Abandon<'a> {
    link: &'a Rc<Link>,
    cookie: u64,
}

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        {
            let mut state = self.link.state.borrow_mut();
            let Some(request) = state.requests.get_mut(&self.cookie) else {
                return;
            };
            request.abandoned = true;
            request.waker = None;
            state.forget_abandoned(self.cookie);
        }
        self.link.rest();
    }
}

fn unasked() -> Violation {
    Violation {
        text: "the server answers what nobody has asked".to_owned(),
    }
}

/// Bytes that have been received and not been taken yet.
struct Window {
    buffer: Option<Buffer>,
    start: usize,
    end: usize,
}

impl Window {
    fn new() -> Self {
        Self {
            buffer: Some(Buffer::zeroed(RECEIVE_BYTES)),
            start: 0,
            end: 0,
        }
    }

    fn bytes(&self) -> &[u8] {
        let all = self.buffer.as_ref().map(Buffer::as_slice);
        all.and_then(|bytes| bytes.get(self.start..self.end))
            .unwrap_or_default()
    }

    fn take(&mut self, count: usize) {
        self.start = self.end.min(self.start + count);
    }

    /// Receives at least one byte more.
    async fn more(&mut self, channel: &Channel) -> Result<(), Violation> {
        let ended = |text: &str| Violation {
            text: text.to_owned(),
        };
        let mut buffer = self.buffer.take().ok_or_else(unasked)?;
        buffer.as_mut_slice().copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        if self.end >= buffer.len() {
            return Err(ended("a head that is longer than any can be"));
        }
        let received = channel.receive(buffer, self.end, Fill::Some).await;
        self.buffer = Some(received.buffer);
        match received.outcome {
            Ok(0) => Err(ended("the server has closed the connection")),
            Ok(count) => {
                self.end += count;
                Ok(())
            }
            Err(errno) => Err(ended(&format!("receiving failed with error {errno}"))),
        }
    }
}
