//! [`BlkdebugNode`]: a filter that fails requests as its rules say, and that is choosier than its child about alignment and
//! length.
//!
//! Requests are cut and widened to what the limits allow before the rules see them, so that a fault on one sector hits one
//! piece. Never offers its child's extents for sharing: what is shared passes no rules.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockyard_storage::error::{EBADF, EOPNOTSUPP};
use blockyard_storage::{
    Buffer, ByteRange, LocalFuture, Operation, Preallocation, StorageError, WritesInFlight,
    ZeroMode,
};

use crate::data::DataContext;
use crate::error::{EngineError, NodeError};
use crate::limits::COPY_CHUNK_BYTES;
use crate::node::build::{NodePlan, child_of};
use crate::node::fault_rules::{DebugEvent, FaultRules};
use crate::node::pieces::{read_in_pieces, to_usize, write_in_pieces};
use crate::node::zeroes::is_zero;
use crate::node::{Fill, Node, NodeFacts, NodeTransfer, StatusExtent, cannot_become, refused};
use crate::request::{BlkdebugIo, DetectZeroes, Discard};

/// What a client chose for one node. Sizes in bytes; 0: the child's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlkdebugOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// What discards do.
    pub discard: Discard,
    /// Whether written zeroes become zero requests.
    pub detect_zeroes: DetectZeroes,
    /// Flushes are no business of the rules.
    pub no_flush: bool,
    /// Requests are multiples of this, a power of two of at most 1 MiB.
    pub align: u32,
    /// Longest transfer, a multiple of the alignment.
    pub max_transfer: u32,
    /// Shorter or unaligned zero requests are written.
    pub opt_write_zero: u32,
    /// Longest zero request.
    pub max_write_zero: u32,
    /// Shorter or unaligned discards are dropped.
    pub opt_discard: u32,
    /// Longest discard.
    pub max_discard: u32,
}

/// The rules of a node and how much of it was flushed; outlives the node when that is brought up on another thread.
#[derive(Clone, Debug)]
pub struct SharedFaults(Arc<Mutex<Faults>>);

#[derive(Debug)]
struct Faults {
    rules: FaultRules,
    changes: u64,
    flushed: u64,
}

impl SharedFaults {
    /// Rules of a node that was opened just now.
    pub fn new(rules: FaultRules) -> Self {
        Self(Arc::new(Mutex::new(Faults {
            rules,
            changes: 0,
            flushed: 0,
        })))
    }

    /// Only one thread has the node at a time.
    fn lock(&self) -> MutexGuard<'_, Faults> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A filter that injects faults.
pub struct BlkdebugNode {
    name: String,
    child: Rc<dyn Node>,
    options: Cell<BlkdebugOptions>,
    faults: SharedFaults,
    writes: WritesInFlight,
}

impl BlkdebugNode {
    /// A filter above `child`.
    pub fn new(
        name: String,
        child: Rc<dyn Node>,
        options: BlkdebugOptions,
        faults: SharedFaults,
    ) -> Self {
        Self {
            name,
            child,
            options: Cell::new(options),
            faults,
            writes: WritesInFlight::default(),
        }
    }

    fn length(&self) -> u64 {
        self.child.facts().length_bytes
    }

    /// What requests to the child are multiples of. A child's own demand is its own business.
    fn alignment(&self) -> u64 {
        u64::from(self.options.get().align.max(1))
    }

    fn transfer_max_bytes(&self) -> u32 {
        let of_child = self.child.facts().transfer_max_bytes;
        match self.options.get().max_transfer {
            0 => of_child,
            own => own.min(of_child),
        }
    }

    fn error(&self, operation: Operation, range: Option<ByteRange>, errno: i32) -> NodeError {
        NodeError {
            node: self.name.clone(),
            source: StorageError {
                operation,
                range,
                errno,
            },
        }
    }

    /// Why a request is refused before it is tried.
    fn refusal(&self, operation: Operation, range: ByteRange) -> Option<NodeError> {
        let errno = refused(
            operation,
            range,
            self.options.get().read_only,
            self.length(),
        )?;
        Some(self.error(operation, Some(range), errno))
    }

    /// Lets the rules fail a request.
    async fn check(&self, io: BlkdebugIo, range: Option<ByteRange>) -> Result<(), NodeError> {
        let fault = self.faults.lock().rules.check(io, range);
        let Some(fault) = fault else {
            return Ok(());
        };
        if !fault.immediately {
            tokio::task::yield_now().await;
        }
        let operation = match io {
            BlkdebugIo::Read => Operation::Read,
            BlkdebugIo::Write => Operation::Write,
            BlkdebugIo::WriteZeroes => Operation::Zero,
            BlkdebugIo::Discard => Operation::Discard,
            BlkdebugIo::Flush => Operation::Sync,
            BlkdebugIo::BlockStatus => Operation::Allocation,
        };
        Err(self.error(operation, range, fault.errno))
    }

    fn changed(&self) {
        self.faults.lock().changes += 1;
    }

    /// Reads whole blocks; what lies behind the end of the child is zeroes.
    async fn read_aligned(&self, offset: u64, into: Buffer) -> NodeTransfer {
        let piece_max_bytes = u64::from(self.transfer_max_bytes());
        read_in_pieces(offset, into, piece_max_bytes, async |offset, mut into| {
            let range = ByteRange::new(offset, into.len() as u64);
            if let Err(error) = self.check(BlkdebugIo::Read, Some(range)).await {
                return NodeTransfer {
                    buffer: into,
                    outcome: Err(error),
                };
            }
            let inside = range.clamp_end(self.length());
            if inside == range {
                return self.child.read(offset, into).await;
            }
            let part = Buffer::zeroed(to_usize(inside.length()));
            let read = self.child.read(inside.offset(), part).await;
            if read.outcome.is_ok() {
                into.as_mut_slice().fill(0);
                into.as_mut_slice()[..read.buffer.len()].copy_from_slice(read.buffer.as_slice());
            }
            NodeTransfer {
                buffer: into,
                outcome: read.outcome,
            }
        })
        .await
    }

    /// Writes whole blocks, less what lies behind the end of the child.
    async fn write_aligned(&self, offset: u64, from: Buffer) -> NodeTransfer {
        let piece_max_bytes = u64::from(self.transfer_max_bytes());
        write_in_pieces(offset, from, piece_max_bytes, async |offset, mut from| {
            let range = ByteRange::new(offset, from.len() as u64);
            if let Err(error) = self.check(BlkdebugIo::Write, Some(range)).await {
                return NodeTransfer {
                    buffer: from,
                    outcome: Err(error),
                };
            }
            let length = from.len();
            from.set_length(to_usize(range.clamp_end(self.length()).length()));
            let mut written = self.child.write(offset, from).await;
            written.buffer.set_length(length);
            written
        })
        .await
    }

    /// A write of whole blocks and the events around it.
    async fn announced_write(&self, offset: u64, from: Buffer) -> NodeTransfer {
        self.hear(DebugEvent::Pwritev);
        let written = self.write_aligned(offset, from).await;
        self.hear(DebugEvent::PwritevDone);
        self.changed();
        written
    }

    /// Reads the blocks around `range`, lets `change` at its bytes, writes them back.
    async fn modify(
        &self,
        range: ByteRange,
        change: impl FnOnce(&mut [u8]),
    ) -> Result<(), NodeError> {
        let outer = range.align_outward(self.alignment());
        let mut bytes = self.blocks_around(range, outer).await?;
        let start = to_usize(range.offset() - outer.offset());
        change(&mut bytes.as_mut_slice()[start..start + to_usize(range.length())]);
        self.announced_write(outer.offset(), bytes).await.outcome
    }

    /// The blocks of `outer`, read where `range` does not fill them.
    async fn blocks_around(&self, range: ByteRange, outer: ByteRange) -> Result<Buffer, NodeError> {
        let alignment = self.alignment();
        let (head, tail) = (range.offset() > outer.offset(), range.end() < outer.end());
        let mut bytes = Buffer::zeroed(to_usize(outer.length()));
        if outer.length() == alignment || (head && tail && outer.length() == 2 * alignment) {
            return self.read_edge(outer, head, tail).await;
        }
        if head {
            let (first, _) = outer.split_at(alignment);
            let read = self.read_edge(first, true, false).await?;
            bytes.as_mut_slice()[..read.len()].copy_from_slice(read.as_slice());
        }
        if tail {
            let (before, last) = outer.split_at(outer.length() - alignment);
            let read = self.read_edge(last, false, true).await?;
            bytes.as_mut_slice()[to_usize(before.length())..].copy_from_slice(read.as_slice());
        }
        Ok(bytes)
    }

    async fn read_edge(
        &self,
        blocks: ByteRange,
        head: bool,
        tail: bool,
    ) -> Result<Buffer, NodeError> {
        let tell = |head_event, tail_event| {
            for (concerned, event) in [(head, head_event), (tail, tail_event)] {
                if concerned {
                    self.hear(event);
                }
            }
        };
        tell(DebugEvent::PwritevRmwHead, DebugEvent::PwritevRmwTail);
        let bytes = Buffer::zeroed(to_usize(blocks.length()));
        let read = self.read_aligned(blocks.offset(), bytes).await;
        read.outcome?;
        tell(
            DebugEvent::PwritevRmwAfterHead,
            DebugEvent::PwritevRmwAfterTail,
        );
        Ok(read.buffer)
    }

    /// Zeroes whole blocks, in pieces that the limits allow; what they do not allow is written.
    async fn zero_aligned(&self, range: ByteRange, mode: ZeroMode) -> Result<(), NodeError> {
        let unit = self
            .alignment()
            .max(u64::from(self.options.get().opt_write_zero));
        let mut rest = range;
        while !rest.is_empty() {
            let piece = next_piece(rest, unit, self.options.get().max_write_zero);
            let outcome = if piece.length() < unit {
                Err(EOPNOTSUPP)
            } else {
                self.zero_piece(piece, mode).await
            };
            let done = match outcome {
                Ok(()) => piece,
                Err(EOPNOTSUPP) if !mode.no_fallback => {
                    let longest = COPY_CHUNK_BYTES.min(u64::from(self.transfer_max_bytes()));
                    let (part, _) = piece.split_at(longest);
                    let zeroes = Buffer::zeroed(to_usize(part.length()));
                    self.write_aligned(part.offset(), zeroes).await.outcome?;
                    part
                }
                Err(errno) => return Err(self.error(Operation::Zero, Some(piece), errno)),
            };
            (_, rest) = rest.split_at(done.length());
        }
        Ok(())
    }

    async fn zero_piece(&self, piece: ByteRange, mode: ZeroMode) -> Result<(), i32> {
        let checked = self.check(BlkdebugIo::WriteZeroes, Some(piece)).await;
        checked.map_err(|error| error.errno())?;
        let inside = piece.clamp_end(self.length());
        let zeroed = self.child.zero(inside, mode).await;
        zeroed.map_err(|error| error.errno())
    }
}

/// The first piece of `rest` that starts and ends at a multiple of `unit`, or the part before or behind those; at most
/// `longest` bytes if that is not 0.
fn next_piece(rest: ByteRange, unit: u64, longest: u32) -> ByteRange {
    let into_unit = rest.offset() % unit;
    let length = if into_unit > 0 {
        unit - into_unit
    } else {
        let whole = rest.length() - rest.length() % unit;
        let whole = if whole == 0 { rest.length() } else { whole };
        match u64::from(longest) {
            0 => whole,
            longest => whole.min(longest),
        }
    };
    rest.split_at(length).0
}

impl Node for BlkdebugNode {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn facts(&self) -> NodeFacts {
        let facts = self.child.facts();
        NodeFacts {
            request_alignment: match self.options.get().align {
                0 => facts.request_alignment,
                own => own,
            },
            transfer_max_bytes: self.transfer_max_bytes(),
            read_only: self.options.get().read_only,
            unmaps: facts.unmaps && self.options.get().discard == Discard::Unmap,
            ..facts
        }
    }

    fn status(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>> {
        Box::pin(async move {
            self.check(BlkdebugIo::BlockStatus, Some(range)).await?;
            self.child.status(range, extents_max).await
        })
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, into.len() as u64);
            if let Some(error) = self.refusal(Operation::Read, range) {
                return NodeTransfer {
                    buffer: into,
                    outcome: Err(error),
                };
            }
            let outer = range.align_outward(self.alignment());
            if outer == range {
                return self.read_aligned(offset, into).await;
            }
            let mut into = into;
            let bytes = Buffer::zeroed(to_usize(outer.length()));
            let read = self.read_aligned(outer.offset(), bytes).await;
            if read.outcome.is_ok() {
                let (start, length) = (to_usize(offset - outer.offset()), into.len());
                into.as_mut_slice()
                    .copy_from_slice(&read.buffer.as_slice()[start..start + length]);
            }
            NodeTransfer {
                buffer: into,
                outcome: read.outcome,
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
            if self.options.get().detect_zeroes != DetectZeroes::Off && is_zero(from.as_slice()) {
                let mode = ZeroMode {
                    may_unmap: self.options.get().detect_zeroes == DetectZeroes::Unmap,
                    no_fallback: false,
                };
                let outcome = self.zero(range, mode).await;
                return NodeTransfer {
                    buffer: from,
                    outcome,
                };
            }
            let outer = range.align_outward(self.alignment());
            let _turn = self.writes.enter(outer).await;
            if outer == range {
                return self.announced_write(offset, from).await;
            }
            let outcome = self
                .modify(range, |bytes| bytes.copy_from_slice(from.as_slice()))
                .await;
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
            let alignment = self.alignment();
            let _turn = self.writes.enter(range.align_outward(alignment)).await;
            let middle = range.align_inward(alignment);
            if middle.is_empty() {
                return self.modify(range, |bytes| bytes.fill(0)).await;
            }
            let head = ByteRange::between(range.offset(), middle.offset());
            let tail = ByteRange::between(middle.end(), range.end());
            if !head.is_empty() {
                self.modify(head, |bytes| bytes.fill(0)).await?;
            }
            self.hear(DebugEvent::PwritevZero);
            let zeroed = self.zero_aligned(middle, mode).await;
            self.hear(DebugEvent::PwritevDone);
            self.changed();
            zeroed?;
            if !tail.is_empty() {
                self.modify(tail, |bytes| bytes.fill(0)).await?;
            }
            Ok(())
        })
    }

    /// Of the rules, those for writing apply, to the bytes that were asked for.
    fn fill(
        &self,
        range: ByteRange,
        with: Fill,
        memory: Option<Buffer>,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            if let Some(error) = self.refusal(Operation::Write, range) {
                return Err(error);
            }
            self.check(BlkdebugIo::Write, Some(range)).await?;
            self.changed();
            self.child.fill(range, with, memory).await
        })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            if let Some(error) = self.refusal(Operation::Discard, range) {
                return Err(error);
            }
            if self.options.get().discard == Discard::Ignore {
                return Ok(());
            }
            let alignment = self.alignment();
            let unit = alignment.max(u64::from(self.options.get().opt_discard));
            let whole = range.align_inward(alignment);
            let _turn = self.writes.enter(whole).await;
            let mut rest = whole;
            while !rest.is_empty() {
                let piece = next_piece(rest, unit, self.options.get().max_discard);
                (_, rest) = rest.split_at(piece.length());
                if piece.length() < u64::from(self.options.get().opt_discard) {
                    continue;
                }
                let discarded = match self.check(BlkdebugIo::Discard, Some(piece)).await {
                    Ok(()) => self.child.discard(piece).await,
                    Err(error) => Err(error),
                };
                self.changed();
                match discarded {
                    Err(error) if error.errno() != EOPNOTSUPP => return Err(error),
                    _ => {}
                }
            }
            Ok(())
        })
    }

    fn shown(&self) -> Option<Rc<dyn Node>> {
        Some(Rc::clone(&self.child))
    }

    fn backing(&self) -> Option<Rc<dyn Node>> {
        self.child.backing()
    }

    fn names_backing(&self) -> bool {
        self.child.names_backing()
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            let (changes, flushed) = {
                let faults = self.faults.lock();
                (faults.changes, faults.flushed)
            };
            if self.options.get().read_only {
                return Ok(());
            }
            // As everywhere: what has been flushed and not written to since needs no flush, and meets no rule.
            if !self.options.get().no_flush && flushed < changes {
                self.check(BlkdebugIo::Flush, None).await?;
            }
            self.child.flush().await?;
            self.faults.lock().flushed = changes;
            Ok(())
        })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            if self.options.get().read_only {
                let range = ByteRange::new(0, length_bytes);
                return Err(self.error(Operation::Resize, Some(range), EBADF));
            }
            self.changed();
            self.child.resize(length_bytes).await
        })
    }

    fn exact_length_bytes(&self) -> u64 {
        self.child.exact_length_bytes()
    }

    /// No rule is about reserving room.
    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            if self.options.get().read_only {
                return Err(self.error(Operation::Preallocate, Some(range), EBADF));
            }
            self.changed();
            self.child.preallocate(range, how).await
        })
    }

    fn listens(&self) -> bool {
        true
    }

    fn hear(&self, event: DebugEvent) {
        self.faults.lock().rules.hear(event);
    }

    fn reopen<'a>(
        &'a self,
        context: &'a DataContext,
        plan: &'a NodePlan,
    ) -> LocalFuture<'a, Result<(), EngineError>> {
        Box::pin(async move {
            let NodePlan::Blkdebug { child, options, .. } = plan else {
                return Err(cannot_become(&self.name));
            };
            if !Rc::ptr_eq(&child_of(context, &self.name, *child)?, &self.child) {
                let text = format!("Node '{}' cannot be put on another node", self.name);
                return Err(EngineError::generic(text));
            }
            self.options.set(*options);
            Ok(())
        })
    }
}
