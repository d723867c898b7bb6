//! [`Qcow2Node`]: a qcow2 image as a node. The image says where bytes are and takes new room for them; this moves them:
//! from and to the image's files, from the backing, through the codec.
//!
//! ```text
//!   read   map -> data: straight into the caller's buffer | zero: fill | unallocated: backing | compressed: decompress
//!   write  prepare -> in place: straight from the caller's buffer
//!                  -> new room: old content at the edges, data, then publish
//! ```
//! A request that lies in several places is carried out in pieces, several at once.

mod amending;
mod compressed;
mod failures;
mod filling;
mod flush_behind;
mod keeping;
mod length;
mod mover;
pub mod opening;
mod pieces;
mod read;
mod recording;
mod reopening;
mod room_ahead;
mod snapshots;
mod status;
mod upkeep;
mod write;
mod zeroing;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blockyard_images::Pace;
use blockyard_images::qcow2::Qcow2;
use blockyard_images::qcow2::amend::AmendOptions;
use blockyard_images::qcow2::info::BitmapInfo;
use blockyard_storage::{Buffer, ByteRange, LocalFuture, Operation, Preallocation, ZeroMode};

use crate::bitmap::NodeBitmaps;
use crate::data::{DataContext, Spawner};
use crate::error::{EngineError, NodeError};
use crate::node::announcing_node::AnnouncingNode;
use crate::node::build::NodePlan;
use crate::node::child_storage::ChildStorage;
use crate::node::gate::{Gate, Way};
use crate::node::qcow2::mover::Mover;
use crate::node::qcow2::snapshots::change_snapshots;
use crate::node::{
    AmendStop, Fill, ImageMarks, Node, NodeFacts, NodeTransfer, Place, Reopened, SnapshotChange,
    StatusExtent,
};
use crate::request::{DetectZeroes, Discard};

/// What a client chose for one node, apart from what the image itself is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Qcow2Options {
    /// What discards do.
    pub discard: Discard,
    /// Whether written zeroes become zero requests.
    pub detect_zeroes: DetectZeroes,
    /// Somebody else may be changing the image: what it keeps of bitmaps is not loaded.
    pub inactive: bool,
    /// After how long what was not used goes from the caches of tables; `None`: never.
    pub cache_clean_interval: Option<Duration>,
}

/// The nodes below an image, as its storages.
#[derive(Clone)]
pub struct Qcow2Files {
    /// The image file.
    pub file: Rc<ChildStorage>,
    /// Where the guest's data is, if it is outside.
    pub data_file: Option<Rc<ChildStorage>>,
}

impl Qcow2Files {
    /// Storages for an image on these nodes.
    pub fn new(file: Rc<dyn Node>, data_file: Option<Rc<dyn Node>>) -> Self {
        let storage = |node| Rc::new(ChildStorage::new(AnnouncingNode::below_image(node)));
        Self {
            file: storage(file),
            data_file: data_file.map(storage),
        }
    }
}

/// A qcow2 image as a node.
///
/// A change whose caller gives up waiting goes on to its end all the same: left in the middle it would keep others from its
/// clusters, or clusters from being used again.
pub struct Qcow2Node {
    /// Another one once the image has been amended.
    mover: Rc<RefCell<Rc<Mover>>>,
    /// What the graph has not heard of yet.
    amended: Rc<RefCell<Option<Reopened>>>,
    /// Closed while the image is another one for a moment.
    gate: Rc<Gate>,
    /// What has been changed on it, of which the image may keep some.
    bitmaps: Arc<NodeBitmaps>,
    spawner: Spawner,
}

impl Qcow2Node {
    /// A node that shows `image`, which has been opened on `files`, on the thread of `context`.
    pub fn new(
        name: String,
        image: Rc<Qcow2>,
        files: Qcow2Files,
        backing: Option<Rc<dyn Node>>,
        options: Qcow2Options,
        context: &DataContext,
    ) -> Self {
        let mover = Mover::new(name, image, files, backing, options, context);
        Self {
            mover: Rc::new(RefCell::new(Rc::new(mover))),
            amended: Rc::default(),
            gate: Rc::default(),
            bitmaps: Arc::default(),
            spawner: context.spawner().clone(),
        }
    }

    /// The image.
    pub fn image(&self) -> Rc<Qcow2> {
        Rc::clone(&self.mover().image)
    }

    fn mover(&self) -> Rc<Mover> {
        Rc::clone(&self.mover.borrow())
    }

    /// A change that goes on to its end in any case, once it has begun.
    fn change<T: 'static, F: Future<Output = T> + 'static>(
        &self,
        work: impl FnOnce(Rc<Mover>) -> F + 'static,
    ) -> LocalFuture<'static, T> {
        let (gate, mover) = (Rc::clone(&self.gate), Rc::clone(&self.mover));
        let spawner = self.spawner.clone();
        Box::pin(async move {
            let pass = gate.enter(Way::Write).await;
            let mover = Rc::clone(&mover.borrow());
            // Made where it stays: moving such work costs more than making it.
            let behind = spawner.clone();
            let work = Box::pin(async move {
                let done = work(Rc::clone(&mover)).await;
                mover.flush_behind(&behind, pass);
                done
            });
            spawner.to_the_end(work).await
        })
    }
}

impl Node for Qcow2Node {
    fn name(&self) -> String {
        self.mover().name.clone()
    }

    fn facts(&self) -> NodeFacts {
        let mover = self.mover();
        let cluster_bytes = mover.image.geometry().cluster_bytes();
        NodeFacts {
            length_bytes: mover.length(),
            request_alignment: 1,
            transfer_max_bytes: mover.data().node().facts().transfer_max_bytes,
            cluster_size_bytes: u32::try_from(cluster_bytes).ok(),
            read_only: mover.read_only(),
            unmaps: mover.unmaps(),
            fixed_length: false,
        }
    }

    fn status(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>> {
        Box::pin(async move {
            let _pass = self.gate.enter(Way::Read).await;
            self.mover().status_of(range, extents_max).await
        })
    }

    fn place(
        &self,
        range: ByteRange,
        finds_holes: bool,
    ) -> LocalFuture<'_, Result<Place, NodeError>> {
        Box::pin(async move {
            let _pass = self.gate.enter(Way::Read).await;
            self.mover().place_of(range, finds_holes).await
        })
    }

    fn has_clusters(&self, at_least: u64) -> LocalFuture<'_, Result<bool, NodeError>> {
        Box::pin(async move {
            let _pass = self.gate.enter(Way::Read).await;
            self.mover().has_clusters(at_least).await
        })
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let _pass = self.gate.enter(Way::Read).await;
            let mover = self.mover();
            let range = ByteRange::new(offset, into.len() as u64);
            match mover.refusal(Operation::Read, range) {
                None => mover.read_range(range, into).await,
                Some(error) => NodeTransfer {
                    buffer: into,
                    outcome: Err(error),
                },
            }
        })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        self.change(move |mover| async move { mover.write(offset, from).await })
    }

    fn compresses(&self) -> bool {
        self.mover().files.data_file.is_none()
    }

    fn write_compressed(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        self.change(move |mover| async move { mover.compress_and_write(offset, from).await })
    }

    fn fill(
        &self,
        range: ByteRange,
        with: Fill,
        memory: Option<Buffer>,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        self.change(move |mover| async move { mover.fill_range(range, with, memory).await })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        self.change(move |mover| async move { mover.zero(range, mode).await })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        self.change(move |mover| async move { mover.discard(range).await })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        self.change(move |mover| async move { mover.flush().await })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        self.change(move |mover| async move { mover.change_length(length_bytes).await })
    }

    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        self.change(move |mover| async move { mover.reserve_room(range, how).await })
    }

    fn backing(&self) -> Option<Rc<dyn Node>> {
        self.mover().backing()
    }

    fn set_backing(&self, backing: Option<Rc<dyn Node>>) {
        self.mover().backing.replace(backing);
    }

    fn image_marks(&self) -> Option<ImageMarks> {
        let mover = self.mover();
        let header = mover.image.header();
        Some(ImageMarks {
            is_dirty: header.is_dirty(),
            is_corrupt: header.is_corrupt(),
        })
    }

    fn resize_refusal(&self, length_bytes: u64) -> Option<String> {
        let refused = self.mover().image.check_resize(length_bytes);
        let refused = refused.err().map(|error| error.to_string());
        refused.or_else(|| self.bitmaps.resize_refusal())
    }

    fn bitmap_refusal(&self, name: &str, granularity_bytes: u64) -> Option<String> {
        self.refusal_of_new(name, granularity_bytes)
    }

    fn kept_bitmaps(&self) -> Vec<BitmapInfo> {
        keeping::kept_by(&self.mover().image)
    }

    fn store_bitmaps(&self) -> LocalFuture<'_, Result<(), EngineError>> {
        self.store_kept()
    }

    fn record_bitmaps(&self) -> LocalFuture<'_, ()> {
        self.write_down_kept()
    }

    fn stop_recording(&self) -> LocalFuture<'_, Result<(), EngineError>> {
        self.stop_recording_kept()
    }

    fn remove_bitmap(&self, name_in_image: Vec<u8>) -> LocalFuture<'_, Result<(), EngineError>> {
        self.remove_kept(name_in_image)
    }

    fn amend<'a>(
        &'a self,
        options: &'a AmendOptions,
        pace: &'a dyn Pace,
    ) -> LocalFuture<'a, Result<(), AmendStop>> {
        Box::pin(self.amend_image(options, pace))
    }

    fn change_snapshots(&self, change: SnapshotChange) -> LocalFuture<'_, Result<(), AmendStop>> {
        let (gate, mover) = (Rc::clone(&self.gate), Rc::clone(&self.mover));
        let (amended, bitmaps) = (Rc::clone(&self.amended), Arc::clone(&self.bitmaps));
        let changed = change_snapshots(gate, mover, amended, bitmaps, change);
        Box::pin(self.spawner.to_the_end(Box::pin(changed)))
    }

    fn reopen<'a>(
        &'a self,
        context: &'a DataContext,
        plan: &'a NodePlan,
    ) -> LocalFuture<'a, Result<(), EngineError>> {
        Box::pin(self.open_again(context, plan))
    }

    fn take_reopened(&self) -> Option<Reopened> {
        self.amended.take()
    }

    fn names_backing(&self) -> bool {
        self.mover().names_backing()
    }

    fn close(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        self.change(move |mover| async move {
            match mover.away.get() {
                // It was closed before, and is another one now.
                true => Ok(()),
                false => mover.close().await,
            }
        })
    }
}

#[cfg(test)]
pub(crate) mod tests;
