//! Images made byte by byte, of any geometry and without QEMU.

use blockyard_images::qcow2::layout::entries::{L1Entry, L2Entry, put_l2_entry, put_word};
use blockyard_images::qcow2::layout::extensions::Extensions;
use blockyard_images::qcow2::layout::header::Header;
use blockyard_images::qcow2::layout::refcounts::put_refcount;
use blockyard_images::qcow2::units::{Compression, Geometry, HostOffset, Version};

use crate::images::Image;

/// Clusters of data of a handmade image.
pub(crate) const DATA_CLUSTERS: u64 = 4;

/// Clusters before the data: header, refcount table, refcount block, L1 table, L2 table, in this order.
pub(crate) const METADATA_CLUSTERS: u64 = 5;

/// Every cluster size, and every width of counts.
pub(crate) fn geometries() -> Vec<Geometry> {
    let mut all = Vec::new();
    for cluster_bits in 9..=21 {
        let refcount_order = cluster_bits % 7;
        let extended = cluster_bits >= 14 && cluster_bits % 2 == 0;
        all.extend(Geometry::new(
            Version::V3,
            cluster_bits,
            refcount_order,
            extended,
        ));
    }
    all.extend(Geometry::new(Version::V2, 9, 4, false));
    all.extend(Geometry::new(Version::V2, 16, 4, false));
    all.extend(Geometry::new(Version::V3, 16, 4, false));
    all.extend(Geometry::new(Version::V3, 16, 6, true));
    all
}

/// A sound image whose first clusters hold data, one after the other.
pub(crate) fn image(geometry: Geometry) -> Image {
    let cluster = geometry.cluster_bytes();
    let at = |index: u64| HostOffset(index * cluster);
    let clusters = METADATA_CLUSTERS + DATA_CLUSTERS;
    let header = Header {
        geometry,
        size_bytes: 2 * DATA_CLUSTERS * cluster,
        crypt_method: 0,
        l1_entries: 1,
        l1_table: at(3),
        refcount_table: at(1),
        refcount_table_clusters: 1,
        snapshots: 0,
        snapshot_table: HostOffset(0),
        backing_name: None,
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        compression: Compression::Zlib,
        extra: vec![
            0;
            if geometry.version() == Version::V2 {
                0
            } else {
                7
            }
        ],
        extensions: Extensions::default(),
    };
    let mut bytes = vec![0; (clusters * cluster) as usize];
    let start = header.encode().expect("fits");
    bytes[..start.len()].copy_from_slice(&start);
    fn table(bytes: &mut [u8], cluster: u64, index: u64) -> &mut [u8] {
        &mut bytes[(index * cluster) as usize..((index + 1) * cluster) as usize]
    }
    assert!(put_word(table(&mut bytes, cluster, 1), 0, 2 * cluster));
    for index in 0..clusters {
        let block = table(&mut bytes, cluster, 2);
        assert!(put_refcount(&geometry, block, index as usize, 1));
    }
    let l1 = table(&mut bytes, cluster, 3);
    assert!(put_word(l1, 0, L1Entry::copied(at(4)).0));
    for index in 0..DATA_CLUSTERS {
        let place = METADATA_CLUSTERS + index;
        let entry = L2Entry::copied(&geometry, at(place));
        let l2 = table(&mut bytes, cluster, 4);
        assert!(put_l2_entry(&geometry, l2, index as usize, entry));
        table(&mut bytes, cluster, place).fill(index as u8 + 1);
    }
    Image { bytes }
}
