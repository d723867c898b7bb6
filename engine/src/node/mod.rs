//! What moves bytes: nodes as they live on a data thread. Names, edges and permissions are the graph's, not theirs.

pub mod block_node;

pub use block_node::{Node, NodeFacts, NodeTransfer, StatusExtent};
