//! Connecting to an NBD server and the handshake, with a deadline. Blocks: for threads that may.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockyard_nbd::handshake::client::{Agreement, ClientHandshake, HandshakeError, Step, Wishes};
use blockyard_storage::error::errno_text;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType};

use crate::node::nbd::NbdConnection;
use crate::node::nbd::talk::Talk;
use crate::sockets::Address;
use crate::tls::credentials::Credentials;

/// Longest path of a UNIX socket in bytes.
const PATH_BYTES_MAX: usize = 107;
/// How often somebody who waits looks whether it still matters.
const LOOK: Duration = Duration::from_millis(200);
/// Between two looks at a queue that is full.
const PAUSE: Duration = Duration::from_millis(20);
/// Between two attempts: doubled from the first to the last of these.
const PAUSES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(200));

/// Where a server is, and what is wanted of it.
#[derive(Clone, Debug)]
pub struct NbdTarget {
    /// Its socket.
    pub address: Address,
    /// The export and how it is used.
    pub wishes: Wishes,
    /// How its bytes are encrypted, where [`Wishes::tls`] asks for that.
    pub encryption: Option<NbdEncryption>,
}

/// How bytes between a client and a server are encrypted.
#[derive(Clone, Debug)]
pub struct NbdEncryption {
    /// Who the client is, and whom it trusts. The same for every connection.
    pub credentials: Arc<Credentials>,
    /// What the server's certificate has to call it; `None`: nobody has said, so that none is good enough.
    pub hostname: Option<String>,
}

/// Connects, again and again until `retry_until` if it does not succeed. One attempt ends at `deadline` at the latest, and soon
/// after `given_up`.
///
/// # Errors
/// Why the last attempt failed: a text for the user, in QEMU's words where it has some.
pub fn connect_until(
    target: &NbdTarget,
    retry_until: Instant,
    deadline: Instant,
    given_up: &AtomicBool,
) -> Result<NbdConnection, String> {
    let (mut pause, longest) = PAUSES;
    loop {
        let patience = Patience { deadline, given_up };
        match connect(target, &patience) {
            Err(text) if Instant::now() < retry_until && patience.check().is_ok() => {
                tracing::debug!(text, "once more");
                std::thread::sleep(pause);
                pause = (pause * 2).min(longest);
            }
            ended => return ended,
        }
    }
}

fn connect(target: &NbdTarget, patience: &Patience<'_>) -> Result<NbdConnection, String> {
    let socket = open(&target.address, patience)?;
    let mut talk = Talk::new(&socket, patience);
    let agreement = shake_hands(&mut talk, target)?;
    let encryption = talk.end();
    Ok(NbdConnection::new(socket, agreement, encryption))
}

/// How long somebody waits.
pub(super) struct Patience<'a> {
    deadline: Instant,
    given_up: &'a AtomicBool,
}

impl Patience<'_> {
    /// # Errors
    /// It is over.
    pub(super) fn check(&self) -> io::Result<()> {
        if self.given_up.load(Ordering::Acquire) || Instant::now() >= self.deadline {
            return Err(Errno::TIMEDOUT.into());
        }
        Ok(())
    }

    /// Waits until the socket can go on.
    pub(super) fn wait(&self, socket: &OwnedFd, events: PollFlags) -> io::Result<()> {
        loop {
            self.check()?;
            let left = self.deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left.min(LOOK)).ok();
            match poll(&mut [PollFd::new(socket, events)], timeout.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn open(address: &Address, patience: &Patience<'_>) -> Result<OwnedFd, String> {
    match address {
        Address::Path(path) => {
            if path.len() > PATH_BYTES_MAX {
                return Err(format!("UNIX socket path '{path}' is too long"));
            }
            let unix = SocketAddrUnix::new(path.as_str());
            let socket = unix.map_err(io::Error::from);
            let socket = socket.and_then(|unix| open_unix(&unix, patience));
            socket.map_err(|error| failed(path, &error))
        }
        Address::Abstract { name, tight } => {
            let mut bytes = name.as_bytes().to_vec();
            if !tight {
                bytes.resize(bytes.len().max(PATH_BYTES_MAX), 0);
            }
            let unix = SocketAddrUnix::new_abstract_name(&bytes);
            let socket = unix.map_err(io::Error::from);
            let socket = socket.and_then(|unix| open_unix(&unix, patience));
            socket.map_err(|error| failed(name, &error))
        }
        Address::Host { host, port, .. } => {
            let mut last = io::Error::from(Errno::ADDRNOTAVAIL);
            for candidate in resolve(address)? {
                match open_tcp(candidate, patience) {
                    Ok(socket) => return Ok(socket),
                    Err(error) => last = error,
                }
            }
            Err(failed(&format!("{host}:{port}"), &last))
        }
        Address::Descriptor(_) => Err("only QEMU supports file descriptor passing".to_owned()),
    }
}

fn failed(place: &str, error: &io::Error) -> String {
    format!("Failed to connect to '{place}': {}", reason(error))
}

/// The system's words for an error, without its number.
pub(super) fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => errno_text(errno),
        None => error.to_string(),
    }
}

fn open_unix(address: &SocketAddrUnix, patience: &Patience<'_>) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match rustix::net::connect(&socket, address) {
            Ok(()) => return Ok(socket),
            // So many wait to be accepted that there is no room for one more.
            Err(Errno::AGAIN | Errno::INTR) => {
                patience.check()?;
                std::thread::sleep(PAUSE);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn open_tcp(address: SocketAddr, patience: &Patience<'_>) -> io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &SocketAddrAny::from(address)) {
        Ok(()) => {}
        Err(Errno::INPROGRESS | Errno::INTR) => {
            patience.wait(&socket, PollFlags::OUT)?;
            rustix::net::sockopt::socket_error(&socket)??;
        }
        Err(error) => return Err(error.into()),
    }
    // Small requests must not wait for each other; without it they are only slower.
    let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
    // A host that is gone without a word is noticed in about a minute.
    let _ = rustix::net::sockopt::set_socket_keepalive(&socket, true);
    let _ = rustix::net::sockopt::set_tcp_keepidle(&socket, Duration::from_secs(30));
    let _ = rustix::net::sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(10));
    let _ = rustix::net::sockopt::set_tcp_keepcnt(&socket, 3);
    let _ = rustix::net::sockopt::set_tcp_user_timeout(&socket, 60_000);
    Ok(socket)
}

/// The addresses of a host that may be used.
fn resolve(address: &Address) -> Result<Vec<SocketAddr>, String> {
    let Address::Host {
        host,
        port,
        ipv4,
        ipv6,
        ..
    } = address
    else {
        return Ok(Vec::new());
    };
    let unresolved =
        |reason: &str| format!("address resolution failed for {host}:{port}: {reason}");
    let Ok(number) = port.parse::<u16>() else {
        return Err(unresolved("Servname not supported for ai_socktype"));
    };
    let named = if host.is_empty() { "localhost" } else { host };
    let found = (named, number).to_socket_addrs();
    // The standard library puts its own words before the resolver's.
    let found = found.map_err(|error| {
        let text = reason(&error);
        let own = "failed to lookup address information: ";
        unresolved(text.strip_prefix(own).unwrap_or(&text))
    })?;
    let wanted = |address: &SocketAddr| if address.is_ipv4() { *ipv4 } else { *ipv6 };
    Ok(found.filter(wanted).collect())
}

fn shake_hands(talk: &mut Talk<'_>, target: &NbdTarget) -> Result<Agreement, String> {
    let mut handshake = ClientHandshake::new(target.wishes.clone());
    let mut bytes = [0; 4096];
    let mut held = 0..0;
    loop {
        match handshake.step() {
            Ok(Step::More) => {}
            // What comes behind is nothing that anybody has asked for.
            Ok(Step::Transmit(_)) if !held.is_empty() => {
                return Err("Unexpected data behind the handshake".to_owned());
            }
            Ok(Step::Transmit(agreement)) => return Ok(*agreement),
            Ok(Step::StartTls) => {
                let unread = bytes.get(held.clone()).unwrap_or_default();
                let started = handshake.tls_started(unread);
                started.map_err(|error| told(&error))?;
                let Some(encryption) = &target.encryption else {
                    return Err("TLS was asked for without credentials (bug)".to_owned());
                };
                talk.encrypt(encryption)?;
            }
            Err(error) => return Err(told(&error)),
        }
        talk.say(&handshake.output())?;
        if held.is_empty() {
            held = 0..talk.hear(&mut bytes)?;
        }
        held.start += handshake.receive(bytes.get(held.clone()).unwrap_or_default());
    }
}

fn told(error: &HandshakeError) -> String {
    if let HandshakeError::Refused { reason, .. } = error
        && !reason.is_empty()
    {
        tracing::info!(reason, "the NBD server refuses");
    }
    error.to_string()
}
