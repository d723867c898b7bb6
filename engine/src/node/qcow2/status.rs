//! What the layer itself holds.

use blockyard_images::qcow2::lookup::Source;
use blockyard_storage::ByteRange;

use crate::error::NodeError;
use crate::node::StatusExtent;
use crate::node::qcow2::mover::Mover;

/// Tables that one question reads at most, so that it ends however much of an image is of one kind.
const TABLES_MAX: usize = 16;

impl Mover {
    /// The layer's own extents; see [`Node::status`](crate::node::Node::status).
    pub(super) async fn status_of(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> Result<Vec<StatusExtent>, NodeError> {
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
            let status = self.status_extent(mapped.range, mapped.source);
            let full = extents.len() >= extents_max.max(1);
            match extents.last_mut() {
                Some(last) if (last.zero, last.allocated) == (status.zero, status.allocated) => {
                    last.range = ByteRange::between(last.range.offset(), status.range.end());
                }
                _ if full => break,
                _ => extents.push(status),
            }
            rest = ByteRange::between(status.range.end(), rest.end());
        }
        Ok(extents)
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
