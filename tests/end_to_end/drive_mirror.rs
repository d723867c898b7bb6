//! `drive-mirror`, and what `blockdev-mirror` does at its end with nodes that are only read: refusals, files, nodes and headers, the
//! same on both daemons.

use std::path::Path;

use serde_json::{Value, json};

use crate::chains::{on, with};
use crate::daemon::Daemon;
use crate::images::{chain, image, overlay, run};
use crate::oracle::{compare, hole_file};
use crate::tools;

/// A line of a script.
fn line(command: &str, arguments: &Value) -> String {
    format!("{}\n", json!({"execute": command, "arguments": arguments}))
}

/// Three layers by name, the lower ones read-only, and their files by name.
fn nodes(top: &Value) -> String {
    let read_only = json!({"read-only": true});
    let mut script = line(
        "blockdev-add",
        &with(on("base", "base.qcow2"), read_only.clone()),
    );
    let mid = with(on("mid", "mid.qcow2"), json!({"backing": "base"}));
    script += &line("blockdev-add", &with(mid, read_only));
    let node = with(on("top", "top.qcow2"), json!({"backing": "mid"}));
    script + &line("blockdev-add", &with(node, top.clone()))
}

/// Images that exist before a mirror opens them.
fn with_targets(folder: &Path) {
    chain(folder);
    image(folder, "bare.qcow2", &[]);
    overlay(folder, "on-mid.qcow2", "mid.qcow2", "qcow2");
    overlay(folder, "on-base.qcow2", "base.qcow2", "qcow2");
    overlay(folder, "on-nothing.qcow2", "gone.qcow2", "qcow2");
    image(folder, "old.qcow2", &[]);
    run(
        folder,
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 9 2M 2M", "old.qcow2"],
    );
    hole_file(&folder.join("t.raw"), 4 << 20);
    hole_file(&folder.join("short.raw"), 2 << 20);
}

fn mirror(arguments: &Value) -> Value {
    with(
        json!({"job-id": "j", "device": "top", "target": "new", "sync": "full"}),
        arguments.clone(),
    )
}

#[test]
fn refused_drive_mirrors_say_why() {
    let mut script = nodes(&json!({}));
    for arguments in [
        json!({"device": "nope"}),
        json!({"device": "mid"}),
        json!({"device": ""}),
        json!({"granularity": 3}),
        json!({"granularity": 513}),
        json!({"granularity": 128 << 20}),
        json!({"granularity": -1}),
        json!({"format": "foo"}),
        json!({"format": ""}),
        json!({"sync": "top", "format": "foo"}),
        json!({"sync": "top", "format": "raw"}),
        json!({"sync": "none", "format": "raw"}),
        json!({"sync": "none", "format": "file"}),
        json!({"format": "blkdebug"}),
        json!({"format": "null-co"}),
        json!({"format": "copy-on-read"}),
        json!({"target": "nodir/x"}),
        json!({"target": "nodir/x", "mode": "existing", "format": "qcow2"}),
        json!({"target": "nodir/x", "mode": "existing", "format": "foo"}),
        json!({"target": "bare.qcow2", "mode": "other"}),
        json!({"target": ""}),
        json!({"target": "", "mode": "existing", "format": "qcow2"}),
        json!({"target": ".", "mode": "existing", "format": "qcow2"}),
        json!({"target": "t.raw", "mode": "existing", "format": "qcow2"}),
        json!({"sync": "incremental"}),
        json!({"sync": "bitmap"}),
        json!({"sync": "bitmap", "format": "raw"}),
        json!({"sync": "some"}),
        json!({"buf-size": -1}),
        json!({"replaces": "nope"}),
        json!({"replaces": "nope", "node-name": "t"}),
        json!({"replaces": "mid", "node-name": "t"}),
        json!({"replaces": "top-file", "node-name": "t"}),
        json!({"node-name": "top"}),
        json!({"node-name": "1x"}),
        json!({"node-name": ""}),
        json!({"target": "top.qcow2"}),
        json!({"target": "top.qcow2", "mode": "existing", "format": "qcow2"}),
        json!({"target": "mid.qcow2", "sync": "top"}),
        json!({"target": "top.qcow2", "sync": "none"}),
        json!({"job-id": "1x"}),
        json!({"job-id": ""}),
        json!({"speed": -1}),
        json!({"speed": 1.5}),
        json!({"filter-node-name": "f"}),
        json!({"target-is-zero": true}),
        json!({"unmap": "yes"}),
        json!({"on-target-error": "never"}),
        json!({"copy-mode": "later"}),
        json!({"bogus": 1}),
    ] {
        script += &line("drive-mirror", &mirror(&arguments));
        script += "gone j\n";
    }
    script += &line("drive-mirror", &json!({"device": "top", "sync": "full"}));
    script += &line("drive-mirror", &json!({"device": "top", "target": "x"}));
    script += &line("drive-mirror", &json!({"target": "x", "sync": "full"}));
    script += &line("blockdev-mirror", &mirror(&json!({"unmap": true})));
    script += &line("query-named-block-nodes", &json!({}));
    compare(&script, with_targets);
}

/// One job to its end, and what is there meanwhile and afterwards.
fn to_its_end(arguments: &Value, end: &str, target: &str) -> String {
    let mut script = line("drive-mirror", &mirror(arguments));
    script += "wait j ready\n";
    script += &line("query-block-jobs", &json!({}));
    script += &line("query-jobs", &json!({}));
    script += &line("x-debug-query-block-graph", &json!({}));
    script += &line("query-named-block-nodes", &json!({}));
    script += &line("blockdev-del", &json!({"node-name": "t"}));
    script += &line(
        "drive-mirror",
        &with(mirror(arguments), json!({"job-id": "k"})),
    );
    script += end;
    script += "wait j null\n";
    script += &line("x-debug-query-block-graph", &json!({}));
    script += &line("query-named-block-nodes", &json!({}));
    for name in ["t", "top", "mid", "base"] {
        script += &line("blockdev-del", &json!({"node-name": name}));
    }
    for command in ["check -q", "info"] {
        script +=
            &format!("$ qemu-img {command} {target} | grep -v -e 'disk size' -e 'file length'\n");
    }
    script + &format!("$ qemu-img compare top.qcow2 {target}\n")
}

fn complete() -> String {
    line("job-complete", &json!({"id": "j"}))
}

#[test]
fn a_target_is_made_and_gets_its_backing_in_the_end() {
    for arguments in [
        json!({"node-name": "t"}),
        json!({}),
        json!({"format": "raw"}),
        json!({"format": "file", "node-name": "t"}),
        json!({"sync": "top", "node-name": "t"}),
        json!({"sync": "none", "node-name": "t"}),
        json!({"unmap": false, "granularity": 4096, "buf-size": 65536}),
        json!({"node-name": "t", "replaces": "top", "copy-mode": "write-blocking"}),
        json!({"target": "old.qcow2", "granularity": 65536}),
    ] {
        let target = arguments["target"].as_str().unwrap_or("new").to_owned();
        let script = nodes(&json!({})) + &to_its_end(&arguments, &complete(), &target);
        compare(&script, with_targets);
    }
}

#[test]
fn a_target_that_exists_is_opened_without_its_backing_at_first() {
    for arguments in [
        json!({"target": "bare.qcow2"}),
        json!({"target": "on-mid.qcow2", "sync": "top", "node-name": "t"}),
        json!({"target": "on-mid.qcow2", "sync": "none"}),
        json!({"target": "on-base.qcow2"}),
        json!({"target": "old.qcow2"}),
        json!({"target": "t.raw", "format": "raw", "node-name": "t"}),
    ] {
        let arguments = with(json!({"mode": "existing", "format": "qcow2"}), arguments);
        let target = arguments["target"].as_str().expect("named").to_owned();
        let script = nodes(&json!({})) + &to_its_end(&arguments, &complete(), &target);
        compare(&script, with_targets);
    }
}

#[test]
fn a_target_takes_over_how_its_source_was_opened() {
    for top in [
        json!({"discard": "unmap"}),
        json!({"cache": {"no-flush": true}, "detect-zeroes": "on"}),
        json!({"read-only": true}),
        json!({"read-only": true, "auto-read-only": true}),
    ] {
        for arguments in [
            json!({"node-name": "t"}),
            json!({"format": "raw", "node-name": "t"}),
        ] {
            let script = nodes(&top) + &to_its_end(&arguments, &complete(), "new");
            compare(&script, with_targets);
        }
    }
}

#[test]
fn a_target_without_users_goes_whatever_the_end() {
    for end in [
        line("block-job-cancel", &json!({"device": "j"})),
        line("block-job-cancel", &json!({"device": "j", "force": true})),
        line("job-cancel", &json!({"id": "j"})),
    ] {
        for arguments in [json!({"node-name": "t"}), json!({"sync": "top"})] {
            let script = nodes(&json!({})) + &to_its_end(&arguments, &end, "new");
            compare(&script, with_targets);
        }
    }
}

#[test]
fn a_target_of_another_length_fails_the_job() {
    for arguments in [json!({}), json!({"node-name": "t", "replaces": "top"})] {
        let existing = json!({"mode": "existing", "format": "raw", "target": "short.raw"});
        let arguments = with(
            with(mirror(&existing), json!({"auto-dismiss": false})),
            arguments,
        );
        let mut script = nodes(&json!({})) + &line("drive-mirror", &arguments);
        script += "wait j concluded\n";
        script += &line("query-jobs", &json!({}));
        script += &line("query-named-block-nodes", &json!({}));
        compare(&script, with_targets);
    }
}

/// What stands in the header is opened when the job completes; it fails if that cannot be done, and the source stays.
#[test]
fn a_backing_that_is_not_there_fails_the_job_in_the_end() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    let daemon = Daemon::start();
    with_targets(daemon.folder.path());
    let mut client = daemon.client();
    client.run("blockdev-add", on("top", "top.qcow2"));
    let gone = json!({"target": "on-nothing.qcow2", "mode": "existing", "format": "qcow2"});
    let gone = with(gone, json!({"auto-dismiss": false}));
    client.run("drive-mirror", with(mirror(&gone), json!({"sync": "top"})));
    client.wait_for("j", "ready");
    client.run("job-complete", json!({"id": "j"}));
    client.wait_for("j", "concluded");
    let jobs = client.run("query-jobs", json!({}));
    let text =
        "Could not open backing file: Could not open 'gone.qcow2': No such file or directory";
    assert_eq!(jobs[0]["error"], text);
    let nodes = client.run("query-named-block-nodes", json!({}));
    let names = nodes.as_array().expect("a list").iter();
    assert!(names.clone().any(|node| node["node-name"] == "top"));
    assert!(
        names
            .clone()
            .all(|node| node["image"]["filename"] != "on-nothing.qcow2")
    );
}

/// Nobody is trusted to tell what an image is by what it holds.
#[test]
fn the_format_of_a_target_that_exists_has_to_be_given() {
    let daemon = Daemon::start();
    hole_file(&daemon.folder.path().join("t.raw"), 4096);
    let mut client = daemon.client();
    let source = json!({"driver": "null-co", "node-name": "top", "size": 4096});
    client.run("blockdev-add", source);
    let existing = json!({"target": "t.raw", "mode": "existing"});
    let refusal = client.refusal("drive-mirror", mirror(&existing));
    let text = "The format of 't.raw' must be given: what a file holds is not trusted to tell it";
    assert_eq!(refusal, text);
    client.run(
        "drive-mirror",
        with(mirror(&existing), json!({"format": "raw"})),
    );
    client.wait_for("j", "ready");
}

/// The data of a target that is said to read as zeroes is not overwritten by zeroes, which is what saves time where it is true.
#[test]
fn a_target_that_is_zero_is_not_zeroed() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.folder.path();
    hole_file(&folder.join("s.raw"), 4 << 20);
    run(
        folder,
        "qemu-io",
        &["-f", "raw", "-c", "write -P 1 0 1M", "s.raw"],
    );
    for name in ["zeroed.raw", "trusted.raw"] {
        hole_file(&folder.join(name), 4 << 20);
        run(
            folder,
            "qemu-io",
            &["-f", "raw", "-c", "write -P 9 2M 64k", name],
        );
    }
    let mut client = daemon.client();
    for (name, is_zero) in [("zeroed", false), ("trusted", true)] {
        client.run("blockdev-add", file_node("s"));
        client.run("blockdev-add", file_node(name));
        let job = json!({"job-id": name, "device": "s", "target": name, "sync": "full", "target-is-zero": is_zero});
        client.run("blockdev-mirror", job);
        client.wait_for(name, "ready");
        client.run("block-job-cancel", json!({"device": name}));
        client.wait_for(name, "null");
        client.run("blockdev-del", json!({"node-name": "s"}));
        client.run("blockdev-del", json!({"node-name": name}));
    }
    let read = |name: &str| std::fs::read(folder.join(name)).expect("read");
    assert!(read("zeroed.raw") == read("s.raw"));
    let trusted = read("trusted.raw");
    assert!(trusted[..1 << 20] == read("s.raw")[..1 << 20]);
    assert!(
        trusted[2 << 20..(2 << 20) + 65536]
            .iter()
            .all(|byte| *byte == 9)
    );
}

fn file_node(name: &str) -> Value {
    json!({"driver": "file", "node-name": name, "filename": format!("{name}.raw")})
}

/// A target that takes the place of a node for reading only becomes so.
#[test]
fn a_mirror_of_what_is_read_only_leaves_the_target_so() {
    for (target, end) in [
        (on("t", "bare.qcow2"), complete()),
        (
            json!({"driver": "raw", "node-name": "t", "file": {"driver": "file", "filename": "t.raw"}}),
            complete(),
        ),
        (
            on("t", "bare.qcow2"),
            line("block-job-cancel", &json!({"device": "j"})),
        ),
    ] {
        let mut script = nodes(&json!({"read-only": true}));
        script += &line("blockdev-add", &target);
        script += &line(
            "blockdev-mirror",
            &json!({"job-id": "j", "device": "top", "target": "t", "sync": "full"}),
        );
        script += "wait j ready\n";
        script += &end;
        script += "wait j null\n";
        script += &line("query-named-block-nodes", &json!({}));
        script += &line("x-debug-query-block-graph", &json!({}));
        compare(&script, with_targets);
    }
}
