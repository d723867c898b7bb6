//! [`CopyOptions`]: how one job copies. Each kind of work has its own.

use crate::jobs::plan::Layers;

/// Bytes between two durable points, if nothing else is wanted.
pub(crate) const REMEMBER_BYTES: u64 = 1 << 30;

/// Requests in flight at most that are as long as they may be: a pause waits for them.
const LONG_REQUESTS_MAX: u64 = 16;

/// Requests in flight at most that bring over what writers have just changed, however short: theirs wait behind them.
pub(crate) const FOLLOWING_MAX: usize = 16;

/// Shorter ones: where a distance is what they wait for, more of them move more.
const REQUESTS_MAX: usize = 64;

/// How much of a copy is in flight at most. The bytes are kept by and large: when requests become longer, those that are on their way
/// already end first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WindowLimits {
    /// Requests, however short they are.
    pub(crate) requests: usize,
    /// Bytes of all of them, as they count in memory; one may be longer.
    pub(crate) bytes: u64,
}

impl WindowLimits {
    /// What a job has in flight whose requests are of at most `longest_bytes`, if nobody wants less.
    pub(crate) fn of(longest_bytes: u64) -> Self {
        Self {
            requests: REQUESTS_MAX,
            bytes: longest_bytes.saturating_mul(LONG_REQUESTS_MAX),
        }
    }

    /// The same, and no more than so many requests.
    pub(crate) fn with_requests(self, most: usize) -> Self {
        Self {
            requests: self.requests.min(most),
            ..self
        }
    }

    /// The same, and no more than so many bytes.
    pub(crate) fn with_bytes(self, most: u64) -> Self {
        Self {
            bytes: self.bytes.min(most),
            ..self
        }
    }
}

/// How one job copies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyOptions {
    /// How much is in flight at most.
    pub(crate) window: WindowLimits,
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
