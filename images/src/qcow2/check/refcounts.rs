//! The refcount structure: its own soundness, and the counts in it held against the references.

use blockyard_storage::ByteRange;

use super::findings::FindingKind;
use super::observer::CheckStop;
use super::read_ahead::{PIECE_BYTES, ReadAhead, read_all};
use super::scan::Scan;
use crate::qcow2::layout::entries::word_at;
use crate::qcow2::layout::refcounts::{TABLE_OFFSET_MASK, refcount_at};
use crate::qcow2::units::HostOffset;

/// Clusters that are compared before findings are handed on.
const BATCH: u64 = 65_536;

/// Blocks that are read ahead in one go.
const RUN_MAX: usize = 1024;

/// What a refcount table says of one of its blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Block {
    /// There is none: all its counts are 0.
    Missing,
    /// It would begin in the middle of a cluster, or where no file reaches: its counts are unknown.
    Unreadable,
    /// Its first byte.
    At(HostOffset),
}

/// What a comparison leaves in the counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Leave {
    /// The references.
    References,
    /// The counts that are stored.
    Counts,
}

impl Scan<'_> {
    /// The block that holds the counts of some clusters.
    pub(super) fn block(&self, index: u64) -> Block {
        let entry = usize::try_from(index)
            .ok()
            .and_then(|index| self.refcount_table.get(index));
        let at = HostOffset(entry.copied().unwrap_or(0) & TABLE_OFFSET_MASK);
        match at.0 {
            0 => Block::Missing,
            offset if self.geometry.is_cluster_start(at) && i64::try_from(offset).is_ok() => {
                Block::At(at)
            }
            _ => Block::Unreadable,
        }
    }

    /// Reads the refcount table, at most 8 MiB.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(in crate::qcow2) async fn read_refcount_table(&mut self) -> Result<(), CheckStop> {
        let length_bytes = self.header.refcount_table_bytes();
        let range = self.in_file(self.header.refcount_table, length_bytes);
        let bytes = read_all(&self.file, range).await?;
        let entries = usize::try_from(length_bytes / 8).unwrap_or(0);
        self.refcount_table = (0..entries)
            .map(|index| word_at(&bytes, index).unwrap_or(0))
            .collect();
        self.sink.step(length_bytes).await
    }

    /// Counts the references to refcount blocks. Each has to have one reference only.
    ///
    /// # Errors
    /// When the observer cancels.
    pub(super) async fn count_refcount_blocks(&mut self) -> Result<(), CheckStop> {
        let cluster_bytes = self.geometry.cluster_bytes();
        for index in 0..self.refcount_table.len() {
            if index.is_multiple_of(65_536) {
                self.sink.step(0).await?;
            }
            let entry = self.refcount_table.get(index).copied().unwrap_or(0);
            let index = index as u64;
            let at = HostOffset(entry & TABLE_OFFSET_MASK);
            let cluster = self.geometry.host_cluster(at).0;
            let finding = if entry & !TABLE_OFFSET_MASK != 0 {
                FindingKind::BlockReserved { index }
            } else if !self.geometry.is_cluster_start(at) {
                FindingKind::BlockUnaligned { index }
            } else if cluster >= self.references.counters.clusters() {
                FindingKind::BlockOutside { index }
            } else if at.0 == 0 {
                continue;
            } else {
                self.references.add(at, cluster_bytes, 1, &mut self.sink);
                match self.references.counters.of(cluster) {
                    1 => continue,
                    references => FindingKind::BlockShared { index, references },
                }
            };
            self.sink.found(finding, 1);
            self.must_rebuild = true;
        }
        Ok(())
    }

    /// Holds every count against the references, and finds out where the image ends. A count of 0 for a cluster that is in
    /// use means that the structure cannot be trusted to say what is free: it has to be made anew.
    ///
    /// # Errors
    /// When a block cannot be read, or the observer cancels.
    pub(super) async fn compare_counts(&mut self, leave: Leave) -> Result<(), CheckStop> {
        let per_block = self.geometry.refcounts_per_block();
        let clusters = self.references.counters.clusters();
        let mut highest = None;
        let blocks = clusters.div_ceil(per_block);
        let mut index = 0;
        while index < blocks {
            let run = self.run_of_blocks(index, blocks);
            let (first, end) = (index * per_block, clusters.min((index + run) * per_block));
            match self.block(index) {
                Block::At(_) => {
                    self.compare_blocks(index..index + run, leave, &mut highest)
                        .await?;
                }
                Block::Missing => {
                    self.compare_without_block(first, end, leave, &mut highest)
                        .await?;
                }
                Block::Unreadable => {
                    let clusters = end - first;
                    self.sink
                        .found(FindingKind::RefcountUnknown { first, clusters }, 1);
                    self.unreadable_blocks += 1;
                    self.must_rebuild = true;
                }
            }
            self.sink.step(0).await?;
            index += run;
        }
        // As QEMU has it: an image without any count ends behind its first cluster.
        let end = (highest.unwrap_or(0) + 1) << self.geometry.cluster_bits();
        self.sink.report.image_end_offset = end;
        Ok(())
    }

    /// How many blocks from `index` on are of one kind, `RUN_MAX` at most; all that the table has no entry for are one run.
    fn run_of_blocks(&self, index: u64, blocks: u64) -> u64 {
        let kind = |index| std::mem::discriminant(&self.block(index));
        if index >= self.refcount_table.len() as u64 {
            return blocks - index;
        }
        (index..blocks)
            .take(RUN_MAX)
            .take_while(|other| kind(*other) == kind(index))
            .count() as u64
    }

    async fn compare_blocks(
        &mut self,
        indices: std::ops::Range<u64>,
        leave: Leave,
        highest: &mut Option<u64>,
    ) -> Result<(), CheckStop> {
        let file = self.file.clone();
        let pieces: Vec<_> = indices.flat_map(|index| self.block_pieces(index)).collect();
        let mut reads = ReadAhead::new(&file, pieces.into_iter());
        while let Some((range, first, buffer)) = reads.next().await? {
            let clusters = self.references.counters.clusters();
            let in_piece = (range.length() * 8) >> self.geometry.refcount_order();
            let end = clusters.min(first + in_piece);
            for cluster in first..end {
                let place = usize::try_from(cluster - first).unwrap_or(usize::MAX);
                let count = refcount_at(&self.geometry, buffer.as_slice(), place).unwrap_or(0);
                let references = self.references.counters.of(cluster);
                self.compare(cluster, count, references, leave, highest);
                if (cluster + 1).is_multiple_of(BATCH) {
                    self.sink.step(0).await?;
                }
            }
            reads.give_back(buffer);
            self.sink.step(range.length()).await?;
        }
        Ok(())
    }

    async fn compare_without_block(
        &mut self,
        first: u64,
        end: u64,
        leave: Leave,
        highest: &mut Option<u64>,
    ) -> Result<(), CheckStop> {
        let mut from = first;
        let mut compared = 0_u64;
        while let Some(cluster) = self
            .references
            .counters
            .next_counted(from)
            .filter(|cluster| *cluster < end)
        {
            let references = self.references.counters.of(cluster);
            self.compare(cluster, 0, references, leave, highest);
            from = cluster + 1;
            compared += 1;
            if compared.is_multiple_of(BATCH) {
                self.sink.step(0).await?;
            }
        }
        Ok(())
    }

    fn compare(
        &mut self,
        cluster: u64,
        count: u64,
        references: u64,
        leave: Leave,
        highest: &mut Option<u64>,
    ) {
        if count > 0 || references > 0 {
            *highest = Some(cluster);
        }
        if count == references {
            return;
        }
        self.must_rebuild |= count == 0;
        self.sink.found(
            FindingKind::Refcount {
                cluster,
                count,
                references,
            },
            1,
        );
        if leave == Leave::Counts {
            self.references.counters.set(cluster, count);
        }
    }

    /// The pieces of a block that hold counts of clusters there are, each with its first cluster.
    pub(super) fn block_pieces(&self, index: u64) -> Vec<(ByteRange, u64)> {
        let Block::At(at) = self.block(index) else {
            return Vec::new();
        };
        let first = index * self.geometry.refcounts_per_block();
        let clusters = self.references.counters.clusters().saturating_sub(first);
        let bits =
            clusters.min(self.geometry.refcounts_per_block()) << self.geometry.refcount_order();
        // Whole sectors, which are what changes at once on the medium.
        let length_bytes = bits.div_ceil(8).next_multiple_of(512);
        let order = self.geometry.refcount_order();
        let mut offset = 0;
        std::iter::from_fn(|| {
            let length =
                PIECE_BYTES.min(length_bytes.checked_sub(offset).filter(|left| *left > 0)?);
            let piece = (
                ByteRange::new(at.plus(offset).0, length),
                first + ((offset * 8) >> order),
            );
            offset += length;
            Some(piece)
        })
        .collect()
    }
}
