//! The copy scenarios: one job on fresh daemons, sides in turn, each result compared with its source.

use std::process::Command;

use serde_json::Value;

use crate::Failure;
use crate::case::{self, Case, Target};
use crate::example;
use crate::job;
use crate::options::{JobKind, Options, Scenario, Side};
use crate::place;
use crate::process::run as run_program;
use crate::report::{CopyResult, Run};

/// Runs one scenario with every chosen job.
///
/// # Errors
/// The place cannot be made, a daemon fails, or a result differs from its source.
pub(crate) fn run(options: &Options, scenario: Scenario) -> Result<Vec<CopyResult>, Failure> {
    let case = case::prepare(options, scenario)?;
    case.jobs(options)
        .into_iter()
        .map(|job| measure(options, &case, job))
        .collect()
}

fn measure(options: &Options, case: &Case, job: JobKind) -> Result<CopyResult, Failure> {
    let target = case.target(job);
    let mut result = CopyResult {
        scenario: case.scenario,
        job,
        place: case.place.description().to_owned(),
        what: case.what(&target),
        bytes: case.counted_bytes,
        direct: case.direct,
        runs: options
            .contestants()
            .into_iter()
            .filter(|contestant| contestant.side != Side::Limit || case.is_limited())
            .map(|contestant| (contestant, Vec::new()))
            .collect(),
    };
    for _ in 0..options.rounds {
        for (contestant, runs) in &mut result.runs {
            let name = contestant.name();
            case.make_ready(&target)?;
            let outcome = match contestant.side {
                Side::Limit => copy_loop(options, case, &target),
                _ => job::run(options, case, &target, contestant, job),
            };
            let checked = outcome.and_then(|mut run| {
                run.target_bytes = place::allocated_bytes(&target.image.path)?;
                target.image.require_equal(&case.source)?;
                target.image.require_sound()?;
                Ok(run)
            });
            let run = checked.map_err(|error| error.about(&format!("{name} {}", job.name())))?;
            eprintln!(
                "  {} {} {name}: {:.3} s, {:.2} CPU s",
                case.scenario.name(),
                job.name(),
                run.wall_seconds,
                run.cpu_seconds
            );
            runs.push(run);
        }
    }
    // Its room is for the next job's.
    std::fs::remove_file(&target.image.path)
        .map_err(|error| Failure::at(&target.image.path, &error))?;
    Ok(result)
}

fn copy_loop(options: &Options, case: &Case, target: &Target) -> Result<Run, Failure> {
    let mut command = Command::new(example::built("blockyard-ring", "copy_loop")?);
    command.arg(&case.source.path).arg(&target.image.path);
    command.args([
        "--chunk-kib",
        &options.chunk_kib.to_string(),
        "--depth",
        &options.depth.to_string(),
    ]);
    if case.direct {
        command.arg("--direct");
    }
    let ended = run_program(&mut command)?;
    let figures: Value = serde_json::from_str(&ended.output)
        .map_err(|error| Failure::new(format!("copy loop: {error}: {}", ended.output)))?;
    let number = |name: &str| figures[name].as_f64().unwrap_or_default();
    Ok(Run {
        wall_seconds: number("wall_seconds"),
        cpu_seconds: number("cpu_seconds"),
        peak_bytes: figures["peak_kib"].as_u64().unwrap_or_default() << 10,
        open_seconds: 0.0,
        target_bytes: 0,
        first_byte_seconds: None,
    })
}
