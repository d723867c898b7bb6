//! What a job is: its states, its verbs, what it may do to the world, and the arithmetic of speed and errors.

pub mod context;
pub mod error_policy;
pub mod latency;
pub mod progress;
pub mod rates;
pub mod speed;
pub mod status;
pub mod verb;
pub mod work;
