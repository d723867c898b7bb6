//! What an image is: raw (and later qcow2). A format maps, a node moves.
//!
//! This crate says where the bytes of a guest disk live in its files and makes room for new ones. It moves no guest data
//! and knows no runtime, no ring, no JSON and no clock.
#![forbid(unsafe_code)]
