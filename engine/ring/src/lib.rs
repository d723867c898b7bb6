//! The kernel, fenced: io_uring and its thread-pool twin behind the one `Storage` trait.
//!
//! The only crate of the workspace with unsafe code. It knows no runtime, no image format and no job. A [`Reactor`] belongs
//! to one thread; its [`turn`](Reactor::turn) is the only place where that thread waits.

pub mod confined;
mod data_run;
mod entries;
pub mod file_attributes;
pub mod file_calls;
pub mod heap;
pub mod host_file;
mod host_storage;
pub mod inherited;
mod neighbours;
pub mod ofd_lock;
mod polled_socket;
pub mod reactor;
mod ring_file;
mod ring_socket;
pub mod socket;

mod uring;
mod wake;
mod workers;

pub use host_file::{FileKind, HostFile, OpenMode};
pub use reactor::{BackendChoice, BackendKind, Reactor, ReactorConfig, ReactorError, probe};
pub use socket::{Fill, Part, Received, Sent, Socket};
pub use wake::RemoteWaker;
