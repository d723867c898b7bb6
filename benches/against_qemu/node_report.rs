//! Requests a second and CPU a request of the scenarios that drive a node.

use serde_json::{Value, json};

use crate::options::{Contestant, Scenario};
use crate::report::{median_of, range_of, ratios};

/// Length of a request.
pub(crate) const REQUEST_BYTES: u64 = 4096;

/// Requests in flight.
pub(crate) const DEPTH: u32 = 32;

/// What the requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Read data.
    Read,
    /// Write where data is.
    Write,
    /// Write to an empty image: the first request to each cluster allocates it.
    WriteNew,
}

impl Access {
    /// The name as the tables show it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Access::Read => "read",
            Access::Write => "write in place",
            Access::WriteNew => "write to an empty image",
        }
    }
}

/// One run of one side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NodeRun {
    /// From the first request to the last answer.
    pub(crate) wall_seconds: f64,
    /// User and system time of the whole process, opening and closing included.
    pub(crate) cpu_seconds: f64,
}

/// All runs of one access.
pub(crate) struct NodeResult {
    /// Which set-up.
    pub(crate) scenario: Scenario,
    /// What was asked.
    pub(crate) access: Access,
    /// Where the image lay.
    pub(crate) place: String,
    /// How often.
    pub(crate) requests: u64,
    /// From the beginning of a request to that of the next.
    pub(crate) step_bytes: u64,
    /// Runs by who took part.
    pub(crate) runs: Vec<(Contestant, Vec<NodeRun>)>,
}

impl NodeResult {
    fn iops(&self, run: &NodeRun) -> f64 {
        self.requests as f64 / run.wall_seconds
    }

    fn cpu_microseconds(&self, run: &NodeRun) -> f64 {
        run.cpu_seconds * 1e6 / self.requests as f64
    }

    /// The result as one JSON object.
    pub(crate) fn json(&self) -> Value {
        let sides: Vec<Value> = self
            .runs
            .iter()
            .map(|(contestant, runs)| {
                json!({
                    "side": contestant.name(),
                    "median-iops": median_of(runs, |run| self.iops(run)),
                    "median-cpu-microseconds": median_of(runs, |run| self.cpu_microseconds(run)),
                    "wall-seconds": runs.iter().map(|run| run.wall_seconds).collect::<Vec<_>>(),
                    "cpu-seconds": runs.iter().map(|run| run.cpu_seconds).collect::<Vec<_>>(),
                })
            })
            .collect();
        json!({
            "scenario": self.scenario.name(), "access": self.access.name(), "place": self.place,
            "requests": self.requests, "request-bytes": REQUEST_BYTES, "step-bytes": self.step_bytes, "depth": DEPTH,
            "sides": sides,
        })
    }

    /// The result as a table.
    pub(crate) fn table(&self) -> String {
        let mut text = format!(
            "\n{} {} ({}, direct I/O)\n  {} requests of {REQUEST_BYTES} bytes, each {} bytes after the one before (round \
             the end), {DEPTH} in flight\n{:<14} {:>9} {:>15}  {:>17}\n",
            self.scenario.name(),
            self.access.name(),
            self.place,
            self.requests,
            self.step_bytes,
            "",
            "IOPS",
            "CPU us/request",
            "IOPS min-max"
        );
        for (contestant, runs) in &self.runs {
            let (least, most) = range_of(runs, |run| self.iops(run));
            text += &format!(
                "{:<14} {:>9.0} {:>15.2}  {least:>8.0}-{most:.0}\n",
                contestant.name(),
                median_of(runs, |run| self.iops(run)),
                median_of(runs, |run| self.cpu_microseconds(run)),
            );
        }
        text + &ratios(
            &self.runs,
            "IOPS",
            |run| self.iops(run),
            |run| self.cpu_microseconds(run),
        )
    }
}
