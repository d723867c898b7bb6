//! Changing edges: permissions worked out anew for what a change reaches, conflicts found, image locks taken. All or nothing.
//!
//! A change of one edge costs what hangs below it and one pass over the list of edges, so that a chain of hundreds of layers
//! can be opened layer by layer.

use std::collections::{HashMap, HashSet};

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::image_locks::{self, HeldLocks};
use crate::graph::permissions::{Permissions, names_of};
use crate::graph::records::{
    BACKING_ROLE, DATA_FILE_ROLE, Edge, NodeRecord, Records, TARGET_ROLE, User,
};
use crate::node::build::NodePlan;
use crate::node::root::RootId;
use crate::request::Permission;

impl Records {
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
        let changed = ends_of_changes(&before, &self.edges);
        let checked = self
            .recompute(&changed)
            .and_then(|reached| self.update_locks(&reached, Locks::Exactly));
        if checked.is_err() {
            self.edges = before;
        }
        checked
    }

    /// Lets nodes be others and hang together in another way, works permissions out anew and checks them, and takes the image
    /// locks that follow. What is not needed any more is kept locked until [`settle`](Self::settle), as the nodes have not
    /// become that yet. All or nothing. Afterwards `change` is what leads back.
    ///
    /// # Errors
    /// The conflict, in QEMU's words.
    pub(super) fn change_nodes(&mut self, change: &mut Change) -> Result<(), EngineError> {
        let before = self.edges.clone();
        let was_writable = |id: &NodeId| self.node(*id).is_some_and(|node| !node.read_only);
        let losing = change.nodes.iter().filter(|node| node.read_only);
        self.losing_write = losing.map(|node| node.id).filter(was_writable).collect();
        self.swap(change);
        let checked = self.recompute(&change.ends()).and_then(|reached| {
            change.reached.extend(reached.iter().copied());
            self.update_locks(&reached, Locks::AtLeast)
        });
        self.losing_write.clear();
        if checked.is_err() {
            self.swap(change);
            self.edges = before;
        } else {
            self.becoming.extend(&change.reached);
        }
        checked
    }

    /// The same without a check, for going back.
    pub(super) fn take_back(&mut self, change: &mut Change) {
        self.swap(change);
        if let Err(error) = self.settle(change) {
            tracing::error!(%error, "somebody has come to rely on what did not come about");
        }
    }

    /// Gives up the image locks that nodes do not need any more since they have changed.
    ///
    /// # Errors
    /// Only if something else was changed meanwhile that does not go together with it.
    pub(super) fn settle(&mut self, change: &Change) -> Result<(), EngineError> {
        for id in &change.reached {
            if let Some(place) = self.becoming.iter().position(|other| other == id) {
                self.becoming.swap_remove(place);
            }
        }
        let mut reached = change.reached.clone();
        reached.extend(self.recompute(&change.ends())?);
        self.update_locks(&reached.into_iter().collect::<Vec<_>>(), Locks::Exactly)
    }

    fn swap(&mut self, change: &mut Change) {
        for other in &mut change.nodes {
            let Some(node) = self.node_mut(other.id) else {
                continue;
            };
            std::mem::swap(node, other);
            // What does not depend on how it is open, and may have changed meanwhile.
            std::mem::swap(&mut node.locked, &mut other.locked);
            node.thread = other.thread;
            node.monitor_owned = other.monitor_owned;
        }
        for link in &mut change.links {
            let is_it = |edge: &&mut Edge| {
                let leads = edge.user == link.user && edge.role == link.role;
                leads && Some(edge.child) == link.from
            };
            match (self.edges.iter_mut().find(is_it), link.to) {
                (Some(edge), Some(to)) => edge.child = to,
                (Some(_), None) => self
                    .edges
                    .retain(|edge| edge.user != link.user || edge.role != link.role),
                (None, Some(child)) => self.edges.push(Edge {
                    user: link.user,
                    child,
                    role: link.role,
                    taken: Permissions::NONE,
                    shared: Permissions::EVERY,
                }),
                (None, None) => {}
            }
            std::mem::swap(&mut link.from, &mut link.to);
        }
        for root in &mut change.roots {
            let is_it = |edge: &&mut Edge| edge.user == User::Root(root.id);
            if let Some(edge) = self.edges.iter_mut().find(is_it) {
                std::mem::swap(&mut edge.taken, &mut root.taken);
                std::mem::swap(&mut edge.shared, &mut root.shared);
            }
        }
    }

    /// Permissions of edges between nodes follow from those above them. Returns every node whose users may have changed.
    fn recompute(&mut self, changed: &HashSet<NodeId>) -> Result<Vec<NodeId>, EngineError> {
        let index = Index::of(&self.edges);
        let order = index.downwards(changed.iter().copied());
        let order = order.map_err(|(parent, child)| self.cycle(parent, child))?;
        let mut waiting = changed.clone();
        let mut reached = Vec::new();
        for id in order {
            if !waiting.remove(&id) {
                continue;
            }
            reached.push(id);
            self.check_node(id, &index)?;
            let (taken, shared) = self.demands_in(index.users(id));
            let is_used = !index.users(id).is_empty();
            for place in index.below(id) {
                let Some((taken, shared)) = self.below(id, *place, is_used, (taken, shared)) else {
                    continue;
                };
                let Some(edge) = self.edges.get_mut(*place) else {
                    continue;
                };
                if (edge.taken, edge.shared) != (taken, shared) {
                    (edge.taken, edge.shared) = (taken, shared);
                    waiting.insert(edge.child);
                }
            }
        }
        Ok(reached)
    }

    /// What a node's edge to a child takes and shares, if that follows from what is taken and shared above the node.
    fn below(
        &self,
        id: NodeId,
        place: usize,
        is_used: bool,
        (taken, shared): (Permissions, Permissions),
    ) -> Option<(Permissions, Permissions)> {
        let (node, edge) = (self.node(id)?, self.edges.get(place)?);
        if edge.role == TARGET_ROLE {
            return None;
        }
        let (taken, shared) = match node.driver {
            // Nothing passes it. A job's own is used once there is the job, which then tells of what is in its way.
            "copy-before-write" if !is_used => (taken, shared),
            // What it reads the filter below sees to.
            "snapshot-access" => (Permissions::NONE, Permissions::EVERY),
            _ if node.inactive => inactive_permissions(node, edge.role, taken),
            _ => child_permissions(node, edge.role, taken, shared),
        };
        let taken = taken.union(node.extra.taken);
        // It is the child that lets everybody in.
        let shared = if self.node(edge.child).is_some_and(|node| node.force_share) {
            Permissions::EVERY
        } else {
            shared.intersection(node.extra.unshared.complement())
        };
        Some((taken, shared))
    }

    /// What all users of a node take together, and what all of them share.
    pub(super) fn demands(&self, id: NodeId) -> (Permissions, Permissions) {
        demands_of(self.users(id))
    }

    fn demands_in(&self, users: &[usize]) -> (Permissions, Permissions) {
        demands_of(users.iter().filter_map(|place| self.edges.get(*place)))
    }

    fn check_node(&self, id: NodeId, index: &Index) -> Result<(), EngineError> {
        let Some(node) = self.node(id) else {
            return Ok(());
        };
        // The newest users are the first to be told of.
        let users = index.users(id).iter().rev();
        let users: Vec<&Edge> = users.filter_map(|place| self.edges.get(*place)).collect();
        for (index, unshares) in users.iter().enumerate() {
            for (other_index, takes) in users.iter().enumerate() {
                let clash = takes.taken.intersection(unshares.shared.complement());
                if index != other_index && !clash.is_empty() {
                    return Err(self.conflict(node, takes, unshares, clash));
                }
            }
        }
        let (taken, _) = demands_of(users.iter().copied());
        if node.inactive {
            self.check_inactive(node, &users, taken)?;
        }
        let writes = taken.has(Permission::Write) || taken.has(Permission::WriteUnchanged);
        if writes && self.losing_write.contains(&id) {
            return Err(EngineError::generic(format!(
                "Read-only block node '{}' cannot support read-write users",
                node.name
            )));
        }
        if node.read_only && writes {
            return Err(EngineError::generic("Block node is read-only"));
        }
        if let NodePlan::Filter { child, kind } = node.plan
            && (kind.refuses_writes() && taken.has(Permission::Write)
                || kind.catches_writes() && self.is_written_by_node(id, index)
                || taken.has(Permission::Resize))
        {
            return Err(EngineError::generic(format!(
                "Node '{}' is the source of a block job and cannot be changed meanwhile",
                self.name_of(child)
            )));
        }
        Ok(())
    }

    /// Nothing relies on a node that somebody else may be changing.
    fn check_inactive(
        &self,
        node: &NodeRecord,
        users: &[&Edge],
        taken: Permissions,
    ) -> Result<(), EngineError> {
        for edge in users {
            if let User::Node(parent) = edge.user
                && let Some(parent) = self.node(parent).filter(|parent| !parent.inactive)
            {
                return Err(EngineError::generic(format!(
                    "Inactive '{}' can't be a {} child of active '{}'",
                    node.name, edge.role, parent.name
                )));
            }
        }
        let refused = taken.without(Permission::ConsistentRead);
        match refused.is_empty() {
            true => Ok(()),
            false => Err(EngineError::generic(format!(
                "Permission '{}' unavailable on inactive node",
                names_of(refused)
            ))),
        }
    }

    /// Whether another node may write to this one.
    fn is_written_by_node(&self, id: NodeId, index: &Index) -> bool {
        let users = index.users(id).iter();
        let mut users = users.filter_map(|place| self.edges.get(*place));
        users.any(|edge| matches!(edge.user, User::Node(_)) && edge.taken.has(Permission::Write))
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

    fn cycle(&self, parent: NodeId, child: NodeId) -> EngineError {
        let mut between = self.children(parent).filter(|edge| edge.child == child);
        let role = between.next().map_or("", |edge| edge.role);
        EngineError::generic(format!(
            "Making '{}' a {role} child of '{}' would create a cycle",
            self.name_of(child),
            self.name_of(parent)
        ))
    }

    fn user_text(&self, user: User) -> String {
        match user {
            User::Node(id) => format!("node '{}'", self.name_of(id)),
            User::Backend(_) | User::Root(_) | User::Command => {
                "an unnamed block device".to_owned()
            }
            User::Job(key) => match self.jobs.iter().find(|job| job.key == key) {
                Some(job) => format!("{} job '{}'", job.job_type.name(), job.id),
                None => "a block job".to_owned(),
            },
        }
    }

    /// Takes the image locks of these nodes that follow from their users, and gives up those that do not any more, unless they
    /// are to be kept.
    fn update_locks(&mut self, reached: &[NodeId], locks: Locks) -> Result<(), EngineError> {
        let mut changed: Vec<(NodeId, HeldLocks)> = Vec::new();
        for id in reached {
            let demands = self.demands(*id);
            let is_becoming = self.becoming.contains(id);
            let Some(node) = self.node_mut(*id) else {
                continue;
            };
            let wanted = wanted_locks(node, demands);
            let Some((file, held)) = node.locked.as_mut() else {
                continue;
            };
            if *held == wanted {
                continue;
            }
            let before = *held;
            let wanted = match locks {
                // Whoever changes edges meanwhile, and may come in at any time, takes nothing from it.
                Locks::Exactly if !is_becoming => wanted,
                Locks::Exactly => wanted.and(before),
                Locks::AtLeast => wanted.and(before),
            };
            if let Err(error) = image_locks::change(file, before, wanted) {
                for (id, before) in changed {
                    let node = self.node_mut(id);
                    if let Some((file, held)) = node.and_then(|node| node.locked.as_mut()) {
                        // Going back takes nothing that was not held a moment ago.
                        let _ = image_locks::change(file, *held, before);
                        *held = before;
                    }
                }
                return Err(error);
            }
            *held = wanted;
            changed.push((*id, before));
        }
        Ok(())
    }

    /// These nodes and all below them, each before its children.
    pub(super) fn parents_first(&self, nodes: impl IntoIterator<Item = NodeId>) -> Vec<NodeId> {
        // What is in the records has no cycles.
        Index::of(&self.edges).downwards(nodes).unwrap_or_default()
    }
}

/// What becomes of some nodes and edges at once.
#[derive(Default)]
pub(super) struct Change {
    /// The nodes as they are to be.
    pub(super) nodes: Vec<NodeRecord>,
    /// What is to be below them.
    pub(super) links: Vec<Link>,
    /// What roots are to take and share, wherever they are.
    pub(super) roots: Vec<RootAccess>,
    /// Nodes whose image locks it has to do with, once it is made.
    reached: HashSet<NodeId>,
}

/// What a root is to take and share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RootAccess {
    pub(super) id: RootId,
    pub(super) taken: Permissions,
    pub(super) shared: Permissions,
}

/// Where a user is to lead in one role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) user: User,
    pub(super) role: &'static str,
    pub(super) from: Option<NodeId>,
    pub(super) to: Option<NodeId>,
}

impl Change {
    /// These nodes, and these links below them.
    pub(super) fn new(nodes: Vec<NodeRecord>, links: Vec<Link>) -> Self {
        Self {
            nodes,
            links,
            roots: Vec::new(),
            reached: HashSet::new(),
        }
    }

    /// Nodes whose users, or whose demands on what is below, may be others.
    fn ends(&self) -> HashSet<NodeId> {
        let nodes = self.nodes.iter().map(|node| node.id);
        let links = self.links.iter();
        let links = links.flat_map(|link| {
            let parent = match link.user {
                User::Node(parent) => Some(parent),
                _ => None,
            };
            [parent, link.from, link.to]
        });
        nodes.chain(links.flatten()).collect()
    }
}

/// Which image locks a file has after a change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Locks {
    /// Those that follow.
    Exactly,
    /// Those, and those that it had.
    AtLeast,
}

/// Which edges lead to a node and which from it, as places in the list of edges.
struct Index {
    users: HashMap<NodeId, Vec<usize>>,
    below: HashMap<NodeId, Vec<usize>>,
    child: Vec<NodeId>,
}

impl Index {
    fn of(edges: &[Edge]) -> Self {
        let mut index = Self {
            users: HashMap::new(),
            below: HashMap::new(),
            child: edges.iter().map(|edge| edge.child).collect(),
        };
        for (place, edge) in edges.iter().enumerate() {
            index.users.entry(edge.child).or_default().push(place);
            if let User::Node(parent) = edge.user {
                index.below.entry(parent).or_default().push(place);
            }
        }
        index
    }

    fn users(&self, id: NodeId) -> &[usize] {
        self.users.get(&id).map_or(&[], Vec::as_slice)
    }

    fn below(&self, id: NodeId) -> &[usize] {
        self.below.get(&id).map_or(&[], Vec::as_slice)
    }

    /// The nodes from `from` downwards, each before its children. A walk without recursion: nothing limits how long a
    /// chain a client may try to make.
    ///
    /// # Errors
    /// Parent and child of an edge that closes a cycle.
    fn downwards(
        &self,
        from: impl IntoIterator<Item = NodeId>,
    ) -> Result<Vec<NodeId>, (NodeId, NodeId)> {
        let mut starts: Vec<NodeId> = from.into_iter().collect();
        starts.sort();
        // Nodes in the order in which all below them has been seen, which is children first.
        let mut done: Vec<NodeId> = Vec::new();
        let mut seen: HashSet<NodeId> = HashSet::new();
        let mut on_the_way: HashSet<NodeId> = HashSet::new();
        let mut stack: Vec<(NodeId, usize)> = Vec::new();
        for start in starts {
            if seen.insert(start) {
                on_the_way.insert(start);
                stack.push((start, 0));
            }
            while let Some((id, next)) = stack.pop() {
                let Some(place) = self.below(id).get(next) else {
                    on_the_way.remove(&id);
                    done.push(id);
                    continue;
                };
                stack.push((id, next + 1));
                let Some(child) = self.child.get(*place).copied() else {
                    continue;
                };
                if on_the_way.contains(&child) {
                    return Err((id, child));
                }
                if seen.insert(child) {
                    on_the_way.insert(child);
                    stack.push((child, 0));
                }
            }
        }
        done.reverse();
        Ok(done)
    }
}

/// Nodes at both ends of all edges that are in only one of the lists.
fn ends_of_changes(before: &[Edge], after: &[Edge]) -> HashSet<NodeId> {
    let mut count: HashMap<&Edge, i64> = HashMap::new();
    for edge in before {
        *count.entry(edge).or_default() -= 1;
    }
    for edge in after {
        *count.entry(edge).or_default() += 1;
    }
    let mut ends = HashSet::new();
    for (edge, _) in count.into_iter().filter(|(_, count)| *count != 0) {
        ends.insert(edge.child);
        if let User::Node(parent) = edge.user {
            ends.insert(parent);
        }
    }
    ends
}

fn demands_of<'a>(users: impl Iterator<Item = &'a Edge>) -> (Permissions, Permissions) {
    users.fold(
        (Permissions::NONE, Permissions::EVERY),
        |(taken, shared), edge| (taken.union(edge.taken), shared.intersection(edge.shared)),
    )
}

fn wanted_locks(node: &NodeRecord, demands: (Permissions, Permissions)) -> HeldLocks {
    if node.inactive {
        return HeldLocks::default();
    }
    let (mut used, mut shared) = demands;
    if node.exclusive {
        used = used.with(Permission::ConsistentRead);
        shared = shared.without(Permission::Write);
        shared = shared.without(Permission::Resize);
    }
    if node.exclusive && !node.read_only {
        used = used.with(Permission::Write);
    }
    HeldLocks {
        used,
        unshared: shared.complement(),
    }
}

/// What a node takes and shares below itself, from what is taken and shared above it.
fn child_permissions(
    node: &NodeRecord,
    role: &str,
    taken: Permissions,
    shared: Permissions,
) -> (Permissions, Permissions) {
    let fixed = shared
        .without(Permission::Write)
        .without(Permission::Resize);
    match (node.driver, role) {
        ("copy-before-write", _) => (taken.with(Permission::ConsistentRead), fixed),
        // What is below changes under its users, as the job's own edges say.
        ("commit_top", _) => (Permissions::NONE, Permissions::EVERY),
        ("mirror_top", _) if node.commits() => {
            let taken = taken.without(Permission::ConsistentRead);
            (taken, shared.with(Permission::Write))
        }
        ("copy-on-read", _)
            if !node.read_only || matches!(node.plan, NodePlan::CopyOnRead { .. }) =>
        {
            (taken.with(Permission::WriteUnchanged), shared)
        }
        // What a backing holds must not change under those who read it through the overlay, unless they do not mind.
        ("qcow2", BACKING_ROLE) => {
            let reads = Permissions::NONE.with(Permission::ConsistentRead);
            let kept = reads.with(Permission::WriteUnchanged);
            let shared = if shared.has(Permission::Write) {
                Permissions::EVERY
            } else {
                kept
            };
            (taken.intersection(reads), shared)
        }
        // Nobody else may touch the metadata, and the format does so whether or not anybody writes.
        ("qcow2", role) if role != DATA_FILE_ROLE => {
            let taken = taken.with(Permission::ConsistentRead);
            let taken = match node.read_only {
                true => taken,
                false => taken.with(Permission::Write).with(Permission::Resize),
            };
            (taken, fixed)
        }
        // What is written for the guest may make the file longer.
        ("qcow2", _) => {
            let taken = written(taken);
            let taken = match taken.has(Permission::Write) {
                true => taken.with(Permission::Resize),
                false => taken,
            };
            (taken, shared.without(Permission::Resize))
        }
        // Windows of one file may stand side by side, but not on ground that moves.
        ("raw", _) if node.windowed => (written(taken), shared.without(Permission::Resize)),
        _ => (taken, shared),
    }
}

/// The same of a node that somebody else may own: it looks at metadata, which others may change.
fn inactive_permissions(
    node: &NodeRecord,
    role: &str,
    taken: Permissions,
) -> (Permissions, Permissions) {
    let looks = node.driver == "qcow2" && role != BACKING_ROLE && role != DATA_FILE_ROLE;
    let taken = match looks {
        true => taken.with(Permission::ConsistentRead),
        false => taken,
    };
    (taken, Permissions::EVERY)
}

/// Rewriting what is there is writing, to a file below.
fn written(taken: Permissions) -> Permissions {
    match taken.has(Permission::WriteUnchanged) {
        true => taken.with(Permission::Write),
        false => taken,
    }
}

#[cfg(test)]
#[path = "linking_tests.rs"]
mod tests;
