//! The only crate that knows JSON: the QMP wire, commands, events and the daemon's command line.
//!
//! The way of one command: bytes -> `wire` -> `session` (negotiation, checks) -> `commands` (arguments, by `schema`, to a
//! request) -> engine -> `replies` -> the client's queue in `server`. Events take the same queue.
#![forbid(unsafe_code)]

pub mod client;
pub mod commands;
pub mod control;
pub mod daemon;
pub mod error;
pub mod events;
pub mod keyval;
pub mod program;
pub mod replies;
pub mod schema;
pub mod server;
pub mod session;
pub mod signals;
pub mod size;
pub mod terminal;
pub mod tour;
pub mod wire;
