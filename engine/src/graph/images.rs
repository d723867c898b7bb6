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
        let edge = {
            let _held = self.hold().await;
            let id = self.look_up(&spec.node)?;
            let mut records = self.records.borrow_mut();
            records.check_free(id)?;
            records.check_unpinned(&records.component(id), None)?;
            let mut edge = user(id, spec.work.writes());
            if records.node(id).is_some_and(|node| node.force_share) {
                edge.shared = Permissions::EVERY;
            }
            records.change_edges(|edges| edges.push(edge.clone()))?;
            edge
        };
        // The edge keeps the node where it is.
        let outcome = self.run_on_image(edge.child, spec).await;
        let mut records = self.records.borrow_mut();
        if let Some(place) = records.edges.iter().position(|other| *other == edge)
            && let Err(error) = records.change_edges(|edges| {
                edges.remove(place);
            })
        {
            let node = records.name_of(edge.child);
            tracing::error!(%error, node, "a permission stays taken");
        }
        outcome
    }

    async fn run_on_image(&self, id: NodeId, spec: ImageSpec) -> Result<ImageReply, EngineError> {
        let thread = self.thread_of(id);
        self.threads
            .run(thread, move |context| {
                Box::pin(async move {
                    match context.node(id) {
                        Some(node) => images::run(node, spec.work, spec.watcher).await,
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
