//! The trait [`Work`]: what a kind of job does, apart from everything that all jobs share.
//!
//! A job runs; then all jobs of its transaction prepare; then each applies or each reverts.

use blockyard_storage::LocalFuture;

use crate::error::{EngineError, JobError};
use crate::job::context::JobContext;

/// Why the work stopped before its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// On request. Nothing is in flight any more.
    Cancelled,
    /// It failed.
    Failed(JobError),
}

impl From<EngineError> for Stop {
    fn from(error: EngineError) -> Self {
        Stop::Failed(JobError::text(error.text))
    }
}

impl From<JobError> for Stop {
    fn from(error: JobError) -> Self {
        Stop::Failed(error)
    }
}

/// The work of one job, on a data thread.
pub trait Work {
    /// Does the work. When it returns, nothing it started is in flight, and on success everything it promised is
    /// durable.
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> LocalFuture<'a, Result<(), Stop>>;

    /// The last chance to fail, when the whole transaction has run well.
    fn prepare<'a>(&'a mut self, cx: &'a JobContext) -> LocalFuture<'a, Result<(), JobError>> {
        let _ = cx;
        Box::pin(async { Ok(()) })
    }

    /// Makes the result final. Cannot fail.
    fn apply(&mut self) {}

    /// Takes back what a failed or cancelled job did, as far as it must be. Cannot fail.
    fn revert(&mut self) {}
}
