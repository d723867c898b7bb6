//! How much more room an image takes on its file system at most, before something is written to it.
//!
//! Data is counted in whole clusters. What is counted of tables is a bound by this formula, with clusters as the unit:
//! ```text
//!   L2      one table for each part of the disk where entries change (it may be there already, or be shared)
//!   L1      the new table, if the disk gets longer
//!   counts  ceil(new clusters / (entries of a block - 1)) + 2 blocks, as free clusters may be in parts of the file without one
//!   table   3 * ceil(8 bytes * blocks of the whole file / cluster) + 1: it moves when it grows, by at least a half
//!   bitmaps all bits of each that the image keeps, a table for each, a directory: they are stored beside the old ones
//! ```

use blockyard_storage::ByteRange;

use crate::qcow2::bitmaps::{BitmapSize, clusters_at_most};
use crate::qcow2::units::Geometry;

/// What an image takes in addition, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MoreRoom {
    /// For the guest's data.
    pub data_bytes: u64,
    /// For tables, at most.
    pub metadata_bytes: u64,
    /// For the bitmaps that it keeps, at most.
    pub bitmaps_bytes: u64,
}

/// Counts what a qcow2 image takes while what will be written to it is looked through, in ascending order.
#[derive(Clone, Debug)]
pub struct Qcow2MoreRoom {
    geometry: Geometry,
    data_clusters: u64,
    tables: u64,
    bitmap_clusters: u64,
    /// Clusters before this byte are counted.
    data_counted_to: u64,
    /// Tables before this one are counted.
    tables_counted_to: u64,
}

impl Qcow2MoreRoom {
    /// An image of this geometry to which nothing is written yet.
    pub const fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            data_clusters: 0,
            tables: 0,
            bitmap_clusters: 0,
            data_counted_to: 0,
            tables_counted_to: 0,
        }
    }

    /// Something is written here that takes new clusters.
    pub fn data(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        self.entries(range);
        let clusters = range.align_outward(self.geometry.cluster_bytes());
        let from = clusters.offset().max(self.data_counted_to);
        if from < clusters.end() {
            let added = (clusters.end() - from).div_ceil(self.geometry.cluster_bytes());
            self.data_clusters = self.data_clusters.saturating_add(added);
            self.data_counted_to = clusters.end();
        }
    }

    /// What tables say of this changes, and no cluster is needed for it.
    pub fn entries(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let covers_bytes = self.geometry.l2_table_covers_bytes();
        let from = (range.offset() / covers_bytes).max(self.tables_counted_to);
        let to = range.end().div_ceil(covers_bytes);
        if from < to {
            self.tables = self.tables.saturating_add(to - from);
            self.tables_counted_to = to;
        }
    }

    /// These bitmaps of a disk of that length are stored in it once.
    pub fn bitmaps(&mut self, disk_bytes: u64, bitmaps: impl IntoIterator<Item = BitmapSize>) {
        self.bitmap_clusters = clusters_at_most(&self.geometry, disk_bytes, bitmaps).0;
    }

    /// The figures, for an image whose file has `file_bytes` now and whose disk will have `grown_to_bytes`, if it gets longer.
    pub fn finish(&self, file_bytes: u64, grown_to_bytes: Option<u64>) -> MoreRoom {
        let geometry = &self.geometry;
        let l1 = grown_to_bytes.map_or(0, |bytes| {
            let entries = geometry.l1_entries_for(bytes);
            geometry.clusters_for(entries.saturating_mul(8)).0
        });
        let tables = self.tables.saturating_add(l1);
        let new = self
            .data_clusters
            .saturating_add(tables)
            .saturating_add(self.bitmap_clusters);
        let counts = match new {
            0 => 0,
            new => self.counts(new, geometry.clusters_for(file_bytes).0),
        };
        let in_bytes = |clusters: u64| clusters.saturating_mul(geometry.cluster_bytes());
        MoreRoom {
            data_bytes: in_bytes(self.data_clusters),
            metadata_bytes: in_bytes(tables.saturating_add(counts)),
            bitmaps_bytes: in_bytes(self.bitmap_clusters),
        }
    }

    /// Clusters of counts and of their table, at most.
    fn counts(&self, new: u64, before: u64) -> u64 {
        let per_block = self.geometry.refcounts_per_block();
        let blocks = new.div_ceil((per_block - 1).max(1)).saturating_add(2);
        let all = before.saturating_add(new).saturating_add(blocks);
        let all_blocks = all.div_ceil(per_block).saturating_add(1);
        let table = self.geometry.clusters_for(all_blocks.saturating_mul(8)).0;
        blocks
            .saturating_add(table.saturating_mul(3))
            .saturating_add(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::units::Version;

    const CLUSTER: u64 = 64 << 10;

    fn room() -> Qcow2MoreRoom {
        let geometry = Geometry::new(Version::V3, 16, 4, false);
        Qcow2MoreRoom::new(geometry.expect("valid"))
    }

    #[test]
    fn nothing_written_takes_nothing() {
        let mut room = room();
        room.data(ByteRange::new(5, 0));
        room.entries(ByteRange::new(5, 0));
        assert_eq!(room.finish(1 << 40, None), MoreRoom::default());
    }

    #[test]
    fn a_cluster_is_counted_once_however_often_it_is_written_to() {
        let mut room = room();
        for offset in [0, 512, CLUSTER - 512] {
            room.data(ByteRange::new(offset, 512));
        }
        room.data(ByteRange::new(CLUSTER - 1, 2));
        assert_eq!(room.finish(0, None).data_bytes, 2 * CLUSTER);
    }

    #[test]
    fn a_table_is_counted_once_and_a_longer_disk_has_a_new_one_above() {
        let mut room = room();
        let covers = 512 << 20;
        room.entries(ByteRange::new(1, covers));
        room.entries(ByteRange::new(covers + 1, 1));
        assert_eq!((room.tables, room.data_clusters), (2, 0));
        let shorter = room.finish(0, None).metadata_bytes;
        let longer = room.finish(0, Some(1 << 30)).metadata_bytes;
        assert_eq!(longer - shorter, CLUSTER);
    }

    #[test]
    fn bitmaps_take_bits_tables_a_directory_and_counts_of_them() {
        let mut room = room();
        let bitmap = |granularity_bytes| BitmapSize {
            granularity_bytes,
            name_bytes: 9,
        };
        // 2 Mi and 16 Mi bits: 4 and 32 clusters, two tables and one directory.
        room.bitmaps(1 << 40, [bitmap(512 << 10), bitmap(64 << 10)]);
        let bound = room.finish(0, None);
        assert_eq!(bound.bitmaps_bytes, (4 + 32 + 2 + 1) * CLUSTER);
        assert!(bound.metadata_bytes > 0 && bound.data_bytes == 0);
        room.bitmaps(1 << 40, []);
        assert_eq!(room.finish(0, None), MoreRoom::default());
    }

    #[test]
    fn no_figure_overflows() {
        for (bits, order) in [(9, 6), (21, 0)] {
            let geometry = Geometry::new(Version::V2, bits, order, false).expect("valid");
            let mut room = Qcow2MoreRoom::new(geometry);
            room.data(ByteRange::between(0, u64::MAX - (8 << 20)));
            let bitmap = BitmapSize {
                granularity_bytes: 0,
                name_bytes: u64::MAX,
            };
            room.bitmaps(u64::MAX, [bitmap, bitmap]);
            let bound = room.finish(u64::MAX, Some(u64::MAX));
            assert!(bound.data_bytes > 1 << 60 && bound.metadata_bytes > 1 << 30);
        }
    }
}
