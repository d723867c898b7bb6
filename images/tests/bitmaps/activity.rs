//! The name under which recent changes are recorded: it counts only until somebody writes who does not record.

use std::rc::Rc;

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::create::CreateOptions;
use blockyard_images::qcow2::layout::extensions::ActivityId;
use blockyard_images::qcow2::layout::header::{Access, Header, autoclear};
use blockyard_images::qcow2::snapshot::{NewSnapshot, SnapshotChoice, apply, create, delete};
use blockyard_images::qcow2::{Options, Qcow2};
use blockyard_simulator::{DiskOptions, World, run};
use blockyard_storage::{ByteRange, Storage};

use crate::bits::{Bits, Wanted, bytes_of, kept, memory, new_image, now, store, with_image};
use crate::oracle::Oracle;
use crate::verdict::ours;

const DISK_BYTES: u64 = 3 << 20;
const FIRST: ActivityId = ActivityId(*b"the first of all");
const SECOND: ActivityId = ActivityId(*b"\0\x01\x02the second\xff\xff\xff");

fn header(image: &[u8]) -> Header {
    Header::parse(image, Access::ReadOnly).expect("a header")
}

fn bitmaps() -> [Wanted; 2] {
    ["one", "two"].map(|name| Wanted {
        name,
        granularity_bytes: 65_536,
        auto: name == "one",
        bits: Bits::of(DISK_BYTES, 65_536, &[(1, 3)]),
    })
}

/// Images with two bitmaps. Small clusters have no room for the names of features; with a backing file's name the extensions go over
/// the end of the first sector.
fn images() -> impl Iterator<Item = Vec<u8>> {
    let all = [(512, 0), (4096, 30), (8192, 90), (65_536, 0), (65_536, 7)];
    all.into_iter().map(|(cluster_bytes, name_bytes)| {
        let mut options = CreateOptions::new(DISK_BYTES);
        options.cluster_bytes = cluster_bytes;
        if name_bytes > 0 {
            options.backing_name = Some(vec![b'b'; name_bytes]);
            options.backing_format = Some("raw".to_owned());
        }
        with_image(&new_image(&options), async |image| {
            store(image, &bitmaps()).await.expect("stored");
        })
    })
}

fn check(image: &[u8]) {
    let verdict = ours(image).expect("checked");
    let report = verdict.report;
    let wrong = report.corruptions + report.check_errors + report.leaks;
    assert_eq!(wrong, 0, "{:?}", verdict.lines);
}

/// The image as somebody leaves it who records and is killed.
fn left(image: &[u8]) -> Vec<u8> {
    with_image(image, async |image| {
        image.mark_bitmaps_in_use().await.expect("marked");
        image.begin_activity(FIRST).await.expect("there is room");
        let range = ByteRange::new(0, 65_536);
        image.discard(range, true).await.expect("written");
        image.flush().await.expect("flushed");
        image.begin_activity(SECOND).await.expect("there is room");
    })
}

#[test]
fn a_name_stays_as_long_as_all_is_recorded() {
    for image in images() {
        let left = left(&image);
        assert_eq!(header(&left).activity(), Some(SECOND));
        check(&left);
        let removed = with_image(&left, async |image| {
            image.continue_activity();
            assert!(image.remove_bitmap(b"two").await.expect("removed"));
            let range = ByteRange::new(65_536, 65_536);
            image.discard(range, true).await.expect("written");
        });
        assert_eq!(header(&removed).activity(), Some(SECOND));
        assert_eq!(kept(&removed).expect("loaded").len(), 1);
        check(&removed);
        let stored = with_image(&left, async |image| {
            image.continue_activity();
            store(image, &bitmaps()).await.expect("stored");
        });
        let ended = with_image(&left, async |image| {
            image.end_activity().await.expect("ended");
            image.end_activity().await.expect("it has ended");
        });
        for image in [stored, ended] {
            let header = header(&image);
            assert_eq!(
                (header.activity(), header.extensions.activity),
                (None, None)
            );
            assert!(header.bitmaps_valid());
            check(&image);
        }
    }
}

#[test]
fn a_snapshot_takes_nothing_away() {
    for image in images() {
        let file = memory(&left(&image));
        let storage: Rc<dyn Storage> = file.clone();
        let is_recorded = || header(&bytes_of(&*file)).activity() == Some(SECOND);
        let new = NewSnapshot {
            name: b"s".to_vec(),
            date_seconds: 1,
            date_nanoseconds: 0,
            vm_clock_nanoseconds: 0,
        };
        now(create(&storage, &new, false, &Unwatched)).expect("made");
        assert!(is_recorded());
        let choice = SnapshotChoice::Name(b"s".to_vec());
        let applied = now(apply(&storage, &choice, false, &Unwatched));
        applied.expect_err("bitmaps would say nothing of it");
        assert!(is_recorded());
        let file = memory(&left(&image));
        let storage: Rc<dyn Storage> = file.clone();
        now(create(&storage, &new, false, &Unwatched)).expect("made");
        now(delete(&storage, &choice, false, &Unwatched)).expect("deleted");
        assert_eq!(header(&bytes_of(&*file)).activity(), Some(SECOND));
        check(&bytes_of(&*file));
    }
}

/// Here as well as in QEMU: the first change by somebody who does not record ends it.
#[test]
fn whoever_does_not_record_takes_the_promise_away() {
    for image in images() {
        let left = left(&image);
        let looked_at = with_image(&left, async |_| {});
        assert_eq!(header(&looked_at).activity(), Some(SECOND));
        let changed = [
            with_image(&left, async |image| {
                let range = ByteRange::new(65_536, 65_536);
                image.discard(range, true).await.expect("written");
            }),
            with_image(&left, async |image| {
                image.remove_bitmap(b"two").await.expect("removed");
            }),
        ];
        for image in changed {
            let header = header(&image);
            assert_eq!(header.activity(), None);
            assert!(header.bitmaps_valid(), "they are there, inconsistent");
            check(&image);
        }
    }
}

#[test]
fn qemu_takes_the_promise_away_and_minds_nothing_else() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    const NAME: &str = "image.qcow2";
    for image in images() {
        if header(&image).backing_name.is_some() {
            continue;
        }
        let left = left(&image);
        let write = |image: &[u8], tool: &str, arguments: &[&str]| {
            oracle.write(NAME, image);
            let output = oracle.run(tool, arguments);
            assert!(output.status.success(), "{arguments:?}: {output:?}");
            let said = oracle.qemu_img(&["check", NAME]);
            assert!(said.contains("No errors were found"), "{said}");
            oracle.read(NAME)
        };
        for looks in [&["info", NAME][..], &["compare", NAME, NAME]] {
            let image = write(&left, "qemu-img", looks);
            assert_eq!(header(&image).activity(), Some(SECOND), "{looks:?}");
        }
        for (tool, changes) in [
            ("qemu-io", &["-c", "write 0 4k", NAME][..]),
            ("qemu-img", &["snapshot", "-c", "new", NAME]),
            ("qemu-img", &["bitmap", "--remove", NAME, "two"]),
        ] {
            let image = write(&left, tool, changes);
            let header = header(&image);
            assert_eq!(header.activity(), None, "{changes:?}");
            let bits = header.autoclear & autoclear::ACTIVITY;
            assert_eq!(bits, 0, "{changes:?}");
        }
    }
}

#[test]
fn the_power_goes_and_one_name_or_the_other_counts() {
    let mut seen = [0, 0];
    for image in images() {
        let before = with_image(&image, async |image| {
            image.mark_bitmaps_in_use().await.expect("marked");
            image.begin_activity(FIRST).await.expect("there is room");
        });
        for steps in 0.. {
            let world = World::new(steps);
            let options = DiskOptions {
                length_bytes: before.len() as u64,
                ..DiskOptions::default()
            };
            let disk = world.disk("image", options);
            disk.fill(0, &before);
            let file: Rc<dyn Storage> = disk.open();
            let work = async {
                let image = Qcow2::open(Rc::clone(&file), None, Options::default()).await;
                let image = image.expect("it opens");
                image.continue_activity();
                image.begin_activity(SECOND).await.expect("there is room");
            };
            let ended = run(work, || world.steps() < steps && world.step()).is_some();
            for seed in 0..3 {
                let image = disk.bytes_after_cut(seed);
                let id = header(&image).activity();
                assert!([Some(FIRST), Some(SECOND)].contains(&id), "{id:?}");
                assert!(!ended || id == Some(SECOND), "it is durable");
                seen[usize::from(id == Some(SECOND))] += 1;
                assert_eq!(kept(&image).expect("loaded").len(), 2);
                check(&image);
            }
            if ended {
                break;
            }
        }
    }
    assert!(seen.iter().all(|count| *count > 10), "{seen:?}");
}

#[test]
fn an_image_without_room_for_it_is_left_alone() {
    let mut options = CreateOptions::new(DISK_BYTES);
    options.cluster_bytes = 512;
    options.backing_name = Some(vec![b'b'; 360]);
    options.backing_format = Some("raw".to_owned());
    let full = new_image(&options);
    let same = with_image(&full, async |image| {
        let refused = image.begin_activity(FIRST).await.expect_err("refused");
        assert!(refused.to_string().contains("no room"), "{refused}");
        image
            .discard(ByteRange::new(0, 65_536), true)
            .await
            .expect("it goes on");
    });
    assert_eq!(header(&same).activity(), None);
    options.version = blockyard_images::qcow2::units::Version::V2;
    with_image(&new_image(&options), async |image| {
        let refused = image.begin_activity(FIRST).await.expect_err("refused");
        assert!(refused.to_string().contains("version 2"), "{refused}");
    });
}
