//! Who listens to a check, and how it tells: findings in bounded batches, progress, and a question whether to go on.

use blockyard_storage::{LocalFuture, StorageError};

use super::findings::{Finding, FindingKind, Severity};
use crate::error::ImageError;

/// Hears what a check finds. A check asks nobody for the time: how often to show progress is the observer's to decide.
pub trait Observer {
    /// Takes the next findings; the check waits until the future ends, so that nothing piles up.
    fn found(&self, findings: Vec<Finding>) -> LocalFuture<'_, ()>;

    /// A repair has put so many corruptions and leaks right, and checks the image again now: findings are of that check from
    /// here on.
    fn repaired(&self, corruptions: u64, leaks: u64) -> LocalFuture<'_, ()>;

    /// So many bytes of metadata have been read of so many that are known of; both grow.
    fn progress(&self, done_bytes: u64, total_bytes: u64);

    /// Whether to end early. Asked between any two steps that read or write.
    fn is_cancelled(&self) -> bool;

    /// Asked between any two steps, before [`is_cancelled`](Self::is_cancelled): the work waits as long as the future takes.
    fn pause(&self) -> Option<LocalFuture<'_, ()>> {
        None
    }
}

/// Hears nothing and never cancels.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unobserved;

impl Observer for Unobserved {
    fn found(&self, _: Vec<Finding>) -> LocalFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    fn repaired(&self, _: u64, _: u64) -> LocalFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    fn progress(&self, _: u64, _: u64) {}

    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Why a check or repair ended early.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CheckStop {
    /// Its observer wanted so. A repair leaves the image no worse than it was.
    #[error("Operation canceled")]
    Cancelled,
    /// The image cannot be checked or repaired.
    #[error(transparent)]
    Failed(#[from] ImageError),
}

impl From<StorageError> for CheckStop {
    fn from(error: StorageError) -> Self {
        Self::Failed(error.into())
    }
}

/// What a check came to. Leaks and corruptions are those that are left.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// Where the last cluster that is in use ends, in bytes.
    pub image_end_offset: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Of these, how many are allocated in the active table.
    pub allocated_clusters: u64,
    /// Of these, how many are compressed.
    pub compressed_clusters: u64,
    /// Allocated clusters that do not follow the one before, compressed ones included.
    pub fragmented_clusters: u64,
    /// Data may be wrong, or become wrong.
    pub corruptions: u64,
    /// Clusters that are reserved for nothing.
    pub leaks: u64,
    /// What could not be looked at.
    pub check_errors: u64,
}

/// Counts findings and hands them on.
pub(in crate::qcow2) struct Sink<'a> {
    observer: &'a dyn Observer,
    /// Findings are counted only: they have been told before.
    pub(in crate::qcow2) silent: bool,
    pending: Vec<Finding>,
    pub(in crate::qcow2) report: Report,
    /// References may be missing.
    pub(in crate::qcow2) hides_references: bool,
    /// Not everything was looked at.
    pub(in crate::qcow2) is_blind: bool,
    /// References that are more than a count can hold; they are corruptions, too.
    pub(in crate::qcow2) overflows: u64,
    /// Corruptions that are gone once the refcount structure has been made anew.
    pub(in crate::qcow2) of_refcounts: u64,
    pub(in crate::qcow2) done_bytes: u64,
    pub(in crate::qcow2) total_bytes: u64,
}

impl<'a> Sink<'a> {
    pub(in crate::qcow2) fn new(observer: &'a dyn Observer, silent: bool) -> Self {
        Self {
            observer,
            silent,
            pending: Vec::new(),
            report: Report::default(),
            hides_references: false,
            is_blind: false,
            overflows: 0,
            of_refcounts: 0,
            done_bytes: 0,
            total_bytes: 0,
        }
    }

    pub(in crate::qcow2) const fn observer(&self) -> &'a dyn Observer {
        self.observer
    }

    /// Counts a finding.
    pub(in crate::qcow2) fn found(&mut self, kind: FindingKind, times: u64) {
        let weight = times.saturating_mul(kind.weight());
        let counter = match kind.severity() {
            Severity::Note => None,
            Severity::Leak => Some(&mut self.report.leaks),
            Severity::Corruption => Some(&mut self.report.corruptions),
            Severity::CheckError => Some(&mut self.report.check_errors),
        };
        if let Some(counter) = counter {
            *counter = counter.saturating_add(weight);
        }
        if matches!(kind, FindingKind::Overflow { .. }) {
            self.overflows = self.overflows.saturating_add(weight);
        }
        self.hides_references |= kind.hides_references();
        self.is_blind |= kind == FindingKind::TooManyUnaligned;
        if kind.severity() == Severity::Corruption && kind.is_of_refcounts() {
            self.of_refcounts = self.of_refcounts.saturating_add(weight);
        }
        self.tell(kind, false, times);
    }

    /// Tells that something is repaired; it is not counted.
    pub(in crate::qcow2) fn repairing(&mut self, kind: FindingKind) {
        self.tell(kind, true, 1);
    }

    fn tell(&mut self, kind: FindingKind, repairing: bool, times: u64) {
        if !self.silent {
            self.pending.push(Finding {
                kind,
                repairing,
                times,
            });
        }
    }

    /// Hands on what was found. Called after every bounded piece of work.
    ///
    /// # Errors
    /// When the observer does not want to go on.
    pub(in crate::qcow2) async fn step(&mut self, bytes: u64) -> Result<(), CheckStop> {
        self.done_bytes = self.done_bytes.saturating_add(bytes);
        self.total_bytes = self.total_bytes.max(self.done_bytes);
        self.observer.progress(self.done_bytes, self.total_bytes);
        if !self.pending.is_empty() {
            self.observer.found(std::mem::take(&mut self.pending)).await;
        }
        if let Some(pause) = self.observer.pause() {
            pause.await;
        }
        match self.observer.is_cancelled() {
            true => Err(CheckStop::Cancelled),
            false => Ok(()),
        }
    }
}
