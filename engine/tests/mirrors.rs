//! Mirrors of real files beside random writers, while clients pause them, change speed and copy mode, and the target fails: what
//! a writer was told to be written is where it reads afterwards.
#![forbid(unsafe_code)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use blockyard_engine::engine::{Engine, EngineConfig, EngineHandle};
use blockyard_engine::error::EngineError;
use blockyard_engine::event::{Event, EventKind};
use blockyard_engine::job::error_policy::{ErrorAction, OnError};
use blockyard_engine::job::status::Status;
use blockyard_engine::job::verb::VerbCall;
use blockyard_engine::reply::{BlockJobView, Reply};
use blockyard_engine::request::{
    BlkdebugSpec, CommonOptions, CopyMode, Discard, DriverSpec, FileSpec, InjectError,
    IntegritySpec, JobSpec, MirrorSpec, NewTargetSpec, NodeRef, NodeSpec, Request, VerbFamily,
    WorkSpec,
};
use blockyard_engine::root_handle::RootHandle;
use blockyard_simulator::Seed;
use blockyard_storage::ByteRange;

const LENGTH: u64 = 6 << 20;

/// The disk is shared out among the writers in pieces of so many bytes, so that each knows what is in its own.
const STRIPE: u64 = 100_000;

const WRITERS: u64 = 3;

/// An engine, its events, and a folder for its files.
struct Yard {
    engine: EngineHandle,
    events: Mutex<Receiver<Event>>,
    folder: tempfile::TempDir,
}

impl Yard {
    /// With a source `s` of zeroes.
    async fn new() -> Self {
        let config = EngineConfig {
            data_threads: 2,
            ..EngineConfig::default()
        };
        let engine = Engine::start(config).expect("the engine starts").handle();
        let (heard, events) = channel();
        engine.subscribe(Box::new(move |event| {
            let _ = heard.send(event.clone());
        }));
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let yard = Self {
            engine,
            events: events.into(),
            folder,
        };
        let spec = NodeSpec {
            node_name: Some("s".to_owned()),
            common: CommonOptions {
                discard: Some(Discard::Unmap),
                ..CommonOptions::default()
            },
            driver: DriverSpec::File(yard.file("s")),
        };
        yard.add(spec).await;
        yard
    }

    /// A new file that is one hole.
    fn file(&self, name: &str) -> FileSpec {
        let filename = self.folder.path().join(name);
        let file = std::fs::File::create(&filename).expect("made");
        file.set_len(LENGTH).expect("sized");
        FileSpec {
            filename,
            ..FileSpec::default()
        }
    }

    async fn add(&self, spec: NodeSpec) {
        let added = self.engine.call(Request::BlockdevAdd(spec)).await;
        added.expect("added");
    }

    /// Adds a target whose requests fail now and then, as `dice` has it.
    async fn add_failing(&self, dice: &Seed) {
        let errors = (0..1 + dice.below(4)).map(|_| InjectError {
            event: "none".to_owned(),
            errno: Some(*dice.pick(&[5, 28])),
            sector: Some(dice.below(LENGTH / 512) as i64),
            once: Some(true),
            ..InjectError::default()
        });
        self.add_target_with(errors.collect()).await;
    }

    async fn add_target_with(&self, inject_error: Vec<InjectError>) {
        let file = NodeSpec {
            node_name: None,
            common: CommonOptions::default(),
            driver: DriverSpec::File(self.file("t")),
        };
        self.add(NodeSpec {
            node_name: Some("t".to_owned()),
            common: CommonOptions::default(),
            driver: DriverSpec::Blkdebug(BlkdebugSpec {
                image: NodeRef::Inline(Box::new(file)),
                inject_error,
                ..BlkdebugSpec::over(NodeRef::Name(String::new()))
            }),
        })
        .await;
    }

    async fn start(&self, spec: MirrorSpec) {
        let started = self.engine.call(Request::StartJob(JobSpec {
            id: Some("j".to_owned()),
            auto_finalize: true,
            auto_dismiss: true,
            work: WorkSpec::Mirror(spec),
        }));
        started.await.expect("started");
    }

    async fn verb(&self, verb: VerbCall) -> Result<Reply, EngineError> {
        let request = Request::JobVerb {
            family: VerbFamily::BlockJob,
            id: "j".to_owned(),
            verb,
        };
        self.engine.call(request).await
    }

    async fn job(&self) -> Option<BlockJobView> {
        match self.engine.call(Request::QueryBlockJobs).await {
            Ok(Reply::BlockJobs(jobs)) => jobs.into_iter().next(),
            other => panic!("no jobs: {other:?}"),
        }
    }

    /// The next event. Where none comes because writers dirty the last granules as fast as the job copies them, which no rate
    /// tells, they have to wait for it.
    async fn event(&self) -> EventKind {
        for _ in 0..120 {
            let event = {
                let events = self.events.lock().expect("one waits");
                events.recv_timeout(Duration::from_secs(1))
            };
            if let Ok(event) = event {
                return event.kind;
            }
            let copy_mode = Some(CopyMode::WriteBlocking);
            // It may have become so already.
            let _ = self.verb(VerbCall::Change { copy_mode }).await;
        }
        panic!("nothing happens: {:?}", self.job().await);
    }

    /// Waits for a status of the job, which goes on after each error.
    async fn until(&self, wanted: Status) {
        loop {
            match self.event().await {
                EventKind::JobStatusChange { status, .. } if status == wanted => return,
                EventKind::BlockJobCompleted {
                    error: Some(error), ..
                } => panic!("failed: {error}"),
                EventKind::BlockJobError {
                    action: ErrorAction::Stop,
                    ..
                } => {
                    // It is paused by then, or will be.
                    let _ = self.verb(VerbCall::Resume).await;
                }
                _ => {}
            }
        }
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    runtime.expect("a runtime").block_on(future)
}

/// What writers share.
struct Shared {
    root: RootHandle,
    /// The target fails now and then.
    fails: bool,
    stop: AtomicBool,
    requests: AtomicU64,
}

impl Shared {
    fn new(root: RootHandle, fails: bool) -> Self {
        Self {
            root,
            fails,
            stop: AtomicBool::new(false),
            requests: AtomicU64::new(0),
        }
    }

    /// Lets the writers make so many requests more.
    fn go_on(&self, count: u64) {
        let goal = self.requests.load(Ordering::Acquire) + count;
        while self.requests.load(Ordering::Acquire) < goal && !self.stop.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    }

    /// Writes, zeroes, discards, flushes and reads in its own stripes until it is told to stop. What it knows of the disk.
    async fn write(&self, me: u64, dice: &Seed) -> Vec<Option<u8>> {
        let mut model = vec![None; LENGTH as usize];
        for stripe in (me..LENGTH.div_ceil(STRIPE)).step_by(WRITERS as usize) {
            let end = ((stripe + 1) * STRIPE).min(LENGTH);
            model[(stripe * STRIPE) as usize..end as usize].fill(Some(0));
        }
        while !self.stop.load(Ordering::Acquire) {
            let stripe = me + WRITERS * dice.below(LENGTH / STRIPE / WRITERS);
            let start = stripe * STRIPE + dice.below(STRIPE);
            let longest = *dice.pick(&[512, 4096, STRIPE]);
            let whole = ByteRange::between(start, ((stripe + 1) * STRIPE).min(LENGTH));
            let (range, _) = whole.split_at(1 + dice.below(longest));
            let place = range.offset() as usize..range.end() as usize;
            self.requests.fetch_add(1, Ordering::AcqRel);
            // A target that fails may have become what is written to; of what has failed nothing is known.
            let left = match dice.below(10) {
                0 => self
                    .root
                    .zero(range, dice.one_in(2))
                    .await
                    .map(|()| Some(0)),
                1 => self.root.discard(range).await.map(|()| None),
                2 => {
                    if let Ok(read) = self.root.read(range).await {
                        assert!(known(&model[place], &read), "wrong bytes in {range}");
                    }
                    continue;
                }
                3 => {
                    let _ = self.root.flush().await;
                    continue;
                }
                _ => {
                    let byte = 1 + dice.below(250) as u8;
                    let bytes = vec![byte; range.length() as usize];
                    let written = self.root.write(range.offset(), bytes).await;
                    written.map(|()| Some(byte))
                }
            };
            assert!(left.is_ok() || self.fails, "{left:?}");
            model[place].fill(left.unwrap_or_default());
        }
        model
    }
}

fn known(model: &[Option<u8>], bytes: &[u8]) -> bool {
    let mut pairs = model.iter().zip(bytes);
    pairs.all(|(known, byte)| known.is_none_or(|known| known == *byte))
}

/// Runs writers while `client` does what it wants, then looks at what they read.
fn beside_writers(seed: u64, shared: &Shared, client: impl FnOnce() + Send) {
    let models: Vec<_> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|me| {
                scope.spawn(move || {
                    let dice = Seed::new(seed.wrapping_mul(31).wrapping_add(me));
                    block_on(shared.write(me, &dice))
                })
            })
            .collect();
        let client = scope.spawn(client);
        let ended = client.join();
        shared.stop.store(true, Ordering::Release);
        if let Err(panic) = ended {
            std::panic::resume_unwind(panic);
        }
        let join = |writer: std::thread::ScopedJoinHandle<'_, _>| writer.join().expect("a writer");
        writers.into_iter().map(join).collect()
    });
    let read = || block_on(shared.root.read(ByteRange::new(0, LENGTH))).ok();
    // Each fault that is left strikes once.
    let bytes = (0..20).find_map(|_| read()).expect("read");
    for model in models {
        assert!(known(&model, &bytes), "seed {seed}: wrong bytes in the end");
    }
}

/// A client that meddles with a mirror until it is ready, and ends it.
async fn meddle(yard: &Yard, shared: &Shared, dice: &Seed) {
    for _ in 0..dice.below(6) {
        shared.go_on(dice.below(30));
        match dice.below(4) {
            0 => {
                if yard.verb(VerbCall::Pause).await.is_ok() {
                    shared.go_on(5);
                    // An error may have paused it before, and be resumed by this.
                    let _ = yard.verb(VerbCall::Resume).await;
                }
            }
            1 => {
                let speed = *dice.pick(&[0, 1 << 20, 64 << 20]);
                let set = yard.verb(VerbCall::SetSpeed { speed }).await;
                set.expect("set");
            }
            2 => {
                let copy_mode = Some(CopyMode::WriteBlocking);
                yard.verb(VerbCall::Change { copy_mode })
                    .await
                    .expect("changed");
            }
            // An error that has stopped it is no reason to stay so.
            _ => {
                let _ = yard.verb(VerbCall::Resume).await;
            }
        }
    }
    yard.verb(VerbCall::SetSpeed { speed: 0 })
        .await
        .expect("set");
    let _ = yard.verb(VerbCall::Resume).await;
    yard.until(Status::Ready).await;
    shared.go_on(dice.below(100));
    let end = match dice.below(5) {
        0 => VerbCall::Cancel { force: true },
        1 => VerbCall::Cancel { force: false },
        _ => VerbCall::Complete,
    };
    // An error may have paused it again.
    while yard.verb(end.clone()).await.is_err() {
        let _ = yard.verb(VerbCall::Resume).await;
    }
    yard.until(Status::Null).await;
    shared.go_on(30);
}

fn random_mirror(seed: u64) {
    let dice = Seed::new(seed ^ 0x31a7);
    let yard = block_on(Yard::new());
    let mut spec = MirrorSpec {
        device: "s".to_owned(),
        target: "t".to_owned(),
        granularity: *dice.pick(&[None, None, Some(512), Some(1 << 20)]),
        buf_size: *dice.pick(&[None, None, Some(4096), Some(3 << 20)]),
        on_target_error: OnError::Stop,
        unmap: dice.one_in(2),
        copy_mode: *dice.pick(&[CopyMode::Background, CopyMode::WriteBlocking]),
        ..MirrorSpec::default()
    };
    match dice.below(3) {
        0 => block_on(yard.add_failing(&dice)),
        format => {
            spec.new_target = Some(NewTargetSpec {
                filename: yard.folder.path().join("t").display().to_string(),
                node_name: Some("t".to_owned()),
                format: Some(if format == 1 { "qcow2" } else { "raw" }.to_owned()),
                exists: false,
            });
        }
    }
    let fails = spec.new_target.is_none();
    let root = block_on(yard.engine.open_root("s", true)).expect("opened");
    let shared = Shared::new(root, fails);
    beside_writers(seed, &shared, || {
        block_on(async {
            shared.go_on(20);
            yard.start(spec).await;
            meddle(&yard, &shared, &Seed::new(seed ^ 0x5ce)).await;
        });
    });
    block_on(shared.root.close()).expect("closed");
}

#[test]
fn random_writers_lose_nothing_beside_a_mirror_that_is_meddled_with() {
    let count = std::env::var("BLOCKYARD_SEEDS").ok();
    let count = count.and_then(|count| count.parse().ok()).unwrap_or(24);
    for seed in 0..count.min(2000) {
        random_mirror(seed);
    }
}

/// Writers that are faster than the copy keep it from ever being done, which is told; once they have to wait for the target,
/// it comes to its end.
#[test]
fn a_mirror_that_falls_behind_says_so_until_its_writers_wait() {
    let yard = block_on(Yard::new());
    let target = yard.folder.path().join("t").display().to_string();
    let spec = MirrorSpec {
        device: "s".to_owned(),
        speed: 2 << 20,
        new_target: Some(NewTargetSpec {
            filename: target,
            format: Some("raw".to_owned()),
            ..NewTargetSpec::default()
        }),
        ..MirrorSpec::default()
    };
    let root = block_on(yard.engine.open_root("s", true)).expect("opened");
    let shared = Shared::new(root, false);
    beside_writers(7, &shared, || {
        block_on(async {
            let has_rates = |job: Option<BlockJobView>| job.and_then(|job| job.rates);
            yard.start(spec).await;
            let behind = loop {
                let rates = has_rates(yard.job().await);
                if let Some(rates) = rates.filter(|rates| !rates.converges()) {
                    break rates;
                }
                shared.go_on(1);
            };
            assert!(behind.dirty_bytes > 4 << 20, "{behind:?}");
            assert!(behind.copied_a_second < 4 << 20, "{behind:?}");
            let jobs = yard.engine.call(Request::QueryJobs).await;
            let Ok(Reply::Jobs(jobs)) = jobs else {
                panic!("no jobs: {jobs:?}");
            };
            assert!(jobs[0].rates.is_some());
            let copy_mode = Some(CopyMode::WriteBlocking);
            let changed = yard.verb(VerbCall::Change { copy_mode }).await;
            changed.expect("changed");
            yard.until(Status::Ready).await;
            let synced = |job: Option<BlockJobView>| job.and_then(|job| job.actively_synced);
            while synced(yard.job().await) != Some(true) {
                shared.go_on(1);
            }
            assert!(has_rates(yard.job().await).is_some_and(|rates| rates.converges()));
            yard.verb(VerbCall::Complete).await.expect("ready");
            yard.until(Status::Null).await;
            shared.go_on(20);
        });
    });
    block_on(shared.root.close()).expect("closed");
}

/// What writers cannot write to the target is copied later. Meanwhile the job copies everything else at its own speed, and once
/// there is nothing else it says that it does not get on.
#[test]
fn writers_whose_target_fails_hold_nothing_else_up() {
    const CHUNK: usize = 1 << 20;
    let yard = block_on(Yard::new());
    let root = block_on(yard.engine.open_root("s", true)).expect("opened");
    block_on(async {
        let written = root.write(0, vec![7; LENGTH as usize]).await;
        written.expect("written");
        yard.add_target_with(vec![InjectError {
            event: "none".to_owned(),
            sector: Some(0),
            ..InjectError::default()
        }])
        .await;
        yard.start(MirrorSpec {
            device: "s".to_owned(),
            target: "t".to_owned(),
            speed: 2 << 20,
            on_target_error: OnError::Ignore,
            copy_mode: CopyMode::WriteBlocking,
            ..MirrorSpec::default()
        })
        .await;
        let is_copied = || {
            let bytes = std::fs::read(yard.folder.path().join("t")).expect("read");
            bytes[CHUNK..].iter().all(|byte| *byte == 7)
        };
        let (mut copied, mut told) = (false, false);
        let begin = Instant::now();
        while !told && begin.elapsed() < Duration::from_secs(30) {
            root.write(0, vec![8; 512]).await.expect("written");
            copied = copied || is_copied();
            let rates = yard.job().await.and_then(|job| job.rates);
            told = copied && rates.is_some_and(|rates| !rates.converges());
        }
        assert!(copied, "{:?}", yard.job().await);
        assert!(told, "{:?}", yard.job().await);
        let cancelled = yard.verb(VerbCall::Cancel { force: true }).await;
        cancelled.expect("cancelled");
        yard.until(Status::Null).await;
        root.close().await.expect("closed");
    });
}

/// Checksums are of what the job has read, so what is written on both sides is read again: that keeps no job from being ready, and
/// from its end, beside writers that never pause.
#[test]
fn a_mirror_with_checksums_comes_to_its_end_beside_writers_that_never_pause() {
    let yard = block_on(Yard::new());
    let target = yard.folder.path().join("t");
    let manifest = yard.folder.path().join("m");
    let spec = MirrorSpec {
        device: "s".to_owned(),
        speed: 16 << 20,
        copy_mode: CopyMode::WriteBlocking,
        new_target: Some(NewTargetSpec {
            filename: target.display().to_string(),
            format: Some("raw".to_owned()),
            ..NewTargetSpec::default()
        }),
        integrity: IntegritySpec {
            manifest: Some(manifest.clone()),
            verify: true,
            ..IntegritySpec::default()
        },
        ..MirrorSpec::default()
    };
    let root = block_on(yard.engine.open_root("s", true)).expect("opened");
    let shared = Shared::new(root, false);
    beside_writers(11, &shared, || {
        block_on(async {
            shared.go_on(200);
            yard.start(spec).await;
            yard.until(Status::Ready).await;
            shared.go_on(200);
            yard.verb(VerbCall::Complete).await.expect("ready");
            yard.until(Status::Null).await;
            assert!(manifest.exists());
            shared.go_on(20);
        });
    });
    block_on(shared.root.close()).expect("closed");
}
