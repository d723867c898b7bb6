//! The trait [`Storage`]: a host file, and what each operation guarantees.
//!
//! Promises that hold for every implementation (and that `conformance` checks):
//! - A transfer is whole or failed: short reads and writes, `EINTR` and `EAGAIN` are handled below this trait.
//! - The buffer always comes back, whatever happened.
//! - Reads behind the end deliver zeroes (but what somebody else cut off fails with `EIO`); writes behind the end grow
//!   the file (unless its length is fixed: `ENOSPC`).
//! - Operations may be in flight together and end in any order; two that overlap and include a write have no defined
//!   order between them, the caller keeps them apart.
//! - What completed before `sync` was called is durable when it returns. After one failed `sync` the storage is
//!   poisoned: every later write, zero, discard, resize and sync fails with that errno, for ever.
//! - Dropping a future abandons the answer, never the safety: memory and descriptor stay alive until the operation
//!   has ended, and the operation may still take effect.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;

use crate::buffer::Buffer;
use crate::error::{EOPNOTSUPP, Operation, StorageError};
use crate::facts::{Preallocation, StorageFacts, ZeroMode};
use crate::range::ByteRange;

/// A boxed future that stays on its thread.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// The end of a read or write: the buffer, and whether all of it was transferred.
#[derive(Debug)]
pub struct Transfer {
    /// The caller's buffer; after a failed read its content is unspecified.
    pub buffer: Buffer,
    /// Whether every byte was transferred.
    pub outcome: Result<(), StorageError>,
}

/// A run of bytes that is either data or a hole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Which bytes.
    pub range: ByteRange,
    /// `true`: there may be data; `false`: a hole, which reads as zeroes.
    pub data: bool,
}

/// A host file, a block device, or something that behaves like one.
pub trait Storage {
    /// Facts as of now.
    fn facts(&self) -> StorageFacts;

    /// Fills the whole of `into` from `offset`. Bytes behind the end are zeroes.
    ///
    /// # Errors
    /// `EINVAL` when offset or length break [`StorageFacts::request_alignment`], else what the kernel says.
    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, Transfer>;

    /// Writes the whole of `from` at `offset`. Visible to reads that start after it ended; durable after
    /// [`sync`](Storage::sync).
    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, Transfer>;

    /// Makes `range` read as zeroes. Tries the file system's own ways first and falls back to writing zeroes in
    /// bounded pieces unless `mode` forbids it. A range behind the end grows the file.
    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), StorageError>>;

    /// Gives the room of `range` back where that is possible; content afterwards is zeroes or unchanged, and never
    /// anything else. Not supported is success.
    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), StorageError>>;

    /// Where data and holes are, in ascending order from `range.offset()`, adjacent runs of one kind merged. Covers at
    /// least the first byte of `range` and may stop early after `extents_max` extents; never passes the end of
    /// `range`. A storage that cannot tell answers "data". Behind the end of the file: a hole.
    fn allocation(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<Extent>, StorageError>>;

    /// Sets the length in bytes. What is cut off is lost; what is added reads as zeroes and has no room reserved.
    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), StorageError>>;

    /// Reserves room for `range` and grows the file to its end if it was shorter. Existing data in `range` stays
    /// with `Falloc` and is overwritten with zeroes with `Full`. `Off` only grows.
    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), StorageError>>;

    /// Makes everything that completed before this call durable (data and what is needed to read it back).
    fn sync(&self) -> LocalFuture<'_, Result<(), StorageError>>;

    /// The descriptor of the host file behind this storage, for sharing extents between two files.
    fn host_file(&self) -> Option<Arc<OwnedFd>> {
        None
    }

    /// Makes `length` bytes at `to` share the extents of `source` at `from` (reflink): no data moves, later writes to
    /// either side do not show on the other. Visible and durable like a write.
    ///
    /// # Errors
    /// [`StorageError::is_unsupported`] or `EINVAL` where file system, pair of files or alignment do not allow it;
    /// nothing has changed then, and the caller copies.
    fn share(
        &self,
        source: Arc<OwnedFd>,
        from: u64,
        to: ByteRange,
    ) -> LocalFuture<'_, Result<(), StorageError>> {
        let _ = (source, from);
        Box::pin(async move { Err(StorageError::new(Operation::Share, to, EOPNOTSUPP)) })
    }
}
