//! Offsets and clusters that must not be mixed: what the guest sees, where the host keeps it, and the geometry that relates
//! them.
//!
//! Nothing here panics or wraps: sums saturate or return `None`, and whoever reads a value from an image checks it before
//! it becomes one of these.

use std::fmt;

/// A byte of the guest's disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct GuestOffset(pub u64);

/// A byte of a file that an image is kept in: of the image file for metadata and compressed clusters, of the data storage
/// (the image file, or the external data file) for everything else.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct HostOffset(pub u64);

/// A cluster of the guest's disk, counted from its start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct GuestCluster(pub u64);

/// A cluster of the image file, counted from its start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct HostCluster(pub u64);

/// A number of clusters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ClusterCount(pub u64);

impl HostOffset {
    /// The offset `bytes` further on, as far as there is one.
    pub const fn plus(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }
}

impl HostCluster {
    /// The cluster `count` further on, as far as there is one.
    pub const fn plus(self, count: ClusterCount) -> Self {
        Self(self.0.saturating_add(count.0))
    }
}

impl fmt::Display for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest offset {:#x}", self.0)
    }
}

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host offset {:#x}", self.0)
    }
}

/// The version of the format.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Version {
    /// 16-bit reference counts, no zero clusters, no feature bits (`compat` 0.10).
    V2,
    /// Everything else (`compat` 1.1).
    V3,
}

/// How compressed clusters of an image are compressed.
///
/// Spec: qcow2, "Header" (`compression_type`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Compression {
    /// Raw deflate, without header and checksum of zlib.
    #[default]
    Zlib,
    /// Zstandard frames (version 3).
    Zstd,
}

/// Smallest `cluster_bits`: 512 bytes.
pub const CLUSTER_BITS_MIN: u32 = 9;
/// Largest `cluster_bits`: 2 MiB.
pub const CLUSTER_BITS_MAX: u32 = 21;
/// Largest `refcount_order`: 64 bits.
pub const REFCOUNT_ORDER_MAX: u32 = 6;
/// Subclusters of a cluster with extended L2 entries.
pub const SUBCLUSTERS_PER_CLUSTER: u32 = 32;

/// The sizes that all arithmetic on an image depends on. Only [`Geometry::new`] makes one, so every shift is in range.
///
/// Spec: qcow2, "Header" (`cluster_bits`, `refcount_order`), "Extended L2 Entries".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    version: Version,
    cluster_bits: u32,
    refcount_order: u32,
    extended_l2: bool,
}

impl Geometry {
    /// `None` where a field is out of its range, and for subclusters of less than 512 bytes.
    pub const fn new(
        version: Version,
        cluster_bits: u32,
        refcount_order: u32,
        extended_l2: bool,
    ) -> Option<Self> {
        let subclusters_fit = !extended_l2 || cluster_bits >= CLUSTER_BITS_MIN + 5;
        if cluster_bits < CLUSTER_BITS_MIN
            || cluster_bits > CLUSTER_BITS_MAX
            || refcount_order > REFCOUNT_ORDER_MAX
            || !subclusters_fit
        {
            return None;
        }
        Some(Self {
            version,
            cluster_bits,
            refcount_order,
            extended_l2,
        })
    }

    /// Version of the format.
    pub const fn version(&self) -> Version {
        self.version
    }

    /// Binary logarithm of the cluster size.
    pub const fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// Size of a cluster in bytes.
    pub const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Binary logarithm of the width of a reference count in bits.
    pub const fn refcount_order(&self) -> u32 {
        self.refcount_order
    }

    /// Width of a reference count in bits.
    pub const fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// Largest value a reference count can hold.
    pub const fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Whether L2 entries tell subclusters apart.
    pub const fn extended_l2(&self) -> bool {
        self.extended_l2
    }

    /// Size of an L2 entry in bytes.
    pub const fn l2_entry_bytes(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub const fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / self.l2_entry_bytes()
    }

    /// Guest bytes behind one L2 table.
    pub const fn l2_table_covers_bytes(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// What L2 entries tell apart: 32 with extended L2 entries, else the cluster itself.
    pub const fn subclusters(&self) -> u32 {
        if self.extended_l2 {
            SUBCLUSTERS_PER_CLUSTER
        } else {
            1
        }
    }

    /// Size of a subcluster in bytes; that of a cluster where there are none.
    pub const fn subcluster_bytes(&self) -> u64 {
        self.cluster_bytes() / self.subclusters() as u64
    }

    /// Reference counts in one refcount block, which is a cluster.
    pub const fn refcounts_per_block(&self) -> u64 {
        (self.cluster_bytes() * 8) >> self.refcount_order
    }

    /// The guest cluster that holds a byte.
    pub const fn guest_cluster(&self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.cluster_bits)
    }

    /// First byte of a guest cluster, as far as there is one.
    pub const fn guest_offset(&self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0.saturating_mul(self.cluster_bytes()))
    }

    /// The host cluster that holds a byte.
    pub const fn host_cluster(&self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.cluster_bits)
    }

    /// First byte of a host cluster, as far as there is one.
    pub const fn host_offset(&self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0.saturating_mul(self.cluster_bytes()))
    }

    /// Whether a host offset is the first byte of a cluster.
    pub const fn is_cluster_start(&self, offset: HostOffset) -> bool {
        offset.0 & (self.cluster_bytes() - 1) == 0
    }

    /// Bytes between the start of its cluster and an offset.
    pub const fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_bytes() - 1)
    }

    /// Clusters that so many bytes take.
    pub const fn clusters_for(&self, bytes: u64) -> ClusterCount {
        ClusterCount(bytes.div_ceil(self.cluster_bytes()))
    }

    /// The L1 entry that leads to a guest cluster.
    pub const fn l1_index(&self, cluster: GuestCluster) -> u64 {
        cluster.0 / self.l2_entries()
    }

    /// The entry of its L2 table that describes a guest cluster.
    pub const fn l2_index(&self, cluster: GuestCluster) -> u64 {
        cluster.0 % self.l2_entries()
    }

    /// L1 entries that a disk of so many bytes needs.
    pub const fn l1_entries_for(&self, guest_bytes: u64) -> u64 {
        self.clusters_for(guest_bytes).0.div_ceil(self.l2_entries())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_geometry_of_the_specification_and_no_other() {
        for cluster_bits in 0..=64 {
            for refcount_order in 0..=64 {
                for extended in [false, true] {
                    let made = Geometry::new(Version::V3, cluster_bits, refcount_order, extended);
                    let allowed = (9..=21).contains(&cluster_bits)
                        && refcount_order <= 6
                        && (!extended || cluster_bits >= 14);
                    assert_eq!(made.is_some(), allowed, "{cluster_bits} {refcount_order}");
                }
            }
        }
    }

    #[test]
    fn sizes_of_the_usual_image() {
        let usual = Geometry::new(Version::V3, 16, 4, false).expect("allowed");
        assert_eq!(usual.l2_entries(), 8192);
        assert_eq!(usual.l2_table_covers_bytes(), 512 << 20);
        assert_eq!(usual.refcounts_per_block(), 32_768);
        assert_eq!(usual.refcount_max(), 65_535);
        assert_eq!(usual.l1_entries_for((512 << 20) + 1), 2);
        let extended = Geometry::new(Version::V3, 16, 6, true).expect("allowed");
        assert_eq!(extended.l2_entries(), 4096);
        assert_eq!(extended.subcluster_bytes(), 2048);
        assert_eq!(extended.refcount_max(), u64::MAX);
    }
}
