//! fio as a client of an export: its nbd engine.

use std::process::Command;

use serde_json::Value;

use crate::Failure;
use crate::options::Options;
use crate::process::run as run_program;

/// What fio has seen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    /// Bytes moved.
    pub(crate) bytes: f64,
    /// For how long it moved them.
    pub(crate) seconds: f64,
    /// From a request to its answer, half of them, in microseconds.
    pub(crate) median_us: f64,
    /// The same of 99 of a hundred.
    pub(crate) p99_us: f64,
}

/// Loads an export: what, how much at a time, how many at once.
///
/// # Errors
/// What fio says, or that it moved nothing.
pub(crate) fn run(
    options: &Options,
    uri: &str,
    (what, length, depth): (&str, &str, u32),
) -> Result<Figures, Failure> {
    let ended = run_program(Command::new("fio").args([
        "--name=export",
        "--ioengine=nbd",
        "--output-format=json",
        "--time_based",
        "--randrepeat=1",
        &format!("--uri={uri}"),
        &format!("--rw={what}"),
        &format!("--bs={length}"),
        &format!("--iodepth={depth}"),
        &format!("--size={}M", options.size_mib),
        &format!("--runtime={}", options.seconds),
    ]))?;
    // Its nbd engine says something before the figures.
    let (_, figures) = ended.output.split_once('{').unwrap_or_default();
    let figures: Value = serde_json::from_str(&format!("{{{figures}"))
        .map_err(|error| Failure::new(format!("fio: {error}: {}", ended.output)))?;
    let side = match what.ends_with("read") {
        true => "read",
        false => "write",
    };
    let figures = &figures["jobs"][0][side];
    let latency_us = |percentile: &str| {
        let nanoseconds = figures["clat_ns"]["percentile"][percentile].as_f64();
        nanoseconds.unwrap_or_default() / 1e3
    };
    match (figures["io_bytes"].as_f64(), figures["runtime"].as_f64()) {
        (Some(bytes), Some(milliseconds)) if bytes > 0.0 => Ok(Figures {
            bytes,
            seconds: milliseconds / 1e3,
            median_us: latency_us("50.000000"),
            p99_us: latency_us("99.000000"),
        }),
        _ => Err(Failure::new("fio has moved nothing")),
    }
}
