//! What moves bytes: nodes as they live on a data thread. Names, edges and permissions are the graph's, not theirs.

mod announcing_node;
pub mod blkdebug_node;
#[cfg(test)]
mod blkdebug_tests;
pub mod block_node;
pub mod build;
pub mod chain;
pub mod child_storage;
#[cfg(test)]
mod child_storage_tests;
pub mod copy_before_write;
pub mod copy_on_read_node;
pub(crate) mod dirty_map;
pub mod fault_rules;
pub mod file_node;
pub mod filter_node;
mod forwarding;
mod gate;
pub mod mirror_top;
pub mod nbd;
pub mod news;
pub mod null_node;
mod pieces;
pub mod qcow2;
pub mod raw_node;
pub mod recording_node;
pub mod root;
pub(crate) mod runs;
pub mod throttle_node;
#[cfg(test)]
mod throttle_tests;
pub(crate) mod transfer;
pub(crate) mod turns;
pub mod zeroes;

pub use block_node::{
    AmendStop, Fill, ImageMarks, Node, NodeFacts, NodeTransfer, Place, Reopened, SnapshotChange,
    StatusExtent,
};
use block_node::{cannot_become, refused};
