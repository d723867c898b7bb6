//! Random mirrors and backups below writers of an export, by seed: paused, resumed, given other speeds and copy modes, failed by
//! their target and told to go on. What a writer was told to be written is where it reads, and every copy is what it has to be.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::images::run;
use crate::nbd::start_server;
use crate::oracle::{data_file, hole_file};
use crate::tools;
use crate::writer::{Random, Writer};

const LENGTH: u64 = 1 << 20;

/// Two writers share the disk.
const HALF: u64 = LENGTH / 2;

const SEEDS: u64 = 200;

/// One seed's disk, job and dice.
struct Case<'a> {
    daemon: &'a Daemon,
    client: &'a mut Client,
    random: Random,
    /// Of everything that belongs to this seed.
    name: String,
    target_fails: bool,
}

#[test]
fn random_jobs_below_writers() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    let daemon = Daemon::start_with(&["--data-threads", "2"]);
    data_file(&daemon.path("content"), LENGTH);
    let image = ["convert", "-f", "raw", "-O", "qcow2", "content", "image"];
    run(daemon.folder.path(), "qemu-img", &image);
    let mut client = daemon.client();
    start_server(&daemon, &mut client, 100);
    for seed in 0..tools::seeds(SEEDS) {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let target_fails = random.below(3) == 0;
        let case = Case {
            daemon: &daemon,
            client: &mut client,
            random,
            name: format!("s{seed}"),
            target_fails,
        };
        case.run();
    }
    drop(client);
    daemon.quit();
}

impl Case<'_> {
    fn run(mut self) {
        self.add_disks();
        match self.random.below(3) {
            0 => self.backup(),
            _ => self.mirror(),
        }
        self.end();
    }

    /// The disk, exported, and an empty target.
    fn add_disks(&mut self) {
        let (name, folder) = (self.name.clone(), self.daemon.folder.path());
        let is_raw = self.random.below(2) == 0;
        let content = if is_raw { "content" } else { "image" };
        fs::copy(folder.join(content), folder.join(&name)).expect("copied");
        let file = json!({"driver": "file", "filename": name, "discard": "unmap"});
        let driver = if is_raw { "raw" } else { "qcow2" };
        let disk = json!({"driver": driver, "node-name": name, "discard": "unmap", "file": file});
        self.client.run("blockdev-add", disk);
        hole_file(&folder.join(self.target()), LENGTH);
        let mut target = json!({"driver": "file", "filename": self.target()});
        if self.target_fails {
            let count = 1 + self.random.below(3);
            let errors = (0..count).map(|_| {
                let errno = [5, 28][usize::from(self.random.below(2) == 0)];
                let sector = self.random.below(LENGTH / 512);
                json!({"event": "none", "iotype": "write", "errno": errno, "sector": sector, "once": true})
            });
            let errors: Vec<Value> = errors.collect();
            target = json!({"driver": "blkdebug", "image": target, "inject-error": errors});
        }
        target["node-name"] = json!(self.target());
        self.client.run("blockdev-add", target);
        self.client.run(
            "block-export-add",
            json!({"type": "nbd", "id": name, "node-name": name, "writable": true}),
        );
    }

    fn target(&self) -> String {
        format!("{}t", self.name)
    }

    fn writers(&mut self) -> [Writer; 2] {
        [0, 1].map(|which| {
            let part = which * HALF..(which + 1) * HALF;
            let socket = self.daemon.path("nbd.sock");
            Writer::start(socket, &self.name, part, self.random.below(u64::MAX))
        })
    }

    /// The target is the disk as it was when the job began, or the job has failed and says so.
    fn backup(&mut self) {
        let [one, other] = self.writers();
        one.goes_on(self.random.below(20));
        let model = whole([one, other]);
        let job = json!({"job-id": "j", "device": self.name, "target": self.target(), "sync": "full",
            "auto-dismiss": false, "on-target-error": "stop", "on-cbw-error": "break-snapshot",
            "speed": self.speed()});
        self.client.run("blockdev-backup", job);
        let writers = self.writers();
        self.meddle(&writers);
        let error = self.until("concluded");
        assert!(
            error.is_none() || self.target_fails,
            "{}: {error:?}",
            self.name
        );
        writers[0].goes_on(10);
        let now = whole(writers);
        self.client.run("job-dismiss", json!({"id": "j"}));
        if error.is_none() {
            assert!(
                self.read(&self.target()) == model,
                "{}: the backup",
                self.name
            );
        }
        self.check_disk(&now);
    }

    /// The target is what writers go on with, or what the disk was when the job was let go.
    fn mirror(&mut self) {
        let writers = self.writers();
        let mode = ["background", "write-blocking"][usize::from(self.random.below(2) == 0)];
        let granularity = [512, 4096, 65536][usize::try_from(self.random.below(3)).expect("small")];
        let job = json!({"job-id": "j", "device": self.name, "target": self.target(), "sync": "full",
            "auto-dismiss": false, "on-target-error": "stop", "copy-mode": mode,
            "granularity": granularity, "speed": self.speed()});
        self.client.run("blockdev-mirror", job);
        self.meddle(&writers);
        // Writers that dirty as fast as it copies have to wait for it.
        let mode = json!({"id": "j", "type": "mirror", "copy-mode": "write-blocking"});
        self.client.command("block-job-change", mode);
        assert_eq!(self.until("ready"), None);
        writers[1].goes_on(self.random.below(20));
        // A fault that is left would strike the writers after they have gone over.
        match self.random.below(3) + u64::from(self.target_fails) {
            0 | 1 if !self.target_fails => {
                self.client.run("job-complete", json!({"id": "j"}));
                assert_eq!(self.until("concluded"), None);
                writers[0].goes_on(20);
                let model = whole(writers);
                self.client.run("job-dismiss", json!({"id": "j"}));
                assert!(
                    self.read(&self.target()) == model,
                    "{}: the mirror",
                    self.name
                );
            }
            2 => {
                let model = whole(writers);
                self.cancel(json!({"device": "j"}));
                assert_eq!(self.until("concluded"), None);
                self.client.run("job-dismiss", json!({"id": "j"}));
                assert!(
                    self.read(&self.target()) == model,
                    "{}: the copy",
                    self.name
                );
                self.check_disk(&model);
            }
            _ => {
                self.cancel(json!({"device": "j", "force": true}));
                self.until("concluded");
                writers[0].goes_on(10);
                let model = whole(writers);
                self.client.run("job-dismiss", json!({"id": "j"}));
                self.check_disk(&model);
            }
        }
    }

    /// A fault may have paused the job again.
    fn cancel(&mut self, how: Value) {
        let cancelled = |reply: Value| reply.get("return").is_some();
        while !cancelled(self.client.command("block-job-cancel", how.clone())) {
            self.client
                .command("block-job-resume", json!({"device": "j"}));
        }
    }

    fn speed(&mut self) -> u64 {
        [0, 0, 1 << 20, 8 << 20][usize::try_from(self.random.below(4)).expect("small")]
    }

    /// Does to the job what clients do, whether it is still there or not.
    fn meddle(&mut self, writers: &[Writer; 2]) {
        let job = json!({"id": "j"});
        for _ in 0..self.random.below(5) {
            writers[0].goes_on(self.random.below(8));
            match self.random.below(3) {
                0 => {
                    self.client.command("job-pause", job.clone());
                    writers[1].goes_on(5);
                    self.client.command("job-resume", job.clone());
                }
                1 => {
                    let speed = json!({"device": "j", "speed": self.speed()});
                    self.client.command("block-job-set-speed", speed);
                }
                _ => {
                    let mode = json!({"id": "j", "type": "mirror", "copy-mode": "write-blocking"});
                    self.client.command("block-job-change", mode);
                }
            }
        }
        let fast = json!({"device": "j", "speed": 0});
        self.client.command("block-job-set-speed", fast);
    }

    /// Waits for a status and lets the job go on after each error. The error that the job has ended with.
    fn until(&mut self, status: &str) -> Option<String> {
        loop {
            let event = match self.client.events.is_empty() {
                true => self.client.message().expect("an event, not the end"),
                false => self.client.events.remove(0),
            };
            let data = &event["data"];
            match event["event"].as_str() {
                Some("JOB_STATUS_CHANGE")
                    if data["status"] == status || data["status"] == "concluded" =>
                {
                    let jobs = self.client.run("query-jobs", json!({}));
                    return jobs[0]["error"].as_str().map(str::to_owned);
                }
                Some("BLOCK_JOB_ERROR") if data["action"] == "stop" => {
                    // It may be paused by now, or be so in a moment; what pauses it later is another error.
                    self.client
                        .command("block-job-resume", json!({"device": "j"}));
                }
                _ => {}
            }
        }
    }

    /// What is in a raw file.
    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.daemon.path(name)).expect("read")
    }

    /// What a new client of the export reads.
    fn check_disk(&self, model: &[u8]) {
        let mut nbd = crate::nbd::Nbd::open(&self.daemon.path("nbd.sock"), &self.name);
        let length = u32::try_from(LENGTH).expect("small");
        assert!(nbd.read(0, length) == model, "{}: the disk", self.name);
    }

    fn end(self) {
        let Self {
            daemon,
            client,
            name,
            ..
        } = self;
        client.run("block-export-del", json!({"id": name, "mode": "hard"}));
        while client.run("query-block-exports", json!({})) != json!([]) {}
        for node in [name.clone(), format!("{name}t")] {
            // One of them may have gone with the job.
            client.command("blockdev-del", json!({"node-name": node}));
        }
        client.events.clear();
        for file in [&name, &format!("{name}t")] {
            fs::remove_file(Path::new(&daemon.path(file))).expect("removed");
        }
    }
}

/// What the disk holds after both have ended.
fn whole(writers: [Writer; 2]) -> Vec<u8> {
    let [one, other] = writers;
    let mut model = one.end();
    model.extend(other.end());
    model
}
