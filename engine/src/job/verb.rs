//! The verbs of a job, and which status accepts which. Pure.

use crate::job::status::Status;
use crate::request::CopyMode;

/// What kind of work a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobType {
    /// Merging a layer down.
    Commit,
    /// Pulling data up.
    Stream,
    /// Copying and keeping equal.
    Mirror,
    /// Copying one point in time.
    Backup,
    /// Creating an image.
    Create,
    /// Changing an image's options.
    Amend,
}

impl JobType {
    /// The type as clients spell it.
    pub const fn name(self) -> &'static str {
        match self {
            JobType::Commit => "commit",
            JobType::Stream => "stream",
            JobType::Mirror => "mirror",
            JobType::Backup => "backup",
            JobType::Create => "create",
            JobType::Amend => "amend",
        }
    }

    /// Whether the older `block-job-*` commands and `BLOCK_JOB_*` events know it.
    pub const fn is_block_job(self) -> bool {
        !matches!(self, JobType::Create | JobType::Amend)
    }
}

/// What a client may ask of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// Give up.
    Cancel,
    /// Become quiet.
    Pause,
    /// Go on.
    Resume,
    /// Change the rate limit.
    SetSpeed,
    /// Switch over and end.
    Complete,
    /// Make the result final.
    Finalize,
    /// Forget the result.
    Dismiss,
    /// Change an option of the running job.
    Change,
}

impl Verb {
    /// Every verb.
    pub const ALL: [Verb; 8] = [
        Verb::Cancel,
        Verb::Pause,
        Verb::Resume,
        Verb::SetSpeed,
        Verb::Complete,
        Verb::Finalize,
        Verb::Dismiss,
        Verb::Change,
    ];

    /// The verb as error texts spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
            Verb::Change => "change",
        }
    }
}

/// A verb with its arguments.
#[derive(Clone, Debug, PartialEq)]
pub enum VerbCall {
    /// Give up; without `force` a ready mirror ends well.
    Cancel {
        /// Stop as soon as possible.
        force: bool,
    },
    /// Become quiet.
    Pause,
    /// Go on.
    Resume,
    /// Change the rate limit.
    SetSpeed {
        /// Bytes per second; 0: none.
        speed: i64,
    },
    /// Switch over and end.
    Complete,
    /// Make the result final.
    Finalize,
    /// Forget the result.
    Dismiss,
    /// Change an option of the running job.
    Change {
        /// New copy mode, for a mirror; other types take no change.
        copy_mode: Option<CopyMode>,
    },
}

impl VerbCall {
    /// The verb without its arguments.
    pub const fn verb(&self) -> Verb {
        match self {
            VerbCall::Cancel { .. } => Verb::Cancel,
            VerbCall::Pause => Verb::Pause,
            VerbCall::Resume => Verb::Resume,
            VerbCall::SetSpeed { .. } => Verb::SetSpeed,
            VerbCall::Complete => Verb::Complete,
            VerbCall::Finalize => Verb::Finalize,
            VerbCall::Dismiss => Verb::Dismiss,
            VerbCall::Change { .. } => Verb::Change,
        }
    }
}

/// Which statuses accept which verbs: one row a verb.
pub const VERBS: &[(Verb, &[Status])] = {
    use Status::*;
    &[
        (
            Verb::Cancel,
            &[Created, Running, Paused, Ready, Standby, Waiting, Pending],
        ),
        (Verb::Pause, &[Created, Running, Paused, Ready, Standby]),
        (Verb::Resume, &[Created, Running, Paused, Ready, Standby]),
        (Verb::SetSpeed, &[Created, Running, Paused, Ready, Standby]),
        (Verb::Complete, &[Ready, Standby]),
        (Verb::Finalize, &[Pending]),
        (Verb::Dismiss, &[Concluded]),
        (Verb::Change, &[Created, Running, Paused, Ready, Standby]),
    ]
};

/// Whether `status` accepts `verb`.
pub fn accepts(status: Status, verb: Verb) -> bool {
    VERBS
        .iter()
        .any(|(row, statuses)| *row == verb && statuses.contains(&status))
}
