//! [`NodePlan`]: what it takes to bring a node up on a data thread, as data that can go to any of them.

use std::rc::Rc;

use blockyard_ring::HostFile;
use blockyard_storage::error::EIO;
use blockyard_storage::{Operation, StorageError};

use crate::data::{DataContext, NodeId};
use crate::error::NodeError;
use crate::node::Node;
use crate::node::blkdebug_node::{BlkdebugNode, BlkdebugOptions, SharedFaults};
use crate::node::file_node::{FileNode, FileOptions};
use crate::node::filter_node::FilterNode;
use crate::node::null_node::{NullNode, NullOptions};
use crate::node::raw_node::{RawNode, Window};
use crate::request::{DetectZeroes, Discard};

/// How to bring a node up.
#[derive(Clone, Debug)]
pub enum NodePlan {
    /// A host file or device.
    File {
        /// Open on the control side, which keeps the image locks.
        file: HostFile,
        /// What the client chose.
        options: FileOptions,
    },
    /// Raw data on a child.
    Raw {
        /// The child, on the same thread.
        child: NodeId,
        /// Its part that counts.
        window: Window,
        /// Refuse writes.
        read_only: bool,
        /// What discards do.
        discard: Discard,
        /// Whether written zeroes become zero requests.
        detect_zeroes: DetectZeroes,
    },
    /// Nothing behind it.
    Null(NullOptions),
    /// A filter that injects faults.
    Blkdebug {
        /// The child, on the same thread.
        child: NodeId,
        /// What the client chose.
        options: BlkdebugOptions,
        /// Its rules, which keep their state when the node moves.
        faults: SharedFaults,
    },
    /// A job's filter.
    Filter {
        /// The child, on the same thread.
        child: NodeId,
    },
}

/// Brings a node up on this thread; its children are there already.
///
/// # Errors
/// When a child is not there, which is a bug of the caller.
pub fn build(
    context: &DataContext,
    name: &str,
    plan: &NodePlan,
) -> Result<Rc<dyn Node>, NodeError> {
    let child_of = |child: NodeId| {
        context.node(child).ok_or_else(|| NodeError {
            node: name.to_owned(),
            source: StorageError::whole(Operation::Read, EIO),
        })
    };
    let name = name.to_owned();
    Ok(match plan {
        NodePlan::File { file, options } => {
            let storage = context.files().storage(file, options.read_only);
            Rc::new(FileNode::new(name, storage, *options))
        }
        NodePlan::Raw {
            child,
            window,
            read_only,
            discard,
            detect_zeroes,
        } => Rc::new(RawNode::new(
            name,
            child_of(*child)?,
            *window,
            *read_only,
            *discard,
            *detect_zeroes,
        )),
        NodePlan::Null(options) => Rc::new(NullNode::new(name, *options, context.clock().clone())),
        NodePlan::Blkdebug {
            child,
            options,
            faults,
        } => Rc::new(BlkdebugNode::new(
            name,
            child_of(*child)?,
            *options,
            faults.clone(),
        )),
        NodePlan::Filter { child } => Rc::new(FilterNode::new(name, child_of(*child)?)),
    })
}
