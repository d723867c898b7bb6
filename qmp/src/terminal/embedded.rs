//! [`Embedded`]: an engine inside the command itself, whose jobs are shown while they run and cancelled by signals.

use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;
use std::time::{Duration, Instant};

use blockyard_engine::engine::{BackendChoice, Engine, EngineConfig, EngineHandle};
use blockyard_engine::error::EngineError;
use blockyard_engine::event::{Event, EventKind};
use blockyard_engine::images::{ImageEvent, ImageReply, ImageSpec, ImageWatch, ImageWork};
use blockyard_engine::job::status::Status;
use blockyard_engine::job::verb::VerbCall;
use blockyard_engine::reply::{ImageView, JobView, LayerView, NodeView, PlanView, Reply};
use blockyard_engine::request::{
    BackingRef, BitmapChange, CommonOptions, DetectZeroes, Discard, DriverSpec, FileSpec, JobSpec,
    NamedBy, NodeRef, NodeSpec, PlanSpec, PlannedJob, Qcow2Spec, Request, VerbFamily, WorkSpec,
};
use clap::{Args, ValueEnum};
use tokio::sync::{mpsc, watch};

use crate::signals::Signals;
use crate::terminal::display::{Display, Figures};
use crate::terminal::exit::Exit;
use crate::terminal::images::image_policy;
use crate::terminal::node_files::{call, files_of_nodes, naming, not_saved};

/// How often a running job is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How the engine works.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct EngineArguments {
    /// How files are read and written: past the page cache where the file system can (auto), only past it (none), or
    /// through it (writeback)
    // Past it by default: a copy is read once, and would push out what others need, then wait for all of it to be
    // written at the end anyway.
    #[arg(long, value_enum, value_name = "MODE", default_value_t = Cache::Auto)]
    pub(crate) cache: Cache,
    /// What carries requests to the kernel; auto: io_uring where it is allowed
    #[arg(long, alias = "backend", value_enum, value_name = "KIND", default_value_t = IoBackend::Auto)]
    pub(crate) io_backend: IoBackend,
}

/// Whether the page cache is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cache {
    Auto,
    None,
    Writeback,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum IoBackend {
    Auto,
    #[value(name = "io_uring")]
    IoUring,
    Threads,
}

/// A file or device to open as a node.
#[derive(Clone, Debug)]
pub(crate) struct NodeFile {
    pub(crate) name: &'static str,
    pub(crate) path: PathBuf,
    pub(crate) is_device: bool,
    pub(crate) read_only: bool,
    /// How much of it is used, in whole sectors.
    pub(crate) size_bytes: u64,
    pub(crate) discard: Discard,
    pub(crate) detect_zeroes: DetectZeroes,
}

/// The file or device of an image, as it is.
#[derive(Clone, Debug)]
pub(crate) struct ImageFile {
    pub(crate) name: &'static str,
    pub(crate) path: PathBuf,
    pub(crate) is_device: bool,
    pub(crate) read_only: bool,
    pub(crate) sharing: Sharing,
    /// Whether room that is given up goes back to the file system.
    pub(crate) discard: Discard,
    pub(crate) named_by: NamedBy,
}

/// Who may use a file meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// Others may read it.
    Readers,
    /// Others may do whatever they want.
    Everything,
}

/// Signals that come so soon after the first one are the same wish.
const ECHO: Duration = Duration::from_millis(200);

/// Whether a signal has asked to end. The second one ends the process at once.
#[derive(Clone)]
pub(crate) struct Interrupt {
    asked: watch::Receiver<bool>,
}

impl Interrupt {
    /// Begins to listen, on a runtime.
    fn listen() -> std::io::Result<Self> {
        let mut signals = Signals::new()?;
        let (ask, asked) = watch::channel(false);
        tokio::spawn(async move {
            signals.next().await;
            ask.send_replace(true);
            // timeout(1) sends its signal to the process and then to its group: that is one wish.
            let echo = tokio::time::sleep(ECHO);
            tokio::pin!(echo);
            loop {
                tokio::select! {
                    () = &mut echo => break,
                    () = signals.next() => {}
                }
            }
            signals.next().await;
            eprintln!("blockyard: ended at once by the second signal, without cleaning up");
            std::process::exit(i32::from(Exit::Cancelled.code()));
        });
        Ok(Self { asked })
    }

    /// Whether it has been asked.
    pub(crate) fn is_asked(&self) -> bool {
        *self.asked.borrow()
    }

    /// Ends once it has been asked.
    async fn wait(&mut self) {
        if self.asked.wait_for(|asked| *asked).await.is_err() {
            // Nobody listens any more, so nobody will ask.
            std::future::pending::<()>().await;
        }
    }
}

/// A running engine, and what its jobs are shown on.
pub(crate) struct Embedded {
    engine: EngineHandle,
    events: mpsc::UnboundedReceiver<Event>,
    /// Where jobs are shown.
    pub(crate) display: Display,
    /// Whether to end early.
    pub(crate) interrupt: Interrupt,
    cache: Cache,
}

/// What a command came to.
pub(crate) trait CameTo {
    /// Whether it has done what it was asked for.
    fn is_success(&self) -> bool;
}

impl<T, E> CameTo for Result<T, E> {
    fn is_success(&self) -> bool {
        self.is_ok()
    }
}

/// Runs `work` with an engine of its own, which has ended when this returns.
///
/// # Errors
/// When engine, runtime or signals cannot be had: `work` has not begun. When something could not be saved at the end, as by a last
/// flush that failed, although `work` has done what it was asked for. If that has failed, its own reason matters more; what was
/// lost is told on standard error then.
pub(crate) fn with_engine<T: CameTo, F: Future<Output = (T, Display)>>(
    arguments: EngineArguments,
    display: Display,
    work: impl FnOnce(Embedded) -> F,
) -> Result<(T, Display), (String, Display)> {
    let config = EngineConfig {
        // Source and target of a job live on one thread, and there is one job at a time.
        data_threads: 1,
        backend: match arguments.io_backend {
            IoBackend::Auto => BackendChoice::Auto,
            IoBackend::IoUring => BackendChoice::Uring,
            IoBackend::Threads => BackendChoice::Threads,
        },
        images: image_policy(),
        ..EngineConfig::default()
    };
    // The worker takes the signals, also while the work computes.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build();
    let started = runtime
        .map_err(|error| format!("cannot start: {error}"))
        .and_then(|runtime| {
            let guard = runtime.enter();
            let interrupt = Interrupt::listen().map_err(|error| format!("signals: {error}"))?;
            drop(guard);
            let engine = Engine::start(config).map_err(|error| error.text)?;
            Ok((runtime, interrupt, engine))
        });
    let (runtime, interrupt, engine) = match started {
        Ok(started) => started,
        Err(text) => return Err((text, display)),
    };
    let handle = engine.handle();
    let (heard, events) = mpsc::unbounded_channel();
    handle.subscribe(Box::new(move |event| {
        let _ = heard.send(event.clone());
    }));
    let embedded = Embedded {
        engine: handle.clone(),
        events,
        display,
        interrupt,
        cache: arguments.cache,
    };
    let (outcome, files) = runtime.block_on(async {
        let outcome = work(embedded).await;
        let files = files_of_nodes(&handle).await;
        // It says no more than that the engine has ended before.
        let _ = handle.call(Request::Quit).await;
        (outcome, files)
    });
    drop(handle);
    let lost = engine.join();
    let (came_to, display) = outcome;
    if lost.is_empty() {
        return Ok((came_to, display));
    }
    let text = not_saved(lost, &files);
    if came_to.is_success() {
        return Err((format!("it was done, but {text}"), display));
    }
    display.error(&text);
    Ok((came_to, display))
}

impl Embedded {
    /// Opens a node and takes its image locks. Returns whether the page cache is bypassed.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) async fn add_node(&self, file: &NodeFile) -> Result<bool, EngineError> {
        if self.cache != Cache::Writeback {
            match self.add_node_as(file, true).await {
                Ok(()) => return Ok(true),
                Err(error) if self.cache == Cache::None => return Err(error),
                // If that was not the reason, the next attempt tells it again.
                Err(error) => tracing::debug!(%error, "no direct I/O, the page cache is used"),
            }
        }
        self.add_node_as(file, false).await.map(|()| false)
    }

    /// Opens a qcow2 image to copy from or to, in the same way.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) async fn add_qcow2_to_copy(
        &self,
        file: &NodeFile,
        backing: BackingRef,
    ) -> Result<bool, EngineError> {
        let add = |direct| {
            let below = NodeSpec {
                node_name: None,
                ..Self::below(file, direct)
            };
            let node = NodeSpec {
                node_name: Some(file.name.to_owned()),
                common: CommonOptions {
                    detect_zeroes: Some(file.detect_zeroes),
                    ..below.common
                },
                driver: DriverSpec::Qcow2(Box::new(Qcow2Spec {
                    backing: backing.clone(),
                    ..Qcow2Spec::over(NodeRef::Inline(Box::new(below)))
                })),
            };
            self.call(Request::BlockdevAdd(node))
        };
        if self.cache != Cache::Writeback {
            match add(true).await {
                Ok(_) => return Ok(true),
                Err(error) if self.cache == Cache::None => return Err(error),
                Err(error) => tracing::debug!(%error, "no direct I/O, the page cache is used"),
            }
        }
        add(false).await.map(|_| false)
    }

    async fn add_node_as(&self, file: &NodeFile, direct: bool) -> Result<(), EngineError> {
        let below = Self::below(file, direct);
        self.call(Request::BlockdevAdd(NodeSpec {
            node_name: Some(file.name.to_owned()),
            common: CommonOptions {
                detect_zeroes: Some(file.detect_zeroes),
                ..below.common
            },
            // A window: a device may be longer than what is copied onto it.
            driver: DriverSpec::Raw {
                file: NodeRef::Inline(Box::new(below)),
                offset: None,
                size: Some(file.size_bytes),
            },
        }))
        .await
        .map(drop)
    }

    /// The file or device below a node.
    fn below(file: &NodeFile, direct: bool) -> NodeSpec {
        let common = CommonOptions {
            read_only: Some(file.read_only),
            discard: Some(file.discard),
            cache_direct: Some(direct),
            ..CommonOptions::default()
        };
        let spec = FileSpec {
            filename: file.path.clone(),
            // From before the target is touched until after it has been verified.
            exclusive: true,
            ..FileSpec::default()
        };
        NodeSpec {
            node_name: Some(format!("{}-file", file.name)),
            common,
            driver: if file.is_device {
                DriverSpec::HostDevice(spec)
            } else {
                DriverSpec::File(spec)
            },
        }
    }

    /// Opens the file of an image and takes its image locks.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) async fn add_image_file(&self, file: &ImageFile) -> Result<(), EngineError> {
        let name = Some(file.name.to_owned());
        let node = self.file_node(file, name);
        self.call(Request::BlockdevAdd(node)).await.map(drop)
    }

    /// Opens a qcow2 image and its chain, as far as the names in it may be followed, and takes their image locks.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) async fn add_qcow2(
        &self,
        file: &ImageFile,
        backing: BackingRef,
    ) -> Result<(), EngineError> {
        let node = self.qcow2_node(file, backing);
        self.call(Request::BlockdevAdd(node)).await.map(drop)
    }

    /// Lets a qcow2 image that was opened for writing be read only from now on; what it keeps is in it then.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) async fn make_qcow2_read_only(
        &self,
        file: &ImageFile,
        backing: BackingRef,
    ) -> Result<(), EngineError> {
        let file = ImageFile {
            read_only: true,
            ..file.clone()
        };
        self.reopen_qcow2(&file, backing).await
    }

    /// Opens a qcow2 image that is open in another way: for writing, or for reading only.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) async fn reopen_qcow2(
        &self,
        file: &ImageFile,
        backing: BackingRef,
    ) -> Result<(), EngineError> {
        let nodes = vec![self.qcow2_node(file, backing)];
        self.call(Request::BlockdevReopen { nodes }).await.map(drop)
    }

    /// Changes a dirty bitmap of a node.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) async fn change_bitmap(&self, change: BitmapChange) -> Result<(), EngineError> {
        self.call(Request::ChangeBitmap(change)).await.map(drop)
    }

    fn qcow2_node(&self, file: &ImageFile, backing: BackingRef) -> NodeSpec {
        let below = self.file_node(file, None);
        NodeSpec {
            node_name: Some(file.name.to_owned()),
            common: below.common,
            driver: DriverSpec::Qcow2(Box::new(Qcow2Spec {
                backing,
                ..Qcow2Spec::over(NodeRef::Inline(Box::new(below)))
            })),
        }
    }

    fn file_node(&self, file: &ImageFile, node_name: Option<String>) -> NodeSpec {
        let spec = FileSpec {
            filename: file.path.clone(),
            exclusive: file.sharing == Sharing::Readers,
            named_by: file.named_by.clone(),
            ..FileSpec::default()
        };
        NodeSpec {
            node_name,
            common: CommonOptions {
                read_only: Some(file.read_only),
                discard: Some(file.discard),
                force_share: Some(file.sharing == Sharing::Everything),
                cache_direct: Some(self.cache == Cache::None),
                ..CommonOptions::default()
            },
            driver: match file.is_device {
                true => DriverSpec::HostDevice(spec),
                false => DriverSpec::File(spec),
            },
        }
    }

    /// What a node shows, and what is behind it.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) async fn image_view(&self, name: &str) -> Result<ImageView, EngineError> {
        self.node_view(name).await.map(|node| node.image)
    }

    /// What is known of a node.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) async fn node_view(&self, name: &str) -> Result<NodeView, EngineError> {
        let views = self
            .call(Request::QueryNamedBlockNodes { flat: false })
            .await?;
        let found = match views {
            Reply::Nodes(nodes) => nodes.into_iter().find(|node| node.node_name == name),
            _ => None,
        };
        let missing = || EngineError::generic("Internal error: a node is lost (bug)");
        found.ok_or_else(missing)
    }

    /// Does something with the image on a node, shown under `name`; `told` hears what is told meanwhile. A signal cancels
    /// it; its end is waited for all the same.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) async fn work_on_image(
        &mut self,
        name: &str,
        node: &str,
        work: ImageWork,
        told: impl FnMut(&Display, ImageEvent),
    ) -> Result<ImageReply, EngineError> {
        let (watcher, watch) = ImageWatch::new();
        let request = Request::Image(ImageSpec {
            node: node.to_owned(),
            work,
            watcher,
        });
        match self.watched(name, request, watch, told).await? {
            Reply::Image(reply) => Ok(reply),
            _ => Err(EngineError::generic("Internal error: another reply (bug)")),
        }
    }

    /// Finds out what a job within a chain would come to, shown under `name`. A signal cancels it.
    ///
    /// # Errors
    /// The engine's, as the job's before it is started.
    pub(crate) async fn plan(
        &mut self,
        name: &str,
        job: PlannedJob,
    ) -> Result<PlanView, EngineError> {
        let (watcher, watch) = ImageWatch::new();
        let request = Request::Plan(PlanSpec { job, watcher });
        match self.watched(name, request, watch, |_, _| ()).await? {
            Reply::Plan(view) => Ok(*view),
            _ => Err(EngineError::generic("Internal error: another reply (bug)")),
        }
    }

    /// Sends a request and shows how far it is.
    async fn watched(
        &mut self,
        name: &str,
        request: Request,
        mut watch: ImageWatch,
        mut told: impl FnMut(&Display, ImageEvent),
    ) -> Result<Reply, EngineError> {
        let engine = self.engine.clone();
        let mut reply = pin!(call(&engine, request));
        let mut cancelled = false;
        let mut look = tokio::time::interval(LOOK_EVERY);
        let outcome = loop {
            tokio::select! {
                event = watch.next() => told(&self.display, event),
                outcome = &mut reply => break outcome,
                () = self.interrupt.wait(), if !cancelled => {
                    cancelled = true;
                    self.display.note("cancelling (once more ends at once)");
                    watch.cancel();
                }
                _ = look.tick() => {
                    let (done, total) = watch.progress();
                    self.display.phase(name, done, total);
                }
            }
        };
        while let Some(event) = watch.try_next() {
            told(&self.display, event);
        }
        self.display.forget(name);
        outcome
    }

    /// The images of a chain, from the top down.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) async fn chain(&self, node: &str) -> Result<Vec<LayerView>, EngineError> {
        let node_name = node.to_owned();
        match self.call(Request::QueryChain { node_name }).await? {
            Reply::Chain(layers) => Ok(layers),
            _ => Err(EngineError::generic("Internal error: another reply (bug)")),
        }
    }

    /// Closes a node.
    ///
    /// # Errors
    /// The engine's. When something was lost by that, as by a last flush that failed: the node is closed then.
    pub(crate) async fn delete_node(&self, name: &str) -> Result<(), EngineError> {
        let files = files_of_nodes(&self.engine).await;
        let node_name = name.to_owned();
        match self.call(Request::BlockdevDel { node_name }).await? {
            Reply::Closed { lost } if !lost.is_empty() => {
                Err(EngineError::generic(not_saved(lost, &files)))
            }
            _ => Ok(()),
        }
    }

    /// Runs a job to its end, on the display if it is `shown`; a mirror is completed once it has converged. A signal cancels it; its end is
    /// waited for all the same. Returns the job as it was at its end.
    ///
    /// # Errors
    /// When the job is refused.
    pub(crate) async fn run_job(
        &mut self,
        id: &str,
        work: WorkSpec,
        shown: bool,
    ) -> Result<JobView, EngineError> {
        // What was heard so far is about jobs that are over, perhaps of the same name.
        while self.events.try_recv().is_ok() {}
        self.call(Request::StartJob(JobSpec {
            id: Some(id.to_owned()),
            auto_finalize: true,
            // What it came to is asked for first.
            auto_dismiss: false,
            work,
        }))
        .await?;
        self.until_concluded(id, shown).await;
        let view = self.job(id).await;
        self.display.forget(id);
        // A job that was cancelled before it began is gone already.
        let _ = self.verb(id, VerbCall::Dismiss).await;
        let mut view = view.ok_or_else(|| EngineError::generic("Operation canceled"))?;
        view.error = naming(&self.engine, view.error).await;
        view.failed_at = naming(&self.engine, view.failed_at).await;
        Ok(view)
    }

    async fn until_concluded(&mut self, id: &str, shown: bool) {
        let mut cancelled = false;
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                event = self.events.recv() => {
                    let Some(event) = event else {
                        return;
                    };
                    let status = self.heard(id, &event.kind).await;
                    if let Some(Status::Concluded | Status::Null) = status {
                        return;
                    }
                }
                () = self.interrupt.wait(), if !cancelled => {
                    cancelled = true;
                    self.display.note("cancelling (once more ends at once, without cleaning up)");
                    // It is refused when the job has just ended.
                    let _ = self.verb(id, VerbCall::Cancel { force: true }).await;
                }
                _ = look.tick(), if shown => if let Some(job) = self.job(id).await {
                    let figures = Figures {
                        id,
                        status: job.status.name(),
                        current_bytes: job.current_progress,
                        total_bytes: job.total_progress,
                    };
                    self.display.progress(&figures, Instant::now());
                },
            }
        }
    }

    /// Acts on an event of the job; returns its new status, if it has one.
    async fn heard(&self, id: &str, event: &EventKind) -> Option<Status> {
        match event {
            EventKind::JobStatusChange { id: of, status } if of == id => Some(*status),
            EventKind::BlockJobReady(figures) if figures.id == id => {
                // It is refused when a signal has just cancelled the job.
                let _ = self.verb(id, VerbCall::Complete).await;
                None
            }
            _ => None,
        }
    }

    async fn verb(&self, id: &str, verb: VerbCall) -> Result<Reply, EngineError> {
        self.call(Request::JobVerb {
            family: VerbFamily::Job,
            id: id.to_owned(),
            verb,
        })
        .await
    }

    async fn job(&self, id: &str) -> Option<JobView> {
        match self.call(Request::QueryJobs).await {
            Ok(Reply::Jobs(jobs)) => jobs.into_iter().find(|job| job.id == id),
            _ => None,
        }
    }

    async fn call(&self, request: Request) -> Result<Reply, EngineError> {
        call(&self.engine, request).await
    }
}
