//! [`SnapshotAccess`]: shows what a disk was when the filter above it came. What has been saved is read from the target, the rest from
//! the source, which nobody changes where it is being read. What its user has read he may give up, and with it the room on the target.

use std::rc::Rc;

use blockyard_storage::buffer::BUFFER_SLOT_BYTES;
use blockyard_storage::error::{EACCES, EIO, EOPNOTSUPP};
use blockyard_storage::{Buffer, ByteRange, LocalFuture, Operation, StorageError, ZeroMode};

use super::saver::{Destination, Saver};
use crate::data::DataContext;
use crate::error::{EngineError, NodeError};
use crate::node::build::NodePlan;
use crate::node::chain::{Content, chain_status};
use crate::node::turns::Doing;
use crate::node::{Node, NodeFacts, NodeTransfer, StatusExtent, cannot_become, refused};
use crate::request::Discard;

/// What a client chose for such a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotAccessOptions {
    /// Nothing is given up.
    pub read_only: bool,
    /// What discards do.
    pub discard: Discard,
}

/// A disk as it was.
pub struct SnapshotAccess {
    name: String,
    /// The filter.
    child: Rc<dyn Node>,
    options: SnapshotAccessOptions,
}

impl SnapshotAccess {
    /// Shows what the disk below the filter `child` was; of any other node, nothing.
    pub fn new(name: String, child: Rc<dyn Node>, options: SnapshotAccessOptions) -> Self {
        Self {
            name,
            child,
            options,
        }
    }

    fn error(&self, operation: Operation, range: ByteRange, errno: i32) -> NodeError {
        NodeError {
            node: self.name.clone(),
            source: StorageError::new(operation, range, errno),
        }
    }

    fn saver(&self, operation: Operation, range: ByteRange) -> Result<Rc<Saver>, NodeError> {
        let saver = self.child.saver();
        saver.ok_or_else(|| self.error(operation, range, EOPNOTSUPP))
    }

    /// Fills `into` with what was there.
    async fn read_old(&self, offset: u64, into: Buffer) -> NodeTransfer {
        let range = ByteRange::new(offset, into.len() as u64);
        let refuse = |errno| self.error(Operation::Read, range, errno);
        let refused = |buffer, error| NodeTransfer {
            buffer,
            outcome: Err(error),
        };
        let saver = match self.saver(Operation::Read, range) {
            Ok(saver) => saver,
            Err(error) => return refused(into, error),
        };
        if range.end() > self.child.facts().length_bytes {
            return refused(into, refuse(EIO));
        }
        let turn = saver
            .clusters()
            .turn(saver.clusters().outward(range), Doing::ReadOld);
        turn.come().await;
        if !saver.keeps(range) {
            return refused(into, refuse(EACCES));
        }
        let sides = match saver.sides() {
            Ok(sides) => sides,
            Err(errno) => return refused(into, refuse(errno)),
        };
        let (piece, is_saved) = next_piece(&saver, range);
        let mut read = match piece == range {
            true => sides.of(is_saved).read(offset, into).await,
            false => read_pieces(&saver, &sides, range, into).await,
        };
        // What broke meanwhile may have been read in part.
        if let Err(errno) = saver.sides() {
            read.outcome = Err(refuse(errno));
        }
        read
    }

    async fn status_of_old(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> Result<Vec<StatusExtent>, NodeError> {
        let saver = self.saver(Operation::Allocation, range)?;
        let clusters = saver.clusters().outward(range);
        let turn = saver.clusters().turn(clusters, Doing::ReadOld);
        turn.come().await;
        let refuse = |errno| self.error(Operation::Allocation, range, errno);
        if !saver.keeps(range) {
            return Err(refuse(EACCES));
        }
        let sides = saver.sides().map_err(refuse)?;
        let (piece, is_saved) = next_piece(&saver, range);
        let told = chain_status(sides.of(is_saved), None, piece, extents_max).await?;
        if saver.broken().is_some() {
            return Err(refuse(EACCES));
        }
        let extents = told.into_iter().map(|extent| StatusExtent {
            range: extent.range,
            zero: extent.content == Content::Zero,
            allocated: true,
        });
        Ok(extents.collect())
    }

    async fn give_up(&self, range: ByteRange) -> Result<(), NodeError> {
        let length_bytes = self.facts().length_bytes;
        let read_only = self.options.read_only;
        if let Some(errno) = refused(Operation::Discard, range, read_only, length_bytes) {
            return Err(self.error(Operation::Discard, range, errno));
        }
        match self.options.discard {
            Discard::Unmap => self.saver(Operation::Discard, range)?.give_up(range).await,
            Discard::Ignore => Ok(()),
        }
    }

    fn refuse_change(&self, operation: Operation, range: ByteRange) -> NodeError {
        self.error(operation, range, EOPNOTSUPP)
    }
}

/// Fills `into` from both sides. Pieces may begin anywhere in it, where no storage can write to, so they are read beside it.
async fn read_pieces(
    saver: &Saver,
    sides: &Destination,
    range: ByteRange,
    mut into: Buffer,
) -> NodeTransfer {
    let (mut rest, mut place) = (range, 0);
    let mut outcome = Ok(());
    while !rest.is_empty() && outcome.is_ok() {
        let (piece, is_saved) = next_piece(saver, rest);
        let (piece, _) = piece.split_at(BUFFER_SLOT_BYTES as u64);
        let length = usize::try_from(piece.length()).unwrap_or(usize::MAX);
        let buffer = saver.pool().take(length).await;
        let read = sides.of(is_saved).read(piece.offset(), buffer).await;
        if let Some(here) = into.as_mut_slice().get_mut(place..place + length) {
            here.copy_from_slice(read.buffer.as_slice());
        }
        outcome = read.outcome;
        place += length;
        rest = ByteRange::between(piece.end(), rest.end());
    }
    NodeTransfer {
        buffer: into,
        outcome,
    }
}

/// The front of `range` that is read from one side, and whether it has been saved.
fn next_piece(saver: &Saver, range: ByteRange) -> (ByteRange, bool) {
    let unsaved = saver.clusters().first_unsaved(range);
    let unsaved = unsaved.map(|run| run.intersection(&range));
    match unsaved.filter(|run| !run.is_empty()) {
        None => (range, true),
        Some(run) if run.offset() == range.offset() => (run, false),
        Some(run) => (ByteRange::between(range.offset(), run.offset()), true),
    }
}

impl Node for SnapshotAccess {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn facts(&self) -> NodeFacts {
        NodeFacts {
            read_only: self.options.read_only,
            unmaps: self.options.discard == Discard::Unmap,
            ..self.child.facts()
        }
    }

    fn status(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>> {
        Box::pin(self.status_of_old(range, extents_max))
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(self.read_old(offset, into))
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        let range = ByteRange::new(offset, from.len() as u64);
        let outcome = Err(self.refuse_change(Operation::Write, range));
        Box::pin(async move {
            NodeTransfer {
                buffer: from,
                outcome,
            }
        })
    }

    fn zero(&self, range: ByteRange, _mode: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move { Err(self.refuse_change(Operation::Zero, range)) })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(self.give_up(range))
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async { Ok(()) })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        let range = ByteRange::new(0, length_bytes);
        Box::pin(async move { Err(self.refuse_change(Operation::Resize, range)) })
    }

    fn reopen<'a>(
        &'a self,
        _: &'a DataContext,
        plan: &'a NodePlan,
    ) -> LocalFuture<'a, Result<(), EngineError>> {
        // It writes to nothing, whoever owns it.
        let is_one = matches!(plan, NodePlan::SnapshotAccess { .. });
        let done = is_one
            .then_some(())
            .ok_or_else(|| cannot_become(&self.name()));
        Box::pin(std::future::ready(done))
    }
}
