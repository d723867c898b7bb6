//! The table of damages: each to a handmade image of every geometry, with the lines that a check has to print.

use blockyard_images::qcow2::layout::entries::{COMPRESSED, COPIED};
use blockyard_images::qcow2::layout::refcounts::put_refcount;
use blockyard_images::qcow2::units::Version;

use crate::handmade::{DATA_CLUSTERS, METADATA_CLUSTERS, geometries, image};
use crate::images::{Image, NAME};
use crate::oracle::Oracle;
use crate::verdict::{assert_same, ours, theirs};

/// A damage, and what is to be found then. Where the geometry does not allow it: `None`.
type Damage = fn(&mut Image) -> Option<Vec<String>>;

/// Every damage by name.
pub(crate) const DAMAGES: &[(&str, Damage)] = &[
    ("nothing", |_| Some(Vec::new())),
    ("a count that is too high", |image| {
        set_count(image, METADATA_CLUSTERS, 2)?;
        let entry = image.word(image.l2());
        Some(vec![
            format!("Leaked cluster {METADATA_CLUSTERS} refcount=2 reference=1"),
            format!("ERROR OFLAG_COPIED data cluster: l2_entry={entry:x} refcount=2"),
        ])
    }),
    ("a cluster that nothing leads to", |image| {
        let l2 = image.l2();
        clear_entry(image, 0);
        assert_eq!(image.word(l2), 0);
        Some(vec![format!(
            "Leaked cluster {METADATA_CLUSTERS} refcount=1 reference=0"
        )])
    }),
    ("a count of zero", |image| {
        set_count(image, METADATA_CLUSTERS, 0)?;
        let entry = image.word(image.l2());
        Some(vec![
            format!("ERROR cluster {METADATA_CLUSTERS} refcount=0 reference=1"),
            format!("ERROR OFLAG_COPIED data cluster: l2_entry={entry:x} refcount=0"),
        ])
    }),
    ("two entries that lead to one cluster", |image| {
        let (first, second) = (entry_at(image, 0), entry_at(image, 1));
        let entry = image.word(first);
        image.set_word(second, entry);
        let [one, two] = [METADATA_CLUSTERS, METADATA_CLUSTERS + 1];
        let leaked = format!("Leaked cluster {two} refcount=1 reference=0");
        let at = one * image.cluster_bytes() as u64;
        Some(match image.header().geometry.refcount_max() {
            1 => vec![format!("ERROR: overflow cluster offset={at:#x}"), leaked],
            _ => vec![
                format!("ERROR cluster {one} refcount=1 reference=2"),
                leaked,
            ],
        })
    }),
    ("reserved bits in L1", |image| {
        let (l1, word) = (image.l1(), image.word(image.l1()) | 1 << 60 | 2);
        image.set_word(l1, word);
        Some(vec![format!(
            "ERROR found L1 entry with reserved bits set: {word:x}"
        )])
    }),
    ("reserved bits in L2", |image| {
        let (l2, word) = (image.l2(), image.word(image.l2()) | 1 << 57 | 4);
        image.set_word(l2, word);
        Some(vec![format!(
            "ERROR found l2 entry with reserved bits set: {word:x}"
        )])
    }),
    ("an L1 entry that is not marked as copied", |image| {
        let (l1, word) = (image.l1(), image.word(image.l1()) & !COPIED);
        image.set_word(l1, word);
        Some(vec![format!(
            "ERROR OFLAG_COPIED L2 cluster: l1_index=0 l1_entry={word:x} refcount=1"
        )])
    }),
    ("an L2 entry that is not marked as copied", |image| {
        let (l2, word) = (image.l2(), image.word(image.l2()) & !COPIED);
        image.set_word(l2, word);
        Some(vec![format!(
            "ERROR OFLAG_COPIED data cluster: l2_entry={word:x} refcount=1"
        )])
    }),
    ("data behind the end", |image| {
        let cluster = image.cluster_bytes() as u64;
        let at = 1000 * cluster;
        let l2 = image.l2();
        image.set_word(l2, at);
        Some(vec![
            behind_end(at, cluster),
            format!("Leaked cluster {METADATA_CLUSTERS} refcount=1 reference=0"),
        ])
    }),
    ("an L2 table behind the end", |image| {
        let cluster = image.cluster_bytes() as u64;
        let (l1, at) = (image.l1(), 1000 * cluster);
        image.set_word(l1, at);
        let leaked = METADATA_CLUSTERS - 1..METADATA_CLUSTERS + DATA_CLUSTERS;
        let leaked = leaked.map(|index| format!("Leaked cluster {index} refcount=1 reference=0"));
        Some(
            std::iter::once(behind_end(at, cluster))
                .chain(leaked)
                .collect(),
        )
    }),
    ("the last cluster cut off", |image| {
        let cluster = image.cluster_bytes();
        let length = image.bytes.len() - cluster;
        image.bytes.truncate(length);
        let last = METADATA_CLUSTERS + DATA_CLUSTERS - 1;
        Some(vec![behind_end(last * cluster as u64, cluster as u64)])
    }),
    ("all but a byte of the last cluster cut off", |image| {
        let length = image.bytes.len() - image.cluster_bytes() + 1;
        image.bytes.truncate(length);
        Some(Vec::new())
    }),
    ("a cluster of data that is not aligned", |image| {
        let (cluster, l2) = (image.cluster_bytes() as u64, image.l2());
        let last = entry_at(image, DATA_CLUSTERS - 1);
        let word = image.word(last) - cluster + 512;
        (cluster > 512).then(|| image.set_word(l2, word))?;
        let at = word & !COPIED;
        let (one, two) = (at / cluster, at / cluster + 1);
        let mut lines = vec![
            format!(
                "ERROR offset={at:x}: Data cluster is not properly aligned; L2 entry corrupted."
            ),
            format!("Leaked cluster {METADATA_CLUSTERS} refcount=1 reference=0"),
        ];
        lines.extend([one, two].map(|index| twice(image, index)));
        Some(lines)
    }),
    ("room for zeroes that is not aligned", |image| {
        let (cluster, l2) = (image.cluster_bytes() as u64, image.l2());
        (cluster > 512 && !image.header().geometry.extended_l2()).then_some(())?;
        let word = image.word(l2) | 512 | 1;
        image.set_word(l2, word);
        let at = word & !COPIED & !1;
        Some(vec![
            format!(
                "ERROR offset={at:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
            ),
            twice(image, METADATA_CLUSTERS + 1),
        ])
    }),
    ("an L2 table that is not aligned", |image| {
        let (cluster, l1) = (image.cluster_bytes() as u64, image.l1());
        // What stands there must not look like entries.
        (cluster > 1024).then_some(())?;
        for index in METADATA_CLUSTERS..METADATA_CLUSTERS + DATA_CLUSTERS {
            let start = (index * cluster) as usize;
            image.bytes[start..start + cluster as usize].fill(0);
        }
        let table = (METADATA_CLUSTERS * cluster + 512) | COPIED;
        image.set_word(l1, table);
        let at = table & !COPIED;
        let leaked = (METADATA_CLUSTERS - 1..METADATA_CLUSTERS + DATA_CLUSTERS)
            .filter(|index| ![METADATA_CLUSTERS, METADATA_CLUSTERS + 1].contains(index))
            .map(|index| format!("Leaked cluster {index} refcount=1 reference=0"));
        let lines = [format!(
            "ERROR l2_offset={at:x}: Table is not cluster aligned; L1 entry corrupted"
        )];
        Some(lines.into_iter().chain(leaked).collect())
    }),
    ("a compressed cluster that is marked as copied", |image| {
        let (l2, at) = (image.l2(), METADATA_CLUSTERS * image.cluster_bytes() as u64);
        image.set_word(l2, COMPRESSED | COPIED | at);
        let extended = image.header().geometry.extended_l2();
        let flag = format!(
            "ERROR: coffset={at:#x}: copied flag must never be set for compressed clusters"
        );
        if !extended {
            return Some(vec![flag]);
        }
        Some(vec![
            flag,
            format!(
                "ERROR compressed cluster 0 with non-zero subcluster allocation bitmap, entry={:#x}",
                COMPRESSED | at
            ),
            format!("Leaked cluster {METADATA_CLUSTERS} refcount=1 reference=0"),
        ])
    }),
    ("a subcluster with data that reads as zeroes", |image| {
        image.header().geometry.extended_l2().then_some(())?;
        let (l2, at) = (image.l2(), image.word(image.l2()) & !COPIED);
        image.set_word(l2 + 8, 1 << 32 | 0xffff_ffff);
        Some(vec![format!(
            "ERROR offset={at:x}: Allocated cluster has corrupted subcluster allocation bitmap"
        )])
    }),
    ("a subcluster with data and no cluster", |image| {
        image.header().geometry.extended_l2().then_some(())?;
        let free = entry_at(image, DATA_CLUSTERS) + 8;
        image.set_word(free, 1);
        Some(vec![
            "ERROR: Unallocated cluster has non-zero subcluster allocation map".to_owned(),
        ])
    }),
    ("a refcount block that is not aligned", |image| {
        let table = image.refcount_table();
        (image.cluster_bytes() > 512).then_some(())?;
        let word = image.word(table) + 512;
        image.set_word(table, word);
        let clusters = 0..METADATA_CLUSTERS + DATA_CLUSTERS;
        let unknown = clusters
            .map(|index| format!("Can't get refcount for cluster {index}: Input/output error"));
        let lines = [
            "ERROR refcount block 0 is not cluster aligned; refcount table entry corrupted"
                .to_owned(),
        ];
        Some(lines.into_iter().chain(unknown).collect())
    }),
    ("reserved bits in the refcount table", |image| {
        let table = image.refcount_table();
        let word = image.word(table) | 1;
        image.set_word(table, word);
        Some(vec![
            "ERROR refcount table entry 0 has reserved bits set".to_owned(),
            "Leaked cluster 2 refcount=1 reference=0".to_owned(),
        ])
    }),
    ("a refcount block behind the end", |image| {
        let table = image.refcount_table();
        let at = 1000 * image.cluster_bytes() as u64;
        image.set_word(table + 8, at);
        Some(vec!["ERROR refcount block 1 is outside image".to_owned()])
    }),
    ("a refcount block in two places", |image| {
        let table = image.refcount_table();
        let word = image.word(table);
        image.set_word(table + 8, word);
        let mut lines = vec![
            "ERROR refcount block 1 refcount=2".to_owned(),
            twice(image, 2),
        ];
        if image.header().geometry.refcount_max() == 1 {
            lines = vec![twice(image, 2)];
        }
        Some(lines)
    }),
    ("no refcount block", |image| {
        let table = image.refcount_table();
        image.set_word(table, 0);
        let counted = (0..METADATA_CLUSTERS + DATA_CLUSTERS).filter(|index| *index != 2);
        let mut lines: Vec<String> = counted
            .map(|index| format!("ERROR cluster {index} refcount=0 reference=1"))
            .collect();
        let entry = image.word(image.l1());
        lines.push(format!(
            "ERROR OFLAG_COPIED L2 cluster: l1_index=0 l1_entry={entry:x} refcount=0"
        ));
        for index in 0..DATA_CLUSTERS {
            let entry = image.word(entry_at(image, index));
            lines.push(format!(
                "ERROR OFLAG_COPIED data cluster: l2_entry={entry:x} refcount=0"
            ));
        }
        Some(lines)
    }),
    ("snapshots in zeroes", |image| {
        // The table is where the file ends.
        image
            .bytes
            .resize(image.bytes.len() + image.cluster_bytes(), 0);
        let place = METADATA_CLUSTERS + DATA_CLUSTERS;
        let at = place * image.cluster_bytes() as u64;
        set_count(image, place, 1)?;
        image.set_half(60, 2);
        image.set_word(64, at);
        Some(match image.header().geometry.version() {
            Version::V2 => Vec::new(),
            Version::V3 => (0..2)
                .map(|index| format!("ERROR snapshot table entry {index} is incomplete"))
                .collect(),
        })
    }),
    (
        "an L1 table of a snapshot that is not aligned or too large",
        |image| {
            image
                .bytes
                .resize(image.bytes.len() + image.cluster_bytes(), 0);
            let place = METADATA_CLUSTERS + DATA_CLUSTERS;
            let at = place as usize * image.cluster_bytes();
            set_count(image, place, 1)?;
            image.set_half(60, 2);
            image.set_word(64, at as u64);
            image.set_word(at, 0x108);
            image.set_half(at + 12, 0x0001_0002);
            image.set_half(at + 36, 16);
            image.bytes[at + 56..at + 59].copy_from_slice(b"1ab");
            image.set_half(at + 64 + 8, 5_000_000);
            image.set_half(at + 64 + 36, 16);
            Some(vec![
            "ERROR snapshot 1 (ab) l1_offset=0x108: L1 table is not cluster aligned; snapshot table entry corrupted"
                .to_owned(),
            "ERROR snapshot  () l1_size=0x4c4b40: L1 table is too large; snapshot table entry corrupted".to_owned(),
        ])
        },
    ),
    ("an L1 table that a snapshot shares", |image| {
        image
            .bytes
            .resize(image.bytes.len() + image.cluster_bytes(), 0);
        let place = METADATA_CLUSTERS + DATA_CLUSTERS;
        let at = place as usize * image.cluster_bytes();
        (image.header().geometry.refcount_max() > 1).then_some(())?;
        set_count(image, place, 1)?;
        image.set_half(60, 1);
        image.set_word(64, at as u64);
        let l1 = image.l1() as u64;
        image.set_word(at, l1);
        image.set_half(at + 8, 1);
        image.set_half(at + 36, 16);
        // Whatever it leads to has twice the references.
        Some(
            (3..METADATA_CLUSTERS + DATA_CLUSTERS)
                .map(|index| twice(image, index))
                .collect(),
        )
    }),
];

/// Where the entry of a guest cluster is.
fn entry_at(image: &Image, index: u64) -> usize {
    image.l2() + (index * image.header().geometry.l2_entry_bytes()) as usize
}

fn clear_entry(image: &mut Image, index: u64) {
    let at = entry_at(image, index);
    let bytes = image.header().geometry.l2_entry_bytes() as usize;
    image.bytes[at..at + bytes].fill(0);
}

/// Stores a count, if it can be.
fn set_count(image: &mut Image, cluster: u64, count: u64) -> Option<()> {
    let (geometry, block) = (image.header().geometry, image.refcount_block());
    let end = block + image.cluster_bytes();
    put_refcount(
        &geometry,
        &mut image.bytes[block..end],
        cluster as usize,
        count,
    )
    .then_some(())
}

/// What is found of a cluster with two references and a count of one.
fn twice(image: &Image, cluster: u64) -> String {
    match image.header().geometry.refcount_max() {
        1 => format!(
            "ERROR: overflow cluster offset={:#x}",
            cluster * image.cluster_bytes() as u64
        ),
        _ => format!("ERROR cluster {cluster} refcount=1 reference=2"),
    }
}

fn behind_end(at: u64, length: u64) -> String {
    format!(
        "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
         offset {at:#x} size {length:#x}"
    )
}

#[test]
fn every_damage_is_found_in_every_geometry() {
    let oracle = Oracle::find();
    for (name, damage) in DAMAGES {
        let mut tried = 0;
        for geometry in geometries() {
            let mut image = image(geometry);
            let Some(mut lines) = damage(&mut image) else {
                continue;
            };
            tried += 1;
            lines.sort();
            let found = ours(&image.bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(found.lines, lines, "{name} {geometry:?}");
            if let Some(oracle) = &oracle {
                oracle.write(NAME, &image.bytes);
                let told = format!("{name} {geometry:?}");
                let theirs = theirs(oracle, NAME).unwrap_or_else(|error| panic!("{told}: {error}"));
                assert_same(&found, &theirs, &told);
            }
        }
        assert!(tried > 3, "{name}: no geometry allows it");
    }
}
