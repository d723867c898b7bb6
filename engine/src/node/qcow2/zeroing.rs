//! Zeroes and discards: metadata alone where that is enough, written zeroes where it is not.

use blockyard_images::qcow2::lookup::Source;
use blockyard_images::qcow2::units::Version;
use blockyard_images::qcow2::zero::{ZeroRequest, Zeroing};
use blockyard_storage::error::EOPNOTSUPP;
use blockyard_storage::{Buffer, ByteRange, Operation, ZeroMode};

use crate::error::NodeError;
use crate::limits::STATUS_EXTENTS_MAX;
use crate::node::chain::{Content, chain_status};
use crate::node::qcow2::mover::Mover;
use crate::node::qcow2::pieces::{in_pieces, to_usize};

/// Most zeroes written at once.
const WRITE_BYTES_MAX: u64 = 1 << 20;

impl Mover {
    /// See [`Node::zero`](crate::node::Node::zero).
    pub(super) async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<(), NodeError> {
        if let Some(error) = self.refusal(Operation::Zero, range) {
            return Err(error);
        }
        let may_unmap = mode.may_unmap && self.unmaps();
        self.zero_range(range, ZeroMode { may_unmap, ..mode }).await
    }

    /// See [`Node::discard`](crate::node::Node::discard).
    pub(super) async fn discard(&self, range: ByteRange) -> Result<(), NodeError> {
        if let Some(error) = self.refusal(Operation::Discard, range) {
            return Err(error);
        }
        if range.is_empty() || !self.unmaps() {
            return Ok(());
        }
        // An image of version 2 would show what is below, were it only named yet.
        let is_v2 = self.image.geometry().version() == Version::V2;
        let has_backing = self.backing().is_some() || is_v2 && self.names_backing();
        let discarded = self.image.discard(range, has_backing).await;
        discarded.map_err(|error| self.failed(error, Operation::Discard, Some(range)))
    }

    /// Makes `range` read as zeroes.
    async fn zero_range(&self, range: ByteRange, mode: ZeroMode) -> Result<(), NodeError> {
        let mut rest = range;
        while !rest.is_empty() {
            let part = self.next_part(rest);
            let done = self.zero_front(part, mode).await?;
            rest = ByteRange::between(done.end(), rest.end());
        }
        Ok(())
    }

    /// The front of `range`: part of a unit, or whole ones. The last unit is whole at the end of the disk.
    fn next_part(&self, range: ByteRange) -> ByteRange {
        let unit = self.image.geometry().subcluster_bytes();
        let from_unit = range.offset() % unit;
        if from_unit > 0 {
            return range.split_at(unit - from_unit).0;
        }
        let whole = range.length() - range.length() % unit;
        match range.end() == self.length() || whole == 0 {
            true => range,
            false => range.split_at(whole).0,
        }
    }

    /// Makes the front of a part read as zeroes, and says how far.
    async fn zero_front(&self, part: ByteRange, mode: ZeroMode) -> Result<ByteRange, NodeError> {
        let geometry = self.image.geometry();
        let unit = part.align_outward(geometry.subcluster_bytes());
        let to_the_end = part.end() == unit.end() || part.end() == self.length();
        let partial = part.offset() != unit.offset() || !to_the_end;
        if partial && self.is_own_zero(part).await? {
            return Ok(part);
        }
        let is_v2 = geometry.version() == Version::V2;
        let zero_below = match partial || is_v2 {
            // Nobody looks at it.
            false => false,
            // Zeroes that are nothing but absence would give way to a backing that is attached later.
            true if is_v2 && (self.backing().is_some() || self.names_backing()) => false,
            true => self.is_zero_below(unit).await?,
        };
        let request = ZeroRequest {
            range: part,
            may_unmap: mode.may_unmap,
            zero_below,
        };
        let zeroed = self.image.zero(request).await;
        match zeroed.map_err(|error| self.failed(error, Operation::Zero, Some(part)))? {
            Zeroing::Done(done) => Ok(done),
            Zeroing::Write(_) if mode.no_fallback => {
                Err(self.error(Operation::Zero, Some(part), EOPNOTSUPP))
            }
            Zeroing::Write(front) => {
                // Where one unit of an old image has to be written, the next ones have to as well.
                let (many, _) = part.split_at(WRITE_BYTES_MAX.max(front.length()));
                let range = if is_v2 { many } else { front };
                self.write_zeroes(range).await.map(|()| range)
            }
        }
    }

    /// Whether the image itself says that `range` is zeroes, whatever is below.
    async fn is_own_zero(&self, range: ByteRange) -> Result<bool, NodeError> {
        let mut rest = range;
        while !rest.is_empty() {
            let extent = self.extent(rest).await?;
            if !matches!(extent.source, Source::Zero { .. }) {
                return Ok(false);
            }
            rest = ByteRange::between(extent.range.end(), rest.end());
        }
        Ok(true)
    }

    /// Whether what is below this layer reads as zeroes in `range`. What cannot tell may have data.
    async fn is_zero_below(&self, range: ByteRange) -> Result<bool, NodeError> {
        let Some(backing) = self.backing() else {
            return Ok(true);
        };
        let mut rest = range.clamp_end(backing.facts().length_bytes);
        while !rest.is_empty() {
            let Ok(extents) = chain_status(&backing, None, rest, STATUS_EXTENTS_MAX).await else {
                return Ok(false);
            };
            let known = extents
                .last()
                .map_or(rest.offset(), |extent| extent.range.end());
            if known <= rest.offset()
                || extents.iter().any(|extent| extent.content != Content::Zero)
            {
                return Ok(false);
            }
            rest = ByteRange::between(known, rest.end());
        }
        Ok(true)
    }

    /// Writes zeroes as data.
    pub(super) async fn write_zeroes(&self, range: ByteRange) -> Result<(), NodeError> {
        in_pieces(
            range,
            async |rest| {
                let (piece, _) = rest.split_at(WRITE_BYTES_MAX);
                let zeroes = Buffer::zeroed(to_usize(piece.length()));
                let written = async move { self.write_range(piece, zeroes).await.outcome };
                Ok((piece, Box::pin(written) as _))
            },
            |()| {},
        )
        .await
    }
}
