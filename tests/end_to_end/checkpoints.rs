//! Checkpoints of several disks in two phases: all disks or none, whoever leaves in between, and no change is missed by the next one.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::images::run;
use crate::nbd::{Nbd, export, start_server};
use crate::oracle::hole_file;
use crate::tools;
use crate::writer::SetAtEnd;

const DISKS: [&str; 3] = ["a", "b", "c"];
const GRANULE: u64 = 65536;

/// Three images that are written to; `None`: the test has to return.
fn start() -> Option<(Daemon, Client)> {
    if !tools::have("qemu-img", "qemu-utils") {
        return None;
    }
    let daemon = Daemon::start();
    let mut client = daemon.client();
    start_server(&daemon, &mut client, 100);
    for disk in DISKS {
        let create = ["create", "-q", "-f", "qcow2", disk, "4M"];
        run(&daemon.path(""), "qemu-img", &create);
        let file = json!({"driver": "file", "filename": disk});
        client.run(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": disk, "file": file}),
        );
        export(&mut client, disk);
    }
    Some((daemon, client))
}

/// Changes one granule of each disk: another one of each.
fn write_at(daemon: &Daemon, granule: u64) {
    for (disk, more) in DISKS.iter().zip(0..) {
        let mut nbd = Nbd::open(&daemon.path("nbd.sock"), disk);
        nbd.write((granule + more) * GRANULE, &[7; 512], 0);
    }
}

fn disks(bitmap: &str, previous: Option<&str>) -> Value {
    let disk = |disk: &&str| match previous {
        Some(previous) => json!({"node": disk, "bitmap": bitmap, "previous": previous}),
        None => json!({"node": disk, "bitmap": bitmap}),
    };
    DISKS.iter().map(disk).collect()
}

/// Names of a node's bitmaps, and how many granules each has, by name.
fn bitmaps(client: &mut Client, node: &str) -> Vec<(String, u64)> {
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.as_array().expect("nodes").iter();
    let mut node = nodes.filter(|one| one["node-name"] == node);
    let bitmaps = node.next().expect("there")["dirty-bitmaps"].clone();
    let bitmaps = bitmaps.as_array().cloned().unwrap_or_default();
    let mut shown: Vec<(String, u64)> = bitmaps
        .iter()
        .map(|one| {
            let name = one["name"].as_str().expect("a name").to_owned();
            (name, one["count"].as_u64().expect("a count") / GRANULE)
        })
        .collect();
    shown.sort();
    shown
}

fn are(client: &mut Client, expected: &[(&str, u64)]) {
    for disk in DISKS {
        let expected: Vec<_> = expected
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count))
            .collect();
        assert_eq!(bitmaps(client, disk), expected, "{disk}");
    }
}

fn info(daemon: &Daemon, image: &str) -> String {
    let mut command = std::process::Command::new("qemu-img");
    command
        .args(["info", "-U", image])
        .current_dir(daemon.path(""));
    tools::run_command(command, "").output
}

#[test]
fn it_is_committed_or_aborted_on_all_disks() {
    let Some((daemon, mut client)) = start() else {
        return;
    };
    let begun = client.run(
        "x-checkpoint-begin",
        json!({"id": "one", "disks": disks("c1", None)}),
    );
    assert_eq!(
        begun["disks"][1],
        json!({"node": "b", "bitmap": "c1", "persistent": true})
    );
    write_at(&daemon, 0);
    client.run("x-checkpoint-commit", json!({"id": "one"}));
    are(&mut client, &[("c1", 1)]);
    write_at(&daemon, 10);
    let second = json!({"id": "two", "disks": disks("c2", Some("c1"))});
    let begun = client.run("x-checkpoint-begin", second.clone());
    let listed = client.run("x-query-checkpoints", json!({}));
    assert_eq!(listed, json!([begun]));
    assert_eq!(begun["disks"][0]["changed"], "x-checkpoint-two");
    write_at(&daemon, 20);
    are(
        &mut client,
        &[("c1", 3), ("c2", 1), ("x-checkpoint-two", 2)],
    );
    // What had changed is shown to a client, and the disks' users are in nobody's way.
    let bitmap = json!([{"node": "a", "name": "x-checkpoint-two"}]);
    client.run(
        "block-export-add",
        json!({"type": "nbd", "id": "shown", "node-name": "a", "name": "shown", "bitmaps": bitmap}),
    );
    let in_use = "Node 'a': Bitmap 'x-checkpoint-two' is currently in use by another operation and \
                  cannot be used";
    for end in ["x-checkpoint-commit", "x-checkpoint-abort"] {
        assert_eq!(client.refusal(end, json!({"id": "two"})), in_use);
    }
    for name in ["c1", "c2"] {
        for change in ["remove", "clear", "disable"] {
            let refused = client.refusal(
                &format!("block-dirty-bitmap-{change}"),
                json!({"node": "b", "name": name}),
            );
            assert!(refused.contains("in use"), "{refused}");
        }
    }
    client.run("block-export-del", json!({"id": "shown"}));
    client.run("x-checkpoint-abort", json!({"id": "two"}));
    are(&mut client, &[("c1", 3)]);
    client.run("x-checkpoint-begin", second);
    write_at(&daemon, 30);
    client.run("x-checkpoint-commit", json!({"id": "two"}));
    are(&mut client, &[("c2", 1)]);
    client.run(
        "x-checkpoint-begin",
        json!({"id": "three", "disks": disks("c3", Some("c2"))}),
    );
    write_at(&daemon, 31);
    let kept = json!({"id": "three", "keep-previous": true});
    client.run("x-checkpoint-commit", kept);
    are(&mut client, &[("c2", 2), ("c3", 1)]);
    assert_eq!(client.run("x-query-checkpoints", json!({})), json!([]));
    drop(client);
    let folder = daemon.end();
    for disk in DISKS {
        let image = folder.path().join(disk);
        let mut command = std::process::Command::new("qemu-img");
        command.arg("info").arg(image);
        let info = tools::run_command(command, "").output;
        assert_eq!(info.matches("auto").count(), 2, "{info}");
        let has = |name: &str| info.contains(&format!("name: {name}\n"));
        assert!(has("c2") && has("c3") && !has("c1"), "{info}");
        assert!(!info.contains("in-use"), "{info}");
    }
}

#[test]
fn what_cannot_be_leaves_nothing() {
    let Some((daemon, mut client)) = start() else {
        return;
    };
    hole_file(&daemon.path("r"), 1 << 20);
    client.run(
        "blockdev-add",
        json!({"driver": "file", "node-name": "r", "filename": "r"}),
    );
    for (node, name, disabled) in [
        ("a", "old", false),
        ("b", "old", false),
        ("c", "old", true),
        ("b", "taken", false),
    ] {
        client.run(
            "block-dirty-bitmap-add",
            json!({"node": node, "name": name, "disabled": disabled}),
        );
    }
    let before = DISKS.map(|disk| bitmaps(&mut client, disk));
    let raw = json!([{"node": "r", "bitmap": "new"}]);
    for (arguments, expected) in [
        (
            json!({"id": "x", "disks": disks("new", Some("old"))}),
            "Node 'c': Bitmap 'old' does not record: what has changed since then is not known",
        ),
        (
            json!({"id": "x", "disks": disks("new", Some("none"))}),
            "Node 'a': Dirty bitmap 'none' not found",
        ),
        (
            json!({"id": "x", "disks": disks("taken", None)}),
            "Node 'b': Bitmap already exists: taken",
        ),
        (
            json!({"id": "x", "disks": [{"node": "a", "bitmap": "new"}, {"node": "zz", "bitmap": "new"}]}),
            "Node 'zz' not found",
        ),
        (
            json!({"id": "x", "disks": [{"node": "a", "bitmap": "new", "granularity": 3}]}),
            "Node 'a': Granularity must be power of 2 and at least 512",
        ),
        (
            json!({"id": "x", "disks": [{"node": "a", "bitmap": "n"}, {"node": "a", "bitmap": "m"}]}),
            "Node 'a' is named twice",
        ),
        (
            json!({"id": "x", "disks": []}),
            "A checkpoint has 1 to 256 disks",
        ),
        (
            json!({"id": "", "disks": disks("new", None)}),
            "A checkpoint's id has 1 to 255 bytes",
        ),
        (
            json!({"id": "x", "disks": raw, "persistent": true}),
            "Node 'r': Can't store persistent bitmaps to r: Operation not supported",
        ),
    ] {
        let refused = client.refusal("x-checkpoint-begin", arguments.clone());
        assert_eq!(refused, expected, "{arguments}");
        let after = DISKS.map(|disk| bitmaps(&mut client, disk));
        assert_eq!(after, before, "{arguments}");
    }
    for end in ["x-checkpoint-commit", "x-checkpoint-abort"] {
        let refused = client.refusal(end, json!({"id": "x"}));
        assert_eq!(refused, "Checkpoint 'x' not found");
    }
    // Where no image keeps bitmaps, memory does.
    let begun = client.run(
        "x-checkpoint-begin",
        json!({"id": "x", "disks": raw.clone()}),
    );
    assert_eq!(begun["disks"][0]["persistent"], false);
    let again = client.refusal("x-checkpoint-begin", json!({"id": "x", "disks": raw}));
    assert_eq!(again, "Checkpoint already exists: x");
    // A disk that is not there any more keeps all of them from going on.
    client.run("blockdev-del", json!({"node-name": "r"}));
    let refused = client.refusal("x-checkpoint-commit", json!({"id": "x"}));
    assert_eq!(
        refused,
        "Node 'r': It has been closed since the checkpoint began"
    );
    client.run("x-checkpoint-abort", json!({"id": "x"}));
    drop(client);
    daemon.quit();
}

#[test]
fn it_does_not_outlive_its_client_or_the_daemon() {
    let Some((daemon, mut client)) = start() else {
        return;
    };
    client.run(
        "x-checkpoint-begin",
        json!({"id": "one", "disks": disks("c1", None)}),
    );
    client.run("x-checkpoint-commit", json!({"id": "one"}));
    write_at(&daemon, 0);
    let mut other = daemon.client();
    for (id, stays) in [("gone", false), ("stays", true)] {
        other.run(
            "x-checkpoint-begin",
            json!({"id": id, "disks": disks(id, Some("c1")), "abort-on-disconnect": !stays}),
        );
        if !stays {
            // It is somebody's own, whatever its name is.
            other.run("x-checkpoint-abort", json!({"id": id}));
            other.run(
                "x-checkpoint-begin",
                json!({"id": id, "disks": disks(id, None), "abort-on-disconnect": true}),
            );
        }
    }
    write_at(&daemon, 10);
    drop(other);
    loop {
        let left = client.run("x-query-checkpoints", json!({}));
        let left = left.as_array().expect("a list");
        let ids: Vec<_> = left.iter().map(|one| one["id"].clone()).collect();
        if ids == ["stays"] {
            break;
        }
    }
    are(
        &mut client,
        &[("c1", 2), ("stays", 1), ("x-checkpoint-stays", 1)],
    );
    drop(client);
    let folder = daemon.end();
    let daemon = Daemon::start_in(folder, &[]);
    for disk in DISKS {
        let info = info(&daemon, disk);
        assert!(info.contains("name: c1\n"), "{info}");
        assert!(
            !info.contains("stays") && !info.contains("in-use"),
            "{info}"
        );
    }
    daemon.quit();
}

/// A writer goes from disk to disk, another granule each time: what a checkpoint says of three disks can have been at one time.
#[test]
fn it_is_of_one_moment() {
    const LENGTH: u64 = 256 << 20;
    let daemon = Daemon::start_with(&["--data-threads", "3"]);
    let mut client = daemon.client();
    start_server(&daemon, &mut client, 10);
    for disk in DISKS {
        hole_file(&daemon.path(disk), LENGTH);
        let node = json!({"driver": "file", "node-name": disk, "filename": disk});
        client.run("blockdev-add", node);
        let bitmap = json!({"node": disk, "name": "c0"});
        client.run("block-dirty-bitmap-add", bitmap);
        export(&mut client, disk);
    }
    let socket = daemon.path("nbd.sock");
    let (rounds, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    // However late a checkpoint comes, there are granules left for those that follow.
    const CHECKPOINTS: u64 = 20;
    let rounds_max = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let ends = SetAtEnd(&stop);
        let writer = scope.spawn(|| {
            let mut disks = DISKS.map(|disk| Nbd::open(&socket, disk));
            while !stop.load(Ordering::Relaxed) {
                if rounds.load(Ordering::Relaxed) >= rounds_max.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                    continue;
                }
                let round = rounds.fetch_add(1, Ordering::Relaxed);
                for disk in &mut disks {
                    disk.write(round * GRANULE, &[1; 512], 0);
                }
            }
        });
        for number in 1..=CHECKPOINTS {
            rounds_max.store(number * (LENGTH / GRANULE / CHECKPOINTS), Ordering::Relaxed);
            let until = rounds.load(Ordering::Relaxed) + 10;
            while rounds.load(Ordering::Relaxed) < until && !writer.is_finished() {
                std::thread::yield_now();
            }
            let (name, previous) = (format!("c{number}"), format!("c{}", number - 1));
            let spec = json!({"id": name, "disks": disks(&name, Some(&previous))});
            client.run("x-checkpoint-begin", spec);
            let shown = DISKS.map(|disk| {
                let all = bitmaps(&mut client, disk);
                let changed = all.iter().find(|(name, _)| name.starts_with("x-"));
                changed.expect("a copy").1
            });
            let [a, b, c] = shown;
            // Of each round since the last moment, from the rest of its last one on.
            let (most, least) = (a.max(b).max(c), a.min(b).min(c));
            assert!(most - least <= 1 && least > 0, "{shown:?}");
            client.run("x-checkpoint-commit", json!({"id": name}));
        }
        drop(ends);
        writer.join().expect("every write is answered");
    });
    drop(client);
    daemon.quit();
}
