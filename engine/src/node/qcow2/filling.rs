//! Filling: what is below is put into the image where that holds nothing, many places at once, beside everybody who writes.

use std::cell::Cell;
use std::future::ready;

use blockyard_images::qcow2::fill::Filling;
use blockyard_images::qcow2::reserve::Reservation;
use blockyard_images::qcow2::zero::Zeroing;
use blockyard_storage::buffer::BUFFER_SLOT_BYTES;
use blockyard_storage::{Buffer, ByteRange, Operation};

use crate::error::NodeError;
use crate::node::Fill;
use crate::node::qcow2::mover::Mover;
use crate::node::qcow2::pieces::{in_pieces, to_usize};
use crate::node::zeroes::is_zero;

impl Mover {
    /// See [`Node::fill`](crate::node::Node::fill).
    pub(super) async fn fill_range(
        &self,
        range: ByteRange,
        with: Fill,
        memory: Option<Buffer>,
    ) -> Result<(), NodeError> {
        if let Some(error) = self.refusal(Operation::Write, range) {
            return Err(error);
        }
        let range = range
            .align_outward(self.image.geometry().subcluster_bytes())
            .clamp_end(self.image.length_bytes());
        match with {
            Fill::Bytes => self.fill_with_bytes(range, &Cell::new(memory)).await,
            Fill::Zeroes => self.fill_with_zeroes(range).await,
        }
    }

    async fn fill_with_zeroes(&self, range: ByteRange) -> Result<(), NodeError> {
        let mut rest = range;
        while !rest.is_empty() {
            let filled = self.image.fill_zeroes(rest).await;
            match filled.map_err(|error| self.failed(error, Operation::Write, Some(rest)))? {
                Zeroing::Done(done) => rest = ByteRange::between(done.end(), rest.end()),
                // The range may be far longer than what one request may take in memory.
                Zeroing::Write(_) => {
                    let (piece, after) = rest.split_at(BUFFER_SLOT_BYTES as u64);
                    self.fill_with_bytes(piece, &Cell::default()).await?;
                    rest = after;
                }
            }
        }
        Ok(())
    }

    /// Bytes pass through `spare` as long as it is there.
    async fn fill_with_bytes(
        &self,
        range: ByteRange,
        spare: &Cell<Option<Buffer>>,
    ) -> Result<(), NodeError> {
        in_pieces(
            range,
            async |rest| {
                let (front, _) = rest.split_at(BUFFER_SLOT_BYTES as u64);
                let filling = self.image.prepare_fill(front).await;
                let failed = |error| self.failed(error, Operation::Write, Some(front));
                Ok(match filling.map_err(failed)? {
                    Filling::Held(held) => (held, Box::pin(ready(Ok(()))) as _),
                    Filling::Room(room) => {
                        (room.range(), Box::pin(self.fill_room(room, spare)) as _)
                    }
                })
            },
            |()| {},
        )
        .await
    }

    /// Copies what is below to where it has its place from now on.
    async fn fill_room(
        &self,
        room: Reservation,
        spare: &Cell<Option<Buffer>>,
    ) -> Result<(), NodeError> {
        let range = room.range();
        let length = to_usize(range.length());
        let buffer = match spare.take() {
            Some(mut buffer) if buffer.capacity() >= length => {
                buffer.set_length(length);
                buffer
            }
            _ => self.scratch(range.length()),
        };
        let read = self.read_below(range, buffer).await;
        if let Err(error) = read.outcome {
            room.give_back();
            return Err(error);
        }
        if self.image.has_zeroes() && is_zero(read.buffer.as_slice()) {
            // Whoever takes the turn in between may write there: then that stays.
            room.give_back();
            spare.set(Some(read.buffer));
            return Box::pin(self.fill_with_zeroes(range)).await;
        }
        let written = self.fill(&room, read.buffer).await;
        spare.set(Some(written.buffer));
        if let Err(error) = written.outcome {
            room.give_back();
            return Err(error);
        }
        let published = self.image.publish(room).await;
        published.map_err(|error| self.failed(error, Operation::Write, Some(range)))
    }
}
