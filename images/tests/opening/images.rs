//! A small valid image with everything that opening looks at, made here, and its places to be damaged.

use blockyard_images::qcow2::layout::bitmaps::{Bitmap, flags};
use blockyard_images::qcow2::layout::entries::{COPIED, put_word};
use blockyard_images::qcow2::layout::extensions::{BitmapsExtension, Extensions};
use blockyard_images::qcow2::layout::header::{Header, autoclear};
use blockyard_images::qcow2::layout::refcounts::put_refcount;
use blockyard_images::qcow2::layout::snapshots::Snapshot;
use blockyard_images::qcow2::units::{Compression, Geometry, HostOffset, Version};

/// Cluster size of the image in bytes.
pub(crate) const CLUSTER: u64 = 4096;
/// Length of the guest's disk in bytes.
pub(crate) const DISK: u64 = 64 << 20;

pub(crate) const REFCOUNT_TABLE: u64 = CLUSTER;
const REFCOUNT_BLOCK: u64 = 2 * CLUSTER;
pub(crate) const L1_TABLE: u64 = 3 * CLUSTER;
const L2_TABLE: u64 = 4 * CLUSTER;
const DATA: u64 = 5 * CLUSTER;
pub(crate) const SNAPSHOT_TABLE: u64 = 6 * CLUSTER;
const SNAPSHOT_L1_TABLES: [u64; 2] = [7 * CLUSTER, 8 * CLUSTER];
pub(crate) const BITMAP_DIRECTORY: u64 = 9 * CLUSTER;
const BITMAP_TABLES: [u64; 2] = [10 * CLUSTER, 11 * CLUSTER];
const CLUSTERS: u64 = 12;

/// Bytes of a snapshot's entry, and of a bitmap's.
pub(crate) const SNAPSHOT_ENTRY: u64 = 72;
pub(crate) const BITMAP_ENTRY: u64 = 32;

/// The bytes of an image, whole or damaged.
#[derive(Clone)]
pub(crate) struct Image(pub(crate) Vec<u8>);

impl Image {
    /// Version 3, two snapshots, two bitmaps (`b0` records, `b1` does not), one cluster of data.
    pub(crate) fn valid() -> Self {
        let header = header();
        let geometry = header.geometry;
        let mut image = Self(vec![0; at(CLUSTERS * CLUSTER)]);
        image.put(0, &header.encode().expect("fits"));
        image.put(REFCOUNT_TABLE, &REFCOUNT_BLOCK.to_be_bytes());
        for cluster in 0..CLUSTERS {
            let block = &mut image.0[at(REFCOUNT_BLOCK)..at(REFCOUNT_BLOCK + CLUSTER)];
            assert!(put_refcount(&geometry, block, at(cluster), 1));
        }
        image.put(L1_TABLE, &(L2_TABLE | COPIED).to_be_bytes());
        let table = &mut image.0[at(L2_TABLE)..at(L2_TABLE + CLUSTER)];
        assert!(put_word(table, 0, DATA | COPIED));
        image.put(DATA, &[0xd5; 4096]);
        for (index, l1_table) in SNAPSHOT_L1_TABLES.into_iter().enumerate() {
            let entry = snapshot(index, l1_table).encode().expect("short");
            assert_eq!(entry.len() as u64, SNAPSHOT_ENTRY);
            image.put(SNAPSHOT_TABLE + index as u64 * SNAPSHOT_ENTRY, &entry);
        }
        for (index, table) in BITMAP_TABLES.into_iter().enumerate() {
            let entry = bitmap(index, table).encode().expect("short");
            assert_eq!(entry.len() as u64, BITMAP_ENTRY);
            image.put(BITMAP_DIRECTORY + index as u64 * BITMAP_ENTRY, &entry);
        }
        image
    }

    /// The same as version 2, without bitmaps.
    pub(crate) fn version_2() -> Self {
        let mut image = Self::valid();
        let header = Header {
            geometry: Geometry::new(Version::V2, 12, 4, false).expect("allowed"),
            autoclear: 0,
            extra: Vec::new(),
            extensions: Extensions::default(),
            ..header()
        };
        image.0[..at(CLUSTER)].fill(0);
        image.put(0, &header.encode().expect("fits"));
        image
    }

    /// Puts bytes somewhere, growing the image.
    pub(crate) fn put(&mut self, offset: u64, bytes: &[u8]) {
        let end = at(offset) + bytes.len();
        self.0.resize(self.0.len().max(end), 0);
        self.0[at(offset)..end].copy_from_slice(bytes);
    }

    /// Puts extensions in place of all there are; an end mark follows.
    pub(crate) fn put_extensions(&mut self, extensions: &[(u32, &[u8])]) {
        self.0[112..at(CLUSTER)].fill(0);
        let mut offset = 112;
        for (kind, data) in extensions {
            self.put(offset, &kind.to_be_bytes());
            let length = u32::try_from(data.len()).expect("short");
            self.put(offset + 4, &length.to_be_bytes());
            self.put(offset + 8, data);
            offset += 8 + (data.len() as u64).next_multiple_of(8);
        }
    }
}

/// A place in the image.
pub(crate) fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("a small image")
}

fn header() -> Header {
    let geometry = Geometry::new(Version::V3, 12, 4, false).expect("allowed");
    let directory_bytes = 2 * BITMAP_ENTRY;
    let bitmaps = BitmapsExtension::new(2, HostOffset(BITMAP_DIRECTORY), directory_bytes);
    Header {
        geometry,
        size_bytes: DISK,
        crypt_method: 0,
        l1_entries: u32::try_from(geometry.l1_entries_for(DISK)).expect("few"),
        l1_table: HostOffset(L1_TABLE),
        refcount_table: HostOffset(REFCOUNT_TABLE),
        refcount_table_clusters: 1,
        snapshots: 2,
        snapshot_table: HostOffset(SNAPSHOT_TABLE),
        backing_name: None,
        incompatible: 0,
        compatible: 0,
        autoclear: autoclear::BITMAPS,
        compression: Compression::Zlib,
        extra: vec![0; 7],
        extensions: Extensions {
            bitmaps: Some(bitmaps),
            ..Extensions::default()
        },
    }
}

fn snapshot(index: usize, l1_table: u64) -> Snapshot {
    Snapshot {
        l1_table: HostOffset(l1_table),
        l1_entries: header().l1_entries,
        id: (index + 1).to_string().into_bytes(),
        name: format!("snap{index}").into_bytes(),
        date_seconds: 1_700_000_000,
        disk_bytes: Some(DISK),
        icount: Some(u64::MAX),
        ..Snapshot::default()
    }
}

fn bitmap(index: usize, table: u64) -> Bitmap {
    Bitmap {
        table: HostOffset(table),
        table_entries: 1,
        flags: if index == 0 { flags::AUTO } else { 0 },
        granularity_bits: 16,
        name: format!("b{index}").into_bytes(),
    }
}
