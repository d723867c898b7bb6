//! One request in several pieces, a bounded number of them at once.

use std::pin::pin;

use blockyard_storage::buffer::BUFFER_SLOT_BYTES;
use blockyard_storage::{Buffer, ByteRange, LocalFuture};
use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};

use crate::error::NodeError;
use crate::node::qcow2::mover::Mover;

/// Pieces of one request in flight at most.
pub(super) const PIECES_MAX: usize = 8;

/// A piece that has been begun: which front of the rest it covers, and what remains to be waited for.
pub(super) type Begun<'a, T> = (ByteRange, LocalFuture<'a, Result<T, NodeError>>);

/// Carries `range` out: `begin` takes the front of what is left, `ended` gets what each piece comes to, in any order. Pieces
/// go on while the next one is begun. After a failure no more are begun; those in flight end first.
///
/// # Errors
/// The first failure.
pub(super) async fn in_pieces<'a, T>(
    range: ByteRange,
    begin: impl AsyncFn(ByteRange) -> Result<Begun<'a, T>, NodeError>,
    mut ended: impl FnMut(T),
) -> Result<(), NodeError> {
    let mut rest = range;
    let mut outcome = Ok(());
    let mut window: FuturesUnordered<LocalFuture<'a, Result<T, NodeError>>> =
        FuturesUnordered::new();
    let mut take = |done: Result<T, NodeError>, outcome: &mut Result<(), NodeError>| match done {
        Ok(done) => ended(done),
        Err(error) if outcome.is_ok() => *outcome = Err(error),
        Err(_) => {}
    };
    while outcome.is_ok() && !rest.is_empty() {
        while window.len() >= PIECES_MAX
            && let Some(done) = window.next().await
        {
            take(done, &mut outcome);
        }
        if outcome.is_err() {
            break;
        }
        let mut beginning = pin!(begin(rest));
        let begun = loop {
            if window.is_empty() {
                break beginning.as_mut().await;
            }
            match select(beginning.as_mut(), window.next()).await {
                Either::Left((begun, _)) => break begun,
                Either::Right((Some(done), _)) => take(done, &mut outcome),
                Either::Right((None, _)) => {}
            }
        };
        match begun {
            // A piece that covers nothing would never come to an end.
            Ok((covered, piece)) => {
                debug_assert!(!covered.is_empty(), "a piece of {rest}");
                rest = ByteRange::between(covered.end().max(rest.offset() + 1), rest.end());
                window.push(piece);
            }
            Err(error) => take(Err(error), &mut outcome),
        }
    }
    while let Some(done) = window.next().await {
        take(done, &mut outcome);
    }
    outcome
}

impl Mover {
    /// A buffer for a piece. Its content is whatever was there before. Whoever asks may hold buffers of the pool already, so
    /// that nothing waits for it: beyond its budget there is as much memory as there is in the requests themselves.
    pub(super) fn scratch(&self, length_bytes: u64) -> Buffer {
        let length = to_usize(length_bytes);
        let pooled = (length <= BUFFER_SLOT_BYTES)
            .then(|| self.pool.try_take(length))
            .flatten();
        pooled.unwrap_or_else(|| Buffer::zeroed(length))
    }
}

/// Requests are far shorter than `usize::MAX`.
pub(super) fn to_usize(length_bytes: u64) -> usize {
    usize::try_from(length_bytes).unwrap_or(usize::MAX)
}

/// Where `part` lies in a buffer whose first byte is that of `whole`; what is outside of it is left out.
pub(super) fn place_in(whole: ByteRange, part: ByteRange) -> std::ops::Range<usize> {
    let part = part.intersection(&whole);
    let start = part.offset().saturating_sub(whole.offset());
    to_usize(start)..to_usize(start + part.length())
}
