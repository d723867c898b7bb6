//! From a request to its handler, one task a request, so that a slow one holds up nobody but its own client.

use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, join, join_all, select};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

use crate::error::{EngineError, ErrorKind};
use crate::graph::RootPlace;
use crate::graph::permissions::Permissions;
use crate::job::context::JobKey;
use crate::job::status::Status;
use crate::manager::Manager;
use crate::manager::publisher::Listener;
use crate::node::root::RootId;
use crate::reply::Reply;
use crate::request::{ExportRequest, NodeSpec, Request};

/// How long the end of the daemon waits for a transaction that is carried out, exports and jobs together.
const USERS_END_WAIT: Duration = Duration::from_secs(30);

/// How much of that exports and jobs have in any case, however long a transaction took.
const USERS_END_WAIT_MIN: Duration = Duration::from_secs(10);

/// How long exports, and then each job, go one behind the other, which is the order in which clients hear of it. What takes longer is
/// stuck, and nothing else waits for it.
const ORDERLY_WAIT: Duration = Duration::from_secs(5);

/// How long a lock may outlive its process: the kernel takes a killed process's ring apart, and with it open files, after its end. 50 ms
/// as a rule, several hundred on a machine that has much to do.
const LOCK_OF_NOBODY_WAIT: Duration = Duration::from_secs(1);

/// How often it is looked whether it is gone.
const LOCK_OF_NOBODY_PAUSE: Duration = Duration::from_millis(25);

/// How long the end of the daemon waits for the last flushes.
const NODES_END_WAIT: Duration = Duration::from_secs(30);

/// The same if somebody was stuck so long that everybody was flushed meanwhile.
const NODES_END_WAIT_LATE: Duration = Duration::from_secs(10);

/// Takes the answer to one request, on the manager's thread and in the step that made it: no event is raised in between.
/// Must not block.
pub(crate) type Answer = Box<dyn FnOnce(Result<Reply, EngineError>) + Send>;

/// What reaches the manager from outside.
pub(crate) enum Call {
    /// A request, and who takes its answer.
    Request(Box<Request>, Answer),
    /// Somebody who wants to hear every event from now on.
    Listen(Listener),
    /// Somebody who wants to read a node, and to write it if so.
    OpenRoot {
        /// Of the node.
        node_name: String,
        /// Whether it is written, too.
        writable: bool,
        /// Takes the way to it.
        answer: oneshot::Sender<Result<RootPlace, EngineError>>,
    },
    /// He does not want to any more, and may want to hear when it is over.
    CloseRoot(RootId, Option<oneshot::Sender<()>>),
}

/// Serves calls until the daemon has quit or nobody can call any more. Every job is ended and every node closed then; what was lost
/// by that, in words.
pub(crate) async fn serve(
    manager: Rc<Manager>,
    mut calls: mpsc::UnboundedReceiver<Call>,
) -> Vec<String> {
    let (quit, mut has_quit) = mpsc::channel(1);
    loop {
        let call = tokio::select! {
            call = calls.recv() => call,
            lost = has_quit.recv() => return lost.unwrap_or_default(),
        };
        match call {
            Some(Call::Listen(listener)) => manager.publisher.add(listener),
            Some(Call::OpenRoot { answer, .. }) if manager.ending.get() => {
                let _ = answer.send(Err(EngineError::generic("The daemon is ending")));
            }
            Some(Call::OpenRoot {
                node_name,
                writable,
                answer,
            }) => {
                let manager = manager.clone();
                tokio::task::spawn_local(async move {
                    let shared = Permissions::EVERY;
                    let opened = manager
                        .graph
                        .open_root(&node_name, writable, shared, false)
                        .await;
                    let id = opened.as_ref().ok().map(|place| place.id);
                    // Who has given up waiting has no use for it.
                    if let (Err(_), Some(id)) = (answer.send(opened), id) {
                        manager.graph.close_root(id).await;
                    }
                });
            }
            Some(Call::CloseRoot(id, answer)) => {
                let manager = manager.clone();
                tokio::task::spawn_local(async move {
                    manager.graph.close_root(id).await;
                    if let Some(answer) = answer {
                        let _ = answer.send(());
                    }
                });
            }
            Some(Call::Request(_, answer)) if manager.ending.get() => {
                answer(Err(EngineError::generic("The daemon is ending")));
            }
            Some(Call::Request(request, answer)) if *request == Request::Quit => {
                manager.ending.set(true);
                let (manager, quit) = (manager.clone(), quit.clone());
                tokio::task::spawn_local(async move {
                    let lost = manager.end_everything().await;
                    let _ = quit.send(lost).await;
                    answer(Ok(Reply::Done));
                });
            }
            Some(Call::Request(request, answer)) => {
                let manager = manager.clone();
                tokio::task::spawn_local(async move {
                    answer(manager.handle(*request).await);
                });
            }
            // Who has asked for the end need not stay until it is there; what is lost meanwhile is told all the same.
            None if manager.ending.get() => {
                drop(quit);
                return has_quit.recv().await.unwrap_or_default();
            }
            None => {
                manager.ending.set(true);
                return manager.end_everything().await;
            }
        }
    }
}

/// Lets what is recorded of bitmaps be written down anew where that pays, until the daemon ends.
pub(crate) async fn keep_records_short(manager: Rc<Manager>, pause: Duration) {
    if manager.graph.state().is_none() {
        return;
    }
    loop {
        tokio::time::sleep(pause).await;
        for node in manager.graph.due_to_be_written_down() {
            // What a transaction has made of a bitmap may yet be taken back.
            let _between_transactions = manager.transacting.read().await;
            if manager.ending.get() {
                return;
            }
            manager.graph.record_bitmaps_of(node).await;
        }
    }
}

impl Manager {
    async fn handle(self: Rc<Self>, request: Request) -> Result<Reply, EngineError> {
        let _between_transactions = match comes_between(&request) {
            true => Some(self.transacting.read().await),
            false => None,
        };
        match request {
            Request::BlockdevAdd(spec) => {
                self.add_node(spec).await?;
                self.go_on_with_checkpoints().await;
            }
            Request::BlockdevDel { node_name } => {
                let lost = self.graph.delete(&node_name).await?;
                return Ok(Reply::Closed { lost });
            }
            Request::BlockResize {
                device,
                node_name,
                size,
            } => {
                self.graph
                    .resize(device.as_deref(), node_name.as_deref(), size)
                    .await?;
            }
            Request::ChangeBackingFile {
                device,
                image_node_name,
                backing_file,
            } => {
                self.graph
                    .change_backing_file(&device, &image_node_name, &backing_file)
                    .await?;
            }
            Request::BlockdevReopen { nodes } => {
                self.graph.reopen(nodes).await?;
                self.go_on_with_checkpoints().await;
            }
            Request::SetActive { node_name, active } => {
                self.graph.set_active(node_name.as_deref(), active).await?;
                if active {
                    self.go_on_with_checkpoints().await;
                }
            }
            Request::BlockdevSnapshot { node, overlay } => {
                let put = self.graph.put_overlay(&node, &overlay).await?;
                self.graph.settle_overlay(put).await;
            }
            Request::NewOverlay(spec) => {
                let put = self.graph.put_new_overlay(&spec).await?;
                self.graph.settle_overlay(put).await;
            }
            Request::DigestBitmap(bitmap) => {
                let digest = self.graph.digest_bitmap(&bitmap).await?;
                return Ok(Reply::BitmapDigest(digest));
            }
            Request::ChangeBitmap(change) => {
                self.graph.change_bitmap(&change).await?.settle();
                self.graph.record_bitmaps(change.node()).await;
            }
            Request::ChangeChildren {
                parent,
                child,
                node,
            } => {
                self.graph
                    .change_children(&parent, child.as_deref(), node.as_deref())?;
            }
            Request::SetIothread {
                node_name,
                iothread,
                force,
            } => {
                self.graph.set_iothread(&node_name, iothread, force).await?;
            }
            Request::ObjectAdd(spec) => self.graph.add_object(spec).await?,
            Request::ListProperties { path } => {
                return Ok(Reply::Properties(self.graph.properties(&path)?));
            }
            Request::Property { path, name } => {
                return Ok(Reply::Property(self.graph.property(&path, &name)?));
            }
            Request::SetProperty { path, name, value } => {
                self.graph.set_property(&path, &name, value)?;
            }
            Request::ObjectDel { id } => self.graph.delete_object(&id).await?,
            Request::QueryNamedBlockNodes { flat } => {
                return Ok(Reply::Nodes(self.graph.views(flat).await));
            }
            Request::QueryBlockGraph => return Ok(Reply::Graph(self.graph.block_graph())),
            Request::QueryChain { node_name } => {
                return Ok(Reply::Chain(self.graph.chain_view(&node_name)?));
            }
            Request::Plan(spec) => {
                return Ok(Reply::Plan(Box::new(self.graph.plan(spec).await?)));
            }
            Request::StartJob(spec) => self.start(spec).await?,
            Request::Transaction { actions, grouped } => self.transact(actions, grouped).await?,
            Request::JobVerb { family, id, verb } => self.verb(family, &id, verb).await?,
            Request::QueryJobs => {
                let jobs = self.jobs.borrow();
                return Ok(Reply::Jobs(
                    jobs.newest_first().map(|job| job.view()).collect(),
                ));
            }
            Request::QueryBlockJobs => {
                let jobs = self.jobs.borrow();
                let block_jobs = jobs.newest_first().filter(|job| job.is_block_job());
                return Ok(Reply::BlockJobs(
                    block_jobs.map(|job| job.block_view()).collect(),
                ));
            }
            Request::CreateInternalSnapshot { device, name } => {
                self.graph.create_snapshot(&device, &name).await?;
            }
            Request::DeleteInternalSnapshot { device, id, name } => {
                let gone = self
                    .graph
                    .delete_snapshot(&device, id.as_deref(), name.as_deref());
                return Ok(Reply::Snapshot(gone.await?));
            }
            Request::Checkpoint(request) => return self.handle_checkpoint(request).await,
            Request::Export(request) => return self.exports.handle(request).await,
            Request::Image(spec) => {
                return Ok(Reply::Image(self.graph.work_on_image(spec).await?));
            }
            Request::Quit => {}
        }
        Ok(Reply::Done)
    }

    /// Opens a node, whose image may still be locked for a moment by a process that was killed.
    async fn add_node(&self, spec: NodeSpec) -> Result<(), EngineError> {
        let until = Instant::now() + LOCK_OF_NOBODY_WAIT;
        loop {
            match self.graph.add(spec.clone()).await {
                Err(error) if error.kind == ErrorKind::LockOfNobody && Instant::now() < until => {
                    tokio::time::sleep(LOCK_OF_NOBODY_PAUSE).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// Closes all exports, quiets all jobs, ends them newest first, and closes every node. What was lost by that, in words.
    async fn end_everything(&self) -> Vec<String> {
        self.graph.end_limits();
        let deadline = Instant::now() + USERS_END_WAIT;
        let mut lost = Vec::new();
        // Bitmaps are not stored as they are in the middle of one.
        let transaction = timeout_at(deadline, self.transaction.lock()).await;
        if transaction.is_err() {
            lost.push("A transaction did not end in time".to_owned());
        }
        let deadline = deadline.max(Instant::now() + USERS_END_WAIT_MIN);
        let (late, is_late) = self.end_users(deadline).await;
        lost.extend(late);
        let wait = match is_late {
            true => NODES_END_WAIT_LATE,
            false => NODES_END_WAIT,
        };
        lost.extend(self.graph.close_all(wait).await);
        self.threads.end();
        lost
    }

    /// Ends exports, and then jobs. Once that takes long something is stuck: then nothing waits for it any more, and all nodes are
    /// flushed meanwhile. What has not ended by `deadline`, in words; and whether there is any.
    async fn end_users(&self, deadline: Instant) -> (Vec<String>, bool) {
        let (exports_ended, jobs_ended) = (Cell::new(false), Cell::new(false));
        let (gone, told) = oneshot::channel();
        let exports = async {
            self.exports.end().await;
            exports_ended.set(true);
            let _ = gone.send(());
        };
        let jobs = async {
            let _ = timeout(ORDERLY_WAIT, told).await;
            self.end_jobs().await;
            jobs_ended.set(true);
        };
        let flushes = async {
            tokio::time::sleep(ORDERLY_WAIT).await;
            self.graph.flush_all().await;
        };
        let all = async {
            match select(pin!(join(exports, jobs)), pin!(flushes)).await {
                Either::Left(_) => {}
                Either::Right(((), users)) => drop(users.await),
            }
        };
        let is_late = timeout_at(deadline, all).await.is_err();
        let mut late = Vec::new();
        if !exports_ended.get() {
            late.push("Requests of clients of exports did not end in time".to_owned());
        }
        if !jobs_ended.get() {
            late.push("Jobs did not end in time".to_owned());
        }
        (late, is_late)
    }

    /// Quiets all jobs, and ends them newest first: one behind the other, as long as that gets on.
    async fn end_jobs(&self) {
        let keys: Vec<_> = self
            .jobs
            .borrow()
            .newest_first()
            .map(|job| job.key)
            .collect();
        let orderly = Instant::now() + ORDERLY_WAIT;
        let quiet = async {
            for key in &keys {
                self.until(*key, |job| job.started).await;
                self.with_job(*key, |job| {
                    job.pause_count += 1;
                    job.order_pause();
                });
            }
            for key in &keys {
                self.until(*key, |job| {
                    job.finished
                        || !job.started
                        || matches!(job.status, Status::Paused | Status::Standby)
                })
                .await;
            }
        };
        let _ = timeout_at(orderly, quiet).await;
        let mut stuck = Vec::new();
        for key in keys {
            let mut end = Box::pin(self.end_job(key));
            // What is late already has begun all the same.
            if timeout_at(orderly, &mut end).await.is_err() {
                stuck.push(end);
            }
        }
        join_all(stuck).await;
    }

    async fn end_job(&self, key: JobKey) {
        self.until_settled(key).await;
        self.with_job(key, |job| {
            job.auto_dismiss = true;
            job.pause_count = job.pause_count.saturating_sub(1);
            job.order_pause();
        });
        let status = self.with_job(key, |job| job.status);
        if status == Some(Status::Concluded) {
            self.dismiss(key);
        } else if status.is_some() {
            self.cancel(key, true).await;
            self.until(key, |job| job.status == Status::Null).await;
        }
    }
}

/// Whether a command would meet with what a transaction has done and may take back.
const fn comes_between(request: &Request) -> bool {
    matches!(
        request,
        Request::BlockdevDel { .. }
            | Request::BlockResize { .. }
            | Request::ChangeBackingFile { .. }
            | Request::BlockdevReopen { .. }
            | Request::SetActive { .. }
            | Request::BlockdevSnapshot { .. }
            | Request::NewOverlay(_)
            | Request::ChangeBitmap(_)
            | Request::SetIothread { .. }
            | Request::StartJob(_)
            | Request::CreateInternalSnapshot { .. }
            | Request::DeleteInternalSnapshot { .. }
            | Request::Export(ExportRequest::Add(_) | ExportRequest::AddLegacy(_))
    )
}
