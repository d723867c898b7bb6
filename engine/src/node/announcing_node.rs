//! [`AnnouncingNode`]: what stands between a format and the fault filter below it, so that fault scripts can wait for what
//! the format does. Requests pass, as long as the filter takes them; their events go first.

use std::cell::Cell;
use std::rc::Rc;

use blockyard_storage::{Buffer, ByteRange, LocalFuture, Preallocation, ZeroMode};

use crate::error::NodeError;
use crate::node::fault_rules::DebugEvent;
use crate::node::pieces::{read_in_pieces, write_in_pieces};
use crate::node::{Fill, Node, NodeFacts, NodeTransfer, StatusExtent};

/// Tells the node below what the node above does.
pub(super) struct AnnouncingNode {
    child: Rc<dyn Node>,
    /// The format is raw: its events are those of its requests.
    raw: bool,
    /// Changes that were made, and how many of them a flush has covered.
    changes: Cell<u64>,
    flushed: Cell<u64>,
}

impl AnnouncingNode {
    /// What a raw node has below it: `child` itself if nothing there listens.
    pub(super) fn below_raw(child: Rc<dyn Node>) -> Rc<dyn Node> {
        Self::over(child, true)
    }

    /// The same for an image, which has events of its own to tell of.
    pub(super) fn below_image(child: Rc<dyn Node>) -> Rc<dyn Node> {
        Self::over(child, false)
    }

    fn over(child: Rc<dyn Node>, raw: bool) -> Rc<dyn Node> {
        if !child.listens() {
            return child;
        }
        Rc::new(Self {
            child,
            raw,
            changes: Cell::new(0),
            flushed: Cell::new(0),
        })
    }

    fn piece_max_bytes(&self) -> u64 {
        u64::from(self.child.facts().transfer_max_bytes)
    }

    fn raw_does(&self, event: DebugEvent) {
        if self.raw {
            self.child.hear(event);
        }
    }

    fn changed(&self) {
        self.changes.set(self.changes.get() + 1);
    }

    async fn announced_write<'a>(
        &'a self,
        offset: u64,
        from: Buffer,
        write: impl Fn(u64, Buffer) -> LocalFuture<'a, NodeTransfer>,
    ) -> NodeTransfer {
        self.child.hear(DebugEvent::Pwritev);
        let written = write_in_pieces(
            offset,
            from,
            self.piece_max_bytes(),
            async |offset, from| {
                self.raw_does(DebugEvent::WriteAio);
                write(offset, from).await
            },
        )
        .await;
        self.child.hear(DebugEvent::PwritevDone);
        self.changed();
        written
    }

    async fn announced_zero(
        &self,
        zero: LocalFuture<'_, Result<(), NodeError>>,
    ) -> Result<(), NodeError> {
        self.child.hear(DebugEvent::PwritevZero);
        let outcome = zero.await;
        self.child.hear(DebugEvent::PwritevDone);
        self.changed();
        outcome
    }
}

impl Node for AnnouncingNode {
    fn name(&self) -> String {
        self.child.name()
    }

    fn facts(&self) -> NodeFacts {
        self.child.facts()
    }

    fn status(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>> {
        self.child.status(range, extents_max)
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(read_in_pieces(
            offset,
            into,
            self.piece_max_bytes(),
            async |offset, into| {
                self.raw_does(DebugEvent::ReadAio);
                self.child.read(offset, into).await
            },
        ))
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(self.announced_write(offset, from, |offset, from| self.child.write(offset, from)))
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(self.announced_zero(self.child.zero(range, mode)))
    }

    fn grows(&self) -> bool {
        self.child.grows()
    }

    fn write_growing(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(self.announced_write(offset, from, |offset, from| {
            self.child.write_growing(offset, from)
        }))
    }

    fn zero_growing(
        &self,
        range: ByteRange,
        mode: ZeroMode,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(self.announced_zero(self.child.zero_growing(range, mode)))
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        self.changed();
        self.child.discard(range)
    }

    fn fill(
        &self,
        range: ByteRange,
        with: Fill,
        memory: Option<Buffer>,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        self.changed();
        self.child.fill(range, with, memory)
    }

    fn backing(&self) -> Option<Rc<dyn Node>> {
        self.child.backing()
    }

    fn names_backing(&self) -> bool {
        self.child.names_backing()
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            self.raw_does(DebugEvent::FlushToOs);
            let changes = self.changes.get();
            if self.flushed.get() < changes {
                self.child.hear(DebugEvent::FlushToDisk);
            }
            self.child.flush().await?;
            self.flushed.set(changes);
            Ok(())
        })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        self.changed();
        self.child.resize(length_bytes)
    }

    fn exact_length_bytes(&self) -> u64 {
        self.child.exact_length_bytes()
    }

    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        self.changed();
        self.child.preallocate(range, how)
    }

    fn listens(&self) -> bool {
        true
    }

    fn hear(&self, event: DebugEvent) {
        self.child.hear(event);
    }
}
