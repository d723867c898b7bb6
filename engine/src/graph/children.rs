//! `x-blockdev-change`: none of the drivers here has children that come and go, so it always ends with a refusal.

use crate::error::EngineError;
use crate::graph::{Graph, not_found};

impl Graph {
    /// Adds or removes a child of a node.
    ///
    /// # Errors
    /// Always, in QEMU's words and order.
    pub fn change_children(
        &self,
        parent: &str,
        child: Option<&str>,
        node: Option<&str>,
    ) -> Result<(), EngineError> {
        let id = self.find(parent).ok_or_else(|| not_found(parent, parent))?;
        let text = match (child, node) {
            (None, None) => "Either child or node must be specified".to_owned(),
            (Some(_), Some(_)) => "The parameters child and node are in conflict".to_owned(),
            (Some(child), None) => {
                let records = self.records.borrow();
                match records.children(id).any(|edge| edge.role == child) {
                    true => format!("The node {parent} does not support removing a child"),
                    false => format!("Node '{parent}' does not have child '{child}'"),
                }
            }
            (None, Some(node)) => match self.find(node) {
                Some(_) => format!("The node {parent} does not support adding a child"),
                None => format!("Node '{node}' not found"),
            },
        };
        Err(EngineError::generic(text))
    }
}
