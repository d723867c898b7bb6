//! Making a new image: [`CreateOptions`] say what it is to be, [`Creation`] is what can be made, [`create`] makes it.
//!
//! Until it has succeeded nobody takes the file for an image: a header that was there is destroyed first and durably, then
//! everything is written that the new header will lead to, and its first sector, with the magic, is the last thing of all.

#[cfg(test)]
mod crash_tests;
pub mod options;
pub mod plan;
#[cfg(test)]
mod tests;
mod writing;

pub use options::{CreateOptions, Creation, ImagePreallocation};
pub use plan::{CreatePlan, Placement, Table};
pub use writing::{CreateError, create};
