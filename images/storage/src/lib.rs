//! What a host file can do, as a trait, and the owned aligned buffers that travel through it.
//!
//! This crate knows no runtime, no ring, no image format and no unsafe code. Everything above it (formats, nodes, jobs)
//! reaches bytes only through [`Storage`]; everything below it (io_uring, a thread pool, memory, the simulator)
//! implements that one trait and passes the one conformance suite.
#![forbid(unsafe_code)]

pub mod aligned;
pub mod buffer;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
pub mod error;
pub mod facts;
pub mod memory;
pub mod range;
pub mod storage;
pub mod writes_in_flight;

pub use aligned::Aligned;
pub use buffer::{Buffer, BufferPool};
pub use error::{Operation, StorageError};
pub use facts::{Preallocation, StorageFacts, ZeroMode};
pub use memory::MemoryStorage;
pub use range::ByteRange;
pub use storage::{Extent, LocalFuture, Storage, Transfer};
pub use writes_in_flight::WritesInFlight;
