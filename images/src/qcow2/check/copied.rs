//! The flags of the active tables that say which clusters may be written in place, held against the stored counts.
//!
//! Runs once the counters hold the stored counts ([`Leave::Counts`](super::refcounts::Leave)).

use blockyard_storage::ByteRange;

use super::findings::FindingKind;
use super::l2::{Kind, pieces_of};
use super::observer::CheckStop;
use super::read_ahead::{PIECE_BYTES, ReadAhead, read_all};
use super::refcounts::Block;
use super::scan::Scan;
use super::tables::{Links, Tables};
use crate::qcow2::layout::entries::{L1Entry, L2Entry, OFFSET_MASK, l2_entry_at, word_at};
use crate::qcow2::layout::refcounts::refcount_at;
use crate::qcow2::units::{Geometry, HostOffset};

/// The stored counts that lie behind those of the file's own clusters: the last sector that was looked at.
#[derive(Default)]
pub(super) struct FarCounts {
    sector: Option<(u64, Vec<u8>)>,
}

impl Scan<'_> {
    /// Checks the flags of the active L1 table and of all L2 tables that it leads to.
    ///
    /// # Errors
    /// When a table cannot be read, or the observer cancels.
    pub(super) async fn check_copied_flags(&mut self) -> Result<(), CheckStop> {
        let mut far = FarCounts::default();
        self.check_l1_flags(&mut far).await?;
        let file = self.file.clone();
        let tables = std::mem::replace(&mut self.tables, Tables::new(self.geometry, 0));
        let geometry = self.geometry;
        let mut reads = ReadAhead::new(&file, pieces_of(tables.active(), &geometry));
        while let Some((range, (at, links), buffer)) = reads.next().await? {
            // QEMU looks at no table whose own count it does not know.
            if self.stored_count(at, &mut far).await?.is_some() {
                self.check_l2_flags(buffer.as_slice(), links, &mut far)
                    .await?;
            }
            reads.give_back(buffer);
            self.sink.step(range.length()).await?;
        }
        drop(reads);
        self.tables = tables;
        Ok(())
    }

    async fn check_l1_flags(&mut self, far: &mut FarCounts) -> Result<(), CheckStop> {
        let range = self.in_file(self.header.l1_table, self.header.l1_table_bytes());
        let pieces = range.pieces(PIECE_BYTES).map(|piece| (piece, ()));
        let file = self.file.clone();
        let mut reads = ReadAhead::new(&file, pieces);
        while let Some((piece, (), buffer)) = reads.next().await? {
            let first = (piece.offset() - range.offset()) / 8;
            for index in 0..buffer.len() / 8 {
                let entry = L1Entry(word_at(buffer.as_slice(), index).unwrap_or(0));
                let index = first + index as u64;
                if let Some(count) = self.wrong_l1_flag(entry, far).await? {
                    let entry = entry.0;
                    let finding = FindingKind::CopiedL1 {
                        index,
                        entry,
                        count,
                    };
                    self.sink.found(finding, 1);
                }
            }
            reads.give_back(buffer);
            self.sink.step(piece.length()).await?;
        }
        Ok(())
    }

    async fn check_l2_flags(
        &mut self,
        table: &[u8],
        links: Links,
        far: &mut FarCounts,
    ) -> Result<(), CheckStop> {
        let mut index = 0;
        while let Some(entry) = l2_entry_at(&self.geometry, table, index) {
            index += 1;
            if let Some(count) = self.wrong_l2_flag(&entry, far).await? {
                let entry = entry.word;
                self.sink
                    .found(FindingKind::CopiedL2 { entry, count }, links.active);
            }
        }
        Ok(())
    }

    /// The count of an entry's table, if the entry's flag contradicts it.
    pub(super) async fn wrong_l1_flag(
        &self,
        entry: L1Entry,
        far: &mut FarCounts,
    ) -> Result<Option<u64>, CheckStop> {
        let Some(table) = entry.table() else {
            return Ok(None);
        };
        let count = self.stored_count(table, far).await?;
        Ok(count.filter(|count| (*count == 1) != entry.is_copied()))
    }

    /// The count of an entry's cluster, if the entry's flag contradicts it. Clusters of a data file are counted nowhere and
    /// have one reference each.
    pub(super) async fn wrong_l2_flag(
        &self,
        entry: &L2Entry,
        far: &mut FarCounts,
    ) -> Result<Option<u64>, CheckStop> {
        let has_data_file = self.header.has_data_file();
        if *entry == L2Entry::default()
            || Kind::of(entry, &self.geometry, has_data_file) != Kind::Allocated
        {
            return Ok(None);
        }
        let at = HostOffset(entry.word & OFFSET_MASK);
        let count = match self.known_count(at) {
            _ if has_data_file => Some(1),
            Some(count) => Some(count),
            None => self.stored_count(at, far).await?,
        };
        Ok(count.filter(|count| (*count == 1) != entry.is_copied()))
    }

    /// The stored count of the cluster that holds a byte, if nothing has to be read for it.
    fn known_count(&self, at: HostOffset) -> Option<u64> {
        let cluster = self.geometry.host_cluster(at).0;
        let counters = &self.references.counters;
        (cluster < counters.clusters() && self.unreadable_blocks == 0).then(|| counters.of(cluster))
    }

    /// The stored count of the cluster that holds a byte; `None`: it is unknown.
    async fn stored_count(
        &self,
        at: HostOffset,
        far: &mut FarCounts,
    ) -> Result<Option<u64>, CheckStop> {
        let cluster = self.geometry.host_cluster(at).0;
        let per_block = self.geometry.refcounts_per_block();
        let block = match self.block(cluster / per_block) {
            Block::Unreadable => return Ok(None),
            Block::Missing => return Ok(Some(0)),
            Block::At(block) => block,
        };
        if cluster < self.references.counters.clusters() {
            return Ok(Some(self.references.counters.of(cluster)));
        }
        let (sector, place) = place_of(&self.geometry, block, cluster % per_block);
        if far.sector.as_ref().is_none_or(|known| known.0 != sector) {
            let bytes = read_all(&self.file, ByteRange::new(sector, 512)).await?;
            far.sector = Some((sector, bytes));
        }
        let bytes = far.sector.as_ref().map_or(&[][..], |known| &known.1);
        Ok(refcount_at(&self.geometry, bytes, place))
    }
}

/// The sector of a block that holds a count, and the count's place there.
fn place_of(geometry: &Geometry, block: HostOffset, index: u64) -> (u64, usize) {
    let bit = index << geometry.refcount_order();
    let sector = bit / (512 * 8);
    let place = (bit % (512 * 8)) >> geometry.refcount_order();
    (
        block.plus(sector * 512).0,
        usize::try_from(place).unwrap_or(0),
    )
}
