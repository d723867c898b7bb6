//! What opening costs: memory, reads, and that any of them may fail. Whatever the bytes.

use std::process::Command;

use blockyard_images::ImageError;
use blockyard_images::qcow2::layout::bitmaps::Bitmap;
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::layout::snapshots::Snapshot;
use blockyard_images::qcow2::open::{OpenedImage, read_image};
use blockyard_images::qcow2::units::HostOffset;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::images::{CLUSTER, Image, at};
use crate::oracle::{Oracle, Write};
use crate::rows::rows;
use crate::storages::{ReadOnlyBytes, now};

const ACCESSES: [Access; 4] = [
    Access::Metadata,
    Access::ReadOnly,
    Access::ReadWrite,
    Access::Check,
];

/// Most memory that opening a file of 4 MiB may take, in bytes.
const MEMORY_BYTES_MAX: usize = 64 << 20;
const LARGE_FILE_BYTES: usize = 4 << 20;

/// Opens whatever the bytes are, for everything, and looks at everything that was read. What a fuzzer calls.
fn open_and_walk(bytes: &[u8]) {
    for access in ACCESSES {
        let file = ReadOnlyBytes::new(bytes.to_vec());
        if let Ok(image) = now(read_image(&file, access)) {
            walk(image, bytes.len() as u64);
        }
        let all_tables = 6 * bytes.len() as u64;
        assert!(
            file.read_bytes.get() <= all_tables + (64 << 10),
            "{access:?}"
        );
        assert!(file.longest_read_bytes.get() <= 1 << 20);
        assert!(file.reads.get() <= 16 + all_tables / (16 << 10));
    }
}

fn walk(mut image: OpenedImage, file_bytes: u64) {
    let geometry = image.header.geometry;
    for snapshot in &image.snapshots {
        let _ = snapshot.check_l1_table(&geometry, file_bytes);
        assert_eq!(
            Snapshot::parse(&snapshot.encode().expect("it was short")),
            *snapshot
        );
    }
    let guest_bytes = image.header.guest_bytes();
    for bitmap in &image.bitmaps {
        let again = Bitmap::parse(&bitmap.encode().expect("short"), &geometry, guest_bytes);
        assert_eq!(again.as_ref(), Ok(bitmap));
    }
    if let Ok(bytes) = image.header.encode() {
        let again = Header::parse(&bytes, image.access).expect("it was valid");
        assert_eq!(again, image.header);
    }
    let _ = blockyard_images::qcow2::info::ImageInfo::of(&image);
    let changes = image.mark_before(blockyard_images::qcow2::open::DiskChange::Length);
    changes.expect("entries that were read can be written");
}

#[test]
fn damaged_rows_can_be_walked() {
    for row in rows() {
        open_and_walk(&row.image.0);
    }
}

proptest! {
    #[test]
    fn any_damage_is_survived(
        damage in vec((0_usize..12 * 4096, any::<u8>()), 0..4),
        fields in vec((0_usize..250, any::<u8>()), 0..4),
        length in prop_oneof![Just(12 * 4096_usize), 0_usize..12 * 4096],
    ) {
        let mut image = Image::valid();
        for (place, byte) in damage.into_iter().chain(fields) {
            image.0[place] = byte;
        }
        image.0.truncate(length);
        open_and_walk(&image.0);
    }

    #[test]
    fn damaged_numbers_are_survived(
        puts in vec((0_usize..15, prop_oneof![any::<u64>(), 0_u64..20, (0_u64..16).prop_map(|n| n * CLUSTER)]), 1..4),
    ) {
        // Every number of the header that is longer than two bytes.
        const PLACES: [(usize, usize); 15] = [
            (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8),
            (72, 8), (96, 4), (100, 4),
        ];
        let mut image = Image::valid();
        for (place, number) in puts {
            let (offset, length) = PLACES[place];
            image.0[offset..offset + length].copy_from_slice(&number.to_be_bytes()[8 - length..]);
        }
        open_and_walk(&image.0);
    }
}

#[test]
fn a_read_that_fails_is_told_and_leaves_nothing_behind() {
    let image = Image::valid();
    for access in ACCESSES {
        let file = ReadOnlyBytes::new(image.0.clone());
        let sound = now(read_image(&file, access)).expect("it is sound");
        let reads = file.reads.replace(0);
        for failing in 0..reads {
            file.reads.set(0);
            file.failing_read.set(Some(failing));
            let failed = now(read_image(&file, access)).expect_err("a read failed");
            assert!(
                matches!(failed, ImageError::Unreadable { .. }),
                "{failed:?}"
            );
            assert!(
                failed.to_string().ends_with(": Input/output error"),
                "{failed}"
            );
        }
        file.failing_read.set(None);
        assert_eq!(now(read_image(&file, access)).as_ref(), Ok(&sound));
    }
}

#[test]
fn eight_tebibytes_open_with_a_few_reads() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    for options in ["", "cluster_size=2M", "extended_l2=on"] {
        let options = match options {
            "" => vec![],
            options => vec!["-o", options],
        };
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        arguments.extend(options);
        arguments.extend(["large.qcow2", "8T"]);
        oracle.qemu_img(&arguments);
        let file = ReadOnlyBytes::new(oracle.read("large.qcow2"));
        let image = now(read_image(&file, Access::ReadWrite)).expect("it is sound");
        assert_eq!(image.header.guest_bytes(), 8 << 40);
        assert!(file.reads.get() <= 8, "{arguments:?}: {}", file.reads.get());
        assert!(file.read_bytes.get() <= 6 << 20, "{arguments:?}");
    }
}

/// The valid image with a table moved to its end and filled by `entry`, up to 4 MiB.
fn filled(count_at: usize, table_at: usize, mut entry: impl FnMut(u32) -> Vec<u8>) -> (Image, u64) {
    let mut image = Image::valid();
    let table = image.0.len() as u64;
    let mut count = 0;
    let mut bytes = Vec::new();
    while count < 65_535 {
        let next = entry(count);
        if image.0.len() + bytes.len() + next.len() > LARGE_FILE_BYTES {
            break;
        }
        bytes.extend(next);
        count += 1;
    }
    image.put(table, &bytes);
    image.put(count_at as u64, &count.to_be_bytes());
    image.put(table_at as u64, &table.to_be_bytes());
    (image, bytes.len() as u64)
}

fn many_snapshots(name_bytes: usize) -> Image {
    let snapshot = Snapshot {
        name: vec![b'n'; name_bytes],
        ..Snapshot::default()
    };
    let entry = snapshot.encode().expect("short");
    filled(60, 64, |_| entry.clone()).0
}

fn many_bitmaps(name_bytes: usize) -> Image {
    let (mut image, length_bytes) = filled(120, 136, |index| {
        let mut name = index.to_string().into_bytes();
        name.resize(name.len().max(name_bytes), b'n');
        let bitmap = Bitmap {
            table: HostOffset(u64::from(index + 1) * CLUSTER),
            table_entries: 1,
            flags: 3,
            granularity_bits: 16,
            name,
        };
        bitmap.encode().expect("short")
    });
    image.put(128, &length_bytes.to_be_bytes());
    image
}

/// A cluster of 2 MiB full of extensions.
fn many_extensions() -> Image {
    let mut image = Image(vec![0; LARGE_FILE_BYTES]);
    image.put(0, &Image::valid().0[..112]);
    image.put(20, &21_u32.to_be_bytes());
    image.put(36, &1_u32.to_be_bytes());
    image.put(40, &(2_u64 << 20).to_be_bytes());
    image.put(48, &(2_u64 << 20).to_be_bytes());
    image.put(60, &[0; 12]);
    image.put(88, &[0; 8]);
    for offset in (112..(2 << 20) - 16).step_by(16) {
        image.put(offset, &[0, 0, 0, 7, 0, 0, 0, 1, 9]);
    }
    image
}

/// L1 and refcount table take all there is, each.
fn large_tables() -> Image {
    let mut image = Image::valid();
    image.0.resize(LARGE_FILE_BYTES, 0);
    let entries = u32::try_from((LARGE_FILE_BYTES - at(3 * CLUSTER)) / 8).expect("few");
    image.put(36, &entries.to_be_bytes());
    image.put(56, &1000_u32.to_be_bytes());
    image.put(60, &[0; 12]);
    image.put(88, &[0; 8]);
    image
}

/// The largest tables that a header can name, none of which are in the file.
fn tables_out_of_the_file() -> Image {
    let mut image = Image::valid();
    image.put(36, &(4_u32 << 20).to_be_bytes());
    image.put(56, &2048_u32.to_be_bytes());
    image.put(60, &65_536_u32.to_be_bytes());
    for field in [40, 48, 64] {
        image.put(field, &(1_u64 << 40).to_be_bytes());
    }
    image
}

fn large_images() -> Vec<(&'static str, Image)> {
    vec![
        ("short snapshots", many_snapshots(0)),
        ("long snapshots", many_snapshots(65_535)),
        ("short bitmaps", many_bitmaps(0)),
        ("long bitmaps", many_bitmaps(1023)),
        ("extensions", many_extensions()),
        ("large tables", large_tables()),
        ("tables out of the file", tables_out_of_the_file()),
    ]
}

#[test]
fn the_largest_tables_can_be_walked() {
    for (name, image) in large_images() {
        assert!(image.0.len() <= LARGE_FILE_BYTES, "{name}");
        let file = ReadOnlyBytes::new(image.0.clone());
        let opened = now(read_image(&file, Access::Metadata));
        assert!(opened.is_ok(), "{name}: {:?}", opened.err());
        open_and_walk(&image.0);
    }
}

#[test]
fn limits_are_reached_and_not_passed() {
    let image = many_bitmaps(0);
    let open = |image: &Image| {
        let file = ReadOnlyBytes::new(image.0.clone());
        now(read_image(&file, Access::Metadata))
    };
    assert_eq!(open(&image).expect("valid").bitmaps.len(), 65_535);
    let snapshots = many_snapshots(0);
    assert_eq!(open(&snapshots).expect("valid").snapshots.len(), 65_535);
}

const MEASURED: &str = "BLOCKYARD_TEST_OPENED_FILE";

/// Not a test by itself: opens a file in a process of its own and prints how much memory that took at its peak, in bytes.
#[test]
fn child_that_is_measured() {
    let Some(path) = std::env::var_os(MEASURED) else {
        return;
    };
    let file = ReadOnlyBytes::new(std::fs::read(path).expect("readable"));
    for access in ACCESSES {
        let before = peak_bytes();
        let opened = now(read_image(&file, access));
        println!("measured {} {}", opened.is_ok(), peak_bytes() - before);
    }
}

fn peak_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number
        .and_then(|number| number.parse::<usize>().ok())
        .expect("a number")
        << 10
}

#[test]
fn small_files_take_little_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    for (name, image) in large_images() {
        std::fs::write(&path, &image.0).expect("writable");
        let output = Command::new(std::env::current_exe().expect("this test"))
            .args(["costs::child_that_is_measured", "--exact", "--nocapture"])
            .env(MEASURED, &path)
            .output()
            .expect("it starts");
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        let measured: Vec<usize> = printed
            .lines()
            .filter_map(|line| line.split("measured ").nth(1))
            .filter_map(|line| line.split(' ').nth(1)?.parse().ok())
            .collect();
        assert_eq!(measured.len(), ACCESSES.len(), "{name}: {output:?}");
        let total: usize = measured.iter().sum();
        assert!(total <= MEMORY_BYTES_MAX, "{name}: {measured:?}");
    }
}

#[test]
fn a_snapshot_table_of_more_than_64_mib_is_refused_as_by_qemu() {
    const ENTRY: u64 = 40 + 2 * 65_535;
    let mut image = Image::valid();
    let table = image.0.len() as u64;
    image.put(64, &table.to_be_bytes());
    let snapshots_in_64_mib = (64 << 20) / ENTRY.next_multiple_of(8);
    for index in 0..=snapshots_in_64_mib {
        let entry = table + index * ENTRY.next_multiple_of(8);
        image.put(entry + 12, &[0xff; 4]);
        image.put(entry + ENTRY, &[]);
    }
    let oracle = Oracle::find();
    for (snapshots, refused) in [
        (snapshots_in_64_mib, None),
        (snapshots_in_64_mib + 1, Some("Snapshot table is too big")),
    ] {
        let count = u32::try_from(snapshots).expect("few");
        image.put(60, &count.to_be_bytes());
        let file = ReadOnlyBytes::new(image.0.clone());
        let said = now(read_image(&file, Access::ReadOnly)).err();
        let said = said.map(|error| error.to_string());
        assert_eq!(said.as_deref(), refused);
        if let Some(oracle) = &oracle {
            oracle.write("snapshots.qcow2", &image.0);
            let names = ["snapshots.qcow2".to_owned()];
            assert_eq!(oracle.open_texts(&names, Write::No)[0].as_deref(), refused);
        }
    }
}
