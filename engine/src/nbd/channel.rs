//! [`Channel`]: the bytes of one NBD connection as the protocol sees them, on a data thread.
//!
//! What lies between them and the socket is this file's business: nothing, or TLS. One receive and one send may be in flight at a
//! time.

use std::fmt;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockyard_ring::{Fill, Part, Received, Sent, Socket};
use blockyard_storage::Buffer;
use blockyard_storage::error::EIO;

use crate::tls::session::{Fault, Session, Step};

/// A connection. Both sides see its end when it is dropped.
pub struct Channel {
    socket: Rc<dyn Socket>,
    /// `None`: bytes go over the socket as they are.
    encryption: Option<SharedEncryption>,
}

/// What lies between plain bytes and the socket. It goes with the connection from thread to thread.
#[derive(Clone)]
pub struct SharedEncryption(Arc<Mutex<Encryption>>);

impl fmt::Debug for SharedEncryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedEncryption").finish_non_exhaustive()
    }
}

struct Encryption {
    session: Session,
    /// What has come in and is still encrypted; away while it is being filled.
    wire: Option<Buffer>,
    /// Which part of it has not been used yet.
    held: Range<usize>,
}

/// Encrypted bytes that are received at once, and that are sent at once.
const WIRE_BYTES: usize = 128 << 10;

impl Channel {
    /// A connection whose bytes go over the socket as they are.
    pub fn plain(socket: Rc<dyn Socket>) -> Self {
        Self {
            socket,
            encryption: None,
        }
    }

    /// A connection whose sides know each other already.
    pub fn encrypted(socket: Rc<dyn Socket>, encryption: SharedEncryption) -> Self {
        Self {
            socket,
            encryption: Some(encryption),
        }
    }

    /// Receives into `into[from..]`, which is not empty. As [`Socket::receive`].
    ///
    /// # Cancel safety
    /// Bytes may be lost: the connection is of no use afterwards but to be shut down.
    pub async fn receive(&self, into: Buffer, from: usize, fill: Fill) -> Received {
        match &self.encryption {
            None => self.socket.receive(into, from, fill).await,
            Some(encryption) => encryption.receive(&*self.socket, into, from, fill).await,
        }
    }

    /// Sends all of these parts, in one go as far as the kernel takes them. As [`Socket::send`].
    ///
    /// # Cancel safety
    /// A part of it may have been sent: the connection is of no use afterwards but to be shut down.
    pub async fn send(&self, parts: Vec<Part>) -> Sent {
        match &self.encryption {
            None => self.socket.send(parts, 0).await,
            Some(encryption) => {
                let outcome = encryption.send(&*self.socket, &parts).await;
                Sent { parts, outcome }
            }
        }
    }

    /// Ends both directions: whatever is in flight ends.
    pub fn shutdown(&self) {
        self.socket.shutdown();
    }

    /// Whether the other side will say nothing any more. As [`Socket::peer_has_ended`].
    pub fn peer_has_ended(&self) -> bool {
        self.socket.peer_has_ended()
    }

    /// Leaves the connection open when this is dropped. As [`Socket::keep`].
    pub fn keep(&self) {
        self.socket.keep();
    }
}

impl SharedEncryption {
    /// Of a session that has got to know the other side, and what has come in behind that.
    pub fn new(session: Session, unread: &[u8]) -> Self {
        Self(Arc::new(Mutex::new(Encryption {
            session,
            wire: (!unread.is_empty()).then(|| Buffer::copy_of(unread)),
            held: 0..unread.len(),
        })))
    }

    /// Encrypts what is said last, and that it is. Empty where the connection is broken.
    pub fn last_words(&self, plain: &[u8]) -> Vec<u8> {
        let mut wire = Vec::new();
        let session = &mut self.lock().session;
        let said = session.send(plain, &mut wire);
        session.close();
        match said.and_then(|()| session.output(&mut wire)) {
            Ok(()) => wire,
            Err(_) => Vec::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Encryption> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn receive(
        &self,
        socket: &dyn Socket,
        mut into: Buffer,
        from: usize,
        fill: Fill,
    ) -> Received {
        let mut filled = from;
        let outcome = loop {
            let room = into.as_mut_slice().get_mut(filled..).unwrap_or_default();
            let room_bytes = room.len();
            let decrypted = self.lock().decrypt(room);
            match decrypted {
                Ok(step) => {
                    filled += step.plain;
                    let is_enough = fill == Fill::Some && filled > from;
                    if step.ended || is_enough || step.plain == room_bytes {
                        break Ok(filled - from);
                    }
                }
                Err(fault) => {
                    tracing::debug!(%fault, "an encrypted connection is broken");
                    break Err(EIO);
                }
            }
            match self.refill(socket).await {
                // Whether that is the end is for the protocol to say.
                Ok(0) => break Ok(filled - from),
                Ok(_) => {}
                Err(errno) => break Err(errno),
            }
        };
        Received {
            buffer: into,
            outcome,
        }
    }

    /// Waits for more, once all that has come in is used up. How much it is.
    async fn refill(&self, socket: &dyn Socket) -> Result<usize, i32> {
        let buffer = self.lock().wire.take();
        let buffer = buffer.filter(|buffer| buffer.len() == WIRE_BYTES);
        let buffer = buffer.unwrap_or_else(|| Buffer::zeroed(WIRE_BYTES));
        let received = socket.receive(buffer, 0, Fill::Some).await;
        let mut encryption = self.lock();
        encryption.wire = Some(received.buffer);
        encryption.held = 0..received.outcome.unwrap_or(0);
        received.outcome
    }

    async fn send(&self, socket: &dyn Socket, parts: &[Part]) -> Result<(), i32> {
        let mut wire = Vec::new();
        for part in parts {
            for piece in part.as_slice().chunks(WIRE_BYTES) {
                let encrypted = self.lock().session.send(piece, &mut wire);
                encrypted.map_err(|_| EIO)?;
                if wire.len() >= WIRE_BYTES {
                    let full = Part::Bytes(std::mem::take(&mut wire));
                    socket.send(vec![full], 0).await.outcome?;
                }
            }
        }
        match wire.is_empty() {
            true => Ok(()),
            false => socket.send(vec![Part::Bytes(wire)], 0).await.outcome,
        }
    }
}

impl Encryption {
    /// Makes plain bytes of what has come in.
    fn decrypt(&mut self, plain: &mut [u8]) -> Result<Step, Fault> {
        let wire = self.wire.as_ref().map_or(&[][..], Buffer::as_slice);
        let held = wire.get(self.held.clone()).unwrap_or_default();
        let step = self.session.receive(held, plain)?;
        self.held.start += step.taken;
        Ok(step)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use blockyard_ring::BackendChoice;
    use blockyard_storage::buffer::BufferPool;

    use super::*;
    use crate::data::ThreadSet;
    use crate::node::news::News;
    use crate::tls::session_tests::acquainted;

    #[test]
    fn bytes_cross_on_a_data_thread() {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.expect("a runtime").block_on(async {
            for backend in [BackendChoice::Auto, BackendChoice::Threads] {
                let pool = BufferPool::new(1 << 20);
                let threads = ThreadSet::start(1, backend, pool, News::channel().0);
                let threads = threads.expect("a thread");
                let thread = threads.choose();
                let (here, there) = UnixStream::pair().expect("a pair");
                let serve = threads.run(thread, move |context| {
                    Box::pin(async move {
                        let socket = context.files().socket(OwnedFd::from(there));
                        let channel = Channel::plain(socket.expect("a socket"));
                        let buffer = Buffer::zeroed(5);
                        let received = channel.receive(buffer, 0, Fill::All).await;
                        assert_eq!(received.outcome, Ok(5));
                        let parts = vec![Part::Bytes(vec![9]), Part::Buffer(received.buffer)];
                        channel.send(parts).await.outcome
                    })
                });
                let ask = threads.run(thread, move |context| {
                    Box::pin(async move {
                        let socket = context.files().socket(OwnedFd::from(here));
                        let channel = Channel::plain(socket.expect("a socket"));
                        let sent = channel.send(vec![Part::Bytes(b"hello".to_vec())]).await;
                        assert_eq!(sent.outcome, Ok(()));
                        let received = channel.receive(Buffer::zeroed(6), 0, Fill::All).await;
                        received.buffer.as_slice().to_vec()
                    })
                });
                let (served, asked) = tokio::join!(serve, ask);
                assert_eq!(served, Ok(Ok(())));
                assert_eq!(asked.expect("answered"), b"\x09hello");
                threads.end();
            }
        });
    }

    /// Both sides on one data thread: bytes of any lengths cross in both directions at once.
    #[test]
    fn encrypted_bytes_cross_on_a_data_thread() {
        let Some((client, server)) = acquainted() else {
            return;
        };
        let lengths = [1_usize, 28, 4096, 300_000, 16_384, 1 << 20, 5];
        let bytes = |length: usize, seed: usize| -> Vec<u8> {
            let byte = |at: usize| u8::try_from((at * seed) % 251).expect("short");
            (0..length).map(byte).collect()
        };
        let talk = move |channel: Channel, seed: (usize, usize)| async move {
            let sending = async {
                for length in lengths {
                    let head = bytes(length.min(28), seed.0);
                    let parts = vec![
                        Part::Bytes(head),
                        Part::Buffer(Buffer::copy_of(&bytes(length, seed.0))),
                    ];
                    let sent = channel.send(parts).await;
                    assert_eq!(sent.outcome, Ok(()));
                    assert_eq!(sent.parts.len(), 2);
                }
            };
            let receiving = async {
                for length in lengths {
                    let (head, rest) = (length.min(28), length);
                    let received = channel
                        .receive(Buffer::zeroed(head + rest), 0, Fill::All)
                        .await;
                    assert_eq!(received.outcome, Ok(head + rest));
                    let expected = [bytes(head, seed.1), bytes(rest, seed.1)].concat();
                    assert!(received.buffer.as_slice() == expected);
                }
            };
            futures_util::future::join(sending, receiving).await;
            channel.shutdown();
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.expect("a runtime").block_on(async {
            let pool = BufferPool::new(1 << 20);
            let threads = ThreadSet::start(1, BackendChoice::Auto, pool, News::channel().0);
            let threads = threads.expect("a thread");
            let thread = threads.choose();
            let (here, there) = UnixStream::pair().expect("a pair");
            let client = SharedEncryption::new(client, &[]);
            let server = SharedEncryption::new(server, &[]);
            let serve = threads.run(thread, move |context| {
                Box::pin(async move {
                    let socket = context.files().socket(OwnedFd::from(there));
                    let channel = Channel::encrypted(socket.expect("a socket"), server);
                    talk(channel, (3, 7)).await;
                })
            });
            let ask = threads.run(thread, move |context| {
                Box::pin(async move {
                    let socket = context.files().socket(OwnedFd::from(here));
                    let channel = Channel::encrypted(socket.expect("a socket"), client);
                    talk(channel, (7, 3)).await;
                })
            });
            let (served, asked) = tokio::join!(serve, ask);
            assert_eq!((served, asked), (Ok(()), Ok(())));
            threads.end();
        });
    }
}
