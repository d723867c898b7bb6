//! Sockets of the control plane: binds, connects, or takes over an inherited one. For monitors and for the NBD server; data
//! threads have their own.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use blockyard_ring::inherited::inherited_descriptor;
use blockyard_storage::error::errno_text;
use rustix::net::sockopt::{socket_acceptconn, socket_domain};
use rustix::net::{AddressFamily, SocketType};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};

/// Clients that may queue up before they are accepted.
const BACKLOG: u32 = 1024;
/// Longest path of a socket in bytes.
const PATH_BYTES_MAX: usize = 107;
/// Bytes of an abstract name that is padded to the whole address.
const ABSTRACT_NAME_BYTES: usize = 107;

/// Where a socket is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A path.
    Path(String),
    /// A name without a file.
    Abstract {
        /// The name.
        name: String,
        /// Without padding to the whole address.
        tight: bool,
    },
    /// A host and port.
    Host {
        /// Name or address; empty: any.
        host: String,
        /// Port number or service.
        port: String,
        /// Last port to try when listening.
        port_last: Option<u16>,
        /// Whether IPv4 may be used.
        ipv4: bool,
        /// Whether IPv6 may be used.
        ipv6: bool,
    },
    /// An inherited descriptor.
    Descriptor(i32),
}

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// A UNIX socket, and its file if it has one.
    Unix(UnixListener, Option<SocketFile>),
    /// A TCP socket.
    Tcp(TcpListener),
}

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// Of a UNIX socket.
    Unix(UnixStream),
    /// Of a TCP socket.
    Tcp(TcpStream),
}

/// The file of a listening socket; removed when this is dropped, unless it is another file by then.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let same = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == self.identity);
        if same && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "a socket stays behind");
        }
    }
}

impl Listener {
    /// Listens at an address.
    ///
    /// # Errors
    /// A text for the user, in QEMU's words where it has some.
    pub async fn bind(address: &Address) -> Result<Self, String> {
        match address {
            Address::Path(path) if path.len() > PATH_BYTES_MAX => {
                Err(format!("UNIX socket path '{path}' is too long"))
            }
            Address::Path(path) => bind_path(Path::new(path))
                .map_err(|error| format!("Failed to bind socket to {path}: {}", reason(&error))),
            Address::Abstract { name, tight } => bind_abstract(name, *tight)
                .map_err(|error| format!("Failed to bind socket to {name}: {}", reason(&error))),
            Address::Host {
                host,
                port,
                port_last,
                ..
            } => {
                let port_last = *port_last;
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                for candidate in resolve(address).await? {
                    for port in candidate.port()..=port_last.unwrap_or(candidate.port()) {
                        match bind_tcp(SocketAddr::new(candidate.ip(), port)) {
                            Ok(listener) => return Ok(Listener::Tcp(listener)),
                            Err(error) => last = error,
                        }
                    }
                }
                Err(format!(
                    "Failed to bind socket to {host}:{port}: {}",
                    reason(&last)
                ))
            }
            Address::Descriptor(number) => match take_over(*number)? {
                Inherited::Listener(listener) => Ok(listener),
                Inherited::Connection(_) => Err(format!(
                    "File descriptor '{number}' is not a listening socket"
                )),
            },
        }
    }

    /// Waits for the next client.
    ///
    /// # Errors
    /// The kernel's.
    ///
    /// # Cancel safety
    /// No client is lost.
    pub async fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Unix(listener, _) => Ok(Stream::Unix(listener.accept().await?.0)),
            Listener::Tcp(listener) => Ok(Stream::tcp(listener.accept().await?.0)),
        }
    }
}

/// Connects to an address.
///
/// # Errors
/// A text for the user, in QEMU's words where it has some.
pub async fn connect(address: &Address) -> Result<Stream, String> {
    match address {
        Address::Path(path) => match UnixStream::connect(path).await {
            Ok(stream) => Ok(Stream::Unix(stream)),
            Err(error) => Err(format!("Failed to connect to '{path}': {}", reason(&error))),
        },
        Address::Abstract { name, tight } => {
            let connected = abstract_address(name, *tight)
                .and_then(|address| std::os::unix::net::UnixStream::connect_addr(&address))
                .and_then(|stream| {
                    stream.set_nonblocking(true)?;
                    UnixStream::from_std(stream)
                });
            match connected {
                Ok(stream) => Ok(Stream::Unix(stream)),
                Err(error) => Err(format!("Failed to connect to '{name}': {}", reason(&error))),
            }
        }
        Address::Host { host, port, .. } => {
            let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
            for candidate in resolve(address).await? {
                match TcpStream::connect(candidate).await {
                    Ok(stream) => return Ok(Stream::tcp(stream)),
                    Err(error) => last = error,
                }
            }
            Err(format!(
                "Failed to connect to '{host}:{port}': {}",
                reason(&last)
            ))
        }
        Address::Descriptor(number) => match take_over(*number)? {
            Inherited::Connection(stream) => Ok(stream),
            Inherited::Listener(_) => {
                Err(format!("File descriptor '{number}' is a listening socket"))
            }
        },
    }
}

fn bind_path(path: &Path) -> io::Result<Listener> {
    // What a daemon that ended badly left behind. Anything but a socket is not ours to remove.
    if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    let found = std::fs::symlink_metadata(path)?;
    let file = SocketFile {
        path: std::path::absolute(path)?,
        identity: (found.dev(), found.ino()),
    };
    Ok(Listener::Unix(listener, Some(file)))
}

fn abstract_address(name: &str, tight: bool) -> io::Result<std::os::unix::net::SocketAddr> {
    let mut bytes = name.as_bytes().to_vec();
    if !tight && bytes.len() < ABSTRACT_NAME_BYTES {
        bytes.resize(ABSTRACT_NAME_BYTES, 0);
    }
    std::os::unix::net::SocketAddr::from_abstract_name(bytes)
}

fn bind_abstract(name: &str, tight: bool) -> io::Result<Listener> {
    let address = abstract_address(name, tight)?;
    let listener = std::os::unix::net::UnixListener::bind_addr(&address)?;
    listener.set_nonblocking(true)?;
    Ok(Listener::Unix(UnixListener::from_std(listener)?, None))
}

fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn resolve(address: &Address) -> Result<Vec<SocketAddr>, String> {
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
    let failed = |reason: &str| format!("address resolution failed for {host}:{port}: {reason}");
    if port.parse::<u16>().is_err() {
        return Err(failed("Servname not supported for ai_socktype"));
    }
    let named = if host.is_empty() { "::" } else { host.as_str() };
    let found = tokio::net::lookup_host(format!(
        "{}:{port}",
        if named.contains(':') {
            format!("[{named}]")
        } else {
            named.to_owned()
        }
    ))
    .await
    .map_err(|error| failed(&reason(&error)))?;
    let wanted = |address: &SocketAddr| if address.is_ipv4() { *ipv4 } else { *ipv6 };
    let found: Vec<_> = found.filter(wanted).collect();
    match found.is_empty() {
        true => Err(failed("Address family for hostname not supported")),
        false => Ok(found),
    }
}

enum Inherited {
    Listener(Listener),
    Connection(Stream),
}

fn take_over(number: i32) -> Result<Inherited, String> {
    let no_socket = || format!("File descriptor '{number}' is not a socket");
    let descriptor = inherited_descriptor(number).map_err(|_| no_socket())?;
    let stream = rustix::net::sockopt::socket_type(&descriptor) == Ok(SocketType::STREAM);
    let listening = socket_acceptconn(&descriptor).map_err(|_| no_socket())?;
    let family = socket_domain(&descriptor).map_err(|_| no_socket())?;
    if !stream {
        return Err(format!("File descriptor '{number}' is not a stream socket"));
    }
    adopt(descriptor, listening, family)
        .map_err(|error| format!("File descriptor '{number}': {}", reason(&error)))
}

fn adopt(descriptor: OwnedFd, listening: bool, family: AddressFamily) -> io::Result<Inherited> {
    rustix::io::ioctl_fionbio(&descriptor, true)?;
    let unix = family == AddressFamily::UNIX;
    Ok(match (listening, unix) {
        (true, true) => Inherited::Listener(Listener::Unix(
            UnixListener::from_std(descriptor.into())?,
            None,
        )),
        (true, false) => {
            Inherited::Listener(Listener::Tcp(TcpListener::from_std(descriptor.into())?))
        }
        (false, true) => {
            Inherited::Connection(Stream::Unix(UnixStream::from_std(descriptor.into())?))
        }
        (false, false) => {
            Inherited::Connection(Stream::tcp(TcpStream::from_std(descriptor.into())?))
        }
    })
}

impl Stream {
    fn tcp(stream: TcpStream) -> Self {
        // Small replies must not wait for each other; without it they are only slower.
        let _ = stream.set_nodelay(true);
        Self::Tcp(stream)
    }
}

/// The system's words for an error, without its number.
fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => errno_text(errno),
        None => {
            let text = error.to_string();
            match text.strip_prefix("failed to lookup address information: ") {
                Some(words) => words.to_owned(),
                None => text,
            }
        }
    }
}
