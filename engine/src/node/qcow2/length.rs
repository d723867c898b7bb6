//! Another length, and room reserved in advance.

use blockyard_images::qcow2::lookup::{Extent, Source};
use blockyard_images::qcow2::reserve::WritePlan;
use blockyard_storage::error::EBADF;
use blockyard_storage::{Buffer, ByteRange, Operation, Preallocation, Storage};

use crate::error::NodeError;
use crate::node::qcow2::mover::Mover;
use crate::node::qcow2::pieces::to_usize;

/// Longest piece of old content that is moved to reserved room at once.
const MOVED_BYTES_MAX: u64 = 1 << 20;

impl Mover {
    /// See [`Node::resize`](crate::node::Node::resize). What is added reads as zeroes from the moment when it is there, whatever is below, and whatever
    /// was left in the cluster that the old end cuts.
    pub(super) async fn change_length(&self, length_bytes: u64) -> Result<(), NodeError> {
        let all = ByteRange::new(0, length_bytes);
        self.check_known(Operation::Resize, all)?;
        if self.read_only() {
            return Err(self.error(Operation::Resize, Some(all), EBADF));
        }
        self.zero_behind_end(length_bytes).await?;
        let resized = self.image.resize(length_bytes, self.below_bytes()).await;
        resized.map_err(|error| self.failed(error, Operation::Resize, Some(all)))
    }

    /// Length of what is below, in bytes.
    pub(super) fn below_bytes(&self) -> u64 {
        self.backing().map_or(0, |node| node.facts().length_bytes)
    }

    /// Makes what a longer disk adds to its last cluster read as zeroes, durably.
    pub(super) async fn zero_behind_end(&self, length_bytes: u64) -> Result<(), NodeError> {
        let added = ByteRange::between(self.image.length_bytes(), length_bytes);
        let cluster_bytes = self.image.geometry().cluster_bytes();
        let to_boundary = added.offset().next_multiple_of(cluster_bytes) - added.offset();
        let (in_last_cluster, _) = added.split_at(to_boundary);
        if !in_last_cluster.is_empty() && !self.is_known_zero(in_last_cluster).await? {
            self.write_zeroes(in_last_cluster).await?;
            // The length is durable at once.
            self.flush().await?;
        }
        Ok(())
    }

    /// See [`Node::preallocate`](crate::node::Node::preallocate).
    pub(super) async fn reserve_room(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> Result<(), NodeError> {
        self.check_known(Operation::Preallocate, range)?;
        match how {
            Preallocation::Off => Ok(()),
            Preallocation::Full => self.write_zeroes(range).await,
            Preallocation::Falloc => {
                let mut rest = range;
                while !rest.is_empty() {
                    let (piece, _) = rest.split_at(MOVED_BYTES_MAX);
                    let extent = self.extent(piece).await?;
                    let covered = self.reserve_extent(extent).await?;
                    rest = ByteRange::between(covered.end(), rest.end());
                }
                Ok(())
            }
        }
    }

    /// Gives the front of an extent room in the file, and says how much of it; its content stays, also what others write
    /// there meanwhile.
    async fn reserve_extent(&self, extent: Extent) -> Result<ByteRange, NodeError> {
        let range = extent.range;
        let data = self.data();
        match extent.source {
            Source::Data { at } => {
                let there = ByteRange::new(at.0, range.length());
                let reserved = data.preallocate(there, Preallocation::Falloc).await;
                reserved.map_err(|error| data.node_error(&error))?;
                Ok(range)
            }
            // It has the room that it needs.
            Source::Compressed(_) => Ok(range),
            Source::Zero { .. } | Source::Unallocated => {
                drop(extent.lease);
                self.fill_with_old(range).await
            }
        }
    }

    /// Writes the old content of the front of `range` to new room, zeroes too: an image has no room but where something was
    /// written. Says how much of it.
    async fn fill_with_old(&self, range: ByteRange) -> Result<ByteRange, NodeError> {
        let mut wanted = range;
        loop {
            let reservation = match self.plan(wanted).await? {
                // Somebody has written there.
                WritePlan::InPlace(place) => {
                    let covered = place.range();
                    place.done();
                    return Ok(covered);
                }
                WritePlan::Allocate(reservation) => reservation,
            };
            let covered = reservation.range();
            // What holds no data now gets none before this has ended. What does may be written in place at any time.
            let now = match self.extent(covered).await {
                Ok(now) => now,
                Err(error) => {
                    reservation.give_back();
                    return Err(error);
                }
            };
            let is_empty = matches!(now.source, Source::Zero { .. } | Source::Unallocated);
            if !is_empty || now.range != covered {
                reservation.give_back();
                if !is_empty {
                    return Ok(now.range);
                }
                wanted = now.range;
                continue;
            }
            let old = Buffer::zeroed(to_usize(covered.length()));
            let old = self.read_range(covered, old).await;
            if let Err(error) = old.outcome {
                reservation.give_back();
                return Err(error);
            }
            let written = self.carry_out(WritePlan::Allocate(reservation), old.buffer);
            return written.await.outcome.map(|()| covered);
        }
    }
}
