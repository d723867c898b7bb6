//! The scenario `marking`: what it costs the writers of an export that a bitmap records what they change.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::Failure;
use crate::case::EXT4;
use crate::daemon::Daemon;
use crate::data;
use crate::exports::serve;
use crate::fio;
use crate::image::{Format, Image, runs_in_mixed_order};
use crate::options::{Contestant, Options, Side};
use crate::place::Place;
use crate::report::{median, median_of, range_of};

/// What the writer does.
const LOAD: (&str, &str, u32) = ("randwrite", "4k", 32);

/// What records it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bitmap {
    /// Nothing.
    None,
    /// One that is lost with the daemon.
    Recording,
    /// One that the image keeps.
    Persistent,
}

impl Bitmap {
    fn name(self) -> &'static str {
        match self {
            Bitmap::None => "no bitmap",
            Bitmap::Recording => "a bitmap",
            Bitmap::Persistent => "a persistent bitmap",
        }
    }
}

/// One run of one side.
#[derive(Clone, Copy, Debug)]
struct Run {
    writes_per_second: f64,
    /// User and system time of the daemon for each write, in microseconds.
    cpu_us: f64,
}

/// All runs on one format.
pub(crate) struct MarkingResult {
    format: Format,
    place: String,
    runs: Vec<(Contestant, Bitmap, Vec<Run>)>,
}

/// Runs the load with and without bitmaps on both formats.
///
/// # Errors
/// The place cannot be made, or a program fails.
pub(crate) fn run(options: &Options) -> Result<Vec<MarkingResult>, Failure> {
    let size_bytes = options.size_mib << 20;
    let place = Place::loop_over_tmpfs(&EXT4, 2 * size_bytes + (512 << 20))?;
    let image = |name: &str, format| Image {
        path: place.path(name),
        format,
    };
    let raw = image("disk.img", Format::Raw);
    let qcow2 = image("disk.qcow2", Format::Qcow2);
    data::fill_with_noise(&raw.path, size_bytes, 1)?;
    qcow2.create_in_order(size_bytes, &raw, &runs_in_mixed_order(size_bytes))?;
    let mut results = Vec::new();
    for image in [raw, qcow2] {
        let bitmaps = match image.format {
            Format::Raw => &[Bitmap::None, Bitmap::Recording][..],
            Format::Qcow2 => &[Bitmap::None, Bitmap::Recording, Bitmap::Persistent],
        };
        let contestants = options.contestants().into_iter();
        let contestants = contestants.filter(|contestant| contestant.side != Side::Limit);
        let mut result = MarkingResult {
            format: image.format,
            place: place.description().to_owned(),
            runs: contestants
                .flat_map(|contestant| {
                    let with = |bitmap: &Bitmap| (contestant.clone(), *bitmap, Vec::new());
                    bitmaps.iter().map(with).collect::<Vec<_>>()
                })
                .collect(),
        };
        for _ in 0..options.rounds {
            for (contestant, bitmap, runs) in &mut result.runs {
                let name = format!("{} {}", contestant.name(), bitmap.name());
                let run = drive(options, contestant, &image, *bitmap);
                let run = run.map_err(|error| error.about(&name))?;
                eprintln!(
                    "  marking {} {name}: {:.0} writes/s, {:.2} us of CPU",
                    image.format.name(),
                    run.writes_per_second,
                    run.cpu_us
                );
                runs.push(run);
            }
        }
        results.push(result);
    }
    Ok(results)
}

/// One daemon, one writer.
fn drive(
    options: &Options,
    contestant: &Contestant,
    image: &Image,
    bitmap: Bitmap,
) -> Result<Run, Failure> {
    let daemon = Daemon::start(options, contestant.side, 1)?;
    let mut client = daemon.client()?;
    let uri = serve(&daemon, &mut client, contestant, image)?;
    if bitmap != Bitmap::None {
        let persistent = bitmap == Bitmap::Persistent;
        let add = json!({"node": "disk", "name": "changes", "persistent": persistent});
        client.call("block-dirty-bitmap-add", add)?;
    }
    let before = daemon.cpu_seconds()?;
    let figures = fio::run(options, &uri, LOAD)?;
    let cpu_seconds = daemon.cpu_seconds()? - before;
    if bitmap != Bitmap::None {
        // The next run begins without.
        let remove = json!({"node": "disk", "name": "changes"});
        client.call("block-dirty-bitmap-remove", remove)?;
    }
    daemon.quit(client)?;
    let writes = figures.bytes / 4096.0;
    Ok(Run {
        writes_per_second: writes / figures.seconds,
        cpu_us: cpu_seconds / writes * 1e6,
    })
}

impl MarkingResult {
    /// Runs without a bitmap of the same side.
    fn plain(&self, contestant: &Contestant) -> &[Run] {
        let plain = |(other, bitmap, _): &&(Contestant, Bitmap, Vec<Run>)| {
            other == contestant && *bitmap == Bitmap::None
        };
        self.runs
            .iter()
            .find(plain)
            .map_or(&[], |(_, _, runs)| runs)
    }

    /// How many writes fewer there were than in the run of the same round without a bitmap, in percent: the median of rounds.
    fn cost_percent(&self, contestant: &Contestant, runs: &[Run]) -> f64 {
        let pairs = runs.iter().zip(self.plain(contestant));
        let cost = |(with, without): (&Run, &Run)| {
            100.0 * (1.0 - with.writes_per_second / without.writes_per_second)
        };
        median(pairs.map(cost).collect()).unwrap_or_default()
    }

    /// The result as one JSON object.
    pub(crate) fn json(&self) -> Value {
        let sides = self.runs.iter().map(|(contestant, bitmap, runs)| {
            json!({
                "side": contestant.name(),
                "bitmap": bitmap.name(),
                "median-writes-per-second": median_of(runs, |run| run.writes_per_second),
                "writes-per-second": runs.iter().map(|run| run.writes_per_second).collect::<Vec<_>>(),
                "median-cpu-us": median_of(runs, |run| run.cpu_us),
                "median-cost-percent": self.cost_percent(contestant, runs),
            })
        });
        json!({
            "scenario": "marking", "format": self.format.name(), "place": self.place,
            "sides": sides.collect::<Vec<Value>>(),
        })
    }

    /// The result as a table.
    pub(crate) fn table(&self) -> String {
        let mut text = format!(
            "\nmarking {} ({}, direct I/O)\n{:<32} {:>9} {:>9} {:>8}  {:>17}\n",
            self.format.name(),
            self.place,
            "",
            "writes/s",
            "CPU us",
            "cost %",
            "min-max"
        );
        for (contestant, bitmap, runs) in &self.runs {
            let (least, most) = range_of(runs, |run| run.writes_per_second);
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "{:<32} {:>9.0} {:>9.2} {:>8.1}  {least:>8.0}-{most:.0}",
                format!("{}, {}", contestant.name(), bitmap.name()),
                median_of(runs, |run| run.writes_per_second),
                median_of(runs, |run| run.cpu_us),
                self.cost_percent(contestant, runs),
            );
        }
        text
    }
}
