//! Random jobs on random chains whose top is written to meanwhile: every reply holds, in the end each disk is what its writers have
//! made of it, and the chain is the same on both daemons.
//!
//! While a stream runs, QEMU's daemon now and then answers a read with something else than what was written. So its writers do not look,
//! what its disk is in the end is told if it is wrong, and only ours fails for either.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use serde_json::json;

use crate::chains::with;
use crate::daemon::Daemon;
use crate::nbd::{export, start_server};
use crate::random_chains::{
    Dice, Job, Layer, STEP, copy, depth, format_of, job, make, must, nodes, verdicts,
};
use crate::tools;
use crate::writer::Writer;

/// So many bytes a second, so that a job lasts while much is written.
const SPEED: u64 = 1 << 20;

/// A chain, a job on it, and which layer the writers write to in the end.
struct Case {
    seed: u64,
    depth: usize,
    job: Job,
    written: usize,
    unmaps: bool,
}

impl Case {
    fn new(seed: u64, folder: &Path) -> (Self, Vec<Layer>) {
        let mut dice = Dice::new(4000 + seed);
        let depth = depth(&mut dice, seed, 9, 6);
        let layers = make(folder, 50 + seed, depth, true);
        let top = depth - 1;
        let (mut job, written) = match seed % 3 {
            0 => active_commit(&mut dice, top),
            _ => (job(&mut dice, &layers), top),
        };
        job.same.retain(|place| *place != written);
        let unmaps = dice.one_in(2);
        let case = Self {
            seed,
            depth,
            job,
            written,
            unmaps,
        };
        (case, layers)
    }
}

/// A commit of the top, after which its base is written to.
fn active_commit(dice: &mut Dice, top: usize) -> (Job, usize) {
    let base = dice.below(top as u64) as usize;
    let job = Job {
        command: "block-commit",
        arguments: json!({"device": format!("n{top}"), "base-node": format!("n{base}")}),
        same: (0..base).collect(),
        became: None,
    };
    (job, base)
}

/// What `qemu-img info` says of the chain that is left.
fn facts(folder: &Path, case: &Case, layers: &[Layer]) -> Vec<String> {
    let left = case.job.same.iter().copied().chain([case.written]);
    let images = left.filter(|place| format_of(layers, *place) == "qcow2");
    let of = |place: usize| {
        let mut command = Command::new("qemu-img");
        let name = format!("{place}.img");
        command.args(["info", "-U", "-f", "qcow2", &name]);
        let output = command.current_dir(folder).output().expect("it runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let told = ["image", "virtual size", "backing file"];
        let lines = text
            .lines()
            .filter(|line| told.iter().any(|word| line.starts_with(word)));
        let lines: Vec<String> = lines
            // It adds where that is, which is another folder for each.
            .map(|line| line.split(" (actual").next().unwrap_or(line).to_owned())
            .collect();
        lines.join(", ")
    };
    images.map(of).collect()
}

/// Runs it on one daemon; what the chain is like then.
fn run_on(daemon: Daemon, case: &Case, layers: &[Layer], is_oracle: bool) -> Vec<String> {
    let seed = case.seed;
    let mut client = daemon.client();
    for mut node in nodes(layers, false) {
        if case.unmaps {
            node["discard"] = json!("unmap");
            node["file"]["discard"] = json!("unmap");
        }
        client.run("blockdev-add", node);
    }
    let top = format!("n{}", case.depth - 1);
    start_server(&daemon, &mut client, 100);
    export(&mut client, &top);
    let half = layers[case.depth - 1].size / 2 / STEP * STEP;
    let parts = [0..half, half..layers[case.depth - 1].size];
    let writers = parts.map(|part| {
        let random = seed * 2 + u64::from(part.start > 0) + 1;
        let start = match is_oracle {
            true => Writer::start_blind,
            false => Writer::start,
        };
        start(daemon.path("nbd.sock"), &top, part, random)
    });
    let go_on = || writers.iter().for_each(|writer| writer.goes_on(10));
    go_on();
    let more = json!({"job-id": "j", "auto-dismiss": false, "speed": SPEED});
    client.run(case.job.command, with(more, case.job.arguments.clone()));
    go_on();
    if case.written + 1 < case.depth {
        // Slower than the writers it would never be done.
        client.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
        client.wait_for("j", "ready");
        go_on();
        client.run("job-complete", json!({"id": "j"}));
    }
    client.wait_for("j", "concluded");
    let jobs = client.run("query-jobs", json!({}));
    assert_eq!(jobs[0].get("error"), None, "seed {seed}: {jobs}");
    client.run("job-dismiss", json!({"id": "j"}));
    go_on();
    let model = writers.map(Writer::end).concat();
    let folder = daemon.quit_by(client);
    let path = folder.path();
    let (written, format) = (case.written, format_of(layers, case.written));
    must(
        path,
        &format!("qemu-img convert -f {format} -O raw {written}.img after"),
        seed,
    );
    let disk = fs::read(path.join("after")).expect("read");
    let is_as_written = disk == model;
    assert!(
        is_as_written || is_oracle,
        "seed {seed}: what was written is not there"
    );
    if !is_as_written {
        eprintln!("seed {seed}: QEMU's daemon has lost something");
    }
    if format == "qcow2" {
        must(
            path,
            &format!("qemu-img check -q -f qcow2 {written}.img"),
            seed,
        );
    }
    for verdict in verdicts(layers, &case.job) {
        must(path, &verdict, seed);
    }
    facts(path, case, layers)
}

#[test]
fn random_jobs_run_below_writers_on_both_daemons() {
    if !tools::have("qemu-img", "qemu-utils") || !tools::have_oracle() {
        return;
    }
    for seed in 0..tools::seeds(11) {
        let made = tempfile::tempdir().expect("a folder");
        let (case, layers) = Case::new(seed, made.path());
        let (ours, theirs) = thread::scope(|scope| {
            let start = |is_oracle: bool| {
                let folder = tempfile::tempdir().expect("a folder");
                copy(made.path(), folder.path());
                let daemon = match is_oracle {
                    true => Daemon::start_oracle_in(folder),
                    false => Daemon::start_in(folder, &[]),
                };
                run_on(daemon, &case, &layers, is_oracle)
            };
            let theirs = scope.spawn(move || start(true));
            (start(false), theirs.join().expect("it does, too"))
        });
        assert_eq!(ours, theirs, "seed {seed}");
    }
}
