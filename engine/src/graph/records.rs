//! What the graph knows: nodes, edges, who blocks what. Plain data and the questions one can ask of it.

use blockyard_ring::{FileKind, HostFile};

use crate::data::{NodeId, ThreadId};
use crate::error::EngineError;
use crate::graph::disk_facts::DiskQuestion;
use crate::graph::filenames::FileName;
use crate::graph::image_locks::{self, HeldLocks};
use crate::graph::jobs::TARGET_ROLE;
use crate::graph::permissions::{ExtraPermissions, Permissions, names_of};
use crate::job::context::JobKey;
use crate::job::verb::JobType;
use crate::node::build::NodePlan;
use crate::request::{DetectZeroes, Permission};

/// One node.
#[derive(Clone)]
pub(super) struct NodeRecord {
    pub(super) id: NodeId,
    /// Its place in lists, where the image below a fault filter counts as the younger one.
    pub(super) listed: NodeId,
    pub(super) name: String,
    pub(super) driver: &'static str,
    /// As queries show it.
    pub(super) filename: FileName,
    pub(super) read_only: bool,
    pub(super) detect_zeroes: DetectZeroes,
    pub(super) cache_direct: bool,
    pub(super) cache_no_flush: bool,
    pub(super) monitor_owned: bool,
    /// Raw with its size given.
    pub(super) fixed_size: bool,
    /// Raw on a part of its child: others must not move what it stands on.
    pub(super) windowed: bool,
    pub(super) force_share: bool,
    /// What its client adds to what it takes and does not share below.
    pub(super) extra: ExtraPermissions,
    /// Writers in other programs are kept off, whoever uses the node.
    pub(super) exclusive: bool,
    pub(super) thread: ThreadId,
    pub(super) plan: NodePlan,
    /// For what only the file system knows of its file.
    pub(super) disk: DiskQuestion,
    /// The host file, if image locks are taken on it.
    pub(super) locked: Option<(HostFile, HeldLocks)>,
}

impl NodeRecord {
    /// Whether it shows its child's data as its own.
    pub(super) fn is_filter(&self) -> bool {
        matches!(
            self.plan,
            NodePlan::Filter { .. } | NodePlan::Blkdebug { .. }
        )
    }
}

/// Who uses a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum User {
    /// Another node.
    Node(NodeId),
    /// A job's own edge.
    Job(JobKey),
    /// A job's access for reading and writing.
    Backend(JobKey),
    /// A command, while it runs.
    Command,
}

/// What a new length comes to.
pub(super) enum Resizing {
    /// A file gets another length.
    File,
    /// A device has the length it has: enough or not.
    Device { device: NodeId, needed_bytes: u64 },
}

/// One use of a node.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Edge {
    pub(super) user: User,
    pub(super) child: NodeId,
    pub(super) role: &'static str,
    pub(super) taken: Permissions,
    pub(super) shared: Permissions,
}

impl Edge {
    /// Whether it is a job's.
    pub(super) fn is_of(&self, job: JobKey) -> bool {
        matches!(self.user, User::Job(key) | User::Backend(key) if key == job)
    }
}

/// A job that keeps others off a node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocker {
    pub(super) node: NodeId,
    pub(super) job: JobKey,
    pub(super) job_type: JobType,
}

/// A job as texts name it.
#[derive(Clone, Debug)]
pub(super) struct JobLabel {
    pub(super) key: JobKey,
    pub(super) id: String,
    pub(super) job_type: JobType,
}

/// Everything the graph knows.
#[derive(Default)]
pub(super) struct Records {
    /// Oldest first.
    pub(super) nodes: Vec<NodeRecord>,
    pub(super) edges: Vec<Edge>,
    pub(super) blockers: Vec<Blocker>,
    pub(super) jobs: Vec<JobLabel>,
    /// Names of nodes that are being opened.
    pub(super) reserved: Vec<String>,
    pub(super) next_id: u64,
}

impl Records {
    pub(super) fn new_id(&mut self) -> NodeId {
        self.next_id += 1;
        NodeId(self.next_id)
    }

    pub(super) fn node(&self, id: NodeId) -> Option<&NodeRecord> {
        self.nodes.iter().find(|node| node.id == id)
    }

    pub(super) fn node_mut(&mut self, id: NodeId) -> Option<&mut NodeRecord> {
        self.nodes.iter_mut().find(|node| node.id == id)
    }

    pub(super) fn by_name(&self, name: &str) -> Option<&NodeRecord> {
        self.nodes.iter().find(|node| node.name == name)
    }

    pub(super) fn name_of(&self, id: NodeId) -> &str {
        self.node(id).map_or("", |node| &node.name)
    }

    /// Users of a node.
    pub(super) fn users(&self, id: NodeId) -> impl Iterator<Item = &Edge> {
        self.edges.iter().filter(move |edge| edge.child == id)
    }

    /// Nodes right below a node.
    pub(super) fn children(&self, id: NodeId) -> impl Iterator<Item = &Edge> {
        self.edges
            .iter()
            .filter(move |edge| edge.user == User::Node(id))
    }

    /// All nodes, newest first, as lists show them.
    pub(super) fn newest_first(&self) -> Vec<&NodeRecord> {
        let mut nodes: Vec<&NodeRecord> = self.nodes.iter().collect();
        nodes.sort_by_key(|node| std::cmp::Reverse(node.listed));
        nodes
    }

    /// How many filters there are from this node down to the first node that is none.
    pub(super) fn filters_from(&self, id: NodeId) -> u32 {
        let mut count = 0;
        let mut next = self.node(id);
        while let Some(filter) = next.filter(|node| node.is_filter()) {
            count += 1;
            let below = self.children(filter.id).next();
            next = below.and_then(|edge| self.node(edge.child));
        }
        count
    }

    /// Whether a node shows the content of a host file, and nothing in between has facts of its own.
    pub(super) fn stands_on_file(&self, id: NodeId) -> bool {
        let bottom = self.node(self.bottom(id));
        bottom.is_some_and(|node| matches!(node.plan, NodePlan::File { .. }))
    }

    /// The node that a node stands on in the end, through all that have just one below.
    pub(super) fn bottom(&self, id: NodeId) -> NodeId {
        let mut bottom = id;
        while let Some(edge) = self.children(bottom).next() {
            bottom = edge.child;
        }
        bottom
    }

    /// Whether something of the graph, or a job, is above a node.
    pub(super) fn has_node_or_job_parent(&self, id: NodeId) -> bool {
        self.users(id)
            .any(|edge| matches!(edge.user, User::Node(_) | User::Job(_)))
    }

    /// Fails if a job keeps others off the node.
    pub(super) fn check_free(&self, id: NodeId) -> Result<(), EngineError> {
        let Some(blocker) = self.blockers.iter().find(|blocker| blocker.node == id) else {
            return Ok(());
        };
        Err(EngineError::generic(format!(
            "Node '{}' is busy: block device is in use by block job: {}",
            self.name_of(id),
            blocker.job_type.name()
        )))
    }

    /// What a new length of a node comes to.
    ///
    /// # Errors
    /// In QEMU's words, if the node or what it stands on has a length that cannot be changed.
    pub(super) fn resizing(&self, id: NodeId, size: u64) -> Result<Resizing, EngineError> {
        let (mut next, mut size) = (self.node(id), size);
        while let Some(node) = next {
            let text = match &node.plan {
                _ if node.read_only => "Image is read-only",
                _ if node.fixed_size => "Cannot resize fixed-size raw disks",
                NodePlan::Null(_) => "Image format driver does not support resize",
                NodePlan::Raw { child, window, .. } => {
                    size = size.saturating_add(window.offset_bytes);
                    next = self.node(*child);
                    continue;
                }
                NodePlan::Filter { child } | NodePlan::Blkdebug { child, .. } => {
                    next = self.node(*child);
                    continue;
                }
                NodePlan::File { file, .. } if file.kind() == FileKind::BlockDevice => {
                    return Ok(Resizing::Device {
                        device: node.id,
                        needed_bytes: size,
                    });
                }
                NodePlan::File { .. } => return Ok(Resizing::File),
            };
            return Err(EngineError::generic(text));
        }
        Ok(Resizing::File)
    }

    /// All nodes connected with this one, oldest first: what lives on one thread together. Children are older than
    /// their parents. A job's target is not of it: bringing the two together is what [`place`](super::Graph::place) does.
    pub(super) fn component(&self, id: NodeId) -> Vec<NodeId> {
        let mut found = vec![id];
        let mut next = 0;
        while let Some(node) = found.get(next).copied() {
            next += 1;
            for edge in self.edges.iter().filter(|edge| edge.role != TARGET_ROLE) {
                let User::Node(parent) = edge.user else {
                    continue;
                };
                for (one, other) in [(parent, edge.child), (edge.child, parent)] {
                    if one == node && !found.contains(&other) {
                        found.push(other);
                    }
                }
            }
        }
        found.sort();
        found
    }

    /// Jobs that use any of these nodes.
    pub(super) fn jobs_on(&self, nodes: &[NodeId]) -> Vec<JobKey> {
        let mut jobs: Vec<JobKey> = self
            .edges
            .iter()
            .filter(|edge| nodes.contains(&edge.child))
            .filter_map(|edge| match edge.user {
                User::Job(key) | User::Backend(key) => Some(key),
                User::Node(_) | User::Command => None,
            })
            .collect();
        jobs.sort();
        jobs.dedup();
        jobs
    }

    /// Fails if a command is changing the length of one of these nodes, which must stay on its thread meanwhile.
    pub(super) fn check_unpinned(&self, nodes: &[NodeId]) -> Result<(), EngineError> {
        let pinned = |edge: &&Edge| edge.user == User::Command && nodes.contains(&edge.child);
        match self.edges.iter().find(pinned) {
            None => Ok(()),
            Some(edge) => {
                let name = self.name_of(edge.child);
                let text = format!("Node '{name}' is busy: its length is being changed");
                Err(EngineError::generic(text))
            }
        }
    }

    /// Changes the edges, works permissions out anew from the top down, checks them, and takes the image locks that
    /// follow. All or nothing.
    ///
    /// # Errors
    /// The conflict, in QEMU's words.
    pub(super) fn change_edges(
        &mut self,
        change: impl FnOnce(&mut Vec<Edge>),
    ) -> Result<(), EngineError> {
        let before = self.edges.clone();
        change(&mut self.edges);
        let checked = self.recompute().and_then(|()| self.update_locks());
        if checked.is_err() {
            self.edges = before;
        }
        checked
    }

    /// Permissions of edges between nodes follow from those above them. Parents are younger than their children, so one
    /// pass from young to old is enough.
    fn recompute(&mut self) -> Result<(), EngineError> {
        let ids: Vec<NodeId> = self.nodes.iter().rev().map(|node| node.id).collect();
        for id in ids {
            self.check_node(id)?;
            let (taken, shared) = self.demands(id);
            let Some(node) = self.node(id) else { continue };
            let (driver, window, extra) = (node.driver, node.windowed, node.extra);
            let (nodes, edges) = (&self.nodes, &mut self.edges);
            for edge in edges
                .iter_mut()
                .filter(|edge| edge.user == User::Node(id) && edge.role != TARGET_ROLE)
            {
                (edge.taken, edge.shared) = child_permissions(driver, window, taken, shared);
                edge.taken = edge.taken.union(extra.taken);
                edge.shared = edge.shared.intersection(extra.unshared.complement());
                // It is the child that lets everybody in.
                let mut below = nodes.iter().filter(|node| node.id == edge.child);
                if below.any(|node| node.force_share) {
                    edge.shared = Permissions::EVERY;
                }
            }
        }
        Ok(())
    }

    /// What all users of a node take together, and what all of them share.
    pub(super) fn demands(&self, id: NodeId) -> (Permissions, Permissions) {
        self.users(id).fold(
            (Permissions::NONE, Permissions::EVERY),
            |(taken, shared), edge| (taken.union(edge.taken), shared.intersection(edge.shared)),
        )
    }

    fn check_node(&self, id: NodeId) -> Result<(), EngineError> {
        let Some(node) = self.node(id) else {
            return Ok(());
        };
        // The newest users are the first to be told of.
        let users: Vec<&Edge> = self.users(id).collect();
        for (index, unshares) in users.iter().enumerate().rev() {
            for (other_index, takes) in users.iter().enumerate().rev() {
                let clash = takes.taken.intersection(unshares.shared.complement());
                if index != other_index && !clash.is_empty() {
                    return Err(self.conflict(node, takes, unshares, clash));
                }
            }
        }
        let (taken, _) = self.demands(id);
        let writes = taken.has(Permission::Write) || taken.has(Permission::WriteUnchanged);
        if node.read_only && writes {
            return Err(EngineError::generic("Block node is read-only"));
        }
        if let NodePlan::Filter { child } = node.plan
            && (writes || taken.has(Permission::Resize))
        {
            // A filter saves no old data and tracks no new data, and a node that was above its source before still
            // stands there on the data thread: it would write past the filter.
            return Err(EngineError::generic(format!(
                "Node '{}' is the source of a block job and cannot be changed meanwhile",
                self.name_of(child)
            )));
        }
        Ok(())
    }

    fn conflict(
        &self,
        node: &NodeRecord,
        takes: &Edge,
        unshares: &Edge,
        clash: Permissions,
    ) -> EngineError {
        let name = &node.name;
        EngineError::generic(format!(
            "Permission conflict on node '{name}': permissions '{}' are both required by {} \
             (uses node '{name}' as '{}' child) and unshared by {} (uses node '{name}' as '{}' \
             child).",
            names_of(clash),
            self.user_text(takes.user),
            takes.role,
            self.user_text(unshares.user),
            unshares.role
        ))
    }

    fn user_text(&self, user: User) -> String {
        match user {
            User::Node(id) => format!("node '{}'", self.name_of(id)),
            User::Backend(_) | User::Command => "an unnamed block device".to_owned(),
            User::Job(key) => match self.jobs.iter().find(|job| job.key == key) {
                Some(job) => format!("{} job '{}'", job.job_type.name(), job.id),
                None => "a block job".to_owned(),
            },
        }
    }

    fn update_locks(&mut self) -> Result<(), EngineError> {
        let wanted: Vec<(usize, HeldLocks)> = self
            .nodes
            .iter()
            .enumerate()
            .filter(|(_, node)| node.locked.is_some())
            .map(|(index, node)| {
                let (mut used, mut shared) = self.demands(node.id);
                if node.exclusive {
                    used = used.with(Permission::ConsistentRead);
                    shared = shared.without(Permission::Write);
                    shared = shared.without(Permission::Resize);
                }
                if node.exclusive && !node.read_only {
                    used = used.with(Permission::Write);
                }
                (
                    index,
                    HeldLocks {
                        used,
                        unshared: shared.complement(),
                    },
                )
            })
            .collect();
        let mut changed: Vec<(usize, HeldLocks)> = Vec::new();
        for (index, wanted) in wanted {
            let Some((file, held)) = self.nodes[index].locked.as_mut() else {
                continue;
            };
            if *held == wanted {
                continue;
            }
            if let Err(error) = image_locks::change(file, *held, wanted) {
                for (index, before) in changed {
                    if let Some((file, held)) = self.nodes[index].locked.as_mut() {
                        // Going back takes nothing that was not held a moment ago.
                        let _ = image_locks::change(file, *held, before);
                        *held = before;
                    }
                }
                return Err(error);
            }
            changed.push((index, *held));
            *held = wanted;
        }
        Ok(())
    }
}

/// What a node takes and shares below itself, from what is taken and shared above it.
fn child_permissions(
    driver: &str,
    window: bool,
    taken: Permissions,
    shared: Permissions,
) -> (Permissions, Permissions) {
    match driver {
        "copy-before-write" => (
            taken.with(Permission::ConsistentRead),
            shared
                .without(Permission::Write)
                .without(Permission::Resize),
        ),
        // Windows of one file may stand side by side, but not on ground that moves.
        "raw" if window => (
            if taken.has(Permission::WriteUnchanged) {
                taken.with(Permission::Write)
            } else {
                taken
            },
            shared.without(Permission::Resize),
        ),
        _ => (taken, shared),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_whose_length_changes_stays_where_it_is() {
        let mut records = Records::default();
        let (changing, other) = (records.new_id(), records.new_id());
        let edge = |user| Edge {
            user,
            child: changing,
            role: "root",
            taken: Permissions::NONE,
            shared: Permissions::EVERY,
        };
        records.edges.push(edge(User::Node(other)));
        assert_eq!(records.check_unpinned(&[other, changing]), Ok(()));
        records.edges.push(edge(User::Command));
        assert_eq!(records.check_unpinned(&[other]), Ok(()));
        assert!(records.check_unpinned(&[other, changing]).is_err());
    }
}
