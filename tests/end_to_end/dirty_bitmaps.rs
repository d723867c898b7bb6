//! Dirty bitmaps beside those of qemu-storage-daemon: names, states, granularities, and what a job marks in them.

use crate::oracle::compare;

const NODES: &str = r#"
    $ qemu-img create -q -f qcow2 a.qcow2 4M
    $ qemu-img create -q -f qcow2 -o cluster_size=512 s.qcow2 4M
    $ qemu-img create -q -f qcow2 -o cluster_size=2M l.qcow2 4M
    {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n", "size": 1000448}}
    {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "m", "size": 1048576}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a", "discard": "unmap", "file": {"driver": "file", "node-name": "af", "filename": "a.qcow2"}}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "s", "file": {"driver": "file", "filename": "s.qcow2"}}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "l", "file": {"driver": "file", "filename": "l.qcow2"}}}
"#;

fn command(name: &str, arguments: &str) -> String {
    format!("{{\"execute\": \"block-dirty-bitmap-{name}\", \"arguments\": {arguments}}}\n")
}

fn digest(node: &str, name: &str) -> String {
    format!(
        "{{\"execute\": \"x-debug-block-dirty-bitmap-sha256\", \
         \"arguments\": {{\"node\": \"{node}\", \"name\": \"{name}\"}}}}\n"
    )
}

/// What the jobs of a test mark.
const BITMAPS: [(&str, &str); 6] = [
    ("a", "fine"),
    ("a", "usual"),
    ("a", "coarse"),
    ("a", "off"),
    ("b", "usual"),
    ("o", "none"),
];

const SHOWN: &str = "{\"execute\": \"query-named-block-nodes\", \"arguments\": {\"flat\": true}}\n";

#[test]
fn bitmaps_are_made_as_the_oracle_makes_them() {
    let mut script = NODES.to_owned();
    for node in ["n", "m", "a", "af", "s", "l"] {
        let arguments = format!(r#"{{"node": "{node}", "name": "b0"}}"#);
        script += &command("add", &arguments);
    }
    script += SHOWN;
    for granularity in [
        "0",
        "1",
        "256",
        "511",
        "512",
        "513",
        "65536",
        "2147483648",
        "4294967295",
        "4294967296",
        "-1",
        "\"1\"",
        "null",
    ] {
        let name = granularity.replace('"', "text");
        let arguments =
            format!(r#"{{"node": "n", "name": "g{name}", "granularity": {granularity}}}"#);
        script += &command("add", &arguments);
    }
    let long = "x".repeat(1024);
    for arguments in [
        r#"{"node": "zz", "name": "b"}"#.to_owned(),
        r#"{"node": "zz", "name": ""}"#.to_owned(),
        r#"{"node": "n", "name": ""}"#.to_owned(),
        r#"{"node": "n", "name": "b0"}"#.to_owned(),
        r#"{"node": "n", "name": "b0", "granularity": 7}"#.to_owned(),
        r#"{"node": "n", "name": "b0", "persistent": true}"#.to_owned(),
        r#"{"node": "af", "name": "p", "persistent": true}"#.to_owned(),
        r#"{"node": "n", "name": "d", "disabled": true}"#.to_owned(),
        r#"{"name": "d", "disabled": true}"#.to_owned(),
        format!(r#"{{"node": "n", "name": "{}"}}"#, &long[1..]),
        format!(r#"{{"node": "n", "name": "{long}"}}"#),
        format!(r#"{{"node": "n", "name": "{long}", "granularity": 3}}"#),
    ] {
        script += &command("add", &arguments);
    }
    script += SHOWN;
    compare(&script, |_| ());
}

#[test]
fn bitmaps_are_changed_as_the_oracle_changes_them() {
    let mut script = NODES.to_owned();
    script += &command("add", r#"{"node": "n", "name": "b0"}"#);
    for change in ["remove", "clear", "enable", "disable"] {
        for (node, name) in [
            ("zz", "b0"),
            ("n", "zz"),
            ("n", ""),
            ("n", "b0"),
            ("n", "b0"),
        ] {
            let arguments = format!(r#"{{"node": "{node}", "name": "{name}"}}"#);
            script += &command(change, &arguments);
        }
        script += &command(change, r#"{"node": "n"}"#);
        script += &command("add", r#"{"node": "n", "name": "b0"}"#);
    }
    script += &command("add", r#"{"node": "n", "name": "t"}"#);
    script += &command("add", r#"{"node": "n", "name": "u", "granularity": 512}"#);
    script += &command("add", r#"{"node": "m", "name": "b0"}"#);
    for (node, target, bitmaps) in [
        ("zz", "t", r#"["u"]"#),
        ("n", "zz", r#"["u"]"#),
        ("n", "zz", r#"["yy"]"#),
        ("n", "t", r#"["u", "zz"]"#),
        ("n", "t", r#"["u", {"node": "m", "name": "b0"}]"#),
        ("n", "t", r#"[{"node": "q", "name": "b0"}]"#),
        ("n", "t", r#"["t"]"#),
        ("n", "t", r#"["u", "t", {"node": "n", "name": "u"}]"#),
        ("n", "t", "[1]"),
        ("n", "t", r#"[{"node": "n"}]"#),
        ("n", "t", r#""u""#),
    ] {
        let arguments =
            format!(r#"{{"node": "{node}", "target": "{target}", "bitmaps": {bitmaps}}}"#);
        script += &command("merge", &arguments);
    }
    script += SHOWN;
    compare(&script, |_| ());
}

/// A job writes what an overlay holds itself, in pieces of its clusters.
#[test]
fn jobs_mark_what_they_write() {
    let mut script = r#"
    $ truncate -s 4M a.img b.img
    $ qemu-img create -q -f qcow2 base.qcow2 4M
    $ qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 -o cluster_size=4k o.qcow2
    $ qemu-io -f qcow2 -c 'write 70000 1000' -c 'write 3M 300k' o.qcow2 > /dev/null
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "a.img", "discard": "unmap"}}
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "b", "filename": "b.img"}}
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "base-file", "filename": "base.qcow2", "read-only": true}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "base", "file": "base-file", "read-only": true}}
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "o-file", "filename": "o.qcow2"}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "o", "file": "o-file", "backing": "base"}}
    "#
    .to_owned();
    for (node, name, more) in [
        ("a", "fine", r#", "granularity": 512"#),
        ("a", "usual", ""),
        ("a", "coarse", r#", "granularity": 1048576"#),
        ("a", "off", r#", "disabled": true"#),
        ("b", "usual", ""),
        ("o", "none", ""),
    ] {
        let arguments = format!(r#"{{"node": "{node}", "name": "{name}"{more}}}"#);
        script += &command("add", &arguments);
    }
    for (target, granularity) in [("a", 4096), ("b", 65536)] {
        script += &format!(
            r#"
    {{"execute": "blockdev-mirror", "arguments": {{"job-id": "j", "device": "o", "target": "{target}", "sync": "top", "granularity": {granularity}}}}}
    wait j ready
    {{"execute": "block-job-cancel", "arguments": {{"device": "j"}}}}
    gone j
    "#
        );
        script += SHOWN;
    }
    for (target, sources) in [
        ("usual", r#"["coarse"]"#),
        ("coarse", r#"["fine"]"#),
        ("fine", r#"["usual", {"node": "b", "name": "usual"}]"#),
        ("off", r#"["fine", "usual"]"#),
    ] {
        let arguments = format!(r#"{{"node": "a", "target": "{target}", "bitmaps": {sources}}}"#);
        script += &command("merge", &arguments);
        script += SHOWN;
    }
    for (node, name) in BITMAPS {
        script += &digest(node, name);
    }
    for size in [5 << 20, (3 << 20) + 512] {
        script += &format!(
            "{{\"execute\": \"block_resize\", \"arguments\": {{\"node-name\": \"a\", \"size\": {size}}}}}\n"
        );
        script += SHOWN;
    }
    for (node, name) in BITMAPS {
        script += &digest(node, name);
    }
    script += &command("clear", r#"{"node": "a", "name": "usual"}"#);
    script += &digest("a", "usual");
    script += &digest("zz", "usual");
    script += &digest("a", "zz");
    script += &command("remove", r#"{"node": "a", "name": "fine"}"#);
    script += SHOWN;
    script += r#"
    {"execute": "blockdev-del", "arguments": {"node-name": "a"}}
    {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
    "#;
    compare(&script, |_| ());
}

/// A client writes through an export and asks what has changed; exported bitmaps are in use.
#[test]
fn exports_show_bitmaps() {
    let mut script = r#"
    $ truncate -s 4M a.img
    $ qemu-img create -q -f qcow2 -b a.img -F raw -o preallocation=falloc o.qcow2
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "a.img"}}
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "ro", "filename": "a.img", "read-only": true, "force-share": true}}
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "o-file", "filename": "o.qcow2"}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "o", "file": "o-file", "backing": "a"}}
    {"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}}
    "#
    .to_owned();
    for node in ["a", "o"] {
        for (name, more) in [
            ("b0".to_owned(), ""),
            ("off".to_owned(), r#", "disabled": true"#),
            (format!("fine-{node}"), r#", "granularity": 512"#),
        ] {
            let arguments = format!(r#"{{"node": "{node}", "name": "{name}"{more}}}"#);
            script += &command("add", &arguments);
        }
    }
    let export = |id: &str, node: &str, more: &str| {
        format!(
            r#"
    {{"execute": "block-export-add", "arguments": {{"type": "nbd", "id": "{id}", "node-name": "{node}", {more}}}}}
    "#
        )
    };
    for bitmaps in [
        r#"["zz"]"#,
        r#"[{"node": "zz", "name": "b0"}]"#,
        r#"[{"node": "a", "name": "zz"}]"#,
        r#"["b0"]"#,
        r#"["off", "b0"]"#,
        r#"["off", "off", {"node": "a", "name": "off"}]"#,
    ] {
        script += &export("e1", "o", &format!("\"bitmaps\": {bitmaps}"));
    }
    script += SHOWN;
    for change in ["remove", "clear", "enable", "disable"] {
        script += &command(change, r#"{"node": "o", "name": "off"}"#);
    }
    for (target, source) in [("b0", "off"), ("off", "b0")] {
        let arguments =
            format!(r#"{{"node": "o", "target": "{target}", "bitmaps": ["{source}"]}}"#);
        script += &command("merge", &arguments);
    }
    script += &digest("o", "off");
    script += &export("e2", "o", r#""bitmaps": ["off"], "name": "two""#);
    script += r#"
    {"execute": "block-export-del", "arguments": {"id": "e1"}}
    "#;
    script += SHOWN;
    script += &export(
        "e2",
        "o",
        r#""bitmaps": ["b0", "fine-a", "fine-o"], "name": "two", "writable": true"#,
    );
    script += &export("e3", "ro", r#""bitmaps": ["b0"], "name": "three""#);
    script += r#"
    $ qemu-io -f raw -c 'write 70000 1000' -c 'write 3M 300k' -c 'write -z 2M 4k' -c flush 'nbd+unix:///two?socket=nbd.sock' > /dev/null
    "#;
    script += SHOWN;
    for name in ["b0", "fine-a", "fine-o"] {
        script += &format!(
            "\n    $ qemu-img map --output=json --image-opts \
             driver=nbd,server.type=unix,server.path=nbd.sock,export=two,x-dirty-bitmap=qemu:dirty-bitmap:{name}\n"
        );
        script += &format!(
            "    $ qemu-img map --output=json --start-offset 70001 --max-length 3M --image-opts \
             driver=nbd,server.type=unix,server.path=nbd.sock,export=two,x-dirty-bitmap=qemu:dirty-bitmap:{name}\n"
        );
    }
    script += r#"
    {"execute": "block-export-del", "arguments": {"id": "e2", "mode": "hard"}}
    {"execute": "nbd-server-add", "arguments": {"device": "o", "name": "old", "bitmap": "zz"}}
    {"execute": "nbd-server-add", "arguments": {"device": "o", "name": "old", "bitmap": "off"}}
    "#;
    script += SHOWN;
    script += r#"
    {"execute": "nbd-server-stop"}
    "#;
    script += SHOWN;
    compare(&script, |_| ());
}
