//! A disk goes to and fro between two daemons, ours and QEMU's, under its writer.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::images::{image, run};
use crate::inactive::{LENGTH, have_tools};
use crate::nbd::{FLUSH, Nbd, TRIM, WRITE, ZERO, start_server};
use crate::oracle::data_file;
use crate::tools;
use crate::writer::Random;

/// `EPERM`, as NBD says it.
const EPERM: u32 = 1;

/// The shared folder's disk at one of two hosts.
struct Host {
    daemon: Daemon,
    client: Client,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Ours,
    Qemus,
}

impl Host {
    fn start(kind: Kind, options: &[&str]) -> Self {
        let daemon = match kind {
            Kind::Ours => Daemon::start_with(options),
            Kind::Qemus => Daemon::start_oracle_with(&[]),
        };
        let client = daemon.client();
        Self { daemon, client }
    }

    /// Has the disk as an inactive node, and exports it for writers all the time.
    fn open(&mut self, node: Value) {
        self.client.run("blockdev-add", node);
        start_server(&self.daemon, &mut self.client, 0);
        let export = json!({"type": "nbd", "id": "e", "name": "disk", "node-name": "disk",
            "writable": true, "allow-inactive": true});
        self.client.run("block-export-add", export);
    }

    fn nbd(&self) -> Nbd {
        Nbd::open(&self.daemon.path("nbd.sock"), "disk")
    }

    fn set_active(&mut self, active: bool) {
        let arguments = json!({"node-name": "disk", "active": active});
        self.client.run("blockdev-set-active", arguments);
    }

    fn quit(self) {
        drop(self.client);
        self.daemon.quit();
    }
}

/// Every pair of hosts of which at least one is ours.
fn pairs() -> Vec<[Kind; 2]> {
    let mut pairs = vec![[Kind::Ours, Kind::Ours]];
    if tools::have_oracle() {
        pairs.push([Kind::Ours, Kind::Qemus]);
        pairs.push([Kind::Qemus, Kind::Ours]);
    }
    pairs
}

fn content(folder: &Path, name: &str, format: &str) -> Vec<u8> {
    let raw = folder.join("content.raw");
    let to = raw.display().to_string();
    run(
        folder,
        "qemu-img",
        &["convert", "-f", format, "-O", "raw", name, &to],
    );
    let bytes = fs::read(&raw).expect("read");
    fs::remove_file(&raw).expect("removed");
    bytes
}

/// Some writes, zeroes and discards.
fn change(nbd: &mut Nbd, model: &mut [u8], random: &mut Random) {
    for _ in 0..12 {
        let start = random.below(LENGTH / 512) * 512;
        let length = (1 + random.below(96)) * 512;
        let end = (start + length).min(LENGTH);
        let part = usize::try_from(start).expect("short")..usize::try_from(end).expect("short");
        let range = (start, u32::try_from(end - start).expect("short"));
        match random.below(6) {
            0 => {
                nbd.change(ZERO, range);
                model[part].fill(0);
            }
            1 => {
                // What it leaves is what it reads as.
                nbd.change(TRIM, range);
                let left = nbd.read(range.0, range.1);
                model[part].copy_from_slice(&left);
            }
            _ => {
                let byte = u8::try_from(1 + random.below(255)).expect("a byte");
                nbd.write(start, &vec![byte; part.len()], 0);
                model[part].fill(byte);
            }
        }
    }
}

/// One of them has the disk, then the other one, and back again.
///
/// QEMU's takes a file that is described within an inactive image for active, does not see then that it has become longer, and reads
/// zeroes behind the old end. So files say that they are inactive, too.
fn hand_over(kinds: [Kind; 2], node: &Value, make: &dyn Fn(&Path), (name, format): (&str, &str)) {
    let shared = tempfile::tempdir().expect("a folder");
    make(shared.path());
    let mut model = content(shared.path(), name, format);
    let mut hosts = kinds.map(|kind| Host::start(kind, &[]));
    let mut random = Random(7);
    let node = node.to_string();
    let node = node.replace("SHARED", &shared.path().display().to_string());
    let node: Value = serde_json::from_str(&node).expect("a node");
    for host in &mut hosts {
        host.open(node.clone());
    }
    let mut connections = hosts.each_ref().map(Host::nbd);
    for round in 0..7 {
        let [mine, other] = [round % 2, (round + 1) % 2];
        hosts[mine].set_active(true);
        // Raw disks may have several writers. QEMU's makes the file active all the same, and believes its length from then on.
        if format == "qcow2" && kinds[other] == Kind::Ours {
            let arguments = json!({"node-name": "disk", "active": true});
            let host = &mut hosts[other];
            let refusal = host.client.refusal("blockdev-set-active", arguments);
            assert!(refusal.contains("\"write\" lock"), "{refusal}");
        }
        let nbd = &mut connections[mine];
        for place in (0..LENGTH).step_by(1 << 20) {
            let from = usize::try_from(place).expect("short");
            let read = nbd.read(place, 1 << 20);
            assert!(
                read == model[from..from + (1 << 20)],
                "round {round}, {place}"
            );
        }
        change(nbd, &mut model, &mut random);
        nbd.change(FLUSH, (0, 0));
        change(nbd, &mut model, &mut random);
        let idle = connections[other].refusal(WRITE, (0, 512), &[1; 512]);
        assert_eq!(idle, EPERM);
        hosts[mine].set_active(false);
        assert_eq!(connections[mine].refusal(WRITE, (0, 512), &[1; 512]), EPERM);
        if format == "qcow2" {
            run(shared.path(), "qemu-img", &["check", "-q", name]);
        }
    }
    drop(connections);
    let before = fs::read(shared.path().join(name)).expect("read");
    let [first, second] = hosts;
    first.quit();
    second.quit();
    let after = fs::read(shared.path().join(name)).expect("read");
    assert!(before == after, "who does not own an image writes nothing");
    assert!(content(shared.path(), name, format) == model);
}

#[test]
fn a_raw_disk_goes_to_and_fro_under_its_writer() {
    if !have_tools() {
        return;
    }
    let node = json!({"driver": "raw", "node-name": "disk", "active": false,
        "file": {"driver": "file", "filename": "SHARED/disk.raw", "discard": "unmap",
            "active": false}});
    for kinds in pairs() {
        let make = |folder: &Path| data_file(&folder.join("disk.raw"), LENGTH);
        hand_over(kinds, &node, &make, ("disk.raw", "raw"));
    }
}

#[test]
fn an_image_goes_to_and_fro_under_its_writer() {
    if !have_tools() {
        return;
    }
    let node = json!({"driver": "qcow2", "node-name": "disk", "active": false,
        "discard": "unmap",
        "file": {"driver": "file", "filename": "SHARED/disk.qcow2", "active": false},
        "backing": {"driver": "qcow2", "file": {"driver": "file", "filename": "SHARED/base.qcow2"},
            "backing": null}});
    for options in ["cluster_size=4096", "lazy_refcounts=on", "extended_l2=on"] {
        for kinds in pairs() {
            let make = |folder: &Path| {
                image(folder, "base.qcow2", &[]);
                run(
                    folder,
                    "qemu-io",
                    &["-c", "write -q -P 9 512k 2M", "base.qcow2"],
                );
                let backed = ["-b", "base.qcow2", "-F", "qcow2", "-o", options];
                let mut create = vec!["create", "-q", "-f", "qcow2"];
                create.extend(backed);
                create.push("disk.qcow2");
                run(folder, "qemu-img", &create);
            };
            hand_over(kinds, &node, &make, ("disk.qcow2", "qcow2"));
        }
    }
}

/// What bitmaps say of a node, by name.
fn counts(client: &mut Client) -> Vec<(String, u64, bool)> {
    let nodes = client.run("query-named-block-nodes", json!({}));
    let nodes = nodes.as_array().expect("a list").iter();
    let mut disk = nodes.filter(|node| node["node-name"] == "disk");
    let bitmaps = disk.next().expect("there")["dirty-bitmaps"].clone();
    let bitmaps = bitmaps.as_array().cloned().unwrap_or_default().into_iter();
    let mut counts: Vec<_> = bitmaps
        .map(|one| {
            let name = one["name"].as_str().expect("named").to_owned();
            let count = one["count"].as_u64().expect("a number");
            (name, count, one["inconsistent"] == json!(true))
        })
        .collect();
    counts.sort();
    counts
}

/// Bitmaps in the image, its snapshots and its length go with it; a bitmap in memory takes all for changed that it has not seen.
#[test]
fn what_an_image_keeps_goes_with_it() {
    if !have_tools() {
        return;
    }
    let states = [tempfile::tempdir(), tempfile::tempdir()].map(|state| state.expect("a folder"));
    for (with_state, kinds) in [(false, pairs()), (true, vec![[Kind::Ours; 2]])]
        .into_iter()
        .flat_map(|(state, pairs)| pairs.into_iter().map(move |kinds| (state, kinds)))
    {
        let shared = tempfile::tempdir().expect("a folder");
        let path = shared.path().join("disk.qcow2").display().to_string();
        image(shared.path(), &path, &[]);
        let folders = states
            .each_ref()
            .map(|state| state.path().display().to_string());
        let mut places = folders.iter();
        let mut hosts = kinds.map(|kind| {
            let folder = places.next().expect("one each");
            match with_state {
                true => Host::start(kind, &["--state-dir", folder]),
                false => Host::start(kind, &[]),
            }
        });
        for host in &mut hosts {
            host.open(
                json!({"driver": "qcow2", "node-name": "disk", "active": false,
                "file": {"driver": "file", "filename": path, "active": false}}),
            );
        }
        let ours = kinds.map(|kind| kind == Kind::Ours);
        let bitmap = |name: &str, persistent: bool| json!({"node": "disk", "name": name, "persistent": persistent});
        let [first, second] = &mut hosts;
        let mut here = first.nbd();
        let mut there = second.nbd();
        first.set_active(true);
        for (name, persistent) in [("kept", true), ("here", false)] {
            first
                .client
                .run("block-dirty-bitmap-add", bitmap(name, persistent));
        }
        here.write(0, &[1; 65536], 0);
        first.set_active(false);
        assert_eq!(
            counts(&mut first.client),
            [("here".to_owned(), 65536, false)]
        );
        if ours[0] {
            let add = bitmap("more", true);
            let refusal = first.client.refusal("block-dirty-bitmap-add", add);
            assert!(refusal.contains("is inactive"), "{refusal}");
        }
        second.set_active(true);
        let kept = |count| ("kept".to_owned(), count, false);
        assert_eq!(counts(&mut second.client), [kept(65536)]);
        there.write(1 << 20, &[2; 65536], 0);
        second
            .client
            .run("block-dirty-bitmap-add", bitmap("other", true));
        let snapshot = json!({"device": "disk", "name": "s"});
        // Its export stands on it.
        second
            .client
            .run("blockdev-snapshot-internal-sync", snapshot);
        there.write(2 << 20, &[3; 65536], 0);
        second.client.run(
            "block-dirty-bitmap-remove",
            json!({"node": "disk", "name": "other"}),
        );
        second
            .client
            .run("block-dirty-bitmap-add", bitmap("new", true));
        second.set_active(false);
        first.set_active(true);
        let missed = match ours[0] {
            true => LENGTH,
            false => 65536,
        };
        let expected = [
            ("here".to_owned(), missed, false),
            kept(3 * 65536),
            ("new".to_owned(), 0, false),
        ];
        assert_eq!(counts(&mut first.client), expected);
        assert_eq!(here.read(2 << 20, 65536), [3; 65536]);
        here.write(3 << 20, &[4; 65536], 0);
        first.set_active(false);
        drop((here, there));
        let [first, second] = hosts;
        first.quit();
        second.quit();
        let list = Command::new("qemu-img")
            .args(["snapshot", "-l", &path])
            .output()
            .expect("run");
        let list = String::from_utf8_lossy(&list.stdout).into_owned();
        assert!(list.lines().any(|line| line.contains(" s ")), "{list}");
        run(shared.path(), "qemu-img", &["check", "-q", &path]);
        if with_state {
            // What was recorded of it ended when it was given away.
            for state in &states {
                let entries = fs::read_dir(state.path().join("bitmaps")).expect("there");
                let left: Vec<_> = entries
                    .map(|entry| entry.expect("there").file_name())
                    .collect();
                assert!(left.is_empty(), "{left:?}");
            }
        }
    }
}

/// What is answered before an image is given away is in it, whatever was in flight.
#[test]
fn what_was_answered_is_there_although_the_image_went_away_under_its_writers() {
    if !have_tools() {
        return;
    }
    let shared = tempfile::tempdir().expect("a folder");
    let path = shared.path().join("disk.qcow2").display().to_string();
    image(shared.path(), &path, &[]);
    let mut hosts = [Host::start(Kind::Ours, &[]), Host::start(Kind::Ours, &[])];
    for host in &mut hosts {
        host.open(
            json!({"driver": "qcow2", "node-name": "disk", "active": false,
            "file": {"driver": "file", "filename": path, "active": false}}),
        );
    }
    const SLOT: u64 = 4096;
    const WRITERS: u64 = 4;
    let mut model: Vec<[u8; 2]> = vec![[0; 2]; usize::try_from(LENGTH / SLOT).expect("short")];
    for round in 0..6_u8 {
        let mine = usize::from(round % 2);
        hosts[mine].set_active(true);
        let done = AtomicU64::new(0);
        let path = hosts[mine].daemon.path("nbd.sock");
        let written = std::thread::scope(|scope| {
            let write = |number: u64| {
                let (path, done) = (&path, &done);
                scope.spawn(move || {
                    let mut nbd = Nbd::open(path, "disk");
                    let mut answered = Vec::new();
                    let mut random = Random(u64::from(round) * WRITERS + number + 1);
                    loop {
                        // Each has every fourth slot.
                        let slot = random.below(LENGTH / SLOT / WRITERS) * WRITERS + number;
                        let byte = u8::try_from(1 + random.below(255)).expect("a byte");
                        let data = vec![byte; usize::try_from(SLOT).expect("short")];
                        let is_written = nbd.try_write(slot * SLOT, &data);
                        answered.push((slot, byte, is_written));
                        done.fetch_add(1, Ordering::Relaxed);
                        if !is_written {
                            return answered;
                        }
                    }
                })
            };
            let writers: Vec<_> = (0..WRITERS).map(write).collect();
            while done.load(Ordering::Relaxed) < 100 {
                std::thread::yield_now();
            }
            hosts[mine].set_active(false);
            let writers = writers.into_iter();
            writers
                .flat_map(|writer| writer.join().expect("it ends"))
                .collect::<Vec<_>>()
        });
        for (slot, byte, is_written) in written {
            let slot = &mut model[usize::try_from(slot).expect("short")];
            *slot = match is_written {
                true => [byte; 2],
                // Nobody knows.
                false => [slot[0], byte],
            };
        }
        let bytes = content(shared.path(), "disk.qcow2", "qcow2");
        for (slot, may_be) in bytes.chunks_exact(4096).zip(&mut model) {
            assert!(slot.iter().all(|byte| *byte == slot[0]), "torn");
            assert!(may_be.contains(&slot[0]), "{} {may_be:?}", slot[0]);
            *may_be = [slot[0]; 2];
        }
        run(shared.path(), "qemu-img", &["check", "-q", "disk.qcow2"]);
    }
    for host in hosts {
        host.quit();
    }
}
