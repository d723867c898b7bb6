//! Walks down the graph: what a node shows, what it stands on, how long its chain is.

use blockyard_ring::HostFile;

use crate::data::NodeId;
use crate::graph::filenames::{FileName, ShownBacking};
use crate::graph::records::{
    BACKING_ROLE, DATA_FILE_ROLE, FILE_ROLE, NodeRecord, Records, TARGET_ROLE, User,
};
use crate::node::build::NodePlan;
use crate::request::DriverSpec;

impl Records {
    /// The node that an image takes from what it does not hold itself.
    pub(super) fn backing(&self, id: NodeId) -> Option<NodeId> {
        if self.node(id)?.is_filter() {
            return None;
        }
        let mut backing = self.children(id).filter(|edge| edge.role == BACKING_ROLE);
        backing.next().map(|edge| edge.child)
    }

    /// The node that holds the guest's data of an image, if that is outside.
    pub(super) fn data_file(&self, id: NodeId) -> Option<NodeId> {
        let mut data_file = self.children(id).filter(|edge| edge.role == DATA_FILE_ROLE);
        data_file.next().map(|edge| edge.child)
    }

    /// The node that holds what a node shows: its file, or what a filter is above.
    pub(super) fn primary(&self, id: NodeId) -> Option<NodeId> {
        let is_filter = self.node(id)?.is_filter();
        let holds = |role| role != TARGET_ROLE && (is_filter || role != BACKING_ROLE);
        // The file comes before everything else.
        let mut children = self.children(id).filter(|edge| holds(edge.role));
        children.next().map(|edge| edge.child)
    }

    /// The node right below another one that is its file.
    pub(super) fn file_of(&self, id: NodeId) -> Option<NodeId> {
        let mut children = self.children(id);
        let file = children.find(|edge| edge.role == FILE_ROLE);
        file.map(|edge| edge.child)
    }

    /// The next node of a chain: what a filter is above, or the backing of an image.
    pub(super) fn next_in_chain(&self, id: NodeId) -> Option<NodeId> {
        if self.node(id)?.is_filter() {
            self.primary(id)
        } else {
            self.backing(id)
        }
    }

    /// The nodes of a chain from the top down, filters included.
    pub(super) fn chain(&self, top: NodeId) -> impl Iterator<Item = NodeId> {
        std::iter::successors(Some(top), |id| self.next_in_chain(*id))
    }

    /// What stands on a node in the chain of `top`; filters do not count.
    pub(super) fn overlay_in(&self, top: NodeId, id: NodeId) -> Option<NodeId> {
        let below = self.unfiltered(id);
        let is_layer = |id: &NodeId| self.node(*id).is_some_and(|node| !node.is_filter());
        let layers = self.chain(top).filter(is_layer);
        layers.take_while(|id| *id != below).last()
    }

    /// All nodes that have this one anywhere below them.
    pub(super) fn above(&self, id: NodeId) -> Vec<NodeId> {
        let mut above: Vec<NodeId> = Vec::new();
        let mut next = vec![id];
        while let Some(below) = next.pop() {
            for edge in self.users(below) {
                if let User::Node(parent) = edge.user
                    && !above.contains(&parent)
                {
                    above.push(parent);
                    next.push(parent);
                }
            }
        }
        above
    }

    /// What is below the filters that a node may be.
    pub(super) fn unfiltered(&self, id: NodeId) -> NodeId {
        let is_filter = |id: &NodeId| self.node(*id).is_some_and(NodeRecord::is_filter);
        let mut chain = self.chain(id);
        chain.find(|id| !is_filter(id)).unwrap_or(id)
    }

    /// What is below the filters of jobs that may stand above a node's place in its chain. What a client has put there stays.
    pub(super) fn below_job_filters(&self, id: NodeId) -> NodeId {
        let is_of_job = |id: &NodeId| {
            let node = self.node(*id);
            node.is_some_and(|node| matches!(node.plan, NodePlan::Filter { .. }))
        };
        let mut chain = self.chain(id);
        chain.find(|id| !is_of_job(id)).unwrap_or(id)
    }

    /// How many of these nodes are no filters.
    pub(super) fn layers(&self, nodes: &[NodeId]) -> usize {
        let layers = nodes.iter().filter_map(|id| self.node(*id));
        layers.filter(|node| !node.is_filter()).count()
    }

    /// How many nodes of its chain are below a node.
    pub(super) fn chain_depth(&self, id: NodeId) -> u32 {
        let mut depth = 0;
        let mut next = self.next_in_chain(id);
        while let Some(below) = next {
            depth += 1;
            next = self.next_in_chain(below);
        }
        depth
    }

    /// The node whose facts about an image are a node's too: the first that is neither a filter nor raw.
    pub(super) fn with_facts(&self, id: NodeId) -> Option<&NodeRecord> {
        let mut node = self.node(id)?;
        while node.is_filter() || matches!(node.plan, NodePlan::Raw { .. }) {
            node = self.node(self.primary(node.id)?)?;
        }
        Some(node)
    }

    /// The host file that a node's own bytes are in, through all that is above it.
    pub(super) fn host_file(&self, id: NodeId) -> Option<&HostFile> {
        let mut node = self.node(id)?;
        loop {
            if let NodePlan::File { file, .. } = &node.plan {
                return Some(file);
            }
            node = self.node(self.primary(node.id)?)?;
        }
    }

    /// The folder of the host file that a node's own bytes are in, with its slash; `None`: they are in no file.
    pub(super) fn folder(&self, id: NodeId) -> Option<&str> {
        let mut node = self.node(id)?;
        while !matches!(node.plan, NodePlan::File { .. }) {
            node = self.node(self.primary(node.id)?)?;
        }
        node.filename.folder()
    }

    /// What is below an image now came of what it names, and is its own.
    pub(super) fn adopt_backing(&mut self, id: NodeId) {
        let backing = self.backing(id).and_then(|backing| self.node(backing));
        let shown = backing.map(|backing| backing.filename.to_string());
        if let Some(image) = self.node_mut(id).and_then(|node| node.image.as_mut()) {
            image.own_backing = shown.unwrap_or_default();
        }
    }

    /// Gives a node the name that queries show, after something below it has changed.
    pub(super) fn name_again(&mut self, id: NodeId) {
        let Some(node) = self.node(id) else {
            return;
        };
        let below = self.primary(id).and_then(|below| self.node(below));
        let below = below.map(|node| node.filename.clone()).unwrap_or_default();
        let name = match (&node.plan, node.opened_as.as_deref()) {
            (NodePlan::Qcow2 { .. }, _) => return self.name_image(id),
            (NodePlan::Raw { .. }, Some(DriverSpec::Raw { offset, size, .. })) => {
                FileName::of_raw(&below, *offset, *size)
            }
            (NodePlan::Blkdebug { .. }, Some(DriverSpec::Blkdebug(spec))) => {
                FileName::of_blkdebug(&below, spec)
            }
            (NodePlan::CopyOnRead { .. }, _) => FileName::of_copy_on_read(&below),
            (NodePlan::Throttle { member, .. }, _) => {
                FileName::of_throttle(&below, member.group().name())
            }
            (
                NodePlan::Filter { .. }
                | NodePlan::CopyBeforeWrite { .. }
                | NodePlan::SnapshotAccess { .. },
                _,
            ) => below,
            _ => return,
        };
        if let Some(node) = self.node_mut(id) {
            node.filename = name;
        }
    }

    /// Gives an image the name that queries show, after something below it has changed. A backing that is its own needs no
    /// mention.
    pub(super) fn name_image(&mut self, id: NodeId) {
        let name_of = |id: Option<NodeId>| {
            let node = id.and_then(|id| self.node(id));
            node.map(|node| node.filename.clone())
        };
        let data_file = name_of(self.data_file(id));
        let file = name_of(self.primary(id)).unwrap_or_default();
        let backing = name_of(self.backing(id));
        let Some(image) = self.node(id).and_then(|node| node.image.as_ref()) else {
            return;
        };
        let shown = match &backing {
            Some(backing) if backing.to_string() == image.own_backing => ShownBacking::AsNamed,
            Some(backing) => ShownBacking::Other(backing),
            None if image.own_backing.is_empty() => ShownBacking::AsNamed,
            None => ShownBacking::Nothing,
        };
        let filename = FileName::of_qcow2(&file, data_file.as_ref(), &shown);
        if let Some(node) = self.node_mut(id) {
            node.filename = filename;
        }
    }
}
