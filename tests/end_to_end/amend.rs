//! `x-blockdev-amend` on qcow2 nodes: options change in place, the node goes on, and what is refused is told.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::oracle::compare;
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
            "Could not change the backing file to 'x': backing format must be specified",
        ),
        (
            json!({"backing-fmt": "raw"}),
            "Backing format cannot be used without backing file",
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
    // The header only: nobody looks for the file.
    let named = json!({"backing-file": "../not/there.raw", "backing-fmt": "raw"});
    assert_eq!(amend(&mut client, named)["error"], Value::Null);
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    let node = nodes
        .as_array()
        .and_then(|nodes| nodes.iter().find(|node| node["node-name"] == "n"));
    let image = &node.expect("it is there")["image"];
    assert_eq!(image["backing-filename"], "../not/there.raw");
    assert_eq!(image["backing-filename-format"], "raw");
    let none = amend(&mut client, json!({"backing-file": ""}));
    assert_eq!(none["error"], Value::Null);
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

/// A job that says it was cancelled has changed nothing, whenever the order comes.
#[test]
fn a_cancelled_one_has_changed_nothing() {
    if !have_oracle() {
        return;
    }
    let daemon = Daemon::start();
    qemu_img(
        &daemon.path(""),
        &["create", "-q", "-f", "qcow2", "i.qcow2", "8M"],
    );
    let mut client = daemon.client();
    client.run(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "i.qcow2"}}),
    );
    for questions in 0..40 {
        client.run("block_resize", json!({"node-name": "n", "size": 8 << 20}));
        let options = json!({"driver": "qcow2", "size": 1 << 20});
        client.run(
            "x-blockdev-amend",
            json!({"job-id": "a", "node-name": "n", "options": options}),
        );
        // Each comes a little later than the one before.
        for _ in 0..questions / 4 {
            client.run("query-version", json!({}));
        }
        let cancelled = client.command("job-cancel", json!({"id": "a"}));
        client.wait_for("a", "concluded");
        let jobs = client.run("query-jobs", json!({}));
        client.run("job-dismiss", json!({"id": "a"}));
        let (_, size) = format_of(&mut client);
        let expected = match jobs[0]["error"].as_str() {
            Some("Operation canceled") => 8 << 20,
            None => 1 << 20,
            Some(other) => panic!("{other}"),
        };
        assert_eq!(size, expected, "{cancelled}: {jobs}");
    }
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

/// `base.qcow2` with data, `mid.qcow2` and `top.qcow2` over it.
fn chain(folder: &Path) {
    let create = ["create", "-q", "-f", "qcow2"];
    qemu_img(folder, &[&create[..], &["base.qcow2", "4M"]].concat());
    for (name, backing) in [("mid.qcow2", "base.qcow2"), ("top.qcow2", "mid.qcow2")] {
        let over = ["-b", backing, "-F", "qcow2", name];
        qemu_img(folder, &[&create[..], &over].concat());
    }
    let write = ["-f", "qcow2", "-c", "write -P 7 1M 300k", "base.qcow2"];
    let wrote = Command::new("qemu-io")
        .args(write)
        .current_dir(folder)
        .output();
    assert!(wrote.expect("it starts").status.success());
}

const CHAIN: [&str; 3] = [
    r#"{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": "base.qcow2"}}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "mid", "file": {"driver": "file", "filename": "mid.qcow2"}, "backing": "base"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "top.qcow2"}, "backing": "mid"}}"#,
];

#[test]
fn a_backing_file_gets_another_name_as_with_qemu() {
    let change = |device: &str, image: &str, name: &str| {
        let arguments = json!({"device": device, "image-node-name": image, "backing-file": name});
        json!({"execute": "change-backing-file", "arguments": arguments}).to_string() + "\n"
    };
    let mut script = CHAIN.join("\n") + "\n";
    script += r#"{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "plain", "file": {"driver": "file", "filename": "plain.qcow2"}}}"#;
    script += "\n";
    for (device, image) in [
        ("nope", "top"),
        ("top", "nope"),
        ("mid", "mid"),
        ("plain", "plain"),
        ("top", "plain"),
        ("top", "base"),
        ("plain", "top"),
    ] {
        script += &change(device, image, "x");
    }
    let names = ["./mid.qcow2", "/abs/olute", "json:{}", "", "mid.qcow2"];
    let (fits, too_long) = ("n".repeat(1023), "n".repeat(1024));
    for name in names.into_iter().chain([&*fits, &*too_long, "mid.qcow2"]) {
        script += &change("top", "top", name);
        script += "{\"execute\": \"query-named-block-nodes\", \"arguments\": {\"flat\": true}}\n";
        script += "$ qemu-img info -U -f qcow2 top.qcow2 | grep -v disk.size\n";
    }
    script += &change("top", "mid", "./base.qcow2");
    script += "{\"execute\": \"query-named-block-nodes\"}\n";
    script += "$ qemu-img info -U -f qcow2 mid.qcow2 | grep -v disk.size\n";
    script += "{\"execute\": \"x-debug-query-block-graph\"}\n";
    for name in ["top", "mid", "base", "plain"] {
        let arguments = json!({"node-name": name});
        let line = json!({"execute": "blockdev-del", "arguments": arguments});
        script += &format!("{line}\n");
    }
    script += "$ qemu-img check -q top.qcow2\n$ qemu-io -r -f qcow2 -c 'read -P 7 1M 300k' top.qcow2 | head -1\n";
    compare(&script, |folder| {
        chain(folder);
        let create = ["create", "-q", "-f", "qcow2", "plain.qcow2", "1M"];
        qemu_img(folder, &create);
    });
}

#[test]
fn nothing_to_amend_is_a_success_wherever_the_node_is() {
    let mut script = CHAIN.join("\n") + "\n";
    script += r##"
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "ro", "read-only": true, "file": {"driver": "file", "filename": "ro.qcow2"}}}
        {"execute": "x-blockdev-amend", "arguments": {"job-id": "a", "node-name": "mid", "options": {"driver": "qcow2"}}}
        wait a concluded
        {"execute": "x-debug-query-block-graph"}
        {"execute": "job-dismiss", "arguments": {"id": "a"}}
        {"execute": "x-blockdev-amend", "arguments": {"job-id": "b", "node-name": "ro", "options": {"driver": "qcow2"}}}
        wait b concluded
        {"execute": "x-blockdev-amend", "arguments": {"job-id": "c", "node-name": "ro", "options": {"driver": "qcow2", "encrypt": {"format": "luks", "state": "inactive"}}}}
        wait c concluded
        {"execute": "query-jobs"}
        "##;
    compare(&script, |folder| {
        chain(folder);
        let create = ["create", "-q", "-f", "qcow2", "ro.qcow2", "1M"];
        qemu_img(folder, &create);
    });
}

#[test]
fn what_stands_below_an_overlay_changes_its_form_and_not_its_length() {
    if !have_oracle() {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.path("");
    chain(&folder);
    for name in ["t.qcow2", "plain.qcow2"] {
        qemu_img(&folder, &["create", "-q", "-f", "qcow2", name, "4M"]);
    }
    let mut client = daemon.client();
    for line in CHAIN {
        let command: Value = serde_json::from_str(line).expect("JSON");
        client.run("blockdev-add", command["arguments"].clone());
    }
    let options = |more: Value| {
        let mut options = more;
        options["driver"] = json!("qcow2");
        json!({"job-id": "a", "node-name": "base", "options": options})
    };
    let longer = options(json!({"size": 8 << 20, "lazy-refcounts": true}));
    assert_eq!(
        client.refusal("x-blockdev-amend", longer),
        "Node 'base' is busy: node is used as backing hd of 'mid'"
    );
    let form = options(json!({"lazy-refcounts": true, "refcount-bits": 64}));
    client.run("x-blockdev-amend", form);
    client.wait_for("a", "concluded");
    let jobs = client.run("query-jobs", json!({}));
    assert_eq!(jobs[0]["error"], Value::Null, "{jobs}");
    client.run("job-dismiss", json!({"id": "a"}));
    client.run(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "t", "file": {"driver": "file", "filename": "t.qcow2"}}),
    );
    // A backing that is read only stays as it is.
    client.run(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "ro", "read-only": true, "file": {"driver": "file", "filename": "plain.qcow2"}}),
    );
    let arguments = json!({"job-id": "r", "node-name": "ro", "options": {"driver": "qcow2", "lazy-refcounts": true}});
    let refused = client.refusal("x-blockdev-amend", arguments);
    assert_eq!(refused, "Block node is read-only");
    client.run(
        "blockdev-backup",
        json!({"job-id": "b", "device": "top", "target": "t", "sync": "full"}),
    );
    client.wait_for("b", "null");
    for node in ["t", "top", "mid", "base", "ro"] {
        client.run("blockdev-del", json!({"node-name": node}));
    }
    let info = qemu_img(&folder, &["info", "-f", "qcow2", "base.qcow2"]);
    assert!(info.contains("refcount bits: 64"), "{info}");
    assert!(info.contains("lazy refcounts: true"), "{info}");
    let formats = ["-f", "qcow2", "-F", "qcow2", "top.qcow2", "t.qcow2"];
    qemu_img(&folder, &[&["compare"][..], &formats].concat());
    qemu_img(&folder, &["check", "-q", "-f", "qcow2", "base.qcow2"]);
    daemon.quit();
}

#[test]
fn what_is_below_gives_its_format_to_the_header() {
    if !have_oracle() {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.path("");
    qemu_img(&folder, &["create", "-q", "-f", "raw", "base.raw", "1M"]);
    let over = ["-b", "base.raw", "-F", "raw", "top.qcow2"];
    qemu_img(
        &folder,
        &[&["create", "-q", "-f", "qcow2"][..], &over].concat(),
    );
    let mut client = daemon.client();
    client.run(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "top.qcow2"}}),
    );
    client.run(
        "change-backing-file",
        json!({"device": "top", "image-node-name": "top", "backing-file": "./base.raw"}),
    );
    client.run("blockdev-del", json!({"node-name": "top"}));
    // QEMU writes the format of the image itself.
    let info = qemu_img(&folder, &["info", "-f", "qcow2", "top.qcow2"]);
    assert!(info.contains("backing file: ./base.raw"), "{info}");
    assert!(info.contains("backing file format: raw"), "{info}");
    daemon.quit();
}
