//! A daemon is killed while it carries out transactions on the bitmaps of three disks, beside a writer. Each image is by itself then:
//! it opens, and what is said of its bitmaps is true.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde_json::{Value, json};

use crate::checkpoint_crashes::{
    DISKS, Writes, dirty, kill, new_disks, opened, random, start_with, write_on,
};
use crate::client::Client;
use crate::daemon::Daemon;
use crate::tools;
use crate::writer::SetAtEnd;

/// There all the time, and cleared by each transaction.
const BASE: &str = "base";

/// What is known of the disks, whatever was killed.
#[derive(Default)]
struct Known {
    writes: Writes,
    /// The transaction that was answered last; 0: none was.
    answered: u64,
    /// How many writes had begun when it was.
    begun: usize,
    /// How often a disk had what was asked for and not answered, and how often not.
    seen: [u32; 2],
}

fn name(number: u64) -> String {
    format!("t{number}")
}

/// Adds a bitmap to each disk, clears another, and removes the one of the transaction before. `None`: the daemon was killed.
fn next_transaction(client: &mut Client, known: &mut Known) -> Option<()> {
    let number = known.answered + 1;
    let actions = DISKS.iter().flat_map(|disk| {
        let mut data = vec![
            ("clear", json!({"node": disk, "name": BASE})),
            (
                "add",
                json!({"node": disk, "name": name(number), "persistent": true}),
            ),
        ];
        if number > 1 {
            data.push(("remove", json!({"node": disk, "name": name(number - 1)})));
        }
        let action =
            |(kind, data)| json!({"type": format!("block-dirty-bitmap-{kind}"), "data": data});
        data.into_iter().map(action)
    });
    let actions: Value = actions.collect();
    let reply = client.try_command("transaction", &json!({"actions": actions}))?;
    assert!(reply.get("return").is_some(), "{reply}");
    known.answered = number;
    known.begun = known.writes.lock().expect("kept").len();
    Some(())
}

/// The bitmaps of a disk by name, and whether they can be relied on.
fn shown(client: &mut Client, disk: &str) -> BTreeMap<String, bool> {
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.as_array().expect("nodes").iter();
    let mut nodes = nodes.filter(|node| node["node-name"] == disk);
    let bitmaps = nodes.next().expect("there")["dirty-bitmaps"].clone();
    let bitmaps = bitmaps.as_array().cloned().unwrap_or_default();
    let bitmap = |one: &Value| {
        let is_good = one["inconsistent"] != json!(true) && one["recording"] == json!(true);
        (one["name"].as_str().expect("a name").to_owned(), is_good)
    };
    bitmaps.iter().map(bitmap).collect()
}

/// What each disk says is true, and with a state directory nothing is lost that a client has heard of.
fn check(daemon: &Daemon, client: &mut Client, known: &mut Known, with_state: bool) {
    for (place, disk) in DISKS.iter().enumerate() {
        let shown = shown(client, disk);
        let is_good = |name: &str| shown.get(name) == Some(&true);
        let (last, next) = (name(known.answered), name(known.answered + 1));
        let known_names = |one: &String| [BASE, &last, &next].contains(&one.as_str());
        assert!(shown.keys().all(known_names), "{disk}: {shown:?}");
        let has_next = shown.contains_key(&next);
        known.seen[usize::from(has_next)] += 1;
        if with_state {
            assert!(shown.values().all(|good| *good), "{disk}: {shown:?}");
            assert!(is_good(BASE), "{disk}: {shown:?}");
            assert!(
                known.answered == 0 || has_next || is_good(&last),
                "{disk}: {shown:?}"
            );
        }
        let writes = known.writes.lock().expect("kept").clone();
        let mut assert_has_all = |name: &str| {
            let dirty = dirty(daemon, client, disk, name);
            for (granule, came) in writes.iter().skip(known.begun) {
                let is_there = *came <= place || dirty[*granule as usize];
                assert!(is_there, "{disk}: {granule} is missing in {name}");
            }
            dirty
        };
        if is_good(&last) {
            assert_has_all(&last);
        }
        match (is_good(BASE), is_good(&next)) {
            // Both began at the moment of the transaction that was not answered.
            (true, true) => {
                let [base, next] = [BASE, &next].map(|name| dirty(daemon, client, disk, name));
                assert_eq!(base, next, "{disk}");
            }
            (true, false) if !has_next => drop(assert_has_all(BASE)),
            _ => {}
        }
    }
}

/// The next round begins with bitmaps that can be relied on.
fn begin(client: &mut Client, known: &mut Known) {
    let number = known.answered + 1;
    for disk in DISKS {
        for name in shown(client, disk).into_keys() {
            client.run(
                "block-dirty-bitmap-remove",
                json!({"node": disk, "name": name}),
            );
        }
        for name in [BASE, &name(number)] {
            let arguments = json!({"node": disk, "name": name, "persistent": true});
            client.run("block-dirty-bitmap-add", arguments);
        }
    }
    known.answered = number;
    known.begun = known.writes.lock().expect("kept").len();
}

/// Any moment within a few transactions.
fn until_killed(daemon: &Daemon, client: &mut Client, known: &mut Known, seed: &mut u64) {
    let (pid, disks) = (daemon.pid(), opened(daemon));
    let moment = Duration::from_micros(random(seed) % 100_000);
    let (stop, writes) = (AtomicBool::new(false), Arc::clone(&known.writes));
    let writer_seed = random(seed);
    std::thread::scope(|scope| {
        let ends = SetAtEnd(&stop);
        scope.spawn(|| write_on(disks, &writes, &stop, writer_seed));
        for _ in 0..2 {
            next_transaction(client, known).expect("it runs");
        }
        scope.spawn(move || {
            std::thread::sleep(moment);
            kill(pid);
        });
        while next_transaction(client, known).is_some() {}
        drop(ends);
    });
}

/// Nothing but clusters may be lost.
fn assert_sound(folder: &Path, disk: &str) {
    let mut command = Command::new("qemu-img");
    command
        .args(["check", "-q", "-U", disk])
        .current_dir(folder);
    let ended = tools::run_command(command, "");
    assert!(
        matches!(ended.code, Some(0 | 3)),
        "{disk}: {}",
        ended.errors
    );
}

fn try_kills(options: &[&str], rounds: usize, with_state: bool) {
    let Some(mut folder) = new_disks() else {
        return;
    };
    let mut known = Known::default();
    let mut seed = 0x0ddb_a11c_afe0_0001 + u64::from(with_state);
    for _ in 0..rounds {
        let (daemon, mut client) = start_with(folder, options);
        begin(&mut client, &mut known);
        until_killed(&daemon, &mut client, &mut known, &mut seed);
        drop(client);
        folder = daemon.kill();
        DISKS
            .iter()
            .for_each(|disk| assert_sound(folder.path(), disk));
        let (daemon, mut client) = start_with(folder, options);
        check(&daemon, &mut client, &mut known, with_state);
        drop(client);
        folder = daemon.kill();
    }
    assert!(known.answered > 2 * rounds as u64, "{}", known.answered);
    assert!(known.seen[0] > 0, "{:?}", known.seen);
}

#[test]
fn killed_within_a_transaction_no_disk_loses_what_was_answered() {
    try_kills(&["--state-dir", "state", "--data-threads", "2"], 12, true);
}

#[test]
fn killed_within_a_transaction_without_a_state_directory_no_disk_claims_too_much() {
    try_kills(&["--data-threads", "2"], 8, false);
}
