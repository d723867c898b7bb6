//! What is stored is what is loaded, in the least room, and nothing of it is left behind.

use blockyard_images::qcow2::create::CreateOptions;
use blockyard_images::qcow2::layout::header::Header;
use blockyard_images::qcow2::layout::header::{Access, autoclear};
use blockyard_images::qcow2::units::Version;
use blockyard_simulator::{Seed, each_seed};

use crate::bits::{Bits, Wanted, all_kept, kept, new_image, store, with_image};
use crate::verdict::ours;

const NAMES: [&str; 4] = ["one", "two", "", "a name that is longer than the others"];

fn wanted(seed: &Seed, name: &'static str, disk_bytes: u64) -> Wanted {
    let granularity_bytes = 512 << seed.below(8);
    let count = disk_bytes.div_ceil(granularity_bytes);
    let bits = match seed.below(4) {
        0 => Bits::of(disk_bytes, granularity_bytes, &[]),
        1 => Bits::of(disk_bytes, granularity_bytes, &[(0, count)]),
        _ => {
            let mut bits = Bits::of(disk_bytes, granularity_bytes, &[]);
            let mut at = 0;
            while at < bits.0.len() {
                let end = bits.0.len().min(at + 1 + seed.below(20_000) as usize);
                bits.0[at..end].fill(seed.one_in(2));
                at = end + seed.below(3) as usize;
            }
            bits
        }
    };
    Wanted {
        name,
        granularity_bytes,
        auto: seed.one_in(2),
        bits,
    }
}

fn check(image: &[u8], told: &str) {
    let verdict = ours(image).expect("checked");
    let report = verdict.report;
    let wrong = report.corruptions + report.check_errors + report.leaks;
    assert_eq!(wrong, 0, "{told}: {:?}", verdict.lines);
}

/// Where the file ends, in clusters that are counted.
fn end_of(image: &[u8]) -> u64 {
    ours(image).expect("checked").report.image_end_offset
}

#[test]
fn any_set_of_bitmaps_comes_back() {
    each_seed(
        "blockyard-images",
        "any_set_of_bitmaps_comes_back",
        60,
        |number| {
            let seed = Seed::new(number);
            let mut options = CreateOptions::new(512 * (1 + seed.below(80_000)));
            options.cluster_bytes = 512 << seed.below(8);
            if seed.one_in(2) {
                options.backing_name = Some(vec![b'b'; 1 + seed.below(100) as usize]);
                options.backing_format = Some("raw".to_owned());
            }
            let mut image = new_image(&options);
            let empty_end = end_of(&image);
            let mut expected = Vec::<Wanted>::new();
            for round in 0..5 {
                let told = format!("{options:?} round {round}");
                let mut names = NAMES.to_vec();
                names.retain(|_| seed.one_in(2));
                let new: Vec<Wanted> = names
                    .into_iter()
                    .map(|name| wanted(&seed, name, options.size_bytes))
                    .collect();
                image = with_image(&image, async |image| {
                    image.mark_bitmaps_in_use().await.expect("marked");
                    assert!(image.bitmaps().iter().all(|bitmap| bitmap.is_in_use()));
                    // The rest as it was: nobody has changed the disk.
                    let mut all = new.clone();
                    for old in &expected {
                        if all.iter().all(|one| one.name != old.name) {
                            all.push(old.clone());
                        }
                    }
                    store(image, &all).await.expect(&told);
                    expected = all;
                    if seed.one_in(3)
                        && let Some(gone) = expected.pop()
                    {
                        let removed = image.remove_bitmap(gone.name.as_bytes()).await;
                        assert_eq!(removed, Ok(true), "{told}");
                    }
                    assert_eq!(image.remove_bitmap(b"nope").await, Ok(false));
                });
                assert_eq!(kept(&image).expect(&told), all_kept(&expected), "{told}");
                check(&image, &told);
                let header = Header::parse(&image, Access::ReadWrite).expect("it opens");
                let says = header.autoclear & autoclear::BITMAPS != 0;
                assert_eq!(says, !expected.is_empty(), "{told}");
                assert_eq!(header.extensions.bitmaps.is_some(), says, "{told}");
                assert!(header.extensions.feature_names.is_some() || options.cluster_bytes <= 4096);
                assert_eq!(header.backing_name, options.backing_name, "{told}");
            }
            let names: Vec<&str> = expected.iter().map(|one| one.name).collect();
            image = with_image(&image, async |image| {
                for name in names {
                    let removed = image.remove_bitmap(name.as_bytes()).await;
                    assert_eq!(removed, Ok(true));
                }
            });
            check(&image, "all gone");
            assert!(kept(&image).expect("it opens").is_empty());
            assert_eq!(end_of(&image), empty_end, "all room is given back");
        },
    );
}

#[test]
fn what_is_alike_takes_no_room() {
    let mut options = CreateOptions::new(1 << 40);
    options.cluster_bytes = 65_536;
    let image = new_image(&options);
    let before = end_of(&image);
    let bits = |set: &[(u64, u64)]| Wanted {
        name: "b",
        granularity_bytes: 65_536,
        auto: true,
        bits: Bits::of(1 << 40, 65_536, set),
    };
    // 32 clusters of 512 Ki bits.
    for (set, clusters) in [
        (vec![], 0),
        (vec![(0, 1 << 24)], 0),
        (vec![(0, 1 << 19)], 0),
        (vec![(0, (1 << 19) + 1)], 1),
        (
            vec![(5, 6), (1 << 23, (1 << 23) + 1), ((1 << 24) - 1, 1 << 24)],
            3,
        ),
    ] {
        let wanted = [bits(&set)];
        let stored = with_image(&image, async |image| {
            store(image, &wanted).await.expect("stored");
        });
        assert_eq!(kept(&stored).expect("it opens"), all_kept(&wanted));
        // Table and directory.
        assert_eq!(end_of(&stored), before + (2 + clusters) * 65_536, "{set:?}");
        check(&stored, "stored");
    }
}

#[test]
fn a_change_of_the_disk_marks_what_was_stored_again() {
    let image = new_image(&CreateOptions::new(1 << 20));
    let of = |name, auto| Wanted {
        name,
        granularity_bytes: 4096,
        auto,
        bits: Bits::of(1 << 20, 4096, &[(3, 5)]),
    };
    let wanted = [of("records", true), of("frozen", false)];
    let in_use = |image: &[u8]| -> Vec<bool> {
        let all = kept(image).expect("it opens");
        all.values().map(|one| one.bits.is_none()).collect()
    };
    let stored = with_image(&image, async |image| {
        store(image, &wanted).await.expect("stored");
    });
    assert_eq!(in_use(&stored), [false, false], "frozen, records");
    // Somebody opens it who does not keep bitmaps up; and the same once more after they have been stored.
    for marks_first in [false, true] {
        let changed = with_image(&stored, async |image| {
            if marks_first {
                image.mark_bitmaps_in_use().await.expect("marked");
                store(image, &wanted).await.expect("stored");
            }
            let all = blockyard_storage::ByteRange::new(0, 65_536);
            image.discard(all, false).await.expect("discarded");
        });
        assert_eq!(in_use(&changed), [false, true], "{marks_first}");
    }
}

#[test]
fn version_2_and_nothing_at_all_keep_none() {
    let one = |disk_bytes| Wanted {
        name: "b",
        granularity_bytes: 512,
        auto: true,
        bits: Bits::of(disk_bytes, 512, &[]),
    };
    for (version, disk_bytes) in [(Version::V2, 1 << 20), (Version::V3, 0)] {
        let mut options = CreateOptions::new(disk_bytes);
        options.version = version;
        let image = new_image(&options);
        let after = with_image(&image, async |image| {
            let refused = store(image, &[one(disk_bytes)]).await;
            let text = refused.expect_err("refused").to_string();
            assert_eq!(text.contains("v2 files"), version == Version::V2, "{text}");
            store(image, &[]).await.expect("nothing to do");
        });
        assert_eq!(after, image, "nothing has changed");
    }
}
