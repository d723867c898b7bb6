//! Scripts that run on both daemons.
//!
//! A script is lines:
//! - `{...}` is a command, sent after the reply to the one before;
//! - `wait JOB STATUS` waits until that status has been reported as often as it was waited for;
//! - `wait JOB stopped` waits until an error has paused the job as often as that was waited for;
//! - `gone JOB` waits until the job is not there, whether or not it ever was;
//! - `moving JOB` waits until the job has got somewhere, which no event tells;
//! - `$ COMMAND` runs a shell command in the daemon's folder; what it prints and its exit code are compared;
//! - `bitmaps` shows the dirty bitmaps of all qcow2 nodes, and those that their images have;
//! - `locks FILE` looks at which bytes of the file are locked;
//! - `signal NAME` ends the daemon, in place of the `quit` that every other script ends with;
//! - `#` begins a comment.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::client::{Client, DEADLINE};
use crate::normal::{Entry, by_job, reply as normal_reply, text as normal_text};

/// What a script came to, for comparison.
#[derive(Debug, PartialEq)]
pub(crate) struct Outcome {
    /// Commands with their replies, in order.
    pub(crate) replies: Vec<(String, Value)>,
    /// Events by job.
    pub(crate) events: BTreeMap<String, Vec<String>>,
}

/// The daemon that a script runs on.
pub(crate) struct Ground<'a> {
    /// What it is.
    pub(crate) program: &'a str,
    /// Its folder.
    pub(crate) folder: &'a Path,
    /// Its process id.
    pub(crate) pid: u32,
}

/// Says where a script was when its test fails.
struct Place<'a> {
    line: &'a str,
    ground: &'a Ground<'a>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{} failed at: {}", self.ground.program, self.line);
        }
    }
}

/// Runs a script over a connection whose greeting has not been read yet. The daemon ends with it.
pub(crate) fn run(script: &str, client: &mut Client, ground: &Ground<'_>) -> Outcome {
    client.negotiate();
    let mut replies = Vec::new();
    let mut log = Vec::new();
    let mut waited: BTreeMap<String, usize> = BTreeMap::new();
    let mut signalled = false;
    for line in script.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        assert!(!signalled, "{line} after the end");
        let _place = Place { line, ground };
        let answer = if let Some(what) = line.strip_prefix("wait ") {
            let times = waited.entry(what.to_owned()).or_default();
            *times += 1;
            wait(client, &mut log, what, *times);
            continue;
        } else if let Some(job) = line.strip_prefix("moving ") {
            until_moving(client, &mut log, job);
            continue;
        } else if let Some(job) = line.strip_prefix("gone ") {
            until_gone(client, &mut log, job);
            continue;
        } else if let Some(command) = line.strip_prefix("$ ") {
            shell(command, ground.folder)
        } else if line == "bitmaps" {
            log.push(Entry::Sent);
            client.send(b"{\"execute\": \"query-named-block-nodes\"}\n");
            bitmaps(&normal_reply(reply(client, &mut log)))
        } else if let Some(file) = line.strip_prefix("locks ") {
            json!(locked_bytes(&ground.folder.join(file)))
        } else if let Some(name) = line.strip_prefix("signal ") {
            signalled = true;
            log.push(Entry::Sent);
            signal(name, ground.pid);
            while let Some(message) = client.message() {
                log.push(Entry::Event(message));
            }
            continue;
        } else {
            log.push(Entry::Sent);
            client.send(format!("{line}\n").as_bytes());
            normal_reply(reply(client, &mut log))
        };
        replies.push((line.to_owned(), answer));
    }
    if !signalled {
        log.push(Entry::Sent);
        client.send(b"{\"execute\": \"quit\"}");
        replies.push(("quit".to_owned(), reply(client, &mut log)));
    }
    Outcome {
        replies,
        events: by_job(&log),
    }
}

fn shell(command: &str, folder: &Path) -> Value {
    let output = Command::new("sh")
        .args(["-c", &format!("exec 2>&1; {command}")])
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .expect("the shell runs");
    let printed = String::from_utf8_lossy(&output.stdout);
    json!({"printed": normal_text(&printed), "exit code": output.status.code()})
}

/// What the bitmaps of all qcow2 nodes are.
fn bitmaps(nodes: &Value) -> Value {
    let nodes = nodes["return"].as_array().expect("nodes").iter();
    let images = nodes.filter(|node| node["drv"] == json!("qcow2"));
    let shown = images.map(|node| {
        let of_image = &node["image"]["format-specific"]["data"]["bitmaps"];
        json!([
            node["node-name"],
            node["ro"],
            node["dirty-bitmaps"],
            of_image
        ])
    });
    shown.collect()
}

/// Bytes of a file on which somebody holds an OFD lock, as the kernel lists them.
pub(crate) fn locked_bytes(path: &Path) -> Vec<String> {
    let inode = format!(":{}", std::fs::metadata(path).expect("a file").ino());
    // While others lock and unlock, the list may show a line twice or not at all.
    let mut before = listed(&inode);
    loop {
        let now = listed(&inode);
        if now == before {
            return now;
        }
        before = now;
    }
}

fn listed(inode: &str) -> Vec<String> {
    let locks = std::fs::read_to_string("/proc/locks").expect("the kernel lists locks");
    let mut bytes: Vec<String> = locks
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| fields.get(1) == Some(&"OFDLCK"))
        .filter(|fields| fields.get(5).is_some_and(|file| file.ends_with(inode)))
        .map(|fields| format!("{} {}-{}", fields[3], fields[6], fields[7]))
        .collect();
    bytes.sort();
    bytes
}

fn signal(name: &str, pid: u32) {
    let signal = match name {
        "TERM" => Signal::TERM,
        "INT" => Signal::INT,
        "HUP" => Signal::HUP,
        other => panic!("which signal? {other}"),
    };
    let pid = Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid");
    kill_process(pid, signal).expect("sent");
}

fn until_moving(client: &mut Client, log: &mut Vec<Entry>, job: &str) {
    let started = Instant::now();
    loop {
        client.send(b"{\"execute\": \"query-jobs\"}\n");
        let jobs = reply(client, log);
        let jobs = jobs["return"].as_array().expect("a list");
        let found = jobs.iter().find(|one| one["id"] == job);
        if found.is_some_and(|job| job["current-progress"] != 0) {
            return;
        }
        assert!(started.elapsed() < DEADLINE, "{job} does not move");
    }
}

fn until_gone(client: &mut Client, log: &mut Vec<Entry>, job: &str) {
    let started = Instant::now();
    loop {
        client.send(b"{\"execute\": \"query-jobs\"}\n");
        let jobs = reply(client, log);
        let jobs = jobs["return"].as_array().expect("a list");
        if jobs.iter().all(|one| one["id"] != job) {
            return;
        }
        assert!(started.elapsed() < DEADLINE, "{job} stays");
    }
}

fn reply(client: &mut Client, log: &mut Vec<Entry>) -> Value {
    loop {
        let message = client.message().expect("a reply, not the end");
        if message.get("event").is_none() {
            return message;
        }
        log.push(Entry::Event(message));
    }
}

fn wait(client: &mut Client, log: &mut Vec<Entry>, what: &str, times: usize) {
    let Some((job, status)) = what.split_once(' ') else {
        panic!("wait what? {what}")
    };
    loop {
        let seen = if status == "stopped" {
            stops(log, job)
        } else {
            let reported = log.iter().filter(|entry| reports(entry, job, status));
            reported.count()
        };
        if seen >= times {
            return;
        }
        let message = client
            .message()
            .unwrap_or_else(|| panic!("the end instead of {what}"));
        log.push(Entry::Event(message));
    }
}

fn reports(entry: &Entry, job: &str, status: &str) -> bool {
    let wanted = json!({"id": job, "status": status});
    matches!(entry, Entry::Event(event)
        if event["event"] == "JOB_STATUS_CHANGE" && event["data"] == wanted)
}

/// How often a job was paused by an error; drains pause it too.
fn stops(log: &[Entry], job: &str) -> usize {
    let is_error = |entry: &Entry| {
        matches!(entry, Entry::Event(event) if event["event"] == "BLOCK_JOB_ERROR"
            && event["data"]["device"] == job && event["data"]["action"] == "stop")
    };
    let mut stopping = false;
    let mut count = 0;
    for entry in log {
        let pauses = reports(entry, job, "paused") || reports(entry, job, "standby");
        if stopping && pauses {
            count += 1;
        }
        stopping = is_error(entry) || (stopping && !pauses);
    }
    count
}
