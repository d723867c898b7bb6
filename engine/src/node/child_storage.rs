//! [`ChildStorage`]: a node as a `Storage`, so that an image can stand on anything that a node can be.
//!
//! Adds to a node what the trait `Storage` promises and a node does not: reads behind the end deliver zeroes, writes behind
//! the end grow the node where it can grow, and after one failed flush nothing changes any more. Any alignment will do.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_storage::error::ENOSPC;
use blockyard_storage::{
    Buffer, ByteRange, Extent, LocalFuture, Operation, Preallocation, Storage, StorageError,
    StorageFacts, Transfer, WritesInFlight, ZeroMode,
};

use crate::error::NodeError;
use crate::node::pieces::to_usize;
use crate::node::{Node, NodeTransfer};

/// Failures whose node is remembered for [`ChildStorage::node_error`].
const FAILURES_MAX: usize = 16;

/// A node as a storage.
pub struct ChildStorage {
    node: Rc<dyn Node>,
    /// What changes the length or the bytes behind it, kept apart where it overlaps: nobody cuts off what another adds.
    growing: WritesInFlight,
    /// The errno of the first failed flush.
    poisoned: Cell<Option<i32>>,
    failures: RefCell<VecDeque<NodeError>>,
}

impl ChildStorage {
    /// A storage that is `node`.
    pub fn new(node: Rc<dyn Node>) -> Self {
        Self {
            node,
            growing: WritesInFlight::default(),
            poisoned: Cell::new(None),
            failures: RefCell::default(),
        }
    }

    /// The node.
    pub fn node(&self) -> &Rc<dyn Node> {
        &self.node
    }

    /// The failure of a node that this storage reported as `error`: which node it was is remembered for a while, after
    /// that it is this one.
    pub fn node_error(&self, error: &StorageError) -> NodeError {
        let failures = self.failures.borrow();
        let known = failures.iter().rev().find(|known| known.source == *error);
        known.cloned().unwrap_or_else(|| NodeError {
            node: self.node.name(),
            source: error.clone(),
        })
    }

    fn length(&self) -> u64 {
        self.node.exact_length_bytes()
    }

    /// How far the node itself takes requests; its last sector may be longer than what is in it.
    fn reach(&self) -> u64 {
        self.node.facts().length_bytes.max(self.length())
    }

    fn noted(&self, error: NodeError) -> StorageError {
        let source = error.source.clone();
        let mut failures = self.failures.borrow_mut();
        if failures.len() == FAILURES_MAX {
            failures.pop_front();
        }
        failures.push_back(error);
        source
    }

    fn transfer(&self, NodeTransfer { buffer, outcome }: NodeTransfer) -> Transfer {
        Transfer {
            buffer,
            outcome: outcome.map_err(|error| self.noted(error)),
        }
    }

    /// Refuses changes after a failed flush.
    fn check(&self, operation: Operation, range: ByteRange) -> Result<(), StorageError> {
        match self.poisoned.get() {
            Some(errno) => Err(StorageError::new(operation, range, errno)),
            None => Ok(()),
        }
    }

    /// Lets a change of `range` pass the end: a node that does not grow by itself is made longer.
    async fn make_room(&self, operation: Operation, range: ByteRange) -> Result<(), StorageError> {
        self.check(operation, range)?;
        if range.end() <= self.reach() || self.node.grows() {
            return Ok(());
        }
        if self.node.facts().fixed_length {
            return Err(StorageError::new(operation, range, ENOSPC));
        }
        self.grow(range.end()).await
    }

    /// Makes the node reach `end`, if it is shorter.
    async fn grow(&self, end: u64) -> Result<(), StorageError> {
        while self.length() < end {
            let missing = ByteRange::between(self.length(), u64::MAX);
            let _turn = self.growing.enter(missing).await;
            if self.length() < missing.offset() {
                // It became shorter meanwhile: more is missing than this turn is for.
                continue;
            }
            if self.length() < end {
                let resized = self.node.resize(end).await;
                return resized.map_err(|error| self.noted(error));
            }
        }
        Ok(())
    }
}

impl Storage for ChildStorage {
    fn facts(&self) -> StorageFacts {
        let facts = self.node.facts();
        StorageFacts {
            length_bytes: self.length(),
            request_alignment: 1,
            transfer_max_bytes: facts.transfer_max_bytes,
            read_only: facts.read_only,
            discards: facts.unmaps,
            fixed_length: facts.fixed_length,
        }
    }

    fn read(&self, offset: u64, mut into: Buffer) -> LocalFuture<'_, Transfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, into.len() as u64);
            let inside = range.clamp_end(self.reach());
            if inside == range {
                return self.transfer(self.node.read(offset, into).await);
            }
            let (length, held) = (into.len(), to_usize(inside.length()));
            let mut outcome = Ok(());
            if held > 0 {
                into.set_length(held);
                let read = self.node.read(offset, into).await;
                (into, outcome) = (read.buffer, read.outcome);
            }
            into.set_length(length);
            into.as_mut_slice()[held..].fill(0);
            self.transfer(NodeTransfer {
                buffer: into,
                outcome,
            })
        })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, Transfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, from.len() as u64);
            let inside = range.end() <= self.length();
            let room = match inside {
                true => self.check(Operation::Write, range),
                false => self.make_room(Operation::Write, range).await,
            };
            if let Err(error) = room {
                return Transfer {
                    buffer: from,
                    outcome: Err(error),
                };
            }
            if inside || range.end() <= self.length() {
                return self.transfer(self.node.write(offset, from).await);
            }
            let _turn = self.growing.enter(range).await;
            self.transfer(self.node.write_growing(offset, from).await)
        })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            self.make_room(Operation::Zero, range).await?;
            let zeroed = if range.end() <= self.length() {
                self.node.zero(range, mode).await
            } else {
                // Zeroes grow a file by setting its length, which would cut off what a write behind them adds meanwhile.
                let behind = ByteRange::between(range.offset(), u64::MAX);
                let _turn = self.growing.enter(behind).await;
                self.node.zero_growing(range, mode).await
            };
            zeroed.map_err(|error| self.noted(error))
        })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            self.check(Operation::Discard, range)?;
            let inside = range.clamp_end(self.length());
            if inside.is_empty() {
                return Ok(());
            }
            let discarded = self.node.discard(inside).await;
            discarded.map_err(|error| self.noted(error))
        })
    }

    fn allocation(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<Extent>, StorageError>> {
        Box::pin(async move {
            let mut extents: Vec<Extent> = Vec::new();
            let mut add = |range: ByteRange, data| match extents.last_mut() {
                Some(last) if last.data == data => {
                    last.range = ByteRange::between(last.range.offset(), range.end());
                }
                _ => extents.push(Extent { range, data }),
            };
            let inside = range.clamp_end(self.length());
            let mut known_to = range.offset();
            if !inside.is_empty() {
                let status = self.node.status(inside, extents_max.max(1)).await;
                for extent in status.map_err(|error| self.noted(error))? {
                    add(extent.range, !extent.zero);
                    known_to = extent.range.end();
                }
            }
            if known_to >= inside.end() {
                let behind = ByteRange::between(known_to, range.end());
                if !behind.is_empty() {
                    add(behind, false);
                }
            }
            extents.truncate(extents_max.max(1));
            Ok(extents)
        })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            self.check(Operation::Resize, ByteRange::new(0, length_bytes))?;
            let from = length_bytes.min(self.length());
            let _turn = self.growing.enter(ByteRange::between(from, u64::MAX)).await;
            let resized = self.node.resize(length_bytes).await;
            resized.map_err(|error| self.noted(error))
        })
    }

    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            self.check(Operation::Preallocate, range)?;
            if range.end() > self.length() && self.node.facts().fixed_length {
                return Err(StorageError::new(Operation::Preallocate, range, ENOSPC));
            }
            self.grow(range.end()).await?;
            if how == Preallocation::Off || range.is_empty() {
                return Ok(());
            }
            // Nobody cuts the node off meanwhile, or it would be longer again, or be taken for longer than it is.
            let _turn = self.growing.enter(range).await;
            let reserved = self.node.preallocate(range, how).await;
            reserved.map_err(|error| self.noted(error))
        })
    }

    fn sync(&self) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            if let Some(errno) = self.poisoned.get() {
                return Err(StorageError::whole(Operation::Sync, errno));
            }
            let flushed = self.node.flush().await;
            flushed.map_err(|error| {
                self.poisoned.set(Some(error.errno()));
                self.noted(error)
            })
        })
    }

    fn share(
        &self,
        source: Arc<OwnedFd>,
        from: u64,
        to: ByteRange,
    ) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            self.check(Operation::Share, to)?;
            let shared = self.node.share(source, from, to).await;
            shared.map_err(|error| self.noted(error))
        })
    }
}
