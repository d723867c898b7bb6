//! [`Aligned`]: any offset and length on top of a storage that takes only whole blocks (direct I/O).
//!
//! Whole-block requests pass straight through. Others are widened: reads through a bounce buffer, writes by
//! read-modify-write of the edges. A write waits for overlapping writes in flight, so that an edge that is read, changed and
//! written back never undoes a neighbour's write, and goes on to its end when its caller gives up. A widened write that
//! passes the end of the file grows it too far; it has the whole tail of the file for itself until that is cut off again,
//! and nobody is told of the length between.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use crate::buffer::Buffer;
use crate::error::{Operation, StorageError};
use crate::facts::{Preallocation, StorageFacts, ZeroMode};
use crate::range::ByteRange;
use crate::storage::{Extent, LocalFuture, Storage, Transfer};
use crate::writes_in_flight::{Turn, WritesInFlight};

/// Lengths of files are kept at multiples of this, the unit of every disk.
const SECTOR_BYTES: u64 = 512;

/// Lifts the alignment demands of a storage.
pub struct Aligned {
    inner: Rc<dyn Storage>,
    alignment: u64,
    writes: WritesInFlight,
    shown: Rc<ShownLength>,
}

/// The length in bytes that callers know, while a widened write has made the file longer.
#[derive(Default)]
struct ShownLength(Cell<Option<u64>>);

impl ShownLength {
    /// A change up to `end` has ended well.
    fn grown_to(&self, end: u64) {
        let shown = self.0.get();
        self.0.set(shown.map(|shown| shown.max(end)));
    }
}

impl Aligned {
    /// `inner` itself if it takes anything, else wrapped.
    pub fn over(inner: Rc<dyn Storage>) -> Rc<dyn Storage> {
        let alignment = u64::from(inner.facts().request_alignment);
        if alignment <= 1 {
            return inner;
        }
        Rc::new(Self {
            inner,
            alignment,
            writes: WritesInFlight::default(),
            shown: Rc::default(),
        })
    }

    /// Length in bytes as callers know it.
    fn length(&self) -> u64 {
        let shown = self.shown.0.get();
        shown.unwrap_or_else(|| self.inner.facts().length_bytes)
    }

    /// Length in bytes after a write of `range`: lengths that writes make are whole sectors.
    fn length_with(&self, range: ByteRange) -> u64 {
        let end = match range.is_aligned(self.alignment) {
            true => range.end(),
            false => range.align_outward(SECTOR_BYTES).end(),
        };
        self.length().max(end)
    }

    /// What a change of `range` has to have for itself: its blocks, all behind them if it makes the file too long, and all behind
    /// the length that callers know if something has to be cut off there: a neighbour may be adding to it.
    fn reach(&self, range: ByteRange) -> ByteRange {
        if self.passes(range) {
            return range;
        }
        let outer = range.align_outward(self.alignment);
        if let Some(length) = self.leftover(range) {
            return ByteRange::between(outer.offset().min(length), u64::MAX);
        }
        let too_long = outer.end() > self.length_with(range) && !self.inner.facts().fixed_length;
        match too_long {
            true => ByteRange::between(outer.offset(), u64::MAX),
            false => outer,
        }
    }

    /// Whether a request for `range` can pass as it is.
    fn passes(&self, range: ByteRange) -> bool {
        range.is_aligned(self.alignment) && self.leftover(range).is_none()
    }

    /// Waits until a change of `range` may go ahead.
    async fn turn(&self, range: ByteRange) -> Turn {
        loop {
            let turn = self.writes.enter(self.reach(range)).await;
            // The length may have changed meanwhile.
            if turn.range().contains(&self.reach(range)) {
                return turn;
            }
        }
    }

    /// Where the file has to be cut before a change of `range`: a widened write that failed has left something behind the
    /// length that callers know, which must not come to light by the file becoming longer.
    fn leftover(&self, range: ByteRange) -> Option<u64> {
        self.shown.0.get().filter(|shown| range.end() > *shown)
    }

    /// Cuts that off. The caller has the turn.
    async fn cut_leftover(&self, turn: &Rc<Turn>, range: ByteRange) -> Result<(), StorageError> {
        let Some(length) = self.leftover(range) else {
            return Ok(());
        };
        let (inner, shown) = (Rc::clone(&self.inner), Rc::clone(&self.shown));
        let turn = Rc::clone(turn);
        let cut = async move {
            let _turn = turn;
            inner.resize(length).await?;
            shown.0.set(None);
            Ok(())
        };
        self.writes.finish(cut).await
    }

    /// Zeroes for what is read behind the end.
    fn hide_leftover(&self, offset: u64, bytes: &mut [u8]) {
        if let Some(shown) = self.shown.0.get() {
            let held = usize::try_from(shown.saturating_sub(offset)).unwrap_or(usize::MAX);
            if let Some(behind) = bytes.get_mut(held..) {
                behind.fill(0);
            }
        }
    }

    /// Writes whole blocks. The caller has the turn.
    async fn write_blocks(&self, range: ByteRange, from: Buffer) -> Transfer {
        let transfer = self.inner.write(range.offset(), from).await;
        if transfer.outcome.is_ok() {
            self.shown.grown_to(range.end());
        }
        transfer
    }

    async fn read_widened(&self, range: ByteRange, mut into: Buffer) -> Transfer {
        let outer = range.align_outward(self.alignment);
        let bounce = Buffer::zeroed(to_usize(outer.length()));
        let Transfer { buffer, outcome } = self.inner.read(outer.offset(), bounce).await;
        if outcome.is_ok() {
            let skip = to_usize(range.offset() - outer.offset());
            let length = into.len();
            into.as_mut_slice()
                .copy_from_slice(&buffer.as_slice()[skip..skip + length]);
            self.hide_leftover(range.offset(), into.as_mut_slice());
        }
        Transfer {
            buffer: into,
            outcome,
        }
    }

    /// Reads the blocks around `range`, lets `change` at the bytes of `range`, writes them back. The caller has the turn; it
    /// is kept until the blocks are back, whether the caller waits for that or not: others would be undone.
    async fn modify(
        &self,
        turn: &Rc<Turn>,
        range: ByteRange,
        change: impl FnOnce(&mut [u8]),
    ) -> Result<(), StorageError> {
        let outer = range.align_outward(self.alignment);
        let mut bounce = Buffer::zeroed(to_usize(outer.length()));
        for edge in self.edges(range, outer) {
            let block = Buffer::zeroed(to_usize(edge.length()));
            let Transfer { buffer, outcome } = self.inner.read(edge.offset(), block).await;
            outcome?;
            let at = to_usize(edge.offset() - outer.offset());
            bounce.as_mut_slice()[at..at + buffer.len()].copy_from_slice(buffer.as_slice());
        }
        let skip = to_usize(range.offset() - outer.offset());
        change(&mut bounce.as_mut_slice()[skip..skip + to_usize(range.length())]);
        let wanted = self.length_with(range);
        let fits = outer.end() <= wanted || self.inner.facts().fixed_length;
        if !fits {
            // Also a failed write may have made the file longer: until all is well the old length is the one to show.
            self.shown.0.set(Some(self.length()));
        }
        let (inner, shown) = (Rc::clone(&self.inner), Rc::clone(&self.shown));
        let turn = Rc::clone(turn);
        let put_back = async move {
            let _turn = turn;
            inner.write(outer.offset(), bounce).await.outcome?;
            if fits {
                shown.grown_to(outer.end());
            } else {
                inner.resize(wanted).await?;
                shown.0.set(None);
            }
            Ok(())
        };
        self.writes.finish(put_back).await
    }

    /// The first and last block of `outer`, where `range` does not fill them.
    fn edges(&self, range: ByteRange, outer: ByteRange) -> Vec<ByteRange> {
        let first = ByteRange::new(outer.offset(), self.alignment);
        let last = ByteRange::new(outer.end() - self.alignment, self.alignment);
        let mut edges = Vec::new();
        if !range.contains(&first) {
            edges.push(first);
        }
        if last != first && !range.contains(&last) {
            edges.push(last);
        }
        edges
    }
}

impl Storage for Aligned {
    fn facts(&self) -> StorageFacts {
        StorageFacts {
            request_alignment: 1,
            length_bytes: self.length(),
            ..self.inner.facts()
        }
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, Transfer> {
        let range = ByteRange::new(offset, into.len() as u64);
        if self.passes(range) {
            return self.inner.read(offset, into);
        }
        Box::pin(self.read_widened(range, into))
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, Transfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, from.len() as u64);
            let turn = self.turn(range).await;
            if self.passes(range) {
                return self.write_blocks(range, from).await;
            }
            let turn = Rc::new(turn);
            if let Err(error) = self.cut_leftover(&turn, range).await {
                return Transfer {
                    buffer: from,
                    outcome: Err(error),
                };
            }
            if range.is_aligned(self.alignment) {
                return self.write_blocks(range, from).await;
            }
            let outcome = self
                .modify(&turn, range, |bytes| bytes.copy_from_slice(from.as_slice()))
                .await;
            Transfer {
                buffer: from,
                outcome,
            }
        })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let turn = Rc::new(self.turn(range).await);
            self.cut_leftover(&turn, range).await?;
            let middle = range.align_inward(self.alignment);
            if middle.is_empty() {
                return self.modify(&turn, range, |bytes| bytes.fill(0)).await;
            }
            self.inner.zero(middle, mode).await?;
            self.shown.grown_to(middle.end());
            for edge in [
                ByteRange::between(range.offset(), middle.offset()),
                ByteRange::between(middle.end(), range.end()),
            ] {
                if !edge.is_empty() {
                    self.modify(&turn, edge, |bytes| bytes.fill(0)).await?;
                }
            }
            Ok(())
        })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let middle = range.align_inward(self.alignment);
            if middle.is_empty() {
                return Ok(());
            }
            let _turn = self.writes.enter(middle).await;
            self.inner.discard(middle).await
        })
    }

    fn allocation(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<Extent>, StorageError>> {
        self.inner.allocation(range, extents_max)
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            // Whatever is cut off or added belongs to nobody else meanwhile.
            let from = length_bytes.min(self.length());
            let _turn = self.turn(ByteRange::between(from, u64::MAX)).await;
            self.inner.resize(length_bytes).await?;
            self.shown.0.set(None);
            Ok(())
        })
    }

    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            if how == Preallocation::Full && !range.is_aligned(self.alignment) {
                return Err(StorageError::new(
                    Operation::Preallocate,
                    range,
                    crate::error::EINVAL,
                ));
            }
            let turn = Rc::new(self.turn(range).await);
            self.cut_leftover(&turn, range).await?;
            self.inner.preallocate(range, how).await?;
            self.shown.grown_to(range.end());
            Ok(())
        })
    }

    fn sync(&self) -> LocalFuture<'_, Result<(), StorageError>> {
        self.inner.sync()
    }

    fn host_file(&self) -> Option<Arc<OwnedFd>> {
        self.inner.host_file()
    }

    fn share(
        &self,
        source: Arc<OwnedFd>,
        from: u64,
        to: ByteRange,
    ) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let turn = Rc::new(self.turn(to).await);
            self.cut_leftover(&turn, to).await?;
            self.inner.share(source, from, to).await?;
            self.shown.grown_to(to.end());
            Ok(())
        })
    }
}

/// Bounce buffers are as long as requests, which are far below `usize::MAX`.
fn to_usize(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}
