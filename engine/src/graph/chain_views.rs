//! The chain of a node as clients see it: which files, in which formats, and what each image says is below it.

use std::path::PathBuf;

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::image_names::BackingName;
use crate::graph::jobs::JobNodes;
use crate::graph::records::NodeRecord;
use crate::graph::{Graph, not_found};
use crate::reply::LayerView;

impl Graph {
    /// The layers of a node's chain, itself first. Filters are not layers.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn chain_view(&self, name: &str) -> Result<Vec<LayerView>, EngineError> {
        let id = self.find(name).ok_or_else(|| not_found("", name))?;
        Ok(self.layers_from(id))
    }

    /// What the chain has become that a job has worked on; `None`: it was no job on a chain.
    pub fn chain_after(&self, nodes: &JobNodes, has_pivoted: bool) -> Option<Vec<LayerView>> {
        let part = nodes.chain.as_ref()?;
        let top = match has_pivoted {
            true => nodes.target?,
            false => part.device,
        };
        Some(self.layers_from(top))
    }

    fn layers_from(&self, top: NodeId) -> Vec<LayerView> {
        let records = self.records.borrow();
        let nodes = records.chain(top).filter_map(|id| records.node(id));
        let layers = nodes.filter(|node| !node.is_filter());
        layers.map(LayerView::of).collect()
    }
}

impl LayerView {
    pub(super) fn of(node: &NodeRecord) -> Self {
        let image = node.image.as_ref();
        Self {
            node_name: node.name.clone(),
            driver: node.driver,
            filename: node.filename.to_string(),
            path: node.filename.file().map(PathBuf::from),
            read_only: node.read_only,
            backing_filename: image
                .and_then(|image| image.backing.as_ref())
                .map(BackingName::shown),
        }
    }
}
