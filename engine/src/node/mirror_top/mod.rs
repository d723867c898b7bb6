//! [`MirrorTop`]: the filter above the source of a mirror. Everything passes; what is written is tracked, or goes to the target too.

#[cfg(test)]
mod tests;
mod tracker;

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_storage::error::EPERM;
use blockyard_storage::{Buffer, ByteRange, LocalFuture, Operation, StorageError, ZeroMode};

use crate::error::NodeError;
use crate::node::gate::{Pass, Way};
use crate::node::turns::{Doing, Turn};
use crate::node::{Node, NodeFacts, NodeTransfer, StatusExtent};

pub use tracker::Tracker;
pub(crate) use tracker::{OtherSide, Quiet};

/// The filter above the source of a mirror.
pub struct MirrorTop {
    name: String,
    child: Rc<dyn Node>,
    tracker: Rc<Tracker>,
}

/// What is changed, for the other side.
#[derive(Clone, Copy)]
enum Change {
    Zero,
    Discard,
}

/// A write on its way. What it may have changed is marked when it goes, unless it was [written](Self::written) on both sides.
struct Tracked<'a> {
    tracker: &'a Tracker,
    range: ByteRange,
    other_side: Option<OtherSide>,
    _turn: Turn,
    _pass: Pass,
}

impl MirrorTop {
    /// A filter above `child`, which tells `tracker`.
    pub fn new(name: String, child: Rc<dyn Node>, tracker: Rc<Tracker>) -> Self {
        Self {
            name,
            child,
            tracker,
        }
    }

    /// Where requests go.
    fn below(&self) -> Rc<dyn Node> {
        let successor = self.tracker.successor();
        successor.unwrap_or_else(|| Rc::clone(&self.child))
    }

    /// Begins a write of `range`, once nobody is in its way.
    async fn begin(&self, range: ByteRange) -> Tracked<'_> {
        let pass = self.tracker.gate.enter(Way::Write).await;
        let doing = match self.tracker.other_side() {
            Some(_) => Doing::WriteBoth,
            None => Doing::Write,
        };
        let turn = self.tracker.turn(self.tracker.outward(range), doing);
        turn.come().await;
        // The job may have ended meanwhile.
        let other_side = match doing {
            Doing::WriteBoth => self.tracker.other_side(),
            _ => None,
        };
        if other_side.is_none() {
            self.tracker.mark_written(range);
        }
        Tracked {
            tracker: &self.tracker,
            range,
            other_side,
            _turn: turn,
            _pass: pass,
        }
    }

    /// Zeroes or discards on the source, and then on the other side.
    async fn change(
        &self,
        range: ByteRange,
        change: Change,
        on_source: impl AsyncFnOnce(Rc<dyn Node>) -> Result<(), NodeError>,
    ) -> Result<(), NodeError> {
        let mut tracked = self.begin(range).await;
        on_source(self.below()).await?;
        if let Some(side) = tracked.other_side.clone() {
            let copied = match change {
                Change::Zero if side.unit_bytes == 1 => {
                    let mode = ZeroMode {
                        may_unmap: side.may_unmap,
                        no_fallback: false,
                    };
                    side.target.zero(range, mode).await
                }
                // What a discard leaves is the source's business.
                Change::Zero | Change::Discard => tracked.bring_over(&side).await,
            };
            tracked.written(copied);
        }
        Ok(())
    }
}

impl Tracked<'_> {
    /// Copies the range in whole units, which is what has been written then.
    async fn bring_over(&mut self, side: &OtherSide) -> Result<(), NodeError> {
        if side.unit_bytes > 1 {
            self.range = self.tracker.outward(self.range);
        }
        (side.bring_over)(self.range).await
    }

    /// The other side has it, too, or not.
    fn written(mut self, outcome: Result<(), NodeError>) {
        match outcome {
            Ok(()) => {
                self.tracker.written_on_both(self.range);
                self.range = ByteRange::default();
            }
            // It is copied later, and the writer does not hear of it.
            Err(error) => self.tracker.failed(error),
        }
    }
}

impl Drop for Tracked<'_> {
    fn drop(&mut self) {
        self.tracker.mark_written(self.range);
    }
}

impl Node for MirrorTop {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn facts(&self) -> NodeFacts {
        self.below().facts()
    }

    fn status(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>> {
        Box::pin(async move { self.below().status(range, extents_max).await })
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move { self.below().read(offset, into).await })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, from.len() as u64);
            let mut tracked = self.begin(range).await;
            let written = self.below().write(offset, from).await;
            let (Ok(()), Some(side)) = (&written.outcome, tracked.other_side.clone()) else {
                return written;
            };
            if side.unit_bytes > 1 {
                let copied = tracked.bring_over(&side).await;
                tracked.written(copied);
                return written;
            }
            let copied = side.target.write(offset, written.buffer).await;
            tracked.written(copied.outcome);
            NodeTransfer {
                buffer: copied.buffer,
                outcome: Ok(()),
            }
        })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        let on_source = async move |node: Rc<dyn Node>| node.zero(range, mode).await;
        Box::pin(self.change(range, Change::Zero, on_source))
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        let on_source = async move |node: Rc<dyn Node>| node.discard(range).await;
        Box::pin(self.change(range, Change::Discard, on_source))
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            // A flush that waits is answered by who has what was written before.
            let _pass = self.tracker.gate.enter(Way::Write).await;
            self.below().flush().await
        })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        let range = ByteRange::new(0, length_bytes);
        let source = StorageError::new(Operation::Resize, range, EPERM);
        let node = self.name();
        Box::pin(std::future::ready(Err(NodeError { node, source })))
    }

    fn shown(&self) -> Option<Rc<dyn Node>> {
        Some(self.below())
    }

    fn backing(&self) -> Option<Rc<dyn Node>> {
        self.below().backing()
    }

    fn names_backing(&self) -> bool {
        self.below().names_backing()
    }

    fn host_extent(&self, range: ByteRange) -> Option<(Arc<OwnedFd>, u64)> {
        self.below().host_extent(range)
    }

    fn tracker(&self) -> Option<Rc<Tracker>> {
        Some(Rc::clone(&self.tracker))
    }
}
