//! `blockyard bitmap` beside `qemu-img bitmap`: the same images, the same messages; and what only ours shows.

use std::path::Path;

use serde_json::{Value, json};

use crate::tools::{self, Ended};

/// What both do, one after the other on the same image: our arguments and theirs.
const DEEDS: &[(&[&str], &[&str])] = &[
    (&["add", "i", "usual"], &["--add", "i", "usual"]),
    (&["add", "i", "usual"], &["--add", "i", "usual"]),
    (
        &["add", "-g", "4k", "--disabled", "i", "fine"],
        &["--add", "--disable", "-g", "4k", "i", "fine"],
    ),
    (
        &["add", "-g", "1M", "i", "third"],
        &["--add", "-g", "1M", "i", "third"],
    ),
    (
        &["add", "-g", "7", "i", "odd"],
        &["--add", "-g", "7", "i", "odd"],
    ),
    (&["add", "i", ""], &["--add", "i", ""]),
    (&["add", "old", "b"], &["--add", "old", "b"]),
    (&["enable", "i", "fine"], &["--enable", "i", "fine"]),
    (&["disable", "i", "usual"], &["--disable", "i", "usual"]),
    (&["write"], &["write"]),
    (
        &["merge", "i", "usual", "fine"],
        &["--merge", "fine", "i", "usual"],
    ),
    (
        &["merge", "i", "usual", "nope"],
        &["--merge", "nope", "i", "usual"],
    ),
    (
        &["merge", "i", "nope", "fine"],
        &["--merge", "fine", "i", "nope"],
    ),
    (
        &["merge", "-b", "other", "i", "third", "theirs"],
        &[
            "--merge", "theirs", "-b", "other", "-F", "qcow2", "i", "third",
        ],
    ),
    (
        &["merge", "-b", "long", "i", "third", "theirs"],
        &[
            "--merge", "theirs", "-b", "long", "-F", "qcow2", "i", "third",
        ],
    ),
    (&["clear", "i", "fine"], &["--clear", "i", "fine"]),
    (&["clear", "i", "nope"], &["--clear", "i", "nope"]),
    (&["remove", "i", "nope"], &["--remove", "i", "nope"]),
    (&["remove", "i", "fine"], &["--remove", "i", "fine"]),
    (&["remove", "i", "third"], &["--remove", "i", "third"]),
    (&["remove", "i", "usual"], &["--remove", "i", "usual"]),
];

const WRITES: &[&str] = &["-c", "write 0 100k", "-c", "write 3M 5k", "i"];

fn run(folder: &Path, program: &str, arguments: &[&str]) -> Ended {
    let mut command = std::process::Command::new(program);
    command.args(arguments).current_dir(folder);
    tools::run_command(command, "")
}

fn must(folder: &Path, program: &str, arguments: &[&str]) -> String {
    let ended = run(folder, program, arguments);
    assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.errors);
    ended.output
}

fn make(folder: &Path) {
    let create = ["create", "-q", "-f", "qcow2"];
    for (name, size, options) in [
        ("i", "4M", "cluster_size=4k"),
        ("old", "4M", "compat=0.10"),
        ("other", "4M", "lazy_refcounts=on"),
        ("long", "8M", "cluster_size=64k"),
    ] {
        must(
            folder,
            "qemu-img",
            &[&create[..], &["-o", options, name, size]].concat(),
        );
    }
    for name in ["other", "long"] {
        must(folder, "qemu-img", &["bitmap", "--add", name, "theirs"]);
        must(folder, "qemu-io", &["-c", "write 2M 1M", name]);
    }
}

/// Flags, granularities and bits of all bitmaps of the image.
fn bitmaps(folder: &Path) -> Value {
    let listed = tools::run(folder, &["bitmap", "list", "--json", "i"], "");
    assert_eq!(listed.code, Some(0), "{}", listed.errors);
    let listed: Value = serde_json::from_str(&listed.output).expect("JSON");
    let all = listed.as_array().expect("a list").iter();
    let with_bits = all.map(|one| {
        let name = one["name"].as_str().expect("a name");
        let dumped = tools::run(folder, &["bitmap", "dump", "--json", "i", name], "");
        let runs: Value = serde_json::from_str(&dumped.output).expect("JSON");
        let lengths = runs.as_array().expect("a list").iter();
        let sum: u64 = lengths
            .map(|run| run["length"].as_u64().expect("bytes"))
            .sum();
        assert_eq!(one["dirty-bytes"], json!(sum));
        json!([one, runs])
    });
    with_bits.collect()
}

#[test]
fn both_change_bitmaps_in_the_same_way() {
    if !tools::have_oracle() || !tools::have("qemu-io", "qemu-utils") {
        return;
    }
    let (ours, theirs) = (
        tempfile::tempdir().expect("a folder"),
        tempfile::tempdir().expect("a folder"),
    );
    let (ours, theirs) = (ours.path(), theirs.path());
    make(ours);
    make(theirs);
    let mut refused = 0;
    for (our, their) in DEEDS {
        if our == &["write"] {
            must(ours, "qemu-io", WRITES);
            must(theirs, "qemu-io", WRITES);
            continue;
        }
        let one = tools::run(ours, &[&["bitmap"], *our].concat(), "");
        let other = run(theirs, "qemu-img", &[&["bitmap"], *their].concat());
        assert_eq!(
            one.code, other.code,
            "{our:?}: {} {}",
            one.errors, other.errors
        );
        let plain = |errors: &str| {
            let text = errors
                .trim_end()
                .replace("qemu-img: ", "")
                .replace("blockyard: ", "");
            let words = text.split(' ').map(|word| {
                let is_made_up = word.starts_with("#block") || word.starts_with("'#block");
                let is_ours = word.starts_with("image") || word.starts_with("'image");
                if is_made_up || is_ours { "NODE" } else { word }
            });
            words.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(plain(&one.errors), plain(&other.errors), "{our:?}");
        refused += usize::from(one.code != Some(0));
        assert_eq!(bitmaps(ours), bitmaps(theirs), "{our:?}");
        must(ours, "qemu-img", &["check", "i"]);
    }
    assert!(refused > 7, "{refused}");
    assert_eq!(bitmaps(ours), json!([]));
}

#[test]
fn people_are_shown_what_has_changed() {
    if !tools::have_oracle() || !tools::have("qemu-io", "qemu-utils") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    make(folder);
    let bitmap = |arguments: &[&str]| tools::run(folder, &[&["bitmap"], arguments].concat(), "");
    assert_eq!(bitmap(&["list", "i"]).output, "");
    for name in ["one", "two"] {
        must(folder, "qemu-img", &["bitmap", "--add", "i", name]);
    }
    must(folder, "qemu-img", &["bitmap", "--disable", "i", "two"]);
    must(folder, "qemu-io", WRITES);
    let shown = bitmap(&["list", "i"]).output;
    let lines: Vec<Vec<&str>> = shown
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines[1], ["one", "4", "KiB", "108", "KiB", "recording"]);
    assert_eq!(lines[2], ["two", "4", "KiB", "0", "B", "disabled"]);
    let dumped = bitmap(&["dump", "i", "one"]).output;
    assert_eq!(
        dumped,
        "Offset          Length\n0x0             0x19000\n0x300000        0x2000\n"
    );
    assert_eq!(bitmap(&["dump", "--json", "i", "two"]).output, "[]\n");
    let refused = bitmap(&["dump", "i", "nope"]);
    let text = "blockyard: Operation dump on bitmap nope failed: Dirty bitmap 'nope' not found\n";
    assert_eq!((refused.code, refused.errors.as_str()), (Some(1), text));
    assert_eq!(bitmap(&["frobnicate", "i"]).code, Some(1));
}
