//! Loading: from the table of a bitmap to its bits. The file is not trusted: what a load costs follows its length.

use blockyard_storage::error::{EINVAL, ENOMEM, errno_text};
use blockyard_storage::{Buffer, Storage};

use super::BitSink;
use crate::error::ImageError;
use crate::qcow2::layout::bitmaps::{Bitmap, BitmapCluster};
use crate::qcow2::layout::entries::word_at;
use crate::qcow2::layout::header::Header;

/// Longest piece that is read at once, in bytes; a cluster where that is longer.
const PIECE_BYTES: u64 = 1 << 20;

/// Memory for the bitmaps of an image in bytes, apart from twice what its file has: bits that are all set take a little although
/// they have no cluster.
const MEMORY_BYTES: u64 = 32 << 20;

/// What may have come to be in memory, in bytes, before that is looked at.
const UNSEEN_BYTES: u64 = 8 << 20;

/// The most that bits of one entry without a cluster can take, in bytes.
const SET_BYTES: u64 = 16 << 10;

/// What the bitmaps of one image may cost to load. Tables and bits of a sound image are apart from each other, so all of them
/// together are not longer than its file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LoadLimits {
    file_bytes_left: u64,
    memory_bytes_left: u64,
}

impl LoadLimits {
    /// For the image in `file`.
    pub fn of(file: &dyn Storage) -> Self {
        let file_bytes = file.facts().length_bytes;
        Self {
            file_bytes_left: file_bytes,
            memory_bytes_left: MEMORY_BYTES.saturating_add(file_bytes.saturating_mul(2)),
        }
    }
}

/// Which of its two parts cannot be loaded.
#[derive(Clone, Copy)]
enum Part {
    Table,
    Bits,
}

/// Loads the bits of a bitmap of the image in `file`, which is not [in use](Bitmap::is_in_use), into a `sink` that has none yet.
///
/// # Errors
/// [`ImageError::Refused`] with QEMU's texts: something cannot be read, is nowhere in the file, or costs more than `limits` allow.
///
/// # Cancel safety
/// Nothing is changed but the sink.
pub async fn load_bitmap(
    file: &dyn Storage,
    header: &Header,
    bitmap: &Bitmap,
    limits: &mut LoadLimits,
    sink: &mut dyn BitSink,
) -> Result<(), ImageError> {
    let loading = Loading { file, bitmap };
    let geometry = &header.geometry;
    let cluster_bytes = geometry.cluster_bytes();
    let bits_per_cluster = cluster_bytes.saturating_mul(8);
    let bits = header.guest_bytes().div_ceil(1 << bitmap.granularity_bits);
    let entries = u64::from(bitmap.table_entries);
    let table = loading
        .read(Part::Table, bitmap.table.0, bitmap.table_bytes(), limits)
        .await?;
    let table = table.as_slice();
    let entry = |index: u64| {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let word = word_at(table, index).unwrap_or(0);
        BitmapCluster::decode(geometry, word).ok_or_else(|| {
            let detail = format!("entry {index} of the table is {word:#x}");
            loading.refused(Part::Table, EINVAL, detail)
        })
    };
    let mut index = 0;
    // Looking at the memory takes a while: not after each of millions of entries.
    let mut unseen_bytes = 0;
    while index < entries {
        let first = index.saturating_mul(bits_per_cluster).min(bits);
        match entry(index)? {
            BitmapCluster::Clear => index += 1,
            BitmapCluster::Set => {
                sink.set(first..first.saturating_add(bits_per_cluster).min(bits));
                unseen_bytes += SET_BYTES;
                index += 1;
            }
            BitmapCluster::Stored(at) => {
                let mut count = 1;
                while index + count < entries
                    && (count + 1) * cluster_bytes <= PIECE_BYTES
                    && entry(index + count)?
                        == BitmapCluster::Stored(at.plus(count * cluster_bytes))
                {
                    count += 1;
                }
                // The last cluster has more bits than the disk has granules.
                let needed = (bits - first).div_ceil(8).min(count * cluster_bytes);
                let read = loading.read(Part::Bits, at.0, needed, limits).await?;
                sink.put(first, read.as_slice());
                unseen_bytes += 2 * needed;
                index += count;
            }
        }
        if unseen_bytes < UNSEEN_BYTES && index < entries {
            continue;
        }
        unseen_bytes = 0;
        if sink.memory_bytes() > limits.memory_bytes_left {
            let detail = format!("more than {} bytes of memory", limits.memory_bytes_left);
            return Err(loading.refused(Part::Bits, ENOMEM, detail));
        }
    }
    limits.memory_bytes_left -= sink.memory_bytes();
    Ok(())
}

struct Loading<'a> {
    file: &'a dyn Storage,
    bitmap: &'a Bitmap,
}

impl Loading<'_> {
    /// Reads a part, all of which has to be there: what is behind the end of the file would read as a disk without changes.
    async fn read(
        &self,
        part: Part,
        at: u64,
        length_bytes: u64,
        limits: &mut LoadLimits,
    ) -> Result<Buffer, ImageError> {
        let file_bytes = self.file.facts().length_bytes;
        if at
            .checked_add(length_bytes)
            .is_none_or(|end| end > file_bytes)
        {
            let detail = format!("{length_bytes} bytes at {at:#x}, the file has {file_bytes}");
            return Err(self.refused(part, EINVAL, detail));
        }
        let Some(left) = limits.file_bytes_left.checked_sub(length_bytes) else {
            let detail = "bitmaps share their clusters".to_owned();
            return Err(self.refused(part, EINVAL, detail));
        };
        limits.file_bytes_left = left;
        // At most a mebibyte, a cluster, or the table: 8 MiB.
        let buffer = Buffer::zeroed(usize::try_from(length_bytes).unwrap_or(0));
        let read = self.file.read(at, buffer).await;
        match read.outcome {
            Ok(()) => Ok(read.buffer),
            Err(error) => Err(self.refused(part, error.errno, error.to_string())),
        }
    }

    fn refused(&self, part: Part, errno: i32, detail: String) -> ImageError {
        let name = String::from_utf8_lossy(&self.bitmap.name);
        let what = match part {
            Part::Table => {
                format!("Could not read bitmap_table table from image for bitmap '{name}'")
            }
            Part::Bits => format!("Could not read bitmap '{name}' from image"),
        };
        ImageError::refused_because(format!("{what}: {}", errno_text(errno)), detail)
    }
}
