//! The scenario `marking`: what it costs the writers of an export that a bitmap records what they change.
//!
//! A machine's speed changes by more within a minute than what is looked for here. So each cost comes from one daemon whose
//! writer runs without the bitmap, with it, with it and without it, right after another; and it is told how far such costs lie
//! apart.

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
use crate::report::median_of;

/// What the writer does.
const LOAD: (&str, &str, u32) = ("randwrite", "4k", 32);

/// What records it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bitmap {
    /// One that is lost with the daemon.
    Recording,
    /// The same with granules of 4 KiB: nearly each write marks one that was clean.
    Fine,
    /// One that the image keeps.
    Persistent,
    /// The same, and it lives on when the daemon is killed: with a state directory, on a disk.
    CrashSafe,
}

impl Bitmap {
    fn name(self) -> &'static str {
        match self {
            Bitmap::Recording => "a bitmap",
            Bitmap::Fine => "granules of 4 KiB",
            Bitmap::Persistent => "persistent",
            Bitmap::CrashSafe => "with a state directory",
        }
    }

    fn is_kept(self) -> bool {
        matches!(self, Bitmap::Persistent | Bitmap::CrashSafe)
    }

    /// Whether this side has it, and this format.
    fn exists(self, side: Side, format: Format) -> bool {
        let can_keep = format == Format::Qcow2;
        let can_survive = side == Side::Blockyard;
        match self {
            Bitmap::Recording | Bitmap::Fine => true,
            Bitmap::Persistent => can_keep,
            Bitmap::CrashSafe => can_keep && can_survive,
        }
    }

    const ALL: [Bitmap; 4] = [
        Bitmap::Recording,
        Bitmap::Fine,
        Bitmap::Persistent,
        Bitmap::CrashSafe,
    ];
}

/// One run of the writer.
#[derive(Clone, Copy, Debug)]
struct Run {
    writes_per_second: f64,
    /// User and system time of the daemon for each write, in microseconds.
    cpu_us: f64,
}

/// Two runs without the bitmap, and between them two with it; each the mean of the two.
#[derive(Clone, Copy, Debug)]
struct Compared {
    without: Run,
    with: Run,
}

impl Compared {
    /// How many writes fewer there were with the bitmap, in percent.
    fn cost_percent(&self) -> f64 {
        100.0 * (1.0 - self.with.writes_per_second / self.without.writes_per_second)
    }

    /// How much more CPU time each of them took, in percent.
    fn cpu_percent(&self) -> f64 {
        100.0 * (self.with.cpu_us / self.without.cpu_us - 1.0)
    }
}

/// All runs on one format.
pub(crate) struct MarkingResult {
    format: Format,
    place: String,
    cells: Vec<(Contestant, Bitmap, Vec<Compared>)>,
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
        let contestants = options.contestants().into_iter();
        let contestants = contestants.filter(|contestant| contestant.side != Side::Limit);
        let cells = contestants.flat_map(|contestant| {
            let exists = |bitmap: &Bitmap| bitmap.exists(contestant.side, image.format);
            let existing = Bitmap::ALL.into_iter().filter(exists);
            let cell = |bitmap| (contestant.clone(), bitmap, Vec::new());
            existing.map(cell).collect::<Vec<_>>()
        });
        let mut result = MarkingResult {
            format: image.format,
            place: place.description().to_owned(),
            cells: cells.collect(),
        };
        for _ in 0..options.rounds {
            for (contestant, bitmap, all) in &mut result.cells {
                let name = format!("{}, {}", contestant.name(), bitmap.name());
                let compared = compare(options, contestant, &image, *bitmap);
                let compared = compared.map_err(|error| error.about(&name))?;
                eprintln!(
                    "  marking {} {name}: {:.0} writes/s without, {:.0} with",
                    image.format.name(),
                    compared.without.writes_per_second,
                    compared.with.writes_per_second
                );
                all.push(compared);
            }
        }
        results.push(result);
    }
    Ok(results)
}

/// One daemon, one writer after the other.
fn compare(
    options: &Options,
    contestant: &Contestant,
    image: &Image,
    bitmap: Bitmap,
) -> Result<Compared, Failure> {
    let state = Place::directory(&options.disk, "the state directory")?;
    let state = state.path("state");
    let more = ["--state-dir".as_ref(), state.as_os_str()];
    let more = match bitmap {
        Bitmap::CrashSafe => &more[..],
        _ => &[],
    };
    let daemon = Daemon::start_with(options, contestant.side, 1, more)?;
    let mut client = daemon.client()?;
    let uri = serve(&daemon, &mut client, contestant, image)?;
    let drive = || -> Result<Run, Failure> {
        let before = daemon.cpu_seconds()?;
        let figures = fio::run(options, &uri, LOAD)?;
        let cpu_seconds = daemon.cpu_seconds()? - before;
        let writes = figures.bytes / 4096.0;
        Ok(Run {
            writes_per_second: writes / figures.seconds,
            cpu_us: cpu_seconds / writes * 1e6,
        })
    };
    // Nobody is measured while everything is new.
    drive()?;
    let first = drive()?;
    let mut add = json!({"node": "disk", "name": "changes", "persistent": bitmap.is_kept()});
    if bitmap == Bitmap::Fine {
        add["granularity"] = json!(4096);
    }
    let mut with = || -> Result<Run, Failure> {
        client.call("block-dirty-bitmap-add", add.clone())?;
        let run = drive()?;
        let remove = json!({"node": "disk", "name": "changes"});
        client.call("block-dirty-bitmap-remove", remove)?;
        Ok(run)
    };
    let with = mean(with()?, with()?);
    let without = mean(first, drive()?);
    daemon.quit(client)?;
    Ok(Compared { without, with })
}

fn mean(one: Run, other: Run) -> Run {
    Run {
        writes_per_second: f64::midpoint(one.writes_per_second, other.writes_per_second),
        cpu_us: f64::midpoint(one.cpu_us, other.cpu_us),
    }
}

/// Mean of what rounds came to, and how far that is to be trusted: the standard error, of one round not known.
fn mean_and_error(all: &[Compared], figure: impl Fn(&Compared) -> f64) -> (f64, f64) {
    let count = all.len() as f64;
    let mean = all.iter().map(&figure).sum::<f64>() / count;
    let squares: f64 = all.iter().map(|one| (figure(one) - mean).powi(2)).sum();
    (mean, (squares / (count - 1.0) / count).sqrt())
}

impl MarkingResult {
    /// The result as one JSON object.
    pub(crate) fn json(&self) -> Value {
        let sides = self.cells.iter().map(|(contestant, bitmap, all)| {
            let (cost, error) = mean_and_error(all, Compared::cost_percent);
            let (cpu_cost, cpu_error) = mean_and_error(all, Compared::cpu_percent);
            json!({
                "side": contestant.name(),
                "bitmap": bitmap.name(),
                "median-writes-per-second-without": median_of(all, |one| one.without.writes_per_second),
                "median-writes-per-second-with": median_of(all, |one| one.with.writes_per_second),
                "median-cpu-us-without": median_of(all, |one| one.without.cpu_us),
                "median-cpu-us-with": median_of(all, |one| one.with.cpu_us),
                "costs-percent": all.iter().map(Compared::cost_percent).collect::<Vec<_>>(),
                "mean-cost-percent": cost,
                "standard-error-percent": error,
                "mean-cpu-cost-percent": cpu_cost,
                "cpu-standard-error-percent": cpu_error,
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
            "\nmarking {} ({}, direct I/O)\n{:<36} {:>10} {:>10} {:>16} {:>8} {:>8} {:>16}\n",
            self.format.name(),
            self.place,
            "",
            "writes/s",
            "with it",
            "cost %",
            "CPU us",
            "with it",
            "more %"
        );
        for (contestant, bitmap, all) in &self.cells {
            let (cost, error) = mean_and_error(all, Compared::cost_percent);
            let (cpu_cost, cpu_error) = mean_and_error(all, Compared::cpu_percent);
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "{:<36} {:>10.0} {:>10.0} {:>16} {:>8.2} {:>8.2} {:>16}",
                format!("{}, {}", contestant.name(), bitmap.name()),
                median_of(all, |one| one.without.writes_per_second),
                median_of(all, |one| one.with.writes_per_second),
                format!("{cost:.2} +- {error:.2}"),
                median_of(all, |one| one.without.cpu_us),
                median_of(all, |one| one.with.cpu_us),
                format!("{cpu_cost:.2} +- {cpu_error:.2}"),
            );
        }
        text
    }
}
