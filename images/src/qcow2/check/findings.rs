//! What a check finds, in the words of `qemu-img check`.

use std::fmt;

use crate::qcow2::units::HostOffset;

/// Something that a check or a repair has to tell.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// What.
    pub kind: FindingKind,
    /// Whether it is being repaired.
    pub repairing: bool,
    /// In how many places: tables that several entries lead to are read once, and what is wrong in them is wrong for each
    /// of those entries.
    pub times: u64,
}

/// How bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Severity {
    /// Nothing is wrong; what the check does about something else.
    Note,
    /// Room is wasted, data is safe.
    Leak,
    /// Data may be wrong, or become wrong when the image is written.
    Corruption,
    /// The check could not look at it.
    CheckError,
}

/// What was found. Numbers of clusters count from the start of the image file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FindingKind {
    /// Something refers to bytes of which the last cluster is behind the end of the file.
    BehindEnd {
        /// First byte.
        at: HostOffset,
        /// How many.
        length_bytes: u64,
    },
    /// A cluster has more references than its count can hold.
    Overflow {
        /// Its first byte.
        at: HostOffset,
    },
    /// An L1 entry has reserved bits set.
    L1Reserved {
        /// The entry.
        entry: u64,
    },
    /// An L1 entry leads into the middle of a cluster.
    L2TableUnaligned {
        /// Where to.
        at: HostOffset,
    },
    /// An L2 entry has reserved bits set.
    L2Reserved {
        /// Its first word.
        entry: u64,
    },
    /// A compressed cluster says that it may be written in place.
    CompressedCopied {
        /// Its first byte.
        at: HostOffset,
    },
    /// Compressed clusters need the image file, and data is in another one.
    CompressedWithDataFile {
        /// Index in its L2 table.
        index: u64,
        /// The entry's first word.
        entry: u64,
    },
    /// Compressed clusters have no subclusters.
    CompressedWithBitmap {
        /// Index in its L2 table.
        index: u64,
        /// The entry's first word.
        entry: u64,
    },
    /// A subcluster has data and reads as zeroes at once.
    SubclusterContradiction {
        /// First byte of the cluster.
        at: HostOffset,
    },
    /// A cluster of data begins in the middle of a cluster.
    DataUnaligned {
        /// Where.
        at: HostOffset,
    },
    /// Room kept for a cluster of zeroes begins in the middle of a cluster.
    PreallocatedUnaligned {
        /// Where.
        at: HostOffset,
    },
    /// A subcluster has data, but there is no cluster.
    UnallocatedWithData,
    /// An entry of the snapshot table lacks what version 3 of the format demands.
    SnapshotIncomplete {
        /// Which.
        index: u32,
    },
    /// The L1 table of a snapshot begins in the middle of a cluster.
    SnapshotL1Unaligned {
        /// Id and name of the snapshot.
        snapshot: SnapshotName,
        /// Where.
        at: HostOffset,
    },
    /// The L1 table of a snapshot is larger than any may be.
    SnapshotL1TooLarge {
        /// Id and name of the snapshot.
        snapshot: SnapshotName,
        /// Its entries.
        entries: u32,
    },
    /// External data files have no snapshots.
    SnapshotsWithDataFile {
        /// How many there are.
        snapshots: u32,
    },
    /// The bitmap directory or one of its entries cannot be used.
    Bitmap {
        /// Why.
        text: String,
    },
    /// An entry of a bitmap's table has reserved bits set or leads into the middle of a cluster.
    BitmapTableEntry {
        /// The entry.
        entry: u64,
    },
    /// An entry of the refcount table has reserved bits set.
    BlockReserved {
        /// Which.
        index: u64,
    },
    /// An entry of the refcount table leads into the middle of a cluster.
    BlockUnaligned {
        /// Which.
        index: u64,
    },
    /// An entry of the refcount table leads behind the end of the file.
    BlockOutside {
        /// Which.
        index: u64,
    },
    /// A refcount block is used for something else, too.
    BlockShared {
        /// Its place in the refcount table.
        index: u64,
        /// References to it so far.
        references: u64,
    },
    /// A count differs from the references there are.
    Refcount {
        /// Which cluster.
        cluster: u64,
        /// The count that is stored.
        count: u64,
        /// The references that were found.
        references: u64,
    },
    /// Counts that cannot be looked at.
    RefcountUnknown {
        /// First cluster.
        first: u64,
        /// How many.
        clusters: u64,
    },
    /// An L1 entry of the active table says wrongly whether its table has one reference only.
    CopiedL1 {
        /// Index in the table.
        index: u64,
        /// The entry.
        entry: u64,
        /// The table's count.
        count: u64,
    },
    /// An L2 entry of an active table says wrongly whether its cluster has one reference only.
    CopiedL2 {
        /// The entry's first word.
        entry: u64,
        /// The cluster's count.
        count: u64,
    },
    /// There are more L2 tables in the middle of clusters than are looked at.
    TooManyUnaligned,
    /// A table that would have to be changed is used for something else, too.
    SharedTable {
        /// Its first byte.
        at: HostOffset,
    },
    /// The refcount structure is made anew.
    Rebuilding,
    /// Leaked clusters are kept.
    LeaksKept,
}

/// Id and name of an internal snapshot, as they stand in the table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotName {
    /// Its id.
    pub id: Vec<u8>,
    /// Its name.
    pub name: Vec<u8>,
}

impl FindingKind {
    /// How bad it is.
    pub const fn severity(&self) -> Severity {
        match self {
            FindingKind::Rebuilding | FindingKind::LeaksKept => Severity::Note,
            FindingKind::Refcount {
                count, references, ..
            } if *count > *references => Severity::Leak,
            FindingKind::RefcountUnknown { .. }
            | FindingKind::TooManyUnaligned
            | FindingKind::SharedTable { .. } => Severity::CheckError,
            _ => Severity::Corruption,
        }
    }

    /// Whether references may be missing because of it: what seems to be leaked may be what a damaged entry led to.
    pub(super) const fn hides_references(&self) -> bool {
        matches!(
            self,
            FindingKind::BehindEnd { .. }
                | FindingKind::L1Reserved { .. }
                | FindingKind::L2TableUnaligned { .. }
                | FindingKind::L2Reserved { .. }
                | FindingKind::CompressedWithDataFile { .. }
                | FindingKind::CompressedWithBitmap { .. }
                | FindingKind::SubclusterContradiction { .. }
                | FindingKind::DataUnaligned { .. }
                | FindingKind::SnapshotL1Unaligned { .. }
                | FindingKind::SnapshotL1TooLarge { .. }
                | FindingKind::SnapshotsWithDataFile { .. }
                | FindingKind::Bitmap { .. }
                | FindingKind::BitmapTableEntry { .. }
                | FindingKind::TooManyUnaligned
        )
    }

    /// Whether it is about what the refcount structure says.
    pub(super) const fn is_of_refcounts(&self) -> bool {
        matches!(
            self,
            FindingKind::Refcount { .. }
                | FindingKind::BlockReserved { .. }
                | FindingKind::BlockUnaligned { .. }
                | FindingKind::BlockOutside { .. }
                | FindingKind::BlockShared { .. }
        )
    }

    /// How many things it counts for in the result.
    pub(super) const fn weight(&self) -> u64 {
        match self {
            FindingKind::RefcountUnknown { clusters, .. } => *clusters,
            _ => 1,
        }
    }
}

impl fmt::Display for Finding {
    /// The line of `qemu-img check`, where it has one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.kind.severity() {
            _ if self.repairing => "Repairing",
            Severity::Leak => "Leaked",
            _ => "ERROR",
        };
        match &self.kind {
            FindingKind::BehindEnd { at, length_bytes } => write!(
                f,
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
                 offset {:#x} size {length_bytes:#x}",
                at.0
            ),
            FindingKind::Overflow { at } => {
                write!(f, "ERROR: overflow cluster offset={:#x}", at.0)
            }
            FindingKind::L1Reserved { entry } => {
                write!(f, "ERROR found L1 entry with reserved bits set: {entry:x}")
            }
            FindingKind::L2TableUnaligned { at } => write!(
                f,
                "ERROR l2_offset={:x}: Table is not cluster aligned; L1 entry corrupted",
                at.0
            ),
            FindingKind::L2Reserved { entry } => {
                write!(f, "ERROR found l2 entry with reserved bits set: {entry:x}")
            }
            FindingKind::CompressedCopied { at } => write!(
                f,
                "ERROR: coffset={:#x}: copied flag must never be set for compressed clusters",
                at.0
            ),
            FindingKind::CompressedWithDataFile { index, entry } => write!(
                f,
                "ERROR compressed cluster {index} with data file, entry={entry:#x}"
            ),
            FindingKind::CompressedWithBitmap { index, entry } => write!(
                f,
                "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry={entry:#x}"
            ),
            FindingKind::SubclusterContradiction { at } => write!(
                f,
                "ERROR offset={:x}: Allocated cluster has corrupted subcluster allocation bitmap",
                at.0
            ),
            FindingKind::DataUnaligned { at } => write!(
                f,
                "ERROR offset={:x}: Data cluster is not properly aligned; L2 entry corrupted.",
                at.0
            ),
            FindingKind::PreallocatedUnaligned { at } => write!(
                f,
                "{verb} offset={:x}: Preallocated cluster is not properly aligned; L2 entry corrupted.",
                at.0
            ),
            FindingKind::UnallocatedWithData => f.write_str(
                "ERROR: Unallocated cluster has non-zero subcluster allocation map",
            ),
            FindingKind::SnapshotIncomplete { index } => {
                write!(f, "{verb} snapshot table entry {index} is incomplete")
            }
            FindingKind::SnapshotL1Unaligned { snapshot, at } => write!(
                f,
                "ERROR snapshot {snapshot} l1_offset={:#x}: L1 table is not cluster aligned; snapshot table entry \
                 corrupted",
                at.0
            ),
            FindingKind::SnapshotL1TooLarge { snapshot, entries } => write!(
                f,
                "ERROR snapshot {snapshot} l1_size={entries:#x}: L1 table is too large; snapshot table entry corrupted"
            ),
            FindingKind::SnapshotsWithDataFile { snapshots } => {
                write!(f, "ERROR {snapshots} snapshots in image with data file")
            }
            FindingKind::Bitmap { text } => write!(f, "ERROR {text}"),
            FindingKind::BitmapTableEntry { entry } => {
                write!(f, "ERROR found bitmap table entry that is invalid: {entry:x}")
            }
            FindingKind::BlockReserved { index } => {
                write!(f, "ERROR refcount table entry {index} has reserved bits set")
            }
            FindingKind::BlockUnaligned { index } => write!(
                f,
                "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
            ),
            FindingKind::BlockOutside { index } => {
                write!(f, "ERROR refcount block {index} is outside image")
            }
            FindingKind::BlockShared { index, references } => {
                write!(f, "ERROR refcount block {index} refcount={references}")
            }
            FindingKind::Refcount {
                cluster,
                count,
                references,
            } => write!(
                f,
                "{verb} cluster {cluster} refcount={count} reference={references}"
            ),
            FindingKind::RefcountUnknown { first, clusters } => {
                write!(f, "Can't get refcount for cluster {first}: Input/output error")?;
                match clusters {
                    0 | 1 => Ok(()),
                    more => write!(f, ", nor for the {} behind it", more - 1),
                }
            }
            FindingKind::CopiedL1 {
                index,
                entry,
                count,
            } => write!(
                f,
                "{verb} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={count}"
            ),
            FindingKind::CopiedL2 { entry, count } => write!(
                f,
                "{verb} OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={count}"
            ),
            FindingKind::TooManyUnaligned => f.write_str(
                "ERROR: more L2 tables are not cluster aligned than are looked at; what they refer to is unknown",
            ),
            FindingKind::SharedTable { at } => write!(
                f,
                "ERROR: the table at offset {:#x} is used for something else as well; it is not changed",
                at.0
            ),
            FindingKind::Rebuilding => f.write_str("Rebuilding refcount structure"),
            FindingKind::LeaksKept => f.write_str(
                "Leaked clusters are kept: they may hold what the damaged entries led to",
            ),
        }
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ({})",
            String::from_utf8_lossy(&self.id),
            String::from_utf8_lossy(&self.name)
        )
    }
}
