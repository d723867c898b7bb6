//! `blockyard bench`: how fast this machine copies, with the engine of the daemon and without its wire.
//!
//! A round is one whole copy, from the job's start until its result is durable. Each begins with an empty target.

mod report;
mod scratch;
mod usage;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use blockyard_engine::engine::probe;
use blockyard_engine::job::error_policy::OnError;
use blockyard_engine::request::{CreatePreallocation, DetectZeroes, IntegritySpec};
use clap::Args;
use serde_json::{Value, json};

use crate::error::reason;
use crate::size;
use crate::terminal::bench::report::{Round, medians, table};
use crate::terminal::bench::scratch::Scratch;
use crate::terminal::copy::arguments::{CopyKind, PaceArguments, SOURCE, TARGET};
use crate::terminal::copy::ends::{Source, Target, shown};
use crate::terminal::copy::job::{Copied, CopyOptions, add_source, add_target, copy_across};
use crate::terminal::display::{Display, DisplayArguments, Ended, Fact, Outcome};
use crate::terminal::embedded::{Embedded, EngineArguments, IoBackend, with_engine};
use crate::terminal::exit::Exit;

/// Name of the whole on the display.
const ID: &str = "bench";

/// Arguments of `bench`.
#[derive(Args, Debug)]
pub struct BenchArguments {
    /// Image or block device to read instead of a file made for it
    #[arg(value_name = "SRC", requires = "target", conflicts_with_all = ["size", "directory"])]
    source: Option<PathBuf>,
    /// Where to write it. It stays, as the copy that it is
    #[arg(value_name = "DST")]
    target: Option<PathBuf>,
    /// Overwrite DST if it exists. Its content is lost
    #[arg(long, short, alias = "overwrite", requires = "target")]
    force: bool,
    /// How much to copy; the folder needs room for twice as much
    #[arg(long, value_name = "SIZE", value_parser = length, default_value = "1G")]
    size: u64,
    /// Where to make the files to copy; they are removed at the end
    #[arg(long, value_name = "DIR", default_value = ".")]
    directory: PathBuf,
    /// Which job copies
    #[arg(long, value_enum, value_name = "KIND", default_value_t = CopyKind::Backup)]
    job: CopyKind,
    /// How many times; medians are of all of them
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    #[command(flatten)]
    pace: PaceArguments,
    #[command(flatten)]
    engine: EngineArguments,
    #[command(flatten)]
    display: DisplayArguments,
}

/// What was measured, and how.
struct Measured {
    rounds: Vec<Round>,
    backend: &'static str,
    /// Both sides past the page cache, one of them, none.
    cache: &'static str,
    source_file_system: Option<String>,
    target_file_system: Option<String>,
}

/// Runs `bench`.
pub(crate) fn run(arguments: &BenchArguments) -> Exit {
    let started = Instant::now();
    let display = Display::new(arguments.display);
    let ran = with_engine(arguments.engine, display, async |mut embedded| {
        let outcome = bench(&mut embedded, arguments).await;
        (outcome, embedded.display)
    });
    let (outcome, mut display) = match ran {
        Ok(ended) => ended,
        Err((text, display)) => (Err(Copied::refused(text)), display),
    };
    let ended = match &outcome {
        Ok(measured) => match medians(&measured.rounds) {
            Some(medians) if display.is_json() => Ended {
                id: ID,
                outcome: Outcome::Completed,
                bytes: medians.bytes,
                took: Some(medians.wall),
                facts: measured.facts(arguments, &medians),
            },
            _ => {
                display.result(&measured.heading(arguments));
                display.result(&table(&measured.rounds));
                return Exit::Success;
            }
        },
        Err(copied) => Ended {
            id: ID,
            outcome: copied.outcome.clone(),
            bytes: copied.bytes,
            took: Some(started.elapsed()),
            facts: copied.facts.clone(),
        },
    };
    display.ended(&ended);
    ended.outcome.exit()
}

/// Measures with the files named, or with some that exist only meanwhile.
async fn bench(embedded: &mut Embedded, arguments: &BenchArguments) -> Result<Measured, Copied> {
    if let (Some(source), Some(target)) = (&arguments.source, &arguments.target) {
        return measure(embedded, arguments, source, target).await;
    }
    let folder = &arguments.directory;
    let cannot = |error: io::Error| {
        Copied::refused(format!("cannot use {}: {}", shown(folder), reason(&error)))
    };
    let scratch = Scratch::new(folder).map_err(cannot)?;
    let (display, interrupt) = (&mut embedded.display, &embedded.interrupt);
    let filled = scratch.fill(SOURCE, arguments.size, |done_bytes| {
        display.phase("fill", done_bytes, arguments.size);
        !interrupt.is_asked()
    });
    display.forget("fill");
    let measured = match filled {
        Ok(true) => {
            let (source, target) = (scratch.path(SOURCE), scratch.path(TARGET));
            measure(embedded, arguments, &source, &target).await
        }
        Ok(false) => Err(Copied {
            outcome: Outcome::Cancelled,
            ..Copied::refused("")
        }),
        Err(error) if error.kind() == io::ErrorKind::StorageFull => Err(Copied::refused(format!(
            "{} has no room for two files of {}; --size and --directory choose others",
            shown(folder),
            size::shown(arguments.size)
        ))),
        Err(error) => Err(cannot(error)),
    };
    scratch.remove().map_err(cannot)?;
    measured
}

async fn measure(
    embedded: &mut Embedded,
    arguments: &BenchArguments,
    source: &Path,
    target: &Path,
) -> Result<Measured, Copied> {
    let source = Source::open(source).map_err(Copied::refused)?;
    let source_direct = add_source(embedded, &source)
        .await
        .map_err(Copied::refused)?;
    let target = Target::claim(target, arguments.force, Some(&source)).map_err(Copied::refused)?;
    let options = CopyOptions {
        integrity: IntegritySpec::default(),
        kind: arguments.job,
        speed: arguments.pace.speed,
        on_error: OnError::Report,
        preallocation: CreatePreallocation::Off,
        detect_zeroes: DetectZeroes::Off,
    };
    let mut measured = Measured {
        rounds: Vec::new(),
        backend: backend(arguments.engine.io_backend),
        cache: "",
        source_file_system: usage::file_system(&source.path),
        target_file_system: usage::file_system(&target.path),
    };
    for _ in 0..arguments.rounds {
        match round(embedded, &options, &source, &target).await {
            Ok((round, target_direct)) => {
                measured.rounds.push(round);
                measured.cache = match (source_direct, target_direct) {
                    (true, true) => "direct I/O",
                    (true, false) => "direct I/O from the source, page cache for the target",
                    (false, true) => "page cache for the source, direct I/O to the target",
                    (false, false) => "page cache",
                };
            }
            Err(mut copied) => {
                if arguments.target.is_some() {
                    copied.clean_up(&target, false);
                }
                return Err(copied);
            }
        }
    }
    Ok(measured)
}

/// One copy onto an empty target. Also returns whether the target bypasses the page cache.
async fn round(
    embedded: &mut Embedded,
    options: &CopyOptions,
    source: &Source,
    target: &Target,
) -> Result<(Round, bool), Copied> {
    let direct = add_target(embedded, options, source, target).await?;
    usage::reset_peak();
    let cpu_before = usage::cpu_time();
    let copied = copy_across(embedded, options, source, target).await;
    let cpu = usage::cpu_time().saturating_sub(cpu_before);
    let (Outcome::Completed, Some(wall), Some(job)) = (&copied.outcome, copied.took, &copied.job)
    else {
        return Err(copied);
    };
    let round = Round {
        bytes: copied.bytes,
        wall,
        cpu,
        latency: job.latency,
        peak_bytes: usage::peak_bytes(),
    };
    let deleted = embedded.delete_node(TARGET).await;
    deleted.map_err(|error| Copied::refused(error.text))?;
    Ok((round, direct))
}

impl Measured {
    fn heading(&self, arguments: &BenchArguments) -> String {
        let bytes = self.rounds.first().map_or(0, |round| round.bytes);
        let kind = |name: &Option<String>| name.clone().unwrap_or("unknown".to_owned());
        let from = kind(&self.source_file_system);
        let place = match (&arguments.source, &arguments.target) {
            (Some(source), Some(target)) => format!(
                "from {} ({from}) to {} ({})",
                shown(source),
                shown(target),
                kind(&self.target_file_system)
            ),
            _ => format!("in {} ({from})", shown(&arguments.directory)),
        };
        format!(
            "{} of {} {place}, {}, {}",
            arguments.job.name(),
            size::shown(bytes),
            self.cache,
            self.backend
        )
    }

    fn facts(&self, arguments: &BenchArguments, medians: &Round) -> Vec<Fact> {
        let rounds: Vec<Value> = self.rounds.iter().map(Round::json).collect();
        [
            ("job", json!(arguments.job.name())),
            ("cache", json!(self.cache)),
            ("io-backend", json!(self.backend)),
            ("source-file-system", json!(self.source_file_system)),
            ("target-file-system", json!(self.target_file_system)),
            ("median", medians.json()),
            ("rounds", json!(rounds)),
        ]
        .map(|(key, value)| Fact {
            key,
            value,
            text: String::new(),
        })
        .into()
    }
}

/// What carries requests, once it has been decided.
fn backend(choice: IoBackend) -> &'static str {
    match choice {
        IoBackend::Threads => "threads",
        IoBackend::Auto if probe().is_err() => "threads",
        IoBackend::Auto | IoBackend::IoUring => "io_uring",
    }
}

fn length(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text).filter(|bytes| (1..=i64::MAX.unsigned_abs()).contains(bytes));
    bytes.ok_or_else(|| format!("expected {}", size::EXPECTED))
}
