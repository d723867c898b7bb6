//! `query-qmp-schema`: complete in itself, true to the commands, and nowhere at odds with the oracle's.

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::{Daemon, Process};
use crate::tools;

/// Options that are ours alone, on purpose.
const CREATE_RAW: &str = "blockdev-create.\"options\"(\"raw\")";
/// What QEMU's own tool can change and its command cannot; only what is not in its schema is passed over.
const AMEND_QCOW2: &str = "x-blockdev-amend.\"options\"(\"qcow2\")";

/// Members that QEMU does not have: what the chain of a concluded job has become, and whether a mirror gains on its writers.
pub(crate) const OUR_MEMBERS: [&str; 10] = [
    "x-connections",
    "x-cbw-timeout",
    "x-manifest",
    "x-onto-manifest",
    "x-verify",
    "x-chain",
    "x-dirty-bytes",
    "x-dirty-rate",
    "x-copy-rate",
    "x-converges",
];

/// Members that newer releases of QEMU have.
pub(crate) const NEWER_MEMBERS: [&str; 2] = ["on-cbw-error", "target-is-zero"];

/// Members that only mirrors of ours have.
pub(crate) const OUR_MIRRORS_MEMBERS: [&str; 2] = ["bitmap", "bitmap-mode"];

/// Actions of transactions that are ours alone: any job may be one.
const OUR_ACTIONS: [&str; 3] = ["blockdev-mirror", "block-commit", "block-stream"];

/// Commands that are ours alone.
pub(crate) const OUR_COMMANDS: [&str; 6] = [
    "x-checkpoint-abort",
    "x-checkpoint-begin",
    "x-checkpoint-commit",
    "x-plan",
    "x-query-chain",
    "x-query-checkpoints",
];

struct Schema(BTreeMap<String, Value>);

impl Schema {
    fn of(value: &Value) -> Self {
        let entries = value.as_array().expect("a list");
        let named = |entry: &Value| {
            (
                entry["name"].as_str().expect("a name").to_owned(),
                entry.clone(),
            )
        };
        Self(entries.iter().map(named).collect())
    }

    fn entry(&self, name: &Value) -> &Value {
        let name = name.as_str().expect("a name");
        self.0
            .get(name)
            .unwrap_or_else(|| panic!("type {name} is not described"))
    }
}

/// Checks that every shape of ours is contained in theirs: same members, same options, a subset of words and cases.
fn contained(
    ours: (&Schema, &Value),
    theirs: (&Schema, &Value),
    path: &str,
    seen: &mut BTreeSet<String>,
) {
    let (our, their) = (ours.0.entry(ours.1), theirs.0.entry(theirs.1));
    if !seen.insert(format!("{} {}", ours.1, theirs.1)) {
        return;
    }
    assert_eq!(our["meta-type"], their["meta-type"], "{path}");
    match our["meta-type"].as_str() {
        Some("builtin") => assert_eq!(our["json-type"], their["json-type"], "{path}"),
        Some("enum") => {
            let words = |entry: &Value| -> BTreeSet<String> {
                let members = entry["members"].as_array().expect("members");
                members
                    .iter()
                    .map(|member| member["name"].to_string())
                    .collect()
            };
            let mut words_of_theirs = words(their);
            if path.starts_with("transaction.") {
                words_of_theirs.extend(OUR_ACTIONS.map(|action| format!("\"{action}\"")));
            }
            assert!(words(our).is_subset(&words_of_theirs), "{path}");
        }
        Some("array") => {
            contained(
                (ours.0, &our["element-type"]),
                (theirs.0, &their["element-type"]),
                path,
                seen,
            );
        }
        Some("alternate") => {
            let count = |entry: &Value| entry["members"].as_array().expect("members").len();
            assert_eq!(count(our), count(their), "{path}");
        }
        Some("object") => {
            for member in our["members"].as_array().expect("members") {
                let name = &member["name"];
                if path == CREATE_RAW {
                    continue;
                }
                let all = their["members"].as_array().expect("members");
                let same = all.iter().find(|other| other["name"] == *name);
                let is_known = |list: &[&str]| list.iter().any(|known| name == known);
                let is_ours = is_known(&OUR_MEMBERS) || is_known(&NEWER_MEMBERS);
                let is_mirror = ["blockdev-mirror", "drive-mirror"].contains(&path);
                let is_ours = is_ours || is_mirror && is_known(&OUR_MIRRORS_MEMBERS);
                if (path == AMEND_QCOW2 || is_ours) && same.is_none() {
                    continue;
                }
                let same = same.unwrap_or_else(|| panic!("{path}.{name} is ours alone"));
                let deeper = format!("{path}.{name}");
                assert_eq!(member.get("default"), same.get("default"), "{deeper}");
                assert_eq!(member.get("features"), same.get("features"), "{deeper}");
                contained(
                    (ours.0, &member["type"]),
                    (theirs.0, &same["type"]),
                    &deeper,
                    seen,
                );
            }
            assert_eq!(our.get("tag"), their.get("tag"), "{path}");
            for variant in our
                .get("variants")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
            {
                let all = their["variants"].as_array().expect("variants");
                let same = all.iter().find(|other| other["case"] == variant["case"]);
                let is_ours = OUR_ACTIONS.iter().any(|action| variant["case"] == *action);
                if same.is_none() && is_ours && path.starts_with("transaction.") {
                    continue;
                }
                let same = same.unwrap_or_else(|| panic!("{path}: case {}", variant["case"]));
                let deeper = format!("{path}({})", variant["case"]);
                contained(
                    (ours.0, &variant["type"]),
                    (theirs.0, &same["type"]),
                    &deeper,
                    seen,
                );
            }
        }
        Some("command" | "event") => {
            for member in ["arg-type", "ret-type"] {
                if our.get(member).is_some() {
                    contained(
                        (ours.0, &our[member]),
                        (theirs.0, &their[member]),
                        path,
                        seen,
                    );
                }
            }
        }
        other => panic!("{path}: {other:?}"),
    }
}

#[test]
fn every_command_and_event_is_described() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let schema = Schema::of(&client.run("query-qmp-schema", json!({})));
    let commands = client.run("query-commands", json!({}));
    let listed: BTreeSet<&str> = commands
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|c| c["name"].as_str())
        .collect();
    let described: BTreeSet<&str> = schema
        .0
        .iter()
        .filter(|(_, entry)| entry["meta-type"] == "command")
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(listed, described);
    // Walking it finds a name that leads nowhere.
    for entry in schema.0.values() {
        contained(
            (&schema, &entry["name"]),
            (&schema, &entry["name"]),
            "",
            &mut BTreeSet::new(),
        );
    }
    daemon.quit();
}

#[test]
fn no_shape_is_at_odds_with_the_oracle() {
    if !tools::have_oracle() {
        return;
    }
    let mut process = Process::start(
        Command::new("qemu-storage-daemon")
            .args(["--chardev", "stdio,id=c", "--monitor", "c"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped()),
    );
    let input = process.child().stdout.take().expect("piped");
    let output = process.child().stdin.take().expect("piped");
    let mut oracle = Client::over(input, output);
    oracle.negotiate();
    let theirs = Schema::of(&oracle.run("query-qmp-schema", json!({})));
    oracle.run("quit", json!({}));
    assert!(process.wait().success());

    let daemon = Daemon::start();
    let ours = Schema::of(&daemon.client().run("query-qmp-schema", json!({})));
    for (name, entry) in &ours.0 {
        let kind = entry["meta-type"].as_str();
        if !matches!(kind, Some("command" | "event")) || OUR_COMMANDS.contains(&name.as_str()) {
            continue;
        }
        let same = theirs
            .0
            .get(name)
            .unwrap_or_else(|| panic!("{name} is ours alone"));
        assert_eq!(entry.get("features"), same.get("features"), "{name}");
        let mut seen = BTreeSet::new();
        contained(
            (&ours, &entry["name"]),
            (&theirs, &entry["name"]),
            name,
            &mut seen,
        );
    }
    daemon.quit();
}
