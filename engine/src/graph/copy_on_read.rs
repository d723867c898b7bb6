//! Opening a `copy-on-read` node, and the links down to its bottom, which stay what they are as long as it is there.

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::Graph;
use crate::graph::add::Site;
use crate::graph::filenames::FileName;
use crate::graph::options::{Inherits, Resolved};
use crate::graph::records::{FILE_ROLE, NodeRecord, Records, User};
use crate::node::build::NodePlan;
use crate::node::copy_on_read_node::CopyOnReadOptions;
use crate::request::NodeRef;

impl Graph {
    /// Opens a filter that copies what is read and, if that is described inline, its child.
    pub(super) async fn open_copy_on_read(
        &self,
        name: Option<&str>,
        file: NodeRef,
        bottom: Option<String>,
        resolved: Resolved,
        site: Site,
    ) -> Result<NodeId, EngineError> {
        let inherits = Inherits::Filtered(resolved);
        let file = self.open_below(file, inherits, site).await?;
        let outcome = async {
            let reserved = self.reserve(name)?;
            let _held = self.hold_still(&[&file], site.batch).await;
            let child = self.child_now(&file, site.batch)?;
            let bottom = {
                let records = self.records.borrow();
                let child = records.node(child);
                if child.is_some_and(|child| child.read_only) {
                    return Err(EngineError::generic("Block node is read-only"));
                }
                let find = |name: &str| records.bottom(name, child.map(|child| child.id), site);
                bottom.as_deref().map(find).transpose()?
            };
            let record = NodeRecord {
                filename: FileName::of_copy_on_read(&self.filename(child)),
                plan: NodePlan::CopyOnRead {
                    child,
                    bottom,
                    options: CopyOnReadOptions {
                        read_only: resolved.read_only,
                        discard: resolved.discard,
                        detect_zeroes: resolved.detect_zeroes,
                    },
                },
                thread: self.thread_of(child),
                ..reserved.record("copy-on-read", resolved, site)?
            };
            let id = self.enlist(record, Some((child, FILE_ROLE))).await?;
            self.adopt(id, &file);
            Ok(id)
        }
        .await;
        self.settle(file, outcome).await
    }
}

impl Records {
    /// The last layer of a chain that is copied from, by name.
    ///
    /// # Errors
    /// It is no layer of that chain, or the links down to it are frozen already.
    fn bottom(&self, name: &str, child: Option<NodeId>, site: Site) -> Result<NodeId, EngineError> {
        let bottom = self
            .by_name(name, Some(site.batch))
            .ok_or_else(|| EngineError::generic(format!("Bottom node '{name}' not found")))?;
        if bottom.is_filter() {
            let text = format!("Bottom node '{name}' is a filter");
            return Err(EngineError::generic(text));
        }
        let chain = child.into_iter().flat_map(|child| self.chain(child));
        let chain: Vec<NodeId> = chain.collect();
        let Some(depth) = chain.iter().position(|id| *id == bottom.id) else {
            let child = child.map_or("", |child| self.name_of(child));
            return Err(EngineError::generic(format!(
                "Bottom node '{name}' is not in the chain of node '{child}'"
            )));
        };
        self.check_links_free(chain.get(..depth).unwrap_or_default())?;
        self.check_links_stay(chain.get(..=depth).unwrap_or_default())?;
        Ok(bottom.id)
    }

    /// Fails if one of the links down the chain from these nodes is frozen by a job or a filter.
    pub(super) fn check_links_free(&self, parents: &[NodeId]) -> Result<(), EngineError> {
        let mut parents = parents.iter().copied();
        let Some(parent) = parents.find(|parent| self.is_frozen(*parent)) else {
            return Ok(());
        };
        let below = self.next_in_chain(parent);
        let mut links = self.children(parent);
        let role = links.find(|edge| Some(edge.child) == below);
        Err(EngineError::generic(format!(
            "Cannot change '{}' link from '{}' to '{}'",
            role.map_or("", |edge| edge.role),
            self.name_of(parent),
            below.map_or("", |below| self.name_of(below))
        )))
    }

    /// Fails if one of these nodes, which something above is about to rely on, is the filter of a commit or a mirror: it goes with its job.
    pub(super) fn check_links_stay(&self, below: &[NodeId]) -> Result<(), EngineError> {
        let mut nodes = below.iter().filter_map(|id| self.node(*id));
        let Some(filter) = nodes.find(|node| node.goes_with_its_job()) else {
            return Ok(());
        };
        let mut links = self.users(filter.id);
        let link =
            links.find(|edge| matches!(edge.user, User::Node(above) if below.contains(&above)));
        Err(EngineError::generic(format!(
            "Cannot freeze '{}' link to '{}'",
            link.map_or(FILE_ROLE, |edge| edge.role),
            filter.name
        )))
    }

    /// Fails if something cannot be put between a node and those above it, as a filter relies on one of these links. What jobs
    /// rely on they have blocked.
    pub(super) fn check_links_to(&self, child: NodeId) -> Result<(), EngineError> {
        for edge in self.users(child) {
            if let User::Node(parent) = edge.user
                && self.next_in_chain(parent) == Some(child)
                && self.is_kept_by_filter(parent)
            {
                return Err(EngineError::generic(format!(
                    "Cannot change '{}' link to '{}'",
                    edge.role,
                    self.name_of(child)
                )));
            }
        }
        Ok(())
    }

    /// Whether what is below a node in its chain must stay what it is, for a job or a filter.
    pub(super) fn is_frozen(&self, parent: NodeId) -> bool {
        let by_job = self.frozen.iter().any(|link| link.parent == parent);
        by_job || self.is_kept_by_filter(parent)
    }

    fn is_kept_by_filter(&self, parent: NodeId) -> bool {
        let mut filters = self.nodes.iter();
        filters.any(|filter| self.keeps_link(filter, parent))
    }

    /// Whether a filter relies on what is below a node.
    fn keeps_link(&self, filter: &NodeRecord, parent: NodeId) -> bool {
        let NodePlan::CopyOnRead {
            bottom: Some(bottom),
            ..
        } = filter.plan
        else {
            return false;
        };
        let mut above = self.chain(filter.id).take_while(|id| *id != bottom);
        above.any(|id| id == parent)
    }
}
