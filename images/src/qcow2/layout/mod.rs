//! What stands in the file, byte for byte: codecs between bytes and types. Pure: no storage, no state.

pub mod bitmaps;
pub mod entries;
pub mod extensions;
pub mod fields;
pub mod header;
mod header_parse;
#[cfg(test)]
mod header_tests;
pub mod refcounts;
pub mod snapshots;
