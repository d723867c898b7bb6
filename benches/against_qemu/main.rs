//! `cargo bench --bench against_qemu -- [options]`: the same work on qemu-storage-daemon and on blockyard.
//!
//! Jobs and QMP traffic run on both daemons in turn, round by round, next to a plain io_uring copy loop as the limit.
//! Results of the jobs are compared with their source. benches/README.md says how to read the output. Most scenarios
//! mount file systems of their own and need root; everything is undone at the end, also after errors and signals.

#![forbid(unsafe_code)]

mod beside_mirror;
mod case;
mod chain;
mod cleanup;
mod client;
mod control;
mod copy;
mod daemon;
#[path = "../../tests/end_to_end/damage.rs"]
mod damage;
mod data;
mod example;
mod exports;
mod far_nbd;
mod fio;
mod hostile;
mod image;
mod incremental;
mod job;
mod load;
mod marking;
mod node;
mod node_report;
mod options;
mod place;
mod process;
mod report;

use std::fmt;
use std::path::Path;
use std::process::{Command, ExitCode};

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use crate::options::{Options, Scenario, Side};

/// Why something could not be measured.
#[derive(Debug)]
pub(crate) struct Failure(String);

impl Failure {
    fn new(text: impl Into<String>) -> Failure {
        Failure(text.into())
    }

    fn at(path: &Path, error: &std::io::Error) -> Failure {
        Failure(format!("{}: {error}", path.display()))
    }

    fn about(self, subject: &str) -> Failure {
        Failure(format!("{subject}: {}", self.0))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    if !options.bench {
        println!("run it as: cargo bench --bench against_qemu -- --help");
        return ExitCode::SUCCESS;
    }
    if let Err(error) = undo_on_signals() {
        eprintln!("against_qemu: {error}");
        return ExitCode::FAILURE;
    }
    if !options.json {
        println!("{}", machine(&options));
    }
    let mut failed = false;
    for scenario in options.chosen() {
        if let Err(error) = measure(&options, scenario) {
            eprintln!("against_qemu: {}: {error}", scenario.name());
            failed = true;
        }
    }
    if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn measure(options: &Options, scenario: Scenario) -> Result<(), Failure> {
    match scenario {
        Scenario::Ram
        | Scenario::Disk
        | Scenario::Cache
        | Scenario::Sparse
        | Scenario::Xfs
        | Scenario::Btrfs
        | Scenario::Qcow2
        | Scenario::Zlib
        | Scenario::Zstd
        | Scenario::Huge => {
            for result in copy::run(options, scenario)? {
                print(options, || result.json().to_string(), || result.table());
            }
        }
        Scenario::Chain | Scenario::ChainRuns | Scenario::ChainDisk | Scenario::Far => {
            for result in chain::run(options, scenario)? {
                print(options, || result.json().to_string(), || result.table());
            }
        }
        Scenario::FarNbd => {
            for result in far_nbd::run(options)? {
                print(options, || result.json().to_string(), || result.table());
            }
        }
        Scenario::RawNode | Scenario::Qcow2Node => {
            for result in node::run(options, scenario)? {
                print(options, || result.json().to_string(), || result.table());
            }
        }
        Scenario::BesideMirror => {
            for result in beside_mirror::run(options)? {
                print(options, || result.json().to_string(), || result.table());
            }
        }
        Scenario::ExportRaw | Scenario::ExportQcow2 => {
            for result in exports::run(options, scenario)? {
                print(options, || result.json().to_string(), || result.table());
            }
        }
        Scenario::Incremental | Scenario::SparseIncremental => {
            for result in incremental::run(options, scenario)? {
                print(options, || result.json().to_string(), || result.table());
            }
        }
        Scenario::Marking => {
            for result in marking::run(options)? {
                print(options, || result.json().to_string(), || result.table());
            }
        }
        _ => {
            for &side in options.sides.iter().filter(|side| **side != Side::Limit) {
                let result = control::run(options, scenario, side)
                    .map_err(|error| error.about(side.name()))?;
                print(options, || result.json().to_string(), || result.table());
            }
        }
    }
    Ok(())
}

fn print(options: &Options, json: impl FnOnce() -> String, table: impl FnOnce() -> String) {
    if options.json {
        println!("{}", json());
    } else {
        print!("{}", table());
    }
}

/// On SIGINT and SIGTERM: undo what is mounted, attached and started, then end.
fn undo_on_signals() -> Result<(), Failure> {
    let failure = |error: std::io::Error| Failure::new(format!("signals: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failure)?;
    let entered = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failure)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failure)?;
    drop(entered);
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => (),
                _ = terminate.recv() => (),
            }
        });
        cleanup::undo_all_for_good();
        std::process::exit(130);
    });
    Ok(())
}

fn machine(options: &Options) -> String {
    let first_line = |command: &mut Command| {
        let output = command
            .output()
            .map(|output| output.stdout)
            .unwrap_or_default();
        String::from_utf8_lossy(&output)
            .lines()
            .next()
            .unwrap_or("not found")
            .to_owned()
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let model = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = model
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("?", |rest| rest.trim_start_matches([' ', '\t', ':']));
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split_whitespace().next().unwrap_or("?").to_owned();
    format!(
        "machine: {cores} cores ({model}), {}, load {load} before the start\nqemu: {}\nblockyard: {}\n\
         rounds: {}, sides in turn, medians; aio: {}",
        first_line(Command::new("uname").arg("-sr")),
        first_line(Command::new(&options.qemu).arg("--version")),
        first_line(Command::new(&options.blockyard).arg("--version")),
        options.rounds,
        if options.aio.is_empty() {
            "default".to_owned()
        } else {
            options.aio.join(", ")
        },
    )
}
