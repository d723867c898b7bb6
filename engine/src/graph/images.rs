//! Nodes that work on whole images uses: kept where they are, and from everybody else, until it has ended.

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::Graph;
use crate::graph::permissions::Permissions;
use crate::graph::records::{Edge, User};
use crate::images::{self, ImageReply, ImageSpec};
use crate::request::Permission;

impl Graph {
    /// Does something with the image on a node. Others may only read the node meanwhile.
    ///
    /// # Errors
    /// When the node is not there or in use, and as the work's.
    pub async fn work_on_image(&self, spec: ImageSpec) -> Result<ImageReply, EngineError> {
        let edges = {
            let mut names = vec![spec.node.as_str()];
            names.extend(spec.work.other());
            let _held = self.hold_named(&names).await;
            let mut nodes = vec![self.look_up(&spec.node)?];
            if let Some(other) = spec.work.other() {
                nodes.push(self.look_up(other)?);
            }
            self.take_for_image(&nodes, spec.work.writes())?
        };
        // The edges keep the nodes where they are.
        let nodes = edges.iter().map(|edge| edge.child).collect();
        let outcome = self.run_on_image(nodes, spec).await;
        let mut records = self.records.borrow_mut();
        for edge in edges {
            if let Some(place) = records.edges.iter().position(|other| *other == edge)
                && let Err(error) = records.change_edges(|edges| {
                    edges.remove(place);
                })
            {
                let node = records.name_of(edge.child);
                tracing::error!(%error, node, "a permission stays taken");
            }
        }
        outcome
    }

    /// Takes nodes, all or none; the first one for writing, if that is needed.
    fn take_for_image(&self, nodes: &[NodeId], writes: bool) -> Result<Vec<Edge>, EngineError> {
        let mut records = self.records.borrow_mut();
        for id in nodes {
            records.check_free(*id)?;
            records.check_unpinned(&records.component(*id), None)?;
        }
        let edge = |(place, id): (usize, &NodeId)| {
            let mut edge = user(*id, writes && place == 0);
            if records.node(*id).is_some_and(|node| node.force_share) {
                edge.shared = Permissions::EVERY;
            }
            edge
        };
        let taken: Vec<Edge> = nodes.iter().enumerate().map(edge).collect();
        records.change_edges(|edges| edges.extend(taken.iter().cloned()))?;
        Ok(taken)
    }

    async fn run_on_image(
        &self,
        ids: Vec<NodeId>,
        spec: ImageSpec,
    ) -> Result<ImageReply, EngineError> {
        let Some(first) = ids.first() else {
            return Err(EngineError::generic("Internal error: no node (bug)"));
        };
        let thread = self.thread_of(*first);
        if ids.iter().any(|id| self.thread_of(*id) != thread) {
            // Commands have one data thread; a daemon does no such work.
            let text = "The nodes are on several data threads";
            return Err(EngineError::generic(text));
        }
        self.threads
            .run(thread, move |context| {
                Box::pin(async move {
                    let mut nodes = ids.iter().filter_map(|id| context.node(*id));
                    match nodes.next() {
                        Some(node) => {
                            images::run(node, nodes.next(), spec.work, spec.watcher).await
                        }
                        None => Err(EngineError::generic("Internal error: a node is lost (bug)")),
                    }
                })
            })
            .await?
    }
}

/// What the work takes: the metadata that it reads must not change under it.
fn user(id: NodeId, writes: bool) -> Edge {
    let reads = Permissions::of(&[Permission::ConsistentRead]);
    let changes = Permissions::of(&[Permission::Write, Permission::Resize]);
    Edge {
        user: User::Command,
        child: id,
        role: "root",
        taken: match writes {
            true => reads.union(changes),
            false => reads,
        },
        shared: reads.with(Permission::WriteUnchanged),
    }
}
