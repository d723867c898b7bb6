//! The same deeds by `qemu-img snapshot` and here, on copies of images of every kind that QEMU makes: the same refusals, the
//! same disks afterwards, the same list, and images that QEMU finds sound.

use std::rc::Rc;

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_images::qcow2::snapshot::{NewSnapshot, SnapshotChoice, apply, create, delete};
use blockyard_simulator::run;
use blockyard_storage::{Buffer, Storage};

use crate::content::content;
use crate::images::{NAME, RECIPES, Recipe, Step};
use crate::oracle::Oracle;
use crate::verdict::{storage, theirs};

/// More images: of another length than their snapshots, and with a backing file.
const MORE: &[Recipe] = &[
    Recipe {
        options: "backing_file=base.raw,backing_fmt=raw,cluster_size=4k",
        size: "1M",
        steps: &[
            WRITE,
            Step::Snapshot("one"),
            Step::Io(&["write -z 0 64k", "truncate 2M", "write -P 7 1536k 64k"]),
            Step::Snapshot("two"),
        ],
    },
    Recipe {
        options: "cluster_size=512",
        size: "1M",
        steps: &[
            WRITE,
            Step::Snapshot("one"),
            Step::Io(&["truncate 100k"]),
            Step::Snapshot("one"),
        ],
    },
];

const WRITE: Step = Step::Io(&["write -P 1 0 200k", "write -P 2 700k 70k"]);

/// What is done, as arguments of `qemu-img snapshot`.
const DEEDS: &[(&str, &str)] = &[
    ("-c", "new"),
    ("-c", "one"),
    ("-a", "one"),
    ("-a", "1"),
    ("-a", "two"),
    ("-a", "nope"),
    ("-d", "one"),
    ("-d", "two"),
    ("-d", "1"),
    ("-d", "nope"),
];

fn bytes_of(file: &Rc<dyn Storage>) -> Vec<u8> {
    let length = file.facts().length_bytes as usize;
    let read = run(file.read(0, Buffer::zeroed(length)), || false).expect("at once");
    read.outcome.expect("read");
    read.buffer.as_slice().to_vec()
}

/// The image after a deed of ours, and what was refused in QEMU's words.
fn ours(image: &[u8], (deed, name): (&str, &str)) -> (Result<(), String>, Vec<u8>) {
    let file = storage(image);
    let bytes = name.as_bytes().to_vec();
    let ended = run(
        async {
            match deed {
                "-c" => {
                    let new = NewSnapshot {
                        name: bytes,
                        ..NewSnapshot::default()
                    };
                    create(&file, &new, true, &Unwatched).await.map(drop)
                }
                "-a" => apply(&file, &SnapshotChoice::IdOrName(bytes), true, &Unwatched).await,
                _ => {
                    let choice = SnapshotChoice::Name(bytes);
                    delete(&file, &choice, true, &Unwatched).await.map(drop)
                }
            }
        },
        || false,
    );
    let verb = match deed {
        "-c" => "create",
        "-a" => "apply",
        _ => "delete",
    };
    let ended = ended.expect("nothing waits");
    let told = |error| format!("Could not {verb} snapshot '{name}': {error}");
    (ended.map_err(told), bytes_of(&file))
}

/// Ids and names of the snapshots.
fn list(oracle: &Oracle, name: &str) -> Vec<String> {
    let text = oracle.qemu_img(&["snapshot", "-l", name]);
    let lines = text.lines().skip(2);
    lines
        .map(|line| line.chars().take(12).collect::<String>())
        .collect()
}

fn size(image: &[u8]) -> u64 {
    let header = Header::parse(image, Access::ReadWrite).expect("it opens");
    header.guest_bytes()
}

#[test]
fn the_same_as_qemu_img() {
    let Some(oracle) = Oracle::find() else {
        return;
    };
    oracle.write("base.raw", &vec![0x5a; 1 << 20]);
    let (mut done, mut refused) = (0, 0);
    for recipe in RECIPES.iter().chain(MORE) {
        let image = recipe.make(&oracle);
        for deed in DEEDS {
            let told = format!("{recipe:?} {deed:?}");
            oracle.write("theirs.qcow2", &image);
            let arguments = ["snapshot", deed.0, deed.1, "theirs.qcow2"];
            let qemu = oracle.run("qemu-img", &arguments);
            let said = String::from_utf8_lossy(&qemu.stderr).into_owned();
            let (ended, bytes) = ours(&image, *deed);
            if !qemu.status.success() {
                let text = said.trim_end().trim_start_matches("qemu-img: ").to_owned();
                assert_eq!(ended, Err(text), "{told}");
                assert!(content(&bytes) == content(&image), "{told}");
                refused += 1;
                continue;
            }
            assert_eq!(ended, Ok(()), "{told}");
            done += 1;
            oracle.write(NAME, &bytes);
            let theirs_now = oracle.read("theirs.qcow2");
            assert_eq!(size(&bytes), size(&theirs_now), "{told}");
            assert!(
                content(&bytes) == content(&theirs_now),
                "{told}: the content is another"
            );
            assert_eq!(list(&oracle, NAME), list(&oracle, "theirs.qcow2"), "{told}");
            let checked = theirs(&oracle, NAME).unwrap_or_else(|error| panic!("{told}: {error}"));
            let report = checked.report;
            assert_eq!(
                (report.corruptions, report.leaks, report.check_errors),
                (0, 0, 0),
                "{told}: {:?}",
                checked.lines
            );
        }
    }
    assert!(done > 60 && refused > 80, "{done} {refused}");
}
