//! Tests of verifying: what differs is named exactly, in any part of a disk, and a damaged manifest judges nothing.

use blockyard_storage::{MemoryStorage, Storage};

use super::*;
use crate::images::watcher::ImageWatch;
use crate::manifest::text::Writer;
use crate::node::file_node::{FileNode, FileOptions};

const LENGTH: usize = 40 * EXTENT_BYTES as usize + 1536;

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.expect("a runtime").block_on(future)
}

/// Data, zeroes from the third extent to the eighth and in the twentieth, and data again.
fn disk() -> Vec<u8> {
    let mut disk: Vec<u8> = (0..LENGTH).map(|at| (at / 509) as u8 | 1).collect();
    for extents in [2..8, 19..20] {
        disk[extents.start << 16..extents.end << 16].fill(0);
    }
    disk
}

pub(crate) fn manifest_of(disk: &[u8]) -> Vec<u8> {
    let mut writer = Writer::new(disk.len() as u64);
    let extents = ByteRange::new(0, disk.len() as u64).pieces(EXTENT_BYTES);
    for (extent, bytes) in extents.zip(disk.chunks(EXTENT_BYTES as usize)) {
        match is_zero(bytes) {
            true => writer.zeroes(extent),
            false => writer.extent(extent, ExtentSum::of(bytes, true)),
        }
    }
    writer.finish().into_bytes()
}

/// A node whose zeroes are holes, but for those of `written`.
pub(crate) fn node(bytes: &[u8], written: ByteRange) -> Rc<dyn Node> {
    let storage = MemoryStorage::new(bytes.len() as u64);
    block_on(async {
        for (nth, block) in bytes.chunks(4096).enumerate() {
            let range = ByteRange::new(nth as u64 * 4096, block.len() as u64);
            if !is_zero(block) || range.overlaps(&written) {
                let done = storage.write(range.offset(), Buffer::copy_of(block)).await;
                done.outcome.expect("written");
            }
        }
    });
    let storage = Rc::new(storage);
    Rc::new(FileNode::new(
        "node".to_owned(),
        storage,
        FileOptions::default(),
    ))
}

/// What is told, and what it comes to.
fn verify(disk: &[u8], manifest: &[u8]) -> (Vec<ByteRange>, Result<VerifyView, String>) {
    let zeroes_as_data = ByteRange::new(3 << 16, 1 << 16);
    let nodes = (
        node(disk, zeroes_as_data),
        node(manifest, ByteRange::default()),
    );
    let (watcher, mut watch) = ImageWatch::new();
    block_on(async {
        let told = RefCell::new(Vec::new());
        let outcome = {
            let work = run(nodes.0, nodes.1, CpuPool::on_the_spot(), &watcher);
            let listen = async {
                loop {
                    if let ImageEvent::Differs(range) = watch.next().await {
                        told.borrow_mut().push(range);
                    }
                }
            };
            let ended = futures_util::future::select(Box::pin(work), Box::pin(listen)).await;
            let futures_util::future::Either::Left((outcome, _)) = ended;
            outcome
        };
        while let Some(ImageEvent::Differs(range)) = watch.try_next() {
            told.borrow_mut().push(range);
        }
        (told.into_inner(), outcome.map_err(|error| error.text))
    })
}

fn extents(first: u64, count: u64) -> ByteRange {
    ByteRange::new(first << 16, count << 16).clamp_end(LENGTH as u64)
}

#[test]
fn a_flipped_bit_is_named_wherever_it_is() {
    let (disk, manifest) = (disk(), manifest_of(&disk()));
    assert_eq!(verify(&disk, &manifest).0, []);
    for place in [
        0,
        65_535,
        65_536,
        (3 << 16) + 5,
        (7 << 16) + 65_535,
        19 << 16,
        (39 << 16) + 3,
        LENGTH - 1,
    ] {
        let mut changed = disk.clone();
        changed[place] ^= 0x10;
        let (told, view) = verify(&changed, &manifest);
        assert_eq!(told, [extents(place as u64 >> 16, 1)], "{place}");
        assert_eq!(view.map(|view| view.differing_bytes), Ok(told[0].length()));
    }
}

#[test]
fn neighbours_are_told_together_in_the_order_of_the_disk() {
    let (mut disk, manifest) = (disk(), manifest_of(&disk()));
    // Zeroes that became data, data that became zeroes, across a block, up to the end.
    disk[1 << 16..2 << 16].fill(0);
    disk[2 << 16] = 1;
    disk[5 << 16] = 1;
    for extent in [15, 16, 17, 19, 40] {
        disk[extent << 16] ^= 1;
    }
    let (told, view) = verify(&disk, &manifest);
    let expected = [
        extents(1, 2),
        extents(5, 1),
        extents(15, 3),
        extents(19, 1),
        extents(40, 1),
    ];
    assert_eq!(told, expected);
    let bytes = expected.iter().map(ByteRange::length).sum();
    assert_eq!(view.map(|view| view.differing_bytes), Ok(bytes));
}

#[test]
fn what_is_missing_at_the_end_differs_and_what_is_behind_it_does_not() {
    let (disk, manifest) = (disk(), manifest_of(&disk()));
    for (length, first) in [
        (LENGTH - 512, 40),
        (39 << 16, 39),
        ((5 << 16) + 512, 5),
        (0, 0),
    ] {
        let (told, view) = verify(&disk[..length], &manifest);
        assert_eq!(told, [extents(first, 41 - first)], "{length}");
        assert_eq!(view.map(|view| view.disk_bytes), Ok(length as u64));
    }
    let mut longer = disk.clone();
    longer.extend([1; 4096]);
    let (told, view) = verify(&longer, &manifest);
    assert_eq!(told, []);
    let lengths = view.map(|view| (view.manifest_bytes, view.disk_bytes));
    assert_eq!(lengths, Ok((LENGTH as u64, LENGTH as u64 + 4096)));
}

#[test]
fn checksums_that_agree_by_chance_are_found_by_the_digest() {
    let disk = disk();
    let mut writer = Writer::new(LENGTH as u64);
    let all = ByteRange::new(0, LENGTH as u64).pieces(EXTENT_BYTES);
    for (extent, bytes) in all.zip(disk.chunks(EXTENT_BYTES as usize)) {
        let mut sum = ExtentSum::of(bytes, true);
        if extent == extents(33, 1) {
            sum.digest[5] ^= 1;
        }
        match is_zero(bytes) {
            true => writer.zeroes(extent),
            false => writer.extent(extent, sum),
        }
    }
    let (told, _) = verify(&disk, writer.finish().as_bytes());
    assert_eq!(told, [extents(32, 9)], "all of its line");
}

#[test]
fn a_damaged_manifest_judges_nothing() {
    let (disk, manifest) = (disk(), manifest_of(&disk()));
    let mut garbled = manifest.clone();
    let place = manifest.len() / 2;
    garbled[place] ^= 1;
    let (short, long) = (
        &manifest[..manifest.len() - 1],
        [&manifest[..], b"\n"].concat(),
    );
    let no_manifest = vec![b'x'; 5000];
    for damaged in [
        &garbled[..],
        short,
        &manifest[..200],
        &long,
        &no_manifest,
        b"",
    ] {
        let (told, view) = verify(&disk, damaged);
        assert_eq!(told, []);
        let text = view.expect_err("damaged");
        assert!(text.starts_with("The manifest cannot be used: "), "{text}");
    }
}
