//! A daemon with a state directory is killed while it begins and commits checkpoints of three disks: once they are opened again all of
//! them are at one checkpoint, and no change since then is missing.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{Client, DEADLINE};
use crate::daemon::Daemon;
use crate::images::run;
use crate::nbd::{Nbd, export, start_server};
use crate::tools;
use crate::writer::SetAtEnd;

pub(crate) const DISKS: [&str; 3] = ["a", "b", "c"];
pub(crate) const GRANULE: u64 = 65536;
const GRANULES: u64 = 1024;
const OPTIONS: [&str; 4] = ["--state-dir", "state", "--data-threads", "2"];

/// Granules that were written, each on all disks in turn, and on how many of them that ended.
pub(crate) type Writes = Arc<Mutex<Vec<(u64, usize)>>>;

/// What is known of the disks, whatever was killed.
#[derive(Default)]
struct Known {
    writes: Writes,
    /// How many writes had begun when a checkpoint was there.
    begun: BTreeMap<u64, usize>,
    /// The checkpoint that was committed last.
    committed: u64,
    /// The one whose commit was asked for, and not answered.
    asked: Option<u64>,
}

pub(crate) fn new_disks() -> Option<TempDir> {
    if !tools::have("qemu-img", "qemu-utils") || !tools::have("nbdinfo", "libnbd-bin") {
        return None;
    }
    let folder = tempfile::tempdir().expect("a folder");
    for disk in DISKS {
        let create = ["create", "-q", "-f", "qcow2", disk, "64M"];
        run(folder.path(), "qemu-img", &create);
    }
    Some(folder)
}

fn start(folder: TempDir) -> (Daemon, Client) {
    start_with(folder, &OPTIONS)
}

/// A daemon that has the disks as nodes and exports.
pub(crate) fn start_with(folder: TempDir, options: &[&str]) -> (Daemon, Client) {
    for left in ["qmp.sock", "pid", "nbd.sock"] {
        let _ = std::fs::remove_file(folder.path().join(left));
    }
    let daemon = Daemon::start_in(folder, options);
    let mut client = daemon.client();
    start_server(&daemon, &mut client, 100);
    for disk in DISKS {
        let file = json!({"driver": "file", "filename": disk});
        let node = json!({"driver": "qcow2", "node-name": disk, "file": file});
        let started = Instant::now();
        // The kernel takes a killed daemon's ring apart, and with it the open files, a moment after its end.
        while let Some(text) =
            client.command("blockdev-add", node.clone())["error"]["desc"].as_str()
        {
            assert!(
                text.contains("lock") && started.elapsed() < DEADLINE,
                "{text}"
            );
        }
        export(&mut client, disk);
    }
    (daemon, client)
}

/// Begins and commits the next checkpoint; `None`: the daemon was killed.
fn next_checkpoint(client: &mut Client, known: &mut Known) -> Option<()> {
    let number = known.committed + 1;
    let disk = |disk: &&str| {
        let mut spec = json!({"node": disk, "bitmap": format!("c{number}")});
        if number > 1 {
            spec["previous"] = json!(format!("c{}", number - 1));
        }
        spec
    };
    let disks: Value = DISKS.iter().map(disk).collect();
    let done = |reply: Value| assert!(reply.get("return").is_some(), "{reply}");
    done(client.try_command("x-checkpoint-begin", &json!({"id": "x", "disks": disks}))?);
    let begun = known.writes.lock().expect("kept").len();
    known.begun.insert(number, begun);
    known.asked = Some(number);
    done(client.try_command("x-checkpoint-commit", &json!({"id": "x"}))?);
    known.asked = None;
    known.committed = number;
    Some(())
}

/// All disks are at one checkpoint, which says at least what has changed since it began.
fn check(daemon: &Daemon, client: &mut Client, known: &mut Known) {
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    let shown = DISKS.map(|disk| {
        let nodes = nodes.as_array().expect("nodes").iter();
        let mut nodes = nodes.filter(|node| node["node-name"] == disk);
        let bitmaps = nodes.next().expect("there")["dirty-bitmaps"].clone();
        let bitmaps = bitmaps.as_array().cloned().unwrap_or_default();
        let names = bitmaps.iter().map(|one| {
            assert_ne!(one["inconsistent"], json!(true), "{disk}: {one}");
            assert_eq!(one["recording"], json!(true), "{disk}: {one}");
            one["name"].as_str().expect("a name").to_owned()
        });
        names.collect::<Vec<String>>()
    });
    let mut possible = vec![known.committed];
    possible.extend(known.asked.take());
    let is = possible.into_iter().rev().find(|number| {
        let expected = match number {
            0 => Vec::new(),
            number => vec![format!("c{number}")],
        };
        shown.iter().all(|names| *names == expected)
    });
    known.committed = is.unwrap_or_else(|| panic!("{shown:?}, not {}", known.committed));
    if known.committed == 0 {
        return;
    }
    let begun = known.begun[&known.committed];
    let writes = known.writes.lock().expect("kept");
    for (place, disk) in DISKS.iter().enumerate() {
        let since = writes.iter().skip(begun).filter(|(_, came)| *came > place);
        let dirty = dirty(daemon, client, disk, &format!("c{}", known.committed));
        for (granule, _) in since {
            assert!(dirty[*granule as usize], "{disk}: {granule} is missing");
        }
    }
}

/// Which granules of a disk have changed according to a bitmap.
pub(crate) fn dirty(daemon: &Daemon, client: &mut Client, disk: &str, name: &str) -> Vec<bool> {
    client.run(
        "block-export-add",
        json!({"type": "nbd", "id": "shown", "node-name": disk, "name": "shown", "writable": true,
            "bitmaps": [name]}),
    );
    let uri = format!(
        "nbd+unix:///shown?socket={}",
        daemon.path("nbd.sock").display()
    );
    let mut command = Command::new("nbdinfo");
    command.args([&format!("--map=qemu:dirty-bitmap:{name}"), "--json", &uri]);
    let ended = tools::run_command(command, "");
    assert_eq!(ended.code, Some(0), "{}", ended.errors);
    client.run("block-export-del", json!({"id": "shown", "mode": "hard"}));
    let extents: Value = serde_json::from_str(&ended.output).expect("JSON");
    let mut dirty = vec![false; GRANULES as usize];
    for extent in extents.as_array().expect("a list") {
        let number = |name: &str| extent[name].as_u64().expect("a number") / GRANULE;
        let (first, count) = (number("offset"), number("length"));
        for granule in first..first + count {
            dirty[granule as usize] = extent["type"] == 1;
        }
    }
    // It goes when its clients have left.
    let started = Instant::now();
    while client
        .run("query-block-exports", json!({}))
        .to_string()
        .contains("\"shown\"")
    {
        assert!(started.elapsed() < DEADLINE);
    }
    dirty
}

pub(crate) fn opened(daemon: &Daemon) -> [Nbd; 3] {
    DISKS.map(|disk| Nbd::open(&daemon.path("nbd.sock"), disk))
}

pub(crate) fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Writes here and there until the daemon is killed or that is enough.
pub(crate) fn write_on(mut disks: [Nbd; 3], writes: &Writes, stop: &AtomicBool, mut seed: u64) {
    while !stop.load(Ordering::Relaxed) {
        // Close together, as each region of 16 MiB counts as a whole after a crash.
        let granule = random(&mut seed) % 32 + 256 * (random(&mut seed) % 2);
        let mine = {
            let mut all = writes.lock().expect("kept");
            all.push((granule, 0));
            all.len() - 1
        };
        for disk in &mut disks {
            if !disk.try_write(granule * GRANULE, &[1; 4096]) {
                return;
            }
            writes.lock().expect("kept")[mine].1 += 1;
        }
    }
}

pub(crate) fn kill(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid");
    // It may have ended already.
    let _ = kill_process(pid, Signal::KILL);
}

/// Makes checkpoints beside a writer until the daemon is killed, or `count` of them.
fn until_killed(disks: [Nbd; 3], client: &mut Client, known: &mut Known, seed: u64, count: usize) {
    let (stop, writes) = (AtomicBool::new(false), Arc::clone(&known.writes));
    std::thread::scope(|scope| {
        let ends = SetAtEnd(&stop);
        scope.spawn(|| write_on(disks, &writes, &stop, seed));
        for _ in 0..count {
            if next_checkpoint(client, known).is_none() {
                break;
            }
        }
        drop(ends);
    });
}

#[test]
fn killed_at_any_moment_all_disks_are_at_one_checkpoint() {
    let Some(mut folder) = new_disks() else {
        return;
    };
    let mut known = Known::default();
    let mut seed = 0x1234_5678_9abc_def1;
    const ROUNDS: u64 = 25;
    for _ in 0..ROUNDS {
        let (daemon, mut client) = start(folder);
        check(&daemon, &mut client, &mut known);
        let (pid, disks) = (daemon.pid(), opened(&daemon));
        let begun = Instant::now();
        next_checkpoint(&mut client, &mut known).expect("it runs");
        // Any moment within a few checkpoints, however long one takes here.
        let moment = begun
            .elapsed()
            .mul_f64((random(&mut seed) % 8000) as f64 / 1000.0);
        let writer_seed = random(&mut seed);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(moment);
                kill(pid);
            });
            until_killed(disks, &mut client, &mut known, writer_seed, usize::MAX);
        });
        drop(client);
        folder = daemon.kill();
    }
    assert!(
        known.committed > ROUNDS,
        "none was made beside the writer: {}",
        known.committed
    );
}

/// Kills the daemon at this call of this kind from now on, each thread counting for itself; `None`: that cannot be had here.
fn kill_at(daemon: &Daemon, call: &str, nth: u32) -> Option<Child> {
    let mut tracer = Command::new("strace")
        .args(["-f", "-p", &daemon.pid().to_string(), "-o", "/dev/null"])
        .args(["-e", &format!("trace={call}")])
        .args(["-e", &format!("inject={call}:signal=KILL:when={nth}")])
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut lines = BufReader::new(tracer.stderr.take().expect("piped")).lines();
    let said = lines.next().and_then(Result::ok).unwrap_or_default();
    if said.contains("attached") {
        // It would end if nobody took what it says of further threads.
        std::thread::spawn(move || lines.for_each(drop));
        return Some(tracer);
    }
    eprintln!("skipped: strace cannot attach here: {said}");
    let _ = tracer.kill();
    let _ = tracer.wait();
    None
}

/// At each step that a checkpoint takes in the state directory and on the images.
#[test]
fn killed_at_any_step_all_disks_are_at_one_checkpoint() {
    if !tools::have("strace", "strace") {
        return;
    }
    let Some(mut folder) = new_disks() else {
        return;
    };
    let (mut known, mut killed) = (Known::default(), 0);
    for (call, last) in [
        ("fsync", 24),
        ("/^rename", 12),
        ("/^unlink", 12),
        ("fdatasync", 8),
        ("write", 12),
    ] {
        for nth in 1..=last {
            let (daemon, mut client) = start(folder);
            check(&daemon, &mut client, &mut known);
            let disks = opened(&daemon);
            let Some(mut tracer) = kill_at(&daemon, call, nth) else {
                daemon.kill();
                return;
            };
            let before = known.committed;
            until_killed(disks, &mut client, &mut known, u64::from(nth) + 1, 1);
            killed += u32::from(known.committed == before);
            drop(client);
            folder = daemon.kill();
            let _ = tracer.wait();
        }
    }
    assert!(killed > 10, "{killed} were killed within a checkpoint");
}
