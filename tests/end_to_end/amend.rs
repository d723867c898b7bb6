//! `x-blockdev-amend` on qcow2 nodes: options change in place, the node goes on, and what is refused is told.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::tools::have_oracle;

fn qemu_img(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("it starts");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn amend(client: &mut Client, options: Value) -> Value {
    let mut all = json!({"driver": "qcow2"});
    for (name, value) in options.as_object().expect("an object") {
        all[name] = value.clone();
    }
    let arguments = json!({"job-id": "a", "node-name": "n", "options": all});
    client.run("x-blockdev-amend", arguments);
    client.wait_for("a", "concluded");
    let jobs = client.run("query-jobs", json!({}));
    client.run("job-dismiss", json!({"id": "a"}));
    jobs[0].clone()
}

fn format_of(client: &mut Client) -> (Value, Value) {
    let nodes = client.run("query-named-block-nodes", json!({}));
    let node = nodes.as_array().expect("a list").iter();
    let node = node
        .clone()
        .find(|node| node["node-name"] == "n")
        .expect("it is there");
    let image = &node["image"];
    (
        image["format-specific"]["data"].clone(),
        image["virtual-size"].clone(),
    )
}

#[test]
fn options_of_a_node_change_in_place() {
    if !have_oracle() {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.path("");
    let make = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compat=v2",
        "i.qcow2",
        "8M",
    ];
    qemu_img(&folder, &make);
    let write = ["-f", "qcow2", "-c", "write -P 5 1M 300k", "i.qcow2"];
    let wrote = Command::new("qemu-io")
        .args(write)
        .current_dir(&folder)
        .output();
    assert!(wrote.expect("it starts").status.success());
    std::fs::copy(folder.join("i.qcow2"), folder.join("before.qcow2")).expect("copied");
    let mut client = daemon.client();
    client.run(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "i.qcow2"}}),
    );
    let job = amend(
        &mut client,
        json!({"version": "v3", "refcount-bits": 64, "lazy-refcounts": true, "size": 16 << 20}),
    );
    assert_eq!(job["error"], Value::Null, "{job}");
    assert_eq!(job["type"], "amend");
    assert_eq!(job["current-progress"], job["total-progress"]);
    let (data, size) = format_of(&mut client);
    assert_eq!(data["compat"], "1.1");
    assert_eq!(data["refcount-bits"], 64);
    assert_eq!(data["lazy-refcounts"], true);
    assert_eq!(size, 16 << 20);
    // No member at all: nothing changes, and that is a success.
    assert_eq!(amend(&mut client, json!({}))["error"], Value::Null);
    for (options, error) in [
        (
            json!({"refcount-bits": 3}),
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        (
            json!({"version": "v2"}),
            "compat=0.10 requires refcount_bits=16",
        ),
        (
            json!({"backing-file": "x"}),
            "Cannot amend the backing file",
        ),
        (
            json!({"data-file-raw": true}),
            "data-file-raw cannot be set on existing images",
        ),
        (
            json!({"size": 1000}),
            "The new size must be a multiple of 512",
        ),
        (
            json!({"encrypt": {"format": "luks", "state": "inactive"}}),
            "image is not encrypted, can't amend",
        ),
    ] {
        assert_eq!(amend(&mut client, options)["error"], error);
    }
    let job = amend(
        &mut client,
        json!({"version": "v2", "refcount-bits": 16, "size": 8 << 20}),
    );
    assert_eq!(job["error"], Value::Null, "{job}");
    let (data, size) = format_of(&mut client);
    assert_eq!(data["compat"], "0.10");
    assert_eq!(size, 8 << 20);
    client.run("blockdev-del", json!({"node-name": "n"}));
    let checked = qemu_img(&folder, &["check", "-f", "qcow2", "i.qcow2"]);
    assert!(checked.contains("No errors were found"), "{checked}");
    qemu_img(
        &folder,
        &[
            "compare",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "i.qcow2",
            "before.qcow2",
        ],
    );
    daemon.quit();
}

#[test]
fn what_cannot_be_amended_is_told() {
    if !have_oracle() {
        return;
    }
    let script = |daemon: &Daemon| {
        let folder = daemon.path("");
        qemu_img(&folder, &["create", "-q", "-f", "qcow2", "i.qcow2", "1M"]);
        let mut client = daemon.client();
        client.run(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "node-name": "f", "filename": "i.qcow2"}}),
        );
        let mut ask = |node: &str, driver: &str| {
            let options = json!({"driver": driver});
            let arguments = json!({"job-id": "a", "node-name": node, "options": options});
            client.refusal("x-blockdev-amend", arguments)
        };
        [ask("nope", "qcow2"), ask("f", "qcow2")]
    };
    let ours = Daemon::start();
    let theirs = Daemon::start_oracle_with(&[]);
    assert_eq!(script(&ours), script(&theirs));
    ours.quit();
    theirs.quit();
}
