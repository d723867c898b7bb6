//! Jobs whose NBD server ends the connection after any number of bytes, again and again: with a `reconnect-delay` they go on and
//! every byte is right; without one they stop or fail as their policy says. Nothing hangs.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::{Daemon, Process};
use crate::images::run;
use crate::nbd_nodes::{assert_same, serve};
use crate::oracle::{data_file, hole_file};
use crate::tools;

const LENGTH: u64 = 8 << 20;

/// Connections that are cut before all are left whole.
const CUTS: usize = 8;

/// xorshift: the same numbers in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Stands between a client and the server of a folder, and cuts their connections.
struct Relay {
    path: PathBuf,
    connections: Arc<AtomicUsize>,
}

impl Relay {
    /// Listens at `relay.sock`; what it cuts off where is decided by `seed`. The first handshake is left whole.
    fn start(folder: &Path, seed: u64) -> Self {
        let path = folder.join("relay.sock");
        let listener = UnixListener::bind(&path).expect("a socket");
        let server = folder.join("server.sock");
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        std::thread::spawn(move || {
            let mut random = Random(seed * 0x9e37_79b9 + 1);
            for client in listener.incoming() {
                // The server may be gone, and the test with it.
                let (Ok(client), Ok(server)) = (client, UnixStream::connect(&server)) else {
                    return;
                };
                let number = count.fetch_add(1, Ordering::SeqCst);
                // Within a handshake, a head or a status, or somewhere in what is copied.
                let mut limit = || match (number, random.below(3)) {
                    (CUTS.., _) => u64::MAX,
                    (1.., 0) => random.below(1000),
                    _ => 1000 + random.below(3 << 20),
                };
                let limits = [limit(), limit()];
                let twice = [&client, &server].map(|stream| stream.try_clone().expect("cloned"));
                let [client_too, server_too] = twice;
                std::thread::spawn(move || pass_on(client, server, limits[0]));
                std::thread::spawn(move || pass_on(server_too, client_too, limits[1]));
            }
        });
        Self { path, connections }
    }

    /// The node behind it.
    fn node(&self, more: Value) -> Value {
        let mut node = json!({"driver": "nbd", "node-name": "remote", "open-timeout": 20,
            "server": {"type": "unix", "path": self.path}});
        if let (Some(node), Value::Object(more)) = (node.as_object_mut(), more) {
            node.extend(more);
        }
        node
    }
}

/// Passes at most so many bytes on, then ends both connections.
fn pass_on(mut from: UnixStream, mut to: UnixStream, limit: u64) {
    let mut left = limit;
    let mut buffer = [0; 16 << 10];
    while left > 0 {
        let room = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let Ok(count @ 1..) = from.read(&mut buffer[..room]) else {
            break;
        };
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
        left -= count as u64;
    }
    for stream in [from, to] {
        // Whoever came first has done it.
        let _ = stream.shutdown(Shutdown::Both);
    }
}

fn have_tools() -> bool {
    tools::have("qemu-nbd", "qemu-utils")
}

/// A server of `remote.raw` (nbdkit 1.32 fails an assertion when clients leave in the middle of what it sends).
fn server(folder: &Path) -> Process {
    let arguments = [
        "-f",
        "raw",
        "-t",
        "-e",
        "0",
        "-k",
        "server.sock",
        "remote.raw",
    ];
    serve(folder, "qemu-nbd", &arguments)
}

fn local() -> Value {
    json!({"driver": "file", "node-name": "local", "filename": "local.raw"})
}

/// Resumes a job whenever it has stopped, until it has ended: why.
fn until_concluded(client: &mut Client) -> Option<String> {
    loop {
        let jobs = client.run("query-jobs", json!({}));
        if jobs[0]["status"] == "concluded" {
            return jobs[0]["error"].as_str().map(str::to_owned);
        }
        match client.events.pop() {
            Some(event) if event["data"]["action"] == "stop" => {
                // Another request may have failed at the same time, which was told before.
                client.command("block-job-resume", json!({"device": "j"}));
            }
            Some(_) => {}
            None => {
                let event = client.message().expect("an event, not the end");
                client.events.push(event);
            }
        }
    }
}

#[test]
fn copies_go_on_over_connections_that_are_cut_anywhere() {
    if !have_tools() {
        return;
    }
    for seed in 0..2 {
        for (command, to_remote) in [
            ("blockdev-backup", true),
            ("blockdev-backup", false),
            ("blockdev-mirror", true),
            ("blockdev-mirror", false),
        ] {
            let daemon = Daemon::start_logging();
            let folder = daemon.path("");
            let (from, to) = match to_remote {
                true => ("local", "remote"),
                false => ("remote", "local"),
            };
            data_file(&folder.join(format!("{from}.raw")), LENGTH);
            hole_file(&folder.join(format!("{to}.raw")), LENGTH);
            let server = server(&folder);
            let relay = Relay::start(&folder, seed);
            let mut client = daemon.client();
            client.run("blockdev-add", local());
            client.run("blockdev-add", relay.node(json!({"reconnect-delay": 600})));
            let job = json!({"job-id": "j", "device": from, "target": to, "sync": "full",
                "auto-dismiss": false});
            client.run(command, job);
            if command == "blockdev-mirror" {
                client.wait_for("j", "ready");
                client.run("job-complete", json!({"id": "j"}));
            }
            client.wait_for("j", "concluded");
            let jobs = client.run("query-jobs", json!({}));
            assert_eq!(jobs[0].get("error"), None, "{command} {seed}");
            client.run("job-dismiss", json!({"id": "j"}));
            for name in ["local", "remote"] {
                client.run("blockdev-del", json!({"node-name": name}));
            }
            let connections = relay.connections.load(Ordering::SeqCst);
            assert!(
                connections > 3,
                "{connections} connections are none that were cut"
            );
            drop(server);
            assert_same(&folder, "local.raw", "remote.raw");
            daemon.assert_no_bug();
        }
    }
}

#[test]
fn chains_are_streamed_and_committed_over_connections_that_are_cut_anywhere() {
    if !have_tools() {
        return;
    }
    for seed in 10..12 {
        for command in ["block-stream", "block-commit"] {
            let daemon = Daemon::start_logging();
            let folder = daemon.path("");
            data_file(&folder.join("remote.raw"), LENGTH);
            let backing = [
                "create",
                "-q",
                "-f",
                "qcow2",
                "-b",
                "remote.raw",
                "-F",
                "raw",
            ];
            run(
                &folder,
                "qemu-img",
                &[&backing[..], &["top.qcow2"]].concat(),
            );
            let write = [
                "-c",
                "write -P 7 1M 3M",
                "-c",
                "write -P 8 4095k 2k",
                "top.qcow2",
            ];
            run(&folder, "qemu-io", &write);
            let convert = ["convert", "-O", "raw", "top.qcow2", "wanted.raw"];
            run(&folder, "qemu-img", &convert);
            let server = server(&folder);
            let relay = Relay::start(&folder, seed);
            let mut client = daemon.client();
            let more = json!({"reconnect-delay": 600, "read-only": true});
            client.run("blockdev-add", relay.node(more));
            let top = json!({"driver": "qcow2", "node-name": "top", "backing": "remote",
                "file": {"driver": "file", "filename": "top.qcow2"}});
            client.run("blockdev-add", top);
            client.run(command, json!({"job-id": "j", "device": "top"}));
            let result = if command == "block-commit" {
                client.wait_for("j", "ready");
                client.run("job-complete", json!({"id": "j"}));
                "remote.raw"
            } else {
                "top.qcow2"
            };
            client.wait_for("j", "null");
            for name in ["top", "remote"] {
                client.run("blockdev-del", json!({"node-name": name}));
            }
            drop(server);
            run(&folder, "qemu-img", &["compare", "wanted.raw", result]);
            daemon.assert_no_bug();
        }
    }
}

/// Without a delay each cut is an error, which stops the job or ends it. A target that may have lost what it had answered is never
/// said to be whole.
#[test]
fn without_a_delay_a_job_stops_or_fails_as_its_policy_says() {
    if !have_tools() {
        return;
    }
    let mut failed = 0;
    for seed in 20..24 {
        for to_remote in [false, true] {
            let daemon = Daemon::start_logging();
            let folder = daemon.path("");
            let (from, to, policy) = match to_remote {
                true => ("local", "remote", "on-target-error"),
                false => ("remote", "local", "on-source-error"),
            };
            data_file(&folder.join(format!("{from}.raw")), LENGTH);
            hole_file(&folder.join(format!("{to}.raw")), LENGTH);
            let server = server(&folder);
            let relay = Relay::start(&folder, seed);
            let mut client = daemon.client();
            client.run("blockdev-add", local());
            client.run("blockdev-add", relay.node(json!({})));
            let policy_is = match to_remote {
                true => "report",
                false => "stop",
            };
            let job = json!({"job-id": "j", "device": from, "target": to, "sync": "full",
                "auto-dismiss": false, policy: policy_is});
            client.run("blockdev-backup", job);
            let error = until_concluded(&mut client);
            client.run("job-dismiss", json!({"id": "j"}));
            for name in ["local", "remote"] {
                client.run("blockdev-del", json!({"node-name": name}));
            }
            drop(server);
            match error {
                None => assert_same(&folder, "local.raw", "remote.raw"),
                Some(text) => {
                    assert!(to_remote, "a source is read again: {text}");
                    assert_eq!(text, "Input/output error");
                    failed += 1;
                }
            }
            daemon.assert_no_bug();
        }
    }
    assert!(
        failed > 0,
        "no connection was cut in the middle of a target"
    );
}
