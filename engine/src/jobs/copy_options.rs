//! [`CopyOptions`]: how one job copies. Each kind of work has its own.

use crate::jobs::plan::Layers;

/// Bytes between two durable points, if nothing else is wanted.
pub(crate) const REMEMBER_BYTES: u64 = 1 << 30;

/// How one job copies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyOptions {
    /// Requests in flight at most.
    pub(crate) window_max: usize,
    /// What of the source is copied.
    pub(crate) layers: Layers,
    /// What the target keeps together, in bytes, a power of two.
    pub(crate) unit_bytes: u64,
    /// Units are written compressed, one or more at a time.
    pub(crate) compress: bool,
    /// Bytes per request at most.
    pub(crate) chunk_max_bytes: u64,
    /// Pieces are multiples of this where the rate limit cuts them.
    pub(crate) granularity_bytes: u64,
    /// Zeroed ranges of the target may become holes.
    pub(crate) may_unmap: bool,
    /// What the source has as zeroes when it is looked at first needs nothing on the target. What changes later does.
    pub(crate) skips_first_zeroes: bool,
    /// Zero requests do not count against the rate limit.
    pub(crate) zeroes_are_free: bool,
    /// Several failures of one round count as one.
    pub(crate) one_error_a_round: bool,
    /// What is skipped counts as done; else it is no part of the whole.
    pub(crate) counts_skipped: bool,
    /// A range whose error is ignored is left out, and the copy fails in the end; else it is tried again.
    pub(crate) leaves_out_ignored: bool,
    /// Bytes between two durable points.
    pub(crate) remember_bytes: u64,
}
