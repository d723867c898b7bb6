//! Headers are read as they were written, whatever they hold, and no bytes can make reading them panic.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use crate::error::ImageError;
use crate::qcow2::layout::extensions::{
    ActivityId, BitmapsExtension, CryptoPointer, Extensions, FeatureNames, FeatureSet,
    UnknownExtension,
};
use crate::qcow2::layout::header::{
    Access, Header, V2_HEADER_BYTES, V3_HEADER_BYTES, V3_HEADER_BYTES_MIN, autoclear, incompatible,
};
use crate::qcow2::units::{Compression, Geometry, HostOffset, Version};

const ACCESSES: [Access; 4] = [
    Access::Metadata,
    Access::ReadOnly,
    Access::ReadWrite,
    Access::Check,
];

/// A header as a new image of 64 MiB may have it.
fn usual(version: Version, cluster_bits: u32) -> Header {
    let geometry = Geometry::new(version, cluster_bits, 4, false).expect("allowed");
    let cluster = geometry.cluster_bytes();
    let size_bytes = 64 << 20;
    Header {
        geometry,
        size_bytes,
        crypt_method: 0,
        l1_entries: u32::try_from(geometry.l1_entries_for(size_bytes)).expect("small"),
        l1_table: HostOffset(3 * cluster),
        refcount_table: HostOffset(cluster),
        refcount_table_clusters: 1,
        snapshots: 0,
        snapshot_table: HostOffset(0),
        backing_name: None,
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        compression: Compression::Zlib,
        extra: match version {
            Version::V2 => Vec::new(),
            Version::V3 => vec![0; 7],
        },
        extensions: Extensions {
            feature_names: FeatureNames::standard(&geometry),
            ..Extensions::default()
        },
    }
}

fn refusal(header: &[u8], access: Access) -> String {
    Header::parse(header, access)
        .expect_err("refused")
        .to_string()
}

#[test]
fn lengths_of_headers() {
    assert_eq!(usual(Version::V2, 16).header_bytes(), V2_HEADER_BYTES);
    let mut header = usual(Version::V3, 16);
    assert_eq!(header.header_bytes(), V3_HEADER_BYTES);
    header.extra.clear();
    assert_eq!(header.header_bytes(), V3_HEADER_BYTES_MIN);
    header.compression = Compression::Zstd;
    assert_eq!(header.header_bytes(), V3_HEADER_BYTES_MIN + 1);
}

#[test]
fn small_clusters_and_version_2_have_no_feature_names() {
    for (version, cluster_bits, named) in [
        (Version::V2, 16, false),
        (Version::V3, 12, false),
        (Version::V3, 13, true),
    ] {
        let header = usual(version, cluster_bits);
        assert_eq!(header.extensions.feature_names.is_some(), named);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut header = usual(Version::V3, 9);
    header.backing_name = Some(vec![b'n'; 512 - 112 - 8]);
    assert_eq!(header.encode().expect("just fits").len(), 512);
    header.backing_name = Some(vec![b'n'; 512 - 112 - 8 + 1]);
    assert!(matches!(header.encode(), Err(ImageError::Refused { .. })));
    let mut header = usual(Version::V3, 16);
    header.backing_name = Some(vec![b'n'; 1024]);
    assert!(matches!(header.encode(), Err(ImageError::Refused { .. })));
    let mut header = usual(Version::V2, 16);
    header.incompatible = incompatible::DIRTY;
    assert!(matches!(header.encode(), Err(ImageError::Refused { .. })));
}

#[test]
fn unknown_features_are_named_by_the_image() {
    let mut header = usual(Version::V3, 16);
    header.incompatible = 1 << 5 | 1 << 6 | 1 << 20;
    let mut table = Vec::new();
    for (bit, name) in [(6, "six"), (5, "five")] {
        table.extend([FeatureSet::Incompatible as u8, bit]);
        table.extend(name.as_bytes());
        table.resize(table.len().next_multiple_of(48), 0);
    }
    header.extensions.feature_names = Some(FeatureNames(table));
    let bytes = header.encode().expect("fits");
    assert_eq!(
        refusal(&bytes, Access::ReadOnly),
        "Unsupported qcow2 feature(s): six, five, Unknown incompatible feature: 100000"
    );
}

#[test]
fn a_corrupt_image_may_be_read_and_checked() {
    let mut header = usual(Version::V3, 16);
    header.incompatible = incompatible::CORRUPT;
    let bytes = header.encode().expect("fits");
    for access in ACCESSES {
        let opens = Header::parse(&bytes, access).is_ok();
        assert_eq!(opens, access != Access::ReadWrite, "{access:?}");
    }
}

#[test]
fn names_end_at_the_first_nul() {
    let mut header = usual(Version::V3, 16);
    header.backing_name = Some(b"base\0/etc/shadow".to_vec());
    header.extensions.backing_format = Some(b"raw\0qcow2".to_vec());
    let bytes = header.encode().expect("fits");
    let read = Header::parse(&bytes, Access::ReadOnly).expect("valid");
    assert_eq!(read.backing_name.as_deref(), Some(&b"base"[..]));
    assert_eq!(read.extensions.backing_format.as_deref(), Some(&b"raw"[..]));
}

fn name(bytes_max: usize) -> impl Strategy<Value = Option<Vec<u8>>> {
    option::of(vec(1_u8..=255, 1..=bytes_max))
}

fn unknown_extensions() -> impl Strategy<Value = Vec<UnknownExtension>> {
    // No kind that is known, or ends the list.
    let kind = 1_u32..0x0500_0000;
    let one = (kind, vec(any::<u8>(), 0..70));
    vec(
        one.prop_map(|(kind, data)| UnknownExtension { kind, data }),
        0..4,
    )
}

prop_compose! {
    fn extensions()(
        backing_format in name(15),
        data_file_name in name(40),
        feature_names in option::of(vec(any::<u8>(), 0..200).prop_map(FeatureNames)),
        bitmaps in option::of((1_u32..=65_535, 0_u64..1 << 20, 0_u64..1 << 20)),
        activity in option::of(any::<[u8; 16]>().prop_map(ActivityId)),
        unknown in unknown_extensions(),
    ) -> Extensions {
        Extensions {
            backing_format,
            data_file_name,
            crypto: None,
            feature_names,
            bitmaps: bitmaps.map(|(bitmaps, bytes, cluster)| {
                BitmapsExtension::new(bitmaps, HostOffset(cluster << 21), bytes)
            }),
            activity,
            unknown,
        }
    }
}

prop_compose! {
    fn v3_header()(
        cluster_bits in 12_u32..=21,
        refcount_order in 0_u32..=6,
        extended in any::<bool>(),
        zstd in any::<bool>(),
        luks in any::<bool>(),
        dirty in any::<bool>(),
        features in (any::<u64>(), any::<u64>()),
        size_bytes in 0_u64..1 << 30,
        backing_name in name(300),
        extra in vec(any::<u8>(), 0..40),
        extensions in extensions(),
        tables in (0_u64..1 << 30, 0_u64..1 << 30, 0_u64..1 << 30),
        snapshots in 0_u32..=65_536,
    ) -> Header {
        let extended = extended && cluster_bits >= 14;
        let geometry = Geometry::new(Version::V3, cluster_bits, refcount_order, extended)
            .expect("allowed");
        let cluster = geometry.cluster_bytes();
        let mut incompatible = incompatible::DATA_FILE;
        incompatible |= if dirty { incompatible::DIRTY } else { 0 };
        incompatible |= if extended { incompatible::EXTENDED_L2 } else { 0 };
        incompatible |= if zstd { incompatible::COMPRESSION } else { 0 };
        let crypto = CryptoPointer { at: HostOffset(7 * cluster), length_bytes: 4096 };
        Header {
            geometry,
            size_bytes,
            crypt_method: if luks { 2 } else { 0 },
            l1_entries: u32::try_from(geometry.l1_entries_for(size_bytes)).expect("small"),
            l1_table: HostOffset(tables.0 * cluster),
            refcount_table: HostOffset(tables.1 * cluster),
            refcount_table_clusters: 1,
            snapshots,
            snapshot_table: HostOffset(tables.2 * cluster),
            backing_name,
            incompatible,
            compatible: features.0,
            autoclear: features.1,
            compression: if zstd { Compression::Zstd } else { Compression::Zlib },
            extra,
            extensions: Extensions {
                crypto: luks.then_some(crypto),
                ..extensions
            },
        }
    }
}

proptest! {
    #[test]
    fn headers_come_back(header in v3_header()) {
        let bytes = header.encode().expect("fits");
        prop_assert!(bytes.len() as u64 <= header.geometry.cluster_bytes());
        let read = Header::parse(&bytes, Access::ReadWrite).expect("valid");
        prop_assert_eq!(&read, &header);
        prop_assert_eq!(read.encode().expect("fits"), bytes);
    }

    #[test]
    fn version_2_headers_come_back(cluster_bits in 9_u32..=21, backing_name in name(300)) {
        let header = Header { backing_name, ..usual(Version::V2, cluster_bits) };
        let bytes = header.encode().expect("fits");
        let read = Header::parse(&bytes, Access::ReadWrite).expect("valid");
        prop_assert_eq!(&read, &header);
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..300)) {
        for access in ACCESSES {
            let _ = Header::parse(&bytes, access);
            let mut image = usual(Version::V3, 9).encode().expect("fits");
            image.truncate(72);
            image.extend(&bytes);
            let _ = Header::parse(&image, access);
        }
    }

    #[test]
    fn damaged_headers_are_read_or_refused(
        header in v3_header(), places in vec((0_usize..600, any::<u8>()), 1..6), length in 0_usize..2000,
    ) {
        let mut bytes = header.encode().expect("fits");
        bytes.resize(length, 0);
        for (place, value) in places {
            if let Some(byte) = bytes.get_mut(place) {
                *byte = value;
            }
        }
        for access in ACCESSES {
            if let Ok(read) = Header::parse(&bytes, access) {
                // It may take more room than before, as the backing file's name may lie in the fields.
                if let Ok(again) = read.encode() {
                    let twice = Header::parse(&again, access).expect("what was written is valid");
                    prop_assert_eq!(twice, read);
                }
            }
        }
    }
}

#[test]
fn autoclear_bits_are_only_read() {
    let mut header = usual(Version::V3, 16);
    header.autoclear = 1 << 40 | autoclear::BITMAPS;
    let bytes = header.encode().expect("fits");
    let read = Header::parse(&bytes, Access::ReadWrite).expect("valid");
    assert_eq!(read.autoclear, header.autoclear);
    assert!(read.bitmaps_valid());
}
