//! Internal snapshots of an image that nobody else uses: made, applied, deleted.
//!
//! Each of the three gives clusters other counts, and entries other flags, all over the image. Changed where they stand, some
//! would contradict others for as long as that takes, and after a power cut for good, as version 2 cannot say that it is
//! dirty. So everything that changes is written to clusters that nothing leads to, and takes effect with one write of the
//! header's first sector, which says where the L1 table, the snapshot table and the counts are, and how long the disk is:
//!
//! ```text
//!   1  all references counted; a damaged image is refused here
//!   2  the L1 table of the disk, that of a new snapshot, and the snapshot table written to free clusters
//!   3  all references counted again, as if the header led there; counts that are too narrow are refused here
//!   4  L2 tables of the disk whose flags are others now written to free clusters, the L1 tables led there
//!   5  new refcount blocks and a new refcount table written to free clusters; sync
//!   6  header; sync
//!   7  what nothing leads to any more is discarded
//! ```
//! Whenever the power goes or something fails, the image is the old one or the new one, whole, and nothing leaks: in both
//! versions, without the dirty bit. It costs two passes over all tables, and until step 6 the room for the tables of the disk
//! and for all counts. QEMU changes them in place, looks at no tables of other snapshots, and believes the stored counts; here
//! they are not used at all, so that a cluster whose count is too low is neither written to nor given away.
//!
//! Memory is that of a check ([`check`](crate::qcow2::check)), one byte more for each cluster of the image file, 128 MiB for L1
//! tables and 192 MiB for the snapshot table at most.
//!
//! Spec: qcow2, "Snapshots", "L1 table entry", "Standard Cluster Descriptor" (bit 63).

mod changing;
mod choosing;
mod own_tables;
mod room;
mod switching;

pub use changing::{SnapshotChange, SnapshotError, apply, create, delete};
pub use choosing::{NewSnapshot, SnapshotChoice};
pub use room::room;
