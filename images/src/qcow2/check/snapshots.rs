//! The table of internal snapshots: how long it is, where their L1 tables are, and a sound copy of it.
//!
//! Spec: qcow2, "Snapshots".

use super::findings::{FindingKind, SnapshotName};
use super::observer::CheckStop;
use super::scan::Scan;
use super::stream::Stream;
use crate::error::ImageError;
use crate::qcow2::layout::header::{L1_TABLE_BYTES_MAX, SNAPSHOTS_MAX};
use crate::qcow2::layout::snapshots::{
    SNAPSHOT_ALIGNMENT_BYTES, SNAPSHOT_HEAD_BYTES, SNAPSHOT_TABLE_BYTES_MAX, Snapshot, SnapshotHead,
};
use crate::qcow2::units::{HostOffset, Version};

/// What the references need of the table.
#[derive(Default)]
pub(in crate::qcow2) struct SnapshotTable {
    /// Length in bytes.
    pub(super) length_bytes: u64,
    /// L1 tables with their number of entries.
    pub(super) l1_tables: Vec<(HostOffset, u32)>,
    /// Entries that lack something.
    pub(super) incomplete: Vec<u32>,
}

/// The entries of a table, one after the other.
struct Entries {
    stream: Stream,
    offset: u64,
    /// Where the last entry ended, without the padding behind it.
    end: u64,
}

impl Entries {
    /// The next entry; the one at `index` of the table.
    async fn next(&mut self, index: u32) -> Result<Snapshot, CheckStop> {
        let head = SnapshotHead::parse(self.stream.at(self.offset, SNAPSHOT_HEAD_BYTES).await?);
        head.check(usize::try_from(index).unwrap_or(usize::MAX))
            .map_err(unreadable)?;
        let length_bytes = head.entry_bytes();
        // At most 132 KiB, as its lengths are limited.
        let length = usize::try_from(length_bytes).unwrap_or(0);
        let snapshot = Snapshot::parse(self.stream.at(self.offset, length).await?);
        self.end = self.offset.saturating_add(length_bytes);
        self.offset = self.end.next_multiple_of(SNAPSHOT_ALIGNMENT_BYTES as u64);
        Ok(snapshot)
    }
}

impl Scan<'_> {
    /// Reads the table.
    ///
    /// # Errors
    /// When it cannot be read or is refused: without it, nothing is known of what snapshots refer to.
    pub(super) async fn read_snapshots(&mut self) -> Result<(), CheckStop> {
        self.check_snapshot_table_place()?;
        if self.header.has_data_file() && self.header.snapshots > 0 {
            let snapshots = self.header.snapshots;
            self.sink
                .found(FindingKind::SnapshotsWithDataFile { snapshots }, 1);
        }
        let start = self.header.snapshot_table.0;
        let mut entries = self.snapshot_entries();
        for index in 0..self.header.snapshots {
            let snapshot = entries.next(index).await?;
            if entries.end - start > SNAPSHOT_TABLE_BYTES_MAX {
                return Err(unreadable(ImageError::refused("Snapshot table is too big")).into());
            }
            self.look_at_snapshot(index, snapshot);
            if index.is_multiple_of(1024) {
                self.sink.step(0).await?;
            }
        }
        self.snapshots.length_bytes = entries.end - start;
        self.sink.step(entries.end - start).await
    }

    /// A table with the same snapshots and nothing missing: the disk of a snapshot that does not say how long it is is as
    /// long as that of the image. At most 64 MiB and 16 bytes for each snapshot.
    ///
    /// # Errors
    /// When the old one cannot be read.
    pub(in crate::qcow2) async fn complete_snapshot_table(&self) -> Result<Vec<u8>, CheckStop> {
        let mut entries = self.snapshot_entries();
        let mut table = Vec::new();
        for index in 0..self.header.snapshots {
            let mut snapshot = entries.next(index).await?;
            snapshot.disk_bytes.get_or_insert(self.header.guest_bytes());
            table.extend(snapshot.encode()?);
        }
        Ok(table)
    }

    fn snapshot_entries(&self) -> Entries {
        let start = self.header.snapshot_table.0;
        Entries {
            stream: Stream::new(&self.file, start),
            offset: start,
            end: start,
        }
    }

    fn check_snapshot_table_place(&self) -> Result<(), ImageError> {
        let header = &self.header;
        if header.snapshots > SNAPSHOTS_MAX {
            return Err(ImageError::refused_because(
                "snapshot table too large",
                format!(
                    "{} snapshots, at most {SNAPSHOTS_MAX} are possible",
                    header.snapshots
                ),
            ));
        }
        let end = header
            .snapshot_table
            .plus(u64::from(header.snapshots) * SNAPSHOT_HEAD_BYTES as u64);
        if i64::try_from(end.0).is_err() || !self.geometry.is_cluster_start(header.snapshot_table) {
            return Err(ImageError::refused_because(
                "snapshot table offset invalid",
                format!(
                    "{:#x} must be a multiple of {} and its end below 2^63",
                    header.snapshot_table.0,
                    self.geometry.cluster_bytes()
                ),
            ));
        }
        Ok(())
    }

    fn look_at_snapshot(&mut self, index: u32, snapshot: Snapshot) {
        if self.geometry.version() == Version::V3 && snapshot.disk_bytes.is_none() {
            self.snapshots.incomplete.push(index);
            self.sink
                .found(FindingKind::SnapshotIncomplete { index }, 1);
        }
        let (at, entries) = (snapshot.l1_table, snapshot.l1_entries);
        let snapshot = SnapshotName {
            id: snapshot.id,
            name: snapshot.name,
        };
        if !self.geometry.is_cluster_start(at) {
            self.sink
                .found(FindingKind::SnapshotL1Unaligned { snapshot, at }, 1);
        } else if u64::from(entries) > L1_TABLE_BYTES_MAX / 8 {
            self.sink
                .found(FindingKind::SnapshotL1TooLarge { snapshot, entries }, 1);
        } else {
            self.snapshots.l1_tables.push((at, entries));
        }
    }
}

/// The same refusal, with what could not be done before it.
fn unreadable(error: ImageError) -> ImageError {
    match error {
        ImageError::Refused { text, detail } => ImageError::Refused {
            text: format!("failed to read the snapshot table: {text}"),
            detail,
        },
        other => other,
    }
}
