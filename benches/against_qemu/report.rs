//! Medians, ratios, tables and JSON lines.

use serde_json::{Value, json};

use crate::options::{Contestant, JobKind, Scenario, Side};

/// One run of one side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// From the command to the last status.
    pub(crate) wall_seconds: f64,
    /// User and system time of the process in between.
    pub(crate) cpu_seconds: f64,
    /// Most memory in use in between.
    pub(crate) peak_bytes: u64,
    /// From the command that opens the source to its reply.
    pub(crate) open_seconds: f64,
    /// Room the target took afterwards.
    pub(crate) target_bytes: u64,
    /// From the command until the job said that it had copied something, where that was looked at.
    pub(crate) first_byte_seconds: Option<f64>,
}

/// All runs of one job in one scenario.
#[derive(Debug)]
pub(crate) struct CopyResult {
    /// Which set-up.
    pub(crate) scenario: Scenario,
    /// Which job.
    pub(crate) job: JobKind,
    /// Where the files lay.
    pub(crate) place: String,
    /// What was copied to what.
    pub(crate) what: String,
    /// How much.
    pub(crate) bytes: u64,
    /// Whether the page cache was bypassed.
    pub(crate) direct: bool,
    /// Runs by who took part.
    pub(crate) runs: Vec<(Contestant, Vec<Run>)>,
}

impl CopyResult {
    /// The result as one JSON object.
    pub(crate) fn json(&self) -> Value {
        let sides: Vec<Value> = self
            .runs
            .iter()
            .map(|(contestant, runs)| {
                let wall = median_of(runs, |run| run.wall_seconds);
                json!({
                    "side": contestant.name(),
                    "median-wall-seconds": wall,
                    "median-mib-per-second": self.bytes as f64 / wall / 1_048_576.0,
                    "median-cpu-seconds": median_of(runs, |run| run.cpu_seconds),
                    "median-open-seconds": median_of(runs, |run| run.open_seconds),
                    "median-first-byte-seconds": first_byte_seconds(runs),
                    "peak-mib": peak_mib(runs),
                    "target-mib": target_mib(runs),
                    "wall-seconds": runs.iter().map(|run| run.wall_seconds).collect::<Vec<_>>(),
                    "cpu-seconds": runs.iter().map(|run| run.cpu_seconds).collect::<Vec<_>>(),
                })
            })
            .collect();
        json!({
            "scenario": self.scenario.name(), "job": self.job.name(), "place": self.place, "what": self.what,
            "bytes": self.bytes, "direct": self.direct, "sides": sides,
        })
    }

    /// The result as a table.
    pub(crate) fn table(&self) -> String {
        let cache = if self.direct {
            "direct I/O"
        } else {
            "page cache"
        };
        let size_mib = self.bytes >> 20;
        let mut text = format!(
            "\n{} {} ({size_mib} MiB, {}, {cache})\n  {}\n{:<14} {:>9} {:>10} {:>9} {:>9} {:>9} {:>8} {:>10}  {:>15}\n",
            self.scenario.name(),
            self.job.name(),
            self.place,
            self.what,
            "",
            "wall s",
            "MiB/s",
            "CPU s",
            "CPU s/GiB",
            "peak MiB",
            "open ms",
            "target MiB",
            "wall min-max"
        );
        for (contestant, runs) in &self.runs {
            let wall = median_of(runs, |run| run.wall_seconds);
            let cpu = median_of(runs, |run| run.cpu_seconds);
            let (least, most) = range_of(runs, |run| run.wall_seconds);
            text += &format!(
                "{:<14} {wall:>9.4} {:>10.0} {cpu:>9.2} {:>9.3} {:>9.1} {:>8.2} {:>10.0}  {least:>7.4}-{most:.4}\n",
                contestant.name(),
                size_mib as f64 / wall,
                cpu / (self.bytes as f64 / f64::from(1u32 << 30)),
                peak_mib(runs),
                median_of(runs, |run| run.open_seconds) * 1e3,
                target_mib(runs),
            );
        }
        for (contestant, runs) in &self.runs {
            if let Some(seconds) = first_byte_seconds(runs) {
                text += &format!("{}: first byte after {seconds:.4} s\n", contestant.name());
            }
        }
        text + &ratios(
            &self.runs,
            "throughput",
            |run| 1.0 / run.wall_seconds,
            |run| run.cpu_seconds,
        )
    }
}

/// One line for each that blockyard is held against: how many times as fast it is, and how much CPU it takes.
pub(crate) fn ratios<T>(
    runs: &[(Contestant, Vec<T>)],
    speed_name: &str,
    speed: impl Fn(&T) -> f64,
    cpu: impl Fn(&T) -> f64,
) -> String {
    let is_ours = |contestant: &Contestant| contestant.side == Side::Blockyard;
    let Some((_, ours)) = runs.iter().find(|(contestant, _)| is_ours(contestant)) else {
        return String::new();
    };
    let line = |(contestant, theirs): &(Contestant, Vec<T>)| {
        let faster = median_of(ours, &speed) / median_of(theirs, &speed);
        let cpu = match median_of(theirs, &cpu) {
            theirs if theirs > 0.0 => format!("{:.2} x", median_of(ours, &cpu) / theirs),
            _ => "not measurable".to_owned(),
        };
        let name = contestant.name();
        format!("blockyard / {name}: {speed_name} {faster:.2} x, CPU {cpu}\n")
    };
    runs.iter()
        .filter(|(contestant, _)| !is_ours(contestant))
        .map(line)
        .collect()
}

/// The median of a figure of several runs; 0 of none.
pub(crate) fn median_of<T>(runs: &[T], figure: impl Fn(&T) -> f64) -> f64 {
    median(runs.iter().map(figure).collect()).unwrap_or_default()
}

/// The least and the most of a figure of several runs.
pub(crate) fn range_of<T>(runs: &[T], figure: impl Fn(&T) -> f64) -> (f64, f64) {
    let figures = || runs.iter().map(&figure);
    (
        figures().fold(f64::INFINITY, f64::min),
        figures().fold(0.0, f64::max),
    )
}

fn first_byte_seconds(runs: &[Run]) -> Option<f64> {
    median(
        runs.iter()
            .filter_map(|run| run.first_byte_seconds)
            .collect(),
    )
}

fn target_mib(runs: &[Run]) -> f64 {
    runs.iter()
        .map(|run| run.target_bytes)
        .max()
        .unwrap_or_default() as f64
        / 1_048_576.0
}

fn peak_mib(runs: &[Run]) -> f64 {
    runs.iter()
        .map(|run| run.peak_bytes)
        .max()
        .unwrap_or_default() as f64
        / 1_048_576.0
}

/// The middle value; of an even number, the mean of the two in the middle.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        length if length % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// The value below which this share of all lies.
pub(crate) fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let place = (values.len() as f64 * share).ceil().max(1.0) as usize - 1;
    values.get(place).copied().unwrap_or_default()
}

/// Figures of one QMP scenario on one side.
#[derive(Debug)]
pub(crate) struct ControlResult {
    /// Which set-up.
    pub(crate) scenario: Scenario,
    /// Who.
    pub(crate) side: Side,
    /// Name, value and unit of what was measured.
    pub(crate) figures: Vec<(&'static str, f64, &'static str)>,
    /// What a reader must know besides.
    pub(crate) note: String,
}

impl ControlResult {
    /// The result as one JSON object.
    pub(crate) fn json(&self) -> Value {
        let figures: serde_json::Map<String, Value> = self
            .figures
            .iter()
            .map(|(name, value, unit)| (format!("{name} ({unit})"), json!(value)))
            .collect();
        json!({"scenario": self.scenario.name(), "side": self.side.name(), "figures": figures, "note": self.note})
    }

    /// The result as lines.
    pub(crate) fn table(&self) -> String {
        let mut text = format!("\n{} {}\n", self.scenario.name(), self.side.name());
        for (name, value, unit) in &self.figures {
            text += &format!("  {name:<40} {value:>12.2} {unit}\n");
        }
        if !self.note.is_empty() {
            text += &format!("  ({})\n", self.note);
        }
        text
    }
}
