//! The program: start, signals, exit codes.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    blockyard_qmp::program::main()
}
