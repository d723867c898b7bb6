//! What the layer itself holds. A long run of data is looked at in the file too: clusters that were only assigned (images made
//! with preallocation) are holes there, and zeroes to everybody.

use blockyard_images::qcow2::lookup::Source;
use blockyard_images::qcow2::units::HostOffset;
use blockyard_storage::{ByteRange, Extent, Operation, Storage};

use crate::error::NodeError;
use crate::node::qcow2::mover::Mover;
use crate::node::{Place, StatusExtent};

/// Shortest run of data that is worth a question to the file system, in bytes.
const HOLES_FROM_BYTES: u64 = 1 << 20;

/// Tables that one question reads at most, so that it ends however much of an image is of one kind.
const TABLES_MAX: usize = 16;

impl Mover {
    /// The layer's own extents; see [`Node::status`](crate::node::Node::status).
    pub(super) async fn status_of(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> Result<Vec<StatusExtent>, NodeError> {
        self.check_known(Operation::Allocation, range)?;
        let mut extents: Vec<StatusExtent> = Vec::new();
        let (mut rest, mut tables) = (range, 0);
        while !rest.is_empty() && tables < TABLES_MAX {
            if self.image.map_now(rest).is_none() {
                tables += 1;
            }
            let mapped = match self.extent(rest).await {
                Ok(mapped) => mapped,
                Err(error) if extents.is_empty() => return Err(error),
                Err(_) => break,
            };
            let told = match mapped.source {
                Source::Data { at } if mapped.range.length() >= HOLES_FROM_BYTES => {
                    self.holes_in(mapped.range, at, extents_max).await
                }
                source => vec![self.status_extent(mapped.range, source)],
            };
            for status in told {
                let full = extents.len() >= extents_max.max(1);
                match extents.last_mut() {
                    Some(last)
                        if (last.zero, last.allocated) == (status.zero, status.allocated) =>
                    {
                        last.range = ByteRange::between(last.range.offset(), status.range.end());
                    }
                    _ if full => return Ok(extents),
                    _ => extents.push(status),
                }
                rest = ByteRange::between(status.range.end(), rest.end());
            }
        }
        Ok(extents)
    }

    /// A run of data that stands at `at`, as the file knows it. One that cannot tell holds data.
    async fn holes_in(
        &self,
        range: ByteRange,
        at: HostOffset,
        extents_max: usize,
    ) -> Vec<StatusExtent> {
        let there = ByteRange::new(at.0, range.length());
        let known = self.data().allocation(there, extents_max).await;
        let in_guest = |extent: Extent| StatusExtent {
            range: ByteRange::new(
                range.offset() + extent.range.offset().saturating_sub(at.0),
                extent.range.length(),
            ),
            zero: !extent.data,
            allocated: true,
        };
        match known {
            Ok(known) if !known.is_empty() => known.into_iter().map(in_guest).collect(),
            _ => vec![StatusExtent {
                range,
                zero: false,
                allocated: true,
            }],
        }
    }

    /// Where the front of a range is kept; see [`Node::place`](crate::node::Node::place).
    pub(super) async fn place_of(
        &self,
        range: ByteRange,
        finds_holes: bool,
    ) -> Result<Place, NodeError> {
        self.check_known(Operation::Allocation, range)?;
        let mapped = self.extent(range).await?;
        let (mut range, mut host_offset) = (mapped.range, None);
        let mut zero = matches!(mapped.source, Source::Zero { .. });
        match mapped.source {
            Source::Data { at } => {
                host_offset = Some(at.0);
                if finds_holes && let Some(first) = self.holes_in(range, at, 1).await.first() {
                    (range, zero) = (first.range, first.zero);
                }
            }
            Source::Compressed(_) | Source::Zero { allocated: false } => {}
            // Each cluster may have its room elsewhere, and only subclusters have some that hold nothing.
            Source::Zero { allocated: true } => {
                (range, host_offset) = self.kept(range);
            }
            Source::Unallocated if self.image.geometry().extended_l2() => {
                (range, host_offset) = self.kept(range);
            }
            Source::Unallocated => {}
        }
        Ok(Place {
            range,
            zero,
            allocated: mapped.source != Source::Unallocated,
            data: matches!(mapped.source, Source::Data { .. } | Source::Compressed(_)),
            compressed: matches!(mapped.source, Source::Compressed(_)),
            host_offset,
        })
    }

    /// See [`Node::has_clusters`].
    pub(super) async fn has_clusters(&self, at_least: u64) -> Result<bool, NodeError> {
        let counted = self.image.has_clusters(at_least).await;
        counted.map_err(|error| self.failed(error, Operation::Read, None))
    }

    fn kept(&self, range: ByteRange) -> (ByteRange, Option<u64>) {
        let (range, at) = self.image.kept_now(range);
        (range, at.map(|at| at.0))
    }

    /// The front of an extent that is of one kind for others.
    fn status_extent(&self, range: ByteRange, source: Source) -> StatusExtent {
        let (zero, allocated) = match source {
            Source::Data { .. } | Source::Compressed(_) => (false, true),
            Source::Zero { .. } => (true, true),
            Source::Unallocated if self.ends_before(range) => (true, false),
            Source::Unallocated => {
                let shown = self.backing.borrow().as_ref().map(|node| node.facts());
                let end = shown.map_or(range.end(), |facts| facts.length_bytes);
                return StatusExtent {
                    range: range.clamp_end(end),
                    zero: false,
                    allocated: false,
                };
            }
        };
        StatusExtent {
            range,
            zero,
            allocated,
        }
    }
}
