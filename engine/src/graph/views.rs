//! What queries see of the graph.

use std::collections::HashMap;

use crate::data::NodeId;
use crate::graph::Graph;
use crate::graph::disk_facts::DiskFacts;
use crate::graph::records::{NodeRecord, User};
use crate::job::context::JobKey;
use crate::node::build::NodePlan;
use crate::reply::{
    FormatSpecific, GraphEdgeView, GraphNodeKind, GraphNodeView, GraphView, ImageView, NodeView,
};

/// Numbers of backends and jobs in the graph view start here, above those of nodes.
const BACKEND_NUMBERS: u64 = 1 << 40;
/// Number of the command that changes a length.
const COMMAND_NUMBER: u64 = u64::MAX;
const JOB_NUMBERS: u64 = 1 << 41;

impl Graph {
    /// Every node, newest first.
    pub async fn views(&self, flat: bool) -> Vec<NodeView> {
        let ids: Vec<NodeId> = self
            .records
            .borrow()
            .newest_first()
            .iter()
            .map(|node| node.id)
            .collect();
        let disk_facts = self.disk_facts().await;
        let mut views = Vec::with_capacity(ids.len());
        for id in ids {
            let facts = match self.facts(id).await {
                Ok(facts) => facts,
                Err(_) => {
                    // It may just be moving to another thread.
                    let _held = self.hold().await;
                    let Ok(facts) = self.facts(id).await else {
                        continue;
                    };
                    facts
                }
            };
            let image = self.image_view(id, facts.length_bytes, flat, &disk_facts);
            let records = self.records.borrow();
            // A node may have gone while another was asked.
            let (Some(node), Some(image)) = (records.node(id), image) else {
                continue;
            };
            views.push(NodeView {
                node_name: node.name.clone(),
                driver: node.driver.to_owned(),
                filename: node.filename.to_string(),
                read_only: node.read_only,
                active: true,
                detect_zeroes: node.detect_zeroes,
                cache_direct: node.cache_direct,
                cache_no_flush: node.cache_no_flush,
                backing_file: None,
                backing_file_depth: if flat { 0 } else { records.filters_from(id) },
                image,
            });
        }
        views
    }

    /// What file systems say of all files that nodes stand on.
    async fn disk_facts(&self) -> HashMap<NodeId, DiskFacts> {
        let files: Vec<_> = {
            let records = self.records.borrow();
            let file_of = |node: &NodeRecord| match &node.plan {
                NodePlan::File { file, .. } => Some((node.id, node.disk.clone(), file.clone())),
                _ => None,
            };
            records.nodes.iter().filter_map(file_of).collect()
        };
        let mut facts = HashMap::with_capacity(files.len());
        for (id, question, file) in files {
            facts.insert(id, question.ask(file).await);
        }
        facts
    }

    /// The image behind a node; the one below a filter shows as its backing image.
    fn image_view(
        &self,
        id: NodeId,
        length_bytes: u64,
        flat: bool,
        disk_facts: &HashMap<NodeId, DiskFacts>,
    ) -> Option<ImageView> {
        let records = self.records.borrow();
        let node = records.node(id)?;
        let below = records.children(id).map(|edge| edge.child).next();
        let mut specific = None;
        let actual = match &node.plan {
            NodePlan::File { .. } => {
                let facts = disk_facts.get(&id).copied().unwrap_or_default();
                specific = Some(FormatSpecific::File {
                    extent_size_hint: facts.extent_size_hint_bytes.map(u64::from),
                });
                facts.allocated_bytes
            }
            NodePlan::Null(_) => Some(0),
            // A protocol of its own, which cannot tell.
            NodePlan::Blkdebug { .. } => None,
            NodePlan::Raw { .. } | NodePlan::Filter { .. } => below
                .and_then(|below| self.image_view(below, length_bytes, true, disk_facts))
                .and_then(|image| image.actual_size_bytes),
        };
        let backing = below.filter(|_| !flat && node.is_filter());
        let backing =
            backing.and_then(|below| self.image_view(below, length_bytes, false, disk_facts));
        Some(ImageView {
            filename: node.filename.to_string(),
            format: node.driver.to_owned(),
            virtual_size_bytes: length_bytes,
            actual_size_bytes: actual,
            cluster_size_bytes: None,
            dirty_flag: records.stands_on_file(id).then_some(false),
            format_specific: specific,
            backing_image: backing.map(Box::new),
        })
    }

    /// The graph with its permissions.
    pub fn block_graph(&self) -> GraphView {
        let records = self.records.borrow();
        let mut view = GraphView::default();
        for node in records.newest_first() {
            let (kind, name) = (GraphNodeKind::BlockDriver, node.name.clone());
            view.nodes.push(GraphNodeView {
                id: node.id.0,
                kind,
                name,
            });
        }
        for job in &records.jobs {
            let (kind, name) = (GraphNodeKind::BlockJob, job.id.clone());
            view.nodes.push(GraphNodeView {
                id: JOB_NUMBERS + job.key.0,
                kind,
                name,
            });
        }
        for edge in &records.edges {
            let parent = match edge.user {
                User::Node(id) => id.0,
                User::Job(JobKey(key)) => JOB_NUMBERS + key,
                User::Backend(JobKey(key)) => BACKEND_NUMBERS + key,
                User::Command => COMMAND_NUMBER,
            };
            if let User::Backend(_) | User::Command = edge.user {
                let (kind, name) = (GraphNodeKind::BlockBackend, String::new());
                view.nodes.push(GraphNodeView {
                    id: parent,
                    kind,
                    name,
                });
            }
            view.edges.push(GraphEdgeView {
                parent,
                child: edge.child.0,
                name: edge.role.to_owned(),
                taken: edge.taken.list(),
                shared: edge.shared.list(),
            });
        }
        view
    }
}
