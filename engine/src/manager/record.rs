//! [`JobRecord`] and [`JobTable`]: what the manager knows of its jobs, and how queries see it.

use std::sync::Arc;

use tokio::sync::mpsc;

use crate::data::ThreadId;
use crate::error::{JobError, NodeError};
use crate::event::BlockJobFigures;
use crate::graph::JobNodes;
use crate::job::context::{JobKey, JobShared};
use crate::job::rates::RatesView;
use crate::job::status::Status;
use crate::job::verb::JobType;
use crate::manager::driver::DriverOrder;
use crate::reply::{BlockJobView, IoStatus, JobView, LayerView};
use crate::request::WorkSpec;

/// Jobs that end together or not at all; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GroupKey(pub(super) u64);

/// What the manager knows of one job.
pub(super) struct JobRecord {
    pub(super) key: JobKey,
    pub(super) id: String,
    pub(super) job_type: JobType,
    pub(super) work: WorkSpec,
    pub(super) status: Status,
    pub(super) shared: Arc<JobShared>,
    /// Who wants it quiet: the user at most once, the engine any number of times.
    pub(super) pause_count: u32,
    /// One of the counts is the user's, or that of an error stop.
    pub(super) user_paused: bool,
    pub(super) cancelled: bool,
    pub(super) force_cancel: bool,
    /// The work was started.
    pub(super) started: bool,
    /// The work has returned.
    pub(super) finished: bool,
    pub(super) error: Option<JobError>,
    /// The failed request that was logged last.
    pub(super) logged_failure: Option<NodeError>,
    pub(super) io_status: IoStatus,
    /// The chain it has worked on, once it has concluded.
    pub(super) chain: Option<Vec<LayerView>>,
    /// A commit of a node that goes on to be written to.
    pub(super) is_active_commit: bool,
    pub(super) auto_finalize: bool,
    pub(super) auto_dismiss: bool,
    /// `None` once concluded.
    pub(super) group: Option<GroupKey>,
    pub(super) nodes: Option<JobNodes>,
    pub(super) thread: Option<ThreadId>,
    pub(super) driver: Option<mpsc::UnboundedSender<DriverOrder>>,
}

impl JobRecord {
    /// Whether the older commands and events know it.
    pub(super) fn is_block_job(&self) -> bool {
        self.job_type.is_block_job()
    }

    /// Whether the work has come as far as being completed on request.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.status, Status::Ready | Status::Standby)
    }

    /// Whether a failed request is of another sort than the one that was logged last: what is tried again and again, here
    /// and there, fills no logs.
    pub(super) fn is_news(&mut self, error: &NodeError) -> bool {
        let sort = |error: &NodeError| {
            let source = &error.source;
            (error.node.clone(), source.operation, source.errno)
        };
        let news = self.logged_failure.as_ref().map(sort) != Some(sort(error));
        self.logged_failure = Some(error.clone());
        news
    }

    /// What it was for has been done and cannot be taken back: a cancel comes too late.
    pub(super) fn is_done_for_good(&self) -> bool {
        let keeps = matches!(self.work, WorkSpec::Create(_) | WorkSpec::Amend(_));
        keeps && self.finished && self.error.is_none()
    }

    /// Passes the pause counter on to the work.
    pub(super) fn order_pause(&self) {
        self.shared.order_pause(self.pause_count > 0);
    }

    /// Takes the user's pause back, if there is one.
    pub(super) fn end_user_pause(&mut self) {
        if self.user_paused {
            self.io_status = IoStatus::Ok;
            self.user_paused = false;
            self.pause_count = self.pause_count.saturating_sub(1);
            self.order_pause();
        }
    }

    /// What its events carry.
    pub(super) fn figures(&self) -> BlockJobFigures {
        BlockJobFigures {
            job_type: self.job_type,
            id: self.id.clone(),
            total_bytes: self.shared.progress.total_bytes(),
            current_bytes: self.shared.progress.current_bytes(),
            speed: self.shared.speed(),
        }
    }

    /// As `query-jobs` shows it.
    pub(super) fn view(&self) -> JobView {
        JobView {
            id: self.id.clone(),
            job_type: self.job_type,
            status: self.status,
            current_progress: self.shared.progress.current_bytes(),
            total_progress: self.shared.progress.total_bytes(),
            error: self.error.as_ref().map(|error| error.text.clone()),
            chain: self.chain.clone(),
            rates: self.rates(),
            failed_at: self.error.as_ref().and_then(JobError::place),
            latency: self.shared.latency.view(),
        }
    }

    /// Whether it becomes ready, and keeps both sides equal until its client decides.
    pub(super) fn keeps_equal(&self) -> bool {
        match self.job_type {
            JobType::Mirror => true,
            JobType::Commit => self.is_active_commit,
            _ => false,
        }
    }

    /// As `query-block-jobs` shows it. A mirror that has ended well and waits keeps its source quiet, which counts as
    /// a pause.
    pub(super) fn block_view(&self) -> BlockJobView {
        let holds_source =
            self.keeps_equal() && matches!(self.status, Status::Waiting | Status::Pending);
        BlockJobView {
            id: self.id.clone(),
            job_type: self.job_type,
            total_bytes: self.shared.progress.total_bytes(),
            current_bytes: self.shared.progress.current_bytes(),
            busy: self.shared.busy() && !self.finished,
            paused: self.pause_count > 0 || holds_source,
            speed: self.shared.speed(),
            io_status: self.io_status,
            ready: self.is_ready(),
            status: self.status,
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            error: self.error.as_ref().map(|error| error.text.clone()),
            actively_synced: (self.job_type == JobType::Mirror)
                .then(|| self.shared.actively_synced()),
            rates: self.rates(),
        }
    }

    /// How fast its source changes and is copied, as long as it works.
    fn rates(&self) -> Option<RatesView> {
        match self.finished {
            true => None,
            false => self.shared.rates.view(),
        }
    }
}

/// What the members of one group have in common.
#[derive(Default)]
pub(super) struct Group {
    /// The members are being finalized or aborted; verbs wait until that is over.
    pub(super) settling: bool,
    /// One failed, so all end.
    pub(super) aborting: bool,
}

/// Every job, oldest first, and every group that has members.
#[derive(Default)]
pub(super) struct JobTable {
    list: Vec<JobRecord>,
    groups: std::collections::HashMap<GroupKey, Group>,
    next_key: u64,
}

impl JobTable {
    /// A number that was never used before.
    pub(super) fn next_key(&mut self) -> u64 {
        self.next_key += 1;
        self.next_key
    }

    /// Takes a job in; its group comes into being with its first member.
    pub(super) fn insert(&mut self, job: JobRecord) {
        if let Some(group) = job.group {
            self.groups.entry(group).or_default();
        }
        self.list.push(job);
    }

    /// Lets a job go.
    pub(super) fn remove(&mut self, key: JobKey) {
        self.leave_group(key);
        self.list.retain(|job| job.key != key);
    }

    /// The job leaves its group; the group ends with its last member.
    pub(super) fn leave_group(&mut self, key: JobKey) {
        let Some(group) = self.by_key_mut(key).and_then(|job| job.group.take()) else {
            return;
        };
        if !self.list.iter().any(|job| job.group == Some(group)) {
            self.groups.remove(&group);
        }
    }

    /// Newest first.
    pub(super) fn newest_first(&self) -> impl Iterator<Item = &JobRecord> {
        self.list.iter().rev()
    }

    /// The job behind a key.
    pub(super) fn by_key(&self, key: JobKey) -> Option<&JobRecord> {
        self.list.iter().find(|job| job.key == key)
    }

    /// The job behind a key, to change.
    pub(super) fn by_key_mut(&mut self, key: JobKey) -> Option<&mut JobRecord> {
        self.list.iter_mut().find(|job| job.key == key)
    }

    /// The job with an id.
    pub(super) fn by_id(&self, id: &str) -> Option<&JobRecord> {
        self.list.iter().find(|job| job.id == id)
    }

    /// Members of a group, newest first.
    pub(super) fn members(&self, group: GroupKey) -> Vec<JobKey> {
        self.newest_first()
            .filter(|job| job.group == Some(group))
            .map(|job| job.key)
            .collect()
    }

    /// What the members of a group have in common.
    pub(super) fn group_mut(&mut self, group: GroupKey) -> Option<&mut Group> {
        self.groups.get_mut(&group)
    }

    /// Whether a job is being finalized or aborted with its group. One that still works is not: its group waits for it,
    /// and it may take as long as its disk does.
    pub(super) fn settling(&self, key: JobKey) -> bool {
        let job = self.by_key(key).filter(|job| job.finished);
        job.and_then(|job| job.group)
            .and_then(|group| self.groups.get(&group))
            .is_some_and(|group| group.settling)
    }
}
