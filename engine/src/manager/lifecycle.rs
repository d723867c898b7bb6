//! The life of a job after its start: reports become steps, ends become results, groups end together.
//!
//! The order of everything here is what clients see: the legacy event before `concluded`, a failing job's `aborting` before
//! the ends of its group, members newest first.

use std::rc::Rc;

use tokio::sync::oneshot;

use crate::error::JobError;
use crate::event::EventKind;
use crate::job::context::{CancelMode, JobKey, Report};
use crate::job::error_policy::ErrorAction;
use crate::job::status::{Status, Step, next};
use crate::job::work::Stop;
use crate::manager::Manager;
use crate::manager::driver::{DriverOrder, bug};
use crate::manager::record::{GroupKey, JobRecord};
use crate::reply::IoStatus;
use crate::request::WorkSpec;
use crate::throttle::group::Suspended;
use blockyard_storage::error::ECANCELED;

impl Manager {
    /// Reads or changes one job; `None` if it is gone.
    pub(super) fn with_job<T>(
        &self,
        key: JobKey,
        change: impl FnOnce(&mut JobRecord) -> T,
    ) -> Option<T> {
        self.jobs.borrow_mut().by_key_mut(key).map(change)
    }

    /// Takes a step and tells everybody. The only place where a status changes.
    pub(super) fn step(&self, key: JobKey, step: Step) {
        let changed = self.with_job(key, |job| {
            let Some(status) = next(job.status, step) else {
                debug_assert!(false, "{:?} does not allow {step:?}", job.status);
                tracing::error!(job = job.id, status = ?job.status, ?step, "step not allowed (bug)");
                return None;
            };
            let changed = status != job.status;
            job.status = status;
            changed.then(|| (job.id.clone(), status))
        });
        if let Some(Some((id, status))) = changed {
            self.publisher
                .publish(EventKind::JobStatusChange { id, status });
        }
        self.changed.notify_waiters();
    }

    /// Ends once `condition` holds for the job, or it is gone.
    pub(super) async fn until(&self, key: JobKey, condition: impl Fn(&JobRecord) -> bool) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.jobs.borrow().by_key(key).is_none_or(&condition) {
                return;
            }
            changed.await;
        }
    }

    /// Ends once no group of this job is being finalized or aborted.
    pub(super) async fn until_settled(&self, key: JobKey) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if !self.jobs.borrow().settling(key) {
                return;
            }
            changed.await;
        }
    }

    /// Hears one report of a job's work.
    pub(crate) fn hear(self: &Rc<Self>, key: JobKey, report: Report) {
        match report {
            Report::Parked => self.step(key, Step::Park),
            Report::Unparked => self.step(key, Step::Unpark),
            Report::Converged { heard } => {
                self.step(key, Step::Converge);
                if let Some(figures) = self.with_job(key, |job| job.figures()) {
                    self.publisher.publish(EventKind::BlockJobReady(figures));
                }
                let _ = heard.send(());
            }
            Report::IoError {
                side,
                action,
                no_space,
                error,
                heard,
            } => {
                let noted = self.with_job(key, |job| (job.id.clone(), job.is_news(&error)));
                let (id, is_news) = noted.unwrap_or_default();
                if is_news {
                    tracing::warn!(job = id, %error, ?action, "a request of a job failed");
                } else {
                    tracing::debug!(job = id, %error, ?action, "a request of a job failed again");
                }
                self.publisher
                    .publish(EventKind::BlockJobError { id, side, action });
                if action == ErrorAction::Stop {
                    self.with_job(key, |job| stop_for_error(job, no_space));
                }
                let _ = heard.send(());
            }
            Report::Remember { cursor, recorded } => {
                self.journal.remember(key, cursor);
                let _ = recorded.send(Ok(()));
            }
            Report::Ended(outcome) => {
                let manager = self.clone();
                tokio::task::spawn_local(async move { manager.ended(key, outcome).await });
            }
        }
    }

    /// The work has returned.
    pub(super) async fn ended(&self, key: JobKey, outcome: Result<(), Stop>) {
        let failed = self.with_job(key, |job| {
            job.finished = true;
            job.shared.set_busy(false);
            match outcome {
                Ok(()) if job.is_done_for_good() => {
                    // A cancel that came when it was about to end.
                    (job.cancelled, job.force_cancel) = (false, false);
                }
                Ok(()) if job.force_cancel => fail_with(job, JobError::errno(ECANCELED)),
                Ok(()) => {}
                Err(Stop::Cancelled) => fail_with(job, JobError::errno(ECANCELED)),
                Err(Stop::Failed(error)) => fail_with(job, error),
            }
            job.error.is_some()
        });
        match failed {
            Some(true) => {
                self.step(key, Step::Fail);
                self.abort_group(key).await;
            }
            Some(false) => self.succeeded(key).await,
            None => {}
        }
    }

    /// A job ended well: if it was the last of its group, the group is done.
    async fn succeeded(&self, key: JobKey) {
        self.step(key, Step::Finish);
        let Some(Some(group)) = self.with_job(key, |job| job.group) else {
            return;
        };
        let members = self.jobs.borrow().members(group);
        let all_ended = members.iter().all(|member| {
            self.with_job(*member, |job| job.status == Status::Waiting)
                .unwrap_or(true)
        });
        if !all_ended {
            return;
        }
        let mut by_itself = true;
        for member in &members {
            self.step(*member, Step::Gather);
            let pending = self.with_job(*member, |job| {
                (!job.auto_finalize).then(|| EventKind::BlockJobPending {
                    job_type: job.job_type,
                    id: job.id.clone(),
                })
            });
            if let Some(Some(event)) = pending {
                by_itself = false;
                self.publisher.publish(event);
            }
        }
        if by_itself {
            self.finalize_group(group).await;
        }
    }

    /// Finalizes every member: all prepare, then all apply; the first that cannot prepare aborts them all.
    pub(super) async fn finalize_group(&self, group: GroupKey) {
        self.set_settling(group, true);
        let members = self.jobs.borrow().members(group);
        let _unlimited = self.suspend_limits(&members);
        for member in &members {
            if let Err(error) = self.prepare(*member).await {
                self.with_job(*member, |job| fail_with(job, error));
                self.step(*member, Step::Fail);
                self.abort_group(*member).await;
                return;
            }
        }
        for member in members {
            self.finalize_one(member).await;
        }
        self.set_settling(group, false);
    }

    /// Headers are written and users drained at once, whatever limits there are, as whoever ends the jobs waits for it.
    fn suspend_limits(&self, members: &[JobKey]) -> Vec<Suspended> {
        let suspended = members.iter().filter_map(|member| {
            let nodes = self.with_job(*member, |job| job.nodes.clone())??;
            Some(self.graph.suspend_limits_of_job(&nodes))
        });
        suspended.flatten().collect()
    }

    /// The last chance of one job to fail: graph changes first, then its own.
    async fn prepare(&self, key: JobKey) -> Result<(), JobError> {
        let facts = self.with_job(key, |job| {
            let pivots = job.keeps_equal() && job.shared.complete_ordered();
            let replaces = match &job.work {
                WorkSpec::Mirror(spec) => spec.replaces.clone(),
                _ => None,
            };
            (
                job.error.is_some(),
                job.keeps_equal(),
                job.is_active_commit,
                pivots,
                replaces,
                job.nodes.clone(),
                job.driver.clone(),
            )
        });
        let Some((false, keeps_equal, is_commit, pivots, replaces, nodes, driver)) = facts else {
            return Ok(());
        };
        if let Some(nodes) = nodes {
            if pivots && is_commit {
                self.graph.finish_active_commit(key, &nodes).await?;
            } else if pivots {
                self.graph.complete_target(&nodes).await?;
                self.graph.pivot(key, &nodes, replaces.as_deref()).await?;
            } else if !keeps_equal {
                self.graph.finish_chain(key, &nodes).await?;
            }
            if keeps_equal && is_commit {
                self.graph.keep_writable(key, &nodes);
            }
        }
        let Some(driver) = driver else {
            return Ok(());
        };
        let (answer, prepared) = oneshot::channel();
        let _ = driver.send(DriverOrder::Prepare(answer));
        prepared
            .await
            .unwrap_or_else(|_| Err(bug("the job's thread is gone")))
    }

    /// One job failed or was cancelled for good: every member of its group ends.
    pub(super) async fn abort_group(&self, key: JobKey) {
        let Some(Some(group)) = self.with_job(key, |job| job.group) else {
            return;
        };
        let already = self.jobs.borrow_mut().group_mut(group).is_none_or(|group| {
            group.settling = true;
            std::mem::replace(&mut group.aborting, true)
        });
        if already {
            return;
        }
        let members = self.jobs.borrow().members(group);
        for member in members.iter().filter(|member| **member != key) {
            self.request_cancel(*member, true);
        }
        for member in members {
            self.until(member, |job| job.finished || !job.started).await;
            self.finalize_one(member).await;
        }
        self.set_settling(group, false);
    }

    /// Makes one result final and public.
    async fn finalize_one(&self, key: JobKey) {
        let aborts = self.with_job(key, |job| {
            if job.error.is_none() && job.force_cancel {
                fail_with(job, JobError::errno(ECANCELED));
            }
            job.error.is_some()
        });
        let Some(aborts) = aborts else {
            return;
        };
        if aborts {
            self.step(key, Step::Fail);
        }
        self.settle_work(key, aborts).await;
        if let Some(Some(nodes)) = self.with_job(key, |job| job.nodes.take()) {
            self.graph.detach_job(key, &nodes).await;
            self.with_job(key, |job| {
                let has_pivoted = !aborts && job.keeps_equal() && job.shared.complete_ordered();
                job.chain = self.graph.chain_after(&nodes, has_pivoted);
            });
        }
        let end = self.with_job(key, |job| {
            if let Some(thread) = job.thread.take() {
                self.threads.load(thread, -1);
            }
            job.error.clone()
        });
        self.journal.end(key, end.flatten().map_or(Ok(()), Err));
        let event = self.with_job(key, |job| {
            (job.started && job.is_block_job()).then(|| end_event(job))
        });
        if let Some(Some(event)) = event {
            self.publisher.publish(event);
        }
        self.jobs.borrow_mut().leave_group(key);
        self.step(key, if aborts { Step::Clean } else { Step::Finalize });
        if self.with_job(key, |job| job.auto_dismiss || !job.started) == Some(true) {
            self.dismiss(key);
        }
    }

    /// Lets the work apply or revert, and lets go of it.
    async fn settle_work(&self, key: JobKey, aborts: bool) {
        if let Some(Some(driver)) = self.with_job(key, |job| job.driver.take()) {
            let (answer, done) = oneshot::channel();
            let order = if aborts {
                DriverOrder::Revert(answer)
            } else {
                DriverOrder::Apply(answer)
            };
            let _ = driver.send(order);
            // An answer that never comes means that the thread is gone, and with it what there was to settle.
            let _ = done.await;
        }
    }

    /// Forgets a concluded job, or one that never started.
    pub(super) fn dismiss(&self, key: JobKey) {
        self.step(key, Step::Dismiss);
        self.graph.release_job(key);
        if let Some(entry) = self.journal.forget(key) {
            tracing::debug!(?entry, "job dismissed");
        }
        self.jobs.borrow_mut().remove(key);
        self.changed.notify_waiters();
    }

    /// Asks a job to end early. Does not wait for it.
    pub(super) fn request_cancel(&self, key: JobKey, force: bool) {
        self.with_job(key, |job| {
            let soft_allowed = job.keeps_equal() && job.is_ready();
            let force = force || !soft_allowed;
            job.end_user_pause();
            if job.is_done_for_good() {
                return;
            }
            if force || !job.finished {
                job.cancelled = true;
                job.force_cancel |= force;
                job.shared.order_cancel(if force {
                    CancelMode::Force
                } else {
                    CancelMode::Soft
                });
            }
        });
        self.changed.notify_waiters();
    }

    /// Cancels a job; one whose work is over already ends here and now, with its group.
    pub(super) async fn cancel(&self, key: JobKey, force: bool) {
        self.request_cancel(key, force);
        let state = self.with_job(key, |job| (job.started, job.finished, job.force_cancel));
        match state {
            Some((false, _, _)) => {
                self.ended(key, Err(Stop::Cancelled)).await;
            }
            Some((true, true, true)) => self.abort_group(key).await,
            _ => {}
        }
    }

    fn set_settling(&self, group: GroupKey, settling: bool) {
        if let Some(group) = self.jobs.borrow_mut().group_mut(group) {
            group.settling = settling;
        }
        self.changed.notify_waiters();
    }
}

/// The first error is the job's error.
fn fail_with(job: &mut JobRecord, error: JobError) {
    job.error.get_or_insert(error);
}

/// An error stop: a pause that the user has to take back. The first error since the last resume shows.
fn stop_for_error(job: &mut JobRecord, no_space: bool) {
    if job.force_cancel {
        return;
    }
    if !job.user_paused {
        job.user_paused = true;
        job.pause_count += 1;
        job.order_pause();
    }
    if job.io_status == IoStatus::Ok {
        job.io_status = if no_space {
            IoStatus::NoSpace
        } else {
            IoStatus::Failed
        };
    }
}

/// The last event of a block job.
fn end_event(job: &JobRecord) -> EventKind {
    if job.force_cancel {
        EventKind::BlockJobCancelled(job.figures())
    } else {
        EventKind::BlockJobCompleted {
            job: job.figures(),
            error: job.error.as_ref().map(|error| error.text.clone()),
        }
    }
}
