//! What an image is: qcow2 (raw needs no map). A format maps, a node moves.
//!
//! This crate says where the bytes of a guest disk live in its files and makes room for new ones. It moves no guest data
//! and knows no runtime, no ring, no JSON and no clock.
#![forbid(unsafe_code)]

pub mod error;
pub mod measure;
pub mod more_room;
pub mod pace;
pub mod qcow2;

pub use error::{Corruption, ImageError};
pub use pace::{Cancelled, Pace};
