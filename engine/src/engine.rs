//! The front door: start an engine, call it, listen to it.

use std::path::PathBuf;
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Duration;

pub use blockyard_ring::heap::share_one_heap;
pub use blockyard_ring::inherited::inherited_descriptor;
pub use blockyard_ring::{BackendChoice, probe};
use blockyard_storage::buffer::BufferPool;
use tokio::sync::{mpsc, oneshot};
use tokio::task::LocalSet;

use crate::bitmap::LOOK_PAUSE;
use crate::data::ThreadSet;
use crate::error::EngineError;
use crate::event::Event;
use crate::graph::Graph;
use crate::image_policy::ImagePolicy;
use crate::limits::BUFFER_BUDGET_BYTES;
use crate::manager::{Call, Manager, keep_records_short, serve};
use crate::node::news::News;
use crate::reply::Reply;
use crate::request::Request;
use crate::root_handle::RootHandle;
use crate::state::StateDir;

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Data threads of the engine's own; at least one.
    pub data_threads: usize,
    /// Bytes of all transfer buffers together.
    pub buffer_budget_bytes: usize,
    /// How host files are read and written.
    pub backend: BackendChoice,
    /// How far names that stand in images are trusted.
    pub images: ImagePolicy,
    /// The directory that keeps what has to be found again after the daemon was killed; none: that is not kept.
    pub state_dir: Option<PathBuf>,
    /// How often it is looked at whether what that says of bitmaps is to be written down anew.
    pub state_look_pause: Duration,
}

impl Default for EngineConfig {
    /// One data thread a core, four at most; io_uring where it is allowed.
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            data_threads: cores.min(4),
            buffer_budget_bytes: BUFFER_BUDGET_BYTES,
            backend: BackendChoice::Auto,
            images: ImagePolicy::default(),
            state_dir: None,
            state_look_pause: LOOK_PAUSE,
        }
    }
}

/// A running engine: the manager's thread and the data threads.
pub struct Engine {
    handle: EngineHandle,
    manager: JoinHandle<Vec<String>>,
}

/// A way to call an engine from any thread.
#[derive(Clone)]
pub struct EngineHandle {
    calls: mpsc::UnboundedSender<Call>,
}

impl Engine {
    /// Starts an engine without nodes and jobs.
    ///
    /// # Errors
    /// When a thread or its reactor cannot be had.
    pub fn start(config: EngineConfig) -> Result<Self, EngineError> {
        if config.backend == BackendChoice::Auto
            && let Err(reason) = probe()
        {
            tracing::warn!(%reason, "io_uring cannot be used, files are served by threads");
        }
        let (calls, incoming) = mpsc::unbounded_channel();
        let (started, answer) = std::sync::mpsc::channel();
        let manager = std::thread::Builder::new()
            .name("manager".to_owned())
            .spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_time()
                    .build();
                let runtime = match runtime {
                    Ok(runtime) => runtime,
                    Err(error) => {
                        let _ = started.send(Err(EngineError::generic(error.to_string())));
                        return Vec::new();
                    }
                };
                let pause = config.state_look_pause;
                let lost = LocalSet::new().block_on(&runtime, async move {
                    match Manager::new(config) {
                        Ok(manager) => {
                            let _ = started.send(Ok(()));
                            tokio::task::spawn_local(keep_records_short(manager.clone(), pause));
                            serve(manager, incoming).await
                        }
                        Err(error) => {
                            let _ = started.send(Err(error));
                            Vec::new()
                        }
                    }
                });
                // An open that is stuck in the kernel holds nobody up, not even the end.
                runtime.shutdown_background();
                lost
            })
            .map_err(|error| EngineError::generic(format!("Cannot start the manager: {error}")))?;
        match answer.recv() {
            Ok(Ok(())) => Ok(Self {
                handle: EngineHandle { calls },
                manager,
            }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(EngineError::generic("The manager ended while it started")),
        }
    }

    /// A way to call this engine.
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }

    /// Waits for the end of the engine: after [`Request::Quit`], or when no other handle is left. Jobs have ended and
    /// nodes are closed then. What was lost by that, in words, naming nodes: last flushes that failed or did not end, jobs and
    /// requests that did not end.
    #[must_use = "what was lost has not been told to anybody yet"]
    pub fn join(self) -> Vec<String> {
        drop(self.handle);
        self.manager
            .join()
            .unwrap_or_else(|_| vec!["The manager ended by a panic (this is a bug)".to_owned()])
    }
}

impl EngineHandle {
    /// Carries out one request. Events raised by it have been heard by every listener when it returns.
    ///
    /// # Errors
    /// As the request's; also when the engine has ended.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the answer; the request is carried out all the same.
    pub async fn call(&self, request: Request) -> Result<Reply, EngineError> {
        self.call_then(request, |outcome| outcome).await
    }

    /// Carries out one request and lets `then` have the outcome on the manager's thread, in the step that made it:
    /// listeners hear events of before it before, and events of after it after `then` runs. It must not block. Returns
    /// what it returns.
    ///
    /// # Errors
    /// When the engine has ended: `then` is not called.
    ///
    /// # Cancel safety
    /// Dropping the future abandons what `then` returns; request and `then` are carried out all the same.
    pub async fn call_then<T: Send + 'static>(
        &self,
        request: Request,
        then: impl FnOnce(Result<Reply, EngineError>) -> Result<T, EngineError> + Send + 'static,
    ) -> Result<T, EngineError> {
        let (done, result) = oneshot::channel();
        let gone = || EngineError::generic("The daemon is ending");
        let answer = Box::new(move |outcome| {
            // The caller may have given up.
            let _ = done.send(then(outcome));
        });
        self.calls
            .send(Call::Request(Box::new(request), answer))
            .map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }

    /// A way to read the node of this name, and to write it if `writable`, as exports do.
    ///
    /// # Errors
    /// In QEMU's words: the node is not there, or others do not allow it; also when the engine has ended.
    ///
    /// # Cancel safety
    /// Nothing is open then.
    pub async fn open_root(
        &self,
        node_name: &str,
        writable: bool,
    ) -> Result<RootHandle, EngineError> {
        let gone = || EngineError::generic("The daemon is ending");
        let (answer, opened) = oneshot::channel();
        let call = Call::OpenRoot {
            node_name: node_name.to_owned(),
            writable,
            answer,
        };
        self.calls.send(call).map_err(|_| gone())?;
        let place = opened.await.map_err(|_| gone())??;
        Ok(RootHandle::new(place, self.calls.downgrade()))
    }

    /// Lets `listener` hear every event from now on: in order, on the manager's thread. It must not block.
    pub fn subscribe(&self, listener: Box<dyn Fn(&Event) + Send>) {
        let _ = self.calls.send(Call::Listen(listener));
    }
}

impl Manager {
    /// A manager with its threads, its graph and a task that hears reports.
    fn new(config: EngineConfig) -> Result<Rc<Self>, EngineError> {
        let pool = BufferPool::new(config.buffer_budget_bytes);
        let (news, mut told) = News::channel();
        let threads = ThreadSet::start(config.data_threads, config.backend, pool.clone(), news)?;
        let (reports, mut heard) = mpsc::unbounded_channel();
        let state = config
            .state_dir
            .as_deref()
            .map(StateDir::open)
            .transpose()?;
        let graph = Graph::new(threads.clone(), config.images, state);
        let manager = Rc::new(Self::with(graph, threads, pool, reports));
        let listener = Rc::downgrade(&manager);
        tokio::task::spawn_local(async move {
            loop {
                let report = tokio::select! {
                    biased;
                    Some(news) = told.recv() => Err(news),
                    Some(report) = heard.recv() => Ok(report),
                    else => return,
                };
                let Some(manager) = listener.upgrade() else {
                    return;
                };
                match report {
                    Err(news) => manager.tell(news),
                    Ok((key, report)) => {
                        // What a node has told before a job failed by it is published before.
                        while let Ok(news) = told.try_recv() {
                            manager.tell(news);
                        }
                        manager.hear(key, report);
                    }
                }
            }
        });
        Ok(manager)
    }
}
