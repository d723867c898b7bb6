//! Whenever the power goes, whatever fails and whoever cancels: the image opens, holds what it held, and its options are the
//! old ones or the new ones, all together.

use std::rc::Rc;

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::amend::{AmendError, AmendOptions, amend};
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::units::{Geometry, Version};
use blockyard_simulator::{Disk, DiskOptions, Fault, World, run};
use blockyard_storage::Storage;
use blockyard_storage::error::EIO;

use crate::content::{Content, Held, content};
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
#[derive(Clone, PartialEq, Eq, Debug)]
struct Form {
    version: Version,
    refcount_bits: u32,
    lazy_refcounts: bool,
    size_bytes: u64,
    backing: (Option<Vec<u8>>, Option<Vec<u8>>),
}

fn form(image: &[u8]) -> Form {
    let header = Header::parse(image, Access::ReadWrite).expect("it opens");
    let geometry = header.geometry;
    Form {
        version: geometry.version(),
        refcount_bits: geometry.refcount_bits(),
        lazy_refcounts: header.lazy_refcounts(),
        size_bytes: header.guest_bytes(),
        backing: (header.backing_name, header.extensions.backing_format),
    }
}

/// The form that the options of a case give its image.
fn wanted(case: &Case) -> Form {
    let (old, options) = (form(&case.image), &case.options);
    let bits = options.refcount_bits.map(|bits| bits as u32);
    let (name, format) = match &options.backing_name {
        Some(name) if name.is_empty() => (None, None),
        Some(name) => (
            Some(name.clone()),
            options.backing_format.clone().or(old.backing.1),
        ),
        None => (
            old.backing.0,
            options.backing_format.clone().or(old.backing.1),
        ),
    };
    Form {
        version: options.version.unwrap_or(old.version),
        refcount_bits: bits.unwrap_or(old.refcount_bits),
        lazy_refcounts: options.lazy_refcounts.unwrap_or(old.lazy_refcounts),
        size_bytes: options.size_bytes.unwrap_or(old.size_bytes),
        backing: (name, format),
    }
}

/// The content of an image, as far as its disk goes. Behind that nothing may be left to come back one day.
fn shown(image: &[u8]) -> Content {
    let header = Header::parse(image, Access::ReadWrite).expect("it opens");
    let all = content(image);
    let shown = cut(&all, &header.geometry, header.guest_bytes());
    let mut left = all.iter().filter(|(place, _)| !shown.contains_key(place));
    assert!(
        left.all(|(_, held)| *held == Held::Below),
        "something is left"
    );
    shown
}

/// What a disk of that length keeps. Snapshots keep everything.
fn cut(content: &Content, geometry: &Geometry, size_bytes: u64) -> Content {
    let end = size_bytes.next_multiple_of(geometry.cluster_bytes()) / geometry.subcluster_bytes();
    let kept = content
        .iter()
        .filter(|((disk, place), _)| *disk > 0 || *place < end);
    kept.map(|(place, held)| (*place, held.clone())).collect()
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
    let size = |size_bytes| AmendOptions {
        size_bytes: Some(size_bytes),
        ..AmendOptions::default()
    };
    let named = |name: &[u8], format: Option<&str>| AmendOptions {
        backing_name: Some(name.to_vec()),
        backing_format: format.map(|format| format.as_bytes().to_vec()),
        ..AmendOptions::default()
    };
    let cases: Vec<(Geometry, Kind, AmendOptions)> = vec![
        (geometry(V3, 9, 4), zeroes, size(64 * 512 + 512)),
        (geometry(V3, 9, 4), zeroes, size(64 * 512)),
        (geometry(V3, 9, 4), without_backing, size(0)),
        (geometry(V3, 12, 1), zeroes, size(4096 * 2)),
        (geometry(V3, 12, 1), zeroes, size(4096 * 513)),
        (geometry(V3, 9, 4), zeroes, named(b"other", Some("qcow2"))),
        (geometry(V3, 9, 4), zeroes, named(b"", None)),
        (geometry(V3, 13, 4), long, named(&[b'n'; 1023], Some("raw"))),
        (
            geometry(V3, 13, 4),
            without_backing,
            named(&[b'n'; 1023], Some("host_device")),
        ),
        (geometry(V2, 13, 4), extended, named(b"other", None)),
        (
            geometry(V3, 9, 4),
            without_backing,
            AmendOptions {
                refcount_bits: Some(8),
                lazy_refcounts: Some(true),
                size_bytes: Some(512 * 3),
                ..named(b"base", Some("raw"))
            },
        ),
        (
            geometry(V3, 9, 2),
            Kind {
                snapshot: false,
                ..zeroes
            },
            AmendOptions {
                version: Some(V2),
                refcount_bits: Some(16),
                size_bytes: Some(512 * 65),
                ..named(b"", None)
            },
        ),
        (
            geometry(V2, 9, 4),
            Kind {
                snapshot: false,
                ..old
            },
            AmendOptions {
                version: Some(V3),
                size_bytes: Some(512 * 65),
                lazy_refcounts: Some(true),
                ..named(b"base", Some("qcow2"))
            },
        ),
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
pub(crate) struct Judge {
    before: Content,
    after: Content,
    old: Form,
    new: Form,
}

impl Judge {
    pub(crate) fn of(case: &Case) -> Self {
        let before = shown(&case.image);
        let header = Header::parse(&case.image, Access::ReadWrite).expect("it opens");
        let (old, new) = (form(&case.image), wanted(case));
        let mut after = before.clone();
        if new.size_bytes < old.size_bytes {
            after = cut(&before, &header.geometry, new.size_bytes);
        }
        if new.backing.0.is_none() {
            // What nothing is below reads as zeroes.
            after.retain(|_, held| *held != Held::Below);
        }
        Self {
            before,
            after,
            old,
            new,
        }
    }

    /// Old or new; which?
    pub(crate) fn look(&self, image: &[u8], told: &str) -> bool {
        let form = form(image);
        let is_new = form == self.new;
        assert!(is_new || form == self.old, "{told}: {form:?}");
        let content = shown(image);
        match is_new {
            // Clusters of an image without a backing file show one that it is given.
            true if self.old.backing.0.is_none() && self.new.backing.0.is_some() => {
                let bytes = content.iter().filter(|(_, held)| **held != Held::Below);
                let wanted: Vec<_> = self.after.iter().collect();
                assert!(bytes.collect::<Vec<_>>() == wanted, "{told}");
            }
            true => assert!(content == self.after, "{told}: the content is another"),
            false => assert!(content == self.before, "{told}: the content is another"),
        }
        let checked = ours(image).expect("checked");
        let wrong = checked.report.corruptions + checked.report.check_errors;
        assert_eq!(wrong, 0, "{told}: {:?}", checked.lines);
        is_new
    }

    fn look_at_end(&self, image: &[u8], told: &str) {
        assert!(self.look(image, told), "{told}");
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
            assert!(judge.look(&again, &told), "{told}");
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
