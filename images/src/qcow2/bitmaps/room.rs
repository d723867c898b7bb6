//! The room that bitmaps take in an image at most, when all of their bits are stored.

use crate::qcow2::units::{ClusterCount, Geometry};

/// Length of a bitmap's entry in the directory before its name, in bytes.
const ENTRY_BYTES: u64 = 24;

/// A bitmap as far as its room goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapSize {
    /// Bytes that one bit stands for.
    pub granularity_bytes: u64,
    /// Length of its name.
    pub name_bytes: u64,
}

/// Clusters of bits, tables and directory of these bitmaps of a disk, which no clusters are shared or left out of. What counts
/// those clusters is not among them.
///
/// Spec: qcow2, "Bitmaps".
pub fn clusters_at_most(
    geometry: &Geometry,
    disk_bytes: u64,
    bitmaps: impl IntoIterator<Item = BitmapSize>,
) -> ClusterCount {
    let clusters = |bytes| geometry.clusters_for(bytes).0;
    let (mut total, mut directory_bytes) = (0_u64, 0_u64);
    for bitmap in bitmaps {
        let bits = disk_bytes.div_ceil(bitmap.granularity_bytes.max(1));
        let data = clusters(bits.div_ceil(8));
        let table = clusters(data.saturating_mul(8));
        total = total.saturating_add(data).saturating_add(table);
        let entry = ENTRY_BYTES.saturating_add(bitmap.name_bytes);
        directory_bytes = directory_bytes.saturating_add(entry.div_ceil(8).saturating_mul(8));
    }
    ClusterCount(total.saturating_add(clusters(directory_bytes)))
}
