//! What clients ask of checkpoints of several disks, and what they see of them, as plain data.

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckpointRequest {
    /// Begin one, at one moment of all of its disks.
    Begin(CheckpointSpec),
    /// It is the checkpoint from now on.
    Commit {
        /// Which.
        id: String,
        /// The bitmaps of the checkpoint before stay, and go on recording.
        keep_previous: bool,
    },
    /// It comes to nothing.
    Abort {
        /// Which.
        id: String,
    },
    /// The same, as the client that began it is gone.
    AbortLost {
        /// Which: its [serial](CheckpointView::serial).
        serial: u64,
    },
    /// Tell of all.
    Query,
}

/// A checkpoint that is to begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointSpec {
    /// Its name.
    pub id: String,
    /// Its disks.
    pub disks: Vec<CheckpointDiskSpec>,
    /// Images keep its bitmaps, once it is committed; `None`: those that can.
    pub persistent: Option<bool>,
    /// It comes to nothing if the client leaves before it is committed.
    pub abort_on_disconnect: bool,
}

/// One disk of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointDiskSpec {
    /// Name of its node.
    pub node: String,
    /// Name of the new bitmap, which records from the moment of the checkpoint.
    pub bitmap: String,
    /// Name of the bitmap of the checkpoint before; `None`: there was none.
    pub previous: Option<String>,
    /// Bytes that one bit of the new bitmap stands for.
    pub granularity_bytes: Option<u32>,
}

/// A checkpoint that has begun and has not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointView {
    /// Its name.
    pub id: String,
    /// No other one ever had or has it.
    pub serial: u64,
    /// Its disks.
    pub disks: Vec<CheckpointDiskView>,
}

/// One disk of such a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointDiskView {
    /// Name of its node.
    pub node: String,
    /// Name of the new bitmap.
    pub bitmap: String,
    /// Name of the bitmap of the checkpoint before.
    pub previous: Option<String>,
    /// Name of the bitmap that says what had changed since that one; it stays as it is.
    pub changed: Option<String>,
    /// The image keeps the new bitmap, once it is committed.
    pub persistent: bool,
}
