//! Backups beside a writer that comes through an export, and a disk that is read as it was through another one.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::images::{SIZE, image, run};
use crate::nbd::{Nbd, ZERO, export, start_server};
use crate::oracle::data_file;
use crate::tools;

/// What a writer has done, in order: where, and what is there now.
type History = Arc<Mutex<Vec<(usize, Vec<u8>)>>>;

/// A client that writes one request after the other until nobody shares its history any more.
fn start_writing(daemon: &Daemon, name: &'static str, mut seed: u64) -> (History, JoinHandle<()>) {
    let history = History::default();
    let (kept, socket) = (Arc::downgrade(&history), daemon.path("nbd.sock"));
    let writer = std::thread::spawn(move || {
        let mut nbd = Nbd::open(&socket, name);
        while let Some(history) = kept.upgrade() {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let mixed = seed >> 16;
            let length = 1 + mixed % 70_000;
            let offset = (mixed >> 8) % (SIZE - length);
            let byte = mixed.to_be_bytes()[4];
            let is_zero = mixed.is_multiple_of(5);
            let data =
                vec![if is_zero { 0 } else { byte }; usize::try_from(length).expect("short")];
            match is_zero {
                true => nbd.change(ZERO, (offset, u32::try_from(length).expect("short"))),
                false => nbd.write(offset, &data, 0),
            }
            history
                .lock()
                .expect("kept")
                .push((usize::try_from(offset).expect("small"), data));
        }
    });
    (history, writer)
}

fn count(history: &History) -> usize {
    history.lock().expect("kept").len()
}

fn goes_on((history, writer): (&History, &JoinHandle<()>), more: usize) {
    let goal = count(history) + more;
    while count(history) < goal {
        assert!(!writer.is_finished(), "the writer has failed");
        std::thread::yield_now();
    }
}

/// Whether a disk is what it was after one of so many requests.
fn was(
    disk: &[u8],
    before: &[u8],
    history: &[(usize, Vec<u8>)],
    when: std::ops::RangeInclusive<usize>,
) -> bool {
    let mut model = before.to_vec();
    for done in 0..=*when.end() {
        if when.contains(&done) && model == disk {
            return true;
        }
        if let Some((offset, data)) = history.get(done) {
            model[*offset..offset + data.len()].copy_from_slice(data);
        }
    }
    false
}

/// A raw disk with content that is exported, and an empty image.
fn start() -> Option<(Daemon, Client)> {
    if !tools::have("qemu-img", "qemu-utils") {
        return None;
    }
    let folder = tempfile::tempdir().expect("a folder");
    data_file(&folder.path().join("disk.raw"), SIZE);
    image(folder.path(), "copy.qcow2", &[]);
    let daemon = Daemon::start_in(folder, &[]);
    let mut client = daemon.client();
    for node in [
        json!({"driver": "file", "node-name": "disk", "filename": "disk.raw", "discard": "unmap"}),
        json!({"driver": "qcow2", "node-name": "copy",
            "file": {"driver": "file", "filename": "copy.qcow2", "discard": "unmap"}}),
    ] {
        client.run("blockdev-add", node);
    }
    start_server(&daemon, &mut client, 100);
    Some((daemon, client))
}

fn exported(client: &mut Client) -> Value {
    client.run("query-block-exports", json!({}))[0]["node-name"].clone()
}

fn copy_of(daemon: &Daemon) -> Vec<u8> {
    let folder = daemon.path("");
    let convert = [
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        "copy.qcow2",
        "out.raw",
    ];
    run(&folder, "qemu-img", &convert);
    std::fs::read(folder.join("out.raw")).expect("read")
}

#[test]
fn a_backup_is_the_disk_of_one_moment_while_a_client_writes() {
    for speed in [0, 8 << 20] {
        let Some((daemon, mut client)) = start() else {
            return;
        };
        let before = std::fs::read(daemon.path("disk.raw")).expect("read");
        export(&mut client, "disk");
        let (history, writer) = start_writing(&daemon, "disk", 3 + speed);
        goes_on((&history, &writer), 20);
        let from = count(&history);
        let job = json!({"job-id": "j", "device": "disk", "target": "copy", "sync": "full",
            "speed": speed, "filter-node-name": "filter"});
        client.run("blockdev-backup", job);
        // One more may be on its way.
        let to = count(&history) + 1;
        if speed > 0 {
            goes_on((&history, &writer), 20);
            assert_eq!(exported(&mut client), json!("filter"));
            client.run("job-pause", json!({"id": "j"}));
            client.wait_for("j", "paused");
            goes_on((&history, &writer), 20);
            client.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
            client.run("job-resume", json!({"id": "j"}));
        }
        client.wait_for("j", "null");
        assert_eq!(exported(&mut client), json!("disk"));
        goes_on((&history, &writer), 20);
        let done = history.lock().expect("kept").clone();
        drop(history);
        writer.join().expect("every write was answered");
        client.run("nbd-server-stop", json!({}));
        client.run("blockdev-del", json!({"node-name": "copy"}));
        assert!(
            was(&copy_of(&daemon), &before, &done, from..=to),
            "speed {speed}"
        );
        drop(client);
        daemon.quit();
    }
}

#[test]
fn a_disk_is_read_as_it_was_while_a_client_writes() {
    let Some((daemon, mut client)) = start() else {
        return;
    };
    let before = std::fs::read(daemon.path("disk.raw")).expect("read");
    for node in [
        json!({"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "copy"}),
        json!({"driver": "snapshot-access", "node-name": "shown", "file": "cbw"}),
    ] {
        client.run("blockdev-add", node);
    }
    export(&mut client, "cbw");
    client.run(
        "block-export-add",
        json!({"type": "nbd", "id": "shown", "node-name": "shown"}),
    );
    let (history, writer) = start_writing(&daemon, "cbw", 9);
    let length = u32::try_from(SIZE).expect("small");
    let mut reader = Nbd::open(&daemon.path("nbd.sock"), "shown");
    while count(&history) < 300 {
        assert!(!writer.is_finished(), "the writer has failed");
        assert!(reader.read(0, length) == before, "not what was there");
    }
    drop(history);
    writer.join().expect("every write was answered");
    assert!(reader.read(0, length) == before, "not what was there");
    drop(reader);
    client.run("nbd-server-stop", json!({}));
    for name in ["shown", "cbw", "disk", "copy"] {
        client.run("blockdev-del", json!({"node-name": name}));
    }
    drop(client);
    daemon.quit();
}
