//! The graph: nodes by name, who uses whom, who may what. Pure data on the manager's thread; the nodes that move bytes live
//! on data threads and are told what to do.
//!
//! Opening, which may take long, happens on other threads while the name is reserved, so that nobody else waits for it.

mod add;
mod amending;
mod backups;
mod bitmaps;
mod blkdebug;
mod chain_ends;
mod chain_jobs;
mod chain_views;
mod chains;
mod checkpoints;
mod children;
mod copy_before_write;
mod copy_on_read;
mod creating;
pub(crate) mod described_images;
mod disk_facts;
mod fault_config;
mod filenames;
mod fixed_options;
mod host_files;
mod image_locks;
pub(crate) mod image_names;
mod image_options;
mod images;
mod inactive;
mod job_bitmaps;
mod jobs;
mod linking;
mod mirroring;
mod moving;
mod named_by_images;
mod names;
mod nbd;
mod new_images;
mod new_overlays;
mod new_targets;
mod objects;
mod options;
mod overlaying;
pub mod permissions;
mod planning;
mod qcow2;
mod reconfiguring;
mod records;
mod reopen;
mod roots;
mod snapshots;
mod throttling;
mod views;
mod writing_down;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use blockyard_storage::error::errno_text;
use tokio::sync::{Mutex, MutexGuard, Notify};

use crate::data::{NodeId, ThreadId, ThreadSet};
use crate::error::{EngineError, NodeError};
use crate::graph::objects::Objects;
use crate::graph::permissions::Permissions;
use crate::graph::records::{Edge, NodeRecord, Records, Resizing, User};
use crate::graph::writing_down::WritingDown;
use crate::image_policy::ImagePolicy;
use crate::limits::NODE_LENGTH_MAX;
use crate::node::NodeFacts;
use crate::request::Permission;
use crate::state::StateDir;

pub use bitmaps::ChangedBitmap;
pub use chain_jobs::ChainPart;
#[cfg(test)]
pub(crate) use checkpoints::changed_since;
pub use checkpoints::{ImageFile, PendingDisk};
pub use jobs::JobNodes;
pub(crate) use names::is_identifier;
pub use overlaying::PutOverlay;
pub use reopen::Writable;
pub use roots::RootPlace;

/// How long closing a node waits for its bitmaps to be written down as they were before.
const WRITING_DOWN_WAIT: Duration = Duration::from_secs(30);

/// How long the end of the daemon waits for requests of users outside of the graph, who have had their time before.
const ROOTS_END_WAIT: Duration = Duration::from_secs(5);

/// The node graph.
pub struct Graph {
    records: RefCell<Records>,
    objects: RefCell<Objects>,
    threads: ThreadSet,
    policy: ImagePolicy,
    /// Where bitmaps are written down.
    state: Option<StateDir>,
    changes: Mutex<()>,
    /// Told when nodes have arrived on another thread, and when a command has changed one.
    arrived: Notify,
    writing_down: WritingDown,
}

/// What a node that a client has let go has lost.
fn log_all(lost: &[String]) {
    for text in lost {
        tracing::error!("{text}");
    }
}

impl Graph {
    /// A graph without nodes, which follows names in images as far as `policy` says and keeps in `state` what has to be found again.
    pub fn new(threads: ThreadSet, policy: ImagePolicy, state: Option<StateDir>) -> Rc<Self> {
        Rc::new(Self {
            records: RefCell::default(),
            objects: RefCell::default(),
            threads,
            policy,
            state,
            changes: Mutex::default(),
            arrived: Notify::new(),
            writing_down: WritingDown::default(),
        })
    }

    /// Keeps every other change of the graph waiting until the guard goes: what takes several steps, between which nodes
    /// must neither vanish nor move to another thread. Opening files is not among them, nor is the end of a job.
    ///
    /// # Cancel safety
    /// Nothing is held then.
    pub async fn hold(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().await
    }

    /// The same, once none of the nodes with these names is on its way to another thread.
    ///
    /// # Cancel safety
    /// Nothing is held then.
    pub async fn hold_named(&self, names: &[&str]) -> MutexGuard<'_, ()> {
        self.hold_while(|records| {
            let named = names.iter().filter_map(|name| records.by_name(name, None));
            named.map(|node| node.id).collect()
        })
        .await
    }

    /// Where is kept what has to be found again after the daemon was killed.
    pub fn state(&self) -> Option<&StateDir> {
        self.state.as_ref()
    }

    /// The node with a name.
    pub fn find(&self, name: &str) -> Option<NodeId> {
        self.records
            .borrow()
            .by_name(name, None)
            .map(|node| node.id)
    }

    /// The node that a command names as its device.
    fn look_up(&self, name: &str) -> Result<NodeId, EngineError> {
        self.find(name).ok_or_else(|| not_found(name, name))
    }

    /// Closes a node that was added by name, and the unnamed ones only it uses. What was lost by that, in words; it is logged, too.
    ///
    /// # Errors
    /// In QEMU's words and order.
    pub async fn delete(&self, name: &str) -> Result<Vec<String>, EngineError> {
        let held = self.hold_named(&[name]).await;
        let id = {
            let records = self.records.borrow();
            let Some(node) = records.by_name(name, None) else {
                let text = format!("Failed to find node with node-name='{name}'");
                return Err(EngineError::generic(text));
            };
            let mut users = records.users(node.id);
            let is_device =
                |edge: &Edge| matches!(edge.user, User::Backend(_) | User::Root(_) | User::Command);
            // Whoever creates an image has its nodes like a device.
            if users.any(is_device) || records.is_being_created(node.id) {
                return Err(EngineError::generic(format!("Node {name} is in use")));
            }
            records.check_free(node.id)?;
            if !node.monitor_owned {
                let text = format!("Node {name} is not owned by the monitor");
                return Err(EngineError::generic(text));
            }
            if records.users(node.id).next().is_some() {
                return Err(EngineError::generic(format!(
                    "Block device {name} is in use"
                )));
            }
            node.id
        };
        let unlinked = self.unlink(id);
        // The last flush may take long; nobody can reach the node any more.
        drop(held);
        let lost = match unlinked {
            Some(unlinked) => self.let_go(unlinked).await,
            None => Vec::new(),
        };
        log_all(&lost);
        Ok(lost)
    }

    /// Lets a node go, makes what was written to it durable, and lets its unnamed children go when nobody else uses
    /// them.
    async fn close(&self, id: NodeId) {
        if let Some(unlinked) = self.unlink(id) {
            log_all(&self.let_go(unlinked).await);
        }
    }

    /// The same unless somebody has come to use the node by its name: then it goes with its last user.
    async fn close_unused(&self, id: NodeId) {
        let used = self.records.borrow().users(id).next().is_some();
        if !used {
            self.close(id).await;
        }
    }

    /// Takes a node out of the records.
    fn unlink(&self, id: NodeId) -> Option<Unlinked> {
        let mut records = self.records.borrow_mut();
        let node = records.node(id).cloned()?;
        let children = records.children(id).map(|edge| edge.child).collect();
        if let Err(error) = records.change_edges(|edges| {
            edges.retain(|edge| edge.user != User::Node(id));
        }) {
            tracing::error!(%error, node = node.name, "a closing node keeps its children");
        }
        records.nodes.retain(|node| node.id != id);
        self.threads.load(node.thread, -1);
        Some(Unlinked { node, children })
    }

    /// The second half of closing a node. What was lost, in words.
    async fn let_go(&self, unlinked: Unlinked) -> Vec<String> {
        let mut lost = Vec::new();
        let mut closing = vec![unlinked];
        while let Some(Unlinked { node, children }) = closing.pop() {
            // Stored after that, its image says so.
            let closes = [node.id];
            let ended = self.writing_down.ended(&closes);
            let _ = tokio::time::timeout(WRITING_DOWN_WAIT, ended).await;
            let dropped = self.drop_node(node.thread, node.id, &node.name).await;
            lost.extend(dropped.err());
            drop(node);
            for child in children {
                let unused = {
                    let records = self.records.borrow();
                    records.node(child).is_some_and(|node| !node.monitor_owned)
                        && records.users(child).next().is_none()
                };
                if unused {
                    closing.extend(self.unlink(child));
                }
            }
        }
        lost
    }

    /// Takes a node off its thread, flushed.
    ///
    /// # Errors
    /// What was lost, in words.
    async fn drop_node(&self, thread: ThreadId, id: NodeId, name: &str) -> Result<(), String> {
        let flushed = self.threads.run(thread, move |context| {
            Box::pin(async move {
                let Some(node) = context.remove_node(id) else {
                    return Ok(Ok(()));
                };
                if !node.facts().read_only {
                    node.flush().await?;
                }
                let stored = node.store_bitmaps().await;
                node.close().await?;
                Ok(stored)
            })
        });
        match flushed.await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(error))) => Err(format!(
                "Node '{name}' has lost its persistent bitmaps: {error}"
            )),
            Ok(Err::<_, NodeError>(error)) => {
                Err(format!("The last flush of node '{name}' failed: {error}"))
            }
            Err(error) => Err(format!("Node '{name}' could not be closed: {error}")),
        }
    }

    /// Makes what was written to every node durable, as far as they answer. Whether that went well shows when they are closed.
    pub async fn flush_all(&self) {
        let nodes: Vec<_> = {
            let records = self.records.borrow();
            let written = records.nodes.iter().filter(|node| !node.read_only);
            written.map(|node| (node.thread, node.id)).collect()
        };
        let flushes = nodes.into_iter().map(|(thread, id)| {
            self.threads.run(thread, move |context| {
                Box::pin(async move {
                    if let Some(node) = context.node(id) {
                        // A failure is one of every later flush, too.
                        let _ = node.flush().await;
                    }
                })
            })
        });
        futures_util::future::join_all(flushes).await;
    }

    /// Closes every node, at the end of the daemon: all at once, so that a disk that does not answer keeps no other from
    /// being flushed, and each for at most `wait`. What was lost, in words.
    pub async fn close_all(&self, wait: Duration) -> Vec<String> {
        let roots = tokio::time::timeout(ROOTS_END_WAIT.min(wait), self.close_roots());
        if roots.await.is_err() {
            tracing::error!("requests of a user of a node do not end");
        }
        let mut closing = Vec::new();
        let overlays_first = {
            let records = self.records.borrow();
            records.parents_first(records.nodes.iter().rev().map(|node| node.id))
        };
        for id in overlays_first {
            {
                let mut records = self.records.borrow_mut();
                records.edges.retain(|edge| edge.child != id);
            }
            closing.extend(self.unlink(id));
        }
        let closed = closing.into_iter().map(|unlinked| async move {
            let name = unlinked.node.name.clone();
            let closed = tokio::time::timeout(wait, self.let_go(unlinked)).await;
            closed.unwrap_or_else(|_| {
                let seconds = wait.as_secs();
                vec![format!(
                    "The last flush of node '{name}' did not end within {seconds} s"
                )]
            })
        });
        let lost = futures_util::future::join_all(closed).await;
        lost.into_iter().flatten().collect()
    }

    /// Changes a node's length.
    ///
    /// # Errors
    /// In QEMU's words.
    pub async fn resize(
        &self,
        device: Option<&str>,
        node_name: Option<&str>,
        size: i64,
    ) -> Result<(), EngineError> {
        let (device, name) = (device.unwrap_or(""), node_name.unwrap_or(""));
        let id = {
            let _held = self.hold_named(&[name]).await;
            let id = self.find(name).ok_or_else(|| not_found(device, name))?;
            if size < 0 {
                return Err(EngineError::generic("Parameter 'size' expects a >0 size"));
            }
            let mut records = self.records.borrow_mut();
            records.check_free(id)?;
            // Two changes at once would leave it open which length is the last.
            records.check_unpinned(&records.component(id), None)?;
            records.change_edges(|edges| edges.push(resizer(id)))?;
            id
        };
        // The edge keeps the node where it is. Nothing else is held: cutting a file may wait for its disk.
        let outcome = self.resize_pinned(id, size.unsigned_abs()).await;
        self.release(id, &resizer(id)).await;
        outcome
    }

    /// Takes back what kept a node where it was while a command changed it.
    async fn release(&self, id: NodeId, mine: &Edge) {
        let is_owned = {
            let mut records = self.records.borrow_mut();
            if let Some(place) = records.edges.iter().position(|edge| edge == mine)
                && let Err(error) = records.change_edges(|edges| {
                    edges.remove(place);
                })
            {
                let node = records.name_of(id);
                tracing::error!(%error, node, "a permission stays taken");
            }
            records.node(id).is_none_or(|node| node.monitor_owned)
        };
        self.arrived.notify_waiters();
        // Its parent may have gone meanwhile.
        if !is_owned {
            self.close_unused(id).await;
        }
    }

    /// What a new length of a node comes to.
    ///
    /// # Errors
    /// In QEMU's words, as far as the graph can tell that the node cannot have it.
    async fn check_length(&self, id: NodeId, size: u64) -> Result<Resizing, EngineError> {
        if size > NODE_LENGTH_MAX {
            return Err(EngineError::generic(format!(
                "offset({size}) exceeds maximum({NODE_LENGTH_MAX})"
            )));
        }
        let resizing = self.records.borrow().resizing(id, size)?;
        if let Resizing::Device {
            device,
            needed_bytes,
        } = resizing
            && self.facts(device).await?.length_bytes < needed_bytes
        {
            return Err(EngineError::generic("Cannot grow device files"));
        }
        Ok(resizing)
    }

    /// Changes the length of a node whose resizing has been permitted.
    async fn resize_pinned(&self, id: NodeId, size: u64) -> Result<(), EngineError> {
        match self.check_length(id, size).await? {
            Resizing::Device { .. } => return Ok(()),
            Resizing::File => {}
            Resizing::Image {
                image,
                length_bytes,
            } => {
                let asked = self.threads.run(self.thread_of(image), move |context| {
                    Box::pin(async move { context.node(image)?.resize_refusal(length_bytes) })
                });
                if let Some(refusal) = asked.await? {
                    return Err(EngineError::generic(refusal));
                }
            }
        }
        let thread = self.thread_of(id);
        let outcome = self
            .threads
            .run(thread, move |context| {
                Box::pin(async move {
                    match context.node(id) {
                        Some(node) => node.resize(size).await.map_err(|error| error.errno()),
                        None => Err(blockyard_storage::error::EIO),
                    }
                })
            })
            .await?;
        outcome.map_err(|errno| {
            EngineError::generic(format!("Could not resize file: {}", errno_text(errno)))
        })
    }

    /// Lets a thread go that a client has added; nodes on it move to the engine's own. The graph is held.
    ///
    /// # Errors
    /// In QEMU's words, when jobs run on it.
    async fn delete_thread<'a>(
        &'a self,
        mut held: MutexGuard<'a, ()>,
        id: &str,
    ) -> Result<(), EngineError> {
        let Some(thread) = self.threads.named(id) else {
            return Ok(());
        };
        loop {
            let next = {
                let records = self.records.borrow();
                let node = records.nodes.iter().find(|node| node.thread == thread);
                let component = node.map(|node| (node.id, records.component(node.id)));
                component.map(|(id, nodes)| {
                    let is_idle =
                        records.jobs_on(&nodes).is_empty() && records.roots_on(&nodes).is_empty();
                    (id, is_idle)
                })
            };
            match next {
                None => break,
                Some((node, true)) => {
                    drop(held);
                    held = self.hold_while(|_| vec![node]).await;
                    if self.thread_of(node) == thread {
                        let to = self.threads.choose();
                        held = self.move_component(held, node, to, None).await?;
                    }
                }
                Some((_, false)) => return Err(objects::in_use(id)),
            }
        }
        self.threads.remove_named(id);
        Ok(())
    }

    /// Moves a node, and all that hangs together with it, to the thread of an object or to one of the engine's own.
    ///
    /// # Errors
    /// When node or object are not there, or a job runs on the nodes.
    pub async fn set_iothread(
        &self,
        node_name: &str,
        iothread: Option<String>,
        force: bool,
    ) -> Result<(), EngineError> {
        let _ = force;
        let held = self.hold_named(&[node_name]).await;
        let id = self.find(node_name).ok_or_else(|| {
            EngineError::generic(format!("Failed to find node with node-name='{node_name}'"))
        })?;
        let thread = match iothread {
            Some(name) => self
                .threads
                .named(&name)
                .ok_or_else(|| EngineError::generic(format!("Cannot find iothread {name}")))?,
            None => self.threads.choose(),
        };
        self.records.borrow().check_no_job(id)?;
        let component = self.records.borrow().component(id);
        if !self.records.borrow().jobs_on(&component).is_empty() {
            let text = format!("Node '{node_name}' is busy: a block job runs on it");
            return Err(EngineError::generic(text));
        }
        if !self.records.borrow().roots_on(&component).is_empty() {
            let text = format!("Node '{node_name}' is busy: somebody outside of the graph uses it");
            return Err(EngineError::generic(text));
        }
        drop(self.move_component(held, id, thread, None).await?);
        Ok(())
    }

    fn thread_of(&self, id: NodeId) -> ThreadId {
        self.records
            .borrow()
            .node(id)
            .map_or(ThreadId(0), |node| node.thread)
    }

    /// Facts of a node as of now.
    async fn facts(&self, id: NodeId) -> Result<NodeFacts, EngineError> {
        let facts = self.threads.run(self.thread_of(id), move |context| {
            Box::pin(async move { context.node(id).map(|node| node.facts()) })
        });
        facts.await?.ok_or_else(|| {
            let text = match self.records.borrow().node(id) {
                None => "The node has been closed meanwhile",
                Some(_) => "Internal error: a node is lost (bug)",
            };
            EngineError::generic(text)
        })
    }
}

/// A node that is no longer in the records, but still on its thread.
struct Unlinked {
    node: NodeRecord,
    children: Vec<NodeId>,
}

/// What a command takes while it changes a node's length.
fn resizer(id: NodeId) -> Edge {
    Edge {
        user: User::Command,
        child: id,
        role: "root",
        taken: Permissions::NONE.with(Permission::Resize),
        shared: Permissions::EVERY,
    }
}

/// The text for a device or node that does not exist.
pub(crate) fn not_found(device: &str, node_name: &str) -> EngineError {
    EngineError::generic(format!(
        "Cannot find device='{device}' nor node-name='{node_name}'"
    ))
}
