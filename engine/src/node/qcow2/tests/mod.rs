//! Images as nodes, on simulated disks: what is read is what was written, whatever the image is like, whatever happens at
//! the same time, and whatever fails.

mod behaviour;
pub(crate) mod faults;
mod flush_behind;
mod keeping;
pub(crate) mod model;
mod oracle;
mod random;
pub(crate) mod reopening;
mod snapshots;
mod sweeps;
pub(crate) mod yard;
