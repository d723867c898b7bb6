//! The only crate that knows JSON: the QMP wire, commands, events and the daemon's command line.
//!
//! The way of one command: bytes -> `wire` -> `session` (negotiation, checks) -> `commands` (arguments to a request) ->
//! engine -> `replies` -> the client's queue. Events take the same queue.
#![forbid(unsafe_code)]

pub mod wire;
