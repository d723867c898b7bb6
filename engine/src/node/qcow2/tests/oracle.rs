//! The same images in the hands of QEMU's tools: each reads what the other has written.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use blockyard_images::qcow2::units::Version;
use blockyard_simulator::{Seed, each_seed};
use blockyard_storage::ByteRange;
use futures_util::future::join_all;

use super::model::{Model, Operation, assert_holds, assert_status, content};
use super::random::round;
use super::yard::{DataFile, Setup, Yard};
use crate::node::Node;
use crate::node::qcow2::Qcow2Node;
use crate::request::{DetectZeroes, Discard};

/// Whether qemu-img and qemu-io are there; else the test has to return.
fn have_qemu() -> bool {
    let found = ["qemu-img", "qemu-io"]
        .iter()
        .all(|tool| Command::new(tool).arg("--version").output().is_ok());
    let missing = "qemu-img or qemu-io is missing: install the package qemu-utils";
    assert!(
        found || std::env::var("CI").as_deref() != Ok("true"),
        "{missing}"
    );
    if !found {
        eprintln!("SKIPPED: {missing}");
    }
    found
}

/// Runs a tool; its output is that of a success.
fn qemu(folder: &Path, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("it runs");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    let failed = !output.status.success() || text.contains("failed");
    assert!(!failed, "{program} {arguments:?}: {text}");
    text
}

/// Puts the disks of a yard into files.
fn save(yard: &Yard, folder: &Path) {
    let disks = [
        ("image", Some(&yard.image)),
        ("data", yard.data.as_ref()),
        ("base", yard.base.as_ref()),
    ];
    for (name, disk) in disks {
        if let Some(disk) = disk {
            std::fs::write(folder.join(name), disk.bytes()).expect("writable");
        }
    }
}

/// Takes image and data over from files.
fn load(yard: &Yard, folder: &Path) {
    let disks = [("image", Some(&yard.image)), ("data", yard.data.as_ref())];
    for (name, disk) in disks {
        if let Some(disk) = disk {
            let bytes = std::fs::read(folder.join(name)).expect("readable");
            disk.fill(0, &bytes);
        }
    }
}

fn requests(yard: &Yard, node: &Rc<Qcow2Node>, model: &mut Model, dice: &Seed) {
    for _ in 0..10 {
        let operations = round(dice, &yard.setup);
        let asked = operations.iter().map(|one| one.carry_out(node));
        for (operation, answer) in operations.iter().zip(yard.drive(join_all(asked))) {
            answer.unwrap_or_else(|error| panic!("{operation:?} {:?}: {error}", yard.setup));
            model.apply(operation, &yard.setup);
        }
    }
}

/// What qemu-io is told to do what an operation does.
fn commands(operation: &Operation, folder: &Path, number: usize) -> Vec<String> {
    let range = operation.range();
    let (offset, length) = (range.offset(), range.length());
    let pattern = |value: u8| {
        let name = format!("pattern-{number}");
        std::fs::write(folder.join(&name), content(range, value)).expect("writable");
        name
    };
    let command = match operation {
        _ if range.is_empty() => return Vec::new(),
        Operation::Read(_) | Operation::Fill(..) | Operation::Flush => return Vec::new(),
        Operation::Write(_, value) => format!("write -s {} {offset} {length}", pattern(*value)),
        Operation::Compress(_, value) => {
            format!("write -c -s {} {offset} {length}", pattern(*value))
        }
        Operation::Zero(_, true) => format!("write -z -u {offset} {length}"),
        Operation::Zero(_, false) => format!("write -z {offset} {length}"),
        Operation::Discard(_) => format!("discard {offset} {length}"),
    };
    vec!["-c".to_owned(), command]
}

#[test]
fn qemu_finds_no_fault_with_images_and_reads_what_they_hold() {
    if !have_qemu() {
        return;
    }
    each_seed("blockyard-engine", "qemu_finds_no_fault", 60, |seed| {
        let yard = Yard::new(Setup::random(seed));
        let dice = Seed::new(seed);
        let mut model = Model::of(&yard);
        let node = yard.open();
        requests(&yard, &node, &mut model, &dice);
        yard.drive(node.close()).expect("closed");
        let folder = tempfile::tempdir().expect("a folder");
        save(&yard, folder.path());
        let check = qemu(
            folder.path(),
            "qemu-img",
            &["check", "-f", "qcow2", "image"],
        );
        assert!(
            check.contains("No errors were found"),
            "{:?}: {check}",
            yard.setup
        );
        let convert = ["convert", "-f", "qcow2", "-O", "raw", "image", "raw"];
        qemu(folder.path(), "qemu-img", &convert);
        let read = std::fs::read(folder.path().join("raw")).expect("readable");
        assert!(read == model.bytes, "{:?}", yard.setup);
    });
}

#[test]
fn what_qemu_has_written_is_read_and_written_on() {
    if !have_qemu() {
        return;
    }
    each_seed("blockyard-engine", "what_qemu_has_written", 60, |seed| {
        let setup = Setup {
            detect_zeroes: DetectZeroes::Off,
            discard: Discard::Unmap,
            lazy_refcounts: false,
            // With fewer QEMU fails to put compressed clusters side by side.
            refcount_bits: 16,
            ..Setup::random(seed)
        };
        if setup.size_bytes == 0 {
            return;
        }
        let yard = Yard::new(setup);
        let setup = &yard.setup;
        let dice = Seed::new(seed);
        let mut model = Model::of(&yard);
        let folder = tempfile::tempdir().expect("a folder");
        save(&yard, folder.path());
        let mut all = vec![
            "-f".to_owned(),
            "qcow2".to_owned(),
            "-d".to_owned(),
            "unmap".to_owned(),
        ];
        let mut touched = Vec::new();
        for number in 0..15 {
            let operation = Operation::random(&dice, setup);
            // QEMU rounds a discard to sectors before it looks at clusters; sectors are all that its tool can ask for.
            let range = operation.range();
            let whole = range.is_aligned(512) || matches!(operation, Operation::Write(..));
            let told = commands(&operation, folder.path(), number);
            // QEMU compresses nothing into a cluster that is there already.
            let outer = range.align_outward(setup.cluster_bytes());
            let taken = matches!(operation, Operation::Compress(..))
                && touched
                    .iter()
                    .any(|other: &ByteRange| other.overlaps(&outer));
            if whole && !taken && !told.is_empty() {
                touched.push(outer);
                all.extend(told);
                model.apply(&operation, setup);
            }
        }
        all.push("image".to_owned());
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        qemu(folder.path(), "qemu-io", &all);
        load(&yard, folder.path());
        let node = yard.open();
        assert_holds(&yard, &node, &model, &dice);
        assert_status(&yard, &node, &model, &dice);
        requests(&yard, &node, &mut model, &dice);
        assert_holds(&yard, &node, &model, &dice);
        yard.drive(node.close()).expect("closed");
        save(&yard, folder.path());
        let check = qemu(
            folder.path(),
            "qemu-img",
            &["check", "-f", "qcow2", "image"],
        );
        assert!(check.contains("No errors were found"), "{setup:?}: {check}");
    });
}

/// What `qemu-img map` says: where each run begins and what it is. Places in the file are each one's own business, and so is
/// where a run is cut for them.
fn map(folder: &Path) -> Vec<(u64, String)> {
    let map = ["map", "-f", "qcow2", "--output=json", "image"];
    let text = qemu(folder, "qemu-img", &map);
    let mut runs: Vec<(u64, String)> = Vec::new();
    for entry in text.split('{').skip(1) {
        let member = |name: &str| {
            let (_, rest) = entry.split_once(&format!("\"{name}\": "))?;
            rest.split([',', '}']).next()
        };
        let start = member("start").and_then(|start| start.parse().ok());
        // Of data it also says where the file has holes.
        let kind = match member("data") {
            Some("true") => ["depth", "data", "compressed"].as_slice(),
            _ => &["depth", "present", "zero", "data"],
        };
        let kind = kind.iter().map(|name| member(name).unwrap_or("?"));
        let kind = kind.collect::<Vec<_>>().join(" ");
        if runs.last().is_none_or(|(_, last)| *last != kind) {
            runs.push((start.expect("a number"), kind));
        }
    }
    runs
}

#[test]
fn zeroes_and_discards_leave_the_same_map_as_qemus() {
    if !have_qemu() {
        return;
    }
    for version in [Version::V2, Version::V3] {
        for (cluster_bits, extended_l2) in [(12, false), (16, false), (16, true)] {
            for backing in [false, true] {
                if extended_l2 && version == Version::V2 {
                    continue;
                }
                let cluster = 1 << cluster_bits;
                let setup = Setup {
                    version,
                    extended_l2,
                    backing_bytes: backing.then_some(7 * cluster),
                    size_bytes: 20 * cluster - 512,
                    ..Setup::new(9, cluster_bits)
                };
                let ours = Yard::new(setup.clone());
                let theirs = tempfile::tempdir().expect("a folder");
                save(&ours, theirs.path());
                let at = |from: u64, length: u64| {
                    ByteRange::new(from * cluster / 4, length * cluster / 4)
                        .clamp_end(setup.size_bytes)
                };
                let steps = [
                    Operation::Write(at(0, 12), 1),
                    Operation::Write(at(33, 10), 1),
                    Operation::Zero(at(4, 4), false),
                    Operation::Zero(at(8, 4), true),
                    Operation::Zero(at(17, 2), false),
                    Operation::Zero(at(29, 2), true),
                    Operation::Zero(at(34, 1), false),
                    Operation::Zero(at(35, 6), true),
                    Operation::Discard(at(0, 3)),
                    Operation::Discard(at(41, 3)),
                    Operation::Discard(at(50, 9)),
                    Operation::Write(at(61, 2), 2),
                    Operation::Zero(at(70, 10), false),
                    Operation::Write(at(76, 4), 3),
                    Operation::Discard(at(76, 4)),
                    Operation::Compress(at(44, 4), 4),
                    Operation::Compress(at(48, 4), 4),
                    Operation::Zero(at(48, 4), true),
                ];
                let node = ours.open();
                let mut all: Vec<String> = ["-f", "qcow2", "-d", "unmap"].map(str::to_owned).into();
                for (number, step) in steps.iter().enumerate() {
                    ours.drive(step.carry_out(&node)).expect("done");
                    all.extend(commands(step, theirs.path(), number));
                }
                ours.drive(node.close()).expect("closed");
                all.push("image".to_owned());
                let all: Vec<&str> = all.iter().map(String::as_str).collect();
                qemu(theirs.path(), "qemu-io", &all);
                let folder = tempfile::tempdir().expect("a folder");
                save(&ours, folder.path());
                assert_eq!(map(folder.path()), map(theirs.path()), "{setup:?}");
                let compare = ["convert", "-f", "qcow2", "-O", "raw", "image", "raw"];
                let read = [folder.path(), theirs.path()].map(|folder| {
                    qemu(folder, "qemu-img", &compare);
                    std::fs::read(folder.join("raw")).expect("readable")
                });
                assert!(read[0] == read[1], "{setup:?}");
                assert_eq!(setup.data_file, DataFile::Inside);
            }
        }
    }
}
