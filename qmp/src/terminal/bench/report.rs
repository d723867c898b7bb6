//! Rounds and their medians, as a table or as JSON. Pure.

use std::time::Duration;

use blockyard_engine::job::latency::LatencyView;
use serde_json::{Value, json};

/// What one round cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Round {
    /// Bytes copied.
    pub(super) bytes: u64,
    /// Until the copy was durable.
    pub(super) wall: Duration,
    /// Of all threads.
    pub(super) cpu: Duration,
    /// Of the job's requests.
    pub(super) latency: LatencyView,
    /// Most memory in use.
    pub(super) peak_bytes: Option<u64>,
}

impl Round {
    fn bytes_per_second(&self) -> f64 {
        let seconds = self.wall.as_secs_f64();
        if seconds > 0.0 {
            self.bytes as f64 / seconds
        } else {
            0.0
        }
    }

    /// The members of one round in JSON.
    pub(super) fn json(&self) -> Value {
        json!({
            "bytes": self.bytes,
            "seconds": self.wall.as_secs_f64(),
            "bytes-per-second": self.bytes_per_second().round() as u64,
            "cpu-seconds": self.cpu.as_secs_f64(),
            "requests": self.latency.requests,
            "latency-p50-us": microseconds(self.latency.median),
            "latency-p99-us": microseconds(self.latency.p99),
            "latency-max-us": microseconds(self.latency.max),
            "peak-memory-bytes": self.peak_bytes,
        })
    }

    fn row(&self, name: &str) -> String {
        let peak = self
            .peak_bytes
            .map(|bytes| format!("{:.1}", mebibytes(bytes)));
        format!(
            "{name:<8}{:>9.3}{:>10.0}{:>9.3}{:>10.2}{:>10.2}{:>10.2}{:>10}",
            self.wall.as_secs_f64(),
            self.bytes_per_second() / f64::from(1 << 20),
            self.cpu.as_secs_f64(),
            milliseconds(self.latency.median),
            milliseconds(self.latency.p99),
            milliseconds(self.latency.max),
            peak.as_deref().unwrap_or("-"),
        )
    }
}

/// A round each of whose figures is the middle one of all rounds; of an even number, the larger of the two in the middle.
/// Of the slowest request and of memory it is the worst.
pub(super) fn medians(rounds: &[Round]) -> Option<Round> {
    let middle = |pick: &dyn Fn(&Round) -> Duration| {
        let mut all: Vec<Duration> = rounds.iter().map(pick).collect();
        all.sort();
        all.get(all.len() / 2).copied()
    };
    let first = rounds.first()?;
    Some(Round {
        bytes: first.bytes,
        wall: middle(&|round| round.wall)?,
        cpu: middle(&|round| round.cpu)?,
        latency: LatencyView {
            requests: first.latency.requests,
            median: middle(&|round| round.latency.median)?,
            p99: middle(&|round| round.latency.p99)?,
            max: rounds.iter().map(|round| round.latency.max).max()?,
        },
        peak_bytes: rounds.iter().map(|round| round.peak_bytes).max()?,
    })
}

/// All rounds and their medians, a line each under a heading.
pub(super) fn table(rounds: &[Round]) -> String {
    let mut lines = vec![format!(
        "{:<8}{:>9}{:>10}{:>9}{:>10}{:>10}{:>10}{:>10}",
        "round", "wall s", "MiB/s", "CPU s", "p50 ms", "p99 ms", "max ms", "peak MiB"
    )];
    let numbered = rounds.iter().zip(1..);
    lines.extend(numbered.map(|(round, number): (&Round, u32)| round.row(&number.to_string())));
    lines.extend(medians(rounds).map(|medians| medians.row("median")));
    lines.join("\n")
}

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(millis: u64, max_millis: u64) -> Round {
        Round {
            bytes: 1 << 30,
            wall: Duration::from_millis(millis),
            cpu: Duration::from_millis(millis / 10),
            latency: LatencyView {
                requests: 1024,
                median: Duration::from_millis(2),
                p99: Duration::from_millis(8),
                max: Duration::from_millis(max_millis),
            },
            peak_bytes: Some(50 << 20),
        }
    }

    #[test]
    fn medians_are_of_the_middle_and_extremes_of_all() {
        let rounds = [round(500, 9), round(1000, 30), round(800, 10)];
        let medians = medians(&rounds).expect("rounds");
        assert_eq!(medians.wall, Duration::from_millis(800));
        assert_eq!(medians.cpu, Duration::from_millis(80));
        assert_eq!(medians.latency.max, Duration::from_millis(30));
        assert_eq!(medians.json()["bytes-per-second"], 1_342_177_280);
        assert_eq!(super::medians(&[]), None);
    }

    #[test]
    fn the_table_has_a_row_for_each_round() {
        let rows = table(&[round(500, 9), round(1000, 9), round(800, 9)]);
        let rows: Vec<&str> = rows.lines().collect();
        assert_eq!(rows.len(), 5);
        let width = rows[0].len();
        assert!(rows.iter().all(|row| row.len() == width), "{rows:#?}");
        let median: Vec<&str> = rows[4].split_whitespace().collect();
        assert_eq!(
            median,
            [
                "median", "0.800", "1280", "0.080", "2.00", "8.00", "9.00", "50.0"
            ]
        );
    }
}
