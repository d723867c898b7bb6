//! What `backup` and `mirror` can be asked for.

use std::path::{Path, PathBuf};

use blockyard_engine::job::error_policy::OnError;
use blockyard_engine::request::{
    BackupPerf, BackupSpec, CbwOptions, CreatePreallocation, DetectZeroes, IntegritySpec,
    MirrorSpec, SyncMode, WorkSpec,
};
use blockyard_engine::request::{BitmapChange, BitmapMode, BitmapName};
use clap::{Args, ValueEnum};

use crate::size;
use crate::terminal::check::arguments::Format;
use crate::terminal::copy::job::CopyOptions;
use crate::terminal::display::DisplayArguments;
use crate::terminal::embedded::EngineArguments;

/// Names of the two nodes.
pub(crate) const SOURCE: &str = "source";
pub(crate) const TARGET: &str = "target";

/// Arguments of `backup`.
#[derive(Args, Debug)]
pub struct BackupArguments {
    #[command(flatten)]
    pub(crate) copy: CopyArguments,
    /// Write compressed clusters to DST, a qcow2 image
    #[arg(long, short)]
    pub(crate) compress: bool,
    #[command(flatten)]
    pub(crate) changes: ChangesArguments,
}

/// Arguments of `mirror`.
#[derive(Args, Debug)]
pub struct MirrorArguments {
    #[command(flatten)]
    pub(crate) copy: CopyArguments,
}

/// What has changed since the backup before.
#[derive(Args, Debug)]
pub(crate) struct ChangesArguments {
    /// Copy only what BITMAP, a dirty bitmap that SRC keeps, says has changed; both are qcow2 images then. Once DST is durable the
    /// bitmap is cleared; unless the copy succeeds it stays as it is
    #[arg(long, value_name = "BITMAP")]
    pub(crate) incremental: Option<String>,
    /// The backup before, which DST is made an overlay of: read through it, DST shows the whole disk. Without it, DST holds what has
    /// changed and nothing else
    #[arg(long, value_name = "PREVIOUS", requires = "incremental")]
    pub(crate) onto: Option<PathBuf>,
    /// Format of PREVIOUS
    #[arg(long, short = 'F', value_enum, value_name = "FORMAT", requires = "onto", default_value_t = Format::Qcow2)]
    pub(crate) onto_format: Format,
    /// The manifest of PREVIOUS: what --manifest says of all that has not changed is taken over from it
    #[arg(long, value_name = "FILE", requires = "onto", requires = "manifest")]
    pub(crate) onto_manifest: Option<PathBuf>,
    /// Do not clear the bitmap
    #[arg(long, requires = "incremental")]
    pub(crate) keep_bitmap: bool,
}

/// What one of the two commands was asked for.
pub(crate) struct Asked<'a> {
    pub(crate) kind: CopyKind,
    pub(crate) copy: &'a CopyArguments,
    pub(crate) compress: bool,
    pub(crate) changes: Option<Changes<'a>>,
}

/// Only what has changed is copied.
#[derive(Clone, Copy)]
pub(crate) struct Changes<'a> {
    /// The bitmap that says what has.
    pub(crate) bitmap: &'a str,
    /// The backup before, and its format.
    pub(crate) onto: Option<(&'a Path, Format)>,
    /// The manifest of that.
    pub(crate) onto_manifest: Option<&'a Path>,
    pub(crate) keeps_bitmap: bool,
}

/// Arguments of `backup` and `mirror`.
#[derive(Args, Debug)]
pub(crate) struct CopyArguments {
    /// Image or block device to read
    #[arg(value_name = "SRC")]
    pub(crate) source: PathBuf,
    /// Image to make, or with --force to overwrite; or a block device, with --force
    #[arg(value_name = "DST")]
    pub(crate) target: PathBuf,
    /// Overwrite DST if it exists. Its content is lost from the start, whether the copy succeeds or not
    #[arg(long, alias = "overwrite")]
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
    /// Format of SRC: raw, if it does not look like another one; it is never guessed
    #[arg(long, short = 'f', value_enum, value_name = "FORMAT")]
    pub(crate) source_format: Option<Format>,
    /// Format of DST: raw, or qcow2 with --incremental
    #[arg(long, short = 'O', value_enum, value_name = "FORMAT")]
    pub(crate) target_format: Option<Format>,
    /// Options of DST, a qcow2 image: name=value, several with commas between them, as for `create`
    #[arg(long = "options", short = 'o', value_name = "OPTIONS")]
    pub(crate) options: Vec<String>,
    /// Reserve the room of a new raw image before copying: no, its blocks (falloc), or by writing zeroes (full)
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

impl BackupArguments {
    /// All of it together.
    pub(crate) fn asked(&self) -> Asked<'_> {
        let ChangesArguments {
            incremental,
            onto,
            onto_format,
            onto_manifest,
            keep_bitmap,
        } = &self.changes;
        Asked {
            kind: CopyKind::Backup,
            copy: &self.copy,
            compress: self.compress,
            changes: incremental.as_deref().map(|bitmap| Changes {
                bitmap,
                onto: onto.as_deref().map(|onto| (onto, *onto_format)),
                onto_manifest: onto_manifest.as_deref(),
                keeps_bitmap: *keep_bitmap,
            }),
        }
    }
}

impl MirrorArguments {
    /// All of it together.
    pub(crate) fn asked(&self) -> Asked<'_> {
        Asked {
            kind: CopyKind::Mirror,
            copy: &self.copy,
            compress: false,
            changes: None,
        }
    }
}

impl Asked<'_> {
    /// What SRC is, by the user's word. Only qcow2 images keep bitmaps.
    pub(crate) fn source_format(&self) -> Option<Format> {
        let by_changes = self.changes.map(|_| Format::Qcow2);
        self.copy.source_format.or(by_changes)
    }

    /// What DST becomes.
    pub(crate) fn target_format(&self) -> Format {
        let otherwise = match self.changes {
            Some(_) => Format::Qcow2,
            None => Format::Raw,
        };
        self.copy.target_format.unwrap_or(otherwise)
    }

    /// Arguments that do not go together.
    ///
    /// # Errors
    /// Which, for the user.
    pub(crate) fn check(&self) -> Result<(), String> {
        let (copy, target) = (self.copy, self.target_format());
        let reserves = copy.preallocation != Preallocation::Off;
        let refused = |text: &str| Err(text.to_owned());
        if reserves && copy.detect_zeroes == Zeroes::Unmap {
            return refused(
                "--detect-zeroes unmap gives back the room that --preallocation reserves; choose one",
            );
        }
        if self.changes.is_some() {
            if self.source_format() != Some(Format::Qcow2) || target != Format::Qcow2 {
                return refused("--incremental is for qcow2 images: a raw one keeps no bitmap");
            }
            let is_alone = self
                .changes
                .is_some_and(|changes| changes.onto_manifest.is_none());
            if copy.manifest.is_some() && is_alone {
                return refused(
                    "--manifest tells of a whole disk; with --incremental it needs --onto, and --onto-manifest, the manifest of that",
                );
            }
            let is_on_nothing = self.changes.is_some_and(|changes| changes.onto.is_none());
            if copy.verify && is_on_nothing {
                return refused(
                    "--verify compares whole disks; with --incremental it needs --onto, without which DST is none",
                );
            }
        }
        if target == Format::Raw && self.compress {
            return refused("--compress is for qcow2 images; say -O qcow2");
        }
        if target == Format::Raw && !copy.options.is_empty() {
            return refused("--options is for qcow2 images; say -O qcow2");
        }
        if target == Format::Qcow2 && reserves {
            return refused("--preallocation is for raw images; say -o preallocation=...");
        }
        Ok(())
    }

    /// The job that copies the source node to the target node. The bitmap stays as it is meanwhile: it is cleared by
    /// [`forgotten`](Self::forgotten), once what was copied is on the medium.
    pub(crate) fn work(&self) -> WorkSpec {
        let options = self.copy.options(self.kind);
        // Whole disks are compared afterwards, as the files have them then.
        let integrity = IntegritySpec {
            verify: false,
            // The job does not read all of the disk that it would tell of.
            manifest: options
                .integrity
                .manifest
                .filter(|_| self.changes.is_none()),
            ..options.integrity
        };
        match self.kind.work(options.speed, options.on_error, integrity) {
            WorkSpec::Backup(spec) => WorkSpec::Backup(BackupSpec {
                compress: self.compress,
                sync: match self.changes {
                    Some(_) => SyncMode::Bitmap,
                    None => SyncMode::Full,
                },
                bitmap: self.changes.map(|changes| changes.bitmap.to_owned()),
                bitmap_mode: self.changes.map(|_| BitmapMode::Never),
                ..spec
            }),
            other => other,
        }
    }

    /// What is done to the bitmap in the end, if something is.
    pub(crate) fn forgotten(&self) -> Option<BitmapChange> {
        let changes = self.changes.filter(|changes| !changes.keeps_bitmap)?;
        Some(BitmapChange::Clear(BitmapName {
            node: SOURCE.to_owned(),
            name: changes.bitmap.to_owned(),
        }))
    }
}

impl CopyArguments {
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
                // An increment's is written when the copy is whole, from the files as they are then.
                onto_manifest: None,
                verify: self.verify,
            },
        }
    }
}

fn speed(text: &str) -> Result<i64, String> {
    let bytes = size::parse(text).and_then(|bytes| i64::try_from(bytes).ok());
    bytes.ok_or_else(|| format!("expected {}", size::EXPECTED))
}
