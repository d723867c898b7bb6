//! The daemon's command line and life: refused in the oracle's words, ended by signals, gone to the background.

use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::client::Client;
use crate::daemon::{Daemon, wait_until};
use crate::tools;

/// What a command prints to standard error, and its exit code.
fn refusal(mut command: Command, arguments: &[&str], folder: &Path) -> (String, Option<i32>) {
    let output = command
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .expect("it runs");
    (
        String::from_utf8_lossy(&output.stderr).into_owned(),
        output.status.code(),
    )
}

fn daemon() -> Command {
    let mut command = tools::without_warnings();
    command.arg("daemon");
    command
}

#[test]
fn refusals_are_those_of_the_oracle() {
    if !tools::have_oracle() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let mut differences = String::new();
    for arguments in [
        &["--frob"][..],
        &["stray"],
        &["--blockdev"],
        &["--pidfile"],
        &["--monitor", "nope"],
        &["--chardev", "stdio,id=a", "--monitor", "a,mode=readline"],
        &[
            "--chardev",
            "stdio,id=a",
            "--monitor",
            "a",
            "--monitor",
            "a",
        ],
        &["--chardev", "stdio,id=a", "--monitor", "a,pretty=maybe"],
        &["--chardev", "stdio,id=a", "--monitor", "a,x=1"],
        &["--chardev", "stdio,id=a", "--chardev", "stdio,id=b"],
        &["--chardev", "stdio,id=a", "--chardev", "null,id=a"],
        &["--chardev", "socket,path=x,server=on,wait=off"],
        &["--chardev", "nope,id=a"],
        &["--chardev", "id=a"],
        &["--chardev", "socket,id=a,path=x,foo=1"],
        &["--chardev", "socket,id=a,path=no/x,server=on,wait=off"],
        &["--chardev", "socket,id=a,path=no/x"],
        &["--chardev", "socket,id=a,path=x,server=maybe"],
        &["--chardev", "socket,id=a,path=x,wait=off"],
        &["--chardev", "socket,id=a,path=x,server=on,reconnect=1"],
        &["--chardev", "socket,id=a,path=x,host=h,port=1"],
        &["--chardev", "socket,id=a,host=127.0.0.1"],
        &["--chardev", "socket,id=a,host=127.0.0.1,port=1"],
        &["--chardev", "socket,id=a,fd=77"],
        &["--chardev", "socket,id=a,fd=nope"],
        &["--daemonize", "--chardev", "stdio,id=a"],
        &["--blockdev", "help"],
        &["--blockdev", "null-co"],
        &["--blockdev", "null-co,node-name=a,size=8M"],
        &["--blockdev", "null-co,node-name=a,size=0x"],
        &["--blockdev", "null-co,node-name=a,read-zeroes=1"],
        &["--blockdev", "null-co,node-name=a,x"],
        &[
            "--blockdev",
            "null-co,node-name=a",
            "--blockdev",
            "null-co,node-name=a",
        ],
        &["--blockdev", "nope,node-name=a"],
        &["--blockdev", "{\"driver\":\"null-co\""],
        &["--blockdev", "{\"driver\":\"null-co"],
        &["--blockdev", "{\"driver\":null-co}"],
        &["--blockdev", "{\"driver\":1,\"driver\":2"],
        &["--blockdev", "{\"driver\":\"null-co\"} {"],
        &["--blockdev", "{\"driver\" 1} x"],
        &["--blockdev", "{\"driver\":\"null-co\",\"node-name\":5}"],
        &["--blockdev", "file,node-name=a,filename=none"],
        &[
            "--blockdev",
            "raw,node-name=a,file.driver=null-co,file.size=1,file.x=1",
        ],
        &["--blockdev", "raw,node-name=a,file=x,file.driver=null-co"],
        &["--chardev", "socket,id=a,path=x,abstract=maybe"],
        &["--chardev", "socket,id=a,path=x,tight=maybe"],
        &["--chardev", "socket,id=a,path=x,fd=3"],
        &[
            "--chardev",
            "socket,id=a,host=127.0.0.1,port=1,to=x,server=on,wait=off",
        ],
        &["--chardev", "socket,id=a,path=no/x,reconnect-ms=x"],
        &[
            "--chardev",
            "socket,id=a,path=no/x,reconnect-ms=1,reconnect=1",
        ],
        &["--chardev", "socket,id=a,path=x,server=on,wait=maybe"],
        &["--chardev", "socket,id=a,fd=0"],
        &["--chardev", "socket,id=a,fd=-1"],
        &["--chardev", "stdio,id=a,signal=maybe"],
        &["--chardev", "stdio"],
        &["--chardev", ""],
        &["--monitor", ""],
        &["--monitor", "chardev=a,mode=control"],
        &["--chardev", "null,id=a", "--monitor", "a,mode=nope"],
        &[
            "--chardev",
            "null,id=a",
            "--monitor",
            "{\"chardev\": \"a\", \"pretty\": 1}",
        ],
        &[
            "--chardev",
            "null,id=a",
            "--monitor",
            "{\"chardev\": \"b\"}",
        ],
        &["--blockdev", ""],
        &["--blockdev", "node-name=a"],
        &["--blockdev", "driver=null-co,driver=nope,node-name=a"],
        &["--blockdev", "null-co,node-name=a,,b"],
        &["--blockdev", "null-co,node-name=a,cache.direct=on,cache=x"],
        &["--blockdev", "null-co,node-name=a,cache.x=on"],
        &[
            "--blockdev",
            "null-co,node-name=a,read-zeroes=yes,size=0x10,latency-ns=-1,x=1",
        ],
        &["--blockdev", "null-co,node-name=a,=1"],
        &["--blockdev", "null-co,node-name=a,1x=1"],
        &["--blockdev", "raw,node-name=a,file.driver=file"],
        &["--blockdev", "raw,node-name=a,file.0=x"],
        &["--blockdev", "raw,node-name=a,file=nobody"],
        &["--blockdev", "raw,node-name=1a,file.driver=null-co"],
        &["--blockdev", "file,node-name=a,filename=."],
        &[
            "--blockdev",
            "{\"driver\": \"null-co\", \"node-name\": \"a\", \"x\": {\"y\": [1]}}",
        ],
        &["--blockdev", "{\"driver\": \"null-co\"} x"],
        &["--blockdev", "[]"],
        &["--object", "iothread,id=a", "--object", "iothread,id=a"],
        &["--object", "iothread,id=a,poll-max-ns=-1"],
        &["--object", "{\"qom-type\": \"iothread\"}"],
        &["--object", ""],
        &["--pidfile", ""],
        &["-x"],
        &["-"],
        &["--blockdev=null-co,node-name=a", "--frob=1"],
        &["--object", "nope,id=a"],
        &["--object", "iothread"],
        &["--object", "iothread,id=a,x=1"],
        &["--pidfile", "no/pid"],
    ] {
        let (theirs, their_code) = refusal(
            Command::new("qemu-storage-daemon"),
            arguments,
            folder.path(),
        );
        let (ours, our_code) = refusal(daemon(), arguments, folder.path());
        let theirs = theirs.replace("qemu-storage-daemon: ", "blockyard: ");
        if (&ours, our_code) != (&theirs, their_code) {
            differences += &format!(
                "{arguments:?}\n  theirs {their_code:?} {theirs}  ours   {our_code:?} {ours}"
            );
        }
    }
    assert!(differences.is_empty(), "\n{differences}");
}

#[test]
fn help_and_version_end_well() {
    for argument in ["--help", "--version", "-h", "-V"] {
        let output = daemon().arg(argument).output().expect("it runs");
        assert!(
            output.status.success() && !output.stdout.is_empty(),
            "{argument}"
        );
    }
}

#[test]
fn signals_end_it_well_and_nothing_stays_behind() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let daemon = Daemon::start();
        let mut client = daemon.client();
        client.run(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "s", "size": 1 << 20}),
        );
        client.run(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "t", "size": 1 << 20}),
        );
        let job = json!({"job-id": "j", "device": "s", "target": "t", "sync": "full", "auto-finalize": false});
        client.run("blockdev-backup", job);
        client.wait_for("j", "pending");
        let pid = Pid::from_raw(i32::try_from(daemon.pid()).expect("a pid")).expect("a pid");
        kill_process(pid, signal).expect("sent");
        client.wait_for("j", "aborting");
        client.wait_for("j", "null");
        client.end();
        let folder = daemon.folder.path().to_owned();
        let (socket, pid_file) = (daemon.socket(), daemon.path("pid"));
        assert!(daemon.wait().success(), "{}", folder.display());
        assert!(!socket.exists());
        assert!(!pid_file.exists());
    }
}

#[test]
fn in_the_background_it_is_ready_when_the_first_process_leaves() {
    let folder = tempfile::tempdir().expect("a folder");
    let status = daemon()
        .args(["--daemonize", "--pidfile", "pid", "--monitor=qmp"])
        .args([
            "--chardev",
            "socket,id=qmp,path=qmp.sock,server=on,wait=off",
        ])
        .current_dir(folder.path())
        .status()
        .expect("it runs");
    // A monitor before its chardev is refused, and the first process says so.
    assert_eq!(status.code(), Some(1));
    let status = daemon()
        .args([
            "--chardev",
            "socket,id=qmp,path=qmp.sock,server=on,wait=off",
        ])
        .args(["--daemonize", "--pidfile", "pid", "--monitor=qmp"])
        .current_dir(folder.path())
        .status()
        .expect("it runs");
    assert!(status.success());
    let pid = std::fs::read_to_string(folder.path().join("pid")).expect("written");
    assert!(Path::new(&format!("/proc/{}", pid.trim())).exists());
    let mut client = Client::ready(&folder.path().join("qmp.sock"));
    client.run("quit", json!({}));
    client.end();
}

#[test]
fn a_second_daemon_does_not_take_the_pid_file() {
    let first = Daemon::start();
    let (text, code) = refusal(daemon(), &["--pidfile", "pid"], first.folder.path());
    assert_eq!(
        text,
        "blockyard: cannot create PID file: Cannot lock pid file: Resource temporarily unavailable\n"
    );
    assert_eq!(code, Some(1));
    wait_until(&first.path("pid"));
    first.quit();
}

#[test]
fn waiting_for_the_first_client_can_be_interrupted() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut child = daemon()
        .args([
            "--chardev",
            "socket,id=a,path=sock,server=on",
            "--monitor",
            "a",
        ])
        .current_dir(folder.path())
        .spawn()
        .expect("it starts");
    crate::daemon::wait_until_exists(&folder.path().join("sock"));
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid")).expect("a pid");
    kill_process(pid, Signal::TERM).expect("sent");
    assert!(child.wait().expect("it ends").success());
    assert!(!folder.path().join("sock").exists());
}

#[test]
fn under_the_other_name_it_takes_the_same_options() {
    let folder = tempfile::tempdir().expect("a folder");
    let link = folder.path().join("qemu-storage-daemon");
    std::os::unix::fs::symlink(tools::blockyard(), &link).expect("linked");
    let (text, code) = refusal(Command::new(link), &["--frob"], folder.path());
    assert_eq!(text, "qemu-storage-daemon: unrecognized option '--frob'\n");
    assert_eq!(code, Some(1));
}
