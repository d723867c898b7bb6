//! [`CopyBeforeWrite`]: a filter that saves what a write is about to change. The write waits for that, and for nothing else.

mod clusters;
mod ordered;
mod saver;
mod snapshot_access;

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_storage::error::EPERM;
use blockyard_storage::{Buffer, ByteRange, LocalFuture, Operation, StorageError, ZeroMode};

use crate::data::DataContext;
use crate::error::{EngineError, NodeError};
use crate::node::build::{NodePlan, child_of};
use crate::node::fault_rules::DebugEvent;
use crate::node::forwarding::forward_to_child;
use crate::node::zeroes::is_zero;
use crate::node::{
    Fill, ImageMarks, Node, NodeFacts, NodeTransfer, Place, StatusExtent, cannot_become, refused,
};
use crate::request::{DetectZeroes, Discard};

pub(crate) use saver::{Destination, Fate};
pub use saver::{Progress, Saver, Surroundings};
pub use snapshot_access::{SnapshotAccess, SnapshotAccessOptions};

/// The filter.
pub struct CopyBeforeWrite {
    name: String,
    /// Another one once an overlay was put there.
    child: RefCell<Rc<dyn Node>>,
    saver: Rc<Saver>,
    /// As a client wants it; a job's filter passes everything on.
    options: Cell<Option<CbwNodeOptions>>,
    progress: Progress,
}

/// What a client chose for one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CbwNodeOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// What discards do.
    pub discard: Discard,
    /// Whether written zeroes become zero requests.
    pub detect_zeroes: DetectZeroes,
}

impl CopyBeforeWrite {
    /// A filter above `child`, which has `saver` save what is about to be changed.
    pub fn new(name: String, child: Rc<dyn Node>, saver: Rc<Saver>) -> Self {
        Self {
            name,
            child: RefCell::new(child),
            saver,
            options: Cell::new(None),
            progress: Progress::default(),
        }
    }

    /// The same as a client's own node, which tells `progress` how far it has come when it is closed.
    pub fn with_options(self, options: CbwNodeOptions, progress: Progress) -> Self {
        Self {
            options: Cell::new(Some(options)),
            progress,
            ..self
        }
    }

    /// Why a change is refused before it is tried.
    fn refusal(&self, operation: Operation, range: ByteRange) -> Option<NodeError> {
        let read_only = self.options.get().is_some_and(|options| options.read_only);
        let errno = refused(operation, range, read_only, self.facts().length_bytes)?;
        Some(NodeError {
            node: self.name.clone(),
            source: StorageError::new(operation, range, errno),
        })
    }

    fn child(&self) -> Rc<dyn Node> {
        Rc::clone(&self.child.borrow())
    }
}

impl Node for CopyBeforeWrite {
    // What fills a layer from below is seen already, so that there is nothing to save.
    forward_to_child! {
        status place has_clusters fill flush exact_length_bytes shown backing names_backing
        image_marks listens hear
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn facts(&self) -> NodeFacts {
        let facts = self.child().facts();
        let Some(options) = self.options.get() else {
            return facts;
        };
        NodeFacts {
            read_only: options.read_only,
            unmaps: facts.unmaps && options.discard == Discard::Unmap,
            ..facts
        }
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move { self.child().read(offset, into).await })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, from.len() as u64);
            if let Some(error) = self.refusal(Operation::Write, range) {
                return NodeTransfer {
                    buffer: from,
                    outcome: Err(error),
                };
            }
            let zeroes = self.options.get().map(|options| options.detect_zeroes);
            let zeroes = zeroes.unwrap_or(DetectZeroes::Off);
            if zeroes != DetectZeroes::Off && is_zero(from.as_slice()) {
                let mode = ZeroMode {
                    may_unmap: zeroes == DetectZeroes::Unmap,
                    no_fallback: false,
                };
                let outcome = self.zero(range, mode).await;
                return NodeTransfer {
                    buffer: from,
                    outcome,
                };
            }
            match self.saver.before_change(range).await {
                Ok(()) => self.child().write(offset, from).await,
                Err(error) => NodeTransfer {
                    buffer: from,
                    outcome: Err(error),
                },
            }
        })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            if let Some(error) = self.refusal(Operation::Zero, range) {
                return Err(error);
            }
            self.saver.before_change(range).await?;
            let options = self.options.get();
            let unmaps = options.is_none_or(|options| options.discard == Discard::Unmap);
            let may_unmap = mode.may_unmap && unmaps;
            let mode = ZeroMode { may_unmap, ..mode };
            self.child().zero(range, mode).await
        })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            if let Some(error) = self.refusal(Operation::Discard, range) {
                return Err(error);
            }
            let options = self.options.get();
            if options.is_some_and(|options| options.discard == Discard::Ignore) {
                return Ok(());
            }
            self.saver.before_change(range).await?;
            self.child().discard(range).await
        })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        let range = ByteRange::new(0, length_bytes);
        let source = StorageError::new(Operation::Resize, range, EPERM);
        let node = self.name();
        Box::pin(std::future::ready(Err(NodeError { node, source })))
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
            let child = match plan {
                NodePlan::Filter { child, .. } => child,
                NodePlan::CopyBeforeWrite { child, options, .. } => {
                    self.options.set(Some(*options));
                    child
                }
                _ => return Err(cannot_become(&self.name)),
            };
            let child = child_of(context, &self.name, *child)?;
            if self.options.get().is_some() {
                self.saver.read_from(child.clone());
            }
            self.child.replace(child);
            Ok(())
        })
    }

    fn close(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async {
            self.progress.remember(&self.saver);
            Ok(())
        })
    }

    fn saver(&self) -> Option<Rc<Saver>> {
        Some(Rc::clone(&self.saver))
    }
}
