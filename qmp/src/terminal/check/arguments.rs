//! What `check` can be asked for.

use std::path::PathBuf;

use blockyard_engine::images::RepairChoice;
use clap::{Args, ValueEnum};

use crate::terminal::embedded::IoBackend;

/// Arguments of `check`.
#[derive(Args, Debug)]
pub struct CheckArguments {
    /// Image to check
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Format of FILE; it is never guessed
    #[arg(long, short, value_enum, value_name = "FORMAT", default_value_t = Format::Qcow2)]
    pub(crate) format: Format,
    /// Put right what is found: give leaked clusters back (leaks), or everything that can be put right (all)
    #[arg(long, short, value_enum, value_name = "WHAT")]
    pub(crate) repair: Option<RepairArgument>,
    /// Form of the result
    #[arg(long, value_enum, value_name = "FORM", default_value_t = Output::Human)]
    pub(crate) output: Output,
    /// The same as --output json
    #[arg(long)]
    pub(crate) json: bool,
    /// Print findings and errors only
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Check FILE although somebody may be writing to it. What is found may not be so
    #[arg(long, short = 'U', conflicts_with = "repair")]
    pub(crate) force_share: bool,
    /// What carries requests to the kernel; auto: io_uring where it is allowed
    #[arg(long, value_enum, value_name = "KIND", default_value_t = IoBackend::Auto)]
    pub(crate) io_backend: IoBackend,
}

impl CheckArguments {
    /// Whether the result is for programs.
    pub(crate) fn is_json(&self) -> bool {
        self.json || self.output == Output::Json
    }
}

/// Formats that images may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Qcow2,
    Raw,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Human,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RepairArgument {
    Leaks,
    All,
}

impl From<RepairArgument> for RepairChoice {
    fn from(argument: RepairArgument) -> Self {
        match argument {
            RepairArgument::Leaks => RepairChoice::Leaks,
            RepairArgument::All => RepairChoice::All,
        }
    }
}
