//! The copy-on-read filter on both daemons: how it is described and shown, what of the graph it keeps as it is, and what is in
//! the overlay when it has been read through.

use serde_json::{Value, json};

use crate::chains::{on, with};
use crate::images::{chain, image, run};
use crate::oracle::{compare, hole_file};

fn line(command: &str, arguments: &Value) -> String {
    format!("{}\n", json!({"execute": command, "arguments": arguments}))
}

fn add(name: &str, file: &Value, more: Value) -> String {
    let node = json!({"driver": "copy-on-read", "node-name": name, "file": file});
    line("blockdev-add", &with(node, more))
}

fn delete(name: &str) -> String {
    line("blockdev-del", &json!({"node-name": name}))
}

/// Three layers, each a node of its own, and a raw target.
fn three() -> String {
    let mut script = line("blockdev-add", &on("base", "base.qcow2"));
    for (name, below) in [("mid", "base"), ("top", "mid")] {
        let node = with(
            on(name, &format!("{name}.qcow2")),
            json!({"backing": below}),
        );
        script += &line("blockdev-add", &node);
    }
    script
}

fn target() -> String {
    let file = json!({"driver": "file", "filename": "t.raw"});
    line(
        "blockdev-add",
        &json!({"driver": "raw", "node-name": "t", "file": file}),
    )
}

fn graph() -> String {
    ["query-named-block-nodes", "x-debug-query-block-graph"]
        .map(|query| line(query, &json!({})))
        .concat()
}

fn files(folder: &std::path::Path) {
    chain(folder);
    hole_file(&folder.join("t.raw"), crate::images::SIZE);
    image(folder, "new.qcow2", &[]);
}

#[test]
fn it_is_described_and_shown_in_the_same_way() {
    let top = json!("top");
    let mut script = three();
    for (file, more) in [
        (json!("none"), json!({})),
        (json!("none"), json!({"bottom": "none"})),
        (json!(1), json!({})),
        (json!(null), json!({})),
        (top.clone(), json!({"bottom": "none"})),
        (top.clone(), json!({"bottom": ""})),
        (top.clone(), json!({"bottom": 1})),
        (top.clone(), json!({"bottom": null})),
        (top.clone(), json!({"on-read": 1})),
        (top.clone(), json!({"bottom": "top"})),
        (top.clone(), json!({"bottom": "base"})),
        (top.clone(), json!({"read-only": true})),
        (top.clone(), json!({"force-share": true})),
        (
            top.clone(),
            json!({"discard": "unmap", "detect-zeroes": "unmap", "cache": {"direct": true}}),
        ),
        (json!("base"), json!({})),
        (json!({"driver": "null-co", "size": 65536}), json!({})),
        (json!({"driver": "file", "filename": "r.raw"}), json!({})),
        (
            json!({"driver": "file", "filename": "r.raw"}),
            json!({"read-only": true}),
        ),
        (
            json!({"driver": "file", "filename": "r.raw", "read-only": true}),
            json!({}),
        ),
        (
            json!({"driver": "file", "filename": "nothing.raw"}),
            json!({}),
        ),
        (
            with(on("inner", "new.qcow2"), json!({"discard": "unmap"})),
            json!({"discard": "unmap"}),
        ),
        (on("inner", "new.qcow2"), json!({"bottom": "inner"})),
        (on("inner", "new.qcow2"), json!({"bottom": "other"})),
    ] {
        script += &add("c", &file, more);
        script += &graph();
        script += &delete("c");
    }
    // One above the other, and below an image.
    script += &add("c", &top, json!({"bottom": "mid"}));
    script += &add("d", &json!("c"), json!({}));
    script += &add("e", &top, json!({}));
    script += &add("f", &json!("c"), json!({"bottom": "c"}));
    script += &add("f", &top, json!({"bottom": "mid"}));
    script += &add("f", &json!("d"), json!({"bottom": "base"}));
    script += &line(
        "blockdev-add",
        &json!({"driver": "raw", "node-name": "r", "file": "d"}),
    );
    script += &graph();
    script += &line("query-named-block-nodes", &json!({"flat": true}));
    for name in [
        "c", "top", "mid", "base", "r", "e", "d", "c", "top", "mid", "base",
    ] {
        script += &delete(name);
    }
    compare(&script, files);
}

#[test]
fn links_that_it_relies_on_stay() {
    for bottom in [None, Some("base"), Some("mid"), Some("top")] {
        let more = bottom.map_or(json!({}), |bottom| json!({"bottom": bottom}));
        let mut script = three();
        script += &add("c", &json!("top"), more);
        script += &target();
        script += &line(
            "blockdev-add",
            &with(on("new", "new.qcow2"), json!({"backing": null})),
        );
        for size in [5 << 20, 4 << 20] {
            script += &line("block_resize", &json!({"node-name": "c", "size": size}));
        }
        for (command, arguments) in [
            (
                "blockdev-backup",
                json!({"device": "top", "target": "t", "sync": "full"}),
            ),
            (
                "blockdev-backup",
                json!({"device": "mid", "target": "t", "sync": "full"}),
            ),
            (
                "blockdev-mirror",
                json!({"device": "top", "target": "t", "sync": "full"}),
            ),
            (
                "block-commit",
                json!({"device": "c", "top-node": "mid", "base-node": "base"}),
            ),
            ("block-stream", json!({"device": "c"})),
            ("block-stream", json!({"device": "top"})),
            ("block-stream", json!({"device": "mid"})),
        ] {
            script += &line(command, &with(arguments, json!({"job-id": "j"})));
            script += "gone j\n";
            script += &graph();
        }
        let node = with(on("top", "top.qcow2"), json!({"backing": null}));
        script += &line("blockdev-reopen", &json!({"options": [node]}));
        let node = json!({"driver": "copy-on-read", "node-name": "c", "file": "top"});
        script += &line("blockdev-reopen", &json!({"options": [node]}));
        script += &line(
            "blockdev-snapshot",
            &json!({"node": "top", "overlay": "new"}),
        );
        script += &graph();
        script += &delete("c");
        script += &graph();
        compare(&script, files);
    }
}

#[test]
fn what_is_read_through_it_is_in_the_overlay() {
    for bottom in [None, Some("base"), Some("mid")] {
        let more = bottom.map_or(json!({}), |bottom| json!({"bottom": bottom}));
        let mut script = three();
        script += &add("c", &json!("top"), more);
        script += &target();
        script += &line(
            "blockdev-backup",
            &json!({"device": "c", "target": "t", "sync": "full", "job-id": "j"}),
        );
        script += "gone j\n";
        for name in ["t", "c", "top", "mid", "base"] {
            script += &delete(name);
        }
        script += "$ qemu-img compare -f raw -F qcow2 t.raw top.qcow2\n";
        for name in ["top", "mid", "base"] {
            script += &format!("$ qemu-io -r -f qcow2 -c map {name}.qcow2\n");
            script += &format!("$ qemu-img check -q {name}.qcow2\n");
        }
        compare(&script, files);
    }
}

#[test]
fn a_copy_that_cannot_be_written_fails_the_read() {
    let rule = json!({"event": "none", "iotype": "write", "errno": 28});
    let file = json!({"driver": "file", "filename": "top.qcow2"});
    let file = json!({"driver": "blkdebug", "image": file, "inject-error": [rule]});
    let top = with(on("top", "top.qcow2"), json!({"file": file}));
    let mut script = line("blockdev-add", &top);
    script += &add("c", &json!("top"), json!({}));
    script += &target();
    script += &line(
        "blockdev-backup",
        &json!({"device": "c", "target": "t", "sync": "full", "job-id": "j", "auto-dismiss": false}),
    );
    script += "wait j concluded\n";
    script += &line("query-jobs", &json!({}));
    script += &line("job-dismiss", &json!({"id": "j"}));
    for name in ["t", "c", "top"] {
        script += &delete(name);
    }
    script += "$ qemu-io -r -f qcow2 -c map top.qcow2\n";
    compare(&script, |folder| {
        files(folder);
        run(folder, "qemu-img", &["check", "-q", "top.qcow2"]);
    });
}
