//! Commit and stream: refusals, who may do what meanwhile, and what chains and headers are afterwards, the same on both
//! daemons.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::chains::{on, with};
use crate::images::{chain, image, overlay, run};
use crate::oracle::compare;

/// A line of a script.
fn line(command: &str, arguments: &Value) -> String {
    format!("{}\n", json!({"execute": command, "arguments": arguments}))
}

/// Nodes `names`, the lowest first, each on its file and read-only but the last, described in one another.
fn nested(names: &[&str]) -> Value {
    let mut below: Option<Value> = None;
    for (place, name) in names.iter().enumerate() {
        let mut node = on(name, &format!("{name}.qcow2"));
        if place + 1 < names.len() {
            node = with(node, json!({"read-only": true}));
        }
        if let Some(below) = below.take() {
            node = with(node, json!({"backing": below}));
        }
        below = Some(node);
    }
    below.expect("one at least")
}

/// Nodes of a chain, each added by itself.
fn one_by_one(names: &[&str]) -> String {
    let mut script = String::new();
    let mut below: Option<&str> = None;
    for name in names {
        let mut node = on(name, &format!("{name}.qcow2"));
        if let Some(below) = below {
            node = with(node, json!({"backing": below}));
        }
        script += &line("blockdev-add", &node);
        below = Some(name);
    }
    script
}

/// What is left when everything is closed.
fn afterwards(images: &[&str]) -> String {
    let mut script = String::new();
    for image in images {
        writeln!(script, "$ qemu-img check -q -f qcow2 {image}.qcow2").expect("a text");
        writeln!(
            script,
            "$ qemu-img info -f qcow2 {image}.qcow2 | grep -E 'backing|virtual'"
        )
        .expect("a text");
    }
    script
}

/// Takes the job `j` to its end, which waits to be told so where it `waits`, and closes everything.
fn to_its_end(waits: bool) -> String {
    let mut script = String::new();
    if waits {
        script += "wait j pending\n";
        script += &line("x-debug-query-block-graph", &json!({}));
        script += &line("query-named-block-nodes", &json!({"flat": true}));
        script += &line("query-block-jobs", &json!({}));
        script += &line("job-finalize", &json!({"id": "j"}));
        script += "wait j concluded\n";
        script += &line("query-jobs", &json!({}));
        script += &line("job-dismiss", &json!({"id": "j"}));
    }
    script += "wait j null\n";
    script += &line("x-debug-query-block-graph", &json!({}));
    script += &line("query-named-block-nodes", &json!({}));
    script += "locks base.qcow2\nlocks top.qcow2\n";
    for name in ["top", "mid", "base"] {
        script += &line("blockdev-del", &json!({"node-name": name}));
    }
    script += &afterwards(&["top", "mid", "base"]);
    script += "$ qemu-img compare before.raw top.qcow2\n";
    script
}

/// Five layers of 4 MiB, each with data of its own.
fn five(folder: &Path) {
    image(folder, "n0.qcow2", &[]);
    for (place, name) in ["n1", "n2", "n3", "n4"].into_iter().enumerate() {
        overlay(
            folder,
            &format!("{name}.qcow2"),
            &format!("n{place}.qcow2"),
            "qcow2",
        );
    }
    for place in 0..5 {
        let name = format!("n{place}.qcow2");
        let write = format!("write -P {} {}k 900k", place + 1, place * 600);
        run(folder, "qemu-io", &["-f", "qcow2", "-c", &write, &name]);
    }
    image(folder, "t.qcow2", &[]);
}

#[test]
fn refused_commits_and_streams_say_why() {
    let mut script = line("blockdev-add", &nested(&["base", "mid", "top"]));
    script += &line(
        "blockdev-add",
        &json!({"driver": "file", "node-name": "r", "filename": "r.raw"}),
    );
    for arguments in [
        json!({"device": "nope"}),
        json!({"device": "mid"}),
        json!({"device": "r"}),
        json!({"device": "top", "top-node": "nope"}),
        json!({"device": "top", "top-node": "r"}),
        json!({"device": "top", "top-node": "base", "base-node": "mid"}),
        json!({"device": "top", "top-node": "mid", "base-node": "nope"}),
        json!({"device": "top", "base-node": "r"}),
        json!({"device": "top", "top": "x", "top-node": "mid"}),
        json!({"device": "top", "top": "x"}),
        json!({"device": "top", "base": "x", "base-node": "y"}),
        json!({"device": "top", "base": "x"}),
        json!({"device": "top", "base-node": "top"}),
        json!({"device": "top", "top-node": "base"}),
        json!({"device": "top", "top-node": "mid", "base-node": "mid"}),
        json!({"device": "top", "backing-file": "z"}),
        json!({"device": "top", "top-node": "mid", "filter-node-name": "1x"}),
        json!({"device": "top", "top-node": "mid", "filter-node-name": "top"}),
        json!({"device": "top", "top-node": "mid", "filter-node-name": "top", "speed": -1}),
        json!({"device": "top", "top-node": "mid", "speed": -1}),
        json!({"device": "top", "top-node": "mid", "job-id": "1x"}),
        json!({"device": "top", "top-node": "mid", "on-error": "foo"}),
        json!({"device": "top", "top-node": "mid", "bogus": 1}),
    ] {
        script += &line("block-commit", &with(json!({"job-id": "j"}), arguments));
    }
    script += &line("block-commit", &json!({"device": "top", "top-node": "mid"}));
    for arguments in [
        json!({"device": "nope"}),
        json!({"device": "top", "base": "x", "base-node": "base"}),
        json!({"device": "nope", "base": "x", "base-node": "base"}),
        json!({"device": "top", "base": "x", "bottom": "base"}),
        json!({"device": "top", "bottom": "x", "base-node": "base"}),
        json!({"device": "top", "base": "x"}),
        json!({"device": "top", "base-node": "nope"}),
        json!({"device": "top", "base-node": "top"}),
        json!({"device": "top", "base-node": "r"}),
        json!({"device": "mid", "base-node": "top"}),
        json!({"device": "top", "bottom": "nope"}),
        json!({"device": "mid", "bottom": "top"}),
        json!({"device": "top", "backing-file": "x"}),
        json!({"device": "top", "bottom": "mid", "backing-file": "x"}),
        json!({"device": "top", "filter-node-name": "1x"}),
        json!({"device": "top", "filter-node-name": "mid"}),
        json!({"device": "top", "speed": -1}),
        json!({"device": "top", "on-error": "foo"}),
    ] {
        script += &line("block-stream", &with(json!({"job-id": "j"}), arguments));
    }
    script += &line("block-stream", &json!({"device": "top"}));
    script += &line("x-debug-query-block-graph", &json!({}));
    script += &line("query-named-block-nodes", &json!({"flat": true}));
    compare(&script, chain);
}

#[test]
fn a_commit_below_the_top_shortens_the_chain() {
    let commits = [
        json!({"device": "top", "top-node": "mid"}),
        json!({"device": "top", "top-node": "mid", "base-node": "base", "backing-file": "sub/../base.qcow2"}),
        json!({"device": "top", "top": "mid.qcow2", "base": "base.qcow2"}),
        json!({"device": "top", "top": "./mid.qcow2", "base": "sub/../base.qcow2", "filter-node-name": "flt"}),
        json!({"device": "top", "top-node": "mid", "auto-finalize": false, "auto-dismiss": false}),
    ];
    for commit in commits {
        let waits = commit.get("auto-finalize").is_some();
        for nodes in [
            line("blockdev-add", &nested(&["base", "mid", "top"])),
            one_by_one(&["base", "mid", "top"]),
        ] {
            let mut script = String::from("$ qemu-img convert top.qcow2 before.raw\n");
            script += &nodes;
            script += &line(
                "block-commit",
                &with(json!({"job-id": "j"}), commit.clone()),
            );
            script += &to_its_end(waits);
            compare(&script, chain);
        }
    }
}

#[test]
fn a_commit_takes_raw_and_short_and_long_bases() {
    for (base_size, mask) in [("4M", false), ("4M", true), ("1M", false), ("6M", true)] {
        let mut script = String::from("$ qemu-img convert top.qcow2 before.raw\n");
        script += &line(
            "blockdev-add",
            &json!({"driver": "file", "node-name": "b", "filename": "b.raw"}),
        );
        script += &line(
            "blockdev-add",
            &with(on("mid", "mid.qcow2"), json!({"backing": "b"})),
        );
        script += &line(
            "blockdev-add",
            &with(on("top", "top.qcow2"), json!({"backing": "mid"})),
        );
        script += &line(
            "block-commit",
            &json!({"job-id": "j", "device": "top", "top-node": "mid", "backing-mask-protocol": mask}),
        );
        script += "wait j null\n";
        script += &line("query-named-block-nodes", &json!({"flat": true}));
        for name in ["top", "mid", "b"] {
            script += &line("blockdev-del", &json!({"node-name": name}));
        }
        script += &afterwards(&["mid"]);
        script += "$ qemu-img info -f qcow2 top.qcow2 | grep -E 'backing'\n$ stat -c %s b.raw\n";
        script += "$ qemu-img rebase -u -f qcow2 -b b.raw -F raw top.qcow2\n";
        script += "$ qemu-img compare before.raw top.qcow2\n";
        compare(&script, |folder| {
            run(
                folder,
                "qemu-img",
                &["create", "-q", "-f", "raw", "b.raw", base_size],
            );
            run(
                folder,
                "qemu-io",
                &["-f", "raw", "-c", "write -P 9 0 1M", "b.raw"],
            );
            overlay(folder, "mid.qcow2", "b.raw", "raw");
            overlay(folder, "top.qcow2", "mid.qcow2", "qcow2");
            run(
                folder,
                "qemu-io",
                &[
                    "-f",
                    "qcow2",
                    "-c",
                    "write -P 2 512k 1M",
                    "-c",
                    "write -z 3M 300k",
                    "mid.qcow2",
                ],
            );
            run(
                folder,
                "qemu-io",
                &["-f", "qcow2", "-c", "write -P 3 2M 100k", "top.qcow2"],
            );
        });
    }
}

#[test]
fn a_stream_pulls_up_what_it_is_asked_for() {
    let streams = [
        json!({"device": "top"}),
        json!({"device": "top", "base-node": "base"}),
        json!({"device": "top", "base": "base.qcow2"}),
        json!({"device": "top", "bottom": "mid"}),
        json!({"device": "top", "bottom": "top"}),
        json!({"device": "top", "base-node": "mid"}),
        json!({"device": "top", "base-node": "base", "backing-file": "sub/../base.qcow2", "backing-mask-protocol": true}),
        json!({"device": "mid", "filter-node-name": "flt"}),
        json!({"device": "mid", "base-node": "base"}),
        json!({"device": "base"}),
        json!({"device": "top", "auto-finalize": false, "auto-dismiss": false}),
    ];
    for stream in streams {
        let waits = stream.get("auto-finalize").is_some();
        let device = stream["device"].as_str().expect("a name").to_owned();
        for nodes in [
            line("blockdev-add", &nested(&["base", "mid", "top"])),
            one_by_one(&["base", "mid", "top"]),
        ] {
            let mut script = String::from("$ qemu-img convert top.qcow2 before.raw\n");
            writeln!(script, "$ qemu-img convert {device}.qcow2 device.raw").expect("a text");
            script += &nodes;
            script += &line(
                "block-stream",
                &with(json!({"job-id": "j"}), stream.clone()),
            );
            script += &to_its_end(waits);
            writeln!(script, "$ qemu-img compare device.raw {device}.qcow2").expect("a text");
            compare(&script, chain);
        }
    }
}

#[test]
fn jobs_of_one_chain_keep_out_of_each_others_way() {
    let running = [
        ("block-stream", json!({"device": "n4", "base-node": "n2"})),
        ("block-stream", json!({"device": "n2"})),
        (
            "block-commit",
            json!({"device": "n4", "top-node": "n3", "base-node": "n2"}),
        ),
        ("block-commit", json!({"device": "n4", "top-node": "n1"})),
    ];
    let others = [
        ("block-stream", json!({"device": "n4"})),
        ("block-stream", json!({"device": "n3"})),
        ("block-stream", json!({"device": "n2"})),
        ("block-stream", json!({"device": "n2", "base-node": "n0"})),
        ("block-stream", json!({"device": "n1"})),
        // What is below a commit's filter cannot be relied on through it.
        ("block-stream", json!({"device": "n3", "base-node": "n1"})),
        (
            "block-stream",
            json!({"device": "n3", "base": "n1.qcow2", "auto-dismiss": false}),
        ),
        ("block-commit", json!({"device": "n4", "top-node": "n1"})),
        (
            "block-commit",
            json!({"device": "n4", "top-node": "n3", "base-node": "n2"}),
        ),
        (
            "blockdev-backup",
            json!({"device": "n4", "target": "t", "sync": "full"}),
        ),
        (
            "blockdev-backup",
            json!({"device": "n3", "target": "t", "sync": "full"}),
        ),
        (
            "blockdev-backup",
            json!({"device": "n0", "target": "t", "sync": "full"}),
        ),
        (
            "blockdev-mirror",
            json!({"device": "t", "target": "n1", "sync": "full"}),
        ),
    ];
    for (command, arguments) in running {
        let mut script = line("blockdev-add", &nested(&["n0", "n1", "n2", "n3", "n4"]));
        script += &line("blockdev-add", &on("t", "t.qcow2"));
        script += &line(
            command,
            &with(
                json!({"job-id": "j", "speed": 1, "filter-node-name": "filter"}),
                arguments,
            ),
        );
        script += &line("x-debug-query-block-graph", &json!({}));
        for (place, (command, arguments)) in others.iter().enumerate() {
            let id = format!("o{place}");
            let arguments = with(
                arguments.clone(),
                json!({"job-id": id, "speed": 1, "auto-finalize": false}),
            );
            script += &line(command, &arguments);
            script += &line("job-cancel", &json!({"id": id}));
            writeln!(script, "gone {id}").expect("a text");
        }
        for (below, bottom) in [("n2", "n1"), ("n2", "n2"), ("filter", "n1")] {
            let node = json!({"driver": "copy-on-read", "node-name": "r", "file": below, "bottom": bottom});
            script += &line("blockdev-add", &node);
            script += &line("blockdev-del", &json!({"node-name": "r"}));
        }
        for name in ["n0", "n1", "n2", "n3", "n4"] {
            script += &line("block_resize", &json!({"node-name": name, "size": 4 << 20}));
            script += &line("blockdev-del", &json!({"node-name": name}));
        }
        script += &line("job-complete", &json!({"id": "j"}));
        script += &line("job-pause", &json!({"id": "j"}));
        script += "wait j paused\n";
        script += &line("query-block-jobs", &json!({}));
        script += &line("job-resume", &json!({"id": "j"}));
        script += &line("job-cancel", &json!({"id": "j"}));
        script += "wait j null\n";
        script += &line("x-debug-query-block-graph", &json!({}));
        script += &line("blockdev-del", &json!({"node-name": "n4"}));
        script += &afterwards(&["n0", "n1", "n2", "n3", "n4"]);
        compare(&script, five);
    }
}

#[test]
fn the_top_is_committed_until_its_client_decides() {
    let commits = [
        json!({"device": "top"}),
        json!({"device": "top", "base-node": "mid"}),
        json!({"device": "top", "top-node": "top", "base": "base.qcow2", "filter-node-name": "flt"}),
        json!({"device": "top", "auto-finalize": false, "auto-dismiss": false}),
    ];
    let ends = [
        line("job-complete", &json!({"id": "j"})),
        line("block-job-cancel", &json!({"device": "j"})),
        line("job-cancel", &json!({"id": "j"})),
    ];
    for commit in commits {
        let waits = commit.get("auto-finalize").is_some();
        for end in &ends {
            let fails = end.contains("job-cancel\"") && !end.contains("block-job");
            let mut script = String::from("$ qemu-img convert top.qcow2 before.raw\n");
            script += &line("blockdev-add", &nested(&["base", "mid", "top"]));
            script += &line(
                "block-commit",
                &with(json!({"job-id": "j"}), commit.clone()),
            );
            script += "wait j ready\n";
            script += &line("x-debug-query-block-graph", &json!({}));
            script += &line("query-block-jobs", &json!({}));
            script += &line("job-pause", &json!({"id": "j"}));
            script += "wait j standby\n";
            script += &line("job-resume", &json!({"id": "j"}));
            script += "wait j ready\n";
            script += &line("block-stream", &json!({"job-id": "k", "device": "top"}));
            script += &line(
                "block_resize",
                &json!({"node-name": "top", "size": 8 << 20}),
            );
            script += end;
            if waits && !fails {
                script += "wait j pending\n";
                script += &line("x-debug-query-block-graph", &json!({}));
                script += &line("job-finalize", &json!({"id": "j"}));
            }
            if waits {
                script += "wait j concluded\n";
                script += &line("job-dismiss", &json!({"id": "j"}));
            }
            script += "wait j null\n";
            script += &line("x-debug-query-block-graph", &json!({}));
            for name in ["top", "mid", "base"] {
                script += &line("blockdev-del", &json!({"node-name": name}));
            }
            script += &afterwards(&["top", "mid", "base"]);
            script += "$ qemu-img compare before.raw top.qcow2\n";
            if !fails {
                script += match commit.get("base-node") {
                    Some(_) => "$ qemu-img compare before.raw mid.qcow2\n",
                    None => "$ qemu-img compare before.raw base.qcow2\n",
                };
            }
            compare(&script, chain);
        }
    }
}

/// A stream that ends while a commit has its filter right below: what is below is the layer when the commit is given up, so that
/// the nodes can still move and be opened in another way.
#[test]
fn a_stream_may_end_above_the_filter_of_a_commit() {
    let mut script = one_by_one(&["base", "mid", "top"]);
    script += &line(
        "blockdev-add",
        &with(on("other", "other.qcow2"), json!({"backing": "mid"})),
    );
    script += &line("object-add", &json!({"qom-type": "iothread", "id": "t"}));
    let commit = json!({"job-id": "c", "device": "other", "top-node": "mid", "speed": 1});
    script += &line("block-commit", &commit);
    script += &line(
        "block-stream",
        &json!({"job-id": "s", "device": "top", "bottom": "top"}),
    );
    script += "wait s null\n";
    script += &line("block-job-cancel", &json!({"device": "c", "force": true}));
    script += "wait c null\n";
    script += &line(
        "x-blockdev-set-iothread",
        &json!({"node-name": "top", "iothread": "t"}),
    );
    script += &afterwards(&["top", "other", "mid", "base"]);
    compare(&script, |folder| {
        chain(folder);
        overlay(folder, "other.qcow2", "mid.qcow2", "qcow2");
    });
}

/// The overlay of a commit's top is the base of another commit, which writes to it: it goes onto the first one's base all the
/// same.
#[test]
fn a_commit_may_end_below_what_another_commit_writes_to() {
    let mut script = one_by_one(&["n0", "n1", "n2", "n3", "n4"]);
    script += &line(
        "blockdev-add",
        &with(on("t", "t.qcow2"), json!({"backing": "n3"})),
    );
    let upper = json!({"job-id": "u", "device": "t", "top-node": "n3", "base-node": "n2"});
    let upper = with(upper, json!({"speed": 1}));
    let lower = json!({"job-id": "l", "device": "n4", "top-node": "n1", "base-node": "n0"});
    let lower = with(lower, json!({"auto-finalize": false}));
    // The other way round it is refused.
    script += &line("block-commit", &upper);
    script += &line("block-commit", &lower);
    script += &line("job-cancel", &json!({"id": "u"}));
    script += "wait u null\n";
    script += &line("block-commit", &lower);
    script += "wait l pending\n";
    script += &line("block-commit", &upper);
    script += &line("job-finalize", &json!({"id": "l"}));
    script += "wait l null\n";
    script += &line("x-debug-query-block-graph", &json!({}));
    script += &line("block-job-set-speed", &json!({"device": "u", "speed": 0}));
    script += "wait u null\n";
    script += &line("x-debug-query-block-graph", &json!({}));
    script += &afterwards(&["n0", "n1", "n2", "n3", "n4"]);
    script += "$ qemu-img compare before.raw n4.qcow2\n";
    compare(&script, |folder| {
        five(folder);
        overlay(folder, "t.qcow2", "n3.qcow2", "qcow2");
        run(
            folder,
            "qemu-img",
            &["convert", "-f", "qcow2", "n4.qcow2", "before.raw"],
        );
    });
}
