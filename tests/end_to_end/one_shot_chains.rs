//! `chain`, `rebase`, `commit`, `stream` and `snapshot --overlay` without a daemon, and `x-plan`: on real files, judged by qemu-img.

use std::fs;
use std::process::Command;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::images::{chain, run};
use crate::made_chains::{
    Dice, assert_at_most_leaks, assert_shows, assert_sound, backing, cannot_grow, json_of, keep,
    number, random_chain, random_image, room,
};
use crate::place::{MIB, Place, Running, code, complaint};
use crate::tools::have_oracle;

#[test]
fn a_rebased_image_shows_the_same_as_qemu_imgs_does() {
    if !have_oracle() {
        return;
    }
    for seed in 1..=25 {
        let place = Place::new();
        let folder = place.folder.path();
        let mut dice = Dice(seed * 0x9e37_79b9);
        let depth = 1 + dice.below(3);
        let names = random_chain(&mut dice, folder, depth + 1);
        let top = names.last().expect("one at least").as_str();
        random_image(&mut dice, folder, "n0", None);
        random_image(&mut dice, folder, "n1", Some(("n0", "qcow2")));
        let (new, format) = match dice.below(4) {
            0 => ("", None),
            1 if backing(folder, "l1").1 == "raw" => ("l0", Some("raw")),
            1 => ("l0", Some("qcow2")),
            2 => ("n0", Some("qcow2")),
            _ => ("n1", Some("qcow2")),
        };
        let what = format!("seed {seed}, {top} on '{new}'");
        keep(folder, top, "kept");
        fs::copy(place.path(top), place.path("theirs")).expect("copied");
        let mut arguments = vec!["rebase", "-b", new];
        if let Some(format) = format {
            arguments.extend(["-F", format]);
        }
        let before = place.read(top);
        let dry = json_of(
            &place,
            &[&arguments[..], &["--dry-run", "--json", top]].concat(),
        );
        assert!(
            place.read(top) == before,
            "{what}: a dry run has changed it"
        );
        let done = json_of(&place, &[&arguments[..], &["--json", top]].concat());
        for key in ["bytes-to-copy", "bytes-to-zero"] {
            assert_eq!(dry[key], done[key], "{what}");
        }
        assert_shows(folder, top, "kept", &what);
        run(
            folder,
            "qemu-img",
            &[&arguments[..], &["-f", "qcow2", "theirs"]].concat(),
        );
        assert_eq!(backing(folder, top), backing(folder, "theirs"), "{what}");
        assert_shows(folder, "theirs", "kept", &what);
    }
}

#[test]
fn rebase_refuses_what_qemu_img_refuses_and_changes_nothing_then() {
    if !have_oracle() {
        return;
    }
    let place = Place::new();
    let folder = place.folder.path();
    chain(folder);
    let before = place.read("top.qcow2");
    for arguments in [
        &["-b", "none.qcow2", "-F", "qcow2", "top.qcow2"][..],
        &["-b", "base.qcow2", "top.qcow2"],
        &["-b", "base.qcow2", "-F", "foo", "top.qcow2"],
        &["-f", "raw", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"],
        &["-b", "base.qcow2", "-F", "qcow2", "none.qcow2"],
    ] {
        let theirs = Command::new("qemu-img")
            .arg("rebase")
            .args(arguments)
            .current_dir(folder)
            .output()
            .expect("it runs");
        // It has copied what differs by the time it fails.
        fs::write(place.path("top.qcow2"), &before).expect("written");
        let ours = place.run(&[&["rebase"][..], arguments].concat());
        assert!(place.read("top.qcow2") == before, "{arguments:?}");
        assert_eq!(code(&ours), code(&theirs), "{arguments:?}");
        let first = |text: String| text.lines().next().unwrap_or_default().to_owned();
        if arguments.ends_with(&["none.qcow2"]) {
            // Every command here says it in one way.
            assert!(complaint(&ours).contains("'none.qcow2': No such file or directory"));
            continue;
        }
        let theirs = first(complaint(&theirs)).replace("qemu-img: ", "");
        let ours = first(complaint(&ours)).replace("blockyard: ", "");
        // The file that is missing is told in both; ours may say more.
        assert_eq!(
            theirs.split(':').next(),
            ours.split(':').next(),
            "{arguments:?}"
        );
    }
    place.fail(&["rebase", "top.qcow2"], "Must specify backing file (-b)");
    place.fail(
        &["rebase", "-b", "top.qcow2", "-F", "qcow2", "top.qcow2"],
        "Could not open new backing file 'top.qcow2'",
    );
    assert!(place.read("top.qcow2") == before);
    // Only the name, whether it is there or not; and back, without a backing file that could be opened.
    place.succeed(&[
        "rebase",
        "-u",
        "-b",
        "none.qcow2",
        "-F",
        "qcow2",
        "top.qcow2",
    ]);
    assert_eq!(backing(folder, "top.qcow2").0, "none.qcow2");
    place.fail(
        &["rebase", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"],
        "Could not open 'top.qcow2'",
    );
    place.succeed(&[
        "rebase",
        "-u",
        "-b",
        "mid.qcow2",
        "-F",
        "qcow2",
        "top.qcow2",
    ]);
    let after = place.read("top.qcow2");
    assert!(after[65_536..] == before[65_536..]);
}

#[test]
fn a_chain_is_shown_as_far_as_it_goes() {
    if !have_oracle() {
        return;
    }
    let place = Place::new();
    let folder = place.folder.path();
    chain(folder);
    let shown = json_of(&place, &["chain", "--json", "top.qcow2"]);
    let layers = shown["layers"].as_array().expect("a list");
    let names: Vec<&Value> = layers.iter().map(|layer| &layer["filename"]).collect();
    assert_eq!(names, ["top.qcow2", "mid.qcow2", "base.qcow2"]);
    assert_eq!(layers[1]["backing-filename"], "base.qcow2");
    assert_eq!(layers[1]["virtual-size"], 4 << 20);
    // 100 KiB in clusters of 64 KiB, into an image that holds nothing there.
    assert_eq!(layers[0]["commit"]["bytes-to-copy"], 128 << 10);
    assert_eq!(layers[0]["commit"]["space-needed"]["data"], 128 << 10);
    // Half of what mid holds is in base already.
    assert_eq!(layers[1]["commit"]["bytes-to-copy"], 1 << 20);
    assert_eq!(layers[1]["commit"]["space-needed"]["data"], 512 << 10);
    assert_eq!(layers[2].get("commit"), None);
    assert_eq!(shown["stream"]["bytes-to-copy"], 1536 << 10);
    let human = place.succeed(&["chain", "top.qcow2"]);
    let human = String::from_utf8(human.stdout).expect("UTF-8");
    assert!(human.contains("0: top.qcow2  qcow2, 4.0 MiB"), "{human}");
    assert!(human.contains("commit into 1: copies 128.0 KiB"), "{human}");
    assert!(
        human.contains("stream of all into 0: copies 1.5 MiB"),
        "{human}"
    );
    // A raw image is a chain of one, and never followed.
    let raw = json_of(&place, &["chain", "--json", "r.raw"]);
    assert_eq!(raw["layers"].as_array().expect("a list").len(), 1);
    // A file that is missing.
    fs::rename(place.path("base.qcow2"), place.path("elsewhere")).expect("moved");
    let output = place.run(&["chain", "--json", "top.qcow2"]);
    assert_eq!(code(&output), 1);
    let shown: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(shown["layers"].as_array().expect("a list").len(), 2);
    let problem = shown["problem"].as_str().expect("a text");
    assert!(
        problem.contains("the chain ends at 'mid.qcow2'"),
        "{problem}"
    );
    assert!(problem.contains("No such file or directory"), "{problem}");
    // One that leads to itself.
    fs::rename(place.path("elsewhere"), place.path("base.qcow2")).expect("moved");
    let loops = [
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "top.qcow2",
        "-F",
        "qcow2",
        "base.qcow2",
    ];
    run(folder, "qemu-img", &loops);
    place.fail(
        &["chain", "top.qcow2"],
        "'top.qcow2', which is below it, is above it as well",
    );
}

#[test]
fn an_overlay_is_made_on_an_image_and_nothing_is_overwritten() {
    if !have_oracle() {
        return;
    }
    let place = Place::new();
    let folder = place.folder.path();
    chain(folder);
    keep(folder, "top.qcow2", "kept");
    let before = place.read("top.qcow2");
    place.succeed(&["snapshot", "--overlay", "new.qcow2", "top.qcow2"]);
    assert_eq!(
        backing(folder, "new.qcow2"),
        (json!("top.qcow2"), json!("qcow2"))
    );
    assert_shows(folder, "new.qcow2", "kept", "an overlay");
    assert!(place.read("top.qcow2") == before);
    place.fail(
        &["snapshot", "--overlay", "new.qcow2", "top.qcow2"],
        "exists already",
    );
    // From another folder, the name leads back.
    place.succeed(&[
        "snapshot",
        "--overlay",
        "sub/new.qcow2",
        "top.qcow2",
        "-o",
        "cluster_size=4k",
    ]);
    assert_shows(folder, "sub/new.qcow2", "kept", "an overlay elsewhere");
    place.succeed(&[
        "snapshot",
        "-f",
        "raw",
        "--overlay",
        "on-raw.qcow2",
        "r.raw",
    ]);
    assert_eq!(
        backing(folder, "on-raw.qcow2"),
        (json!("r.raw"), json!("raw"))
    );
    assert_shows(folder, "on-raw.qcow2", "r.raw", "an overlay of a raw image");
    let names = place.names();
    place.fail(
        &["snapshot", "--overlay", "x.qcow2", "none.qcow2"],
        "No such file or directory",
    );
    place.fail(
        &["snapshot", "--overlay", "x.qcow2", "r.raw"],
        "Image is not in qcow2 format",
    );
    let named = [
        "snapshot",
        "--overlay",
        "x.qcow2",
        "-o",
        "backing_file=r.raw",
        "top.qcow2",
    ];
    place.fail(&named, "-o cannot name another one");
    assert_eq!(place.names(), names);
}

#[test]
fn a_stream_is_what_was_planned_and_shows_the_same() {
    if !have_oracle() {
        return;
    }
    for seed in 1..=20 {
        let place = Place::new();
        let folder = place.folder.path();
        let mut dice = Dice(seed * 0x517c_c1b7);
        let count = 2 + dice.below(4);
        let names = random_chain(&mut dice, folder, count);
        let top = names.last().expect("some").as_str();
        let base = usize::try_from(dice.below(count)).expect("small");
        let base = (base + 1 < names.len()).then(|| names[base].as_str());
        let what = format!("seed {seed}, {count} layers, base {base:?}");
        keep(folder, top, "kept");
        let below: Vec<Vec<u8>> = names[..names.len() - 1]
            .iter()
            .map(|name| place.read(name))
            .collect();
        let mut arguments = vec!["stream", "--json"];
        if let Some(base) = base {
            arguments.extend(["--base", base]);
        }
        let before = place.read(top);
        let dry = json_of(&place, &[&arguments[..], &["--dry-run", top]].concat());
        assert!(
            place.read(top) == before,
            "{what}: a dry run has changed it"
        );
        let room_before = room(folder, top);
        let done = json_of(&place, &[&arguments[..], &[top]].concat());
        assert_eq!(done["event"], "completed", "{what}: {done}");
        assert_room(
            &dry["plan"],
            room(folder, top).saturating_sub(room_before),
            &what,
        );
        assert_shows(folder, top, "kept", &what);
        let expected = base.map_or(Value::Null, Value::from);
        assert_eq!(backing(folder, top).0, expected, "{what}");
        for (name, bytes) in names.iter().zip(below) {
            assert!(place.read(name) == bytes, "{what}: {name} has changed");
        }
    }
}

#[test]
fn a_commit_is_what_was_planned_and_shows_the_same() {
    if !have_oracle() {
        return;
    }
    let mut refused = 0;
    for seed in 1..=20 {
        let place = Place::new();
        let folder = place.folder.path();
        let mut dice = Dice(seed * 0x2545_f491);
        let count = 2 + dice.below(4);
        let names = random_chain(&mut dice, folder, count);
        let last = names.len() - 1;
        let upper = 1 + usize::try_from(dice.below(count - 1)).expect("small");
        let lower = usize::try_from(dice.below(upper as u64)).expect("small");
        let (device, top, base) = (
            names[last].as_str(),
            names[upper].as_str(),
            names[lower].as_str(),
        );
        let what = format!("seed {seed}, {count} layers, {top} into {base}");
        keep(folder, device, "kept");
        keep(folder, top, "kept-top");
        let arguments = ["commit", "--json", "--top", top, "--base", base];
        let before = place.read(base);
        if lower > 0 && cannot_grow(folder, base, top) {
            for more in [&["--dry-run", device][..], &[device]] {
                let output = place.run(&[&arguments[..], more].concat());
                assert_eq!(code(&output), 1, "{what}");
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                assert!(text.contains("cannot be made as long"), "{what}: {text}");
                assert!(place.read(base) == before, "{what}: it was changed");
            }
            refused += 1;
            continue;
        }
        let dry = json_of(&place, &[&arguments[..], &["--dry-run", device]].concat());
        assert!(
            place.read(base) == before,
            "{what}: a dry run has changed it"
        );
        let room_before = room(folder, base);
        let done = json_of(&place, &[&arguments[..], &[device]].concat());
        assert_eq!(done["event"], "completed", "{what}: {done}");
        assert_room(
            &dry["plan"],
            room(folder, base).saturating_sub(room_before),
            &what,
        );
        assert_shows(folder, device, "kept", &what);
        let base_format = match lower {
            0 => backing(folder, "l1")
                .1
                .as_str()
                .unwrap_or("qcow2")
                .to_owned(),
            _ => "qcow2".to_owned(),
        };
        if upper == last {
            // The base shows all that its top did, as far as that goes.
            let converted = [
                "convert",
                "-f",
                &base_format,
                "-O",
                "raw",
                base,
                "base-shows",
            ];
            run(folder, "qemu-img", &converted);
            let (shows, kept) = (place.read("base-shows"), place.read("kept-top"));
            assert!(
                shows.starts_with(&kept),
                "{what}: the base shows something else"
            );
        } else {
            let above = names[upper + 1].as_str();
            assert_eq!(backing(folder, above).0, base, "{what}");
            assert_sound(folder, above, &what);
        }
        if base_format == "qcow2" {
            assert_sound(folder, base, &what);
        }
    }
    assert!(refused < 10, "{refused} of 20 refused");
}

#[test]
fn a_move_that_is_cancelled_leaves_the_chain_as_it_was() {
    if !have_oracle() {
        return;
    }
    let place = Place::new();
    let folder = place.folder.path();
    run(
        folder,
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "base", "64M"],
    );
    run(
        folder,
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 1 0 64M", "base"],
    );
    for (name, below) in [("mid", "base"), ("top", "mid")] {
        let made = [
            "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", name,
        ];
        run(folder, "qemu-img", &made);
    }
    run(
        folder,
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 2 0 32M", "mid"],
    );
    keep(folder, "top", "kept");
    for arguments in [
        &["stream", "top"][..],
        &["stream", "--base", "base", "top"],
        &["commit", "--top", "mid", "top"],
        &["commit", "--base", "base", "top"],
    ] {
        let running = Running::start(&place, arguments);
        running.signal(Signal::INT);
        let (code, last) = running.end();
        let what = format!("{arguments:?}: {last}");
        assert_eq!(
            (code, last["event"].as_str()),
            (130, Some("cancelled")),
            "{what}"
        );
        assert_eq!(backing(folder, "top").0, "mid", "{what}");
        assert_eq!(backing(folder, "mid").0, "base", "{what}");
        assert_shows(folder, "top", "kept", &what);
        assert_sound(folder, "base", &what);
    }
    // And it can be done again.
    place.succeed(&["stream", "top"]);
    assert_shows(folder, "top", "kept", "a second stream");
    assert_eq!(backing(folder, "top").0, Value::Null);
}

/// What was taken is no more than the plan has said, but for blocks that an image reserves ahead for small writes, where there
/// are some.
fn assert_room(plan: &Value, taken: u64, what: &str) {
    let needed = &plan["space-needed"];
    let most = ["data", "metadata", "bitmaps"].map(|part| number(&needed[part]));
    let most: u64 = most.iter().sum();
    assert!(taken <= most + MIB, "{what}: {taken} bytes, planned {plan}");
}

#[test]
fn what_cannot_be_moved_is_refused() {
    if !have_oracle() {
        return;
    }
    let place = Place::new();
    chain(place.folder.path());
    let before = ["base.qcow2", "mid.qcow2", "top.qcow2"].map(|name| place.read(name));
    place.fail(
        &["commit", "base.qcow2"],
        "'base.qcow2' has no backing file",
    );
    place.fail(
        &["stream", "base.qcow2"],
        "'base.qcow2' has no backing file",
    );
    place.fail(
        &["commit", "--base", "r.raw", "top.qcow2"],
        "'r.raw' is not in the chain of 'top.qcow2'",
    );
    place.fail(
        &["stream", "--base", "top.qcow2", "top.qcow2"],
        "is not below itself",
    );
    let upside_down = [
        "commit",
        "--top",
        "base.qcow2",
        "--base",
        "mid.qcow2",
        "top.qcow2",
    ];
    place.fail(&upside_down, "'mid.qcow2' is not below 'base.qcow2'");
    place.fail(&["commit", "none.qcow2"], "No such file or directory");
    for (name, bytes) in ["base.qcow2", "mid.qcow2", "top.qcow2"].iter().zip(before) {
        assert!(place.read(name) == bytes, "{name} has changed");
    }
}

#[test]
fn a_move_that_the_file_system_cannot_hold_is_refused_before_it_begins() {
    let Some((place, tiny)) = Place::beside_tiny() else {
        return;
    };
    let folder = place.folder.path();
    let big = "8M";
    run(
        folder,
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "base", big],
    );
    run(
        folder,
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 1 0 8M", "base"],
    );
    let on = [
        "create", "-q", "-f", "qcow2", "-b", "../base", "-F", "qcow2", "tiny/top", big,
    ];
    run(folder, "qemu-img", &on);
    let before = place.read("tiny/top");
    place.fail(&["stream", "tiny/top"], "--force begins all the same");
    assert!(place.read("tiny/top") == before);
    let dry = json_of(&place, &["stream", "--dry-run", "--json", "tiny/top"]);
    assert_eq!(dry["plan"]["fits"], false);
    assert!(number(&dry["plan"]["space-free"]) < 4 * MIB);
    keep(folder, "tiny/top", "kept");
    place.fail(
        &["stream", "--force", "tiny/top"],
        "No space left on device",
    );
    let compared = ["compare", "-f", "qcow2", "-F", "raw", "tiny/top", "kept"];
    run(folder, "qemu-img", &compared);
    assert_at_most_leaks(folder, "tiny/top");
    assert_eq!(backing(folder, "tiny/top").0, "../base");
    drop(tiny);
}

/// Its bound is all that may differ; only where that may not fit is it found out what does.
#[test]
fn a_rebase_that_the_file_system_cannot_hold_is_refused_before_it_begins() {
    let Some((place, tiny)) = Place::beside_tiny() else {
        return;
    };
    let folder = place.folder.path();
    for (name, writes) in [
        ("old", &["write -P 1 0 8M"][..]),
        ("far", &["write -P 2 0 8M"]),
        ("near", &["write -P 1 0 8M", "write -P 2 1M 64k"]),
    ] {
        let create = ["create", "-q", "-f", "qcow2", name, "8M"];
        run(folder, "qemu-img", &create);
        for write in writes {
            run(folder, "qemu-io", &["-f", "qcow2", "-c", write, name]);
        }
    }
    let on = [
        "create", "-q", "-f", "qcow2", "-b", "../old", "-F", "qcow2", "tiny/top", "8M",
    ];
    run(folder, "qemu-img", &on);
    keep(folder, "tiny/top", "kept");
    let before = place.read("tiny/top");
    let onto_far = ["rebase", "-b", "../far", "-F", "qcow2"];
    let far = |more: &[&'static str]| [&onto_far[..], more, &["tiny/top"]].concat();
    place.fail(&far(&[]), "--force begins all the same");
    assert!(place.read("tiny/top") == before);
    let dry = json_of(&place, &far(&["--dry-run", "--json"]));
    assert_eq!(dry["bytes-to-copy"], 8 * MIB);
    assert_eq!(dry["fits"], false);
    assert!(number(&dry["bytes-needed"]) > 8 * MIB);
    assert!(number(&dry["bytes-free"]) < 4 * MIB);
    place.fail(&far(&["--force"]), "No space left on device");
    assert_eq!(backing(folder, "tiny/top").0, "../old");
    let compared = ["compare", "-f", "qcow2", "-F", "raw", "tiny/top", "kept"];
    run(folder, "qemu-img", &compared);
    assert_at_most_leaks(folder, "tiny/top");
    // Something fits although all of it would not.
    fs::remove_file(place.path("tiny/top")).expect("removed");
    run(folder, "qemu-img", &on);
    let onto_near = ["rebase", "-b", "../near", "-F", "qcow2"];
    let near = |more: &[&'static str]| [&onto_near[..], more, &["tiny/top"]].concat();
    let dry = json_of(&place, &near(&["--dry-run", "--json"]));
    assert_eq!(
        (&dry["bytes-to-copy"], &dry["fits"]),
        (&json!(64 << 10), &json!(true))
    );
    let room_before = room(folder, "tiny/top");
    place.succeed(&near(&[]));
    let taken = room(folder, "tiny/top").saturating_sub(room_before);
    assert!(taken <= number(&dry["bytes-needed"]), "{taken}: {dry}");
    assert_eq!(backing(folder, "tiny/top").0, "../near");
    assert_shows(folder, "tiny/top", "kept", "on what is nearly the same");
    drop(tiny);
}

#[test]
fn a_plan_is_made_over_qmp_with_the_checks_of_the_job() {
    if !have_oracle() {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.path("");
    chain(&folder);
    let mut client = daemon.client();
    let file = json!({"driver": "file", "filename": "top.qcow2"});
    client.run(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "top", "file": file}),
    );
    let before = fs::read(folder.join("top.qcow2")).expect("read");
    let plan = client.run("x-plan", json!({"job": "stream", "device": "top"}));
    assert_eq!(plan["bytes-to-copy"], 1536 << 10);
    assert_eq!(plan["target"]["node-name"], "top");
    assert_eq!(plan["fits"], true);
    let layers = plan["layers"].as_array().expect("a list");
    let files: Vec<&str> = layers
        .iter()
        .filter_map(|layer| layer["filename"].as_str())
        .collect();
    assert_eq!(files, ["mid.qcow2", "base.qcow2"]);
    let base = layers[1]["node-name"].clone();
    let plan = client.run(
        "x-plan",
        json!({"job": "commit", "device": "top", "base-node": base}),
    );
    assert_eq!(plan["target"]["filename"], "base.qcow2");
    assert_eq!(plan["bytes-to-copy"], (1 << 20) + (128 << 10));
    for (job, command, arguments) in [
        ("commit", "block-commit", json!({"device": "none"})),
        (
            "commit",
            "block-commit",
            json!({"device": "top", "base-node": "top"}),
        ),
        (
            "commit",
            "block-commit",
            json!({"device": "top", "base-node": "none"}),
        ),
        ("stream", "block-stream", json!({"device": "none"})),
        (
            "stream",
            "block-stream",
            json!({"device": "top", "base-node": "none"}),
        ),
        (
            "stream",
            "block-stream",
            json!({"device": "top", "base": "none", "bottom": "none"}),
        ),
    ] {
        let mut planned = arguments.clone();
        planned["job"] = json!(job);
        let mut started = arguments;
        started["job-id"] = json!("j");
        let planned = client.command("x-plan", planned);
        let started = client.command(command, started);
        assert!(planned["error"].is_object(), "{planned}");
        assert_eq!(planned["error"], started["error"]);
    }
    let wrong = client.command("x-plan", json!({"job": "mirror", "device": "top"}));
    assert_eq!(
        wrong["error"]["desc"],
        "Parameter 'job' does not accept value 'mirror'"
    );
    assert_eq!(client.run("query-jobs", json!({})), json!([]));
    assert!(fs::read(folder.join("top.qcow2")).expect("read") == before);
    daemon.quit();
}
