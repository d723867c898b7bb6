//! From one header to another: whenever the power goes, the old one or the new one is read, whole.
//!
//! A write of 512 bytes takes effect whole or not at all, and the first of them decide how all others are read. So what the
//! new header reads behind the first sector is written before, to bytes that the old one does not look at, and what both look
//! at must be the same. Where the backing file's name is in the way, it is moved to free bytes first, which is a switch, too.
//!
//! Spec: qcow2, "Header", "Header extensions", "Backing file name".

use std::ops::Range;
use std::rc::Rc;

use blockyard_storage::{Buffer, Storage, StorageError};

use crate::error::ImageError;
use crate::qcow2::layout::extensions::Extensions;
use crate::qcow2::layout::fields::{u32_at, u64_at};
use crate::qcow2::layout::header::{Header, V2_HEADER_BYTES, V3_HEADER_BYTES_MIN};
use crate::qcow2::units::Version;

/// What no power cut tears.
const SECTOR_BYTES: usize = 512;
/// Where place and length of the backing file's name stand.
const NAME_PLACE: Range<usize> = 8..20;

/// The way to another header: first clusters, of which each can follow the one before.
pub(in crate::qcow2) struct HeaderSwitch {
    now: Vec<u8>,
    pub(super) steps: Vec<Vec<u8>>,
}

impl HeaderSwitch {
    /// Finds the way from the first cluster `now`, which begins with `old`, to `new`. Nothing is written yet.
    ///
    /// # Errors
    /// When there is none: the extensions of an image fill more than a sector and would have to be overwritten.
    pub(in crate::qcow2) fn plan(
        now: Vec<u8>,
        old: &Header,
        new: &Header,
    ) -> Result<Self, ImageError> {
        let same_version = new.geometry.version() == old.geometry.version();
        let stays = same_version
            && new.backing_name == old.backing_name
            && new.extensions == old.extensions;
        if stays {
            let steps = vec![with_fields(&now, new)?];
            return Ok(Self { now, steps });
        }
        let mut reduced = new.clone();
        if old.extensions.feature_names.is_none() {
            // They only help programs that do not know the features.
            reduced.extensions.feature_names = None;
        }
        for new in [new, &reduced] {
            if let Some(steps) = steps_to(&now, old, new)? {
                return Ok(Self { now, steps });
            }
        }
        Err(ImageError::refused_because(
            "The header has no room to be changed safely",
            "its extensions, or the backing file name, lie where the new ones go",
        ))
    }

    /// Goes the way. What the new header leads to is durable already.
    ///
    /// # Errors
    /// What the storage says; the image has one header of the way or the next.
    pub(in crate::qcow2) async fn go(self, file: &Rc<dyn Storage>) -> Result<(), StorageError> {
        let mut now = self.now;
        for next in self.steps {
            if next == now {
                continue;
            }
            let sector = SECTOR_BYTES.min(next.len());
            let changed = |index: &usize| now.get(*index) != next.get(*index);
            let first = (sector..next.len()).find(changed);
            if let Some(first) = first {
                let last = (first..next.len()).rfind(changed).unwrap_or(first);
                write(file, first, next.get(first..=last)).await?;
                file.sync().await?;
            }
            write(file, 0, next.get(..sector)).await?;
            file.sync().await?;
            now = next;
        }
        Ok(())
    }
}

async fn write(
    file: &Rc<dyn Storage>,
    offset: usize,
    bytes: Option<&[u8]>,
) -> Result<(), StorageError> {
    let bytes = Buffer::copy_of(bytes.unwrap_or(&[]));
    file.write(offset as u64, bytes).await.outcome
}

/// The way, if there is one.
fn steps_to(now: &[u8], old: &Header, new: &Header) -> Result<Option<Vec<Vec<u8>>>, ImageError> {
    if let Some(step) = direct(now, old, new)? {
        return Ok(Some(vec![step]));
    }
    if let Some(moved) = with_name_moved(now, old, new)?
        && let Some(step) = direct(&moved, old, new)?
    {
        return Ok(Some(vec![moved, step]));
    }
    if old.extensions.feature_names.is_none() {
        return Ok(None);
    }
    // Most of what stands in the way may be the names of features, which nobody needs meanwhile.
    let mut lean = old.clone();
    lean.extensions.feature_names = None;
    let Some(first) = direct(now, old, &lean)? else {
        return Ok(None);
    };
    let rest = steps_to(&first, &lean, new)?;
    Ok(rest.map(|rest| std::iter::once(first).chain(rest).collect()))
}

/// The first cluster with other fields of the header, but for the place of the name; the extensions stay.
fn with_fields(now: &[u8], new: &Header) -> Result<Vec<u8>, ImageError> {
    let encoded = new.encode()?;
    let mut next = now.to_vec();
    let known = new.header_bytes().min(SECTOR_BYTES);
    for (index, byte) in encoded.iter().enumerate().take(known) {
        if let Some(slot) = next.get_mut(index)
            && !NAME_PLACE.contains(&index)
        {
            *slot = *byte;
        }
    }
    Ok(next)
}

/// The first cluster with the new header, if it can follow at once.
fn direct(now: &[u8], old: &Header, new: &Header) -> Result<Option<Vec<u8>>, ImageError> {
    let used = Used::of(now, old);
    let behind_all = used.end();
    for name_offset in [0, used.name.start, behind_all] {
        let Ok(encoded) = new.encode_with_name_at(name_offset) else {
            continue;
        };
        let mut next = now.to_vec();
        let Some(front) = next.get_mut(..encoded.len()) else {
            continue;
        };
        let gap = Gap::of(&encoded, new)?;
        for (index, (slot, byte)) in front.iter_mut().zip(&encoded).enumerate() {
            if !gap.contains(index) {
                *slot = *byte;
            }
        }
        if !used.differs_behind_sector(now, &next) {
            return Ok(Some(next));
        }
    }
    Ok(None)
}

/// The first cluster with the name behind everything that the old header and the new one use.
fn with_name_moved(now: &[u8], old: &Header, new: &Header) -> Result<Option<Vec<u8>>, ImageError> {
    let used = Used::of(now, old);
    if used.name.is_empty() || !used.ends_with_mark {
        return Ok(None);
    }
    let needed = new.header_bytes() + new.extensions.encode()?.len();
    let start = used.end().max(needed);
    let mut next = now.to_vec();
    let Some((name, slot)) = now
        .get(used.name.clone())
        .zip(next.get_mut(start..start + used.name.len()))
    else {
        return Ok(None);
    };
    slot.copy_from_slice(name);
    if let Some(slot) = next.get_mut(8..16) {
        slot.copy_from_slice(&(start as u64).to_be_bytes());
    }
    Ok((!used.differs_behind_sector(now, &next)).then_some(next))
}

/// Bytes between the extensions and the name, which nobody reads.
struct Gap(Range<usize>);

impl Gap {
    fn of(encoded: &[u8], header: &Header) -> Result<Self, ImageError> {
        let start = header.header_bytes() + header.extensions.encode()?.len();
        let name = header.backing_name.as_ref().map_or(0, Vec::len);
        Ok(Self(start..encoded.len().saturating_sub(name)))
    }

    fn contains(&self, index: usize) -> bool {
        self.0.contains(&index)
    }
}

/// Which bytes of the first cluster a header reads.
struct Used {
    extensions_end: usize,
    ends_with_mark: bool,
    name: Range<usize>,
}

impl Used {
    fn of(cluster: &[u8], header: &Header) -> Self {
        let from = match header.geometry.version() {
            Version::V2 => V2_HEADER_BYTES,
            Version::V3 => header.header_bytes().max(V3_HEADER_BYTES_MIN),
        };
        let name_offset = usize::try_from(u64_at(cluster, 8)).unwrap_or(usize::MAX);
        let (area_end, name) = match &header.backing_name {
            _ if name_offset == 0 => (cluster.len(), 0..0),
            None => (name_offset, 0..0),
            Some(_) => {
                // The field, not the name: what ends the name may be within.
                let length = usize::try_from(u32_at(cluster, 16)).unwrap_or(usize::MAX);
                let end = name_offset.saturating_add(length).min(cluster.len());
                (name_offset, name_offset..end)
            }
        };
        let area = cluster.get(from..area_end).unwrap_or(&[]);
        let (read, ends_with_mark) = Extensions::read_of(area);
        Self {
            extensions_end: from + read,
            ends_with_mark,
            name,
        }
    }

    fn end(&self) -> usize {
        self.extensions_end.max(self.name.end)
    }

    /// Whether bytes that are read are others in `next`, apart from those of the first sector.
    fn differs_behind_sector(&self, now: &[u8], next: &[u8]) -> bool {
        let differs = |range: &Range<usize>| {
            let range = range.start.max(SECTOR_BYTES)..range.end.max(SECTOR_BYTES);
            now.get(range.clone()) != next.get(range)
        };
        differs(&(0..self.extensions_end)) || differs(&self.name)
    }
}
