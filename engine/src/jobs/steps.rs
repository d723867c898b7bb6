//! The steps of a copy, each carried out by itself: what is read, written, zeroed, shared or filled, in which pieces.

use std::rc::Rc;

use blockyard_storage::buffer::{BUFFER_SLOT_BYTES, BufferPool};
use blockyard_storage::{Buffer, ByteRange, ZeroMode};

use crate::error::NodeError;
use crate::job::context::JobContext;
use crate::job::error_policy::Side;
use crate::jobs::copier::CopyOptions;
use crate::jobs::plan::{Step, StepKind};
use crate::limits::STATUS_EXTENTS_MAX;
use crate::node::chain::{Content, chain_status};
use crate::node::{Fill, Node};

/// Why one range was not copied.
pub(super) enum Failure {
    /// A request failed.
    Io(Side, NodeError),
    /// Its extents cannot be shared; nothing is wrong with copying it.
    NotShared,
}

/// Carries one step out.
///
/// # Errors
/// As [`Failure`] says; a part may have been done.
pub(super) async fn carry_out(
    step: Step,
    source: &dyn Node,
    target: &dyn Node,
    cx: &JobContext,
    options: CopyOptions,
) -> Result<(), Failure> {
    match step.kind {
        StepKind::Copy if options.compress => {
            compress(step.range, source, target, cx, options.unit_bytes).await
        }
        StepKind::Copy => copy(step.range, source, target, cx.pool()).await,
        StepKind::Zero => zero(step.range, target, options.may_unmap)
            .await
            .map_err(|error| Failure::Io(Side::Target, error)),
        StepKind::Share => share(step.range, source, target).await,
        StepKind::Fill(with) => fill(step.range, with, target, cx).await,
        StepKind::Skip => Ok(()),
    }
}

/// Copies what the source has in `range`, zeroes as such: what a write that goes to both sides has left there.
///
/// # Errors
/// Of either side; a part may have been copied.
pub(super) async fn bring_over(
    range: ByteRange,
    source: &Rc<dyn Node>,
    target: &dyn Node,
    pool: &BufferPool,
    may_unmap: bool,
) -> Result<(), NodeError> {
    let mut rest = range;
    while !rest.is_empty() {
        let told = chain_status(source, None, rest, STATUS_EXTENTS_MAX).await;
        let told = told.unwrap_or_default();
        let (piece, is_zero) = match told.first() {
            Some(first) => (
                first.range.intersection(&rest),
                first.content == Content::Zero,
            ),
            None => (rest, false),
        };
        if is_zero {
            zero(piece, target, may_unmap).await?;
        } else if let Err(Failure::Io(_, error)) = copy(piece, &**source, target, pool).await {
            return Err(error);
        }
        rest = ByteRange::between(piece.end().max(rest.offset() + 1), rest.end());
    }
    Ok(())
}

/// Reads and writes one range, in pieces of a buffer slot.
async fn copy(
    range: ByteRange,
    source: &dyn Node,
    target: &dyn Node,
    pool: &BufferPool,
) -> Result<(), Failure> {
    let mut rest = range;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(BUFFER_SLOT_BYTES as u64);
        rest = after;
        let length = usize::try_from(piece.length()).unwrap_or(usize::MAX);
        let buffer = pool.take(length).await;
        let read = source.read(piece.offset(), buffer).await;
        read.outcome
            .map_err(|error| Failure::Io(Side::Source, error))?;
        let written = target.write(piece.offset(), read.buffer).await;
        written
            .outcome
            .map_err(|error| Failure::Io(Side::Target, error))?;
    }
    Ok(())
}

/// Reads one range and writes it compressed, in pieces of whole units.
async fn compress(
    range: ByteRange,
    source: &dyn Node,
    target: &dyn Node,
    cx: &JobContext,
    unit_bytes: u64,
) -> Result<(), Failure> {
    for piece in range.pieces(unit_bytes.max(BUFFER_SLOT_BYTES as u64)) {
        let length = usize::try_from(piece.length()).unwrap_or(usize::MAX);
        let buffer = match length <= BUFFER_SLOT_BYTES {
            true => cx.pool().take(length).await,
            // The longest clusters are two slots long, and have to be written as a whole.
            false => Buffer::zeroed(length),
        };
        let read = source.read(piece.offset(), buffer).await;
        read.outcome
            .map_err(|error| Failure::Io(Side::Source, error))?;
        let written = target.write_compressed(piece.offset(), read.buffer).await;
        written
            .outcome
            .map_err(|error| Failure::Io(Side::Target, error))?;
    }
    Ok(())
}

/// Lets the target hold one range itself. Whether reading or writing failed is not told.
async fn fill(
    range: ByteRange,
    with: Fill,
    target: &dyn Node,
    cx: &JobContext,
) -> Result<(), Failure> {
    let memory = match with {
        Fill::Bytes => {
            let length = usize::try_from(range.length()).unwrap_or(usize::MAX);
            Some(cx.pool().take(length).await)
        }
        Fill::Zeroes => None,
    };
    let filled = target.fill(range, with, memory).await;
    filled.map_err(|error| Failure::Io(Side::Source, error))
}

/// Makes one range of the target read as zeroes, leaving alone what does already and will: holes stay holes.
async fn zero(range: ByteRange, target: &dyn Node, may_unmap: bool) -> Result<(), NodeError> {
    let mode = ZeroMode {
        may_unmap,
        no_fallback: false,
    };
    let mut rest = range;
    while !rest.is_empty() {
        let answer = target.status(rest, STATUS_EXTENTS_MAX).await;
        let extents = answer.unwrap_or_else(|error| {
            tracing::debug!(%error, "what the target holds is not known, it is zeroed");
            Vec::new()
        });
        let mut covered = rest.offset();
        for extent in extents {
            let stays = extent.allocated || !target.names_backing();
            if !extent.zero || !stays {
                target.zero(extent.range, mode).await?;
            }
            covered = extent.range.end();
        }
        if covered <= rest.offset() {
            // A node that says nothing is taken at its word: nothing is known to be zero.
            return target.zero(rest, mode).await;
        }
        rest = ByteRange::between(covered, rest.end());
    }
    Ok(())
}

/// Shares one range. Whatever goes wrong, copying tells better what it is.
async fn share(range: ByteRange, source: &dyn Node, target: &dyn Node) -> Result<(), Failure> {
    let Some((file, offset)) = source.host_extent(range) else {
        return Err(Failure::NotShared);
    };
    target.share(file, offset, range).await.map_err(|error| {
        tracing::debug!(%error, "extents cannot be shared, bytes are copied");
        Failure::NotShared
    })
}
