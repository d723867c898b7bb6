//! [`Aligned`]: any offset and length on top of a storage that takes only whole blocks (direct I/O).
//!
//! Whole-block requests pass straight through. Others are widened: reads through a bounce buffer, writes by
//! read-modify-write of the edges. A write waits for overlapping writes in flight, so that an edge that is read, changed and
//! written back never undoes a neighbour's write. A widened write that passes the end of the file grows it too far; it has
//! the whole tail of the file for itself until that is cut off again, and nobody is told of the length between.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use crate::buffer::Buffer;
use crate::error::{Operation, StorageError};
use crate::facts::{Preallocation, StorageFacts, ZeroMode};
use crate::range::ByteRange;
use crate::storage::{Extent, LocalFuture, Storage, Transfer};

/// Lengths of files are kept at multiples of this, the unit of every disk.
const SECTOR_BYTES: u64 = 512;

/// Lifts the alignment demands of a storage.
pub struct Aligned {
    inner: Rc<dyn Storage>,
    alignment: u64,
    writes: WritesInFlight,
    /// The length in bytes that callers know, while a widened write has made the file longer.
    shown_length: Cell<Option<u64>>,
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
            shown_length: Cell::new(None),
        })
    }

    /// Length in bytes as callers know it.
    fn length(&self) -> u64 {
        let shown = self.shown_length.get();
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

    /// A change up to `end` has ended well.
    fn grown_to(&self, end: u64) {
        let shown = self.shown_length.get();
        self.shown_length.set(shown.map(|shown| shown.max(end)));
    }

    /// What a change of `range` has to have for itself: its blocks, and all behind them if it makes the file too long.
    fn reach(&self, range: ByteRange) -> ByteRange {
        let outer = range.align_outward(self.alignment);
        if outer.end() > self.length_with(range) && !self.inner.facts().fixed_length {
            return ByteRange::between(outer.offset(), u64::MAX);
        }
        outer
    }

    /// Waits until a change of `range` may go ahead.
    async fn turn(&self, range: ByteRange) -> Turn<'_> {
        loop {
            let turn = self.writes.enter(self.reach(range)).await;
            // The length may have changed meanwhile.
            if turn.range.contains(&self.reach(range)) {
                return turn;
            }
        }
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
        }
        Transfer {
            buffer: into,
            outcome,
        }
    }

    /// Reads the blocks around `range`, lets `change` at the bytes of `range`, writes them back. The caller has the turn.
    async fn modify(
        &self,
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
        if outer.end() <= wanted || self.inner.facts().fixed_length {
            return self.inner.write(outer.offset(), bounce).await.outcome;
        }
        // Also a failed write may have made the file longer: until all is well the old length is the one to show.
        self.shown_length.set(Some(self.length()));
        self.inner.write(outer.offset(), bounce).await.outcome?;
        self.inner.resize(wanted).await?;
        self.shown_length.set(None);
        Ok(())
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
        if range.is_aligned(self.alignment) {
            return self.inner.read(offset, into);
        }
        Box::pin(self.read_widened(range, into))
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, Transfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, from.len() as u64);
            let _turn = self.turn(range).await;
            if range.is_aligned(self.alignment) {
                let transfer = self.inner.write(offset, from).await;
                if transfer.outcome.is_ok() {
                    self.grown_to(range.end());
                }
                return transfer;
            }
            let outcome = self
                .modify(range, |bytes| bytes.copy_from_slice(from.as_slice()))
                .await;
            Transfer {
                buffer: from,
                outcome,
            }
        })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let _turn = self.turn(range).await;
            let middle = range.align_inward(self.alignment);
            if middle.is_empty() {
                return self.modify(range, |bytes| bytes.fill(0)).await;
            }
            self.inner.zero(middle, mode).await?;
            self.grown_to(middle.end());
            for edge in [
                ByteRange::between(range.offset(), middle.offset()),
                ByteRange::between(middle.end(), range.end()),
            ] {
                if !edge.is_empty() {
                    self.modify(edge, |bytes| bytes.fill(0)).await?;
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
            self.shown_length.set(None);
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
            let _turn = self.turn(range).await;
            self.inner.preallocate(range, how).await?;
            self.grown_to(range.end());
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
            let _turn = self.turn(to).await;
            self.inner.share(source, from, to).await?;
            self.grown_to(to.end());
            Ok(())
        })
    }
}

/// Bounce buffers are as long as requests, which are far below `usize::MAX`.
fn to_usize(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}

/// The ranges being written, and who waits for one of them: keeps two writes from changing one block at the same time.
#[derive(Default)]
pub struct WritesInFlight {
    state: RefCell<(Vec<ByteRange>, Vec<Waker>)>,
}

impl WritesInFlight {
    /// Waits until no write in flight overlaps `range`, and counts as one until the answer is dropped.
    pub async fn enter(&self, range: ByteRange) -> Turn<'_> {
        poll_fn(|cx| {
            let mut state = self.state.borrow_mut();
            if state.0.iter().any(|other| other.overlaps(&range)) {
                state.1.push(cx.waker().clone());
                return Poll::Pending;
            }
            state.0.push(range);
            Poll::Ready(())
        })
        .await;
        Turn {
            writes: self,
            range,
        }
    }
}

/// A write in flight, until dropped.
pub struct Turn<'a> {
    writes: &'a WritesInFlight,
    range: ByteRange,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.writes.state.borrow_mut();
        if let Some(place) = state.0.iter().position(|range| *range == self.range) {
            state.0.swap_remove(place);
        }
        let waiting = std::mem::take(&mut state.1);
        drop(state);
        for waker in waiting {
            waker.wake();
        }
    }
}
