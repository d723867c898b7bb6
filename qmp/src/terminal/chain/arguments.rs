//! What `commit` and `stream` can be asked for.

use std::path::PathBuf;

use clap::Args;

use crate::terminal::check::arguments::Format;
use crate::terminal::copy::arguments::PaceArguments;
use crate::terminal::display::DisplayArguments;
use crate::terminal::embedded::EngineArguments;

/// Arguments of `commit`.
#[derive(Args, Debug)]
pub struct CommitArguments {
    /// Image at the top of the chain
    #[arg(value_name = "OVERLAY")]
    pub(crate) overlay: PathBuf,
    /// Image of the chain that takes in what the images above it hold. Without it, the one right below
    #[arg(long, short, value_name = "BASE")]
    pub(crate) base: Option<PathBuf>,
    /// Highest image that is taken in. Without it, OVERLAY; else the image above it is put on BASE
    #[arg(long, value_name = "TOP")]
    pub(crate) top: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) shared: MoveArguments,
}

/// Arguments of `stream`.
#[derive(Args, Debug)]
pub struct StreamArguments {
    /// Image that takes in what the images below it hold
    #[arg(value_name = "OVERLAY")]
    pub(crate) overlay: PathBuf,
    /// Image of the chain that stays below OVERLAY. Without it, none does
    #[arg(long, short, value_name = "BASE")]
    pub(crate) base: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) shared: MoveArguments,
}

/// What both can be asked for.
#[derive(Args, Debug)]
pub(crate) struct MoveArguments {
    /// Format of OVERLAY; it is never guessed. Images of other formats than qcow2 have no chain
    #[arg(long, short, value_enum, value_name = "FORMAT", default_value_t = Format::Qcow2)]
    pub(crate) format: Format,
    /// Say what would be moved and how much room it would take, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Begin although the file system has too little room for what may be needed
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) pace: PaceArguments,
    #[command(flatten)]
    pub(crate) engine: EngineArguments,
    #[command(flatten)]
    pub(crate) display: DisplayArguments,
}
