//! Chains that move between data threads: with jobs and overlays that join them, by command, under the same locks, and staying
//! where they are when they cannot move.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::chains::{on, with};
use crate::client::Client;
use crate::daemon::Daemon;
use crate::images::{SIZE, chain, image, overlay, run};
use crate::oracle::hole_file;
use crate::script::locked_bytes;
use crate::tools;

/// Far more threads than nodes, so that every chain begins on a thread of its own.
const THREADS: [&str; 2] = ["--data-threads", "8"];

fn daemon_with_chain() -> Option<Daemon> {
    if !tools::have("qemu-img", "qemu-utils") {
        return None;
    }
    let daemon = Daemon::start_with(&THREADS);
    let folder = daemon.folder.path();
    chain(folder);
    run(
        folder,
        "qemu-img",
        &["convert", "-O", "raw", "top.qcow2", "expected.raw"],
    );
    Some(daemon)
}

fn raw(name: &str, file: &str) -> Value {
    json!({"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": file}})
}

/// Copies a node to a new raw file and compares.
fn shows_what_it_should(client: &mut Client, folder: &Path, node: &str) {
    let copy = folder.join("copy.raw");
    hole_file(&copy, SIZE);
    client.run("blockdev-add", raw("copy", "copy.raw"));
    let job = json!({"job-id": "copying", "device": node, "target": "copy", "sync": "full"});
    client.run("blockdev-backup", job);
    client.wait_for("copying", "null");
    client.run("blockdev-del", json!({"node-name": "copy"}));
    let (expected, copied) = (fs::read(folder.join("expected.raw")), fs::read(&copy));
    assert!(expected.expect("read") == copied.expect("read"));
    fs::remove_file(copy).expect("removed");
    client.events.clear();
}

#[test]
fn a_chain_goes_where_it_is_sent_and_keeps_its_locks() {
    let Some(daemon) = daemon_with_chain() else {
        return;
    };
    let folder = daemon.folder.path();
    let mut client = daemon.client();
    client.run("object-add", json!({"qom-type": "iothread", "id": "io0"}));
    client.run("blockdev-add", on("top", "top.qcow2"));
    let locks = |name: &str| locked_bytes(&daemon.path(name));
    let before = (locks("top.qcow2"), locks("base.qcow2"));
    for iothread in [json!("io0"), Value::Null, json!("io0"), json!("io0")] {
        let command = json!({"node-name": "top", "iothread": iothread});
        client.run("x-blockdev-set-iothread", command);
        assert_eq!((locks("top.qcow2"), locks("base.qcow2")), before);
        shows_what_it_should(&mut client, folder, "top");
    }
    // An object takes nothing with it.
    client.run("object-del", json!({"id": "io0"}));
    shows_what_it_should(&mut client, folder, "top");
    client.run("blockdev-del", json!({"node-name": "top"}));
    assert_eq!(locks("top.qcow2"), Vec::<String>::new());
    daemon.quit();
}

/// What was written to an image, and is in nobody's memory but its node's, is there on the other thread.
#[test]
fn an_image_brings_along_what_was_written_to_it() {
    let Some(daemon) = daemon_with_chain() else {
        return;
    };
    let folder = daemon.folder.path();
    image(
        folder,
        "t.qcow2",
        &["-o", "lazy_refcounts=on,cluster_size=4k"],
    );
    let mut client = daemon.client();
    client.run("object-add", json!({"qom-type": "iothread", "id": "io0"}));
    client.run("blockdev-add", on("top", "top.qcow2"));
    client.run("blockdev-add", on("t", "t.qcow2"));
    let job = json!({"job-id": "j", "device": "top", "target": "t", "sync": "full"});
    client.run("blockdev-backup", job);
    client.wait_for("j", "null");
    let send = json!({"node-name": "t", "iothread": "io0"});
    client.run("x-blockdev-set-iothread", send);
    shows_what_it_should(&mut client, folder, "t");
    client.run("blockdev-del", json!({"node-name": "t"}));
    run(folder, "qemu-img", &["check", "-q", "t.qcow2"]);
    run(
        folder,
        "qemu-img",
        &["compare", "-q", "-U", "t.qcow2", "expected.raw"],
    );
    daemon.quit();
}

#[test]
fn overlays_join_what_they_stand_on() {
    let Some(daemon) = daemon_with_chain() else {
        return;
    };
    let folder = daemon.folder.path();
    let mut client = daemon.client();
    let file =
        |name: &str, file: &str| json!({"driver": "file", "node-name": name, "filename": file});
    let null = |name: &str| json!({"driver": "null-co", "node-name": name, "size": SIZE});
    // Each on a thread of its own.
    client.run("blockdev-add", on("base", "base.qcow2"));
    client.run("blockdev-add", file("midf", "mid.qcow2"));
    client.run("blockdev-add", file("topf", "top.qcow2"));
    let mid = json!({"driver": "qcow2", "node-name": "mid", "file": "midf", "backing": "base"});
    client.run("blockdev-add", mid);
    let top = json!({"driver": "qcow2", "node-name": "top", "file": "topf", "backing": "mid"});
    client.run("blockdev-add", top.clone());
    shows_what_it_should(&mut client, folder, "top");
    client.run("blockdev-del", json!({"node-name": "top"}));

    // With a job on one side the other one moves, whichever it is.
    client.run("blockdev-add", null("n1"));
    client.run("blockdev-add", null("n2"));
    let job = |name: &str, device: &str, target: &str| json!({"job-id": name, "device": device, "target": target, "sync": "full", "auto-finalize": false});
    let read_only = with(top, json!({"read-only": true}));
    for (device, other) in [("mid", "topf"), ("topf", "mid")] {
        client.run("object-add", json!({"qom-type": "iothread", "id": "io0"}));
        let away = json!({"node-name": other, "iothread": "io0"});
        client.run("x-blockdev-set-iothread", away);
        let size = fs::metadata(daemon.path("top.qcow2"))
            .expect("a file")
            .len();
        let target = match device {
            "mid" => "n1",
            _ => "n3",
        };
        let target_node = json!({"driver": "null-co", "node-name": "n3", "size": size});
        client.run("blockdev-add", target_node);
        client.run("blockdev-backup", job("j", device, target));
        client.wait_for("j", "pending");
        client.run("blockdev-add", read_only.clone());
        client.run("job-finalize", json!({"id": "j"}));
        client.wait_for("j", "null");
        client.events.clear();
        shows_what_it_should(&mut client, folder, "top");
        for node in ["top", "n3"] {
            client.run("blockdev-del", json!({"node-name": node}));
        }
        client.run("object-del", json!({"id": "io0"}));
    }

    // With jobs on both they stay apart, and nothing of the overlay stays.
    client.run("object-add", json!({"qom-type": "iothread", "id": "io0"}));
    let away = json!({"node-name": "topf", "iothread": "io0"});
    client.run("x-blockdev-set-iothread", away);
    let size = fs::metadata(daemon.path("top.qcow2"))
        .expect("a file")
        .len();
    let target = json!({"driver": "null-co", "node-name": "n3", "size": size});
    client.run("blockdev-add", target);
    // One after the other: waiting for one job passes over what the others tell meanwhile.
    for (name, device, target) in [("j", "mid", "n1"), ("k", "topf", "n3")] {
        client.run("blockdev-backup", job(name, device, target));
        client.wait_for(name, "pending");
    }
    let refused = client.refusal("blockdev-add", read_only.clone());
    assert!(refused.contains("different data threads"), "{refused}");
    for name in ["j", "k"] {
        client.run("job-finalize", json!({"id": name}));
        client.wait_for(name, "null");
    }
    client.run("blockdev-add", read_only);
    shows_what_it_should(&mut client, folder, "top");
    daemon.quit();
}

/// An image that cannot be read again stays where it is, with all that is connected, and goes on.
#[test]
fn what_cannot_move_stays() {
    let Some(daemon) = daemon_with_chain() else {
        return;
    };
    let folder = daemon.folder.path();
    let mut client = daemon.client();
    client.run("object-add", json!({"qom-type": "iothread", "id": "io0"}));
    client.run("blockdev-add", on("top", "top.qcow2"));
    // Somebody who cares for no lock.
    let vandal = OpenOptions::new()
        .write(true)
        .open(daemon.path("mid.qcow2"));
    let vandal = vandal.expect("opened");
    vandal.write_all_at(b"gone", 0).expect("written");
    let send = json!({"node-name": "top", "iothread": "io0"});
    let refused = client.refusal("x-blockdev-set-iothread", send.clone());
    assert_eq!(refused, "Image is not in qcow2 format");
    shows_what_it_should(&mut client, folder, "top");
    client.run("object-del", json!({"id": "io0"}));
    client.run("object-add", json!({"qom-type": "iothread", "id": "io0"}));
    vandal.write_all_at(b"QFI\xfb", 0).expect("written");
    client.run("x-blockdev-set-iothread", send);
    shows_what_it_should(&mut client, folder, "top");
    daemon.quit();
}

/// Clients that move, use, build on, take away and look at the same chain at once: some are refused, none meets a bug, and in
/// the end everything is there.
#[test]
fn many_clients_at_one_chain() {
    const ROUNDS: usize = 40;
    let Some(daemon) = daemon_with_chain() else {
        return;
    };
    let folder = daemon.folder.path();
    for name in ["over1", "over2"] {
        overlay(folder, &format!("{name}.qcow2"), "top.qcow2", "qcow2");
    }
    let mut client = daemon.client();
    for id in ["io0", "io1"] {
        client.run("object-add", json!({"qom-type": "iothread", "id": id}));
    }
    client.run("blockdev-add", on("top", "top.qcow2"));
    let null = |name: &str| json!({"driver": "null-co", "node-name": name, "size": SIZE});
    for name in ["n1", "n2"] {
        client.run("blockdev-add", null(name));
    }
    let attempt = |client: &mut Client, command: &str, arguments: Value| {
        let reply = client.command(command, arguments);
        let text = reply["error"]["desc"].as_str().unwrap_or("");
        assert!(!text.contains("bug"), "{command}: {text}");
        reply.get("error").is_none()
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = daemon.client();
            for round in 0..ROUNDS {
                let iothread = [json!("io0"), json!("io1"), Value::Null][round % 3].clone();
                let command = json!({"node-name": "top", "iothread": iothread, "force": true});
                attempt(&mut client, "x-blockdev-set-iothread", command);
            }
        });
        for name in ["over1", "over2"] {
            let daemon = &daemon;
            scope.spawn(move || {
                let mut client = daemon.client();
                for _ in 0..ROUNDS {
                    let node = with(
                        on(name, &format!("{name}.qcow2")),
                        json!({"backing": "top"}),
                    );
                    if attempt(&mut client, "blockdev-add", node) {
                        let size = json!({"node-name": name, "size": SIZE});
                        attempt(&mut client, "block_resize", size);
                        let deleted = json!({"node-name": name});
                        while !attempt(&mut client, "blockdev-del", deleted.clone()) {}
                    }
                }
            });
        }
        for (name, target) in [("j1", "n1"), ("j2", "n2")] {
            let daemon = &daemon;
            scope.spawn(move || {
                let mut client = daemon.client();
                for _ in 0..ROUNDS {
                    let job =
                        json!({"job-id": name, "device": "top", "target": target, "sync": "full"});
                    if attempt(&mut client, "blockdev-backup", job) {
                        client.wait_for(name, "null");
                        client.events.clear();
                    }
                }
            });
        }
        scope.spawn(|| {
            let mut client = daemon.client();
            for _ in 0..ROUNDS {
                let nodes = client.run("query-named-block-nodes", json!({}));
                let nodes = nodes.as_array().expect("a list");
                // Three layers and their files are always there.
                let layers = nodes.iter().filter(|node| node["drv"] == "qcow2");
                assert!(layers.count() >= 3);
                client.run("x-debug-query-block-graph", json!({}));
            }
        });
    });
    shows_what_it_should(&mut client, folder, "top");
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    assert_eq!(nodes.as_array().map(Vec::len), Some(8));
    daemon.quit();
}
