//! Opening a `throttle` node, which nodes a group is in use by, and when nothing waits for its turn.
//!
//! Whoever waits for requests to end would wait for as long as limits want, so limits are suspended meanwhile: what waits passes
//! at once, and counts all the same.

use std::sync::Arc;

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::add::Site;
use crate::graph::filenames::FileName;
use crate::graph::options::{Inherits, Resolved};
use crate::graph::records::{FILE_ROLE, NodeRecord, Records};
use crate::graph::{Graph, JobNodes};
use crate::node::build::NodePlan;
use crate::node::root::RootId;
use crate::node::throttle_node::ThrottleOptions;
use crate::request::NodeRef;
use crate::throttle::group::{Suspended, ThrottleGroup};

impl Graph {
    /// Opens a filter with limits and, if that is described inline, its child.
    pub(super) async fn open_throttle(
        &self,
        name: Option<&str>,
        file: NodeRef,
        group: &str,
        resolved: Resolved,
        site: Site,
    ) -> Result<NodeId, EngineError> {
        let inherits = Inherits::Filtered(resolved);
        let file = self.open_below(file, inherits, site).await?;
        let outcome = async {
            let reserved = self.reserve(name)?;
            let _held = self.hold_still(&[&file], site.batch).await;
            let child = self.child_now(&file, site.batch)?;
            let group = self.objects.borrow().throttle_group(group)?;
            let record = NodeRecord {
                filename: FileName::of_throttle(&self.filename(child), group.name()),
                plan: NodePlan::Throttle {
                    child,
                    member: group.join(),
                    options: options(resolved),
                },
                thread: self.thread_of(child),
                ..reserved.record("throttle", resolved, site)?
            };
            let id = self.enlist(record, Some((child, FILE_ROLE))).await?;
            self.adopt(id, &file);
            Ok(id)
        }
        .await;
        self.settle(file, outcome).await
    }

    /// Lets nothing wait for its turn in or below these nodes until the guards go.
    pub(super) fn suspend_limits(&self, nodes: &[NodeId]) -> Vec<Suspended> {
        self.records.borrow().suspend_limits(nodes)
    }

    /// The same for whatever a root leads to.
    pub fn suspend_limits_of_root(&self, id: RootId) -> Vec<Suspended> {
        let node = self.node_of_root(id);
        node.map_or_else(Vec::new, |node| self.suspend_limits(&[node]))
    }

    /// The same for what a job uses, and what stands on that.
    pub fn suspend_limits_of_job(&self, nodes: &JobNodes) -> Vec<Suspended> {
        let records = self.records.borrow();
        let used = [nodes.source, nodes.target, nodes.filter];
        let all: Vec<NodeId> = used
            .into_iter()
            .flatten()
            .flat_map(|node| records.ancestors(node))
            .collect();
        records.suspend_limits(&all)
    }

    /// Lets nothing wait for its turn any more, at the end of the daemon.
    pub fn end_limits(&self) {
        for node in &self.records.borrow().nodes {
            if let NodePlan::Throttle { member, .. } = &node.plan {
                member.suspend_for_good();
            }
        }
    }
}

/// How a node is used.
pub(super) fn options(resolved: Resolved) -> ThrottleOptions {
    ThrottleOptions {
        read_only: resolved.read_only,
        discard: resolved.discard,
        detect_zeroes: resolved.detect_zeroes,
    }
}

impl Records {
    /// Whether a node belongs to a group.
    pub(super) fn is_throttled_by(&self, group: &Arc<ThrottleGroup>) -> bool {
        self.nodes.iter().any(|node| match &node.plan {
            NodePlan::Throttle { member, .. } => Arc::ptr_eq(member.group(), group),
            _ => false,
        })
    }

    fn suspend_limits(&self, nodes: &[NodeId]) -> Vec<Suspended> {
        let is_throttle = |node: &NodeRecord| matches!(node.plan, NodePlan::Throttle { .. });
        if !self.nodes.iter().any(is_throttle) {
            return Vec::new();
        }
        let mut seen: Vec<NodeId> = nodes.to_vec();
        let mut place = 0;
        while let Some(id) = seen.get(place).copied() {
            for edge in self.children(id) {
                if !seen.contains(&edge.child) {
                    seen.push(edge.child);
                }
            }
            place += 1;
        }
        let plans = seen.iter().filter_map(|id| self.node(*id));
        let members = plans.filter_map(|node| match &node.plan {
            NodePlan::Throttle { member, .. } => Some(member.suspend()),
            _ => None,
        });
        members.collect()
    }
}
