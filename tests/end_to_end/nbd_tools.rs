//! Programs of others as NBD clients: libnbd's Python module with random requests on several connections, fio, QEMU's bench, copies
//! in both directions; with a ring and without, over UNIX sockets and TCP.

use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::daemon::Daemon;
use crate::images::run;
use crate::nbd::{export, start_server};
use crate::oracle::data_file;
use crate::tools;

const LENGTH: u64 = 16 << 20;

/// A daemon with a raw and a qcow2 export, both with content.
fn start(options: &[&str]) -> Daemon {
    let folder = tempfile::tempdir().expect("a folder");
    data_file(&folder.path().join("raw.img"), LENGTH);
    let create = ["create", "-q", "-f", "qcow2", "image.qcow2", "16M"];
    run(folder.path(), "qemu-img", &create);
    let write = ["-f", "qcow2", "-c", "write -P 9 1M 2M", "image.qcow2"];
    run(folder.path(), "qemu-io", &write);
    let daemon = Daemon::start_in(folder, options);
    let mut client = daemon.client();
    for node in [
        json!({"driver": "file", "node-name": "raw", "filename": "raw.img", "discard": "unmap"}),
        json!({"driver": "qcow2", "node-name": "image", "discard": "unmap",
            "file": {"driver": "file", "filename": "image.qcow2", "discard": "unmap"}}),
    ] {
        client.run("blockdev-add", node);
    }
    start_server(&daemon, &mut client, 100);
    export(&mut client, "raw");
    export(&mut client, "image");
    daemon
}

/// Debian's Python with libnbd's module; `None`: the test has to return.
pub(crate) fn python() -> Option<&'static str> {
    const PYTHON: &str = "/usr/bin/python3";
    let found = Command::new(PYTHON).args(["-c", "import nbd"]).output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(PYTHON);
    }
    tools::missing("Python's module nbd is missing: install the package python3-libnbd");
    None
}

fn check(folder: &Path) {
    let arguments = ["check", "-q", "-f", "qcow2", "image.qcow2"];
    run(folder, "qemu-img", &arguments);
}

fn random_requests(options: &[&str], seeds: &str) {
    let Some(python) = python() else { return };
    if !tools::have("qemu-img", "qemu-utils") || !tools::have("qemu-io", "qemu-utils") {
        return;
    }
    let daemon = start(options);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/end_to_end/nbd_client.py");
    for name in ["raw", "image"] {
        let mut command = Command::new(python);
        let uri = format!("nbd+unix:///{name}?socket=nbd.sock");
        command
            .arg(&script)
            .args([&uri, seeds])
            .current_dir(daemon.path(""));
        let ended = tools::run_command(command, "");
        assert_eq!(ended.code, Some(0), "{}{}", ended.output, ended.errors);
        assert_eq!(ended.output, "ok\n");
    }
    let mut client = daemon.client();
    client.run("nbd-server-stop", json!({}));
    for name in ["raw", "image"] {
        client.run("blockdev-del", json!({"node-name": name}));
    }
    check(&daemon.path(""));
    drop(client);
    daemon.quit();
}

#[test]
fn libnbd_with_many_requests_at_once() {
    random_requests(&[], "0:4");
}

#[test]
fn libnbd_where_there_is_no_ring() {
    random_requests(&["--io-backend", "threads"], "100:103");
}

#[test]
fn fio_and_qemu_bench_and_copies() {
    for (program, package) in [
        ("fio", "fio"),
        ("nbdcopy", "libnbd-bin"),
        ("qemu-img", "qemu-utils"),
        ("qemu-io", "qemu-utils"),
    ] {
        if !tools::have(program, package) {
            return;
        }
    }
    let daemon = start(&[]);
    let folder = daemon.path("");
    for name in ["raw", "image"] {
        let uri = format!("nbd+unix:///{name}?socket=nbd.sock");
        let fio = [
            "--name=verify",
            "--ioengine=nbd",
            &format!("--uri={uri}"),
            "--rw=randrw",
            "--bsrange=512-256k",
            "--bs_unaligned=1",
            "--iodepth=32",
            "--size=8M",
            "--verify=crc32c",
            "--randseed=11",
            "--do_verify=1",
            "--verify_state_save=0",
        ];
        run(&folder, "fio", &fio);
        let bench = ["bench", "-q", "-f", "raw", "-c", "500", "-d", "16", &uri];
        let bench: Vec<&str> = bench.iter().copied().filter(|a| *a != "-q").collect();
        run(&folder, "qemu-img", &bench);
        let writes = [
            "bench",
            "-w",
            "-f",
            "raw",
            "-c",
            "500",
            "-d",
            "16",
            "--flush-interval=50",
            &uri,
        ];
        run(&folder, "qemu-img", &writes);
        let copy = format!("{name}.copy");
        run(&folder, "nbdcopy", &[&uri, &copy]);
        let compare = ["compare", "-f", "raw", "-F", "raw", &uri, &copy];
        run(&folder, "qemu-img", &compare);
    }
    // From one export to the other, and with QEMU over its own client.
    let uris = ["raw", "image"].map(|name| format!("nbd+unix:///{name}?socket=nbd.sock"));
    run(&folder, "nbdcopy", &[&uris[0], &uris[1]]);
    let compare = ["compare", "-f", "raw", "-F", "raw", &uris[0], &uris[1]];
    run(&folder, "qemu-img", &compare);
    daemon.quit();
}

#[test]
fn over_tcp_it_is_the_same() {
    if !tools::have("qemu-io", "qemu-utils") || !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    let daemon = start(&[]);
    let mut client = daemon.client();
    client.run("nbd-server-stop", json!({}));
    // Ports are tried from here on; somebody else may have some of them.
    let data = json!({"host": "127.0.0.1", "port": "21809", "to": 21909});
    let address = json!({"type": "inet", "data": data});
    client.run("nbd-server-start", json!({"addr": address}));
    export(&mut client, "image");
    let port = listening_port(daemon.pid());
    let uri = format!("nbd://127.0.0.1:{port}/image");
    let io = [
        "-f",
        "raw",
        "-c",
        "write -P 4 1M 3M",
        "-c",
        "read -P 4 1M 3M",
        &uri,
    ];
    run(&daemon.path(""), "qemu-io", &io);
    drop(client);
    daemon.quit();
    // It has gone with its folder; what counts is that the bytes were acknowledged and read.
}

/// The TCP port that a process listens at.
pub(crate) fn listening_port(pid: u32) -> u16 {
    let sockets: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("it runs")
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .map(|target| target.display().to_string())
        .collect();
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).expect("a table");
    for line in table.lines().skip(1) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_listening = fields[3] == "0A";
        let is_mine = sockets.contains(&format!("socket:[{}]", fields[9]));
        if is_listening && is_mine {
            let (_, port) = fields[1].split_once(':').expect("a port");
            return u16::from_str_radix(port, 16).expect("a number");
        }
    }
    panic!("it listens nowhere");
}
