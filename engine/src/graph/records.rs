//! What the graph knows: nodes, edges, who blocks what. Plain data and the questions one can ask of it.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;

use blockyard_images::qcow2::info::ImageInfo;
use blockyard_ring::{FileKind, HostFile};

use crate::bitmap::NodeBitmaps;
use crate::data::{NodeId, ThreadId};
use crate::error::EngineError;
use crate::graph::disk_facts::DiskQuestion;
use crate::graph::filenames::FileName;
use crate::graph::image_locks::HeldLocks;
use crate::graph::image_names::BackingName;
use crate::graph::permissions::{ExtraPermissions, Permissions};
use crate::graph::reopen::Writable;
use crate::job::context::JobKey;
use crate::job::verb::JobType;
use crate::node::build::NodePlan;
use crate::node::filter_node::FilterKind;
use crate::node::root::RootId;
use crate::request::{CommonOptions, DetectZeroes, DriverSpec};

/// Role of the node that holds an image, or that a filter shows.
pub(super) const FILE_ROLE: &str = "file";
/// Role of the node below a fault filter.
pub(super) const IMAGE_ROLE: &str = "image";
/// Role of the node below the image in a chain. Filters of jobs have it above their source, too.
pub(super) const BACKING_ROLE: &str = "backing";
/// Role of the node that holds the guest's data of an image that keeps it outside.
pub(super) const DATA_FILE_ROLE: &str = "data-file";
/// Role of a node that somebody outside of the graph uses.
pub(super) const ROOT_ROLE: &str = "root";
/// Role of the node that a commit writes to.
pub(super) const BASE_ROLE: &str = "base";
/// Role of the nodes that a job takes out of a chain.
pub(super) const INTERMEDIATE_ROLE: &str = "intermediate node";
/// Role of a node that a job, or its filter, writes to. Permissions on such an edge are fixed.
pub(super) const TARGET_ROLE: &str = "target";

/// One node.
#[derive(Clone)]
pub(super) struct NodeRecord {
    /// Its place in lists, too: given with the name, which a node has after its file and before its backing.
    pub(super) id: NodeId,
    pub(super) name: String,
    /// The command that is opening it: until all of it is open nobody else sees the node.
    pub(super) batch: Option<Batch>,
    pub(super) driver: &'static str,
    /// As queries show it.
    pub(super) filename: FileName,
    /// What its image says of itself, for formats that have something to say.
    pub(super) image: Option<ImageRecord>,
    pub(super) read_only: bool,
    /// Somebody else may own what it shows: it is not written, and keeps nobody from that.
    pub(super) inactive: bool,
    /// What its client says of it, without what comes from elsewhere.
    pub(super) said: CommonOptions,
    /// The node that it was described with or followed from, which decides what the client does not say, as long as it is
    /// above.
    pub(super) inherits_from: Option<NodeId>,
    /// The description it was opened with, for drivers with options that stay what they were.
    pub(super) opened_as: Option<Rc<DriverSpec>>,
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
    /// What has been changed on it.
    pub(super) bitmaps: Arc<NodeBitmaps>,
}

impl NodeRecord {
    /// Whether it is a file, a device or the like, and not something that is in one.
    pub(super) fn is_protocol(&self) -> bool {
        self.filename.is_protocol()
    }

    /// Whether it may be written now.
    pub(super) fn takes_writes(&self) -> bool {
        !self.read_only && !self.inactive
    }

    /// Whether it is the filter of a job that commits what it is above.
    pub(super) fn commits(&self) -> bool {
        let NodePlan::Filter { kind, .. } = self.plan else {
            return false;
        };
        matches!(kind, FilterKind::Tracks { commits: true, .. })
    }

    /// Whether it is the filter of a commit or a mirror, which goes when its job ends although others stand on it.
    pub(super) fn goes_with_its_job(&self) -> bool {
        matches!(self.driver, "commit_top" | "mirror_top")
    }

    /// Whether it shows its child's data as its own.
    pub(super) fn is_filter(&self) -> bool {
        matches!(
            self.plan,
            NodePlan::Filter { .. }
                | NodePlan::Blkdebug { .. }
                | NodePlan::CopyOnRead { .. }
                | NodePlan::Throttle { .. }
                | NodePlan::CopyBeforeWrite { .. }
        )
    }
}

/// What a format's image says that the graph has to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ImageRecord {
    /// What its header says of a backing file.
    pub(super) backing: Option<BackingName>,
    /// How the backing is shown that is the image's own: as the header names it, or what came of that.
    pub(super) own_backing: String,
    /// Bytes of its tables that are read when it is opened.
    pub(super) tables_bytes: u64,
    /// For queries, as it was when the image was opened.
    pub(super) info: Option<ImageInfo>,
}

impl ImageRecord {
    /// Memory that the image takes as long as it is open, in bytes, without its caches.
    fn memory_bytes(&self) -> u64 {
        // What is known of each in memory besides its name.
        const ENTRY_BYTES: usize = 256;
        let listed = self.info.as_ref().map_or(0, |info| {
            let snapshots = info.snapshots.iter();
            let snapshots = snapshots.map(|one| ENTRY_BYTES + 2 * (one.id.len() + one.name.len()));
            let bitmaps = info.version_3.iter().flat_map(|info| &info.bitmaps);
            let bitmaps = bitmaps.map(|one| ENTRY_BYTES + 2 * one.name.len());
            snapshots.chain(bitmaps).sum::<usize>()
        });
        self.tables_bytes.saturating_add(listed as u64)
    }
}

/// What one command opens, which comes into view as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Batch(pub(super) u64);

/// Who uses a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum User {
    /// Another node.
    Node(NodeId),
    /// A job's own edge.
    Job(JobKey),
    /// A job's access for reading and writing.
    Backend(JobKey),
    /// Somebody outside of the graph, who goes where the graph puts him.
    Root(RootId),
    /// A command, while it runs.
    Command,
}

/// What a new length comes to.
pub(super) enum Resizing {
    /// A file gets another length.
    File,
    /// The disk in an image does.
    Image { image: NodeId, length_bytes: u64 },
    /// A device has the length it has: enough or not.
    Device { device: NodeId, needed_bytes: u64 },
}

/// One use of a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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

/// What somebody outside of the graph wants of his node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RootWish {
    pub(super) taken: Permissions,
    pub(super) shared: Permissions,
    /// Whether a node that he writes to may become inactive.
    pub(super) rests: bool,
}

/// A job that keeps others off a node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocker {
    pub(super) node: NodeId,
    pub(super) job: JobKey,
    pub(super) job_type: JobType,
}

/// A link down a chain that a job relies on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frozen {
    pub(super) parent: NodeId,
    pub(super) job: JobKey,
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
    /// Backings, and what filters are above, that must stay what they are.
    pub(super) frozen: Vec<Frozen>,
    pub(super) jobs: Vec<JobLabel>,
    /// What was opened for writing for a job.
    pub(super) writable: Vec<(JobKey, Writable)>,
    /// Names of nodes that are being opened.
    pub(super) reserved: Vec<String>,
    /// Nodes that are just becoming read-only.
    pub(super) losing_write: HashSet<NodeId>,
    /// Nodes that have not become yet what is recorded of them, once for each change: they keep their image locks.
    pub(super) becoming: Vec<NodeId>,
    /// Nodes on their way to another thread.
    pub(super) moving: HashSet<NodeId>,
    /// What roots take and share while their node is active.
    pub(super) roots: HashMap<RootId, RootWish>,
    pub(super) next_id: u64,
    pub(super) next_root: u64,
    pub(super) next_batch: u64,
}

impl Records {
    pub(super) fn new_id(&mut self) -> NodeId {
        self.next_id += 1;
        NodeId(self.next_id)
    }

    pub(super) fn new_root(&mut self) -> RootId {
        self.next_root += 1;
        RootId(self.next_root)
    }

    pub(super) fn new_batch(&mut self) -> Batch {
        self.next_batch += 1;
        Batch(self.next_batch)
    }

    pub(super) fn node(&self, id: NodeId) -> Option<&NodeRecord> {
        let place = self.nodes.binary_search_by_key(&id, |node| node.id).ok()?;
        self.nodes.get(place)
    }

    pub(super) fn node_mut(&mut self, id: NodeId) -> Option<&mut NodeRecord> {
        let place = self.nodes.binary_search_by_key(&id, |node| node.id).ok()?;
        self.nodes.get_mut(place)
    }

    /// Takes a node in, at its place.
    pub(super) fn insert(&mut self, node: NodeRecord) {
        let place = self.nodes.partition_point(|other| other.id < node.id);
        self.nodes.insert(place, node);
    }

    /// The node with a name, if it is open, or is being opened by `batch`.
    pub(super) fn by_name(&self, name: &str, batch: Option<Batch>) -> Option<&NodeRecord> {
        let seen = |node: &&NodeRecord| node.batch.is_none() || node.batch == batch;
        let mut named = self.nodes.iter().filter(|node| node.name == name);
        named.find(seen)
    }

    /// Whether a name is a node's, or is going to be.
    pub(super) fn is_taken(&self, name: &str) -> bool {
        self.nodes.iter().any(|node| node.name == name)
            || self.reserved.iter().any(|other| other == name)
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

    /// What was opened with a node below it follows what becomes of the node.
    pub(super) fn adopt(&mut self, parent: NodeId, child: NodeId) {
        if let Some(node) = self.node_mut(child) {
            node.inherits_from = Some(parent);
        }
    }

    /// Edges to what follows a node in what its client does not say.
    pub(super) fn heirs(&self, id: NodeId) -> impl Iterator<Item = &Edge> {
        let follows = move |child| {
            self.node(child)
                .is_some_and(|node| node.inherits_from == Some(id))
        };
        self.children(id).filter(move |edge| follows(edge.child))
    }

    /// All nodes that are open, newest first, as lists show them.
    pub(super) fn newest_first(&self) -> impl Iterator<Item = &NodeRecord> {
        let newest_first = self.nodes.iter().rev();
        newest_first.filter(|node| node.batch.is_none())
    }

    /// Whether something of the graph, or a job, is above a node.
    pub(super) fn has_node_or_job_parent(&self, id: NodeId) -> bool {
        self.users(id)
            .any(|edge| matches!(edge.user, User::Node(_) | User::Job(_)))
    }

    /// Fails if a job keeps others off the node, or an overlay needs it to stay as it is.
    pub(super) fn check_free(&self, id: NodeId) -> Result<(), EngineError> {
        self.check_no_job(id)?;
        let is_overlay = |edge: &&Edge| match edge.user {
            User::Node(parent) => {
                edge.role == BACKING_ROLE && self.node(parent).is_some_and(|node| !node.is_filter())
            }
            _ => false,
        };
        let overlays = self.users(id).filter(is_overlay);
        // The newest is the first to be told of.
        match overlays.last().map(|edge| edge.user) {
            Some(User::Node(overlay)) => Err(EngineError::generic(format!(
                "Node '{}' is busy: node is used as backing hd of '{}'",
                self.name_of(id),
                self.name_of(overlay)
            ))),
            _ => Ok(()),
        }
    }

    /// Fails if a job keeps others off the node; below an overlay it may be.
    pub(super) fn check_no_job(&self, id: NodeId) -> Result<(), EngineError> {
        let Some(blocker) = self.blockers.iter().find(|blocker| blocker.node == id) else {
            return Ok(());
        };
        Err(EngineError::generic(format!(
            "Node '{}' is busy: block device is in use by block job: {}",
            self.name_of(id),
            blocker.job_type.name()
        )))
    }

    /// Fails if a job or a filter relies on what is below a node in this role.
    pub(super) fn check_not_frozen(
        &self,
        parent: NodeId,
        role: &'static str,
    ) -> Result<(), EngineError> {
        let is_filter = self.node(parent).is_some_and(NodeRecord::is_filter);
        let leads_down = is_filter || role == BACKING_ROLE;
        if !leads_down || !self.is_frozen(parent) {
            return Ok(());
        }
        let below = self.children(parent).find(|edge| edge.role == role);
        let below = below.map_or("", |edge| self.name_of(edge.child));
        Err(EngineError::generic(format!(
            "Cannot change frozen '{role}' link from '{}' to '{below}'",
            self.name_of(parent)
        )))
    }

    /// Whether a job creates an image there.
    pub(super) fn is_being_created(&self, id: NodeId) -> bool {
        let mut blockers = self.blockers.iter().filter(|blocker| blocker.node == id);
        blockers.any(|blocker| blocker.job_type == JobType::Create)
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
                NodePlan::CopyBeforeWrite { .. }
                | NodePlan::SnapshotAccess { .. }
                | NodePlan::Null(_) => "Image format driver does not support resize",
                // It has the length that its server says.
                NodePlan::Nbd { remote, .. } => {
                    if size > remote.agreement().length_bytes {
                        return Err(EngineError::generic("Cannot grow NBD nodes"));
                    }
                    return Ok(Resizing::Device {
                        device: node.id,
                        needed_bytes: size,
                    });
                }
                NodePlan::Raw { child, window, .. } => {
                    size = size.saturating_add(window.offset_bytes);
                    next = self.node(*child);
                    continue;
                }
                NodePlan::Filter { child, .. }
                | NodePlan::Blkdebug { child, .. }
                | NodePlan::CopyOnRead { child, .. }
                | NodePlan::Throttle { child, .. } => {
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
                NodePlan::Qcow2 { .. } => {
                    return Ok(Resizing::Image {
                        image: node.id,
                        length_bytes: size,
                    });
                }
                NodePlan::Opening => "The node is being opened",
            };
            return Err(EngineError::generic(text));
        }
        Ok(Resizing::File)
    }

    /// All nodes connected with this one, children first: what lives on one thread together. A job's target is not of
    /// it: bringing the two together is what [`place`](super::Graph::place) does.
    pub(super) fn component(&self, id: NodeId) -> Vec<NodeId> {
        let mut beside: HashMap<NodeId, Vec<NodeId>> = HashMap::new();
        for edge in &self.edges {
            if let User::Node(parent) = edge.user {
                let is_own = |node: &NodeRecord| !matches!(node.plan, NodePlan::Filter { .. });
                if edge.role == TARGET_ROLE && !self.node(parent).is_some_and(is_own) {
                    continue;
                }
                beside.entry(parent).or_default().push(edge.child);
                beside.entry(edge.child).or_default().push(parent);
            }
        }
        let mut found = HashSet::from([id]);
        let mut next = vec![id];
        while let Some(node) = next.pop() {
            let others = beside.get(&node).into_iter().flatten();
            next.extend(others.filter(|other| found.insert(**other)));
        }
        let mut order = self.parents_first(found.iter().copied());
        order.retain(|node| found.contains(node));
        order.reverse();
        order
    }

    /// Jobs that use any of these nodes.
    pub(super) fn jobs_on(&self, nodes: &[NodeId]) -> Vec<JobKey> {
        let mut jobs: Vec<JobKey> = self
            .edges
            .iter()
            .filter(|edge| nodes.contains(&edge.child))
            .filter_map(|edge| match edge.user {
                User::Job(key) | User::Backend(key) => Some(key),
                User::Node(_) | User::Root(_) | User::Command => None,
            })
            .collect();
        jobs.sort();
        jobs.dedup();
        jobs
    }

    /// Roots on any of these nodes, which keep them on their thread.
    pub(super) fn roots_on(&self, nodes: &[NodeId]) -> Vec<RootId> {
        let on_them = self.edges.iter().filter(|edge| nodes.contains(&edge.child));
        let roots = on_them.filter_map(|edge| match edge.user {
            User::Root(id) => Some(id),
            _ => None,
        });
        roots.collect()
    }

    /// Fails if a command is changing the length or the header of one of these nodes, or opening one, which must stay on its thread
    /// meanwhile. What `batch` opens may move.
    pub(super) fn check_unpinned(
        &self,
        nodes: &[NodeId],
        batch: Option<Batch>,
    ) -> Result<(), EngineError> {
        let resized = |edge: &&Edge| edge.user == User::Command && nodes.contains(&edge.child);
        if let Some(edge) = self.edges.iter().find(resized) {
            let name = self.name_of(edge.child);
            let text = format!("Node '{name}' is busy: a command is changing it");
            return Err(EngineError::generic(text));
        }
        self.check_opened(nodes, batch)
    }

    /// Fails if a command is opening one of these nodes, but for what `batch` opens.
    pub(super) fn check_opened(
        &self,
        nodes: &[NodeId],
        batch: Option<Batch>,
    ) -> Result<(), EngineError> {
        let mut records = nodes.iter().filter_map(|id| self.node(*id));
        match records.find(|node| node.batch.is_some() && node.batch != batch) {
            None => Ok(()),
            Some(node) => {
                let text = format!("Node '{}' is busy: it is being opened", node.name);
                Err(EngineError::generic(text))
            }
        }
    }

    /// Whether a command is changing one of these nodes.
    pub(super) fn has_command(&self, nodes: &[NodeId]) -> bool {
        let mut edges = self.edges.iter();
        edges.any(|edge| edge.user == User::Command && nodes.contains(&edge.child))
    }

    /// Memory that the images take that a command has opened so far, in bytes.
    pub(super) fn memory_bytes(&self, batch: Batch) -> u64 {
        let opened = self.nodes.iter().filter(|node| node.batch == Some(batch));
        let images = opened.filter_map(|node| node.image.as_ref());
        images.fold(0, |sum, image| sum.saturating_add(image.memory_bytes()))
    }

    /// All that a command has opened comes into view.
    pub(super) fn publish(&mut self, batch: Batch) {
        for node in &mut self.nodes {
            if node.batch == Some(batch) {
                node.batch = None;
            }
        }
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
        assert_eq!(records.check_unpinned(&[other, changing], None), Ok(()));
        records.edges.push(edge(User::Command));
        assert_eq!(records.check_unpinned(&[other], None), Ok(()));
        assert!(records.check_unpinned(&[other, changing], None).is_err());
    }
}
