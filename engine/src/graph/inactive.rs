//! Nodes whose image somebody else may own: another host that goes on with a disk. An inactive node writes nothing, holds no image
//! lock that keeps others from writing, and what it knows of its image counts for nothing once it is active again.
//!
//! ```text
//!   inactive   writers end -> bitmaps stored, all written back and flushed, image before file -> image locks go
//!   active     image locks come -> page cache and lengths dropped -> read anew, file before image -> writers go on
//! ```
//! On their threads such nodes are read-only ones; only the records know the difference. What stands on an inactive node is
//! inactive, too.

use std::io;

use blockyard_ring::HostFile;
use blockyard_storage::error::{EPERM, errno_text};

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::host_files::in_background;
use crate::graph::linking::{Change, RootAccess};
use crate::graph::permissions::Permissions;
use crate::graph::records::{NodeRecord, Records, User};
use crate::graph::reopen::{pin, reopened_file};
use crate::graph::{Graph, not_found};
use crate::node::build::NodePlan;
use crate::request::Permission;

impl Graph {
    /// Makes a node active, with all below it, or inactive, with what nobody else needs below it. `None`: all nodes.
    ///
    /// # Errors
    /// In QEMU's words. Of one node all is as it was then; of all nodes, those that have become active stay so, and those that
    /// have become inactive are active again.
    pub async fn set_active(
        &self,
        node_name: Option<&str>,
        active: bool,
    ) -> Result<(), EngineError> {
        let Some(name) = node_name else {
            return match active {
                true => self.activate_all().await,
                false => self.inactivate_all().await,
            };
        };
        let found = || {
            let text = format!("Failed to find node with node-name='{name}'");
            self.find(name).ok_or_else(|| EngineError::generic(text))
        };
        let _held = self.hold_named(&[name]).await;
        match active {
            true => self.activate(found()?).await,
            false => self.inactivate(found()?).await.map_err(|refusal| {
                let what = "Failed to inactivate node: ";
                refusal.named(what)
            }),
        }
    }

    /// A node that is to be relied on is made active.
    ///
    /// # Errors
    /// In QEMU's words: it is not there, somebody else is in the way, or its image cannot be read. It is inactive then, as it was.
    pub async fn make_active(&self, name: &str) -> Result<(), EngineError> {
        let _held = self.hold_named(&[name]).await;
        let id = self.find(name).ok_or_else(|| not_found(name, name))?;
        self.activate(id).await
    }

    async fn activate_all(&self) -> Result<(), EngineError> {
        loop {
            let next = |records: &Records| records.next_to_activate();
            let _held = self
                .hold_while(|records| Vec::from_iter(next(records)))
                .await;
            let next = next(&self.records.borrow());
            match next {
                Some(id) => self.activate(id).await?,
                None => return Ok(()),
            }
        }
    }

    async fn inactivate_all(&self) -> Result<(), EngineError> {
        let mut done: Vec<NodeId> = Vec::new();
        loop {
            let next = |records: &Records| records.next_to_inactivate();
            let held = self
                .hold_while(|records| Vec::from_iter(next(records)))
                .await;
            let next = next(&self.records.borrow());
            let Some(id) = next else {
                return Ok(());
            };
            let Err(refusal) = self.inactivate(id).await else {
                done.push(id);
                continue;
            };
            drop(held);
            for id in done.into_iter().rev() {
                let _held = self.hold_while(|_| vec![id]).await;
                if let Err(error) = self.activate(id).await {
                    let records = self.records.borrow();
                    let node = records.name_of(id);
                    tracing::error!(%error, node, "a node stays inactive");
                }
            }
            return Err(refusal.named("Failed to inactivate all nodes: "));
        }
    }

    /// Makes a node active, and all below it. The graph is held.
    ///
    /// # Errors
    /// In QEMU's words: somebody else is in the way, or the image cannot be read. All is inactive then that was.
    pub(super) async fn activate(&self, id: NodeId) -> Result<(), EngineError> {
        self.pin(id).await?;
        let outcome = self.activate_pinned(id).await;
        self.release(id, &pin(id)).await;
        outcome
    }

    async fn activate_pinned(&self, id: NodeId) -> Result<(), EngineError> {
        let mut change = self.records.borrow().activation(id);
        for node in &mut change.nodes {
            let again = reopened_file(node, node.read_only, node.cache_direct).await?;
            node.inactive = false;
            node.plan.set_access(node.read_only, false);
            if let (NodePlan::File { file, .. }, Some(again)) = (&mut node.plan, again) {
                *file = again;
            }
        }
        let activated: Vec<NodeId> = change.nodes.iter().map(|node| node.id).collect();
        self.reopen_nodes(change).await?;
        for id in activated {
            let length_bytes = self.facts(id).await?.length_bytes;
            self.bitmaps_on(id)?.miss(length_bytes);
        }
        Ok(())
    }

    /// Makes a node inactive, and what is below it as far as nobody else needs that. The graph is held.
    pub(super) async fn inactivate(&self, id: NodeId) -> Result<(), Refusal> {
        self.pin(id).await?;
        let outcome = self.inactivate_pinned(id).await;
        self.release(id, &pin(id)).await;
        outcome
    }

    async fn inactivate_pinned(&self, id: NodeId) -> Result<(), Refusal> {
        let mut change = self.records.borrow().inactivation(id)?;
        for node in &mut change.nodes {
            node.inactive = true;
            node.plan.set_access(node.read_only, true);
        }
        Ok(self.reopen_nodes(change).await.map(drop)?)
    }
}

/// Why a node does not become inactive.
pub(super) enum Refusal {
    /// Somebody writes to it, who is not going to stop.
    Written,
    /// Said as a whole.
    Other(EngineError),
}

impl Refusal {
    /// As clients hear it.
    fn named(self, what: &str) -> EngineError {
        match self {
            Self::Written => EngineError::generic(format!("{what}{}", errno_text(EPERM))),
            Self::Other(error) => error,
        }
    }
}

impl From<EngineError> for Refusal {
    fn from(error: EngineError) -> Self {
        Self::Other(error)
    }
}

impl From<Refusal> for EngineError {
    fn from(refusal: Refusal) -> Self {
        refusal.named("Failed to inactivate node: ")
    }
}

impl Records {
    /// Fails if somebody else may own what a node shows.
    pub(super) fn check_active(&self, id: NodeId) -> Result<(), EngineError> {
        match self.node(id) {
            Some(node) if node.inactive => Err(EngineError::generic(format!(
                "Node '{}' is inactive: its image may be somebody else's",
                node.name
            ))),
            _ => Ok(()),
        }
    }

    /// Whether an active node stands on this one.
    fn is_needed(&self, id: NodeId) -> bool {
        self.users(id).any(|edge| match edge.user {
            User::Node(parent) => self.node(parent).is_some_and(|parent| !parent.inactive),
            _ => false,
        })
    }

    /// The node that is to become active next, if all are to: a chain does as a whole.
    fn next_to_activate(&self) -> Option<NodeId> {
        let is_below = |id| {
            self.users(id).any(|edge| match edge.user {
                User::Node(parent) => self.node(parent).is_some_and(|parent| parent.inactive),
                _ => false,
            })
        };
        let mut newest_first = self.newest_first();
        let next = newest_first.find(|node| node.inactive && !is_below(node.id));
        next.map(|node| node.id)
    }

    /// The node that is to become inactive next, if all are to.
    fn next_to_inactivate(&self) -> Option<NodeId> {
        let mut newest_first = self.newest_first();
        let next = newest_first.find(|node| !node.inactive && !self.is_needed(node.id));
        next.map(|node| node.id)
    }

    /// What becomes of all that is inactive from a node downwards: the nodes as they are, and what those outside want of them.
    fn activation(&self, id: NodeId) -> Change {
        let below = self.parents_first([id]);
        let nodes = below.iter().filter_map(|id| self.node(*id));
        let nodes: Vec<NodeRecord> = nodes.filter(|node| node.inactive).cloned().collect();
        let is_one = |id| nodes.iter().any(|node| node.id == id);
        let mut roots = Vec::new();
        for edge in self.edges.iter().filter(|edge| is_one(edge.child)) {
            if let User::Root(id) = edge.user
                && let Some(wish) = self.roots.get(&id)
            {
                roots.push(RootAccess {
                    id,
                    taken: wish.taken,
                    shared: wish.shared,
                });
            }
        }
        let mut change = Change::new(nodes, Vec::new());
        change.roots = roots;
        change
    }

    /// The nodes that become inactive with this one, as they are, and those outside who let go of them.
    ///
    /// # Errors
    /// In QEMU's words: an active node stands on it, somebody writes to one of them, a job uses one, or a bitmap is in use.
    fn inactivation(&self, id: NodeId) -> Result<Change, Refusal> {
        if self.is_needed(id) {
            return Err(EngineError::generic("Node has active parent node").into());
        }
        let mut nodes: Vec<&NodeRecord> = Vec::new();
        let mut roots = Vec::new();
        for id in self.parents_first([id]) {
            let Some(node) = self.node(id).filter(|node| !node.inactive) else {
                continue;
            };
            let becomes = |id| nodes.iter().any(|node| node.id == id);
            let mut users = self.users(id);
            let is_needed = users.any(|edge| match edge.user {
                User::Node(parent) => {
                    let parent = self.node(parent).filter(|parent| !parent.inactive);
                    parent.is_some_and(|parent| !becomes(parent.id))
                }
                _ => false,
            });
            if is_needed {
                continue;
            }
            self.check_idle(node)?;
            let of_roots = self.users(id).filter_map(|edge| match edge.user {
                User::Root(id) => Some(RootAccess {
                    id,
                    taken: Permissions::NONE,
                    shared: Permissions::EVERY,
                }),
                _ => None,
            });
            roots.extend(of_roots);
            nodes.push(node);
        }
        let mut change = Change::new(nodes.into_iter().cloned().collect(), Vec::new());
        change.roots = roots;
        Ok(change)
    }

    /// That nobody relies on a node staying active.
    fn check_idle(&self, node: &NodeRecord) -> Result<(), Refusal> {
        if matches!(node.plan, NodePlan::Filter { .. }) {
            return Err(Refusal::Written);
        }
        for edge in self.users(node.id) {
            let writes = edge.taken.has(Permission::Write);
            let stays = match edge.user {
                User::Job(_) | User::Backend(_) => true,
                User::Root(id) => writes && !self.roots.get(&id).is_some_and(|wish| wish.rests),
                // What a filter saves it has to write whoever is above.
                User::Node(_) => writes && edge.role == super::records::TARGET_ROLE,
                User::Command => false,
            };
            if stays {
                return Err(Refusal::Written);
            }
        }
        if self.blockers.iter().any(|blocker| blocker.node == node.id) {
            return Err(Refusal::Written);
        }
        Ok(node.bitmaps.check_idle()?)
    }

    /// Files below what becomes active that nobody writes yet: what is known of them counts for nothing.
    pub(super) fn taken_over(&self, change: &Change) -> Vec<HostFile> {
        let was_inactive = |node: &&NodeRecord| {
            let now = self.node(node.id).is_some_and(|node| node.inactive);
            now && !node.inactive
        };
        let activated = change.nodes.iter().filter(was_inactive);
        let below = self.parents_first(activated.map(|node| node.id));
        let unwritten = below.into_iter().filter(|id| {
            let (taken, _) = self.demands(*id);
            !taken.has(Permission::Write) && !taken.has(Permission::WriteUnchanged)
        });
        let plans = unwritten.filter_map(|id| Some(&self.node(id)?.plan));
        let files = plans.filter_map(|plan| match plan {
            NodePlan::File { file, .. } => Some(file.clone()),
            _ => None,
        });
        files.collect()
    }
}

/// Takes files over that others may have changed.
///
/// # Errors
/// What the kernel says.
pub(super) async fn look_anew(files: Vec<HostFile>) -> Result<(), EngineError> {
    if files.is_empty() {
        return Ok(());
    }
    let looked = in_background(move || {
        let look = |file: HostFile| file.look_anew().map(|length| (file, length));
        files.into_iter().map(look).collect::<io::Result<Vec<_>>>()
    });
    let looked = looked.await.map_err(|error| {
        EngineError::generic(format!("What others have left cannot be read: {error}"))
    })?;
    // What ends later than it was waited for must not say any more how long a file is.
    for (file, length_bytes) in looked {
        file.taken_over(length_bytes);
    }
    Ok(())
}
