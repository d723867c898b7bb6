//! qcow2, versions 2 and 3: where guest bytes live, and room for new ones.
//!
//! Spec: the public document "qcow2" (docs/interop in QEMU's tree); section names are cited where code obeys them.

pub mod activity;
pub mod amend;
pub mod asked;
pub mod bitmaps;
pub mod check;
mod claims;
mod cluster_marks;
pub mod compressed;
pub mod compressed_room;
pub mod create;
pub mod fill;
mod free_list;
mod frees;
mod fresh;
mod fresh_room;
mod growth;
mod header_updates;
pub mod image;
mod in_use;
pub mod info;
pub mod layout;
pub mod leases;
mod life;
pub mod lookup;
pub mod open;
pub mod options;
pub mod overlap;
mod places;
mod publish;
mod reading;
mod refcounts;
pub mod reserve;
mod resize;
mod runs;
pub mod snapshot;
mod stale_bitmaps;
mod table_cache;
pub mod units;
mod waiting;
mod watching;
mod word_table;
mod write_order;
mod write_plan;
pub mod zero;

pub use compressed_room::{CompressedReservation, CompressedRun};
pub use image::Qcow2;
pub use lookup::{Extent, Source};
pub use options::Options;
pub use reserve::{InPlace, Reservation, WritePlan};
pub use zero::{ZeroRequest, Zeroing};
