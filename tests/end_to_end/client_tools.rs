//! `blockyard qmp` and `blockyard jobs` against daemons of both kinds, and against what only looks like one.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::tools::{self, Ended, ended, run};

/// A job on these takes as long as its limit says.
const NODES: &[&str] = &[
    "--blockdev",
    "null-co,node-name=s,size=1073741824",
    "--blockdev",
    "null-co,node-name=t,size=1073741824",
];
/// A job that goes on for as long as a test needs it, and still moves.
const SLOW: &str = "job-id=b device=s target=t sync=full speed=1048576";

fn qmp(folder: &Path, arguments: &[&str]) -> Ended {
    run(folder, &[&["qmp", "qmp.sock"], arguments].concat(), "")
}

fn jobs(folder: &Path, arguments: &[&str]) -> Ended {
    run(folder, &[&["jobs", "qmp.sock"], arguments].concat(), "")
}

/// The result of a command that must succeed.
fn result(folder: &Path, arguments: &[&str]) -> Value {
    let ended = qmp(folder, arguments);
    assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.errors);
    assert_eq!(ended.errors, "", "{arguments:?}");
    serde_json::from_str(&ended.output).unwrap_or_else(|error| panic!("{error}: {}", ended.output))
}

/// What a command that must fail has to say about it.
fn complaint(ended: &Ended) -> &str {
    assert_eq!(ended.code, Some(1), "{}", ended.errors);
    ended.errors.trim_end()
}

fn start_slow(folder: &Path) {
    let words: Vec<&str> = ["blockdev-backup"]
        .into_iter()
        .chain(SLOW.split(' '))
        .collect();
    result(folder, &words);
}

/// Every form that arguments can have, on a daemon whose socket is in the folder.
fn every_form(folder: &Path) {
    let add = |arguments: &[&str]| {
        let words = [&["blockdev-add", "driver=raw"], arguments].concat();
        assert_eq!(result(folder, &words), json!({}));
    };
    add(&[
        "node-name=a",
        "file.driver=null-co",
        "file.size=1048576",
        "read-only=true",
    ]);
    std::fs::write(folder.join("8"), [0; 512]).expect("written");
    add(&["node-name=b", "file.driver=file", "file.filename=\"8\""]);
    let refused = qmp(
        folder,
        &["blockdev-add", "driver=file", "node-name=d", "filename=8"],
    );
    let expected =
        "blockyard: GenericError: Invalid parameter type for 'filename', expected: string";
    assert_eq!(complaint(&refused), expected);
    assert_eq!(refused.output, "");
    let object = r#"{"driver": "null-co", "node-name": "c", "size": 1024}"#;
    assert_eq!(result(folder, &["blockdev-add", object]), json!({}));
    let message = r#"{"execute": "query-named-block-nodes", "arguments": {"flat": true}, "id": 5}"#;
    let nodes = result(folder, &[message, "--compact"]);
    let size_of = |name: &str| {
        let nodes = nodes.as_array().expect("a list");
        let node = nodes.iter().find(|node| node["node-name"] == name);
        node.map(|node| (node["image"]["virtual-size"].clone(), node["ro"].clone()))
    };
    assert_eq!(size_of("a"), Some((json!(1_048_576), json!(true))));
    assert_eq!(size_of("b"), Some((json!(512), json!(false))));
    assert_eq!(size_of("c"), Some((json!(1024), json!(false))));
    assert_eq!(qmp(folder, &["query-jobs", "--compact"]).output, "[]\n");
    assert!(
        qmp(folder, &["query-version"])
            .output
            .starts_with("{\n  \"qemu\": {\n")
    );
    assert_eq!(
        complaint(&qmp(folder, &["nope"])),
        "blockyard: CommandNotFound: The command nope has not been found"
    );
}

#[test]
fn arguments_have_many_forms() {
    let daemon = Daemon::start();
    every_form(daemon.folder.path());
    daemon.quit();
}

#[test]
fn the_oracle_is_spoken_with_in_the_same_way() {
    if !tools::have_oracle() {
        return;
    }
    let daemon = Daemon::start_oracle_with(NODES);
    let folder = daemon.folder.path();
    every_form(folder);
    start_slow(folder);
    let listed = jobs(folder, &["--json"]);
    let job: Value = serde_json::from_str(&listed.output).expect("one job");
    assert_eq!(
        (&job["id"], &job["speed"]),
        (&json!("b"), &json!(1_048_576))
    );
    assert_eq!(jobs(folder, &["speed", "b", "0"]).code, Some(0));
    // Somebody else holds the socket: there will be no greeting.
    let holder = Client::ready(&folder.join("qmp.sock"));
    let silent = qmp(folder, &["query-jobs", "--timeout", "0.3"]);
    assert!(
        complaint(&silent)
            .contains("no greeting within 0.3 s: another client may hold this socket"),
        "{}",
        silent.errors
    );
    drop(holder);
    assert_eq!(result(folder, &["quit"]), json!({}));
    assert!(daemon.wait().success());
}

#[test]
fn what_is_typed_wrong_is_refused_before_anybody_is_asked() {
    let folder = tempfile::tempdir().expect("a folder");
    for (arguments, expected) in [
        (&["x", "a"][..], "Expected '=' after parameter 'a'"),
        (&["x", "a=[1"], "'a' begins like JSON and is none"),
        (
            &["{\"execute\": 1}"],
            "a QMP message needs \"execute\" with a string",
        ),
        (&["x", "--timeout", "0"], "seconds above 0"),
        (&["x", "--wait", "--events"], "cannot be used with"),
    ] {
        let ended = qmp(folder.path(), arguments);
        assert_eq!(ended.code, Some(2), "{arguments:?}: {}", ended.errors);
        assert!(
            ended.errors.contains(expected),
            "{arguments:?}: {}",
            ended.errors
        );
    }
}

#[test]
fn who_is_not_there_is_told_apart() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let complaint_at = |socket: &str| {
        let ended = run(
            folder,
            &["qmp", socket, "query-jobs", "--timeout", "0.3"],
            "",
        );
        complaint(&ended).to_owned()
    };
    assert_eq!(
        complaint_at("none"),
        "blockyard: none: there is no such socket; is the daemon running?"
    );
    std::fs::write(folder.join("file"), "x").expect("written");
    assert_eq!(
        complaint_at("file"),
        "blockyard: file: this is not a socket"
    );
    drop(UnixListener::bind(folder.join("stale")).expect("bound"));
    assert_eq!(
        complaint_at("stale"),
        "blockyard: stale: nobody listens there; a daemon that was killed leaves its socket behind"
    );
    let _listener = UnixListener::bind(folder.join("silent")).expect("bound");
    assert!(complaint_at("unix:silent").starts_with("blockyard: silent: no greeting within 0.3 s"));
}

/// A server in a thread that takes one client and does with it as it is told.
fn server(
    folder: &Path,
    act: impl FnOnce(std::os::unix::net::UnixStream) + Send + 'static,
) -> std::thread::JoinHandle<()> {
    let listener = UnixListener::bind(folder.join("qmp.sock")).expect("bound");
    std::thread::spawn(move || act(listener.accept().expect("a client").0))
}

#[test]
fn what_is_no_qmp_server_is_told() {
    for (said, expected) in [
        (
            &b"SSH-2.0-OpenSSH\r\n"[..],
            "this is no QMP server: it begins with",
        ),
        (
            b"{\"hello\": 1}\n",
            "this is no QMP server: it begins with {\\\"hello\\\":1}",
        ),
        (
            b"",
            "this is no QMP server: it has closed the connection at once",
        ),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let server = server(folder.path(), move |mut stream| {
            stream.write_all(said).expect("sent");
        });
        let ended = qmp(folder.path(), &["query-jobs"]);
        assert!(complaint(&ended).contains(expected), "{}", ended.errors);
        server.join().expect("it has served");
    }
}

#[test]
fn a_daemon_that_goes_before_it_answers_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = server(folder.path(), |mut stream| {
        stream.write_all(b"{\"QMP\": {}}\n").expect("sent");
        let mut lines = BufReader::new(stream.try_clone().expect("cloned")).lines();
        let negotiation = lines.next().expect("a line").expect("a line");
        assert_eq!(negotiation, "{\"execute\":\"qmp_capabilities\",\"id\":1}");
        // An answer in pieces, an answer to nobody, and the end.
        stream
            .write_all(b"{\"id\": 7, \"return\": 1}{\"return\"")
            .expect("sent");
        stream.write_all(b": {}, \"id\": 1}").expect("sent");
        let command = lines.next().expect("a line").expect("a line");
        assert_eq!(
            command,
            "{\"execute\":\"x\",\"arguments\":{\"a\":1},\"id\":2}"
        );
    });
    assert_eq!(
        complaint(&qmp(folder.path(), &["x", "a=1"])),
        "blockyard: qmp.sock: the daemon has closed the connection before it answered x"
    );
    server.join().expect("it has served");
}

#[test]
fn paths_longer_than_the_kernel_takes_are_reached() {
    let daemon = Daemon::start();
    let deep = daemon.path(&"d".repeat(120));
    std::fs::create_dir(&deep).expect("created");
    std::fs::hard_link(daemon.socket(), deep.join("s")).expect("linked");
    let path = deep.join("s").display().to_string();
    let ended = run(Path::new("/"), &["qmp", &path, "query-jobs"], "");
    assert_eq!(
        (ended.code, ended.output.as_str()),
        (Some(0), "[]\n"),
        "{}",
        ended.errors
    );
    daemon.quit();
}

#[test]
fn lines_are_carried_out_one_after_the_other() {
    let daemon = Daemon::start();
    let script = "# a remark\n\n\
        blockdev-add driver=null-co node-name='a' size=512\n\
        nope\n\
        blockdev-add node-name=\n\
        {\"execute\": \"blockdev-del\", \"arguments\": {\"node-name\": \"a\"}}\n\
        what?=\n\
        query-jobs";
    let ended = run(daemon.folder.path(), &["qmp", "qmp.sock"], script);
    assert_eq!(ended.output, "{}\n{}\n[]\n");
    assert_eq!(
        complaint(&ended),
        "blockyard: line 4: CommandNotFound: The command nope has not been found\n\
         blockyard: line 5: GenericError: Parameter 'driver' is missing\n\
         blockyard: line 7: CommandNotFound: The command what?= has not been found"
    );
    // What comes behind quit has nobody to do it; quit itself is done when the daemon is.
    let script = "quit\nquery-jobs\n";
    let ended = run(
        daemon.folder.path(),
        &["qmp", "qmp.sock", "--compact"],
        script,
    );
    assert_eq!((ended.code, ended.output.as_str()), (Some(0), "{}\n"));
    assert!(!daemon.socket().exists(), "the daemon still runs");
}

#[test]
fn a_terminal_is_asked_for_commands_and_shown_events() {
    if !tools::have("script", "bsdutils") {
        return;
    }
    let daemon = Daemon::start();
    let mut command = Command::new("script");
    let program = tools::blockyard().display().to_string();
    command
        .args(["--quiet", "--return", "--command"])
        .arg(format!("'{program}' qmp qmp.sock"))
        .arg("/dev/null")
        .current_dir(daemon.folder.path());
    let typed = "blockdev-create job-id=c options.driver=file options.filename=n options.size=512\n\
        query-version\nquit\n";
    let ended = tools::run_command(command, typed);
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    for expected in [
        "Connected to qmp.sock (blockyard",
        "qmp> ",
        "\"event\":\"JOB_STATUS_CHANGE\"",
        "\"package\": \"blockyard",
    ] {
        assert!(
            ended.output.contains(expected),
            "{expected}: {}",
            ended.output
        );
    }
}

/// A running tool whose output is read as it comes.
fn spawn(daemon: &Daemon, arguments: &[&str]) -> Child {
    Command::new(tools::blockyard())
        .args(arguments)
        .current_dir(daemon.folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts")
}

/// The first line of a stream.
fn first_line(stream: impl Read) -> String {
    let mut lines = BufReader::with_capacity(1, stream).lines();
    lines.next().expect("a line").expect("a line")
}

#[test]
fn events_are_printed_until_the_daemon_ends() {
    let daemon = Daemon::start_with(NODES);
    let mut listener = spawn(
        &daemon,
        &["qmp", "qmp.sock", "query-jobs", "--compact", "--events"],
    );
    // It listens from its first result on.
    assert_eq!(first_line(listener.stdout.as_mut().expect("piped")), "[]");
    let mut client = daemon.client();
    let job = json!({"job-id": "b", "device": "s", "target": "t", "sync": "full"});
    client.run("blockdev-backup", job);
    client.wait_for("b", "null");
    daemon.quit();
    let ended = ended(listener);
    let events: Vec<Value> = ended
        .output
        .lines()
        .map(|line| serde_json::from_str(line).expect("an event"))
        .collect();
    let statuses: Vec<_> = events
        .iter()
        .filter_map(|event| event["data"]["status"].as_str())
        .collect();
    assert_eq!(
        statuses,
        [
            "created",
            "running",
            "waiting",
            "pending",
            "concluded",
            "null"
        ]
    );
    assert_eq!(
        complaint(&ended),
        "blockyard: qmp.sock: the daemon has closed the connection"
    );
}

#[test]
fn waiting_ends_with_the_job_and_as_it_does() {
    let daemon = Daemon::start_with(NODES);
    let folder = daemon.folder.path();
    let wait = |words: &str| qmp(folder, &words.split(' ').collect::<Vec<_>>());
    let done = wait("blockdev-backup job-id=b device=s target=t sync=full --wait");
    assert_eq!(done.code, Some(0), "{}", done.errors);
    assert!(done.output.starts_with("b: 1.0 GiB in "), "{}", done.output);
    let by_hand =
        wait("blockdev-backup device=s target=t sync=full auto-finalize=false job-id=f --wait");
    assert_eq!(by_hand.output, "f: pending, waits for orders\n");
    assert_eq!(jobs(folder, &["finalize", "f"]).code, Some(0));
    let ready = wait("blockdev-mirror job-id=m device=s target=t sync=full --compact --wait");
    let last = ready.output.lines().last().expect("a line");
    assert_eq!(last, "{\"event\":\"ready\",\"id\":\"m\"}");
    assert_eq!(ready.code, Some(0));
    assert_eq!(jobs(folder, &["complete", "m"]).code, Some(0));
    let failed = wait(
        "blockdev-create job-id=c options.driver=file options.filename=no/x options.size=512 --wait",
    );
    assert_eq!(
        complaint(&failed),
        "blockyard: c failed: Could not create 'no/x': No such file or directory"
    );
    assert_eq!(wait("query-jobs --wait --compact").code, Some(0));
    daemon.quit();
}

#[test]
fn a_daemon_that_is_killed_leaves_nobody_waiting() {
    let more_nodes = [
        "--blockdev",
        "null-co,node-name=m,size=1073741824",
        "--blockdev",
        "null-co,node-name=n,size=1073741824",
    ];
    let daemon = Daemon::start_with(&[NODES, &more_nodes].concat());
    start_slow(daemon.folder.path());
    let mut watching = spawn(&daemon, &["jobs", "qmp.sock", "--watch", "--json"]);
    let mirror = "qmp qmp.sock blockdev-mirror job-id=m device=m target=n sync=full speed=1048576 --wait --compact";
    let mut waiting = spawn(&daemon, &mirror.split(' ').collect::<Vec<_>>());
    // Both have seen their job.
    first_line(waiting.stdout.as_mut().expect("piped"));
    first_line(watching.stdout.as_mut().expect("piped"));
    let pid = Pid::from_raw(i32::try_from(daemon.pid()).expect("small")).expect("a process");
    kill_process(pid, Signal::KILL).expect("killed");
    let watched = ended(watching);
    let told = "the daemon has closed the connection; unfinished: ";
    let unfinished = complaint(&watched).split_once(told);
    let unfinished = unfinished.map(|(_, jobs)| jobs.split(", ").any(|job| job == "b"));
    assert_eq!(unfinished, Some(true), "{}", watched.errors);
    let waited = ended(waiting);
    let told = "the daemon has closed the connection while job 'm' was running";
    assert!(complaint(&waited).ends_with(told), "{}", waited.errors);
}

#[test]
fn jobs_are_listed_steered_and_watched() {
    let daemon = Daemon::start_with(NODES);
    let folder = daemon.folder.path();
    let none = jobs(folder, &[]);
    assert_eq!((none.code, none.output.as_str()), (Some(0), ""));
    assert_eq!(none.errors, "blockyard: qmp.sock: there are no jobs\n");
    start_slow(folder);
    let mut client = daemon.client();
    let table = jobs(folder, &[]).output;
    let lines: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split("  ").collect())
        .collect();
    assert!(lines[0][0] == "ID" && lines[1][0] == "b", "{table}");
    assert!(table.contains("backup  running"), "{table}");
    assert!(table.contains(" of 1.0 GiB  1.0 MiB/s"), "{table}");
    assert_eq!(jobs(folder, &["pause", "b"]).code, Some(0));
    client.wait_for("b", "paused");
    let job: Value = serde_json::from_str(&jobs(folder, &["--json"]).output).expect("one job");
    assert_eq!(job["status"], "paused");
    assert_eq!(job["total-bytes"], 1_u64 << 30);
    assert_eq!(jobs(folder, &["resume", "b"]).code, Some(0));
    assert_eq!(jobs(folder, &["speed", "b", "2M"]).code, Some(0));
    assert_eq!(
        client.run("query-block-jobs", json!({}))[0]["speed"],
        2 << 20
    );
    let unknown = jobs(folder, &["cancel", "nope"]);
    assert_eq!(
        complaint(&unknown),
        "blockyard: GenericError: Job not found"
    );
    assert_eq!(jobs(folder, &["speed", "b", "fast"]).code, Some(2));

    let mut watching = spawn(&daemon, &["jobs", "qmp.sock", "--watch"]);
    let mut for_programs = spawn(&daemon, &["jobs", "qmp.sock", "--watch", "--json"]);
    let first: Value =
        serde_json::from_str(&first_line(for_programs.stdout.as_mut().expect("piped")))
            .expect("JSON");
    assert_eq!(
        (&first["event"], &first["id"]),
        (&json!("progress"), &json!("b"))
    );
    let limit = first_line(watching.stderr.as_mut().expect("piped"));
    assert_eq!(limit, "blockyard: b: limit 2.0 MiB/s");
    assert_eq!(jobs(folder, &["cancel", "b"]).code, Some(0));
    let watched = ended(watching);
    assert!(
        watched.errors.ends_with("blockyard: b cancelled\n"),
        "{}",
        watched.errors
    );
    assert_eq!(watched.code, Some(1));
    let last = ended(for_programs).output;
    let last: Value = serde_json::from_str(last.lines().last().expect("a line")).expect("JSON");
    assert_eq!(last["event"], "cancelled");

    start_slow(folder);
    let watching = spawn(
        &daemon,
        &["jobs", "qmp.sock", "--watch", "--quiet", "--json"],
    );
    assert_eq!(jobs(folder, &["speed", "b", "0"]).code, Some(0));
    assert_eq!(ended(watching).code, Some(0));
    daemon.quit();
}
