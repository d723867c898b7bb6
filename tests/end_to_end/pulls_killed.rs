//! A real client that pulls what has changed since a checkpoint is killed in the middle: the checkpoint that it had begun comes to
//! nothing, and the next one has all of what had changed, and what has changed since.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};

use crate::checkpoint_crashes::{GRANULE, dirty};
use crate::client::{Client, DEADLINE};
use crate::daemon::Daemon;
use crate::images::run;
use crate::nbd::{Nbd, export, start_server};
use crate::tools;

const LENGTH: u64 = 64 << 20;

fn uri(daemon: &Daemon, export: &str) -> String {
    let socket = daemon.path("nbd.sock");
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

/// Writes these granules as a guest.
fn write(daemon: &Daemon, granules: &[u64], byte: u8) {
    let mut guest = Nbd::open(&daemon.path("nbd.sock"), "a");
    for granule in granules {
        guest.write(granule * GRANULE, &[byte; GRANULE as usize], 0);
    }
}

fn begin(client: &mut Client, number: u64, with_client: bool) {
    let previous = format!("c{}", number - 1);
    let mut disk = json!({"node": "a", "bitmap": format!("c{number}")});
    if number > 1 {
        disk["previous"] = json!(previous);
    }
    client.run(
        "x-checkpoint-begin",
        json!({"id": "x", "disks": [disk], "abort-on-disconnect": with_client}),
    );
}

/// Shows the disk and what had changed, by a node of it.
fn show(client: &mut Client, node: &str) {
    let bitmap = json!([{"node": "a", "name": "x-checkpoint-x"}]);
    client.run(
        "block-export-add",
        json!({"type": "nbd", "id": "pull", "node-name": node, "name": "pull", "bitmaps": bitmap}),
    );
}

/// A client that pulls all of it.
fn pull(daemon: &Daemon, into: &str) -> Child {
    let mut command = Command::new("nbdcopy");
    command
        .args(["--connections=1", "--requests=2", "--request-size=65536"])
        .args([&uri(daemon, "pull"), into])
        .current_dir(daemon.path(""))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().expect("it starts")
}

/// What QEMU's tools say had changed: where the bitmap is set, they show no data.
fn changed_as_qemu_says(daemon: &Daemon) -> Vec<bool> {
    let image = format!(
        "driver=nbd,export=pull,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:x-checkpoint-x",
        daemon.path("nbd.sock").display()
    );
    let mut command = Command::new("qemu-img");
    command.args(["map", "--output=json", "--image-opts", &image]);
    let ended = tools::run_command(command, "");
    assert_eq!(ended.code, Some(0), "{}", ended.errors);
    let extents: Value = serde_json::from_str(&ended.output).expect("JSON");
    let mut changed = vec![false; (LENGTH / GRANULE) as usize];
    for extent in extents.as_array().expect("a list") {
        let number = |name: &str| extent[name].as_u64().expect("a number") / GRANULE;
        for granule in number("start")..number("start") + number("length") {
            changed[granule as usize] = extent["data"] == json!(false);
        }
    }
    changed
}

fn set(granules: &[&[u64]]) -> Vec<bool> {
    let is_set = |granule: u64| granules.iter().any(|some| some.contains(&granule));
    (0..LENGTH / GRANULE).map(is_set).collect()
}

fn content(daemon: &Daemon) -> Vec<u8> {
    let mut disk = Nbd::open(&daemon.path("nbd.sock"), "a");
    let pieces = (0..LENGTH).step_by(1 << 20);
    pieces.flat_map(|at| disk.read(at, 1 << 20)).collect()
}

/// A disk full of data, its first checkpoint, and a backup of that.
fn start() -> Option<(Daemon, Client)> {
    let needed = [
        ("nbdcopy", "libnbd-bin"),
        ("nbdinfo", "libnbd-bin"),
        ("qemu-img", "qemu-utils"),
    ];
    if !needed
        .iter()
        .all(|(tool, package)| tools::have(tool, package))
    {
        return None;
    }
    let daemon = Daemon::start();
    let mut client = daemon.client();
    start_server(&daemon, &mut client, 100);
    let size = (LENGTH >> 20).to_string() + "M";
    run(
        &daemon.path(""),
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "a", &size],
    );
    let file = json!({"driver": "file", "filename": "a"});
    client.run(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "a", "file": file}),
    );
    export(&mut client, "a");
    let all: Vec<u64> = (0..LENGTH / GRANULE).collect();
    write(&daemon, &all, 1);
    begin(&mut client, 1, false);
    client.run("x-checkpoint-commit", json!({"id": "x"}));
    fs::write(daemon.path("backup"), content(&daemon)).expect("written");
    Some((daemon, client))
}

/// Pulls so slowly that it is killed in the middle.
fn kill_a_pull(daemon: &Daemon, between: impl FnOnce()) {
    let mut puller = pull(daemon, "partial");
    let partial = daemon.path("partial");
    let started = Instant::now();
    let has_come = || fs::metadata(&partial).map_or(0, |file| file.blocks() * 512);
    while has_come() < 1 << 20 {
        assert!(started.elapsed() < DEADLINE);
        std::thread::yield_now();
    }
    between();
    assert!(
        puller.try_wait().expect("it was started").is_none(),
        "it was slow"
    );
    puller.kill().expect("killed");
    puller.wait().expect("ended");
}

/// Puts the granules that have changed into the backup.
fn take_over(backup: &Path, pulled: &Path, changed: &[bool]) {
    let (from, to) = (File::open(pulled), File::options().write(true).open(backup));
    let (from, to) = (from.expect("pulled"), to.expect("there"));
    for granule in (0..).zip(changed).filter_map(|(at, set)| set.then_some(at)) {
        let mut bytes = [0; GRANULE as usize];
        from.read_exact_at(&mut bytes, granule * GRANULE)
            .expect("read");
        to.write_all_at(&bytes, granule * GRANULE).expect("written");
    }
}

#[test]
fn a_pull_that_is_killed_leaves_the_next_one_complete() {
    let Some((daemon, mut client)) = start() else {
        return;
    };
    // 4 MiB each second.
    client.run(
        "object-add",
        json!({"qom-type": "throttle-group", "id": "g", "x-bps-total": 4 << 20}),
    );
    client.run(
        "blockdev-add",
        json!({"driver": "throttle", "node-name": "slow", "throttle-group": "g", "file": "a"}),
    );
    let (before, meanwhile, after) = ([3, 4, 700], [5, 700, 900], [6, 1000, 1023]);
    write(&daemon, &before, 2);
    let mut backup = daemon.client();
    begin(&mut backup, 2, true);
    show(&mut client, "slow");
    assert_eq!(changed_as_qemu_says(&daemon), set(&[&before]));
    kill_a_pull(&daemon, || write(&daemon, &meanwhile, 3));
    // Its program is gone as a whole.
    drop(backup);
    let started = Instant::now();
    while client.run("x-query-checkpoints", json!({})) != json!([]) {
        assert!(started.elapsed() < DEADLINE);
    }
    client.run("block-export-del", json!({"id": "pull", "mode": "hard"}));
    while client
        .run("query-block-exports", json!({}))
        .to_string()
        .contains("pull")
    {
        assert!(started.elapsed() < DEADLINE);
    }
    write(&daemon, &after, 4);
    let expected = set(&[&before, &meanwhile, &after]);
    assert_eq!(
        dirty(&daemon, &mut client, "a", "c1")[..expected.len()],
        expected
    );

    begin(&mut client, 2, false);
    show(&mut client, "a");
    assert_eq!(changed_as_qemu_says(&daemon), expected);
    let pulled = pull(&daemon, "pulled").wait().expect("it was started");
    assert!(pulled.success());
    take_over(&daemon.path("backup"), &daemon.path("pulled"), &expected);
    client.run("block-export-del", json!({"id": "pull"}));
    while client
        .run("query-block-exports", json!({}))
        .to_string()
        .contains("pull")
    {
        assert!(started.elapsed() < DEADLINE);
    }
    client.run("x-checkpoint-commit", json!({"id": "x"}));
    let backup = fs::read(daemon.path("backup")).expect("there");
    assert!(backup == content(&daemon), "the backup is the disk");
    write(&daemon, &[7], 5);
    assert_eq!(dirty(&daemon, &mut client, "a", "c2"), set(&[&[7]]));
    drop(client);
    daemon.quit();
}
