//! `--dry-run` and the room that commands without a daemon take: no more than was told.

use std::path::Path;

use serde_json::Value;

use crate::images::run;
use crate::made_chains::{assert_sound, info, json_of, number, room};
use crate::place::{MIB, Place};
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
fn write_far_apart(folder: &Path, name: &str, pattern: &str) {
    let writes: Vec<String> = (0..32)
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
            write_far_apart(folder, "base", "7");
        }
        make(folder, "top", Some("base"));
        if target == "base" {
            write_far_apart(folder, "top", "7");
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
    write_far_apart(folder, "top", "7");
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
