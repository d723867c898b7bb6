//! What a mirror is told, as clients describe it: [`MirrorSpec`], [`CopyMode`], [`NewTargetSpec`].

use crate::job::error_policy::OnError;
use crate::request::{BitmapMode, IntegritySpec, SyncMode};

/// How a mirror treats writes while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyMode {
    /// Copied later.
    Background,
    /// Copied before the write ends.
    WriteBlocking,
}

/// Arguments of `blockdev-mirror` and `drive-mirror`.
#[derive(Clone, Debug, PartialEq)]
pub struct MirrorSpec {
    /// Source node.
    pub device: String,
    /// Target node. Not looked at where there is a [new target](Self::new_target).
    pub target: String,
    /// The target is described by its file.
    pub new_target: Option<NewTargetSpec>,
    /// Node that the target takes the place of; `None`: the source.
    pub replaces: Option<String>,
    /// How much.
    pub sync: SyncMode,
    /// Name of a bitmap of the source.
    pub bitmap: Option<String>,
    /// What to do to it.
    pub bitmap_mode: Option<BitmapMode>,
    /// Limit in bytes per second; 0: none.
    pub speed: i64,
    /// Unit of dirty tracking in bytes; `None`: from the target.
    pub granularity: Option<u32>,
    /// Bytes in flight at most; `None` or 0: 16 MiB.
    pub buf_size: Option<i64>,
    /// When reading fails.
    pub on_source_error: OnError,
    /// When writing fails.
    pub on_target_error: OnError,
    /// Zeroed ranges of the target may become holes.
    pub unmap: bool,
    /// The target reads as zeroes everywhere when the job begins.
    pub target_is_zero: bool,
    /// Name of the filter node.
    pub filter_node_name: Option<String>,
    /// How writes are treated.
    pub copy_mode: CopyMode,
    /// Checksums of what is copied.
    pub integrity: IntegritySpec,
}

impl Default for MirrorSpec {
    /// What is left out on the wire; no nodes are named.
    fn default() -> Self {
        Self {
            device: String::new(),
            target: String::new(),
            new_target: None,
            replaces: None,
            sync: SyncMode::Full,
            bitmap: None,
            bitmap_mode: None,
            speed: 0,
            granularity: None,
            buf_size: None,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            unmap: true,
            target_is_zero: false,
            filter_node_name: None,
            copy_mode: CopyMode::Background,
            integrity: IntegritySpec::default(),
        }
    }
}

/// A target that a job opens by its file, and makes before unless it is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewTargetSpec {
    /// The file, as queries show it.
    pub filename: String,
    /// Name of the target's node; `None`: one is made up.
    pub node_name: Option<String>,
    /// Its format; `None`: the source's.
    pub format: Option<String>,
    /// It is there already.
    pub exists: bool,
}
