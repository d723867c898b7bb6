//! A disk that does not answer, and whom it may hold up: its own jobs and clients, nobody else.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use blockyard_engine::engine::{Engine, EngineConfig, EngineHandle};
use blockyard_engine::error::EngineError;
use blockyard_engine::job::error_policy::OnError;
use blockyard_engine::job::status::Status;
use blockyard_engine::job::verb::VerbCall;
use blockyard_engine::reply::Reply;
use blockyard_engine::request::{
    BackupPerf, BackupSpec, CbwOptions, CommonOptions, DriverSpec, EventLoopSpec, IntegritySpec,
    JobSpec, NodeSpec, NullSpec, ObjectKind, ObjectSpec, Request, SyncMode, VerbFamily, WorkSpec,
};
use blockyard_storage::ByteRange;

/// No test lasts as long as this.
const HOUR_NS: u64 = 3_600_000_000_000;

/// When an answer is given up.
const PATIENCE: Duration = Duration::from_secs(60);

fn engine() -> EngineHandle {
    let config = EngineConfig {
        data_threads: 2,
        ..EngineConfig::default()
    };
    Engine::start(config).expect("the engine starts").handle()
}

async fn call(engine: &EngineHandle, request: Request) -> Result<Reply, EngineError> {
    let answer = tokio::time::timeout(PATIENCE, engine.call(request)).await;
    answer.expect("answered although a disk does not")
}

fn node(name: &str, driver: DriverSpec) -> Request {
    Request::BlockdevAdd(NodeSpec {
        node_name: Some(name.to_owned()),
        common: CommonOptions::default(),
        driver,
    })
}

/// Adds a node whose requests take so long.
async fn add(engine: &EngineHandle, name: &str, latency_ns: u64) {
    let null = NullSpec {
        size: Some(1 << 20),
        latency_ns: Some(latency_ns),
        ..NullSpec::default()
    };
    let added = call(engine, node(name, DriverSpec::NullCo(null))).await;
    added.expect("added");
}

fn backup(id: &str, source: &str, target: &str) -> Request {
    Request::StartJob(job(id, source, target, SyncMode::None))
}

fn job(id: &str, source: &str, target: &str, sync: SyncMode) -> JobSpec {
    JobSpec {
        id: Some(id.to_owned()),
        auto_finalize: true,
        auto_dismiss: true,
        work: WorkSpec::Backup(BackupSpec {
            device: source.to_owned(),
            target: target.to_owned(),
            sync,
            speed: 0,
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
        }),
    }
}

/// Others come and go, which needs the graph.
async fn others_go_on(engine: &EngineHandle) {
    add(engine, "other", 0).await;
    let node_name = "other".to_owned();
    let deleted = call(engine, Request::BlockdevDel { node_name }).await;
    deleted.expect("deleted");
}

#[tokio::test]
async fn a_refused_job_waits_for_no_disk() {
    let engine = engine();
    add(&engine, "stuck", HOUR_NS).await;
    add(&engine, "target", 0).await;
    let refused = call(&engine, backup("1 bad", "stuck", "target")).await;
    refused.expect_err("not an id");
    others_go_on(&engine).await;
}

#[tokio::test]
async fn moving_to_another_thread_waits_for_no_disk() {
    let engine = engine();
    add(&engine, "source", 0).await;
    // Each on a thread of its own.
    add(&engine, "stuck", HOUR_NS).await;
    let started = call(&engine, backup("job", "source", "stuck")).await;
    started.expect("started");
    add(&engine, "too", HOUR_NS).await;
    let id = "thread".to_owned();
    let object = call(
        &engine,
        Request::ObjectAdd(ObjectSpec {
            id,
            kind: ObjectKind::Iothread(EventLoopSpec::default()),
        }),
    )
    .await;
    object.expect("added");
    let moved = Request::SetIothread {
        node_name: "too".to_owned(),
        iothread: Some("thread".to_owned()),
        force: false,
    };
    call(&engine, moved).await.expect("moved");
    others_go_on(&engine).await;
}

/// One member of a group has been cancelled, and the group waits for the other, whose disk does not answer.
#[tokio::test]
async fn orders_for_a_job_whose_group_waits_for_it_are_taken() {
    let engine = engine();
    for (name, latency_ns) in [("s", 0), ("t", 0), ("stuck", HOUR_NS), ("target", 0)] {
        add(&engine, name, latency_ns).await;
    }
    let jobs = vec![
        job("idle", "s", "t", SyncMode::None),
        job("slow", "stuck", "target", SyncMode::Full),
    ];
    let grouped = true;
    let started = call(
        &engine,
        Request::Transaction {
            actions: jobs.into_iter().map(Into::into).collect(),
            grouped,
        },
    )
    .await;
    started.expect("started");
    let cancel = |id: &str| Request::JobVerb {
        family: VerbFamily::Job,
        id: id.to_owned(),
        verb: VerbCall::Cancel { force: true },
    };
    call(&engine, cancel("idle")).await.expect("accepted");
    loop {
        let Ok(Reply::Jobs(jobs)) = call(&engine, Request::QueryJobs).await else {
            panic!("not a list of jobs");
        };
        if jobs.iter().any(|job| job.status == Status::Aborting) {
            break;
        }
    }
    call(&engine, cancel("slow")).await.expect("accepted");
    others_go_on(&engine).await;
}

/// A user whose request does not end has had his time; other nodes are flushed all the same, and it does not take all the time that
/// they have for it.
#[tokio::test]
async fn the_end_waits_for_no_request_of_a_stuck_disk() {
    let config = EngineConfig::default();
    let ends = Engine::start(config).expect("the engine starts");
    let engine = ends.handle();
    // What is read-only needs no last flush, which would be stuck, too.
    let stuck = NodeSpec {
        node_name: Some("stuck".to_owned()),
        common: CommonOptions {
            read_only: Some(true),
            ..CommonOptions::default()
        },
        driver: DriverSpec::NullCo(NullSpec {
            size: Some(1 << 20),
            latency_ns: Some(HOUR_NS),
            ..NullSpec::default()
        }),
    };
    let added = call(&engine, Request::BlockdevAdd(stuck)).await;
    added.expect("added");
    add(&engine, "other", 0).await;
    let root = engine.open_root("stuck", false).await.expect("opened");
    let read =
        tokio::time::timeout(Duration::from_millis(50), root.read(ByteRange::new(0, 512))).await;
    assert!(read.is_err(), "it is stuck");
    let begun = Instant::now();
    call(&engine, Request::Quit).await.expect("quit");
    assert!(begun.elapsed() < Duration::from_secs(20));
    drop((root, engine));
    assert_eq!(ends.join(), Vec::<String>::new());
}
