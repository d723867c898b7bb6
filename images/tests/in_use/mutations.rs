//! Images with one to four numbers changed, wherever numbers stand in an image: everything is tried with each.
//! `BLOCKYARD_SEEDS=100000` tries as many; `BLOCKYARD_CORPUS=folder` writes the sound images there, for a fuzzer to begin with,
//! and with `BLOCKYARD_FOUND=folder` what a fuzzer found is tried.

use std::process::Command;

use blockyard_images::qcow2::layout::entries::{COMPRESSED, COPIED, OFFSET_MASK};
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::units::Version;
use blockyard_simulator::{Seed, each_seed};

use crate::any_bytes::try_everything;
use crate::opened_images::Image;
use crate::recount::bytes;
use crate::sequences::random_run;
use crate::setup::all_bytes;

/// Longest image file that is mutated, in bytes.
const FILE_BYTES_MAX: usize = 192 << 10;

/// Memory that trying everything with such a file may take at its peak, in bytes: 64 MiB to open it, 16 MiB to check it, and
/// clusters of 2 MiB that are moved, with copies of the file.
const MEMORY_BYTES_MAX: usize = (64 + 16 + 16) << 20;

/// Sound images of every kind: what random steps leave, and one with snapshots and bitmaps.
fn sound_images() -> Vec<Vec<u8>> {
    let used = (0..60).map(|number| all_bytes(&random_run(8_000_000 + number).file));
    let mut images: Vec<_> = used.filter(|file| file.len() <= FILE_BYTES_MAX).collect();
    images.push(Image::valid().0);
    images.push(Image::version_2().0);
    images
}

/// Where numbers stand: offset, bytes of each number, how many.
type Numbers = (u64, u64, u64);

/// Everything that is a number in an image.
fn numbers_of(file: &[u8], header: &Header) -> Vec<Numbers> {
    let cluster_bytes = header.geometry.cluster_bytes();
    let word = |at: u64| u64::from_be_bytes(bytes(file, at, 8).try_into().expect("eight"));
    let half = |at: u64| u32::from_be_bytes(bytes(file, at, 4).try_into().expect("four"));
    let mut numbers = vec![(8, 8, 1), (16, 4, 2), (24, 8, 1), (32, 4, 2), (40, 8, 2)];
    numbers.extend([(56, 4, 2), (64, 8, 1)]);
    let mut extension = 72;
    if header.geometry.version() == Version::V3 {
        numbers.extend([(72, 8, 3), (96, 4, 2), (104, 1, 1)]);
        extension = u64::from(half(100));
    }
    while extension + 8 <= cluster_bytes && half(extension) != 0 {
        let length = u64::from(half(extension + 4));
        numbers.extend([(extension, 4, 2), (extension + 8, 8, (length / 8).max(1))]);
        extension += 8 + length.next_multiple_of(8);
    }
    let entries = |at: u64, count: u64| (at, 8, count.max(1));
    numbers.push(entries(header.refcount_table.0, 4));
    let block = word(header.refcount_table.0);
    numbers.extend([entries(block, 16), entries(block, cluster_bytes / 8)]);
    let l1_tables = [(header.l1_table.0, u64::from(header.l1_entries))];
    let mut entry = header.snapshot_table.0;
    for _ in 0..header.snapshots.min(4) {
        numbers.extend([(entry, 8, 1), (entry + 8, 4, 1), (entry + 12, 2, 2)]);
        numbers.extend([(entry + 36, 4, 1), (entry + 40, 8, 3)]);
        let names = word(entry + 12) >> 48;
        numbers.push(entries(word(entry), 4));
        entry += (40 + u64::from(half(entry + 36)) + names + 4).next_multiple_of(8);
    }
    for (at, count) in l1_tables {
        numbers.push(entries(at, count));
        for index in 0..count.min(4) {
            let table = word(at + index * 8) & OFFSET_MASK;
            if table != 0 {
                numbers.extend([entries(table, 12), entries(table, cluster_bytes / 8)]);
            }
        }
    }
    if let Some(bitmaps) = &header.extensions.bitmaps {
        let at = bitmaps.directory.0;
        for bitmap in 0..2 {
            let entry = at + bitmap * 32;
            numbers.extend([(entry, 8, 1), (entry + 8, 4, 2), (entry + 16, 1, 2)]);
            numbers.extend([(entry + 18, 2, 1), (entry + 20, 4, 1)]);
            numbers.push(entries(word(entry), 1));
        }
    }
    let end = file.len() as u64;
    numbers.retain(|(at, length, count)| at.saturating_add(length * count) <= end);
    numbers
}

/// Changes numbers of a sound image.
fn mutate(file: &mut Vec<u8>, seed: &Seed) {
    let header = Header::parse(file, Access::Check).expect("an image");
    let cluster_bytes = header.geometry.cluster_bytes();
    let numbers = numbers_of(file, &header);
    for _ in 0..1 + seed.below(4) {
        let (at, length, count) = *seed.pick(&numbers);
        let at = (at + seed.below(count) * length) as usize;
        let place = at..at + length as usize;
        let mut wide = [0; 8];
        wide[8 - length as usize..].copy_from_slice(&file[place.clone()]);
        let old = u64::from_be_bytes(wide);
        let other = *seed.pick(&numbers);
        let cluster = seed.below(file.len() as u64 / cluster_bytes + 3) * cluster_bytes;
        let new = match seed.below(16) {
            0 => 0,
            1 => old.wrapping_add(1),
            2 => old.wrapping_sub(1),
            3 => old ^ (1 << seed.below(length * 8)),
            4 => u64::MAX,
            5 => (1 << seed.below(64)) - seed.below(2),
            6 => cluster,
            7 => cluster | COPIED,
            8 => cluster | COPIED | 1,
            9 => cluster | COMPRESSED | (seed.any() & 0x3fff << 48),
            10 => (other.0 / cluster_bytes * cluster_bytes) | COPIED,
            11 => old ^ COPIED,
            12 => old ^ COMPRESSED,
            13 => old.wrapping_add(512),
            14 => seed.any() >> seed.below(64),
            _ => old.wrapping_mul(2),
        };
        file[place].copy_from_slice(&new.to_be_bytes()[8 - length as usize..]);
    }
    match seed.below(16) {
        0 => file.truncate(seed.below(file.len() as u64) as usize),
        1 => file.truncate(
            file.len()
                .saturating_sub(seed.below(cluster_bytes) as usize),
        ),
        2 => file.resize(file.len() + seed.below(3 * cluster_bytes) as usize, 0xff),
        _ => {}
    }
}

#[test]
fn everything_can_be_done_with_sound_images() {
    let images = sound_images();
    assert!(images.len() > 20, "{} images", images.len());
    let corpus = std::env::var_os("BLOCKYARD_CORPUS");
    for (index, image) in images.iter().enumerate() {
        if let Some(folder) = &corpus {
            let path = std::path::Path::new(folder).join(format!("sound-{index}"));
            std::fs::write(path, image).expect("written");
        }
        try_everything(image);
    }
}

#[test]
fn what_a_fuzzer_found_does_no_harm() {
    let Some(folder) = std::env::var_os("BLOCKYARD_FOUND") else {
        return;
    };
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        println!("{}", entry.path().display());
        try_everything(&std::fs::read(entry.path()).expect("readable"));
    }
}

/// The image of a seed, damaged.
fn damaged(images: &[Vec<u8>], number: u64) -> Vec<u8> {
    let seed = Seed::new(number);
    let mut file = seed.pick(images).clone();
    mutate(&mut file, &seed);
    file
}

#[test]
fn any_numbers_in_an_image_do_no_harm() {
    let images = sound_images();
    each_seed(
        "blockyard-images",
        "any_numbers_in_an_image_do_no_harm",
        3000,
        |number| try_everything(&damaged(&images, number)),
    );
}

const MEASURED: &str = "BLOCKYARD_TEST_MEASURED_MUTATIONS";

/// Not a test by itself: tries some images in a process of its own and prints how much memory that took at its peak, in bytes.
#[test]
fn child_that_is_measured() {
    if std::env::var_os(MEASURED).is_none() {
        return;
    }
    let images = sound_images();
    for number in 0..400 {
        let file = damaged(&images, number);
        // From here on the peak is what is held now.
        std::fs::write("/proc/self/clear_refs", "5").expect("Linux");
        let before = memory_bytes("VmRSS:");
        try_everything(&file);
        let taken = memory_bytes("VmHWM:").saturating_sub(before);
        println!("measured {taken} {number}");
    }
}

/// A figure of this process.
fn memory_bytes(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with(name));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    let number = number.and_then(|number| number.parse::<usize>().ok());
    number.expect("a number") << 10
}

#[test]
fn whatever_the_numbers_little_memory_is_taken() {
    let output = Command::new(std::env::current_exe().expect("this test"))
        .args([
            "mutations::child_that_is_measured",
            "--exact",
            "--nocapture",
        ])
        .env(MEASURED, "1")
        .output()
        .expect("it starts");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let measured: Vec<(usize, usize)> = printed
        .lines()
        .filter_map(|line| line.split("measured ").nth(1)?.split_once(' '))
        .filter_map(|(taken, number)| Some((taken.parse().ok()?, number.parse().ok()?)))
        .collect();
    assert_eq!(measured.len(), 400, "{output:?}");
    let most = measured.iter().max().expect("some");
    assert!(most.0 <= MEMORY_BYTES_MAX, "{most:?}: bytes, seed");
}
