//! Encrypted NBD with the clients of others: whole copies and random requests through TLS, and who is not let in.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::nbd::{connect, export, go, greeting, option, receive, until_end};
use crate::nbd_tools::python;
use crate::oracle::{compare, data_file};
use crate::tls_objects::{certificates, layout};
use crate::tools;

const LENGTH: u64 = 16 << 20;

/// What asks for TLS, and for an export.
const STARTTLS: u32 = 5;
const LIST: u32 = 3;
const GO: u32 = 7;

/// Certificates, and folders with them for everybody.
pub(crate) fn pki(folder: &Path) {
    certificates(folder);
    let own = |name: &'static str, side: &'static str| {
        [("ca-cert", "ca"), (side, name)].map(|(to, from)| (to, from))
    };
    let [ca, server] = own("server", "server-cert");
    layout(folder, "s", &[ca, server, ("server-key", "server-key")]);
    let [ca, client] = own("client", "client-cert");
    layout(folder, "c", &[ca, client, ("client-key", "client-key")]);
    layout(folder, "nobody", &[ca]);
    let [ca, foreign] = own("foreign", "client-cert");
    layout(
        folder,
        "stranger",
        &[ca, foreign, ("client-key", "foreign-key")],
    );
    layout(
        folder,
        "others",
        &[("ca-cert", "other"), client, ("client-key", "client-key")],
    );
}

/// A daemon with an export that is only to be had encrypted, or `None`: a tool is missing.
fn start(more: Value) -> Option<(Daemon, Client)> {
    let needed = [
        ("openssl", "openssl"),
        ("qemu-img", "qemu-utils"),
        ("qemu-nbd", "qemu-utils"),
    ];
    if !needed
        .iter()
        .all(|(tool, package)| tools::have(tool, package))
    {
        return None;
    }
    let folder = tempfile::tempdir().expect("a folder");
    pki(folder.path());
    data_file(&folder.path().join("disk.raw"), LENGTH);
    let daemon = Daemon::start_in(folder, &[]);
    let mut client = daemon.client();
    let node = json!({"driver": "file", "node-name": "disk", "filename": "disk.raw"});
    client.run("blockdev-add", node);
    let credentials =
        json!({"qom-type": "tls-creds-x509", "id": "t", "dir": "s", "endpoint": "server"});
    client.run("object-add", credentials);
    let mut server = json!({
        "addr": {"type": "unix", "data": {"path": "nbd.sock"}},
        "tls-creds": "t",
    });
    for (key, value) in more.as_object().expect("members") {
        server[key] = value.clone();
    }
    client.run("nbd-server-start", server);
    export(&mut client, "disk");
    Some((daemon, client))
}

/// Runs a program of QEMU's with the certificates of a folder; whether it succeeded, and what it said.
fn qemu(daemon: &Daemon, dir: &str, program: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program)
        .args(arguments)
        .args([
            "--object",
            &format!("tls-creds-x509,id=c,dir={dir},endpoint=client"),
        ])
        .current_dir(daemon.path(""))
        .output()
        .expect("it runs");
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// Lists the exports; whether that succeeded.
fn lists(daemon: &Daemon, dir: &str, hostname: &str) -> bool {
    let socket = daemon.path("nbd.sock");
    let output = Command::new("qemu-nbd")
        .args([
            "--list",
            "--tls-creds",
            "c",
            "--tls-hostname",
            hostname,
            "-k",
        ])
        .arg(socket)
        .args([
            "--object",
            &format!("tls-creds-x509,id=c,dir={dir},endpoint=client,sanity-check=off"),
        ])
        .current_dir(daemon.path(""))
        .output()
        .expect("it runs");
    output.status.success()
}

const IMAGE: &str = "driver=nbd,path=nbd.sock,export=disk,tls-creds=c,tls-hostname=localhost";

#[test]
fn qemu_copies_in_both_directions() {
    let Some((daemon, client)) = start(json!({})) else {
        return;
    };
    let copy = ["convert", "--image-opts", IMAGE, "-O", "raw", "copy.raw"];
    assert_eq!(qemu(&daemon, "c", "qemu-img", &copy), (true, String::new()));
    let (disk, copied) = (daemon.path("disk.raw"), daemon.path("copy.raw"));
    assert!(std::fs::read(&disk).expect("read") == std::fs::read(copied).expect("read"));
    data_file(&daemon.path("new.raw"), LENGTH / 2);
    let back = [
        "convert",
        "-n",
        "-f",
        "raw",
        "new.raw",
        "--target-image-opts",
        IMAGE,
    ];
    assert_eq!(qemu(&daemon, "c", "qemu-img", &back), (true, String::new()));
    drop(client);
    daemon.quit();
}

#[test]
fn libnbd_with_many_requests_at_once() {
    let Some((daemon, client)) = start(json!({})) else {
        return;
    };
    let Some(python) = python() else {
        daemon.quit();
        return;
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/end_to_end/nbd_client.py");
    let uri = "nbds+unix:///disk?socket=nbd.sock&tls-certificates=c";
    let mut command = Command::new(python);
    command
        .arg(&script)
        .args([uri, "0:3"])
        .current_dir(daemon.path(""));
    let ended = tools::run_command(command, "");
    assert_eq!(ended.code, Some(0), "{}{}", ended.output, ended.errors);
    drop(client);
    daemon.quit();
}

#[test]
fn who_is_not_believed_is_not_let_in_and_harms_nobody() {
    let Some((daemon, client)) = start(json!({})) else {
        return;
    };
    assert!(lists(&daemon, "c", "localhost"));
    for dir in ["nobody", "stranger", "others"] {
        assert!(!lists(&daemon, dir, "localhost"), "{dir} came in");
    }
    assert!(!lists(&daemon, "c", "elsewhere"));
    let plain = ["info", "nbd+unix:///disk?socket=nbd.sock"];
    assert!(!qemu(&daemon, "c", "qemu-img", &plain).0, "not encrypted");
    assert!(lists(&daemon, "c", "localhost"));
    drop(client);
    daemon.quit();
}

#[test]
fn a_list_says_who_may_come_in_as_of_now() {
    let Some((daemon, mut client)) = start(json!({"tls-authz": "a"})) else {
        return;
    };
    let comes_in = |allowed: bool| assert_eq!(lists(&daemon, "c", "localhost"), allowed);
    comes_in(false);
    let simple =
        json!({"qom-type": "authz-simple", "id": "a", "identity": "C=GB,O=Example,CN=laptop"});
    client.run("object-add", simple);
    comes_in(true);
    let other = json!({"path": "a", "property": "identity", "value": "CN=laptop"});
    client.run("qom-set", other);
    comes_in(false);
    client.run("object-del", json!({"id": "a"}));
    let list = json!({"qom-type": "authz-list", "id": "a", "policy": "deny", "rules": [
        {"match": "*CN=desktop", "policy": "deny", "format": "glob"},
        {"match": "*CN=laptop", "policy": "allow", "format": "glob"},
    ]});
    client.run("object-add", list);
    comes_in(true);
    // Who has come in keeps what he uses.
    client.run("object-del", json!({"id": "t"}));
    comes_in(true);
    drop(client);
    daemon.quit();
}

#[test]
fn what_is_no_tls_ends_its_own_connection_only() {
    let Some((daemon, client)) = start(json!({"handshake-max-seconds": 1})) else {
        return;
    };
    let socket = daemon.path("nbd.sock");
    let starts = || {
        let mut stream = connect(&socket);
        stream.write_all(&greeting()).expect("sent");
        stream.write_all(&option(STARTTLS, &[])).expect("sent");
        let answer = receive(&mut stream, 18 + 20);
        // Acknowledged.
        assert_eq!(answer[18 + 12..18 + 16], 1_u32.to_be_bytes());
        stream
    };
    // What is asked for before.
    let mut stream = connect(&socket);
    stream.write_all(&greeting()).expect("sent");
    for number in [LIST, GO] {
        stream
            .write_all(&option(number, &go("disk")))
            .expect("sent");
        let from = if number == LIST { 18 } else { 0 };
        let head = receive(&mut stream, from + 20);
        let policy = head[from + 12..from + 16].to_vec();
        assert_eq!(policy, 0x8000_0005_u32.to_be_bytes(), "TLS is required");
        let bytes = u32::from_be_bytes(head[from + 16..].try_into().expect("four"));
        receive(&mut stream, bytes as usize);
    }
    for garbage in [
        &b"GET / HTTP/1.0\r\n\r\n"[..],
        &[0xff; 600],
        &option(GO, &go("disk")),
    ] {
        let mut stream = starts();
        let _ = stream.write_all(garbage);
        until_end(&mut stream);
    }
    // Behind the option and before it is answered.
    let mut stream = connect(&socket);
    let injected = [
        greeting().to_vec(),
        option(STARTTLS, &[]),
        option(GO, &go("disk")),
    ]
    .concat();
    stream.write_all(&injected).expect("sent");
    until_end(&mut stream);
    // Stalls: the beginning of a hello, and nothing.
    let begun = Instant::now();
    for bytes in [&[][..], &[0x16, 3, 1, 2, 0, 1]] {
        let mut stream = starts();
        stream.write_all(bytes).expect("sent");
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    }
    assert!(begun.elapsed() < Duration::from_secs(20));
    assert!(lists(&daemon, "c", "localhost"));
    drop(client);
    daemon.quit();
}

#[test]
fn what_tls_needs_is_asked_for_in_the_same_way() {
    if !tools::have("openssl", "openssl") {
        return;
    }
    let line = |command: &str, arguments: Value| {
        format!("{}\n", json!({"execute": command, "arguments": arguments}))
    };
    let mut script = String::new();
    for (id, dir, endpoint) in [("s", "s", "server"), ("c", "c", "client")] {
        let object =
            json!({"qom-type": "tls-creds-x509", "id": id, "dir": dir, "endpoint": endpoint});
        script += &line("object-add", object);
    }
    script += &line("object-add", json!({"qom-type": "iothread", "id": "io"}));
    for (credentials, list) in [
        ("none", "x"),
        ("c", "x"),
        ("io", "x"),
        ("s", "none"),
        ("s", "s"),
    ] {
        let server = json!({
            "addr": {"type": "unix", "data": {"path": "nbd.sock"}},
            "tls-creds": credentials,
            "tls-authz": list,
        });
        script += &line("nbd-server-start", server);
        script += &line("nbd-server-stop", json!({}));
    }
    let nowhere = json!({
        "addr": {"type": "unix", "data": {"path": "none/nbd.sock"}},
        "tls-creds": "none",
    });
    script += &line("nbd-server-start", nowhere);
    compare(&script, pki);
}
