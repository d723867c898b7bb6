//! `backup` and `mirror` without a daemon: equal copies, refusals that touch nothing, cancelling, failures, exit codes.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

use rustix::process::Signal;
use serde_json::Value;

use crate::place::{Loop, MIB, Place, Running, Tiny, Writer, can_mount, code, complaint, events};
use crate::tools;

#[test]
fn copies_are_equal_to_the_last_byte() {
    let place = Place::new();
    for length in [0, 1, 511, 512, 513, 4095, 4097, 65_537, 3 * MIB + 1] {
        let bytes = place.data("source", length);
        for kind in ["backup", "mirror"] {
            for cache in ["auto", "writeback"] {
                for backend in ["auto", "threads"] {
                    let options = ["--cache", cache, "--io-backend", backend, "--verify"];
                    let output =
                        place.succeed(&[&[kind, "source", "target"][..], &options].concat());
                    let what = format!("{kind} of {length} bytes, {options:?}");
                    assert!(place.read("target") == bytes, "{what}");
                    let said = String::from_utf8_lossy(&output.stdout).into_owned();
                    assert!(
                        said.starts_with(kind) && said.ends_with(", verified\n"),
                        "{what}: {said}"
                    );
                    fs::remove_file(place.path("target")).expect("removed");
                }
            }
        }
    }
}

#[test]
fn holes_stay_holes_and_zeroes_become_holes_on_request() {
    let place = Place::new();
    let source = File::create(place.path("holes")).expect("made");
    source.set_len(64 * MIB + 100).expect("grown");
    source.write_all_at(&[7; 4096], 10 * MIB).expect("written");
    fs::write(place.path("zeroes"), vec![0; 4 * MIB as usize]).expect("written");
    let room = |name: &str| fs::metadata(place.path(name)).expect("there").blocks() * 512;
    for kind in ["backup", "mirror"] {
        place.succeed(&[kind, "--force", "holes", "target"]);
        assert!(place.read("target") == place.read("holes"), "{kind}");
        assert!(room("target") <= 2 * MIB, "{kind}: {}", room("target"));
        place.succeed(&[
            kind,
            "--force",
            "--detect-zeroes",
            "unmap",
            "zeroes",
            "target",
        ]);
        assert!(place.read("target") == place.read("zeroes"), "{kind}");
        assert!(room("target") < MIB, "{kind}: {}", room("target"));
    }
    place.succeed(&["backup", "--preallocation", "full", "zeroes", "reserved"]);
    assert!(room("reserved") >= 4 * MIB);
}

#[test]
fn who_may_not_read_the_disk_may_not_read_its_copy() {
    let place = Place::new();
    place.data("source", 4096);
    let private = fs::Permissions::from_mode(0o600);
    fs::set_permissions(place.path("source"), private).expect("set");
    place.succeed(&["backup", "source", "target"]);
    let mode = fs::metadata(place.path("target")).expect("there").mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn an_existing_target_is_kept_unless_told() {
    let place = Place::new();
    let bytes = place.data("source", 70_000);
    let before = place.data("target", 200_000);
    for kind in ["backup", "mirror"] {
        place.fail(
            &[kind, "source", "target"],
            "'target' exists already; --force",
        );
        assert!(place.read("target") == before);
    }
    place.succeed(&["backup", "--force", "source", "target"]);
    assert!(place.read("target") == bytes);
    // Growing is as good as shrinking.
    place.data("target", 5);
    place.succeed(&["mirror", "--force", "source", "target"]);
    assert!(place.read("target") == bytes);
}

#[test]
fn the_same_file_is_refused_under_any_name() {
    let place = Place::new();
    let bytes = place.data("source", 10_000);
    fs::hard_link(place.path("source"), place.path("hard")).expect("linked");
    symlink("source", place.path("soft")).expect("linked");
    for name in ["source", "hard", "soft", "./source"] {
        let words = format!("'source' and '{name}' are the same file");
        place.fail(&["backup", "--force", "source", name], &words);
        assert!(place.read("source") == bytes, "{name}");
    }
}

#[test]
fn what_looks_like_another_format_must_be_called_raw() {
    let place = Place::new();
    for (offset, magic, name) in [
        (0, &b"QFI\xfb"[..], "qcow2"),
        (0, b"KDMV", "vmdk"),
        (0, b"vhdxfile", "vhdx"),
        (64, b"\x7f\x10\xda\xbe", "vdi"),
    ] {
        let mut bytes = vec![1; 1000];
        bytes[offset..offset + magic.len()].copy_from_slice(magic);
        fs::write(place.path("image"), &bytes).expect("written");
        let words = format!("'image' looks like a {name} image");
        place.fail(&["backup", "image", "target"], &words);
        place.fail(&["backup", "image", "target"], "--source-format raw");
        assert_eq!(place.names(), ["image"]);
        place.succeed(&["backup", "--source-format", "raw", "image", "target"]);
        assert!(place.read("target") == bytes);
        fs::remove_file(place.path("target")).expect("removed");
    }
}

#[test]
fn what_cannot_be_copied_is_said_and_nothing_is_left() {
    let place = Place::new();
    place.data("source", 10_000);
    symlink("nowhere", place.path("dangling")).expect("linked");
    fs::create_dir(place.path("folder")).expect("made");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        place.path("fifo"),
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .expect("made");
    let before = place.names();
    for (source, target, words) in [
        (
            "missing",
            "target",
            "cannot read 'missing': No such file or directory",
        ),
        ("folder", "target", "'folder' is a directory"),
        (
            "fifo",
            "target",
            "'fifo' is neither a regular file nor a block device",
        ),
        ("source", "folder", "'folder' is a directory"),
        (
            "source",
            "fifo",
            "'fifo' is neither a regular file nor a block device",
        ),
        ("source", "no/target", "the folder 'no' does not exist"),
        (
            "source",
            "dangling",
            "'dangling' is a symbolic link that leads nowhere",
        ),
        (
            "source",
            "source/target",
            "cannot open 'source/target': Not a directory",
        ),
    ] {
        for force in [&[][..], &["--force"]] {
            place.fail(&[&["backup", source, target][..], force].concat(), words);
            assert_eq!(place.names(), before, "{source} to {target}");
        }
    }
}

#[test]
fn usage_errors_are_two_and_help_is_none() {
    let place = Place::new();
    place.data("source", 1000);
    for arguments in [
        &[][..],
        &["frob"],
        &["backup"],
        &["backup", "source"],
        &["backup", "source", "target", "more"],
        &["backup", "source", "target", "--frob"],
        &["backup", "source", "target", "--speed", "fast"],
        &["backup", "source", "target", "--speed", "-1"],
        &["backup", "source", "target", "--speed", "9E"],
        &["backup", "source", "target", "--target-format", "vmdk"],
        &["backup", "source", "target", "--on-error", "stop"],
        &[
            "backup",
            "source",
            "target",
            "--preallocation",
            "full",
            "--detect-zeroes",
            "unmap",
        ],
    ] {
        let output = place.run(arguments);
        assert_eq!(code(&output), 2, "{arguments:?}: {}", complaint(&output));
        assert!(!complaint(&output).is_empty(), "{arguments:?}");
        assert_eq!(place.names(), ["source"], "{arguments:?}");
    }
    for arguments in [
        &["--help"][..],
        &["backup", "--help"],
        &["mirror", "--help"],
        &["help", "backup"],
    ] {
        let output = place.succeed(arguments);
        let help = String::from_utf8_lossy(&output.stdout).into_owned();
        for words in ["Usage:", "Examples:", "Exit codes:\n  0 ", "130 "] {
            assert!(help.contains(words), "{arguments:?}: {words} in {help}");
        }
    }
    for arguments in [&["daemon", "--help"][..], &["help", "daemon"]] {
        let output = place.succeed(arguments);
        assert!(String::from_utf8_lossy(&output.stdout).contains("--blockdev"));
    }
    let output = place.succeed(&["--version"]);
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("blockyard 0."));
}

#[test]
fn json_lines_end_with_what_happened() {
    let place = Place::new();
    place.data("source", 6 * MIB + 5);
    let output = place.succeed(&[
        "mirror", "--json", "--speed", "8M", "--verify", "source", "target",
    ]);
    let all = events(&output.stdout);
    let (last, before) = all.split_last().expect("events");
    assert!(
        before.iter().any(|event| event["id"] == "mirror"),
        "{all:?}"
    );
    let mut done = 0;
    for event in before.iter().filter(|event| event["id"] == "mirror") {
        assert_eq!(event["event"], "progress");
        let current = event["current-bytes"].as_u64().expect("a number");
        assert!(
            current >= done && event["total-bytes"].as_u64() >= Some(current),
            "{event}"
        );
        done = current;
    }
    assert_eq!(last["event"], "completed");
    assert_eq!(last["bytes"], 6 * MIB + 5);
    assert_eq!(last["verified"], true);
    assert!(last["seconds"].as_f64() > Some(0.0) && last["bytes-per-second"].as_u64() > Some(0));
    assert!(output.stderr.is_empty(), "{}", complaint(&output));

    let output = place.run(&["backup", "--json", "source", "target"]);
    assert_eq!(code(&output), 1);
    let all = events(&output.stdout);
    assert_eq!(all.len(), 1);
    assert_eq!(all[0]["event"], "failed");
    assert!(
        all[0]["error"]
            .as_str()
            .expect("a text")
            .contains("exists already")
    );

    let output = place.succeed(&["backup", "--quiet", "--force", "source", "target"]);
    assert!(output.stdout.is_empty() && output.stderr.is_empty());
}

#[test]
fn signals_cancel_and_clean_up() {
    let place = Place::new();
    let bytes = place.data("source", 64 * MIB);
    for (kind, signal) in [
        ("backup", Signal::INT),
        ("mirror", Signal::TERM),
        ("backup", Signal::HUP),
    ] {
        let running = Running::start(&place, &[kind, "source", "target"]);
        running.signal(signal);
        let (code, last) = running.end();
        assert_eq!(code, 130, "{last}");
        assert_eq!(last["event"], "cancelled", "{last}");
        assert_eq!(last["target-removed"], true, "{last}");
        assert_eq!(place.names(), ["source"], "{kind}");
    }
    // timeout(1) sends its signal to the process and then to its group.
    let running = Running::start(&place, &["backup", "source", "target"]);
    running.signal(Signal::TERM);
    running.signal(Signal::TERM);
    let (code, last) = running.end();
    assert_eq!(
        (code, &last["target-removed"]),
        (130, &Value::from(true)),
        "{last}"
    );
    assert_eq!(place.names(), ["source"]);
    // What was there before stays, and so does what is asked for.
    place.data("old", 5000);
    for options in [
        &["--force", "source", "old"][..],
        &["--keep-partial", "source", "new"],
    ] {
        let running = Running::start(&place, &[&["backup"][..], options].concat());
        running.signal(Signal::INT);
        let (code, last) = running.end();
        assert_eq!(code, 130, "{last}");
        assert_eq!(last["target-removed"], false, "{last}");
    }
    assert_eq!(place.names(), ["new", "old", "source"]);
    assert!(place.read("source") == bytes);
}

#[test]
fn a_target_that_was_replaced_meanwhile_is_not_removed() {
    let place = Place::new();
    place.data("source", 64 * MIB);
    let running = Running::start(&place, &["backup", "source", "target"]);
    fs::remove_file(place.path("target")).expect("removed");
    let theirs = place.data("target", 100);
    running.signal(Signal::INT);
    let (code, last) = running.end();
    assert_eq!(
        (code, &last["target-removed"]),
        (130, &Value::from(false)),
        "{last}"
    );
    assert!(place.read("target") == theirs);

    // Nor is it taken for the copy.
    place.data("source", 6 * MIB);
    let running = Running::start(&place, &["backup", "--force", "source", "target"]);
    fs::remove_file(place.path("target")).expect("removed");
    let theirs = place.data("target", 100);
    let (code, last) = running.end();
    assert_eq!(code, 1, "{last}");
    assert_eq!(
        last["error"], "'target' was replaced while it was written",
        "{last}"
    );
    assert!(place.read("target") == theirs);
}

#[test]
fn a_source_that_changes_is_noticed() {
    let place = Place::new();
    place.data("source", 12 * MIB);
    let source = File::options()
        .write(true)
        .open(place.path("source"))
        .expect("open");
    let running = Running::start(&place, &["backup", "--verify", "source", "target"]);
    // What has been copied already.
    source.write_all_at(&[255], 0).expect("written");
    let (code, last) = running.end();
    assert_eq!(
        (code, &last["verified"]),
        (1, &Value::from(false)),
        "{last}"
    );
    assert_eq!(
        last["error"],
        "'source' was written to while it was copied, so that 'target' may hold a mixture of old and new",
        "{last}"
    );
    assert_eq!(place.names(), ["source"]);

    let running = Running::start(&place, &["backup", "source", "target"]);
    source.set_len(MIB).expect("cut");
    let (code, last) = running.end();
    assert_eq!(code, 1, "{last}");
    assert!(
        last["error"]
            .as_str()
            .expect("a text")
            .contains("changed its length"),
        "{last}"
    );
    assert_eq!(place.names(), ["source"]);
}

#[test]
fn images_in_use_are_refused_before_anything_changes() {
    if !tools::have("qemu-io", "qemu-utils") {
        return;
    }
    let place = Place::new();
    place.data("source", MIB);
    let before = place.data("target", 3 * MIB);
    for used in ["source", "target"] {
        let writer = Writer::open(&place.path(used));
        let words = format!("cannot use '{used}': Failed to get shared \"write\" lock");
        place.fail(&["backup", "--force", "source", "target"], &words);
        assert!(place.read("target") == before, "{used}");
        drop(writer);
    }
    let writer = Writer::open(&place.path("source"));
    place.fail(&["backup", "source", "new"], "cannot use 'source'");
    drop(writer);
    assert_eq!(place.names(), ["source", "target"]);
}

#[test]
fn a_full_target_fails_with_its_place_and_is_removed() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    place.data("source", 8 * MIB);
    let Some(tiny) = Tiny::mount(place.path("tiny")) else {
        return;
    };
    for options in [&[][..], &["--preallocation", "full"]] {
        for kind in ["backup", "mirror"] {
            let arguments = [&[kind, "source", "tiny/target"][..], options].concat();
            place.fail(&arguments, "No space left on device");
            place.fail(&arguments, "at offset ");
            place.fail(&arguments, "'tiny/target' was removed");
            assert_eq!(fs::read_dir(&tiny.path).expect("a folder").count(), 0);
        }
    }
    let output = place.run(&["backup", "--keep-partial", "source", "tiny/target"]);
    assert_eq!(code(&output), 1);
    assert!(
        complaint(&output).contains("kept and incomplete"),
        "{}",
        complaint(&output)
    );
    assert!(tiny.path.join("target").exists());
}

#[test]
fn a_bad_sector_fails_with_its_place() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    place.data("disk", 8 * MIB);
    let Some(device) = Loop::over(&place.path("disk")) else {
        return;
    };
    // The device keeps its length, and has nothing behind its second half.
    let disk = File::options()
        .write(true)
        .open(place.path("disk"))
        .expect("open");
    disk.set_len(4 * MIB).expect("cut");
    for kind in ["backup", "mirror"] {
        let output = place.run(&[kind, "--json", &device.path, "target"]);
        assert_eq!(code(&output), 1);
        let last = events(&output.stdout).pop().expect("an event");
        assert_eq!(last["error"], "Input/output error", "{last}");
        let failed_at = last["failed-at"].as_str().expect("a place");
        assert!(
            failed_at.starts_with(&format!("'{}'", device.path)),
            "{last}"
        );
        assert!(failed_at.contains("bytes at offset"), "{last}");
        assert_eq!(place.names(), ["disk"]);
    }
}

#[test]
fn block_devices_are_copied_both_ways() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    let bytes = place.data("source", 3 * MIB + 512);
    for (name, length) in [("large", 4 * MIB), ("small", MIB)] {
        fs::write(place.path(name), vec![0xee; length as usize]).expect("written");
    }
    let (Some(large), Some(small)) = (
        Loop::over(&place.path("large")),
        Loop::over(&place.path("small")),
    ) else {
        return;
    };
    place.fail(
        &["backup", "source", &large.path],
        "is a block device; --force",
    );
    place.fail(
        &["backup", "--force", "source", &small.path],
        "too few for the",
    );
    assert!(place.read("small").iter().all(|byte| *byte == 0xee));
    let output = place.succeed(&["backup", "--force", "--verify", "source", &large.path]);
    assert!(
        complaint(&output).contains("is longer than"),
        "{}",
        complaint(&output)
    );
    let written = place.read("large");
    assert!(written[..bytes.len()] == bytes[..]);
    assert!(
        written[bytes.len()..].iter().all(|byte| *byte == 0xee),
        "behind the copy"
    );
    place.succeed(&["mirror", &large.path, "back"]);
    assert!(place.read("back") == written);
    place.fail(
        &["backup", "--force", &large.path, &large.path],
        "are the same device",
    );
}

#[test]
fn holes_overwrite_what_a_device_held() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    let source = File::create(place.path("holes")).expect("made");
    source.set_len(8 * MIB).expect("grown");
    source.write_all_at(&[7; 8192], 3 * MIB).expect("written");
    for (kind, gives_back) in [("backup", false), ("mirror", true)] {
        fs::write(place.path("disk"), vec![0xee; 8 * MIB as usize]).expect("written");
        let Some(device) = Loop::over(&place.path("disk")) else {
            return;
        };
        place.succeed(&[kind, "--force", "--verify", "holes", &device.path]);
        assert!(place.read("disk") == place.read("holes"), "{kind}");
        let room = fs::metadata(place.path("disk")).expect("there").blocks() * 512;
        assert_eq!(room < 4 * MIB, gives_back, "{kind}: {room}");
    }
}
