//! [`HostStorage`]: a host file as a `Storage`. Reads and writes go through the ring where there is one, everything that
//! may block goes to the workers.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use blockyard_storage::error::{EBADF, EINVAL, EIO, ENOSPC};
use blockyard_storage::{
    Buffer, ByteRange, Extent, LocalFuture, Operation, Preallocation, Storage, StorageError,
    StorageFacts, Transfer, ZeroMode,
};

use crate::file_calls::{self, Abilities, Failed};
use crate::host_file::{FileKind, HostFile};
use crate::ring_file::RingFile;
use crate::workers::Workers;

/// Largest transfer in bytes.
const TRANSFER_MAX_BYTES: u32 = 1 << 30;

/// A host file on one reactor.
pub(crate) struct HostStorage {
    file: HostFile,
    read_only: bool,
    abilities: Arc<Abilities>,
    workers: Workers,
    ring: Option<RingFile>,
}

impl HostStorage {
    /// `file` with what carries its requests.
    pub(crate) fn new(
        file: HostFile,
        read_only: bool,
        workers: Workers,
        ring: Option<RingFile>,
    ) -> Self {
        Self {
            read_only: read_only || !file.is_writable(),
            abilities: Arc::default(),
            file,
            workers,
            ring,
        }
    }

    fn fixed_length(&self) -> bool {
        self.file.kind() != FileKind::Regular
    }

    /// Why a change is refused before it is tried.
    fn refusal(&self, range: ByteRange) -> Option<i32> {
        if self.read_only {
            return Some(EBADF);
        }
        if let Some(errno) = self.file.failed_sync() {
            return Some(errno);
        }
        (self.fixed_length() && range.end() > self.file.length_bytes()).then_some(ENOSPC)
    }

    fn is_misaligned(&self, offset: u64, length: usize) -> bool {
        let alignment = u64::from(self.file.request_alignment());
        !(offset | length as u64).is_multiple_of(alignment)
    }

    /// A change that a worker carries out.
    async fn change(
        &self,
        operation: Operation,
        range: ByteRange,
        call: impl FnOnce(&OwnedFd) -> Result<(), Failed> + Send + 'static,
    ) -> Result<(), StorageError> {
        if let Some(errno) = self.refusal(range) {
            return Err(StorageError::new(operation, range, errno));
        }
        let file = self.file.clone();
        let changed = move || {
            // The worker forgets: whoever asked may be gone by then.
            file.data_run().forget();
            let outcome = call(file.descriptor());
            file.data_run().forget();
            outcome
        };
        let outcome = self.workers.run(changed).await.unwrap_or(Err(EIO));
        outcome.map_err(|errno| StorageError::new(operation, range, errno))
    }

    fn grown_to(&self, end: u64) {
        self.file.grown_to(end);
    }
}

impl Storage for HostStorage {
    fn facts(&self) -> StorageFacts {
        StorageFacts {
            length_bytes: self.file.length_bytes(),
            request_alignment: self.file.request_alignment(),
            transfer_max_bytes: TRANSFER_MAX_BYTES,
            read_only: self.read_only,
            discards: true,
            fixed_length: self.fixed_length(),
        }
    }

    fn read(&self, offset: u64, mut into: Buffer) -> LocalFuture<'_, Transfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, into.len() as u64);
            if self.is_misaligned(offset, into.len()) {
                return failed(into, Operation::Read, range, EINVAL);
            }
            if offset >= self.file.length_bytes() && !self.fixed_length() {
                into.as_mut_slice().fill(0);
                return Transfer {
                    buffer: into,
                    outcome: Ok(()),
                };
            }
            let length_before = self.file.length_bytes();
            let (buffer, outcome) = match &self.ring {
                Some(ring) => ring.read_whole(offset, into).await,
                None => {
                    let file = self.file.descriptor().clone();
                    let alignment = self.file.request_alignment();
                    let call = move || {
                        let outcome =
                            file_calls::read_whole(&file, offset, into.as_mut_slice(), alignment);
                        (into, outcome)
                    };
                    self.workers
                        .run(call)
                        .await
                        .unwrap_or((Buffer::zeroed(0), Err(EIO)))
                }
            };
            let length = length_before.min(self.file.length_bytes());
            let outcome = outcome.and_then(|got| {
                let expected = range.clamp_end(length).length();
                if (got as u64) < expected {
                    tracing::warn!(%range, "a file is shorter than it was when it was opened");
                    return Err(EIO);
                }
                Ok(())
            });
            finished((buffer, outcome), Operation::Read, range)
        })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, Transfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, from.len() as u64);
            if self.is_misaligned(offset, from.len()) {
                return failed(from, Operation::Write, range, EINVAL);
            }
            if let Some(errno) = self.refusal(range) {
                return failed(from, Operation::Write, range, errno);
            }
            let outcome = match &self.ring {
                Some(ring) => ring.write_whole(offset, from).await,
                None => {
                    let file = self.file.descriptor().clone();
                    let call = move || {
                        let outcome = file_calls::write_whole(&file, offset, from.as_slice());
                        (from, outcome)
                    };
                    self.workers
                        .run(call)
                        .await
                        .unwrap_or((Buffer::zeroed(0), Err(EIO)))
                }
            };
            if outcome.1.is_ok() {
                self.grown_to(range.end());
            }
            finished(outcome, Operation::Write, range)
        })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let (kind, abilities) = (self.file.kind(), self.abilities.clone());
            self.change(Operation::Zero, range, move |file| {
                file_calls::zero(file, kind, &abilities, range, mode)
            })
            .await?;
            self.grown_to(range.end());
            Ok(())
        })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let abilities = self.abilities.clone();
            let range = range.clamp_end(self.file.length_bytes());
            self.change(Operation::Discard, range, move |file| {
                file_calls::discard(file, &abilities, range)
            })
            .await
        })
    }

    fn allocation(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<Extent>, StorageError>> {
        Box::pin(async move {
            if !range.is_empty() && self.file.data_run().contains(range) {
                return Ok(vec![Extent { range, data: true }]);
            }
            let (file, abilities) = (self.file.clone(), self.abilities.clone());
            let call = move || {
                let changes = file.data_run().changes();
                let (kind, descriptor) = (file.kind(), file.descriptor());
                let told =
                    file_calls::allocation(descriptor, kind, &abilities, range, extents_max)?;
                if let Some(run) = told.data_run {
                    file.data_run().learned(run, changes);
                }
                Ok(told.extents)
            };
            let outcome = self.workers.run(call).await.unwrap_or(Err(EIO));
            outcome.map_err(|errno| StorageError::new(Operation::Allocation, range, errno))
        })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let range = ByteRange::new(0, length_bytes);
            if self.fixed_length() && length_bytes != self.file.length_bytes() {
                return Err(StorageError::new(Operation::Resize, range, EINVAL));
            }
            self.change(Operation::Resize, range, move |file| {
                file_calls::resize(file, length_bytes)
            })
            .await?;
            self.file.resized_to(length_bytes);
            Ok(())
        })
    }

    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let kind = self.file.kind();
            self.change(Operation::Preallocate, range, move |file| {
                file_calls::preallocate(file, kind, range, how)
            })
            .await?;
            self.grown_to(range.end());
            Ok(())
        })
    }

    fn sync(&self) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            if let Some(errno) = self.file.failed_sync() {
                return Err(StorageError::whole(Operation::Sync, errno));
            }
            if self.read_only {
                return Ok(());
            }
            let file = self.file.clone();
            // The worker remembers: whoever asked may be gone by then, and the kernel tells a failure only once.
            let sync = move || {
                file_calls::sync(file.descriptor())
                    .inspect_err(|errno| file.remember_failed_sync(*errno))
            };
            let outcome = self.workers.run(sync).await.unwrap_or_else(|| {
                self.file.remember_failed_sync(EIO);
                Err(EIO)
            });
            outcome.map_err(|errno| StorageError::whole(Operation::Sync, errno))
        })
    }

    fn host_file(&self) -> Option<Arc<OwnedFd>> {
        Some(self.file.descriptor().clone())
    }

    fn share(
        &self,
        source: Arc<OwnedFd>,
        from: u64,
        to: ByteRange,
    ) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            self.change(Operation::Share, to, move |file| {
                file_calls::share(file, &source, from, to)
            })
            .await?;
            self.grown_to(to.end());
            Ok(())
        })
    }
}

fn failed(buffer: Buffer, operation: Operation, range: ByteRange, errno: i32) -> Transfer {
    Transfer {
        buffer,
        outcome: Err(StorageError::new(operation, range, errno)),
    }
}

fn finished(
    (buffer, outcome): (Buffer, Result<(), Failed>),
    operation: Operation,
    range: ByteRange,
) -> Transfer {
    let outcome = outcome.map_err(|errno| StorageError::new(operation, range, errno));
    Transfer { buffer, outcome }
}
