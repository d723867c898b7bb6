//! The scenarios `incremental` and `sparse-incremental`: backups of what a persistent bitmap says has changed, onto an overlay of
//! the backup before. Fresh copies for each run, sides in turn; read through its chain the target has to equal the source, and the
//! bitmap has to be empty afterwards.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Failure;
use crate::case::EXT4;
use crate::client::Client;
use crate::daemon::Daemon;
use crate::data;
use crate::image::{CLUSTER_BYTES, Format, Image, Piece, runs_in_mixed_order};
use crate::job::{is_status, require_success};
use crate::load::Sequence;
use crate::options::{Contestant, JobKind, Options, Scenario, Side};
use crate::place::{Place, allocated_bytes};
use crate::process::{run as run_program, run_with_input};
use crate::report::{CopyResult, Run};

/// Length of the disk of `sparse-incremental` in bytes.
const SPARSE_BYTES: u64 = 800 << 30;

/// Clusters that have changed there, at equal distances.
const SPARSE_EXTENTS: u64 = 8695;

/// Between two looks at whether a job has copied something.
const LOOK_EVERY: Duration = Duration::from_micros(200);

/// Which clusters have changed since the last backup.
#[derive(Clone, Copy, Debug)]
enum Changed {
    /// A quarter of them, in no order: each of four neighbours with the same chance.
    Scattered,
    /// One after the other, a quarter of the disk.
    Together,
    /// Few of a large disk that holds nothing else.
    FarApart,
}

/// A disk, the backup before, and what has changed since.
struct Disk {
    scenario: Scenario,
    place: Place,
    changed: Changed,
    /// What the job reads: the image that has the bitmap, or a raw file with a bitmap that was merged from that.
    source: Format,
    size_bytes: u64,
    changed_bytes: u64,
}

/// Runs one scenario.
///
/// # Errors
/// The place cannot be made, a program or a daemon fails, or a target is not what it should be.
pub(crate) fn run(options: &Options, scenario: Scenario) -> Result<Vec<CopyResult>, Failure> {
    let disks = match scenario {
        Scenario::SparseIncremental => vec![
            (Changed::FarApart, Format::Qcow2),
            (Changed::FarApart, Format::Raw),
        ],
        _ => vec![
            (Changed::Scattered, Format::Qcow2),
            (Changed::Together, Format::Qcow2),
        ],
    };
    let measure =
        |(changed, source)| Disk::make(options, scenario, changed, source)?.measure(options);
    disks.into_iter().map(measure).collect()
}

/// What has changed, in whole clusters.
fn pieces(changed: Changed, size_bytes: u64) -> Vec<Piece> {
    let cluster = |index: u64| (index * CLUSTER_BYTES, CLUSTER_BYTES);
    let clusters = size_bytes / CLUSTER_BYTES;
    match changed {
        Changed::Scattered => {
            let mut order = Sequence::new(5);
            let one_of = |four: u64| cluster(4 * four + order.below(4) as u64);
            (0..clusters / 4).map(one_of).collect()
        }
        Changed::Together => (clusters / 2..clusters / 2 + clusters / 4)
            .map(cluster)
            .collect(),
        Changed::FarApart => (0..SPARSE_EXTENTS)
            .map(|index| cluster(clusters / SPARSE_EXTENTS * index))
            .collect(),
    }
}

impl Disk {
    fn make(
        options: &Options,
        scenario: Scenario,
        changed: Changed,
        source: Format,
    ) -> Result<Self, Failure> {
        let size_bytes = match changed {
            Changed::FarApart => SPARSE_BYTES,
            Changed::Scattered | Changed::Together => options.size_mib << 20,
        };
        let room_bytes = match changed {
            Changed::FarApart => 6 << 30,
            Changed::Scattered | Changed::Together => 5 * size_bytes + (1 << 30),
        };
        let pieces = pieces(changed, size_bytes);
        let disk = Self {
            scenario,
            place: Place::loop_over_tmpfs(&EXT4, room_bytes)?,
            changed,
            source,
            size_bytes,
            changed_bytes: pieces.len() as u64 * CLUSTER_BYTES,
        };
        let (before, master) = (disk.image("before"), disk.image("master"));
        match changed {
            Changed::FarApart => before.create(size_bytes, &[])?,
            Changed::Scattered | Changed::Together => {
                let raw = disk.raw("content");
                data::fill_with_noise(&raw.path, size_bytes, 1)?;
                before.create_in_order(size_bytes, &raw, &runs_in_mixed_order(size_bytes))?;
                fs::remove_file(&raw.path).map_err(|error| Failure::at(&raw.path, &error))?;
            }
        }
        run_program(Command::new("cp").arg(&before.path).arg(&master.path))?;
        let mut bitmap = Command::new("qemu-img");
        bitmap.args(["bitmap", "--add", "-f", "qcow2", "-g", "65536"]);
        run_program(bitmap.arg(&master.path).arg("changes"))?;
        let mut script = String::new();
        for (place, (offset, length)) in pieces.iter().enumerate() {
            // Writing to a string does not fail.
            let _ = writeln!(script, "write -q -P {} {offset} {length}", 1 + place % 254);
        }
        let mut write = Command::new("qemu-io");
        write.args(["-n", "-f", "qcow2"]).arg(&master.path);
        run_with_input(&mut write, &script)?;
        if source == Format::Raw {
            let mut convert = Command::new("qemu-img");
            convert.args(["convert", "-T", "none", "-f", "qcow2", "-O", "raw"]);
            run_program(convert.arg(&master.path).arg(&disk.raw("disk").path))?;
            disk.raw("disk").leave_page_cache()?;
        }
        before.leave_page_cache()?;
        Ok(disk)
    }

    fn image(&self, name: &str) -> Image {
        Image {
            path: self.place.path(&format!("{name}.qcow2")),
            format: Format::Qcow2,
        }
    }

    fn raw(&self, name: &str) -> Image {
        Image {
            path: self.place.path(&format!("{name}.img")),
            format: Format::Raw,
        }
    }

    fn what(&self) -> String {
        let changed = match self.changed {
            Changed::Scattered => "one of four neighbouring clusters has changed",
            Changed::Together => "a quarter of the disk in one piece has changed",
            Changed::FarApart => "800 GiB, 8695 clusters at equal distances have changed",
        };
        let source = self.source.name();
        format!("{source}, {changed} -> qcow2, overlay of the backup before")
    }

    fn measure(&self, options: &Options) -> Result<CopyResult, Failure> {
        let contestants = options.contestants().into_iter();
        let contestants = contestants.filter(|contestant| contestant.side != Side::Limit);
        let mut result = CopyResult {
            scenario: self.scenario,
            job: JobKind::Incremental,
            place: self.place.description().to_owned(),
            what: self.what(),
            bytes: self.changed_bytes,
            direct: true,
            runs: contestants
                .map(|contestant| (contestant, Vec::new()))
                .collect(),
        };
        for _ in 0..options.rounds {
            for (contestant, runs) in &mut result.runs {
                let run = self.run_once(options, contestant);
                let run = run.map_err(|error| error.about(&contestant.name()))?;
                eprintln!(
                    "  {} {}: {:.3} s, {:.2} CPU s, first byte after {:.4} s",
                    self.scenario.name(),
                    contestant.name(),
                    run.wall_seconds,
                    run.cpu_seconds,
                    run.first_byte_seconds.unwrap_or_default()
                );
                runs.push(run);
            }
        }
        Ok(result)
    }

    /// A fresh source with all its changes, and a fresh target.
    fn make_ready(&self) -> Result<(), Failure> {
        let (source, target) = (self.image("source"), self.image("target"));
        let mut copy = Command::new("cp");
        copy.arg("--sparse=always").arg(&self.image("master").path);
        run_program(copy.arg(&source.path))?;
        target.create(self.size_bytes, &[])?;
        let mut rebase = Command::new("qemu-img");
        rebase.args([
            "rebase",
            "-u",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            "before.qcow2",
        ]);
        run_program(rebase.arg(&target.path))?;
        source.leave_page_cache()?;
        target.leave_page_cache()?;
        run_program(Command::new("sync").arg("--file-system").arg(&target.path)).map(|_| ())
    }

    fn run_once(&self, options: &Options, contestant: &Contestant) -> Result<Run, Failure> {
        self.make_ready()?;
        let daemon = Daemon::start(options, contestant.side, 1)?;
        let mut client = daemon.client()?;
        let node =
            |image: &Image, name: &str, read_only| image.node(name, contestant, true, read_only);
        let opening = Instant::now();
        client.call("blockdev-add", node(&self.image("source"), "source", false))?;
        let open_seconds = opening.elapsed().as_secs_f64();
        let device = match self.source {
            Format::Qcow2 => "source",
            Format::Raw => {
                client.call("blockdev-add", node(&self.raw("disk"), "disk", false))?;
                let bitmap =
                    json!({"node": "disk", "name": "changes", "granularity": CLUSTER_BYTES});
                client.call("block-dirty-bitmap-add", bitmap)?;
                let merged = json!([{"node": "source", "name": "changes"}]);
                let merge = json!({"node": "disk", "target": "changes", "bitmaps": merged});
                client.call("block-dirty-bitmap-merge", merge)?;
                "disk"
            }
        };
        require_changed(&mut client, device, self.changed_bytes)?;
        client.call("blockdev-add", node(&self.image("before"), "before", true))?;
        let mut target = node(&self.image("target"), "target", false);
        target["backing"] = json!("before");
        client.call("blockdev-add", target)?;
        daemon.reset_peak()?;
        let (began, cpu) = (Instant::now(), daemon.cpu_seconds()?);
        let arguments = json!({"job-id": "copy", "device": device, "target": "target", "sync": "bitmap",
            "bitmap": "changes", "bitmap-mode": "on-success", "auto-dismiss": false});
        client.call("blockdev-backup", arguments)?;
        let first_byte = until_something_is_copied(&mut client, began)?;
        client.wait_for("concluded", |event| is_status(event, &["concluded"]))?;
        let (wall, cpu) = (began.elapsed(), daemon.cpu_seconds()? - cpu);
        let peak_bytes = daemon.peak_bytes()?;
        require_success(&mut client)?;
        require_changed(&mut client, device, 0)?;
        client.call("job-dismiss", json!({"id": "copy"}))?;
        for name in ["target", "before"] {
            client.call("blockdev-del", json!({"node-name": name}))?;
        }
        daemon.quit(client)?;
        let target = self.image("target");
        target.require_equal(&self.image("master"))?;
        target.require_sound()?;
        self.image("source").require_sound()?;
        Ok(Run {
            wall_seconds: wall.as_secs_f64(),
            cpu_seconds: cpu,
            peak_bytes,
            open_seconds,
            target_bytes: allocated_bytes(&target.path)?,
            first_byte_seconds: Some(first_byte.as_secs_f64()),
        })
    }
}

/// Fails unless the bitmap says that so many bytes have changed.
fn require_changed(client: &mut Client, node: &str, bytes: u64) -> Result<(), Failure> {
    let nodes = client.call("query-named-block-nodes", json!({"flat": true}))?;
    let nodes = nodes.as_array().map_or(&[][..], Vec::as_slice);
    let node = nodes.iter().find(|found| found["node-name"] == node);
    let count = node.map(|node| &node["dirty-bitmaps"][0]["count"]);
    match count.and_then(Value::as_u64) {
        Some(count) if count == bytes => Ok(()),
        count => Err(Failure::new(format!(
            "the bitmap counts {count:?} bytes instead of {bytes}"
        ))),
    }
}

/// Looks at the job until it says that it has copied something, or has ended.
fn until_something_is_copied(client: &mut Client, began: Instant) -> Result<Duration, Failure> {
    loop {
        let jobs = client.call("query-jobs", json!({}))?;
        let copied = jobs[0]["current-progress"].as_u64().unwrap_or_default();
        if copied > 0 || jobs[0]["status"] == "concluded" {
            return Ok(began.elapsed());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
