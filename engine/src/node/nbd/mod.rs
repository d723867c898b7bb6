//! Disks of other hosts: the driver `nbd`. A storage whose requests go over connections, which may break and come back.
//!
//! [`Remote`] is what is known on every thread: where the server is, what it has agreed to, and the open connections. One data
//! thread at a time has requests on a connection; with none in flight it can go on from any other, so that a node moves
//! without its server noticing.

mod connecting;
mod lane;
mod link;
mod remote;
mod storage;
mod talk;
#[cfg(test)]
mod tests;

pub use connecting::{NbdEncryption, NbdTarget, connect_until};
pub use remote::{NbdConnection, Remote};
pub use storage::NbdStorage;
