//! [`FilterNode`]: what a job puts above its source, for names and permissions; and the [kinds](FilterKind) of such filters.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_storage::error::{EOPNOTSUPP, EPERM};
use blockyard_storage::{Buffer, ByteRange, LocalFuture, Operation, StorageError, ZeroMode};

use crate::data::DataContext;
use crate::error::{EngineError, NodeError};
use crate::node::build::{NodePlan, child_of};
use crate::node::{Fill, Node, NodeFacts, NodeTransfer, StatusExtent, cannot_become};
use crate::request::CbwOptions;

/// What becomes of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FilterKind {
    /// They pass once what they are about to change has been saved (backup):
    /// [`CopyBeforeWrite`](super::copy_before_write::CopyBeforeWrite).
    Saves {
        /// Bytes of a cluster, a power of two.
        cluster_bytes: u64,
        /// How.
        options: CbwOptions,
        /// Whether anybody may write. Who discards the source behind the copy would discard what was written.
        admits_writers: bool,
    },
    /// They pass: nothing that is written above harms the job (commit of layers below, stream).
    Passes,
    /// They pass, and are tracked: [`MirrorTop`](super::mirror_top::MirrorTop).
    Tracks {
        /// Bytes of a granule, a power of two.
        granularity_bytes: u64,
        /// The target is in the source's own chain: what is read through the filter changes below it meanwhile.
        commits: bool,
    },
}

impl FilterKind {
    /// Whether each write has to pass the filter itself.
    pub const fn catches_writes(self) -> bool {
        matches!(self, FilterKind::Saves { .. })
    }

    /// Whether nobody may write.
    pub const fn refuses_writes(self) -> bool {
        matches!(
            self,
            FilterKind::Saves {
                admits_writers: false,
                ..
            }
        )
    }
}

/// A job's filter.
pub struct FilterNode {
    name: String,
    /// Another one once an overlay was put there.
    child: RefCell<Rc<dyn Node>>,
    kind: FilterKind,
}

impl FilterNode {
    /// A filter above `child`.
    pub fn new(name: String, child: Rc<dyn Node>, kind: FilterKind) -> Self {
        Self {
            name,
            child: RefCell::new(child),
            kind,
        }
    }

    fn child(&self) -> Rc<dyn Node> {
        Rc::clone(&self.child.borrow())
    }

    fn refuse(&self, operation: Operation, range: ByteRange) -> NodeError {
        let source = StorageError::new(operation, range, EPERM);
        NodeError {
            node: self.name.clone(),
            source,
        }
    }
}

impl Node for FilterNode {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn facts(&self) -> NodeFacts {
        self.child().facts()
    }

    fn status(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>> {
        Box::pin(async move { self.child().status(range, extents_max).await })
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move { self.child().read(offset, into).await })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move { self.child().write(offset, from).await })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move { self.child().zero(range, mode).await })
    }

    fn fill(
        &self,
        range: ByteRange,
        with: Fill,
        memory: Option<Buffer>,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        if matches!(self.kind, FilterKind::Tracks { .. }) {
            let source = StorageError::new(Operation::Write, range, EOPNOTSUPP);
            let node = self.name.clone();
            return Box::pin(async move { Err(NodeError { node, source }) });
        }
        // What is read stays, so that there is nothing to save.
        Box::pin(async move { self.child().fill(range, with, memory).await })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move { self.child().discard(range).await })
    }

    fn shown(&self) -> Option<Rc<dyn Node>> {
        Some(self.child())
    }

    fn backing(&self) -> Option<Rc<dyn Node>> {
        self.child().backing()
    }

    fn names_backing(&self) -> bool {
        self.child().names_backing()
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move { self.child().flush().await })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        let range = ByteRange::new(0, length_bytes);
        Box::pin(async move { Err(self.refuse(Operation::Resize, range)) })
    }

    fn host_extent(&self, range: ByteRange) -> Option<(Arc<OwnedFd>, u64)> {
        self.child().host_extent(range)
    }

    fn reopen<'a>(
        &'a self,
        context: &'a DataContext,
        plan: &'a NodePlan,
    ) -> LocalFuture<'a, Result<(), EngineError>> {
        Box::pin(async move {
            let NodePlan::Filter { child, .. } = plan else {
                return Err(cannot_become(&self.name));
            };
            self.child.replace(child_of(context, &self.name, *child)?);
            Ok(())
        })
    }
}
