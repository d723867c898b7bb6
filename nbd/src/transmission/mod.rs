//! Requests and their replies.
//!
//! Only heads are made and read here: data is sent from where it lies and received to where it belongs.
//!
//! Spec: NBD, "Transmission".

pub mod block_status;
pub mod incoming;
#[cfg(test)]
mod incoming_tests;
pub mod reply;
pub mod request;

#[cfg(test)]
mod request_tests;

pub use block_status::{Extent, StatusExtents, StatusQuery};
pub use incoming::{Awaited, Content, Failure, Follows, Incoming, parse_extents};
pub use reply::Reply;
pub use request::{Command, Refusal, Request};
