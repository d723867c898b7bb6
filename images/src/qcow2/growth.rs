//! Tables that get too small move: written as a whole to a new place, durable there before one write of the header's first
//! sector says where they are. What they say on the medium does not change by that.

use std::rc::Rc;

use blockyard_storage::error::{EFBIG, ENOSPC};
use blockyard_storage::{ByteRange, Operation, StorageError};

use crate::error::ImageError;
use crate::qcow2::claims::Claim;
use crate::qcow2::free_list::Why;
use crate::qcow2::header_updates::interrupted;
use crate::qcow2::image::{ImageState, Qcow2};
use crate::qcow2::layout::entries::L1Entry;
use crate::qcow2::layout::header::{L1_TABLE_BYTES_MAX, REFCOUNT_TABLE_BYTES_MAX};
use crate::qcow2::layout::refcounts::{TABLE_OFFSET_MASK, put_refcount};
use crate::qcow2::overlap::Metadata;
use crate::qcow2::refcounts::Counted;
use crate::qcow2::units::{ClusterCount, HostCluster, HostOffset};

/// Runs that are too short for a table before its place is looked for at the end of the file.
const TRIES_MAX: usize = 8;

/// Free clusters that are not counted by any block yet, and the blocks for them.
struct Region {
    /// The blocks stand at its front.
    first: HostCluster,
    blocks: u64,
    clusters: u64,
}

impl Region {
    fn behind_blocks(&self) -> HostCluster {
        self.first.plus(ClusterCount(self.blocks))
    }
}

impl Qcow2 {
    /// Makes room for more clusters in the refcount table.
    pub(super) async fn grow_refcount_table(&self) -> Result<(), ImageError> {
        let state = Rc::clone(&self.state);
        let before = state.counts.table.borrow().len();
        let grown = self
            .serial
            .run(move || {
                Box::pin(async move {
                    // Others may have wanted the same.
                    let grown = state.counts.table.borrow().len() > before;
                    match grown {
                        true => Ok(()),
                        false => state.grow_refcount_table(1).await,
                    }
                })
            })
            .await;
        grown.unwrap_or_else(|| Err(interrupted()))
    }

    /// Makes the L1 table `entries` long.
    ///
    /// # Errors
    /// Refused where that is more than the format allows.
    pub(super) async fn grow_l1_table(&self, entries: u64) -> Result<(), ImageError> {
        let header_entries = l1_entries(entries)?;
        let clusters = self.state.geometry.clusters_for(entries.saturating_mul(8));
        let place = self.claim_together(clusters).await?;
        let first = place.first;
        let state = Rc::clone(&self.state);
        let moved = self
            .serial
            .run(move || Box::pin(async move { state.move_l1_table(first, header_entries).await }))
            .await;
        match moved.unwrap_or_else(|| Err(interrupted())) {
            Ok(()) => {
                place.keep();
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Takes so many clusters that stand together.
    pub(super) async fn claim_together(
        &self,
        wanted: ClusterCount,
    ) -> Result<Together, ImageError> {
        let mut too_short = Vec::new();
        for _ in 0..TRIES_MAX {
            let claim = self.claim(wanted).await?;
            let mut together = Together {
                first: claim.first(),
                claims: vec![claim],
            };
            while together.count() < wanted {
                match self.claim_exactly(together.end()).await? {
                    Some(claim) => together.claims.push(claim),
                    None => break,
                }
            }
            if together.count() >= wanted {
                return Ok(together);
            }
            too_short.push(together);
        }
        drop(too_short);
        let state = Rc::clone(&self.state);
        let made = self
            .serial
            .run(move || Box::pin(async move { state.claim_region(wanted).await }))
            .await;
        let claim = made.unwrap_or_else(|| Err(interrupted()))?;
        Ok(Together {
            first: claim.first(),
            claims: vec![claim],
        })
    }

    async fn claim_exactly(&self, cluster: HostCluster) -> Result<Option<Claim>, ImageError> {
        loop {
            match self.state.claim_cluster(cluster)? {
                Counted::Done(true) => return Ok(Some(self.state.claimed_cluster(cluster))),
                Counted::Done(false) | Counted::Full => return Ok(None),
                Counted::Load(slice) => self.load_counts(slice).await?,
                Counted::Write => self.commit_counts().await?,
                Counted::Reserve(cluster) => self.reserve_table(cluster).await?,
                Counted::GrowTable => self.grow_refcount_table().await?,
                Counted::Wait => self.wait_for_claims().await,
            }
        }
    }
}

/// Claims that stand one behind the other.
pub(super) struct Together {
    pub(super) first: HostCluster,
    claims: Vec<Claim>,
}

impl Together {
    fn count(&self) -> ClusterCount {
        ClusterCount(self.claims.iter().map(|claim| claim.count().0).sum())
    }

    fn end(&self) -> HostCluster {
        self.first.plus(self.count())
    }

    /// As with each [`Claim`].
    pub(super) fn keep(self) {
        self.claims.into_iter().for_each(Claim::keep);
    }

    /// As with each [`Claim`].
    pub(super) fn writing(&mut self) {
        self.claims.iter_mut().for_each(Claim::writing);
    }

    /// As with each [`Claim`].
    pub(super) fn settled(&mut self) {
        self.claims.iter_mut().for_each(Claim::settled);
    }
}

impl ImageState {
    /// Moves the refcount table to where it has no entry yet, with room for at least `more` clusters behind it.
    async fn grow_refcount_table(&self, more: u64) -> Result<(), ImageError> {
        self.check_sound()?;
        let geometry = &self.geometry;
        let per_block = geometry.refcounts_per_block();
        let old_entries = self.counts.table.borrow().len();
        let start = HostCluster(old_entries.saturating_mul(per_block));
        // Half as much again, so that it does not move often.
        let mut entries = old_entries + old_entries / 2 + 1;
        let (region, table_clusters) = loop {
            let table_clusters = geometry.clusters_for(entries.saturating_mul(8));
            entries = table_clusters.0 * geometry.cluster_bytes() / 8;
            let region = region(start, table_clusters.0, per_block);
            let needed = (region.first.0 + region.clusters + more).div_ceil(per_block);
            if needed <= entries {
                break (region, table_clusters);
            }
            entries = needed;
        };
        if table_clusters.0 << geometry.cluster_bits() > REFCOUNT_TABLE_BYTES_MAX {
            return Err(StorageError::whole(Operation::Write, EFBIG).into());
        }
        self.check_region(&region)?;
        self.write_blocks(&region).await?;
        let at = geometry.host_offset(region.behind_blocks());
        let mut words = self.durable_refcount_table();
        let length = usize::try_from(entries).unwrap_or(usize::MAX);
        words.resize(length, 0);
        self.link_blocks(&region, &mut words)?;
        self.write_words(at, &words, Metadata::RefcountTable)
            .await?;
        self.sync().await?;
        let clusters = u32::try_from(table_clusters.0).unwrap_or(u32::MAX);
        self.write_header(|header| {
            header.refcount_table = at;
            header.refcount_table_clusters = clusters;
        })
        .await?;
        let old_at = {
            let mut table = self.counts.table.borrow_mut();
            let old_at = table.at();
            table.moved(at, &words);
            old_at
        };
        self.touch(&region);
        self.overlaps.rebuild(self);
        let old_clusters = geometry.clusters_for(old_entries * 8);
        self.unlink(geometry.host_cluster(old_at), old_clusters, Why::Other);
        Ok(())
    }

    /// Takes `wanted` clusters that stand together behind everything else.
    async fn claim_region(self: &Rc<Self>, wanted: ClusterCount) -> Result<Claim, ImageError> {
        self.check_sound()?;
        // Nothing counts these clusters before their blocks are written, so nothing else would keep others away.
        self.claims_wait.set(true);
        let claimed = self.claim_uncounted(wanted).await;
        self.claims_wait.set(false);
        claimed
    }

    async fn claim_uncounted(self: &Rc<Self>, wanted: ClusterCount) -> Result<Claim, ImageError> {
        let per_block = self.geometry.refcounts_per_block();
        let region = loop {
            let entries = self.counts.table.borrow().len();
            let untouched = self.counts.untouched_from.get().0;
            let mut start = untouched.next_multiple_of(per_block);
            // Where no block counts anything yet.
            while self.counts.table.borrow().word(start / per_block) != 0 {
                start += per_block;
            }
            let region = region(HostCluster(start), wanted.0, per_block);
            let end = region.first.0 + region.clusters;
            if end.div_ceil(per_block) <= entries {
                break region;
            }
            self.grow_refcount_table(end).await?;
            if self.counts.table.borrow().len() <= entries {
                return Err(StorageError::whole(Operation::Write, EFBIG).into());
            }
        };
        self.check_region(&region)?;
        self.touch(&region);
        self.write_blocks(&region).await?;
        self.sync().await?;
        let table_index = region.first.0 / per_block;
        let mut table = self.counts.table.borrow_mut();
        for block in 0..region.blocks {
            let at = self
                .geometry
                .host_offset(region.first.plus(ClusterCount(block)));
            if table.word(table_index + block) != 0 || !table.set(table_index + block, at.0) {
                return Err(StorageError::whole(Operation::Write, ENOSPC).into());
            }
        }
        drop(table);
        self.overlaps.rebuild(self);
        Ok(self.claimed_run(region.behind_blocks(), wanted))
    }

    /// Moves the L1 table to clusters that have been taken for it.
    async fn move_l1_table(&self, first: HostCluster, entries: u32) -> Result<(), ImageError> {
        // Counts of the new clusters are durable before the table is used, and all L2 tables are written.
        self.counts_wanted.set(true);
        self.commit().await?;
        let at = self.geometry.host_offset(first);
        let mut words = self.durable_l1_table();
        let length = usize::try_from(entries).unwrap_or(usize::MAX);
        words.resize(length.max(words.len()), 0);
        self.write_words(at, &words, Metadata::ActiveL1).await?;
        self.sync().await?;
        self.write_header(|header| {
            header.l1_table = at;
            header.l1_entries = entries.max(header.l1_entries);
        })
        .await?;
        let (old_at, old_entries) = {
            let mut l1 = self.l1.borrow_mut();
            let old = (l1.at(), l1.len());
            l1.moved(at, &words);
            old
        };
        self.overlaps.rebuild(self);
        let old_clusters = self.geometry.clusters_for(old_entries * 8);
        self.unlink(self.geometry.host_cluster(old_at), old_clusters, Why::Other);
        Ok(())
    }

    /// The refcount table without blocks that are not written yet.
    fn durable_refcount_table(&self) -> Vec<u64> {
        let fresh = self.fresh.borrow();
        let table = self.counts.table.borrow();
        let word = |word: &u64| match fresh.contains(HostOffset(word & TABLE_OFFSET_MASK)) {
            true => 0,
            false => *word,
        };
        table.words().iter().map(word).collect()
    }

    /// The L1 table with the old places of tables that are not written yet.
    fn durable_l1_table(&self) -> Vec<u64> {
        let fresh = self.fresh.borrow();
        let l1 = self.l1.borrow();
        let word = |word: &u64| match L1Entry(*word).table() {
            Some(table) if fresh.contains(table) => fresh.origin(table).map_or(0, |at| at.0),
            _ => *word,
        };
        l1.words().iter().map(word).collect()
    }

    fn check_region(&self, region: &Region) -> Result<(), ImageError> {
        let end = region.first.plus(ClusterCount(region.clusters));
        if end > self.clusters_max() {
            let errno = match self.file.facts().fixed_length {
                true => ENOSPC,
                false => EFBIG,
            };
            return Err(StorageError::whole(Operation::Write, errno).into());
        }
        let at = self.geometry.host_offset(region.first);
        let length = region
            .clusters
            .saturating_mul(self.geometry.cluster_bytes());
        self.overlaps
            .check(self, ByteRange::new(at.0, length), None)
            .map_err(ImageError::Corrupt)
    }

    fn touch(&self, region: &Region) {
        self.counts
            .touch(region.first.plus(ClusterCount(region.clusters)));
    }

    /// Writes the blocks of a region: they count all of it.
    async fn write_blocks(&self, region: &Region) -> Result<(), ImageError> {
        let per_block = self.geometry.refcounts_per_block();
        let cluster_bytes = self.geometry.cluster_bytes();
        for block in 0..region.blocks {
            let counted = region
                .clusters
                .saturating_sub(block * per_block)
                .min(per_block);
            let mut bytes = vec![0; usize::try_from(cluster_bytes).unwrap_or(0)];
            for index in 0..usize::try_from(counted).unwrap_or(0) {
                let put = put_refcount(&self.geometry, &mut bytes, index, 1);
                debug_assert!(put, "a count of 1 fits");
            }
            let at = self
                .geometry
                .host_offset(region.first.plus(ClusterCount(block)));
            self.write_metadata(at, &bytes, Some(Metadata::RefcountBlock))
                .await?;
        }
        Ok(())
    }

    fn link_blocks(&self, region: &Region, words: &mut [u64]) -> Result<(), ImageError> {
        let index = region.first.0 / self.geometry.refcounts_per_block();
        for block in 0..region.blocks {
            let at = self
                .geometry
                .host_offset(region.first.plus(ClusterCount(block)));
            let place = usize::try_from(index + block).ok();
            match place.and_then(|place| words.get_mut(place)) {
                Some(word) => *word = at.0,
                None => return Err(StorageError::whole(Operation::Write, EFBIG).into()),
            }
        }
        Ok(())
    }

    /// Writes a table of words, in bounded pieces.
    async fn write_words(
        &self,
        at: HostOffset,
        words: &[u64],
        kind: Metadata,
    ) -> Result<(), ImageError> {
        let mut at = at;
        for piece in words.chunks(WORDS_PER_WRITE) {
            let bytes: Vec<u8> = piece.iter().flat_map(|word| word.to_be_bytes()).collect();
            self.write_metadata(at, &bytes, Some(kind)).await?;
            at = at.plus(bytes.len() as u64);
        }
        Ok(())
    }
}

/// Words that are written at once: 1 MiB.
const WORDS_PER_WRITE: usize = 1 << 17;

/// A region at `first`, the first cluster of a block, with room for `wanted` clusters behind the blocks.
fn region(first: HostCluster, wanted: u64, per_block: u64) -> Region {
    let mut blocks = 1;
    loop {
        let clusters = wanted.saturating_add(blocks);
        let needed = clusters.div_ceil(per_block);
        if needed <= blocks {
            return Region {
                first,
                blocks,
                clusters,
            };
        }
        blocks = needed;
    }
}

/// The number of entries of an L1 table, as a header has it.
///
/// # Errors
/// Refused where that is more than the format allows.
pub(super) fn l1_entries(entries: u64) -> Result<u32, ImageError> {
    let bytes = entries.saturating_mul(8);
    let fitting = u32::try_from(entries).ok();
    fitting
        .filter(|_| bytes <= L1_TABLE_BYTES_MAX)
        .ok_or_else(|| {
            ImageError::refused_because(
                "Failed to grow the L1 table: File too large",
                format!("it would take {bytes} bytes, {L1_TABLE_BYTES_MAX} at most are possible"),
            )
        })
}
