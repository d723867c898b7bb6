//! [`SimulatedStorage`]: a disk of a world as a `Storage`. Every operation that is not refused at once waits in the world
//! until a step ends it.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_storage::error::{EBADF, EINVAL, EIO, ENOSPC};
use blockyard_storage::{
    Buffer, ByteRange, Extent, LocalFuture, Operation, Preallocation, Storage, StorageError,
    StorageFacts, Transfer, ZeroMode,
};

use crate::change::Change;
use crate::world::{Answer, Task, World};

/// Where the errno of a failed sync is kept.
pub(crate) type Poison = Rc<Cell<Option<i32>>>;

/// An open disk.
pub struct SimulatedStorage {
    world: World,
    disk: usize,
    /// Power cuts before it was opened.
    life: u64,
    read_only: bool,
    poison: Poison,
}

impl SimulatedStorage {
    pub(crate) fn new(world: World, disk: usize, read_only: bool) -> Self {
        let life = world.cuts();
        Self {
            world,
            disk,
            life,
            read_only,
            poison: Poison::default(),
        }
    }

    /// Why an operation is refused before it is tried.
    fn refusal(&self, operation: Operation, range: ByteRange) -> Option<i32> {
        let facts = self.facts();
        if self.life != self.world.cuts() {
            return Some(EIO);
        }
        let transfers = matches!(operation, Operation::Read | Operation::Write);
        if transfers && !range.is_aligned(u64::from(facts.request_alignment)) {
            return Some(EINVAL);
        }
        if matches!(operation, Operation::Read | Operation::Allocation) {
            return None;
        }
        if self.read_only {
            return Some(EBADF);
        }
        if let Some(errno) = self.poison.get() {
            return Some(errno);
        }
        let resizes = operation == Operation::Resize;
        match facts.fixed_length {
            true if resizes => (range.end() != facts.length_bytes).then_some(EINVAL),
            true => (range.end() > facts.length_bytes).then_some(ENOSPC),
            false => None,
        }
    }

    async fn carry_out(&self, operation: Operation, range: ByteRange, task: Task) -> Answer {
        match self.refusal(operation, range) {
            Some(errno) => Answer::refused(task, errno),
            None => self.world.issue(self.disk, operation, range, task).await,
        }
    }

    async fn transfer(&self, operation: Operation, offset: u64, buffer: Buffer) -> Transfer {
        let range = ByteRange::new(offset, buffer.len() as u64);
        // Direct I/O wants memory in blocks, too.
        let address = buffer.as_slice().as_ptr().addr();
        if !address.is_multiple_of(self.facts().request_alignment as usize) {
            return Transfer {
                buffer,
                outcome: Err(StorageError::new(operation, range, EINVAL)),
            };
        }
        let task = match operation {
            Operation::Read => Task::Read(buffer),
            _ => Task::write(offset, buffer),
        };
        let Answer { buffer, outcome } = self.carry_out(operation, range, task).await;
        Transfer {
            buffer: buffer.expect("transfers give their buffer back"),
            outcome: outcome
                .map(drop)
                .map_err(|errno| StorageError::new(operation, range, errno)),
        }
    }

    async fn change(&self, operation: Operation, change: Change) -> Result<(), StorageError> {
        let range = change.range();
        let answer = self.carry_out(operation, range, Task::Change(change)).await;
        answer
            .outcome
            .map(drop)
            .map_err(|errno| StorageError::new(operation, range, errno))
    }
}

impl Storage for SimulatedStorage {
    fn facts(&self) -> StorageFacts {
        self.world.with_disk(self.disk, |state| StorageFacts {
            length_bytes: state.visible.facts().length_bytes,
            request_alignment: state.options.request_alignment,
            transfer_max_bytes: 1 << 30,
            read_only: self.read_only,
            discards: true,
            fixed_length: state.options.fixed_length,
        })
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, Transfer> {
        Box::pin(self.transfer(Operation::Read, offset, into))
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, Transfer> {
        Box::pin(self.transfer(Operation::Write, offset, from))
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let inside = range.clamp_end(self.facts().length_bytes);
            if inside == range {
                return self
                    .change(Operation::Zero, Change::Zero { range, mode })
                    .await;
            }
            // As a file: what is behind the end is zero once the file is long enough, and that is a step of its own. Whoever
            // makes it longer between the look at its length and that step is cut off.
            if !inside.is_empty() {
                let inside = Change::Zero {
                    range: inside,
                    mode,
                };
                self.change(Operation::Zero, inside).await?;
            }
            let grown = Task::Change(match self.facts().length_bytes < range.end() {
                true => Change::Resize {
                    length_bytes: range.end(),
                },
                false => Change::Zero {
                    range: ByteRange::default(),
                    mode,
                },
            });
            let answer = self.carry_out(Operation::Zero, range, grown).await;
            answer
                .outcome
                .map(drop)
                .map_err(|errno| StorageError::new(Operation::Zero, range, errno))
        })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), StorageError>> {
        let range = range.clamp_end(self.facts().length_bytes);
        Box::pin(self.change(Operation::Discard, Change::Discard { range }))
    }

    fn allocation(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<Extent>, StorageError>> {
        Box::pin(async move {
            let task = Task::Map { extents_max };
            let answer = self.carry_out(Operation::Allocation, range, task).await;
            answer
                .outcome
                .map_err(|errno| StorageError::new(Operation::Allocation, range, errno))
        })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(self.change(Operation::Resize, Change::Resize { length_bytes }))
    }

    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(self.change(Operation::Preallocate, Change::Preallocate { range, how }))
    }

    fn sync(&self) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            if self.read_only {
                return Ok(());
            }
            let changes = self.world.with_disk(self.disk, |state| state.changes());
            let task = Task::Sync {
                changes,
                poison: self.poison.clone(),
            };
            let nowhere = ByteRange::new(0, 0);
            let answer = self.carry_out(Operation::Sync, nowhere, task).await;
            answer
                .outcome
                .map(drop)
                .map_err(|errno| StorageError::whole(Operation::Sync, errno))
        })
    }

    fn host_file(&self) -> Option<Arc<OwnedFd>> {
        self.world
            .with_disk(self.disk, |state| state.descriptor.clone())
    }

    fn share(
        &self,
        source: Arc<OwnedFd>,
        from: u64,
        to: ByteRange,
    ) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let shared = self.world.shared_bytes(self.disk, &source, from, to);
            let bytes = shared.map_err(|errno| StorageError::new(Operation::Share, to, errno))?;
            self.change(
                Operation::Share,
                Change::Write {
                    offset: to.offset(),
                    bytes,
                },
            )
            .await
        })
    }
}
