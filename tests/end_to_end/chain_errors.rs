//! Commit and stream that are stopped by an error, and go on once its reason is gone.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::chains::{on, with};
use crate::daemon::Daemon;
use crate::images::{overlay, run};
use crate::oracle::{compare, hole_file};
use crate::place::{Tiny, can_mount};
use crate::tools;

/// A line of a script.
fn line(command: &str, arguments: &Value) -> String {
    format!("{}\n", json!({"execute": command, "arguments": arguments}))
}

/// A raw base, an image with data on it, and another one on that.
fn layers(folder: &Path) {
    hole_file(&folder.join("base.raw"), 4 << 20);
    overlay(folder, "mid.qcow2", "base.raw", "raw");
    overlay(folder, "top.qcow2", "mid.qcow2", "qcow2");
    for (name, write) in [
        ("mid.qcow2", "write -P 2 512k 2M"),
        ("top.qcow2", "write -P 3 3M 100k"),
    ] {
        run(folder, "qemu-io", &["-f", "qcow2", "-c", write, name]);
    }
    let to_raw = [
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        "top.qcow2",
        "before.raw",
    ];
    run(folder, "qemu-img", &to_raw);
}

/// A file whose requests fail as a rule has it, once.
fn failing(filename: &str, rule: Value) -> Value {
    let rule = with(json!({"once": true}), rule);
    let file = json!({"driver": "file", "filename": filename});
    json!({"driver": "blkdebug", "image": file, "inject-error": [rule]})
}

/// The job goes on where it failed, and everything is where it should be.
fn stopped_once(command: &str, arguments: &Value, base: Value, top: Value) {
    let mut script = line(
        "blockdev-add",
        &json!({"driver": "raw", "node-name": "base", "file": base}),
    );
    let mid = with(on("mid", "mid.qcow2"), json!({"backing": "base"}));
    script += &line("blockdev-add", &mid);
    let top = json!({"driver": "qcow2", "node-name": "top", "file": top, "backing": "mid"});
    script += &line("blockdev-add", &top);
    let job = json!({"job-id": "j", "on-error": "stop"});
    script += &line(command, &with(job, arguments.clone()));
    script += "wait j stopped\n";
    script += &line("job-complete", &json!({"id": "j"}));
    script += &line("job-resume", &json!({"id": "j"}));
    script += "wait j null\n";
    script += &line("x-debug-query-block-graph", &json!({}));
    for name in ["top", "mid", "base"] {
        script += &line("blockdev-del", &json!({"node-name": name}));
    }
    script += "$ qemu-img check -q -f qcow2 top.qcow2\n";
    script += "$ qemu-img info -f qcow2 top.qcow2 | grep backing\n";
    script += "$ qemu-img compare -F raw top.qcow2 before.raw\n";
    compare(&script, layers);
}

#[test]
fn a_commit_stopped_by_its_base_goes_on() {
    for errno in [5, 28] {
        let rule = json!({"event": "none", "iotype": "write", "errno": errno, "sector": 3000});
        let arguments = json!({"device": "top", "top-node": "mid", "base-node": "base",
            "backing-file": "base.raw"});
        let top = json!({"driver": "file", "filename": "top.qcow2"});
        stopped_once("block-commit", &arguments, failing("base.raw", rule), top);
    }
}

#[test]
fn a_stream_stopped_by_its_device_goes_on() {
    for errno in [5, 28] {
        let rule = json!({"event": "write_aio", "iotype": "write", "errno": errno});
        let base = json!({"driver": "file", "filename": "base.raw"});
        let arguments = json!({"device": "top"});
        stopped_once("block-stream", &arguments, base, failing("top.qcow2", rule));
    }
}

/// The file system is full, gets room, and the job goes on.
#[test]
fn a_full_file_system_stops_commit_and_stream_until_it_has_room() {
    if !can_mount() {
        return;
    }
    for is_commit in [true, false] {
        let scratch = tempfile::tempdir().expect("a folder");
        let folder = scratch.path();
        let Some(tiny) = Tiny::mount(folder.join("tiny")) else {
            return;
        };
        // 8 MiB go to where 4 MiB have room.
        let (base, top) = match is_commit {
            true => ("tiny/base.img", "top.img"),
            false => ("base.img", "tiny/top.img"),
        };
        let path = |name: &str| folder.join(name).display().to_string();
        run(
            folder,
            "qemu-img",
            &["create", "-q", "-f", "qcow2", base, "8M"],
        );
        let backing = path(base);
        let on_base = ["create", "-q", "-f", "qcow2", "-b", &backing, "-F", "qcow2"];
        run(folder, "qemu-img", &[&on_base[..], &["mid.img"]].concat());
        run(
            folder,
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 5 0 8M", "mid.img"],
        );
        let backing = path("mid.img");
        let on_mid = ["create", "-q", "-f", "qcow2", "-b", &backing, "-F", "qcow2"];
        run(folder, "qemu-img", &[&on_mid[..], &[top]].concat());
        let daemon = Daemon::start();
        let mut client = daemon.client();
        let node = |name: &str, file: &str| {
            let file = json!({"driver": "file", "filename": path(file)});
            json!({"driver": "qcow2", "node-name": name, "file": file})
        };
        client.run("blockdev-add", node("base", base));
        client.run(
            "blockdev-add",
            with(node("mid", "mid.img"), json!({"backing": "base"})),
        );
        client.run(
            "blockdev-add",
            with(node("top", top), json!({"backing": "mid"})),
        );
        let job = json!({"job-id": "j", "device": "top", "on-error": "enospc"});
        match is_commit {
            true => {
                let more =
                    json!({"top-node": "mid", "base-node": "base", "backing-file": path(base)});
                client.run("block-commit", with(job, more));
            }
            false => drop(client.run("block-stream", job)),
        }
        client.wait_for("j", "paused");
        let jobs = client.run("query-block-jobs", json!({}));
        assert_eq!(jobs[0]["io-status"], "nospace");
        assert_eq!(jobs[0]["paused"], true);
        let remounted = Command::new("mount")
            .args(["-o", "remount,size=32m"])
            .arg(&tiny.path)
            .status();
        assert!(remounted.expect("it runs").success());
        client.run("job-resume", json!({"id": "j"}));
        client.wait_for("j", "null");
        for name in ["top", "mid", "base"] {
            client.run("blockdev-del", json!({"node-name": name}));
        }
        daemon.quit();
        run(folder, "qemu-img", &["check", "-q", "-f", "qcow2", top]);
        run(folder, "qemu-img", &["check", "-q", "-f", "qcow2", base]);
        run(
            folder,
            "qemu-io",
            &["-f", "qcow2", "-r", "-c", "read -P 5 0 8M", top],
        );
    }
}

/// What QEMU's job finds out when it runs is said before there is one.
#[test]
fn a_base_of_version_2_that_cannot_grow_is_refused_at_once() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    for (has_snapshot, below_bytes, why) in [
        (true, None, "Can't resize a v2 image which has snapshots"),
        (false, Some("4M"), "what is below it and longer would show"),
    ] {
        let daemon = Daemon::start();
        let folder = daemon.folder.path();
        let create = ["create", "-q", "-f", "qcow2"];
        let version_2 = [&create[..], &["-o", "compat=0.10"]].concat();
        let mut on_below = Vec::new();
        if let Some(bytes) = below_bytes {
            let below = ["below.img", bytes];
            run(folder, "qemu-img", &[&create[..], &below].concat());
            on_below = vec!["-b", "below.img", "-F", "qcow2"];
        }
        let base = [&version_2[..], &on_below, &["base.img", "1M"]].concat();
        run(folder, "qemu-img", &base);
        if has_snapshot {
            run(folder, "qemu-img", &["snapshot", "-c", "s", "base.img"]);
        }
        for (name, below) in [("mid.img", "base.img"), ("top.img", "mid.img")] {
            let image = ["-b", below, "-F", "qcow2", name, "2M"];
            run(folder, "qemu-img", &[&create[..], &image].concat());
        }
        let before = fs::read(folder.join("base.img")).expect("read");
        let mut client = daemon.client();
        client.run("blockdev-add", on("base", "base.img"));
        for (name, below) in [("mid", "base"), ("top", "mid")] {
            let node = with(on(name, &format!("{name}.img")), json!({"backing": below}));
            client.run("blockdev-add", node);
        }
        for (arguments, source) in [
            (
                json!({"device": "top", "top-node": "mid", "base-node": "base"}),
                "mid",
            ),
            (json!({"device": "top", "base-node": "base"}), "top"),
        ] {
            let job = with(json!({"job-id": "j"}), arguments.clone());
            let plan = with(json!({"job": "commit"}), arguments);
            for (command, arguments) in [("x-plan", plan), ("block-commit", job)] {
                let reply = client.command(command, arguments);
                let text = reply["error"]["desc"].as_str().unwrap_or_default();
                let expected =
                    format!("Node 'base' cannot be made as long as node '{source}': {why}");
                assert!(text.starts_with(&expected), "{command}: {reply}");
            }
        }
        assert_eq!(client.run("query-jobs", json!({})), json!([]));
        assert!(fs::read(folder.join("base.img")).expect("read") == before);
    }
}
