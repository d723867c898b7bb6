//! Whenever the power goes and whatever fails: the old bitmaps, marked, or the new ones; the image is sound, and what it leaks is
//! no more than what was being written.

use std::rc::Rc;

use blockyard_images::ImageError;
use blockyard_images::qcow2::create::CreateOptions;
use blockyard_images::qcow2::{Options, Qcow2};
use blockyard_simulator::{Disk, DiskOptions, Fault, World, run};
use blockyard_storage::error::EIO;
use blockyard_storage::{ByteRange, Storage};

use crate::bits::{AllKept, Bits, Wanted, all_kept, kept, new_image, store, with_image};
use crate::verdict::ours;

const DISK_BYTES: u64 = 3 << 20;

fn wanted(name: &'static str, granularity_bytes: u64, shift: u64) -> Wanted {
    let runs = [(shift, shift + 9), (100 + shift, 101 + shift)];
    Wanted {
        name,
        granularity_bytes,
        auto: shift != 2,
        bits: Bits::of(DISK_BYTES, granularity_bytes, &runs),
    }
}

/// An image, what it has before, and what is done to it.
struct Case {
    told: String,
    image: Vec<u8>,
    before: Vec<Wanted>,
    after: Vec<Wanted>,
    removes: Option<&'static str>,
}

fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    let old = vec![wanted("one", 512, 1), wanted("two", 65_536, 2)];
    let more = [wanted("one", 512, 5), wanted("three", 1024, 3)];
    // Clusters of 512 bytes have no room for the names of features, others have; with a backing file's name the extension goes
    // over the end of the first sector, or starts behind it.
    for (cluster_bytes, name_bytes) in [(512, 0), (4096, 30), (8192, 0), (8192, 90), (65_536, 7)] {
        let mut options = CreateOptions::new(DISK_BYTES);
        options.cluster_bytes = cluster_bytes;
        if name_bytes > 0 {
            options.backing_name = Some(vec![b'b'; name_bytes]);
            options.backing_format = Some("raw".to_owned());
        }
        let empty = new_image(&options);
        let full = with_image(&empty, async |image| {
            store(image, &old).await.expect("stored");
        });
        for (image, before, after, removes) in [
            (&empty, &[][..], &old[..], None),
            (&full, &old[..], &more[..], None),
            (&full, &old[..], &[][..], Some("one")),
            (&empty, &[][..], &old[..1], Some("one")),
        ] {
            all.push(Case {
                told: format!("{cluster_bytes} {name_bytes} {} {removes:?}", after.len()),
                image: image.clone(),
                before: before.to_vec(),
                after: after.to_vec(),
                removes,
            });
        }
    }
    all
}

impl Case {
    fn disk(&self, seed: u64) -> (World, Disk) {
        let world = World::new(seed);
        let options = DiskOptions {
            length_bytes: self.image.len() as u64,
            ..DiskOptions::default()
        };
        let disk = world.disk("image", options);
        disk.fill(0, &self.image);
        (world, disk)
    }

    async fn run(&self, file: &Rc<dyn Storage>) -> Result<(), ImageError> {
        let image = Qcow2::open(Rc::clone(file), None, Options::default()).await?;
        image.mark_bitmaps_in_use().await?;
        // The disk changes, as it is not what the bitmaps said before.
        image.discard(ByteRange::new(0, 65_536), true).await?;
        store(&image, &self.after).await?;
        if let Some(name) = self.removes {
            image.remove_bitmap(name.as_bytes()).await?;
        }
        image.close().await
    }

    /// The same, on a disk that is full when bitmaps are to be stored.
    async fn run_without_room(&self, disk: &Disk) -> Result<(), ImageError> {
        let file: Rc<dyn Storage> = disk.open();
        let image = Qcow2::open(file, None, Options::default()).await?;
        image.mark_bitmaps_in_use().await?;
        image.discard(ByteRange::new(0, 65_536), true).await?;
        image.flush().await?;
        disk.set_capacity(Some(disk.allocated_bytes()));
        store(&image, &self.after).await?;
        image.close().await
    }

    /// What has to be there in the end.
    fn outcome(&self) -> AllKept {
        let mut all = all_kept(&self.before);
        if !self.before.is_empty() {
            all.values_mut().for_each(|one| one.bits = None);
        }
        all.extend(all_kept(&self.after));
        all.retain(|name, _| self.removes != Some(name));
        all
    }

    /// Whether it is the old set before anything was marked; panics where it is none of those it may be.
    fn look(&self, image: &[u8], told: &str) -> Phase {
        let verdict = ours(image).expect("checked");
        let wrong = verdict.report.corruptions + verdict.report.check_errors;
        assert_eq!(wrong, 0, "{told}: {:?}", verdict.lines);
        let all = kept(image).unwrap_or_else(|error| panic!("{told}: {error}"));
        let stored = {
            let mut all = self.outcome();
            if let Some(name) = self.removes {
                let before = all_kept(&self.after).remove(name);
                let before = before.or_else(|| {
                    let mut old = all_kept(&self.before).remove(name)?;
                    old.bits = None;
                    Some(old)
                });
                all.extend(before.map(|one| (name.to_owned(), one)));
            }
            all
        };
        if all == self.outcome() {
            return Phase::Done;
        }
        if all == stored {
            return Phase::Stored;
        }
        let before = all_kept(&self.before);
        assert_eq!(all.len(), before.len(), "{told}: {all:?}");
        for (name, old) in before {
            let now = &all[&name];
            let same = now.granularity_bytes == old.granularity_bytes && now.auto == old.auto;
            assert!(
                same && (now.bits.is_none() || now.bits == old.bits),
                "{told}"
            );
        }
        let unmarked = all.values().any(|one| one.bits.is_some());
        if unmarked { Phase::Old } else { Phase::Marked }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Phase {
    Old,
    Marked,
    Stored,
    Done,
}

#[test]
fn a_power_cut_at_any_step_leaves_old_marked_or_new_bitmaps() {
    let mut seen = [0; 4];
    for case in cases() {
        let outcome = case.outcome();
        for steps in 0.. {
            let told = format!("{} cut after {steps}", case.told);
            let (world, disk) = case.disk(steps * 31 + 7);
            let file: Rc<dyn Storage> = disk.open();
            let ended = run(case.run(&file), || world.steps() < steps && world.step());
            if let Some(ended) = ended {
                ended.expect(&told);
                assert!(steps > 5, "{told}");
                for seed in 0..4 {
                    let image = disk.bytes_after_cut(seed);
                    assert_eq!(kept(&image).expect(&told), outcome, "{told}: durable");
                    assert_eq!(case.look(&image, &told), Phase::Done);
                }
                let verdict = ours(&disk.bytes()).expect("checked");
                assert_eq!(verdict.report.leaks, 0, "{told}: {:?}", verdict.lines);
                break;
            }
            for seed in 0..2 {
                let phase = case.look(&disk.bytes_after_cut(seed), &told);
                seen[phase as usize] += 1;
            }
        }
    }
    assert!(seen.iter().all(|count| *count > 10), "{seen:?}");
}

#[test]
fn the_disk_never_changes_below_a_bitmap_that_does_not_say_so() {
    // The first discard is behind the mark: once the disk is another, nothing that recorded before is valid as it was.
    let marked = |case: &Case| !case.before.is_empty() && case.removes.is_none();
    for case in cases().into_iter().filter(marked) {
        let (world, disk) = case.disk(3);
        let file: Rc<dyn Storage> = disk.open();
        let image = run(
            async {
                let image = Qcow2::open(Rc::clone(&file), None, Options::default()).await;
                let image = image.expect("it opens");
                image.mark_bitmaps_in_use().await.expect("marked");
                image
            },
            || world.step(),
        );
        drop(image.expect("it ends"));
        let phase = case.look(&disk.bytes_after_cut(9), &case.told);
        assert_eq!(phase, Phase::Marked, "{}: it is durable", case.told);
    }
}

#[test]
fn whatever_fails_no_bitmap_claims_what_is_not_so() {
    let mut failures = 0;
    for case in cases() {
        for nth in 1.. {
            let told = format!("{} operation {nth} fails", case.told);
            let (world, disk) = case.disk(nth);
            world.add_fault(Fault::fails(EIO).nth(nth));
            let file: Rc<dyn Storage> = disk.open();
            let ended = run(case.run(&file), || world.step()).expect("it ends");
            case.look(&disk.bytes(), &told);
            case.look(&disk.bytes_after_cut(nth), &told);
            if world.failures() == 0 {
                ended.expect(&told);
                break;
            }
            failures += 1;
            if ended.is_ok() {
                assert_eq!(case.look(&disk.bytes(), &told), Phase::Done, "{told}");
            }
        }
    }
    assert!(failures > 200, "{failures}");
}

#[test]
fn a_full_disk_keeps_what_it_has() {
    let mut refused = 0;
    let stores_more = |case: &Case| !case.before.is_empty() && case.removes.is_none();
    for case in cases().into_iter().filter(stores_more) {
        let (world, disk) = case.disk(5);
        let ended = run(case.run_without_room(&disk), || world.step()).expect("it ends");
        let Err(error) = ended else {
            continue;
        };
        refused += 1;
        let told = &case.told;
        assert!(
            error.to_string().starts_with("'three': "),
            "{told}: {error}"
        );
        let all = kept(&disk.bytes()).expect(told);
        assert!(
            !all.contains_key("three") && all["two"].bits.is_none(),
            "{told}"
        );
        assert_tells(&all, &case.after[0], told);
    }
    assert!(refused > 0);
}

/// Whether a bitmap has all bits that are wanted, and perhaps more.
fn assert_tells(all: &AllKept, wanted: &Wanted, told: &str) {
    let bits = all[wanted.name].bits.as_ref();
    let bits = bits.unwrap_or_else(|| panic!("{told}: '{}' is in use", wanted.name));
    let missing = wanted
        .bits
        .0
        .iter()
        .zip(&bits.0)
        .position(|(wanted, bit)| *wanted && !bit);
    assert_eq!(missing, None, "{told}: '{}'", wanted.name);
}

#[test]
fn without_room_bitmaps_say_too_much_and_never_too_little() {
    let mut cuts = 0;
    let clear = |bits: &mut Wanted| bits.bits.0.fill(false);
    for cluster_bytes in [512, 4096, 65_536] {
        let mut before = vec![
            wanted("one", 512, 1),
            wanted("two", 65_536, 2),
            wanted("three", 512, 3),
        ];
        clear(&mut before[2]);
        // Where there is a cluster, bits are exact; where there is none, all are set.
        let mut after = vec![
            wanted("one", 512, 5),
            before[1].clone(),
            wanted("three", 512, 7),
        ];
        after[0].auto = false;
        let image = with_image(
            &new_image(&CreateOptions {
                cluster_bytes,
                ..CreateOptions::new(DISK_BYTES)
            }),
            async |image| {
                store(image, &before).await.expect("stored");
            },
        );
        let case = Case {
            told: format!("{cluster_bytes}"),
            image,
            before,
            after,
            removes: None,
        };
        for steps in 0.. {
            let told = format!("{} cut after {steps}", case.told);
            let (world, disk) = case.disk(steps * 29 + 3);
            let ended = run(case.run_without_room(&disk), || {
                world.steps() < steps && world.step()
            });
            let ends = ended.is_some();
            for seed in 0..3 {
                let image = disk.bytes_after_cut(seed);
                let verdict = ours(&image).expect("checked");
                let wrong = verdict.report.corruptions + verdict.report.check_errors;
                assert_eq!(wrong, 0, "{told}: {:?}", verdict.lines);
                let all = kept(&image).expect(&told);
                assert_eq!(all.len(), 3, "{told}");
                for (wanted, old) in case.after.iter().zip(&case.before) {
                    let bits = all[wanted.name].bits.as_ref();
                    if ends || bits.is_some_and(|bits| *bits != old.bits) {
                        assert_tells(&all, wanted, &told);
                    }
                }
                if ends {
                    assert_eq!(verdict.report.leaks, 0, "{told}: {:?}", verdict.lines);
                    assert_eq!(all["two"], all_kept(&case.after)["two"], "{told}");
                    assert!(!all["one"].auto, "{told}");
                    let all_set = |name: &str| {
                        all[name]
                            .bits
                            .as_ref()
                            .is_some_and(|bits| bits.0.iter().all(|bit| *bit))
                    };
                    assert!(!all_set("one"), "{told}");
                    assert_eq!(all_set("three"), cluster_bytes > 512, "{told}");
                }
            }
            if let Some(ended) = ended {
                ended.expect(&told);
                break;
            }
            cuts += 1;
        }
    }
    assert!(cuts > 50, "{cuts}");
}
