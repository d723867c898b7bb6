//! The life of jobs as a client of the engine sees it: every verb in every status it can be found in, the order of events,
//! both ways to end.
#![forbid(unsafe_code)]

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blockyard_engine::engine::{Engine, EngineConfig, EngineHandle};
use blockyard_engine::error::{EngineError, ErrorKind};
use blockyard_engine::event::{Event, EventKind};
use blockyard_engine::job::error_policy::OnError;
use blockyard_engine::job::status::Status;
use blockyard_engine::job::verb::{Verb, VerbCall, accepts};
use blockyard_engine::reply::{BlockJobView, IoStatus, JobView, Reply};
use blockyard_engine::request::{
    BackupPerf, BackupSpec, BlkdebugIo, BlkdebugSpec, CommonOptions, CopyMode, DriverSpec,
    InjectError, JobSpec, MirrorSpec, NodeRef, NodeSpec, NullSpec, Request, SyncMode, VerbFamily,
    WorkSpec,
};

/// An engine and everything it says.
struct Yard {
    engine: EngineHandle,
    events: Receiver<Event>,
}

impl Yard {
    fn new() -> Self {
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

    async fn call(&self, request: Request) -> Result<Reply, EngineError> {
        self.engine.call(request).await
    }

    /// Adds a null node of `size` bytes that reads as data.
    async fn node(&self, name: &str, size: i64) {
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

    async fn start(&self, id: &str, work: WorkSpec, auto: bool) -> Result<Reply, EngineError> {
        let spec = JobSpec {
            id: Some(id.to_owned()),
            auto_finalize: auto,
            auto_dismiss: auto,
            work,
        };
        self.call(Request::StartJob(spec)).await
    }

    async fn verb(&self, id: &str, verb: VerbCall) -> Result<Reply, EngineError> {
        let request = Request::JobVerb {
            family: VerbFamily::Job,
            id: id.to_owned(),
            verb,
        };
        self.call(request).await
    }

    async fn jobs(&self) -> Vec<JobView> {
        match self.call(Request::QueryJobs).await {
            Ok(Reply::Jobs(jobs)) => jobs,
            other => panic!("not a list of jobs: {other:?}"),
        }
    }

    async fn block_job(&self, id: &str) -> BlockJobView {
        match self.call(Request::QueryBlockJobs).await {
            Ok(Reply::BlockJobs(jobs)) => jobs
                .into_iter()
                .find(|job| job.id == id)
                .expect("the job is listed"),
            other => panic!("not a list of block jobs: {other:?}"),
        }
    }

    /// The next event, in the short form the tests below compare.
    fn next(&self) -> String {
        let event = self
            .events
            .recv_timeout(Duration::from_secs(20))
            .expect("an event");
        short(&event.kind)
    }

    fn expect(&self, events: &[&str]) {
        for event in events {
            assert_eq!(self.next(), *event);
        }
    }

    /// Waits until `event` comes, whatever is before it.
    fn until(&self, event: &str) {
        while self.next() != event {}
    }
}

fn short(kind: &EventKind) -> String {
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
    }
}

fn backup(source: &str, target: &str, speed: i64) -> WorkSpec {
    WorkSpec::Backup(BackupSpec {
        device: source.to_owned(),
        target: target.to_owned(),
        sync: SyncMode::Full,
        speed,
        bitmap: None,
        bitmap_mode: None,
        compress: false,
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
        filter_node_name: None,
        discard_source: false,
        perf: BackupPerf::default(),
    })
}

fn mirror(source: &str, target: &str, speed: i64) -> WorkSpec {
    WorkSpec::Mirror(MirrorSpec {
        device: source.to_owned(),
        target: target.to_owned(),
        replaces: None,
        sync: SyncMode::Full,
        speed,
        granularity: None,
        buf_size: None,
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
        filter_node_name: None,
        copy_mode: CopyMode::Background,
    })
}

const MIB: i64 = 1 << 20;

async fn yard_with_nodes() -> Yard {
    let yard = Yard::new();
    yard.node("s", 8 * MIB).await;
    yard.node("t", 8 * MIB).await;
    yard
}

#[tokio::test]
async fn a_backup_runs_through_its_states() {
    let yard = yard_with_nodes().await;
    yard.start("j", backup("s", "t", 0), true)
        .await
        .expect("started");
    yard.expect(&[
        "j created",
        "j running",
        "j waiting",
        "j pending",
        "j COMPLETED 8388608/8388608",
        "j concluded",
        "j null",
    ]);
    assert_eq!(yard.jobs().await, []);
}

#[tokio::test]
async fn a_client_that_wants_to_finalizes_and_dismisses_itself() {
    let yard = yard_with_nodes().await;
    yard.start("j", backup("s", "t", 0), false)
        .await
        .expect("started");
    yard.until("j PENDING");
    assert_eq!(yard.block_job("j").await.status, Status::Pending);
    yard.verb("j", VerbCall::Finalize).await.expect("finalized");
    yard.expect(&["j COMPLETED 8388608/8388608", "j concluded"]);
    yard.verb("j", VerbCall::Dismiss).await.expect("dismissed");
    yard.expect(&["j null"]);
    let gone = yard.verb("j", VerbCall::Dismiss).await.expect_err("gone");
    assert_eq!(gone.text, "Job not found");
    let request = Request::JobVerb {
        family: VerbFamily::BlockJob,
        id: "j".to_owned(),
        verb: VerbCall::Dismiss,
    };
    let gone = yard.call(request).await.expect_err("gone");
    assert_eq!(
        (gone.kind, gone.text.as_str()),
        (ErrorKind::DeviceNotActive, "Block job 'j' not found")
    );
}

#[tokio::test]
async fn a_throttled_job_pauses_resumes_and_is_cancelled_while_paused() {
    let yard = yard_with_nodes().await;
    yard.start("j", backup("s", "t", 65536), false)
        .await
        .expect("started");
    yard.expect(&["j created", "j running"]);
    let early = yard
        .verb("j", VerbCall::Resume)
        .await
        .expect_err("not paused");
    assert_eq!(early.text, "Can't resume a job that was not paused");
    yard.verb("j", VerbCall::Pause).await.expect("paused");
    yard.until("j paused");
    let twice = yard
        .verb("j", VerbCall::Pause)
        .await
        .expect_err("paused already");
    assert_eq!(twice.text, "Job is already paused");
    let soft = Request::JobVerb {
        family: VerbFamily::BlockJob,
        id: "j".to_owned(),
        verb: VerbCall::Cancel { force: false },
    };
    let refused = yard.call(soft).await.expect_err("paused");
    assert_eq!(
        refused.text,
        "The block job for device 'j' is currently paused"
    );
    yard.verb("j", VerbCall::Resume).await.expect("resumed");
    yard.expect(&["j running"]);
    yard.verb("j", VerbCall::Pause).await.expect("paused");
    yard.expect(&["j paused"]);
    yard.verb("j", VerbCall::Cancel { force: true })
        .await
        .expect("cancelled");
    yard.expect(&["j running", "j aborting", "j CANCELLED", "j concluded"]);
    assert_eq!(
        yard.jobs().await[0].error.as_deref(),
        Some("Operation canceled")
    );
}

#[tokio::test]
async fn a_mirror_converges_and_completes_or_is_let_go() {
    let yard = yard_with_nodes().await;
    for ending in [VerbCall::Complete, VerbCall::Cancel { force: false }] {
        yard.start("m", mirror("s", "t", 0), true)
            .await
            .expect("started");
        yard.expect(&[
            "m created",
            "m running",
            "m ready",
            "m READY 8388608/8388608",
        ]);
        let request = Request::JobVerb {
            family: VerbFamily::BlockJob,
            id: "m".to_owned(),
            verb: ending,
        };
        yard.call(request).await.expect("accepted");
        yard.expect(&[
            "m waiting",
            "m pending",
            "m COMPLETED 8388608/8388608",
            "m concluded",
            "m null",
        ]);
    }
    yard.start("m", mirror("s", "t", 0), true)
        .await
        .expect("started");
    yard.until("m READY 8388608/8388608");
    yard.verb("m", VerbCall::Cancel { force: true })
        .await
        .expect("cancelled");
    yard.expect(&["m aborting", "m CANCELLED", "m concluded", "m null"]);
}

#[tokio::test]
async fn a_standby_mirror_completes_after_resume() {
    let yard = yard_with_nodes().await;
    yard.start("m", mirror("s", "t", 0), true)
        .await
        .expect("started");
    yard.until("m READY 8388608/8388608");
    yard.verb("m", VerbCall::Pause).await.expect("paused");
    yard.expect(&["m standby"]);
    yard.verb("m", VerbCall::Complete).await.expect("accepted");
    assert_eq!(yard.block_job("m").await.status, Status::Standby);
    yard.verb("m", VerbCall::Resume).await.expect("resumed");
    yard.expect(&["m ready", "m waiting", "m pending"]);
}

/// Brings a job into `status` and keeps it there.
async fn job_in(yard: &Yard, status: Status) -> &'static str {
    match status {
        Status::Running | Status::Paused => {
            yard.start("j", backup("s", "t", 65536), false)
                .await
                .expect("started");
            yard.until("j running");
            if status == Status::Paused {
                yard.verb("j", VerbCall::Pause).await.expect("paused");
                yard.until("j paused");
            }
        }
        Status::Ready | Status::Standby => {
            yard.start("j", mirror("s", "t", 0), false)
                .await
                .expect("started");
            yard.until("j READY 8388608/8388608");
            if status == Status::Standby {
                yard.verb("j", VerbCall::Pause).await.expect("paused");
                yard.until("j standby");
            }
        }
        Status::Pending | Status::Concluded => {
            yard.start("j", backup("s", "t", 0), false)
                .await
                .expect("started");
            yard.until("j PENDING");
            if status == Status::Concluded {
                yard.verb("j", VerbCall::Finalize).await.expect("finalized");
                yard.until("j concluded");
            }
        }
        other => panic!("no way to keep a job in {other:?}"),
    }
    "j"
}

fn call_of(verb: Verb) -> VerbCall {
    match verb {
        Verb::Cancel => VerbCall::Cancel { force: true },
        Verb::Pause => VerbCall::Pause,
        Verb::Resume => VerbCall::Resume,
        Verb::SetSpeed => VerbCall::SetSpeed { speed: 1 },
        Verb::Complete => VerbCall::Complete,
        Verb::Finalize => VerbCall::Finalize,
        Verb::Dismiss => VerbCall::Dismiss,
        Verb::Change => VerbCall::Change {
            copy_mode: Some(CopyMode::WriteBlocking),
        },
    }
}

#[tokio::test]
async fn every_verb_in_every_status_that_lasts() {
    use Status::*;
    for status in [Running, Paused, Ready, Standby, Pending, Concluded] {
        for verb in Verb::ALL {
            let yard = yard_with_nodes().await;
            let id = job_in(&yard, status).await;
            let outcome = yard.verb(id, call_of(verb)).await;
            let is_mirror = matches!(status, Ready | Standby);
            let is_paused = matches!(status, Paused | Standby);
            let expected = match verb {
                Verb::Resume if !is_paused => {
                    Some("Can't resume a job that was not paused".to_owned())
                }
                _ if !accepts(status, verb) => Some(format!(
                    "Job 'j' in state '{}' cannot accept command verb '{}'",
                    status.name(),
                    verb.name()
                )),
                Verb::Pause if is_paused => Some("Job is already paused".to_owned()),
                Verb::Change if !is_mirror => Some("Job type does not support change".to_owned()),
                _ => None,
            };
            assert_eq!(
                outcome.err().map(|error| error.text),
                expected,
                "{verb:?} in {status:?}"
            );
        }
    }
}

#[tokio::test]
async fn jobs_that_never_start_come_and_go() {
    let yard = yard_with_nodes().await;
    let error = yard
        .start("j", backup("s", "t", -1), true)
        .await
        .expect_err("negative");
    assert_eq!(error.text, "Parameter 'speed' expects a non-negative value");
    yard.expect(&["j created", "j null"]);
    for (id, text) in [("1x", "Invalid job ID '1x'"), ("", "Invalid job ID ''")] {
        let error = yard
            .start(id, mirror("s", "t", 0), true)
            .await
            .expect_err("bad id");
        assert_eq!(error.text, text);
    }
    yard.start("j", backup("s", "t", 65536), true)
        .await
        .expect("started");
    yard.node("u", 8 * MIB).await;
    let error = yard
        .start("j", mirror("u", "u", 0), true)
        .await
        .expect_err("itself");
    assert_eq!(error.text, "Can't mirror node into itself");
    yard.node("v", 8 * MIB).await;
    let error = yard
        .start("j", mirror("u", "v", 0), true)
        .await
        .expect_err("taken");
    assert_eq!(error.text, "Job ID 'j' already in use");
}

#[tokio::test]
async fn sizes_that_differ_fail_inside_a_mirror_and_before_a_backup() {
    let yard = yard_with_nodes().await;
    yard.node("u", MIB).await;
    yard.start("m", mirror("s", "u", 0), false)
        .await
        .expect("started");
    yard.expect(&[
        "m created",
        "m running",
        "m aborting",
        "m COMPLETED Source and target image have different sizes",
        "m concluded",
    ]);
    let view = yard.block_job("m").await;
    assert_eq!((view.total_bytes, view.io_status), (0, IoStatus::Ok));
    yard.verb("m", VerbCall::Dismiss).await.expect("dismissed");
    let error = yard
        .start("b", backup("s", "u", 0), true)
        .await
        .expect_err("different sizes");
    assert_eq!(error.text, "Source and target image have different sizes");
}

fn job(id: &str, work: WorkSpec, auto_finalize: bool) -> JobSpec {
    JobSpec {
        id: Some(id.to_owned()),
        auto_finalize,
        auto_dismiss: true,
        work,
    }
}

/// Four nodes, and a group of two backups: A is done at once, B is held by its rate limit.
async fn group(auto_finalize: bool) -> Yard {
    let yard = yard_with_nodes().await;
    for name in ["u", "v"] {
        yard.node(name, 8 * MIB).await;
    }
    let jobs = vec![
        job("A", backup("s", "t", 0), auto_finalize),
        job("B", backup("u", "v", 65536), true),
    ];
    yard.call(Request::StartJobs {
        jobs,
        grouped: true,
    })
    .await
    .expect("started");
    yard.expect(&[
        "A created",
        "B created",
        "B running",
        "A running",
        "A waiting",
    ]);
    yard
}

#[tokio::test]
async fn a_group_waits_for_its_last_member_and_is_finalized_through_any() {
    let yard = group(false).await;
    for verb in [VerbCall::Finalize, VerbCall::Pause] {
        let error = yard.verb("A", verb.clone()).await.expect_err("waiting");
        let name = verb.verb().name();
        assert_eq!(
            error.text,
            format!("Job 'A' in state 'waiting' cannot accept command verb '{name}'")
        );
    }
    yard.verb("B", VerbCall::SetSpeed { speed: 0 })
        .await
        .expect("speed set");
    yard.expect(&["B waiting", "B pending", "A pending", "A PENDING"]);
    yard.verb("B", VerbCall::Finalize).await.expect("finalized");
    yard.expect(&[
        "B COMPLETED 8388608/8388608",
        "B concluded",
        "B null",
        "A COMPLETED 8388608/8388608",
        "A concluded",
        "A null",
    ]);
}

#[tokio::test]
async fn cancelling_a_waiting_member_ends_its_group() {
    let yard = group(true).await;
    yard.verb("A", VerbCall::Cancel { force: true })
        .await
        .expect("cancelled");
    yard.expect(&[
        "B aborting",
        "B CANCELLED",
        "B concluded",
        "B null",
        "A aborting",
        "A CANCELLED",
        "A concluded",
        "A null",
    ]);
}

#[tokio::test]
async fn a_member_that_fails_ends_its_group() {
    let yard = yard_with_nodes().await;
    for name in ["u", "v"] {
        yard.node(name, 8 * MIB).await;
    }
    let fault = InjectError {
        event: "none".to_owned(),
        iotype: Some(BlkdebugIo::Read),
        sector: Some(8192),
        ..InjectError::default()
    };
    let faulty = BlkdebugSpec {
        inject_error: vec![fault],
        ..BlkdebugSpec::over(NodeRef::Name("s".to_owned()))
    };
    let spec = NodeSpec {
        node_name: Some("faulty".to_owned()),
        common: CommonOptions::default(),
        driver: DriverSpec::Blkdebug(faulty),
    };
    let added = yard.call(Request::BlockdevAdd(spec)).await;
    added.expect("node added");
    let jobs = vec![
        job("A", backup("faulty", "t", 0), true),
        job("B", backup("u", "v", 65536), true),
    ];
    let grouped = true;
    let started = yard.call(Request::StartJobs { jobs, grouped }).await;
    started.expect("started");
    yard.expect(&["A created", "B created", "B running", "A running"]);
    yard.expect(&[
        "A ERROR Source Report",
        "A aborting",
        "B aborting",
        "B CANCELLED",
        "B concluded",
        "B null",
        "A COMPLETED Input/output error",
        "A concluded",
        "A null",
    ]);
}

#[tokio::test]
async fn a_group_that_cannot_start_as_a_whole_comes_to_nothing() {
    let yard = yard_with_nodes().await;
    let jobs = vec![
        job("A", backup("s", "t", 0), true),
        job("B", backup("s", "zz", 0), true),
    ];
    let error = yard
        .call(Request::StartJobs {
            jobs,
            grouped: true,
        })
        .await
        .expect_err("no zz");
    assert_eq!(error.text, "Cannot find device='zz' nor node-name='zz'");
    yard.expect(&["A created", "A aborting", "A concluded", "A null"]);
    assert_eq!(yard.jobs().await, []);
}

#[tokio::test]
async fn quitting_ends_every_job_whatever_its_state() {
    let yard = yard_with_nodes().await;
    for name in ["u", "v"] {
        yard.node(name, 8 * MIB).await;
    }
    yard.start("k", backup("s", "t", 65536), false)
        .await
        .expect("started");
    yard.start("p", backup("u", "v", 0), false)
        .await
        .expect("started");
    yard.until("p PENDING");
    yard.call(Request::Quit).await.expect("quits");
    let mut heard = Vec::new();
    while let Ok(event) = yard.events.try_recv() {
        heard.push(short(&event.kind));
    }
    for job in ["k", "p"] {
        let of_job: Vec<_> = heard.iter().filter(|line| line.starts_with(job)).collect();
        let end = [format!("{job} aborting"), format!("{job} CANCELLED")];
        assert!(end.iter().all(|line| of_job.contains(&line)), "{heard:?}");
        assert_eq!(
            of_job.last().map(|line| line.as_str()),
            Some(format!("{job} null").as_str())
        );
    }
    let after = yard.call(Request::QueryJobs).await.expect_err("gone");
    assert_eq!(after.text, "The daemon is ending");
}

/// What a query says is never older than an event that was heard before it.
/// A node above the source does not lead past the job, whichever came first.
#[tokio::test]
async fn a_source_is_not_changed_through_a_node_above_it() {
    let yard = yard_with_nodes().await;
    yard.node("other", 8 * MIB).await;
    let spec = NodeSpec {
        node_name: Some("above".to_owned()),
        common: CommonOptions::default(),
        driver: DriverSpec::Raw {
            file: NodeRef::Name("s".to_owned()),
            offset: None,
            size: None,
        },
    };
    let added = yard.call(Request::BlockdevAdd(spec)).await;
    added.expect("added");
    let text = "Node 's' is the source of a block job and cannot be changed meanwhile";
    for (first, second) in [
        (backup("s", "t", 1), backup("other", "above", 0)),
        (backup("other", "above", 1), backup("s", "t", 0)),
    ] {
        yard.start("first", first, true).await.expect("started");
        let refused = yard.start("second", second, true).await;
        let refused = refused.expect_err("leads past the job");
        assert!(refused.text.ends_with(text), "{}", refused.text);
        let force = true;
        let cancelled = yard.verb("first", VerbCall::Cancel { force }).await;
        cancelled.expect("accepted");
        yard.until("first null");
    }
}

#[tokio::test]
async fn nothing_is_opened_on_a_filter_that_goes_with_its_job() {
    let yard = yard_with_nodes().await;
    let mut work = backup("s", "t", 1);
    if let WorkSpec::Backup(spec) = &mut work {
        spec.filter_node_name = Some("filter".to_owned());
    }
    yard.start("job", work, true).await.expect("started");
    let spec = NodeSpec {
        node_name: Some("above".to_owned()),
        common: CommonOptions::default(),
        driver: DriverSpec::Raw {
            file: NodeRef::Name("filter".to_owned()),
            offset: None,
            size: None,
        },
    };
    let refused = yard.call(Request::BlockdevAdd(spec)).await;
    let text = "Node 'filter' is the filter of a job and cannot have other users";
    assert_eq!(refused, Err(EngineError::generic(text)));
}

#[tokio::test]
async fn answers_and_events_have_one_order() {
    let yard = yard_with_nodes().await;
    let latest = Arc::new(Mutex::new(Status::Undefined));
    let heard = latest.clone();
    yard.engine.subscribe(Box::new(move |event| {
        if let EventKind::JobStatusChange { status, .. } = &event.kind {
            *heard.lock().expect("whole") = *status;
        }
    }));
    yard.start("j", backup("s", "t", 65536), false)
        .await
        .expect("started");
    let changing = async {
        for _ in 0..100 {
            yard.verb("j", VerbCall::Pause).await.expect("paused");
            yard.verb("j", VerbCall::Resume).await.expect("resumed");
        }
    };
    let asking = async {
        for _ in 0..1000 {
            let latest = latest.clone();
            let answered = yard.engine.call_then(Request::QueryJobs, move |outcome| {
                let Ok(Reply::Jobs(jobs)) = outcome else {
                    panic!("jobs are told")
                };
                Ok((jobs[0].status, *latest.lock().expect("whole")))
            });
            let (told, heard) = answered.await.expect("answered");
            assert_eq!(told, heard);
        }
    };
    tokio::join!(changing, asking);
}
