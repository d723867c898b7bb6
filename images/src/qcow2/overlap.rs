//! Overlap checks: nothing is written where metadata of another kind stands. A sound image never needs them; they keep a
//! broken one from being destroyed.
//!
//! A filter answers for most writes at the cost of a bit per cluster; only where it cannot exclude an overlap the tables are
//! gone through.

use std::cell::RefCell;

use blockyard_storage::ByteRange;

use crate::error::Corruption;
use crate::qcow2::image::ImageState;
use crate::qcow2::layout::entries::L1Entry;
use crate::qcow2::layout::refcounts::TABLE_OFFSET_MASK;
use crate::qcow2::units::{Geometry, HostOffset};

/// Bits of the filter for each cluster of metadata: fewer than one false alarm in a hundred writes.
const FILTER_BITS_PER_CLUSTER: usize = 16;
/// Smallest filter: 8 KiB.
const FILTER_BITS_MIN: usize = 1 << 16;
/// Largest filter: 16 MiB.
const FILTER_BITS_MAX: usize = 1 << 27;

/// A kind of metadata.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Metadata {
    /// The header's cluster.
    Header,
    /// The L1 table in use.
    ActiveL1,
    /// L2 tables it leads to.
    ActiveL2,
    /// The refcount table.
    RefcountTable,
    /// Refcount blocks.
    RefcountBlock,
    /// The table of internal snapshots.
    SnapshotTable,
    /// L1 tables of internal snapshots.
    InactiveL1,
    /// L2 tables of internal snapshots.
    InactiveL2,
    /// The directory of bitmaps.
    BitmapDirectory,
}

impl Metadata {
    /// QEMU's name for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Header => "qcow2_header",
            Self::ActiveL1 => "active L1 table",
            Self::ActiveL2 => "active L2 table",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::SnapshotTable => "snapshot table",
            Self::InactiveL1 => "inactive L1 table",
            Self::InactiveL2 => "inactive L2 table",
            Self::BitmapDirectory => "bitmap directory",
        }
    }
}

/// Which kinds of metadata are protected: a set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OverlapChecks(u16);

impl OverlapChecks {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// What stays where it is.
    pub const CONSTANT: Self = Self::NONE
        .with(Metadata::Header, true)
        .with(Metadata::ActiveL1, true)
        .with(Metadata::RefcountTable, true)
        .with(Metadata::SnapshotTable, true)
        .with(Metadata::BitmapDirectory, true);
    /// What is known without reading.
    pub const CACHED: Self = Self::CONSTANT
        .with(Metadata::ActiveL2, true)
        .with(Metadata::RefcountBlock, true)
        .with(Metadata::InactiveL1, true);
    /// Everything.
    pub const ALL: Self = Self::CACHED.with(Metadata::InactiveL2, true);

    /// The same set with a kind in it or not.
    pub const fn with(self, kind: Metadata, protected: bool) -> Self {
        let bit = 1 << kind as u16;
        Self(if protected {
            self.0 | bit
        } else {
            self.0 & !bit
        })
    }

    /// Whether a kind is protected.
    pub const fn contains(self, kind: Metadata) -> bool {
        self.0 & 1 << kind as u16 != 0
    }
}

/// What is known of the metadata of an image beside its tables in memory.
pub(super) struct Overlaps {
    checks: OverlapChecks,
    /// Metadata that stays where it is and that no table in memory leads to.
    others: RefCell<Vec<(Metadata, ByteRange)>>,
    /// First bytes of L2 tables of internal snapshots, in ascending order; known only where they are protected.
    inactive_l2: RefCell<Vec<HostOffset>>,
    filter: RefCell<Filter>,
}

/// A set of clusters that sometimes says yes for others.
struct Filter {
    cluster_bits: u32,
    bits: Vec<u64>,
}

impl Overlaps {
    /// Checks for an image with this much of metadata.
    pub(super) fn new(
        checks: OverlapChecks,
        geometry: &Geometry,
        others: Vec<(Metadata, ByteRange)>,
    ) -> Self {
        Self {
            checks,
            others: RefCell::new(others),
            inactive_l2: RefCell::default(),
            filter: RefCell::new(Filter {
                cluster_bits: geometry.cluster_bits(),
                bits: Vec::new(),
            }),
        }
    }

    /// Whether L2 tables of internal snapshots are protected.
    pub(super) const fn wants_inactive_l2(&self) -> bool {
        self.checks.contains(Metadata::InactiveL2)
    }

    /// Tables of internal snapshots stand at `tables`, in ascending order.
    pub(super) fn set_inactive_l2(&self, tables: Vec<HostOffset>, cluster_bytes: u64) {
        for at in &tables {
            self.add(ByteRange::new(at.0, cluster_bytes));
        }
        self.inactive_l2.replace(tables);
    }

    /// The bitmap directory stands there from now on; empty: there is none. [`rebuild`](Self::rebuild) is to follow.
    pub(super) fn set_bitmap_directory(&self, range: ByteRange) {
        let mut others = self.others.borrow_mut();
        others.retain(|(kind, _)| *kind != Metadata::BitmapDirectory);
        if !range.is_empty() {
            others.push((Metadata::BitmapDirectory, range));
        }
    }

    /// Metadata stands in `range` from now on.
    pub(super) fn add(&self, range: ByteRange) {
        self.filter.borrow_mut().add(range);
    }

    /// Forgets what stood where, and takes all of it from `state` again. To be called when tables have got longer.
    pub(super) fn rebuild(&self, state: &ImageState) {
        let (l1, counts) = (state.l1.borrow(), state.counts.table.borrow());
        let cluster_bytes = state.geometry.cluster_bytes();
        let others = self.others.borrow();
        let mut ranges: Vec<ByteRange> = others.iter().map(|(_, range)| *range).collect();
        drop(others);
        ranges.push(ByteRange::new(0, cluster_bytes));
        ranges.push(ByteRange::new(l1.at().0, l1.len() * 8));
        ranges.push(ByteRange::new(counts.at().0, counts.len() * 8));
        let whole = |at: HostOffset| ByteRange::new(at.0, cluster_bytes);
        let clusters_of = |range: &ByteRange| range.length() / cluster_bytes + 2;
        let inactive = self.inactive_l2.borrow();
        let tables = l1.len() + counts.len() + inactive.len() as u64;
        let clusters = ranges.iter().map(clusters_of).sum::<u64>() + tables;
        let mut filter = self.filter.borrow_mut();
        filter.clear(usize::try_from(clusters).unwrap_or(usize::MAX));
        ranges.into_iter().for_each(|range| filter.add(range));
        l2_tables(l1.words()).for_each(|at| filter.add(whole(at)));
        refcount_blocks(counts.words()).for_each(|at| filter.add(whole(at)));
        inactive.iter().for_each(|at| filter.add(whole(*at)));
    }

    /// Which protected metadata a write of `range` would destroy; `own`: the kind of what is written.
    pub(super) fn find(
        &self,
        state: &ImageState,
        range: ByteRange,
        own: Option<Metadata>,
    ) -> Option<Metadata> {
        if range.is_empty() || !self.filter.borrow().may_hold(range) {
            return None;
        }
        let cluster_bytes = state.geometry.cluster_bytes();
        let hits = |kind: Metadata, other: ByteRange| {
            Some(kind) != own && self.checks.contains(kind) && other.overlaps(&range)
        };
        let whole = |at: HostOffset| ByteRange::new(at.0, cluster_bytes);
        if hits(Metadata::Header, ByteRange::new(0, cluster_bytes)) {
            return Some(Metadata::Header);
        }
        {
            let l1 = state.l1.borrow();
            if hits(Metadata::ActiveL1, ByteRange::new(l1.at().0, l1.len() * 8)) {
                return Some(Metadata::ActiveL1);
            }
            if l2_tables(l1.words()).any(|at| hits(Metadata::ActiveL2, whole(at))) {
                return Some(Metadata::ActiveL2);
            }
        }
        let table = state.counts.table.borrow();
        let table_range = ByteRange::new(table.at().0, table.len() * 8);
        if hits(Metadata::RefcountTable, table_range) {
            return Some(Metadata::RefcountTable);
        }
        if refcount_blocks(table.words()).any(|at| hits(Metadata::RefcountBlock, whole(at))) {
            return Some(Metadata::RefcountBlock);
        }
        let others = self.others.borrow();
        let other = others.iter().find(|(kind, other)| hits(*kind, *other));
        if let Some((kind, _)) = other {
            return Some(*kind);
        }
        let inactive = self.inactive_l2.borrow();
        let first = inactive.partition_point(|at| at.plus(cluster_bytes).0 <= range.offset());
        let hit = inactive
            .get(first)
            .is_some_and(|at| hits(Metadata::InactiveL2, whole(*at)));
        hit.then_some(Metadata::InactiveL2)
    }

    /// The corruption that a write of `range` would be, if it is one.
    pub(super) fn check(
        &self,
        state: &ImageState,
        range: ByteRange,
        own: Option<Metadata>,
    ) -> Result<(), Corruption> {
        match self.find(state, range, own) {
            None => Ok(()),
            Some(kind) => Err(Corruption {
                text: format!(
                    "Preventing invalid write on metadata (overlaps with {})",
                    kind.name()
                ),
                at: Some(HostOffset(range.offset())),
                length_bytes: Some(range.length()),
                fatal: true,
            }),
        }
    }
}

fn l2_tables(words: &[u64]) -> impl Iterator<Item = HostOffset> {
    words.iter().filter_map(|word| L1Entry(*word).table())
}

fn refcount_blocks(words: &[u64]) -> impl Iterator<Item = HostOffset> {
    let places = words.iter().map(|word| word & TABLE_OFFSET_MASK);
    places.filter(|at| *at != 0).map(HostOffset)
}

impl Filter {
    fn clear(&mut self, clusters: usize) {
        let wanted = clusters.saturating_mul(FILTER_BITS_PER_CLUSTER);
        let bits = wanted.clamp(FILTER_BITS_MIN, FILTER_BITS_MAX);
        self.bits = vec![0; bits.next_power_of_two() / 64];
    }

    /// The bits of a cluster: words and their bits.
    fn places(&self, cluster: u64) -> [(usize, u64); 3] {
        let bits = self.bits.len().max(1) as u64 * 64;
        let hash = cluster.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        [hash >> 36, hash >> 18, hash.rotate_left(23)].map(|part| {
            let bit = part & (bits - 1);
            // Below the length of the table, which is a usize.
            ((bit / 64) as usize, 1 << (bit % 64))
        })
    }

    fn add(&mut self, range: ByteRange) {
        for cluster in self.clusters(range) {
            for (place, bit) in self.places(cluster) {
                if let Some(word) = self.bits.get_mut(place) {
                    *word |= bit;
                }
            }
        }
    }

    fn may_hold(&self, range: ByteRange) -> bool {
        let is_set = |(place, bit): (usize, u64)| {
            let word = self.bits.get(place);
            word.is_none_or(|word| word & bit != 0)
        };
        self.clusters(range)
            .any(|cluster| self.places(cluster).into_iter().all(is_set))
    }

    fn clusters(&self, range: ByteRange) -> std::ops::Range<u64> {
        if range.is_empty() {
            return 0..0;
        }
        range.offset() >> self.cluster_bits..((range.end() - 1) >> self.cluster_bits) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_knows_what_it_was_told_and_little_else() {
        for step in [1, 7, 512, 8192] {
            let mut filter = Filter {
                cluster_bits: 16,
                bits: Vec::new(),
            };
            filter.clear(20_000);
            let range = |cluster: u64| ByteRange::new(cluster << 16, 1);
            (0..20_000).for_each(|n| filter.add(range(n * step)));
            assert!((0..20_000).all(|n| filter.may_hold(range(n * step))));
            let others = (0..20_000).map(|n| n * 3 + 100_000_000_000);
            let alarms = others.filter(|n| filter.may_hold(range(*n))).count();
            assert!(alarms < 400, "{alarms} false alarms with every {step}th");
        }
    }
}
