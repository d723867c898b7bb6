//! Images that something is wrong with: what is refused, and that nothing else happens.

use std::rc::Rc;

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::layout::fields::u64_at;
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::layout::refcounts::put_refcount;
use blockyard_images::qcow2::snapshot::{
    NewSnapshot, SnapshotChoice, SnapshotError, apply, create,
};
use blockyard_images::qcow2::units::{Geometry, Version};
use blockyard_simulator::{DiskOptions, Seed, each_seed, run};
use blockyard_storage::{Buffer, Storage};

use crate::cases::{Case, Judge, cases};
use crate::handmade::{Kind, image};
use crate::verdict::{ours, storage};

fn sound(refcount_order: u32, snapshot: bool) -> (Geometry, Vec<u8>) {
    let geometry = Geometry::new(Version::V3, 9, refcount_order, false).expect("allowed");
    let kind = Kind {
        snapshot,
        zeroes: true,
        ..Kind::default()
    };
    (geometry, image(geometry, kind))
}

fn bytes_of(file: &Rc<dyn Storage>) -> Vec<u8> {
    let length = file.facts().length_bytes as usize;
    let read = run(file.read(0, Buffer::zeroed(length)), || false).expect("at once");
    read.buffer.as_slice().to_vec()
}

/// Makes a snapshot of the image, or applies its first: is refused, and nothing that is in use has changed.
fn refusal(image: &[u8], applies: bool) -> String {
    let file = storage(image);
    let one = SnapshotChoice::IdOrName(b"1".to_vec());
    let ended = run(
        async {
            match applies {
                true => apply(&file, &one, true, &Unwatched).await,
                false => {
                    let new = NewSnapshot::default();
                    create(&file, &new, true, &Unwatched).await.map(drop)
                }
            }
        },
        || false,
    );
    let after = bytes_of(&file);
    assert_eq!(after.len(), image.len());
    assert_eq!(after[..512], image[..512], "the header");
    // Every cluster that is in use has something in it.
    let clusters = after.chunks(512).zip(image.chunks(512));
    for (index, (after, before)) in clusters.enumerate() {
        let is_used = before.iter().any(|byte| *byte != 0);
        assert!(after == before || !is_used, "cluster {index}");
    }
    match ended.expect("nothing waits") {
        Err(SnapshotError::Failed(error)) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn counts_of_one_bit_count_no_snapshot() {
    let (_, image) = sound(0, false);
    assert_eq!(refusal(&image, false), "Invalid argument");
}

#[test]
fn damage_is_not_built_upon() {
    let text = "The image is damaged, repair it first";
    let (_, good) = sound(4, true);
    let header = Header::parse(&good, Access::ReadWrite).expect("it opens");
    // A reserved bit of an L1 entry.
    let mut reserved = good.clone();
    reserved[header.l1_table.0 as usize + 7] |= 1;
    assert_eq!(refusal(&reserved, false), text);
    // An entry of the refcount table.
    let mut unreadable = good.clone();
    unreadable[header.refcount_table.0 as usize + 14] = 1;
    assert_eq!(refusal(&unreadable, false), text);
}

#[test]
fn stored_counts_are_not_believed() {
    let (geometry, good) = sound(4, true);
    let header = Header::parse(&good, Access::ReadWrite).expect("it opens");
    let block = u64_at(&good, header.refcount_table.0 as usize) as usize;
    for cases in cases().iter().take(3) {
        // Clusters of data and of tables are counted as free, one that is free is counted.
        let mut image = good.clone();
        for (cluster, count) in [(3, 0), (4, 0), (9, 0), (10, 0), (13, 0), (14, 7)] {
            let block = &mut image[block..block + 512];
            assert!(put_refcount(&geometry, block, cluster, count));
        }
        let case = Case {
            told: cases.told.clone(),
            image,
            deed: cases.deed,
            disk: DiskOptions::default(),
        };
        let file = storage(&case.image);
        let ended = run(case.run(&file, &Unwatched), || false).expect("nothing waits");
        ended.expect("done");
        let is_new = Judge::of(&case).look(&bytes_of(&file), &case.told);
        assert!(is_new, "{}", case.told);
    }
}

#[test]
fn snapshots_that_cannot_be_applied() {
    let (_, good) = sound(4, true);
    let header = Header::parse(&good, Access::ReadWrite).expect("it opens");
    let entry = header.snapshot_table.0 as usize;
    let put = |at: usize, value: &[u8]| {
        let mut bytes = good.clone();
        bytes[entry + at..entry + at + value.len()].copy_from_slice(value);
        bytes
    };
    let load = "Failed to load snapshot: ";
    for (image, text) in [
        (
            put(0, &(1_u64 << 40).to_be_bytes()),
            "Snapshot L1 table offset invalid",
        ),
        (put(6, &[1]), "Snapshot L1 table offset invalid"),
        (
            put(8, &u32::MAX.to_be_bytes()),
            "Snapshot L1 table too large",
        ),
        (put(48, &(1_u64 << 60).to_be_bytes()), "File too large"),
    ] {
        assert_eq!(refusal(&image, true), format!("{load}{text}"));
    }
}

#[test]
fn whatever_stands_in_an_image_nothing_gets_worse() {
    let cases = cases();
    each_seed(
        "blockyard-images",
        "whatever_stands_in_an_image_nothing_gets_worse",
        4000,
        |number| {
            let seed = Seed::new(number);
            let case = seed.pick(&cases);
            let mut bytes = case.image.clone();
            let cluster = Header::parse(&bytes, Access::Check)
                .expect("it opens")
                .geometry
                .cluster_bytes();
            // Somewhere in the tables, which are at the front.
            for _ in 0..=seed.below(2) {
                let at = seed.below(cluster * 9) / 8 * 8 + seed.below(8);
                bytes[at as usize] = match seed.below(3) {
                    0 => 0,
                    1 => 0xff,
                    _ => seed.any() as u8,
                };
            }
            let before = ours(&bytes);
            let file = storage(&bytes);
            let ended = run(case.run(&file, &Unwatched), || false).expect("nothing waits");
            if ended.is_err() {
                return;
            }
            // It was taken for sound enough: then it is sound now.
            let after = ours(&bytes_of(&file)).expect("checked").report;
            let before = before.expect("checked").report;
            assert_eq!(
                after.corruptions + after.check_errors,
                0,
                "{before:?} {after:?}"
            );
        },
    );
}
