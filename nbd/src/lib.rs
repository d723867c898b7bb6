//! The NBD protocol as data: what is said in the handshake and for each request, for a server and for a client.
//!
//! Two machines take bytes and give bytes; who moves them, over which socket, in which runtime and how long that may take is
//! somebody else's. Nothing here panics on what a peer says, and nothing grows with it beyond the limits in [`constants`].
//!
//! Spec: NBD (doc/proto.md of the reference implementation).
#![forbid(unsafe_code)]

pub mod constants;
pub mod errors;
pub mod handshake;
pub mod transmission;
mod wire;

pub use errors::{NbdError, Violation};
pub use handshake::{
    BlockSizes, ContextKind, ExportDirectory, ExportFacts, MetaContext, Mode, Session,
};
