//! Check and repair of a qcow2 image on its node.

use std::rc::Rc;

use blockyard_images::qcow2::check::{
    self, CheckStop, Finding, Observer, Repair, Report, Severity as FoundSeverity,
};
use blockyard_storage::{LocalFuture, Storage};

use crate::error::EngineError;
use crate::images::watcher::{ImageEvent, ImageWatcher};
use crate::images::{cancelled, refused};
use crate::node::Node;
use crate::node::child_storage::ChildStorage;

/// What a check may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckSpec {
    /// What is put right; `None`: nothing is written.
    pub repair: Option<RepairChoice>,
}

/// How much is put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepairChoice {
    /// Leaked clusters are given back.
    Leaks,
    /// Everything that can be.
    All,
}

/// What a check came to, after the repair if there was one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckView {
    /// Where the last cluster that is in use ends, in bytes.
    pub image_end_offset: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Of these, how many are allocated.
    pub allocated_clusters: u64,
    /// Of these, how many are compressed.
    pub compressed_clusters: u64,
    /// Of the allocated ones, how many do not follow the one before.
    pub fragmented_clusters: u64,
    /// Corruptions that are left.
    pub corruptions: u64,
    /// Leaked clusters that are left.
    pub leaks: u64,
    /// What could not be looked at.
    pub check_errors: u64,
    /// Corruptions that were put right.
    pub corruptions_fixed: u64,
    /// Leaked clusters that were given back.
    pub leaks_fixed: u64,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FindingView {
    /// The line of `qemu-img check`, where it has one.
    pub text: String,
    /// How bad it is.
    pub severity: Severity,
    /// In how many places.
    pub times: u64,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Nothing is wrong; what the check does.
    Note,
    /// Room is wasted.
    Leak,
    /// Data may be wrong, or become wrong.
    Corruption,
    /// It could not be looked at.
    CheckError,
}

impl CheckView {
    fn of(report: &Report) -> Self {
        Self {
            image_end_offset: report.image_end_offset,
            total_clusters: report.total_clusters,
            allocated_clusters: report.allocated_clusters,
            compressed_clusters: report.compressed_clusters,
            fragmented_clusters: report.fragmented_clusters,
            corruptions: report.corruptions,
            leaks: report.leaks,
            check_errors: report.check_errors,
            corruptions_fixed: 0,
            leaks_fixed: 0,
        }
    }
}

/// Checks the image on a node, and repairs it if wanted.
///
/// # Errors
/// When the image is refused or cannot be read or written, with what says more in brackets; when it was cancelled.
pub(super) async fn run(
    node: Rc<dyn Node>,
    spec: CheckSpec,
    watcher: &ImageWatcher,
) -> Result<CheckView, EngineError> {
    let storage = Rc::new(ChildStorage::new(node));
    let file: Rc<dyn Storage> = storage;
    let observer = Told(watcher);
    let checked = match spec.repair {
        None => check::check(&file, &observer)
            .await
            .map(|report| CheckView::of(&report)),
        Some(choice) => {
            let how = match choice {
                RepairChoice::Leaks => Repair::Leaks,
                RepairChoice::All => Repair::All,
            };
            let repaired = check::repair(&file, how, &observer).await;
            repaired.map(|repaired| CheckView {
                corruptions_fixed: repaired.corruptions_fixed,
                leaks_fixed: repaired.leaks_fixed,
                ..CheckView::of(&repaired.after)
            })
        }
    };
    checked.map_err(|stop| match stop {
        CheckStop::Cancelled => cancelled(),
        CheckStop::Failed(error) => refused(error),
    })
}

/// Tells the watcher what the check tells.
struct Told<'a>(&'a ImageWatcher);

impl Observer for Told<'_> {
    fn found(&self, findings: Vec<Finding>) -> LocalFuture<'_, ()> {
        let found = findings.iter().map(FindingView::from).collect();
        Box::pin(self.0.tell(ImageEvent::Found(found)))
    }

    fn repaired(&self, corruptions: u64, leaks: u64) -> LocalFuture<'_, ()> {
        Box::pin(self.0.tell(ImageEvent::Repaired { corruptions, leaks }))
    }

    fn progress(&self, done_bytes: u64, total_bytes: u64) {
        self.0.set_progress(done_bytes, total_bytes);
    }

    fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}

impl From<&Finding> for FindingView {
    fn from(finding: &Finding) -> Self {
        Self {
            text: finding.to_string(),
            severity: match finding.kind.severity() {
                FoundSeverity::Note => Severity::Note,
                FoundSeverity::Leak => Severity::Leak,
                FoundSeverity::Corruption => Severity::Corruption,
                FoundSeverity::CheckError => Severity::CheckError,
            },
            times: finding.times,
        }
    }
}
