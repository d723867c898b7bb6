//! [`Options`]: how an image is used while it is open.

use crate::qcow2::overlap::OverlapChecks;

/// How an image is used while it is open; nothing of it is kept in the image, except that lazy refcounts show as its `dirty`
/// bit meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Changes are refused.
    pub read_only: bool,
    /// Reference counts are written when the image is closed; until then the image is marked dirty.
    pub lazy_refcounts: bool,
    /// Memory for L2 tables in bytes.
    pub l2_cache_bytes: u64,
    /// Bytes of an L2 table that are read at once: a power of two from 512 to the cluster size.
    pub l2_cache_entry_bytes: u64,
    /// Memory for refcount blocks in bytes.
    pub refcount_cache_bytes: u64,
    /// A discarded cluster keeps its place.
    pub discard_no_unref: bool,
    /// What a guest discards or unmaps is discarded in the file.
    pub pass_discard_request: bool,
    /// What an internal snapshot gave up is discarded in the file.
    pub pass_discard_snapshot: bool,
    /// What is given up otherwise is discarded in the file.
    pub pass_discard_other: bool,
    /// Room in bytes that may be given up before it is made free for others, which takes a flush; an eighth of the disk where that
    /// is less, but 1 MiB at least, and a sixty-fourth of the disk where that is more.
    pub given_up_bytes_max: u64,
    /// What is looked at before something is written.
    pub overlap_checks: OverlapChecks,
}

impl Default for Options {
    /// QEMU's, for an image of 256 GiB at most with clusters of 64 KiB, opened without `discard=unmap`.
    fn default() -> Self {
        Self {
            read_only: false,
            lazy_refcounts: false,
            l2_cache_bytes: 32 << 20,
            l2_cache_entry_bytes: 65_536,
            refcount_cache_bytes: 256 << 10,
            discard_no_unref: false,
            pass_discard_request: false,
            pass_discard_snapshot: true,
            pass_discard_other: false,
            given_up_bytes_max: 64 << 20,
            overlap_checks: OverlapChecks::CACHED,
        }
    }
}
