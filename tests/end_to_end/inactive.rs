//! Inactive nodes: the same script on both daemons, and what only ours does.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::chains::with;
use crate::client::Client;
use crate::daemon::Daemon;
use crate::images::run;
use crate::nbd::{Nbd, start_server};
use crate::oracle::{compare, hole_file};
use crate::script::locked_bytes;
use crate::tools;

pub(crate) const LENGTH: u64 = 4 << 20;

fn line(command: &str, arguments: &Value) -> String {
    format!("{}\n", json!({"execute": command, "arguments": arguments}))
}

fn set_active(node: &str, active: bool) -> String {
    let arguments = json!({"node-name": node, "active": active});
    line("blockdev-set-active", &arguments) + &show()
}

fn show() -> String {
    line("query-named-block-nodes", &json!({}))
}

/// Files, and an image on another one with a little data in both.
fn files(folder: &Path) {
    hole_file(&folder.join("r.raw"), 1 << 20);
    for (name, more) in [
        ("a.qcow2", &[][..]),
        ("b.qcow2", &["-b", "a.qcow2", "-F", "qcow2"][..]),
    ] {
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        arguments.extend(more);
        arguments.extend([name, "4M"]);
        run(folder, "qemu-img", &arguments);
        let write = ["-c", "write -q -P 1 64k 128k", name];
        run(folder, "qemu-io", &write);
    }
}

pub(crate) fn have_tools() -> bool {
    tools::have("qemu-img", "qemu-utils") && tools::have("qemu-io", "qemu-utils")
}

fn image(name: &str, file: &str, more: Value) -> Value {
    let file_node = format!("{name}f");
    let mut node = json!({"driver": "qcow2", "node-name": name,
        "file": {"driver": "file", "node-name": file_node, "filename": file}});
    if let (Some(node), Value::Object(more)) = (node.as_object_mut(), more) {
        node.extend(more);
    }
    node
}

#[test]
fn nodes_become_active_and_inactive_as_with_qemu() {
    if !have_tools() {
        return;
    }
    let mut script = String::new();
    let file = json!({"driver": "file", "node-name": "f", "filename": "r.raw", "active": false});
    let raw = |name, more: Value| {
        let mut node = json!({"driver": "raw", "node-name": name, "file": "f"});
        if let (Some(node), Value::Object(more)) = (node.as_object_mut(), more) {
            node.extend(more);
        }
        node
    };
    script += &line("blockdev-add", &file);
    script += "locks r.raw\n";
    script += &line("blockdev-add", &raw("r", json!({})));
    script += &line("blockdev-add", &raw("r", json!({"active": false})));
    for (node, active) in [
        ("f", true),
        ("r", true),
        ("f", false),
        ("r", false),
        ("r", false),
        ("none", false),
        ("none", true),
        ("", true),
        ("r", true),
        ("r", true),
    ] {
        script += &set_active(node, active);
    }
    for arguments in [
        json!({"active": false}),
        json!({"active": true}),
        json!({}),
        json!({"node-name": "r"}),
        json!({"active": 1}),
    ] {
        script += &line("blockdev-set-active", &arguments);
        script += &show();
    }
    let backing = |more: Value| image("b", "a.qcow2", more);
    for more in [
        json!({"active": false}),
        json!({"active": true}),
        json!({"active": false, "read-only": true}),
        json!({"active": false, "backing": backing(json!({}))}),
        json!({"active": false, "backing": backing(json!({"active": true}))}),
        json!({"backing": backing(json!({"active": false}))}),
        json!({"active": false, "file": {"driver": "file", "node-name": "of",
            "filename": "b.qcow2", "active": false}}),
        json!({"file": {"driver": "file", "node-name": "of", "filename": "b.qcow2",
            "active": false}}),
    ] {
        script += &line("blockdev-add", &image("o", "b.qcow2", more));
        script += &show();
        script += &set_active("o", true);
        script += "locks a.qcow2\nlocks b.qcow2\n";
        script += &set_active("b", false);
        script += &set_active("o", false);
        script += &set_active("b", true);
        script += &line("blockdev-del", &json!({"node-name": "o"}));
    }
    script += "$ qemu-img check -q a.qcow2; qemu-img check -q b.qcow2\n";
    compare(&script, files);
}

#[test]
fn filters_are_inactive_with_what_is_above_them() {
    let null = json!({"driver": "null-co", "node-name": "n", "size": 65536});
    let below = |key: &str, driver: &str, more: Value| {
        let mut node = json!({"driver": driver, "node-name": "x", "active": false});
        if let (Some(node), Value::Object(more)) = (node.as_object_mut(), more) {
            node.insert(key.to_owned(), null.clone());
            node.extend(more);
        }
        node
    };
    let other = json!({"driver": "null-co", "node-name": "m", "size": 65536});
    let group = json!({"qom-type": "throttle-group", "id": "tg"});
    let mut script = line("object-add", &group);
    for node in [
        below("file", "throttle", json!({"throttle-group": "tg"})),
        below("image", "blkdebug", json!({})),
        below("file", "copy-on-read", json!({})),
        below("file", "snapshot-access", json!({})),
        below(
            "file",
            "copy-before-write",
            json!({"target": other.clone()}),
        ),
    ] {
        script += &line("blockdev-add", &node);
        script += &show();
        script += &set_active("x", true);
        script += &set_active("x", false);
        script += &line("blockdev-del", &json!({"node-name": "x"}));
    }
    let mut named = null;
    named["active"] = json!(false);
    script += &line("blockdev-add", &named);
    let raw = |more: &str| json!({"driver": "raw", "node-name": "x", "file": more});
    script += &line("blockdev-add", &raw("n"));
    script += &line("blockdev-add", &other);
    script += &line("blockdev-add", &raw("m"));
    script += &line("blockdev-reopen", &json!({"options": [raw("n")]}));
    script += &set_active("x", false);
    script += &line("blockdev-reopen", &json!({"options": [raw("n")]}));
    script += &set_active("x", true);
    compare(&script, |_| {});
}

#[test]
fn what_an_inactive_node_refuses_is_told_in_the_same_words() {
    if !have_tools() {
        return;
    }
    let target = json!({"driver": "null-co", "node-name": "n", "size": LENGTH});
    let mut script = line("blockdev-add", &target);
    script += &line(
        "blockdev-add",
        &image("q", "b.qcow2", json!({"active": false})),
    );
    let job = |more: Value| {
        let mut job = json!({"job-id": "j", "sync": "full"});
        if let (Some(job), Value::Object(more)) = (job.as_object_mut(), more) {
            job.extend(more);
        }
        job
    };
    for (command, arguments) in [
        (
            "blockdev-backup",
            job(json!({"device": "q", "target": "n"})),
        ),
        (
            "blockdev-backup",
            job(json!({"device": "n", "target": "q"})),
        ),
        (
            "blockdev-mirror",
            job(json!({"device": "q", "target": "n"})),
        ),
        (
            "blockdev-mirror",
            job(json!({"device": "n", "target": "q"})),
        ),
        ("block-stream", json!({"job-id": "j", "device": "q"})),
        (
            "block_resize",
            json!({"node-name": "q", "size": 2 * LENGTH}),
        ),
        (
            "block_resize",
            json!({"node-name": "q", "size": LENGTH / 2}),
        ),
        (
            "blockdev-snapshot-internal-sync",
            json!({"device": "q", "name": "s"}),
        ),
        (
            "blockdev-snapshot-delete-internal-sync",
            json!({"device": "q", "name": "s"}),
        ),
        ("block-dirty-bitmap-add", json!({"node": "q", "name": "b"})),
        (
            "block-dirty-bitmap-clear",
            json!({"node": "q", "name": "b"}),
        ),
        (
            "block-dirty-bitmap-remove",
            json!({"node": "q", "name": "b"}),
        ),
        (
            "blockdev-reopen",
            json!({"options": [{"driver": "qcow2", "node-name": "q", "file": "qf"}]}),
        ),
        (
            "blockdev-reopen",
            json!({"options": [{"driver": "qcow2", "node-name": "q", "file": "qf",
                "active": true}]}),
        ),
    ] {
        script += &line(command, &arguments);
    }
    script += &show();
    script += "$ qemu-img create -q -f qcow2 o.qcow2 4M\n";
    script += &line(
        "blockdev-add",
        &image("o", "o.qcow2", json!({"backing": null})),
    );
    script += &line("blockdev-snapshot", &json!({"node": "q", "overlay": "o"}));
    for active in [true, false] {
        let arguments = json!({"node-name": "o", "active": active});
        script += &line("blockdev-set-active", &arguments);
    }
    script += &line("blockdev-del", &json!({"node-name": "q"}));
    script += &line("blockdev-del", &json!({"node-name": "o"}));
    script += &line("blockdev-del", &json!({"node-name": "q"}));
    script += "$ qemu-img check -q a.qcow2; qemu-img check -q b.qcow2; qemu-img check -q o.qcow2\n";
    compare(&script, files);
}

#[test]
fn jobs_and_exports_keep_nodes_active_as_with_qemu() {
    if !have_tools() {
        return;
    }
    let mut script = line("blockdev-add", &image("q", "b.qcow2", json!({})));
    let target = json!({"driver": "null-co", "node-name": "n", "size": LENGTH});
    script += &line("blockdev-add", &target);
    let backup = json!({"job-id": "j", "device": "q", "target": "n", "sync": "full", "speed": 1});
    script += &line("blockdev-backup", &backup);
    script += "wait j running\n";
    script += &set_active("q", false);
    script += &set_active("n", false);
    script += &line("job-cancel", &json!({"id": "j"}));
    script += "wait j null\n";
    let address = json!({"type": "unix", "data": {"path": "n.sock"}});
    script += &line("nbd-server-start", &json!({"addr": address}));
    let export = |id: &str, writable: bool, allow_inactive: bool| {
        let export = json!({"type": "nbd", "id": id, "name": id, "node-name": "q",
            "writable": writable, "allow-inactive": allow_inactive});
        line("block-export-add", &export)
    };
    script += &export("w", true, false);
    script += &set_active("q", false);
    script += &line("block-export-del", &json!({"id": "w"}));
    script += &export("r", false, false);
    script += &set_active("q", false);
    script += &export("wi", true, true);
    script += &export("ri", false, true);
    script += &show();
    let io = |command: &str, name: &str| {
        format!(
            "$ qemu-io -f raw -c '{command}' 'nbd+unix:///{name}?socket=n.sock' | grep -v ops\n"
        )
    };
    script += &io("read -P 1 64k 64k", "ri");
    script += &io("write -P 2 0 64k", "wi");
    // It wants the node to be active.
    script += &export("r2", false, false);
    script += &show();
    script += &io("write -P 2 0 64k", "wi");
    script += &set_active("q", false);
    script += &io("write -P 3 0 64k", "wi");
    script += &set_active("q", true);
    script += &io("write -P 3 64k 64k", "wi");
    for id in ["r", "r2", "ri", "wi"] {
        script += &line("block-export-del", &json!({"id": id}));
    }
    script += &set_active("q", false);
    script += &line("query-block-exports", &json!({}));
    script += "$ qemu-img check -q b.qcow2; qemu-io -r -c 'read -P 2 0 64k' -c 'read -P 3 64k 64k' b.qcow2 | grep -v ops\n";
    compare(&script, files);
}

/// Who does not own an image leaves it alone, and it is his again only as a whole.
#[test]
fn an_image_that_cannot_be_read_again_stays_inactive() {
    if !have_tools() {
        return;
    }
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let folder = daemon.path("");
    files(&folder);
    client.run("blockdev-add", image("q", "b.qcow2", json!({})));
    let locked = locked_bytes(&folder.join("b.qcow2"));
    assert!(!locked.is_empty());
    let inactive = json!({"node-name": "q", "active": false});
    let active = json!({"node-name": "q", "active": true});
    client.run("blockdev-set-active", inactive.clone());
    for file in ["a.qcow2", "b.qcow2"] {
        assert_eq!(locked_bytes(&folder.join(file)), Vec::<String>::new());
    }
    let good = fs::read(folder.join("b.qcow2")).expect("read");
    fs::write(folder.join("b.qcow2"), vec![7; good.len()]).expect("written");
    let refusal = client.refusal("blockdev-set-active", active.clone());
    let expected = "Could not reopen qcow2 layer: Image is not in qcow2 format";
    assert_eq!(refusal, expected);
    let all = client.refusal("blockdev-set-active", json!({"active": true}));
    assert_eq!(all, expected);
    for file in ["a.qcow2", "b.qcow2"] {
        assert_eq!(locked_bytes(&folder.join(file)), Vec::<String>::new());
    }
    fs::write(folder.join("b.qcow2"), &good).expect("written");
    client.run("blockdev-set-active", active);
    assert_eq!(locked_bytes(&folder.join("b.qcow2")), locked);
    client.run("blockdev-set-active", inactive);
    // Somebody else makes something else of it.
    fs::write(folder.join("b.qcow2"), vec![7; good.len()]).expect("written");
    client.run("blockdev-del", json!({"node-name": "q"}));
    let left = fs::read(folder.join("b.qcow2")).expect("read");
    assert_eq!(left, vec![7; good.len()]);
    drop(client);
    daemon.quit();
}

#[test]
fn what_lies_below_is_read_through_a_filter_that_cannot_keep_it() {
    if !have_tools() {
        return;
    }
    let daemon = Daemon::start();
    let mut client = daemon.client();
    files(&daemon.path(""));
    let write = ["-c", "write -q -P 7 1M 64k", "a.qcow2"];
    run(&daemon.path(""), "qemu-io", &write);
    let before = fs::read(daemon.path("b.qcow2")).expect("read");
    let below = image("q", "b.qcow2", json!({}));
    let filter = json!({"driver": "copy-on-read", "node-name": "c", "file": below});
    client.run("blockdev-add", filter);
    start_server(&daemon, &mut client, 1);
    let export = json!({"type": "nbd", "id": "c", "node-name": "c", "writable": true,
        "allow-inactive": true});
    client.run("block-export-add", export);
    let inactive = json!({"node-name": "c", "active": false});
    client.run("blockdev-set-active", inactive);
    let mut nbd = Nbd::open(&daemon.path("nbd.sock"), "c");
    assert_eq!(nbd.read(1 << 20, 65536), vec![7; 65536]);
    drop(nbd);
    assert!(fs::read(daemon.path("b.qcow2")).expect("read") == before);
    drop(client);
    daemon.quit();
}

/// What QEMU does not refuse in time, and overlays that are made for inactive nodes.
#[test]
fn what_would_write_to_an_inactive_image_is_refused() {
    if !have_tools() {
        return;
    }
    let daemon = Daemon::start();
    let mut client = daemon.client();
    files(&daemon.path(""));
    client.run(
        "blockdev-add",
        image("q", "b.qcow2", json!({"active": false})),
    );
    let before = fs::read(daemon.path("b.qcow2")).expect("read");
    let inactive = "Node 'q' is inactive: its image may be somebody else's";
    let change = json!({"device": "q", "image-node-name": "q", "backing-file": "x"});
    assert_eq!(client.refusal("change-backing-file", change), inactive);
    let begin = json!({"id": "c", "disks": [{"node": "q", "bitmap": "new"}]});
    let text = client.refusal("x-checkpoint-begin", begin);
    assert!(text.ends_with(inactive), "{text}");
    let commit = json!({"job-id": "j", "device": "q"});
    let text = client.refusal("block-commit", commit);
    assert!(
        text.starts_with("Inactive 'q' can't be a backing child of active '#block"),
        "{text}"
    );
    let snapshot =
        json!({"node-name": "q", "snapshot-file": "new.qcow2", "snapshot-node-name": "new"});
    client.run("blockdev-snapshot-sync", snapshot);
    run(
        &daemon.path(""),
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "other.qcow2", "4M"],
    );
    let over = image("over", "other.qcow2", json!({"backing": null}));
    client.run("blockdev-add", over);
    let actions = json!([
        {"type": "blockdev-snapshot", "data": {"node": "q", "overlay": "over"}},
        {"type": "blockdev-snapshot-internal-sync", "data": {"device": "none", "name": "s"}},
    ]);
    client.refusal("transaction", json!({"actions": actions}));
    let is_active = |client: &mut Client, name: &str| -> Value {
        let nodes = client.run("query-named-block-nodes", json!({}));
        let mut nodes = nodes.as_array().expect("a list").iter();
        let node = nodes.find(|node| node["node-name"] == name);
        node.expect("there")["active"].clone()
    };
    assert_eq!(
        is_active(&mut client, "over"),
        json!(true),
        "it is what it was"
    );
    assert_eq!(is_active(&mut client, "q"), json!(false));
    let snapshot = json!({"node": "q", "overlay": "over"});
    client.run("blockdev-snapshot", snapshot);
    assert_eq!(is_active(&mut client, "over"), json!(false));
    assert!(fs::read(daemon.path("b.qcow2")).expect("read") == before);
    drop(client);
    daemon.quit();
}

/// All nodes at once, or none: with QEMU's, a job above makes the command do nothing and say nothing.
#[test]
fn all_nodes_become_inactive_or_none() {
    if !have_tools() {
        return;
    }
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let folder = daemon.path("");
    files(&folder);
    client.run("blockdev-add", image("q", "b.qcow2", json!({})));
    let null = |name| json!({"driver": "null-co", "node-name": name, "size": LENGTH});
    client.run("blockdev-add", null("n"));
    let backup = json!({"job-id": "j", "device": "q", "target": "n", "sync": "full", "speed": 1});
    client.run("blockdev-backup", backup);
    // Newer than what the job uses: it would come first.
    client.run("blockdev-add", null("m"));
    let none = client.refusal("blockdev-set-active", json!({"active": false}));
    let expected = "Failed to inactivate all nodes: Operation not permitted";
    assert_eq!(none, expected);
    let actives = |client: &mut Client| -> Vec<bool> {
        let nodes = client.run("query-named-block-nodes", json!({}));
        let nodes = nodes.as_array().expect("a list").iter();
        nodes.map(|node| node["active"] == json!(true)).collect()
    };
    assert!(actives(&mut client).into_iter().all(|active| active));
    client.run("job-cancel", json!({"id": "j"}));
    client.wait_for("j", "null");
    client.run("blockdev-set-active", json!({"active": false}));
    assert!(actives(&mut client).into_iter().all(|active| !active));
    client.run("blockdev-set-active", json!({"active": true}));
    assert!(actives(&mut client).into_iter().all(|active| active));
    drop(client);
    daemon.quit();
}

/// The image could not be activated if a bitmap had a name that it keeps: QEMU takes it, and loses the node then.
#[test]
fn a_bitmap_that_an_inactive_image_keeps_is_not_added_again() {
    if !have_tools() {
        return;
    }
    let daemon = Daemon::start();
    let mut client = daemon.client();
    files(&daemon.path(""));
    let add = ["bitmap", "--add", "b.qcow2", "kept"];
    run(&daemon.path(""), "qemu-img", &add);
    client.run("blockdev-add", image("q", "b.qcow2", json!({})));
    let bitmap = |name| json!({"node": "q", "name": name});
    for added in [
        bitmap("kept"),
        with(bitmap("more"), json!({"persistent": true})),
    ] {
        client.command("block-dirty-bitmap-add", added);
    }
    let active = |active| json!({"node-name": "q", "active": active});
    client.run("blockdev-set-active", active(false));
    for name in ["kept", "more"] {
        let refused = client.refusal("block-dirty-bitmap-add", bitmap(name));
        assert_eq!(refused, format!("Bitmap already exists: {name}"));
    }
    client.run("block-dirty-bitmap-add", bitmap("other"));
    client.run("blockdev-set-active", active(true));
    client.run("block-dirty-bitmap-remove", bitmap("kept"));
    client.run("block-dirty-bitmap-add", bitmap("kept"));
    drop(client);
    daemon.quit();
}
