//! [`MemoryStorage`]: the reference implementation of `Storage`. Blocks that were never written are holes and cost
//! nothing, so that a disk of many TiB fits.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use crate::buffer::Buffer;
use crate::error::{EBADF, EINVAL, ENOSPC, Operation, StorageError};
use crate::facts::{Preallocation, StorageFacts, ZeroMode};
use crate::range::ByteRange;
use crate::storage::{Extent, LocalFuture, Storage, Transfer};

/// Unit in which room is taken.
const BLOCK_BYTES: u64 = 4096;

/// A storage in memory. A clone has its own copy of the bytes.
#[derive(Clone)]
pub struct MemoryStorage {
    length_bytes: Cell<u64>,
    blocks: RefCell<BTreeMap<u64, Box<[u8]>>>,
    request_alignment: u32,
    read_only: bool,
    fixed_length: bool,
}

impl MemoryStorage {
    /// An empty storage of `length_bytes`: one hole.
    pub fn new(length_bytes: u64) -> Self {
        Self {
            length_bytes: Cell::new(length_bytes),
            blocks: RefCell::default(),
            request_alignment: 1,
            read_only: false,
            fixed_length: false,
        }
    }

    /// The same, taking only multiples of `alignment`.
    pub fn with_alignment(self, alignment: u32) -> Self {
        Self {
            request_alignment: alignment,
            ..self
        }
    }

    /// The same, refusing changes.
    pub fn read_only(self) -> Self {
        Self {
            read_only: true,
            ..self
        }
    }

    /// The same, keeping its length.
    pub fn fixed_length(self) -> Self {
        Self {
            fixed_length: true,
            ..self
        }
    }

    /// Bytes of room taken.
    pub fn allocated_bytes(&self) -> u64 {
        self.blocks.borrow().len() as u64 * BLOCK_BYTES
    }

    fn refusal(&self, range: ByteRange) -> Option<i32> {
        if self.read_only {
            return Some(EBADF);
        }
        (self.fixed_length && range.end() > self.length_bytes.get()).then_some(ENOSPC)
    }

    fn misaligned(&self, range: ByteRange) -> bool {
        !range.is_aligned(u64::from(self.request_alignment))
    }

    fn copy_out(&self, offset: u64, into: &mut [u8]) {
        into.fill(0);
        let range = ByteRange::new(offset, into.len() as u64);
        let visible = range.clamp_end(self.length_bytes.get());
        let blocks = self.blocks.borrow();
        for piece in visible.pieces(BLOCK_BYTES) {
            if let Some(block) = blocks.get(&(piece.offset() / BLOCK_BYTES)) {
                let from = (piece.offset() % BLOCK_BYTES) as usize;
                let to = (piece.offset() - offset) as usize;
                let length = piece.length() as usize;
                into[to..to + length].copy_from_slice(&block[from..from + length]);
            }
        }
    }

    fn copy_in(&self, offset: u64, from: &[u8]) {
        let range = ByteRange::new(offset, from.len() as u64);
        let mut blocks = self.blocks.borrow_mut();
        for piece in range.pieces(BLOCK_BYTES) {
            let block = blocks
                .entry(piece.offset() / BLOCK_BYTES)
                .or_insert_with(|| vec![0; BLOCK_BYTES as usize].into());
            let to = (piece.offset() % BLOCK_BYTES) as usize;
            let at = (piece.offset() - offset) as usize;
            let length = piece.length() as usize;
            block[to..to + length].copy_from_slice(&from[at..at + length]);
        }
        self.length_bytes
            .set(self.length_bytes.get().max(range.end()));
    }

    fn clear(&self, range: ByteRange, unmap: bool) {
        let mut blocks = self.blocks.borrow_mut();
        let whole = range.align_inward(BLOCK_BYTES);
        let first = whole.offset() / BLOCK_BYTES;
        let last = whole.end() / BLOCK_BYTES;
        if unmap && !whole.is_empty() {
            let gone: Vec<u64> = blocks.range(first..last).map(|(index, _)| *index).collect();
            for index in gone {
                blocks.remove(&index);
            }
        }
        let held: Vec<u64> = blocks
            .range(range.offset() / BLOCK_BYTES..=range.end() / BLOCK_BYTES)
            .map(|(index, _)| *index)
            .collect();
        for index in held {
            let block = ByteRange::new(index * BLOCK_BYTES, BLOCK_BYTES);
            let part = block.intersection(&range);
            if let (Some(bytes), false) = (blocks.get_mut(&index), part.is_empty()) {
                let at = (part.offset() - block.offset()) as usize;
                bytes[at..at + part.length() as usize].fill(0);
            }
        }
    }
}

impl Storage for MemoryStorage {
    fn facts(&self) -> StorageFacts {
        StorageFacts {
            length_bytes: self.length_bytes.get(),
            request_alignment: self.request_alignment,
            transfer_max_bytes: 1 << 30,
            read_only: self.read_only,
            discards: true,
            fixed_length: self.fixed_length,
        }
    }

    fn read(&self, offset: u64, mut into: Buffer) -> LocalFuture<'_, Transfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, into.len() as u64);
            if self.misaligned(range) {
                let error = StorageError::new(Operation::Read, range, EINVAL);
                return Transfer {
                    buffer: into,
                    outcome: Err(error),
                };
            }
            self.copy_out(offset, into.as_mut_slice());
            Transfer {
                buffer: into,
                outcome: Ok(()),
            }
        })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, Transfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, from.len() as u64);
            let refusal = self
                .refusal(range)
                .or(self.misaligned(range).then_some(EINVAL));
            if let Some(errno) = refusal {
                let error = StorageError::new(Operation::Write, range, errno);
                return Transfer {
                    buffer: from,
                    outcome: Err(error),
                };
            }
            self.copy_in(offset, from.as_slice());
            Transfer {
                buffer: from,
                outcome: Ok(()),
            }
        })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            if let Some(errno) = self.refusal(range) {
                return Err(StorageError::new(Operation::Zero, range, errno));
            }
            self.clear(range, mode.may_unmap);
            self.length_bytes
                .set(self.length_bytes.get().max(range.end()));
            Ok(())
        })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let range = range.clamp_end(self.length_bytes.get());
            if let Some(errno) = self.refusal(range) {
                return Err(StorageError::new(Operation::Discard, range, errno));
            }
            self.clear(range.align_inward(BLOCK_BYTES), true);
            Ok(())
        })
    }

    fn allocation(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<Extent>, StorageError>> {
        Box::pin(async move {
            let blocks = self.blocks.borrow();
            let mut extents: Vec<Extent> = Vec::new();
            let mut rest = range;
            while !rest.is_empty() && extents.len() < extents_max.max(1) {
                let index = rest.offset() / BLOCK_BYTES;
                let data = blocks.contains_key(&index) && rest.offset() < self.length_bytes.get();
                let end = if data {
                    (index + 1) * BLOCK_BYTES
                } else {
                    blocks
                        .range(index + 1..)
                        .next()
                        .map_or(u64::MAX, |(next, _)| next * BLOCK_BYTES)
                };
                let (run, after) = rest.split_at(end - rest.offset());
                rest = after;
                match extents.last_mut() {
                    Some(last) if last.data == data => {
                        last.range = ByteRange::between(last.range.offset(), run.end());
                    }
                    _ => extents.push(Extent { range: run, data }),
                }
            }
            Ok(extents)
        })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let range = ByteRange::new(0, length_bytes);
            if self.read_only || self.fixed_length {
                let errno = if self.read_only { EBADF } else { EINVAL };
                return Err(StorageError::new(Operation::Resize, range, errno));
            }
            let old = self.length_bytes.get();
            self.clear(ByteRange::between(length_bytes, old), true);
            self.length_bytes.set(length_bytes);
            Ok(())
        })
    }

    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            if let Some(errno) = self.refusal(range) {
                return Err(StorageError::new(Operation::Preallocate, range, errno));
            }
            if how == Preallocation::Full {
                self.clear(range, false);
            }
            if how != Preallocation::Off {
                let mut blocks = self.blocks.borrow_mut();
                for piece in range.pieces(BLOCK_BYTES) {
                    blocks
                        .entry(piece.offset() / BLOCK_BYTES)
                        .or_insert_with(|| vec![0; BLOCK_BYTES as usize].into());
                }
            }
            self.length_bytes
                .set(self.length_bytes.get().max(range.end()));
            Ok(())
        })
    }

    fn sync(&self) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async { Ok(()) })
    }
}
