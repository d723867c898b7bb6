//! `blockdev-snapshot-sync`: an overlay is made in a file, or found there, and put on a node.

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::new_images::{NewImage, check_format, file_node};
use crate::graph::overlaying::PutOverlay;
use crate::graph::{Graph, not_found};
use crate::request::{
    BackingRef, CommonOptions, DriverSpec, NewOverlaySpec, NodeRef, NodeSpec, Qcow2Spec,
};

impl Graph {
    /// Makes an overlay, unless it exists, and puts it on a node. It goes when that is settled if nobody used the node, who would
    /// use it now; its file stays.
    ///
    /// # Errors
    /// In QEMU's words and order. A file that was not there before is left only with a whole image in it.
    pub async fn put_new_overlay(&self, spec: &NewOverlaySpec) -> Result<PutOverlay, EngineError> {
        let name = spec.node_name.as_deref().unwrap_or_default();
        let device = spec.device.as_deref().unwrap_or_default();
        let below = self.find(name).ok_or_else(|| not_found(device, name))?;
        self.records.borrow().check_free(below)?;
        match &spec.overlay_name {
            None => return Err(EngineError::generic("New overlay node-name missing")),
            Some(overlay) if self.records.borrow().is_taken(overlay) => {
                return Err(EngineError::generic("New overlay node-name already in use"));
            }
            Some(_) => {}
        }
        if !spec.exists {
            self.make_overlay(spec, below).await?;
        }
        let overlay = self.open_unowned(overlay_node(spec)?).await?;
        let overlay_name = self.records.borrow().name_of(overlay).to_owned();
        match self.put_overlay(name, &overlay_name).await {
            Ok(put) => Ok(put.unowned(overlay)),
            Err(error) => {
                self.close_unused(overlay).await;
                Err(error)
            }
        }
    }

    /// An empty image that says that it stands on a node.
    async fn make_overlay(&self, spec: &NewOverlaySpec, below: NodeId) -> Result<(), EngineError> {
        check_format(&spec.format, true)?;
        let backing = {
            let records = self.records.borrow();
            let node = records.node(below);
            let node = node.ok_or_else(|| EngineError::generic("The node is gone"))?;
            (node.filename.to_string(), node.driver)
        };
        self.make_image(&NewImage {
            filename: &spec.filename,
            format: &spec.format,
            size_bytes: self.facts(below).await?.length_bytes,
            backing: Some(backing),
        })
        .await
    }
}

/// The overlay as it would be described in `blockdev-add`.
///
/// # Errors
/// The format is not one that can be opened.
fn overlay_node(spec: &NewOverlaySpec) -> Result<NodeSpec, EngineError> {
    let file = NodeRef::Inline(Box::new(file_node(&spec.filename)));
    let driver = match spec.format.as_str() {
        "qcow2" => DriverSpec::Qcow2(Box::new(Qcow2Spec {
            backing: BackingRef::Nothing,
            ..Qcow2Spec::over(file)
        })),
        "raw" => DriverSpec::Raw {
            file,
            offset: None,
            size: None,
        },
        other => {
            let text = format!("Unknown driver '{other}'");
            return Err(EngineError::generic(text));
        }
    };
    Ok(NodeSpec {
        node_name: spec.overlay_name.clone(),
        common: CommonOptions::default(),
        driver,
    })
}
