//! Users outside of the graph: where they come in, how they go to another node while they are in use, where they leave.
//!
//! In the records a root is an edge; on the data thread of its node it is a [`Root`], which goes to another node only while
//! nobody is inside. A node with a root stays on its thread.

use std::pin::pin;
use std::time::Duration;

use futures_util::future::{Either, join_all, select};
use tokio::sync::oneshot;

use crate::data::{Mailbox, NodeId, ThreadId};
use crate::error::EngineError;
use crate::graph::jobs::edge;
use crate::graph::permissions::Permissions;
use crate::graph::records::{Edge, ROOT_ROLE, RootWish, User};
use crate::graph::{Graph, not_found};
use crate::job::context::JobKey;
use crate::node::NodeFacts;
use crate::node::root::{Root, RootId};
use crate::request::Permission;
use crate::throttle::group::Suspended;

/// How long the requests of a root may take to end before it goes to another node: longer, and something is stuck.
const DRAIN_WAIT: Duration = Duration::from_secs(30);

/// Where a root is reached.
#[derive(Clone)]
pub struct RootPlace {
    /// Which root.
    pub id: RootId,
    /// Its data thread, where it stays.
    pub(crate) mailbox: Mailbox,
}

/// Roots whose requests wait. They go on when it is dropped.
#[must_use = "requests go on when it is dropped"]
pub struct DrainedRoots<'a> {
    graph: &'a Graph,
    roots: Vec<Drained>,
    _unlimited: Vec<Suspended>,
}

/// One of them. It goes on wherever this is dropped, also on the way to somebody who has given up.
#[must_use = "requests go on when it is dropped"]
struct Drained {
    id: RootId,
    mailbox: Mailbox,
}

impl Graph {
    /// Lets somebody outside of the graph read from a node, and write to it if `writable`. He lets everybody else do as much
    /// as `shared` says. `rests`: the node may be inactive, or become so, although he writes to it: his writes fail then.
    ///
    /// # Errors
    /// In QEMU's words: the node is not there, or others do not allow it.
    pub async fn open_root(
        &self,
        node_name: &str,
        writable: bool,
        shared: Permissions,
        rests: bool,
    ) -> Result<RootPlace, EngineError> {
        let _held = self.hold_named(&[node_name]).await;
        let node = self
            .find(node_name)
            .ok_or_else(|| not_found(node_name, node_name))?;
        let read = Permissions::of(&[Permission::ConsistentRead]);
        let taken = match writable {
            true => read.with(Permission::Write),
            false => read,
        };
        let thread = self.thread_of(node);
        let id = {
            let mut records = self.records.borrow_mut();
            let id = records.new_root();
            let is_inactive = records.node(node).is_some_and(|node| node.inactive);
            let (takes, shares) = match is_inactive && rests {
                true => (Permissions::NONE, Permissions::EVERY),
                false => (taken, shared),
            };
            let root = edge(User::Root(id), node, ROOT_ROLE, takes, shares);
            records.change_edges(|edges| edges.push(root))?;
            let wish = RootWish {
                taken,
                shared,
                rests,
            };
            records.roots.insert(id, wish);
            id
        };
        let made = self.threads.run(thread, move |context| {
            Box::pin(async move {
                let Some(node) = context.node(node) else {
                    return false;
                };
                let root = Root::new(node, writable, context.spawner().clone());
                context.insert_root(id, root.into());
                true
            })
        });
        let made = made.await;
        match (made, self.threads.mailbox(thread)) {
            (Ok(true), Some(mailbox)) => Ok(RootPlace { id, mailbox }),
            (made, _) => {
                self.drop_root_edge(id);
                made?;
                Err(EngineError::generic("Internal error: a node is lost (bug)"))
            }
        }
    }

    /// Lets a root go once its requests have ended; a node that only it used goes with it.
    pub async fn close_root(&self, id: RootId) {
        let Some(node) = self.node_of_root(id) else {
            return;
        };
        let _unlimited = self.suspend_limits(&[node]);
        let closed = self.threads.run(self.thread_of(node), move |context| {
            Box::pin(async move {
                if let Some(root) = context.remove_root(id) {
                    root.close().await;
                }
            })
        });
        match tokio::time::timeout(DRAIN_WAIT, closed).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "a user of a node could not be closed"),
            Err(_) => {
                let records = self.records.borrow();
                let node = records.name_of(node);
                tracing::error!(node, "requests of a user of a node do not end");
            }
        }
        let Some(node) = self.drop_root_edge(id) else {
            return;
        };
        let is_owned = {
            let records = self.records.borrow();
            records.node(node).is_none_or(|node| node.monitor_owned)
        };
        if !is_owned {
            self.close_unused(node).await;
        }
    }

    /// Lets all roots go, at the end of the daemon.
    pub(super) async fn close_roots(&self) {
        let roots: Vec<RootId> = {
            let records = self.records.borrow();
            let nodes: Vec<NodeId> = records.nodes.iter().map(|node| node.id).collect();
            records.roots_on(&nodes)
        };
        join_all(roots.into_iter().map(|id| self.close_root(id))).await;
    }

    /// Name of the node that a root is on now; empty: it is on none.
    pub fn node_name_of_root(&self, id: RootId) -> String {
        let node = self.node_of_root(id);
        let records = self.records.borrow();
        node.map_or_else(String::new, |node| records.name_of(node).to_owned())
    }

    /// Facts of the node that a root is on.
    ///
    /// # Errors
    /// When it is closed.
    pub async fn root_facts(&self, place: &RootPlace) -> Result<NodeFacts, EngineError> {
        let gone = || EngineError::generic("The node has been closed meanwhile");
        let node = self.node_of_root(place.id).ok_or_else(gone)?;
        self.facts(node).await
    }

    /// Whether a node refuses writers; `None`: there is none of this name.
    pub fn is_read_only(&self, node_name: &str) -> Option<bool> {
        let node = self.find(node_name)?;
        let records = self.records.borrow();
        records.node(node).map(|node| node.read_only)
    }

    /// Whether there is an `iothread` object of this id.
    pub fn has_iothread(&self, id: &str) -> bool {
        self.threads.named(id).is_some()
    }

    pub(super) fn node_of_root(&self, id: RootId) -> Option<NodeId> {
        let records = self.records.borrow();
        let mut edges = records.edges.iter();
        let found = edges.find(|edge| edge.user == User::Root(id));
        found.map(|edge| edge.child)
    }

    /// Takes a root out of the records. The node that it was on.
    fn drop_root_edge(&self, id: RootId) -> Option<NodeId> {
        let node = self.node_of_root(id);
        let mut records = self.records.borrow_mut();
        records.roots.remove(&id);
        let dropped = records.change_edges(|edges| {
            edges.retain(|edge| edge.user != User::Root(id));
        });
        if let Err(error) = dropped {
            tracing::error!(%error, "a permission stays taken");
        }
        node
    }

    /// Lets the requests of all roots on a node end, and new ones wait.
    ///
    /// # Errors
    /// When they do not end in time: nothing waits then.
    ///
    /// # Cancel safety
    /// Nothing waits then.
    pub(super) async fn drain_roots(&self, node: NodeId) -> Result<DrainedRoots<'_>, EngineError> {
        self.drain_roots_on(node, &[node]).await
    }

    /// The same for all roots on a node and on these, which are on one thread with it.
    ///
    /// # Errors
    /// As above.
    ///
    /// # Cancel safety
    /// As above.
    pub(super) async fn drain_roots_on(
        &self,
        node: NodeId,
        nodes: &[NodeId],
    ) -> Result<DrainedRoots<'_>, EngineError> {
        let thread = self.thread_of(node);
        let roots = self.records.borrow().roots_on(nodes);
        let mut drained = DrainedRoots {
            graph: self,
            roots: Vec::new(),
            _unlimited: self.suspend_limits(nodes),
        };
        let draining: Vec<_> = roots
            .into_iter()
            .filter_map(|id| self.start_draining(thread, id))
            .collect();
        let all = async {
            for ended in draining {
                // One that is gone has no requests.
                drained.roots.extend(ended.await.ok());
            }
        };
        match tokio::time::timeout(DRAIN_WAIT, all).await {
            Ok(()) => Ok(drained),
            Err(_) => {
                let records = self.records.borrow();
                Err(EngineError::generic(format!(
                    "Node '{}' is busy: its requests do not end within {} s",
                    records.name_of(node),
                    DRAIN_WAIT.as_secs()
                )))
            }
        }
    }

    /// The same for whoever uses these nodes, or what stands on them; those that are not there have no users.
    ///
    /// # Errors
    /// As above.
    ///
    /// # Cancel safety
    /// As above.
    pub async fn drain_named(&self, names: &[&str]) -> Result<Vec<DrainedRoots<'_>>, EngineError> {
        let mut drained = Vec::new();
        for name in names {
            if let Some(node) = self.find(name) {
                let all = self.records.borrow().ancestors(node);
                drained.push(self.drain_roots_on(node, &all).await?);
            }
        }
        Ok(drained)
    }

    /// Drains one root, unless the answer is dropped before. `None`: its thread is gone.
    fn start_draining(&self, thread: ThreadId, id: RootId) -> Option<oneshot::Receiver<Drained>> {
        let mailbox = self.threads.mailbox(thread)?;
        let (mut answer, drained) = oneshot::channel();
        self.threads.spawn(thread, move |context| {
            Box::pin(async move {
                let Some(root) = context.root(id) else {
                    return;
                };
                let is_drained = {
                    let (draining, given_up) = (pin!(root.drain()), pin!(answer.closed()));
                    matches!(select(draining, given_up).await, Either::Left(_))
                };
                if is_drained {
                    // Whoever does not take it any more lets it go on.
                    drop(answer.send(Drained { id, mailbox }));
                }
            })
        });
        Some(drained)
    }

    /// All users of a node that are no nodes go to another one on the same thread, which shows the same bytes; but for the
    /// edges of one job. Requests of roots wait meanwhile. `also` changes other edges in the same step. The graph is held.
    ///
    /// # Errors
    /// When requests do not end, or a conflict in QEMU's words: nothing has changed then.
    pub(super) async fn move_users(
        &self,
        from: NodeId,
        to: NodeId,
        but_of: Option<JobKey>,
        also: impl FnOnce(&mut Vec<Edge>),
    ) -> Result<(), EngineError> {
        let drained = self.drain_roots(from).await?;
        self.records.borrow_mut().change_edges(|edges| {
            also(edges);
            move_edges(edges, from, to, but_of);
        })?;
        drained.put_on(to).await
    }

    /// Puts roots on another node of their thread, all in one moment there. Requests that are inside stay where they are.
    ///
    /// # Errors
    /// When the node is not there, which is a bug: they are where they were.
    pub(super) async fn put_on(&self, roots: &[RootId], to: NodeId) -> Result<(), EngineError> {
        if roots.is_empty() {
            return Ok(());
        }
        let roots = roots.to_vec();
        let put = self.threads.run(self.thread_of(to), move |context| {
            Box::pin(async move {
                let Some(node) = context.node(to) else {
                    return false;
                };
                for root in roots.iter().filter_map(|id| context.root(*id)) {
                    root.put_on(node.clone());
                }
                true
            })
        });
        match put.await? {
            true => Ok(()),
            false => Err(EngineError::generic("Internal error: a node is lost (bug)")),
        }
    }
}

/// Leads all edges from users that are no nodes elsewhere.
pub(super) fn move_edges(edges: &mut [Edge], from: NodeId, to: NodeId, but_of: Option<JobKey>) {
    for edge in edges.iter_mut().filter(|edge| edge.child == from) {
        let stays = but_of.is_some_and(|job| edge.is_of(job));
        // What a command holds it lets go where it took it.
        if !stays && !matches!(edge.user, User::Node(_) | User::Command) {
            edge.child = to;
        }
    }
}

impl DrainedRoots<'_> {
    /// Puts them on another node of the same thread.
    ///
    /// # Errors
    /// When the node is not there, which is a bug: they are where they were.
    pub(super) async fn put_on(&self, to: NodeId) -> Result<(), EngineError> {
        let roots: Vec<RootId> = self.roots.iter().map(|root| root.id).collect();
        self.graph.put_on(&roots, to).await
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        let id = self.id;
        self.mailbox.send(Box::new(move |context| {
            Box::pin(async move {
                if let Some(root) = context.root(id) {
                    root.release();
                }
            })
        }));
    }
}

#[cfg(test)]
mod tests {
    use blockyard_ring::BackendChoice;
    use blockyard_storage::buffer::BufferPool;
    use blockyard_storage::{Buffer, ByteRange};
    use tokio::task::LocalSet;

    use super::*;
    use crate::data::ThreadSet;
    use crate::image_policy::ImagePolicy;
    use crate::node::news::News;
    use crate::request::{CommonOptions, DriverSpec, NodeSpec, NullSpec};

    /// A disk whose requests do not end in this test's time.
    fn stuck() -> NodeSpec {
        NodeSpec {
            node_name: Some("n".to_owned()),
            common: CommonOptions::default(),
            driver: DriverSpec::NullCo(NullSpec {
                size: Some(1 << 20),
                latency_ns: Some(3_600_000_000_000),
                ..NullSpec::default()
            }),
        }
    }

    #[test]
    fn a_root_that_is_drained_goes_on_when_another_one_is_not() {
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_time().build().expect("a runtime");
        let pool = BufferPool::new(1 << 20);
        let threads = ThreadSet::start(1, BackendChoice::Threads, pool, News::channel().0);
        let threads = threads.expect("a thread");
        LocalSet::new().block_on(&runtime, async {
            let graph = Graph::new(threads.clone(), ImagePolicy::default(), None);
            graph.add(stuck()).await.expect("added");
            let shared = Permissions::EVERY;
            let busy = graph
                .open_root("n", false, shared, false)
                .await
                .expect("opened");
            let idle = graph
                .open_root("n", false, shared, false)
                .await
                .expect("opened");
            let node = graph.find("n").expect("there");
            let thread = graph.thread_of(node);
            let (busy, idle) = (busy.id, idle.id);
            threads.spawn(thread, move |context| {
                Box::pin(async move {
                    let root = context.root(busy).expect("there");
                    let _ = root.read(0, Buffer::zeroed(512)).await;
                })
            });
            let asks = async || {
                let asked = threads.run(thread, move |context| {
                    Box::pin(async move {
                        let root = context.root(idle).expect("there");
                        let told = root.layers(ByteRange::new(0, 512), 1);
                        futures_util::FutureExt::now_or_never(told).is_some()
                    })
                });
                asked.await.expect("asked")
            };
            {
                let mut draining = pin!(graph.drain_roots(node));
                while asks().await {
                    let polled = futures_util::FutureExt::now_or_never(draining.as_mut());
                    assert!(polled.is_none(), "one is inside");
                }
            }
            // The answer that nobody has taken is on its way back.
            let goes_on = async { while !asks().await {} };
            let goes_on = tokio::time::timeout(Duration::from_secs(10), goes_on).await;
            assert!(goes_on.is_ok(), "its requests wait for ever");
        });
        threads.end();
    }
}
