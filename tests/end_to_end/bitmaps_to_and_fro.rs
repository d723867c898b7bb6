//! One image that both daemons use in turn, with changes of its bitmaps and its disk: whoever opens it next finds what the other one
//! has left, to the bit.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::random_chains::Dice;
use crate::tools;

const DISK_BYTES: u64 = 3 << 20;
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

/// What a bitmap has to be.
#[derive(Clone, Debug, PartialEq)]
struct Expected {
    granularity: u64,
    recording: bool,
    /// Which granules have changed.
    dirty: Vec<bool>,
}

impl Expected {
    fn mark(&mut self, offset: u64, length: u64) {
        let (first, last) = (
            offset / self.granularity,
            (offset + length - 1) / self.granularity,
        );
        let range = usize::try_from(first).expect("small")..=usize::try_from(last).expect("small");
        self.dirty[range].fill(true);
    }

    /// Changed bytes side by side, as `blockyard bitmap dump` prints them.
    fn runs(&self) -> Value {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (granule, _) in (0_u64..).zip(&self.dirty).filter(|(_, dirty)| **dirty) {
            let start = granule * self.granularity;
            let end = (start + self.granularity).min(DISK_BYTES);
            match runs.last_mut() {
                Some((_, last)) if *last == start => *last = end,
                _ => runs.push((start, end)),
            }
        }
        let run = |(start, end): &(u64, u64)| json!({"start": start, "length": end - start});
        runs.iter().map(run).collect()
    }
}

type All = BTreeMap<&'static str, Expected>;

/// A daemon that serves the image.
struct User {
    daemon: Daemon,
    client: Client,
}

impl User {
    fn new(daemon: Daemon) -> Self {
        let mut client = daemon.client();
        let address = json!({"type": "unix", "data": {"path": "nbd.sock"}});
        client.run("nbd-server-start", json!({"addr": address}));
        Self { daemon, client }
    }

    fn open(&mut self, image: &Path) {
        let file = json!({"driver": "file", "node-name": "f", "filename": image});
        let node = json!({"driver": "qcow2", "node-name": "n", "file": file});
        self.client.run("blockdev-add", node);
    }

    fn close(&mut self, reopens: bool) {
        if reopens {
            let node = json!({"driver": "qcow2", "node-name": "n", "read-only": true, "file": "f"});
            self.client
                .run("blockdev-reopen", json!({"options": [node]}));
        }
        self.client.run("blockdev-del", json!({"node-name": "n"}));
    }

    /// Whether what is shown of the bitmaps is what has to be.
    fn look(&mut self, all: &All, told: &str) {
        let nodes = self.client.run("query-named-block-nodes", json!({}));
        let nodes = nodes.as_array().expect("nodes").iter();
        let mut named = nodes.filter(|node| node["node-name"] == json!("n"));
        let shown = named.next().expect("open")["dirty-bitmaps"].clone();
        let shown = shown.as_array().cloned().unwrap_or_default();
        assert_eq!(shown.len(), all.len(), "{told}: {shown:?}");
        for one in &shown {
            let expected = &all[one["name"].as_str().expect("a name")];
            let dirty = expected.dirty.iter().filter(|dirty| **dirty).count() as u64;
            assert_eq!(one["count"], json!(dirty * expected.granularity), "{told}");
            assert_eq!(one["granularity"], json!(expected.granularity), "{told}");
            assert_eq!(one["recording"], json!(expected.recording), "{told}");
            assert_eq!(one.get("inconsistent"), None, "{told}");
        }
    }

    fn write(&mut self, commands: &[String]) {
        let export = json!({"type": "nbd", "id": "e", "node-name": "n", "writable": true});
        self.client.run("block-export-add", export);
        let mut command = std::process::Command::new("qemu-io");
        command.current_dir(self.daemon.folder.path());
        command.args(["-f", "raw", "nbd+unix:///n?socket=nbd.sock"]);
        command.args(commands.iter().flat_map(|one| ["-c", one]));
        let ended = tools::run_command(command, "");
        assert_eq!(ended.code, Some(0), "{}", ended.errors);
        self.client
            .run("block-export-del", json!({"id": "e", "mode": "hard"}));
        // It goes when its client has gone.
        while self.client.run("query-block-exports", json!({})) != json!([]) {}
    }

    fn change(&mut self, command: &str, arguments: Value) {
        self.client
            .run(&format!("block-dirty-bitmap-{command}"), arguments);
    }
}

/// One change of the disk or of a bitmap.
fn step(user: &mut User, all: &mut All, dice: &mut Dice) {
    let name = NAMES[usize::try_from(dice.below(5)).expect("small")];
    let named = json!({"node": "n", "name": name});
    match (dice.below(8), all.contains_key(name)) {
        (0..3, _) => {
            let mut commands = Vec::new();
            for _ in 0..1 + dice.below(6) {
                let offset = 512 * dice.below(DISK_BYTES / 512);
                let length = (512 * (1 + dice.below(300))).min(DISK_BYTES - offset);
                let zeroes = if dice.below(3) == 0 { "-z " } else { "" };
                commands.push(format!("write {zeroes}{offset} {length}"));
                let recording = all.values_mut().filter(|one| one.recording);
                recording.for_each(|one| one.mark(offset, length));
            }
            user.write(&commands);
        }
        (_, false) => {
            let granularity = 512 << dice.below(9);
            let recording = dice.below(3) > 0;
            user.change(
                "add",
                json!({"node": "n", "name": name, "granularity": granularity, "persistent": true, "disabled": !recording}),
            );
            let granules = usize::try_from(DISK_BYTES.div_ceil(granularity)).expect("small");
            let expected = Expected {
                granularity,
                recording,
                dirty: vec![false; granules],
            };
            all.insert(name, expected);
        }
        (3, true) => {
            user.change("remove", named);
            all.remove(name);
        }
        (4, true) => {
            user.change("clear", named);
            all.get_mut(name).expect("there").dirty.fill(false);
        }
        (5, true) => {
            let switched = all.get_mut(name).expect("there");
            switched.recording = !switched.recording;
            let command = if switched.recording {
                "enable"
            } else {
                "disable"
            };
            user.change(command, named);
        }
        (_, true) => {
            let Some((other, source)) = all.iter().find(|(other, _)| **other != name) else {
                return;
            };
            let (other, source) = (*other, source.clone());
            user.change(
                "merge",
                json!({"node": "n", "target": name, "bitmaps": [other]}),
            );
            let target = all.get_mut(name).expect("there");
            for run in source.runs().as_array().expect("runs") {
                let number = |member: &str| run[member].as_u64().expect("bytes");
                target.mark(number("start"), number("length"));
            }
        }
    }
}

/// Whether the image, which nobody uses, has what has to be there.
fn check(image: &Path, all: &All, told: &str) {
    let folder = image.parent().expect("a folder");
    let mut command = std::process::Command::new("qemu-img");
    command.arg("check").arg(image);
    let checked = tools::run_command(command, "");
    assert_eq!(
        checked.code,
        Some(0),
        "{told}: {}{}",
        checked.output,
        checked.errors
    );
    for (name, expected) in all {
        let dumped = tools::run(folder, &["bitmap", "dump", "--json", "image", name], "");
        assert_eq!(dumped.code, Some(0), "{told}: {}", dumped.errors);
        let runs: Value = serde_json::from_str(&dumped.output).expect("JSON");
        assert_eq!(runs, expected.runs(), "{told}: {name}");
    }
}

#[test]
fn whoever_comes_next_finds_every_bit() {
    if !tools::have_oracle() || !tools::have("qemu-io", "qemu-utils") {
        return;
    }
    let place = tempfile::tempdir().expect("a folder");
    let image = place.path().join("image");
    let mut users = [
        User::new(Daemon::start()),
        User::new(Daemon::start_oracle_with(&[])),
    ];
    for (seed, options) in [
        (1, "cluster_size=64k"),
        (2, "cluster_size=512"),
        (3, "cluster_size=4k,lazy_refcounts=on"),
        (4, "cluster_size=2M,extended_l2=on"),
    ] {
        let size = DISK_BYTES.to_string();
        let mut command = std::process::Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "-o", options]);
        command.arg(&image).arg(&size);
        let made = tools::run_command(command, "");
        assert_eq!(made.code, Some(0), "{}", made.errors);
        let mut dice = Dice::new(seed);
        let mut all = All::new();
        for round in 0..14 {
            let who = usize::try_from(dice.below(2)).expect("small");
            let told = format!("seed {seed}, round {round}, {who}");
            let user = &mut users[who];
            user.open(&image);
            user.look(&all, &told);
            for _ in 0..dice.below(6) {
                step(user, &mut all, &mut dice);
            }
            user.look(&all, &told);
            user.close(dice.below(3) == 0);
            check(&image, &all, &told);
        }
    }
    for user in users {
        drop(user.client);
        user.daemon.quit();
    }
}
