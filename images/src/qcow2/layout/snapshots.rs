//! Entries of the snapshot table.
//!
//! Spec: qcow2, "Snapshots".

use crate::error::ImageError;
use crate::qcow2::layout::fields::{bytes_at, u16_at, u32_at, u64_at, until_nul};
use crate::qcow2::layout::header::L1_TABLE_BYTES_MAX;
use crate::qcow2::units::{Geometry, HostOffset};

/// Bytes of an entry before its extra data.
pub const SNAPSHOT_HEAD_BYTES: usize = 40;
/// Most extra data of an entry, in bytes.
pub const SNAPSHOT_EXTRA_BYTES_MAX: u32 = 1024;
/// Largest snapshot table in bytes.
pub const SNAPSHOT_TABLE_BYTES_MAX: u64 = 64 << 20;
/// Where an entry of the table begins, from its start.
pub const SNAPSHOT_ALIGNMENT_BYTES: usize = 8;

/// Extra data that is known: three numbers of 64 bits.
const KNOWN_EXTRA_BYTES: usize = 24;

/// An internal snapshot, as its entry describes it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Snapshot {
    /// First byte of its L1 table, not checked: see [`Snapshot::check_l1_table`].
    pub l1_table: HostOffset,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// Unique, as any bytes but NUL.
    pub id: Vec<u8>,
    /// As any bytes but NUL.
    pub name: Vec<u8>,
    /// When it was made, in seconds since 1970.
    pub date_seconds: u32,
    /// And nanoseconds.
    pub date_nanoseconds: u32,
    /// How long the guest had been running, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Length of the saved state of the machine in bytes; 0: none was saved.
    pub vm_state_bytes: u64,
    /// Length of the guest's disk in bytes; `None`: the entry does not say, it was that of the image.
    pub disk_bytes: Option<u64>,
    /// Instructions the guest had executed; `None`, and all bits set: not known.
    pub icount: Option<u64>,
    /// Extra data that is not known here, byte for byte.
    pub unknown_extra: Vec<u8>,
}

/// The lengths that an entry begins with.
#[derive(Clone, Copy, Debug)]
pub struct SnapshotHead {
    /// Extra data in bytes, not limited yet.
    pub extra_bytes: u32,
    id_bytes: u16,
    name_bytes: u16,
}

impl SnapshotHead {
    /// Reads the first [`SNAPSHOT_HEAD_BYTES`] of an entry.
    pub fn parse(entry: &[u8]) -> Self {
        Self {
            extra_bytes: u32_at(entry, 36),
            id_bytes: u16_at(entry, 12),
            name_bytes: u16_at(entry, 14),
        }
    }

    /// Refuses the extra data of the entry at `index` of the table, if it is too much.
    ///
    /// # Errors
    /// [`ImageError::Refused`] with QEMU's text.
    pub fn check(&self, index: usize) -> Result<(), ImageError> {
        if self.extra_bytes <= SNAPSHOT_EXTRA_BYTES_MAX {
            return Ok(());
        }
        Err(ImageError::refused_because(
            format!("Too much extra metadata in snapshot table entry {index}"),
            format!(
                "{} bytes, at most {SNAPSHOT_EXTRA_BYTES_MAX} are possible",
                self.extra_bytes
            ),
        ))
    }

    /// Length of the entry in bytes, without the padding before the next one.
    pub fn entry_bytes(&self) -> u64 {
        SNAPSHOT_HEAD_BYTES as u64
            + u64::from(self.extra_bytes)
            + u64::from(self.id_bytes)
            + u64::from(self.name_bytes)
    }
}

impl Snapshot {
    /// Reads an entry whose [`SnapshotHead`] has been checked; what is missing at its end reads as zeroes.
    pub fn parse(entry: &[u8]) -> Self {
        let head = SnapshotHead::parse(entry);
        let extra_bytes = head.extra_bytes.min(SNAPSHOT_EXTRA_BYTES_MAX) as usize;
        let extra = bytes_at(entry, SNAPSHOT_HEAD_BYTES, extra_bytes);
        let known = |offset: usize| (extra.len() >= offset + 8).then(|| u64_at(&extra, offset));
        let id_at = SNAPSHOT_HEAD_BYTES + extra_bytes;
        let id_bytes = usize::from(head.id_bytes);
        let text = |at, length| until_nul(&bytes_at(entry, at, length)).to_vec();
        Self {
            l1_table: HostOffset(u64_at(entry, 0)),
            l1_entries: u32_at(entry, 8),
            id: text(id_at, id_bytes),
            name: text(id_at + id_bytes, usize::from(head.name_bytes)),
            date_seconds: u32_at(entry, 16),
            date_nanoseconds: u32_at(entry, 20),
            vm_clock_nanoseconds: u64_at(entry, 24),
            vm_state_bytes: known(0).unwrap_or_else(|| u64::from(u32_at(entry, 32))),
            disk_bytes: known(8),
            icount: known(16),
            unknown_extra: extra.get(KNOWN_EXTRA_BYTES..).unwrap_or(&[]).to_vec(),
        }
    }

    /// The entry as it stands in the table, padded for the next one. Version 3 wants [`Snapshot::disk_bytes`] in it: who
    /// writes a table fills in what an old entry did not say.
    ///
    /// # Errors
    /// [`ImageError::Refused`] where extra data, id or name are too long.
    pub fn encode(&self) -> Result<Vec<u8>, ImageError> {
        let extra = self.encode_extra();
        let too_long = |_| {
            ImageError::refused_because(
                "Snapshot id or name too long",
                format!(
                    "{} and {} bytes, at most 65535 are possible",
                    self.id.len(),
                    self.name.len()
                ),
            )
        };
        let id_bytes = u16::try_from(self.id.len()).map_err(too_long)?;
        let name_bytes = u16::try_from(self.name.len()).map_err(too_long)?;
        let extra_bytes = match u32::try_from(extra.len()) {
            Ok(bytes) if bytes <= SNAPSHOT_EXTRA_BYTES_MAX => bytes,
            _ => {
                return Err(ImageError::refused_because(
                    "Too much extra metadata in snapshot table entry",
                    format!("{} bytes", extra.len()),
                ));
            }
        };
        let low_half = u32::try_from(self.vm_state_bytes & u64::from(u32::MAX)).unwrap_or(0);
        let mut entry = self.l1_table.0.to_be_bytes().to_vec();
        entry.extend(self.l1_entries.to_be_bytes());
        entry.extend(id_bytes.to_be_bytes());
        entry.extend(name_bytes.to_be_bytes());
        entry.extend(self.date_seconds.to_be_bytes());
        entry.extend(self.date_nanoseconds.to_be_bytes());
        entry.extend(self.vm_clock_nanoseconds.to_be_bytes());
        entry.extend(low_half.to_be_bytes());
        entry.extend(extra_bytes.to_be_bytes());
        entry.extend(extra);
        entry.extend(&self.id);
        entry.extend(&self.name);
        entry.resize(entry.len().next_multiple_of(SNAPSHOT_ALIGNMENT_BYTES), 0);
        Ok(entry)
    }

    /// Whether the snapshot's L1 table can be used. Opening an image does not ask: QEMU opens it, and only who uses the
    /// snapshot depends on it.
    ///
    /// # Errors
    /// [`ImageError::Refused`] with QEMU's texts for its size and alignment, and where it is not in the file.
    pub fn check_l1_table(&self, geometry: &Geometry, file_bytes: u64) -> Result<(), ImageError> {
        let length_bytes = u64::from(self.l1_entries) * 8;
        if length_bytes > L1_TABLE_BYTES_MAX {
            return Err(ImageError::refused_because(
                "Snapshot L1 table too large",
                format!(
                    "{} entries, at most {} are possible",
                    self.l1_entries,
                    L1_TABLE_BYTES_MAX / 8
                ),
            ));
        }
        let end = self.l1_table.0.checked_add(length_bytes);
        let in_file = end.is_some_and(|end| end <= file_bytes) && self.l1_table.0 != 0;
        if !geometry.is_cluster_start(self.l1_table) || (length_bytes != 0 && !in_file) {
            return Err(ImageError::refused_because(
                "Snapshot L1 table offset invalid",
                format!(
                    "{length_bytes} bytes at {:#x}, cluster size {}, file length {file_bytes}",
                    self.l1_table.0,
                    geometry.cluster_bytes()
                ),
            ));
        }
        Ok(())
    }

    /// Only as much as is needed: QEMU understands entries of every length, older programs only short ones.
    fn encode_extra(&self) -> Vec<u8> {
        let large_state = u32::try_from(self.vm_state_bytes).is_err();
        let numbers = if !self.unknown_extra.is_empty() || self.icount.is_some() {
            3
        } else if self.disk_bytes.is_some() {
            2
        } else {
            usize::from(large_state)
        };
        let all = [
            self.vm_state_bytes,
            self.disk_bytes.unwrap_or(0),
            self.icount.unwrap_or(u64::MAX),
        ];
        let known = all.into_iter().take(numbers).flat_map(u64::to_be_bytes);
        known.chain(self.unknown_extra.iter().copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    use super::*;
    use crate::qcow2::units::Version;

    prop_compose! {
        fn snapshot()(
            place in (any::<u64>(), any::<u32>()),
            names in (vec(1_u8..=255, 0..40), vec(1_u8..=255, 0..40)),
            date in (any::<u32>(), any::<u32>()),
            clock in any::<u64>(),
            vm_state_bytes in prop_oneof![any::<u64>(), 0_u64..100],
            known in option::of((any::<u64>(), option::of((any::<u64>(), vec(any::<u8>(), 0..60))))),
        ) -> Snapshot {
            let beyond_disk = known.as_ref().and_then(|(_, beyond)| beyond.clone());
            Snapshot {
                l1_table: HostOffset(place.0),
                l1_entries: place.1,
                id: names.0,
                name: names.1,
                date_seconds: date.0,
                date_nanoseconds: date.1,
                vm_clock_nanoseconds: clock,
                vm_state_bytes,
                disk_bytes: known.map(|(disk, _)| disk),
                icount: beyond_disk.as_ref().map(|(icount, _)| *icount),
                unknown_extra: beyond_disk.map(|(_, extra)| extra).unwrap_or_default(),
            }
        }
    }

    proptest! {
        #[test]
        fn entries_come_back(snapshot in snapshot()) {
            let entry = snapshot.encode().expect("short enough");
            prop_assert_eq!(entry.len() % SNAPSHOT_ALIGNMENT_BYTES, 0);
            let head = SnapshotHead::parse(&entry);
            prop_assert!(head.check(0).is_ok());
            prop_assert_eq!(head.entry_bytes().next_multiple_of(8), entry.len() as u64);
            prop_assert_eq!(Snapshot::parse(&entry), snapshot);
        }

        #[test]
        fn any_bytes_are_an_entry(bytes in vec(any::<u8>(), 0..200)) {
            let head = SnapshotHead::parse(&bytes);
            let _ = head.check(0);
            let read = Snapshot::parse(&bytes);
            prop_assert!(read.unknown_extra.len() <= 1024);
            let geometry = Geometry::new(Version::V3, 16, 4, false).expect("allowed");
            let _ = read.check_l1_table(&geometry, 1 << 40);
        }
    }

    #[test]
    fn extra_data_is_limited() {
        let mut entry = Snapshot::default().encode().expect("short enough");
        entry[36..40].copy_from_slice(&1024_u32.to_be_bytes());
        assert!(SnapshotHead::parse(&entry).check(7).is_ok());
        entry[36..40].copy_from_slice(&1025_u32.to_be_bytes());
        let refused = SnapshotHead::parse(&entry).check(7).expect_err("too much");
        assert_eq!(
            refused.to_string(),
            "Too much extra metadata in snapshot table entry 7"
        );
    }

    #[test]
    fn tables_that_cannot_be_used() {
        let geometry = Geometry::new(Version::V3, 16, 4, false).expect("allowed");
        let check = |l1_table, l1_entries| {
            let snapshot = Snapshot {
                l1_table: HostOffset(l1_table),
                l1_entries,
                ..Snapshot::default()
            };
            let checked = snapshot.check_l1_table(&geometry, 1 << 20);
            checked.map_err(|error| error.to_string())
        };
        assert_eq!(check(0, 0), Ok(()));
        assert_eq!(check(0x10000, 8192), Ok(()));
        let offset = Err("Snapshot L1 table offset invalid".to_owned());
        assert_eq!(check(0, 1), offset);
        assert_eq!(check(0x10200, 1), offset);
        assert_eq!(check(0xf0000, 8193), offset);
        assert_eq!(check(!0xffff, 8192), offset);
        let size = Err("Snapshot L1 table too large".to_owned());
        assert_eq!(check(0x10000, (4 << 20) + 1), size);
    }
}
