//! Work on whole images through the front door: a check is told, holds its node, and ends when nobody wants it any more.
#![forbid(unsafe_code)]

use std::os::unix::fs::FileExt;

use blockyard_engine::engine::{Engine, EngineConfig, EngineHandle};
use blockyard_engine::error::EngineError;
use blockyard_engine::images::{
    CheckSpec, CheckView, ImageEvent, ImageReply, ImageSpec, ImageWatch, ImageWatcher, ImageWork,
    RepairChoice, Severity,
};
use blockyard_engine::job::status::Status;
use blockyard_engine::reply::Reply;
use blockyard_engine::request::{
    CommonOptions, CreatePreallocation, CreateQcow2Spec, CreateSpec, DriverSpec, FileSpec, JobSpec,
    NodeRef, NodeSpec, Request, WorkSpec,
};

/// An engine with a qcow2 image of many small clusters, all of them allocated, on the node `file`.
struct Yard {
    engine: EngineHandle,
    folder: tempfile::TempDir,
}

impl Yard {
    async fn new() -> Self {
        let engine = Engine::start(EngineConfig::default());
        let yard = Self {
            engine: engine.expect("the engine starts").handle(),
            folder: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder"),
        };
        let path = yard.folder.path().join("image.qcow2");
        std::fs::write(&path, b"").expect("made");
        let file = FileSpec {
            filename: path,
            ..FileSpec::default()
        };
        let node = NodeSpec {
            node_name: Some("file".to_owned()),
            common: CommonOptions::default(),
            driver: DriverSpec::File(file),
        };
        yard.call(Request::BlockdevAdd(node)).await.expect("added");
        yard.create().await;
        yard
    }

    async fn call(&self, request: Request) -> Result<Reply, EngineError> {
        self.engine.call(request).await
    }

    async fn create(&self) {
        let spec = CreateQcow2Spec {
            file: NodeRef::Name("file".to_owned()),
            data_file: None,
            data_file_raw: false,
            extended_l2: false,
            size: 4 << 20,
            version_2: false,
            backing_file: None,
            backing_fmt: None,
            encrypt: None,
            cluster_size: Some(512),
            preallocation: Some(CreatePreallocation::Metadata),
            lazy_refcounts: false,
            refcount_bits: None,
            zstd: false,
        };
        let job = JobSpec {
            id: Some("create".to_owned()),
            auto_finalize: true,
            auto_dismiss: false,
            work: WorkSpec::Create(CreateSpec::Qcow2(Box::new(spec))),
        };
        self.call(Request::StartJob(job)).await.expect("started");
        loop {
            let Ok(Reply::Jobs(jobs)) = self.call(Request::QueryJobs).await else {
                panic!("jobs are listed");
            };
            if jobs.first().map(|job| job.status) == Some(Status::Concluded) {
                assert_eq!(jobs.first().and_then(|job| job.error.clone()), None);
                return;
            }
            tokio::task::yield_now().await;
        }
    }

    /// Makes every stored count 0.
    fn forget_counts(&self) {
        let path = self.folder.path().join("image.qcow2");
        let bytes = std::fs::read(&path).expect("readable");
        let word = |at: usize| {
            let bytes = bytes[at..at + 8].try_into().expect("eight bytes");
            u64::from_be_bytes(bytes)
        };
        let table = usize::try_from(word(48)).expect("small");
        let file = std::fs::OpenOptions::new().write(true).open(path);
        let file = file.expect("opened");
        for index in 0..64 {
            let block = word(table + index * 8);
            if block != 0 {
                file.write_all_at(&[0; 512], block).expect("written");
            }
        }
    }

    async fn check(
        &self,
        repair: Option<RepairChoice>,
        watcher: ImageWatcher,
    ) -> Result<CheckView, EngineError> {
        let spec = ImageSpec {
            node: "file".to_owned(),
            work: ImageWork::Check(CheckSpec { repair }),
            watcher,
        };
        match self.call(Request::Image(spec)).await? {
            Reply::Image(ImageReply::Checked(view)) => Ok(view),
            other => panic!("another reply: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_sound_image_is_checked() {
    let yard = Yard::new().await;
    let (watcher, watch) = ImageWatch::new();
    let view = yard.check(None, watcher).await.expect("checked");
    assert_eq!((view.corruptions, view.leaks, view.check_errors), (0, 0, 0));
    assert_eq!((view.total_clusters, view.allocated_clusters), (8192, 8192));
    let (done, total) = watch.progress();
    assert!(done > 65_536 && done <= total, "{done} of {total}");
}

#[tokio::test]
async fn findings_and_repairs_are_told_in_order() {
    let yard = Yard::new().await;
    yard.forget_counts();
    let (watcher, mut watch) = ImageWatch::new();
    let mut told = Vec::new();
    let mut reply = std::pin::pin!(yard.check(Some(RepairChoice::All), watcher));
    let view = loop {
        tokio::select! {
            event = watch.next() => told.push(event),
            view = &mut reply => break view.expect("repaired"),
        }
    };
    while let Some(event) = watch.try_next() {
        told.push(event);
    }
    assert_eq!((view.corruptions, view.leaks), (0, 0));
    assert!(view.corruptions_fixed > 8192, "{view:?}");
    let repaired = told.iter().position(|event| {
        *event
            == ImageEvent::Repaired {
                corruptions: view.corruptions_fixed,
                leaks: 0,
            }
    });
    let repaired = repaired.expect("told");
    assert_eq!(repaired, told.len() - 1, "nothing is found any more");
    let ImageEvent::Found(found) = &told[0] else {
        panic!("findings come first");
    };
    assert_eq!(found[0].severity, Severity::Corruption);
    assert_eq!(found[0].text, "ERROR cluster 0 refcount=0 reference=1");
}

#[tokio::test]
async fn a_check_holds_its_node_until_nobody_wants_it_any_more() {
    let yard = Yard::new().await;
    yard.forget_counts();
    let (watcher, mut watch) = ImageWatch::new();
    let mut waiting = std::pin::pin!(yard.check(None, watcher));
    tokio::select! {
        event = watch.next() => assert!(matches!(event, ImageEvent::Found(_))),
        ended = &mut waiting => panic!("it has ended: {ended:?}"),
    }
    // There is more to tell than is kept for somebody who does not listen, so it cannot end.
    let refused = yard
        .call(Request::BlockdevDel {
            node_name: "file".to_owned(),
        })
        .await
        .expect_err("it is in use");
    assert_eq!(refused.text, "Node file is in use");
    let (other, _watch) = ImageWatch::new();
    let refused = yard.check(Some(RepairChoice::All), other).await;
    assert!(refused.is_err(), "two at once");
    drop(watch);
    let cancelled = waiting.await.expect_err("cancelled");
    assert_eq!(cancelled.text, "Operation canceled");
    yard.call(Request::BlockdevDel {
        node_name: "file".to_owned(),
    })
    .await
    .expect("free again");
}
