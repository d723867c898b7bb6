//! Nodes whose bitmaps are being written down: each stays on its thread and open until that has ended, however long that takes and
//! whoever has given up waiting for it. And which of them are written down without being asked for.

use std::cell::RefCell;
use std::sync::{Arc, Weak};

use tokio::sync::Notify;

use crate::data::NodeId;
use crate::graph::Graph;

/// Those that are being written down.
#[derive(Default)]
pub(super) struct WritingDown {
    all: RefCell<Vec<(NodeId, Weak<Token>)>>,
    ended: Arc<Notify>,
}

/// One is being written down as long as it is there; it goes with the work.
pub(super) struct Token {
    ended: Arc<Notify>,
}

impl Drop for Token {
    fn drop(&mut self) {
        self.ended.notify_waiters();
    }
}

impl WritingDown {
    fn begin(&self, node: NodeId) -> Arc<Token> {
        let token = Arc::new(Token {
            ended: Arc::clone(&self.ended),
        });
        self.all.borrow_mut().push((node, Arc::downgrade(&token)));
        token
    }

    /// Waits until none of `nodes` is being written down.
    pub(super) async fn ended(&self, nodes: &[NodeId]) {
        loop {
            let ended = self.ended.notified();
            {
                let mut all = self.all.borrow_mut();
                all.retain(|(_, token)| token.strong_count() > 0);
                if !all.iter().any(|(node, _)| nodes.contains(node)) {
                    return;
                }
            }
            ended.await;
        }
    }
}

impl Graph {
    /// Writes down what an image keeps of bitmaps as it is now; see [`record_bitmaps`](Self::record_bitmaps).
    pub async fn record_bitmaps_of(&self, node: NodeId) {
        if self.state.is_none() {
            return;
        }
        let Some(token) = self.begin_writing_down(node).await else {
            return;
        };
        let recorded = self.threads.run(self.thread_of(node), move |context| {
            Box::pin(async move {
                let _token = token;
                if let Some(node) = context.node(node) {
                    node.record_bitmaps().await;
                }
            })
        });
        if let Err(error) = recorded.await {
            tracing::error!(%error, "bitmaps are not written down");
        }
    }

    /// Once the node is not on its way to another thread; `None`: it is gone.
    async fn begin_writing_down(&self, node: NodeId) -> Option<Arc<Token>> {
        loop {
            let arrived = self.arrived.notified();
            {
                let records = self.records.borrow();
                records.node(node)?;
                if !records.moving.contains(&node) {
                    return Some(self.writing_down.begin(node));
                }
            }
            arrived.await;
        }
    }

    /// Nodes of which so much counts as changed after a crash that has long gone cold that it pays to write their bitmaps down anew,
    /// and those whose could not be written down before. To be asked again and again.
    pub fn due_to_be_written_down(&self) -> Vec<NodeId> {
        let records = self.records.borrow();
        let nodes = records.nodes.iter().filter(|node| node.bitmaps.is_due());
        nodes.map(|node| node.id).collect()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn who_needs_a_node_waits_for_those_who_write_down_and_for_no_others() {
        let writing_down = WritingDown::default();
        let (one, other) = (NodeId(1), NodeId(2));
        let first = writing_down.begin(one);
        let second = writing_down.begin(one);
        writing_down.ended(&[other]).await;
        let both = [other, one];
        let mut waits = Box::pin(writing_down.ended(&both));
        assert!((&mut waits).now_or_never().is_none());
        drop(first);
        assert!((&mut waits).now_or_never().is_none());
        std::thread::spawn(move || drop(second));
        waits.await;
    }
}
