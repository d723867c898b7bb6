//! Storage goes from one host to another, as README has it: two daemons in network namespaces of their own with a cable between
//! them, a writer that never stops, and a cable that is pulled meanwhile.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::daemon::{Daemon, Process};
use crate::images::SIZE;
use crate::oracle::{data_file, hole_file};
use crate::tools;
use crate::writer::Writer;

const HERE: &str = "10.117.0.1";
const THERE: &str = "10.117.0.2";

/// A network namespace, which is there as long as a process in it.
struct Host {
    keeper: Process,
}

impl Host {
    /// A host in a user namespace of its own. `None`: this user may not make one here.
    fn new() -> Option<Self> {
        Self::keep(Command::new("unshare").args(["--user", "--map-root-user", "--net"]))
    }

    /// One more in the same user namespace.
    fn beside(&self) -> Option<Self> {
        Self::keep(self.enter().args(["unshare", "--net"]))
    }

    /// Starts the process that keeps a namespace, and waits until it is in it.
    fn keep(command: &mut Command) -> Option<Self> {
        // Its input never ends before it is killed.
        command.args(["sh", "-c", "echo there; exec cat"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(Stdio::piped());
        let mut keeper = Process::start(command);
        let output = keeper.child().stdout.take().expect("piped");
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line).expect("read");
        if line == "there\n" {
            return Some(Self { keeper });
        }
        let mut reason = String::new();
        let errors = keeper.child().stderr.take();
        // What it says is for whoever reads why the test was skipped.
        let _ = errors.map(|mut errors| errors.read_to_string(&mut reason));
        eprintln!("SKIPPED: no network namespaces here: {}", reason.trim());
        None
    }

    /// A command that runs the program that is its first argument on this host.
    fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        let target = self.keeper.id().to_string();
        command.args(["--target", &target, "--user", "--net"]);
        command.arg("--preserve-credentials");
        command
    }

    fn ip(&self, arguments: &str) {
        let mut command = self.enter();
        command.arg("ip").args(arguments.split(' '));
        let ended = tools::run_command(command, "");
        assert_eq!(ended.code, Some(0), "ip {arguments}: {}", ended.errors);
    }
}

/// Two hosts and a cable between them, `eth` at both ends.
fn hosts() -> Option<(Host, Host)> {
    if !tools::have("unshare", "util-linux") || !tools::have("ip", "iproute2") {
        return None;
    }
    let here = Host::new()?;
    let there = here.beside()?;
    let other_end = there.keeper.id();
    here.ip(&format!(
        "link add eth type veth peer name eth netns {other_end}"
    ));
    for (host, address) in [(&here, HERE), (&there, THERE)] {
        host.ip(&format!("address add {address}/24 dev eth"));
        host.ip("link set lo up");
        host.ip("link set eth up");
    }
    Some((here, there))
}

#[test]
fn a_disk_moves_to_another_host_under_its_writer() {
    let Some((here, there)) = hosts() else {
        return;
    };
    let folder = || tempfile::tempdir().expect("a folder");
    let (source, target) = (folder(), folder());
    data_file(&source.path().join("disk.raw"), SIZE);
    hole_file(&target.path().join("new.raw"), SIZE);
    let listen = format!("addr.type=inet,addr.host={THERE},addr.port=10809");
    let target = Daemon::start_inside(
        there.enter(),
        target,
        &[
            "--blockdev",
            "file,node-name=new,filename=new.raw,discard=unmap",
            "--nbd-server",
            &listen,
            "--export",
            "nbd,id=in,node-name=new,writable=on",
        ],
    );
    let remote = format!(
        "nbd,node-name=there,server.type=inet,server.host={THERE},server.port=10809,export=new,reconnect-delay=60"
    );
    let source = Daemon::start_inside(
        here.enter(),
        source,
        &[
            "--blockdev",
            "file,node-name=disk,filename=disk.raw,discard=unmap",
            "--nbd-server",
            "addr.type=unix,addr.path=disk.sock",
            "--export",
            "nbd,id=out,node-name=disk,writable=on",
            "--blockdev",
            &remote,
        ],
    );
    let writer = Writer::start(source.path("disk.sock"), "disk", 0..SIZE, 77);
    let mut client = source.client();
    writer.goes_on(20);
    let job = json!({"job-id": "move", "device": "disk", "target": "there", "sync": "full",
        "copy-mode": "write-blocking", "speed": 1 << 20});
    client.run("blockdev-mirror", job);
    client.wait_for("move", "running");
    writer.goes_on(5);
    // Somebody pulls the cable, and sees after a while what he has done.
    here.ip("link set eth down");
    let stopped = client.run("query-block-jobs", json!({}));
    assert_eq!(stopped[0]["status"], "running", "{stopped}");
    here.ip("link set eth up");
    client.run("block-job-set-speed", json!({"device": "move", "speed": 0}));
    client.wait_for("move", "ready");
    writer.goes_on(20);
    client.run("job-complete", json!({"id": "move"}));
    client.wait_for("move", "null");
    let before = fs::read(source.path("disk.raw")).expect("read");
    writer.goes_on(100);
    let exports = client.run("query-block-exports", json!({}));
    assert_eq!(exports[0]["node-name"], "there", "{exports}");
    let model = writer.end();
    client.run("block-export-del", json!({"id": "out", "mode": "hard"}));
    // It is gone once its client is.
    while client.run("query-block-exports", json!({})) != json!([]) {
        std::thread::yield_now();
    }
    client.run("blockdev-del", json!({"node-name": "there"}));
    assert!(
        fs::read(source.path("disk.raw")).expect("read") == before,
        "the old disk is left alone"
    );
    drop(client);
    source.quit();
    let kept = target.path("new.raw");
    let keeps_file = fs::File::open(&kept).expect("opened");
    target.quit();
    let mut moved = Vec::new();
    (&keeps_file).read_to_end(&mut moved).expect("read");
    assert!(
        moved == model,
        "the new disk is what the writer has written"
    );
}
