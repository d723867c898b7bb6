//! Random jobs on random chains: what is seen through every image that is left is what was seen before, headers tell of the chain
//! that was asked for, the same on both daemons; and a daemon that is killed at any moment leaves a chain that reads as it did.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use crate::chains::{on, with};
use crate::client::{Client, DEADLINE};
use crate::daemon::Daemon;
use crate::images::run;
use crate::oracle::compare;
use crate::tools;

/// Unit of lengths of disks.
pub(crate) const STEP: u64 = 64 << 10;

/// Most layers of a chain.
const LAYERS_MAX: u64 = 40;

/// Numbers that a seed stands for.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 20) % bound
    }

    pub(crate) fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// What a layer is made of.
pub(crate) struct Layer {
    /// Length of its disk in bytes.
    pub(crate) size: u64,
    raw: bool,
}

/// How many layers the chain of a seed has: a few for the first `short` seeds, which are many jobs in little time, then 40, and up
/// to 40 for those behind.
pub(crate) fn depth(dice: &mut Dice, seed: u64, short: u64, short_max: u64) -> usize {
    let layers = match seed {
        seed if seed < short => 2 + dice.below(short_max - 1),
        seed if seed == short => LAYERS_MAX,
        _ => 2 + dice.below(LAYERS_MAX - 1),
    };
    layers as usize
}

/// The layers that [`make`] has made in one folder are put into another one.
pub(crate) fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).expect("a folder") {
        let name = entry.expect("an entry").file_name();
        let (from, to) = (from.join(&name), to.join(&name));
        // What was seen before is only read.
        let is_kept = name.to_string_lossy().ends_with(".before");
        match is_kept && fs::hard_link(&from, &to).is_ok() {
            true => {}
            false => drop(fs::copy(&from, &to).expect("copied")),
        }
    }
}

/// Makes layers `0`, `1`, ... of a chain. Where `rising`, none is shorter than one below it.
pub(crate) fn make(folder: &Path, seed: u64, depth: usize, rising: bool) -> Vec<Layer> {
    let mut dice = Dice::new(seed);
    let mut layers: Vec<Layer> = Vec::new();
    for place in 0..depth {
        let below = layers.last().map_or(8 * STEP, |layer: &Layer| layer.size);
        let size = match rising {
            true => below + STEP * dice.below(3),
            false => STEP * (4 + dice.below(24)),
        };
        let raw = place == 0 && dice.one_in(3);
        let name = format!("{place}.img");
        if raw {
            let size = size.to_string();
            run(
                folder,
                "qemu-img",
                &["create", "-q", "-f", "raw", &name, &size],
            );
        } else {
            let cluster_bytes = make_qcow2(folder, &mut dice, place, size, layers.last());
            if let Some(cluster_bytes) = cluster_bytes.filter(|_| dice.one_in(2)) {
                compress(folder, &mut dice, place, size, cluster_bytes);
            }
        }
        write(folder, &mut dice, place, size, raw);
        layers.push(Layer { size, raw });
    }
    for place in 0..depth {
        let format = format_of(&layers, place);
        let (from, to) = (format!("{place}.img"), format!("{place}.before"));
        run(
            folder,
            "qemu-img",
            &["convert", "-f", format, "-O", "raw", &from, &to],
        );
    }
    layers
}

/// Makes an image. Length of its clusters in bytes, if they can be compressed.
fn make_qcow2(
    folder: &Path,
    dice: &mut Dice,
    place: usize,
    size: u64,
    below: Option<&Layer>,
) -> Option<u64> {
    let mut options = Vec::new();
    let extended = dice.one_in(5);
    let bits = match extended {
        true => 14 + dice.below(5),
        false => 9 + dice.below(11),
    };
    options.push(format!("cluster_size={}", 1_u64 << bits));
    if extended {
        options.push("extended_l2=on".to_owned());
    } else if dice.one_in(5) {
        options.push("compat=0.10".to_owned());
    } else if dice.one_in(5) {
        options.push("lazy_refcounts=on".to_owned());
    } else if dice.one_in(6) {
        options.push(format!("data_file={place}.data"));
    }
    let (name, size, options) = (format!("{place}.img"), size.to_string(), options.join(","));
    let backing = place.wrapping_sub(1);
    let backing = format!("{backing}.img");
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    if let Some(below) = below {
        let format = if below.raw { "raw" } else { "qcow2" };
        arguments.extend(["-b", &backing, "-F", format]);
    }
    arguments.extend([&*name, &*size]);
    run(folder, "qemu-img", &arguments);
    (!options.contains("data_file")).then_some(1 << bits)
}

/// Compressed clusters, here and there; what is written later may be in the same ones.
fn compress(folder: &Path, dice: &mut Dice, place: usize, size: u64, cluster_bytes: u64) {
    let mut done = Vec::new();
    for _ in 0..3 + dice.below(6) {
        let cluster = dice.below(size.div_ceil(cluster_bytes));
        // One that is there already cannot be compressed again.
        if done.contains(&cluster) {
            continue;
        }
        done.push(cluster);
        let offset = cluster * cluster_bytes;
        let length = cluster_bytes.min(size - offset);
        let command = format!("write -c -P {} {offset} {length}", 1 + dice.below(250));
        let name = format!("{place}.img");
        run(folder, "qemu-io", &["-f", "qcow2", "-c", &command, &name]);
    }
}

/// Data, zeroes, holes and compressed clusters.
fn write(folder: &Path, dice: &mut Dice, place: usize, size: u64, raw: bool) {
    let mut arguments = vec![
        "-f".to_owned(),
        if raw { "raw" } else { "qcow2" }.to_owned(),
    ];
    for _ in 0..2 + dice.below(6) {
        let offset = dice.below(size / 512) * 512;
        let length = (512 * (1 + dice.below(300))).min(size - offset);
        let command = match dice.below(6) {
            0 => format!("write -z {offset} {length}"),
            1 => format!("write -z -u {offset} {length}"),
            2 => format!("discard {offset} {length}"),
            _ => format!("write -P {} {offset} {length}", 1 + dice.below(250)),
        };
        arguments.extend(["-c".to_owned(), command]);
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    run(
        folder,
        "qemu-io",
        &[&arguments[..], &[&*format!("{place}.img")]].concat(),
    );
}

pub(crate) fn format_of(layers: &[Layer], place: usize) -> &'static str {
    match layers.get(place) {
        Some(layer) if layer.raw => "raw",
        _ => "qcow2",
    }
}

/// A node for each layer, in one another where `nested`, else one by one.
pub(crate) fn nodes(layers: &[Layer], nested: bool) -> Vec<Value> {
    let mut all = Vec::new();
    let mut below: Option<Value> = None;
    for place in 0..layers.len() {
        let mut node = on(&format!("n{place}"), &format!("{place}.img"));
        node["driver"] = json!(format_of(layers, place));
        if let Some(below) = below.take() {
            node = with(node, json!({"backing": below}));
        }
        below = match nested {
            true => Some(node),
            false => {
                all.push(node);
                Some(json!(format!("n{place}")))
            }
        };
    }
    if nested {
        all.extend(below);
    }
    all
}

/// A job, and the layers that read afterwards as they did before.
pub(crate) struct Job {
    pub(crate) command: &'static str,
    pub(crate) arguments: Value,
    pub(crate) same: Vec<usize>,
    /// What this layer shows afterwards another one showed before.
    pub(crate) became: Option<(usize, usize)>,
}

/// A commit below the top or a stream, wherever it fits.
pub(crate) fn job(dice: &mut Dice, layers: &[Layer]) -> Job {
    let depth = layers.len();
    let any =
        |dice: &mut Dice, from: usize, to: usize| from + dice.below((to - from) as u64) as usize;
    if depth > 2 && dice.one_in(2) {
        let top = any(dice, 1, depth - 1);
        let base = any(dice, 0, top);
        let overlay = top + 1;
        return Job {
            command: "block-commit",
            arguments: json!({"device": format!("n{}", depth - 1), "top-node": format!("n{top}"),
                "base-node": format!("n{base}"), "backing-file": format!("{base}.img")}),
            same: (0..base).chain(overlay..depth).collect(),
            became: (layers[base].size <= layers[top].size).then_some((base, top)),
        };
    }
    let device = any(dice, 1, depth);
    let mut arguments = json!({"device": format!("n{device}")});
    if dice.one_in(2) {
        let base = any(dice, 0, device);
        arguments["base-node"] = json!(format!("n{base}"));
        arguments["backing-file"] = json!(format!("{base}.img"));
    }
    Job {
        command: "block-stream",
        arguments,
        same: (0..depth).collect(),
        became: None,
    }
}

/// Commands that judge what is left.
pub(crate) fn verdicts(layers: &[Layer], job: &Job) -> Vec<String> {
    let mut verdicts = Vec::new();
    let shown = job.same.iter().map(|place| (*place, *place));
    for (place, was) in shown.chain(job.became) {
        let format = format_of(layers, place);
        verdicts.push(format!(
            "qemu-img compare -f {format} -F raw {place}.img {was}.before"
        ));
        if format == "qcow2" {
            verdicts.push(format!("qemu-img check -q -f qcow2 {place}.img"));
            verdicts.push(format!(
                "qemu-img info -f qcow2 {place}.img | grep -E 'backing|virtual'"
            ));
        }
    }
    verdicts
}

#[test]
fn random_jobs_leave_the_same_chains_on_both_daemons() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    for seed in 0..tools::seeds(18) {
        let mut dice = Dice::new(1000 + seed);
        let depth = depth(&mut dice, seed, 16, 8);
        let scratch = tempfile::tempdir().expect("a folder");
        let layers = make(scratch.path(), seed, depth, true);
        let job = job(&mut dice, &layers);
        let mut script = format!("# seed {seed}\n");
        for node in nodes(&layers, dice.one_in(2)) {
            writeln!(
                script,
                "{}",
                json!({"execute": "blockdev-add", "arguments": node})
            )
            .expect("a text");
        }
        let arguments = with(json!({"job-id": "j"}), job.arguments.clone());
        writeln!(
            script,
            "{}",
            json!({"execute": job.command, "arguments": arguments})
        )
        .expect("a text");
        script += "wait j null\n{\"execute\": \"x-debug-query-block-graph\"}\n";
        for place in (0..depth).rev() {
            let name = format!("n{place}");
            writeln!(
                script,
                "{}",
                json!({"execute": "blockdev-del", "arguments": {"node-name": name}})
            )
            .expect("a text");
        }
        for verdict in verdicts(&layers, &job) {
            writeln!(script, "$ {verdict}").expect("a text");
        }
        compare(&script, |folder| copy(scratch.path(), folder));
    }
}

/// Runs a command in a shell; it must succeed. The kernel may keep the image locks of a process for a moment after its end.
pub(crate) fn must(folder: &Path, command: &str, seed: u64) {
    let started = Instant::now();
    loop {
        let mut shell = Command::new("sh");
        let ended = shell.args(["-c", command]).current_dir(folder).output();
        let ended = ended.expect("it runs");
        let output = String::from_utf8_lossy(&ended.stdout);
        let errors = String::from_utf8_lossy(&ended.stderr);
        if ended.status.success() {
            return;
        }
        assert!(
            errors.contains("lock") && started.elapsed() < DEADLINE,
            "seed {seed}: {command}: {output}{errors}"
        );
    }
}

/// A command that checks an image after a crash. Lazy counts are repaired when it is opened the next time.
fn sound_but_leaks(image: &str) -> String {
    format!(
        "qemu-img check -q -f qcow2 {image}; code=$?; test $code -eq 0 -o $code -eq 3 \
         || {{ qemu-img info {image} | grep -q 'lazy refcounts: true'; }}"
    )
}

/// Opens everything and starts the job.
fn start(client: &mut Client, layers: &[Layer], job: &Job, more: Value) {
    for node in nodes(layers, false) {
        client.run("blockdev-add", node);
    }
    let arguments = with(with(json!({"job-id": "j"}), job.arguments.clone()), more);
    client.run(job.command, arguments);
}

/// Layers of any lengths, where the reference daemon shows what a short layer hides.
#[test]
fn what_short_layers_hide_stays_hidden() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    for seed in 0..tools::seeds(24) {
        let mut dice = Dice::new(2000 + seed);
        let depth = match seed {
            0 => 40,
            1..24 => 2 + dice.below(9) as usize,
            _ => 2 + dice.below(LAYERS_MAX - 1) as usize,
        };
        let daemon = Daemon::start();
        let layers = make(daemon.folder.path(), seed, depth, false);
        let job = job(&mut dice, &layers);
        let mut client = daemon.client();
        start(&mut client, &layers, &job, json!({"auto-dismiss": false}));
        client.wait_for("j", "concluded");
        let jobs = client.run("query-jobs", json!({}));
        assert_eq!(jobs[0].get("error"), None, "seed {seed}: {jobs}");
        let folder = daemon.kill();
        for verdict in verdicts(&layers, &job) {
            // Killed, so that leaks may be left.
            let verdict = match verdict.strip_prefix("qemu-img check") {
                Some(_) => sound_but_leaks(verdict.rsplit(' ').next().expect("a name")),
                None => verdict,
            };
            must(folder.path(), &verdict, seed);
        }
    }
}

/// Killed in the middle, and finished by the next daemon.
#[test]
fn a_killed_daemon_leaves_a_chain_that_reads_as_before() {
    if !tools::have("qemu-img", "qemu-utils") {
        return;
    }
    for seed in 0..tools::seeds(13) {
        let mut dice = Dice::new(3000 + seed);
        let depth = depth(&mut dice, seed, 12, 6);
        let mut daemon = Daemon::start();
        let layers = make(daemon.folder.path(), seed, depth, false);
        let job = job(&mut dice, &layers);
        let rounds = 1 + dice.below(3);
        for _ in 0..rounds {
            let mut client = daemon.client();
            // The job takes about a second, and is killed at some point of it.
            start(
                &mut client,
                &layers,
                &job,
                json!({"speed": 512 << 10, "auto-dismiss": false}),
            );
            let reach = dice.below(12) * STEP;
            loop {
                let jobs = client.run("query-jobs", json!({}));
                let done = jobs[0]["current-progress"].as_u64().expect("a number");
                if done >= reach || jobs[0]["status"] == "concluded" {
                    break;
                }
            }
            let folder = daemon.kill();
            let tops: Vec<usize> = job
                .same
                .iter()
                .copied()
                .filter(|place| *place + 1 == depth)
                .collect();
            for place in tops {
                let format = format_of(&layers, place);
                must(
                    folder.path(),
                    &format!("qemu-img compare -f {format} -F raw {place}.img {place}.before"),
                    seed,
                );
                must(
                    folder.path(),
                    &sound_but_leaks(&format!("{place}.img")),
                    seed,
                );
            }
            for left in ["qmp.sock", "pid"] {
                fs::remove_file(folder.path().join(left)).expect("left behind");
            }
            daemon = Daemon::start_in(folder, &[]);
        }
        // What was asked for may have been done before the kill; whatever the headers say is opened.
        let top = format!("{}.img", depth - 1);
        let mut client = daemon.client();
        client.run("blockdev-add", on("top", &top));
        client.run(
            "block-stream",
            json!({"job-id": "j", "device": "top", "auto-dismiss": false}),
        );
        client.wait_for("j", "concluded");
        let folder = daemon.kill();
        must(
            folder.path(),
            &format!(
                "qemu-img compare -f qcow2 -F raw {top} {}.before",
                depth - 1
            ),
            seed,
        );
        must(
            folder.path(),
            &format!("test -z \"$(qemu-img info -f qcow2 {top} | grep backing)\""),
            seed,
        );
    }
}
