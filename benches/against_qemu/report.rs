//! Medians, ratios, tables and JSON lines.

use serde_json::{Value, json};

use crate::options::{JobKind, Scenario, Side};

/// One run of one side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// From the command to the last status.
    pub(crate) wall_seconds: f64,
    /// User and system time of the process in between.
    pub(crate) cpu_seconds: f64,
    /// Most memory in use in between.
    pub(crate) peak_bytes: u64,
    /// Room the target took afterwards.
    pub(crate) target_bytes: u64,
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
    /// Length of the copied file.
    pub(crate) bytes: u64,
    /// Whether the page cache was bypassed.
    pub(crate) direct: bool,
    /// Runs by side.
    pub(crate) runs: Vec<(Side, Vec<Run>)>,
}

impl CopyResult {
    fn median(&self, side: Side, figure: impl Fn(&Run) -> f64) -> Option<f64> {
        let (_, runs) = self.runs.iter().find(|(found, _)| *found == side)?;
        median(runs.iter().map(figure).collect())
    }

    /// The result as one JSON object.
    pub(crate) fn json(&self) -> Value {
        let sides: Vec<Value> = self
            .runs
            .iter()
            .map(|(side, runs)| {
                let wall = self
                    .median(*side, |run| run.wall_seconds)
                    .unwrap_or_default();
                json!({
                    "side": side.name(),
                    "median-wall-seconds": wall,
                    "median-mib-per-second": self.bytes as f64 / wall / 1_048_576.0,
                    "median-cpu-seconds": self.median(*side, |run| run.cpu_seconds),
                    "peak-mib": peak_mib(runs),
                    "target-mib": target_mib(runs),
                    "wall-seconds": runs.iter().map(|run| run.wall_seconds).collect::<Vec<_>>(),
                    "cpu-seconds": runs.iter().map(|run| run.cpu_seconds).collect::<Vec<_>>(),
                })
            })
            .collect();
        json!({
            "scenario": self.scenario.name(), "job": self.job.name(), "place": self.place, "bytes": self.bytes,
            "direct": self.direct, "sides": sides,
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
            "\n{} {} ({size_mib} MiB, {}, {cache})\n{:<10} {:>9} {:>10} {:>9} {:>9} {:>9} {:>10}  {:>15}\n",
            self.scenario.name(),
            self.job.name(),
            self.place,
            "",
            "wall s",
            "MiB/s",
            "CPU s",
            "CPU s/GiB",
            "peak MiB",
            "target MiB",
            "wall min-max"
        );
        for (side, runs) in &self.runs {
            let wall = self
                .median(*side, |run| run.wall_seconds)
                .unwrap_or_default();
            let cpu = self
                .median(*side, |run| run.cpu_seconds)
                .unwrap_or_default();
            let least = runs
                .iter()
                .map(|run| run.wall_seconds)
                .fold(f64::INFINITY, f64::min);
            let most = runs.iter().map(|run| run.wall_seconds).fold(0.0, f64::max);
            text += &format!(
                "{:<10} {wall:>9.4} {:>10.0} {cpu:>9.2} {:>9.3} {:>9.1} {:>10.0}  {least:>7.4}-{most:.4}\n",
                side.name(),
                size_mib as f64 / wall,
                cpu / (self.bytes as f64 / f64::from(1u32 << 30)),
                peak_mib(runs),
                target_mib(runs),
            );
        }
        for base in [Side::Qemu, Side::Limit] {
            text += &self.ratios(base).unwrap_or_default();
        }
        text
    }

    fn ratios(&self, base: Side) -> Option<String> {
        let wall = |side| self.median(side, |run| run.wall_seconds);
        let cpu = |side| self.median(side, |run| run.cpu_seconds);
        let throughput = wall(base)? / wall(Side::Blockyard)?;
        let (ours, theirs) = (cpu(Side::Blockyard)?, cpu(base)?);
        let cpu = if theirs > 0.0 {
            format!("{:.2} x", ours / theirs)
        } else {
            "not measurable".to_owned()
        };
        Some(format!(
            "blockyard / {}: throughput {throughput:.2} x, CPU {cpu}\n",
            base.name()
        ))
    }
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
