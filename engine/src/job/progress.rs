//! Done and expected, as two counters that anybody may read at any time and nobody waits for.

use std::sync::atomic::{AtomicU64, Ordering};

/// Progress of one job in bytes. `current` never decreases; `total` may move both ways.
#[derive(Debug, Default)]
pub struct Progress {
    current_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

impl Progress {
    /// Bytes done so far.
    pub fn current_bytes(&self) -> u64 {
        self.current_bytes.load(Ordering::Acquire)
    }

    /// Bytes expected in all.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes.load(Ordering::Acquire)
    }

    /// Counts `bytes` more as done.
    pub fn done(&self, bytes: u64) {
        self.current_bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    /// Expects `bytes` more than are done now.
    pub fn set_remaining(&self, bytes: u64) {
        self.total_bytes.store(
            self.current_bytes().saturating_add(bytes),
            Ordering::Release,
        );
    }

    /// Expects `bytes` more than before.
    pub fn increase_remaining(&self, bytes: u64) {
        self.total_bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    /// Expects `bytes` less than before.
    pub fn decrease_remaining(&self, bytes: u64) {
        let _ = self
            .total_bytes
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |total| {
                Some(total.saturating_sub(bytes))
            });
    }
}
