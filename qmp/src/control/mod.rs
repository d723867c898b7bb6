//! The commands for a daemon that runs: `qmp` speaks with it, `jobs` shows and steers its jobs.

pub mod jobs;
pub mod qmp;
pub mod table;
pub mod target;
pub mod watch;
