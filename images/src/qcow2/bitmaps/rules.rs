//! Which bitmaps an image can keep, with QEMU's texts.

use crate::error::ImageError;
use crate::qcow2::image::Qcow2;
use crate::qcow2::layout::bitmaps::{
    BITMAP_BYTES_MAX, BITMAP_HEAD_BYTES, BITMAP_NAME_BYTES_MAX, BITMAP_TABLE_ENTRIES_MAX,
    GRANULARITY_BITS,
};
use crate::qcow2::layout::extensions::{BITMAP_DIRECTORY_BYTES_MAX, BITMAPS_MAX};
use crate::qcow2::units::Version;

impl Qcow2 {
    /// Whether a new bitmap could be kept beside others with these lengths of names: those that are there, and those that are going
    /// to be.
    ///
    /// # Errors
    /// [`ImageError::Refused`] with QEMU's texts.
    pub fn check_new_bitmap(
        &self,
        name: &[u8],
        granularity_bytes: u64,
        others: impl IntoIterator<Item = usize>,
    ) -> Result<(), ImageError> {
        if self.geometry().version() == Version::V2 {
            return Err(ImageError::refused(
                "Cannot store dirty bitmaps in qcow2 v2 files",
            ));
        }
        self.check_bitmap(name, granularity_bytes)?;
        let (mut bitmaps, mut directory_bytes) = (1, entry_bytes(name.len()));
        for length in others {
            bitmaps += 1;
            directory_bytes += entry_bytes(length);
        }
        if bitmaps > BITMAPS_MAX {
            return Err(ImageError::refused(
                "Maximum number of persistent bitmaps is already reached",
            ));
        }
        if directory_bytes > BITMAP_DIRECTORY_BYTES_MAX {
            return Err(ImageError::refused(
                "Not enough space in the bitmap directory",
            ));
        }
        Ok(())
    }

    /// Whether a bitmap of the disk as it is now could be kept by itself.
    pub(super) fn check_bitmap(
        &self,
        name: &[u8],
        granularity_bytes: u64,
    ) -> Result<(), ImageError> {
        let (smallest, largest) = (*GRANULARITY_BITS.start(), *GRANULARITY_BITS.end());
        if granularity_bytes > 1 << largest {
            let text = format!("Granularity exceeds maximum ({} bytes)", 1_u64 << largest);
            return Err(ImageError::refused(text));
        }
        if granularity_bytes < 1 << smallest {
            let text = format!("Granularity is under minimum ({} bytes)", 1_u64 << smallest);
            return Err(ImageError::refused(text));
        }
        let guest_bytes = self.length_bytes();
        if guest_bytes == 0 {
            // A table without entries is none. QEMU takes such a bitmap and loses it in the end.
            let text = "An image whose disk has no length cannot keep bitmaps";
            return Err(ImageError::refused(text));
        }
        let per_entry = (self.geometry().cluster_bytes() * 8).saturating_mul(granularity_bytes);
        let too_long = guest_bytes / granularity_bytes > BITMAP_BYTES_MAX << 3
            || guest_bytes > per_entry.saturating_mul(u64::from(BITMAP_TABLE_ENTRIES_MAX));
        if too_long {
            return Err(ImageError::refused(
                "Too much space will be occupied by the bitmap. Use larger granularity",
            ));
        }
        if name.len() > usize::from(BITMAP_NAME_BYTES_MAX) {
            let text = format!("Name length exceeds maximum ({BITMAP_NAME_BYTES_MAX} characters)");
            return Err(ImageError::refused(text));
        }
        Ok(())
    }
}

/// Length of a directory's entry for a name of so many bytes.
fn entry_bytes(name_bytes: usize) -> u64 {
    ((BITMAP_HEAD_BYTES + name_bytes) as u64).next_multiple_of(8)
}
