//! [`RawNode`]: raw data on a child, all of it or a window.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_storage::error::{EBADF, EINVAL};
use blockyard_storage::{
    Buffer, ByteRange, LocalFuture, Operation, Preallocation, StorageError, ZeroMode,
};

use crate::data::DataContext;
use crate::error::{EngineError, NodeError};
use crate::limits::SECTOR_BYTES;
use crate::node::announcing_node::AnnouncingNode;
use crate::node::build::{NodePlan, child_of};
use crate::node::fault_rules::DebugEvent;
use crate::node::zeroes::is_zero;
use crate::node::{Node, NodeFacts, NodeTransfer, Place, StatusExtent, cannot_become, refused};
use crate::request::{DetectZeroes, Discard};

/// A window's place in its child.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// First byte in the child.
    pub offset_bytes: u64,
    /// Length in bytes; `None`: to the child's end.
    pub size_bytes: Option<u64>,
}

/// Raw data on a child.
pub struct RawNode {
    /// Another one once the node has been opened in another way. Requests go on to their end with what they began with.
    view: RefCell<Rc<RawView>>,
}

/// What a raw node shows now.
struct RawView {
    name: String,
    child: Rc<dyn Node>,
    window: Window,
    read_only: bool,
    discard: Discard,
    detect_zeroes: DetectZeroes,
}

impl RawNode {
    /// A node over `window` of `child`.
    pub fn new(
        name: String,
        child: Rc<dyn Node>,
        window: Window,
        read_only: bool,
        discard: Discard,
        detect_zeroes: DetectZeroes,
    ) -> Self {
        let view = RawView {
            name,
            child: AnnouncingNode::below_raw(child),
            window,
            read_only,
            discard,
            detect_zeroes,
        };
        Self {
            view: RefCell::new(Rc::new(view)),
        }
    }

    fn view(&self) -> Rc<RawView> {
        Rc::clone(&self.view.borrow())
    }
}

impl RawView {
    fn length(&self) -> u64 {
        let of_child = self
            .child
            .facts()
            .length_bytes
            .saturating_sub(self.window.offset_bytes);
        let length = self
            .window
            .size_bytes
            .map_or(of_child, |size| size.min(of_child));
        length - length % SECTOR_BYTES
    }

    fn in_child(&self, range: ByteRange) -> ByteRange {
        ByteRange::new(
            range.offset().saturating_add(self.window.offset_bytes),
            range.length(),
        )
    }

    /// Why a request is refused before it is tried.
    fn refusal(&self, operation: Operation, range: ByteRange) -> Option<NodeError> {
        let errno = refused(operation, range, self.read_only, self.length())?;
        let source = StorageError::new(operation, range, errno);
        Some(NodeError {
            node: self.name.clone(),
            source,
        })
    }

    /// Why a request that may pass the end is refused before it is tried.
    fn refusal_growing(&self, operation: Operation, range: ByteRange) -> Option<NodeError> {
        if self.grows() && !self.read_only {
            return None;
        }
        self.refusal(operation, range)
    }

    /// Written zeroes as a zero request, if that was asked for.
    fn zeroes_instead(&self, bytes: &Buffer) -> Option<ZeroMode> {
        let looked_for = self.detect_zeroes != DetectZeroes::Off;
        (looked_for && is_zero(bytes.as_slice())).then_some(ZeroMode {
            may_unmap: self.detect_zeroes == DetectZeroes::Unmap,
            no_fallback: false,
        })
    }

    fn allowed(&self, mode: ZeroMode) -> ZeroMode {
        let may_unmap = mode.may_unmap && self.discard == Discard::Unmap;
        ZeroMode { may_unmap, ..mode }
    }
}

fn refuse<'a>(buffer: Buffer, error: NodeError) -> LocalFuture<'a, NodeTransfer> {
    Box::pin(async move {
        NodeTransfer {
            buffer,
            outcome: Err(error),
        }
    })
}

impl Node for RawNode {
    fn name(&self) -> String {
        self.view().name()
    }

    fn facts(&self) -> NodeFacts {
        self.view().facts()
    }

    fn status(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>> {
        Box::pin(async move { self.view().status(range, extents_max).await })
    }

    fn place(
        &self,
        range: ByteRange,
        finds_holes: bool,
    ) -> LocalFuture<'_, Result<Place, NodeError>> {
        Box::pin(async move { self.view().place(range, finds_holes).await })
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move { self.view().read(offset, into).await })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move { self.view().write(offset, from).await })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move { self.view().zero(range, mode).await })
    }

    fn grows(&self) -> bool {
        self.view().grows()
    }

    fn write_growing(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move { self.view().write_growing(offset, from).await })
    }

    fn zero_growing(
        &self,
        range: ByteRange,
        mode: ZeroMode,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move { self.view().zero_growing(range, mode).await })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move { self.view().discard(range).await })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move { self.view().flush().await })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move { self.view().resize(length_bytes).await })
    }

    fn exact_length_bytes(&self) -> u64 {
        self.view().exact_length_bytes()
    }

    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move { self.view().preallocate(range, how).await })
    }

    fn listens(&self) -> bool {
        self.view().listens()
    }

    fn hear(&self, event: DebugEvent) {
        self.view().hear(event);
    }

    fn host_extent(&self, range: ByteRange) -> Option<(Arc<OwnedFd>, u64)> {
        self.view().host_extent(range)
    }

    fn share(
        &self,
        source: Arc<OwnedFd>,
        from: u64,
        to: ByteRange,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move { self.view().share(source, from, to).await })
    }

    fn reopen<'a>(
        &'a self,
        context: &'a DataContext,
        plan: &'a NodePlan,
    ) -> LocalFuture<'a, Result<(), EngineError>> {
        Box::pin(async move {
            let NodePlan::Raw {
                child,
                window,
                read_only,
                discard,
                detect_zeroes,
            } = plan
            else {
                return Err(cannot_become(&self.name()));
            };
            let child = child_of(context, &self.name(), *child)?;
            let new = Self::new(
                self.name(),
                child,
                *window,
                *read_only,
                *discard,
                *detect_zeroes,
            );
            self.view.replace(new.view());
            Ok(())
        })
    }
}

impl Node for RawView {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn facts(&self) -> NodeFacts {
        let facts = self.child.facts();
        NodeFacts {
            length_bytes: self.length(),
            read_only: self.read_only,
            unmaps: facts.unmaps && self.discard == Discard::Unmap,
            fixed_length: facts.fixed_length || self.window.size_bytes.is_some(),
            ..facts
        }
    }

    fn status(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>> {
        Box::pin(async move {
            let mut extents = self.child.status(self.in_child(range), extents_max).await?;
            for extent in &mut extents {
                let offset = extent.range.offset() - self.window.offset_bytes;
                extent.range = ByteRange::new(offset, extent.range.length());
                extent.allocated = true;
            }
            Ok(extents)
        })
    }

    fn place(
        &self,
        range: ByteRange,
        finds_holes: bool,
    ) -> LocalFuture<'_, Result<Place, NodeError>> {
        Box::pin(async move {
            let below = self.child.place(self.in_child(range), finds_holes).await?;
            let start = below
                .range
                .offset()
                .saturating_sub(self.window.offset_bytes);
            Ok(Place {
                range: ByteRange::new(start, below.range.length()),
                ..below
            })
        })
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        let range = ByteRange::new(offset, into.len() as u64);
        match self.refusal(Operation::Read, range) {
            Some(error) => refuse(into, error),
            None => self.child.read(self.in_child(range).offset(), into),
        }
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        let range = ByteRange::new(offset, from.len() as u64);
        if let Some(error) = self.refusal(Operation::Write, range) {
            return refuse(from, error);
        }
        match self.zeroes_instead(&from) {
            Some(mode) => Box::pin(async move {
                let outcome = self.zero(range, mode).await;
                NodeTransfer {
                    buffer: from,
                    outcome,
                }
            }),
            None => self.child.write(self.in_child(range).offset(), from),
        }
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            if let Some(error) = self.refusal(Operation::Zero, range) {
                return Err(error);
            }
            self.child
                .zero(self.in_child(range), self.allowed(mode))
                .await
        })
    }

    fn grows(&self) -> bool {
        self.window.size_bytes.is_none() && self.child.grows()
    }

    fn write_growing(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        let range = ByteRange::new(offset, from.len() as u64);
        if let Some(error) = self.refusal_growing(Operation::Write, range) {
            return refuse(from, error);
        }
        match self.zeroes_instead(&from) {
            Some(mode) => Box::pin(async move {
                let outcome = self.zero_growing(range, mode).await;
                NodeTransfer {
                    buffer: from,
                    outcome,
                }
            }),
            None => self
                .child
                .write_growing(self.in_child(range).offset(), from),
        }
    }

    fn zero_growing(
        &self,
        range: ByteRange,
        mode: ZeroMode,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            if let Some(error) = self.refusal_growing(Operation::Zero, range) {
                return Err(error);
            }
            self.child
                .zero_growing(self.in_child(range), self.allowed(mode))
                .await
        })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            if let Some(error) = self.refusal(Operation::Discard, range) {
                return Err(error);
            }
            if self.discard == Discard::Ignore {
                return Ok(());
            }
            self.child.discard(self.in_child(range)).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        self.child.flush()
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            let in_child = length_bytes.checked_add(self.window.offset_bytes);
            let errno = if self.read_only { EBADF } else { EINVAL };
            match in_child {
                Some(length) if self.window.size_bytes.is_none() && !self.read_only => {
                    self.child.resize(length).await
                }
                _ => {
                    let range = ByteRange::new(0, length_bytes);
                    let source = StorageError::new(Operation::Resize, range, errno);
                    Err(NodeError {
                        node: self.name.clone(),
                        source,
                    })
                }
            }
        })
    }

    fn exact_length_bytes(&self) -> u64 {
        match self.window.size_bytes {
            Some(_) => self.length(),
            None => self
                .child
                .exact_length_bytes()
                .saturating_sub(self.window.offset_bytes),
        }
    }

    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        if self.read_only {
            let source = StorageError::new(Operation::Preallocate, range, EBADF);
            let node = self.name.clone();
            return Box::pin(async move { Err(NodeError { node, source }) });
        }
        self.child.preallocate(self.in_child(range), how)
    }

    fn listens(&self) -> bool {
        self.child.listens()
    }

    fn hear(&self, event: DebugEvent) {
        self.child.hear(event);
    }

    fn host_extent(&self, range: ByteRange) -> Option<(Arc<OwnedFd>, u64)> {
        self.child.host_extent(self.in_child(range))
    }

    fn share(
        &self,
        source: Arc<OwnedFd>,
        from: u64,
        to: ByteRange,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        match self.refusal(Operation::Share, to) {
            Some(error) => Box::pin(async move { Err(error) }),
            None => self.child.share(source, from, self.in_child(to)),
        }
    }
}
