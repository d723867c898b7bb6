//! Images made byte by byte, with everything that amending has to look at: an internal snapshot, a table and clusters that it
//! shares, zero clusters of every kind.

use blockyard_images::qcow2::layout::entries::{
    COPIED, L1Entry, L2Entry, ZERO, put_l2_entry, put_word,
};
use blockyard_images::qcow2::layout::extensions::{Extensions, FeatureNames, UnknownExtension};
use blockyard_images::qcow2::layout::header::Header;
use blockyard_images::qcow2::layout::refcounts::put_refcount;
use blockyard_images::qcow2::layout::snapshots::Snapshot;
use blockyard_images::qcow2::units::{Compression, Geometry, HostOffset, Version};

/// What an image is like, apart from its geometry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Kind {
    /// Length of the backing file's name; 0: there is none.
    pub(crate) backing_name_bytes: usize,
    /// There is an internal snapshot. Counts of one bit are too narrow for it.
    pub(crate) snapshot: bool,
    /// The entry of the snapshot does not say how long its disk is (version 2).
    pub(crate) short_entry: bool,
    /// There are zero clusters (version 3).
    pub(crate) zeroes: bool,
    /// An extension that nobody knows, in bytes.
    pub(crate) extension_bytes: usize,
    /// Free clusters at the end of the file.
    pub(crate) room: u64,
}

const REFCOUNT_TABLE: u64 = 1;
const REFCOUNT_BLOCK: u64 = 2;
const L1: u64 = 3;
const L2: u64 = 4;
const SHARED_L2: u64 = 5;
const SNAPSHOT_TABLE: u64 = 6;
const SNAPSHOT_L1: u64 = 7;
const SNAPSHOT_L2: u64 = 8;
const DATA: u64 = 9;
const CLUSTERS: u64 = 15;

/// The header of such an image.
pub(crate) fn header(geometry: Geometry, kind: Kind) -> Header {
    let at = |index: u64| HostOffset(index << geometry.cluster_bits());
    let extensions = Extensions {
        backing_format: (kind.backing_name_bytes > 0).then(|| b"raw".to_vec()),
        feature_names: FeatureNames::standard(&geometry),
        unknown: Some(kind.extension_bytes)
            .filter(|bytes| *bytes > 0)
            .map(|bytes| UnknownExtension {
                kind: 0x1234_5678,
                data: vec![0xe7; bytes],
            })
            .into_iter()
            .collect(),
        ..Extensions::default()
    };
    Header {
        geometry,
        size_bytes: 2 * geometry.l2_table_covers_bytes(),
        crypt_method: 0,
        l1_entries: 2,
        l1_table: at(L1),
        refcount_table: at(REFCOUNT_TABLE),
        refcount_table_clusters: 1,
        snapshots: u32::from(kind.snapshot),
        snapshot_table: at(if kind.snapshot { SNAPSHOT_TABLE } else { 0 }),
        backing_name: (kind.backing_name_bytes > 0).then(|| vec![b'b'; kind.backing_name_bytes]),
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        compression: Compression::Zlib,
        extra: match geometry.version() {
            Version::V2 => Vec::new(),
            Version::V3 => vec![0; 7],
        },
        extensions,
    }
}

/// The bytes of such an image.
pub(crate) fn image(geometry: Geometry, kind: Kind) -> Vec<u8> {
    let header = header(geometry, kind);
    let cluster = geometry.cluster_bytes() as usize;
    let at = |index: u64| HostOffset(index << geometry.cluster_bits());
    let mut bytes = vec![0; (CLUSTERS + kind.room) as usize * cluster];
    let mut counts = [0_u64; CLUSTERS as usize];
    let start = header.encode().expect("it fits");
    bytes[..start.len()].copy_from_slice(&start);
    let mut table = |index: u64, put: &mut dyn FnMut(&mut [u8])| {
        put(&mut bytes[index as usize * cluster..][..cluster]);
    };
    table(REFCOUNT_TABLE, &mut |table| {
        assert!(put_word(table, 0, at(REFCOUNT_BLOCK).0))
    });
    let times = 1 + u64::from(kind.snapshot);
    let copied = |at: HostOffset, times: u64| at.0 | if times == 1 { COPIED } else { 0 };
    table(L1, &mut |table| {
        assert!(put_word(table, 0, L1Entry::copied(at(L2)).0));
        assert!(put_word(table, 1, copied(at(SHARED_L2), times)));
    });
    let bitmap = if geometry.extended_l2() {
        0xffff_ffff
    } else {
        0
    };
    let put = |table: &mut [u8], index: usize, word: u64| {
        let entry = if word == ZERO && geometry.extended_l2() {
            L2Entry::zero(&geometry)
        } else {
            L2Entry { word, bitmap }
        };
        assert!(put_l2_entry(&geometry, table, index, entry));
    };
    let zeroes = kind.zeroes && !geometry.extended_l2();
    // Shared data, own data, data that only the snapshot has as such.
    table(L2, &mut |table| {
        put(table, 0, copied(at(DATA), times));
        put(table, 1, copied(at(DATA + 1), 1));
        if kind.zeroes {
            put(table, 3, ZERO);
        }
        if zeroes {
            put(table, 2, copied(at(DATA + 2), times) | ZERO);
            put(table, 4, copied(at(DATA + 3), 1) | ZERO);
        }
    });
    table(SHARED_L2, &mut |table| {
        put(table, 1, copied(at(DATA + 4), times));
        if zeroes {
            put(table, 0, ZERO);
            put(table, 7, copied(at(DATA + 5), times) | ZERO);
        }
    });
    for own in [0, REFCOUNT_TABLE, REFCOUNT_BLOCK, L1, L2, DATA + 1] {
        counts[own as usize] = 1;
    }
    for shared in [SHARED_L2, DATA, DATA + 4] {
        counts[shared as usize] = times;
    }
    if zeroes {
        counts[DATA as usize + 2] = times;
        counts[DATA as usize + 3] = 1;
        counts[DATA as usize + 5] = times;
    }
    if kind.snapshot {
        let entry = Snapshot {
            l1_table: at(SNAPSHOT_L1),
            l1_entries: 2,
            id: b"1".to_vec(),
            name: b"one".to_vec(),
            disk_bytes: (!kind.short_entry).then_some(header.size_bytes),
            ..Snapshot::default()
        };
        let entry = entry.encode().expect("short");
        table(SNAPSHOT_TABLE, &mut |table| {
            table[..entry.len()].copy_from_slice(&entry)
        });
        table(SNAPSHOT_L1, &mut |table| {
            assert!(put_word(table, 0, at(SNAPSHOT_L2).0));
            assert!(put_word(table, 1, at(SHARED_L2).0));
        });
        table(SNAPSHOT_L2, &mut |table| {
            put(table, 0, at(DATA).0);
            if zeroes {
                put(table, 2, at(DATA + 2).0);
                put(table, 5, ZERO);
            }
        });
        for own in [SNAPSHOT_TABLE, SNAPSHOT_L1, SNAPSHOT_L2] {
            counts[own as usize] = 1;
        }
    }
    for index in DATA..CLUSTERS {
        if counts[index as usize] > 0 {
            table(index, &mut |table| table.fill(index as u8));
        }
    }
    table(REFCOUNT_BLOCK, &mut |table| {
        for (index, count) in counts.iter().enumerate() {
            assert!(put_refcount(&geometry, table, index, *count));
        }
    });
    bytes
}
