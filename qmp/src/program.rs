//! The program: which of its commands runs, and where log messages go.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use blockyard_engine::engine::share_one_heap;
use tracing_subscriber::EnvFilter;

use crate::control;
use crate::daemon;
use crate::terminal::images::{
    bitmap, compare, create, info, map, measure, resize, snapshot, verify,
};
use crate::terminal::{self, Command, bench, chain, check, copy};
use crate::tour;

/// Runs the program with the arguments of the process.
pub fn main() -> ExitCode {
    share_one_heap();
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    let name = arguments.first().map(Path::new).and_then(Path::file_name);
    let name = name
        .unwrap_or(OsStr::new("blockyard"))
        .to_string_lossy()
        .into_owned();
    // A link of that name can stand wherever the original is started.
    if name == "qemu-storage-daemon" {
        log_to_standard_error("warn");
        return daemon::run(&name, &[], arguments.split_off(1));
    }
    let command = match terminal::read(arguments) {
        Ok(command) => command,
        Err(exit) => return exit.into(),
    };
    // What a job meets, the other commands tell themselves.
    log_to_standard_error(match command {
        Command::Daemon { .. } => "warn",
        _ => "error",
    });
    match command {
        Command::Daemon { options } => daemon::run(&name, &["daemon".into()], options),
        Command::Backup(arguments) => copy::run(&arguments.asked()).into(),
        Command::Mirror(arguments) => copy::run(&arguments.asked()).into(),
        Command::Chain(arguments) => chain::show::run(&arguments).into(),
        Command::Commit(arguments) => chain::moves::commit(&arguments).into(),
        Command::Stream(arguments) => chain::moves::stream(&arguments).into(),
        Command::Rebase(arguments) => chain::rebase::run(&arguments).into(),
        Command::Check(arguments) => check::run(&arguments),
        Command::Compare(arguments) => compare::run(&arguments),
        Command::Verify(arguments) => verify::run(&arguments),
        Command::Create(arguments) => create::run(&arguments).into(),
        Command::Info(arguments) => info::run(&arguments).into(),
        Command::Map(arguments) => map::run(&arguments).into(),
        Command::Measure(arguments) => measure::run(&arguments).into(),
        Command::Resize(arguments) => resize::run(&arguments).into(),
        Command::Bitmap(arguments) => bitmap::run(&arguments).into(),
        Command::Snapshot(arguments) => snapshot::run(&arguments).into(),
        Command::Qmp(arguments) => control::qmp::run(&arguments).into(),
        Command::Jobs(arguments) => control::jobs::run(&arguments).into(),
        Command::Tour(arguments) => tour::guide::run(&arguments).into(),
        Command::Bench(arguments) => bench::run(&arguments).into(),
    }
}

/// Messages of this level and worse, unless `RUST_LOG` says otherwise.
fn log_to_standard_error(level: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
}
