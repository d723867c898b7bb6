//! [`Address`]: where a daemon listens, as people write it.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// Longest path of a socket that the kernel takes, in bytes.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Where a daemon listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A UNIX socket.
    Unix(PathBuf),
    /// A host and a port, with a colon between them.
    Tcp(String),
}

/// The two ways of a connection, and the process at its other end where the kernel tells.
pub(super) struct Streams {
    pub(super) input: Box<dyn AsyncRead + Send + Unpin>,
    pub(super) output: Box<dyn AsyncWrite + Send + Unpin>,
    pub(super) server: Option<OwnedFd>,
}

/// `HOST:PORT` with a number as port and no slash is TCP, everything else the path of a UNIX socket. `unix:PATH` and
/// `tcp:HOST:PORT` leave no doubt.
impl From<OsString> for Address {
    fn from(given: OsString) -> Self {
        let Some(text) = given.to_str() else {
            return Self::Unix(PathBuf::from(given));
        };
        if let Some(path) = text.strip_prefix("unix:") {
            return Self::Unix(PathBuf::from(path));
        }
        if let Some(host_and_port) = text.strip_prefix("tcp:") {
            return Self::Tcp(host_and_port.to_owned());
        }
        match text.rsplit_once(':') {
            Some((host, port))
                if !host.is_empty() && !text.contains('/') && port.parse::<u16>().is_ok() =>
            {
                Self::Tcp(text.to_owned())
            }
            _ => Self::Unix(PathBuf::from(text)),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(formatter, "{}", path.display()),
            Self::Tcp(host_and_port) => formatter.write_str(host_and_port),
        }
    }
}

impl Address {
    /// Connects.
    ///
    /// # Errors
    /// The kernel's or the resolver's. [`io::ErrorKind::WouldBlock`]: others wait there already, more than the server lets
    /// wait.
    pub(super) async fn connect(&self) -> io::Result<Streams> {
        match self {
            Self::Unix(path) if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX => {
                connect_below(path).await
            }
            Self::Unix(path) => Ok(halves(UnixStream::connect(path).await?)),
            Self::Tcp(host_and_port) => {
                let stream = TcpStream::connect(host_and_port).await?;
                stream.set_nodelay(true)?;
                let (input, output) = stream.into_split();
                Ok(Streams {
                    input: Box::new(input),
                    output: Box::new(output),
                    server: None,
                })
            }
        }
    }
}

/// Connects to a socket whose path is too long for the kernel, by its name below its opened folder.
async fn connect_below(path: &Path) -> io::Result<Streams> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let folder = rustix::fs::open(folder, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let short = Path::new("/proc/self/fd")
        .join(folder.as_raw_fd().to_string())
        .join(name);
    Ok(halves(UnixStream::connect(short).await?))
}

fn halves(stream: UnixStream) -> Streams {
    let server = stream.peer_cred().ok().and_then(|peer| peer.pid());
    let server = server.and_then(Pid::from_raw);
    let (input, output) = stream.into_split();
    Streams {
        input: Box::new(input),
        output: Box::new(output),
        server: server.and_then(|pid| pidfd_open(pid, PidfdFlags::NONBLOCK).ok()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_hosts_are_told_apart() {
        let unix = |path: &str| Address::Unix(PathBuf::from(path));
        let tcp = |text: &str| Address::Tcp(text.to_owned());
        for (given, expected) in [
            ("qmp.sock", unix("qmp.sock")),
            ("/run/a:1", unix("/run/a:1")),
            ("./a:1", unix("./a:1")),
            ("unix:a:1", unix("a:1")),
            ("localhost:4444", tcp("localhost:4444")),
            ("[::1]:4444", tcp("[::1]:4444")),
            ("tcp:a:ssh", tcp("a:ssh")),
            ("a:ssh", unix("a:ssh")),
            ("a:70000", unix("a:70000")),
            (":80", unix(":80")),
        ] {
            assert_eq!(Address::from(OsString::from(given)), expected, "{given}");
        }
    }
}
