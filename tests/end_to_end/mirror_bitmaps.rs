//! Mirrors by bitmap, which the oracle does not have: only what has changed is copied, and in the end the bitmap says what has changed
//! since.

use serde_json::{Value, json};

use crate::chains::with;
use crate::client::Client;
use crate::daemon::Daemon;
use crate::images::SIZE;
use crate::nbd::{Nbd, export, start_server};
use crate::oracle::{data_file, hole_file};

const CLUSTER: u64 = 65_536;

/// A disk that is exported, with a bitmap, and a target that holds nothing of it.
fn start() -> (Daemon, Client) {
    let folder = tempfile::tempdir().expect("a folder");
    data_file(&folder.path().join("disk.raw"), SIZE);
    hole_file(&folder.path().join("copy.raw"), SIZE);
    let daemon = Daemon::start_in(folder, &[]);
    let mut client = daemon.client();
    for (node, file) in [("disk", "disk.raw"), ("copy", "copy.raw")] {
        let node = json!({"driver": "file", "node-name": node, "filename": file});
        client.run("blockdev-add", node);
    }
    let bitmap = json!({"node": "disk", "name": "b"});
    client.run("block-dirty-bitmap-add", bitmap);
    start_server(&daemon, &mut client, 100);
    export(&mut client, "disk");
    (daemon, client)
}

fn mirror(more: Value) -> Value {
    with(
        json!({"job-id": "j", "device": "disk", "target": "copy", "bitmap": "b"}),
        more,
    )
}

/// What the bitmap counts, and what is beside it.
fn bitmaps(client: &mut Client) -> Vec<(Value, Value)> {
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.as_array().expect("nodes");
    let disk = nodes.iter().find(|node| node["node-name"] == "disk");
    let bitmaps = disk.expect("the disk")["dirty-bitmaps"].as_array();
    let bitmaps = bitmaps.expect("bitmaps").iter();
    bitmaps
        .map(|one| (one["name"].clone(), one["count"].clone()))
        .collect()
}

fn total(client: &mut Client) -> Value {
    client.run("query-jobs", json!({}))[0]["total-progress"].clone()
}

fn files(daemon: &Daemon) -> (Vec<u8>, Vec<u8>) {
    let read = |name| std::fs::read(daemon.path(name)).expect("read");
    (read("disk.raw"), read("copy.raw"))
}

#[test]
fn a_mirror_copies_what_has_changed_and_lets_go() {
    let (daemon, mut client) = start();
    let full = mirror(json!({"sync": "full", "bitmap-mode": "on-success"}));
    client.run("blockdev-mirror", full);
    client.wait_for("j", "ready");
    let mut nbd = Nbd::open(&daemon.path("nbd.sock"), "disk");
    // What is written before the end is on both sides.
    nbd.write(0, &[7; 1000], 0);
    assert_eq!(
        bitmaps(&mut client),
        [(Value::Null, json!(CLUSTER)), (json!("b"), json!(0))]
    );
    let refused = client.refusal(
        "block-dirty-bitmap-clear",
        json!({"node": "disk", "name": "b"}),
    );
    assert!(refused.contains("in use by another operation"), "{refused}");
    client.run("block-job-cancel", json!({"device": "j"}));
    client.wait_for("j", "null");
    assert_eq!(bitmaps(&mut client), [(json!("b"), json!(0))]);
    let (disk, copy) = files(&daemon);
    assert!(disk == copy);
    nbd.write(SIZE - 5000, &[8; 5000], 0);
    nbd.write(3 * CLUSTER - 1, &[9; 2], 0);
    // What is copied early is forgotten, but not what is left: nothing is, once it is ready.
    let always = mirror(json!({"sync": "bitmap", "bitmap-mode": "always"}));
    client.run("blockdev-mirror", always);
    client.wait_for("j", "ready");
    assert_eq!(total(&mut client), json!(3 * CLUSTER));
    nbd.write(9 * CLUSTER, &[1; 1], 0);
    client.run("job-cancel", json!({"id": "j"}));
    client.wait_for("j", "null");
    assert_eq!(bitmaps(&mut client), [(json!("b"), json!(CLUSTER))]);
    // A mirror in mode never leaves what it was about.
    for (mode, left) in [("never", CLUSTER), ("on-success", 0)] {
        let job = mirror(json!({"sync": "bitmap", "bitmap-mode": mode}));
        client.run("blockdev-mirror", job);
        client.wait_for("j", "ready");
        assert_eq!(total(&mut client), json!(CLUSTER), "{mode}");
        client.run("block-job-cancel", json!({"device": "j"}));
        client.wait_for("j", "null");
        assert_eq!(bitmaps(&mut client), [(json!("b"), json!(left))]);
        let (disk, copy) = files(&daemon);
        assert!(disk == copy, "{mode}");
    }
}

/// A mirror that is cancelled by force, or whose target fails, forgets nothing.
#[test]
fn a_mirror_that_ends_early_forgets_nothing() {
    let (daemon, mut client) = start();
    let mut nbd = Nbd::open(&daemon.path("nbd.sock"), "disk");
    nbd.write(0, &[7; 3], 0);
    for mode in ["on-success", "never", "always"] {
        // Held by its speed once it has copied one cluster.
        let job = mirror(json!({"sync": "bitmap", "bitmap-mode": mode, "speed": 1}));
        client.run("blockdev-mirror", job);
        client.wait_for("j", "running");
        nbd.write(CLUSTER, &[8; 3], 0);
        client.run("job-cancel", json!({"id": "j"}));
        client.wait_for("j", "null");
        let left = bitmaps(&mut client);
        let all = left == [(json!("b"), json!(2 * CLUSTER))];
        // The first one may have been copied; the other one has been written since.
        let may_be_one = mode == "always" && left == [(json!("b"), json!(CLUSTER))];
        assert!(all || may_be_one, "{mode}: {left:?}");
    }
}

/// The target takes the source's place, although the rest was never copied by this job.
#[test]
fn a_mirror_by_bitmap_completes() {
    let (daemon, mut client) = start();
    for more in [
        json!({"sync": "full", "bitmap-mode": "on-success"}),
        json!({"sync": "incremental", "copy-mode": "write-blocking"}),
    ] {
        let mut nbd = Nbd::open(&daemon.path("nbd.sock"), "disk");
        client.run("blockdev-mirror", mirror(more.clone()));
        client.wait_for("j", "ready");
        nbd.write(5 * CLUSTER, &[5; 512], 0);
        let verb = match more["sync"] == "full" {
            true => "block-job-cancel",
            false => "block-job-complete",
        };
        client.run(verb, json!({"device": "j"}));
        client.wait_for("j", "null");
        let (disk, copy) = files(&daemon);
        assert!(disk == copy);
        nbd.write(6 * CLUSTER, &[6; 512], 0);
    }
    let (disk, copy) = files(&daemon);
    let differs = disk.iter().zip(&copy).filter(|(old, new)| old != new);
    assert_eq!(differs.count(), 0, "the same was written before");
    let mut nbd = Nbd::open(&daemon.path("nbd.sock"), "disk");
    nbd.write(7 * CLUSTER, &[1; 512], 0);
    let (disk, copy) = files(&daemon);
    assert!(
        disk != copy && copy[7 * CLUSTER as usize] == 1,
        "it went over"
    );
    assert_eq!(bitmaps(&mut client), [(json!("b"), json!(0))]);
}

#[test]
fn refused_bitmaps_say_why() {
    let (_daemon, mut client) = start();
    for (more, text) in [
        (
            json!({"sync": "bitmap", "bitmap": "zz"}),
            "could not be found",
        ),
        (json!({"sync": "bitmap"}), "Bitmap sync mode must be given"),
        (
            json!({"sync": "incremental", "bitmap-mode": "never"}),
            "Bitmap sync mode must be 'on-success'",
        ),
        (
            json!({"sync": "none", "bitmap-mode": "always"}),
            "does not produce meaningful bitmap outputs",
        ),
        (
            json!({"sync": "full", "bitmap-mode": "never"}),
            "has no meaningful effect",
        ),
    ] {
        let refused = client.refusal("blockdev-mirror", mirror(more));
        assert!(refused.contains(text), "{refused}");
    }
    let new = mirror(json!({"sync": "incremental", "target": "new.raw"}));
    let refused = client.refusal("drive-mirror", new);
    assert!(refused.contains("needs a target that exists"), "{refused}");
    let existing =
        json!({"sync": "incremental", "target": "copy.raw", "mode": "existing", "format": "raw"});
    client.run("blockdev-del", json!({"node-name": "copy"}));
    client.run("drive-mirror", mirror(existing));
    client.wait_for("j", "ready");
}
