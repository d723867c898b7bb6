//! An engine with its events and files, and the jobs that are tried beside users outside of the graph.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use blockyard_engine::engine::{Engine, EngineConfig, EngineHandle};
use blockyard_engine::error::EngineError;
use blockyard_engine::event::{Event, EventKind};
use blockyard_engine::job::error_policy::OnError;
use blockyard_engine::job::status::Status;
use blockyard_engine::job::verb::VerbCall;
use blockyard_engine::reply::Reply;
use blockyard_engine::request::{
    BackupPerf, BackupSpec, CbwOptions, CommonOptions, CopyMode, CreateQcow2Spec, CreateSpec,
    DriverSpec, FileSpec, IntegritySpec, JobSpec, MirrorSpec, NodeRef, NodeSpec, Qcow2Spec,
    Request, SyncMode, VerbFamily, WorkSpec,
};
use blockyard_storage::ByteRange;

pub(crate) const LENGTH: u64 = 4 << 20;

/// An engine, its events, and a folder for its files.
pub(crate) struct Yard {
    pub(crate) engine: EngineHandle,
    pub(crate) events: Mutex<Receiver<Event>>,
    pub(crate) folder: tempfile::TempDir,
}

impl Yard {
    pub(crate) fn new() -> Self {
        Self::with(|_| EngineConfig::default())
    }

    /// The same, whose folder says how the engine is set up.
    pub(crate) fn with(config: impl FnOnce(&Path) -> EngineConfig) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let config = EngineConfig {
            data_threads: 2,
            ..config(folder.path())
        };
        let engine = Engine::start(config).expect("the engine starts").handle();
        let (heard, events) = channel();
        engine.subscribe(Box::new(move |event| {
            let _ = heard.send(event.clone());
        }));
        Self {
            engine,
            events: events.into(),
            folder,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) async fn call(&self, request: Request) -> Result<Reply, EngineError> {
        self.engine.call(request).await
    }

    /// Adds a raw node over a new file that holds this byte everywhere.
    pub(crate) async fn add(&self, name: &str, byte: u8) -> PathBuf {
        let path = self.path(name);
        let file = std::fs::File::create(&path).expect("made");
        match byte {
            0 => file.set_len(LENGTH).expect("sized"),
            byte => file
                .write_all_at(&vec![byte; LENGTH as usize], 0)
                .expect("written"),
        }
        let file = NodeSpec {
            node_name: None,
            common: CommonOptions::default(),
            driver: DriverSpec::File(FileSpec {
                filename: path.clone(),
                ..FileSpec::default()
            }),
        };
        let spec = NodeSpec {
            node_name: Some(name.to_owned()),
            common: CommonOptions::default(),
            driver: DriverSpec::Raw {
                file: NodeRef::Inline(Box::new(file)),
                offset: None,
                size: None,
            },
        };
        self.call(Request::BlockdevAdd(spec)).await.expect("added");
        path
    }

    pub(crate) async fn remove(&self, name: &str) -> Result<Reply, EngineError> {
        let node_name = name.to_owned();
        self.call(Request::BlockdevDel { node_name }).await
    }

    pub(crate) async fn start(&self, work: WorkSpec) -> Result<Reply, EngineError> {
        let spec = JobSpec {
            id: Some("j".to_owned()),
            auto_finalize: true,
            auto_dismiss: true,
            work,
        };
        self.call(Request::StartJob(spec)).await
    }

    pub(crate) async fn verb(&self, verb: VerbCall) {
        let request = Request::JobVerb {
            family: VerbFamily::BlockJob,
            id: "j".to_owned(),
            verb,
        };
        self.call(request).await.expect("accepted");
    }

    /// Waits for a status of the job.
    pub(crate) fn until(&self, wanted: Status) {
        loop {
            let events = self.events.lock().expect("one waits");
            let event = events
                .recv_timeout(Duration::from_secs(30))
                .expect("an event");
            if let EventKind::BlockJobCompleted {
                error: Some(error), ..
            } = &event.kind
            {
                panic!("failed: {error}");
            }
            if matches!(event.kind, EventKind::JobStatusChange { status, .. } if status == wanted) {
                return;
            }
        }
    }

    /// Names of nodes that somebody uses as a root.
    pub(crate) async fn roots(&self) -> Vec<String> {
        let Ok(Reply::Graph(graph)) = self.call(Request::QueryBlockGraph).await else {
            panic!("not a graph");
        };
        let roots = graph.edges.iter().filter(|edge| edge.name == "root");
        let name = |id| {
            let mut nodes = graph.nodes.iter();
            let found = nodes.find(|node| node.id == id);
            found.map(|node| node.name.clone()).unwrap_or_default()
        };
        roots.map(|edge| name(edge.child)).collect()
    }
}

pub(crate) fn backup() -> WorkSpec {
    WorkSpec::Backup(BackupSpec {
        device: "s".to_owned(),
        target: "t".to_owned(),
        sync: SyncMode::Full,
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
    })
}

pub(crate) fn mirror(copy_mode: CopyMode) -> WorkSpec {
    WorkSpec::Mirror(MirrorSpec {
        device: "s".to_owned(),
        target: "t".to_owned(),
        filter_node_name: Some("filter".to_owned()),
        copy_mode,
        ..MirrorSpec::default()
    })
}

pub(crate) fn block_on(future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    runtime.expect("a runtime").block_on(future);
}

pub(crate) fn holds(path: &Path, range: ByteRange, byte: u8) -> bool {
    let bytes = std::fs::read(path).expect("read");
    let place = range.offset() as usize..range.end() as usize;
    bytes[place].iter().all(|other| *other == byte)
}

impl Yard {
    /// Adds a qcow2 node over a new image without a backing file.
    pub(crate) async fn add_image(&self, name: &str) {
        self.add_long_image(name, LENGTH).await;
    }

    /// The same of this length in bytes.
    pub(crate) async fn add_long_image(&self, name: &str, size: u64) {
        let path = self.path(name);
        std::fs::File::create(&path).expect("made");
        let file = NodeSpec {
            node_name: Some(format!("{name}-file")),
            common: CommonOptions::default(),
            driver: DriverSpec::File(FileSpec {
                filename: path,
                ..FileSpec::default()
            }),
        };
        self.call(Request::BlockdevAdd(file)).await.expect("added");
        let file = NodeRef::Name(format!("{name}-file"));
        let spec = CreateQcow2Spec {
            file: file.clone(),
            data_file: None,
            data_file_raw: false,
            extended_l2: false,
            size,
            version_2: false,
            backing_file: None,
            backing_fmt: None,
            encrypt: None,
            cluster_size: None,
            preallocation: None,
            lazy_refcounts: false,
            refcount_bits: None,
            zstd: false,
        };
        let create = CreateSpec::Qcow2(Box::new(spec));
        self.start(WorkSpec::Create(create)).await.expect("started");
        self.until(Status::Null);
        let image = NodeSpec {
            node_name: Some(name.to_owned()),
            common: CommonOptions::default(),
            driver: DriverSpec::Qcow2(Box::new(Qcow2Spec::over(file))),
        };
        self.call(Request::BlockdevAdd(image)).await.expect("added");
    }
}
