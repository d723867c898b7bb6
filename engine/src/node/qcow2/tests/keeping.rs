//! Bitmaps that the image keeps, while its disk is written, opened in other ways, and the power goes: none that is valid afterwards
//! has missed a change.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::amend::AmendOptions;
use blockyard_images::qcow2::units::Version;
use blockyard_simulator::{Seed, each_seed};
use blockyard_storage::{Buffer, ByteRange, ZeroMode};
use futures_util::future::join3;
use tempfile::{TempDir, tempdir, tempdir_in};

use super::reopening::plan;
use super::snapshots::create;
use super::yard::{DataFile, Setup, Yard};
use crate::bitmap::{Bitmap, Need, NodeBitmaps};
use crate::node::Node;
use crate::node::build::build;
use crate::node::dirty_map::DirtyMap;
use crate::state::{MARKS_SUFFIX, StateDir};

const NAME: &str = "b";
const GRANULE: u64 = 512;

/// The image as a node with what it keeps.
struct Opened {
    node: Rc<dyn Node>,
    bitmaps: Arc<NodeBitmaps>,
}

async fn open(yard: &Yard, read_only: bool) -> Opened {
    open_with(yard, read_only, None).await
}

async fn open_with(yard: &Yard, read_only: bool, state: Option<&StateDir>) -> Opened {
    let bitmaps = Arc::new(NodeBitmaps::recorded_in(state.cloned()));
    let plan = plan(yard, read_only, 1 << 16);
    let built = build(&yard.context, "image", &plan, Arc::clone(&bitmaps)).await;
    Opened {
        node: built.expect("an image").node,
        bitmaps,
    }
}

impl Opened {
    async fn close(&self) {
        self.node.flush().await.expect("flushed");
        self.node.store_bitmaps().await.expect("stored");
        self.node.close().await.expect("closed");
    }

    async fn content(&self) -> Vec<u8> {
        let length = self.node.facts().length_bytes as usize;
        let read = self.node.read(0, Buffer::zeroed(length)).await;
        read.outcome.expect("read");
        read.buffer.as_slice().to_vec()
    }

    /// What the bitmap says has changed; `None`: nothing can be said.
    fn changed(&self) -> Option<DirtyMap> {
        let map = self.bitmaps.with(NAME, Need::Read, |one| one.map().clone());
        map.ok()
    }
}

/// Writes, and whatever else comes to a node, until it is closed. What may have changed is put among `written` before.
async fn session(
    yard: &Yard,
    dice: &Seed,
    written: &RefCell<Vec<ByteRange>>,
    state: Option<&StateDir>,
) {
    let opened = open_with(yard, false, state).await;
    assert!(opened.changed().is_some(), "it was stored");
    let length = opened.node.facts().length_bytes;
    for _ in 0..dice.below(8) {
        let offset = GRANULE * dice.below(length / GRANULE);
        let longest = (length - offset).min(5 << 10);
        let range = ByteRange::new(offset, 1 + dice.below(longest));
        match dice.below(10) {
            0 => opened.node.flush().await.expect("flushed"),
            1 => {
                for read_only in [true, false] {
                    let plan = plan(yard, read_only, 1 << 14);
                    let reopened = opened.node.reopen(&yard.context, &plan).await;
                    reopened.expect("opened in another way");
                }
            }
            5 => {
                let options = amendment(dice);
                let amended = opened.node.amend(&options, &Unwatched).await;
                amended.expect("amended");
                if dice.one_in(2) {
                    opened.node.record_bitmaps().await;
                }
            }
            // Counts of one bit do not allow it.
            3 => drop(opened.node.change_snapshots(create("s")).await),
            2 => {
                written.borrow_mut().push(range);
                let zeroed = opened.node.zero(range, ZeroMode::default()).await;
                zeroed.expect("zeroed");
            }
            4 => {
                // As of its own accord, while others write.
                let other = ByteRange::new(GRANULE * dice.below(length / GRANULE), GRANULE);
                written.borrow_mut().extend([range, other]);
                let write = |range: ByteRange| {
                    let bytes = vec![dice.any() as u8; range.length() as usize];
                    opened.node.write(range.offset(), Buffer::copy_of(&bytes))
                };
                let anew = opened.node.record_bitmaps();
                let (first, (), second) = join3(write(range), anew, write(other)).await;
                first.outcome.and(second.outcome).expect("written");
            }
            _ => {
                written.borrow_mut().push(range);
                let fill = dice.any() as u8;
                let bytes = vec![fill; range.length() as usize];
                let wrote = opened.node.write(offset, Buffer::copy_of(&bytes)).await;
                wrote.outcome.expect("written");
            }
        }
    }
    opened.close().await;
}

/// What rewrites the header, and shows the same disk.
fn amendment(dice: &Seed) -> AmendOptions {
    let named = dice.one_in(2);
    AmendOptions {
        backing_name: named.then(|| vec![b'x'; 1 + dice.below(40) as usize]),
        backing_format: named.then(|| b"raw".to_vec()),
        lazy_refcounts: dice.one_in(2).then(|| dice.one_in(2)),
        refcount_bits: dice.one_in(2).then(|| 16 << dice.below(3)),
        ..AmendOptions::default()
    }
}

/// Every granule that is another than it was has changed according to the map, and none that nobody has written to.
/// `coarse`: that far around what was written others may have changed, too.
fn look(map: &DirtyMap, before: &[u8], now: &[u8], written: &[ByteRange], coarse: u64, told: &str) {
    for (index, (old, new)) in before.chunks(512).zip(now.chunks(512)).enumerate() {
        let granule = ByteRange::new(index as u64 * GRANULE, GRANULE);
        let is_dirty = map.run_in(granule).is_some();
        assert!(
            old == new || is_dirty,
            "{told}: a change at {granule:?} is missed"
        );
        let start = granule.offset().saturating_sub(coarse);
        let around = ByteRange::between(start, granule.end() + coarse);
        let is_written = written.iter().any(|range| range.overlaps(&around));
        assert!(
            is_written || !is_dirty,
            "{told}: {granule:?} is what it was"
        );
    }
}

/// A folder where syncs cost nothing, if there is one.
fn in_memory() -> TempDir {
    let folder = tempdir_in("/dev/shm").or_else(|_| tempdir());
    folder.expect("a folder")
}

fn setup(seed: u64) -> Setup {
    let any = Setup::random(seed);
    Setup {
        version: Version::V3,
        data_file: DataFile::Inside,
        // A disk without length keeps none.
        size_bytes: any.size_bytes.max(GRANULE),
        ..any
    }
}

#[test]
fn no_bitmap_that_is_valid_has_missed_a_change() {
    let seen = RefCell::new([0_u32; 3]);
    each_seed(
        "blockyard-engine",
        "no_bitmap_has_missed_a_change",
        60,
        |seed| {
            let setup = setup(seed);
            let dice = Seed::new(seed ^ 0xb17);
            let yard = Yard::new(setup);
            let before = yard.drive(async {
                let opened = open(&yard, false).await;
                let length = opened.node.facts().length_bytes;
                let mut bitmap = Bitmap::new(NAME.to_owned(), length, GRANULE);
                bitmap.keep();
                opened.bitmaps.add(bitmap).expect("added");
                opened.close().await;
                opened.content().await
            });
            let written = RefCell::default();
            for number in 0..4 {
                let told = format!("seed {seed} session {number}");
                let end = match dice.below(3) {
                    0 => yard.world.steps() + dice.below(60),
                    _ => u64::MAX,
                };
                let work = session(&yard, &dice, &written, None);
                let ended = yard.drive_while(work, || yard.world.steps() < end);
                if ended.is_none() {
                    yard.cut_power();
                }
                let (map, now) = yard.drive(async {
                    let opened = open(&yard, true).await;
                    (opened.changed(), opened.content().await)
                });
                let Some(map) = map else {
                    assert!(ended.is_none(), "{told}: it was closed");
                    seen.borrow_mut()[0] += 1;
                    return;
                };
                look(&map, &before, &now, &written.borrow(), 0, &told);
                seen.borrow_mut()[1 + usize::from(ended.is_none())] += 1;
            }
        },
    );
    let seen = seen.into_inner();
    assert!(seen.iter().all(|count| *count > 1), "{seen:?}");
}

/// An image that is to be read only has no room for one of its bitmaps, so it is written on: what has been stored of the others says
/// nothing of what comes after.
#[test]
fn what_was_stored_in_vain_is_in_use() {
    let yard = Yard::new(Setup::new(3, 9));
    let add = |opened: &Opened, name: &str| {
        let length = opened.node.facts().length_bytes;
        let mut bitmap = Bitmap::new(name.to_owned(), length, GRANULE);
        bitmap.keep();
        opened.bitmaps.add(bitmap).expect("added");
    };
    yard.drive(async {
        let opened = open(&yard, false).await;
        add(&opened, NAME);
        opened.close().await;
        let opened = open(&yard, false).await;
        add(&opened, "new");
        yard.image.set_capacity(Some(yard.image.allocated_bytes()));
        let for_reading = plan(&yard, true, 1 << 14);
        let reopened = opened.node.reopen(&yard.context, &for_reading).await;
        let refusal = reopened.expect_err("there is no room").to_string();
        assert!(refusal.contains("'new': "), "{refusal}");
        let now = open(&yard, true).await;
        assert!(now.changed().is_none(), "it is written on");
        yard.image.set_capacity(None);
        opened.close().await;
        let now = open(&yard, true).await;
        assert!(now.changed().is_some(), "there is room again");
    });
}

/// With a state directory no power cut loses a bitmap, however often it comes: neither one that was stored, nor one that has come
/// since, nor what was said of it since.
#[test]
fn no_power_cut_loses_a_bitmap_that_is_recorded() {
    let seen = RefCell::new([0_u32; 3]);
    each_seed(
        "blockyard-engine",
        "no_power_cut_loses_a_bitmap",
        100,
        |seed| {
            let dice = Seed::new(seed ^ 0xac7);
            let yard = Yard::new(setup(seed));
            let folder = in_memory();
            let state = StateDir::open_here(folder.path()).expect("made");
            let mut before = yard.drive(async {
                let opened = open_with(&yard, false, Some(&state)).await;
                let length = opened.node.facts().length_bytes;
                let mut bitmap = Bitmap::new(NAME.to_owned(), length, GRANULE);
                bitmap.keep();
                opened.bitmaps.add(bitmap).expect("added");
                opened.node.record_bitmaps().await;
                // The image itself does not have it before it is closed.
                if dice.one_in(2) {
                    opened.close().await;
                }
                opened.content().await
            });
            yard.cut_power();
            let written = RefCell::default();
            for number in 0..6 {
                let told = format!("seed {seed} session {number}");
                let end = yard.world.steps() + dice.below(120);
                let work = session(&yard, &dice, &written, Some(&state));
                let ended = yard.drive_while(work, || yard.world.steps() < end);
                yard.cut_power();
                let clears = dice.one_in(3);
                let read_only = !clears && dice.one_in(2);
                let (map, now) = yard.drive(async {
                    let opened = open_with(&yard, read_only, Some(&state)).await;
                    let found = (opened.changed(), opened.content().await);
                    if clears {
                        let clear = opened.bitmaps.with(NAME, Need::Change, Bitmap::clear);
                        clear.expect("it is usable");
                        opened.node.record_bitmaps().await;
                    }
                    found
                });
                let map = map.unwrap_or_else(|| panic!("{told}: the bitmap is lost"));
                look(&map, &before, &now, &written.borrow(), 4 * 4096, &told);
                seen.borrow_mut()[usize::from(ended.is_none())] += 1;
                if clears {
                    yard.cut_power();
                    before = now;
                    written.borrow_mut().clear();
                    seen.borrow_mut()[2] += 1;
                }
            }
        },
    );
    let seen = seen.into_inner();
    assert!(seen.iter().all(|count| *count > 20), "{seen:?}");
}

#[test]
fn what_is_recorded_goes_when_bitmaps_are_stored() {
    let dice = Seed::new(5);
    let yard = Yard::new(setup(5));
    let folder = in_memory();
    let state = StateDir::open_here(folder.path()).expect("made");
    let files = || {
        let files = std::fs::read_dir(folder.path().join("bitmaps"));
        files.expect("a folder").count()
    };
    yard.drive(async {
        let opened = open_with(&yard, false, Some(&state)).await;
        assert_eq!(files(), 0);
        let length = opened.node.facts().length_bytes;
        let mut bitmap = Bitmap::new(NAME.to_owned(), length, GRANULE);
        bitmap.keep();
        opened.bitmaps.add(bitmap).expect("added");
        opened.node.record_bitmaps().await;
        assert_eq!(files(), 2, "the bitmaps, and what has changed since");
        opened.node.record_bitmaps().await;
        assert_eq!(files(), 2);
        opened.close().await;
        assert_eq!(files(), 0);
        session(&yard, &dice, &RefCell::default(), Some(&state)).await;
        assert_eq!(files(), 0);
        let opened = open_with(&yard, false, Some(&state)).await;
        assert_eq!(files(), 2);
        opened.bitmaps.take_out(NAME).expect("it is there");
        opened.node.record_bitmaps().await;
        assert_eq!(files(), 0, "there is nothing to record");
        opened.close().await;
    });
}

/// Where the state directory cannot be written any more the disk goes on, and a crash leaves what it leaves everybody: bitmaps that
/// nobody takes for good ones.
#[test]
fn a_state_directory_that_fails_costs_no_write_and_no_bitmap_claims_too_much() {
    let seen = RefCell::new([0_u32; 2]);
    each_seed("blockyard-engine", "a_state_directory_fails", 40, |seed| {
        let dice = Seed::new(seed ^ 0xfa11);
        let yard = Yard::new(setup(seed));
        let folder = in_memory();
        let state = StateDir::open_here(folder.path()).expect("made");
        yard.drive(async {
            let opened = open_with(&yard, false, Some(&state)).await;
            let length = opened.node.facts().length_bytes;
            let mut bitmap = Bitmap::new(NAME.to_owned(), length, GRANULE);
            bitmap.keep();
            opened.bitmaps.add(bitmap).expect("added");
            opened.close().await;
        });
        let before = yard.drive(async { open(&yard, true).await.content().await });
        let written = RefCell::<Vec<ByteRange>>::default();
        let end = yard.world.steps() + 20 + dice.below(100);
        let work = async {
            let opened = open_with(&yard, false, Some(&state)).await;
            state.fail_marks(true);
            let length = opened.node.facts().length_bytes;
            for _ in 0..4 {
                let offset = GRANULE * dice.below(length / GRANULE);
                let range = ByteRange::new(offset, GRANULE);
                written.borrow_mut().push(range);
                let bytes = Buffer::copy_of(&[dice.any() as u8; GRANULE as usize]);
                let wrote = opened.node.write(offset, bytes).await;
                wrote.outcome.expect("it goes on");
            }
            opened.node.flush().await.expect("flushed");
        };
        yard.drive_while(work, || yard.world.steps() < end);
        state.fail_marks(false);
        yard.cut_power();
        let (map, now) = yard.drive(async {
            let opened = open_with(&yard, true, Some(&state)).await;
            (opened.changed(), opened.content().await)
        });
        seen.borrow_mut()[usize::from(map.is_none())] += 1;
        if let Some(map) = map {
            let told = format!("seed {seed}");
            look(&map, &before, &now, &written.borrow(), 4 * 4096, &told);
        }
    });
    let seen = seen.into_inner();
    assert!(seen.iter().all(|count| *count > 1), "{seen:?}");
}

/// What is recorded and cannot be read right now is not taken for nothing: it stays, and nobody writes to the image until it can be.
#[test]
fn a_record_that_cannot_be_read_is_kept() {
    for suffix in ["", MARKS_SUFFIX] {
        let yard = Yard::new(setup(5));
        let folder = in_memory();
        let state = StateDir::open_here(folder.path()).expect("made");
        yard.drive(async {
            let opened = open_with(&yard, false, Some(&state)).await;
            let length = opened.node.facts().length_bytes;
            let mut bitmap = Bitmap::new(NAME.to_owned(), length, GRANULE);
            bitmap.keep();
            opened.bitmaps.add(bitmap).expect("added");
            opened.node.record_bitmaps().await;
            let wrote = opened.node.write(0, Buffer::copy_of(&[1; 512])).await;
            wrote.outcome.expect("written");
            opened.node.flush().await.expect("flushed");
        });
        yard.cut_power();
        let files = std::fs::read_dir(folder.path().join("bitmaps")).expect("a folder");
        let mut files = files.map(|file| file.expect("read").path());
        let is_field = |path: &PathBuf| path.to_string_lossy().ends_with(MARKS_SUFFIX);
        let record = files.find(|path| is_field(path) != suffix.is_empty());
        let record = record.expect("it is recorded");
        let hidden = folder.path().join("hidden");
        // A folder cannot be read as a file.
        std::fs::rename(&record, &hidden).expect("moved");
        std::fs::create_dir(&record).expect("made");
        yard.drive(async {
            let bitmaps = || Arc::new(NodeBitmaps::recorded_in(Some(state.clone())));
            let writing = plan(&yard, false, 1 << 16);
            let refused = build(&yard.context, "image", &writing, bitmaps()).await;
            let refused = refused.err().expect("refused").to_string();
            assert!(
                refused.starts_with("State directory: what was recorded of the image's bitmaps")
                    && refused.contains("directory (os error 21)"),
                "{refused}"
            );
            let opened = open_with(&yard, true, Some(&state)).await;
            assert!(opened.changed().is_none(), "nothing is known of it");
            let reopened = opened.node.reopen(&yard.context, &writing).await;
            assert_eq!(reopened.expect_err("refused").to_string(), refused);
            assert!(opened.content().await.starts_with(&[1; 512]));
            std::fs::remove_dir(&record).expect("removed");
            std::fs::rename(&hidden, &record).expect("moved back");
            let writing = plan(&yard, false, 1 << 16);
            let reopened = opened.node.reopen(&yard.context, &writing).await;
            reopened.expect("it can be read now");
            let map = opened.changed().expect("it is good");
            assert!(map.run_in(ByteRange::new(0, 512)).is_some());
            let offset = opened.node.facts().length_bytes - GRANULE;
            let wrote = opened.node.write(offset, Buffer::copy_of(&[2; 512])).await;
            wrote.outcome.expect("written");
            opened.node.flush().await.expect("flushed");
        });
        yard.cut_power();
        yard.drive(async {
            let opened = open_with(&yard, true, Some(&state)).await;
            let map = opened.changed().expect("it is good");
            let length = opened.node.facts().length_bytes;
            for offset in [0, length - GRANULE] {
                assert!(map.run_in(ByteRange::new(offset, GRANULE)).is_some());
            }
        });
    }
}

/// What was touched long ago counts as changed after a crash only until the bitmaps are written down anew; when it pays is known.
#[test]
fn what_has_gone_cold_is_forgotten_when_bitmaps_are_written_down_anew() {
    let region = 4096;
    let yard = Yard::new(Setup {
        size_bytes: 200 * region,
        ..Setup::new(5, 12)
    });
    let folder = in_memory();
    let state = StateDir::open_here(folder.path()).expect("made");
    let write = async |opened: &Opened, offset: u64| {
        let wrote = opened.node.write(offset, Buffer::copy_of(&[7; 512])).await;
        wrote.outcome.expect("written");
    };
    yard.drive(async {
        let opened = open_with(&yard, false, Some(&state)).await;
        let length = opened.node.facts().length_bytes;
        let mut bitmap = Bitmap::new(NAME.to_owned(), length, GRANULE);
        bitmap.keep();
        opened.bitmaps.add(bitmap).expect("added");
        opened.node.record_bitmaps().await;
        for region_number in (0..120).step_by(2) {
            write(&opened, region_number * region).await;
        }
        assert!(!opened.bitmaps.is_due(), "little is left as it is");
        for region_number in (120..200).step_by(2) {
            write(&opened, region_number * region).await;
        }
        assert!(opened.bitmaps.is_due());
        opened.node.record_bitmaps().await;
        assert!(!opened.bitmaps.is_due());
        write(&opened, 150 * region).await;
        opened.node.flush().await.expect("flushed");
    });
    yard.cut_power();
    let map = yard.drive(async {
        let opened = open_with(&yard, true, Some(&state)).await;
        opened.changed().expect("it is good")
    });
    for region_number in 0..200 {
        let start = region_number * region;
        let dirty = (start..start + region)
            .step_by(512)
            .filter(|at| map.run_in(ByteRange::new(*at, 512)).is_some());
        let expected = match region_number {
            150 => region / 512,
            even if even % 2 == 0 => 1,
            _ => 0,
        };
        assert_eq!(dirty.count() as u64, expected, "{region_number}");
    }
    // Where the directory fails, it is tried again.
    yard.drive(async {
        let opened = open_with(&yard, false, Some(&state)).await;
        state.fail_marks(true);
        write(&opened, 60 * region).await;
        assert!(!opened.bitmaps.is_recorded() && opened.bitmaps.is_due());
        state.fail_marks(false);
        opened.node.record_bitmaps().await;
        assert!(opened.bitmaps.is_recorded() && !opened.bitmaps.is_due());
    });
    yard.cut_power();
    let map = yard.drive(async {
        let opened = open_with(&yard, true, Some(&state)).await;
        opened.changed().expect("it is good again")
    });
    assert!(map.run_in(ByteRange::new(60 * region, 512)).is_some());
}
