//! An engine, what it says, and the nodes and jobs that tests of lives need.

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use blockyard_engine::engine::{Engine, EngineConfig, EngineHandle};
use blockyard_engine::error::EngineError;
use blockyard_engine::event::{Event, EventKind};
use blockyard_engine::job::error_policy::OnError;
use blockyard_engine::job::verb::VerbCall;
use blockyard_engine::reply::{BlockJobView, JobView, Reply};
use blockyard_engine::request::{
    BackupPerf, BackupSpec, CbwOptions, CommonOptions, DriverSpec, IntegritySpec, JobSpec,
    MirrorSpec, NodeSpec, NullSpec, Request, SyncMode, VerbFamily, WorkSpec,
};

/// An engine and everything it says.
pub(crate) struct Yard {
    pub(crate) engine: EngineHandle,
    pub(crate) events: Receiver<Event>,
}

impl Yard {
    pub(crate) fn new() -> Self {
        let config = EngineConfig {
            data_threads: 2,
            ..EngineConfig::default()
        };
        let engine = Engine::start(config).expect("the engine starts").handle();
        let (heard, events) = channel();
        engine.subscribe(Box::new(move |event| {
            let _ = heard.send(event.clone());
        }));
        Self { engine, events }
    }

    pub(crate) async fn call(&self, request: Request) -> Result<Reply, EngineError> {
        self.engine.call(request).await
    }

    /// Adds a null node of `size` bytes that reads as data.
    pub(crate) async fn node(&self, name: &str, size: i64) {
        let null = NullSpec {
            size: Some(size),
            ..NullSpec::default()
        };
        let spec = NodeSpec {
            node_name: Some(name.to_owned()),
            common: CommonOptions::default(),
            driver: DriverSpec::NullCo(null),
        };
        self.call(Request::BlockdevAdd(spec))
            .await
            .expect("node added");
    }

    pub(crate) async fn start(
        &self,
        id: &str,
        work: WorkSpec,
        auto: bool,
    ) -> Result<Reply, EngineError> {
        let spec = JobSpec {
            id: Some(id.to_owned()),
            auto_finalize: auto,
            auto_dismiss: auto,
            work,
        };
        self.call(Request::StartJob(spec)).await
    }

    pub(crate) async fn verb(&self, id: &str, verb: VerbCall) -> Result<Reply, EngineError> {
        let request = Request::JobVerb {
            family: VerbFamily::Job,
            id: id.to_owned(),
            verb,
        };
        self.call(request).await
    }

    pub(crate) async fn jobs(&self) -> Vec<JobView> {
        match self.call(Request::QueryJobs).await {
            Ok(Reply::Jobs(jobs)) => jobs,
            other => panic!("not a list of jobs: {other:?}"),
        }
    }

    pub(crate) async fn block_job(&self, id: &str) -> BlockJobView {
        match self.call(Request::QueryBlockJobs).await {
            Ok(Reply::BlockJobs(jobs)) => jobs
                .into_iter()
                .find(|job| job.id == id)
                .expect("the job is listed"),
            other => panic!("not a list of block jobs: {other:?}"),
        }
    }

    /// The next event, in the short form the tests below compare.
    pub(crate) fn next(&self) -> String {
        let event = self
            .events
            .recv_timeout(Duration::from_secs(20))
            .expect("an event");
        short(&event.kind)
    }

    pub(crate) fn expect(&self, events: &[&str]) {
        for event in events {
            assert_eq!(self.next(), *event);
        }
    }

    /// Waits until `event` comes, whatever is before it.
    pub(crate) fn until(&self, event: &str) {
        while self.next() != event {}
    }
}

pub(crate) fn short(kind: &EventKind) -> String {
    match kind {
        EventKind::JobStatusChange { id, status } => format!("{id} {}", status.name()),
        EventKind::BlockJobCompleted { job, error: None } => {
            format!(
                "{} COMPLETED {}/{}",
                job.id, job.current_bytes, job.total_bytes
            )
        }
        EventKind::BlockJobCompleted {
            job,
            error: Some(error),
        } => {
            format!("{} COMPLETED {error}", job.id)
        }
        EventKind::BlockJobCancelled(job) => format!("{} CANCELLED", job.id),
        EventKind::BlockJobReady(job) => {
            format!("{} READY {}/{}", job.id, job.current_bytes, job.total_bytes)
        }
        EventKind::BlockJobPending { id, .. } => format!("{id} PENDING"),
        EventKind::BlockJobError { id, side, action } => format!("{id} ERROR {side:?} {action:?}"),
        EventKind::BlockExportDeleted { id } => format!("{id} DELETED"),
        EventKind::BlockImageCorrupted { node_name, .. } => format!("{node_name} CORRUPTED"),
    }
}

pub(crate) fn backup(source: &str, target: &str, speed: i64) -> WorkSpec {
    WorkSpec::Backup(BackupSpec {
        device: source.to_owned(),
        target: target.to_owned(),
        sync: SyncMode::Full,
        speed,
        new_target: None,
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
    })
}

pub(crate) fn mirror(source: &str, target: &str, speed: i64) -> WorkSpec {
    WorkSpec::Mirror(MirrorSpec {
        device: source.to_owned(),
        target: target.to_owned(),
        speed,
        ..MirrorSpec::default()
    })
}

pub(crate) const MIB: i64 = 1 << 20;

pub(crate) async fn yard_with_nodes() -> Yard {
    let yard = Yard::new();
    yard.node("s", 8 * MIB).await;
    yard.node("t", 8 * MIB).await;
    yard
}
