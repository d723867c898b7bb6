//! Reading: bytes come from wherever the image says they are.

use blockyard_images::qcow2::lookup::{Extent, Source};
use blockyard_storage::{Buffer, ByteRange, Operation, Storage, Transfer};

use crate::error::NodeError;
use crate::node::NodeTransfer;
use crate::node::child_storage::ChildStorage;
use crate::node::fault_rules::DebugEvent;
use crate::node::qcow2::mover::Mover;
use crate::node::qcow2::pieces::{Parts, in_pieces, is_in_blocks, to_usize};

impl Mover {
    /// Fills the whole of `into`, which is as long as `range`.
    pub(super) async fn read_range(&self, range: ByteRange, into: Buffer) -> NodeTransfer {
        if range.is_empty() {
            return NodeTransfer {
                buffer: into,
                outcome: Ok(()),
            };
        }
        let first = match self.extent(range).await {
            Ok(extent) if extent.range == range => return self.read_extent(extent, into).await,
            Ok(first) => first,
            Err(error) => {
                return NodeTransfer {
                    buffer: into,
                    outcome: Err(error),
                };
            }
        };
        let first = std::cell::RefCell::new(Some(first));
        let parts = Parts::of(range, into);
        let outcome = in_pieces(
            range,
            async |rest| {
                let known = first.borrow_mut().take();
                let extent = match known {
                    Some(extent) => extent,
                    None => self.extent(rest).await?,
                };
                let covered = extent.range;
                let part = parts.take_front(covered);
                let parts = &parts;
                let read = async move {
                    let read = self.read_piece(extent, part).await;
                    parts.put_back(covered, read.buffer);
                    read.outcome
                };
                Ok((covered, Box::pin(read) as _))
            },
            |()| {},
        )
        .await;
        parts.transfer(&self.name, (Operation::Read, range), outcome)
    }

    /// What is at the front of `range`.
    pub(super) async fn extent(&self, range: ByteRange) -> Result<Extent, NodeError> {
        let mapped = match self.image.map_now(range) {
            Some(mapped) => mapped,
            None => self.image.map(range).await,
        };
        mapped.map_err(|error| self.failed(error, Operation::Read, Some(range)))
    }

    /// Reads an extent into its part of a buffer: straight into place, unless that would make a disk's driver copy it.
    async fn read_piece(&self, extent: Extent, mut part: Buffer) -> NodeTransfer {
        let is_filled_here = match extent.source {
            Source::Zero { .. } | Source::Compressed(_) => true,
            // It may come from a disk, too, somewhere below.
            Source::Unallocated => self.ends_before(extent.range),
            Source::Data { .. } => false,
        };
        if is_in_blocks(&part) || is_filled_here {
            return self.read_extent(extent, part).await;
        }
        let read = self
            .read_extent(extent, self.scratch(part.len() as u64))
            .await;
        part.as_mut_slice().copy_from_slice(read.buffer.as_slice());
        NodeTransfer {
            buffer: part,
            outcome: read.outcome,
        }
    }

    /// Whether nothing of the backing, if there is one, shows in `range`.
    pub(super) fn ends_before(&self, range: ByteRange) -> bool {
        let backing = self.backing.borrow();
        let shown = backing.as_ref().map(|node| node.facts().length_bytes);
        shown.is_none_or(|length_bytes| length_bytes <= range.offset())
    }

    /// Reads an extent into `into`, which is as long.
    async fn read_extent(&self, extent: Extent, mut into: Buffer) -> NodeTransfer {
        // Holds the lease until the bytes are here.
        let Extent {
            range,
            source,
            lease: _lease,
        } = extent;
        match source {
            Source::Data { at } => {
                self.announce(DebugEvent::ReadAio);
                let data = self.data();
                transferred(data, data.read(at.0, into).await)
            }
            Source::Zero { .. } => {
                into.as_mut_slice().fill(0);
                NodeTransfer {
                    buffer: into,
                    outcome: Ok(()),
                }
            }
            Source::Unallocated => self.read_below(range, into).await,
            Source::Compressed(place) => self.read_compressed(range, place, into).await,
        }
    }

    /// Reads from the backing; behind its end, and without one, are zeroes.
    pub(super) async fn read_below(&self, range: ByteRange, mut into: Buffer) -> NodeTransfer {
        let backing = self.backing.borrow().clone();
        let length = into.len();
        let (mut outcome, mut held) = (Ok(()), 0);
        if let Some(backing) = backing {
            let inside = range.clamp_end(backing.facts().length_bytes);
            if !inside.is_empty() {
                self.announce(DebugEvent::ReadBackingAio);
                held = to_usize(inside.length());
                into.set_length(held);
                let read = backing.read(range.offset(), into).await;
                (into, outcome) = (read.buffer, read.outcome);
            }
        }
        into.set_length(length);
        into.as_mut_slice()[held..].fill(0);
        NodeTransfer {
            buffer: into,
            outcome,
        }
    }
}

/// The end of a transfer on a file of the image.
pub(super) fn transferred(
    storage: &ChildStorage,
    Transfer { buffer, outcome }: Transfer,
) -> NodeTransfer {
    NodeTransfer {
        buffer,
        outcome: outcome.map_err(|error| storage.node_error(&error)),
    }
}
