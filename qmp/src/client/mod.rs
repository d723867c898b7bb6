//! A QMP client: one connection to a running daemon, ours or QEMU's, and what the tools built on it share.

pub mod address;
pub mod arguments;
pub mod connection;
pub mod error;
pub mod jobs;
pub mod runtime;
pub mod transcript;
