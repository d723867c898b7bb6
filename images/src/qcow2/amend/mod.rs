//! Amending: options of an image that nobody else uses are changed in place, as `qemu-img amend` does, with progress.
//!
//! Whenever the power goes or something fails, the image opens, its content is unchanged, and each option has its old or its
//! new value; at most clusters leak. What an option needs is made where nothing leads to it and takes effect with one write
//! of the header's first sector ([`header_switch`]):
//!
//! ```text
//!   width of counts, snapshot entries that lack something
//!        all references counted -> a new structure written to free clusters; sync; header; sync
//!   version 3 to 2
//!        room for zeroes counted by a new structure, as above -> the room zeroed; sync; L2 tables lead there instead of saying
//!        "zeroes" -> sync; header; sync
//!   everything else
//!        header; sync
//! ```
//! Several options that need no L2 table changed take effect at once. The length of the disk is not changed here: whoever has
//! the image open does that, and knows what is below it.

mod amending;
pub(in crate::qcow2) mod header_switch;
#[cfg(test)]
mod header_switch_tests;
mod options;
mod zero_clusters;

pub use amending::{AmendError, amend};
pub use options::AmendOptions;
