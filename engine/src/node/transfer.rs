//! How bytes go from one node to another: read and written, compressed, or as zeroes; in which pieces.

use std::rc::Rc;

use blockyard_storage::buffer::{BUFFER_SLOT_BYTES, BufferPool};
use blockyard_storage::error::EIO;
use blockyard_storage::{Buffer, ByteRange, Operation, StorageError, ZeroMode};

use crate::error::NodeError;
use crate::limits::STATUS_EXTENTS_MAX;
use crate::manifest::recorder::Recording;
use crate::manifest::{EXTENT_BYTES, Recorder};
use crate::node::Node;
use crate::node::chain::{Content, chain_status};
use crate::node::runs::{Known, Runs, Seen};

/// Why bytes did not come over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// The source did not give them.
    Reading(NodeError),
    /// The target did not take them.
    Writing(NodeError),
}

impl Failed {
    /// What failed, on whichever side.
    pub(crate) fn error(self) -> NodeError {
        match self {
            Failed::Reading(error) | Failed::Writing(error) => error,
        }
    }
}

/// Sums of bytes that are not there any more, by a bug in what makes them.
fn lost(source: &dyn Node, range: ByteRange) -> Failed {
    Failed::Reading(NodeError {
        node: source.name(),
        source: StorageError::new(Operation::Read, range, EIO),
    })
}

/// How a target wants to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Writing {
    /// What it keeps together, in bytes, a power of two: it is not written in parts.
    pub(crate) unit_bytes: u64,
    /// Units are written compressed.
    pub(crate) compress: bool,
    /// What becomes zeroes may become holes.
    pub(crate) may_unmap: bool,
}

/// Brings `range` over, whose ends are multiples of the target's unit or the end of the disk: what is known to be zeroes as such.
/// With a recorder, they are those of extents as well.
///
/// # Errors
/// Of either side; a part may have come over.
pub(crate) async fn bring_over(
    range: ByteRange,
    source: &Rc<dyn Node>,
    target: &dyn Node,
    pool: &BufferPool,
    how: Writing,
    recorder: Option<&Recorder>,
) -> Result<(), Failed> {
    let mut recording = recorder.map(|recorder| recorder.begin(range));
    let unit_bytes = how.unit_bytes.max(1);
    let (mut known, mut rest) = (Runs::default(), range);
    while !rest.is_empty() {
        known.go_on_to(rest.offset());
        look_ahead(&mut known, source, None, rest, unit_bytes).await;
        let (run, is_zero) = known.front_units(rest, unit_bytes, Seen::is_zero);
        rest = ByteRange::between(run.end(), rest.end());
        let recording = recording.as_mut();
        match is_zero {
            true => {
                zero(run, target, how.may_unmap)
                    .await
                    .map_err(Failed::Writing)?;
                recording
                    .into_iter()
                    .for_each(|sums| sums.zeroes(run.length()));
            }
            false if how.compress => {
                compress_recording(run, &**source, target, (pool, unit_bytes), recording).await?;
            }
            false => copy_recording(run, &**source, target, pool, recording).await?,
        }
    }
    ended(recording).await;
    Ok(())
}

/// Reads `range`, whole extents, for its checksums; the target is left alone.
///
/// # Errors
/// Of the source.
pub(crate) async fn read_for_sums(
    range: ByteRange,
    source: &Rc<dyn Node>,
    pool: &BufferPool,
    recorder: &Recorder,
) -> Result<(), Failed> {
    let mut recording = recorder.begin_to_read(range);
    let (mut known, mut rest) = (Runs::default(), range);
    while !rest.is_empty() {
        known.go_on_to(rest.offset());
        look_ahead(&mut known, source, None, rest, EXTENT_BYTES).await;
        let (run, is_zero) = known.front_units(rest, EXTENT_BYTES, Seen::is_zero);
        rest = ByteRange::between(run.end(), rest.end());
        if is_zero {
            recording.zeroes(run.length());
            continue;
        }
        for piece in run.pieces(BUFFER_SLOT_BYTES as u64) {
            let length = usize::try_from(piece.length()).unwrap_or(usize::MAX);
            let buffer = pool.take(length).await;
            let read = source.read(piece.offset(), buffer).await;
            read.outcome.map_err(Failed::Reading)?;
            recorded(piece, read.buffer, &**source, Some(&mut recording)).await?;
        }
    }
    recording.end().await;
    Ok(())
}

async fn ended(recording: Option<Recording<'_>>) {
    if let Some(recording) = recording {
        recording.end().await;
    }
}

/// Lets a recording have the bytes of `piece`.
async fn recorded(
    piece: ByteRange,
    buffer: Buffer,
    source: &dyn Node,
    recording: Option<&mut Recording<'_>>,
) -> Result<Buffer, Failed> {
    match recording {
        Some(recording) => {
            let buffer = recording.bytes(buffer).await;
            buffer.ok_or_else(|| lost(source, piece))
        }
        None => Ok(buffer),
    }
}

/// Finds out what the unit at the front of `rest` is, in the first `layers_max` layers (`None`: in all), and what comes with the
/// same answer. What cannot be told may be data.
pub(crate) async fn look_ahead(
    known: &mut Runs,
    source: &Rc<dyn Node>,
    layers_max: Option<usize>,
    rest: ByteRange,
    unit_bytes: u64,
) {
    let unit_end = (rest.offset() + 1).checked_next_multiple_of(unit_bytes);
    let wanted_to = unit_end.map_or(rest.end(), |end| end.min(rest.end()));
    while known.known_to(rest.offset()) < wanted_to {
        let from = known.known_to(rest.offset());
        let ahead = ByteRange::between(from, rest.end());
        let told = chain_status(source, layers_max, ahead, STATUS_EXTENTS_MAX).await;
        for extent in told.unwrap_or_default() {
            let what = match extent.content {
                Content::Data => Known::Data,
                Content::Zero => Known::Zero,
                Content::Unallocated => Known::Nothing,
            };
            known.push(extent.range, what);
        }
        if known.known_to(from) <= from {
            known.push(ByteRange::between(from, wanted_to), Known::Data);
        }
    }
}

/// Reads and writes one range, in pieces of a buffer slot. With a recorder, it is whole extents.
///
/// # Errors
/// Of either side; a part may have been copied.
pub(crate) async fn copy(
    range: ByteRange,
    source: &dyn Node,
    target: &dyn Node,
    pool: &BufferPool,
    recorder: Option<&Recorder>,
) -> Result<(), Failed> {
    let mut recording = recorder.map(|recorder| recorder.begin(range));
    copy_recording(range, source, target, pool, recording.as_mut()).await?;
    ended(recording).await;
    Ok(())
}

async fn copy_recording(
    range: ByteRange,
    source: &dyn Node,
    target: &dyn Node,
    pool: &BufferPool,
    mut recording: Option<&mut Recording<'_>>,
) -> Result<(), Failed> {
    let mut rest = range;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(BUFFER_SLOT_BYTES as u64);
        rest = after;
        let length = usize::try_from(piece.length()).unwrap_or(usize::MAX);
        let buffer = pool.take(length).await;
        let read = source.read(piece.offset(), buffer).await;
        read.outcome.map_err(Failed::Reading)?;
        let buffer = recorded(piece, read.buffer, source, recording.as_deref_mut()).await?;
        let written = target.write(piece.offset(), buffer).await;
        written.outcome.map_err(Failed::Writing)?;
    }
    Ok(())
}

/// Reads one range and writes it compressed, in pieces of whole units. With a recorder, it is whole extents.
///
/// # Errors
/// Of either side; a part may have been copied.
pub(crate) async fn compress(
    range: ByteRange,
    source: &dyn Node,
    target: &dyn Node,
    (pool, unit_bytes): (&BufferPool, u64),
    recorder: Option<&Recorder>,
) -> Result<(), Failed> {
    let mut recording = recorder.map(|recorder| recorder.begin(range));
    let how = (pool, unit_bytes);
    compress_recording(range, source, target, how, recording.as_mut()).await?;
    ended(recording).await;
    Ok(())
}

async fn compress_recording(
    range: ByteRange,
    source: &dyn Node,
    target: &dyn Node,
    (pool, unit_bytes): (&BufferPool, u64),
    mut recording: Option<&mut Recording<'_>>,
) -> Result<(), Failed> {
    for piece in range.pieces(unit_bytes.max(BUFFER_SLOT_BYTES as u64)) {
        let length = usize::try_from(piece.length()).unwrap_or(usize::MAX);
        let buffer = match length <= BUFFER_SLOT_BYTES {
            true => pool.take(length).await,
            // The longest clusters are two slots long, and have to be written as a whole.
            false => Buffer::zeroed(length),
        };
        let read = source.read(piece.offset(), buffer).await;
        read.outcome.map_err(Failed::Reading)?;
        let buffer = recorded(piece, read.buffer, source, recording.as_deref_mut()).await?;
        let written = target.write_compressed(piece.offset(), buffer).await;
        written.outcome.map_err(Failed::Writing)?;
    }
    Ok(())
}

/// Makes one range of the target read as zeroes, leaving alone what does already and will: holes stay holes.
///
/// # Errors
/// Of the target; a part may read as zeroes.
pub(crate) async fn zero(
    range: ByteRange,
    target: &dyn Node,
    may_unmap: bool,
) -> Result<(), NodeError> {
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
