//! Amending: options of an image that nobody else uses are changed in place, as `qemu-img amend` does, with progress.
//!
//! Whenever the power goes or something fails, the image opens, its content is unchanged, and its options are the old ones or
//! the new ones, all together; at most clusters leak. What an option needs is made where nothing leads to it, and one write of
//! the header's first sector ([`header_switch`]) puts all of them into effect:
//!
//! ```text
//!   version 3 to 2: entries that say "zeroes"
//!        room for them counted by new counts in free clusters; sync; header; sync -> the room zeroed; sync; L2 tables lead
//!        there; sync.  The image is what it was, and has no such entries any more
//!   width of counts, snapshot entries that lack something, a shorter disk
//!        all references counted -> counts, the snapshot table, the tables that the end cuts written to free clusters; sync
//!   then the header; sync
//!   then clusters that nothing leads to any more are given back
//! ```
//! Where the names in the header are in each other's way, headers that say the same as the old one come before the new one.
//!
//! A longer disk is prepared by whoever has the image open, as that one knows what is below
//! ([`Qcow2::prepare_growth`](crate::qcow2::Qcow2::prepare_growth)). The one pair of options that does not take effect
//! together is version 2 to 3 with a longer disk, where a backing file would show behind the old end, which version 2 cannot
//! hide, or where there are internal snapshots: the version rises first ([`AmendOptions::grows_behind`]).

mod amending;
pub(in crate::qcow2) mod header_switch;
#[cfg(test)]
mod header_switch_tests;
mod options;
mod shorter;
mod zero_clusters;

pub use amending::{AmendError, amend};
pub use options::AmendOptions;
