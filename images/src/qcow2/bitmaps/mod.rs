//! Bitmaps that are kept in an image: their bits are loaded, and stored again; which bitmaps there are changes as a whole.
//!
//! What is in the file counts only as long as the disk does not change. So whoever keeps bitmaps up in memory has all of them
//! marked first ([`mark_bitmaps_in_use`](crate::qcow2::Qcow2::mark_bitmaps_in_use)), and stores them when nobody writes any more.
//! Storing writes bits, tables and the directory to free clusters, and takes effect with the header:
//!
//! ```text
//!   1  bits, tables and directory written to free clusters
//!   2  counts of those clusters; sync (everything that was written to the disk before is durable then, too)
//!   3  header: where the directory is, and that it is valid; sync
//!   4  the clusters of what was there before are given up
//! ```
//! Whenever the power goes, the image has the old bitmaps, marked as they were, or the new ones; clusters may be leaked. QEMU
//! changes the directory where it stands and takes the autoclear bit away meanwhile: a power cut leaves no bitmaps at all then.
//!
//! A file system without room for that is no reason to lose what is tracked: bitmaps are stored where they stand then, see `in_place`.
//!
//! What is all clear or all set takes no cluster, so file and time follow what has changed, but for the table: eight bytes for each
//! cluster of bits.
//!
//! Spec: qcow2, "Bitmaps", "Bitmaps extension", "Header" (`autoclear_features`).

mod in_place;
mod loading;
mod room;
mod rules;
mod storing;

pub use loading::{LoadLimits, load_bitmap};
pub use room::{BitmapSize, clusters_at_most};
pub use storing::{BitmapToStore, Stored};

use std::ops::Range;

/// Where the bits of a bitmap go when they are loaded. Bit 0 stands for the first granule of the disk.
pub trait BitSink {
    /// All of these are set.
    fn set(&mut self, bits: Range<u64>);

    /// The bits from `first` on, a multiple of 8, the lowest of each byte first. May go on behind the end of the disk.
    fn put(&mut self, first: u64, bytes: &[u8]);

    /// Memory that all of it takes by now, in bytes.
    fn memory_bytes(&self) -> u64;
}

/// Where the bits of a bitmap come from when they are stored.
pub trait BitSource {
    /// The first set bit at or behind `from`.
    fn next_set(&self, from: u64) -> Option<u64>;

    /// The bits from `first` on, a multiple of 8, the lowest of each byte first; those behind the end of the disk are clear.
    fn copy_to(&self, first: u64, bytes: &mut [u8]);
}
