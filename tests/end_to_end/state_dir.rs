//! A daemon with a state directory that is killed: its images' persistent bitmaps stay usable, and none says too little.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{Client, DEADLINE};
use crate::daemon::Daemon;
use crate::tools;

const MIB: u64 = 1 << 20;
/// After a crash all of a region counts as changed.
const REGION: u64 = 16 * MIB;
const OPTIONS: [&str; 2] = ["--state-dir", "state"];

fn run(daemon: &Daemon, program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(daemon.folder.path());
    let ended = tools::run_command(command, "");
    assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.errors);
    ended.output
}

/// The next daemon in the folder of one that has ended.
fn next(folder: TempDir, options: &[&str]) -> Daemon {
    for left in ["qmp.sock", "pid", "nbd.sock"] {
        let _ = fs::remove_file(folder.path().join(left));
    }
    Daemon::start_in(folder, options)
}

/// Opens the image as `n`. The kernel takes a killed daemon's ring apart, and with it the open files, a moment after its end.
pub(crate) fn add(client: &mut Client, read_only: bool) {
    let file = json!({"driver": "file", "filename": "i.qcow2"});
    let node = json!({"driver": "qcow2", "node-name": "n", "read-only": read_only, "file": file});
    let started = Instant::now();
    loop {
        let reply = client.command("blockdev-add", node.clone());
        match reply["error"]["desc"].as_str() {
            None => return,
            Some(text) => {
                assert!(text.contains("lock"), "{text}");
                assert!(started.elapsed() < DEADLINE, "{text}");
            }
        }
    }
}

/// The bitmaps of `n` by name: how many bytes have changed, and whether that can be relied on.
fn bitmaps(client: &mut Client) -> Vec<(String, u64, bool)> {
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.as_array().expect("a list").clone();
    let node = nodes.iter().find(|node| node["node-name"] == json!("n"));
    let bitmaps = node.expect("there")["dirty-bitmaps"].as_array().cloned();
    let bitmap = |one: &Value| {
        let name = one["name"].as_str().expect("a name").to_owned();
        let count = one["count"].as_u64().expect("a number");
        (name, count, one["inconsistent"] != json!(true))
    };
    let mut all: Vec<_> = bitmaps.unwrap_or_default().iter().map(bitmap).collect();
    all.sort();
    all
}

/// Writes 4 KiB at each of these offsets, in the background, until the daemon is killed.
fn writer(daemon: &Daemon, client: &mut Client, offsets: impl Iterator<Item = u64>) -> Child {
    let address = json!({"type": "unix", "data": {"path": "nbd.sock"}});
    client.run("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "n", "writable": true});
    client.run("block-export-add", export);
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw", "nbd+unix:///n?socket=nbd.sock"]);
    for (number, offset) in offsets.enumerate() {
        let pattern = 1 + number % 255;
        command.args(["-c", &format!("write -P {pattern} {offset} 4k")]);
    }
    command
        .current_dir(daemon.folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().expect("it starts")
}

fn add_bitmap(client: &mut Client, name: &str) {
    let arguments = json!({"node": "n", "name": name, "persistent": true});
    client.run("block-dirty-bitmap-add", arguments);
}

/// What a bitmap says has changed, copied on top of what the disk was before, is the disk as it is now; whenever the daemon is killed.
#[test]
fn an_incremental_backup_after_a_kill_has_every_write() {
    if !tools::have_oracle() {
        return;
    }
    let mut daemon = Daemon::start_with(&OPTIONS);
    run(
        &daemon,
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "i.qcow2", "256M"],
    );
    for round in 0..6_u64 {
        let _ = fs::remove_file(daemon.path("inc.qcow2"));
        run(
            &daemon,
            "qemu-img",
            &["convert", "-U", "-O", "raw", "i.qcow2", "before.raw"],
        );
        let mut client = daemon.client();
        add(&mut client, false);
        match round {
            0 => add_bitmap(&mut client, "b"),
            _ => {
                client.run(
                    "block-dirty-bitmap-clear",
                    json!({"node": "n", "name": "b"}),
                );
            }
        }
        // Some all over the disk, some within one region.
        let spread = if round % 2 == 0 { 97 * 4096 * 64 } else { 8192 };
        let offsets = (0..2000).map(|number| (round * MIB + number * spread) % (256 * MIB));
        let mut writes = writer(&daemon, &mut client, offsets);
        let enough = (1 + round * 3) * 65_536;
        while bitmaps(&mut client)
            .first()
            .is_none_or(|(_, count, _)| *count < enough)
        {
            let ended = writes.try_wait().expect("it was started");
            assert!(ended.is_none(), "the writer has ended: {ended:?}");
        }
        drop(client);
        let folder = daemon.kill();
        writes.wait().expect("it was started");
        daemon = next(folder, &OPTIONS);
        let mut client = daemon.client();
        // Looked at first, which changes nothing.
        if round % 3 == 0 {
            add(&mut client, true);
            client.run("blockdev-del", json!({"node-name": "n"}));
        }
        add(&mut client, false);
        let all = bitmaps(&mut client);
        let [(name, count, true)] = all.as_slice() else {
            panic!("round {round}: {all:?}");
        };
        assert_eq!(name, "b");
        assert!(*count >= enough, "round {round}: {count}");
        if spread < REGION && round % 2 == 1 {
            // All that was written lies in two regions; with the ones that are set ahead.
            assert!(*count <= 5 * REGION, "round {round}: {count}");
        }
        run(
            &daemon,
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-b",
                "before.raw",
                "-F",
                "raw",
                "inc.qcow2",
            ],
        );
        let file = json!({"driver": "file", "filename": "inc.qcow2"});
        let backing = json!({"driver": "file", "filename": "before.raw", "read-only": true});
        let target = json!({"driver": "qcow2", "node-name": "t", "file": file, "backing": backing});
        client.run("blockdev-add", target);
        let backup = json!({
            "job-id": "j", "device": "n", "target": "t", "sync": "bitmap", "bitmap": "b",
            "bitmap-mode": "on-success", "auto-dismiss": false,
        });
        client.run("blockdev-backup", backup);
        client.wait_for("j", "concluded");
        let jobs = client.run("query-jobs", json!({}));
        assert_eq!(jobs[0].get("error"), None, "{jobs}");
        client.run("job-dismiss", json!({"id": "j"}));
        drop(client);
        // Killed again: what the backup has taken is not taken once more.
        daemon = match round % 2 {
            0 => next(daemon.kill(), &OPTIONS),
            _ => next(daemon.end(), &OPTIONS),
        };
        let mut client = daemon.client();
        add(&mut client, true);
        assert_eq!(bitmaps(&mut client), [("b".to_owned(), 0, true)]);
        drop(client);
        daemon = next(daemon.end(), &OPTIONS);
        let compared = ["compare", "-U", "inc.qcow2", "i.qcow2"];
        run(&daemon, "qemu-img", &compared);
        // A crash may have left clusters that nothing leads to: 3.
        let mut check = Command::new("qemu-img");
        let image = daemon.path("i.qcow2");
        check.args(["check", "-U"]).arg(image);
        let ended = tools::run_command(check, "");
        assert!(matches!(ended.code, Some(0 | 3)), "{}", ended.output);
    }
    daemon.quit();
}

/// Whoever has written meanwhile without recording it makes a record worthless, and so does its loss.
#[test]
fn a_record_does_not_speak_for_a_disk_that_others_have_changed() {
    if !tools::have_oracle() {
        return;
    }
    type Between = fn(&Daemon);
    let cases: [(&str, bool, Between); 6] = [
        ("nobody", true, |_| ()),
        ("qemu-io has looked", true, |daemon| {
            run(daemon, "qemu-io", &["-r", "-c", "read 0 4k", "i.qcow2"]);
        }),
        ("qemu-io has written", false, |daemon| {
            run(daemon, "qemu-io", &["-c", "write 1M 4k", "i.qcow2"]);
        }),
        ("our own commands have", false, |daemon| {
            let program = tools::blockyard();
            let program = program.to_str().expect("text");
            run(daemon, program, &["bitmap", "add", "i.qcow2", "other"]);
        }),
        ("the directory is empty", false, |daemon| {
            fs::remove_dir_all(daemon.path("state/bitmaps")).expect("removed");
            fs::create_dir(daemon.path("state/bitmaps")).expect("made");
        }),
        ("the record is damaged", false, |daemon| {
            for file in fs::read_dir(daemon.path("state/bitmaps")).expect("a folder") {
                let path = file.expect("a file").path();
                let mut bytes = fs::read(&path).expect("read");
                bytes[20] ^= 4;
                fs::write(&path, bytes).expect("written");
            }
        }),
    ];
    for (told, is_good, between) in cases {
        let daemon = Daemon::start_with(&OPTIONS);
        run(
            &daemon,
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "i.qcow2", "64M"],
        );
        let mut client = daemon.client();
        add(&mut client, false);
        add_bitmap(&mut client, "b");
        drop(client);
        // Stored once, so that the image has it too.
        let daemon = next(daemon.end(), &OPTIONS);
        let mut client = daemon.client();
        add(&mut client, false);
        add_bitmap(&mut client, "new");
        drop(client);
        let daemon = next(daemon.kill(), &[]);
        // The image is free once a daemon can open it.
        let mut client = daemon.client();
        add(&mut client, true);
        let without = bitmaps(&mut client);
        assert_eq!(without, [("b".to_owned(), 0, false)], "{told}");
        drop(client);
        let daemon = next(daemon.end(), &[]);
        between(&daemon);
        let daemon = next(daemon.end(), &OPTIONS);
        let mut client = daemon.client();
        add(&mut client, false);
        let all = bitmaps(&mut client);
        match is_good {
            true => {
                let both = ["b", "new"].map(|name| (name.to_owned(), 0, true));
                assert_eq!(all, both, "{told}");
            }
            false => {
                let named = |name: &str| all.iter().find(|one| one.0 == name);
                assert_eq!(named("b"), Some(&("b".to_owned(), 0, false)), "{told}");
                assert_eq!(named("new"), None, "{told}");
            }
        }
        drop(client);
        daemon.quit();
    }
}

#[test]
fn one_daemon_uses_a_state_directory() {
    let daemon = Daemon::start_with(&OPTIONS);
    let state = daemon.path("state");
    let mut second = tools::without_warnings();
    second.args(["daemon", "--state-dir"]).arg(&state);
    let ended = tools::run_command(second, "");
    assert_eq!(ended.code, Some(1));
    let text = format!(
        "blockyard: State directory '{}' is in use by another daemon\n",
        state.display()
    );
    assert_eq!(ended.errors, text);
    let folder = daemon.kill();
    next(folder, &OPTIONS).quit();
}

/// A copy of an image that is being written has its name: it is not taken for the image, and takes nothing away from it.
#[test]
fn a_copy_of_an_image_in_use_is_another_image() {
    if !tools::have_oracle() {
        return;
    }
    let daemon = Daemon::start_with(&OPTIONS);
    run(
        &daemon,
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "i.qcow2", "64M"],
    );
    let mut client = daemon.client();
    add(&mut client, false);
    add_bitmap(&mut client, "b");
    fs::copy(daemon.path("i.qcow2"), daemon.path("copy.qcow2")).expect("copied");
    for read_only in [true, false] {
        let file = json!({"driver": "file", "filename": "copy.qcow2"});
        let node =
            json!({"driver": "qcow2", "node-name": "c", "read-only": read_only, "file": file});
        client.run("blockdev-add", node);
        client.run("blockdev-del", json!({"node-name": "c"}));
    }
    drop(client);
    let daemon = next(daemon.kill(), &OPTIONS);
    let mut client = daemon.client();
    add(&mut client, false);
    assert_eq!(bitmaps(&mut client), [("b".to_owned(), 0, true)]);
    drop(client);
    daemon.quit();
}
