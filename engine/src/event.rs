//! [`Event`]: everything a listener may hear, as plain data.

use std::time::SystemTime;

use crate::job::error_policy::{ErrorAction, Side};
use crate::job::status::Status;
use crate::job::verb::JobType;

/// Something that happened, and when.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Wall-clock time of emission.
    pub time: SystemTime,
    /// What happened.
    pub kind: EventKind,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum EventKind {
    /// `JOB_STATUS_CHANGE`.
    JobStatusChange {
        /// Job id.
        id: String,
        /// Its new status.
        status: Status,
    },
    /// `BLOCK_JOB_COMPLETED`.
    BlockJobCompleted {
        /// The job at that moment.
        job: BlockJobFigures,
        /// Why it failed, if it did.
        error: Option<String>,
    },
    /// `BLOCK_JOB_CANCELLED`.
    BlockJobCancelled(BlockJobFigures),
    /// `BLOCK_JOB_READY`.
    BlockJobReady(BlockJobFigures),
    /// `BLOCK_JOB_PENDING`.
    BlockJobPending {
        /// Its type.
        job_type: JobType,
        /// Job id.
        id: String,
    },
    /// `BLOCK_JOB_ERROR`.
    BlockJobError {
        /// Job id.
        id: String,
        /// Reading or writing.
        side: Side,
        /// What is done about it.
        action: ErrorAction,
    },
    /// `BLOCK_EXPORT_DELETED`.
    BlockExportDeleted {
        /// Id of the export.
        id: String,
    },
    /// `BLOCK_IMAGE_CORRUPTED`.
    BlockImageCorrupted {
        /// Name of the image's node.
        node_name: String,
        /// What is wrong.
        message: String,
        /// Where in the file, in bytes, if that is known.
        offset: Option<u64>,
        /// How many bytes it is about.
        size: Option<u64>,
        /// The node takes no further request.
        fatal: bool,
    },
}

/// The figures of a block job that its events carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockJobFigures {
    /// Its type.
    pub job_type: JobType,
    /// Job id.
    pub id: String,
    /// Bytes expected in all.
    pub total_bytes: u64,
    /// Bytes done.
    pub current_bytes: u64,
    /// Rate limit in bytes per second; 0: none.
    pub speed: i64,
}
