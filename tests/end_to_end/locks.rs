//! Image locks between processes: ours and QEMU's keep each other off an image, in both directions.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::{Client, DEADLINE};
use crate::daemon::{Daemon, Process};
use crate::images::image;
use crate::oracle::{compare, data_file, hole_file};
use crate::script::locked_bytes;
use crate::tools;

/// How long the daemon waits for locks of a process that was killed.
const LOCK_OF_NOBODY_WAIT: Duration = Duration::from_secs(1);

fn files(folder: &Path) {
    data_file(&folder.join("s.raw"), 4 << 20);
    hole_file(&folder.join("t.raw"), 4 << 20);
    hole_file(&folder.join("u.raw"), 4 << 20);
}

const TOOLS: &str = "
$ qemu-io -f raw -c 'write 0 4k' s.raw | grep -v ops
$ qemu-io -f raw -r -c 'read 0 4k' s.raw | grep -v ops
$ qemu-img info -f raw s.raw | grep -v disk
$ qemu-img info -f raw -U s.raw | grep -v disk
$ qemu-io -f raw -c 'write 0 4k' t.raw | grep -v ops
$ qemu-io -f raw -r -c 'read 0 4k' t.raw | grep -v ops
$ qemu-img info -f raw t.raw | grep -v disk
$ qemu-img info -f raw -U t.raw | grep -v disk
$ qemu-img compare -f raw -F raw s.raw u.raw
$ qemu-img create -q -f raw t.raw 4M
$ qemu-img resize -q -f raw s.raw 4M
locks s.raw
locks t.raw
";

/// What QEMU's tools may do with the images of a daemon in each phase of its jobs.
#[test]
fn tools_meet_the_daemon() {
    if !tools::have("qemu-io", "qemu-utils") {
        return;
    }
    for (job, hold, options) in [
        (
            "blockdev-backup",
            "wait j running",
            r#", "speed": 1, "sync": "full""#,
        ),
        ("blockdev-backup", "wait j running", r#", "sync": "none""#),
        ("blockdev-mirror", "wait j ready", r#", "sync": "full""#),
        (
            "blockdev-mirror",
            "wait j pending",
            r#", "sync": "full", "auto-finalize": false"#,
        ),
    ] {
        let complete = if hold.contains("pending") {
            "wait j ready\n{\"execute\": \"job-complete\", \"arguments\": {\"id\": \"j\"}}"
        } else {
            ""
        };
        let script = format!(
            r#"
            {{"execute": "blockdev-add", "arguments": {{"driver": "file", "node-name": "s", "filename": "s.raw"}}}}
            {{"execute": "blockdev-add", "arguments": {{"driver": "raw", "node-name": "t", "file": {{"driver": "file", "filename": "t.raw"}}}}}}
            {TOOLS}
            {{"execute": "{job}", "arguments": {{"job-id": "j", "device": "s", "target": "t"{options}}}}}
            {complete}
            {hold}
            {TOOLS}
            {{"execute": "job-cancel", "arguments": {{"id": "j"}}}}
            wait j null
            {TOOLS}
            "#
        );
        compare(&script, files);
    }
}

#[test]
fn locking_off_and_force_share() {
    compare(
        r#"
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "s", "filename": "s.raw", "read-only": true, "force-share": true}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "t", "filename": "t.raw", "locking": "off"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "u", "filename": "u.raw", "locking": "on"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "s2", "filename": "s.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "u2", "filename": "u.raw"}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "j", "device": "s", "target": "t", "sync": "full"}}
        wait j ready
        locks s.raw
        locks t.raw
        $ qemu-io -f raw -c 'write 0 4k' t.raw | grep -v ops
        {"execute": "job-cancel", "arguments": {"id": "j"}}
        wait j null
        {"execute": "blockdev-backup", "arguments": {"job-id": "b", "device": "s", "target": "u", "sync": "full", "speed": 1}}
        locks s.raw
        locks u.raw
        # Two open files of one process conflict like two processes.
        {"execute": "blockdev-mirror", "arguments": {"job-id": "k", "device": "t", "target": "s2", "sync": "full"}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "k", "device": "t", "target": "u2", "sync": "full"}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "k", "device": "u2", "target": "t", "sync": "full"}}
        wait k ready
        locks u.raw
        {"execute": "blockdev-create", "arguments": {"job-id": "c", "options": {"driver": "file", "filename": "u.raw", "size": 4194304}}}
        wait c concluded
        {"execute": "query-jobs"}
        {"execute": "block_resize", "arguments": {"node-name": "s2", "size": 4096}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "w", "file": "s2", "offset": 512}}
        locks s.raw
        "#,
        files,
    );
}

/// What is in a backup's way is told of by the job, or, where its filter would take over users of the source, by that.
#[test]
fn a_backup_onto_its_own_file() {
    compare(
        r#"
        $ ln -s s.raw twin.raw
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "s", "filename": "s.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "twin", "filename": "twin.raw"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "t", "filename": "t.raw"}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "j", "device": "s", "target": "twin", "sync": "full"}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "j", "device": "twin", "target": "s", "sync": "full"}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "j", "device": "s", "target": "t", "sync": "full", "filter-node-name": "twin"}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "j", "device": "s", "target": "t", "sync": "full", "filter-node-name": "1"}}
        {"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}}
        {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "s", "writable": true}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "j", "device": "s", "target": "twin", "sync": "full"}}
        {"execute": "blockdev-backup", "arguments": {"job-id": "j", "device": "twin", "target": "s", "sync": "full"}}
        {"execute": "query-block-exports"}
        locks s.raw
        {"execute": "blockdev-backup", "arguments": {"job-id": "k", "device": "s", "target": "t", "sync": "full"}}
        wait k null
        locks s.raw
        $ cmp s.raw t.raw
        "#,
        files,
    );
}

/// A qemu-io that holds an image until it is told to go.
pub(crate) struct Holder {
    process: Process,
    lines: BufReader<ChildStdout>,
}

impl Holder {
    /// Opens a raw image with these flags, and has it open once this returns.
    fn open(folder: &Path, flags: &[&str], image: &str) -> Self {
        Self::open_as("raw", folder, flags, image)
    }

    /// The same with an image of any format.
    pub(crate) fn open_as(format: &str, folder: &Path, flags: &[&str], image: &str) -> Self {
        let mut process = Process::start(
            Command::new("qemu-io")
                .args(["-f", format])
                .args(flags)
                .arg(image)
                .current_dir(folder)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped()),
        );
        let lines = BufReader::new(process.child().stdout.take().expect("piped"));
        let mut holder = Self { process, lines };
        // It answers only once the image is open.
        holder.say("length\n");
        let mut line = String::new();
        while !line.contains("MiB") {
            line.clear();
            assert!(
                holder.lines.read_line(&mut line).expect("read") > 0,
                "it has left"
            );
        }
        holder
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    fn say(&mut self, text: &str) {
        let input = self.process.child().stdin.as_mut().expect("piped");
        input.write_all(text.as_bytes()).expect("sent");
        input.flush().expect("sent");
    }

    /// Lets the image go.
    pub(crate) fn leave(mut self) {
        self.say("quit\n");
        assert!(self.process.wait().success());
    }
}

fn add(client: &mut Client, name: &str) {
    let filename = format!("{name}.raw");
    let node = json!({"driver": "file", "node-name": name, "filename": filename});
    client.run("blockdev-add", node);
}

/// They hold, we want: refused in QEMU's words and with the holder's process, and possible once it has gone.
#[test]
fn the_daemon_meets_tools() {
    if !tools::have("qemu-io", "qemu-utils") {
        return;
    }
    let daemon = Daemon::start();
    files(daemon.folder.path());
    let mut client = daemon.client();
    for name in ["s", "t", "u"] {
        add(&mut client, name);
    }
    let job = |name: &str, source: &str, target: &str| json!({"job-id": name, "device": source, "target": target, "sync": "full"});

    // A tool that writes shares everything, so a backup may go beside it; what needs it to keep off may not.
    let writer = Holder::open(daemon.folder.path(), &[], "t.raw");
    let by = format!(" (held by process {})", writer.process.id());
    client.run("blockdev-backup", job("j1", "s", "t"));
    client.wait_for("j1", "null");
    assert_eq!(
        client.refusal("blockdev-mirror", job("refused", "s", "t")),
        format!("Failed to get shared \"consistent read\" lock{by}")
    );
    assert_eq!(
        client.refusal("blockdev-backup", job("refused", "t", "u")),
        format!("Failed to get shared \"write\" lock{by}")
    );
    assert_eq!(client.run("query-jobs", json!({})), json!([]));
    writer.leave();
    client.run("blockdev-backup", job("j2", "t", "u"));
    client.wait_for("j2", "null");

    let reader = Holder::open(daemon.folder.path(), &["-r"], "t.raw");
    let by = format!(" (held by process {})", reader.process.id());
    assert_eq!(
        client.refusal("blockdev-mirror", job("refused", "s", "t")),
        format!("Failed to get shared \"consistent read\" lock{by}")
    );
    client.run("blockdev-backup", job("j3", "t", "u"));
    client.wait_for("j3", "null");
    reader.leave();

    let careless = Holder::open(daemon.folder.path(), &["-r", "-U"], "t.raw");
    client.run("blockdev-backup", job("j4", "s", "t"));
    client.wait_for("j4", "null");
    careless.leave();
    assert_eq!(locked_bytes(&daemon.path("t.raw")), Vec::<String>::new());
    daemon.quit();
}

/// Two daemons of ours on the same files; the one that is killed leaves nothing behind.
#[test]
fn two_daemons_and_one_that_is_killed() {
    let first = Daemon::start();
    files(first.folder.path());
    let mut holder = first.client();
    for name in ["s", "t"] {
        add(&mut holder, name);
    }
    let second = Daemon::start();
    let mut other = second.client();
    for name in ["s", "t", "u"] {
        let path = first.path(&format!("{name}.raw"));
        other.run(
            "blockdev-add",
            json!({"driver": "file", "node-name": name, "filename": path}),
        );
    }
    let job = |name: &str, source: &str, target: &str| json!({"job-id": name, "device": source, "target": target, "sync": "full", "auto-finalize": false});
    holder.run("blockdev-backup", job("held", "s", "t"));
    holder.wait_for("held", "pending");
    let by = format!(" (held by process {})", first.pid());
    assert_eq!(
        other.refusal("blockdev-mirror", job("j", "u", "s")),
        format!("Failed to get \"write\" lock{by}")
    );
    // A backup's target may be read, but not by somebody who wants it to stay as it is.
    assert_eq!(
        other.refusal("blockdev-backup", job("j", "t", "u")),
        format!("Failed to get shared \"write\" lock{by}")
    );
    // One source may have many readers.
    other.run("blockdev-backup", job("beside", "s", "u"));
    other.wait_for("beside", "pending");
    other.run("job-finalize", json!({"id": "beside"}));
    other.wait_for("beside", "null");
    let folder = first.kill();
    // The kernel takes a killed process's ring apart, and with it the open files, a moment after the process has ended.
    let started = Instant::now();
    let mirror = job("j", "u", "t");
    while other
        .command("blockdev-mirror", mirror.clone())
        .get("error")
        .is_some()
    {
        assert!(
            started.elapsed() < DEADLINE,
            "the locks of a killed daemon stay"
        );
    }
    // Each of its files goes by itself.
    while !locked_bytes(&folder.path().join("s.raw")).is_empty() {
        assert!(started.elapsed() < DEADLINE, "one of its locks stays");
    }
    other.wait_for("j", "ready");
    other.run("job-cancel", json!({"id": "j"}));
    other.wait_for("j", "null");
    second.quit();
}

/// The kernel takes a killed process's ring apart, and with it the locks, a moment after the process has ended.
#[test]
fn an_image_of_a_daemon_that_was_killed_is_opened_at_once() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    let daemon = Daemon::start();
    image(daemon.folder.path(), "a.qcow2", &[]);
    let mut client = daemon.client();
    let node = json!({"driver": "qcow2", "node-name": "a",
        "file": {"driver": "file", "filename": daemon.path("a.qcow2")}});
    for _ in 0..8 {
        let killed = Daemon::start();
        killed.client().run("blockdev-add", node.clone());
        let by = format!("(held by process {})", killed.pid());
        let held = client.refusal("blockdev-add", node.clone());
        assert!(held.ends_with(&by), "{held}");
        killed.kill();
        let started = Instant::now();
        loop {
            let asked = Instant::now();
            let reply = client.command("blockdev-add", node.clone());
            if reply.get("error").is_none() {
                break;
            }
            // On a machine that has too much to do it takes longer than anybody waits for it.
            assert!(asked.elapsed() >= LOCK_OF_NOBODY_WAIT, "refused at once");
            assert!(started.elapsed() < DEADLINE, "it is locked for good");
        }
        client.run("blockdev-del", json!({"node-name": "a"}));
    }
    daemon.quit();
}
