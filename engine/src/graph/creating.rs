//! What the creation of images needs of the graph: nodes that exist or are opened for it, in QEMU's order.

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::Graph;
use crate::graph::jobs::{JobNodes, edge};
use crate::graph::permissions::Permissions;
use crate::graph::records::{Edge, Records, User};
use crate::job::context::JobKey;
use crate::jobs::create_qcow2::create_options;
use crate::request::{CreateQcow2Spec, NodeRef, Permission};

/// What was opened for a job, and goes with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// Where it writes.
    pub target: Option<NodeId>,
    /// Where it writes guest data.
    pub data_file: Option<NodeId>,
}

impl Opened {
    /// Everything.
    pub(super) fn all(&self) -> impl Iterator<Item = NodeId> + use<> {
        [self.data_file, self.target].into_iter().flatten()
    }
}

impl Graph {
    /// Opens what the description of an image describes inline, and refuses what contradicts itself when QEMU does:
    /// between the two nodes.
    ///
    /// # Errors
    /// In QEMU's words; nothing stays open then.
    pub(super) async fn open_for_qcow2(
        &self,
        spec: &CreateQcow2Spec,
    ) -> Result<Opened, EngineError> {
        let mut opened = Opened {
            target: self.open_inline(&spec.file).await?,
            data_file: None,
        };
        let checked = create_options(spec).check();
        let data_file = match (checked, &spec.data_file) {
            (Err(error), _) => Err(EngineError::generic(error.to_string())),
            (Ok(_), Some(data_file)) => self.open_inline(data_file).await,
            (Ok(_), None) => Ok(None),
        };
        match data_file {
            Ok(data_file) => {
                opened.data_file = data_file;
                Ok(opened)
            }
            Err(error) => {
                self.close_opened(&opened).await;
                Err(error)
            }
        }
    }

    /// Opens a node that is described; one that is named has to be there.
    async fn open_inline(&self, node: &NodeRef) -> Result<Option<NodeId>, EngineError> {
        match node {
            NodeRef::Inline(spec) => self.open_unowned((**spec).clone()).await.map(Some),
            NodeRef::Name(name) => self.look_up(name).map(|_| None),
        }
    }

    /// Closes what was opened for a job, as far as nobody else has come to use it.
    pub(super) async fn close_opened(&self, opened: &Opened) {
        for node in opened.all() {
            self.close_unused(node).await;
        }
    }

    /// The nodes of a new image.
    ///
    /// # Errors
    /// In QEMU's words, and nothing stays open.
    pub(super) async fn prepare_create_qcow2(
        &self,
        spec: &CreateQcow2Spec,
        opened: Opened,
    ) -> Result<JobNodes, EngineError> {
        let named = |node: &NodeRef, opened: Option<NodeId>| match (node, opened) {
            (NodeRef::Name(name), _) => self.look_up(name),
            (NodeRef::Inline(_), Some(opened)) => Ok(opened),
            (NodeRef::Inline(_), None) => Err(EngineError::generic("A node was not opened (bug)")),
        };
        let found = named(&spec.file, opened.target).and_then(|target| {
            let data_file = spec.data_file.as_ref();
            let data_file = data_file.map(|node| named(node, opened.data_file));
            Ok((target, data_file.transpose()?))
        });
        match found {
            Ok((target, data_file)) => Ok(JobNodes {
                target: Some(target),
                data_file,
                data_file_name: data_file.map(|id| self.shown_filename(id)),
                makes_image: true,
                opened,
                ..JobNodes::default()
            }),
            Err(error) => {
                self.close_opened(&opened).await;
                Err(error)
            }
        }
    }

    fn shown_filename(&self, id: NodeId) -> String {
        let records = self.records.borrow();
        records
            .node(id)
            .map(|node| node.filename.to_string())
            .unwrap_or_default()
    }
}

/// The edges of a job that makes an image. QEMU writes the header through a device of its own before it opens the image,
/// so that a conflict with that one is told first.
pub(super) fn image_edges(
    records: &mut Records,
    key: JobKey,
    nodes: &JobNodes,
    target: NodeId,
) -> Result<Vec<Edge>, EngineError> {
    let changes = Permissions::of(&[Permission::Write, Permission::Resize]);
    let device = edge(
        User::Backend(key),
        target,
        "root",
        changes,
        Permissions::EVERY,
    );
    records.change_edges(|all| all.push(device.clone()))?;
    records.change_edges(|all| all.retain(|edge| *edge != device))?;
    let taken = changes.with(Permission::ConsistentRead);
    let read_shared = Permissions::of(&[Permission::ConsistentRead, Permission::WriteUnchanged]);
    let keeps_length = Permissions::EVERY.without(Permission::Resize);
    let job = |node, role, shared| edge(User::Job(key), node, role, taken, shared);
    let mut edges = vec![job(target, "file", read_shared)];
    edges.extend(
        nodes
            .data_file
            .map(|data_file| job(data_file, "data-file", keeps_length)),
    );
    Ok(edges)
}
