//! What stands in the file, byte for byte: codecs between bytes and types. Pure: no storage, no state.

pub mod entries;
pub mod refcounts;
