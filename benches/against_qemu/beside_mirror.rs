//! The scenario `beside-mirror`: how long a client of an export waits for its writes while the disk is mirrored without limit,
//! one mirror after the other.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::Failure;
use crate::case::EXT4;
use crate::client::Client;
use crate::daemon::Daemon;
use crate::data;
use crate::exports::serve;
use crate::fio::{self, Figures};
use crate::image::{Format, Image, runs_in_mixed_order};
use crate::job::{is_status, require_success};
use crate::options::{Contestant, Options, Side};
use crate::place::Place;
use crate::report::{median_of, range_of};

/// What the writer does.
const LOADS: [(&str, &str, u32); 2] = [("randwrite", "4k", 1), ("randwrite", "4k", 16)];

/// One run of one side.
#[derive(Clone, Copy, Debug)]
struct Run {
    writer: Figures,
    /// Mirrors that came to their end meanwhile, and the last one, which did afterwards.
    mirrors: u32,
}

/// All runs of one load on one format.
pub(crate) struct BesideMirrorResult {
    format: Format,
    load: (&'static str, &'static str, u32),
    place: String,
    runs: Vec<(Contestant, Vec<Run>)>,
}

/// Runs every load on both formats.
///
/// # Errors
/// The place cannot be made, a program fails, or a job does.
pub(crate) fn run(options: &Options) -> Result<Vec<BesideMirrorResult>, Failure> {
    let size_bytes = options.size_mib << 20;
    let place = Place::loop_over_tmpfs(&EXT4, 3 * size_bytes + (512 << 20))?;
    let image = |name: &str, format| Image {
        path: place.path(name),
        format,
    };
    let raw = image("disk.img", Format::Raw);
    let qcow2 = image("disk.qcow2", Format::Qcow2);
    let target = image("target.img", Format::Raw);
    data::fill_with_noise(&raw.path, size_bytes, 1)?;
    data::fill_with_noise(&target.path, size_bytes, 2)?;
    qcow2.create_in_order(size_bytes, &raw, &runs_in_mixed_order(size_bytes))?;
    let mut results = Vec::new();
    for source in [raw, qcow2] {
        for load in LOADS {
            let contestants = options.contestants().into_iter();
            let contestants = contestants.filter(|contestant| contestant.side != Side::Limit);
            let mut result = BesideMirrorResult {
                format: source.format,
                load,
                place: place.description().to_owned(),
                runs: contestants
                    .map(|contestant| (contestant, Vec::new()))
                    .collect(),
            };
            for _ in 0..options.rounds {
                for (contestant, runs) in &mut result.runs {
                    let run = drive(options, contestant, (&source, &target), load);
                    let run = run.map_err(|error| error.about(&contestant.name()))?;
                    eprintln!(
                        "  beside-mirror {} {}: p99 {:.0} us, {} mirrors",
                        contestant.name(),
                        source.format.name(),
                        run.writer.p99_us,
                        run.mirrors
                    );
                    runs.push(run);
                }
            }
            results.push(result);
        }
    }
    Ok(results)
}

/// One daemon, one writer, mirrors until it ends.
fn drive(
    options: &Options,
    contestant: &Contestant,
    (source, target): (&Image, &Image),
    load: (&'static str, &'static str, u32),
) -> Result<Run, Failure> {
    let daemon = Daemon::start(options, contestant.side, 1)?;
    let mut client = daemon.client()?;
    let uri = serve(&daemon, &mut client, contestant, source)?;
    client.call(
        "blockdev-add",
        target.node("target", contestant, true, false),
    )?;
    let run = std::thread::scope(|scope| {
        let writer = scope.spawn(|| fio::run(options, &uri, load));
        let mut mirrors = 0;
        while !writer.is_finished() {
            mirror_once(&mut client)?;
            mirrors += 1;
        }
        let writer = writer.join();
        let writer = writer.map_err(|_| Failure::new("the writer's thread has panicked"))??;
        Ok::<_, Failure>(Run { writer, mirrors })
    })?;
    daemon.quit(client)?;
    Ok(run)
}

/// Mirrors the disk until both sides are equal, and lets go of it.
fn mirror_once(client: &mut Client) -> Result<(), Failure> {
    let arguments = json!({"job-id": "copy", "device": "disk", "target": "target", "sync": "full",
        "auto-dismiss": false});
    client.call("blockdev-mirror", arguments)?;
    let event = client.wait_for("ready", |event| is_status(event, &["ready", "concluded"]))?;
    if is_status(&event, &["ready"]) {
        client.call("block-job-cancel", json!({"device": "copy"}))?;
        client.wait_for("concluded", |event| is_status(event, &["concluded"]))?;
    }
    require_success(client)?;
    client
        .call("job-dismiss", json!({"id": "copy"}))
        .map(|_| ())
}

impl BesideMirrorResult {
    fn about(&self) -> String {
        let (what, length, depth) = self.load;
        format!(
            "{what} {length}, {depth} at once, on {}",
            self.format.name()
        )
    }

    /// The result as one JSON object.
    pub(crate) fn json(&self) -> Value {
        let sides = self.runs.iter().map(|(contestant, runs)| {
            json!({
                "side": contestant.name(),
                "median-p99-us": median_of(runs, |run| run.writer.p99_us),
                "p99-us": runs.iter().map(|run| run.writer.p99_us).collect::<Vec<_>>(),
                "median-p50-us": median_of(runs, |run| run.writer.median_us),
                "median-bytes-per-second": median_of(runs, |run| run.writer.bytes / run.writer.seconds),
                "mirrors": median_of(runs, |run| f64::from(run.mirrors)),
            })
        });
        json!({
            "scenario": "beside-mirror", "load": self.about(), "place": self.place,
            "sides": sides.collect::<Vec<Value>>(),
        })
    }

    /// The result as a table.
    pub(crate) fn table(&self) -> String {
        let mut text = format!(
            "\nbeside-mirror {} ({}, direct I/O)\n{:<14} {:>9} {:>9} {:>9} {:>8}  {:>17}\n",
            self.about(),
            self.place,
            "",
            "p50 us",
            "p99 us",
            "MiB/s",
            "mirrors",
            "p99 min-max"
        );
        for (contestant, runs) in &self.runs {
            let (least, most) = range_of(runs, |run| run.writer.p99_us);
            let rate = |run: &Run| run.writer.bytes / run.writer.seconds / f64::from(1 << 20);
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "{:<14} {:>9.0} {:>9.0} {:>9.1} {:>8.0}  {least:>8.0}-{most:.0}",
                contestant.name(),
                median_of(runs, |run| run.writer.median_us),
                median_of(runs, |run| run.writer.p99_us),
                median_of(runs, rate),
                median_of(runs, |run| f64::from(run.mirrors)),
            );
        }
        text
    }
}
