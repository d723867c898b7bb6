//! What moves bytes: nodes as they live on a data thread. Names, edges and permissions are the graph's, not theirs.

pub mod block_node;
pub mod build;
pub mod file_node;
pub mod filter_node;
pub mod null_node;
pub mod raw_node;
pub mod zeroes;

pub use block_node::{Node, NodeFacts, NodeTransfer, StatusExtent};
