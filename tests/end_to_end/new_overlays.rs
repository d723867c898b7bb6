//! `blockdev-snapshot-sync`: refusals and existing overlays as on the reference daemon, and what a new one says of itself.

use std::fmt::Write as _;
use std::fs;

use serde_json::{Value, json};

use crate::chains::on;
use crate::daemon::Daemon;
use crate::images::{chain, image, run};
use crate::oracle::compare;
use crate::place::{MIB, Tiny, can_mount};
use crate::tools;

fn line(script: &mut String, command: &str, arguments: &Value) {
    let line = json!({"execute": command, "arguments": arguments});
    writeln!(script, "{line}").expect("a text");
}

#[test]
fn overlays_that_cannot_be_are_refused_and_existing_ones_are_taken() {
    let mut script = String::new();
    line(&mut script, "blockdev-add", &on("top", "top.qcow2"));
    for arguments in [
        json!({"device": "nope", "snapshot-file": "x.qcow2"}),
        json!({"node-name": "nope", "snapshot-file": "x.qcow2"}),
        json!({"device": "top", "snapshot-file": "x.qcow2", "snapshot-node-name": "o"}),
        json!({"snapshot-file": "x.qcow2"}),
        json!({"node-name": "top", "snapshot-file": "x.qcow2"}),
        json!({"node-name": "top", "snapshot-file": "x.qcow2", "snapshot-node-name": "top"}),
        json!({"node-name": "top", "snapshot-file": "x.qcow2", "snapshot-node-name": "o", "format": "foo"}),
        json!({"node-name": "top", "snapshot-file": "x.qcow2", "snapshot-node-name": "o", "format": "raw"}),
        json!({"node-name": "top", "snapshot-file": "top.qcow2", "snapshot-node-name": "o"}),
        json!({"node-name": "top", "snapshot-file": "x.qcow2", "snapshot-node-name": "o", "mode": "existing"}),
        json!({"node-name": "top", "snapshot-file": "e.qcow2", "snapshot-node-name": "1x", "mode": "existing"}),
        json!({"node-name": "top", "snapshot-file": "r.raw", "snapshot-node-name": "o", "format": "raw", "mode": "existing"}),
        json!({"node-name": "top", "snapshot-file": "e.qcow2", "snapshot-node-name": "o", "mode": "foo"}),
        json!({"node-name": "top", "snapshot-file": "e.qcow2", "snapshot-node-name": "o", "mode": "existing"}),
        // The node is read-only by now, and its overlay gone again.
        json!({"device": "x", "node-name": "top", "snapshot-file": "e.qcow2", "snapshot-node-name": "o", "mode": "existing"}),
    ] {
        line(&mut script, "blockdev-snapshot-sync", &arguments);
    }
    line(
        &mut script,
        "query-named-block-nodes",
        &json!({"flat": true}),
    );
    line(&mut script, "x-debug-query-block-graph", &json!({}));
    line(&mut script, "blockdev-del", &json!({"node-name": "top"}));
    script += "$ qemu-img check -q e.qcow2\n$ ls\n";
    compare(&script, |folder| {
        chain(folder);
        image(folder, "e.qcow2", &[]);
    });
}

#[test]
fn a_new_overlay_names_what_it_stands_on() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    let daemon = Daemon::start();
    chain(daemon.folder.path());
    let mut client = daemon.client();
    client.run("blockdev-add", on("top", "top.qcow2"));
    let refusal = client.refusal(
        "blockdev-snapshot-sync",
        json!({"node-name": "top", "snapshot-file": "none/o.qcow2", "snapshot-node-name": "o"}),
    );
    assert_eq!(
        refusal,
        "Could not create 'none/o.qcow2': No such file or directory"
    );
    client.run(
        "blockdev-snapshot-sync",
        json!({"node-name": "top", "snapshot-file": "o.qcow2", "snapshot-node-name": "o"}),
    );
    client.run("blockdev-del", json!({"node-name": "top"}));
    let folder = daemon.kill();
    let shown = std::process::Command::new("qemu-img")
        .args(["info", "--output=json", "o.qcow2"])
        .current_dir(folder.path())
        .output()
        .expect("it runs");
    let shown: Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    assert_eq!(shown["backing-filename"], "top.qcow2");
    assert_eq!(shown["backing-filename-format"], "qcow2");
    assert_eq!(shown["virtual-size"], 4 << 20);
    run(folder.path(), "qemu-img", &["check", "-q", "o.qcow2"]);
    run(
        folder.path(),
        "qemu-img",
        &["compare", "top.qcow2", "o.qcow2"],
    );
}

/// A command that fails for want of room leaves no file behind that it has made, and every file that was there.
#[test]
fn a_full_file_system_keeps_no_part_of_a_new_image() {
    if !tools::have("qemu-img", "qemu-utils") || !can_mount() {
        return;
    }
    let daemon = Daemon::start();
    chain(daemon.folder.path());
    let Some(tiny) = Tiny::mount(daemon.folder.path().join("tiny")) else {
        return;
    };
    let names = || {
        let entries = fs::read_dir(&tiny.path).expect("a folder");
        let mut names: Vec<_> = entries
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        names.sort();
        names
    };
    let fill = tiny.path.join("fill");
    // As much of it as there is room for.
    let _ = fs::write(&fill, vec![1; 5 * MIB as usize]);
    fs::write(tiny.path.join("old"), "").expect("a name takes no room");
    let mut client = daemon.client();
    client.run("blockdev-add", on("top", "top.qcow2"));
    let snapshot = |name: &str| json!({"node-name": "top", "snapshot-file": format!("tiny/{name}"), "snapshot-node-name": "o"});
    let copy = |name: &str| json!({"job-id": "j", "device": "top", "target": format!("tiny/{name}"), "format": "qcow2", "sync": "full"});
    let commands = [
        (
            "blockdev-snapshot-sync",
            &snapshot as &dyn Fn(&str) -> Value,
        ),
        ("drive-backup", &copy),
        ("drive-mirror", &copy),
    ];
    for (command, arguments) in commands {
        for name in ["new", "old"] {
            let refusal = client.refusal(command, arguments(name));
            assert!(refusal.ends_with("No space left on device"), "{refusal}");
            assert_eq!(names(), ["fill", "old"], "{command} {name}");
            if command != "drive-mirror" {
                let action = json!({"type": command, "data": arguments(name)});
                let refusal = client.refusal("transaction", json!({"actions": [action]}));
                assert!(refusal.ends_with("No space left on device"), "{refusal}");
                assert_eq!(
                    names(),
                    ["fill", "old"],
                    "{command} {name} in a transaction"
                );
            }
        }
    }
    fs::remove_file(&fill).expect("removed");
    client.run("drive-backup", copy("new"));
    client.wait_for("j", "null");
    client.run("blockdev-snapshot-sync", snapshot("old"));
    assert_eq!(names(), ["new", "old"]);
    daemon.quit();
}
