//! All L2 tables: what they lead to.

use blockyard_storage::ByteRange;

use super::findings::FindingKind;
use super::observer::CheckStop;
use super::read_ahead::{PIECE_BYTES, ReadAhead};
use super::scan::Scan;
use super::tables::{Links, Tables};
use crate::qcow2::layout::entries::{
    COMPRESSED, COPIED, CompressedAt, L2_RESERVED, L2Entry, OFFSET_MASK, ZERO, l2_entry_at,
};
use crate::qcow2::units::{Geometry, HostOffset};

/// Subclusters of an extended entry that have data.
const ALL_DATA: u64 = 0xffff_ffff;

/// What an entry is to a check, which takes bit 0 for "reads as zeroes" in version 2 as well, as QEMU does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::qcow2) enum Kind {
    Unallocated,
    /// Reads as zeroes and keeps nothing.
    ZeroPlain,
    /// Leads to a cluster, for data or kept for it.
    Allocated,
    Compressed,
}

impl Kind {
    pub(in crate::qcow2) const fn of(
        entry: &L2Entry,
        geometry: &Geometry,
        has_data_file: bool,
    ) -> Self {
        let leads = entry.word & OFFSET_MASK != 0;
        if entry.word & COMPRESSED != 0 {
            Kind::Compressed
        } else if !geometry.extended_l2() && entry.word & ZERO != 0 {
            match leads {
                true => Kind::Allocated,
                false => Kind::ZeroPlain,
            }
        } else if leads || has_data_file && entry.is_copied() {
            // The first cluster of a data file is as good as any.
            Kind::Allocated
        } else {
            Kind::Unallocated
        }
    }
}

/// Whether an allocated entry has data in its cluster, not only room for it.
pub(super) const fn has_data(entry: &L2Entry, geometry: &Geometry) -> bool {
    match geometry.extended_l2() {
        true => entry.bitmap & ALL_DATA != 0,
        false => entry.word & ZERO == 0,
    }
}

/// A table that is being gone through.
#[derive(Clone, Copy)]
struct Place {
    links: Links,
    /// First entry of the piece.
    index: u64,
}

/// Pieces of tables to read, with where each begins in its table.
pub(in crate::qcow2) fn pieces_of(
    tables: impl Iterator<Item = (HostOffset, Links)>,
    geometry: &Geometry,
) -> impl Iterator<Item = (ByteRange, (HostOffset, Links))> {
    let cluster_bytes = geometry.cluster_bytes();
    tables.flat_map(move |(at, links)| {
        let mut rest = ByteRange::new(at.0, cluster_bytes);
        std::iter::from_fn(move || {
            let (piece, after) = rest.split_at(PIECE_BYTES);
            rest = after;
            (!piece.is_empty()).then_some((piece, (at, links)))
        })
    })
}

impl Scan<'_> {
    /// Counts what all L2 tables lead to.
    ///
    /// # Errors
    /// When one cannot be read, or the observer cancels.
    pub(super) async fn count_l2_tables(&mut self) -> Result<(), CheckStop> {
        let file = self.file.clone();
        // Nothing is added to them any more.
        let tables = std::mem::replace(&mut self.tables, Tables::new(self.geometry, 0));
        let geometry = self.geometry;
        let mut reads = ReadAhead::new(&file, pieces_of(tables.all(), &geometry));
        // Where the next cluster would be if nothing were fragmented; 0: any place is right.
        let mut expected = 0;
        while let Some((range, (at, links), buffer)) = reads.next().await? {
            let into = range.offset().saturating_sub(at.0);
            if into == 0 {
                expected = 0;
            }
            let place = Place {
                links,
                index: into / self.geometry.l2_entry_bytes(),
            };
            self.look_at_l2_entries(buffer.as_slice(), place, &mut expected);
            reads.give_back(buffer);
            self.sink.step(range.length()).await?;
        }
        drop(reads);
        self.tables = tables;
        Ok(())
    }

    fn look_at_l2_entries(&mut self, table: &[u8], place: Place, expected: &mut u64) {
        let has_data_file = self.header.has_data_file();
        let mut index = 0;
        while let Some(entry) = l2_entry_at(&self.geometry, table, index) {
            let in_table = place.index + index as u64;
            index += 1;
            if entry == L2Entry::default() {
                continue;
            }
            if entry.word & COMPRESSED == 0 && entry.word & L2_RESERVED != 0 {
                let entry = entry.word;
                self.sink
                    .found(FindingKind::L2Reserved { entry }, place.links.times);
            }
            match Kind::of(&entry, &self.geometry, has_data_file) {
                Kind::Compressed => self.look_at_compressed(&entry, in_table, place.links),
                Kind::Allocated => self.look_at_allocated(&entry, place.links, expected),
                Kind::ZeroPlain => {}
                Kind::Unallocated if entry.bitmap & ALL_DATA != 0 => {
                    self.sink
                        .found(FindingKind::UnallocatedWithData, place.links.times);
                }
                Kind::Unallocated => {}
            }
        }
    }

    fn look_at_compressed(&mut self, entry: &L2Entry, index: u64, links: Links) {
        let place = CompressedAt::decode(&self.geometry, entry.word);
        if entry.is_copied() {
            self.sink
                .found(FindingKind::CompressedCopied { at: place.at }, links.times);
        }
        let entry_word = entry.word & !COPIED;
        if self.header.has_data_file() {
            let finding = FindingKind::CompressedWithDataFile {
                index,
                entry: entry_word,
            };
            self.sink.found(finding, links.times);
            return;
        }
        if entry.bitmap != 0 {
            let finding = FindingKind::CompressedWithBitmap {
                index,
                entry: entry_word,
            };
            self.sink.found(finding, links.times);
            return;
        }
        self.references
            .add(place.at, place.length_bytes, links.times, &mut self.sink);
        let report = &mut self.sink.report;
        for counter in [
            &mut report.allocated_clusters,
            &mut report.compressed_clusters,
            // They lie where there was room.
            &mut report.fragmented_clusters,
        ] {
            *counter = counter.saturating_add(links.active);
        }
    }

    fn look_at_allocated(&mut self, entry: &L2Entry, links: Links, expected: &mut u64) {
        let at = HostOffset(entry.word & OFFSET_MASK);
        if entry.bitmap & (entry.bitmap >> 32) & ALL_DATA != 0 {
            self.sink
                .found(FindingKind::SubclusterContradiction { at }, links.times);
        }
        if !self.geometry.is_cluster_start(at) {
            let finding = if has_data(entry, &self.geometry) {
                FindingKind::DataUnaligned { at }
            } else {
                self.unaligned_zeroes = self.unaligned_zeroes.saturating_add(1);
                FindingKind::PreallocatedUnaligned { at }
            };
            self.sink.found(finding, links.times);
        }
        let report = &mut self.sink.report;
        report.allocated_clusters = report.allocated_clusters.saturating_add(links.active);
        if *expected != 0 && at.0 != *expected {
            report.fragmented_clusters = report.fragmented_clusters.saturating_add(links.active);
        }
        let cluster_bytes = self.geometry.cluster_bytes();
        *expected = at.plus(cluster_bytes).0;
        if !self.header.has_data_file() {
            self.references
                .add(at, cluster_bytes, links.times, &mut self.sink);
        }
    }
}
