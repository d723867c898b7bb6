//! [`CopyOnReadNode`]: a filter that lets the layer it is above hold what is read through it, so that it is read from the layers
//! below once.
//!
//! Never offers its child's extents for sharing: what is shared is not read.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockyard_storage::error::{EBADF, EOPNOTSUPP};
use blockyard_storage::{
    Buffer, ByteRange, LocalFuture, Operation, Preallocation, StorageError, ZeroMode,
};

use crate::data::DataContext;
use crate::error::{EngineError, NodeError};
use crate::limits::STATUS_EXTENTS_MAX;
use crate::node::build::{NodePlan, child_of};
use crate::node::chain::{Content, chain_status};
use crate::node::fault_rules::DebugEvent;
use crate::node::forwarding::forward_to_child;
use crate::node::zeroes::is_zero;
use crate::node::{
    Fill, ImageMarks, Node, NodeFacts, NodeTransfer, Place, StatusExtent, cannot_become, refused,
};
use crate::request::{DetectZeroes, Discard};

/// What a client chose for one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyOnReadOptions {
    /// Refuse writes. What is read is copied all the same.
    pub read_only: bool,
    /// What discards do.
    pub discard: Discard,
    /// Whether written zeroes become zero requests.
    pub detect_zeroes: DetectZeroes,
}

/// A filter that copies what is read.
pub struct CopyOnReadNode {
    name: String,
    /// Another one once something was put there.
    child: RefCell<Rc<dyn Node>>,
    bottom: Option<Rc<dyn Node>>,
    options: Cell<CopyOnReadOptions>,
}

impl CopyOnReadNode {
    /// A filter above `child`. What only layers below `bottom` hold is not copied; `bottom` is in the child's chain, whose links
    /// down to it stay what they are.
    pub fn new(
        name: String,
        child: Rc<dyn Node>,
        bottom: Option<Rc<dyn Node>>,
        options: CopyOnReadOptions,
    ) -> Self {
        Self {
            name,
            child: RefCell::new(child),
            bottom,
            options: Cell::new(options),
        }
    }

    fn child(&self) -> Rc<dyn Node> {
        Rc::clone(&self.child.borrow())
    }

    /// Why a request is refused before it is tried.
    fn refusal(&self, operation: Operation, range: ByteRange) -> Option<NodeError> {
        let length_bytes = self.child().facts().length_bytes;
        let errno = refused(operation, range, self.options.get().read_only, length_bytes)?;
        Some(NodeError {
            node: self.name.clone(),
            source: StorageError::new(operation, range, errno),
        })
    }

    /// How many layers of the chain may be copied from, the one that is copied to included. Jobs put filters into chains
    /// meanwhile, which do not count: what is below a filter is what is below its child.
    fn layers(&self, child: &Rc<dyn Node>) -> usize {
        let Some(bottom) = &self.bottom else {
            return usize::MAX;
        };
        let Some(beyond) = bottom.backing() else {
            return usize::MAX;
        };
        let (mut layers, mut below) = (1, child.backing());
        while let Some(layer) = below {
            if std::ptr::addr_eq(Rc::as_ptr(&layer), Rc::as_ptr(&beyond)) {
                break;
            }
            layers += 1;
            below = layer.backing();
        }
        layers
    }

    /// Lets the child hold what it does not hold of `range` and layers that may be copied from do.
    async fn fill_from_below(
        &self,
        child: &Rc<dyn Node>,
        range: ByteRange,
    ) -> Result<(), NodeError> {
        if child.backing().is_none() || is_held(child, range).await {
            return Ok(());
        }
        let layers = self.layers(child);
        let mut rest = range;
        while !rest.is_empty() {
            let told = chain_status(child, Some(layers), rest, STATUS_EXTENTS_MAX).await;
            // What cannot be told is tried.
            let told = told.unwrap_or_default();
            let mut covered = rest.offset();
            for extent in &told {
                if extent.depth > 0 && extent.content != Content::Unallocated {
                    // Not as zeroes, which have to be there for whole units of the format. Those that it finds it keeps so.
                    fill(child, extent.range).await?;
                }
                covered = extent.range.end();
            }
            if covered <= rest.offset() {
                return fill(child, rest).await;
            }
            rest = ByteRange::between(covered.min(rest.end()), rest.end());
        }
        Ok(())
    }
}

/// Whether a layer is known to hold all of `range` itself.
async fn is_held(layer: &Rc<dyn Node>, range: ByteRange) -> bool {
    match layer.status(range, 1).await.as_deref() {
        Ok([extent, ..]) => extent.allocated && extent.range.contains(&range),
        _ => false,
    }
}

/// Lets a layer hold `range`, if it can.
async fn fill(child: &Rc<dyn Node>, range: ByteRange) -> Result<(), NodeError> {
    match child.fill(range, Fill::Bytes, None).await {
        // A job's filter that cannot let it through. Nothing but the copy is missing.
        Err(error) if error.errno() == EOPNOTSUPP => Ok(()),
        filled => filled,
    }
}

impl Node for CopyOnReadNode {
    forward_to_child! {
        status place has_clusters fill flush resize resize_refusal exact_length_bytes
        shown backing names_backing image_marks compresses listens hear
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn facts(&self) -> NodeFacts {
        let facts = self.child().facts();
        let options = self.options.get();
        NodeFacts {
            read_only: options.read_only,
            unmaps: facts.unmaps && options.discard == Discard::Unmap,
            ..facts
        }
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, into.len() as u64);
            let child = self.child();
            let filled = match self.refusal(Operation::Read, range) {
                Some(error) => Err(error),
                // An inactive one, which may be somebody else's.
                None if child.facts().read_only => Ok(()),
                None => self.fill_from_below(&child, range).await,
            };
            match filled {
                Ok(()) => child.read(offset, into).await,
                Err(error) => NodeTransfer {
                    buffer: into,
                    outcome: Err(error),
                },
            }
        })
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
            let detect_zeroes = self.options.get().detect_zeroes;
            if detect_zeroes == DetectZeroes::Off || !is_zero(from.as_slice()) {
                return self.child().write(offset, from).await;
            }
            let mode = ZeroMode {
                may_unmap: detect_zeroes == DetectZeroes::Unmap,
                no_fallback: false,
            };
            let outcome = self.zero(range, mode).await;
            NodeTransfer {
                buffer: from,
                outcome,
            }
        })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            if let Some(error) = self.refusal(Operation::Zero, range) {
                return Err(error);
            }
            let may_unmap = mode.may_unmap && self.options.get().discard == Discard::Unmap;
            let mode = ZeroMode { may_unmap, ..mode };
            self.child().zero(range, mode).await
        })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            if let Some(error) = self.refusal(Operation::Discard, range) {
                return Err(error);
            }
            match self.options.get().discard {
                Discard::Ignore => Ok(()),
                Discard::Unmap => self.child().discard(range).await,
            }
        })
    }

    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            if self.options.get().read_only {
                let source = StorageError::new(Operation::Preallocate, range, EBADF);
                let node = self.name.clone();
                return Err(NodeError { node, source });
            }
            self.child().preallocate(range, how).await
        })
    }

    fn write_compressed(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, from.len() as u64);
            match self.refusal(Operation::Write, range) {
                None => self.child().write_compressed(offset, from).await,
                Some(error) => NodeTransfer {
                    buffer: from,
                    outcome: Err(error),
                },
            }
        })
    }

    fn reopen<'a>(
        &'a self,
        context: &'a DataContext,
        plan: &'a NodePlan,
    ) -> LocalFuture<'a, Result<(), EngineError>> {
        Box::pin(async move {
            let NodePlan::CopyOnRead { child, options, .. } = plan else {
                return Err(cannot_become(&self.name));
            };
            self.child.replace(child_of(context, &self.name, *child)?);
            self.options.set(*options);
            Ok(())
        })
    }
}
