//! The chain scenarios: commit, stream and active commit on fresh daemons and fresh copies of the same images, sides in turn;
//! what is seen through the top is compared with what it was.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use crate::Failure;
use crate::case::EXT4;
use crate::daemon::Daemon;
use crate::data;
use crate::image::{CLUSTER_BYTES, Format, Image, Piece, runs_in_mixed_order};
use crate::job::{is_status, require_success};
use crate::options::{Contestant, JobKind, Options, Scenario, Side};
use crate::place::{Place, allocated_bytes};
use crate::process::run as run_program;
use crate::report::{CopyResult, Run};

/// Length of the disks of `far` in bytes.
const FAR_BYTES: u64 = 256 << 20;

/// How long the far end takes for a request, in nanoseconds.
const LATENCIES_NS: [u64; 2] = [10_000_000, 1_000_000];

/// What lies below the overlays.
#[derive(Clone, Copy, Debug)]
enum Base {
    /// An image that is full of data.
    Full,
    /// A node that answers after so many nanoseconds, and keeps nothing.
    Far(u64),
}

/// A chain of base, mid and top, of which each run gets a copy.
struct Chain {
    scenario: Scenario,
    place: Place,
    base: Base,
    size_bytes: u64,
    /// Data in mid, which stands above half of a full base's.
    moved_bytes: u64,
    direct: bool,
}

/// Runs one scenario with every job on chains.
///
/// # Errors
/// The place cannot be made, a daemon fails, or a result differs from what was there.
pub(crate) fn run(options: &Options, scenario: Scenario) -> Result<Vec<CopyResult>, Failure> {
    let mut results = Vec::new();
    match scenario {
        Scenario::Far => {
            for latency_ns in LATENCIES_NS {
                let chain = Chain::make(options, scenario, Base::Far(latency_ns))?;
                for job in [JobKind::Commit, JobKind::Stream] {
                    results.push(chain.measure(options, job)?);
                }
            }
        }
        _ => {
            let chain = Chain::make(options, scenario, Base::Full)?;
            for job in [JobKind::Commit, JobKind::Stream, JobKind::ActiveCommit] {
                results.push(chain.measure(options, job)?);
            }
        }
    }
    Ok(results)
}

/// All clusters of an image, one after the other.
fn clusters(size_bytes: u64) -> Vec<Piece> {
    let clusters = size_bytes / CLUSTER_BYTES;
    (0..clusters)
        .map(|cluster| (cluster * CLUSTER_BYTES, CLUSTER_BYTES))
        .collect()
}

impl Chain {
    /// Makes the images that runs get copies of.
    fn make(options: &Options, scenario: Scenario, base: Base) -> Result<Self, Failure> {
        let size_bytes = match base {
            Base::Full => options.size_mib << 20,
            Base::Far(_) => FAR_BYTES,
        };
        let room_bytes = 5 * size_bytes + (1 << 30);
        let place = match scenario {
            Scenario::ChainDisk => Place::directory(&options.disk, "a directory on a real disk")?,
            _ => Place::loop_over_tmpfs(&EXT4, room_bytes)?,
        };
        let chain = Self {
            scenario,
            place,
            base,
            size_bytes,
            moved_bytes: match base {
                Base::Full => size_bytes / 2,
                Base::Far(_) => size_bytes,
            },
            direct: true,
        };
        let raw = Image {
            path: chain.place.path("content.img"),
            format: Format::Raw,
        };
        let (master_base, master_mid) = (chain.master("base"), chain.master("mid"));
        if let Base::Full = base {
            data::fill_with_noise(&raw.path, size_bytes, 1)?;
            let pieces = runs_in_mixed_order(size_bytes);
            master_base.create_in_order(size_bytes, &raw, &pieces)?;
            fs::remove_file(&raw.path).map_err(|error| Failure::at(&raw.path, &error))?;
        }
        master_mid.create(size_bytes, &[])?;
        // Every other piece, so that data of both lies side by side.
        let mut script = String::new();
        let mut left = chain.moved_bytes;
        let pieces = match scenario {
            Scenario::ChainRuns | Scenario::Far => runs_in_mixed_order(size_bytes),
            _ => clusters(size_bytes),
        };
        for (place, (offset, length)) in pieces.into_iter().enumerate() {
            if matches!(base, Base::Full) && place % 2 == 1 {
                continue;
            }
            let length = length.min(left);
            left -= length;
            if length > 0 {
                script += &format!("write -q -P {} {offset} {length}\n", 1 + place % 254);
            }
        }
        let mut write = Command::new("qemu-io");
        write.args(["-n", "-f", "qcow2"]).arg(&master_mid.path);
        crate::process::run_with_input(&mut write, &script)?;
        Ok(chain)
    }

    fn master(&self, name: &str) -> Image {
        Image {
            path: self.place.path(&format!("{name}.master.qcow2")),
            format: Format::Qcow2,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path(&format!("{name}.qcow2"))
    }

    fn measure(&self, options: &Options, job: JobKind) -> Result<CopyResult, Failure> {
        let mut result = CopyResult {
            scenario: self.scenario,
            job,
            place: self.place.description().to_owned(),
            what: self.what(job),
            // A stream of half a disk moves the other half.
            bytes: self.moved_bytes,
            direct: self.direct,
            runs: options
                .contestants()
                .into_iter()
                .filter(|contestant| contestant.side != Side::Limit)
                .map(|contestant| (contestant, Vec::new()))
                .collect(),
        };
        for _ in 0..options.rounds {
            for (contestant, runs) in &mut result.runs {
                let name = contestant.name();
                let run = self.run_once(options, contestant, job);
                let run = run.map_err(|error| error.about(&format!("{name} {}", job.name())))?;
                eprintln!(
                    "  {} {} {name}: {:.3} s, {:.2} CPU s",
                    self.scenario.name(),
                    job.name(),
                    run.wall_seconds,
                    run.cpu_seconds
                );
                runs.push(run);
            }
        }
        Ok(result)
    }

    fn what(&self, job: JobKind) -> String {
        let base = match self.base {
            Base::Full => match self.scenario {
                Scenario::ChainRuns => "base full of noise, every other run overwritten in mid",
                _ => "base full of noise, every other cluster overwritten in mid",
            }
            .to_owned(),
            Base::Far(latency_ns) => {
                format!("base is null-co, {} ms a request", latency_ns / 1_000_000)
            }
        };
        let moves = match job {
            JobKind::Commit => "mid -> base, below an empty top",
            JobKind::Stream if matches!(self.base, Base::Far(_)) => "base -> empty top",
            JobKind::Stream => "base -> mid",
            _ => "mid -> base, mid being the top",
        };
        format!("{base}; {moves}")
    }

    /// Fresh copies of the images, as each run needs them.
    fn make_ready(&self) -> Result<(), Failure> {
        let mut names = vec!["mid"];
        if let Base::Full = self.base {
            names.push("base");
        }
        for name in names {
            let path = self.path(name);
            run_program(
                Command::new("cp")
                    .arg("--sparse=always")
                    .arg(&self.master(name).path)
                    .arg(&path),
            )?;
            let image = Image {
                path,
                format: Format::Qcow2,
            };
            image.leave_page_cache()?;
        }
        let top = Image {
            path: self.path("top"),
            format: Format::Qcow2,
        };
        top.create(self.size_bytes, &[])?;
        self.say_backing("top", "mid.qcow2")?;
        if let Base::Full = self.base {
            self.say_backing("mid", "base.qcow2")?;
        }
        top.leave_page_cache()?;
        run_program(Command::new("sync").arg("--file-system").arg(&top.path)).map(|_| ())
    }

    fn say_backing(&self, name: &str, backing: &str) -> Result<(), Failure> {
        let mut command = Command::new("qemu-img");
        command.args(["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing]);
        run_program(command.arg(self.path(name))).map(|_| ())
    }

    fn run_once(
        &self,
        options: &Options,
        contestant: &Contestant,
        job: JobKind,
    ) -> Result<Run, Failure> {
        self.make_ready()?;
        let seen = match (self.base, job) {
            (Base::Full, JobKind::Commit) => Some("top"),
            (Base::Full, _) => Some("mid"),
            (Base::Far(_), _) => None,
        };
        let before = seen.map(|seen| self.sum(seen)).transpose()?;
        let daemon = Daemon::start(options, contestant.side, 1)?;
        let mut client = daemon.client()?;
        let node = |name: &str, backing: Value| {
            let image = Image {
                path: self.path(name),
                format: Format::Qcow2,
            };
            let mut node = image.node(name, contestant, self.direct, false);
            node["backing"] = backing;
            node
        };
        let opening = Instant::now();
        let base = match self.base {
            Base::Full => node("base", Value::Null),
            // QEMU streams nothing from one that does not read as zeroes; ours reads nothing from one that does.
            Base::Far(latency_ns) => json!({"driver": "null-co", "node-name": "base",
                "size": self.size_bytes, "latency-ns": latency_ns,
                "read-zeroes": contestant.side == Side::Qemu}),
        };
        client.call("blockdev-add", base)?;
        let is_far_stream = matches!((self.base, job), (Base::Far(_), JobKind::Stream));
        if !is_far_stream {
            client.call("blockdev-add", node("mid", json!("base")))?;
        }
        let open_seconds = opening.elapsed().as_secs_f64();
        if is_far_stream {
            client.call("blockdev-add", node("top", json!("base")))?;
        } else if job == JobKind::Commit {
            client.call("blockdev-add", node("top", json!("mid")))?;
        }
        daemon.reset_peak()?;
        let (began, cpu) = (Instant::now(), daemon.cpu_seconds()?);
        let mut arguments = json!({"job-id": "copy", "auto-dismiss": false});
        let command = match job {
            JobKind::Commit => {
                arguments["device"] = json!("top");
                arguments["top-node"] = json!("mid");
                arguments["base-node"] = json!("base");
                arguments["backing-file"] = json!("base.qcow2");
                "block-commit"
            }
            JobKind::Stream => {
                arguments["device"] = json!(if is_far_stream { "top" } else { "mid" });
                "block-stream"
            }
            _ => {
                arguments["device"] = json!("mid");
                "block-commit"
            }
        };
        client.call(command, arguments)?;
        if job == JobKind::ActiveCommit {
            let event =
                client.wait_for("ready", |event| is_status(event, &["ready", "concluded"]))?;
            if is_status(&event, &["ready"]) {
                client.call("job-complete", json!({"id": "copy"}))?;
            }
        }
        client.wait_for("concluded", |event| is_status(event, &["concluded"]))?;
        let (wall, cpu) = (began.elapsed(), daemon.cpu_seconds()? - cpu);
        let peak_bytes = daemon.peak_bytes()?;
        require_success(&mut client)?;
        // QEMU's keeps the nodes busy until then, and would lose what it has not flushed.
        client.call("job-dismiss", json!({"id": "copy"}))?;
        for name in ["top", "mid", "base"] {
            // Some are gone by now.
            let _ = client.call("blockdev-del", json!({"node-name": name}));
        }
        drop(client);
        drop(daemon);
        let written = match job {
            JobKind::Stream if is_far_stream => "top",
            JobKind::Stream => "mid",
            _ => "base",
        };
        if let (Some(seen), Some(before)) = (seen, before) {
            let seen = if job == JobKind::ActiveCommit {
                "base"
            } else {
                seen
            };
            if self.sum(seen)? != before {
                return Err(Failure::new(format!(
                    "{seen} reads differently than before"
                )));
            }
        }
        let image = Image {
            path: self.path(written),
            format: Format::Qcow2,
        };
        let target_bytes = match image.path.exists() {
            true => {
                image.require_sound()?;
                allocated_bytes(&image.path)?
            }
            false => 0,
        };
        Ok(Run {
            wall_seconds: wall.as_secs_f64(),
            cpu_seconds: cpu,
            peak_bytes,
            open_seconds,
            target_bytes,
            first_byte_seconds: None,
        })
    }

    /// A sum of all that is read through an image.
    fn sum(&self, name: &str) -> Result<String, Failure> {
        let script = format!(
            "qemu-img convert -f qcow2 -O raw -T none {}.qcow2 sum.img && cksum < sum.img; rm -f sum.img",
            name
        );
        let directory = self.path(name);
        let directory = directory.parent().unwrap_or(&directory);
        let ended = run_program(
            Command::new("sh")
                .arg("-c")
                .arg(script)
                .current_dir(directory),
        )?;
        Ok(ended.output)
    }
}
