//! What commands on chains refuse without a daemon: in a dry run what they refuse in earnest, in the same words, and in words about
//! files.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use crate::images::run;
use crate::place::{Place, code, complaint};
use crate::tools::have_oracle;

/// Makes an image, on `backing` if there is one.
fn make(place: &Place, name: &str, backing: Option<&str>) {
    let mut create = vec!["create", "-q", "-f", "qcow2"];
    if let Some(backing) = backing {
        create.extend(["-b", backing, "-F", "qcow2"]);
    }
    run(
        place.folder.path(),
        "qemu-img",
        &[&create[..], &[name, "1M"]].concat(),
    );
}

/// Sets the mark that a qcow2 image has been found corrupt.
fn mark_corrupt(place: &Place, name: &str) {
    let file = OpenOptions::new().write(true).open(place.path(name));
    file.expect("opened").write_at(&[2], 79).expect("written");
}

#[test]
fn a_dry_run_refuses_a_corrupt_image_as_the_command_does() {
    if !have_oracle() {
        return;
    }
    let place = Place::new();
    make(&place, "base", None);
    for (name, backing) in [("corrupt", "base"), ("on", "corrupt"), ("top", "on")] {
        make(&place, name, Some(backing));
    }
    mark_corrupt(&place, "corrupt");
    let names = ["base", "corrupt", "on", "top"];
    let before = names.map(|name| place.read(name));
    for (command, is_refused) in [
        (&["commit", "corrupt"][..], true),
        (&["stream", "corrupt"], true),
        (&["rebase", "-b", "base", "-F", "qcow2", "corrupt"], true),
        (
            &["rebase", "-u", "-b", "base", "-F", "qcow2", "corrupt"],
            true,
        ),
        (&["commit", "on"], true),
        (&["commit", "--base", "corrupt", "top"], true),
        (&["commit", "--top", "on", "--base", "corrupt", "top"], true),
        // Nothing is written to it.
        (&["stream", "on"], false),
        (&["commit", "--base", "base", "on"], false),
    ] {
        let dry = place.run(&[command, &["--dry-run"]].concat());
        assert!(names.map(|name| place.read(name)) == before, "{command:?}");
        if !is_refused {
            assert_eq!(code(&dry), 0, "{command:?}: {}", complaint(&dry));
            continue;
        }
        let in_earnest = place.run(command);
        assert!(names.map(|name| place.read(name)) == before, "{command:?}");
        for refused in [&dry, &in_earnest] {
            assert_eq!(code(refused), 1, "{command:?}: {}", complaint(refused));
        }
        let told = |output| complaint(output).lines().last().map(str::to_owned);
        assert_eq!(told(&dry), told(&in_earnest), "{command:?}");
        let refusal = told(&dry).expect("a line");
        assert!(
            refusal.ends_with("qcow2: Image is corrupt; cannot be opened read/write"),
            "{command:?}: {refusal}"
        );
    }
    for command in [&["commit", "--base", "base", "on"][..], &["stream", "on"]] {
        place.succeed(command);
    }
}

#[test]
fn nodes_are_told_by_their_files() {
    if !have_oracle() {
        return;
    }
    let place = Place::new();
    let folder = place.folder.path();
    let old = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        "old",
        "1M",
    ];
    run(folder, "qemu-img", &old);
    run(folder, "qemu-img", &["snapshot", "-c", "s", "old"]);
    let longer = [
        "create", "-q", "-f", "qcow2", "-b", "old", "-F", "qcow2", "longer", "2M",
    ];
    run(folder, "qemu-img", &longer);
    for command in [
        &["commit", "longer"][..],
        &["commit", "--dry-run", "longer"],
    ] {
        place.fail(
            command,
            "'longer': 'old' cannot be made as long as 'longer': Can't resize a v2 image which has snapshots",
        );
    }
}

#[test]
fn a_full_file_system_is_told_with_the_file_that_had_no_room() {
    let Some((place, tiny)) = Place::beside_tiny() else {
        return;
    };
    let folder = place.folder.path();
    run(
        folder,
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "tiny/base", "8M"],
    );
    let on = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "tiny/base",
        "-F",
        "qcow2",
        "over",
    ];
    run(folder, "qemu-img", &on);
    run(
        folder,
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 5 0 8M", "over"],
    );
    let ended = place.run(&["commit", "--force", "over"]);
    let told = complaint(&ended);
    assert_eq!(code(&ended), 1, "{told}");
    let words = "No space left on device ('tiny/base', ";
    assert!(told.contains(words) && !told.contains("node"), "{told}");
    // A copy tells its ends in the same way.
    place.data("source", 8 << 20);
    let ended = place.run(&["backup", "--force", "source", "tiny/copy"]);
    let told = complaint(&ended);
    let words = "No space left on device ('tiny/copy', ";
    assert!(told.contains(words) && !told.contains("node"), "{told}");
    drop(tiny);
}
