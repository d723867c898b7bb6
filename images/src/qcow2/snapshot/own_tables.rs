//! L2 tables of the disk whose flags are others from now on: they are copied, and L1 tables are led to the copies.

use blockyard_storage::Buffer;

use crate::qcow2::check::CheckStop;
use crate::qcow2::check::l2::{Kind, pieces_of};
use crate::qcow2::check::read_ahead::ReadAhead;
use crate::qcow2::check::rebuild::Room;
use crate::qcow2::check::repair::Fixer;
use crate::qcow2::check::scan::Scan;
use crate::qcow2::check::tables::Tables;
use crate::qcow2::layout::entries::{L1Entry, L2Entry, OFFSET_MASK, l2_entry_at, put_l2_entry};
use crate::qcow2::units::{HostCluster, HostOffset};

/// Tables that have been copied.
#[derive(Default)]
pub(super) struct OwnTables {
    /// The cluster of a table and that of its copy, in the order of the former. Both fit: so many clusters are not looked at.
    copies: Vec<(u32, u32)>,
}

impl OwnTables {
    /// Copies each table of the disk where an entry does not say whether its cluster is referred to once. `scan` has counted
    /// all references. Nothing leads to the copies yet, and their counts are 0.
    ///
    /// # Errors
    /// When something cannot be read or written, there is no room, or the observer cancels.
    pub(super) async fn make(
        scan: &mut Scan<'_>,
        room: &mut Room,
        fixer: &mut Fixer,
    ) -> Result<Self, CheckStop> {
        let mut own = Self::default();
        let geometry = scan.geometry;
        let file = scan.file.clone();
        let tables = std::mem::replace(&mut scan.tables, Tables::new(geometry, 0));
        let mut table = Vec::new();
        let mut differs = false;
        let mut reads = ReadAhead::new(&file, pieces_of(tables.active(), &geometry));
        while let Some((range, (at, _), mut buffer)) = reads.next().await? {
            differs |= put_flags(scan, &mut buffer);
            table.extend_from_slice(buffer.as_slice());
            reads.give_back(buffer);
            if range.end() >= at.plus(geometry.cluster_bytes()).0 {
                if differs {
                    let to = room.take(scan, 1)?;
                    fixer
                        .write(scan, geometry.host_offset(HostCluster(to)).0, &table)
                        .await?;
                    scan.references.counters.set(to, 0);
                    own.push(geometry.host_cluster(at).0, to);
                }
                table.clear();
                differs = false;
            }
            scan.sink.step(range.length()).await?;
        }
        drop(reads);
        scan.tables = tables;
        Ok(own)
    }

    fn push(&mut self, from: u64, to: u64) {
        if let (Ok(from), Ok(to)) = (u32::try_from(from), u32::try_from(to)) {
            self.copies.push((from, to));
        }
    }

    /// Lets the entries of an L1 table lead to the copies; counts are what they are then. No entry has the flag afterwards.
    pub(super) fn lead(&self, scan: &mut Scan<'_>, l1: &mut [u64]) {
        let geometry = scan.geometry;
        let counters = &mut scan.references.counters;
        for word in l1 {
            let Some(table) = L1Entry(*word).table() else {
                continue;
            };
            let from = geometry.host_cluster(table).0;
            *word = L1Entry(*word).with_copied(false).0;
            if let Some(to) = self.copy_of(from) {
                counters.set(from, counters.of(from).saturating_sub(1));
                counters.set(to, counters.of(to).saturating_add(1));
                *word = geometry.host_offset(HostCluster(to)).0;
            }
        }
    }

    fn copy_of(&self, from: u64) -> Option<u64> {
        let from = u32::try_from(from).ok()?;
        let found = self
            .copies
            .binary_search_by_key(&from, |copy| copy.0)
            .ok()?;
        self.copies.get(found).map(|copy| u64::from(copy.1))
    }
}

/// Lets the entries of the disk's L1 table say which L2 tables are its own.
pub(super) fn put_l1_flags(scan: &Scan<'_>, l1: &mut [u64]) {
    for word in l1 {
        if let Some(table) = L1Entry(*word).table() {
            let cluster = scan.geometry.host_cluster(table).0;
            let is_own = scan.references.counters.of(cluster) == 1;
            *word = L1Entry(*word).with_copied(is_own).0;
        }
    }
}

/// Lets the entries of a piece of a table say which clusters are the disk's own; whether one has changed.
fn put_flags(scan: &Scan<'_>, piece: &mut Buffer) -> bool {
    let geometry = scan.geometry;
    let mut differs = false;
    let mut index = 0;
    while let Some(entry) = l2_entry_at(&geometry, piece.as_slice(), index) {
        if entry != L2Entry::default() && Kind::of(&entry, &geometry, false) == Kind::Allocated {
            let at = HostOffset(entry.word & OFFSET_MASK);
            let cluster = geometry.host_cluster(at).0;
            let is_own = scan.references.counters.of(cluster) == 1;
            if is_own != entry.is_copied() {
                // It was read from there.
                differs |= put_l2_entry(
                    &geometry,
                    piece.as_mut_slice(),
                    index,
                    entry.with_copied(is_own),
                );
            }
        }
        index += 1;
    }
    differs
}
