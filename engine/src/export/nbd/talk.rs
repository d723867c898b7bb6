//! [`Talk`]: what a client that has not chosen an export yet says and hears, encrypted or not.

use std::time::Duration;

use rustls::ServerConnection;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::tls::session::Session;

/// Bytes read at once from a client that has not chosen yet.
const READ_BYTES: usize = 4096;

/// How long a client may take to leave that is not let in, and what it may still say.
const LEAVING_WAIT: Duration = Duration::from_secs(1);
const LEAVING_BYTES_MAX: usize = 64 << 10;

/// What lies between plain bytes and the socket, and what has come in there and is still encrypted.
pub(super) type Encryption = (Session, Vec<u8>);

/// A conversation over a stream.
pub(super) struct Talk<'a, S> {
    stream: &'a mut S,
    encryption: Option<Encryption>,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> Talk<'a, S> {
    /// One that is not encrypted.
    pub(super) fn new(stream: &'a mut S) -> Self {
        Self {
            stream,
            encryption: None,
        }
    }

    /// Encrypts everything from here on, once the client has shown who it is: the name in its certificate, if it has any. `None`:
    /// it has left, or is not believed.
    pub(super) async fn encrypt(&mut self, connection: ServerConnection) -> Option<Option<String>> {
        let mut session = Session::server(connection);
        let mut wire = Vec::new();
        while session.is_handshaking() {
            let received = session.receive(&wire, &mut []);
            let mut output = Vec::new();
            let said = session.output(&mut output);
            // The client is told of its fault.
            self.stream.write_all(&output).await.ok()?;
            match received {
                Ok(step) => drop(wire.drain(..step.taken)),
                Err(fault) => {
                    tracing::warn!(%fault, "an NBD client cannot be believed");
                    self.let_leave().await;
                    return None;
                }
            }
            said.ok()?;
            if session.is_handshaking() {
                self.read(&mut wire).await?;
            }
        }
        let name = session.peer_name();
        self.encryption = Some((session, wire));
        Some(name)
    }

    /// What the client says before it has heard of its fault is let go by: were it not read, he would hear that the connection was
    /// reset, and nothing else.
    async fn let_leave(&mut self) {
        let leaving = async {
            self.stream.shutdown().await?;
            let (mut buffer, mut left) = ([0; READ_BYTES], LEAVING_BYTES_MAX);
            while left > 0 {
                match self.stream.read(&mut buffer).await? {
                    0 => break,
                    count => left = left.saturating_sub(count),
                }
            }
            std::io::Result::Ok(())
        };
        // He is cut off whether or not he leaves.
        let _ = tokio::time::timeout(LEAVING_WAIT, leaving).await;
    }

    /// Says something. `None`: the client has left.
    pub(super) async fn say(&mut self, plain: &[u8]) -> Option<()> {
        let Some((session, _)) = &mut self.encryption else {
            return self.stream.write_all(plain).await.ok();
        };
        let mut wire = Vec::new();
        session.send(plain, &mut wire).ok()?;
        session.output(&mut wire).ok()?;
        self.stream.write_all(&wire).await.ok()
    }

    /// Waits for something, which goes behind what is in `plain`. `None`: the client has left.
    pub(super) async fn hear(&mut self, plain: &mut Vec<u8>) -> Option<()> {
        let mut buffer = [0; READ_BYTES];
        loop {
            let Some((session, wire)) = &mut self.encryption else {
                return self.read(plain).await;
            };
            let step = session.receive(wire, &mut buffer).ok()?;
            wire.drain(..step.taken);
            if step.plain > 0 {
                plain.extend(buffer.iter().take(step.plain));
                return Some(());
            }
            if step.ended {
                return None;
            }
            let mut more = std::mem::take(wire);
            self.read(&mut more).await?;
            if let Some((_, wire)) = &mut self.encryption {
                *wire = more;
            }
        }
    }

    /// What encrypts from here on.
    pub(super) fn end(self) -> Option<Encryption> {
        self.encryption
    }

    async fn read(&mut self, into: &mut Vec<u8>) -> Option<()> {
        let mut buffer = [0; READ_BYTES];
        let count = self.stream.read(&mut buffer).await.ok()?;
        into.extend(buffer.iter().take(count));
        (count > 0).then_some(())
    }
}
