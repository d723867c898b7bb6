//! Creation of raw data on a node, which the reference daemon does not have.

use std::os::unix::fs::MetadataExt;

use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::oracle::{data_file, hole_file};

const MIB: u64 = 1 << 20;

fn add_file(client: &mut Client, name: &str) {
    let node = json!({"driver": "file", "node-name": name, "filename": format!("{name}.raw")});
    client.run("blockdev-add", node);
}

fn options(file: &Value, size: u64, preallocation: &str) -> Value {
    json!({"driver": "raw", "file": file, "size": size, "preallocation": preallocation})
}

/// Runs a job to its end and dismisses it; how `query-jobs` showed it in between.
fn create(client: &mut Client, options: &Value) -> Value {
    client.run(
        "blockdev-create",
        json!({"job-id": "c", "options": options}),
    );
    client.wait_for("c", "concluded");
    let jobs = client.run("query-jobs", json!({}));
    client.run("job-dismiss", json!({"id": "c"}));
    jobs[0].clone()
}

#[test]
fn a_node_gets_its_length_and_room() {
    let daemon = Daemon::start();
    data_file(&daemon.path("a.raw"), MIB);
    let old = std::fs::read(daemon.path("a.raw")).expect("read");
    let mut client = daemon.client();
    add_file(&mut client, "a");
    for (size, preallocation, total) in [
        (3 * MIB, "full", 3 * MIB),
        (4 * MIB + 1000, "falloc", 4 * MIB + 1000),
        (5 * MIB, "off", 1),
        (2 * MIB, "falloc", 2 * MIB),
    ] {
        let job = create(&mut client, &options(&json!("a"), size, preallocation));
        let expected = json!({
            "id": "c", "type": "create", "status": "concluded",
            "current-progress": total, "total-progress": total,
        });
        assert_eq!(job, expected);
        let file = std::fs::metadata(daemon.path("a.raw")).expect("there");
        assert_eq!(file.len(), size);
        assert!(preallocation == "off" || file.blocks() * 512 >= size);
        let bytes = std::fs::read(daemon.path("a.raw")).expect("read");
        assert!(bytes.starts_with(&old), "what the node held stays");
        assert!(bytes[old.len()..].iter().all(|byte| *byte == 0));
    }
    let nodes = client.run("query-named-block-nodes", json!({}));
    assert_eq!(nodes[0]["image"]["virtual-size"], 2 * MIB);
    client.run("blockdev-del", json!({"node-name": "a"}));

    // A node that is described is there for the job only.
    let raw = json!({"driver": "raw", "file": {"driver": "file", "filename": "a.raw"}});
    let job = create(&mut client, &options(&raw, MIB, "off"));
    assert_eq!(job.get("error"), None);
    let file = std::fs::metadata(daemon.path("a.raw")).expect("there");
    assert_eq!(file.len(), MIB);
    assert_eq!(client.run("query-named-block-nodes", json!({})), json!([]));
    daemon.quit();
}

#[test]
fn what_cannot_be_is_told() {
    let daemon = Daemon::start();
    for name in ["a", "t"] {
        hole_file(&daemon.path(&format!("{name}.raw")), MIB);
    }
    let mut client = daemon.client();
    add_file(&mut client, "a");
    add_file(&mut client, "t");
    let window = json!({"driver": "raw", "node-name": "w", "file": "a", "size": 512});
    client.run("blockdev-add", window);
    let null = json!({"driver": "null-co", "node-name": "n", "size": 512});
    client.run("blockdev-add", null);
    let read_only = json!({"driver": "null-co", "node-name": "r", "read-only": true});
    client.run("blockdev-add", read_only);
    let gone = json!({"driver": "file", "filename": "gone.raw"});
    let fixed =
        json!({"driver": "raw", "size": 512, "file": {"driver": "file", "filename": "t.raw"}});
    for (options, text) in [
        (
            json!({"driver": "raw"}),
            "Parameter 'options.file' is missing",
        ),
        (
            json!({"driver": "raw", "file": "a"}),
            "Parameter 'options.size' is missing",
        ),
        (
            json!({"driver": "raw", "file": "a", "size": 1, "x": 1}),
            "Parameter 'options.x' is unexpected",
        ),
        (
            options(&json!("a"), 1, "some"),
            "Parameter 'preallocation' does not accept value 'some'",
        ),
        (
            options(&json!("b"), 1, "off"),
            "Cannot find device='b' nor node-name='b'",
        ),
        (
            options(&gone, 1, "off"),
            "Could not open 'gone.raw': No such file or directory",
        ),
        (
            options(&json!("w"), 1, "off"),
            "Cannot resize fixed-size raw disks",
        ),
        (
            options(&fixed, 1, "off"),
            "Cannot resize fixed-size raw disks",
        ),
        (options(&json!("r"), 1, "off"), "Image is read-only"),
        (
            options(&json!("n"), 1, "off"),
            "Image format driver does not support resize",
        ),
        (
            options(&json!("t"), u64::MAX, "off"),
            "offset(18446744073709551615) exceeds maximum(9223372035781033984)",
        ),
        (
            options(&json!("a"), 1, "off"),
            "Permission conflict on node 'a': permissions 'resize' are both required by an unnamed block device (uses node 'a' as 'root' child) and unshared by node 'w' (uses node 'a' as 'file' child).",
        ),
    ] {
        let refusal = client.refusal(
            "blockdev-create",
            json!({"job-id": "c", "options": options}),
        );
        assert_eq!(refusal, text);
    }
    let nodes = client.run("query-named-block-nodes", json!({}));
    assert_eq!(
        nodes.as_array().map(Vec::len),
        Some(5),
        "nothing stays open"
    );

    // The sides of another job are in use.
    let backup = json!({"job-id": "b", "device": "a", "target": "t", "sync": "none", "filter-node-name": "f"});
    client.run("blockdev-backup", backup);
    for (node, text) in [
        (
            "t",
            "Node 't' is busy: block device is in use by block job: backup",
        ),
        (
            "a",
            "Permission conflict on node 'a': permissions 'write, resize' are both required by an unnamed block device (uses node 'a' as 'root' child) and unshared by node 'f' (uses node 'a' as 'file' child).",
        ),
    ] {
        let create = json!({"job-id": "c", "options": options(&json!(node), 1, "off")});
        assert_eq!(client.refusal("blockdev-create", create), text);
    }
    client.run("job-cancel", json!({"id": "b"}));
    client.wait_for("b", "null");

    // What only the job finds out.
    let job = create(&mut client, &options(&json!("t"), 512, "metadata"));
    assert_eq!(job["error"], "Unsupported preallocation mode: metadata");
    daemon.quit();
}

#[test]
fn nobody_else_gets_at_the_node_meanwhile() {
    let daemon = Daemon::start();
    hole_file(&daemon.path("a.raw"), MIB);
    let mut client = daemon.client();
    add_file(&mut client, "a");
    let other = json!({"driver": "null-co", "node-name": "o", "size": MIB});
    client.run("blockdev-add", other);
    // Long enough to be paused in between.
    let create = json!({"job-id": "c", "options": options(&json!("a"), 8192 * MIB, "full")});
    client.run("blockdev-create", create.clone());
    client.run("job-pause", json!({"id": "c"}));
    client.wait_for("c", "paused");
    let busy = "Node 'a' is busy: block device is in use by block job: create";
    let backup = json!({"job-id": "b", "device": "o", "target": "a", "sync": "full"});
    let resize = json!({"node-name": "a", "size": 512});
    for (command, arguments, text) in [
        ("blockdev-create", create, busy),
        ("blockdev-backup", backup, busy),
        ("block_resize", resize, busy),
        (
            "blockdev-del",
            json!({"node-name": "a"}),
            "Node a is in use",
        ),
    ] {
        assert_eq!(client.refusal(command, arguments), text);
    }
    let graph = client.run("x-debug-query-block-graph", json!({}));
    let edge = &graph["edges"][0];
    assert_eq!(edge["perm"], json!(["resize", "write"]));
    assert_eq!(
        edge["shared-perm"],
        json!(["write-unchanged", "consistent-read"])
    );
    client.run("job-cancel", json!({"id": "c"}));
    client.wait_for("c", "concluded");
    let file = std::fs::metadata(daemon.path("a.raw")).expect("there");
    assert_eq!(file.len(), MIB, "as long as it was");
    daemon.quit();
}
