//! What can go wrong between a client and a daemon, in words for the person at the terminal.

use std::io;
use std::time::Duration;

use crate::client::address::Address;

/// The connection could not be made, or has ended.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing could be reached there.
    #[error("{address}: {reason}")]
    Unreachable {
        /// As it was given.
        address: String,
        /// What to make of it.
        reason: String,
    },
    /// It took the connection, and said nothing.
    #[error(
        "{address}: no greeting within {} s: another client may hold this socket (qemu-storage-daemon serves one at a \
         time and lets others wait), or it is no QMP socket", .waited.as_secs_f32()
    )]
    Silent {
        /// As it was given.
        address: String,
        /// How long it had time.
        waited: Duration,
    },
    /// It speaks something else.
    #[error("{address}: this is no QMP server: {detail}")]
    NotQmp {
        /// As it was given.
        address: String,
        /// What came instead.
        detail: String,
    },
    /// It was there, and has gone.
    #[error("{address}: the daemon has closed the connection{}", why(.reason))]
    Gone {
        /// As it was given.
        address: String,
        /// The kernel's word on it, where there is one.
        reason: Option<io::Error>,
    },
}

fn why(reason: &Option<io::Error>) -> String {
    match reason {
        Some(error) => format!(": {error}"),
        None => String::new(),
    }
}

impl ClientError {
    /// For a connection that was not made.
    pub(super) fn unreachable(address: &Address, error: &io::Error) -> Self {
        use io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
        let reason = match (address, error.kind()) {
            (Address::Unix(_), NotFound) => {
                "there is no such socket; is the daemon running?".into()
            }
            (Address::Unix(path), ConnectionRefused) if is_no_socket(path) => {
                "this is not a socket".into()
            }
            (Address::Unix(_), ConnectionRefused) => {
                "nobody listens there; a daemon that was killed leaves its socket behind".into()
            }
            (Address::Tcp(_), ConnectionRefused) => {
                "nobody listens there; is the daemon running?".into()
            }
            (_, PermissionDenied) => {
                "permission denied; the daemon may belong to another user".into()
            }
            _ => error.to_string(),
        };
        Self::Unreachable {
            address: address.to_string(),
            reason,
        }
    }
}

fn is_no_socket(path: &std::path::Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|found| !found.file_type().is_socket())
}

/// The daemon's answer to a command it did not carry out, as it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{class}: {text}")]
pub struct Refusal {
    /// `GenericError` or another.
    pub class: String,
    /// The description.
    pub text: String,
}

/// A command that has no result.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The daemon refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Nobody knows what became of it.
    #[error(transparent)]
    Lost(#[from] ClientError),
}
