//! Clients that know no manners: random verbs on random jobs from several sides, requests that do not fit, garbage. The
//! daemon stays, answers, and gives back what it took.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Client, DEADLINE};
use crate::daemon::Daemon;
use crate::oracle::{data_file, hole_file};

/// Requests of each client.
const STEPS: usize = 1000;
const CLIENTS: usize = 4;
const JOBS: usize = 6;
const NODES: usize = 8;

/// xorshift: the same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).expect("small")
    }

    fn pick<'a>(&mut self, list: &[&'a str]) -> &'a str {
        list[self.below(list.len())]
    }
}

/// Something that a client might want, of any job, node or file, in any order.
fn request(random: &mut Random) -> (&'static str, Value) {
    let job = format!("j{}", random.below(JOBS));
    let (node, other) = (
        format!("n{}", random.below(NODES)),
        format!("n{}", random.below(NODES)),
    );
    let flag = |random: &mut Random| random.below(2) == 0;
    match random.below(16) {
        0 => {
            let sync = random.pick(&["full", "top", "none"]);
            let speed = random.pick(&["0", "65536", "1048576"]);
            let speed: u64 = speed.parse().expect("a number");
            let backup = json!({"job-id": job, "device": node, "target": other, "sync": sync,
                "speed": speed, "auto-finalize": flag(random), "auto-dismiss": flag(random)});
            ("blockdev-backup", backup)
        }
        1 => {
            let mirror = json!({"job-id": job, "device": node, "target": other, "sync": "full",
                "auto-finalize": flag(random), "auto-dismiss": flag(random)});
            ("blockdev-mirror", mirror)
        }
        2 => {
            let options = json!({"driver": "file", "filename": "new.raw", "size": 1 << 20});
            (
                "blockdev-create",
                json!({"job-id": job, "options": options}),
            )
        }
        3 => ("job-pause", json!({"id": job})),
        4 => ("job-resume", json!({"id": job})),
        5 => ("job-cancel", json!({"id": job})),
        6 => ("job-complete", json!({"id": job})),
        7 => ("job-finalize", json!({"id": job})),
        8 => ("job-dismiss", json!({"id": job})),
        9 => (
            "block-job-cancel",
            json!({"device": job, "force": flag(random)}),
        ),
        10 => (
            "block-job-set-speed",
            json!({"device": job, "speed": random.below(1 << 30)}),
        ),
        11 => {
            let change = json!({"id": job, "type": "mirror", "copy-mode": "write-blocking"});
            ("block-job-change", change)
        }
        12 => {
            let filename = format!("f{}.raw", random.below(NODES));
            let driver = random.pick(&["file", "null-co"]);
            let mut add = json!({"driver": driver, "node-name": node});
            if driver == "file" {
                add["filename"] = json!(filename);
            } else {
                add["size"] = json!(1 << 20);
            }
            ("blockdev-add", add)
        }
        13 => ("blockdev-del", json!({"node-name": node})),
        14 => {
            let iothread = if flag(random) {
                json!("io0")
            } else {
                Value::Null
            };
            (
                "x-blockdev-set-iothread",
                json!({"node-name": node, "iothread": iothread}),
            )
        }
        _ => ("query-block-jobs", json!({})),
    }
}

/// Waits for a condition by asking the daemon for its version in between, which is the clock of this test.
fn eventually(client: &mut Client, what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < DEADLINE, "{what}");
        client.run("query-version", json!({}));
    }
}

#[test]
fn random_verbs_on_random_jobs_from_four_clients() {
    let daemon = Daemon::start_logging();
    for number in 0..NODES {
        let path = daemon.path(&format!("f{number}.raw"));
        if number % 2 == 0 {
            data_file(&path, 1 << 20);
        } else {
            hole_file(&path, 1 << 20);
        }
    }
    let mut observer = daemon.client();
    observer.run("object-add", json!({"qom-type": "iothread", "id": "io0"}));
    let descriptors_before = daemon.descriptors().len();
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let mut client = daemon.client();
            scope.spawn(move || {
                let mut random = Random(0x9e37_79b9 + number as u64);
                for _ in 0..STEPS {
                    let (name, arguments) = request(&mut random);
                    let reply = client.command(name, arguments.clone());
                    let text = reply["error"]["desc"].as_str().unwrap_or("");
                    assert!(!text.contains("bug"), "{name} {arguments}: {text}");
                }
            });
        }
    });
    observer.run("query-version", json!({}));
    let concluded = observer
        .events
        .iter()
        .filter(|event| event["data"]["status"] == "concluded");
    assert!(concluded.count() > 20, "hardly any job ran");
    let bug = observer.events.iter().find(|event| {
        let error = event["data"]["error"].as_str();
        error.is_some_and(|text| text.contains("bug"))
    });
    assert_eq!(bug, None);
    // All that is left is ended and taken away; then nothing is left.
    let jobs = observer.run("query-jobs", json!({}));
    for job in jobs.as_array().expect("a list") {
        let id = job["id"].as_str().expect("an id");
        observer.command("job-cancel", json!({"id": id}));
    }
    let started = Instant::now();
    loop {
        let jobs = observer.run("query-jobs", json!({}));
        let jobs = jobs.as_array().expect("a list");
        if jobs.is_empty() {
            break;
        }
        assert!(started.elapsed() < DEADLINE, "these jobs stay: {jobs:?}");
        for job in jobs.iter().filter(|job| job["status"] == "concluded") {
            observer.command("job-dismiss", json!({"id": job["id"]}));
        }
    }
    for number in 0..NODES {
        observer.command("blockdev-del", json!({"node-name": format!("n{number}")}));
    }
    assert_eq!(
        observer.run("query-named-block-nodes", json!({})),
        json!([])
    );
    eventually(&mut observer, "descriptors stay open", || {
        daemon.descriptors().len() <= descriptors_before
    });
    assert!(daemon.resident_bytes() < 256 << 20);
    no_bugs(&daemon);
    daemon.quit();
}

/// What the daemon itself calls a bug must not have happened.
fn no_bugs(daemon: &Daemon) {
    daemon.assert_no_bug();
}

/// A job exists a moment before it runs, and others may have heard of it by then: their verbs find it running.
#[test]
fn verbs_between_creation_and_start() {
    let daemon = Daemon::start_logging();
    let mut starter = daemon.client();
    let mut other = daemon.client();
    starter.run("object-add", json!({"qom-type": "iothread", "id": "io0"}));
    for name in ["s", "t"] {
        let node = json!({"driver": "null-co", "node-name": name, "size": 64 << 20});
        starter.run("blockdev-add", node);
    }
    for round in 0..60 {
        // Its nodes are on two threads, so that the job has to bring them together first.
        let away = json!({"node-name": "t", "iothread": "io0"});
        starter.run("x-blockdev-set-iothread", away);
        let id = format!("j{round}");
        let backup = json!({"execute": "blockdev-backup", "arguments":
            {"job-id": id, "device": "s", "target": "t", "sync": "full", "speed": 1}});
        starter.send(backup.to_string().as_bytes());
        other.wait_for(&id, "created");
        let verb = if round % 2 == 0 {
            "job-cancel"
        } else {
            "job-pause"
        };
        other.run(verb, json!({"id": id}));
        assert_eq!(starter.reply(), json!({"return": {}}));
        if verb == "job-pause" {
            other.run("job-cancel", json!({"id": id}));
        }
        starter.wait_for(&id, "running");
        starter.wait_for(&id, "null");
    }
    no_bugs(&daemon);
    daemon.quit();
}

#[test]
fn garbage_and_connections_that_break() {
    let daemon = Daemon::start();
    let mut observer = daemon.client();
    let descriptors_before = daemon.descriptors().len();
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for round in 0..200 {
        let mut stream = UnixStream::connect(daemon.socket()).expect("connected");
        let mut bytes = match round % 4 {
            0 => vec![b'{'; 2000],
            1 => b"{\"execute\": \"qmp_capabilities\"}{\"execute\": \"query-jobs\", \"id\": \""
                .to_vec(),
            2 => vec![0xff; 500],
            _ => b"{\"execute\": \"qmp_capabilities\"}".to_vec(),
        };
        for _ in 0..random.below(3000) {
            bytes.push(u8::try_from(random.below(256)).expect("a byte"));
        }
        stream.set_write_timeout(Some(DEADLINE)).expect("set");
        stream.write_all(&bytes).expect("sent");
        match round % 3 {
            // Gone without a word.
            0 => {}
            // Deaf, but still talking.
            1 => stream.shutdown(Shutdown::Read).expect("shut down"),
            // Silent, but listening to the end.
            _ => {
                stream.shutdown(Shutdown::Write).expect("shut down");
                stream.set_read_timeout(Some(DEADLINE)).expect("set");
                let mut answers = Vec::new();
                // A daemon that resets the connection has answered too.
                let _ = stream.read_to_end(&mut answers);
                assert!(answers.starts_with(b"{\"QMP\": "));
            }
        }
        assert!(observer.run("query-version", json!({}))["qemu"].is_object());
    }
    eventually(&mut observer, "descriptors stay open", || {
        daemon.descriptors().len() <= descriptors_before
    });
    assert!(daemon.resident_bytes() < 128 << 20);
    daemon.quit();
}

/// A storm on three sides does not keep a fourth from its answers.
#[test]
fn one_client_is_served_while_others_storm() {
    let daemon = Daemon::start();
    let mut observer = daemon.client();
    let longest = std::thread::scope(|scope| {
        for number in 0..3_u64 {
            let mut client = daemon.client();
            scope.spawn(move || {
                let mut random = Random(77 + number);
                let mut batch = Vec::new();
                for _ in 0..STEPS {
                    let (name, arguments) = request(&mut random);
                    let line = json!({"execute": name, "arguments": arguments});
                    batch.extend(line.to_string().into_bytes());
                }
                client.send(&batch);
                for _ in 0..STEPS {
                    client.reply();
                }
            });
        }
        let mut longest = Duration::ZERO;
        for _ in 0..STEPS {
            let asked = Instant::now();
            observer.run("query-version", json!({}));
            longest = longest.max(asked.elapsed());
        }
        longest
    });
    eprintln!("the longest answer took {longest:?}");
    daemon.quit();
}
