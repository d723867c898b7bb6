//! Jobs on real files: what they copy, what they leave alone, and what keeps two programs off one image.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use blockyard_engine::engine::{BackendChoice, Engine, EngineConfig, EngineHandle};
use blockyard_engine::error::EngineError;
use blockyard_engine::event::{Event, EventKind};
use blockyard_engine::job::error_policy::OnError;
use blockyard_engine::job::status::Status;
use blockyard_engine::job::verb::VerbCall;
use blockyard_engine::reply::Reply;
use blockyard_engine::request::{
    BackupPerf, BackupSpec, CbwOptions, CommonOptions, CreatePreallocation, CreateSpec, DriverSpec,
    FileSpec, IntegritySpec, JobSpec, MirrorSpec, NodeRef, NodeSpec, Request, SyncMode, VerbFamily,
    WorkSpec,
};
use blockyard_ring::file_attributes;
use proptest::prelude::*;

/// An engine, its events, and a folder for its files.
struct Yard {
    engine: EngineHandle,
    events: Receiver<Event>,
    folder: tempfile::TempDir,
}

impl Yard {
    fn new(backend: BackendChoice) -> Self {
        let config = EngineConfig {
            data_threads: 2,
            backend,
            ..EngineConfig::default()
        };
        let engine = Engine::start(config).expect("the engine starts").handle();
        let (heard, events) = channel();
        engine.subscribe(Box::new(move |event| {
            let _ = heard.send(event.clone());
        }));
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        Self {
            engine,
            events,
            folder,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file of `length` bytes with data where `runs` say.
    fn image(&self, name: &str, length: u64, runs: &[(u64, u64)]) -> PathBuf {
        let path = self.path(name);
        let file = std::fs::File::create(&path).expect("made");
        file.set_len(length).expect("sized");
        for (offset, run) in runs {
            let run = (*run).min(length.saturating_sub(*offset));
            let bytes: Vec<u8> = (0..run)
                .map(|index| ((offset + index) / 7 % 251) as u8 | 1)
                .collect();
            file.write_all_at(&bytes, *offset).expect("written");
        }
        path
    }

    async fn call(&self, request: Request) -> Result<Reply, EngineError> {
        self.engine.call(request).await
    }

    /// Adds a raw node over a file.
    async fn add(&self, name: &str, path: &Path, direct: bool) -> Result<Reply, EngineError> {
        let file = NodeSpec {
            node_name: None,
            common: CommonOptions::default(),
            driver: DriverSpec::File(FileSpec {
                filename: path.to_owned(),
                ..FileSpec::default()
            }),
        };
        let common = CommonOptions {
            cache_direct: Some(direct),
            ..CommonOptions::default()
        };
        let file = NodeRef::Inline(Box::new(file));
        let driver = DriverSpec::Raw {
            file,
            offset: None,
            size: None,
        };
        let spec = NodeSpec {
            node_name: Some(name.to_owned()),
            common,
            driver,
        };
        self.call(Request::BlockdevAdd(spec)).await
    }

    async fn start(&self, id: &str, work: WorkSpec) -> Result<Reply, EngineError> {
        let spec = JobSpec {
            id: Some(id.to_owned()),
            auto_finalize: true,
            auto_dismiss: false,
            work,
        };
        self.call(Request::StartJob(spec)).await
    }

    async fn verb(&self, id: &str, verb: VerbCall) {
        let request = Request::JobVerb {
            family: VerbFamily::Job,
            id: id.to_owned(),
            verb,
        };
        self.call(request).await.expect("accepted");
    }

    /// Waits for a status of a job.
    fn until(&self, wanted: Status) {
        loop {
            let event = self
                .events
                .recv_timeout(Duration::from_secs(30))
                .expect("an event");
            if matches!(event.kind, EventKind::JobStatusChange { status, .. } if status == wanted) {
                return;
            }
        }
    }

    /// The error of a job, if it failed.
    async fn error(&self, id: &str) -> Option<String> {
        match self.call(Request::QueryJobs).await {
            Ok(Reply::Jobs(jobs)) => {
                jobs.into_iter()
                    .find(|job| job.id == id)
                    .expect("listed")
                    .error
            }
            other => panic!("not a list of jobs: {other:?}"),
        }
    }
}

fn backup(speed: i64) -> WorkSpec {
    WorkSpec::Backup(BackupSpec {
        device: "s".to_owned(),
        target: "t".to_owned(),
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

fn mirror() -> WorkSpec {
    WorkSpec::Mirror(MirrorSpec {
        device: "s".to_owned(),
        target: "t".to_owned(),
        ..MirrorSpec::default()
    })
}

/// Copies an image of `length` bytes with data in `runs` over a target with data in `stale`, and compares.
async fn copies(
    backend: BackendChoice,
    mirrors: bool,
    direct: bool,
    length: u64,
    runs: &[(u64, u64)],
    stale: &[(u64, u64)],
) {
    let yard = Yard::new(backend);
    let source = yard.image("s.img", length, runs);
    let target = yard.image("t.img", length, stale);
    if yard.add("s", &source, direct).await.is_err() {
        eprintln!("SKIPPED: no direct I/O on {}", source.display());
        return;
    }
    yard.add("t", &target, direct).await.expect("added");
    yard.start("j", if mirrors { mirror() } else { backup(0) })
        .await
        .expect("started");
    if mirrors {
        yard.until(Status::Ready);
        yard.verb("j", VerbCall::Complete).await;
    }
    yard.until(Status::Concluded);
    assert_eq!(yard.error("j").await, None);
    let (old, new) = (
        std::fs::read(&source).expect("read"),
        std::fs::read(&target).expect("read"),
    );
    assert!(new.starts_with(&old), "the copy differs");
    assert!(new[old.len()..].iter().all(|byte| *byte == 0) && new.len() - old.len() < 512);
    if stale.is_empty() {
        let room = |path: &Path| std::fs::metadata(path).expect("there").blocks() * 512;
        let (had, has) = (room(&source), room(&target));
        assert!(
            has <= had + (64 << 10),
            "holes were filled: {has} bytes where there were {had}"
        );
    }
}

fn block_on(future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    runtime.expect("a runtime").block_on(future);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn copies_of_anything_are_equal(
        threads in any::<bool>(),
        mirrors in any::<bool>(),
        direct in any::<bool>(),
        length in 0_u64..(6 << 20),
        runs in prop::collection::vec((0_u64..(6 << 20), 0_u64..(1 << 20)), 0..6),
        stale in prop::collection::vec((0_u64..(6 << 20), 0_u64..(1 << 20)), 0..3),
    ) {
        let backend = if threads { BackendChoice::Threads } else { BackendChoice::Auto };
        block_on(copies(backend, mirrors, direct, length, &runs, &stale));
    }
}

#[test]
fn holes_stay_holes() {
    for mirrors in [false, true] {
        let runs = [(0, 65536), (512 << 20, 1 << 20), ((1 << 30) - 4096, 4096)];
        block_on(async {
            let yard = Yard::new(BackendChoice::Auto);
            let source = yard.image("s.img", 1 << 30, &runs);
            let target = yard.image("t.img", 1 << 30, &[]);
            yard.add("s", &source, false).await.expect("added");
            yard.add("t", &target, false).await.expect("added");
            yard.start("j", if mirrors { mirror() } else { backup(0) })
                .await
                .expect("started");
            yard.until(if mirrors {
                Status::Ready
            } else {
                Status::Concluded
            });
            let room = |path: &Path| std::fs::metadata(path).expect("there").blocks() * 512;
            assert!(room(&target) <= room(&source) + (64 << 10));
            let file = std::fs::File::open(&target).expect("opened");
            for (offset, length) in runs {
                let mut bytes = vec![0; length as usize];
                file.read_exact_at(&mut bytes, offset).expect("read");
                assert!(
                    bytes.iter().all(|byte| *byte != 0),
                    "data at {offset} is missing"
                );
            }
        });
    }
}

#[test]
fn a_paused_backup_goes_on_where_it_was_and_a_cancelled_one_leaves_the_source() {
    block_on(async {
        let yard = Yard::new(BackendChoice::Auto);
        let source = yard.image("s.img", 8 << 20, &[(0, 8 << 20)]);
        let target = yard.image("t.img", 8 << 20, &[]);
        let before = std::fs::read(&source).expect("read");
        yard.add("s", &source, false).await.expect("added");
        yard.add("t", &target, false).await.expect("added");
        yard.start("j", backup(1 << 20)).await.expect("started");
        yard.verb("j", VerbCall::Pause).await;
        yard.until(Status::Paused);
        yard.verb("j", VerbCall::SetSpeed { speed: 0 }).await;
        yard.verb("j", VerbCall::Resume).await;
        yard.until(Status::Concluded);
        assert_eq!(yard.error("j").await, None);
        assert!(std::fs::read(&target).expect("read") == before);
        yard.verb("j", VerbCall::Dismiss).await;
        yard.start("j", backup(1 << 20)).await.expect("started");
        yard.verb("j", VerbCall::Cancel { force: true }).await;
        yard.until(Status::Concluded);
        assert_eq!(yard.error("j").await.as_deref(), Some("Operation canceled"));
        assert!(std::fs::read(&source).expect("read") == before);
    });
}

#[test]
fn an_image_written_by_one_job_is_locked_for_others() {
    block_on(async {
        let yard = Yard::new(BackendChoice::Auto);
        let other = Yard::new(BackendChoice::Auto);
        let source = yard.image("s.img", 8 << 20, &[(0, 8 << 20)]);
        let target = yard.image("t.img", 8 << 20, &[]);
        yard.add("s", &source, false).await.expect("added");
        yard.add("t", &target, false).await.expect("added");
        yard.start("j", backup(65536)).await.expect("started");
        other.add("s", &target, false).await.expect("added");
        other.add("t", &source, false).await.expect("added");
        let error = other.start("k", mirror()).await.expect_err("locked");
        let own = std::process::id();
        assert!(error.text.starts_with("Failed to get "), "{error}");
        assert!(
            error.text.ends_with(&format!("(held by process {own})")),
            "{error}"
        );
        yard.verb("j", VerbCall::Cancel { force: true }).await;
        yard.until(Status::Concluded);
        other.start("k", mirror()).await.expect("free again");
        other.until(Status::Ready);
    });
}

#[test]
fn files_that_are_not_images_are_refused_at_once() {
    block_on(async {
        let yard = Yard::new(BackendChoice::Auto);
        let folder = yard.path("folder");
        std::fs::create_dir(&folder).expect("made");
        let fifo = yard.path("fifo");
        let made = std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .expect("mkfifo runs");
        assert!(made.success());
        for (path, text) in [
            (
                fifo.clone(),
                format!(
                    "'file' driver requires '{}' to be a regular file",
                    fifo.display()
                ),
            ),
            (
                folder.clone(),
                format!("Could not open '{}': Is a directory", folder.display()),
            ),
            (
                yard.path("none"),
                format!(
                    "Could not open '{}': No such file or directory",
                    yard.path("none").display()
                ),
            ),
        ] {
            let error = yard.add("n", &path, false).await.expect_err("refused");
            assert_eq!(error.text, text);
        }
        yard.add("n", &yard.image("i.img", 4096, &[]), false)
            .await
            .expect("the name is free");
    });
}

#[test]
fn files_are_created_with_progress_and_without_leftovers() {
    let create = |path: &Path, size, preallocation| {
        WorkSpec::Create(CreateSpec::File {
            filename: path.to_owned(),
            size,
            preallocation: Some(preallocation),
            nocow: false,
            extent_size_hint: None,
        })
    };
    block_on(async {
        let yard = Yard::new(BackendChoice::Auto);
        for (name, how) in [
            ("off", CreatePreallocation::Off),
            ("falloc", CreatePreallocation::Falloc),
            ("full", CreatePreallocation::Full),
        ] {
            let path = yard.path(name);
            yard.start(name, create(&path, 1 << 20, how))
                .await
                .expect("started");
            yard.until(Status::Concluded);
            assert_eq!(yard.error(name).await, None);
            let made = std::fs::metadata(&path).expect("there");
            assert_eq!(made.len(), 1 << 20);
            assert_eq!(
                made.blocks() * 512 >= 1 << 20,
                how != CreatePreallocation::Off,
                "{name}"
            );
        }
        let missing = yard.path("no/such");
        yard.start("c", create(&missing, 1, CreatePreallocation::Off))
            .await
            .expect("started");
        yard.until(Status::Concluded);
        let text = format!(
            "Could not create '{}': No such file or directory",
            missing.display()
        );
        assert_eq!(yard.error("c").await, Some(text));
        let huge = yard.path("huge");
        let work = create(&huge, u64::MAX, CreatePreallocation::Off);
        yard.start("d", work).await.expect("started");
        yard.until(Status::Concluded);
        let text = "Could not resize file: Invalid argument".to_owned();
        assert_eq!(yard.error("d").await, Some(text));
        assert!(!huge.exists(), "what the job made is gone");
        let kept = yard.image("kept", 4096, &[(0, 4096)]);
        let work = create(&kept, u64::MAX, CreatePreallocation::Off);
        yard.start("e", work).await.expect("started");
        yard.until(Status::Concluded);
        assert!(kept.exists(), "what was there before stays");
    });
}

/// A created file carries what a file that is made by hand in the same folder can carry.
#[test]
fn created_files_carry_what_their_file_system_keeps() {
    let create = |path: &Path, nocow, extent_size_hint| {
        WorkSpec::Create(CreateSpec::File {
            filename: path.to_owned(),
            size: 1 << 20,
            preallocation: None,
            nocow,
            extent_size_hint,
        })
    };
    let kept = |path: &Path| {
        let file = OwnedFd::from(std::fs::File::open(path).expect("there"));
        let hint = file_attributes::extent_size_hint(&file).ok().flatten();
        let nocow = file_attributes::avoids_copy_on_write(&file).unwrap_or(false);
        (nocow, hint)
    };
    block_on(async {
        let yard = Yard::new(BackendChoice::Auto);
        let by_hand = yard.path("by-hand");
        let file = OwnedFd::from(std::fs::File::create(&by_hand).expect("made"));
        let outcomes = (
            file_attributes::avoid_copy_on_write(&file),
            file_attributes::set_extent_size_hint(&file, 1 << 20),
        );
        let (nocow, hint) = kept(&by_hand);
        if !nocow || hint.is_none() {
            eprintln!("SKIPPED in part: this file system keeps ({nocow}, {hint:?}): {outcomes:?}");
        }
        for (name, asked, expected) in [
            ("both", (true, None), (nocow, hint)),
            ("neither", (false, Some(0)), (false, None)),
            ("small", (false, Some(65536)), (false, hint.map(|_| 65536))),
        ] {
            let path = yard.path(name);
            let work = create(&path, asked.0, asked.1);
            yard.start(name, work).await.expect("started");
            yard.until(Status::Concluded);
            assert_eq!(yard.error(name).await, None);
            assert_eq!(kept(&path), expected, "{name}");
        }
        let work = create(&yard.path("large"), false, Some(1 << 32));
        yard.start("large", work).await.expect("started");
        yard.until(Status::Concluded);
        let text = "Extent size hint is too large".to_owned();
        assert_eq!(yard.error("large").await, Some(text));
        assert!(!yard.path("large").exists());
    });
}
