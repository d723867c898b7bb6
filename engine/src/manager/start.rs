//! From a job's description to running work: checks in QEMU's order, the record, the filter and its edges, the driver.

use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::{MutexGuard, mpsc};

use crate::data::ThreadId;
use crate::error::{EngineError, JobError};
use crate::graph::{JobNodes, is_identifier};
use crate::job::context::{ErrorPolicies, JobContext, JobKey, JobShared};
use crate::job::status::{Status, Step};
use crate::job::work::Stop;
use crate::jobs;
use crate::manager::Manager;
use crate::manager::driver::{EndReport, drive};
use crate::manager::record::{GroupKey, JobRecord};
use crate::manager::verbs::negative_speed;
use crate::reply::IoStatus;
use crate::request::{CopyMode, CreateSpec, JobSpec, WorkSpec};

/// A job that exists and can start.
pub(super) struct Admitted {
    pub(super) key: JobKey,
    thread: ThreadId,
    work: WorkSpec,
    nodes: JobNodes,
    /// Why its work will fail before it begins.
    failed: Option<JobError>,
}

impl Manager {
    /// Starts a job; returns when it is running.
    ///
    /// # Errors
    /// As the command's; a job that already existed by then has come and gone with its two events.
    pub(super) async fn start(self: &Rc<Self>, spec: JobSpec) -> Result<(), EngineError> {
        let admitted = self.admit(spec, self.new_group()).await?;
        self.launch(admitted);
        Ok(())
    }

    /// A group that no job belongs to yet.
    pub(super) fn new_group(&self) -> GroupKey {
        GroupKey(self.jobs.borrow_mut().next_key())
    }

    /// Everything that can fail before a job runs. What a client may only hear from the job itself becomes its failure.
    pub(super) async fn admit(
        &self,
        spec: JobSpec,
        group: GroupKey,
    ) -> Result<Admitted, EngineError> {
        let told_by_job = tells_of_nodes(&spec.work);
        let (held, nodes, missing) = match self.prepare_nodes(&spec.work).await {
            Ok((held, nodes)) => (Some(held), nodes, None),
            Err(error) if told_by_job => (None, JobNodes::default(), Some(error)),
            Err(error) => return Err(error),
        };
        let key = match self.create(&spec, nodes.clone(), group) {
            Ok(key) => key,
            Err(error) => {
                self.graph.abandon(&nodes).await;
                return Err(error);
            }
        };
        let mut nodes = nodes;
        let brought_up = match (held, missing) {
            (Some(held), None) => self.bring_up(held, key, &spec, &mut nodes).await,
            (_, Some(error)) => Err(error),
            (None, None) => Err(EngineError::generic("The graph is not held (bug)")),
        };
        let error = match brought_up {
            Ok(thread) => {
                self.with_job(key, |job| job.nodes = Some(nodes.clone()));
                return Ok(Admitted {
                    key,
                    thread,
                    work: spec.work,
                    nodes,
                    failed: None,
                });
            }
            Err(error) => error,
        };
        self.with_job(key, |job| job.nodes = None);
        self.graph.detach_job(key, &nodes).await;
        if told_by_job {
            return Ok(Admitted {
                key,
                thread: self.threads.choose(),
                work: spec.work,
                nodes: JobNodes::default(),
                failed: Some(JobError::text(error.text)),
            });
        }
        self.jobs.borrow_mut().leave_group(key);
        self.dismiss(key);
        Err(error)
    }

    /// The nodes of a job that is to be; the graph is held from then on.
    async fn prepare_nodes(
        &self,
        work: &WorkSpec,
    ) -> Result<(MutexGuard<'_, ()>, JobNodes), EngineError> {
        let opened = self.graph.open_for_job(work).await?;
        let held = self.graph.hold_for(work, &opened).await;
        let nodes = self.graph.prepare_job(work, opened).await?;
        Ok((held, nodes))
    }

    /// Checks the id and takes the job in.
    fn create(
        &self,
        spec: &JobSpec,
        nodes: JobNodes,
        group: GroupKey,
    ) -> Result<JobKey, EngineError> {
        // Looking at the nodes may have taken until the daemon's end, which only knows the jobs that it found.
        if self.ending.get() {
            return Err(EngineError::generic("The daemon is ending"));
        }
        let id = spec.id.clone().unwrap_or_default();
        if !is_identifier(&id) {
            return Err(EngineError::generic(format!("Invalid job ID '{id}'")));
        }
        if self.jobs.borrow().by_id(&id).is_some() {
            return Err(EngineError::generic(format!(
                "Job ID '{id}' already in use"
            )));
        }
        let (speed, copy_mode) = match &spec.work {
            WorkSpec::Backup(backup) => (backup.speed, CopyMode::Background),
            WorkSpec::Mirror(mirror) => (mirror.speed, mirror.copy_mode),
            WorkSpec::Commit(commit) => (commit.speed, CopyMode::Background),
            WorkSpec::Stream(stream) => (stream.speed, CopyMode::Background),
            WorkSpec::Create(_) | WorkSpec::Amend(_) => (0, CopyMode::Background),
        };
        let mut jobs = self.jobs.borrow_mut();
        let key = JobKey(jobs.next_key());
        jobs.insert(JobRecord {
            key,
            id,
            job_type: spec.work.job_type(),
            work: spec.work.clone(),
            status: Status::Undefined,
            shared: Arc::new(JobShared::new(speed, copy_mode)),
            pause_count: 0,
            user_paused: false,
            cancelled: false,
            force_cancel: false,
            started: false,
            finished: false,
            error: None,
            logged_failure: None,
            io_status: IoStatus::Ok,
            chain: None,
            is_active_commit: nodes.chain.as_ref().is_some_and(|part| part.is_whole),
            auto_finalize: spec.auto_finalize,
            auto_dismiss: spec.auto_dismiss,
            group: Some(group),
            nodes: Some(nodes),
            thread: None,
            driver: None,
        });
        drop(jobs);
        self.journal.begin(key, spec);
        self.step(key, Step::Create);
        Ok(key)
    }

    /// What can still fail once the job exists. Its nodes are its own from the middle on, and the graph is free.
    async fn bring_up(
        &self,
        held: MutexGuard<'_, ()>,
        key: JobKey,
        spec: &JobSpec,
        nodes: &mut JobNodes,
    ) -> Result<ThreadId, EngineError> {
        let (id, speed) = self
            .with_job(key, |job| (job.id.clone(), job.shared.speed()))
            .ok_or_else(|| EngineError::generic("Job not found"))?;
        if speed < 0 {
            return Err(negative_speed());
        }
        self.graph.insert_late_filter(&spec.work, nodes).await?;
        self.graph
            .attach_job(key, &id, spec.work.job_type(), nodes)
            .await?;
        let thread = self.graph.place(held, nodes).await?;
        self.graph.open_chain_for_writing(key, nodes).await?;
        Ok(thread)
    }

    /// Starts the work on its thread. From here on everything is the lifecycle's.
    pub(super) fn launch(self: &Rc<Self>, job: Admitted) {
        let Admitted {
            key,
            thread,
            work,
            nodes,
            failed,
        } = job;
        let (driver, orders) = mpsc::unbounded_channel();
        let shared = self.with_job(key, |job| {
            job.started = true;
            job.driver = Some(driver);
            job.thread = Some(thread);
            job.shared.clone()
        });
        let Some(shared) = shared else {
            return;
        };
        self.threads.load(thread, 1);
        self.step(key, Step::Start);
        let policies = ErrorPolicies::of(&work);
        let (reports, pool) = (self.reports.clone(), self.pool.clone());
        // A thread that is gone drops the work, and with it the report: that is the job's end.
        let end = EndReport::owed(key, reports.clone());
        let _ = self.threads.spawn(thread, move |data| {
            Box::pin(async move {
                let cx = Rc::new(JobContext::new(
                    key,
                    shared,
                    reports,
                    data.clock().clone(),
                    pool,
                    policies,
                ));
                let work = match failed {
                    None => jobs::work(&work, &nodes, &data),
                    Some(error) => {
                        // The one step there was.
                        cx.progress().set_remaining(1);
                        cx.progress().done(1);
                        Err(error)
                    }
                };
                match work {
                    Ok(work) => drive(work, cx, end, orders).await,
                    Err(error) => end.send(Err(Stop::Failed(error))),
                }
            })
        });
    }
}

/// Whether what is wrong with the nodes is told by the job, as QEMU only looks at them when it runs.
const fn tells_of_nodes(work: &WorkSpec) -> bool {
    matches!(work, WorkSpec::Create(CreateSpec::Qcow2(_)))
}
