//! What amending an image needs of the graph: its node, and what is known of the image afterwards.

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::jobs::JobNodes;
use crate::graph::{Graph, not_found};
use crate::node::build::NodePlan;
use crate::request::AmendSpec;

impl Graph {
    /// The node of an image that is to be amended.
    ///
    /// # Errors
    /// In QEMU's words and order.
    pub(super) fn prepare_amend(&self, spec: &AmendSpec) -> Result<JobNodes, EngineError> {
        let target = self
            .find(&spec.node)
            .ok_or_else(|| not_found("", &spec.node))?;
        let records = self.records.borrow();
        let driver = records.node(target).map(|node| node.driver);
        if driver != Some(&*spec.driver) {
            return Err(EngineError::generic(
                "x-blockdev-amend doesn't support changing the block driver",
            ));
        }
        if spec.driver != "qcow2" {
            let text = "Driver does not support x-blockdev-amend";
            return Err(EngineError::generic(text));
        }
        records.check_free(target)?;
        Ok(JobNodes {
            target: Some(target),
            amends: true,
            ..JobNodes::default()
        })
    }

    /// Takes note of what an image has become, for queries and for moves to another thread.
    pub(super) async fn take_in_amended(&self, id: NodeId) {
        let reopened = self.threads.run(self.thread_of(id), move |context| {
            Box::pin(async move { context.node(id).and_then(|node| node.take_reopened()) })
        });
        let Ok(Some(reopened)) = reopened.await else {
            return;
        };
        let mut records = self.records.borrow_mut();
        let Some(record) = records.node_mut(id) else {
            return;
        };
        if let NodePlan::Qcow2 { plan, .. } = &mut record.plan {
            plan.image = reopened.options;
        }
        if let Some(image) = &mut record.image {
            image.info = Some(reopened.info);
        }
    }
}
