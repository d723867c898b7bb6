//! What is known of a storage without asking it to do anything, as plain data.

/// Facts about an open storage. They change only through [`Storage::resize`](crate::Storage::resize) and writes behind
/// the end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StorageFacts {
    /// Length in bytes, not rounded.
    pub length_bytes: u64,
    /// Offsets and lengths of transfers must be multiples of this power of two (1 for buffered files, the logical
    /// block size with direct I/O). [`Aligned`](crate::storage) lifts the demand for callers.
    pub request_alignment: u32,
    /// Largest single transfer in bytes; callers that ask for more get `EINVAL`.
    pub transfer_max_bytes: u32,
    /// Whether writes, zeroes, discards and resizes are refused with `EBADF`.
    pub read_only: bool,
    /// Whether discarded ranges give room back (punched holes read as zeroes).
    pub discards: bool,
    /// Whether the length is fixed, as a block device's.
    pub fixed_length: bool,
}

/// How far [`Storage::zero`](crate::Storage::zero) may go.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ZeroMode {
    /// The range may become a hole (its room may be given back).
    pub may_unmap: bool,
    /// Fail with `EOPNOTSUPP` rather than write zeroes as data.
    pub no_fallback: bool,
}

/// How room behind the old end is reserved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Preallocation {
    /// Not at all: a hole.
    #[default]
    Off,
    /// By the file system, without writing (`fallocate`).
    Falloc,
    /// By writing zeroes.
    Full,
}
