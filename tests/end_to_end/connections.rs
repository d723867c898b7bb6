//! Connections: sockets of every kind, many clients, clients that do not behave.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::{Daemon, Process, wait_until};

/// What a client may have unread before its requests are left unread, and some room for what is in the sockets.
const UNREAD_BYTES_MAX: usize = 20 << 20;

#[test]
fn many_clients_get_greetings_replies_and_all_events() {
    let daemon = Daemon::start();
    let mut clients: Vec<_> = (0..20).map(|_| daemon.client()).collect();
    let size = 1 << 20;
    clients[0].run(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "s", "size": size}),
    );
    clients[1].run(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "t", "size": size}),
    );
    let backup = json!({"job-id": "j", "device": "s", "target": "t", "sync": "full"});
    clients[2].run("blockdev-backup", backup);
    for client in &mut clients {
        for status in [
            "created",
            "running",
            "waiting",
            "pending",
            "concluded",
            "null",
        ] {
            client.wait_for("j", status);
        }
    }
    daemon.quit();
}

#[test]
fn a_thousand_connections_are_served() {
    let daemon = Daemon::start();
    let mut clients: Vec<UnixStream> = (0..1000)
        .map(|_| UnixStream::connect(daemon.socket()).expect("connected"))
        .collect();
    for client in &mut clients {
        let mut first = [0; 8];
        client.read_exact(&mut first).expect("a greeting");
        assert_eq!(&first, b"{\"QMP\": ");
    }
    daemon.quit();
}

#[test]
fn events_begin_with_negotiation() {
    let daemon = Daemon::start();
    let mut early = Client::connect(&daemon.socket());
    let mut other = daemon.client();
    other.run(
        "blockdev-create",
        json!({"job-id": "c", "options": {"driver": "file", "filename": "n", "size": 512}}),
    );
    other.wait_for("c", "concluded");
    early.negotiate();
    other.run("job-dismiss", json!({"id": "c"}));
    early.wait_for("c", "null");
    assert_eq!(early.events, Vec::<Value>::new());
    daemon.quit();
}

#[test]
fn tcp_abstract_and_pretty_monitors_side_by_side() {
    let name = format!("blockyard-test-{}", std::process::id());
    let chardev = format!("socket,id=b,path={name},abstract=on,server=on,wait=off");
    let port = free_port();
    let tcp = format!("socket,id=a,host=127.0.0.1,port={port},server=on,wait=off");
    let daemon = Daemon::start_with(&[
        "--chardev",
        &tcp,
        "--monitor",
        "a",
        "--chardev",
        &chardev,
        "--monitor",
        "b,pretty=on",
    ]);
    let mut over_tcp = Client::tcp(TcpStream::connect(("127.0.0.1", port)).expect("connected"));
    over_tcp.negotiate();
    assert_eq!(over_tcp.run("query-jobs", json!({})), json!([]));
    let address = SocketAddr::from_abstract_name(&name).expect("a name");
    let mut pretty = Client::unix(UnixStream::connect_addr(&address).expect("connected"));
    assert_eq!(pretty.line().as_deref(), Some("{"));
    while pretty.line().as_deref() != Some("}") {}
    pretty.send(b"{'execute': 'qmp_capabilities'}");
    let lines: Vec<_> = (0..4).filter_map(|_| pretty.line()).collect();
    assert_eq!(lines, ["{", "    \"return\": {", "    }", "}"]);
    daemon.quit();
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("bound");
    listener.local_addr().expect("bound").port()
}

#[test]
fn a_client_that_listens_is_called_again_and_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let listener = UnixListener::bind(folder.path().join("mine")).expect("bound");
    let daemon = Daemon::start_in(
        folder,
        &[
            "--chardev",
            "socket,id=a,path=mine,reconnect-ms=10",
            "--monitor",
            "a",
        ],
    );
    for _ in 0..3 {
        let (stream, _) = listener.accept().expect("called");
        let mut client = Client::unix(stream);
        client.negotiate();
        assert_eq!(client.run("query-jobs", json!({})), json!([]));
    }
    daemon.quit();
}

#[test]
fn a_client_that_leaves_early_changes_nothing_for_its_jobs() {
    let daemon = Daemon::start();
    let mut observer = daemon.client();
    let mut client = daemon.client();
    client.run(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "s", "size": 1 << 20}),
    );
    client.run(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "t", "size": 1 << 20}),
    );
    let request = json!({"execute": "blockdev-backup", "arguments":
        {"job-id": "j", "device": "s", "target": "t", "sync": "full"}});
    client.send(format!("{request}{{\"execute\": \"blockd").as_bytes());
    drop(client);
    observer.wait_for("j", "null");
    daemon.quit();
}

#[test]
fn who_does_not_read_is_not_read_and_holds_nobody_up() {
    let daemon = Daemon::start();
    let mut other = daemon.client();
    let mut deaf = UnixStream::connect(daemon.socket()).expect("connected");
    deaf.write_all(b"{'execute': 'qmp_capabilities'}")
        .expect("sent");
    let request = b"{'execute': 'query-qmp-schema'}".repeat(64);
    let reply_bytes = serde_json::to_vec(&other.run("query-qmp-schema", json!({})))
        .expect("JSON")
        .len();
    deaf.set_nonblocking(true).expect("set");
    let mut taken_bytes = 0;
    let mut refusals_in_a_row = 0;
    // Others' round trips are the clock: the daemon is awake and has had its chance to read.
    while refusals_in_a_row < 200 {
        match deaf.write(&request) {
            Ok(length) => {
                taken_bytes += length;
                refusals_in_a_row = 0;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => refusals_in_a_row += 1,
            Err(error) => panic!("{error}"),
        }
        other.run("query-version", json!({}));
    }
    // What it took, the daemon has answered or holds in its socket's buffer, which is far smaller than the answers.
    let socket_bytes = 1 << 20;
    let answered = taken_bytes.saturating_sub(socket_bytes) / (request.len() / 64);
    assert!(
        answered * reply_bytes < 4 * UNREAD_BYTES_MAX,
        "{taken_bytes} bytes were taken"
    );
    assert!(daemon.resident_bytes() < 128 << 20);
    drop(deaf);
    daemon.quit();
}

#[test]
fn a_file_that_does_not_open_holds_nobody_up() {
    let daemon = Daemon::start();
    let made = std::process::Command::new("mkfifo")
        .arg(daemon.path("fifo"))
        .status();
    assert!(made.expect("mkfifo runs").success());
    let mut stuck = daemon.client();
    let mut other = daemon.client();
    let add = json!({"execute": "blockdev-add", "arguments":
        {"driver": "file", "node-name": "f", "filename": "fifo"}});
    stuck.send(add.to_string().as_bytes());
    for _ in 0..10 {
        assert_eq!(other.run("query-jobs", json!({})), json!([]));
    }
    // Opening a pipe for reading and writing does not wait; it is refused for what it is.
    assert!(stuck.reply()["error"]["desc"].is_string());
    daemon.quit();
}

#[test]
fn deep_nesting_is_refused_before_anything_is_built() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let mut node = json!({"driver": "null-co"});
    for _ in 0..40 {
        node = json!({"driver": "raw", "file": node});
    }
    node["node-name"] = json!("n");
    let text = client.refusal("blockdev-add", node);
    assert_eq!(text, "Node definitions are nested more than 32 deep");
    let mut node = "{\"driver\":\"null-co\"}".to_owned();
    for _ in 0..600 {
        node = format!("{{\"driver\":\"raw\",\"file\":{node}}}");
    }
    client.send(format!("{{\"execute\":\"blockdev-add\",\"arguments\":{node}}}").as_bytes());
    let text = client.reply()["error"]["desc"].as_str().map(str::to_owned);
    assert_eq!(
        text.as_deref(),
        Some("Parameters are nested more than 128 levels deep")
    );
    assert_eq!(client.run("query-named-block-nodes", json!({})), json!([]));
    daemon.quit();
}

#[test]
fn several_listening_sockets_can_be_inherited() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("inherited");
    // The shell opens nothing itself; python binds, clears close-on-exec and becomes the daemon.
    let script = "import os, socket, sys\n\
        s = socket.socket(socket.AF_UNIX)\n\
        s.bind('inherited')\n\
        s.listen(5)\n\
        os.set_inheritable(s.fileno(), True)\n\
        fd = s.fileno()\n\
        os.execv(sys.argv[1], [sys.argv[1], 'daemon', '--chardev',\n\
            f'socket,id=a,fd={fd},server=on,wait=off', '--monitor', 'a', '--pidfile', 'pid'])\n";
    if !crate::tools::have("python3", "python3") {
        return;
    }
    let mut child = std::process::Command::new("python3")
        .args(["-c", script])
        .arg(crate::tools::blockyard())
        .current_dir(folder.path())
        .spawn()
        .expect("python runs");
    wait_until(&folder.path().join("pid"));
    let mut client = Client::ready(&path);
    client.run("quit", json!({}));
    client.end();
    assert!(child.wait().expect("it ends").success());
}

/// What a daemon with these options prints to standard output for `input`, up to the end; the version is left out.
fn printed(mut command: std::process::Command, options: &[&str], input: &[u8]) -> String {
    let mut process = Process::start(
        command
            .args(options)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped()),
    );
    let mut stdin = process.child().stdin.take().expect("piped");
    let mut stdout = process.child().stdout.take().expect("piped");
    stdin.write_all(input).expect("sent");
    let mut text = String::new();
    stdout.read_to_string(&mut text).expect("read");
    assert!(process.wait().success());
    let rest = text.split_once("package").map_or("", |(_, rest)| rest);
    let rest = rest.split_once('\n').map_or(rest, |(_, rest)| rest);
    rest.to_owned()
}

#[test]
fn standard_output_is_the_same_plain_and_pretty() {
    if !crate::tools::have_oracle() {
        return;
    }
    let input = b"{'execute': 'qmp_capabilities'}{'execute': 'query-jobs', 'id': [{}, [], {'a': [1, 'x']}]}\
        {'execute': 'nope'}{'execute': 'blockdev-add', 'arguments': {'driver': 'null-co', 'node-name': 'n'}}\
        {'execute': 'x-debug-query-block-graph'}{'execute': 'quit', 'id': null}";
    for monitor in [
        "a",
        "a,pretty=on",
        "a,pretty=off,mode=control",
        "{\"chardev\": \"a\", \"pretty\": true}",
    ] {
        for chardev in ["stdio,id=a", "stdio,id=a,signal=off"] {
            let options = ["--chardev", chardev, "--monitor", monitor];
            let mut ours = std::process::Command::new(crate::tools::blockyard());
            ours.arg("daemon");
            let theirs = std::process::Command::new("qemu-storage-daemon");
            assert_eq!(
                printed(ours, &options, input),
                printed(theirs, &options, input),
                "{options:?}"
            );
        }
    }
}

/// The daemon waits for its first client before anything else happens, and takes more clients afterwards.
#[test]
fn starting_up_goes_on_with_the_first_client() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = std::process::Command::new(crate::tools::blockyard());
    command
        .args([
            "daemon",
            "--chardev",
            "socket,id=a,path=sock,server=on,wait=on",
        ])
        .args(["--monitor", "a", "--pidfile", "pid"])
        .current_dir(folder.path());
    let process = Process::start(&mut command);
    let socket = folder.path().join("sock");
    crate::daemon::wait_until_exists(&socket);
    assert!(!folder.path().join("pid").exists());
    let mut first = Client::ready(&socket);
    wait_until(&folder.path().join("pid"));
    let mut second = Client::ready(&socket);
    assert_eq!(second.run("query-jobs", json!({})), json!([]));
    first.run("quit", json!({}));
    second.end();
    assert!(process.wait().success());
}

/// A connected descriptor that is inherited needs no address on either side.
#[test]
fn an_inherited_connection_is_a_monitor() {
    if !crate::tools::have("python3", "python3") {
        return;
    }
    let script = "import os, socket, sys\n\
        ours, theirs = socket.socketpair()\n\
        theirs.set_inheritable(True)\n\
        pid = os.fork()\n\
        if pid == 0:\n\
        \x20   ours.close()\n\
        \x20   os.execvp(sys.argv[1], sys.argv[1:] + ['--chardev', f'socket,id=a,fd={theirs.fileno()}', '--monitor', 'a'])\n\
        theirs.close()\n\
        with ours.makefile('rwb', buffering=0) as stream:\n\
        \x20   assert stream.readline().startswith(b'{\"QMP\": ')\n\
        \x20   stream.write(b'{\"execute\": \"qmp_capabilities\"}{\"execute\": \"query-jobs\"}{\"execute\": \"quit\"}')\n\
        \x20   print([stream.readline() for _ in range(3)])\n\
        \x20   assert stream.readline() == b''\n\
        assert os.waitpid(pid, 0)[1] == 0\n";
    let run = |program: &[&std::ffi::OsStr]| {
        let output = std::process::Command::new("python3")
            .args(["-c", script])
            .args(program)
            .output()
            .expect("python runs");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let ours = run(&[crate::tools::blockyard().as_os_str(), "daemon".as_ref()]);
    assert!(ours.contains("\"return\": []"), "{ours}");
    if crate::tools::have_oracle() {
        assert_eq!(ours, run(&["qemu-storage-daemon".as_ref()]));
    }
}

/// Monitors on one daemon, each with its own negotiation, all hear the same events in the same order.
#[test]
fn several_monitors_hear_the_same() {
    let daemon = Daemon::start_with(&[
        "--chardev",
        "socket,id=x,path=x.sock,server=on,wait=off",
        "--monitor",
        "chardev=x,mode=control,pretty=off",
    ]);
    let mut here = daemon.client();
    let mut there = Client::ready(&daemon.path("x.sock"));
    let options = json!({"driver": "file", "filename": "new.raw", "size": 512});
    here.run(
        "blockdev-create",
        json!({"job-id": "c", "options": options}),
    );
    for client in [&mut here, &mut there] {
        while !client
            .events
            .iter()
            .any(|event| event["data"]["status"] == "concluded")
        {
            let event = client.message().expect("an event");
            client.events.push(event);
        }
    }
    assert_eq!(here.events, there.events);
    daemon.quit();
}
