//! The program's commands, and what they share: where messages go and what the exit code means.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

use crate::daemon;

/// Runs the program with the arguments of the process.
pub fn main() -> ExitCode {
    log_to_standard_error();
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    let name = arguments.first().map(Path::new).and_then(Path::file_name);
    let name = name
        .unwrap_or(OsStr::new("blockyard"))
        .to_string_lossy()
        .into_owned();
    // A link of that name can stand wherever the original is started.
    if name == "qemu-storage-daemon" {
        return daemon::run(&name, &[], arguments.split_off(1));
    }
    if arguments.get(1).is_some_and(|command| command == "daemon") {
        let leading = [arguments[1].clone()];
        return daemon::run(&name, &leading, arguments.split_off(2));
    }
    eprintln!("{name}: a command is expected: daemon");
    ExitCode::FAILURE
}

/// Warnings and worse, unless `RUST_LOG` says otherwise.
fn log_to_standard_error() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
}
