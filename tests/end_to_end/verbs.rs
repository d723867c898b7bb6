//! Every verb on a job of every kind in every status that lasts, the same on both daemons.

use std::fmt::Write;

use crate::oracle::compare;

/// A status that lasts, and how a job is brought there. `J`, `S` and `T` stand for the job and its nodes.
struct Station {
    status: &'static str,
    way: &'static [&'static str],
}

const VERBS: &[&str] = &[
    r#"{"execute": "job-pause", "arguments": {"id": "J"}}"#,
    r#"{"execute": "job-resume", "arguments": {"id": "J"}}"#,
    r#"{"execute": "job-cancel", "arguments": {"id": "J"}}"#,
    r#"{"execute": "job-complete", "arguments": {"id": "J"}}"#,
    r#"{"execute": "job-finalize", "arguments": {"id": "J"}}"#,
    r#"{"execute": "job-dismiss", "arguments": {"id": "J"}}"#,
    r#"{"execute": "block-job-pause", "arguments": {"device": "J"}}"#,
    r#"{"execute": "block-job-resume", "arguments": {"device": "J"}}"#,
    r#"{"execute": "block-job-cancel", "arguments": {"device": "J"}}"#,
    r#"{"execute": "block-job-cancel", "arguments": {"device": "J", "force": true}}"#,
    r#"{"execute": "block-job-complete", "arguments": {"device": "J"}}"#,
    r#"{"execute": "block-job-finalize", "arguments": {"id": "J"}}"#,
    r#"{"execute": "block-job-dismiss", "arguments": {"id": "J"}}"#,
    r#"{"execute": "block-job-set-speed", "arguments": {"device": "J", "speed": 4096}}"#,
    r#"{"execute": "block-job-set-speed", "arguments": {"device": "J", "speed": -1}}"#,
    r#"{"execute": "block-job-change", "arguments": {"id": "J", "type": "mirror", "copy-mode": "background"}}"#,
    r#"{"execute": "block-job-change", "arguments": {"id": "J", "type": "mirror", "copy-mode": "write-blocking"}}"#,
    r#"{"execute": "block-job-change", "arguments": {"id": "J", "type": "backup"}}"#,
];

const NODES: &str = r#"
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "S", "size": 67108864, "read-zeroes": false}}
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "T", "size": 67108864, "read-zeroes": false}}
"#;

/// Verbs whose consequence comes later: what to wait for, so that the next line finds both daemons in one state.
fn consequence(status: &str, verb: &str, mirror: bool) -> Option<&'static str> {
    let name = verb.split('"').nth(3).unwrap_or("");
    match (status, name) {
        ("running", "job-cancel" | "block-job-cancel") => Some("concluded"),
        ("ready" | "standby", "job-cancel") => Some("concluded"),
        ("ready" | "standby", "block-job-cancel") if verb.contains("force") => Some("concluded"),
        ("ready", "job-complete" | "block-job-complete" | "block-job-cancel") => Some("pending"),
        ("paused", "job-cancel") => Some("concluded"),
        ("paused", "block-job-cancel") if verb.contains("force") => Some("concluded"),
        ("running", "job-pause" | "block-job-pause") => Some("paused"),
        ("paused", "job-resume" | "block-job-resume") => Some("running"),
        ("ready", "job-pause" | "block-job-pause") if mirror => Some("standby"),
        ("standby", "job-resume" | "block-job-resume") => Some("ready"),
        _ => None,
    }
}

/// Takes a fresh job to each station, tries one verb there, looks, and ends it; then the next verb.
fn matrix(kind: &str, stations: &[Station]) {
    let mut script = NODES.to_owned();
    for station in stations {
        for (number, verb) in VERBS.iter().enumerate() {
            let job = format!("{}-{number}", station.status);
            let mut line = |text: &str| {
                writeln!(script, "{}", text.replace("J\"", &format!("{job}\""))).expect("written");
            };
            let mut reached = Vec::new();
            line(station.way[0]);
            line(&format!("wait {job} running"));
            for step in &station.way[1..] {
                match step.strip_prefix("wait ") {
                    Some(status) => {
                        reached.push(status);
                        line(&format!("wait {job} {status}"));
                    }
                    None if *step == MOVING => line(&format!("moving {job}")),
                    None => line(step),
                }
            }
            line(verb);
            let later = consequence(station.status, verb, kind == "mirror");
            if let Some(status) = later {
                line(&format!("wait {job} {status}"));
            }
            line(r#"{"execute": "query-jobs"}"#);
            // When the new mode shows is not fixed.
            if !verb.contains("write-blocking") {
                line(r#"{"execute": "query-block-jobs"}"#);
            }
            line(r#"{"execute": "job-cancel", "arguments": {"id": "J"}}"#);
            if later != Some("concluded") && !reached.contains(&"concluded") {
                line(&format!("wait {job} concluded"));
            }
            line(r#"{"execute": "query-jobs"}"#);
            line(r#"{"execute": "job-dismiss", "arguments": {"id": "J"}}"#);
        }
    }
    compare(&script, |_| {});
}

const SLOW_BACKUP: &str = r#"{"execute": "blockdev-backup", "arguments": {"job-id": "J", "device": "S", "target": "T", "sync": "full", "auto-finalize": false, "auto-dismiss": false, "speed": 65536}}"#;
const BACKUP: &str = r#"{"execute": "blockdev-backup", "arguments": {"job-id": "J", "device": "S", "target": "T", "sync": "full", "auto-finalize": false, "auto-dismiss": false}}"#;
const SLOW_MIRROR: &str = r#"{"execute": "blockdev-mirror", "arguments": {"job-id": "J", "device": "S", "target": "T", "sync": "full", "auto-finalize": false, "auto-dismiss": false, "speed": 65536}}"#;
const MIRROR: &str = r#"{"execute": "blockdev-mirror", "arguments": {"job-id": "J", "device": "S", "target": "T", "sync": "full", "auto-finalize": false, "auto-dismiss": false}}"#;
const CREATE: &str = r#"{"execute": "blockdev-create", "arguments": {"job-id": "J", "options": {"driver": "file", "filename": "new", "size": 65536}}}"#;
const MOVING: &str = "moving";
const PAUSE: &str = r#"{"execute": "job-pause", "arguments": {"id": "J"}}"#;
const COMPLETE: &str = r#"{"execute": "job-complete", "arguments": {"id": "J"}}"#;
const FINALIZE: &str = r#"{"execute": "job-finalize", "arguments": {"id": "J"}}"#;
const CANCEL: &str = r#"{"execute": "job-cancel", "arguments": {"id": "J"}}"#;

#[test]
fn on_a_backup() {
    matrix(
        "backup",
        &[
            Station {
                status: "running",
                way: &[SLOW_BACKUP, MOVING],
            },
            Station {
                status: "paused",
                way: &[SLOW_BACKUP, MOVING, PAUSE, "wait paused"],
            },
            Station {
                status: "pending",
                way: &[BACKUP, "wait pending"],
            },
            Station {
                status: "concluded",
                way: &[BACKUP, "wait pending", FINALIZE, "wait concluded"],
            },
            Station {
                status: "concluded",
                way: &[SLOW_BACKUP, MOVING, CANCEL, "wait concluded"],
            },
        ],
    );
}

#[test]
fn on_a_mirror() {
    matrix(
        "mirror",
        &[
            Station {
                status: "running",
                way: &[SLOW_MIRROR, MOVING],
            },
            Station {
                status: "paused",
                way: &[SLOW_MIRROR, MOVING, PAUSE, "wait paused"],
            },
            Station {
                status: "ready",
                way: &[MIRROR, "wait ready"],
            },
            Station {
                status: "standby",
                way: &[MIRROR, "wait ready", PAUSE, "wait standby"],
            },
            Station {
                status: "pending",
                way: &[MIRROR, "wait ready", COMPLETE, "wait pending"],
            },
            Station {
                status: "concluded",
                way: &[MIRROR, "wait ready", CANCEL, "wait concluded"],
            },
        ],
    );
}

#[test]
fn on_a_create() {
    matrix(
        "create",
        &[Station {
            status: "concluded",
            way: &[CREATE, "wait concluded"],
        }],
    );
}
