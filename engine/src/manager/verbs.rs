//! What clients may ask of a running job: lookups, checks in QEMU's order, then orders.
//!
//! A verb returns once its order is given. Where the job is parked, so that the consequence is immediate, it waits for it
//! (bounded), so that the events come before the reply as clients are used to.

use std::time::Duration;

use crate::error::EngineError;
use crate::job::context::JobKey;
use crate::job::status::Status;
use crate::job::verb::{JobType, Verb, VerbCall, accepts};
use crate::manager::Manager;
use crate::reply::IoStatus;
use crate::request::{CopyMode, VerbFamily, WorkSpec};

/// How long a verb waits for a consequence that should be immediate.
const CONSEQUENCE_WAIT: Duration = Duration::from_millis(500);

impl Manager {
    /// Carries out one verb.
    pub(super) async fn verb(
        &self,
        family: VerbFamily,
        id: &str,
        call: VerbCall,
    ) -> Result<(), EngineError> {
        let key = self.look_up(family, id)?;
        // Creation and start are one step for clients, whoever hears of it in between.
        self.until(key, |job| job.started).await;
        self.until_settled(key).await;
        // The job may have gone meanwhile.
        let key = self.look_up(family, id)?;
        match call {
            VerbCall::Pause => self.pause(key).await,
            VerbCall::Resume => self.resume(key).await,
            VerbCall::Cancel { force } => {
                let soft_family = family == VerbFamily::BlockJob && !force;
                self.cancel_verb(key, force || family == VerbFamily::Job, soft_family)
                    .await
            }
            VerbCall::Complete => self.complete(key),
            VerbCall::SetSpeed { speed } => self.set_speed(key, speed),
            VerbCall::Change { copy_mode } => self.change(key, copy_mode),
            VerbCall::Finalize => {
                let group = self.check(key, Verb::Finalize, |job| job.group)?;
                if let Some(group) = group {
                    self.finalize_group(group).await;
                }
                Ok(())
            }
            VerbCall::Dismiss => {
                self.check(key, Verb::Dismiss, |_| ())?;
                self.dismiss(key);
                Ok(())
            }
        }
    }

    fn look_up(&self, family: VerbFamily, id: &str) -> Result<JobKey, EngineError> {
        let jobs = self.jobs.borrow();
        let job = jobs.by_id(id);
        match family {
            VerbFamily::Job => job
                .map(|job| job.key)
                .ok_or_else(|| EngineError::generic("Job not found")),
            VerbFamily::BlockJob => job
                .filter(|job| job.is_block_job())
                .map(|job| job.key)
                .ok_or_else(|| EngineError::no_block_job(id)),
        }
    }

    /// Checks the verb against the status and, if it is accepted, reads from the job.
    fn check<T>(
        &self,
        key: JobKey,
        verb: Verb,
        read: impl FnOnce(&mut super::record::JobRecord) -> T,
    ) -> Result<T, EngineError> {
        let checked = self.with_job(key, |job| {
            if accepts(job.status, verb) {
                Ok(read(job))
            } else {
                Err(EngineError::generic(format!(
                    "Job '{}' in state '{}' cannot accept command verb '{}'",
                    job.id,
                    job.status.name(),
                    verb.name()
                )))
            }
        });
        checked.unwrap_or_else(|| Err(EngineError::generic("Job not found")))
    }

    async fn pause(&self, key: JobKey) -> Result<(), EngineError> {
        let parked = self.check(key, Verb::Pause, |job| {
            if job.user_paused {
                return Err(EngineError::generic("Job is already paused"));
            }
            let parked = !job.shared.busy() && job.started;
            job.user_paused = true;
            job.pause_count += 1;
            job.order_pause();
            Ok(parked)
        })??;
        if parked {
            self.soon(key, |status| {
                matches!(status, Status::Paused | Status::Standby)
            })
            .await;
        }
        Ok(())
    }

    async fn resume(&self, key: JobKey) -> Result<(), EngineError> {
        let user_paused = self.with_job(key, |job| job.user_paused).unwrap_or(false);
        if !user_paused {
            return Err(EngineError::generic(
                "Can't resume a job that was not paused",
            ));
        }
        let parked = self.check(key, Verb::Resume, |job| {
            let parked = matches!(job.status, Status::Paused | Status::Standby);
            job.user_paused = false;
            job.io_status = IoStatus::Ok;
            job.pause_count = job.pause_count.saturating_sub(1);
            job.order_pause();
            parked && job.pause_count == 0
        })?;
        if parked {
            self.soon(key, |status| {
                !matches!(status, Status::Paused | Status::Standby)
            })
            .await;
        }
        Ok(())
    }

    async fn cancel_verb(
        &self,
        key: JobKey,
        force: bool,
        refuses_paused: bool,
    ) -> Result<(), EngineError> {
        let refused = self.with_job(key, |job| {
            (refuses_paused && job.user_paused).then(|| {
                EngineError::generic(format!(
                    "The block job for device '{}' is currently paused",
                    job.id
                ))
            })
        });
        if let Some(Some(error)) = refused {
            return Err(error);
        }
        let parked = self.check(key, Verb::Cancel, |job| {
            matches!(job.status, Status::Paused | Status::Standby)
        })?;
        self.cancel(key, force).await;
        if parked {
            self.soon(key, |status| {
                matches!(status, Status::Concluded | Status::Null)
            })
            .await;
        }
        Ok(())
    }

    fn complete(&self, key: JobKey) -> Result<(), EngineError> {
        let replaces = self.check(key, Verb::Complete, |job| {
            if job.cancelled || !job.keeps_equal() {
                return Err(EngineError::generic(format!(
                    "The active block job '{}' cannot be completed",
                    job.id
                )));
            }
            Ok(match &job.work {
                WorkSpec::Mirror(spec) => spec.replaces.clone(),
                _ => None,
            })
        })??;
        if let Some(name) = replaces
            && self.graph.find(&name).is_none()
        {
            return Err(EngineError::generic(format!(
                "Node name '{name}' not found"
            )));
        }
        self.with_job(key, |job| job.shared.order_complete());
        Ok(())
    }

    fn set_speed(&self, key: JobKey, speed: i64) -> Result<(), EngineError> {
        self.check(key, Verb::SetSpeed, |job| {
            if speed < 0 {
                return Err(negative_speed());
            }
            job.shared.order_speed(speed);
            Ok(())
        })?
    }

    fn change(&self, key: JobKey, copy_mode: Option<CopyMode>) -> Result<(), EngineError> {
        self.check(key, Verb::Change, |job| {
            if job.job_type != JobType::Mirror {
                return Err(EngineError::generic("Job type does not support change"));
            }
            match (job.shared.copy_mode(), copy_mode) {
                (CopyMode::WriteBlocking, Some(CopyMode::Background)) => Err(EngineError::generic(
                    "Change to copy mode 'background' is not implemented",
                )),
                (CopyMode::Background, Some(CopyMode::WriteBlocking)) => {
                    job.shared.order_copy_mode(CopyMode::WriteBlocking);
                    Ok(())
                }
                _ => Ok(()),
            }
        })?
    }

    /// Waits for a status that should come at once, but not for ever.
    async fn soon(&self, key: JobKey, wanted: impl Fn(Status) -> bool) {
        let reached = self.until(key, |job| {
            wanted(job.status) || job.status == Status::Concluded
        });
        let _ = tokio::time::timeout(CONSEQUENCE_WAIT, reached).await;
    }
}

/// The error for a rate limit below zero.
pub(super) fn negative_speed() -> EngineError {
    EngineError::generic("Parameter 'speed' expects a non-negative value")
}
