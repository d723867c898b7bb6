//! [`NbdServer`]: where clients come in and choose an export, on a thread of its own, so that neither the manager nor a data
//! thread has anything to do with a client that has not chosen.
//!
//! Promises: no byte of an image is read before a client has chosen its export; whoever takes too long is cut off; when it is
//! stopped, nobody is half-way in any more.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use blockyard_nbd::Session;
use blockyard_nbd::handshake::server::{Security, ServerHandshake, Step};
use rustix::net::sockopt::set_socket_keepalive;
use rustls::{ServerConfig, ServerConnection};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinSet;

use super::Directory;
use super::connection::{Arrival, serve};
use super::talk::{Encryption, Talk};
use crate::error::EngineError;
use crate::export::spec::NbdServerSpec;
use crate::limits::{CONNECTIONS_MAX, HALF_OPEN_MAX};
use crate::sockets::{Listener, Stream};
use crate::tls::authorization::Authorizations;

/// How long accepting pauses when the kernel has no room for another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Whom the server lets in, if anybody but those on the other end of the wire may.
pub(crate) struct TlsGate {
    /// Certificate, key, and whom they believe.
    pub(crate) config: Arc<ServerConfig>,
    /// Lists of who may come in.
    pub(crate) authorizations: Authorizations,
    /// Which of them; `None`: everybody who is believed.
    pub(crate) list: Option<String>,
}

/// A running server. Stopped when it is dropped, without waiting for that.
pub(crate) struct NbdServer {
    /// Connections at once; 0: as many as come, up to [`CONNECTIONS_MAX`].
    connections_max: u32,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What the server's thread works with.
struct Reception {
    directory: Directory,
    connections: Arc<Semaphore>,
    half_open: Arc<Semaphore>,
    patience: Option<Duration>,
    tls: Option<TlsGate>,
}

impl NbdServer {
    /// Listens, and lets clients choose among what is in `directory`.
    ///
    /// # Errors
    /// In QEMU's words: there is no listening at this address, or what TLS needs is not there.
    pub(crate) async fn start(
        spec: NbdServerSpec,
        directory: Directory,
        tls: Option<Result<TlsGate, EngineError>>,
    ) -> Result<Self, EngineError> {
        let (started, outcome) = oneshot::channel();
        let (stop, stopped) = oneshot::channel();
        let connections_max = spec.connections_max;
        let thread = std::thread::Builder::new()
            .name("nbd-server".to_owned())
            .spawn(move || run(&spec, directory, tls, started, stopped));
        let thread = thread.map_err(|error| {
            EngineError::generic(format!("Cannot start the NBD server: {error}"))
        })?;
        let ended = || EngineError::generic("The NBD server ended while it started");
        outcome.await.map_err(|_| ended())??;
        Ok(Self {
            connections_max,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Whether clients may use several connections at once.
    pub(crate) fn multi_conn(&self) -> bool {
        self.connections_max != 1
    }

    /// Lets nobody in any more, and waits until nobody is half-way in. Who has chosen an export stays.
    pub(crate) async fn stop(mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let joined = tokio::task::spawn_blocking(move || thread.join());
            if !matches!(joined.await, Ok(Ok(()))) {
                tracing::error!("the NBD server ended by a panic (this is a bug)");
            }
        }
    }
}

fn run(
    spec: &NbdServerSpec,
    directory: Directory,
    tls: Option<Result<TlsGate, EngineError>>,
    started: oneshot::Sender<Result<(), EngineError>>,
    stopped: oneshot::Receiver<()>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = started.send(Err(EngineError::generic(error.to_string())));
            return;
        }
    };
    runtime.block_on(async move {
        // An address that is taken comes first, as in QEMU.
        let opened = async { Ok((listen(spec).await?, tls.transpose()?)) };
        let (listener, tls) = match opened.await {
            Ok(opened) => opened,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let connections = places(spec.connections_max, descriptors);
        let patience = u64::from(spec.handshake_seconds_max);
        let reception = Arc::new(Reception {
            directory,
            connections: Arc::new(Semaphore::new(connections)),
            half_open: Arc::new(Semaphore::new(HALF_OPEN_MAX)),
            patience: (patience > 0).then(|| Duration::from_secs(patience)),
            tls,
        });
        if started.send(Ok(())).is_err() {
            // Who has asked for it has given up.
            return;
        }
        tokio::select! {
            _ = stopped => {}
            () = reception.accept_all(&listener) => {}
        }
    });
    // A name that is still looked up holds nobody up.
    runtime.shutdown_background();
}

/// How many connections there may be at once: never so many that all memory is theirs, or every descriptor (`None`: these have no
/// limit), which files and clients of QMP need, too.
fn places(connections_max: u32, descriptors: Option<u64>) -> usize {
    let wanted = match connections_max {
        0 => CONNECTIONS_MAX,
        most => usize::try_from(most).unwrap_or(usize::MAX),
    };
    let half = descriptors.and_then(|most| usize::try_from(most / 2).ok());
    let possible = half.map_or(CONNECTIONS_MAX, |half| half.clamp(1, CONNECTIONS_MAX));
    wanted.min(possible)
}

async fn listen(spec: &NbdServerSpec) -> Result<Listener, EngineError> {
    let listener = Listener::bind(&spec.address).await;
    listener.map_err(EngineError::generic)
}

impl Reception {
    /// Lets clients in. Those beyond a limit wait in the kernel's queue.
    async fn accept_all(self: Arc<Self>, listener: &Listener) {
        // Dropping it cuts off who is half-way in.
        let mut handshakes = JoinSet::new();
        loop {
            tokio::select! {
                entered = self.accept(listener) => {
                    let Some((stream, place, half)) = entered else {
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    };
                    let reception = Arc::clone(&self);
                    handshakes.spawn(async move {
                        reception.receive(stream, place).await;
                        drop(half);
                    });
                }
                // Reaped as they end, so that the set does not grow.
                Some(_) = handshakes.join_next() => {}
            }
        }
    }

    async fn accept(
        &self,
        listener: &Listener,
    ) -> Option<(Stream, OwnedSemaphorePermit, OwnedSemaphorePermit)> {
        let place = Arc::clone(&self.connections).acquire_owned().await.ok()?;
        let half = Arc::clone(&self.half_open).acquire_owned().await.ok()?;
        match listener.accept().await {
            Ok(stream) => Some((stream, place, half)),
            Err(error) => {
                tracing::warn!(%error, "an NBD client cannot be let in");
                None
            }
        }
    }

    /// Lets one client choose, and hands it over to the data thread of its export.
    async fn receive(&self, stream: Stream, place: OwnedSemaphorePermit) {
        let negotiated = async {
            match stream {
                Stream::Unix(mut stream) => {
                    let chosen = self.negotiate(&mut stream).await?;
                    let socket = stream.into_std().ok()?;
                    Some((chosen, OwnedFd::from(socket)))
                }
                Stream::Tcp(mut stream) => {
                    // A peer that is gone without a word does not keep its place for ever.
                    let _ = set_socket_keepalive(&stream, true);
                    let chosen = self.negotiate(&mut stream).await?;
                    let socket = stream.into_std().ok()?;
                    Some((chosen, OwnedFd::from(socket)))
                }
            }
        };
        let negotiated = match self.patience {
            Some(patience) => match tokio::time::timeout(patience, negotiated).await {
                Ok(negotiated) => negotiated,
                Err(_) => {
                    tracing::debug!("an NBD client has taken too long to choose an export");
                    None
                }
            },
            None => negotiated.await,
        };
        let Some(((session, unread, encryption), socket)) = negotiated else {
            return;
        };
        let Some(attendance) = self.directory.enter(&session) else {
            tracing::debug!(export = session.export_name, "an export is gone");
            return;
        };
        let mailbox = attendance.0.place.mailbox.clone();
        let arrival = Arrival {
            session,
            socket,
            unread,
            encryption,
            attendance,
            place,
            pool: self.directory.pool.clone(),
        };
        mailbox.send(Box::new(|context| Box::pin(serve(context, arrival))));
    }

    /// Speaks the handshake. What was agreed on, what came behind it, and what encrypts it; `None`: the client has left, or has to.
    async fn negotiate(
        &self,
        stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    ) -> Option<(Box<Session>, Vec<u8>, Option<Encryption>)> {
        let mut handshake = ServerHandshake::new(match self.tls {
            Some(_) => Security::TlsRequired,
            None => Security::Plain,
        });
        let (mut talk, mut unread) = (Talk::new(stream), Vec::new());
        loop {
            talk.say(&handshake.output()).await?;
            let taken = handshake.receive(&unread);
            unread.drain(..taken);
            let step = handshake.step(&self.directory);
            talk.say(&handshake.output()).await?;
            match step {
                Step::Transmit(session) => return Some((session, unread, talk.end())),
                Step::Close => return None,
                Step::StartTls => {
                    if matches!(handshake.tls_started(&unread), Step::Close) {
                        tracing::warn!("an NBD client has spoken before it was encrypted");
                        return None;
                    }
                    self.let_in(&mut talk).await?;
                }
                Step::More if taken > 0 && !unread.is_empty() => {}
                Step::More => talk.hear(&mut unread).await?,
            }
        }
    }

    /// Encrypts a conversation, and looks who it is. `None`: he may not come in.
    async fn let_in<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        talk: &mut Talk<'_, S>,
    ) -> Option<()> {
        let gate = self.tls.as_ref()?;
        let connection = ServerConnection::new(gate.config.clone()).ok()?;
        let name = talk.encrypt(connection).await?;
        let Some(list) = &gate.list else {
            return Some(());
        };
        let name = name.unwrap_or_default();
        let allowed = gate.authorizations.allow(list, &name);
        if !allowed {
            tracing::warn!("TLS x509 authz check for {name} is denied");
        }
        allowed.then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_never_more_than_there_is_memory_and_descriptors_for() {
        for (connections_max, descriptors, expected) in [
            (100, Some(20_000), 100),
            (0, Some(20_000), CONNECTIONS_MAX),
            (1_000_000, Some(20_000), CONNECTIONS_MAX),
            (0, None, CONNECTIONS_MAX),
            (0, Some(1024), 512),
            (600, Some(1024), 512),
            (1, Some(1), 1),
        ] {
            let places = places(connections_max, descriptors);
            assert_eq!(places, expected, "{connections_max}, {descriptors:?}");
        }
    }
}
