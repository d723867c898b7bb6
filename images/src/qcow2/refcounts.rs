//! Reference counts: finding free clusters, raising and lowering. Everything here happens at once and in memory; what is
//! missing from the cache is named, and the caller loads it and asks again.
//!
//! A free cluster is one whose count is 0. Whatever waits for something (its unlinking to be durable, a lease to end) keeps
//! its count meanwhile, so the counts alone decide.
//!
//! Spec: qcow2, "Host cluster management".

use std::cell::{Cell, RefCell};
use std::ops::Range;

use blockyard_storage::error::{EFBIG, ENOSPC};
use blockyard_storage::{ByteRange, Operation, StorageError};

use crate::error::{Corruption, ImageError};
use crate::qcow2::free_list::Why;
use crate::qcow2::fresh::TableKind;
use crate::qcow2::image::ImageState;
use crate::qcow2::layout::refcounts::{TABLE_OFFSET_MASK, put_refcount, refcount_at};
use crate::qcow2::lookup::{Look, hexadecimal};
use crate::qcow2::table_cache::TableCache;
use crate::qcow2::units::{ClusterCount, HostCluster, HostOffset};
use crate::qcow2::word_table::WordTable;

/// First host offset that L1 and L2 entries cannot name.
const HOST_END_BYTES: u64 = 1 << 56;

/// The refcount table, the blocks it leads to, and where free clusters are looked for.
pub(super) struct Refcounts {
    pub(super) table: RefCell<WordTable>,
    pub(super) blocks: TableCache,
    /// No cluster below it is free.
    pub(super) cursor: Cell<HostCluster>,
    /// Nobody has ever written to this cluster or behind it: the file reads as zeroes there.
    pub(super) untouched_from: Cell<HostCluster>,
}

/// Where the count of a cluster stands.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// In the slice at `slice`, which holds the counts of `clusters`.
    Slice {
        slice: HostOffset,
        clusters: (HostCluster, ClusterCount),
    },
    /// There is no block for it yet.
    NoBlock { table_index: u64 },
    /// The table is too short for it.
    NoEntry,
}

/// What stands in the way of a change of counts, or its result.
pub(super) enum Counted<T> {
    /// It was done.
    Done(T),
    /// This slice has to be loaded first.
    Load(HostOffset),
    /// Something has to be written first, to make room in the cache.
    Write,
    /// Room in the file has to be reserved first for a block, or a part of the table, in this cluster.
    Reserve(HostCluster),
    /// The refcount table has to grow first.
    GrowTable,
    /// Nobody is given a cluster for now.
    Wait,
    /// There is no free cluster.
    Full,
}

/// What the counts at the front of a run are.
pub(super) enum Peeked {
    Load(HostOffset),
    /// So many have no reference, or are not to be lowered for another reason.
    Unused(ClusterCount),
    /// So many have one.
    Last(ClusterCount),
    /// So many have more.
    Shared(ClusterCount),
}

/// Whether counts were lowered.
pub(super) enum Lowered {
    Done,
    Load,
}

/// A run of clusters that was found free and whose counts are 1 now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    pub(super) first: HostCluster,
    pub(super) count: ClusterCount,
    /// Nobody has ever written there: it reads as zeroes.
    pub(super) reads_zero: bool,
}

impl Refcounts {
    /// Counts as they are in the file, which is `file_clusters` long.
    pub(super) fn new(table: WordTable, blocks: TableCache, file_clusters: ClusterCount) -> Self {
        Self {
            table: RefCell::new(table),
            blocks,
            cursor: Cell::new(HostCluster(1)),
            untouched_from: Cell::new(HostCluster(file_clusters.0)),
        }
    }

    /// Somebody may write up to `end` from now on.
    pub(super) fn touch(&self, end: HostCluster) {
        self.untouched_from.set(self.untouched_from.get().max(end));
    }
}

impl ImageState {
    pub(super) fn no_room(&self) -> StorageError {
        let end = self.geometry.host_offset(self.clusters_max());
        let errno = match self.file.facts().fixed_length {
            true => ENOSPC,
            false => EFBIG,
        };
        StorageError::new(
            Operation::Write,
            ByteRange::new(end.0, self.geometry.cluster_bytes()),
            errno,
        )
    }

    /// The first cluster that can never be used.
    pub(super) fn clusters_max(&self) -> HostCluster {
        let facts = self.file.facts();
        let end = match facts.fixed_length {
            true => facts.length_bytes.min(HOST_END_BYTES),
            false => HOST_END_BYTES,
        };
        self.geometry.host_cluster(HostOffset(end))
    }

    /// Finds a run of free clusters, of `wanted` at most, and raises their counts to 1. The longest of the first slice that
    /// has any is taken.
    pub(super) fn claim_now(&self, wanted: ClusterCount) -> Result<Counted<Run>, ImageError> {
        if self.claims_wait.get() {
            return Ok(Counted::Wait);
        }
        let limit = self.clusters_max();
        let mut from = self.counts.cursor.get().max(HostCluster(1));
        while from < limit {
            let (slice, clusters) = match self.place(from)? {
                Place::Slice { slice, clusters } => (slice, clusters),
                Place::NoEntry => return Ok(Counted::GrowTable),
                Place::NoBlock { table_index } => match self.add_block(table_index)? {
                    Counted::Done(()) => continue,
                    Counted::Reserve(cluster) => return Ok(Counted::Reserve(cluster)),
                    _ => return Ok(Counted::Write),
                },
            };
            let end = clusters.0.plus(clusters.1).min(limit);
            let (skip, length) = (index_in(clusters.0, from), index_in(clusters.0, end));
            let found = self.counts.blocks.read(slice, |block| {
                self.longest_free(block, skip..length, wanted)
            });
            let Some(found) = found else {
                return Ok(Counted::Load(slice));
            };
            let Some((first_free, run)) = found else {
                self.counts.cursor.set(end);
                from = end;
                continue;
            };
            let block = self.geometry.host_cluster(slice);
            if !self.table_rooms.contains(block) {
                return Ok(Counted::Reserve(block));
            }
            let first = clusters.0.plus(ClusterCount(run.start as u64));
            let count = ClusterCount(run.len() as u64);
            self.check_claim(first, count)?;
            if !self.set_counts(slice, run.clone(), 1) {
                return Ok(Counted::Load(slice));
            }
            let behind = first.plus(count);
            let next = match first_free == run.start {
                true => behind,
                false => clusters.0.plus(ClusterCount(first_free as u64)),
            };
            self.counts.cursor.set(next);
            let untouched = first >= self.counts.untouched_from.get();
            self.counts.touch(behind);
            return Ok(Counted::Done(Run {
                first,
                count,
                reads_zero: untouched && !self.file.facts().fixed_length,
            }));
        }
        Ok(Counted::Full)
    }

    /// Takes exactly this cluster, if it is free; `Done(false)`: it is not.
    pub(super) fn claim_cluster(&self, cluster: HostCluster) -> Result<Counted<bool>, ImageError> {
        if self.claims_wait.get() {
            return Ok(Counted::Wait);
        }
        if cluster >= self.clusters_max() {
            return Ok(Counted::Full);
        }
        let (slice, clusters) = match self.place(cluster)? {
            Place::Slice { slice, clusters } => (slice, clusters),
            Place::NoEntry => return Ok(Counted::GrowTable),
            Place::NoBlock { table_index } => {
                return Ok(match self.add_block(table_index)? {
                    // The block may have taken the very cluster.
                    Counted::Done(()) => Counted::Load(self.block_at(table_index)),
                    Counted::Reserve(cluster) => Counted::Reserve(cluster),
                    _ => Counted::Write,
                });
            }
        };
        let index = index_in(clusters.0, cluster);
        let count = self.counts.blocks.read(slice, |block| {
            refcount_at(&self.geometry, block, index).unwrap_or(1)
        });
        match count {
            None => Ok(Counted::Load(slice)),
            Some(0) => {
                let block = self.geometry.host_cluster(slice);
                if !self.table_rooms.contains(block) {
                    return Ok(Counted::Reserve(block));
                }
                self.check_claim(cluster, ClusterCount(1))?;
                if !self.set_counts(slice, index..index + 1, 1) {
                    return Ok(Counted::Load(slice));
                }
                self.counts.touch(cluster.plus(ClusterCount(1)));
                Ok(Counted::Done(true))
            }
            Some(_) => Ok(Counted::Done(false)),
        }
    }

    /// Adds a reference to a cluster that has some; `Done(false)`: its count can go no higher.
    pub(super) fn raise(&self, cluster: HostCluster) -> Result<Counted<bool>, ImageError> {
        let Place::Slice { slice, clusters } = self.place(cluster)? else {
            return Ok(Counted::Done(false));
        };
        let index = index_in(clusters.0, cluster);
        let count = self
            .counts
            .blocks
            .read(slice, |block| refcount_at(&self.geometry, block, index));
        match count {
            None => Ok(Counted::Load(slice)),
            Some(Some(count)) if count > 0 && count < self.geometry.refcount_max() => {
                match self.set_counts(slice, index..index + 1, count + 1) {
                    true => Ok(Counted::Done(true)),
                    false => Ok(Counted::Load(slice)),
                }
            }
            Some(_) => Ok(Counted::Done(false)),
        }
    }

    /// What the counts at the front of a run are, as far as they are of one kind.
    pub(super) fn peek(&self, first: HostCluster, count: ClusterCount) -> Peeked {
        let Ok(Place::Slice { slice, clusters }) = self.place(first) else {
            return Peeked::Unused(ClusterCount(1));
        };
        let strayed = self.strayed.borrow();
        if strayed.contains(first) {
            return Peeked::Unused(ClusterCount(1));
        }
        let end = clusters.0.plus(clusters.1).min(first.plus(count));
        let range = index_in(clusters.0, first)..index_in(clusters.0, end);
        let kinds = self.counts.blocks.read(slice, |block| {
            let kind = |index| {
                refcount_at(&self.geometry, block, index)
                    .unwrap_or(0)
                    .min(2)
            };
            let front = kind(range.start);
            let alike = range.clone().take_while(|index| {
                let cluster = clusters.0.plus(ClusterCount(*index as u64));
                kind(*index) == front && (strayed.is_empty() || !strayed.contains(cluster))
            });
            (front, ClusterCount(alike.count().max(1) as u64))
        });
        match kinds {
            None => Peeked::Load(slice),
            Some((0, count)) => Peeked::Unused(count),
            Some((1, count)) => Peeked::Last(count),
            Some((_, count)) => Peeked::Shared(count),
        }
    }

    /// The last cluster before `end` that has a count, in the slice that holds the count of the one before `end`; else the first
    /// cluster of that slice. `None`: there is no such slice.
    pub(super) fn last_counted_before(
        &self,
        end: HostCluster,
    ) -> Option<Look<Result<HostCluster, HostCluster>>> {
        let before = HostCluster(end.0.checked_sub(1)?);
        let Ok(Place::Slice { slice, clusters }) = self.place(before) else {
            return None;
        };
        let length = index_in(clusters.0, end);
        let last = self.counts.blocks.read(slice, |block| {
            (0..length).rfind(|index| refcount_at(&self.geometry, block, *index) != Some(0))
        });
        Some(match last {
            None => Look::Load(slice),
            Some(Some(index)) => Look::Is(Ok(clusters.0.plus(ClusterCount(index as u64)))),
            Some(None) => Look::Is(Err(clusters.0)),
        })
    }

    /// Takes one reference from each cluster of a run that [`peek`](Self::peek) has named.
    pub(super) fn lower(&self, first: HostCluster, count: ClusterCount) -> Lowered {
        let Ok(Place::Slice { slice, clusters }) = self.place(first) else {
            return Lowered::Load;
        };
        let start = index_in(clusters.0, first);
        let Ok(length) = usize::try_from(count.0) else {
            return Lowered::Load;
        };
        let range = start..start + length;
        let mut freed = false;
        let bytes = self.bytes_of(range.clone());
        let done = self.counts.blocks.change(slice, bytes, |block| {
            for index in range {
                let before = refcount_at(&self.geometry, block, index).unwrap_or(0);
                let after = before.saturating_sub(1);
                freed |= before == 1;
                // It fits, as it is less than what was there.
                let _ = put_refcount(&self.geometry, block, index, after);
            }
        });
        if done.is_none() {
            return Lowered::Load;
        }
        if freed {
            let cursor = &self.counts.cursor;
            cursor.set(cursor.get().min(first));
        }
        Lowered::Done
    }

    /// Clusters that nothing ever led to are free again.
    pub(super) fn give_back(&self, first: HostCluster, count: ClusterCount) {
        let mut first = first;
        let end = first.plus(count);
        while first < end {
            let left = ClusterCount(end.0 - first.0);
            let Peeked::Last(same) = self.peek(first, left) else {
                break;
            };
            match self.lower(first, same) {
                Lowered::Done => first = first.plus(same),
                Lowered::Load => break,
            }
        }
        if first < end {
            self.unlink(first, ClusterCount(end.0 - first.0), Why::Other);
        }
    }

    fn place(&self, cluster: HostCluster) -> Result<Place, ImageError> {
        let per_block = self.geometry.refcounts_per_block();
        let table_index = cluster.0 / per_block;
        let block = {
            let table = self.counts.table.borrow();
            if table_index >= table.len() {
                return Ok(Place::NoEntry);
            }
            HostOffset(table.word(table_index) & TABLE_OFFSET_MASK)
        };
        if block.0 == 0 {
            return Ok(Place::NoBlock { table_index });
        }
        if !self.geometry.is_cluster_start(block) {
            return Err(ImageError::Corrupt(Corruption {
                text: format!(
                    "Refblock offset {:#x} unaligned (reftable index: {})",
                    block.0,
                    hexadecimal(table_index)
                ),
                at: None,
                length_bytes: None,
                fatal: true,
            }));
        }
        let per_slice = per_block
            .min((self.counts.blocks.slice_bytes() as u64 * 8) >> self.geometry.refcount_order());
        let in_block = cluster.0 % per_block;
        let slice_index = in_block / per_slice.max(1);
        Ok(Place::Slice {
            slice: block.plus(slice_index * self.counts.blocks.slice_bytes() as u64),
            clusters: (
                HostCluster(cluster.0 - in_block % per_slice.max(1)),
                ClusterCount(per_slice),
            ),
        })
    }

    fn block_at(&self, table_index: u64) -> HostOffset {
        HostOffset(self.counts.table.borrow().word(table_index) & TABLE_OFFSET_MASK)
    }

    /// Makes a block for clusters that have none: it stands in the first of them, and counts itself. Needs room in the file, and
    /// in the cache.
    fn add_block(&self, table_index: u64) -> Result<Counted<()>, ImageError> {
        let geometry = &self.geometry;
        let cluster = HostCluster(table_index.saturating_mul(geometry.refcounts_per_block()));
        let at = geometry.host_offset(cluster);
        if at.0 == 0 {
            return Err(ImageError::Corrupt(Corruption {
                text: "Preventing invalid allocation of refcount block at offset 0".to_owned(),
                at: None,
                length_bytes: None,
                fatal: true,
            }));
        }
        self.check_claim(cluster, ClusterCount(1))?;
        let entry = geometry.host_cluster(self.counts.table.borrow().at_of(table_index));
        if let Some(cluster) = [cluster, entry]
            .into_iter()
            .find(|cluster| !self.table_rooms.contains(*cluster))
        {
            return Ok(Counted::Reserve(cluster));
        }
        let mut bytes = vec![0; self.counts.blocks.slice_bytes()];
        if !put_refcount(geometry, &mut bytes, 0, 1) || !self.counts.blocks.put_new(at, bytes) {
            return Ok(Counted::Write);
        }
        let mut fresh = self.fresh.borrow_mut();
        let slice_bytes = self.counts.blocks.slice_bytes();
        fresh.add(
            at,
            TableKind::RefcountBlock,
            None,
            geometry.cluster_bytes(),
            slice_bytes,
        );
        fresh.loaded(at, at);
        if !self.counts.table.borrow_mut().set(table_index, at.0) {
            fresh.remove(at);
        }
        self.overlaps
            .add(ByteRange::new(at.0, geometry.cluster_bytes()));
        self.counts.touch(cluster.plus(ClusterCount(1)));
        Ok(Counted::Done(()))
    }

    /// A broken image may count as free what is in use: its metadata at least is not handed out.
    fn check_claim(&self, first: HostCluster, count: ClusterCount) -> Result<(), ImageError> {
        let at = self.geometry.host_offset(first);
        let length = count.0.saturating_mul(self.geometry.cluster_bytes());
        self.overlaps
            .check(self, ByteRange::new(at.0, length), None)
            .map_err(ImageError::Corrupt)
    }

    /// The longest run of free clusters, up to `wanted`, and the first free one.
    fn longest_free(
        &self,
        block: &[u8],
        range: Range<usize>,
        wanted: ClusterCount,
    ) -> Option<(usize, Range<usize>)> {
        let wanted = usize::try_from(wanted.0).unwrap_or(usize::MAX).max(1);
        let free = |index: usize| refcount_at(&self.geometry, block, index) == Some(0);
        let mut first_free = None;
        let mut best = 0..0;
        let mut index = range.start;
        while index < range.end {
            if !free(index) {
                index += 1;
                continue;
            }
            let start = index;
            let end = range.end.min(start.saturating_add(wanted));
            while index < end && free(index) {
                index += 1;
            }
            first_free.get_or_insert(start);
            if index - start > best.len() {
                best = start..index;
            }
            if best.len() == wanted {
                break;
            }
        }
        first_free.map(|first| (first, best))
    }

    /// Sets the counts of some clusters of a slice; `false`, and nothing done: it is not in the cache.
    fn set_counts(&self, slice: HostOffset, range: Range<usize>, count: u64) -> bool {
        let bytes = self.bytes_of(range.clone());
        let set = self.counts.blocks.change(slice, bytes, |block| {
            range
                .into_iter()
                .all(|index| put_refcount(&self.geometry, block, index, count))
        });
        set == Some(true)
    }

    /// Which bytes of a slice hold these counts.
    fn bytes_of(&self, range: Range<usize>) -> Range<usize> {
        let order = self.geometry.refcount_order();
        (range.start << order) / 8..(range.end << order).div_ceil(8)
    }
}

/// The index of a cluster in a slice that begins with `first`; slices hold less than a `usize` does.
fn index_in(first: HostCluster, cluster: HostCluster) -> usize {
    usize::try_from(cluster.0.saturating_sub(first.0)).unwrap_or(usize::MAX)
}
