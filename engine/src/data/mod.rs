//! Data threads: where nodes, jobs and their I/O live. Everything here but the handles stays on its thread.

pub mod context;
pub mod cpu_pool;
mod opener;
pub mod spawner;
mod thread;
mod threads;
mod timers;

pub use context::{DataContext, HostFiles, NodeId, ThreadId};
pub use cpu_pool::CpuPool;
pub use spawner::Spawner;
pub(crate) use thread::Mailbox;
pub use threads::ThreadSet;
