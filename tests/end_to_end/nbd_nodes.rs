//! Nodes on NBD servers: described and shown as by qemu-storage-daemon; jobs with such nodes as source, target and base, on
//! qemu-nbd, nbdkit and our own server, also while the server goes and comes back.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::daemon::{Daemon, Process, wait_until_exists};
use crate::images::run;
use crate::nbd::{export, start_server};
use crate::oracle::{compare, data_file, hole_file};
use crate::tools;

const LENGTH: u64 = 8 << 20;

fn line(command: &str, arguments: &Value) -> String {
    format!("{}\n", json!({"execute": command, "arguments": arguments}))
}

fn unix() -> Value {
    json!({"type": "unix", "path": "server.sock"})
}

/// A socket may be there a moment before its server listens.
fn node(name: &str, more: Value) -> Value {
    let mut node =
        json!({"driver": "nbd", "node-name": name, "server": unix(), "open-timeout": 20});
    if let (Some(node), Value::Object(more)) = (node.as_object_mut(), more) {
        node.extend(more);
    }
    node
}

/// A server's process, which does not outlive its test.
pub(crate) fn serve(folder: &Path, program: &str, arguments: &[&str]) -> Process {
    let socket = folder.join("server.sock");
    // One that was killed leaves it behind.
    let _ = std::fs::remove_file(&socket);
    // qemu-nbd takes no other path than a whole one.
    let path = socket.display().to_string();
    let arguments = arguments.iter().map(|argument| match *argument {
        "server.sock" => path.as_str(),
        other => other,
    });
    let process = Process::start(
        Command::new(program)
            .args(arguments)
            .current_dir(folder)
            .stderr(Stdio::null()),
    );
    wait_until_exists(&socket);
    process
}

fn nbdkit(folder: &Path, filters: &[&str], parameters: &[&str]) -> Process {
    let mut arguments = vec!["-f", "-U", "server.sock"];
    arguments.extend(filters);
    arguments.push("file");
    arguments.extend(parameters);
    serve(folder, "nbdkit", &arguments)
}

fn have_tools() -> bool {
    tools::have("qemu-nbd", "qemu-utils") && tools::have("nbdkit", "nbdkit")
}

#[test]
fn what_cannot_be_opened_is_told_in_the_same_words() {
    let mut script = String::new();
    for server in [
        unix(),
        json!({"type": "unix"}),
        json!({}),
        json!({"type": "unix", "path": "x".repeat(200)}),
        json!({"type": "unix", "path": "plain"}),
        json!({"type": "inet", "host": "127.0.0.1", "port": "1"}),
        json!({"type": "inet", "host": "127.0.0.1", "port": "zzz"}),
        json!({"type": "fd", "str": "99"}),
    ] {
        let node = json!({"driver": "nbd", "node-name": "n", "server": server});
        script += &line("blockdev-add", &node);
    }
    script += &line("blockdev-add", &json!({"driver": "nbd", "node-name": "n"}));
    for more in [
        json!({"tls-creds": "nope"}),
        json!({"open-timeout": -1}),
        json!({"path": "x"}),
    ] {
        script += &line("blockdev-add", &node("n", more));
    }
    compare(&script, |folder| hole_file(&folder.join("plain"), 512));
}

#[test]
fn jobs_copy_from_servers_and_to_them() {
    if !have_tools() {
        return;
    }
    let qemu: &[&str] = &["-f", "raw", "-t", "-k", "server.sock", "remote.raw"];
    let kit: &[&str] = &["-f", "-U", "server.sock", "file", "remote.raw"];
    for (program, arguments, more) in [
        ("qemu-nbd", qemu, json!({})),
        ("nbdkit", kit, json!({})),
        ("nbdkit", kit, json!({"x-connections": 4})),
    ] {
        for (command, to_remote) in [
            ("blockdev-backup", true),
            ("blockdev-backup", false),
            ("blockdev-mirror", true),
            ("blockdev-mirror", false),
        ] {
            let daemon = Daemon::start_logging();
            let folder = daemon.path("");
            let (from, to) = match to_remote {
                true => ("local.raw", "remote.raw"),
                false => ("remote.raw", "local.raw"),
            };
            data_file(&folder.join(from), LENGTH);
            hole_file(&folder.join(to), LENGTH);
            let server = serve(&folder, program, arguments);
            let mut client = daemon.client();
            let local = json!({"driver": "file", "node-name": "local", "filename": "local.raw"});
            client.run("blockdev-add", local);
            client.run("blockdev-add", node("remote", more.clone()));
            let (device, target) = match to_remote {
                true => ("local", "remote"),
                false => ("remote", "local"),
            };
            let job = json!({"job-id": "j", "device": device, "target": target, "sync": "full"});
            client.run(command, job);
            if command == "blockdev-mirror" {
                client.wait_for("j", "ready");
                client.run("job-complete", json!({"id": "j"}));
            }
            client.wait_for("j", "null");
            for name in ["local", "remote"] {
                client.run("blockdev-del", json!({"node-name": name}));
            }
            drop(server);
            assert_same(&folder, from, to);
            daemon.assert_no_bug();
        }
    }
}

pub(crate) fn assert_same(folder: &Path, one: &str, other: &str) {
    let read = |name| std::fs::read(folder.join(name)).expect("a file");
    assert!(read(one) == read(other), "{one} and {other} differ");
}

#[test]
fn a_mirror_goes_on_when_its_server_was_killed_and_came_back() {
    if !have_tools() {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.path("");
    data_file(&folder.join("local.raw"), LENGTH);
    hole_file(&folder.join("remote.raw"), LENGTH);
    let start = || nbdkit(&folder, &["--filter=delay"], &["remote.raw", "wdelay=20ms"]);
    let mut server = start();
    let mut client = daemon.client();
    let local = json!({"driver": "file", "node-name": "local", "filename": "local.raw"});
    client.run("blockdev-add", local);
    client.run(
        "blockdev-add",
        node("remote", json!({"reconnect-delay": 30})),
    );
    let job = json!({"job-id": "j", "device": "local", "target": "remote", "sync": "full",
        "speed": 4 << 20, "buf-size": 1 << 20});
    client.run("blockdev-mirror", job);
    let mut copied = 0;
    for _ in 0..3 {
        // Some requests further on; the job is slow enough to be caught in the middle.
        copied = loop {
            let jobs = client.run("query-jobs", json!({}));
            let now = jobs[0]["current-progress"].as_u64().expect("a number");
            if now > copied {
                break now;
            }
        };
        server.kill();
        server = start();
    }
    client.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
    client.wait_for("j", "ready");
    client.run("job-complete", json!({"id": "j"}));
    client.wait_for("j", "concluded");
    client.wait_for("j", "null");
    client.run("blockdev-del", json!({"node-name": "remote"}));
    drop(server);
    assert_same(&folder, "local.raw", "remote.raw");
}

#[test]
fn a_job_whose_server_is_gone_ends_with_an_error() {
    if !have_tools() {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.path("");
    data_file(&folder.join("local.raw"), LENGTH);
    hole_file(&folder.join("remote.raw"), LENGTH);
    let server = nbdkit(&folder, &[], &["remote.raw"]);
    let mut client = daemon.client();
    let local = json!({"driver": "file", "node-name": "local", "filename": "local.raw"});
    client.run("blockdev-add", local);
    client.run("blockdev-add", node("remote", json!({})));
    let job = json!({"job-id": "j", "device": "local", "target": "remote", "sync": "full",
        "speed": 1 << 20, "auto-dismiss": false});
    client.run("blockdev-backup", job);
    server.kill();
    client.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
    client.wait_for("j", "concluded");
    let jobs = client.run("query-jobs", json!({}));
    assert_eq!(jobs[0]["error"], "Input/output error");
}

/// The disk of the server that comes back is empty, and nobody asks it for what the other one had made safe.
#[test]
fn a_node_that_was_flushed_ends_well_whatever_became_of_its_server() {
    if !have_tools() {
        return;
    }
    for comes_back in [true, false] {
        let daemon = Daemon::start();
        let folder = daemon.path("");
        data_file(&folder.join("local.raw"), LENGTH);
        let start = || {
            serve(
                &folder,
                "nbdkit",
                &["-f", "-U", "server.sock", "memory", "8M"],
            )
        };
        let server = start();
        let mut client = daemon.client();
        let local = json!({"driver": "file", "node-name": "local", "filename": "local.raw"});
        client.run("blockdev-add", local);
        client.run("blockdev-add", node("remote", json!({})));
        let job = json!({"job-id": "j", "device": "local", "target": "remote", "sync": "full",
            "auto-dismiss": false});
        client.run("blockdev-backup", job);
        client.wait_for("j", "concluded");
        client.run("job-dismiss", json!({"id": "j"}));
        server.kill();
        let _again = comes_back.then(start);
        daemon.quit();
    }
}

#[test]
fn errors_of_a_server_are_errors_of_the_job() {
    if !have_tools() {
        return;
    }
    let daemon = Daemon::start();
    let folder = daemon.path("");
    data_file(&folder.join("local.raw"), LENGTH);
    hole_file(&folder.join("remote.raw"), LENGTH);
    let errors = [
        "remote.raw",
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=100%",
    ];
    let _server = nbdkit(&folder, &["--filter=error"], &errors);
    let mut client = daemon.client();
    let local = json!({"driver": "file", "node-name": "local", "filename": "local.raw"});
    client.run("blockdev-add", local);
    client.run("blockdev-add", node("remote", json!({})));
    let job = json!({"job-id": "j", "device": "local", "target": "remote", "sync": "full",
        "auto-dismiss": false});
    client.run("blockdev-backup", job);
    client.wait_for("j", "concluded");
    let jobs = client.run("query-jobs", json!({}));
    assert_eq!(jobs[0]["error"], "No space left on device");
}

#[test]
fn chains_stand_on_servers_and_stream_from_them_and_commit_to_them() {
    if !have_tools() {
        return;
    }
    for command in ["block-stream", "block-commit"] {
        let daemon = Daemon::start();
        let folder = daemon.path("");
        data_file(&folder.join("remote.raw"), LENGTH);
        let create = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "remote.raw",
            "-F",
            "raw",
            "top.qcow2",
        ];
        run(&folder, "qemu-img", &create);
        let write = [
            "-c",
            "write -P 7 1M 100k",
            "-c",
            "write -P 8 4095k 2k",
            "top.qcow2",
        ];
        run(&folder, "qemu-io", &write);
        let convert = ["convert", "-O", "raw", "top.qcow2", "wanted.raw"];
        run(&folder, "qemu-img", &convert);
        let server = nbdkit(
            &folder,
            &["--filter=delay"],
            &["remote.raw", "rdelay=1ms", "wdelay=1ms"],
        );
        let mut client = daemon.client();
        client.run("blockdev-add", node("base", json!({"read-only": true})));
        let top = json!({"driver": "qcow2", "node-name": "top", "backing": "base",
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
        for name in ["top", "base"] {
            client.run("blockdev-del", json!({"node-name": name}));
        }
        drop(server);
        run(&folder, "qemu-img", &["compare", "wanted.raw", result]);
    }
}

#[test]
fn two_daemons_copy_over_our_own_server() {
    let remote = Daemon::start();
    let local = Daemon::start();
    data_file(&local.path("local.raw"), LENGTH);
    hole_file(&remote.path("remote.raw"), LENGTH);
    let mut server = remote.client();
    let file = json!({"driver": "file", "node-name": "disk", "filename": "remote.raw"});
    server.run("blockdev-add", file);
    start_server(&remote, &mut server, 100);
    export(&mut server, "disk");
    let mut client = local.client();
    let file = json!({"driver": "file", "node-name": "local", "filename": "local.raw"});
    client.run("blockdev-add", file);
    let address = json!({"type": "unix", "path": remote.path("nbd.sock")});
    let disk = json!({"driver": "nbd", "node-name": "remote", "export": "disk", "server": address});
    client.run("blockdev-add", disk);
    let job = json!({"job-id": "j", "device": "local", "target": "remote", "sync": "full"});
    client.run("blockdev-mirror", job);
    client.wait_for("j", "ready");
    client.run("job-complete", json!({"id": "j"}));
    client.wait_for("j", "null");
    client.run("blockdev-del", json!({"node-name": "remote"}));
    server.run("nbd-server-stop", json!({}));
    let read = |path| std::fs::read(path).expect("a file");
    assert!(read(local.path("local.raw")) == read(remote.path("remote.raw")));
}

/// What is said of a server is what it was opened with; what is said of the node may change, if the server allows it.
#[test]
fn a_node_is_opened_in_another_way_as_by_qemu() {
    if !have_tools() {
        return;
    }
    let socket = |path: &str| json!({"type": "unix", "path": path});
    let said = |server: Value, more: Value| {
        let mut node = json!({"driver": "nbd", "node-name": "n", "server": server});
        if let (Some(node), Value::Object(more)) = (node.as_object_mut(), more) {
            node.extend(more);
        }
        node
    };
    let reopen = |node: Value| line("blockdev-reopen", &json!({"options": [node]}));
    let full = json!({"export": "e", "reconnect-delay": 7, "open-timeout": 20});
    let with = |change: Value| {
        let mut more = full.clone();
        if let (Some(more), Value::Object(change)) = (more.as_object_mut(), change) {
            more.extend(change);
            more.retain(|_, value| !value.is_null());
        }
        reopen(said(socket("server.sock"), more))
    };
    let mut script = line("blockdev-add", &said(socket("server.sock"), full.clone()));
    let inet = json!({"type": "inet", "host": "127.0.0.1", "port": "1"});
    for server in [socket("other.sock"), inet] {
        script += &reopen(said(server, full.clone()));
    }
    for change in [
        json!({}),
        json!({"reconnect-delay": 8}),
        json!({"reconnect-delay": null}),
        json!({"open-timeout": 0}),
        json!({"open-timeout": null}),
        json!({"export": ""}),
        json!({"export": null}),
        json!({"x-dirty-bitmap": "qemu:dirty-bitmap:b"}),
        json!({"tls-creds": "t"}),
        json!({"tls-hostname": "t"}),
        json!({"force-share": true}),
        json!({"discard": "unmap", "detect-zeroes": "on"}),
        json!({"read-only": true}),
        json!({"read-only": false}),
        json!({"cache": {"no-flush": true}}),
        json!({}),
    ] {
        script += &with(change);
        script += &line("query-named-block-nodes", &json!({"flat": true}));
    }
    let servers = std::cell::RefCell::new(Vec::new());
    for more in [[].as_slice(), &["-r"]] {
        let script = match more.is_empty() {
            true => script.clone(),
            false => {
                let read_only = json!({"read-only": true, "open-timeout": 20});
                let writable = json!({"read-only": false, "open-timeout": 20});
                line(
                    "blockdev-add",
                    &said(socket("server.sock"), read_only.clone()),
                ) + &reopen(said(socket("server.sock"), read_only))
                    + &reopen(said(socket("server.sock"), writable))
            }
        };
        compare(&script, |folder| {
            hole_file(&folder.join("remote.raw"), LENGTH);
            servers
                .borrow_mut()
                .push(nbdkit(folder, more, &["remote.raw"]));
        });
    }
}
