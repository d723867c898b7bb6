//! [`Talk`]: what a client says and hears until it may use its export, encrypted or not. Blocks, as long as [`Patience`] lets it.

use std::io;
use std::os::fd::OwnedFd;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::nbd::channel::SharedEncryption;
use crate::node::nbd::NbdEncryption;
use crate::node::nbd::connecting::{Patience, reason};
use crate::tls::session::{Distrust, Fault, Session};

/// Encrypted bytes that are received at once.
const READ_BYTES: usize = 4096;

/// A conversation over a socket.
pub(super) struct Talk<'a> {
    socket: &'a OwnedFd,
    patience: &'a Patience<'a>,
    /// What encrypts, and what has come in and is still encrypted.
    encryption: Option<(Session, Vec<u8>)>,
}

impl<'a> Talk<'a> {
    /// One that is not encrypted.
    pub(super) fn new(socket: &'a OwnedFd, patience: &'a Patience<'a>) -> Self {
        Self {
            socket,
            patience,
            encryption: None,
        }
    }

    /// Encrypts everything from here on, once the server has shown who it is.
    ///
    /// # Errors
    /// In QEMU's words where it has some: it is not believed, or says nothing that makes sense.
    pub(super) fn encrypt(&mut self, encryption: &NbdEncryption) -> Result<(), String> {
        let credentials = &encryption.credentials;
        let verifies = credentials.spec().verify_peer;
        // Whoever believes anybody does not ask for a name.
        let hostname = encryption.hostname.as_deref().filter(|_| verifies);
        let connection = credentials.connect(hostname)?;
        let mut session = Session::client(connection);
        let mut wire = Vec::new();
        loop {
            let received = session.receive(&wire, &mut []);
            let mut output = Vec::new();
            let said = session.output(&mut output);
            // The server is told of its fault, if it still hears.
            let sent = self.send_all(&output);
            let step = received.map_err(|fault| distrusted(&fault, hostname))?;
            said.map_err(|fault| distrusted(&fault, hostname))?;
            sent.map_err(|error| lost(&error))?;
            wire.drain(..step.taken);
            if !session.is_handshaking() {
                break;
            }
            self.receive_encrypted(&mut wire)
                .map_err(|error| lost(&error))?;
        }
        // That somebody has signed it does not make it the server that is meant.
        if verifies && hostname.is_none() {
            return Err("No hostname for certificate validation".to_owned());
        }
        self.encryption = Some((session, wire));
        Ok(())
    }

    /// Says something.
    ///
    /// # Errors
    /// The connection is lost, or time is up.
    pub(super) fn say(&mut self, plain: &[u8]) -> Result<(), String> {
        let Some((session, _)) = &mut self.encryption else {
            return self.send_all(plain).map_err(|error| lost(&error));
        };
        let mut wire = Vec::new();
        session
            .send(plain, &mut wire)
            .map_err(|fault| broken(&fault))?;
        session.output(&mut wire).map_err(|fault| broken(&fault))?;
        self.send_all(&wire).map_err(|error| hung_up(&error))
    }

    /// Waits for something: how many bytes, at least one.
    ///
    /// # Errors
    /// The connection is lost, or time is up.
    pub(super) fn hear(&mut self, plain: &mut [u8]) -> Result<usize, String> {
        let Some((mut session, mut wire)) = self.encryption.take() else {
            return self.receive(plain).map_err(|error| lost(&error));
        };
        loop {
            let step = session.receive(&wire, plain);
            let step = step.map_err(|fault| broken(&fault))?;
            wire.drain(..step.taken);
            if step.plain > 0 {
                self.encryption = Some((session, wire));
                return Ok(step.plain);
            }
            if step.ended {
                return Err(hung_up(&Errno::CONNRESET.into()));
            }
            self.receive_encrypted(&mut wire)
                .map_err(|error| hung_up(&error))?;
        }
    }

    /// What encrypts from here on.
    pub(super) fn end(self) -> Option<SharedEncryption> {
        let (session, unread) = self.encryption?;
        Some(SharedEncryption::new(session, &unread))
    }

    fn receive_encrypted(&self, wire: &mut Vec<u8>) -> io::Result<()> {
        let mut buffer = [0; READ_BYTES];
        let count = self.receive(&mut buffer)?;
        wire.extend(buffer.iter().take(count));
        Ok(())
    }

    fn send_all(&self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match rustix::net::send(self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::AGAIN) => self.patience.wait(self.socket, PollFlags::OUT)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// At least one byte.
    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        // A server that talks without end must not be listened to without end.
        self.patience.check()?;
        loop {
            match rustix::net::recv(self.socket, &mut *into, RecvFlags::empty()) {
                Ok((0, _)) => return Err(Errno::CONNRESET.into()),
                Ok((count, _)) => return Ok(count),
                Err(Errno::AGAIN) => self.patience.wait(self.socket, PollFlags::IN)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn lost(error: &io::Error) -> String {
    format!("The NBD handshake failed: {}", reason(error))
}

/// The same once we have shown who we are. Since TLS 1.3 a server looks at that only when we take it for settled, and many leave without
/// a word then.
fn hung_up(error: &io::Error) -> String {
    let text = lost(error);
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::CONNRESET | Errno::PIPE) => {
            format!("{text}; after TLS began, the server may want a certificate that it believes")
        }
        _ => text,
    }
}

fn broken(fault: &Fault) -> String {
    format!("TLS handshake failed: {fault}")
}

/// Why a server is not believed.
fn distrusted(fault: &Fault, hostname: Option<&str>) -> String {
    match fault.distrust() {
        Some(Distrust::Issuer) => "The certificate hasn't got a known issuer".to_owned(),
        Some(Distrust::Revoked) => "The certificate has been revoked".to_owned(),
        Some(Distrust::OutOfDate) => "The certificate is not trusted".to_owned(),
        Some(Distrust::Name) => {
            let hostname = hostname.unwrap_or_default();
            format!("Certificate does not match the hostname {hostname}")
        }
        None => broken(fault),
    }
}
