//! Repairs: what can be put right is, as QEMU's repair of a copy does it, and a power cut at any step harms nothing.

use std::rc::Rc;

use blockyard_images::qcow2::check::{
    CheckStop, FindingKind, Repair, Repaired, Report, Severity, Unobserved, repair, repair_dirty,
};
use blockyard_images::qcow2::layout::entries::{
    COMPRESSED, COPIED, L2Entry, OFFSET_MASK, ZERO, l2_entry_at,
};
use blockyard_images::qcow2::layout::header::incompatible;
use blockyard_images::qcow2::units::{Geometry, Version};
use blockyard_simulator::{DiskOptions, Seed, World, each_seed, run};
use blockyard_storage::Storage;

use crate::damages::DAMAGES;
use crate::handmade::{geometries, image};
use crate::images::{Image, NAME, RECIPES};
use crate::oracle::Oracle;
use crate::random::damage;
use crate::verdict::{Listener, ours, storage, theirs};

/// Damages that no repair can put right: what an entry led to is not known.
const HOPELESS: &[&str] = &[
    "reserved bits in L1",
    "reserved bits in L2",
    "data behind the end",
    "an L2 table behind the end",
    "the last cluster cut off",
    "a cluster of data that is not aligned",
    "an L2 table that is not aligned",
    "a compressed cluster that is marked as copied",
    "a subcluster with data that reads as zeroes",
    "a subcluster with data and no cluster",
    "an L1 table of a snapshot that is not aligned or too large",
];

/// Repairs bytes. Returns what it came to, and the bytes then.
fn repaired(image: &[u8], how: Repair) -> (Result<Repaired, CheckStop>, Vec<u8>) {
    let file = storage(image);
    let result = run(repair(&file, how, &Listener::default()), || false).expect("nothing waits");
    (result, bytes_of(&file))
}

fn bytes_of(file: &Rc<dyn Storage>) -> Vec<u8> {
    let length = file.facts().length_bytes as usize;
    let read = file.read(0, blockyard_storage::Buffer::zeroed(length));
    let read = run(read, || false).expect("at once");
    read.buffer.as_slice().to_vec()
}

/// What is known to be damaged for good in an image with counts of one bit, where a cluster has two references.
fn overflows(image: &Image) -> bool {
    let found = ours(&image.bytes).expect("checked");
    found.lines.iter().any(|line| line.contains("overflow"))
}

#[test]
fn what_can_be_put_right_is() {
    let oracle = Oracle::find();
    for (name, damage) in DAMAGES {
        for geometry in geometries() {
            let mut image = image(geometry);
            if damage(&mut image).is_none() {
                continue;
            }
            let told = format!("{name} {geometry:?}");
            let content = content(&image);
            let (result, bytes) = repaired(&image.bytes, Repair::All);
            let result = result.unwrap_or_else(|stop| panic!("{told}: {stop}"));
            let after = ours(&bytes).expect("checked").report;
            assert_eq!(after, result.after, "{told}");
            assert_eq!(
                self::content(&Image {
                    bytes: bytes.clone()
                }),
                content,
                "{told}"
            );
            if HOPELESS.contains(name) {
                assert!(after.corruptions > 0, "{told}: {after:?}");
                continue;
            }
            if overflows(&image) && after.corruptions > 0 {
                continue;
            }
            assert_eq!(
                (after.corruptions, after.leaks, after.check_errors),
                (0, 0, 0),
                "{told}"
            );
            assert_eq!(result.has_fixed(), bytes != image.bytes, "{told}");
            if let Some(oracle) = &oracle {
                oracle.write(NAME, &bytes);
                let theirs = theirs(oracle, NAME).unwrap_or_else(|error| panic!("{told}: {error}"));
                assert_eq!(theirs.report, after, "{told}");
            }
        }
    }
}

#[test]
fn leaks_are_given_back_and_nothing_else_is_touched() {
    for (name, damage) in DAMAGES {
        for geometry in geometries() {
            let mut image = image(geometry);
            if damage(&mut image).is_none() {
                continue;
            }
            let before = ours(&image.bytes).expect("checked");
            let (result, bytes) = repaired(&image.bytes, Repair::Leaks);
            let told = format!("{name} {geometry:?}");
            let Ok(result) = result else {
                // A structure that cannot be trusted to say what is free.
                assert_eq!(bytes, image.bytes, "{told}");
                continue;
            };
            let hopeless = HOPELESS.contains(name)
                && !name.starts_with("a compressed")
                && *name != "a subcluster with data and no cluster";
            if hopeless {
                assert_eq!(result.after.leaks, before.report.leaks, "{told}");
            }
            assert!(
                result.after.corruptions <= before.report.corruptions,
                "{told}"
            );
        }
    }
}

#[test]
fn repaired_images_read_as_those_that_qemu_repairs() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    let images: Vec<Vec<u8>> = RECIPES.iter().map(|recipe| recipe.make(&oracle)).collect();
    each_seed("blockyard-images", "repaired_images_read", 60, |seed| {
        let dice = Seed::new(seed);
        let which = dice.below(images.len() as u64) as usize;
        // Data of these is in a file that the next recipe has replaced.
        if RECIPES[which].options.contains("data_file") {
            return;
        }
        let mut image = Image {
            bytes: images[which].clone(),
        };
        let told = format!("{:?}: {}", RECIPES[which], damage(&mut image, &dice));
        oracle.write("theirs.qcow2", &image.bytes);
        let qemu = oracle.run(
            "qemu-img",
            &["check", "-f", "qcow2", "-r", "all", "theirs.qcow2"],
        );
        let (result, bytes) = repaired(&image.bytes, Repair::All);
        if let Ok(result) = &result {
            assert_eq!(
                ours(&bytes).expect("checked").report,
                result.after,
                "{told}"
            );
        }
        oracle.write(NAME, &bytes);
        if qemu.status.code() != Some(0) {
            return;
        }
        let result = result.unwrap_or_else(|stop| panic!("{told}: {stop}"));
        assert_eq!(
            result.after.corruptions + result.after.check_errors,
            0,
            "{told}"
        );
        let checked = theirs(&oracle, NAME).unwrap_or_else(|error| panic!("{told}: {error}"));
        assert_eq!(checked.report, result.after, "{told}");
        let convert = |name: &str| {
            let raw = format!("{name}.raw");
            let arguments = ["convert", "-f", "qcow2", "-O", "raw", name, &raw];
            oracle.run("qemu-img", &arguments).status.success()
        };
        // A compressed cluster may be damaged itself.
        let readable = convert("theirs.qcow2");
        assert_eq!(convert(NAME), readable, "{told}");
        if !readable {
            return;
        }
        let same = oracle.read("image.qcow2.raw") == oracle.read("theirs.qcow2.raw");
        assert!(same, "{told}");
    });
}

#[test]
fn random_damages_are_never_made_worse() {
    each_seed("blockyard-images", "never_made_worse", 200, |seed| {
        let dice = Seed::new(seed);
        let small: Vec<_> = geometries()
            .into_iter()
            .filter(|one| one.cluster_bits() <= 12)
            .collect();
        let mut image = image(*dice.pick(&small));
        let told = damage(&mut image, &dice);
        let Ok(before) = ours(&image.bytes) else {
            return;
        };
        let how = *dice.pick(&[Repair::All, Repair::Leaks]);
        let (result, bytes) = repaired(&image.bytes, how);
        let Ok(result) = result else {
            return;
        };
        assert_eq!(
            ours(&bytes).expect("checked").report,
            result.after,
            "{told}"
        );
        let (old, new) = (
            harm(&image),
            harm(&Image {
                bytes: bytes.clone(),
            }),
        );
        assert!(
            new.0 <= old.0 && new.1 <= old.1 && new.2 <= old.2,
            "{told}: {old:?} {new:?}"
        );
        assert!(
            result.after.check_errors <= before.report.check_errors,
            "{told}"
        );
        // What is right stays as it is.
        let (again, twice) = repaired(&bytes, how);
        let again = again.unwrap_or_else(|stop| panic!("{told}: {stop}"));
        if result.after.corruptions == 0 && result.after.check_errors == 0 {
            assert_eq!(again.corruptions_fixed, 0, "{told}");
        }
        assert!(twice.len() >= bytes.len(), "{told}");
    });
}

/// What the guest reads from a handmade image, cluster by cluster, as far as its first L2 table can be followed.
fn content(image: &Image) -> Vec<Vec<u8>> {
    let geometry = image.header().geometry;
    let cluster = image.cluster_bytes();
    let Some(table) = image.bytes.get(image.l2()..image.l2() + cluster) else {
        return Vec::new();
    };
    let entries = 0..geometry.l2_entries().min(16) as usize;
    entries
        .map(|index| guest_cluster(image, l2_entry_at(&geometry, table, index).expect("there")))
        .collect()
}

fn guest_cluster(image: &Image, entry: L2Entry) -> Vec<u8> {
    let (geometry, cluster) = (image.header().geometry, image.cluster_bytes());
    if entry.word & COMPRESSED != 0 {
        return entry.word.to_be_bytes().to_vec();
    }
    let at = (entry.word & OFFSET_MASK) as usize;
    let zero = !geometry.extended_l2() && entry.word & ZERO != 0;
    if at == 0 || zero {
        return vec![0; cluster];
    }
    let mut bytes = image.bytes.get(at..).unwrap_or(&[]).to_vec();
    bytes.resize(cluster, 0);
    if geometry.extended_l2() {
        let piece = cluster / 32;
        for index in (0..32).filter(|index| !entry.has_data(*index)) {
            bytes[index as usize * piece..][..piece].fill(0);
        }
    }
    bytes
}

/// What can do harm in an image: counts that are too low, everything else that is corrupt, and entries that say that their
/// cluster may be written in place though another entry leads to it. Wrong flags that are only a nuisance do not count.
fn harm(image: &Image) -> (u64, u64, u64) {
    let listener = Listener::default();
    let file = storage(&image.bytes);
    let report = run(
        blockyard_images::qcow2::check::check(&file, &listener),
        || false,
    );
    report.expect("nothing waits").expect("it opens");
    let (mut low, mut corrupt) = (0, 0);
    listener.each(|finding| match &finding.kind {
        FindingKind::Refcount {
            count, references, ..
        } => low += u64::from(count < references),
        // As many as the file has, which grows.
        FindingKind::RefcountUnknown { .. } => low += 1,
        FindingKind::CopiedL1 { .. } | FindingKind::CopiedL2 { .. } => {}
        kind => corrupt += u64::from(kind.severity() >= Severity::Corruption) * finding.times,
    });
    let geometry = image.header().geometry;
    let table = image.bytes.get(image.l2()..).unwrap_or(&[]);
    let words: Vec<u64> = (0..geometry.l2_entries().min(16) as usize)
        .filter_map(|index| l2_entry_at(&geometry, table, index))
        .filter(|entry| entry.word & COMPRESSED == 0)
        .map(|entry| entry.word)
        .collect();
    let shared = words.iter().filter(|word| {
        let same = words
            .iter()
            .filter(|other| *other & OFFSET_MASK == *word & OFFSET_MASK);
        *word & COPIED != 0 && same.count() > 1
    });
    (low, corrupt, shared.count() as u64)
}

/// Repairs on a simulated disk and cuts the power after so many steps. `None`: it had ended before.
fn cut_after(bytes: &[u8], steps: u64, seed: u64, options: DiskOptions) -> Option<(World, Image)> {
    let world = World::new(seed);
    let disk = world.disk("image", options);
    disk.fill(0, bytes);
    let file: Rc<dyn Storage> = disk.open();
    let ended = run(repair(&file, Repair::All, &Unobserved), || {
        world.steps() < steps && world.step()
    });
    if let Some(result) = ended {
        result.expect("repaired");
        return None;
    }
    world.cut_power();
    let bytes = disk.bytes();
    Some((world, Image { bytes }))
}

#[test]
fn a_power_cut_at_any_step_harms_nothing() {
    let small = |version, bits, order| Geometry::new(version, bits, order, false).expect("allowed");
    let geometries = [
        small(Version::V3, 9, 4),
        small(Version::V3, 12, 0),
        small(Version::V2, 10, 4),
        Geometry::new(Version::V3, 14, 3, true).expect("allowed"),
    ];
    let mut cuts = 0;
    for (name, damage) in DAMAGES {
        for geometry in geometries {
            let mut image = image(geometry);
            if damage(&mut image).is_none() {
                continue;
            }
            // A device keeps its length: room is found among the clusters that are free.
            let room = image.bytes.len() + 8 * image.cluster_bytes();
            for fixed_length in [false, true] {
                let mut image = image.clone();
                if fixed_length {
                    image.bytes.resize(room, 0);
                }
                let options = DiskOptions {
                    fixed_length,
                    length_bytes: image.bytes.len() as u64,
                    ..DiskOptions::default()
                };
                let (before, content_before) = (harm(&image), content(&image));
                for steps in 0.. {
                    let told = format!("{name} {geometry:?} {fixed_length} cut after {steps}");
                    let seed = steps * 31 + 7;
                    let Some((_world, cut)) = cut_after(&image.bytes, steps, seed, options.clone())
                    else {
                        assert!(steps > 3, "{told}");
                        break;
                    };
                    cuts += 1;
                    let after = harm(&cut);
                    let worse = after.0 > before.0 || after.1 > before.1 || after.2 > before.2;
                    assert!(!worse, "{told}: {before:?} {after:?}");
                    assert_eq!(content(&cut), content_before, "{told}");
                    // Repairing goes on where it was left.
                    let (again, bytes) = repaired(&cut.bytes, Repair::All);
                    let again = again.unwrap_or_else(|stop| panic!("{told}: {stop}"));
                    if !HOPELESS.contains(name) && before.1 == 0 {
                        assert_eq!(again.after.corruptions, 0, "{told}");
                    }
                    assert_eq!(content(&Image { bytes }), content_before, "{told}");
                }
            }
        }
    }
    assert!(cuts > 500, "{cuts}");
}

#[test]
fn bits_of_the_header_are_cleared_once_nothing_is_wrong() {
    let geometry = Geometry::new(Version::V3, 12, 4, false).expect("allowed");
    for (how, wrong) in [
        (Repair::All, false),
        (Repair::Leaks, false),
        (Repair::All, true),
    ] {
        let mut image = image(geometry);
        image.set_word(72, incompatible::DIRTY | incompatible::CORRUPT);
        image.set_word(88, 1 << 40);
        if wrong {
            let l2 = image.l2();
            image.set_word(l2, 1 << 30);
        }
        let (result, bytes) = repaired(&image.bytes, how);
        assert_eq!(result.expect("repaired").after.corruptions > 0, wrong);
        let header = Image { bytes }.header();
        assert_eq!(header.incompatible == 0, !wrong);
        assert!(wrong || header.autoclear == 0, "bits that nobody knows");
    }
}

#[test]
fn a_dirty_image_is_put_right_before_it_is_used() {
    let geometry = Geometry::new(Version::V3, 12, 4, false).expect("allowed");
    for (name, damage) in DAMAGES {
        let mut image = image(geometry);
        if damage(&mut image).is_none() || HOPELESS.contains(name) {
            continue;
        }
        image.set_word(72, incompatible::DIRTY);
        let file = storage(&image.bytes);
        let report = run(repair_dirty(&file), || false).expect("nothing waits");
        let report: Report = report.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{name}");
        assert!(
            !Image {
                bytes: bytes_of(&file)
            }
            .header()
            .is_dirty(),
            "{name}"
        );
    }
}
