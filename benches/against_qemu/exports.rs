//! The scenarios that drive an export over NBD: fio's nbd engine and nbdcopy as clients of either daemon, on a UNIX socket.

use std::fmt::Write;
use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::Failure;
use crate::case::EXT4;
use crate::client::Client;
use crate::daemon::Daemon;
use crate::data;
use crate::fio;
use crate::image::{Format, Image, runs_in_mixed_order};
use crate::options::{Contestant, Options, Scenario, Side};
use crate::place::Place;
use crate::process::run as run_program;
use crate::report::{median_of, range_of, ratios};

/// What a client does.
#[derive(Clone, Copy, Debug)]
enum Load {
    /// fio: what, how much at a time, how many at once.
    Fio(&'static str, &'static str, u32),
    /// All of it, once, to nowhere.
    Copy,
}

const LOADS: [Load; 7] = [
    Load::Fio("randread", "4k", 1),
    Load::Fio("randwrite", "4k", 1),
    Load::Fio("randread", "4k", 32),
    Load::Fio("randwrite", "4k", 32),
    Load::Fio("read", "1M", 8),
    Load::Fio("write", "1M", 8),
    Load::Copy,
];

/// One run of one side.
#[derive(Clone, Copy, Debug)]
struct Run {
    bytes_per_second: f64,
    /// User and system time of the daemon.
    cpu_seconds_per_gib: f64,
}

/// All runs of one load.
pub(crate) struct ExportResult {
    scenario: Scenario,
    load: Load,
    place: String,
    runs: Vec<(Contestant, Vec<Run>)>,
}

/// Runs one scenario with every load.
///
/// # Errors
/// The place cannot be made, or a program fails.
pub(crate) fn run(options: &Options, scenario: Scenario) -> Result<Vec<ExportResult>, Failure> {
    let size_bytes = options.size_mib << 20;
    let place = Place::loop_over_tmpfs(&EXT4, 2 * size_bytes + (512 << 20))?;
    let raw = Image {
        path: place.path("disk.img"),
        format: Format::Raw,
    };
    data::fill_with_noise(&raw.path, size_bytes, 1)?;
    let image = match scenario {
        Scenario::ExportRaw => raw,
        _ => {
            let image = Image {
                path: place.path("disk.qcow2"),
                format: Format::Qcow2,
            };
            image.create_in_order(size_bytes, &raw, &runs_in_mixed_order(size_bytes))?;
            fs::remove_file(&raw.path).map_err(|error| Failure::at(&raw.path, &error))?;
            image
        }
    };
    LOADS
        .into_iter()
        .map(|load| measure(options, scenario, &place, &image, load))
        .collect()
}

fn measure(
    options: &Options,
    scenario: Scenario,
    place: &Place,
    image: &Image,
    load: Load,
) -> Result<ExportResult, Failure> {
    let contestants = options.contestants().into_iter();
    let contestants = contestants.filter(|contestant| contestant.side != Side::Limit);
    let mut result = ExportResult {
        scenario,
        load,
        place: place.description().to_owned(),
        runs: contestants
            .map(|contestant| (contestant, Vec::new()))
            .collect(),
    };
    for _ in 0..options.rounds {
        for (contestant, runs) in &mut result.runs {
            let name = format!("{} {}", contestant.name(), load.name());
            let run = drive(options, contestant, image, load);
            let run = run.map_err(|error| error.about(&name))?;
            eprintln!(
                "  {} {name}: {:.0} MiB/s",
                scenario.name(),
                run.bytes_per_second / f64::from(1 << 20)
            );
            runs.push(run);
        }
    }
    Ok(result)
}

/// One daemon, one client, one load.
fn drive(
    options: &Options,
    contestant: &Contestant,
    image: &Image,
    load: Load,
) -> Result<Run, Failure> {
    let daemon = Daemon::start(options, contestant.side, 1)?;
    let mut client = daemon.client()?;
    let uri = serve(&daemon, &mut client, contestant, image)?;
    let before = daemon.cpu_seconds()?;
    let (bytes, seconds) = match load {
        Load::Fio(what, length, depth) => {
            let figures = fio::run(options, &uri, (what, length, depth))?;
            (figures.bytes, figures.seconds)
        }
        Load::Copy => {
            let started = std::time::Instant::now();
            run_program(Command::new("nbdcopy").args([&uri, "null:"]))?;
            let bytes = (options.size_mib << 20) as f64;
            (bytes, started.elapsed().as_secs_f64())
        }
    };
    let cpu_seconds = daemon.cpu_seconds()? - before;
    daemon.quit(client)?;
    Ok(Run {
        bytes_per_second: bytes / seconds,
        cpu_seconds_per_gib: cpu_seconds / bytes * f64::from(1 << 30),
    })
}

/// Opens an image as node `disk` and exports it. Its URI.
///
/// # Errors
/// What the daemon says.
pub(crate) fn serve(
    daemon: &Daemon,
    client: &mut Client,
    contestant: &Contestant,
    image: &Image,
) -> Result<String, Failure> {
    client.call("blockdev-add", image.node("disk", contestant, true, false))?;
    let socket = daemon.socket().with_file_name("nbd");
    let address = json!({"type": "unix", "data": {"path": socket}});
    client.call("nbd-server-start", json!({"addr": address}))?;
    client.call(
        "block-export-add",
        json!({"type": "nbd", "id": "disk", "node-name": "disk", "writable": true}),
    )?;
    Ok(format!("nbd+unix:///disk?socket={}", socket.display()))
}

impl Load {
    fn name(self) -> String {
        match self {
            Load::Fio(what, length, depth) => format!("{what} {length}, {depth} at once"),
            Load::Copy => "nbdcopy".to_owned(),
        }
    }

    /// What one request is in bytes, where they are counted.
    fn request_bytes(self) -> Option<f64> {
        matches!(self, Load::Fio(_, "4k", _)).then_some(4096.0)
    }
}

impl ExportResult {
    /// What is compared: requests a second, or MiB a second.
    fn rate(&self, run: &Run) -> f64 {
        run.bytes_per_second / self.load.request_bytes().unwrap_or(f64::from(1 << 20))
    }

    fn unit(&self) -> &'static str {
        match self.load.request_bytes() {
            Some(_) => "IOPS",
            None => "MiB/s",
        }
    }

    /// The result as one JSON object.
    pub(crate) fn json(&self) -> Value {
        let sides = self.runs.iter().map(|(contestant, runs)| {
            json!({
                "side": contestant.name(),
                "median": median_of(runs, |run| self.rate(run)),
                "rates": runs.iter().map(|run| self.rate(run)).collect::<Vec<_>>(),
                "median-cpu-seconds-per-gib": median_of(runs, |run| run.cpu_seconds_per_gib),
            })
        });
        json!({
            "scenario": self.scenario.name(), "load": self.load.name(), "place": self.place,
            "unit": self.unit(), "sides": sides.collect::<Vec<Value>>(),
        })
    }

    /// The result as a table.
    pub(crate) fn table(&self) -> String {
        let mut text = format!(
            "\n{} {} ({}, direct I/O)\n{:<14} {:>9} {:>10}  {:>17}\n",
            self.scenario.name(),
            self.load.name(),
            self.place,
            "",
            self.unit(),
            "CPU s/GiB",
            "min-max"
        );
        for (contestant, runs) in &self.runs {
            let (least, most) = range_of(runs, |run| self.rate(run));
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "{:<14} {:>9.0} {:>10.2}  {least:>8.0}-{most:.0}",
                contestant.name(),
                median_of(runs, |run| self.rate(run)),
                median_of(runs, |run| run.cpu_seconds_per_gib),
            );
        }
        text + &ratios(
            &self.runs,
            self.unit(),
            |run| self.rate(run),
            |run| run.cpu_seconds_per_gib,
        )
    }
}
