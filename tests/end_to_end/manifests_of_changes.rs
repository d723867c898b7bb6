//! Manifests of jobs that copy a part of a disk: they tell of all of it, whether the rest is read or taken over from the manifest before.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::chains::with;
use crate::client::Client;
use crate::daemon::Daemon;
use crate::images::run;
use crate::nbd::{Nbd, export, start_server};
use crate::oracle::{data_file, hole_file};
use crate::place::MIB;
use crate::tools;

const LENGTH: u64 = 8 * MIB;

/// A disk that is exported, and a full copy of it with a manifest; a bitmap has recorded since then.
fn start() -> (Daemon, Client) {
    let folder = tempfile::tempdir().expect("a folder");
    data_file(&folder.path().join("disk.raw"), LENGTH);
    hole_file(&folder.path().join("copy.raw"), LENGTH);
    let daemon = Daemon::start_in(folder, &[]);
    let mut client = daemon.client();
    for (node, file) in [("disk", "disk.raw"), ("copy", "copy.raw")] {
        let node = json!({"driver": "file", "node-name": node, "filename": file});
        client.run("blockdev-add", node);
    }
    start_server(&daemon, &mut client, 100);
    export(&mut client, "disk");
    let actions = json!([
        {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "b"}},
        {"type": "blockdev-backup", "data": job(json!({"sync": "full", "x-manifest": "full"}))},
    ]);
    client.run("transaction", json!({"actions": actions}));
    client.wait_for("j", "null");
    (daemon, client)
}

fn job(more: Value) -> Value {
    with(
        json!({"job-id": "j", "device": "disk", "target": "copy"}),
        more,
    )
}

fn incremental(more: Value) -> Value {
    let by_bitmap = json!({"sync": "incremental", "bitmap": "b", "x-verify": true});
    with(job(by_bitmap), more)
}

/// Runs a job to its end. Its error, if it has one.
fn finish(client: &mut Client, command: &str, arguments: Value) -> Option<String> {
    client.run(command, with(arguments, json!({"auto-dismiss": false})));
    if command.ends_with("mirror") {
        client.wait_for("j", "ready");
        client.run("block-job-cancel", json!({"device": "j"}));
    }
    client.wait_for("j", "concluded");
    let jobs = client.run("query-jobs", json!({}));
    client.run("job-dismiss", json!({"id": "j"}));
    jobs[0]["error"].as_str().map(str::to_owned)
}

/// The copy is what the manifest says, and a flipped bit of it is named, wherever it is.
fn assert_tells(folder: &Path, manifest: &str, image: &[&str]) {
    let arguments = [&["verify"], image, &[manifest]].concat();
    let verified = tools::run(folder, &arguments, "");
    assert_eq!(verified.code, Some(0), "{manifest}: {}", verified.output);
    if image != ["copy.raw"] {
        return;
    }
    let file = File::options()
        .read(true)
        .write(true)
        .open(folder.join("copy.raw"))
        .expect("open");
    for place in [0, 3 * MIB + 70_000, LENGTH - 1] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, place).expect("read");
        file.write_all_at(&[byte[0] ^ 4], place).expect("written");
        let found = tools::run(folder, &arguments, "");
        let extent = place / 65_536 * 65_536;
        let line = format!("Differs: 65536 bytes at offset {extent}\n");
        assert!(found.output.starts_with(&line), "{}", found.output);
        assert_eq!(found.code, Some(1));
        file.write_all_at(&byte, place).expect("written");
    }
}

#[test]
fn an_increment_has_the_manifest_of_the_whole_disk() {
    let (daemon, mut client) = start();
    let folder = daemon.path("");
    let mut nbd = Nbd::open(&daemon.path("nbd.sock"), "disk");
    let mut before = "full".to_owned();
    for (round, command) in ["blockdev-backup", "blockdev-mirror"]
        .into_iter()
        .cycle()
        .take(4)
        .enumerate()
    {
        let round = round as u64;
        nbd.write(3 * MIB + 65_536 * round, &[7; 1000], 0);
        nbd.write(LENGTH - 512 * (round + 1), &[9; 512], 0);
        let path = |name: &str| daemon.path(name).display().to_string();
        let (onto, whole) = (format!("onto-{round}"), format!("whole-{round}"));
        // Both by the same bitmap: the first one leaves it as it is.
        let never = json!({"sync": "bitmap", "bitmap-mode": "never", "x-manifest": path(&whole)});
        assert_eq!(finish(&mut client, command, incremental(never)), None);
        let more = json!({"x-manifest": path(&onto), "x-onto-manifest": path(&before)});
        assert_eq!(finish(&mut client, command, incremental(more)), None);
        let read = |name: &str| fs::read(daemon.path(name)).expect("a manifest");
        assert!(read(&onto) == read(&whole), "one text for each content");
        assert!(read(&onto) != read(&before), "it has changed");
        assert_tells(&folder, &onto, &["copy.raw"]);
        before = onto;
    }
    let disk = fs::read(daemon.path("disk.raw")).expect("read");
    assert!(disk == fs::read(daemon.path("copy.raw")).expect("read"));
}

/// What goes wrong leaves no manifest, and the bitmap as it was: the next one gets it.
#[test]
fn a_manifest_that_comes_to_nothing_can_be_made_by_the_next_job() {
    for command in ["blockdev-backup", "blockdev-mirror"] {
        let (daemon, mut client) = start();
        let path = |name: &str| daemon.path(name).display().to_string();
        let mut nbd = Nbd::open(&daemon.path("nbd.sock"), "disk");
        nbd.write(2 * MIB, &[7; 1000], 0);
        let onto =
            |before: &str| json!({"x-manifest": path("new"), "x-onto-manifest": path(before)});
        let always = with(
            onto("full"),
            json!({"sync": "bitmap", "bitmap-mode": "always"}),
        );
        assert_eq!(
            client.refusal(command, incremental(always)),
            "x-onto-manifest needs a bitmap that keeps all that has changed if the job fails: \
             bitmap-mode 'on-success' or 'never'"
        );
        let mut damaged = fs::read(daemon.path("full")).expect("read");
        let place = damaged.len() / 2;
        damaged[place] ^= 1;
        fs::write(daemon.path("damaged"), damaged).expect("written");
        for (before, words) in [
            ("missing", "Could not open manifest '"),
            ("damaged", "The manifest cannot be used: "),
            ("disk.raw", "The manifest cannot be used: "),
        ] {
            client.run(
                command,
                with(incremental(onto(before)), json!({"auto-dismiss": false})),
            );
            client.wait_for("j", "concluded");
            let jobs = client.run("query-jobs", json!({}));
            let error = jobs[0]["error"].as_str().expect("it failed").to_owned();
            assert!(error.starts_with(words), "{error}");
            client.run("job-dismiss", json!({"id": "j"}));
        }
        // One is cancelled when all is done.
        let held = with(incremental(onto("full")), json!({"auto-finalize": false}));
        client.run(command, held);
        if command == "blockdev-mirror" {
            client.wait_for("j", "ready");
            client.run("job-complete", json!({"id": "j"}));
        }
        client.wait_for("j", "pending");
        client.run("job-cancel", json!({"id": "j"}));
        client.wait_for("j", "null");
        assert!(!daemon.path("new").exists(), "{command}");
        assert_eq!(
            finish(&mut client, command, incremental(onto("full"))),
            None
        );
        assert_tells(&daemon.path(""), "new", &["copy.raw"]);
        let left = fs::read_dir(daemon.path(""))
            .expect("a folder")
            .filter(|entry| {
                let name = entry.as_ref().expect("an entry").file_name();
                name.to_string_lossy().contains("partial")
            });
        assert_eq!(left.count(), 0, "{command}");
    }
}

/// What the top does not hold is read as well.
#[test]
fn a_copy_of_the_top_has_the_manifest_of_the_whole_disk() {
    if !tools::have("qemu-img", "qemu-utils") || !tools::have("qemu-io", "qemu-utils") {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.path("");
    let create = ["create", "-q", "-f", "qcow2"];
    run(
        &folder,
        "qemu-img",
        &[&create[..], &["base.img", "8M"]].concat(),
    );
    for name in ["top.img", "one.img", "two.img"] {
        let on_base = ["-b", "base.img", "-F", "qcow2", name];
        run(&folder, "qemu-img", &[&create[..], &on_base].concat());
    }
    let write = |pattern, name| run(&folder, "qemu-io", &["-f", "qcow2", "-c", pattern, name]);
    write("write -q -P 1 1M 3M", "base.img");
    write("write -q -P 2 2M 128k", "top.img");
    let mut client = daemon.client();
    for name in ["base", "top", "one", "two"] {
        let file = json!({"driver": "file", "filename": format!("{name}.img")});
        let mut node = json!({"driver": "qcow2", "node-name": name, "file": file});
        if name != "base" {
            node = with(
                node,
                json!({"backing": if name == "top" { json!("base") } else { Value::Null }}),
            );
        }
        client.run("blockdev-add", node);
    }
    for (command, target) in [("blockdev-backup", "one"), ("blockdev-mirror", "two")] {
        let manifest = daemon.path(&format!("of-{target}")).display().to_string();
        let arguments = json!({"job-id": "j", "device": "top", "target": target, "sync": "top",
            "x-manifest": manifest, "x-verify": true});
        assert_eq!(finish(&mut client, command, arguments), None);
    }
    let read = |name: &str| fs::read(daemon.path(name)).expect("a manifest");
    assert!(read("of-one") == read("of-two"), "the same content");
    let _folder = daemon.quit_by(client);
    for name in ["top.img", "one.img", "two.img"] {
        assert_tells(&folder, "of-one", &["-f", "qcow2", name]);
    }
    // Nothing but what the top holds was copied.
    for name in ["one.img", "two.img"] {
        let room = fs::metadata(folder.join(name)).expect("there").len();
        assert!(room < 2 * MIB, "{name}: {room}");
    }
    write("write -q -P 3 2M 512", "one.img");
    let found = tools::run(&folder, &["verify", "-f", "qcow2", "one.img", "of-one"], "");
    let line = "Differs: 65536 bytes at offset 2097152\n";
    assert!(found.output.starts_with(line), "{}", found.output);
}
