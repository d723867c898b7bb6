//! Moving nodes between data threads. What is connected moves as a whole: everything is brought up on the new thread beside
//! what is on the old one, and only when all of it is there do the nodes change over. Image locks, lengths and the memory of
//! a failed flush belong to the open files, which stay.
//!
//! Images are written back before, and read again, so a move may wait for a disk. The graph is not held meanwhile; the nodes
//! are marked, and whoever needs one waits for the end of the move, which has a deadline.

use std::time::Duration;

use tokio::sync::MutexGuard;

use crate::data::{NodeId, ThreadId};
use crate::error::{EngineError, NodeError};
use crate::graph::Graph;
use crate::graph::add::Below;
use crate::graph::jobs::JobNodes;
use crate::graph::records::{Batch, Records};
use crate::node::build::{Built, NodePlan, build};

/// How long writing one image back, or reading it again, may take: longer, and something is stuck.
const MOVE_WAIT: Duration = Duration::from_secs(30);

impl Graph {
    /// Keeps every other change of the graph waiting, once none of the nodes is on its way to another thread.
    ///
    /// # Cancel safety
    /// Nothing is held then.
    pub(super) async fn hold_while(
        &self,
        nodes: impl Fn(&Records) -> Vec<NodeId>,
    ) -> MutexGuard<'_, ()> {
        loop {
            let held = self.hold().await;
            let arrived = self.arrived.notified();
            {
                let records = self.records.borrow();
                let on_the_way = |id: &NodeId| records.moving.contains(id);
                if !nodes(&records).iter().any(on_the_way) {
                    return held;
                }
            }
            drop(held);
            arrived.await;
        }
    }

    /// The same for children of a node that is being opened.
    pub(super) async fn hold_still(&self, children: &[&Below], batch: Batch) -> MutexGuard<'_, ()> {
        self.hold_while(|records| {
            let now = |child: &&Below| match child {
                Below::Opened(id) => Some(*id),
                Below::Named(name) => records.by_name(name, Some(batch)).map(|node| node.id),
            };
            children.iter().filter_map(now).collect()
        })
        .await
    }

    /// Moves everything connected with a node. What `batch` is opening may be part of it.
    ///
    /// # Errors
    /// When it may not move now, or cannot be brought up there: everything is where it was then.
    pub(super) async fn move_component<'a>(
        &'a self,
        held: MutexGuard<'a, ()>,
        id: NodeId,
        thread: ThreadId,
        batch: Option<Batch>,
    ) -> Result<MutexGuard<'a, ()>, EngineError> {
        let component = {
            let mut records = self.records.borrow_mut();
            let component = records.component(id);
            records.check_unpinned(&component, batch)?;
            records.moving.extend(component.iter().copied());
            component
        };
        drop(held);
        let brought = self.bring_over(&component, thread).await;
        if brought.is_ok() {
            let mut records = self.records.borrow_mut();
            for id in &component {
                let Some(node) = records.node_mut(*id) else {
                    continue;
                };
                let from = std::mem::replace(&mut node.thread, thread);
                self.threads.load(from, -1);
                self.threads.load(thread, 1);
            }
        }
        if let Ok(old) = &brought {
            for (id, from) in old.iter().rev() {
                self.forget_on(*from, *id).await;
            }
        }
        {
            let mut records = self.records.borrow_mut();
            records.moving.retain(|id| !component.contains(id));
        }
        self.arrived.notify_waiters();
        brought?;
        Ok(self.hold().await)
    }

    /// Brings nodes up on a thread, children first, and leaves them where they are, too. Returns where they were.
    async fn bring_over(
        &self,
        component: &[NodeId],
        thread: ThreadId,
    ) -> Result<Vec<(NodeId, ThreadId)>, EngineError> {
        let _unlimited = self.suspend_limits(component);
        let ended = self.writing_down.ended(component);
        if tokio::time::timeout(MOVE_WAIT, ended).await.is_err() {
            let text =
                "Bitmaps of a node that has to move to another data thread are being written down";
            return Err(EngineError::generic(text));
        }
        let moving = component.iter().map(|id| (*id, self.thread_of(*id)));
        let moving: Vec<(NodeId, ThreadId)> = moving.filter(|(_, from)| *from != thread).collect();
        // Overlays first: what they write goes through the nodes below.
        for (id, from) in moving.iter().rev() {
            self.write_back(*from, *id).await?;
        }
        for (place, (id, _)) in moving.iter().enumerate() {
            if let Err(error) = self.bring_up_on(*id, thread).await {
                for (id, _) in moving.iter().take(place).rev() {
                    self.forget_on(thread, *id).await;
                }
                return Err(error);
            }
        }
        Ok(moving)
    }

    /// Lets an image write what only its memory holds, so that it can be opened elsewhere.
    async fn write_back(&self, thread: ThreadId, id: NodeId) -> Result<(), EngineError> {
        let written = self.threads.run(thread, move |context| {
            Box::pin(async move {
                match context.node(id) {
                    Some(node) => node.close().await,
                    None => Ok(()),
                }
            })
        });
        let written = tokio::time::timeout(MOVE_WAIT, written).await;
        let written = written.map_err(|_| self.stuck(id))??;
        written.map_err(|error: NodeError| EngineError::generic(error.to_string()))
    }

    fn stuck(&self, id: NodeId) -> EngineError {
        let records = self.records.borrow();
        let name = records.name_of(id);
        EngineError::generic(format!(
            "Node '{name}' could not move to another data thread within {} s",
            MOVE_WAIT.as_secs()
        ))
    }

    /// Brings a recorded node up on its thread.
    pub(super) async fn bring_up(&self, id: NodeId) -> Result<(), EngineError> {
        self.bring_up_on(id, self.thread_of(id)).await
    }

    async fn bring_up_on(&self, id: NodeId, thread: ThreadId) -> Result<(), EngineError> {
        let facts = {
            let mut records = self.records.borrow_mut();
            let node = records.node_mut(id);
            node.map(|node| {
                if node.inactive {
                    node.plan.set_access(node.read_only, true);
                }
                (node.name.clone(), node.plan.clone(), node.bitmaps.clone())
            })
        };
        let Some((name, plan, bitmaps)) = facts else {
            return Ok(());
        };
        if matches!(plan, NodePlan::Opening) {
            // It has nothing to be brought over yet.
            return Ok(());
        }
        let built = self.threads.run(thread, move |context| {
            Box::pin(async move {
                let Built { node, info } = build(&context, &name, &plan, bitmaps).await?;
                context.insert_node(id, node);
                Ok::<_, EngineError>(info)
            })
        });
        let info = built.await??;
        let mut records = self.records.borrow_mut();
        if let Some(image) = records.node_mut(id).and_then(|node| node.image.as_mut()) {
            image.info = info;
        }
        Ok(())
    }

    /// Drops a node that has nothing to write on a thread.
    pub(super) async fn forget_on(&self, thread: ThreadId, id: NodeId) {
        let name = self.records.borrow().name_of(id).to_owned();
        self.forget_named(thread, id, &name).await;
    }

    /// Drops a node that is in no record any more, and was called `name`.
    pub(super) async fn forget_named(&self, thread: ThreadId, id: NodeId, node: &str) {
        let removed = self.threads.run(thread, move |context| {
            Box::pin(async move { drop(context.remove_node(id)) })
        });
        if let Err(error) = removed.await {
            self.tell_lost(&error, node, "a node could not be taken off its thread");
        }
    }

    /// A data thread did not do what it was asked for with a node. At the end of the daemon that follows from what was told already:
    /// somebody on that thread did not end in time.
    pub(super) fn tell_lost(&self, error: &EngineError, node: &str, what: &str) {
        match self.threads.has_ended() {
            true => tracing::debug!(%error, node, "{what}"),
            false => tracing::error!(%error, node, "{what}"),
        }
    }

    /// Brings both sides of a job to one thread. The idle side moves.
    ///
    /// # Errors
    /// When both sides have other jobs on different threads, or the move fails.
    pub async fn place(
        &self,
        held: MutexGuard<'_, ()>,
        nodes: &JobNodes,
    ) -> Result<ThreadId, EngineError> {
        let Some(target) = nodes.target else {
            return Ok(self.threads.choose());
        };
        // A data file is brought to its image, as a source to its target.
        let source = nodes.source.or(nodes.data_file).unwrap_or(target);
        // The job itself is on both sides by now.
        drop(self.join(held, source, target, 1, None).await?);
        Ok(self.thread_of(source))
    }

    /// Brings two nodes and what is connected with them to one thread. The second side moves unless more than `own` jobs
    /// are on it or somebody outside of the graph uses it, else the first. Where nothing has to move, the graph is held
    /// throughout.
    ///
    /// # Errors
    /// When both sides have such jobs on different threads, or the move fails.
    pub(super) async fn join<'a>(
        &'a self,
        held: MutexGuard<'a, ()>,
        one: NodeId,
        other: NodeId,
        own: usize,
        batch: Option<Batch>,
    ) -> Result<MutexGuard<'a, ()>, EngineError> {
        let is_moving = {
            let records = self.records.borrow();
            [one, other].iter().any(|id| records.moving.contains(id))
        };
        let held = match is_moving {
            true => {
                drop(held);
                self.hold_while(|_| vec![one, other]).await
            }
            false => held,
        };
        let (here, there) = (self.thread_of(one), self.thread_of(other));
        if here == there {
            return Ok(held);
        }
        let is_idle = |id| {
            let records = self.records.borrow();
            let component = records.component(id);
            records.jobs_on(&component).len() <= own && records.roots_on(&component).is_empty()
        };
        if is_idle(other) {
            self.move_component(held, other, here, batch).await
        } else if is_idle(one) {
            self.move_component(held, one, there, batch).await
        } else {
            Err(EngineError::generic(
                "What belongs together is used by other jobs or users on different data threads; \
                 move one side with x-blockdev-set-iothread once they have ended",
            ))
        }
    }
}
