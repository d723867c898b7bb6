//! Encrypted NBD over TCP: our exports with nbdinfo, nbdcopy and qemu-img, our nodes on a qemu-nbd, what a certificate has to say of the
//! host that was connected to, and what a user reads when it does not.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};

use crate::client::{Client, DEADLINE};
use crate::daemon::{Daemon, Process};
use crate::nbd::export;
use crate::nbd_tls::pki;
use crate::nbd_tools::listening_port;
use crate::oracle::data_file;
use crate::tls_objects::{layout, signed};
use crate::tools::{self, Ended};

const LENGTH: u64 = 4 << 20;

fn have_tools() -> bool {
    [
        ("openssl", "openssl"),
        ("qemu-img", "qemu-utils"),
        ("qemu-nbd", "qemu-utils"),
        ("nbdinfo", "libnbd-bin"),
        ("nbdcopy", "libnbd-bin"),
    ]
    .into_iter()
    .all(|(tool, package)| tools::have(tool, package))
}

/// The certificates of everybody, also those of a server that is known by its name only.
fn certificates(folder: &Path) {
    pki(folder);
    signed(
        folder,
        "named",
        "/CN=localhost",
        "subjectAltName=DNS:localhost\n",
    );
    let files = [
        ("ca-cert", "ca"),
        ("server-cert", "named"),
        ("server-key", "named-key"),
    ];
    layout(folder, "by-name", &files);
}

/// Our server at a port of 127.0.0.1, with what it logs in `log`.
fn our_server(dir: &str) -> (Daemon, Client, u16) {
    let daemon = Daemon::start_logging();
    let folder = daemon.path("");
    certificates(&folder);
    data_file(&folder.join("disk.raw"), LENGTH);
    let mut client = daemon.client();
    let node = json!({"driver": "file", "node-name": "disk", "filename": "disk.raw"});
    client.run("blockdev-add", node);
    let credentials =
        json!({"qom-type": "tls-creds-x509", "id": "t", "dir": dir, "endpoint": "server"});
    client.run("object-add", credentials);
    let address = json!({"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}});
    client.run(
        "nbd-server-start",
        json!({"addr": address, "tls-creds": "t"}),
    );
    export(&mut client, "disk");
    let port = listening_port(daemon.pid());
    (daemon, client, port)
}

fn run(folder: &Path, program: &str, arguments: &[&str]) -> Ended {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(folder);
    tools::run_command(command, "")
}

fn nbdinfo(folder: &Path, host: &str, port: u16, dir: &str) -> Ended {
    let uri = format!("nbds://{host}:{port}/disk?tls-certificates={dir}");
    run(folder, "nbdinfo", &["--size", &uri])
}

/// `qemu-img` with an image on a server, as somebody.
fn qemu_img(folder: &Path, dir: &str, arguments: &[&str]) -> Ended {
    let object = format!("tls-creds-x509,id=c,dir={dir},endpoint=client,sanity-check=off");
    let mut all = vec![arguments[0], "--object", &object];
    all.extend(&arguments[1..]);
    run(folder, "qemu-img", &all)
}

fn image(host: &str, port: u16) -> String {
    format!(
        "driver=nbd,server.type=inet,server.host={host},server.port={port},export=disk,tls-creds=c"
    )
}

fn log(daemon: &Daemon) -> String {
    std::fs::read_to_string(daemon.path("log")).expect("a log")
}

#[test]
fn others_read_and_write_our_export() {
    if !have_tools() {
        return;
    }
    let (daemon, client, port) = our_server("s");
    let folder = daemon.path("");
    let disk = || std::fs::read(folder.join("disk.raw")).expect("read");
    for host in ["127.0.0.1", "localhost"] {
        let size = nbdinfo(&folder, host, port, "c");
        assert_eq!(
            (size.code, size.output.trim()),
            (Some(0), "4194304"),
            "{}",
            size.errors
        );
        let uri = format!("nbds://{host}:{port}/disk?tls-certificates=c");
        let copied = run(&folder, "nbdcopy", &[&uri, "out.raw"]);
        assert_eq!(copied.code, Some(0), "{}", copied.errors);
        assert!(std::fs::read(folder.join("out.raw")).expect("read") == disk());
        let mut other = disk();
        other.rotate_left(4096);
        std::fs::write(folder.join("in.raw"), &other).expect("written");
        let copied = run(&folder, "nbdcopy", &["in.raw", &uri]);
        assert_eq!(copied.code, Some(0), "{}", copied.errors);
        assert!(disk() == other);
        let source = image(host, port);
        let read = ["convert", "--image-opts", &source, "-O", "raw", "out.raw"];
        let read = qemu_img(&folder, "c", &read);
        assert_eq!(read.code, Some(0), "{}", read.errors);
        assert!(std::fs::read(folder.join("out.raw")).expect("read") == other);
        other.rotate_left(4096);
        std::fs::write(folder.join("in.raw"), &other).expect("written");
        let write = [
            "convert",
            "-n",
            "-f",
            "raw",
            "in.raw",
            "--target-image-opts",
            &source,
        ];
        let write = qemu_img(&folder, "c", &write);
        assert_eq!(write.code, Some(0), "{}", write.errors);
        assert!(disk() == other);
    }
    drop(client);
    daemon.quit();
}

/// What each of them reads, and what our log says.
#[test]
fn who_is_not_let_in_reads_why() {
    if !have_tools() {
        return;
    }
    let (daemon, client, port) = our_server("by-name");
    let folder = daemon.path("");
    let info = |dir: &str, host: &str| {
        let asked = qemu_img(&folder, dir, &["info", "--image-opts", &image(host, port)]);
        assert_eq!(asked.code, Some(1));
        let text = asked
            .errors
            .trim()
            .rsplit_once("': ")
            .map(|(_, text)| text.to_owned());
        text.unwrap_or(asked.errors)
    };
    let known = nbdinfo(&folder, "localhost", port, "c");
    assert_eq!(known.code, Some(0), "{}", known.errors);
    let by_address = nbdinfo(&folder, "127.0.0.1", port, "c");
    assert_eq!(by_address.code, Some(1), "it is no name of the certificate");
    assert_eq!(
        info("c", "127.0.0.1"),
        "Certificate does not match the hostname 127.0.0.1"
    );
    assert_eq!(
        info("others", "localhost"),
        "The certificate hasn't got a known issuer"
    );
    for dir in ["nobody", "stranger"] {
        let before = log(&daemon).len();
        for _ in 0..5 {
            // Since TLS 1.3 a client hears of it when it has gone on already.
            let text = info(dir, "localhost");
            assert!(
                text.ends_with("A TLS fatal alert has been received."),
                "{text}"
            );
        }
        let asked = nbdinfo(&folder, "localhost", port, dir);
        let text = asked.errors;
        assert!(
            text.contains("A TLS fatal alert has been received."),
            "{text}"
        );
        let said = log(&daemon).split_off(before);
        assert_eq!(
            said.matches("an NBD client cannot be believed").count(),
            6,
            "{said}"
        );
        assert!(said.contains("peer sent no certificates"), "{said}");
    }
    let uri = format!("nbd://localhost:{port}/disk");
    let plain = run(&folder, "nbdinfo", &["--size", &uri]);
    assert!(
        plain
            .errors
            .contains("server requires TLS encryption first"),
        "{}",
        plain.errors
    );
    drop(client);
    daemon.quit();
}

/// qemu-nbd with TLS at a port of 127.0.0.1 that was free a moment ago.
fn qemu_nbd(folder: &Path, dir: &str) -> (Process, u16) {
    let started = Instant::now();
    loop {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        drop(listener);
        let object = format!("tls-creds-x509,id=t,endpoint=server,dir={dir}");
        let mut process = Process::start(
            Command::new("qemu-nbd")
                .args([
                    "-f",
                    "raw",
                    "-t",
                    "-e",
                    "8",
                    "-b",
                    "127.0.0.1",
                    "-x",
                    "disk",
                ])
                .args(["-p", &port.to_string(), "--object", &object])
                .args(["--tls-creds", "t", "disk.raw"])
                .current_dir(folder)
                .stderr(Stdio::null()),
        );
        loop {
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return (process, port);
            }
            assert!(started.elapsed() < DEADLINE, "qemu-nbd does not listen");
            // Somebody else has taken the port.
            if process.child().try_wait().expect("waited").is_some() {
                break;
            }
            std::thread::yield_now();
        }
    }
}

#[test]
fn our_nodes_believe_the_host_that_they_connect_to() {
    if !have_tools() {
        return;
    }
    for dir in ["s", "by-name"] {
        let daemon = Daemon::start();
        let folder = daemon.path("");
        certificates(&folder);
        data_file(&folder.join("disk.raw"), LENGTH);
        let (server, port) = qemu_nbd(&folder, dir);
        let mut client = daemon.client();
        for who in ["c", "nobody", "stranger", "others"] {
            let credentials = json!({"qom-type": "tls-creds-x509", "id": who, "dir": who,
                "endpoint": "client", "sanity-check": false});
            client.run("object-add", credentials);
        }
        let node = |who: &str, host: &str, hostname: Option<&str>| -> Value {
            let mut node = json!({"driver": "nbd", "node-name": "n", "export": "disk",
                "server": {"type": "inet", "host": host, "port": port.to_string()},
                "tls-creds": who});
            if let Some(hostname) = hostname {
                node["tls-hostname"] = json!(hostname);
            }
            node
        };
        for hostname in ["elsewhere", "127.0.0.2"] {
            let text = client.refusal("blockdev-add", node("c", "127.0.0.1", Some(hostname)));
            assert_eq!(
                text,
                format!("Certificate does not match the hostname {hostname}")
            );
        }
        if dir == "by-name" {
            let text = client.refusal("blockdev-add", node("c", "127.0.0.1", None));
            assert_eq!(text, "Certificate does not match the hostname 127.0.0.1");
        }
        let text = client.refusal("blockdev-add", node("others", "localhost", None));
        assert_eq!(text, "The certificate hasn't got a known issuer");
        for who in ["nobody", "stranger"] {
            let text = client.refusal("blockdev-add", node(who, "localhost", None));
            assert_eq!(
                text,
                "The NBD handshake failed: Connection reset by peer; after TLS began, the server \
                 may want a certificate that it believes"
            );
        }
        let local = json!({"driver": "file", "node-name": "local", "filename": "local.raw"});
        std::fs::File::create(folder.join("local.raw"))
            .and_then(|file| file.set_len(LENGTH))
            .expect("made");
        client.run("blockdev-add", local);
        let ways = match dir {
            "s" => [("127.0.0.1", None), ("localhost", None)],
            _ => [("127.0.0.1", Some("localhost")), ("localhost", None)],
        };
        for (host, hostname) in ways {
            client.run("blockdev-add", node("c", host, hostname));
            let backup = json!({"job-id": "j", "device": "n", "target": "local", "sync": "full"});
            client.run("blockdev-backup", backup);
            client.wait_for("j", "null");
            client.run("blockdev-del", json!({"node-name": "n"}));
        }
        let read = |name: &str| std::fs::read(folder.join(name)).expect("read");
        assert!(read("local.raw") == read("disk.raw"));
        drop(server);
        drop(client);
        daemon.quit();
    }
}
