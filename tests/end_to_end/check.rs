//! `check` beside `qemu-img check`: the same figures, lines and exit codes on the same images, and the same results of repairs.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::{Command, Output};

use crate::place::{Place, Writer, code, complaint};
use crate::tools;

/// Where the tables of [`image`] are: it has clusters of 64 KiB.
const REFCOUNT_TABLE: u64 = 0x1_0000;
const REFCOUNTS: u64 = 0x2_0000;
const L2: u64 = 0x4_0000;
const DATA: u64 = 0x5_0000;

/// A name, and numbers to write: where, how many bytes each, and which.
type Damage = (&'static str, &'static [(u64, usize, u64)]);

const COPIED: u64 = 1 << 63;

const DAMAGES: &[Damage] = &[
    ("nothing", &[]),
    ("a leaked cluster", &[(L2 + 8, 8, 0)]),
    ("a count that is too high", &[(REFCOUNTS + 2 * 7, 2, 4)]),
    ("a count that is too low", &[(L2 + 8, 8, DATA | COPIED)]),
    ("a flag", &[(L2, 8, DATA)]),
    ("a count of zero", &[(REFCOUNTS + 2 * 6, 2, 0)]),
    ("no refcount block", &[(REFCOUNT_TABLE, 8, 0)]),
    ("data behind the end", &[(L2, 8, 0x500_0000 | COPIED)]),
    ("reserved bits", &[(L2, 8, DATA | COPIED | 2)]),
    (
        "room for zeroes that is not aligned",
        &[(L2, 8, (DATA + 512) | 1)],
    ),
    ("a dirty image", &[(72, 8, 1), (REFCOUNTS + 2 * 7, 2, 2)]),
];

/// An image with four clusters of data and this damage, under several names.
fn damaged(place: &Place, damage: &Damage, names: &[&str]) {
    for name in names {
        tool(
            place,
            "qemu-img",
            &["create", "-q", "-f", "qcow2", name, "4M"],
        );
        tool(
            place,
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 1 0 256k", name],
        );
        let file = fs::OpenOptions::new()
            .write(true)
            .open(place.path(name))
            .expect("opened");
        for (offset, bytes, number) in damage.1 {
            let number = number.to_be_bytes();
            file.write_all_at(&number[8 - bytes..], *offset)
                .expect("written");
        }
    }
}

fn tool(place: &Place, program: &str, arguments: &[&str]) -> Output {
    let output = qemu(place, program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    output
}

fn qemu(place: &Place, program: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .current_dir(place.folder.path())
        .output()
        .expect("it runs")
}

fn lines(bytes: &[u8]) -> Vec<String> {
    let mut lines: Vec<String> = String::from_utf8_lossy(bytes)
        .lines()
        .map(str::to_owned)
        .collect();
    lines.sort();
    lines
}

#[test]
fn a_check_says_what_qemu_img_says() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    for damage in DAMAGES {
        let place = Place::new();
        damaged(&place, damage, &["image"]);
        for output in ["human", "json"] {
            let form = format!("--output={output}");
            let ours = place.run(&["check", &form, "image"]);
            let theirs = qemu(
                &place,
                "qemu-img",
                &["check", "-f", "qcow2", &form, "image"],
            );
            let told = format!("{} {output}", damage.0);
            assert_eq!(code(&ours), code(&theirs), "{told}");
            let text = |output: &Output| {
                String::from_utf8_lossy(&output.stdout)
                    .trim_end()
                    .to_owned()
            };
            assert_eq!(text(&ours), text(&theirs), "{told}");
            assert_eq!(lines(&ours.stderr), lines(&theirs.stderr), "{told}");
        }
    }
}

#[test]
fn a_repaired_image_is_clean_to_qemu_img_and_reads_as_its_own() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    for damage in DAMAGES {
        let place = Place::new();
        damaged(&place, damage, &["ours", "theirs"]);
        let ours = place.run(&["check", "--repair=all", "--json", "ours"]);
        let theirs = qemu(
            &place,
            "qemu-img",
            &["check", "-q", "-f", "qcow2", "-r", "all", "theirs"],
        );
        assert_eq!(
            code(&ours),
            code(&theirs),
            "{}: {}",
            damage.0,
            complaint(&ours)
        );
        let checked = qemu(&place, "qemu-img", &["check", "-q", "-f", "qcow2", "ours"]);
        assert_eq!(code(&checked), code(&ours), "{}", damage.0);
        tool(
            &place,
            "qemu-img",
            &["compare", "-f", "qcow2", "-F", "qcow2", "ours", "theirs"],
        );
    }
}

#[test]
fn exit_codes_are_those_of_qemu_img() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    let place = Place::new();
    damaged(&place, &DAMAGES[1], &["leaked"]);
    damaged(&place, &DAMAGES[5], &["uncounted"]);
    fs::write(place.path("text"), "no image").expect("written");
    let before = place.read("uncounted");
    for (arguments, expected, words) in [
        (&["check", "leaked"][..], 3, "Leaked cluster"),
        (&["check", "-f", "raw", "leaked"], 63, "nothing to check"),
        (
            &["check", "missing"],
            1,
            "blockyard: Could not open 'missing': No such file or directory",
        ),
        (&["check", "text"], 1, "Image is not in qcow2 format"),
        (&["check", "."], 1, "cannot use '.'"),
        (&["check"], 1, "FILE"),
        (&["check", "--repair=some", "leaked"], 1, "possible values"),
        (
            &["check", "-U", "--repair=all", "leaked"],
            1,
            "cannot be used with",
        ),
        (
            &["check", "-r", "leaks", "uncounted"],
            1,
            "need to rebuild refcount structures",
        ),
        (&["check", "-r", "leaks", "leaked"], 0, "Repairing cluster"),
        (&["check", "-q", "leaked"], 0, ""),
    ] {
        let output = place.run(arguments);
        assert_eq!(
            code(&output),
            expected,
            "{arguments:?}: {}",
            complaint(&output)
        );
        assert!(
            complaint(&output).contains(words),
            "{arguments:?}: {}",
            complaint(&output)
        );
    }
    assert!(place.read("uncounted") == before, "nothing was done");
}

#[test]
fn an_image_in_use_is_left_alone() {
    if !tools::have("qemu-io", "qemu-utils") {
        return;
    }
    let place = Place::new();
    damaged(&place, &DAMAGES[1], &["image"]);
    let before = place.read("image");
    let writer = Writer::open(&place.path("image"));
    place.fail(&["check", "image"], "Failed to get");
    place.fail(&["check", "--repair=leaks", "image"], "Failed to get");
    let output = place.run(&["check", "--force-share", "image"]);
    assert_eq!(code(&output), 3, "{}", complaint(&output));
    drop(writer);
    assert!(place.read("image") == before);
    place.succeed(&["check", "--repair=leaks", "image"]);
}
