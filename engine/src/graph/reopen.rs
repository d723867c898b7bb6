//! Nodes that are opened in another way while they are in use: for writing, or not any more.
//!
//! ```text
//!   files opened anew -> records: permissions, more image locks -> data threads, one node after the other -> fewer image locks
//! ```
//! Nodes that come to be written are changed from the file upwards, those that are not to be written any more from the image
//! downwards, so that what an image holds in memory can always be written back. If one cannot be changed, those before it go
//! back. Image locks stay with the descriptor that was opened first.

use std::io;

use blockyard_ring::{HostFile, OpenMode};
use blockyard_storage::error::errno_text;

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::Graph;
use crate::graph::host_files::in_background;
use crate::graph::inactive::look_anew;
use crate::graph::linking::{Change, Link};
use crate::graph::permissions::Permissions;
use crate::graph::records::{BACKING_ROLE, Edge, NodeRecord, Records, User};
use crate::node::build::NodePlan;

/// Nodes that were opened for writing and are to be read-only again.
#[derive(Debug, Default)]
#[must_use = "the nodes stay writable without it"]
pub struct Writable {
    nodes: Vec<WasReadOnly>,
}

#[derive(Debug)]
struct WasReadOnly {
    id: NodeId,
    /// The file as it was open, if it had to be opened anew.
    file: Option<HostFile>,
}

impl Graph {
    /// Lets a node be written that is read-only: its image, and what was described with it to hold that. Users go on, and wait
    /// for a moment. Whether the graph is held does not matter.
    ///
    /// # Errors
    /// In QEMU's words: the file may not be written, somebody else is in the way, or what is below was made read-only by its
    /// client. Everything is read-only then as it was.
    pub async fn open_for_writing(&self, id: NodeId) -> Result<Writable, EngineError> {
        self.pin(id).await?;
        let outcome = self.make_writable(id).await;
        self.release(id, &pin(id)).await;
        outcome
    }

    /// The same for a node that an edge of the caller keeps where it is.
    pub(super) async fn make_writable(&self, id: NodeId) -> Result<Writable, EngineError> {
        let before = self.records.borrow().following(id, false);
        let mut change = Change::default();
        let mut was = Vec::new();
        for node in before {
            if node.force_share {
                let text = "force-share=on can only be used with read-only images";
                return Err(EngineError::generic(text));
            }
            let again = reopened_file(&node, false, node.cache_direct).await?;
            let old = file_of(&node.plan).filter(|_| again.is_some()).cloned();
            was.push(WasReadOnly {
                id: node.id,
                file: old,
            });
            change.nodes.push(with_access(node, false, again));
        }
        self.reopen_nodes(change).await?;
        Ok(Writable { nodes: was })
    }

    /// Makes nodes read-only again that were opened for writing, as far as they are still there and nobody else has come to
    /// write them. Waits for whoever is changing one of them.
    pub async fn restore_read_only(&self, writable: Writable) {
        let Some(first) = writable.nodes.first().map(|was| was.id) else {
            return;
        };
        match self.pin(first).await {
            Ok(()) => {
                self.make_read_only(writable).await;
                self.release(first, &pin(first)).await;
            }
            Err(error) => tracing::warn!(%error, "a node stays writable"),
        }
    }

    /// The same for nodes that an edge of the caller keeps where they are.
    pub(super) async fn make_read_only(&self, writable: Writable) {
        let mut change = Change::default();
        let first = writable.nodes.first().map(|was| was.id);
        for was in writable.nodes {
            let node = self.records.borrow().node(was.id).cloned();
            // Who was given other options meanwhile has its own file open.
            let same_way = |node: &NodeRecord, file: &HostFile| {
                file_of(&node.plan).is_some_and(|now| now.is_direct() == file.is_direct())
            };
            if let Some(node) = node.filter(|node| !node.read_only) {
                let file = was.file.filter(|file| same_way(&node, file));
                change.nodes.push(with_access(node, true, file));
            }
        }
        if let Err(error) = self.reopen_nodes(change).await {
            let records = self.records.borrow();
            let node = first.map(|first| records.name_of(first));
            tracing::warn!(%error, node, "a node stays writable");
        }
    }

    /// Makes a node read-only, and what was described with it to hold it. An edge of the caller keeps it where it is.
    ///
    /// # Errors
    /// In QEMU's words: somebody writes to it. It is writable then as it was.
    pub(super) async fn make_all_read_only(&self, id: NodeId) -> Result<(), EngineError> {
        let before = self.records.borrow().following(id, true);
        let mut change = Change::default();
        for node in before {
            let again = reopened_file(&node, true, node.cache_direct).await?;
            change.nodes.push(with_access(node, true, again));
        }
        self.reopen_nodes(change).await.map(drop)
    }

    /// Puts something else below an image while the image is in use, which reads the same through it: the end of a job that
    /// has copied what was there before. Requests in flight may end on what was below. An edge of the caller keeps the image
    /// where it is, and others from opening it in another way, with what was below it before; both sides are on one thread.
    ///
    /// # Errors
    /// In QEMU's words; what was below is there still.
    pub async fn set_backing_live(
        &self,
        overlay: NodeId,
        backing: Option<NodeId>,
    ) -> Result<(), EngineError> {
        let (mut change, backing) = {
            let records = self.records.borrow();
            let node = records.node(overlay).cloned();
            let mut node = node.ok_or_else(|| EngineError::generic("The node is gone"))?;
            let NodePlan::Qcow2 { backing: below, .. } = &mut node.plan else {
                let text = format!("Node '{}' has nothing below it", node.name);
                return Err(EngineError::generic(text));
            };
            // In the records the filter of a job may be in between; it goes with its job.
            let live = backing.map(|new| records.below_job_filters(new));
            *below = live;
            let mut children = records.children(overlay);
            let from = children.find(|edge| edge.role == BACKING_ROLE);
            let from = from.map(|edge| edge.child);
            if backing.is_some_and(|new| self.thread_of(new) != node.thread) {
                return Err(EngineError::generic(
                    "Layers of one chain are on different threads (bug)",
                ));
            }
            let link = Link {
                user: User::Node(overlay),
                role: BACKING_ROLE,
                from,
                to: backing,
            };
            (Change::new(vec![node], vec![link]), live)
        };
        self.records.borrow_mut().change_nodes(&mut change)?;
        let linked = self.threads.run(self.thread_of(overlay), move |context| {
            Box::pin(async move {
                let below = backing.map(|id| context.node(id));
                match (context.node(overlay), below) {
                    (Some(node), None) => node.set_backing(None),
                    (Some(node), Some(Some(below))) => node.set_backing(Some(below)),
                    _ => return false,
                }
                true
            })
        });
        let linked = linked.await;
        let mut records = self.records.borrow_mut();
        match linked {
            Ok(true) => {
                for id in records.component(overlay) {
                    records.name_again(id);
                }
                records.settle(&change)
            }
            Ok(false) => {
                records.take_back(&mut change);
                Err(EngineError::generic("A node is lost (bug)"))
            }
            Err(error) => {
                records.take_back(&mut change);
                Err(error)
            }
        }
    }

    /// Changes nodes, and what is below them, in the records and on their threads, where the caller keeps them. All or
    /// nothing. What it comes to leads back.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(super) async fn reopen_nodes(&self, mut change: Change) -> Result<Change, EngineError> {
        if change.nodes.is_empty() {
            return Ok(change);
        }
        let changing: Vec<NodeId> = change.nodes.iter().map(|node| node.id).collect();
        let _unlimited = self.suspend_limits(&changing);
        let (steps, taken_over) = {
            let mut records = self.records.borrow_mut();
            let losers = records.losing_write(&change);
            let taken_over = records.taken_over(&change);
            records.change_nodes(&mut change)?;
            (records.steps(&change, &losers), taken_over)
        };
        // Nobody else may change them from here on, and nobody here has looked into them yet.
        let outcome = match look_anew(taken_over).await {
            Ok(()) => self.take_steps(&steps).await,
            Err(error) => Err(error),
        };
        if outcome.is_err() {
            self.records.borrow_mut().take_back(&mut change);
            return outcome.map(|()| change);
        }
        for step in &steps {
            self.take_in_amended(step.id).await;
        }
        let settled = self.records.borrow_mut().settle(&change);
        if let Err(error) = settled {
            tracing::error!(%error, "image locks are kept that are not needed any more");
        }
        Ok(change)
    }

    /// Carries out what becomes of nodes on their threads, and goes back if one step cannot be taken.
    async fn take_steps(&self, steps: &[ReopenStep]) -> Result<(), EngineError> {
        for (place, step) in steps.iter().enumerate() {
            let Err(error) = self.take_step(step.id, step.new.clone()).await else {
                continue;
            };
            for done in steps.iter().take(place).rev() {
                if let Err(error) = self.take_step(done.id, done.old.clone()).await {
                    let records = self.records.borrow();
                    let node = records.name_of(done.id);
                    tracing::error!(%error, node, "a node cannot go back to what it was");
                }
            }
            return Err(error);
        }
        Ok(())
    }

    async fn take_step(&self, id: NodeId, plan: NodePlan) -> Result<(), EngineError> {
        let reopened = self.threads.run(self.thread_of(id), move |context| {
            Box::pin(async move {
                let lost = || EngineError::generic("A node is lost (bug)");
                let node = context.node(id).ok_or_else(lost)?;
                node.reopen(&context, &plan).await
            })
        });
        reopened.await?
    }

    /// Keeps a node, and what is connected with it, on its thread until the edge of [`pin`] is released, and others from
    /// changing one of them. Waits for whoever is doing that.
    ///
    /// # Errors
    /// Never, but for what is a bug.
    pub(super) async fn pin(&self, id: NodeId) -> Result<(), EngineError> {
        loop {
            self.wait_until_still(id).await;
            let released = self.arrived.notified();
            {
                let mut records = self.records.borrow_mut();
                let component = records.component(id);
                if !records.has_command(&component) {
                    return records.change_edges(|edges| edges.push(pin(id)));
                }
            }
            released.await;
        }
    }

    /// Waits until a node is not on its way to another thread.
    pub(super) async fn wait_until_still(&self, id: NodeId) {
        loop {
            let arrived = self.arrived.notified();
            if !self.records.borrow().moving.contains(&id) {
                return;
            }
            arrived.await;
        }
    }
}

/// What becomes of one node on its thread.
struct ReopenStep {
    id: NodeId,
    new: NodePlan,
    old: NodePlan,
}

impl Records {
    /// A node and what follows it, as far as all of it changes when the node is to be written or not any more.
    pub(super) fn following(&self, id: NodeId, read_only: bool) -> Vec<NodeRecord> {
        let mut found = Vec::new();
        let mut next = vec![id];
        while let Some(id) = next.pop() {
            let Some(node) = self.node(id).filter(|node| node.read_only != read_only) else {
                continue;
            };
            found.push(node.clone());
            let holds = self.heirs(id).filter(|edge| edge.role != BACKING_ROLE);
            let silent = |child: &NodeId| {
                let node = self.node(*child);
                node.is_some_and(|node| node.said.read_only.is_none())
            };
            next.extend(holds.map(|edge| edge.child).filter(silent));
        }
        found
    }

    /// Nodes that are not to be written any more, each before what it writes to.
    fn losing_write(&self, change: &Change) -> Vec<NodeId> {
        let loses = |id: NodeId| {
            let now = self.node(id).is_some_and(NodeRecord::takes_writes);
            let then = change.nodes.iter().find(|node| node.id == id);
            now && then.is_some_and(|node| !node.takes_writes())
        };
        let mut order = self.parents_first(change.nodes.iter().map(|node| node.id));
        order.retain(|id| loses(*id));
        order
    }

    /// The steps of a change that the records show already, in an order in which each can be taken.
    fn steps(&self, change: &Change, losers: &[NodeId]) -> Vec<ReopenStep> {
        let mut order = self.parents_first(change.nodes.iter().map(|node| node.id));
        order.reverse();
        order.retain(|id| !losers.contains(id));
        order.extend(losers);
        let step = |id: NodeId| {
            let old = change.nodes.iter().find(|node| node.id == id)?;
            Some(ReopenStep {
                id,
                new: self.node(id)?.plan.clone(),
                old: old.plan.clone(),
            })
        };
        order.into_iter().filter_map(step).collect()
    }
}

/// What keeps nodes on their thread while they are opened in another way.
pub(super) fn pin(id: NodeId) -> Edge {
    Edge {
        user: User::Command,
        child: id,
        role: "root",
        taken: Permissions::NONE,
        shared: Permissions::EVERY,
    }
}

fn file_of(plan: &NodePlan) -> Option<&HostFile> {
    match plan {
        NodePlan::File { file, .. } => Some(file),
        _ => None,
    }
}

/// The file of a node opened once more, if what is open does not do for what the node is to be.
///
/// # Errors
/// In QEMU's words.
pub(super) async fn reopened_file(
    node: &NodeRecord,
    read_only: bool,
    direct: bool,
) -> Result<Option<HostFile>, EngineError> {
    let Some(file) = file_of(&node.plan) else {
        return Ok(None);
    };
    let opened = file_for(file, read_only, direct).await;
    opened.map_err(|error| not_opened(node, &error))
}

/// The file of a node could not be opened once more.
pub(super) fn not_opened(node: &NodeRecord, error: &io::Error) -> EngineError {
    let reason = match error.raw_os_error() {
        Some(errno) => errno_text(errno),
        None => error.to_string(),
    };
    EngineError::generic(format!("Could not open '{}': {reason}", node.filename))
}

/// A file opened once more, if what is open does not do.
///
/// # Errors
/// What the kernel says.
pub(super) async fn file_for(
    file: &HostFile,
    read_only: bool,
    direct: bool,
) -> io::Result<Option<HostFile>> {
    if (read_only || file.is_writable()) && file.is_direct() == direct {
        return Ok(None);
    }
    let mode = OpenMode {
        write: !read_only,
        direct,
        create: false,
    };
    let old = file.clone();
    let opened = in_background(move || {
        let new = old.reopened(mode)?;
        let is_protected = mode.write && new.is_write_protected()?;
        Ok((new, is_protected))
    });
    match opened.await? {
        (_, true) => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "The device is not writable",
        )),
        (new, false) => Ok(Some(new)),
    }
}

/// A node that may be written or not, on another open file if one is given.
pub(super) fn with_access(
    mut node: NodeRecord,
    now_read_only: bool,
    new_file: Option<HostFile>,
) -> NodeRecord {
    node.read_only = now_read_only;
    node.plan.set_access(now_read_only, node.inactive);
    if let (NodePlan::File { file, .. }, Some(new)) = (&mut node.plan, new_file) {
        *file = new;
    }
    node
}
