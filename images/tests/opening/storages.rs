//! A storage of plain bytes that counts what is asked of it, and lets any of its reads fail.

use std::cell::Cell;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use blockyard_storage::error::{EBADF, EIO};
use blockyard_storage::{
    Buffer, ByteRange, LocalFuture, Operation, Preallocation, Storage, StorageError, StorageFacts,
    Transfer, ZeroMode,
};

/// Bytes to be read, of which those behind the given ones are a hole.
pub(crate) struct ReadOnlyBytes {
    bytes: Arc<Vec<u8>>,
    length_bytes: u64,
    /// Reads so far.
    pub(crate) reads: Cell<u64>,
    /// Bytes of the longest one.
    pub(crate) longest_read_bytes: Cell<usize>,
    /// Bytes of all of them.
    pub(crate) read_bytes: Cell<u64>,
    /// The number of the read that fails.
    pub(crate) failing_read: Cell<Option<u64>>,
}

impl ReadOnlyBytes {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let length_bytes = bytes.len() as u64;
        Self::longer(bytes, length_bytes)
    }

    /// The same with a hole behind the bytes.
    pub(crate) fn longer(bytes: Vec<u8>, length_bytes: u64) -> Self {
        Self {
            bytes: Arc::new(bytes),
            length_bytes,
            reads: Cell::default(),
            longest_read_bytes: Cell::default(),
            read_bytes: Cell::default(),
            failing_read: Cell::default(),
        }
    }

    fn refused(&self, range: ByteRange) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move { Err(StorageError::new(Operation::Write, range, EBADF)) })
    }
}

impl Storage for ReadOnlyBytes {
    fn facts(&self) -> StorageFacts {
        StorageFacts {
            length_bytes: self.length_bytes,
            request_alignment: 1,
            transfer_max_bytes: 1 << 30,
            read_only: true,
            discards: false,
            fixed_length: true,
        }
    }

    fn read(&self, offset: u64, mut into: Buffer) -> LocalFuture<'_, Transfer> {
        Box::pin(async move {
            let number = self.reads.get();
            self.reads.set(number + 1);
            let length = into.len();
            self.longest_read_bytes
                .set(self.longest_read_bytes.get().max(length));
            self.read_bytes.set(self.read_bytes.get() + length as u64);
            let range = ByteRange::new(offset, length as u64);
            assert!(range.end() <= self.length_bytes, "reads within the file");
            if self.failing_read.get() == Some(number) {
                let error = StorageError::new(Operation::Read, range, EIO);
                return Transfer {
                    buffer: into,
                    outcome: Err(error),
                };
            }
            let slice = into.as_mut_slice();
            slice.fill(0);
            let rest = usize::try_from(offset).ok();
            let rest = rest
                .and_then(|offset| self.bytes.get(offset..))
                .unwrap_or(&[]);
            let known = rest.len().min(length);
            slice[..known].copy_from_slice(&rest[..known]);
            Transfer {
                buffer: into,
                outcome: Ok(()),
            }
        })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, Transfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, from.len() as u64);
            Transfer {
                buffer: from,
                outcome: Err(StorageError::new(Operation::Write, range, EBADF)),
            }
        })
    }

    fn zero(&self, range: ByteRange, _: ZeroMode) -> LocalFuture<'_, Result<(), StorageError>> {
        self.refused(range)
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), StorageError>> {
        self.refused(range)
    }

    fn allocation(
        &self,
        range: ByteRange,
        _: usize,
    ) -> LocalFuture<'_, Result<Vec<blockyard_storage::Extent>, StorageError>> {
        let all = blockyard_storage::Extent { range, data: true };
        Box::pin(async move { Ok(vec![all]) })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), StorageError>> {
        self.refused(ByteRange::new(length_bytes, 0))
    }

    fn preallocate(
        &self,
        range: ByteRange,
        _: Preallocation,
    ) -> LocalFuture<'_, Result<(), StorageError>> {
        self.refused(range)
    }

    fn sync(&self) -> LocalFuture<'_, Result<(), StorageError>> {
        self.refused(ByteRange::default())
    }
}

/// What a future gives that has nothing to wait for.
pub(crate) fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("nothing is waited for"),
    }
}
