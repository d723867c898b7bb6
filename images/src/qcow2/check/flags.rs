//! Repair of L1 and L2 tables: flags that contradict the stored counts, and room that is kept where no cluster begins.
//!
//! A table is changed only where its clusters are nothing but that table: what else they are to somebody would be changed
//! with it.

use super::copied::FarCounts;
use super::counters::Counters;
use super::findings::FindingKind;
use super::l2::{Kind, has_data, pieces_of};
use super::observer::CheckStop;
use super::read_ahead::{PIECE_BYTES, ReadAhead};
use super::refcounts::Leave;
use super::repair::{Changed, Fixer, Repair};
use super::scan::Scan;
use super::tables::Tables;
use crate::qcow2::layout::entries::{
    L1Entry, L2Entry, OFFSET_MASK, ZERO, l2_entry_at, put_l2_entry, put_word, word_at,
};
use crate::qcow2::units::{Geometry, HostOffset};

/// Which tables must not be changed. Found out while the counters hold references.
struct Shared {
    /// Not 0: the L2 table in this cluster.
    l2: Counters,
    l1: bool,
}

impl Shared {
    fn of(scan: &Scan<'_>) -> Self {
        let counters = &scan.references.counters;
        let mut l2 = Counters::new(counters.clusters());
        for (at, _) in scan.tables.all() {
            let cluster = scan.geometry.host_cluster(at).0;
            let only_table = scan.tables.links_of(cluster) == counters.of(cluster);
            if !only_table || !scan.geometry.is_cluster_start(at) {
                l2.set(cluster, 1);
            }
        }
        let l1 = scan
            .active_l1
            .iter()
            .any(|run| (run.start..run.end).any(|cluster| counters.of(cluster) != run.times));
        Self { l2, l1 }
    }

    fn has_l2(&self, at: HostOffset, geometry: &Geometry) -> bool {
        !geometry.is_cluster_start(at) || self.l2.of(geometry.host_cluster(at).0) != 0
    }
}

impl Fixer {
    /// Turns entries of zeroes that keep room in the middle of a cluster into entries that keep none: they read the same.
    pub(super) async fn fix_unaligned_zeroes(
        &mut self,
        scan: &mut Scan<'_>,
    ) -> Result<(), CheckStop> {
        let shared = Shared::of(scan);
        let tables = std::mem::replace(&mut scan.tables, Tables::new(scan.geometry, 0));
        let geometry = scan.geometry;
        let mut reads = ReadAhead::new(&self.file, pieces_of(tables.all(), &geometry));
        while let Some((range, (at, _), mut buffer)) = reads.next().await? {
            let mut changed = Changed::default();
            let mut index = 0;
            while let Some(entry) = l2_entry_at(&geometry, buffer.as_slice(), index) {
                let keeps = HostOffset(entry.word & OFFSET_MASK);
                let wrong = Kind::of(&entry, &geometry, scan.header.has_data_file())
                    == Kind::Allocated
                    && !has_data(&entry, &geometry)
                    && !geometry.is_cluster_start(keeps);
                if wrong && !shared.has_l2(at, &geometry) {
                    let sound = without_room(&entry, &geometry);
                    if put_l2_entry(&geometry, buffer.as_mut_slice(), index, sound) {
                        changed_entry(&mut changed, &geometry, index);
                        self.corruptions_fixed += 1;
                        scan.sink
                            .repairing(FindingKind::PreallocatedUnaligned { at: keeps });
                    }
                }
                index += 1;
            }
            self.write_back(scan, range, &buffer, changed).await?;
            reads.give_back(buffer);
            scan.sink.step(range.length()).await?;
        }
        drop(reads);
        scan.tables = tables;
        self.sync().await
    }

    /// Holds the flags of the active tables against the stored counts. They are put right if everything is to be, and also
    /// when nothing else is wrong; else wrong ones are found. `scan` has counted references, and its counters hold them.
    pub(super) async fn fix_flags(
        &mut self,
        scan: &mut Scan<'_>,
        how: Repair,
    ) -> Result<(), CheckStop> {
        let shared = Shared::of(scan);
        // The findings of a first comparison have been told and, if nothing was changed since, counted.
        let (silent, known) = (self.has_changed, scan.sink.report);
        scan.sink.silent = true;
        scan.compare_counts(Leave::Counts).await?;
        if !silent {
            scan.sink.report = known;
        }
        scan.sink.silent = false;
        let report = scan.sink.report;
        let clean = report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0;
        if how != Repair::All && !clean {
            return scan.check_copied_flags().await;
        }
        let mut far = FarCounts::default();
        self.fix_l1_flags(scan, &shared, &mut far).await?;
        let tables = std::mem::replace(&mut scan.tables, Tables::new(scan.geometry, 0));
        let geometry = scan.geometry;
        let mut reads = ReadAhead::new(&self.file, pieces_of(tables.active(), &geometry));
        while let Some((range, (at, links), mut buffer)) = reads.next().await? {
            let mut changed = Changed::default();
            let may_change = !shared.has_l2(at, &geometry);
            let mut index = 0;
            let mut wrong = 0_u64;
            while let Some(entry) = l2_entry_at(&geometry, buffer.as_slice(), index) {
                if let Some(count) = scan.wrong_l2_flag(&entry, &mut far).await? {
                    let finding = FindingKind::CopiedL2 {
                        entry: entry.word,
                        count,
                    };
                    let right = entry.with_copied(count == 1);
                    if may_change && put_l2_entry(&geometry, buffer.as_mut_slice(), index, right) {
                        changed_entry(&mut changed, &geometry, index);
                        self.corruptions_fixed += 1;
                        scan.sink.repairing(finding);
                    } else {
                        wrong += 1;
                        scan.sink.found(finding, links.active);
                    }
                }
                index += 1;
            }
            if wrong > 0 {
                scan.sink.found(FindingKind::SharedTable { at }, 1);
            }
            self.write_back(scan, range, &buffer, changed).await?;
            reads.give_back(buffer);
            scan.sink.step(range.length()).await?;
        }
        drop(reads);
        scan.tables = tables;
        self.sync().await
    }

    async fn fix_l1_flags(
        &mut self,
        scan: &mut Scan<'_>,
        shared: &Shared,
        far: &mut FarCounts,
    ) -> Result<(), CheckStop> {
        let range = scan.in_file(scan.header.l1_table, scan.header.l1_table_bytes());
        let pieces = range.pieces(PIECE_BYTES).map(|piece| (piece, ()));
        let mut reads = ReadAhead::new(&self.file, pieces);
        while let Some((piece, (), mut buffer)) = reads.next().await? {
            let first = (piece.offset() - range.offset()) / 8;
            let mut changed = Changed::default();
            let mut wrong = 0_u64;
            for index in 0..buffer.len() / 8 {
                let entry = L1Entry(word_at(buffer.as_slice(), index).unwrap_or(0));
                let Some(count) = scan.wrong_l1_flag(entry, far).await? else {
                    continue;
                };
                let finding = FindingKind::CopiedL1 {
                    index: first + index as u64,
                    entry: entry.0,
                    count,
                };
                let right = entry.with_copied(count == 1);
                if !shared.l1 && put_word(buffer.as_mut_slice(), index, right.0) {
                    changed.bytes(index * 8, index * 8 + 8);
                    self.corruptions_fixed += 1;
                    scan.sink.repairing(finding);
                } else {
                    wrong += 1;
                    scan.sink.found(finding, 1);
                }
            }
            if wrong > 0 {
                let at = scan.header.l1_table;
                scan.sink.found(FindingKind::SharedTable { at }, 1);
            }
            self.write_back(scan, piece, &buffer, changed).await?;
            reads.give_back(buffer);
            scan.sink.step(piece.length()).await?;
        }
        Ok(())
    }
}

/// An entry that reads the same and keeps no cluster.
const fn without_room(entry: &L2Entry, geometry: &Geometry) -> L2Entry {
    if geometry.extended_l2() {
        // No subcluster has data; those that read as zeroes still do, the others are still not here.
        return L2Entry {
            word: 0,
            bitmap: entry.bitmap,
        };
    }
    L2Entry {
        word: ZERO,
        bitmap: 0,
    }
}

fn changed_entry(changed: &mut Changed, geometry: &Geometry, index: usize) {
    let bytes = usize::try_from(geometry.l2_entry_bytes()).unwrap_or(8);
    changed.bytes(index * bytes, (index + 1) * bytes);
}
