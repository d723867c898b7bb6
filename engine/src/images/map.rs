//! Where the bytes of a disk are kept: in which layer of its chain, as data, zeroes or compressed, and at which offset there.

use std::rc::Rc;

use blockyard_storage::ByteRange;

use crate::error::EngineError;
use crate::images::cancelled;
use crate::images::watcher::{ImageEvent, ImageWatcher};
use crate::limits::STATUS_EXTENTS_MAX;
use crate::node::{Node, Place};

/// Which part of the disk is to be looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapSpec {
    /// Its first byte.
    pub start: u64,
    /// How many bytes at most; `None`: all there are.
    pub length_bytes: Option<u64>,
    /// Of each layer from the top: from so many clusters in use on, holes are looked for where its image keeps data. `None`, and
    /// what is not named here: never.
    pub holes_from_clusters: Vec<Option<u64>>,
}

/// A run of bytes that are kept in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapExtent {
    /// First byte on the disk.
    pub start: u64,
    /// Length in bytes.
    pub length_bytes: u64,
    /// The layer that decides, counted from the top, which is 0.
    pub depth: u64,
    /// Whether that layer holds it; else none does, and it reads as zeroes.
    pub present: bool,
    /// Whether it reads as zeroes for certain.
    pub zero: bool,
    /// Whether it is kept as data; where it reads as zeroes too, as a hole of the layer's file.
    pub data: bool,
    /// Whether it is compressed.
    pub compressed: bool,
    /// Where the layer's file keeps it, as it is.
    pub offset: Option<u64>,
}

impl MapExtent {
    const fn kind(&self) -> (u64, [bool; 4]) {
        let kind = [self.present, self.zero, self.data, self.compressed];
        (self.depth, kind)
    }

    /// Whether `next`, which begins where this ends, is more of the same.
    fn continues(&self, next: &Self) -> bool {
        let in_place = match (self.offset, next.offset) {
            (Some(offset), Some(next)) => offset.checked_add(self.length_bytes) == Some(next),
            (None, None) => true,
            _ => false,
        };
        in_place && self.kind() == next.kind()
    }
}

/// Tells the watcher where the disk on a node is kept, in ascending order, neighbours of one kind merged.
///
/// # Errors
/// When a layer cannot tell; when it was cancelled.
pub(super) async fn run(
    node: Rc<dyn Node>,
    spec: MapSpec,
    watcher: &ImageWatcher,
) -> Result<(), EngineError> {
    let disk_bytes = node.facts().length_bytes;
    let end = spec.length_bytes.map_or(disk_bytes, |length| {
        spec.start.saturating_add(length).min(disk_bytes)
    });
    let finds_holes = finds_holes(&node, &spec.holes_from_clusters).await?;
    let mut rest = ByteRange::between(spec.start.min(end), end);
    let mut found: Vec<MapExtent> = Vec::new();
    while !rest.is_empty() {
        if watcher.is_cancelled() {
            return Err(cancelled());
        }
        let extent = first_extent(&node, rest, &finds_holes).await?;
        rest = ByteRange::between(rest.offset() + extent.length_bytes, rest.end());
        match found.last_mut() {
            Some(last) if last.continues(&extent) => last.length_bytes += extent.length_bytes,
            _ => found.push(extent),
        }
        // The last one may go on.
        if found.len() > STATUS_EXTENTS_MAX {
            let last = found.split_off(STATUS_EXTENTS_MAX);
            watcher.tell(ImageEvent::Mapped(found)).await;
            found = last;
        }
    }
    watcher.tell(ImageEvent::Mapped(found)).await;
    Ok(())
}

/// In which layers holes are looked for.
async fn finds_holes(
    top: &Rc<dyn Node>,
    from_clusters: &[Option<u64>],
) -> Result<Vec<bool>, EngineError> {
    let mut finds_holes = Vec::new();
    let mut layer = Some(Rc::clone(top));
    for from in from_clusters {
        let Some(node) = layer else { break };
        let has_clusters = match from {
            Some(clusters) => node.has_clusters(*clusters).await,
            None => Ok(false),
        };
        let has_clusters = has_clusters.map_err(|error| EngineError::generic(error.to_string()));
        finds_holes.push(has_clusters?);
        layer = node.backing();
    }
    Ok(finds_holes)
}

/// What is at the front of `rest`.
async fn first_extent(
    top: &Rc<dyn Node>,
    rest: ByteRange,
    finds_holes: &[bool],
) -> Result<MapExtent, EngineError> {
    let (mut node, mut bound, mut depth) = (Rc::clone(top), rest, 0);
    loop {
        let layer = usize::try_from(depth).ok();
        let finds_holes = layer.and_then(|layer| finds_holes.get(layer));
        let place = node.place(bound, finds_holes.copied().unwrap_or(false));
        let place = place.await;
        let place = place.map_err(|error| EngineError::generic(error.to_string()))?;
        let within = place.range.intersection(&bound);
        if within.is_empty() || within.offset() != bound.offset() {
            return Err(EngineError::generic("Internal error: no answer (bug)"));
        }
        bound = within;
        let below = node.backing().filter(|_| !place.allocated);
        let shows = below.filter(|below| bound.offset() < below.facts().length_bytes);
        let Some(below) = shows else {
            return Ok(extent(bound, depth, &place));
        };
        // What is behind the end of a shorter layer is decided above it.
        bound = bound.clamp_end(below.facts().length_bytes);
        node = below;
        depth += 1;
    }
}

fn extent(range: ByteRange, depth: u64, place: &Place) -> MapExtent {
    MapExtent {
        start: range.offset(),
        length_bytes: range.length(),
        depth,
        present: place.allocated,
        zero: place.zero || !place.allocated,
        data: place.data,
        compressed: place.compressed,
        offset: place.host_offset,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_merged_only_where_they_go_on() {
        let data = |start, offset| MapExtent {
            start,
            length_bytes: 10,
            depth: 0,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset,
        };
        assert!(data(0, Some(100)).continues(&data(10, Some(110))));
        assert!(!data(0, Some(100)).continues(&data(10, Some(120))));
        assert!(!data(0, Some(100)).continues(&data(10, None)));
        assert!(!data(0, Some(u64::MAX)).continues(&data(10, Some(0))));
        assert!(data(0, None).continues(&data(10, None)));
        let deeper = MapExtent {
            depth: 1,
            ..data(10, Some(110))
        };
        assert!(!data(0, Some(100)).continues(&deeper));
    }
}
