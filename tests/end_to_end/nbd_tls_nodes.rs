//! Nodes on NBD servers through TLS: whom they believe, as qemu-storage-daemon does; jobs through it, on qemu-nbd and our own
//! server, also while the server goes and comes back.

use std::cell::RefCell;
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::{Daemon, Process};
use crate::images::run;
use crate::nbd::export;
use crate::nbd_nodes::{assert_same, serve};
use crate::nbd_tls::pki;
use crate::oracle::{compare, data_file, hole_file};
use crate::tools;

const LENGTH: u64 = 8 << 20;

fn have_tools() -> bool {
    tools::have("openssl", "openssl") && tools::have("qemu-nbd", "qemu-utils")
}

fn line(command: &str, arguments: &Value) -> String {
    format!("{}\n", json!({"execute": command, "arguments": arguments}))
}

/// Our certificates in a folder; some of them are of no use, which is for the other side to find out.
fn credentials(dir: &str) -> Value {
    json!({"qom-type": "tls-creds-x509", "id": dir, "dir": dir, "endpoint": "client",
        "sanity-check": false})
}

fn node(name: &str, dir: &str, hostname: &str) -> Value {
    json!({"driver": "nbd", "node-name": name, "server": {"type": "unix", "path": "server.sock"},
        "tls-creds": dir, "tls-hostname": hostname})
}

const TLS: [&str; 4] = [
    "--object",
    "tls-creds-x509,id=t,endpoint=server,dir=s",
    "--tls-creds",
    "t",
];

/// qemu-nbd at `server.sock`, for several clients after each other.
fn qemu_nbd(folder: &Path, image: &str, more: &[&str]) -> Process {
    let mut arguments = vec!["-f", "raw", "-t", "-e", "4", "-k", "server.sock"];
    arguments.extend(more);
    arguments.push(image);
    let process = serve(folder, "qemu-nbd", &arguments);
    // Its socket is there a moment before it listens.
    while UnixStream::connect(folder.join("server.sock")).is_err() {
        std::thread::yield_now();
    }
    process
}

#[test]
fn whom_a_node_believes_and_how_it_is_shown() {
    if !have_tools() {
        return;
    }
    let mut script = String::new();
    for dir in ["c", "others"] {
        script += &line("object-add", &credentials(dir));
    }
    let server = json!({"qom-type": "tls-creds-x509", "id": "s", "dir": "s", "endpoint": "server"});
    script += &line("object-add", &server);
    script += &line("object-add", &json!({"qom-type": "iothread", "id": "io"}));
    let socket = json!({"type": "unix", "path": "server.sock"});
    let nameless =
        |dir| json!({"driver": "nbd", "node-name": "n", "server": socket, "tls-creds": dir});
    for refused in [
        node("n", "none", "localhost"),
        node("n", "io", "localhost"),
        node("n", "s", "localhost"),
        json!({"driver": "nbd", "node-name": "n", "server": socket}),
        nameless("c"),
        nameless("others"),
        node("n", "c", "elsewhere"),
        node("n", "c", ""),
        node("n", "c", "no name"),
        node("n", "others", "localhost"),
        node("n", "others", "elsewhere"),
    ] {
        script += &line("blockdev-add", &refused);
    }
    script += &line("blockdev-add", &node("n", "c", "localhost"));
    let top = json!({"driver": "qcow2", "node-name": "top", "backing": "n",
        "file": {"driver": "file", "filename": "top.qcow2"}});
    script += &line("blockdev-add", &top);
    script += &line("query-named-block-nodes", &json!({"flat": true}));
    let servers = RefCell::new(Vec::new());
    compare(&script, |folder| {
        pki(folder);
        hole_file(&folder.join("disk.raw"), LENGTH);
        run(
            folder,
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "top.qcow2", "8M"],
        );
        let server = qemu_nbd(folder, "disk.raw", &TLS);
        servers.borrow_mut().push(server);
    });
    let mut script = line("object-add", &credentials("c"));
    script += &line("blockdev-add", &node("n", "c", "localhost"));
    compare(&script, |folder| {
        pki(folder);
        hole_file(&folder.join("disk.raw"), LENGTH);
        let server = qemu_nbd(folder, "disk.raw", &[]);
        servers.borrow_mut().push(server);
    });
}

/// A daemon with certificates and two images of one length, of which the first has data.
fn start() -> (Daemon, Client) {
    let daemon = Daemon::start_logging();
    let folder = daemon.path("");
    pki(&folder);
    data_file(&folder.join("local.raw"), LENGTH);
    hole_file(&folder.join("remote.raw"), LENGTH);
    let mut client = daemon.client();
    for dir in ["c", "nobody", "stranger"] {
        client.run("object-add", credentials(dir));
    }
    client.run(
        "object-add",
        json!({"qom-type": "iothread", "id": "elsewhere"}),
    );
    let local = json!({"driver": "file", "node-name": "local", "filename": "local.raw"});
    client.run("blockdev-add", local);
    (daemon, client)
}

/// Our own server in the folder of another daemon, at `server.sock`, for `remote.raw`.
fn our_server(folder: &Path) -> (Daemon, Client) {
    let server = Daemon::start();
    let mut client = server.client();
    let place = |name: &str| folder.join(name);
    let credentials = json!({"qom-type": "tls-creds-x509", "id": "t", "dir": place("s"),
        "endpoint": "server"});
    client.run("object-add", credentials);
    let disk = json!({"driver": "file", "node-name": "disk", "filename": place("remote.raw")});
    client.run("blockdev-add", disk);
    let started = json!({"tls-creds": "t",
        "addr": {"type": "unix", "data": {"path": place("server.sock")}}});
    client.run("nbd-server-start", started);
    export(&mut client, "disk");
    (server, client)
}

/// Who keeps a server alive.
enum Server {
    Qemu(Process),
    Ours(Daemon, Client),
}

fn end(server: Server) {
    match server {
        Server::Qemu(process) => process.kill(),
        Server::Ours(daemon, client) => {
            drop(client);
            daemon.quit();
        }
    }
}

#[test]
fn jobs_copy_through_it_and_the_node_moves() {
    if !have_tools() {
        return;
    }
    for is_ours in [false, true] {
        for command in ["blockdev-backup", "blockdev-mirror"] {
            let (daemon, mut client) = start();
            let folder = daemon.path("");
            let (server, exported) = if is_ours {
                let (server, client) = our_server(&folder);
                (Server::Ours(server, client), "disk")
            } else {
                let server = qemu_nbd(&folder, "remote.raw", &TLS);
                (Server::Qemu(server), "")
            };
            let remote = |name: &str, dir: &str| {
                let mut node = node(name, dir, "localhost");
                node["export"] = json!(exported);
                node
            };
            for dir in ["nobody", "stranger"] {
                client.refusal("blockdev-add", remote("n", dir));
            }
            client.run("blockdev-add", remote("remote", "c"));
            for thread in [json!("elsewhere"), json!(null)] {
                let away = json!({"node-name": "remote", "iothread": thread});
                client.run("x-blockdev-set-iothread", away);
            }
            let job = |device: &str, target: &str| json!({"job-id": "j", "device": device, "target": target, "sync": "full"});
            let copy = |client: &mut Client, device: &str, target: &str| {
                client.run(command, job(device, target));
                if command == "blockdev-mirror" {
                    client.wait_for("j", "ready");
                    client.run("job-complete", json!({"id": "j"}));
                }
                client.wait_for("j", "null");
            };
            copy(&mut client, "local", "remote");
            // And back.
            hole_file(&folder.join("back.raw"), LENGTH);
            let back = json!({"driver": "file", "node-name": "back", "filename": "back.raw"});
            client.run("blockdev-add", back);
            copy(&mut client, "remote", "back");
            for name in ["local", "remote", "back"] {
                client.run("blockdev-del", json!({"node-name": name}));
            }
            end(server);
            assert_same(&folder, "local.raw", "remote.raw");
            assert_same(&folder, "local.raw", "back.raw");
            daemon.assert_no_bug();
        }
    }
}

#[test]
fn a_mirror_goes_on_with_the_same_credentials_when_its_server_came_back() {
    if !have_tools() {
        return;
    }
    let (daemon, mut client) = start();
    let folder = daemon.path("");
    let mut server = qemu_nbd(&folder, "remote.raw", &TLS);
    let mut remote = node("remote", "c", "localhost");
    remote["reconnect-delay"] = json!(30);
    client.run("blockdev-add", remote);
    // The node keeps what it has begun with.
    client.run("object-del", json!({"id": "c"}));
    let job = json!({"job-id": "j", "device": "local", "target": "remote", "sync": "full",
        "speed": 4 << 20, "buf-size": 1 << 20});
    client.run("blockdev-mirror", job);
    let mut copied = 0;
    for _ in 0..2 {
        // Some requests further on; the job is slow enough to be caught in the middle.
        copied = loop {
            let jobs = client.run("query-jobs", json!({}));
            let now = jobs[0]["current-progress"].as_u64().expect("a number");
            if now > copied {
                break now;
            }
        };
        server.kill();
        server = qemu_nbd(&folder, "remote.raw", &TLS);
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
