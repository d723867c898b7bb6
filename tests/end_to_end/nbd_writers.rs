//! Writers through exports while jobs run below them: every reply holds, whatever becomes of the graph, and the copies are what
//! they have to be.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::images::{image, overlay, run};
use crate::nbd::{Nbd, export, start_server};
use crate::oracle::hole_file;
use crate::tools;
use crate::writer::{SetAtEnd, Writer};

/// Length of the disks, as those of the images.
const LENGTH: u64 = crate::images::SIZE;

fn qcow2(name: &str, backing: Value) -> Value {
    json!({"driver": "qcow2", "node-name": name, "backing": backing, "discard": "unmap",
        "file": {"driver": "file", "filename": format!("{name}.qcow2"), "discard": "unmap"}})
}

/// Three images, all of them holding something.
fn images(folder: &Path) {
    image(folder, "base.qcow2", &[]);
    overlay(folder, "mid.qcow2", "base.qcow2", "qcow2");
    overlay(folder, "top.qcow2", "mid.qcow2", "qcow2");
    image(folder, "copy.qcow2", &[]);
    for (name, write) in [
        ("base.qcow2", "write -P 1 0 3M"),
        ("mid.qcow2", "write -P 2 1M 2M"),
        ("top.qcow2", "write -P 3 2500k 1M"),
    ] {
        run(folder, "qemu-io", &["-f", "qcow2", "-c", write, name]);
    }
    hole_file(&folder.join("copy.raw"), LENGTH);
}

fn disk_of(folder: &Path, name: &str, format: &str) -> Vec<u8> {
    let out = format!("{name}.out");
    let arguments = ["convert", "-f", format, "-O", "raw", name, &out];
    run(folder, "qemu-img", &arguments);
    std::fs::read(folder.join(out)).expect("read")
}

struct Yard {
    daemon: Daemon,
    client: Client,
}

impl Yard {
    fn new() -> Option<Self> {
        if !tools::have("qemu-io", "qemu-utils") || !tools::have("qemu-img", "qemu-utils") {
            return None;
        }
        let folder = tempfile::tempdir().expect("a folder");
        images(folder.path());
        let daemon = Daemon::start_in(folder, &[]);
        let mut client = daemon.client();
        let mut base = qcow2("base", json!(null));
        base["read-only"] = json!(true);
        base["auto-read-only"] = json!(true);
        client.run("blockdev-add", base);
        client.run("blockdev-add", qcow2("mid", json!("base")));
        client.run("blockdev-add", qcow2("top", json!("mid")));
        client.run("blockdev-add", qcow2("copy", json!(null)));
        let raw = json!({"driver": "file", "node-name": "raw", "filename": "copy.raw"});
        client.run("blockdev-add", raw);
        start_server(&daemon, &mut client, 100);
        export(&mut client, "top");
        Some(Self { daemon, client })
    }

    fn writer(&self, seed: u64) -> Writer {
        Writer::start(self.daemon.path("nbd.sock"), "top", 0..LENGTH, seed)
    }

    /// On which node the export is.
    fn exported(&mut self) -> Value {
        let exports = self.client.run("query-block-exports", json!({}));
        exports[0]["node-name"].clone()
    }

    /// Ends everything; the disk has to be `model`, and the image sound.
    fn end(self, image: &str, model: &[u8]) {
        let Self { daemon, client } = self;
        drop(client);
        let folder = daemon.path("");
        let keep = tempfile::tempdir().expect("a folder");
        let pid = daemon.pid();
        let mut client = daemon.client();
        client.run("quit", json!({}));
        client.end();
        assert!(pid > 0);
        let format = if image.ends_with(".raw") {
            "raw"
        } else {
            "qcow2"
        };
        assert!(disk_of(&folder, image, format) == model, "{image}");
        if format == "qcow2" {
            run(&folder, "qemu-img", &["check", "-q", "-f", "qcow2", image]);
        }
        drop(keep);
        assert!(daemon.wait().success());
    }
}

#[test]
fn a_mirror_takes_its_writers_over() {
    for (number, (copy_mode, target)) in [
        ("background", "copy"),
        ("write-blocking", "copy"),
        ("background", "raw"),
        ("write-blocking", "raw"),
    ]
    .into_iter()
    .enumerate()
    {
        let Some(mut yard) = Yard::new() else { return };
        let writer = yard.writer(31 * number as u64 + 7);
        writer.goes_on(20);
        let job = json!({"job-id": "j", "device": "top", "target": target, "sync": "full",
            "copy-mode": copy_mode, "granularity": 4096});
        yard.client.run("blockdev-mirror", job);
        yard.client.wait_for("j", "ready");
        writer.goes_on(50);
        assert_ne!(yard.exported(), json!("copy"));
        yard.client.run("job-complete", json!({"id": "j"}));
        yard.client.wait_for("j", "null");
        assert_eq!(yard.exported(), json!(target));
        writer.goes_on(50);
        let model = writer.end();
        let image = if target == "raw" {
            "copy.raw"
        } else {
            "copy.qcow2"
        };
        yard.end(image, &model);
    }
}

#[test]
fn a_mirror_that_is_cancelled_leaves_a_copy_and_its_writers() {
    let Some(mut yard) = Yard::new() else { return };
    let writer = yard.writer(5);
    let job = json!({"job-id": "j", "device": "top", "target": "raw", "sync": "full",
        "copy-mode": "write-blocking"});
    yard.client.run("blockdev-mirror", job);
    yard.client.wait_for("j", "ready");
    writer.goes_on(30);
    let model = writer.end();
    yard.client.run("job-cancel", json!({"id": "j"}));
    yard.client.wait_for("j", "null");
    assert_eq!(yard.exported(), json!("top"));
    let copy = std::fs::read(yard.daemon.path("copy.raw")).expect("read");
    assert!(copy == model, "the copy is another");
    let writer = yard.writer(6);
    writer.goes_on(30);
    let model = writer.end();
    yard.end("top.qcow2", &model);
}

#[test]
fn commits_and_streams_run_below_writers() {
    let stream = json!({"job-id": "j", "device": "top"});
    let commit = json!({"job-id": "j", "device": "top", "top-node": "mid", "base-node": "base"});
    for (number, (command, job)) in [("block-stream", stream), ("block-commit", commit)]
        .into_iter()
        .enumerate()
    {
        let Some(mut yard) = Yard::new() else { return };
        let writer = yard.writer(1000 + number as u64);
        writer.goes_on(10);
        yard.client.run(command, job);
        yard.client.wait_for("j", "null");
        writer.goes_on(30);
        let model = writer.end();
        yard.end("top.qcow2", &model);
    }
}

#[test]
fn the_commit_of_the_top_takes_its_writers_down() {
    let Some(mut yard) = Yard::new() else { return };
    let writer = yard.writer(77);
    let job = json!({"job-id": "j", "device": "top", "base-node": "base"});
    yard.client.run("block-commit", job);
    yard.client.wait_for("j", "ready");
    writer.goes_on(50);
    yard.client.run("job-complete", json!({"id": "j"}));
    yard.client.wait_for("j", "null");
    assert_eq!(yard.exported(), json!("base"));
    writer.goes_on(50);
    let model = writer.end();
    yard.end("base.qcow2", &model);
}

#[test]
fn an_overlay_comes_between_and_is_committed_again() {
    let Some(mut yard) = Yard::new() else { return };
    let writer = yard.writer(99);
    for number in 0..3 {
        let name = format!("over{number}");
        let device = yard.exported();
        let file = yard.daemon.path(&format!("{name}.qcow2"));
        yard.client.run(
            "blockdev-snapshot-sync",
            json!({"node-name": device, "snapshot-file": file, "snapshot-node-name": name}),
        );
        assert_eq!(yard.exported(), json!(name));
        writer.goes_on(30);
        let job = json!({"job-id": "j", "device": name, "base-node": "top"});
        yard.client.run("block-commit", job);
        yard.client.wait_for("j", "ready");
        yard.client.run("job-complete", json!({"id": "j"}));
        yard.client.wait_for("j", "null");
        assert_eq!(yard.exported(), json!("top"));
        writer.goes_on(30);
    }
    let model = writer.end();
    yard.end("top.qcow2", &model);
}

/// What a backup needs may have to change its thread first, which must not happen while its filter keeps writers waiting.
#[test]
fn backups_begin_beside_reopens_of_their_source() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    image(folder.path(), "one.qcow2", &[]);
    image(folder.path(), "two.qcow2", &[]);
    overlay(folder.path(), "over.qcow2", "one.qcow2", "qcow2");
    hole_file(&folder.path().join("copy.raw"), LENGTH);
    let daemon = Daemon::start_in(folder, &["--data-threads", "2"]);
    let mut client = daemon.client();
    client.run("blockdev-add", qcow2("one", json!(null)));
    client.run("blockdev-add", qcow2("two", json!(null)));
    let file = json!({"driver": "file", "node-name": "file", "filename": "over.qcow2"});
    client.run("blockdev-add", file);
    let over = |backing| json!({"driver": "qcow2", "node-name": "over", "file": "file", "backing": backing});
    client.run("blockdev-add", over("one"));
    start_server(&daemon, &mut client, 100);
    export(&mut client, "over");
    let half = LENGTH / 2;
    let writers = [(0..half, 7), (half..LENGTH, 8)]
        .map(|(part, seed)| Writer::start(daemon.path("nbd.sock"), "over", part, seed));
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let ends = SetAtEnd(&is_over);
        scope.spawn(|| {
            let mut other = daemon.client();
            let backings = ["two", "one"].into_iter().cycle();
            for backing in backings.take_while(|_| !is_over.load(Ordering::Relaxed)) {
                let reply = other.command("blockdev-reopen", json!({"options": [over(backing)]}));
                let text = reply["error"]["desc"].as_str().unwrap_or_default();
                assert!(!text.contains("do not end within"), "{text}");
            }
        });
        for number in 0..12 {
            let node = format!("copy{number}");
            let copy = json!({"driver": "file", "node-name": node, "filename": "copy.raw"});
            client.run("blockdev-add", copy);
            client.run(
                "blockdev-backup",
                json!({"job-id": "b", "device": "over", "target": node, "sync": "full", "auto-dismiss": false}),
            );
            client.wait_for("b", "concluded");
            client.run("job-dismiss", json!({"id": "b"}));
            client.run("blockdev-del", json!({"node-name": node}));
        }
        drop(ends);
    });
    for writer in writers {
        writer.end();
    }
    daemon.quit_by(client);
}

/// While a mirror is pending its writers wait for what its client decides. Nobody waits for them, and what they were answered is there.
#[test]
fn who_waits_for_a_pending_mirror_holds_nothing_up() {
    for by in ["quit", "SIGTERM", "nbd-server-stop", "block-export-del"] {
        let Some(mut yard) = Yard::new() else { return };
        let socket = yard.daemon.path("nbd.sock");
        let writer = std::thread::spawn(move || {
            let mut nbd = Nbd::open(&socket, "top");
            let mut count = 0_usize;
            while nbd.try_write(
                (count % 1000) as u64 * 512,
                &[(count / 1000) as u8 | 128; 512],
            ) {
                count += 1;
            }
            count
        });
        let job = json!({"job-id": "j", "device": "top", "target": "copy", "sync": "full",
            "auto-finalize": false});
        yard.client.run("blockdev-mirror", job);
        yard.client.wait_for("j", "ready");
        yard.client.run("job-complete", json!({"id": "j"}));
        yard.client.wait_for("j", "pending");
        let begun = Instant::now();
        let arguments = match by {
            "block-export-del" => json!({"id": "top", "mode": "hard"}),
            _ => json!({}),
        };
        match by {
            "SIGTERM" => yard.daemon.terminate(),
            command => drop(yard.client.run(command, arguments)),
        }
        let count = writer.join().expect("the writer");
        let folder = match by {
            "quit" | "SIGTERM" => {
                yard.client.end();
                yard.daemon.ended()
            }
            _ => yard.daemon.quit_by(yard.client),
        };
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(20), "{by}: {took:?}");
        let disk = disk_of(folder.path(), "top.qcow2", "qcow2");
        for (place, found) in disk.chunks(512).take(1000.min(count)).enumerate() {
            let round = (count - 1 - place) / 1000;
            assert_eq!(found, [round as u8 | 128; 512], "{by}: {place} of {count}");
        }
        let check = ["check", "-q", "-f", "qcow2", "top.qcow2"];
        run(folder.path(), "qemu-img", &check);
    }
}
