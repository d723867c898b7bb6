//! The commands for people and scripts: what they are asked, how they show progress, how they end.

pub mod display;
pub mod exit;
pub mod rate;

use std::ffi::OsString;

use clap::{Parser, Subcommand};

use crate::daemon::options::HELP;
use crate::terminal::exit::{Exit, after_help};

/// What `--version` prints behind the program's name.
pub const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    ", compatible with qemu-storage-daemon 10.0"
);

const EXAMPLES: &str = "  blockyard daemon --help";

/// Runs backup, mirror and other block jobs on disk images
#[derive(Debug, Parser)]
#[command(name = "blockyard", version = VERSION, after_help = after_help(EXAMPLES))]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// One command and its arguments.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve QMP; takes the options of qemu-storage-daemon
    #[command(disable_help_flag = true, override_help = HELP)]
    Daemon {
        /// The daemon's own options.
        // They act in order, so they are read by hand.
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        options: Vec<OsString>,
    },
}

/// Reads the command line, the program's name first.
///
/// # Errors
/// How to exit when there is nothing to run: help, the version or what is wrong has been printed.
pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, Exit> {
    let parsed = Arguments::try_parse_from(arguments);
    parsed.map(|arguments| arguments.command).map_err(|error| {
        // There is nowhere left to complain when this cannot be printed.
        let _ = error.print();
        if error.use_stderr() {
            Exit::Usage
        } else {
            Exit::Success
        }
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
