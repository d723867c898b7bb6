//! Check and repair of an image that nobody else uses, with the findings of `qemu-img check`.
//!
//! A check reads all metadata and no data. It counts the references to every cluster of the image file and holds the stored
//! counts and flags against them. What refers to one cluster may be anywhere, so the counts of all clusters are kept in
//! memory, nothing else that grows with the image is:
//!
//! ```text
//!   memory of a check, at most
//!     clusters of the image file x 1 byte    (2 bytes in chunks of 1024 clusters where a count is above 255, 8 above 65535)
//!     + clusters / 1024 x 48 bytes           (lists of chunks, but for parts of the file that nothing refers to)
//!     + L2 tables x 2 KiB                     (chunks of links to L2 tables; never more than the first line twice)
//!     + 16 MiB                                (refcount table 8 MiB, reads in flight 4 MiB, findings on their way)
//!     + snapshots and bitmaps x 128 bytes
//! ```
//! A repair takes as much, and where it makes a new refcount structure 40 MiB and a snapshot table (64 MiB at most) more.
//! An image file of 8 TiB with clusters of 64 KiB takes 128 MiB for its clusters, 6 MiB for the lists, 32 MiB for its tables.
//!
//! Time is linear in the bytes of metadata that stand in the file, however often something leads to them: each L2 table is
//! read once and counts as often as L1 entries lead to it (`tables.rs`), L1 tables and bitmap tables that overlap are read
//! once (`sweep.rs`). Of L2 tables that begin in the middle of a cluster, which are damage in any case, as many are read as the
//! file has clusters, and 65536 at most; if there are more, the check says that it could not look at everything. An image
//! file of more than 2^31 clusters is refused.

mod bitmaps;
mod copied;
pub(in crate::qcow2) mod counters;
pub mod findings;
mod flags;
mod l1;
pub(in crate::qcow2) mod l2;
pub mod observer;
pub(in crate::qcow2) mod read_ahead;
pub(in crate::qcow2) mod rebuild;
mod refcounts;
pub(in crate::qcow2) mod references;
pub(in crate::qcow2) mod repair;
pub(in crate::qcow2) mod scan;
mod snapshots;
mod stream;
mod sweep;
pub(in crate::qcow2) mod tables;

use std::rc::Rc;

use blockyard_storage::Storage;

pub use findings::{Finding, FindingKind, Severity};
pub use observer::{CheckStop, Observer, Report, Unobserved};
pub use references::CLUSTERS_MAX;
pub use repair::{Repair, Repaired, repair, repair_dirty};

use refcounts::Leave;
use scan::{Extent, Scan};

/// Checks an image. Nothing is changed, and no other file is looked at: an external data file has nothing to check.
///
/// `file` takes requests of any alignment, and nobody writes to it meanwhile.
///
/// # Errors
/// When the image is refused or cannot be read, or the observer cancels. Findings are no errors.
///
/// # Cancel safety
/// Dropping the future ends the check; reads in flight come to nothing.
pub async fn check(file: &Rc<dyn Storage>, observer: &dyn Observer) -> Result<Report, CheckStop> {
    let mut scan = Scan::begin(file, observer, false).await?;
    scan.count(Extent::Whole).await?;
    scan.compare_counts(Leave::Counts).await?;
    scan.check_copied_flags().await?;
    scan.sink.step(0).await?;
    Ok(scan.sink.report)
}
