//! `--dry-run` and the room that commands without a daemon take: no more than was told, and refused where there is less.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::images::run;
use crate::made_chains::{assert_shows, assert_sound, backing, info, json_of, keep, number, room};
use crate::place::{MIB, Place, Tiny, code, complaint};
use crate::tools::have_oracle;

const GIB: u64 = 1 << 30;

/// A node reserves so much ahead for small writes, where there is room.
const RESERVED_AHEAD: u64 = MIB;

fn needed(plan: &Value) -> u64 {
    let needed = &plan["space-needed"];
    let parts = ["data", "metadata", "bitmaps"];
    parts.iter().map(|part| number(&needed[part])).sum()
}

/// One sector in each 256 MiB of a disk of 8 GiB: what a cluster of bits stands for, at 512 bytes each.
fn write_far_apart(folder: &Path, name: &str, pattern: &str, count: u64) {
    let writes: Vec<String> = (0..count)
        .map(|place| format!("write -P {pattern} {} 512", place * (GIB / 4)))
        .collect();
    let mut arguments = vec!["-f", "qcow2"];
    for write in &writes {
        arguments.extend(["-c", write]);
    }
    arguments.push(name);
    run(folder, "qemu-io", &arguments);
}

fn make(folder: &Path, name: &str, on: Option<&str>) {
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
    if let Some(on) = on {
        arguments.extend(["-b", on, "-F", "qcow2"]);
    }
    arguments.extend([name, "8G"]);
    run(folder, "qemu-img", &arguments);
}

fn keep_bitmap(folder: &Path, name: &str) {
    let add = ["bitmap", "--add", "-g", "512", name, "changed"];
    run(folder, "qemu-img", &add);
}

/// The image keeps the bitmap, valid.
fn assert_kept(folder: &Path, name: &str, what: &str) {
    let info = info(folder, name);
    let kept = &info["format-specific"]["data"]["bitmaps"];
    assert_eq!(kept[0]["name"], "changed", "{what}: {info}");
    assert_eq!(kept[0]["flags"][0], "auto", "{what}: {info}");
    assert_eq!(kept[0]["flags"][1], Value::Null, "{what}: {info}");
}

/// 2 MiB of bits, each cluster of them in part, are as much as everything else here.
#[test]
fn bitmaps_that_the_target_keeps_are_planned_for() {
    if !have_oracle() {
        return;
    }
    let bits_bytes = 8 * GIB / 512 / 8;
    let (table, directory) = (64 << 10, 64 << 10);
    for (command, target, onto) in [
        (&["commit", "--json"][..], "base", "top"),
        (&["stream", "--json"], "top", "top"),
        (&["rebase", "-b", "", "--json"], "top", "top"),
    ] {
        let place = Place::new();
        let folder = place.folder.path();
        make(folder, "base", None);
        if target == "top" {
            write_far_apart(folder, "base", "7", 32);
        }
        make(folder, "top", Some("base"));
        if target == "base" {
            write_far_apart(folder, "top", "7", 32);
        }
        keep_bitmap(folder, target);
        let bytes_before = place.read(target);
        let dry = json_of(&place, &[command, &["--dry-run", onto]].concat());
        assert!(place.read(target) == bytes_before, "{command:?}");
        let plan = if command[0] == "rebase" {
            &dry
        } else {
            &dry["plan"]
        };
        let of_bitmaps = number(&plan["space-needed"]["bitmaps"]);
        assert_eq!(of_bitmaps, bits_bytes + table + directory, "{command:?}");
        let before = room(folder, target);
        place.succeed(&[command, &[onto]].concat());
        let taken = room(folder, target).saturating_sub(before);
        let most = needed(plan);
        assert!(
            taken <= most + RESERVED_AHEAD,
            "{command:?}: {taken}: {plan}"
        );
        if command[0] != "stream" {
            // A stream changes nothing that the guest sees: its bits stay clear.
            let without = most - of_bitmaps + RESERVED_AHEAD;
            assert!(taken > without, "{command:?}: {taken}: {plan}");
        }
        assert_kept(folder, target, command[0]);
        assert_sound(folder, target, command[0]);
        assert!(
            !place.succeed(&["chain", target]).stdout.is_empty(),
            "{command:?}"
        );
    }
}

#[test]
fn an_image_without_bitmaps_or_with_lost_ones_needs_no_room_for_any() {
    if !have_oracle() {
        return;
    }
    let place = Place::new();
    let folder = place.folder.path();
    make(folder, "base", None);
    make(folder, "top", Some("base"));
    write_far_apart(folder, "top", "7", 32);
    let plan =
        |name: &str| json_of(&place, &["commit", "--dry-run", "--json", name])["plan"].clone();
    assert_eq!(number(&plan("top")["space-needed"]["bitmaps"]), 0);
    // Bitmaps of the image that is read do not matter.
    keep_bitmap(folder, "top");
    assert_eq!(number(&plan("top")["space-needed"]["bitmaps"]), 0);
    keep_bitmap(folder, "base");
    let human = place.succeed(&["commit", "--dry-run", "top"]);
    let human = String::from_utf8_lossy(&human.stdout).into_owned();
    assert!(
        human.contains("tables ") && human.contains(", bitmaps "),
        "{human}"
    );
}

#[test]
fn an_overlay_is_planned_before_it_is_made() {
    if !have_oracle() {
        return;
    }
    let place = Place::new();
    let folder = place.folder.path();
    make(folder, "base", None);
    write_far_apart(folder, "base", "7", 32);
    keep(folder, "base", "kept");
    let before = place.read("base");
    let names = place.names();
    for options in [
        &[][..],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=2M,refcount_bits=64"],
        &["-o", "extended_l2=on,preallocation=metadata"],
        &["-o", "data_file=new.data"],
    ] {
        let command = [&["snapshot", "--overlay", "new"][..], options].concat();
        let dry = json_of(
            &place,
            &[&command[..], &["--dry-run", "--json", "base"]].concat(),
        );
        assert_eq!(place.names(), names, "{options:?}");
        assert_eq!(dry["fits"], true, "{options:?}");
        assert_eq!(dry["bytes-to-copy"], 0);
        let human = place.succeed(&[&command[..], &["--dry-run", "base"]].concat());
        let human = String::from_utf8_lossy(&human.stdout).into_owned();
        assert!(human.contains("copies no data; takes up to "), "{human}");
        place.succeed(&[&command[..], &["base"]].concat());
        let taken = room(folder, "new");
        assert!(taken <= needed(&dry), "{options:?}: {taken}: {dry}");
        assert_shows(folder, "new", "kept", "an overlay");
        for made in ["new", "new.data"] {
            if place.path(made).exists() {
                fs::remove_file(place.path(made)).expect("removed");
            }
        }
        assert!(place.read("base") == before, "{options:?}");
    }
    place.data("there", 512);
    let refused = ["snapshot", "--dry-run", "--overlay", "there", "base"];
    place.fail(&refused, "'there' exists already");
    place.fail(&["snapshot", "--dry-run", "base"], "a list changes nothing");
    assert!(!place.succeed(&["snapshot", "--help"]).stdout.is_empty());
}

#[test]
fn snapshots_are_planned_and_refused_where_their_tables_do_not_fit() {
    let Some((place, tiny)) = Place::beside_tiny() else {
        return;
    };
    let folder = place.folder.path();
    let create = ["create", "-q", "-f", "qcow2", "tiny/image", "1G"];
    run(folder, "qemu-img", &create);
    let write = [
        "-f",
        "qcow2",
        "-c",
        "write -P 3 0 64k",
        "-c",
        "write -P 4 600M 64k",
    ];
    run(folder, "qemu-io", &[&write[..], &["tiny/image"]].concat());
    keep(folder, "tiny/image", "kept");
    for deed in [["-c", "one"], ["-a", "one"], ["-c", "two"], ["-d", "one"]] {
        let command = [&["snapshot"][..], &deed].concat();
        let dry_run = [&command[..], &["--dry-run", "--json", "tiny/image"]].concat();
        let before = place.read("tiny/image");
        let room_before = room(folder, "tiny/image");
        let dry = json_of(&place, &dry_run);
        assert!(place.read("tiny/image") == before, "{deed:?}");
        assert_eq!(dry["fits"], true, "{deed:?}: {dry}");
        // All but a little is taken by others.
        let filling = number(&dry["space-free"]) - needed(&dry) + 4096;
        fs::write(place.path("tiny/other"), vec![1; filling as usize]).expect("written");
        assert_eq!(json_of(&place, &dry_run)["fits"], false, "{deed:?}");
        let told = "--force begins all the same";
        place.fail(&[&command[..], &["tiny/image"]].concat(), told);
        assert!(place.read("tiny/image") == before, "{deed:?}");
        place.fail(
            &[
                "snapshot",
                "--overlay",
                "tiny/new",
                "tiny/image",
                "-o",
                "cluster_size=2M",
            ],
            told,
        );
        assert!(!place.path("tiny/new").exists());
        fs::remove_file(place.path("tiny/other")).expect("removed");
        place.succeed(&[&command[..], &["tiny/image"]].concat());
        let taken = room(folder, "tiny/image").saturating_sub(room_before);
        assert!(taken <= needed(&dry), "{deed:?}: {taken}: {dry}");
        assert_shows(folder, "tiny/image", "kept", "after a snapshot");
    }
    assert_eq!(backing(folder, "tiny/image").0, Value::Null);
    drop(tiny);
}

/// Runs a command on `file`, which keeps the bitmap, with less and less room: it ends well only if the bitmap is good afterwards.
/// Returns what was told where the bitmap was lost although the rest was done.
fn lost_in_spite_of(
    place: &Place,
    tiny: &Tiny,
    file: &str,
    arguments: &[&str],
    fills_kib: std::ops::Range<usize>,
) -> Vec<String> {
    let mut all_told = Vec::new();
    for fill_kib in fills_kib.step_by(32) {
        for entry in fs::read_dir(&tiny.path).expect("a folder") {
            fs::remove_file(entry.expect("an entry").path()).expect("removed");
        }
        // With its holes: what stands there has no room of its own yet.
        run(place.folder.path(), "cp", &[file, "tiny"]);
        // As much of it as there is room for.
        let _ = fs::write(tiny.path.join("fill"), vec![1; fill_kib << 10]);
        let ended = place.run(arguments);
        let told = String::from_utf8_lossy(&ended.stdout).into_owned() + complaint(&ended).as_str();
        let info = info(&tiny.path, file);
        let flags = info["format-specific"]["data"]["bitmaps"][0]["flags"].to_string();
        match code(&ended) {
            0 => assert_eq!(flags, r#"["auto"]"#, "{fill_kib} KiB: {told}"),
            1 if told.contains(" but not everything could be saved at the end: ") => {
                assert_eq!(flags, r#"["in-use","auto"]"#, "{fill_kib} KiB: {told}");
                all_told.push(told);
            }
            other => assert_eq!(other, 1, "{fill_kib} KiB: {told}"),
        }
    }
    all_told
}

/// What cannot be saved at the end, here the bits of a bitmap, is a failure of the command, which names the file.
#[test]
fn what_cannot_be_saved_at_the_end_fails_the_command() {
    let Some((place, tiny)) = Place::beside_tiny() else {
        return;
    };
    let base = tiny.path.join("base").display().to_string();
    for (arguments, fills_kib) in [
        (&["commit", "--force", "--json", "top"][..], 0..1024),
        (&["resize", "-f", "qcow2", &base, "16G"], 3072..4096),
    ] {
        make(place.folder.path(), "base", None);
        keep_bitmap(place.folder.path(), "base");
        match arguments[0] {
            "commit" => {
                run(place.folder.path(), "cp", &["base", "tiny"]);
                make(place.folder.path(), "top", Some(&base));
                write_far_apart(place.folder.path(), "top", "7", 32);
            }
            _ => write_far_apart(place.folder.path(), "base", "7", 8),
        }
        let all_told = lost_in_spite_of(&place, &tiny, "base", arguments, fills_kib);
        assert!(!all_told.is_empty(), "{arguments:?}: there was always room");
        for told in all_told {
            let lost = format!("'{base}' has lost its persistent bitmaps: ");
            assert!(told.contains(&lost), "{told}");
        }
    }
    drop(tiny);
}
