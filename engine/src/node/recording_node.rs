//! [`RecordingNode`]: what stands in front of every node: all requests pass, and what they change is marked in the node's dirty
//! bitmaps. Which of them record is looked at when a change has ended. Where somebody has asked for it, those who look at a part of
//! the node and those who change it take turns.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_images::Pace;
use blockyard_images::qcow2::amend::AmendOptions;
use blockyard_images::qcow2::info::BitmapInfo;
use blockyard_storage::{Buffer, ByteRange, LocalFuture, Preallocation, ZeroMode};

use crate::bitmap::NodeBitmaps;
use crate::data::{DataContext, Spawner};
use crate::error::{EngineError, NodeError};
use crate::node::build::NodePlan;
use crate::node::copy_before_write::Saver;
use crate::node::fault_rules::DebugEvent;
use crate::node::mirror_top::Tracker;
use crate::node::turns::{Doing, Turn, Turns};
use crate::node::{
    AmendStop, Fill, ImageMarks, Node, NodeFacts, NodeTransfer, Place, Reopened, SnapshotChange,
    StatusExtent,
};

/// A node with its bitmaps.
pub struct RecordingNode {
    node: Rc<dyn Node>,
    bitmaps: Arc<NodeBitmaps>,
    spawner: Spawner,
    turns: Rc<Turns>,
    /// How often somebody has asked for turns.
    ordered: Cell<usize>,
}

impl RecordingNode {
    /// `node`, whose changes are marked in `bitmaps`.
    pub fn new(node: Rc<dyn Node>, bitmaps: Arc<NodeBitmaps>, spawner: Spawner) -> Self {
        Self {
            node,
            bitmaps,
            spawner,
            turns: Rc::default(),
            ordered: Cell::new(0),
        }
    }

    fn turn(&self, range: ByteRange, doing: Doing) -> Option<Turn> {
        (self.ordered.get() > 0).then(|| self.turns.take(range, doing))
    }

    /// `change` of `range`, marked when it has ended: also when it has failed, as a part of it may have been done, and when nobody
    /// waits for it any more, which must not leave a change behind that comes after its mark.
    fn marked<'a, T: 'static>(
        &'a self,
        range: ByteRange,
        change: impl AsyncFnOnce(Rc<dyn Node>) -> T + 'static,
    ) -> LocalFuture<'a, T> {
        let (node, bitmaps) = (Rc::clone(&self.node), Arc::clone(&self.bitmaps));
        let turn = self.turn(range, Doing::Copy);
        Box::pin(self.spawner.to_the_end(Box::pin(async move {
            if let Some(turn) = &turn {
                turn.come().await;
            }
            let key = bitmaps.begin_change(range);
            touch(&*node, &bitmaps, range).await;
            let changed = change(Rc::clone(&node)).await;
            // As of now: one that has come meanwhile records what ends now.
            if bitmaps.record() {
                bitmaps.mark(range, node.facts().length_bytes);
            }
            bitmaps.end_change(key);
            changed
        })))
    }
}

/// Before a change of `range`: it is known to have changed if the daemon does not live to mark it.
async fn touch(node: &dyn Node, bitmaps: &NodeBitmaps, range: ByteRange) {
    if let Err(error) = bitmaps.touch(range).await {
        stop_recording(node, &error).await;
        bitmaps.set_given_up(true);
    }
}

/// The state directory cannot be written: the disk can, and its bitmaps are as safe as anybody's.
async fn stop_recording(node: &dyn Node, error: &std::io::Error) {
    if let Err(error) = node.stop_recording().await {
        // It refuses the change by itself.
        tracing::error!(%error, node = node.name(), "an image still says that its changes are recorded");
        return;
    }
    tracing::error!(
        %error,
        node = node.name(),
        "the state directory cannot be written; bitmaps will be lost if the daemon is killed"
    );
}

/// Methods that the node answers by itself.
macro_rules! passed_on {
    ($(fn $method:ident $(<$of:lifetime>)? ($($arg:ident: $type:ty),*) $(-> $answer:ty)?;)*) => { $(
        fn $method $(<$of>)? (& $($of)? self $(, $arg: $type)*) $(-> $answer)? {
            self.node.$method($($arg),*)
        }
    )* };
}

impl Node for RecordingNode {
    passed_on! {
        fn name() -> String;
        fn facts() -> NodeFacts;
        fn status(
            range: ByteRange,
            extents_max: usize
        ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>>;
        fn place(
            range: ByteRange,
            finds_holes: bool
        ) -> LocalFuture<'_, Result<Place, NodeError>>;
        fn has_clusters(at_least: u64) -> LocalFuture<'_, Result<bool, NodeError>>;
        fn grows() -> bool;
        fn fill(
            range: ByteRange,
            with: Fill,
            memory: Option<Buffer>
        ) -> LocalFuture<'_, Result<(), NodeError>>;
        fn flush() -> LocalFuture<'_, Result<(), NodeError>>;
        fn resize_refusal(length_bytes: u64) -> Option<String>;
        fn exact_length_bytes() -> u64;
        fn backing() -> Option<Rc<dyn Node>>;
        fn set_backing(backing: Option<Rc<dyn Node>>);
        fn image_marks() -> Option<ImageMarks>;
        fn change_snapshots(change: SnapshotChange) -> LocalFuture<'_, Result<(), AmendStop>>;
        fn take_reopened() -> Option<Reopened>;
        fn names_backing() -> bool;
        fn compresses() -> bool;
        fn bitmap_refusal(name: &str, granularity_bytes: u64) -> Option<String>;
        fn kept_bitmaps() -> Vec<BitmapInfo>;
        fn store_bitmaps() -> LocalFuture<'_, Result<(), EngineError>>;
        fn record_bitmaps() -> LocalFuture<'_, ()>;
        fn stop_recording() -> LocalFuture<'_, Result<(), EngineError>>;
        fn remove_bitmap(name_in_image: Vec<u8>) -> LocalFuture<'_, Result<(), EngineError>>;
        fn close() -> LocalFuture<'_, Result<(), NodeError>>;
        fn reopen<'a>(
            context: &'a DataContext,
            plan: &'a NodePlan
        ) -> LocalFuture<'a, Result<(), EngineError>>;
        fn shown() -> Option<Rc<dyn Node>>;
        fn tracker() -> Option<Rc<Tracker>>;
        fn saver() -> Option<Rc<Saver>>;
        fn listens() -> bool;
        fn hear(event: DebugEvent);
        fn host_extent(range: ByteRange) -> Option<(Arc<OwnedFd>, u64)>;
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        let range = ByteRange::new(offset, into.len() as u64);
        let Some(turn) = self.turn_to_look(range) else {
            return self.node.read(offset, into);
        };
        Box::pin(async move {
            turn.come().await;
            self.node.read(offset, into).await
        })
    }

    fn order_reads(&self, ordered: bool) {
        let count = self.ordered.get();
        self.ordered.set(match ordered {
            true => count + 1,
            false => count.saturating_sub(1),
        });
    }

    fn turn_to_look(&self, range: ByteRange) -> Option<Turn> {
        self.turn(range, Doing::ReadOld)
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        let range = ByteRange::new(offset, from.len() as u64);
        self.marked(range, async move |node| node.write(offset, from).await)
    }

    fn write_growing(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        let range = ByteRange::new(offset, from.len() as u64);
        self.marked(range, async move |node| {
            node.write_growing(offset, from).await
        })
    }

    fn write_compressed(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        let range = ByteRange::new(offset, from.len() as u64);
        self.marked(range, async move |node| {
            node.write_compressed(offset, from).await
        })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        self.marked(range, async move |node| node.zero(range, mode).await)
    }

    fn zero_growing(
        &self,
        range: ByteRange,
        mode: ZeroMode,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        self.marked(range, async move |node| {
            node.zero_growing(range, mode).await
        })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        // Where discards do nothing, nothing changes.
        if !self.node.facts().unmaps {
            return self.node.discard(range);
        }
        self.marked(range, async move |node| node.discard(range).await)
    }

    fn share(
        &self,
        source: Arc<OwnedFd>,
        from: u64,
        to: ByteRange,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        self.marked(to, async move |node| node.share(source, from, to).await)
    }

    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        self.marked(range, async move |node| node.preallocate(range, how).await)
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        let (node, bitmaps) = (Rc::clone(&self.node), Arc::clone(&self.bitmaps));
        let resize = Box::pin(async move {
            // What it grows by changes.
            let grown = ByteRange::between(node.facts().length_bytes, length_bytes);
            let key = bitmaps.begin_change(grown);
            touch(&*node, &bitmaps, grown).await;
            let resized = node.resize(length_bytes).await;
            bitmaps.resize(node.facts().length_bytes);
            bitmaps.end_change(key);
            if bitmaps.is_recorded() {
                node.record_bitmaps().await;
            }
            resized
        });
        Box::pin(self.spawner.to_the_end(resize))
    }

    fn amend<'a>(
        &'a self,
        options: &'a AmendOptions,
        pace: &'a dyn Pace,
    ) -> LocalFuture<'a, Result<(), AmendStop>> {
        Box::pin(async move {
            let before_bytes = self.node.facts().length_bytes;
            let grown = ByteRange::between(before_bytes, options.size_bytes.unwrap_or(0));
            let key = self.bitmaps.begin_change(grown);
            touch(&*self.node, &self.bitmaps, grown).await;
            let amended = self.node.amend(options, pace).await;
            self.bitmaps.resize(self.node.facts().length_bytes);
            self.bitmaps.end_change(key);
            amended
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// A method with a default that is not passed on would be lost for every node.
    #[test]
    fn every_method_of_a_node_is_there() {
        fn methods(source: &'static str, indented: &str) -> BTreeSet<&'static str> {
            let lines = source.lines();
            let named = lines.filter_map(|line| line.strip_prefix(indented)?.strip_prefix("fn "));
            named
                .filter_map(|rest| rest.split(['(', '<']).next())
                .collect()
        }
        let (_, of_node) = include_str!("block_node.rs")
            .split_once("pub trait Node {")
            .expect("the trait");
        let (of_node, _) = of_node.split_once("\n}\n").expect("its end");
        let here = include_str!("recording_node.rs");
        let mut there = methods(here, "        ");
        there.extend(methods(here, "    "));
        let missing: Vec<_> = methods(of_node, "    ")
            .difference(&there)
            .copied()
            .collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
}
