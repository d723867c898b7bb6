//! [`Session`]: what lies between the bytes of a protocol and those on the wire. It knows no socket: whoever has one gives it what
//! came in, and sends what it gives out.

use std::io::{self, Read, Write};

use rustls::{CertificateError, ClientConnection, Connection, Error, ServerConnection};

use crate::tls::certificate::Certificate;

/// Plain bytes that are encrypted at once, at most; a record holds no more.
const RECORD_BYTES: usize = 16 << 10;

/// One side of an encrypted connection.
pub struct Session {
    connection: Connection,
}

/// What came in is not what the other side should have said, or is not believed. What is told to it is in the output.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Fault {
    text: String,
    distrust: Option<Distrust>,
}

/// What is wrong with the other side's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distrust {
    /// Nobody whom we trust has signed it.
    Issuer,
    /// It is of somebody who is called otherwise.
    Name,
    /// Whoever signed it does not stand by it any more.
    Revoked,
    /// It is not valid yet, or not any more.
    OutOfDate,
}

impl Fault {
    /// What is wrong with the other side's certificate, if it is that.
    pub fn distrust(&self) -> Option<Distrust> {
        self.distrust
    }

    fn of_tls(error: &Error) -> Self {
        let distrust = match error {
            Error::InvalidCertificate(wrong) => match wrong {
                CertificateError::UnknownIssuer => Some(Distrust::Issuer),
                CertificateError::NotValidForName
                | CertificateError::NotValidForNameContext { .. } => Some(Distrust::Name),
                CertificateError::Revoked => Some(Distrust::Revoked),
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. } => Some(Distrust::OutOfDate),
                _ => None,
            },
            _ => None,
        };
        Self {
            text: error.to_string(),
            distrust,
        }
    }

    fn of_stream(error: &io::Error) -> Self {
        Self {
            text: error.to_string(),
            distrust: None,
        }
    }
}

/// What one step of receiving came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Bytes from the wire that are done with.
    pub taken: usize,
    /// Plain bytes that there are now.
    pub plain: usize,
    /// The other side has said that nothing more comes.
    pub ended: bool,
}

impl Session {
    /// A client's side, which has to say something first: see [`output`](Self::output).
    pub fn client(connection: ClientConnection) -> Self {
        Self {
            connection: Connection::Client(connection),
        }
    }

    /// A server's side.
    pub fn server(connection: ServerConnection) -> Self {
        Self {
            connection: Connection::Server(connection),
        }
    }

    /// Whether the sides are still getting to know each other; no plain bytes pass until then.
    pub fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// The name in the other side's certificate, if it has shown one that is believed.
    pub fn peer_name(&self) -> Option<String> {
        peer_name(self.connection.peer_certificates()?.first()?)
    }

    /// Takes bytes from the wire until `plain` is full or they are used up. What is not taken is given again, with more room.
    ///
    /// # Errors
    /// The connection is of no use afterwards, but what is in the output should be sent.
    pub fn receive(&mut self, wire: &[u8], plain: &mut [u8]) -> Result<Step, Fault> {
        let mut rest = wire;
        let mut filled = 0;
        loop {
            let room = plain.get_mut(filled..).unwrap_or_default();
            let mut ended = false;
            if !room.is_empty() {
                match self.connection.reader().read(room) {
                    Ok(0) => ended = true,
                    Ok(read) => {
                        filled += read;
                        continue;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(Fault::of_stream(&error)),
                }
            }
            let is_full = filled == plain.len() && !self.connection.is_handshaking();
            if rest.is_empty() || ended || is_full {
                return Ok(Step {
                    taken: wire.len() - rest.len(),
                    plain: filled,
                    ended,
                });
            }
            let read = self.connection.read_tls(&mut rest);
            read.map_err(|error| Fault::of_stream(&error))?;
            let processed = self.connection.process_new_packets();
            processed.map_err(|error| Fault::of_tls(&error))?;
        }
    }

    /// Encrypts plain bytes, behind what is in `wire`.
    ///
    /// # Errors
    /// As [`receive`](Self::receive).
    pub fn send(&mut self, plain: &[u8], wire: &mut Vec<u8>) -> Result<(), Fault> {
        for part in plain.chunks(RECORD_BYTES) {
            let written = self.connection.writer().write_all(part);
            written.map_err(|error| Fault::of_stream(&error))?;
            self.output(wire)?;
        }
        Ok(())
    }

    /// Puts behind what is in `wire` whatever has to be sent besides plain bytes.
    ///
    /// # Errors
    /// As [`receive`](Self::receive).
    pub fn output(&mut self, wire: &mut Vec<u8>) -> Result<(), Fault> {
        while self.connection.wants_write() {
            let written = self.connection.write_tls(wire);
            written.map_err(|error| Fault::of_stream(&error))?;
        }
        Ok(())
    }

    /// Tells the other side that nothing more comes; see [`output`](Self::output).
    pub fn close(&mut self) {
        self.connection.send_close_notify();
    }
}

/// The name in a certificate.
pub fn peer_name(certificate: &[u8]) -> Option<String> {
    Certificate::read(certificate).map(|certificate| certificate.subject)
}
