//! [`CreatePlan`]: where everything of a new image goes, and what stands there. Pure.
//!
//! One behind the other: header, refcount table, refcount blocks, L1 table, and where guest clusters get their places at
//! once, L2 tables and data. So much is counted as is used: nothing is moved later, nothing is left over.

use blockyard_storage::ByteRange;
use blockyard_storage::error::{EFBIG, errno_text};

use crate::error::ImageError;
use crate::qcow2::layout::entries::{COPIED, L1Entry, L2Entry, put_l2_entry, put_word};
use crate::qcow2::layout::header::{L1_TABLE_BYTES_MAX, REFCOUNT_TABLE_BYTES_MAX};
use crate::qcow2::layout::refcounts::put_refcount;
use crate::qcow2::units::{ClusterCount, Geometry, GuestCluster, HostCluster, HostOffset};

/// Host offsets have 56 bits.
const HOST_BYTES_MAX: u64 = 1 << 56;
/// Largest length that an image's disk may have.
const DISK_BYTES_MAX: u64 = 0x7fff_ffff_c000_0000;

/// Where guest clusters get their places.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Placement {
    /// Nowhere yet.
    None,
    /// Behind the metadata.
    InImage {
        /// The file holds all of the last cluster, not only what the guest sees of it.
        whole_clusters: bool,
    },
    /// In the external data file, at the same offset as the guest has them.
    InDataFile {
        /// The data file reads as the guest's disk does.
        raw: bool,
    },
}

/// A part of the metadata that is written: not longer than what is not zero there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Table {
    /// Where the refcount blocks are.
    RefcountTable,
    /// The reference counts.
    RefcountBlocks,
    /// Where the L2 tables are.
    L1,
    /// Where the guest's clusters are.
    L2,
}

/// Where everything goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CreatePlan {
    geometry: Geometry,
    size_bytes: u64,
    placement: Placement,
    refcount_table_clusters: u64,
    refcount_blocks: u64,
    l1_entries: u64,
    l2_tables: u64,
    placed_clusters: u64,
}

impl CreatePlan {
    /// Places a disk of `size_bytes`.
    ///
    /// # Errors
    /// [`ImageError::Refused`] with QEMU's texts, where the format cannot describe so much.
    pub fn new(
        geometry: Geometry,
        size_bytes: u64,
        placement: Placement,
    ) -> Result<Self, ImageError> {
        if size_bytes > i64::MAX as u64 {
            let text = "Could not resize image: Image size cannot be negative";
            return Err(ImageError::refused(text));
        }
        if size_bytes > DISK_BYTES_MAX {
            return Err(ImageError::refused(format!(
                "Could not resize image: offset({size_bytes}) exceeds maximum({DISK_BYTES_MAX})"
            )));
        }
        let l1_entries = geometry.l1_entries_for(size_bytes);
        if l1_entries > L1_TABLE_BYTES_MAX / 8 {
            let detail = format!(
                "the L1 table would have {l1_entries} entries, {} at most are possible with \
                 clusters of {} bytes",
                L1_TABLE_BYTES_MAX / 8,
                geometry.cluster_bytes()
            );
            return Err(too_big("Failed to grow the L1 table", detail));
        }
        let plan = Self::without_limits(geometry, size_bytes, placement);
        plan.check_limits()?;
        Ok(plan)
    }

    /// Places a disk, whatever the format's tables can hold. Nothing overflows, and nothing may be made of it.
    pub(crate) fn without_limits(
        geometry: Geometry,
        size_bytes: u64,
        placement: Placement,
    ) -> Self {
        let l1_entries = geometry.l1_entries_for(size_bytes);
        let (l2_tables, placed_clusters) = match placement {
            Placement::None => (0, 0),
            _ => (l1_entries, geometry.clusters_for(size_bytes).0),
        };
        let mut plan = Self {
            geometry,
            size_bytes,
            placement,
            refcount_table_clusters: 1,
            refcount_blocks: 1,
            l1_entries,
            l2_tables,
            placed_clusters,
        };
        plan.fit_refcounts();
        plan
    }

    /// Grows refcount table and blocks until they also count themselves.
    fn fit_refcounts(&mut self) {
        loop {
            let blocks = self
                .used_clusters()
                .0
                .div_ceil(self.geometry.refcounts_per_block());
            let table_clusters = self.geometry.clusters_for(blocks.saturating_mul(8)).0;
            if blocks <= self.refcount_blocks && table_clusters <= self.refcount_table_clusters {
                return;
            }
            self.refcount_blocks = self.refcount_blocks.max(blocks);
            self.refcount_table_clusters = self.refcount_table_clusters.max(table_clusters);
        }
    }

    fn check_limits(&self) -> Result<(), ImageError> {
        let step = match self.placement {
            Placement::InImage {
                whole_clusters: true,
            } => "Failed to resize refcount structures",
            _ => "Allocating clusters failed",
        };
        let table_bytes = self
            .refcount_table_clusters
            .saturating_mul(self.geometry.cluster_bytes());
        if table_bytes > REFCOUNT_TABLE_BYTES_MAX {
            let detail = format!(
                "the refcount table would have {table_bytes} bytes, {REFCOUNT_TABLE_BYTES_MAX} at \
                 most are possible"
            );
            return Err(too_big(step, detail));
        }
        let end = self
            .geometry
            .host_offset(HostCluster(self.used_clusters().0));
        let data_file_end = match self.placement {
            Placement::InDataFile { .. } => self.data_file_bytes(),
            _ => 0,
        };
        if end.0.max(data_file_end) > HOST_BYTES_MAX {
            let detail = format!("files can have {HOST_BYTES_MAX} bytes at most");
            return Err(too_big(step, detail));
        }
        Ok(())
    }

    /// Version, cluster size, width of reference counts, kind of L2 entries.
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Length of the guest's disk in bytes.
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Clusters of the image file that are in use, from its start.
    pub const fn used_clusters(&self) -> ClusterCount {
        let in_image = match self.placement {
            Placement::InImage { .. } => self.placed_clusters,
            _ => 0,
        };
        ClusterCount(self.before_data().saturating_add(in_image))
    }

    /// Clusters of the image file before the first one with data.
    const fn before_data(&self) -> u64 {
        self.before_l2() + self.l2_tables
    }

    const fn before_l2(&self) -> u64 {
        self.before_l1() + self.geometry.clusters_for(self.l1_entries * 8).0
    }

    const fn before_l1(&self) -> u64 {
        (1 + self.refcount_table_clusters).saturating_add(self.refcount_blocks)
    }

    /// First byte of the refcount table.
    pub const fn refcount_table(&self) -> HostOffset {
        self.geometry.host_offset(HostCluster(1))
    }

    /// Length of the refcount table.
    pub const fn refcount_table_clusters(&self) -> ClusterCount {
        ClusterCount(self.refcount_table_clusters)
    }

    /// First byte of the first refcount block; the others follow.
    pub const fn refcount_blocks_start(&self) -> HostOffset {
        let first = HostCluster(1 + self.refcount_table_clusters);
        self.geometry.host_offset(first)
    }

    /// Number of refcount blocks.
    pub const fn refcount_blocks(&self) -> ClusterCount {
        ClusterCount(self.refcount_blocks)
    }

    /// First byte of the L1 table; 0 where there is none.
    pub const fn l1_table(&self) -> HostOffset {
        if self.l1_entries == 0 {
            return HostOffset(0);
        }
        self.geometry.host_offset(HostCluster(self.before_l1()))
    }

    /// Entries of the L1 table.
    pub const fn l1_entries(&self) -> u64 {
        self.l1_entries
    }

    /// First byte of the first L2 table; the others follow.
    pub const fn l2_tables_start(&self) -> HostOffset {
        self.geometry.host_offset(HostCluster(self.before_l2()))
    }

    /// Number of L2 tables.
    pub const fn l2_tables(&self) -> ClusterCount {
        ClusterCount(self.l2_tables)
    }

    /// The bytes of the image file that the guest's clusters have.
    pub const fn data(&self) -> ByteRange {
        let start = self.geometry.host_offset(HostCluster(self.before_data()));
        let length = match self.placement {
            Placement::InImage {
                whole_clusters: true,
            } => self
                .placed_clusters
                .saturating_mul(self.geometry.cluster_bytes()),
            Placement::InImage {
                whole_clusters: false,
            } => self.subclusters_end(),
            _ => 0,
        };
        ByteRange::new(start.0, length)
    }

    /// The bytes of the image file that metadata has, without the rest of the last cluster where nothing follows.
    pub const fn metadata(&self) -> ByteRange {
        let end = if self.l2_tables > 0 {
            self.geometry.host_offset(HostCluster(self.before_data())).0
        } else {
            let l1 = self.geometry.host_offset(HostCluster(self.before_l1()));
            l1.plus(self.l1_entries * 8).0
        };
        ByteRange::new(0, end)
    }

    /// Length of the image file in bytes.
    pub const fn file_bytes(&self) -> u64 {
        match self.placement {
            Placement::InImage { .. } if self.placed_clusters > 0 => self.data().end(),
            _ => self.metadata().end(),
        }
    }

    /// Length of the external data file in bytes, if there is one.
    pub const fn data_file_bytes(&self) -> u64 {
        match self.placement {
            Placement::InDataFile { .. } => self.subclusters_end(),
            _ => self.size_bytes,
        }
    }

    /// The end of the last subcluster (without subclusters: cluster) that the guest sees anything of.
    const fn subclusters_end(&self) -> u64 {
        let unit = self.geometry.subcluster_bytes();
        self.size_bytes.div_ceil(unit).saturating_mul(unit)
    }

    /// Where a table is, as far as it is not zero.
    pub const fn table(&self, table: Table) -> ByteRange {
        match table {
            Table::RefcountTable => {
                ByteRange::new(self.refcount_table().0, self.refcount_blocks * 8)
            }
            Table::RefcountBlocks => {
                let bits = self.used_clusters().0 << self.geometry.refcount_order();
                ByteRange::new(self.refcount_blocks_start().0, bits.div_ceil(8))
            }
            Table::L1 => ByteRange::new(self.l1_table().0, self.l2_tables * 8),
            Table::L2 => {
                let bytes = self
                    .placed_clusters
                    .saturating_mul(self.geometry.l2_entry_bytes());
                ByteRange::new(self.l2_tables_start().0, bytes)
            }
        }
    }

    /// Puts what stands in `table` from its byte `skip` (a multiple of 16) into `bytes`.
    pub fn fill(&self, table: Table, skip: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        match table {
            Table::RefcountTable => {
                let first = self.refcount_blocks_start();
                self.fill_words(skip, bytes, |index| {
                    let at = self.geometry.host_cluster(first).plus(ClusterCount(index));
                    (index < self.refcount_blocks).then(|| self.geometry.host_offset(at).0)
                });
            }
            Table::RefcountBlocks => self.fill_counts(skip, bytes),
            Table::L1 => {
                let first = self.l2_tables_start();
                self.fill_words(skip, bytes, |index| {
                    let at = self.geometry.host_cluster(first).plus(ClusterCount(index));
                    let at = self.geometry.host_offset(at);
                    (index < self.l2_tables).then(|| L1Entry::copied(at).0)
                });
            }
            Table::L2 => self.fill_l2(skip, bytes),
        }
    }

    fn fill_words(&self, skip: u64, bytes: &mut [u8], word: impl Fn(u64) -> Option<u64>) {
        for (place, index) in (0..bytes.len() / 8).zip(skip / 8..) {
            if let Some(word) = word(index) {
                let _fits = put_word(bytes, place, word);
            }
        }
    }

    /// Every cluster in use has one reference.
    fn fill_counts(&self, skip: u64, bytes: &mut [u8]) {
        let order = self.geometry.refcount_order();
        let before = (skip * 8) >> order;
        let there = ((bytes.len() as u64) * 8) >> order;
        let ones = self.used_clusters().0.saturating_sub(before).min(there);
        let mut pattern = [0; 8];
        for index in 0..(64_usize >> order) {
            let _fits = put_refcount(&self.geometry, &mut pattern, index, 1);
        }
        let whole = usize::try_from((ones << order) / 64).unwrap_or(usize::MAX);
        for chunk in bytes.chunks_exact_mut(8).take(whole) {
            chunk.copy_from_slice(&pattern);
        }
        let counted = (whole * 64) >> order;
        for index in counted..usize::try_from(ones).unwrap_or(usize::MAX) {
            let _fits = put_refcount(&self.geometry, bytes, index, 1);
        }
    }

    fn fill_l2(&self, skip: u64, bytes: &mut [u8]) {
        let entry_bytes = self.geometry.l2_entry_bytes();
        let first = skip / entry_bytes;
        for (place, index) in (0..bytes.len()).zip(first..self.placed_clusters) {
            if !put_l2_entry(
                &self.geometry,
                bytes,
                place,
                self.l2_entry(GuestCluster(index)),
            ) {
                return;
            }
        }
    }

    /// Where the guest's `cluster` is. Its subclusters are not in use yet, so that a backing file shows through and what is
    /// not written reads as zeroes, except that a raw data file is the guest's disk already.
    fn l2_entry(&self, cluster: GuestCluster) -> L2Entry {
        let guest = self.geometry.guest_offset(cluster).0;
        match self.placement {
            Placement::InDataFile { raw: true } => {
                L2Entry::copied(&self.geometry, HostOffset(guest))
            }
            Placement::InDataFile { raw: false } => L2Entry {
                word: guest | COPIED,
                bitmap: 0,
            },
            _ => L2Entry {
                word: self.data().offset().saturating_add(guest) | COPIED,
                bitmap: 0,
            },
        }
    }
}

fn too_big(step: &str, detail: String) -> ImageError {
    let reason = errno_text(EFBIG);
    ImageError::refused_because(format!("Could not resize image: {step}: {reason}"), detail)
}
