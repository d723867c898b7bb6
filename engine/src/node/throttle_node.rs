//! [`ThrottleNode`]: a filter through which no more passes than the group that it is a member of allows.
//!
//! Reads and writes wait for their turn before they go on, whole; zeroes and discards count as writes of their length, and letting a
//! layer hold what is below it counts as reading that. Flushes and questions pass. Extents are not offered for sharing: what is
//! shared is not counted.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_storage::error::EBADF;
use blockyard_storage::{
    Buffer, ByteRange, LocalFuture, Operation, Preallocation, StorageError, ZeroMode,
};

use crate::clock::Clock;
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
use crate::throttle::Direction;
use crate::throttle::group::Member;

/// What a client chose for one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThrottleOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// What discards do.
    pub discard: Discard,
    /// Whether written zeroes become zero requests.
    pub detect_zeroes: DetectZeroes,
}

/// A filter with limits.
pub struct ThrottleNode {
    name: String,
    clock: Rc<dyn Clock>,
    /// Another one once the node has been opened in another way. Requests go on with what it is when they have waited.
    view: RefCell<Rc<View>>,
}

/// What the node shows now.
struct View {
    child: Rc<dyn Node>,
    member: Arc<Member>,
    options: ThrottleOptions,
}

impl ThrottleNode {
    /// A filter above `child`, in the group of `member`.
    pub fn new(
        name: String,
        child: Rc<dyn Node>,
        member: Arc<Member>,
        options: ThrottleOptions,
        clock: Rc<dyn Clock>,
    ) -> Self {
        let view = View {
            child,
            member,
            options,
        };
        Self {
            name,
            clock,
            view: RefCell::new(Rc::new(view)),
        }
    }

    fn view(&self) -> Rc<View> {
        Rc::clone(&self.view.borrow())
    }

    fn child(&self) -> Rc<dyn Node> {
        Rc::clone(&self.view.borrow().child)
    }

    /// What a request goes on with, once it may pass.
    ///
    /// # Errors
    /// It is refused before it is tried, and then at once.
    async fn pass(
        &self,
        operation: Operation,
        range: ByteRange,
        may_grow: bool,
    ) -> Result<Rc<View>, NodeError> {
        let view = self.view();
        self.check(&view, operation, range, may_grow)?;
        let direction = match operation {
            Operation::Read => Direction::Read,
            _ => Direction::Write,
        };
        let pass = view.member.pass(direction, range.length(), &*self.clock);
        pass.await;
        // It may have become another one meanwhile, and nothing has been asked of what was below.
        let view = self.view();
        self.check(&view, operation, range, may_grow)?;
        Ok(view)
    }

    /// Fails if a request is refused before it is tried.
    fn check(
        &self,
        view: &View,
        operation: Operation,
        range: ByteRange,
        may_grow: bool,
    ) -> Result<(), NodeError> {
        let end = match may_grow && view.child.grows() {
            true => u64::MAX,
            false => view.child.facts().length_bytes,
        };
        let errno = refused(operation, range, view.options.read_only, end);
        errno.map_or(Ok(()), |errno| {
            Err(NodeError {
                node: self.name.clone(),
                source: StorageError::new(operation, range, errno),
            })
        })
    }

    async fn write_to(&self, offset: u64, from: Buffer, may_grow: bool) -> NodeTransfer {
        let range = ByteRange::new(offset, from.len() as u64);
        let view = match self.pass(Operation::Write, range, may_grow).await {
            Ok(view) => view,
            Err(error) => {
                return NodeTransfer {
                    buffer: from,
                    outcome: Err(error),
                };
            }
        };
        let detect_zeroes = view.options.detect_zeroes;
        if detect_zeroes == DetectZeroes::Off || !is_zero(from.as_slice()) {
            return match may_grow {
                true => view.child.write_growing(offset, from).await,
                false => view.child.write(offset, from).await,
            };
        }
        let mode = ZeroMode {
            may_unmap: detect_zeroes == DetectZeroes::Unmap,
            no_fallback: false,
        };
        NodeTransfer {
            outcome: view.zero(range, mode, may_grow).await,
            buffer: from,
        }
    }
}

impl View {
    async fn zero(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        may_grow: bool,
    ) -> Result<(), NodeError> {
        let may_unmap = mode.may_unmap && self.options.discard == Discard::Unmap;
        let mode = ZeroMode { may_unmap, ..mode };
        match may_grow {
            true => self.child.zero_growing(range, mode).await,
            false => self.child.zero(range, mode).await,
        }
    }
}

impl Node for ThrottleNode {
    forward_to_child! {
        status place has_clusters flush resize resize_refusal exact_length_bytes grows
        shown backing names_backing image_marks compresses listens hear
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn facts(&self) -> NodeFacts {
        let view = self.view();
        let facts = view.child.facts();
        NodeFacts {
            read_only: view.options.read_only,
            unmaps: facts.unmaps && view.options.discard == Discard::Unmap,
            ..facts
        }
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, into.len() as u64);
            match self.pass(Operation::Read, range, false).await {
                Ok(view) => view.child.read(offset, into).await,
                Err(error) => NodeTransfer {
                    buffer: into,
                    outcome: Err(error),
                },
            }
        })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(self.write_to(offset, from, false))
    }

    fn write_growing(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(self.write_to(offset, from, true))
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            let view = self.pass(Operation::Zero, range, false).await?;
            view.zero(range, mode, false).await
        })
    }

    fn zero_growing(
        &self,
        range: ByteRange,
        mode: ZeroMode,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            let view = self.pass(Operation::Zero, range, true).await?;
            view.zero(range, mode, true).await
        })
    }

    fn fill(
        &self,
        range: ByteRange,
        with: Fill,
        memory: Option<Buffer>,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            let view = self.view();
            if with == Fill::Bytes {
                let pass = view
                    .member
                    .pass(Direction::Read, range.length(), &*self.clock);
                pass.await;
            }
            self.child().fill(range, with, memory).await
        })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            let view = self.view();
            if view.options.discard == Discard::Ignore {
                // Nothing is done, so that nothing has to wait.
                return self.check(&view, Operation::Discard, range, false);
            }
            let view = self.pass(Operation::Discard, range, false).await?;
            view.child.discard(range).await
        })
    }

    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            let view = self.view();
            if view.options.read_only {
                let source = StorageError::new(Operation::Preallocate, range, EBADF);
                let node = self.name.clone();
                return Err(NodeError { node, source });
            }
            view.child.preallocate(range, how).await
        })
    }

    fn write_compressed(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, from.len() as u64);
            match self.pass(Operation::Write, range, false).await {
                Ok(view) => view.child.write_compressed(offset, from).await,
                Err(error) => NodeTransfer {
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
            let NodePlan::Throttle {
                child,
                member,
                options,
            } = plan
            else {
                return Err(cannot_become(&self.name));
            };
            let view = View {
                child: child_of(context, &self.name, *child)?,
                member: member.clone(),
                options: *options,
            };
            self.view.replace(Rc::new(view));
            Ok(())
        })
    }
}
