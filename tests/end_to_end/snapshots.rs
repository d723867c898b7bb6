//! Internal snapshots: over QMP, on both daemons, and by `blockyard snapshot`, beside `qemu-img snapshot`.

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use serde_json::{Value, json};

use crate::chains::with;
use crate::client::Client;
use crate::daemon::Daemon;
use crate::images::{image, run};
use crate::nbd::{Nbd, export, start_server};
use crate::place::{MIB, Place, code, complaint};
use crate::tools::have_oracle;

const CREATE: &str = "blockdev-snapshot-internal-sync";
const DELETE: &str = "blockdev-snapshot-delete-internal-sync";

fn add(client: &mut Client, name: &str, driver: &str, read_only: bool) {
    let file = json!({"driver": "file", "filename": format!("{name}.img")});
    client.run(
        "blockdev-add",
        json!({"driver": driver, "node-name": name, "read-only": read_only, "file": file}),
    );
}

/// Ids and names of the snapshots that a query shows.
fn shown(client: &mut Client, node: &str) -> Vec<(Value, Value)> {
    let nodes = client.run("query-named-block-nodes", json!({}));
    let nodes = nodes.as_array().expect("a list").clone();
    let node = nodes.into_iter().find(|one| one["node-name"] == node);
    let snapshots = node.expect("it is there")["image"]["snapshots"].clone();
    let snapshots = snapshots.as_array().cloned().unwrap_or_default();
    snapshots
        .iter()
        .map(|one| (one["id"].clone(), one["name"].clone()))
        .collect()
}

/// A reply without the times in it, which are those of the test.
fn asked(client: &mut Client, command: &str, arguments: Value) -> Value {
    let mut reply = client.command(command, arguments);
    for name in ["date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"] {
        let time = reply
            .get_mut("return")
            .and_then(|value| value.get_mut(name));
        if let Some(time) = time {
            assert!(time.is_u64());
            *time = json!(0);
        }
    }
    reply
}

/// What both daemons are asked, and what comes of it.
fn script(daemon: &Daemon) -> Vec<Value> {
    let folder = daemon.path("");
    image(&folder, "n.img", &[]);
    image(&folder, "t.img", &[]);
    image(&folder, "ro.img", &[]);
    image(&folder, "narrow.img", &["-o", "refcount_bits=1"]);
    image(&folder, "outside.img", &["-o", "data_file=outside.data"]);
    std::fs::write(folder.join("raw.img"), [0; 4096]).expect("written");
    for name in ["n.img", "narrow.img"] {
        run(
            &folder,
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 1 0 1M", name],
        );
    }
    let mut client = daemon.client();
    for name in ["n", "t", "narrow", "outside"] {
        add(&mut client, name, "qcow2", false);
    }
    add(&mut client, "ro", "qcow2", true);
    add(&mut client, "raw", "raw", false);
    client.run(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "null"}),
    );
    let mut told = Vec::new();
    let mut ask = |client: &mut Client, command: &str, arguments: Value| {
        told.push(asked(client, command, arguments));
    };
    for device in ["n", "ro", "raw", "null", "narrow", "outside", "nope", ""] {
        for name in ["one", "", "one"] {
            ask(&mut client, CREATE, json!({"device": device, "name": name}));
        }
    }
    ask(&mut client, CREATE, json!({"device": "n"}));
    ask(&mut client, CREATE, json!({"device": "n", "name": "two"}));
    ask(&mut client, CREATE, json!({"device": "n", "name": "1"}));
    told.push(json!(shown(&mut client, "n")));
    let mut ask = |client: &mut Client, arguments: Value| {
        told.push(asked(client, DELETE, arguments));
    };
    for device in ["n", "ro", "raw", "null", "outside", "nope"] {
        ask(&mut client, json!({"device": device}));
        ask(&mut client, json!({"device": device, "name": "nope"}));
        ask(&mut client, json!({"device": device, "id": "9"}));
        ask(
            &mut client,
            json!({"device": device, "id": "2", "name": "one"}),
        );
    }
    ask(
        &mut client,
        json!({"device": "n", "id": "2", "name": "two"}),
    );
    ask(&mut client, json!({"device": "n", "name": "1"}));
    client.run(
        "blockdev-backup",
        json!({"job-id": "j", "device": "n", "target": "t", "sync": "full", "speed": 1}),
    );
    for device in ["n", "t"] {
        ask(&mut client, json!({"device": device, "name": "one"}));
    }
    client.run("job-cancel", json!({"id": "j"}));
    client.wait_for("j", "null");
    ask(&mut client, json!({"device": "n", "id": "1"}));
    told.push(json!(shown(&mut client, "n")));
    told.extend(through_filters(&mut client));
    told
}

/// The same through nodes that pass everything on to the image.
fn through_filters(client: &mut Client) -> Vec<Value> {
    client.run(
        "object-add",
        json!({"qom-type": "throttle-group", "id": "g"}),
    );
    let mut told = Vec::new();
    for (image, driver, more) in [
        ("t", "throttle", json!({"throttle-group": "g", "file": "t"})),
        (
            "t",
            "throttle",
            json!({"throttle-group": "g", "file": "t", "read-only": true}),
        ),
        ("t", "blkdebug", json!({"image": "t"})),
        ("t", "copy-on-read", json!({"file": "t"})),
        ("t", "raw", json!({"file": "t"})),
        (
            "t",
            "copy-before-write",
            json!({"file": "t", "target": "n"}),
        ),
        (
            "t",
            "throttle",
            json!({"throttle-group": "g", "file": {"driver": "blkdebug", "image": "t"}}),
        ),
        (
            "raw",
            "throttle",
            json!({"throttle-group": "g", "file": "raw"}),
        ),
        ("raw", "blkdebug", json!({"image": "raw"})),
    ] {
        let node = with(json!({"driver": driver, "node-name": "above"}), more);
        client.run("blockdev-add", node);
        for (device, name) in [("above", "s"), ("above", "s"), ("above", ""), (image, "s")] {
            let arguments = json!({"device": device, "name": name});
            told.push(asked(client, CREATE, arguments));
        }
        for node in [image, "above"] {
            told.push(json!(shown(client, node)));
        }
        for arguments in [
            json!({"device": "above"}),
            json!({"device": "above", "name": "nope"}),
            json!({"device": image, "name": "s"}),
            json!({"device": "above", "name": "s"}),
        ] {
            told.push(asked(client, DELETE, arguments));
        }
        told.push(json!(shown(client, image)));
        client.run("blockdev-del", json!({"node-name": "above"}));
    }
    told
}

/// What was written before through a filter is in the snapshot, and what comes later is not, while others write all the time.
#[test]
fn a_snapshot_below_a_filter_is_taken_beside_its_writers() {
    if !have_oracle() {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.path("");
    image(&folder, "n.img", &[]);
    let mut client = daemon.client();
    client.run(
        "object-add",
        json!({"qom-type": "throttle-group", "id": "g", "x-iops-write": 200}),
    );
    add(&mut client, "n", "qcow2", false);
    let above = json!({"driver": "throttle", "node-name": "above", "throttle-group": "g",
        "file": "n"});
    client.run("blockdev-add", above);
    start_server(&daemon, &mut client, 4);
    export(&mut client, "above");
    let mut writer = Nbd::open(&daemon.path("nbd.sock"), "above");
    writer.write(0, &[1; 65_536], 0);
    let path = daemon.path("nbd.sock");
    let beside = std::thread::spawn(move || {
        let mut other = Nbd::open(&path, "above");
        for nth in 0..100_u64 {
            other.write(MIB + nth * 4096, &[3; 4096], 0);
        }
    });
    for name in ["one", "two", "three"] {
        client.run(CREATE, json!({"device": "above", "name": name}));
    }
    writer.write(0, &[2; 65_536], 0);
    beside.join().expect("it has written");
    client.run(DELETE, json!({"device": "above", "name": "two"}));
    client.run("block-export-del", json!({"id": "above", "mode": "hard"}));
    let _folder = daemon.quit_by(client);
    run(&folder, "qemu-img", &["check", "-f", "qcow2", "n.img"]);
    let shows = |pattern| {
        let read = format!("read -q -P {pattern} 0 64k");
        run(&folder, "qemu-io", &["-f", "qcow2", "-c", &read, "n.img"]);
    };
    shows(2);
    let all = "read -q -P 3 1M 400k";
    run(&folder, "qemu-io", &["-f", "qcow2", "-c", all, "n.img"]);
    for name in ["one", "three"] {
        run(&folder, "qemu-img", &["snapshot", "-a", name, "n.img"]);
        shows(1);
    }
}

#[test]
fn both_daemons_make_and_delete_the_same_snapshots() {
    if !have_oracle() {
        return;
    }
    let ours = Daemon::start();
    let theirs = Daemon::start_oracle_with(&[]);
    let (our_replies, their_replies) = (script(&ours), script(&theirs));
    for (one, other) in our_replies.iter().zip(&their_replies) {
        assert_eq!(one, other);
    }
    assert_eq!(our_replies.len(), their_replies.len());
    theirs.quit();
    // What was promised is durable. The kernel may close the files of a process later than it ends.
    let folder = ours.kill();
    run(
        folder.path(),
        "qemu-img",
        &["check", "-U", "-f", "qcow2", "n.img"],
    );
}

#[test]
fn a_snapshot_holds_what_the_disk_held() {
    if !have_oracle() {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.path("");
    for name in ["n.img", "later.img"] {
        image(&folder, name, &[]);
    }
    run(
        &folder,
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 1 0 3M", "n.img"],
    );
    run(
        &folder,
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 2 1M 2M", "later.img"],
    );
    std::fs::copy(folder.join("n.img"), folder.join("before.img")).expect("copied");
    let mut client = daemon.client();
    add(&mut client, "n", "qcow2", false);
    add(&mut client, "later", "qcow2", true);
    client.run(CREATE, json!({"device": "n", "name": "before"}));
    client.run(
        "blockdev-backup",
        json!({"job-id": "j", "device": "later", "target": "n", "sync": "full"}),
    );
    client.wait_for("j", "null");
    client.run("blockdev-del", json!({"node-name": "n"}));
    let compare = |one: &str, other: &str| {
        run(
            &folder,
            "qemu-img",
            &["compare", "-f", "qcow2", "-F", "qcow2", one, other],
        );
    };
    compare("n.img", "later.img");
    run(&folder, "qemu-img", &["check", "-f", "qcow2", "n.img"]);
    run(&folder, "qemu-img", &["snapshot", "-a", "before", "n.img"]);
    compare("n.img", "before.img");
    daemon.quit();
}

/// What `qemu-img snapshot` prints, what it complains of, and its exit code.
fn qemu_img(place: &Place, arguments: &[&str]) -> (String, String, i32) {
    let mut command = Command::new("qemu-img");
    command
        .arg("snapshot")
        .args(arguments)
        .env("TZ", "UTC")
        .current_dir(place.folder.path());
    told(&command.output().expect("it runs"))
}

fn told(output: &std::process::Output) -> (String, String, i32) {
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    // The first line, without the name of the program and what ours says in brackets.
    let complaint = complaint(output);
    let line = complaint.lines().next().unwrap_or_default();
    let line = line.split_once(": ").map_or(line, |(_, rest)| rest);
    let line = line.split(" (").next().unwrap_or_default();
    (printed, line.to_owned(), code(output))
}

#[test]
fn the_command_does_what_qemu_img_does() {
    if !have_oracle() {
        return;
    }
    let place = Place::new();
    let folder = place.folder.path();
    for name in ["ours", "theirs"] {
        image(folder, name, &["-o", "cluster_size=4k"]);
    }
    image(folder, "narrow", &["-o", "refcount_bits=1"]);
    std::fs::write(folder.join("raw"), [0; 4096]).expect("written");
    run(
        folder,
        "qemu-io",
        &["-f", "qcow2", "-c", "write 0 1M", "narrow"],
    );
    let both = |arguments: &[&str], ours: &str, theirs: &str| {
        let with = |file| [&["snapshot"], arguments, &[file]].concat();
        let one = told(&place.run(&with(ours)));
        let other = qemu_img(&place, &[arguments, &[theirs]].concat());
        assert_eq!(one, other, "{arguments:?} {ours}");
    };
    let write = |what: &str| {
        for name in ["ours", "theirs"] {
            run(folder, "qemu-io", &["-f", "qcow2", "-c", what, name]);
        }
    };
    let same_disks = || {
        let arguments = ["compare", "-f", "qcow2", "-F", "qcow2", "ours", "theirs"];
        run(folder, "qemu-img", &arguments);
        run(folder, "qemu-img", &["check", "-f", "qcow2", "ours"]);
    };
    both(&["-l"], "ours", "theirs");
    write("write -P 1 0 1M");
    both(&["-c", "one"], "ours", "theirs");
    write("write -P 2 512k 1M");
    both(&["-c", "two"], "ours", "theirs");
    both(&["-c", "one"], "ours", "theirs");
    write("write -z 0 64k");
    both(&["-a", "one"], "ours", "theirs");
    same_disks();
    both(&["-a", "2"], "ours", "theirs");
    same_disks();
    for wrong in [["-a", "nope"], ["-d", "nope"], ["-d", "2"]] {
        both(&wrong, "ours", "theirs");
    }
    let blocks = || {
        std::fs::metadata(place.path("ours"))
            .expect("there")
            .blocks()
    };
    let before = blocks();
    both(&["-d", "one"], "ours", "theirs");
    same_disks();
    // What only that snapshot had, 512 KiB, went back to the file system.
    assert!(blocks() + 800 < before, "{} of {before}", blocks());
    for name in ["ours", "theirs"] {
        for arguments in [&["-l"][..], &[], &["-U", "-l"]] {
            both(arguments, name, name);
        }
    }
    both(&["-c", "x"], "narrow", "narrow");
    for deed in [
        &["-f", "raw", "-l"][..],
        &["-f", "raw", "-c", "x"],
        &["-f", "raw", "-a", "x"],
        &["-f", "raw", "-d", "x"],
    ] {
        both(deed, "raw", "raw");
    }
    for wrong in [
        &["-c", "x", "-d", "x", "ours"][..],
        &["-c", "x"],
        &["-U", "-c", "x", "ours"],
        &["-l", "nowhere"],
    ] {
        let output = place.run(&[&["snapshot"], wrong].concat());
        assert_eq!(code(&output), 1, "{wrong:?}");
    }
    let listed = place.succeed(&["snapshot", "--json", "ours"]);
    let listed: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    let names: Vec<&Value> = listed
        .as_array()
        .expect("a list")
        .iter()
        .map(|snapshot| &snapshot["name"])
        .collect();
    assert_eq!(names, ["two", "one"]);
}
