//! [`NullNode`]: keeps nothing; reads deliver zeroes or whatever the buffer held. For tests and measurements.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use blockyard_storage::error::{EBADF, EINVAL, EIO, ENOSPC};
use blockyard_storage::{Buffer, ByteRange, LocalFuture, Operation, StorageError, ZeroMode};

use crate::clock::Clock;
use crate::data::DataContext;
use crate::error::{EngineError, NodeError};
use crate::node::build::NodePlan;
use crate::node::{Node, NodeFacts, NodeTransfer, StatusExtent, cannot_become};

/// What a client chose for one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NullOptions {
    /// Length in bytes.
    pub length_bytes: u64,
    /// How long each request takes.
    pub latency: Duration,
    /// Reads fill the buffer with zeroes.
    pub read_zeroes: bool,
    /// Refuse writes.
    pub read_only: bool,
}

/// A node that keeps nothing.
pub struct NullNode {
    name: String,
    options: Cell<NullOptions>,
    clock: Rc<dyn Clock>,
}

impl NullNode {
    /// A node on a thread whose time is `clock`'s.
    pub fn new(name: String, options: NullOptions, clock: Rc<dyn Clock>) -> Self {
        Self {
            name,
            options: Cell::new(options),
            clock,
        }
    }

    async fn delay(&self) {
        if !self.options.get().latency.is_zero() {
            self.clock
                .sleep_until(self.clock.now().after(self.options.get().latency))
                .await;
        }
    }

    async fn request(&self, operation: Operation, range: ByteRange) -> Result<(), NodeError> {
        let writes = operation != Operation::Read;
        let errno = if writes && self.options.get().read_only {
            EBADF
        } else if range.end() > self.options.get().length_bytes {
            if writes { ENOSPC } else { EIO }
        } else {
            self.delay().await;
            return Ok(());
        };
        let source = StorageError::new(operation, range, errno);
        Err(NodeError {
            node: self.name.clone(),
            source,
        })
    }
}

impl Node for NullNode {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn facts(&self) -> NodeFacts {
        NodeFacts {
            length_bytes: self.options.get().length_bytes,
            request_alignment: 1,
            transfer_max_bytes: 1 << 30,
            cluster_size_bytes: None,
            read_only: self.options.get().read_only,
            unmaps: false,
            fixed_length: true,
        }
    }

    fn status(
        &self,
        range: ByteRange,
        _: usize,
    ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>> {
        let zero = self.options.get().read_zeroes;
        Box::pin(async move {
            Ok(vec![StatusExtent {
                range,
                zero,
                allocated: true,
            }])
        })
    }

    fn read(&self, offset: u64, mut into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, into.len() as u64);
            let outcome = self.request(Operation::Read, range).await;
            if self.options.get().read_zeroes {
                into.as_mut_slice().fill(0);
            }
            NodeTransfer {
                buffer: into,
                outcome,
            }
        })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, from.len() as u64);
            let outcome = self.request(Operation::Write, range).await;
            NodeTransfer {
                buffer: from,
                outcome,
            }
        })
    }

    fn zero(&self, range: ByteRange, _: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(self.request(Operation::Zero, range))
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(self.request(Operation::Discard, range))
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            self.delay().await;
            Ok(())
        })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            let range = ByteRange::new(0, length_bytes);
            Err(NodeError {
                node: self.name.clone(),
                source: StorageError::new(Operation::Resize, range, EINVAL),
            })
        })
    }

    fn reopen<'a>(
        &'a self,
        _: &'a DataContext,
        plan: &'a NodePlan,
    ) -> LocalFuture<'a, Result<(), EngineError>> {
        Box::pin(async move {
            let NodePlan::Null(options) = plan else {
                return Err(cannot_become(&self.name));
            };
            self.options.set(*options);
            Ok(())
        })
    }
}
