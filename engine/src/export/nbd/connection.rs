//! One client that has chosen its export: requests come in here, on the data thread of the export's node.
//!
//! Requests are read one behind the other and carried out side by side; each has a slot until its reply is sent, so that a client
//! which does not take replies is not read any further. Data of a write is received into the buffer that is written from.

use std::cell::{Cell, RefCell};
use std::future::{Future, pending, poll_fn};
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use blockyard_nbd::handshake::Mode;
use blockyard_nbd::transmission::{Command, Refusal, Reply, Request};
use blockyard_nbd::{NbdError, Session};
use blockyard_ring::Fill;
use blockyard_storage::Buffer;
use blockyard_storage::buffer::BufferPool;
use futures_util::future::{join, select};
use tokio::sync::OwnedSemaphorePermit;

use super::memory::{Loan, Memory};
use super::outbox::Outbox;
use super::requests::Writing;
use super::{Attendance, NbdExport};
use crate::data::{DataContext, Spawner};
use crate::limits::CLIENT_REQUESTS_MAX;
use crate::nbd::channel::{Channel, SharedEncryption};
use crate::node::root::Root;
use crate::tls;

/// Bytes received ahead of what they mean.
const INBOX_BYTES: usize = 32 << 10;

/// A client on its way from the handshake to its data thread.
pub(super) struct Arrival {
    /// What was agreed on.
    pub(super) session: Box<Session>,
    /// Its socket.
    pub(super) socket: OwnedFd,
    /// What has been received behind the handshake.
    pub(super) unread: Vec<u8>,
    /// What lies between that and the socket, and what has come in there and is still encrypted.
    pub(super) encryption: Option<(tls::session::Session, Vec<u8>)>,
    /// Its use of the export.
    pub(super) attendance: Attendance,
    /// Its place among the connections of the server.
    pub(super) place: OwnedSemaphorePermit,
    /// Memory of all clients.
    pub(super) pool: BufferPool,
}

/// One client.
pub(super) struct Connection {
    pub(super) channel: Rc<Channel>,
    pub(super) session: Box<Session>,
    pub(super) root: Rc<Root>,
    pub(super) memory: Memory,
    pub(super) outbox: Outbox,
    /// Every write is flushed before it is answered.
    pub(super) writethrough: bool,
    /// Whose bitmaps are shown.
    pub(super) export: Arc<NbdExport>,
    slots: Rc<Slots>,
    spawner: Spawner,
}

/// Requests that are not answered yet.
struct Slots {
    used: Cell<usize>,
    waker: RefCell<Option<Waker>>,
    channel: Rc<Channel>,
}

/// One of them; until its reply is sent.
pub(super) struct Slot(Rc<Slots>);

/// Whether the client goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Request,
    End,
}

/// What has been received and not been read yet.
struct Inbox {
    /// Away while it is being filled.
    buffer: Option<Buffer>,
    at: usize,
    filled: usize,
}

/// Serves a client until it leaves, breaks the protocol, or the export is closed. What it has asked for is carried out then.
pub(super) async fn serve(context: Rc<DataContext>, arrival: Arrival) {
    let Arrival {
        session,
        socket,
        unread,
        encryption,
        attendance,
        place,
        pool,
    } = arrival;
    let export = &attendance.0;
    let Some(root) = context.root(export.place.id) else {
        return;
    };
    let channel = match context.files().socket(socket) {
        Ok(socket) => Rc::new(match encryption {
            None => Channel::plain(socket),
            Some((session, unread)) => {
                Channel::encrypted(socket, SharedEncryption::new(session, &unread))
            }
        }),
        Err(error) => {
            tracing::warn!(%error, "a client cannot be served");
            return;
        }
    };
    let connection = Rc::new(Connection {
        slots: Rc::new(Slots {
            used: Cell::new(0),
            waker: RefCell::default(),
            channel: Rc::clone(&channel),
        }),
        channel,
        session,
        root,
        memory: Memory::new(pool),
        outbox: Outbox::default(),
        writethrough: export.writethrough,
        export: Arc::clone(export),
        spawner: context.spawner().clone(),
    });
    let serving = async {
        let receiving = async {
            connection.receive_all(&unread).await;
            connection.slots.until_used(|used| used == 0).await;
            connection.outbox.end();
        };
        join(receiving, connection.outbox.send_all(&connection.channel)).await;
    };
    let closing = async {
        export.until_closing().await;
        connection.channel.shutdown();
        // A mirror's client decides how long its writers wait; these are gone, and were not answered.
        connection.root.leave();
        pending::<()>().await;
    };
    select(pin!(serving), pin!(closing)).await;
    // In this order: the socket is gone before another client may come, and before the export is.
    drop(connection);
    drop((place, attendance));
}

impl Connection {
    /// Reads requests and starts them.
    async fn receive_all(self: &Rc<Self>, unread: &[u8]) {
        let mode = self.session.mode;
        let mut inbox = Inbox::with(unread);
        loop {
            let parsed = match Request::parse(mode, inbox.bytes()) {
                Ok(parsed) => parsed,
                Err(violation) => {
                    tracing::debug!(%violation, "a client is cut off");
                    return;
                }
            };
            let next = match parsed {
                Some(request) => {
                    inbox.skip(Request::head_bytes(mode));
                    self.take(request, &mut inbox).await
                }
                None => inbox.more(&self.channel).await,
            };
            if next == Next::End {
                return;
            }
        }
    }

    /// Starts one request. Its payload, if it has one, comes next.
    async fn take(self: &Rc<Self>, request: Request, inbox: &mut Inbox) -> Next {
        if request.command == Command::Disconnect {
            return Next::End;
        }
        let slot = self.slot().await;
        if let Err(refusal) = request.check(&self.session) {
            self.refuse(&request, &refusal, slot);
            if refusal.closes {
                return Next::End;
            }
            return inbox.drop(request.payload_bytes, &self.channel).await;
        }
        match request.command {
            Command::Write => return self.receive_write(request, slot, inbox).await,
            Command::Read if self.reads_in_one(&request) => {
                // Bounded by the check.
                let length = usize::try_from(request.length_bytes).unwrap_or(usize::MAX);
                if let Some(loan) = self.memory.take_shared(length) {
                    let connection = Rc::clone(self);
                    self.start(async move { connection.read_into(&request, loan, slot).await });
                    return Next::Request;
                }
                self.slots.until_used(|used| used == 1).await;
                return match self.read_alone(&request, slot).await {
                    true => Next::Request,
                    false => Next::End,
                };
            }
            Command::BlockStatus => {
                // Bounded by the check.
                let length = usize::try_from(request.payload_bytes).unwrap_or(0);
                let mut payload = vec![0; length];
                if inbox.take(&mut payload, &self.channel).await == Next::End {
                    return Next::End;
                }
                let connection = Rc::clone(self);
                self.start(async move {
                    connection.block_status(&request, &payload, slot).await;
                });
            }
            _ => {
                let connection = Rc::clone(self);
                self.start(async move { connection.carry_out(request, slot).await });
            }
        }
        Next::Request
    }

    /// Receives the data of a write piece by piece; each is written as soon as it is there.
    async fn receive_write(
        self: &Rc<Self>,
        request: Request,
        slot: Slot,
        inbox: &mut Inbox,
    ) -> Next {
        let writing = Rc::new(Writing::new(Rc::clone(self), request, slot));
        let mut at = 0;
        while at < request.payload_bytes {
            let rest = usize::try_from(request.payload_bytes - at).unwrap_or(usize::MAX);
            let Loan { buffer, share } = self.memory.take(rest).await;
            let length = buffer.len() as u64;
            let Some(buffer) = inbox.fill(buffer, &self.channel).await else {
                // It is not answered: nobody is there.
                writing.fail(NbdError::Shutdown.errno());
                return Next::End;
            };
            let (offset, piece) = (request.offset + at, Rc::clone(&writing));
            at += length;
            if at == request.payload_bytes {
                // The last one answers, unless others take longer.
                self.start(writing.piece(offset, Loan { buffer, share }));
                drop(piece);
                return Next::Request;
            }
            self.start(piece.piece(offset, Loan { buffer, share }));
        }
        self.start(writing.finish());
        Next::Request
    }

    pub(super) fn start(&self, work: impl Future<Output = ()> + 'static) {
        self.spawner.spawn(Box::pin(work));
    }

    pub(super) fn mode(&self) -> Mode {
        self.session.mode
    }

    pub(super) fn refuse(&self, request: &Request, refusal: &Refusal, slot: Slot) {
        tracing::debug!(?request, text = refusal.text, "a request is refused");
        let mut head = Vec::new();
        Reply::to(request, self.mode()).error(refusal.error, &refusal.text, &mut head);
        self.outbox.push(head, None, Some(slot));
    }

    async fn slot(&self) -> Slot {
        self.slots
            .until_used(|used| used < CLIENT_REQUESTS_MAX)
            .await;
        self.slots.used.set(self.slots.used.get() + 1);
        Slot(Rc::clone(&self.slots))
    }
}

impl Slots {
    /// Waits for a number of them. Only the receiving side does.
    async fn until_used(&self, is_so: impl Fn(usize) -> bool) {
        poll_fn(|cx| {
            if is_so(self.used.get()) {
                return Poll::Ready(());
            }
            self.waker.replace(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The client would wait for an answer that never comes.
            self.0.channel.shutdown();
        }
        self.0.used.set(self.0.used.get() - 1);
        if let Some(waker) = self.0.waker.take() {
            waker.wake();
        }
    }
}

impl Inbox {
    fn with(unread: &[u8]) -> Self {
        let mut buffer = Buffer::zeroed(INBOX_BYTES.max(unread.len()));
        let filled = unread.len();
        if let Some(front) = buffer.as_mut_slice().get_mut(..filled) {
            front.copy_from_slice(unread);
        }
        Self {
            buffer: Some(buffer),
            at: 0,
            filled,
        }
    }

    /// What has not been read yet.
    fn bytes(&self) -> &[u8] {
        let bytes = self.buffer.as_ref().map(Buffer::as_slice);
        bytes
            .and_then(|bytes| bytes.get(self.at..self.filled))
            .unwrap_or_default()
    }

    fn skip(&mut self, count: usize) {
        self.at = self.filled.min(self.at + count);
    }

    /// Receives more, at least one byte.
    async fn more(&mut self, channel: &Channel) -> Next {
        let Some(mut buffer) = self.buffer.take() else {
            return Next::End;
        };
        buffer.as_mut_slice().copy_within(self.at..self.filled, 0);
        self.filled -= self.at;
        self.at = 0;
        let received = channel.receive(buffer, self.filled, Fill::Some).await;
        self.buffer = Some(received.buffer);
        match received.outcome {
            Ok(0) | Err(_) => Next::End,
            Ok(count) => {
                self.filled += count;
                Next::Request
            }
        }
    }

    /// Passes bytes over.
    async fn drop(&mut self, length_bytes: u64, channel: &Channel) -> Next {
        let mut rest = length_bytes;
        loop {
            let here = usize::try_from(rest)
                .map_or(self.bytes().len(), |rest| rest.min(self.bytes().len()));
            self.skip(here);
            rest -= here as u64;
            if rest == 0 {
                return Next::Request;
            }
            if self.more(channel).await == Next::End {
                return Next::End;
            }
        }
    }

    /// Takes bytes out, as many as `into` holds.
    async fn take(&mut self, into: &mut [u8], channel: &Channel) -> Next {
        let mut rest = into;
        loop {
            let here = rest.len().min(self.bytes().len());
            let (front, behind) = rest.split_at_mut(here);
            front.copy_from_slice(self.bytes().get(..here).unwrap_or_default());
            self.skip(here);
            rest = behind;
            if rest.is_empty() {
                return Next::Request;
            }
            if self.more(channel).await == Next::End {
                return Next::End;
            }
        }
    }

    /// Fills a buffer: with what is here, then straight from the connection. `None`: the client is gone.
    async fn fill(&mut self, mut buffer: Buffer, channel: &Channel) -> Option<Buffer> {
        let here = buffer.len().min(self.bytes().len());
        if let (Some(front), Some(bytes)) = (
            buffer.as_mut_slice().get_mut(..here),
            self.bytes().get(..here),
        ) {
            front.copy_from_slice(bytes);
        }
        self.skip(here);
        if here == buffer.len() {
            return Some(buffer);
        }
        let wanted = buffer.len() - here;
        let received = channel.receive(buffer, here, Fill::All).await;
        (received.outcome == Ok(wanted)).then_some(received.buffer)
    }
}
