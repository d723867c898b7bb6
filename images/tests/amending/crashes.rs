//! Whenever the power goes, whatever fails and whoever cancels: the image opens, holds what it held, and each of its options
//! has its old or its new value.

use std::rc::Rc;

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::amend::{AmendError, AmendOptions, amend};
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::units::{Geometry, Version};
use blockyard_simulator::{Disk, DiskOptions, Fault, World, run};
use blockyard_storage::Storage;
use blockyard_storage::error::EIO;

use crate::content::{Content, content};
use crate::handmade::{Kind, image};
use crate::verdict::ours;

/// An image and how it is amended.
pub(crate) struct Case {
    pub(crate) told: String,
    pub(crate) image: Vec<u8>,
    pub(crate) options: AmendOptions,
    pub(crate) disk: DiskOptions,
}

/// The options of an image that can be amended.
type Form = (Version, u32, bool);

fn form(image: &[u8]) -> Form {
    let header = Header::parse(image, Access::ReadWrite).expect("it opens");
    let geometry = header.geometry;
    (
        geometry.version(),
        geometry.refcount_bits(),
        header.lazy_refcounts(),
    )
}

fn geometry(version: Version, bits: u32, order: u32) -> Geometry {
    Geometry::new(version, bits, order, false).expect("allowed")
}

/// Every kind of amending on images of several kinds.
pub(crate) fn cases() -> Vec<Case> {
    use Version::{V2, V3};
    let zeroes = Kind {
        snapshot: true,
        zeroes: true,
        backing_name_bytes: 20,
        ..Kind::default()
    };
    let without_backing = Kind {
        backing_name_bytes: 0,
        ..zeroes
    };
    let old = Kind {
        zeroes: false,
        ..zeroes
    };
    let short = Kind {
        short_entry: true,
        ..old
    };
    // The name lies where the names of features go, and crosses sectors.
    let long = Kind {
        backing_name_bytes: 900,
        ..old
    };
    let extended = Kind {
        extension_bytes: 300,
        ..long
    };
    let upgrade = AmendOptions {
        version: Some(V3),
        ..AmendOptions::default()
    };
    let downgrade = AmendOptions {
        version: Some(V2),
        ..AmendOptions::default()
    };
    let width = |bits| AmendOptions {
        refcount_bits: Some(bits),
        ..AmendOptions::default()
    };
    let lazy = AmendOptions {
        lazy_refcounts: Some(true),
        ..AmendOptions::default()
    };
    let all_up = AmendOptions {
        refcount_bits: Some(64),
        lazy_refcounts: Some(true),
        ..upgrade.clone()
    };
    let all_down = AmendOptions {
        refcount_bits: Some(16),
        ..downgrade.clone()
    };
    let cases: Vec<(Geometry, Kind, AmendOptions)> = vec![
        (geometry(V3, 9, 4), zeroes, lazy),
        (geometry(V3, 9, 4), zeroes, width(64)),
        (geometry(V3, 9, 4), zeroes, width(2)),
        (geometry(V3, 12, 1), zeroes, width(32)),
        (geometry(V3, 16, 3), zeroes, width(4)),
        (geometry(V2, 9, 4), old, upgrade.clone()),
        (geometry(V2, 12, 4), short, upgrade.clone()),
        (geometry(V2, 13, 4), long, upgrade.clone()),
        (geometry(V2, 13, 4), extended, upgrade),
        (geometry(V2, 13, 4), extended, all_up.clone()),
        (geometry(V2, 9, 4), short, all_up),
        (geometry(V3, 9, 4), zeroes, downgrade.clone()),
        (geometry(V3, 12, 4), zeroes, downgrade.clone()),
        (geometry(V3, 9, 4), without_backing, downgrade.clone()),
        (geometry(V3, 13, 4), long, downgrade),
        (geometry(V3, 9, 2), zeroes, all_down.clone()),
        (geometry(V3, 13, 6), without_backing, all_down),
    ];
    let mut all = Vec::new();
    for (geometry, kind, options) in cases {
        for room in [0, 40] {
            let image = image(geometry, Kind { room, ..kind });
            let disk = DiskOptions {
                length_bytes: image.len() as u64,
                fixed_length: room > 0,
                ..DiskOptions::default()
            };
            all.push(Case {
                told: format!("{geometry:?} {kind:?} {options:?} room {room}"),
                image,
                options: options.clone(),
                disk,
            });
        }
    }
    all
}

/// What has to hold of an image at any time.
struct Judge {
    before: Content,
    old: Form,
    new: Form,
}

impl Judge {
    fn of(case: &Case) -> Self {
        let old = form(&case.image);
        let bits = case.options.refcount_bits.map(|bits| bits as u32);
        let new = (
            case.options.version.unwrap_or(old.0),
            bits.unwrap_or(old.1),
            case.options.lazy_refcounts.unwrap_or(old.2),
        );
        Self {
            before: content(&case.image),
            old,
            new,
        }
    }

    fn look(&self, image: &[u8], told: &str) {
        let (old, new, form) = (self.old, self.new, form(image));
        assert!(form.0 == old.0 || form.0 == new.0, "{told}: {form:?}");
        assert!(form.1 == old.1 || form.1 == new.1, "{told}: {form:?}");
        assert!(form.2 == old.2 || form.2 == new.2, "{told}: {form:?}");
        assert!(
            content(image) == self.before,
            "{told}: the content is another"
        );
        let checked = ours(image).expect("checked");
        let wrong = checked.report.corruptions + checked.report.check_errors;
        assert_eq!(wrong, 0, "{told}: {:?}", checked.lines);
    }

    fn look_at_end(&self, image: &[u8], told: &str) {
        self.look(image, told);
        assert_eq!(form(image), self.new, "{told}");
        let checked = ours(image).expect("checked");
        assert_eq!(checked.report.leaks, 0, "{told}: {:?}", checked.lines);
    }
}

/// A disk of a world with the image of a case.
pub(crate) fn disk_of(case: &Case, seed: u64) -> (World, Disk) {
    let world = World::new(seed);
    let disk = world.disk("image", case.disk.clone());
    disk.fill(0, &case.image);
    (world, disk)
}

/// Amends bytes without any trouble.
fn amended(case: &Case, image: &[u8]) -> Vec<u8> {
    let world = World::new(1);
    let disk = world.disk("image", case.disk.clone());
    disk.fill(0, image);
    let file: Rc<dyn Storage> = disk.open();
    let ended = run(amend(&file, &case.options, &Unwatched), || world.step());
    ended.expect("it ends").expect("amended");
    assert_eq!(disk.bytes(), disk.durable_bytes(), "all is durable");
    disk.bytes()
}

#[test]
fn an_image_of_every_kind_gets_its_options() {
    for case in cases() {
        let judge = Judge::of(&case);
        judge.look(&case.image, &case.told);
        let new = amended(&case, &case.image);
        judge.look_at_end(&new, &case.told);
        assert_eq!(
            amended(&case, &new),
            new,
            "{}: nothing is left to do",
            case.told
        );
    }
}

#[test]
fn a_power_cut_at_any_step_leaves_the_old_or_the_new() {
    let mut cuts = 0;
    for case in cases() {
        let judge = Judge::of(&case);
        for steps in 0.. {
            let told = format!("{} cut after {steps}", case.told);
            let (world, disk) = disk_of(&case, steps * 31 + 7);
            let file: Rc<dyn Storage> = disk.open();
            let ended = run(amend(&file, &case.options, &Unwatched), || {
                world.steps() < steps && world.step()
            });
            if let Some(ended) = ended {
                ended.expect("amended");
                assert!(steps > 3, "{told}");
                break;
            }
            for seed in 0..3 {
                cuts += 1;
                judge.look(&disk.bytes_after_cut(seed), &told);
            }
            world.cut_power();
            // Amending goes on where it was left.
            let again = amended(&case, &disk.bytes());
            judge.look(&again, &told);
            assert_eq!(form(&again), judge.new, "{told}");
        }
    }
    assert!(cuts > 500, "{cuts}");
}

#[test]
fn whatever_fails_the_image_is_whole() {
    let mut failures = 0;
    for case in cases() {
        let judge = Judge::of(&case);
        for nth in 1.. {
            let told = format!("{} operation {nth} fails", case.told);
            let (world, disk) = disk_of(&case, nth);
            world.add_fault(Fault::fails(EIO).nth(nth));
            let file: Rc<dyn Storage> = disk.open();
            let ended = run(amend(&file, &case.options, &Unwatched), || world.step());
            let ended = ended.expect("it ends");
            if world.failures() == 0 {
                ended.expect("amended");
                break;
            }
            failures += 1;
            let error = ended.expect_err("a failure is told");
            assert!(matches!(error, AmendError::Failed(_)), "{told}: {error}");
            judge.look(&disk.bytes(), &told);
            judge.look(&disk.bytes_after_cut(nth), &told);
        }
    }
    assert!(failures > 100, "{failures}");
}
