//! One request in several pieces, a bounded number of them at once.

use std::cell::RefCell;
use std::pin::pin;

use blockyard_storage::buffer::{BUFFER_ALIGNMENT_BYTES, BUFFER_SLOT_BYTES};
use blockyard_storage::error::EIO;
use blockyard_storage::{Buffer, ByteRange, LocalFuture, Operation, StorageError};
use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};

use crate::error::NodeError;
use crate::node::NodeTransfer;
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

/// A buffer in parts, one for each piece of a request.
pub(super) struct Parts {
    rest: RefCell<(u64, Buffer)>,
    ended: RefCell<Vec<(u64, Buffer)>>,
}

impl Parts {
    /// Nothing is taken yet from `buffer`, which is as long as `range`.
    pub(super) fn of(range: ByteRange, buffer: Buffer) -> Self {
        Self {
            rest: RefCell::new((range.offset(), buffer)),
            ended: RefCell::default(),
        }
    }

    /// The part for `piece`, the front of what was not taken yet.
    pub(super) fn take_front(&self, piece: ByteRange) -> Buffer {
        let mut rest = self.rest.borrow_mut();
        let (at, buffer) = &mut *rest;
        debug_assert_eq!(*at, piece.offset(), "pieces come in order");
        let behind = buffer.split_off(to_usize(piece.length()));
        *at = piece.end();
        std::mem::replace(buffer, behind)
    }

    /// `piece` has ended, this is its part.
    pub(super) fn put_back(&self, piece: ByteRange, part: Buffer) {
        self.ended.borrow_mut().push((piece.offset(), part));
    }

    /// The whole buffer, once every piece has ended; `None`: a part did not come back, as after a panic of a worker.
    pub(super) fn into_whole(self) -> Option<Buffer> {
        let mut parts = self.ended.into_inner();
        parts.push(self.rest.into_inner());
        parts.sort_by_key(|(at, _)| *at);
        let mut parts = parts.into_iter().map(|(_, part)| part);
        let mut whole = parts.next()?;
        parts.all(|part| whole.join(part)).then_some(whole)
    }

    /// The end of a request in parts.
    pub(super) fn transfer(
        self,
        name: &str,
        (operation, range): (Operation, ByteRange),
        outcome: Result<(), NodeError>,
    ) -> NodeTransfer {
        match self.into_whole() {
            Some(buffer) => NodeTransfer { buffer, outcome },
            None => NodeTransfer {
                buffer: Buffer::zeroed(to_usize(range.length())),
                outcome: outcome.and(Err(NodeError {
                    node: name.to_owned(),
                    source: StorageError::new(operation, range, EIO),
                })),
            },
        }
    }
}

/// Whether memory and length of `part` are what a disk with direct I/O takes.
pub(super) fn is_in_blocks(part: &Buffer) -> bool {
    let address = part.as_slice().as_ptr().addr();
    (address | part.len()).is_multiple_of(BUFFER_ALIGNMENT_BYTES)
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
