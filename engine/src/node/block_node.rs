//! The trait [`Node`]: where jobs and exports read and write.
//!
//! Promises on top of those of `Storage`:
//! - Any offset and length: alignment is the node's business.
//! - The length is a multiple of 512; the tail of a shorter file reads as zeroes.
//! - A request that passes the end is refused with `EIO` (reads) or `ENOSPC` (writes); nothing is clipped silently.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_images::Pace;
use blockyard_images::qcow2::Options;
use blockyard_images::qcow2::amend::AmendOptions;
use blockyard_images::qcow2::info::{BitmapInfo, ImageInfo};
use blockyard_images::qcow2::snapshot::{NewSnapshot, SnapshotChoice};
use blockyard_storage::error::{EBADF, EIO, ENOSPC, EOPNOTSUPP};
use blockyard_storage::{
    Buffer, ByteRange, LocalFuture, Operation, Preallocation, StorageError, ZeroMode,
};

use crate::data::DataContext;
use crate::error::{EngineError, NodeError};
use crate::node::build::NodePlan;
use crate::node::copy_before_write::Saver;
use crate::node::fault_rules::DebugEvent;
use crate::node::mirror_top::Tracker;
use crate::node::turns::Turn;

/// Facts about a node as of now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeFacts {
    /// Length in bytes, a multiple of 512.
    pub length_bytes: u64,
    /// Requests aligned to this power of two need no read-modify-write.
    pub request_alignment: u32,
    /// Largest efficient transfer in bytes; larger requests are cut by the node.
    pub transfer_max_bytes: u32,
    /// Unit of allocation in bytes, where the format has one.
    pub cluster_size_bytes: Option<u32>,
    /// Writes are refused.
    pub read_only: bool,
    /// Zero requests may give room back (opened with discard=unmap and able to).
    pub unmaps: bool,
    /// The length is what it is, as a device's or a window's.
    pub fixed_length: bool,
}

/// The end of a read or write on a node.
#[derive(Debug)]
pub struct NodeTransfer {
    /// The caller's buffer; after a failed read its content is unspecified.
    pub buffer: Buffer,
    /// Whether every byte was transferred.
    pub outcome: Result<(), NodeError>,
}

/// What an image says of its own state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ImageMarks {
    /// It was not closed after its last use, or is in use.
    pub is_dirty: bool,
    /// It has been found corrupt.
    pub is_corrupt: bool,
}

/// What the graph has to know of an image that was opened anew.
#[derive(Clone, Debug)]
pub struct Reopened {
    /// What it says of itself.
    pub info: ImageInfo,
    /// Name of the backing file as it stands in the header, and its format.
    pub backing: Option<(Vec<u8>, Option<Vec<u8>>)>,
    /// How it is used.
    pub options: Options,
}

/// What is done to the internal snapshots of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotChange {
    /// One more.
    Create(NewSnapshot),
    /// One less.
    Delete(SnapshotChoice),
}

/// Why an image was not amended, or its snapshots are what they were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AmendStop {
    /// On request.
    Cancelled,
    /// It is refused, in QEMU's words.
    Refused(String),
    /// A node failed.
    Failed(NodeError),
}

/// A run of bytes of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StatusExtent {
    /// Which bytes.
    pub range: ByteRange,
    /// Reads as zeroes for certain; else there may be data.
    pub zero: bool,
    /// Held by this layer itself (not by one below). Raw layers hold everything.
    pub allocated: bool,
}

/// Where a run of bytes is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Which bytes.
    pub range: ByteRange,
    /// Reads as zeroes for certain; else there may be data.
    pub zero: bool,
    /// Held by this layer itself (not by one below).
    pub allocated: bool,
    /// Kept as data. It may read as zeroes all the same, where that is a hole of the file.
    pub data: bool,
    /// Compressed, so that it is nowhere as it is.
    pub compressed: bool,
    /// Where the host file of this layer keeps it as it is, or keeps room for it.
    pub host_offset: Option<u64>,
}

/// What a layer is filled with where it holds nothing itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fill {
    /// What is below, read for it.
    Bytes,
    /// Zeroes: all that is below is known to be.
    Zeroes,
}

/// A node is asked to become one of another driver.
pub(super) fn cannot_become(name: &str) -> EngineError {
    EngineError::generic(format!(
        "Node '{name}' cannot become another driver's (bug)"
    ))
}

/// Why a request for `range` of a node this long is refused before it is tried: an error number.
pub(super) fn refused(
    operation: Operation,
    range: ByteRange,
    read_only: bool,
    length_bytes: u64,
) -> Option<i32> {
    let writes = operation != Operation::Read;
    if writes && read_only {
        return Some(EBADF);
    }
    (range.end() > length_bytes).then_some(if writes { ENOSPC } else { EIO })
}

/// A node on its data thread. Methods may be called while others are in flight; see the module for what holds.
pub trait Node {
    /// Its name, for errors.
    fn name(&self) -> String;

    /// Facts as of now.
    fn facts(&self) -> NodeFacts;

    /// What kind of content `range` has, in ascending order from its first byte, neighbours of one kind merged; covers
    /// at least the first byte and may stop early after `extents_max` extents.
    fn status(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>>;

    /// Where the front of `range` is kept, as far as it is kept in one way; at least its first byte. With `finds_holes`, the data
    /// of an image is looked at in its file too.
    fn place(
        &self,
        range: ByteRange,
        finds_holes: bool,
    ) -> LocalFuture<'_, Result<Place, NodeError>> {
        let _ = finds_holes;
        Box::pin(async move {
            let extents = self.status(range, 1).await?;
            // A node that says nothing has told of no hole.
            let extent = extents.first().copied().unwrap_or(StatusExtent {
                range,
                zero: false,
                allocated: true,
            });
            Ok(Place {
                range: extent.range,
                zero: extent.zero,
                allocated: extent.allocated,
                data: extent.allocated && !extent.zero,
                compressed: false,
                host_offset: None,
            })
        })
    }

    /// Whether at least so many clusters of an image's file are in use; of what is no image, none are.
    fn has_clusters(&self, at_least: u64) -> LocalFuture<'_, Result<bool, NodeError>> {
        Box::pin(std::future::ready(Ok(at_least == 0)))
    }

    /// Fills the whole of `into` from `offset`.
    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer>;

    /// Writes the whole of `from` at `offset`.
    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer>;

    /// Makes `range` read as zeroes. `may_unmap` only has an effect where [`NodeFacts::unmaps`].
    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>>;

    /// Whether [`write_growing`](Self::write_growing) and [`zero_growing`](Self::zero_growing) may pass the end.
    fn grows(&self) -> bool {
        false
    }

    /// [`write`](Self::write) that makes the node longer where it passes the end of one that [`grows`](Self::grows). For an
    /// image's own file, whose length is the image's business; who may is the graph's.
    fn write_growing(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        self.write(offset, from)
    }

    /// [`zero`](Self::zero), in the same way.
    fn zero_growing(
        &self,
        range: ByteRange,
        mode: ZeroMode,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        self.zero(range, mode)
    }

    /// Lets this layer hold all of `range` itself, which reads as before: what it holds nothing of comes from below, in whole
    /// units of its format. What others write meanwhile stays. Durable with the next [`flush`](Self::flush). A layer that
    /// nothing is below of holds everything already. Bytes pass through `memory`; where several pieces do at once, or units
    /// are longer, through as much again.
    ///
    /// # Errors
    /// [`EOPNOTSUPP`] by a filter of what has something below, else as [`read`](Self::read) of that and
    /// [`write`](Self::write); a part may have been filled.
    fn fill(
        &self,
        range: ByteRange,
        with: Fill,
        memory: Option<Buffer>,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        let _ = (with, memory);
        let filled = match self.backing() {
            None => Ok(()),
            Some(_) => Err(NodeError {
                node: self.name(),
                source: StorageError::new(Operation::Write, range, EOPNOTSUPP),
            }),
        };
        Box::pin(std::future::ready(filled))
    }

    /// Gives room back where that is possible; content afterwards is zeroes or unchanged.
    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>>;

    /// Makes everything that completed before this call durable (unless opened with cache.no-flush).
    fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>>;

    /// Changes the length in bytes. Who may is the graph's business.
    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>>;

    /// Why [`resize`](Self::resize) to this length would be refused, in QEMU's words, as far as that is known without trying.
    fn resize_refusal(&self, length_bytes: u64) -> Option<String> {
        let _ = length_bytes;
        None
    }

    /// Length in bytes before it is rounded to sectors: what [`resize`](Self::resize) takes to leave it as it is.
    fn exact_length_bytes(&self) -> u64 {
        self.facts().length_bytes
    }

    /// Reserves room for `range`, which lies within the length. What is there stays with `Falloc` and becomes zeroes with
    /// `Full`.
    ///
    /// # Errors
    /// [`EOPNOTSUPP`] where no room can be reserved, else what the storage says; part of it may have been done.
    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            if how == Preallocation::Off {
                return Ok(());
            }
            Err(NodeError {
                node: self.name(),
                source: StorageError::new(Operation::Preallocate, range, EOPNOTSUPP),
            })
        })
    }

    /// The node that decides where [`status`](Self::status) says that this layer holds nothing; `None`: zeroes. A filter,
    /// whose status is that of its child, answers for it too.
    fn backing(&self) -> Option<Rc<dyn Node>> {
        None
    }

    /// Gives this layer another [`backing`](Self::backing). No request may be in flight; without effect where nothing is ever
    /// read from one.
    fn set_backing(&self, backing: Option<Rc<dyn Node>>) {
        let _ = backing;
    }

    /// The marks of an image, as of now; `None`: what is below cannot have any.
    fn image_marks(&self) -> Option<ImageMarks> {
        None
    }

    /// Gives the image of this node other options, and goes on with it. Who reads from the node goes on meanwhile, who changes
    /// something waits; during a pause the work makes way for them and begins anew. Nobody uses it where the length changes.
    ///
    /// # Errors
    /// As [`AmendStop`] says. The node goes on with what the image is then.
    ///
    /// # Cancel safety
    /// Dropped midway, the image is whole and the node takes no further request. `pace` is the better way.
    fn amend<'a>(
        &'a self,
        options: &'a AmendOptions,
        pace: &'a dyn Pace,
    ) -> LocalFuture<'a, Result<(), AmendStop>> {
        let _ = (options, pace);
        let text = "Driver does not support x-blockdev-amend".to_owned();
        Box::pin(std::future::ready(Err(AmendStop::Refused(text))))
    }

    /// Changes the internal snapshots of this node's image; what is read from the node stays. Requests wait meanwhile.
    ///
    /// # Errors
    /// As [`AmendStop`] says. The node goes on with what the image is then.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the answer; it is done all the same.
    fn change_snapshots(&self, change: SnapshotChange) -> LocalFuture<'_, Result<(), AmendStop>> {
        let _ = change;
        let text = "Operation not supported".to_owned();
        Box::pin(std::future::ready(Err(AmendStop::Refused(text))))
    }

    /// What has changed by [`amend`](Self::amend) or [`change_snapshots`](Self::change_snapshots), once.
    fn take_reopened(&self) -> Option<Reopened> {
        None
    }

    /// Whether what this layer does not hold is read from a backing file, or may be one day, although none is attached now: its
    /// zeroes are only there to stay where they are [allocated](StatusExtent::allocated).
    fn names_backing(&self) -> bool {
        false
    }

    /// Whether [`write_compressed`](Self::write_compressed) can be asked for.
    fn compresses(&self) -> bool {
        false
    }

    /// Writes the whole of `from` at `offset`, compressed. Both are whole clusters, but for a last one that the end of the
    /// node cuts. What does not get shorter is stored as it is.
    ///
    /// # Errors
    /// [`EOPNOTSUPP`] where nothing is ever compressed, `EINVAL` for a part of a cluster, else as
    /// [`write`](Self::write).
    fn write_compressed(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, from.len() as u64);
            NodeTransfer {
                buffer: from,
                outcome: Err(NodeError {
                    node: self.name(),
                    source: StorageError::new(Operation::Write, range, EOPNOTSUPP),
                }),
            }
        })
    }

    /// Why the image of this node cannot keep a new bitmap, in QEMU's words; `None`: it can.
    fn bitmap_refusal(&self, name: &str, granularity_bytes: u64) -> Option<String> {
        let _ = (name, granularity_bytes);
        Some(format!(
            "Can't store persistent bitmaps to {}: Operation not supported",
            self.name()
        ))
    }

    /// The bitmaps as this node's image has them now.
    fn kept_bitmaps(&self) -> Vec<BitmapInfo> {
        Vec::new()
    }

    /// Puts the bitmaps that this node's image keeps into it, valid and durable. No request may be in flight. Whoever changes the
    /// node later marks what records changes as out of date first.
    ///
    /// # Errors
    /// In QEMU's words; the image has what it had. Where there is no room for some of them, the others may be stored.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the answer; it is done all the same.
    fn store_bitmaps(&self) -> LocalFuture<'_, Result<(), EngineError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Takes a bitmap out of this node's image, if it is there; durable afterwards.
    ///
    /// # Errors
    /// In QEMU's words; the image has what it had.
    ///
    /// # Cancel safety
    /// As [`store_bitmaps`](Self::store_bitmaps).
    fn remove_bitmap(&self, name_in_image: Vec<u8>) -> LocalFuture<'_, Result<(), EngineError>> {
        let _ = name_in_image;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Writes down the bitmaps that this node's image keeps, as they are now, outside of the image, so that a crash does not lose what
    /// has been done with them; nothing where there is no place for that. Durable afterwards, or the image says that they are not
    /// written down. Its bitmaps are marked as in use.
    ///
    /// # Cancel safety
    /// As [`store_bitmaps`](Self::store_bitmaps).
    fn record_bitmaps(&self) -> LocalFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    /// Changes of this node's disk cannot be recorded any more: the image says so afterwards, and its bitmaps are inconsistent after a
    /// crash.
    ///
    /// # Errors
    /// What the image says: it takes no change any more then.
    ///
    /// # Cancel safety
    /// As [`store_bitmaps`](Self::store_bitmaps).
    fn stop_recording(&self) -> LocalFuture<'_, Result<(), EngineError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Writes back what only this node's memory holds, so that the same can be brought up anew on what is below. Waits for a
    /// disk only if there is something to write; it is durable afterwards. No request may be in flight. The node can be used
    /// on, unless another one has been brought up on what is below.
    ///
    /// # Errors
    /// Something is not written: dropping the node would lose what it has promised.
    fn close(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async { Ok(()) })
    }

    /// Goes on in the way of `plan`, which is one of the same driver: its options, and the nodes below, which are on this
    /// thread, may be others. Requests that come meanwhile wait, those in flight end before or go on with what they began
    /// with. What only this node's memory holds is written back first, if it could be written so far.
    ///
    /// # Errors
    /// Why not; the node is what it was then.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the answer; it may be done all the same.
    fn reopen<'a>(
        &'a self,
        context: &'a DataContext,
        plan: &'a NodePlan,
    ) -> LocalFuture<'a, Result<(), EngineError>> {
        let _ = (context, plan);
        let text = format!("Node '{}' cannot be opened in another way", self.name());
        Box::pin(std::future::ready(Err(EngineError::generic(text))))
    }

    /// The node whose bytes this one, a filter, shows.
    fn shown(&self) -> Option<Rc<dyn Node>> {
        None
    }

    /// Whoever reads a part of this node, or asks what is there, and whoever changes it take turns from now on, in the order in
    /// which they came: until that is given up as often as it was asked for.
    fn order_reads(&self, ordered: bool) {
        let _ = ordered;
    }

    /// The turn of somebody who is about to look at `range` in several steps, where such turns are taken.
    fn turn_to_look(&self, range: ByteRange) -> Option<Turn> {
        let _ = range;
        None
    }

    /// What the filter of a mirror knows of the writes that pass it.
    fn tracker(&self) -> Option<Rc<Tracker>> {
        None
    }

    /// What a filter that saves what is about to be changed knows.
    fn saver(&self) -> Option<Rc<Saver>> {
        None
    }

    /// Whether this node, or one below, wants to [`hear`](Self::hear) what happens above it.
    fn listens(&self) -> bool {
        false
    }

    /// Something happens above that fault scripts may wait for.
    fn hear(&self, event: DebugEvent) {
        let _ = event;
    }

    /// Where `range` lives in one host file, if it does as a whole and unchanged: descriptor and offset there.
    fn host_extent(&self, range: ByteRange) -> Option<(Arc<OwnedFd>, u64)> {
        let _ = range;
        None
    }

    /// Makes `to` share extents with a host file instead of copying, see `Storage::share`.
    fn share(
        &self,
        source: Arc<OwnedFd>,
        from: u64,
        to: ByteRange,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        let _ = (source, from);
        Box::pin(async move {
            Err(NodeError {
                node: self.name(),
                source: StorageError::new(Operation::Share, to, EOPNOTSUPP),
            })
        })
    }
}
