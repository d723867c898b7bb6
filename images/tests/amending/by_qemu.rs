//! Amending held against `qemu-img amend` on copies: the same refusals, the same options afterwards, sound images, and the
//! content that there was.

use std::rc::Rc;

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::amend::{AmendError, AmendOptions, amend};
use blockyard_images::qcow2::layout::header::Access;
use blockyard_images::qcow2::open::read_image;
use blockyard_images::qcow2::units::Version;
use blockyard_images::qcow2::{Options, Qcow2};
use blockyard_simulator::run;
use blockyard_storage::{Buffer, Storage};

use crate::content::{Held, content};
use crate::images::{NAME, RECIPES, Recipe, Step};
use crate::oracle::Oracle;
use crate::verdict::{ours as check, storage, theirs};

/// More images: with a backing file, with snapshots that share what became zeroes, and with zstd.
const MORE: &[Recipe] = &[
    recipe("backing_file=base.raw,backing_fmt=raw", "4M", ZEROES),
    recipe(
        "backing_file=base.raw,backing_fmt=raw,cluster_size=512,refcount_bits=64",
        "1M",
        ZEROES,
    ),
    recipe("cluster_size=4k", "4M", ZEROES),
    recipe("compression_type=zstd,cluster_size=4k", "1M", &[WRITE]),
    recipe(
        "compression_type=zstd,cluster_size=4k",
        "1M",
        &[WRITE, Step::Compress],
    ),
    recipe("compat=0.10", "4M", &[WRITE, Step::Compress]),
];

const WRITE: Step = Step::Io(&["write -P 1 0 200k"]);
const ZEROES: &[Step] = &[
    Step::Io(&[
        "write -P 1 0 128k",
        "write -z 256k 64k",
        "write -z -u 512k 64k",
    ]),
    Step::Snapshot("one"),
    Step::Io(&[
        "write -z 0 64k",
        "write -P 3 64k 8k",
        "write -z -u 768k 64k",
    ]),
    Step::Snapshot("two"),
    Step::Io(&["write -P 9 256k 4k", "discard 64k 64k"]),
];

const fn recipe(options: &'static str, size: &'static str, steps: &'static [Step]) -> Recipe {
    Recipe {
        options,
        size,
        steps,
    }
}

/// Options as `qemu-img` takes them, and ours.
fn amends() -> Vec<(&'static str, AmendOptions)> {
    let none = AmendOptions::default();
    let version = |version| AmendOptions {
        version: Some(version),
        ..none.clone()
    };
    let bits = |bits| AmendOptions {
        refcount_bits: Some(bits),
        ..none.clone()
    };
    let lazy = |lazy| AmendOptions {
        lazy_refcounts: Some(lazy),
        ..none.clone()
    };
    let raw = |raw| AmendOptions {
        data_file_raw: Some(raw),
        ..none.clone()
    };
    let size = |size_bytes| AmendOptions {
        size_bytes: Some(size_bytes),
        ..none.clone()
    };
    vec![
        ("compat=v3", version(Version::V3)),
        ("compat=v2", version(Version::V2)),
        ("lazy_refcounts=on", lazy(true)),
        ("lazy_refcounts=off", lazy(false)),
        ("refcount_bits=1", bits(1)),
        ("refcount_bits=2", bits(2)),
        ("refcount_bits=4", bits(4)),
        ("refcount_bits=8", bits(8)),
        ("refcount_bits=16", bits(16)),
        ("refcount_bits=32", bits(32)),
        ("refcount_bits=64", bits(64)),
        ("refcount_bits=3", bits(3)),
        ("refcount_bits=128", bits(128)),
        ("data_file_raw=on", raw(true)),
        ("data_file_raw=off", raw(false)),
        ("size=1M", size(1 << 20)),
        ("size=72192", size(72_192)),
        ("size=1000000", size(1_000_000)),
        ("size=70M", size(70 << 20)),
        (
            "compat=v3,size=520k,lazy_refcounts=on,refcount_bits=64",
            AmendOptions {
                version: Some(Version::V3),
                lazy_refcounts: Some(true),
                refcount_bits: Some(64),
                ..size(520 << 10)
            },
        ),
        (
            "compat=v2,size=580k",
            AmendOptions {
                version: Some(Version::V2),
                ..size(580 << 10)
            },
        ),
        (
            "compat=v2,size=9M,refcount_bits=16",
            AmendOptions {
                version: Some(Version::V2),
                refcount_bits: Some(16),
                ..size(9 << 20)
            },
        ),
        (
            "compat=v2,refcount_bits=16",
            AmendOptions {
                refcount_bits: Some(16),
                ..version(Version::V2)
            },
        ),
        (
            "compat=v2,lazy_refcounts=on",
            AmendOptions {
                lazy_refcounts: Some(true),
                ..version(Version::V2)
            },
        ),
        (
            "compat=v2,refcount_bits=8",
            AmendOptions {
                refcount_bits: Some(8),
                ..version(Version::V2)
            },
        ),
        (
            "compat=v3,lazy_refcounts=on,refcount_bits=64",
            AmendOptions {
                lazy_refcounts: Some(true),
                refcount_bits: Some(64),
                ..version(Version::V3)
            },
        ),
    ]
}

/// The bytes of an image after our amending, and what was refused.
fn ours(image: &[u8], options: &AmendOptions) -> (Result<(), String>, Vec<u8>) {
    let file = storage(image);
    let work = async {
        prepare(&file, options).await?;
        amend(&file, options, &Unwatched).await
    };
    let ended = run(work, || false).expect("nothing waits");
    (ended.map_err(|error| error.to_string()), bytes_of(&file))
}

/// What whoever has an image open does before it gets longer.
async fn prepare(file: &Rc<dyn Storage>, options: &AmendOptions) -> Result<(), AmendError> {
    let opened = read_image(&**file, Access::ReadWrite).await?;
    let header = options.check(&opened)?;
    let (old_bytes, size_bytes) = (opened.header.guest_bytes(), header.guest_bytes());
    let is_overlay = opened.header.backing_name.is_some();
    if size_bytes <= old_bytes || opened.header.has_data_file() {
        return Ok(());
    }
    let below_bytes = if is_overlay { 4 << 20 } else { 0 };
    if options.grows_behind(&opened.header, below_bytes) {
        // The version is another one before.
        let first = AmendOptions {
            size_bytes: None,
            ..options.clone()
        };
        amend(file, &first, &Unwatched).await?;
    }
    let image = Qcow2::open(file.clone(), None, Options::default()).await?;
    image
        .prepare_growth(size_bytes, below_bytes, &Unwatched)
        .await?;
    Ok(image.close().await?)
}

fn bytes_of(file: &Rc<dyn Storage>) -> Vec<u8> {
    let length = file.facts().length_bytes as usize;
    let read = run(file.read(0, Buffer::zeroed(length)), || false).expect("at once");
    read.outcome.expect("read");
    read.buffer.as_slice().to_vec()
}

/// What `qemu-img info` says of the format, without what a file takes.
fn info(oracle: &Oracle, name: &str) -> String {
    let text = oracle.qemu_img(&["info", "-f", "qcow2", name]);
    let from = text.find("Format specific").expect("always there");
    let to = text.find("Child node").unwrap_or(text.len());
    let size = text.lines().find(|line| line.starts_with("virtual size"));
    format!("{size:?}{}", &text[from..to])
}

/// Where QEMU does something that we do not: bitmaps are lost and their clusters leak.
fn loses_bitmaps(recipe: &Recipe, amend: &str) -> bool {
    let has = recipe
        .steps
        .iter()
        .any(|step| matches!(step, Step::Bitmap(_)));
    has && amend.starts_with("compat=v2") && !amend.contains("lazy") && !amend.contains("=8")
}

/// Where somebody else has a part in a length: the data file, which is one for all images, and bitmaps, which are not kept up
/// to date here.
fn is_of_others(recipe: &Recipe, amend: &str) -> bool {
    let bitmap = |step: &Step| matches!(step, Step::Bitmap(_));
    let others = recipe.options.contains("data_file") || recipe.steps.iter().any(bitmap);
    others && amend.contains("size")
}

/// QEMU looks at every count of a block by itself, of which there may be sixteen million.
fn takes_long(recipe: &Recipe, amend: &str) -> bool {
    let large = ["cluster_size=256k", "cluster_size=2M"].contains(&recipe.options);
    large && amend.contains("refcount_bits") && !amend.ends_with("=16")
}

#[test]
fn the_same_as_qemu_img() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    oracle.write("base.raw", &vec![0x5a; 4 << 20]);
    let amends = amends();
    let (mut changed, mut refused) = (0, 0);
    for (number, recipe) in RECIPES.iter().chain(MORE).enumerate() {
        let image = recipe.make(&oracle);
        let before = content(&image);
        for (index, (text, options)) in amends.iter().enumerate() {
            // Each with every fifth, those where most happens with all.
            if index > 1 && (index + number) % 5 != 0
                || takes_long(recipe, text)
                || is_of_others(recipe, text)
            {
                continue;
            }
            let told = format!("{recipe:?} {text}");
            oracle.write("theirs.qcow2", &image);
            let arguments = ["amend", "-f", "qcow2", "-o", text, "theirs.qcow2"];
            let qemu = oracle.run("qemu-img", &arguments);
            let said = String::from_utf8_lossy(&qemu.stderr).into_owned();
            let (ended, bytes) = ours(&image, options);
            if loses_bitmaps(recipe, text) {
                assert!(qemu.status.success(), "{told}: {said}");
                let text = "Cannot downgrade an image with bitmaps".to_owned();
                assert_eq!(ended, Err(text), "{told}");
                assert!(bytes == image, "{told}");
                continue;
            }
            if !qemu.status.success() {
                let first = said.lines().next().unwrap_or_default();
                let first = first.trim_start_matches("qemu-img: ").to_owned();
                assert_eq!(ended, Err(first), "{told}");
                assert!(bytes == image, "{told}: a refusal changes nothing");
                refused += 1;
                continue;
            }
            assert_eq!(ended, Ok(()), "{told}");
            changed += u64::from(bytes != image);
            oracle.write(NAME, &bytes);
            assert_eq!(info(&oracle, NAME), info(&oracle, "theirs.qcow2"), "{told}");
            let checked = theirs(&oracle, NAME).unwrap_or_else(|error| panic!("{told}: {error}"));
            let report = checked.report;
            assert_eq!(
                (report.corruptions, report.leaks, report.check_errors),
                (0, 0, 0),
                "{told}: {:?}",
                checked.lines
            );
            if options.size_bytes.is_none() {
                assert!(content(&bytes) == before, "{told}: the content is another");
                oracle.write("theirs.qcow2", &image);
            }
            let same = ["compare", "-f", "qcow2", "-F", "qcow2", NAME];
            oracle.qemu_img(&[&same[..], &["theirs.qcow2"]].concat());
            let snapshots = |image: &[u8]| {
                let mut content = content(image);
                content.retain(|(disk, _), _| *disk > 0);
                content
            };
            assert!(snapshots(&bytes) == snapshots(&image), "{told}");
        }
    }
    assert!(changed > 40 && refused > 25, "{changed} {refused}");
}

/// `qemu-img rebase -u` with these arguments, and our options.
fn rebases() -> Vec<(Vec<&'static str>, AmendOptions)> {
    let backing = |name: &[u8], format: Option<&str>| AmendOptions {
        backing_name: Some(name.to_vec()),
        backing_format: format.map(|format| format.as_bytes().to_vec()),
        ..AmendOptions::default()
    };
    vec![
        (vec!["-b", ""], backing(b"", None)),
        (
            vec!["-b", "base.raw", "-F", "raw"],
            backing(b"base.raw", Some("raw")),
        ),
        (
            vec!["-b", "../some/other.qcow2", "-F", "qcow2"],
            backing(b"../some/other.qcow2", Some("qcow2")),
        ),
        (
            vec!["-b", LONGEST, "-F", "host_device"],
            backing(LONGEST.as_bytes(), Some("host_device")),
        ),
        (
            vec!["-b", TOO_LONG, "-F", "raw"],
            backing(TOO_LONG.as_bytes(), Some("raw")),
        ),
    ]
}

const TOO_LONG: &str = match std::str::from_utf8(&[b'n'; 1024]) {
    Ok(name) => name,
    Err(_) => "",
};
const LONGEST: &str = TOO_LONG.split_at(1023).0;

#[test]
fn the_same_as_a_rebase_without_a_look_at_the_content() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    oracle.write("base.raw", &vec![0x5a; 4 << 20]);
    let (mut changed, mut refused) = (0, 0);
    for recipe in RECIPES.iter().chain(MORE) {
        let image = recipe.make(&oracle);
        // One after the other: what one has left is in the way of the next.
        let mut now = image.clone();
        for (arguments, options) in rebases() {
            let told = format!("{recipe:?} {arguments:?}");
            oracle.write("theirs.qcow2", &now);
            let rebase = ["rebase", "-u", "-f", "qcow2"];
            let all = [&rebase[..], &arguments, &["theirs.qcow2"]].concat();
            let qemu = oracle.run("qemu-img", &all);
            let said = String::from_utf8_lossy(&qemu.stderr).into_owned();
            let (ended, bytes) = ours(&now, &options);
            if !qemu.status.success() {
                let said = said.trim().trim_start_matches("qemu-img: ");
                assert_eq!(ended, Err(said.to_owned()), "{told}");
                assert!(bytes == now, "{told}: a refusal changes nothing");
                refused += 1;
                continue;
            }
            assert_eq!(ended, Ok(()), "{told}");
            changed += u64::from(bytes != now);
            oracle.write(NAME, &bytes);
            let info = |name| {
                let text = oracle.qemu_img(&["info", "-f", "qcow2", name]);
                let is_of_format =
                    |line: &&str| !line.contains("disk size:") && !line.contains(name);
                let lines = text.lines().filter(is_of_format);
                lines.map(str::to_owned).collect::<Vec<_>>()
            };
            assert_eq!(info(NAME), info("theirs.qcow2"), "{told}");
            let without_below = |image: &[u8]| {
                let mut content = content(image);
                content.retain(|_, held| *held != Held::Below);
                content
            };
            assert!(without_below(&bytes) == without_below(&image), "{told}");
            // QEMU would open what is named now.
            let report = check(&bytes).expect("checked").report;
            let wrong = (report.corruptions, report.leaks, report.check_errors);
            assert_eq!(wrong, (0, 0, 0), "{told}");
            now = bytes;
        }
    }
    assert!(changed > 60 && refused > 20, "{changed} {refused}");
}
