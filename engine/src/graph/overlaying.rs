//! An overlay is put on a node: what is written from then on goes there, and the node keeps what it holds.
//!
//! All in one change: the node becomes read-only and the overlay's backing, and whoever used the node uses the overlay. Users
//! outside of the graph are drained meanwhile, as a write that is still on its way to the node must not be overtaken by one to
//! the overlay, which would copy the old bytes around it.

use tokio::sync::MutexGuard;

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::linking::{Change, Link};
use crate::graph::records::{BACKING_ROLE, ROOT_ROLE, Records, User};
use crate::graph::reopen::{reopened_file, with_access};
use crate::graph::{Graph, not_found};
use crate::limits::CHAIN_LAYERS_MAX;
use crate::node::build::NodePlan;
use crate::node::root::RootId;
use crate::request::Permission;

/// An overlay that has been put on a node.
#[must_use = "it is settled or taken off"]
pub struct PutOverlay {
    below: NodeId,
    above: NodeId,
    /// The overlay, if nobody has it but who uses it now.
    unowned: Option<NodeId>,
    /// It was made inactive for the node that it was put on.
    rests: bool,
    /// Users outside of the graph that have gone to it.
    roots: Vec<RootId>,
    /// What leads back.
    back: Change,
}

impl PutOverlay {
    /// With an overlay that was opened for this.
    pub(super) fn unowned(mut self, overlay: NodeId) -> Self {
        self.unowned = Some(overlay);
        self
    }
}

impl Graph {
    /// It is final. What was made for it goes if nobody uses it.
    pub async fn settle_overlay(&self, put: PutOverlay) {
        if let Some(overlay) = put.unowned {
            self.close_unused(overlay).await;
        }
    }

    /// Puts an overlay on a node.
    ///
    /// # Errors
    /// In QEMU's words and order; nothing has changed then.
    pub async fn put_overlay(&self, node: &str, overlay: &str) -> Result<PutOverlay, EngineError> {
        let (_held, below, above) = self.hold_for_overlay(node, overlay).await?;
        let rests = {
            let records = self.records.borrow();
            let is_inactive = |id| records.node(id).is_some_and(|node| node.inactive);
            is_inactive(below) && !is_inactive(above)
        };
        if rests {
            // Nothing active stands on what somebody else may own.
            self.inactivate(above).await?;
        }
        // What is planned from here on holds only as long as nobody else changes one of them.
        self.pin(below).await?;
        let outcome = self.put_pinned(below, above).await;
        self.release(below, &super::reopen::pin(below)).await;
        match outcome {
            Ok(put) => Ok(PutOverlay { rests, ..put }),
            Err(error) => {
                self.rouse(above, rests).await;
                Err(error)
            }
        }
    }

    /// Takes an overlay off again to which nobody has written yet, as its users have been drained since before it was put there.
    ///
    /// # Errors
    /// Its users stay on it; nothing is lost then.
    pub async fn take_overlay_off(&self, put: PutOverlay) -> Result<(), EngineError> {
        let name = self.records.borrow().name_of(put.below).to_owned();
        let outcome = {
            let _held = self.hold_named(&[&name]).await;
            self.pin(put.below).await?;
            let (below, above) = (put.below, put.above);
            let outcome = self
                .take_pinned_off((below, above), &put.roots, put.back)
                .await;
            self.release(below, &super::reopen::pin(below)).await;
            if outcome.is_ok() {
                self.rouse(above, put.rests).await;
            }
            outcome
        };
        if let Some(overlay) = put.unowned {
            self.close_unused(overlay).await;
        }
        outcome
    }

    /// An overlay that is not put on an inactive node after all is what it was.
    async fn rouse(&self, overlay: NodeId, rests: bool) {
        if rests && let Err(error) = self.activate(overlay).await {
            let records = self.records.borrow();
            let node = records.name_of(overlay);
            tracing::error!(%error, node, "a node stays inactive");
        }
    }

    async fn take_pinned_off(
        &self,
        (below, above): (NodeId, NodeId),
        roots: &[RootId],
        back: Change,
    ) -> Result<(), EngineError> {
        let ancestors = self.records.borrow().ancestors(below);
        let drained = self.drain_roots_on(below, &ancestors).await?;
        let is_new = |root: &RootId| !roots.contains(root);
        if self.records.borrow().roots_on(&[above]).iter().any(is_new) {
            let text = "Somebody has come to use the overlay: it stays";
            return Err(EngineError::generic(text));
        }
        self.reopen_nodes(back).await?;
        self.put_on(roots, below).await?;
        drop(drained);
        let mut records = self.records.borrow_mut();
        for id in ancestors {
            records.name_again(id);
        }
        Ok(())
    }

    /// The same for nodes that an edge of the caller keeps as they are. The graph is held.
    async fn put_pinned(&self, below: NodeId, above: NodeId) -> Result<PutOverlay, EngineError> {
        let ancestors = {
            let records = self.records.borrow();
            records.check_opened(&records.component(below), None)?;
            records.ancestors(below)
        };
        self.records.borrow().check_unwritten(below, &ancestors)?;
        let drained = self.drain_roots_on(below, &ancestors).await?;
        let (change, roots) = self.overlaid(below, above).await?;
        let back = self.reopen_nodes(change).await?;
        self.put_on(&roots, above).await?;
        drop(drained);
        let mut records = self.records.borrow_mut();
        for id in records.component(above) {
            records.name_again(id);
        }
        Ok(PutOverlay {
            below,
            above,
            unowned: None,
            rests: false,
            roots,
            back,
        })
    }

    /// Node and overlay, on one thread, while nobody else changes the graph.
    async fn hold_for_overlay(
        &self,
        node: &str,
        overlay: &str,
    ) -> Result<(MutexGuard<'_, ()>, NodeId, NodeId), EngineError> {
        let mut held = self.hold_named(&[node, overlay]).await;
        loop {
            let (below, above) = self.find_overlay(node, overlay)?;
            if self.thread_of(below) == self.thread_of(above) {
                return Ok((held, below, above));
            }
            // Names may be others' when it has arrived.
            held = self.join(held, below, above, 0, None).await?;
        }
    }

    /// Node and overlay by name, if the one can be put on the other.
    fn find_overlay(&self, node: &str, overlay: &str) -> Result<(NodeId, NodeId), EngineError> {
        let below = self.look_up(node)?;
        self.records.borrow().check_free(below)?;
        let above = self
            .find(overlay)
            .ok_or_else(|| not_found(overlay, overlay))?;
        let records = self.records.borrow();
        let fail = |text: &str| Err(EngineError::generic(text));
        if records.demands(above).0.has(Permission::ConsistentRead) {
            return fail("The overlay is already in use");
        }
        let record = records.node(above);
        if record.is_some_and(|node| node.is_filter()) {
            return fail("Filters cannot be used as overlays");
        }
        if records.backing(above).is_some() {
            return fail("The overlay already has a backing image");
        }
        if record.is_none_or(|node| !matches!(node.plan, NodePlan::Qcow2 { .. })) {
            return fail("The overlay does not support backing images");
        }
        if records.parents_first([below]).contains(&above) {
            return Err(EngineError::generic(format!(
                "Making '{node}' a backing child of '{overlay}' would create a cycle"
            )));
        }
        records.check_links_to(below)?;
        let layers = records.chain_depth(below).saturating_add(2);
        if usize::try_from(layers).is_ok_and(|layers| layers > CHAIN_LAYERS_MAX) {
            return Err(EngineError::generic(format!(
                "The backing chain would have more than {CHAIN_LAYERS_MAX} layers"
            )));
        }
        Ok((below, above))
    }

    /// What becomes of nodes and edges, and which users outside of the graph go to the overlay.
    async fn overlaid(
        &self,
        below: NodeId,
        above: NodeId,
    ) -> Result<(Change, Vec<RootId>), EngineError> {
        let (mut nodes, mut links, roots, keeping) = {
            let records = self.records.borrow();
            let below_overlay = records.parents_first([above]);
            let parents = records.users(below).filter_map(|edge| match edge.user {
                User::Node(parent) if !below_overlay.contains(&parent) => Some((parent, edge.role)),
                _ => None,
            });
            let mut nodes = Vec::new();
            let mut links = Vec::new();
            // Behind the filter of a job others may stand on the node, too.
            for id in records.ancestors(below) {
                let node = records.node(id).filter(|_| !below_overlay.contains(&id));
                if let Some(mut node) = node.cloned()
                    && retarget(&mut node.plan, below, above)
                {
                    nodes.push(node);
                }
            }
            for (parent, role) in parents {
                links.push(Link {
                    user: User::Node(parent),
                    role,
                    from: Some(below),
                    to: Some(above),
                });
            }
            let roots = records.roots_on(&[below]);
            links.extend(roots.iter().map(|id| Link {
                user: User::Root(*id),
                role: ROOT_ROLE,
                from: Some(below),
                to: Some(above),
            }));
            if let Some(mut node) = records.node(above).cloned() {
                if let NodePlan::Qcow2 { backing, .. } = &mut node.plan {
                    *backing = Some(below);
                }
                nodes.push(node);
            }
            (nodes, links, roots, records.following(below, true))
        };
        links.push(Link {
            user: User::Node(above),
            role: BACKING_ROLE,
            from: None,
            to: Some(below),
        });
        for node in keeping {
            let direct = node.cache_direct;
            let file = reopened_file(&node, true, direct).await?;
            nodes.push(with_access(node, true, file));
        }
        Ok((Change::new(nodes, links), roots))
    }
}

impl Records {
    /// A node and all that stand on it.
    pub(super) fn ancestors(&self, id: NodeId) -> Vec<NodeId> {
        let mut found = vec![id];
        let mut place = 0;
        while let Some(id) = found.get(place).copied() {
            place += 1;
            for edge in self.users(id) {
                if let User::Node(parent) = edge.user
                    && !found.contains(&parent)
                {
                    found.push(parent);
                }
            }
        }
        found
    }

    /// That no job writes to a node, or through one of those above it: its requests are not drained.
    fn check_unwritten(&self, node: NodeId, ancestors: &[NodeId]) -> Result<(), EngineError> {
        let writes = |edge: &&crate::graph::records::Edge| {
            let is_job = matches!(edge.user, User::Job(_) | User::Backend(_));
            let written = edge.taken.has(Permission::Write);
            is_job && ancestors.contains(&edge.child) && written
        };
        match self.edges.iter().find(writes) {
            None => Ok(()),
            Some(_) => Err(EngineError::generic(format!(
                "Node '{}' is busy: a block job writes to it",
                self.name_of(node)
            ))),
        }
    }
}

/// Lets a node stand on another one where it stood on `from`. Whether it did.
fn retarget(plan: &mut NodePlan, from: NodeId, to: NodeId) -> bool {
    let mut stood = false;
    let mut turn = |child: &mut NodeId| {
        if *child == from {
            *child = to;
            stood = true;
        }
    };
    match plan {
        NodePlan::Raw { child, .. }
        | NodePlan::Blkdebug { child, .. }
        | NodePlan::CopyOnRead { child, .. }
        | NodePlan::Throttle { child, .. }
        | NodePlan::SnapshotAccess { child, .. }
        | NodePlan::Filter { child, .. } => turn(child),
        NodePlan::CopyBeforeWrite { child, target, .. } => {
            turn(child);
            turn(target);
        }
        NodePlan::Qcow2 {
            file,
            data_file,
            backing,
            ..
        } => {
            turn(file);
            data_file.iter_mut().for_each(&mut turn);
            backing.iter_mut().for_each(turn);
        }
        NodePlan::File { .. } | NodePlan::Nbd { .. } | NodePlan::Null(_) | NodePlan::Opening => {}
    }
    stood
}
