//! What `backup` and `mirror` can be asked for.

use std::path::PathBuf;

use blockyard_engine::job::error_policy::OnError;
use blockyard_engine::request::{
    BackupPerf, BackupSpec, CbwOptions, CreatePreallocation, DetectZeroes, IntegritySpec,
    MirrorSpec, SyncMode, WorkSpec,
};
use clap::{Args, ValueEnum};

use crate::size;
use crate::terminal::copy::job::CopyOptions;
use crate::terminal::display::DisplayArguments;
use crate::terminal::embedded::EngineArguments;

/// Names of the two nodes.
pub(crate) const SOURCE: &str = "source";
pub(crate) const TARGET: &str = "target";

/// Arguments of `backup` and `mirror`.
#[derive(Args, Debug)]
pub struct CopyArguments {
    /// Image or block device to read
    #[arg(value_name = "SRC")]
    pub(crate) source: PathBuf,
    /// Image to make, or with --force to overwrite; or a block device, with --force
    #[arg(value_name = "DST")]
    pub(crate) target: PathBuf,
    /// Overwrite DST if it exists. Its content is lost from the start, whether the copy succeeds or not
    #[arg(long, short, alias = "overwrite")]
    pub(crate) force: bool,
    /// Read DST back once the copy is made, and compare it with what was read from SRC
    #[arg(long)]
    pub(crate) verify: bool,
    /// Write checksums of the copy to FILE, for `blockyard verify`. FILE must not exist, or is replaced with --force. All bytes
    /// of SRC are read then, also where the file system could share them
    #[arg(long, value_name = "FILE")]
    pub(crate) manifest: Option<PathBuf>,
    /// Keep what was written to a new DST when the copy fails or is cancelled
    #[arg(long)]
    pub(crate) keep_partial: bool,
    /// Format of SRC. Must be given if SRC looks like another one; it is never guessed
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub(crate) source_format: Option<Format>,
    /// Format of DST
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = Format::Raw)]
    pub(crate) target_format: Format,
    /// Reserve the room of a new image before copying: no, its blocks (falloc), or by writing zeroes (full)
    #[arg(long, value_enum, value_name = "MODE", default_value_t = Preallocation::Off)]
    pub(crate) preallocation: Preallocation,
    /// Look for zeroes in the data, and store them as zeroes (on) or holes (unmap). Holes of SRC stay holes anyway
    #[arg(long, value_enum, value_name = "MODE", default_value_t = Zeroes::Off)]
    pub(crate) detect_zeroes: Zeroes,
    /// When reading or writing fails: give up (report), or go on and try that part again until it works (ignore)
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = ErrorChoice::Report)]
    pub(crate) on_error: ErrorChoice,
    #[command(flatten)]
    pub(crate) pace: PaceArguments,
    #[command(flatten)]
    pub(crate) engine: EngineArguments,
    #[command(flatten)]
    pub(crate) display: DisplayArguments,
}

/// How fast to go.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct PaceArguments {
    /// Bytes per second at most, with k, M, G or T for powers of 1024; 0: no limit
    #[arg(long, visible_alias = "rate", value_name = "RATE", value_parser = speed, default_value = "0", hide_default_value = true)]
    pub(crate) speed: i64,
}

/// Image formats there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Raw,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Preallocation {
    Off,
    Falloc,
    Full,
}

impl From<Preallocation> for CreatePreallocation {
    fn from(choice: Preallocation) -> Self {
        match choice {
            Preallocation::Off => CreatePreallocation::Off,
            Preallocation::Falloc => CreatePreallocation::Falloc,
            Preallocation::Full => CreatePreallocation::Full,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Zeroes {
    Off,
    On,
    Unmap,
}

impl From<Zeroes> for DetectZeroes {
    fn from(choice: Zeroes) -> Self {
        match choice {
            Zeroes::Off => DetectZeroes::Off,
            Zeroes::On => DetectZeroes::On,
            Zeroes::Unmap => DetectZeroes::Unmap,
        }
    }
}

/// The policies that need nobody who resumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ErrorChoice {
    Report,
    Ignore,
}

impl From<ErrorChoice> for OnError {
    fn from(choice: ErrorChoice) -> Self {
        match choice {
            ErrorChoice::Report => OnError::Report,
            ErrorChoice::Ignore => OnError::Ignore,
        }
    }
}

/// The two ways to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CopyKind {
    Backup,
    Mirror,
}

impl CopyKind {
    /// Name of the job.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            CopyKind::Backup => "backup",
            CopyKind::Mirror => "mirror",
        }
    }

    /// The job that copies the source node to the target node.
    pub(crate) fn work(self, speed: i64, on_error: OnError, integrity: IntegritySpec) -> WorkSpec {
        let (device, target) = (SOURCE.to_owned(), TARGET.to_owned());
        match self {
            CopyKind::Backup => WorkSpec::Backup(BackupSpec {
                device,
                target,
                sync: SyncMode::Full,
                speed,
                new_target: None,
                bitmap: None,
                bitmap_mode: None,
                compress: false,
                on_source_error: on_error,
                on_target_error: on_error,
                filter_node_name: None,
                discard_source: false,
                perf: BackupPerf::default(),
                cbw: CbwOptions::default(),
                integrity,
            }),
            CopyKind::Mirror => WorkSpec::Mirror(MirrorSpec {
                device,
                target,
                speed,
                on_source_error: on_error,
                on_target_error: on_error,
                integrity,
                ..MirrorSpec::default()
            }),
        }
    }
}

impl CopyArguments {
    /// Arguments that do not go together.
    ///
    /// # Errors
    /// Which, for the user.
    pub(crate) fn check(&self) -> Result<(), String> {
        let reserves = self.preallocation != Preallocation::Off;
        if reserves && self.detect_zeroes == Zeroes::Unmap {
            return Err(
                "--detect-zeroes unmap gives back the room that --preallocation reserves; choose one"
                    .to_owned(),
            );
        }
        Ok(())
    }

    /// How to copy.
    pub(crate) fn options(&self, kind: CopyKind) -> CopyOptions {
        CopyOptions {
            kind,
            speed: self.pace.speed,
            on_error: self.on_error.into(),
            preallocation: self.preallocation.into(),
            detect_zeroes: self.detect_zeroes.into(),
            integrity: IntegritySpec {
                manifest: self.manifest.clone(),
                replaces_manifest: self.force,
                verify: self.verify,
            },
        }
    }
}

fn speed(text: &str) -> Result<i64, String> {
    let bytes = size::parse(text).and_then(|bytes| i64::try_from(bytes).ok());
    bytes.ok_or_else(|| format!("expected {}", size::EXPECTED))
}
