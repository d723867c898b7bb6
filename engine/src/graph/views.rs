//! What queries see of the graph.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;

use crate::data::NodeId;
use crate::graph::Graph;
use crate::graph::disk_facts::DiskFacts;
use crate::graph::records::{ImageRecord, NodeRecord, Records, User};
use crate::job::context::JobKey;
use crate::node::build::NodePlan;
use crate::node::root::RootId;
use crate::node::{ImageMarks, NodeFacts};
use crate::reply::{
    FormatSpecific, GraphEdgeView, GraphNodeKind, GraphNodeView, GraphView, ImageView, NodeView,
    Version3Info,
};

/// Numbers of backends and jobs in the graph view start here, above those of nodes.
const BACKEND_NUMBERS: u64 = 1 << 40;
/// Number of the command that changes a length.
const COMMAND_NUMBER: u64 = u64::MAX;
const JOB_NUMBERS: u64 = 1 << 41;
/// Numbers of users outside of the graph start here.
const ROOT_NUMBERS: u64 = 1 << 42;

/// How many files are asked for their room at once.
const FILES_ASKED_AT_ONCE: usize = 32;
/// How long a query waits for all of them; those that have not answered are shown without it.
const ANSWERS_WAIT: Duration = Duration::from_secs(2);

/// What the records do not know of a node.
struct Known {
    facts: NodeFacts,
    marks: Option<ImageMarks>,
    disk: DiskFacts,
}

impl Graph {
    /// Every node, newest first.
    pub async fn views(&self, flat: bool) -> Vec<NodeView> {
        let known = self.known().await;
        let records = self.records.borrow();
        let chains = (!flat).then(|| chain_views(&records, &known));
        let view = |node: &NodeRecord| {
            let (image, depth) = match &chains {
                None => (layer_view(&records, node.id, &known)?, 0),
                Some(chains) => {
                    let (image, depth) = chains.get(&node.id)?;
                    (ImageView::clone(image), *depth)
                }
            };
            let backing = records.backing(node.id);
            let backing = backing.and_then(|backing| records.node(backing));
            Some(NodeView {
                node_name: node.name.clone(),
                driver: node.driver.to_owned(),
                filename: node.filename.to_string(),
                read_only: node.read_only,
                active: !node.inactive,
                detect_zeroes: node.detect_zeroes,
                cache_direct: node.cache_direct,
                cache_no_flush: node.cache_no_flush,
                backing_file: backing.map(|backing| backing.filename.to_string()),
                backing_file_depth: depth,
                bitmaps: node.bitmaps.views(),
                image,
            })
        };
        // A node that has come after the others were asked is not shown.
        records.newest_first().filter_map(view).collect()
    }

    /// What only nodes and file systems know, for every node.
    async fn known(&self) -> HashMap<NodeId, Known> {
        let ids: Vec<NodeId> = {
            let records = self.records.borrow();
            records.newest_first().map(|node| node.id).collect()
        };
        let mut disk_facts = self.disk_facts().await;
        let mut known = HashMap::with_capacity(ids.len());
        for id in ids {
            // One that has gone meanwhile is not shown.
            let asked = self.threads.run(self.thread_of(id), move |context| {
                Box::pin(async move {
                    let node = context.node(id)?;
                    Some((node.facts(), node.image_marks()))
                })
            });
            if let Ok(Some((facts, marks))) = asked.await {
                let disk = disk_facts.remove(&id).unwrap_or_default();
                known.insert(id, Known { facts, marks, disk });
            }
        }
        known
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
        let asked = futures_util::stream::iter(files).map(|(id, question, file)| async move {
            let facts = question.ask(file).await;
            (id, facts)
        });
        let mut answers = asked.buffer_unordered(FILES_ASKED_AT_ONCE);
        let mut facts = HashMap::new();
        let deadline = tokio::time::Instant::now() + ANSWERS_WAIT;
        while let Ok(Some((id, answer))) = tokio::time::timeout_at(deadline, answers.next()).await {
            facts.insert(id, answer);
        }
        facts
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
        // Others stand in no graph.
        let block_jobs = records.jobs.iter();
        for job in block_jobs.filter(|job| job.job_type.is_block_job()) {
            let (kind, name) = (GraphNodeKind::BlockJob, job.id.clone());
            view.nodes.push(GraphNodeView {
                id: JOB_NUMBERS + job.key.0,
                kind,
                name,
            });
        }
        let is_seen = |id| records.node(id).is_some_and(|node| node.batch.is_none());
        for edge in &records.edges {
            // What is still being opened is not shown, nor that it uses something.
            let by_seen = match edge.user {
                User::Node(parent) => is_seen(parent),
                User::Job(_) | User::Backend(_) | User::Root(_) | User::Command => true,
            };
            if !by_seen || !is_seen(edge.child) {
                continue;
            }
            let parent = match edge.user {
                User::Node(id) => id.0,
                User::Job(JobKey(key)) => JOB_NUMBERS + key,
                User::Backend(JobKey(key)) => BACKEND_NUMBERS + key,
                User::Root(RootId(root)) => ROOT_NUMBERS + root,
                User::Command => COMMAND_NUMBER,
            };
            if let User::Backend(_) | User::Root(_) | User::Command = edge.user {
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

/// The image of every node with its chain behind it, and how long that is. Chains share what they have in common.
fn chain_views(
    records: &Records,
    known: &HashMap<NodeId, Known>,
) -> HashMap<NodeId, (Arc<ImageView>, u32)> {
    let mut views: HashMap<NodeId, (Arc<ImageView>, u32)> = HashMap::new();
    let nodes = records.nodes.iter().map(|node| node.id);
    for id in records.parents_first(nodes).into_iter().rev() {
        let Some(layer) = layer_view(records, id, known) else {
            continue;
        };
        let behind = records.next_in_chain(id).and_then(|next| views.get(&next));
        let view = ImageView {
            backing_image: behind.map(|(image, _)| image.clone()),
            ..layer
        };
        let depth = behind.map_or(0, |(_, depth)| depth + 1);
        views.insert(id, (Arc::new(view), depth));
    }
    views
}

/// The image of one layer, without what is behind it.
fn layer_view(records: &Records, id: NodeId, known: &HashMap<NodeId, Known>) -> Option<ImageView> {
    let (node, mine) = (records.node(id)?, known.get(&id)?);
    let mut view = ImageView {
        filename: node.filename.to_string(),
        path: node.filename.file().map(PathBuf::from),
        format: node.driver.to_owned(),
        virtual_size_bytes: mine.facts.length_bytes,
        actual_size_bytes: room(records, id, known),
        cluster_size_bytes: None,
        dirty_flag: None,
        backing_filename: None,
        full_backing_filename: None,
        backing_filename_format: None,
        snapshots: Vec::new(),
        format_specific: None,
        backing_image: None,
    };
    if let NodePlan::File { .. } = &node.plan {
        let hint = mine.disk.extent_size_hint_bytes;
        view.format_specific = Some(FormatSpecific::File {
            extent_size_hint: hint.map(u64::from),
        });
    }
    // Filters and raw show what is below.
    if let Some(with_facts) = records.with_facts(id) {
        let is_file = matches!(with_facts.plan, NodePlan::File { .. });
        let facts = known.get(&with_facts.id);
        let marks = facts.and_then(|facts| facts.marks);
        // Whether it was closed cleanly, a file never has to tell.
        view.dirty_flag = match marks {
            Some(marks) => Some(marks.is_dirty),
            None => is_file.then_some(false),
        };
        let cluster = facts.and_then(|facts| facts.facts.cluster_size_bytes);
        view.cluster_size_bytes = cluster.map(u64::from);
    }
    if let Some(image) = &node.image {
        add_image(
            &mut view,
            records,
            node,
            image,
            mine.marks.unwrap_or_default(),
        );
    } else if let Some(below) = records.snapshot_image(id)
        && let Some(info) = below.image.as_ref().and_then(|image| image.info.as_ref())
    {
        view.snapshots.clone_from(&info.snapshots);
    }
    Some(view)
}

/// What an image says of itself.
fn add_image(
    view: &mut ImageView,
    records: &Records,
    node: &NodeRecord,
    image: &ImageRecord,
    marks: ImageMarks,
) {
    if let Some(backing) = &image.backing {
        view.full_backing_filename = records.folder(node.id).map(|folder| backing.from(folder));
        view.backing_filename = Some(backing.shown());
        view.backing_filename_format.clone_from(&backing.format);
    }
    let Some(info) = &image.info else { return };
    view.snapshots.clone_from(&info.snapshots);
    view.format_specific = Some(FormatSpecific::Qcow2 {
        refcount_bits: info.refcount_bits,
        compression: info.compression,
        version_3: info.version_3.clone().map(|version_3| Version3Info {
            corrupt: marks.is_corrupt,
            ..version_3
        }),
    });
}

/// Room that everything below a node but its backing takes, where all of it can tell.
fn room(records: &Records, id: NodeId, known: &HashMap<NodeId, Known>) -> Option<u64> {
    match &records.node(id)?.plan {
        NodePlan::File { .. } => known.get(&id)?.disk.allocated_bytes,
        NodePlan::Null(_) => Some(0),
        // A protocol of its own, which cannot tell.
        NodePlan::Blkdebug { .. } | NodePlan::Nbd { .. } | NodePlan::Opening => None,
        NodePlan::CopyBeforeWrite { child, .. } | NodePlan::SnapshotAccess { child, .. } => {
            room(records, *child, known)
        }
        NodePlan::Raw { child, .. }
        | NodePlan::Filter { child, .. }
        | NodePlan::CopyOnRead { child, .. }
        | NodePlan::Throttle { child, .. } => room(records, *child, known),
        NodePlan::Qcow2 {
            file, data_file, ..
        } => {
            let data_bytes = match data_file {
                Some(data_file) => room(records, *data_file, known)?,
                None => 0,
            };
            room(records, *file, known)?.checked_add(data_bytes)
        }
    }
}
