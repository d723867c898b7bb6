//! [`Watching`]: who watches a piece of work as the observer of the scan that it begins with.

use std::cell::Cell;

use blockyard_storage::LocalFuture;

use crate::pace::{Cancelled, Pace};
use crate::qcow2::check::{Finding, Observer};

/// Hands progress to a [`Pace`] and asks it to pause and to end.
pub(super) struct Watching<'a> {
    pace: &'a dyn Pace,
    expected_bytes: Cell<u64>,
    done_bytes: Cell<u64>,
    cancelled: Cell<bool>,
    must_finish: Cell<bool>,
}

impl<'a> Watching<'a> {
    pub(super) fn new(pace: &'a dyn Pace) -> Self {
        Self {
            pace,
            expected_bytes: Cell::new(0),
            done_bytes: Cell::new(0),
            cancelled: Cell::new(false),
            must_finish: Cell::new(false),
        }
    }
}

impl Watching<'_> {
    /// So many bytes more are to be written.
    pub(super) fn expect(&self, bytes: u64) {
        self.pace.expect(bytes);
    }

    /// So many of those bytes are written.
    pub(super) fn done(&self, bytes: u64) {
        self.pace.done(bytes);
    }

    /// The scan has come to its end, though it may have expected more.
    pub(super) fn end_of_scan(&self) {
        let left = self
            .expected_bytes
            .get()
            .saturating_sub(self.done_bytes.get());
        self.pace.done(left);
        // Another one begins at its beginning.
        self.expected_bytes.set(0);
        self.done_bytes.set(0);
    }

    /// What is left to do is done in any case.
    pub(super) fn must_finish(&self) {
        self.must_finish.set(true);
    }

    /// Between two steps.
    ///
    /// # Errors
    /// When the work is to end.
    pub(super) async fn checkpoint(&self) -> Result<(), Cancelled> {
        self.pace.checkpoint().await
    }
}

impl Observer for Watching<'_> {
    fn found(&self, _: Vec<Finding>) -> LocalFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    fn repaired(&self, _: u64, _: u64) -> LocalFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    fn progress(&self, done_bytes: u64, total_bytes: u64) {
        if done_bytes < self.done_bytes.get() {
            self.end_of_scan();
        }
        let total_bytes = total_bytes.max(done_bytes);
        let expected = self.expected_bytes.get();
        if total_bytes > expected {
            self.pace.expect(total_bytes - expected);
            self.expected_bytes.set(total_bytes);
        }
        let done = self.done_bytes.get();
        if done_bytes > done {
            self.pace.done(done_bytes - done);
            self.done_bytes.set(done_bytes);
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.get() && !self.must_finish.get()
    }

    fn pause(&self) -> Option<LocalFuture<'_, ()>> {
        Some(Box::pin(async {
            if self.pace.checkpoint().await.is_err() {
                self.cancelled.set(true);
            }
        }))
    }
}
