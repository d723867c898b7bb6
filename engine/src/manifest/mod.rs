//! Checksum manifests: what a disk holds, extent by extent, so that a copy can be checked without its source.
//!
//! A manifest is a text file; `docs/MANIFEST.md` says how to read one, [`text`] writes and reads it. While a job copies, a
//! [`Recorder`] takes the sums of what is read, in whatever order it comes; at the end [`file::ManifestFile`] puts them into a new
//! file with one step. [`lines`] reads one, [`onto`] makes one onto another. [`unverified`] is what of a target has not been read back yet.

pub(crate) mod file;
pub(crate) mod lines;
pub(crate) mod onto;
pub(crate) mod recorder;
pub(crate) mod sums;
pub(crate) mod text;
pub(crate) mod unverified;

pub(crate) use recorder::Recorder;

/// Bytes of an extent: what one checksum is about.
pub(crate) const EXTENT_BYTES: u64 = 64 << 10;

/// Bytes of a block: what one digest is about. Extents of one line never lie in two.
pub(crate) const BLOCK_BYTES: u64 = 1 << 20;

const _: () = assert!(BLOCK_BYTES.is_multiple_of(EXTENT_BYTES));
