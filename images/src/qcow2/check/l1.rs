//! All L1 tables, the active one and those of snapshots: what they take, and which L2 tables they lead to.

use blockyard_storage::ByteRange;

use super::findings::FindingKind;
use super::observer::CheckStop;
use super::read_ahead::{PIECE_BYTES, ReadAhead};
use super::scan::Scan;
use super::sweep::{Stretch, sweep};
use super::tables::Links;
use crate::qcow2::layout::entries::{L1_RESERVED, OFFSET_MASK, word_at};
use crate::qcow2::units::HostOffset;

impl Scan<'_> {
    /// Counts the clusters of all L1 tables, and links to L2 tables.
    ///
    /// # Errors
    /// When one cannot be read, or the observer cancels.
    pub(super) async fn count_l1_tables(&mut self) -> Result<(), CheckStop> {
        let active = (self.header.l1_table, u64::from(self.header.l1_entries));
        let inactive = std::mem::take(&mut self.snapshots.l1_tables);
        let all = || {
            let inactive = inactive
                .iter()
                .map(|(at, entries)| (*at, u64::from(*entries), false));
            std::iter::once((active.0, active.1, true)).chain(inactive)
        };
        let mut clusters = Vec::new();
        for (at, entries, active) in all() {
            if self
                .references
                .is_in_file(at, entries * 8, 1, &mut self.sink)
                && let Some((start, end)) = self.references.clusters_of(at, entries * 8)
            {
                clusters.push(Stretch { start, end, active });
            }
        }
        for run in sweep(clusters) {
            self.references
                .add_clusters(run.start, run.end, run.times, &mut self.sink);
            if run.active > 0 {
                self.active_l1.push(run);
            }
        }
        self.sink.step(0).await?;
        let bytes = all().map(|(at, entries, active)| {
            let range = self.in_file(at, entries * 8);
            Stretch {
                start: range.offset(),
                end: range.end(),
                active,
            }
        });
        let bytes: Vec<Stretch> = bytes.collect();
        let pieces = sweep(bytes).flat_map(|run| {
            let links = Links {
                times: run.times,
                active: run.active,
            };
            ByteRange::between(run.start, run.end)
                .pieces(PIECE_BYTES)
                .map(move |piece| (piece, links))
        });
        let mut reads = ReadAhead::new(&self.file.clone(), pieces);
        while let Some((range, links, buffer)) = reads.next().await? {
            self.look_at_l1_entries(buffer.as_slice(), links);
            reads.give_back(buffer);
            self.sink.step(range.length()).await?;
        }
        self.snapshots.l1_tables = inactive;
        Ok(())
    }

    fn look_at_l1_entries(&mut self, table: &[u8], links: Links) {
        for index in 0..table.len() / 8 {
            let entry = word_at(table, index).unwrap_or(0);
            if entry == 0 {
                continue;
            }
            if entry & L1_RESERVED != 0 {
                self.sink
                    .found(FindingKind::L1Reserved { entry }, links.times);
            }
            let at = HostOffset(entry & OFFSET_MASK);
            let cluster_bytes = self.geometry.cluster_bytes();
            self.references
                .add(at, cluster_bytes, links.times, &mut self.sink);
            if !self.geometry.is_cluster_start(at) {
                self.sink
                    .found(FindingKind::L2TableUnaligned { at }, links.times);
            }
            if !self.tables.add(at, links) {
                self.sink.found(FindingKind::TooManyUnaligned, links.times);
            }
        }
    }
}
