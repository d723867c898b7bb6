//! Transactions beside those of qemu-storage-daemon, action by action: what is refused, what is taken back, in which order jobs come and go.

use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::images::SIZE;
use crate::nbd::{Nbd, export, start_server};
use crate::oracle::{compare, data_file, hole_file};

const NODES: &str = r#"
    $ truncate -s 4M a.img b.img t.img u.img
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "a.img"}}
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "b", "filename": "b.img"}}
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "t", "filename": "t.img"}}
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "u", "filename": "u.img"}}
    {"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}}
    {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "a", "writable": true}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "b0"}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "off", "disabled": true, "granularity": 4096}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "b", "name": "b0"}}
    $ qemu-io -f raw -c 'write -P 1 70000 1000' -c 'write -P 2 3M 300k' 'nbd+unix:///a?socket=nbd.sock' > /dev/null
"#;

const SHOWN: &str = r#"
    {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
    {"execute": "query-jobs"}
    {"execute": "x-debug-block-dirty-bitmap-sha256", "arguments": {"node": "a", "name": "b0"}}
    {"execute": "x-debug-block-dirty-bitmap-sha256", "arguments": {"node": "a", "name": "off"}}
"#;

fn transaction(actions: &[Value], properties: Option<Value>) -> String {
    let mut arguments = json!({"actions": actions});
    if let Some(properties) = properties {
        arguments["properties"] = properties;
    }
    let command = json!({"execute": "transaction", "arguments": arguments});
    format!("    {command}\n")
}

fn action(kind: &str, data: Value) -> Value {
    json!({"type": kind, "data": data})
}

fn bitmap(kind: &str, name: &str) -> Value {
    let kind = format!("block-dirty-bitmap-{kind}");
    action(&kind, json!({"node": "a", "name": name}))
}

fn merge(target: &str, sources: Value) -> Value {
    let data = json!({"node": "a", "target": target, "bitmaps": sources});
    action("block-dirty-bitmap-merge", data)
}

fn backup(id: &str, source: &str, target: &str, more: Value) -> Value {
    let mut data = json!({"job-id": id, "device": source, "target": target, "sync": "full"});
    for (name, value) in more.as_object().expect("an object") {
        data[name] = value.clone();
    }
    action("blockdev-backup", data)
}

fn abort() -> Value {
    action("abort", json!({}))
}

fn individual() -> Option<Value> {
    Some(json!({"completion-mode": "individual"}))
}

fn grouped() -> Option<Value> {
    Some(json!({"completion-mode": "grouped"}))
}

#[test]
fn bitmaps_are_changed_all_or_none() {
    let mut script = NODES.to_owned();
    for (actions, properties) in [
        (vec![], None),
        (vec![abort()], None),
        (vec![abort()], individual()),
        (vec![abort()], grouped()),
        (vec![json!({"type": "abort"})], None),
        (vec![action("abort", json!({"x": 1}))], None),
        (vec![action("nope", json!({}))], None),
        (vec![bitmap("clear", "b0")], grouped()),
        (vec![], grouped()),
        (vec![], Some(json!({"completion-mode": "later"}))),
        (vec![], Some(json!({}))),
        (vec![bitmap("clear", "b0"), bitmap("clear", "zz")], None),
        (
            vec![
                bitmap("add", "new"),
                bitmap("disable", "b0"),
                bitmap("enable", "off"),
                bitmap("clear", "b0"),
                merge("off", json!(["new"])),
                bitmap("remove", "new"),
                abort(),
                bitmap("add", "late"),
            ],
            None,
        ),
        (vec![merge("off", json!(["b0"])), abort()], None),
        (vec![merge("off", json!(["b0"])), bitmap("add", "b0")], None),
        (vec![bitmap("remove", "b0"), bitmap("clear", "b0")], None),
        (
            vec![bitmap("remove", "off"), bitmap("remove", "b0"), abort()],
            None,
        ),
        (
            vec![
                bitmap("add", "new"),
                merge("new", json!(["b0", {"node": "b", "name": "b0"}])),
                bitmap("clear", "b0"),
                bitmap("disable", "b0"),
            ],
            individual(),
        ),
        (
            vec![merge("off", json!(["new"])), bitmap("enable", "b0")],
            None,
        ),
        (vec![bitmap("remove", "new"), bitmap("add", "new")], None),
        (vec![bitmap("remove", "new"), bitmap("clear", "b0")], None),
    ] {
        script += &transaction(&actions, properties);
        script += SHOWN;
        script +=
            "    $ qemu-io -f raw -c 'write 1M 1k' 'nbd+unix:///a?socket=nbd.sock' > /dev/null\n";
    }
    script += SHOWN;
    compare(&script, |_| ());
}

#[test]
fn jobs_start_all_or_none() {
    let mut script = NODES.to_owned();
    let by_bitmap = json!({"sync": "incremental", "bitmap": "b0"});
    for (actions, properties) in [
        (vec![backup("j", "a", "t", json!({})), abort()], None),
        (
            vec![
                backup("j", "a", "t", by_bitmap.clone()),
                backup("k", "b", "u", json!({})),
                bitmap("clear", "b0"),
            ],
            None,
        ),
        (
            vec![
                bitmap("add", "c"),
                backup("j", "a", "t", by_bitmap.clone()),
                backup("k", "b", "t", json!({})),
            ],
            None,
        ),
        (
            vec![
                backup("j", "a", "t", json!({})),
                backup("k", "b", "u", json!({"speed": -1})),
            ],
            grouped(),
        ),
        (
            vec![
                backup("j", "a", "t", json!({})),
                backup("j", "b", "u", json!({})),
            ],
            None,
        ),
        (
            vec![
                backup("j", "a", "t", by_bitmap.clone()),
                backup("k", "b", "u", json!({})),
                bitmap("add", "after"),
            ],
            None,
        ),
        (
            vec![
                backup("j", "a", "t", by_bitmap.clone()),
                backup("k", "b", "u", json!({})),
            ],
            grouped(),
        ),
        (
            vec![
                bitmap("clear", "b0"),
                action(
                    "drive-backup",
                    json!({"job-id": "j", "device": "a", "target": "new.qcow2", "sync": "full", "format": "qcow2"}),
                ),
            ],
            individual(),
        ),
    ] {
        script += &transaction(&actions, properties);
        script += "    gone j\n    gone k\n";
        script += SHOWN;
        script +=
            "    $ qemu-io -f raw -c 'write 1M 1k' 'nbd+unix:///a?socket=nbd.sock' > /dev/null\n";
    }
    script += "    $ sha256sum t.img u.img\n";
    compare(&script, |_| ());
}

/// One job of two fails: the other one goes on by itself, or ends with it, and so do their bitmaps.
#[test]
fn jobs_end_together_if_they_are_to() {
    let anywhere = json!({});
    // The first one has done its work by then.
    let late = json!({"sector": 6144});
    for (properties, mode, speeds, place) in [
        (grouped(), "on-success", (65_536, 0), &anywhere),
        (grouped(), "always", (0, 2 << 20), &late),
        (individual(), "on-success", (0, 0), &anywhere),
    ] {
        let mut script = NODES.to_owned();
        let mut fault = json!({"event": "none", "iotype": "write", "errno": 28});
        for (name, value) in place.as_object().expect("an object") {
            fault[name] = value.clone();
        }
        let node =
            json!({"driver": "blkdebug", "node-name": "f", "image": "u", "inject-error": [fault]});
        let add = json!({"execute": "blockdev-add", "arguments": node});
        script += &format!("    {add}\n");
        let actions = [
            backup(
                "j",
                "a",
                "t",
                json!({"sync": "bitmap", "bitmap": "b0", "bitmap-mode": mode, "speed": speeds.0}),
            ),
            backup("k", "b", "f", json!({"speed": speeds.1})),
        ];
        script += &transaction(&actions, properties);
        script += "    gone j\n    gone k\n";
        script += SHOWN;
        compare(&script, |folder| data_file(&folder.join("b.img"), SIZE));
    }
}

/// Jobs that QEMU's transactions do not take.
#[test]
fn other_jobs_are_taken_too() {
    let folder = tempfile::tempdir().expect("a folder");
    data_file(&folder.path().join("a.img"), SIZE);
    hole_file(&folder.path().join("t.img"), SIZE);
    hole_file(&folder.path().join("u.img"), SIZE);
    let daemon = Daemon::start_in(folder, &[]);
    let mut client = daemon.client();
    for node in ["a", "t", "u"] {
        let file = format!("{node}.img");
        let node = json!({"driver": "file", "node-name": node, "filename": file});
        client.run("blockdev-add", node);
    }
    let name = json!({"node": "a", "name": "b"});
    client.run("block-dirty-bitmap-add", name.clone());
    start_server(&daemon, &mut client, 100);
    export(&mut client, "a");
    let mirror = json!({"job-id": "m", "device": "a", "target": "t", "sync": "full"});
    let refused = client.refusal(
        "transaction",
        json!({"actions": [
            {"type": "block-dirty-bitmap-remove", "data": name},
            {"type": "blockdev-mirror", "data": mirror},
            {"type": "block-stream", "data": {"job-id": "s", "device": "nobody"}},
        ]}),
    );
    assert_eq!(
        refused,
        "Cannot find device='nobody' nor node-name='nobody'"
    );
    assert_eq!(client.run("query-jobs", json!({})), json!([]));
    client.refusal("block-dirty-bitmap-add", name.clone());
    client.run(
        "transaction",
        json!({"actions": [
            {"type": "blockdev-mirror", "data": mirror},
            {"type": "block-dirty-bitmap-clear", "data": name},
        ]}),
    );
    client.wait_for("m", "ready");
    let mut nbd = Nbd::open(&daemon.path("nbd.sock"), "a");
    nbd.write(100, &[3; 100], 0);
    client.run("block-job-cancel", json!({"device": "m"}));
    client.wait_for("m", "null");
    let read = |name: &str| std::fs::read(daemon.path(name)).expect("read");
    assert!(read("a.img") == read("t.img"));
}
