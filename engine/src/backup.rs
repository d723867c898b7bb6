//! [`BackupSpec`] and [`CbwSpec`]: what a backup and a `copy-before-write` node are told, and what becomes of writes when something
//! cannot be saved.

use std::path::PathBuf;

use crate::job::error_policy::OnError;
use crate::request::{BitmapMode, NewTargetSpec, NodeRef, SyncMode};

/// Arguments of `blockdev-backup` and `drive-backup`.
#[derive(Clone, Debug, PartialEq)]
pub struct BackupSpec {
    /// Source node.
    pub device: String,
    /// Target node. Not looked at where there is a [new target](Self::new_target).
    pub target: String,
    /// The target is described by its file.
    pub new_target: Option<NewTargetSpec>,
    /// How much.
    pub sync: SyncMode,
    /// Limit in bytes per second; 0: none.
    pub speed: i64,
    /// Name of a bitmap.
    pub bitmap: Option<String>,
    /// What to do to it.
    pub bitmap_mode: Option<BitmapMode>,
    /// Write compressed clusters.
    pub compress: bool,
    /// When reading fails.
    pub on_source_error: OnError,
    /// When writing fails.
    pub on_target_error: OnError,
    /// Name of the filter node.
    pub filter_node_name: Option<String>,
    /// Discard the source behind the copy.
    pub discard_source: bool,
    /// Tuning.
    pub perf: BackupPerf,
    /// When what is about to be changed cannot be saved.
    pub cbw: CbwOptions,
    /// Checksums of what is copied.
    pub integrity: IntegritySpec,
}

/// What is done about checksums of a copy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IntegritySpec {
    /// Where they are written down once the copy is whole.
    pub manifest: Option<PathBuf>,
    /// That file may be there already, and is replaced.
    pub replaces_manifest: bool,
    /// The manifest of what the target is laid onto: what has not changed since is taken over from there, and not read.
    pub onto_manifest: Option<PathBuf>,
    /// The target is read back and compared with them before the job ends well.
    pub verify: bool,
}

impl IntegritySpec {
    /// Whether there are any.
    pub fn is_wanted(&self) -> bool {
        self.manifest.is_some() || self.verify
    }
}

impl Default for BackupSpec {
    /// What is left out on the wire; no nodes are named.
    fn default() -> Self {
        Self {
            device: String::new(),
            target: String::new(),
            new_target: None,
            sync: SyncMode::Full,
            speed: 0,
            bitmap: None,
            bitmap_mode: None,
            compress: false,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            filter_node_name: None,
            discard_source: false,
            perf: BackupPerf::default(),
            cbw: CbwOptions::default(),
            integrity: IntegritySpec::default(),
        }
    }
}

/// `x-perf` of `blockdev-backup`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupPerf {
    /// Allow copying inside the file system.
    pub use_copy_range: bool,
    /// Requests in flight at most.
    pub max_workers: i64,
    /// Bytes per request at most; 0: no limit.
    pub max_chunk: i64,
    /// Smallest unit of copying in bytes.
    pub min_cluster_size: u64,
}

impl Default for BackupPerf {
    fn default() -> Self {
        Self {
            use_copy_range: false,
            max_workers: 64,
            max_chunk: 0,
            min_cluster_size: 0,
        }
    }
}

/// Options of `copy-before-write`.
#[derive(Clone, Debug, PartialEq)]
pub struct CbwSpec {
    /// The node whose data is saved before it is changed.
    pub file: NodeRef,
    /// Where to.
    pub target: NodeRef,
    /// What of it.
    pub bitmap: Option<CbwBitmap>,
    /// How.
    pub options: CbwOptions,
    /// Smallest unit of copying in bytes; 0: as the target's.
    pub min_cluster_size: u64,
}

/// A bitmap that says what is saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CbwBitmap {
    /// Its node.
    pub node: String,
    /// Its name there.
    pub name: String,
}

/// What becomes of a write when what it is about to change cannot be saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCbwError {
    /// The write fails: what was there stays.
    #[default]
    BreakGuestWrite,
    /// It goes on, and what was saved is worth nothing any more.
    BreakSnapshot,
}

/// How a filter saves what is about to be changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CbwOptions {
    /// When it cannot be saved.
    pub on_error: OnCbwError,
    /// After so many seconds it could not; 0: never.
    pub timeout_seconds: u32,
}
