//! Nodes that save what is about to be changed, on both daemons: how they are described, shown, connected and refused.

use serde_json::{Value, json};

use crate::chains::{on, with};
use crate::images::{SIZE, image};
use crate::oracle::{compare, hole_file};

fn line(command: &str, arguments: &Value) -> String {
    format!("{}\n", json!({"execute": command, "arguments": arguments}))
}

fn add(name: &str, driver: &str, more: Value) -> String {
    let node = json!({"driver": driver, "node-name": name});
    line("blockdev-add", &with(node, more))
}

fn delete(name: &str) -> String {
    line("blockdev-del", &json!({"node-name": name}))
}

fn files(folder: &std::path::Path) {
    for name in ["s.raw", "t.raw", "r.raw"] {
        hole_file(&folder.join(name), SIZE);
    }
    image(folder, "t.qcow2", &[]);
}

fn nodes() -> String {
    let raw = |name: &str| {
        let file = json!({"driver": "file", "filename": format!("{name}.raw")});
        add(name, "raw", json!({"file": file}))
    };
    let read_only = json!({"driver": "file", "filename": "r.raw", "read-only": true});
    raw("s")
        + &raw("t")
        + &add("ro", "raw", json!({"file": read_only, "read-only": true}))
        + &line("blockdev-add", &on("q", "t.qcow2"))
}

#[test]
fn it_is_described_and_refused_in_the_same_way() {
    let cbw = "copy-before-write";
    let mut script = nodes();
    for more in [
        json!({}),
        json!({"file": "s"}),
        json!({"target": "t"}),
        json!({"file": "none", "target": "t"}),
        json!({"file": "s", "target": "none"}),
        json!({"file": "s", "target": "ro"}),
        json!({"file": "s", "target": "t", "bitmap": {"node": "s", "name": "b"}}),
        json!({"file": "s", "target": "t", "bitmap": {"node": "none", "name": "b"}}),
        json!({"file": "s", "target": "t", "bitmap": {"node": "s"}}),
        json!({"file": "s", "target": "t", "bitmap": "b"}),
        json!({"file": "s", "target": "t", "on-cbw-error": "break"}),
        json!({"file": "s", "target": "t", "on-cbw-error": 1}),
        json!({"file": "s", "target": "t", "cbw-timeout": -1}),
        json!({"file": "s", "target": "t", "cbw-timeout": 4_294_967_296_u64}),
        json!({"file": "s", "target": "t", "min-cluster-size": 3}),
        json!({"file": "s", "target": "t", "min-cluster-size": 9_223_372_036_854_775_808_u64}),
        json!({"file": "s", "target": "t", "top": "s"}),
        json!({"file": "s", "target": "q", "on-cbw-error": "break-snapshot", "cbw-timeout": 3}),
        json!({"file": "s", "target": "t", "min-cluster-size": 1_048_576}),
        json!({"file": "ro", "target": "t"}),
        json!({"file": "ro", "target": "t", "read-only": true}),
        json!({"file": "s", "target": "s"}),
    ] {
        script += &add("c", cbw, more);
        script += &line("x-debug-query-block-graph", &json!({}));
        script += &delete("c");
    }
    for more in [json!({}), json!({"file": "none"}), json!({"file": "s"})] {
        script += &add("a", "snapshot-access", more);
        script += &delete("a");
    }
    compare(&script, files);
}

#[test]
fn what_it_stands_on_stays_and_is_connected_in_the_same_way() {
    let mut script = nodes();
    script += &add(
        "c",
        "copy-before-write",
        json!({"file": "s", "target": "q"}),
    );
    script += &add("a", "snapshot-access", json!({"file": "c"}));
    script += &add(
        "c2",
        "copy-before-write",
        json!({"file": "s", "target": "t"}),
    );
    script += &add("r", "raw", json!({"file": "c"}));
    script += &line("x-debug-query-block-graph", &json!({}));
    let cbw = json!({"driver": "copy-before-write", "node-name": "c", "file": "s", "target": "q"});
    let shown = json!({"driver": "snapshot-access", "node-name": "a", "file": "c"});
    for node in [cbw, shown] {
        script += &line("blockdev-reopen", &json!({"options": [node]}));
    }
    for name in ["s", "q", "t", "c", "r", "c", "a", "c", "c2", "s", "q", "t"] {
        script += &delete(name);
    }
    compare(&script, files);
}

/// A bitmap says what is saved; of the rest nobody knows what it was.
#[test]
fn a_bitmap_says_what_is_saved() {
    let mut script = r#"
    $ truncate -s 4M a.img t.img
    $ truncate -s 8M big.img
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "a.img"}}
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "t", "filename": "t.img"}}
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "big", "filename": "big.img"}}
    {"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "b", "granularity": 4096}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "t", "name": "off", "disabled": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "big", "name": "b"}}
    {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "a", "writable": true}}
    $ qemu-io -f raw -c 'write -P 1 0 100k' -c 'write -P 2 3M 300k' 'nbd+unix:///a?socket=nbd.sock' > /dev/null
    {"execute": "block-export-del", "arguments": {"id": "e"}}
    "#
    .to_owned();
    for more in [
        r#""bitmap": {"node": "zz", "name": "b"}"#,
        r#""bitmap": {"node": "a", "name": "zz"}, "min-cluster-size": 3"#,
        r#""bitmap": {"node": "big", "name": "b"}, "min-cluster-size": 3"#,
        r#""bitmap": {"node": "big", "name": "b"}"#,
        r#""bitmap": {"node": "t", "name": "off"}"#,
        r#""bitmap": {"node": "a", "name": "b"}"#,
    ] {
        script += &format!(
            r#"
    {{"execute": "blockdev-del", "arguments": {{"node-name": "c"}}}}
    {{"execute": "blockdev-add", "arguments": {{"driver": "copy-before-write", "node-name": "c", "file": "a", "target": "t", {more}}}}}
    "#
        );
    }
    script += r#"
    {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
    {"execute": "blockdev-add", "arguments": {"driver": "snapshot-access", "node-name": "s", "file": "c"}}
    {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "s", "node-name": "s"}}
    {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "c", "node-name": "c", "writable": true}}
    $ qemu-io -f raw -c 'write -P 9 99k 3k' -c 'write -P 8 200k 1k' -c 'write -P 7 3M 64k' 'nbd+unix:///c?socket=nbd.sock' > /dev/null
    {"execute": "block-dirty-bitmap-clear", "arguments": {"node": "a", "name": "b"}}
    $ sha256sum a.img t.img
    "#;
    for read in [
        "-P 1 0 100k",
        "-P 0 100k 28k",
        "-P 0 100k 29k",
        "0 200k",
        "200k 1k",
        "-P 2 3M 300k",
        "3M 340k",
        "1M 1k",
    ] {
        script += &format!(
            "$ qemu-io -r -f raw -c 'read {read}' 'nbd+unix:///s?socket=nbd.sock' | grep -v ops\n"
        );
    }
    compare(&script, |_| ());
}
