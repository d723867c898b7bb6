//! Data threads: where nodes, jobs and their I/O live. Everything here but the handles stays on its thread.

pub mod context;

pub use context::{DataContext, NodeId, ThreadId};
