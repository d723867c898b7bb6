//! Transfers in pieces, for nodes above something that takes no longer ones.

use blockyard_storage::{Buffer, ByteRange};

use crate::node::NodeTransfer;

/// Fills `into` from `offset` by reads of at most `piece_max_bytes`, one after the other; the first failure ends it.
pub(super) async fn read_in_pieces(
    offset: u64,
    mut into: Buffer,
    piece_max_bytes: u64,
    read: impl AsyncFn(u64, Buffer) -> NodeTransfer,
) -> NodeTransfer {
    if into.len() as u64 <= piece_max_bytes {
        return read(offset, into).await;
    }
    for (piece, from) in pieces(offset, into.len(), piece_max_bytes) {
        let NodeTransfer { buffer, outcome } =
            read(piece.offset(), Buffer::zeroed(to_usize(piece.length()))).await;
        if outcome.is_err() {
            return NodeTransfer {
                buffer: into,
                outcome,
            };
        }
        into.as_mut_slice()[from..from + buffer.len()].copy_from_slice(buffer.as_slice());
    }
    NodeTransfer {
        buffer: into,
        outcome: Ok(()),
    }
}

/// Writes `from` at `offset` by writes of at most `piece_max_bytes`, one after the other; the first failure ends it.
pub(super) async fn write_in_pieces(
    offset: u64,
    from: Buffer,
    piece_max_bytes: u64,
    write: impl AsyncFn(u64, Buffer) -> NodeTransfer,
) -> NodeTransfer {
    if from.len() as u64 <= piece_max_bytes {
        return write(offset, from).await;
    }
    for (piece, start) in pieces(offset, from.len(), piece_max_bytes) {
        let bytes = &from.as_slice()[start..start + to_usize(piece.length())];
        let NodeTransfer { outcome, .. } = write(piece.offset(), Buffer::copy_of(bytes)).await;
        if outcome.is_err() {
            return NodeTransfer {
                buffer: from,
                outcome,
            };
        }
    }
    NodeTransfer {
        buffer: from,
        outcome: Ok(()),
    }
}

/// The pieces of a transfer, and where in its buffer each begins.
fn pieces(
    offset: u64,
    length: usize,
    piece_max_bytes: u64,
) -> impl Iterator<Item = (ByteRange, usize)> {
    let mut rest = ByteRange::new(offset, length as u64);
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (piece, after) = rest.split_at(piece_max_bytes.max(1));
        rest = after;
        Some((piece, to_usize(piece.offset() - offset)))
    })
}

/// Buffers are far shorter than `usize::MAX`.
pub(super) fn to_usize(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}
