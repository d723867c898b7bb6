//! The way between headers, with each sector of each write on the medium or not.

use super::header_switch::HeaderSwitch;
use crate::qcow2::layout::extensions::{
    BitmapsExtension, Extensions, FeatureNames, UnknownExtension,
};
use crate::qcow2::layout::header::{Access, Header, compatible};
use crate::qcow2::units::{Compression, Geometry, HostOffset, Version};

fn header(version: Version, bits: u32, name: usize, unknown: usize, fields: usize) -> Header {
    let geometry = Geometry::new(version, bits, 4, false).expect("allowed");
    let cluster = geometry.cluster_bytes();
    Header {
        geometry,
        size_bytes: cluster,
        crypt_method: 0,
        l1_entries: 1,
        l1_table: HostOffset(3 * cluster),
        refcount_table: HostOffset(cluster),
        refcount_table_clusters: 1,
        snapshots: 0,
        snapshot_table: HostOffset(0),
        backing_name: (name > 0).then(|| (0..name).map(|byte| byte as u8 | 1).collect()),
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        compression: Compression::Zlib,
        extra: vec![0; if version == Version::V3 { fields } else { 0 }],
        extensions: Extensions {
            backing_format: (name > 0).then(|| b"qcow2".to_vec()),
            feature_names: FeatureNames::standard(&geometry),
            bitmaps: (fields > 7).then(|| BitmapsExtension::new(1, HostOffset(0), 0)),
            unknown: Some(unknown)
                .filter(|bytes| *bytes > 0)
                .map(|bytes| UnknownExtension {
                    kind: 77,
                    data: (0..bytes).map(|byte| byte as u8).collect(),
                })
                .into_iter()
                .collect(),
            ..Extensions::default()
        },
    }
}

fn target(old: &Header, version: Version) -> Header {
    let mut new = old.clone();
    let old = old.geometry;
    let geometry = Geometry::new(version, old.cluster_bits(), 4, false);
    new.geometry = geometry.expect("allowed");
    new.refcount_table = HostOffset(7 * old.cluster_bytes());
    if version == Version::V2 {
        new.extra = Vec::new();
        new.compatible = 0;
    } else if old.version() == Version::V2 {
        new.extra = vec![0; 7];
    }
    if version == Version::V3 {
        new.compatible = compatible::LAZY_REFCOUNTS;
    }
    if version != old.version() {
        new.extensions.feature_names = FeatureNames::standard(&new.geometry);
    }
    new
}

fn parsed(cluster: &[u8]) -> Header {
    Header::parse(cluster, Access::ReadWrite).expect("it opens")
}

/// Every header that the medium may show on the way is one of the way.
fn walk(mut now: Vec<u8>, way: HeaderSwitch, told: &str) -> Header {
    for next in way.steps {
        let old = parsed(&now);
        let behind = now.len().div_ceil(512) - 1;
        // Each sector alone, each but one, all.
        let mut subsets: Vec<Vec<usize>> = vec![(1..=behind).collect()];
        for sector in 1..=behind.min(8) {
            subsets.push(vec![sector]);
            subsets.push((1..=behind).filter(|other| *other != sector).collect());
        }
        for sectors in subsets {
            let mut torn = now.clone();
            for sector in sectors {
                let end = ((sector + 1) * 512).min(now.len());
                torn[sector * 512..end].copy_from_slice(&next[sector * 512..end]);
            }
            assert!(parsed(&torn) == old, "{told}: the old one is damaged");
        }
        now = next;
    }
    parsed(&now)
}

#[test]
fn whatever_is_on_the_medium_is_the_old_header_or_the_new() {
    let (mut ways, mut refused) = (0, 0);
    for bits in [9, 10, 12, 13, 16] {
        for (from, to) in [
            (Version::V2, Version::V3),
            (Version::V3, Version::V2),
            (Version::V3, Version::V3),
        ] {
            for name in [0, 1, 7, 100, 300, 420, 500, 700, 1023] {
                for unknown in [0, 1, 40, 300, 380, 440, 900] {
                    for fields in [7, 23] {
                        for place in [0, 480, 600, 1500, 3000] {
                            let told =
                                format!("{bits} {from:?} {to:?} {name} {unknown} {fields} {place}");
                            let old = header(from, bits, name, unknown, fields);
                            let Ok(mut now) = old.encode_with_name_at(place) else {
                                continue;
                            };
                            // What nobody reads may be anything.
                            now.resize(1 << bits, 0xa5);
                            let old = parsed(&now);
                            let new = target(&old, to);
                            match HeaderSwitch::plan(now.clone(), &old, &new) {
                                Ok(way) => {
                                    ways += 1;
                                    let mut end = walk(now, way, &told);
                                    if end.extensions.feature_names.is_none() {
                                        end.extensions.feature_names =
                                            new.extensions.feature_names.clone();
                                    }
                                    assert!(end == new, "{told}");
                                }
                                // Extensions of more than a sector stand in their own way.
                                Err(_) if unknown >= 380 || fields > 7 => refused += 1,
                                Err(_) if new.encode().is_err() => refused += 1,
                                Err(error) => {
                                    let small = bits < 12 && name >= 300;
                                    assert!(small, "{told}: {error}");
                                    refused += 1;
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(ways > 1000 && refused < ways / 2, "{ways} {refused}");
}

#[test]
fn a_header_of_the_same_version_stays_where_it_is() {
    let old = header(Version::V3, 13, 900, 40, 7);
    let mut now = old.encode_with_name_at(4000).expect("it fits");
    now.resize(1 << 13, 0);
    let new = target(&old, Version::V3);
    let way = HeaderSwitch::plan(now.clone(), &old, &new).expect("always");
    let [step] = way.steps.as_slice() else {
        panic!("one write is enough");
    };
    assert_eq!(step[512..], now[512..]);
    assert_eq!(step[8..20], now[8..20]);
    assert_eq!(parsed(step), new);
}

fn without_names(mut header: Header) -> Header {
    header.extensions.feature_names = None;
    header
}

#[test]
fn another_backing_file_is_named_by_the_old_header_or_the_new() {
    let (mut ways, mut refused) = (0, 0);
    for bits in [9, 10, 12, 13, 16] {
        for version in [Version::V2, Version::V3] {
            for (name, place) in [
                (0, 0),
                (1, 0),
                (200, 480),
                (500, 600),
                (1023, 1500),
                (1023, 3000),
            ] {
                for new_name in [0, 1, 250, 1023] {
                    for format in [&b"raw"[..], b"qcow2", b"host_device"] {
                        for (unknown, fields) in [(0, 7), (0, 23), (300, 23), (900, 7)] {
                            let told = format!(
                                "{bits} {version:?} {name} {place} {new_name} {format:?} {unknown} {fields}"
                            );
                            let old = header(version, bits, name, unknown, fields);
                            let Ok(mut now) = old.encode_with_name_at(place) else {
                                continue;
                            };
                            now.resize(1 << bits, 0xa5);
                            let old = parsed(&now);
                            let mut new = old.clone();
                            new.backing_name = (new_name > 0).then(|| vec![b'n'; new_name]);
                            let format = (new_name > 0).then(|| format.to_vec());
                            new.extensions.backing_format = format;
                            let Ok(way) = HeaderSwitch::plan(now.clone(), &old, &new) else {
                                // Two names, or long extensions, have no room beside each other.
                                let crowded = bits < 12 || unknown + fields > 300;
                                assert!(crowded || new.encode().is_err(), "{told}");
                                refused += 1;
                                continue;
                            };
                            ways += 1;
                            for step in &way.steps {
                                let step = without_names(parsed(step));
                                let is_old = step == without_names(old.clone());
                                assert!(is_old || step == without_names(new.clone()), "{told}");
                            }
                            assert!(walk(now, way, &told) == new, "{told}");
                        }
                    }
                }
            }
        }
    }
    assert!(ways > 500 && refused < ways / 2, "{ways} {refused}");
}
