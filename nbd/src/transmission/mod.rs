//! Requests and their replies.
//!
//! Only heads are made and read here: data is sent from where it lies and received to where it belongs.
//!
//! Spec: NBD, "Transmission".

pub mod block_status;
pub mod reply;
pub mod request;

#[cfg(test)]
mod request_tests;

pub use block_status::{Extent, StatusExtents, StatusQuery};
pub use reply::Reply;
pub use request::{Command, Refusal, Request};
