//! What has to stand in an image before its disk changes, so that nobody takes stale bitmaps for valid ones.
//!
//! Bitmaps are not kept up to date here. So each one that records changes gets the flag that its content is out of date: QEMU
//! shows it as inconsistent then, by its name, and lets a client remove it. Clearing the autoclear bit instead would make all
//! bitmaps disappear and their clusters leak. A bitmap that records nothing (a disabled one) stays as it is: it says what had
//! changed before, and that stays true, unless the length of the disk changes. As long as nothing is written, nothing is marked.
//!
//! Marking is safe at any power cut without taking the autoclear bit away for its duration, as QEMU does: apart from the
//! flags, each entry is written over itself, and the disk changes only when all of them are durable.
//!
//! Spec: qcow2, "Bitmap directory" (`in_use`, `auto`), "Header" (`autoclear_features`).

use crate::error::ImageError;
use crate::qcow2::layout::bitmaps::{Bitmap, flags};
use crate::qcow2::layout::header::{Header, autoclear};
use crate::qcow2::units::HostOffset;

/// Largest piece of the directory that is written at once; entries are not parted, so it may be longer by one.
const PIECE_BYTES: usize = 64 << 10;

/// Changes of the image file that must be durable before the guest's disk is changed, in any order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BeforeWriting {
    /// Bits to clear in [`Header::autoclear`]: nobody here knows what they promise.
    pub clear_autoclear: u64,
    /// Bytes of the bitmap directory.
    pub overwrites: Vec<Overwrite>,
}

/// Bytes and where they go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Overwrite {
    /// First byte in the image file.
    pub at: HostOffset,
    /// What stands there afterwards.
    pub bytes: Vec<u8>,
}

/// What is going to change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskChange {
    /// What the guest's disk holds.
    Content,
    /// How long it is.
    Length,
}

impl BeforeWriting {
    /// Whether nothing has to be done.
    pub fn is_empty(&self) -> bool {
        self.clear_autoclear == 0 && self.overwrites.is_empty()
    }

    /// What `change` demands of an image with this header and these bitmaps, which are all of its directory. Marks them.
    pub(super) fn mark(
        header: &Header,
        bitmaps: &mut [Bitmap],
        change: DiskChange,
    ) -> Result<Self, ImageError> {
        let mut changes = Self {
            clear_autoclear: header.autoclear & !autoclear::KNOWN,
            overwrites: Vec::new(),
        };
        let Some(extension) = header.extensions.bitmaps else {
            return Ok(changes);
        };
        let mut at = extension.directory;
        for bitmap in bitmaps {
            let stale = !bitmap.is_in_use() && (bitmap.is_auto() || change == DiskChange::Length);
            if stale {
                bitmap.flags |= flags::IN_USE;
            }
            let entry = bitmap.encode()?;
            let next = at.plus(entry.len() as u64);
            if stale {
                changes.overwrite(at, entry);
            }
            at = next;
        }
        Ok(changes)
    }

    /// Adds bytes, behind those that are there already.
    fn overwrite(&mut self, at: HostOffset, bytes: Vec<u8>) {
        match self.overwrites.last_mut() {
            Some(last)
                if last.at.plus(last.bytes.len() as u64) == at
                    && last.bytes.len() < PIECE_BYTES =>
            {
                last.bytes.extend(bytes);
            }
            _ => self.overwrites.push(Overwrite { at, bytes }),
        }
    }
}
