//! Transactions beside those of qemu-storage-daemon, and on ours what they promise: all of it or nothing, at one moment of
//! several disks.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::nbd::{Nbd, export, start_server};
use crate::oracle::{compare, hole_file};
use crate::writer::SetAtEnd;

const NODES: &str = r#"
    $ truncate -s 4M a.img b.img t.img u.img
    $ qemu-img create -q -f qcow2 q.qcow2 4M
    $ qemu-img create -q -f qcow2 o.qcow2 4M
    $ qemu-img create -q -f qcow2 p.qcow2 4M
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "a.img"}}
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "b", "filename": "b.img"}}
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "t", "filename": "t.img"}}
    {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "u", "filename": "u.img"}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "q", "backing": null, "file": {"driver": "file", "filename": "q.qcow2"}}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "o", "backing": null, "file": {"driver": "file", "filename": "o.qcow2"}}}
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "p", "backing": null, "file": {"driver": "file", "filename": "p.qcow2"}}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "a", "name": "x"}}
    {"execute": "block-dirty-bitmap-add", "arguments": {"node": "b", "name": "y", "disabled": true}}
"#;

const SHOWN: &str = "{\"execute\": \"query-named-block-nodes\", \"arguments\": {\"flat\": true}}\n";

const DISKS: [&str; 3] = ["a", "b", "c"];

const ABORT: &str = r#"{"type": "abort", "data": {}}"#;

fn action(kind: &str, data: Value) -> String {
    json!({"type": kind, "data": data}).to_string()
}

fn bitmap(change: &str, node: &str, name: &str) -> String {
    let kind = format!("block-dirty-bitmap-{change}");
    action(&kind, json!({"node": node, "name": name}))
}

fn backup(id: &str, device: &str, target: &str) -> String {
    let data = json!({"job-id": id, "device": device, "target": target, "sync": "full"});
    action("blockdev-backup", data)
}

fn snapshot(node: &str, overlay: &str) -> String {
    let data = json!({"node": node, "overlay": overlay});
    action("blockdev-snapshot", data)
}

fn internal(device: &str, name: &str) -> String {
    let data = json!({"device": device, "name": name});
    action("blockdev-snapshot-internal-sync", data)
}

fn transaction(actions: &[String], mode: &str) -> String {
    let actions = actions.join(", ");
    format!(
        "{{\"execute\": \"transaction\", \"arguments\": {{\"actions\": [{actions}], \
         \"properties\": {{\"completion-mode\": \"{mode}\"}}}}}}\n"
    )
}

/// Each list of actions, then with an action that fails behind them, and what is there afterwards.
fn failed_and_done(lists: &[Vec<String>]) -> String {
    let mut script = NODES.to_owned();
    for list in lists {
        let mut fails = list.clone();
        fails.push(ABORT.to_owned());
        script += &transaction(&fails, "individual");
        script += SHOWN;
        script += &transaction(list, "individual");
        script += SHOWN;
    }
    script
}

#[test]
fn what_is_no_transaction_is_refused_in_the_same_words() {
    let mut script = NODES.to_owned();
    for arguments in [
        "{}",
        r#"{"actions": []}"#,
        r#"{"actions": {}}"#,
        r#"{"actions": [{}]}"#,
        r#"{"actions": [{"type": "nope", "data": {}}]}"#,
        r#"{"actions": [{"type": "abort"}]}"#,
        r#"{"actions": [{"type": "abort", "data": {"a": 1}}]}"#,
        r#"{"actions": [{"type": "abort", "data": {}, "more": 1}]}"#,
        r#"{"actions": [{"type": "block-dirty-bitmap-add", "data": {"node": "a"}}]}"#,
        r#"{"actions": [], "properties": {}}"#,
        r#"{"actions": [], "properties": {"completion-mode": "x"}}"#,
        r#"{"actions": [], "properties": {"completion-mode": "grouped"}}"#,
    ] {
        script += &format!("{{\"execute\": \"transaction\", \"arguments\": {arguments}}}\n");
    }
    for one in [
        ABORT.to_owned(),
        bitmap("add", "a", "n"),
        bitmap("clear", "a", "x"),
        bitmap("clear", "zz", "x"),
        bitmap("remove", "a", "zz"),
        bitmap("add", "a", ""),
        bitmap("add", "a", "x"),
        snapshot("q", "zz"),
        snapshot("zz", "o"),
        internal("zz", "s"),
        internal("a", "s"),
        backup("j", "a", "zz"),
    ] {
        script += &transaction(std::slice::from_ref(&one), "grouped");
        script += &transaction(&[bitmap("add", "b", "first"), one], "individual");
        script += SHOWN;
        script += &transaction(&[bitmap("remove", "b", "first")], "individual");
    }
    compare(&script, |_| ());
}

#[test]
fn bitmaps_are_changed_together_or_not_at_all() {
    let merge = action(
        "block-dirty-bitmap-merge",
        json!({"node": "a", "target": "m", "bitmaps": ["x", {"node": "b", "name": "y"}]}),
    );
    let script = failed_and_done(&[
        vec![bitmap("add", "a", "m"), bitmap("add", "b", "n")],
        vec![bitmap("disable", "a", "x"), bitmap("enable", "b", "y")],
        vec![merge, bitmap("clear", "a", "x"), bitmap("enable", "a", "x")],
        vec![bitmap("add", "a", "l"), bitmap("add", "a", "l")],
        vec![bitmap("remove", "b", "n"), bitmap("add", "b", "n")],
        vec![bitmap("remove", "b", "n"), bitmap("clear", "b", "n")],
        vec![bitmap("remove", "b", "n"), bitmap("remove", "a", "m")],
    ]);
    compare(&script, |_| ());
}

#[test]
fn snapshots_are_made_together_or_not_at_all() {
    let new = action(
        "blockdev-snapshot-sync",
        json!({"node-name": "p", "snapshot-file": "n.qcow2", "snapshot-node-name": "n"}),
    );
    let script = failed_and_done(&[
        vec![
            snapshot("q", "o"),
            bitmap("add", "o", "new"),
            bitmap("disable", "a", "x"),
        ],
        vec![snapshot("q", "o")],
        vec![new, bitmap("add", "n", "new")],
    ]);
    compare(&script, |_| ());
}

/// The node is for reading only once the overlay is there: the bitmap goes all the same, from the image as well.
#[test]
fn a_bitmap_goes_although_its_node_becomes_read_only() {
    let mut script = NODES.to_owned();
    let keep = json!({"node": "q", "name": "keep", "persistent": true});
    script += &transaction(&[action("block-dirty-bitmap-add", keep)], "individual");
    let gone = [bitmap("remove", "q", "keep"), snapshot("q", "o")];
    script += &transaction(&[&gone[..], &[ABORT.to_owned()]].concat(), "individual");
    script += SHOWN;
    script += &transaction(&gone, "individual");
    script += SHOWN;
    compare(&script, |_| ());
}

/// A name that is left would be refused when it is given again.
#[test]
fn internal_snapshots_are_made_together_or_not_at_all() {
    let mut script = NODES.to_owned();
    let both = [internal("p", "s"), internal("q", "s")];
    let fails = [internal("p", "s2"), internal("q", "s")];
    let then = [internal("p", "s2"), bitmap("clear", "a", "x")];
    script += &transaction(&[&both[..], &[ABORT.to_owned()]].concat(), "individual");
    for list in [&both[..], &both[..], &fails[..], &then[..], &then[..]] {
        script += &transaction(list, "individual");
    }
    compare(&script, |_| ());
}

#[test]
fn jobs_start_together_or_not_at_all() {
    let mut script = NODES.to_owned();
    for mode in ["individual", "grouped"] {
        script += &transaction(&[backup("j", "a", "t"), backup("k", "b", "zz")], mode);
        script += &transaction(&[backup("j", "a", "t"), backup("j", "b", "u")], mode);
        script += "gone j\n";
        script += &transaction(&[backup("j1", "a", "t"), backup("k1", "b", "u")], mode);
        script += "gone j1\ngone k1\n";
        script = script
            .replace("j1", &format!("{mode}-j"))
            .replace("k1", &format!("{mode}-k"));
    }
    compare(&script, |_| ());
}

/// A writer goes from disk to disk, so that only some states of the three can ever have been there at one time.
#[test]
fn three_disks_are_saved_at_one_moment() {
    for _ in 0..20 {
        one_moment();
    }
}

fn one_moment() {
    const LENGTH: u64 = 256 << 10;
    let daemon = Daemon::start_with(&["--data-threads", "3"]);
    let mut client = daemon.client();
    start_server(&daemon, &mut client, 10);
    let mut actions = Vec::new();
    for disk in DISKS {
        let target = format!("{disk}t");
        for name in [disk, &target] {
            hole_file(&daemon.path(name), LENGTH);
            let node = json!({"driver": "file", "node-name": name, "filename": name});
            client.run("blockdev-add", node);
        }
        export(&mut client, disk);
        let job = json!({"job-id": disk, "device": disk, "target": target, "sync": "full"});
        actions.push(json!({"type": "blockdev-backup", "data": job}));
    }
    let socket = daemon.path("nbd.sock");
    let (rounds, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let ends = SetAtEnd(&stop);
        let writer = scope.spawn(|| {
            let mut disks = DISKS.map(|disk| Nbd::open(&socket, disk));
            while !stop.load(Ordering::Relaxed) {
                let round = 1 + rounds.fetch_add(1, Ordering::Relaxed);
                for disk in &mut disks {
                    disk.write(4096, &round.to_be_bytes(), 0);
                }
            }
        });
        while rounds.load(Ordering::Relaxed) < 20 && !writer.is_finished() {
            std::thread::yield_now();
        }
        client.run("transaction", json!({"actions": actions}));
        for disk in DISKS {
            while client
                .run("query-jobs", json!({}))
                .to_string()
                .contains(&format!("\"{disk}\""))
            {}
        }
        drop(ends);
        writer.join().expect("every write is answered");
    });
    let [a, b, c] = DISKS.map(|disk| {
        let bytes = fs::read(daemon.path(&format!("{disk}t"))).expect("read");
        let eight: [u8; 8] = bytes[4096..4104].try_into().expect("eight");
        u64::from_be_bytes(eight)
    });
    assert!(c >= 18, "somebody has written before");
    assert!(a == c || a == c + 1, "{a} {b} {c}");
    assert!(b == a || b == c, "{a} {b} {c}");
    daemon.quit();
}

/// Jobs that QEMU takes in no transaction: they start together, and where one cannot, none does.
#[test]
fn jobs_that_only_we_take_start_together_or_not_at_all() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    for name in ["s", "t"] {
        hole_file(&daemon.path(name), 1 << 20);
        let node = json!({"driver": "file", "node-name": name, "filename": name});
        client.run("blockdev-add", node);
    }
    let mirror = |target: &str| {
        let job = json!({"job-id": "m", "device": "s", "target": target, "sync": "full"});
        json!({"type": "blockdev-mirror", "data": job})
    };
    let add = json!({"type": "block-dirty-bitmap-add", "data": {"node": "s", "name": "since"}});
    let stream = json!({"type": "block-stream", "data": {"job-id": "z", "device": "zz"}});
    let refused = client.refusal(
        "transaction",
        json!({"actions": [add, mirror("t"), stream]}),
    );
    assert_eq!(refused, "Cannot find device='zz' nor node-name='zz'");
    assert_eq!(client.run("query-jobs", json!({})), json!([]));
    let nodes = client.run("query-named-block-nodes", json!({}));
    assert!(!nodes.to_string().contains("since"), "{nodes}");
    client.run("transaction", json!({"actions": [add, mirror("t")]}));
    client.wait_for("m", "ready");
    client.run("job-cancel", json!({"id": "m"}));
    client.wait_for("m", "null");
    let nodes = client.run("query-named-block-nodes", json!({}));
    assert!(nodes.to_string().contains("since"), "{nodes}");
    drop(client);
    daemon.quit();
}

/// Another client may not meet with what may yet be taken back.
#[test]
fn nobody_comes_between_the_actions() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let create = ["create", "-q", "-f", "qcow2", "i.qcow2", "1M"];
    crate::images::run(daemon.folder.path(), "qemu-img", &create);
    let limits = json!({"qom-type": "throttle-group", "id": "g", "limits": {"iops-write": 8}});
    client.run("object-add", limits);
    let file = json!({"driver": "file", "filename": "i.qcow2"});
    let slow = json!({"driver": "throttle", "throttle-group": "g", "file": file});
    let image = json!({"driver": "qcow2", "node-name": "i", "file": slow});
    client.run("blockdev-add", image);
    let null = json!({"driver": "null-co", "node-name": "n", "size": 65536});
    client.run("blockdev-add", null);
    let bitmap = json!({"node": "n", "name": "m"});
    let actions = json!([
        {"type": "block-dirty-bitmap-add", "data": bitmap},
        {"type": "blockdev-snapshot-internal-sync", "data": {"device": "i", "name": "s"}},
        {"type": "abort", "data": {}},
    ]);
    let request = json!({"execute": "transaction", "arguments": {"actions": actions}});
    client.send(format!("{request}\n").as_bytes());
    let mut other = daemon.client();
    loop {
        let nodes = other.run("query-named-block-nodes", json!({}));
        if nodes.to_string().contains("\"m\"") {
            break;
        }
    }
    let refused = other.refusal("block-dirty-bitmap-remove", bitmap);
    assert_eq!(refused, "Dirty bitmap 'm' not found");
    let reply = client.reply();
    let text = "Transaction aborted using Abort action";
    assert_eq!(reply["error"]["desc"], text, "{reply}");
    drop((client, other));
    daemon.quit();
}

/// What is on its way when a bitmap comes is marked in it: its client may read the disk before it has landed.
#[test]
fn a_write_is_marked_in_a_bitmap_that_comes_before_its_end() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    hole_file(&daemon.path("f"), 1 << 20);
    let limits = json!({"qom-type": "throttle-group", "id": "g", "limits": {"bps-write": 1}});
    client.run("object-add", limits);
    let file = json!({"driver": "file", "filename": "f"});
    let slow = json!({"driver": "throttle", "throttle-group": "g", "file": file});
    let node = json!({"driver": "raw", "node-name": "r", "file": slow});
    client.run("blockdev-add", node);
    start_server(&daemon, &mut client, 10);
    export(&mut client, "r");
    let mut writer = Nbd::open(&daemon.path("nbd.sock"), "r");
    // The first one passes at once, the second one waits.
    let data = [7; 65536];
    writer.send(crate::nbd::WRITE, 0, (0, 65536), &data);
    writer.send(crate::nbd::WRITE, 0, (1 << 19, 65536), &data);
    writer.reply();
    for _ in 0..20 {
        client.run("query-version", json!({}));
    }
    client.run("block-dirty-bitmap-add", json!({"node": "r", "name": "b"}));
    let unlimited = json!({"path": "g", "property": "limits", "value": {"bps-write": 0}});
    client.run("qom-set", unlimited);
    writer.reply();
    let nodes = client.run("query-named-block-nodes", json!({}));
    let all = nodes.as_array().expect("nodes").iter();
    let bitmap = all.filter_map(|node| node["dirty-bitmaps"].get(0)).next();
    assert_eq!(bitmap.expect("a bitmap")["count"], 65536);
    drop(client);
    daemon.quit();
}
