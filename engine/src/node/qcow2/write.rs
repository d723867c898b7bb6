//! Writing: in place where the guest's bytes have a place of their own, else to new room, whose edges are filled with what
//! was there before; only then does the image lead there.

use std::cell::RefCell;

use blockyard_images::qcow2::lookup::Source;
use blockyard_images::qcow2::reserve::{InPlace, Reservation, WritePlan};
use blockyard_images::qcow2::units::HostOffset;
use blockyard_storage::{Buffer, ByteRange, Operation, Storage, ZeroMode};
use futures_util::future::join3;

use crate::error::NodeError;
use crate::node::NodeTransfer;
use crate::node::fault_rules::DebugEvent;
use crate::node::qcow2::mover::Mover;
use crate::node::qcow2::pieces::{Parts, in_pieces, is_in_blocks, place_in};
use crate::node::qcow2::read::transferred;
use crate::node::zeroes::is_zero;

/// Longest write that edges are merged into: beyond it, copying the data costs more than requests of their own.
const MERGED_BYTES_MAX: u64 = 256 << 10;

/// Longest edge of zeroes that is written as data.
const ZERO_EDGE_BYTES_MAX: u64 = 64 << 10;

/// What an edge is filled with.
enum Edge {
    /// Nothing has to be written: there is no edge, or it reads as zeroes already where it goes.
    Nothing,
    Zeroes(ByteRange),
    Bytes(ByteRange, Buffer),
}

impl Edge {
    fn length(&self) -> u64 {
        match self {
            Edge::Nothing => 0,
            Edge::Zeroes(range) | Edge::Bytes(range, _) => range.length(),
        }
    }

    /// Whether it is better made of zeroes than written.
    fn is_long_zeroes(&self) -> bool {
        matches!(self, Edge::Zeroes(range) if range.length() > ZERO_EDGE_BYTES_MAX)
    }
}

impl Mover {
    /// See [`Node::write`](crate::node::Node::write).
    pub(super) async fn write(&self, offset: u64, from: Buffer) -> NodeTransfer {
        let range = ByteRange::new(offset, from.len() as u64);
        let outcome = match self.refusal(Operation::Write, range) {
            Some(error) => Err(error),
            None => match self.zeroes_instead(from.as_slice()) {
                // Boxed, as what is rare would make every write larger, which has its price in moving it.
                Some(mode) => Box::pin(self.zero(range, mode)).await,
                None => {
                    return match self.place_now(range) {
                        Some(place) => self.write_in_place(place, from).await,
                        None => Box::pin(self.write_range(range, from)).await,
                    };
                }
            },
        };
        NodeTransfer {
            buffer: from,
            outcome,
        }
    }

    /// Where the whole of `range` is, if it is to be written there and that is known at once.
    fn place_now(&self, range: ByteRange) -> Option<InPlace> {
        let place = self.image.prepare_write_now(range)?;
        if place.range() == range {
            return Some(place);
        }
        // Nobody writes there yet.
        place.done();
        None
    }

    /// See [`Node::flush`](crate::node::Node::flush).
    pub(super) async fn flush(&self) -> Result<(), NodeError> {
        self.announce(DebugEvent::FlushToOs);
        let flushed = self.image.flush().await;
        flushed.map_err(|error| self.failed(error, Operation::Sync, None))?;
        self.behind.flushed();
        Ok(())
    }

    /// See [`Node::close`](crate::node::Node::close).
    pub(super) async fn close(&self) -> Result<(), NodeError> {
        self.decompressed.clear();
        self.behind.end().await;
        let closed = self.image.close().await;
        closed.map_err(|error| self.failed(error, Operation::Sync, None))?;
        let clusters = self.image.given_up_clusters();
        if clusters > 0 {
            tracing::warn!(
                node = self.name,
                clusters,
                "clusters that were given up stay counted: 'check -r leaks' gives them back"
            );
        }
        Ok(())
    }

    /// Writes the whole of `from`, which is as long as `range`.
    pub(super) async fn write_range(&self, range: ByteRange, from: Buffer) -> NodeTransfer {
        if range.is_empty() {
            return NodeTransfer {
                buffer: from,
                outcome: Ok(()),
            };
        }
        let first = match self.plan(range).await {
            Ok(plan) if covered(&plan) == range => return self.carry_out(plan, from).await,
            Ok(first) => RefCell::new(Some(first)),
            Err(error) => {
                return NodeTransfer {
                    buffer: from,
                    outcome: Err(error),
                };
            }
        };
        let parts = Parts::of(range, from);
        let outcome = in_pieces(
            range,
            async |rest| {
                let known = first.borrow_mut().take();
                let plan = match known {
                    Some(plan) => plan,
                    None => self.plan(rest).await?,
                };
                let covered = covered(&plan);
                let (part, parts) = (parts.take_front(covered), &parts);
                let written = async move {
                    let written = self.write_piece(plan, part).await;
                    parts.put_back(covered, written.buffer);
                    written.outcome
                };
                Ok((covered, Box::pin(written) as _))
            },
            |()| {},
        )
        .await;
        parts.transfer(&self.name, (Operation::Write, range), outcome)
    }

    /// Writes a part of a buffer: from where it is, unless that would make a disk's driver copy it.
    async fn write_piece(&self, plan: WritePlan, part: Buffer) -> NodeTransfer {
        if is_in_blocks(&part) {
            return self.carry_out(plan, part).await;
        }
        let mut copy = self.scratch(part.len() as u64);
        copy.as_mut_slice().copy_from_slice(part.as_slice());
        NodeTransfer {
            buffer: part,
            outcome: self.carry_out(plan, copy).await.outcome,
        }
    }

    pub(super) async fn plan(&self, range: ByteRange) -> Result<WritePlan, NodeError> {
        let planned = self.image.prepare_write(range).await;
        planned.map_err(|error| self.failed(error, Operation::Write, Some(range)))
    }

    /// Writes `from` where the plan says.
    pub(super) async fn carry_out(&self, plan: WritePlan, from: Buffer) -> NodeTransfer {
        match plan {
            WritePlan::InPlace(place) => self.write_in_place(place, from).await,
            WritePlan::Allocate(reservation) => {
                let range = reservation.range();
                let NodeTransfer { buffer, outcome } = self.fill(&reservation, from).await;
                // Nothing is under way any more, however it ended.
                let outcome = match outcome {
                    Ok(()) => self
                        .image
                        .publish(reservation)
                        .await
                        .map_err(|error| self.failed(error, Operation::Write, Some(range))),
                    Err(error) => {
                        reservation.give_back();
                        Err(error)
                    }
                };
                NodeTransfer { buffer, outcome }
            }
        }
    }

    async fn write_in_place(&self, place: InPlace, from: Buffer) -> NodeTransfer {
        let written = self.write_data(place.at(), from).await;
        place.done();
        written
    }

    async fn write_data(&self, at: HostOffset, from: Buffer) -> NodeTransfer {
        self.announce(DebugEvent::WriteAio);
        let data = self.data();
        transferred(data, data.write(at.0, from).await)
    }

    /// Writes `from` and the edges of its new room, together where that costs little.
    pub(super) async fn fill(&self, room: &Reservation, from: Buffer) -> NodeTransfer {
        self.reserve_ahead(room).await;
        let edges = async {
            let before = self.edge(room.fill_before(), room.reads_zero()).await?;
            let after = self.edge(room.fill_after(), room.reads_zero()).await?;
            Ok((before, after))
        };
        let (before, after) = match edges.await {
            Ok((Edge::Nothing, Edge::Nothing)) => return self.write_data(room.at(), from).await,
            Ok(edges) => edges,
            Err(error) => {
                return NodeTransfer {
                    buffer: from,
                    outcome: Err(error),
                };
            }
        };
        let whole = before.length() + room.range().length() + after.length();
        if whole > MERGED_BYTES_MAX || before.is_long_zeroes() || after.is_long_zeroes() {
            let data = self.write_data(room.at(), from);
            let (before, written, after) = join3(
                self.write_edge(room, before),
                data,
                self.write_edge(room, after),
            )
            .await;
            return NodeTransfer {
                buffer: written.buffer,
                outcome: written.outcome.and(before).and(after),
            };
        }
        let start = room.range().offset() - before.length();
        let whole = ByteRange::new(start, whole);
        let mut merged = self.scratch(whole.length());
        let bytes = merged.as_mut_slice();
        bytes[place_in(whole, room.range())].copy_from_slice(from.as_slice());
        for edge in [before, after] {
            match edge {
                Edge::Nothing => {}
                Edge::Zeroes(range) => bytes[place_in(whole, range)].fill(0),
                Edge::Bytes(range, old) => {
                    bytes[place_in(whole, range)].copy_from_slice(old.as_slice());
                }
            }
        }
        let outcome = self.write_data(room.at_of(start), merged).await.outcome;
        NodeTransfer {
            buffer: from,
            outcome,
        }
    }

    /// The old content of an edge. What lies behind the end of the disk is zeroes.
    async fn edge(&self, range: ByteRange, reads_zero: bool) -> Result<Edge, NodeError> {
        let zeroes = |range: ByteRange| match reads_zero || range.is_empty() {
            true => Edge::Nothing,
            false => Edge::Zeroes(range),
        };
        let inside = range.clamp_end(self.image.length_bytes());
        if inside.is_empty() || self.is_known_zero(inside).await? {
            return Ok(zeroes(range));
        }
        self.announce(DebugEvent::CowRead);
        let mut old = self.scratch(inside.length());
        let read = self.read_old(inside, old).await;
        read.outcome?;
        old = read.buffer;
        if is_zero(old.as_slice()) {
            return Ok(zeroes(range));
        }
        if inside == range {
            return Ok(Edge::Bytes(range, old));
        }
        let mut padded = self.scratch(range.length());
        let (held, behind) = padded.as_mut_slice().split_at_mut(old.len());
        held.copy_from_slice(old.as_slice());
        behind.fill(0);
        Ok(Edge::Bytes(range, padded))
    }

    /// Reading is written in terms of pieces, and so is writing: boxed, so that their types end somewhere.
    fn read_old(
        &self,
        range: ByteRange,
        into: Buffer,
    ) -> blockyard_storage::LocalFuture<'_, NodeTransfer> {
        Box::pin(self.read_range(range, into))
    }

    /// Whether the image alone tells that `range` reads as zeroes.
    pub(super) async fn is_known_zero(&self, range: ByteRange) -> Result<bool, NodeError> {
        let mut rest = range;
        while !rest.is_empty() {
            let extent = self.extent(rest).await?;
            let zero = match extent.source {
                Source::Zero { .. } => true,
                Source::Unallocated => self.ends_before(extent.range),
                Source::Data { .. } | Source::Compressed(_) => false,
            };
            if !zero {
                return Ok(false);
            }
            rest = ByteRange::between(extent.range.end(), rest.end());
        }
        Ok(true)
    }

    async fn write_edge(&self, room: &Reservation, edge: Edge) -> Result<(), NodeError> {
        let data = self.data();
        let written = match edge {
            Edge::Nothing => return Ok(()),
            Edge::Zeroes(range) => {
                let zeroed = ByteRange::new(room.at_of(range.offset()).0, range.length());
                let mode = ZeroMode {
                    may_unmap: true,
                    no_fallback: false,
                };
                data.zero(zeroed, mode).await
            }
            Edge::Bytes(range, old) => {
                self.announce(DebugEvent::CowWrite);
                data.write(room.at_of(range.offset()).0, old).await.outcome
            }
        };
        written.map_err(|error| data.node_error(&error))
    }
}

/// The guest bytes of the request that a plan takes.
fn covered(plan: &WritePlan) -> ByteRange {
    match plan {
        WritePlan::InPlace(place) => place.range(),
        WritePlan::Allocate(reservation) => reservation.range(),
    }
}
