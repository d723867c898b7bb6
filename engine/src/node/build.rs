//! [`NodePlan`]: what it takes to bring a node up on a data thread, as data that can go to any of them.

use std::rc::Rc;
use std::sync::Arc;

use blockyard_images::qcow2::info::ImageInfo;
use blockyard_ring::HostFile;

use crate::bitmap::NodeBitmaps;
use crate::data::{DataContext, NodeId};
use crate::error::EngineError;
use crate::node::Node;
use crate::node::blkdebug_node::{BlkdebugNode, BlkdebugOptions, SharedFaults};
use crate::node::copy_before_write::{
    CbwNodeOptions, CopyBeforeWrite, Destination, Progress, Saver, SnapshotAccess,
    SnapshotAccessOptions, Surroundings,
};
use crate::node::copy_on_read_node::{CopyOnReadNode, CopyOnReadOptions};
use crate::node::file_node::{FileNode, FileOptions};
use crate::node::filter_node::{FilterKind, FilterNode};
use crate::node::mirror_top::{MirrorTop, Tracker};
use crate::node::nbd::{NbdStorage, Remote};
use crate::node::null_node::{NullNode, NullOptions};
use crate::node::qcow2::Qcow2Files;
use crate::node::qcow2::opening::{Qcow2Plan, open};
use crate::node::raw_node::{RawNode, Window};
use crate::node::recording_node::RecordingNode;
use crate::node::throttle_node::{ThrottleNode, ThrottleOptions};
use crate::node::transfer::Writing;
use crate::request::{CbwOptions, DetectZeroes, Discard};
use crate::throttle::group::Member;

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
    /// A disk of another host.
    Nbd {
        /// Its server, with the connections that are open.
        remote: Arc<Remote>,
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
    /// A filter that copies what is read.
    CopyOnRead {
        /// The child, on the same thread.
        child: NodeId,
        /// The last layer of the child's chain that is copied from, on the same thread, too; `None`: the last of all.
        bottom: Option<NodeId>,
        /// What the client chose.
        options: CopyOnReadOptions,
    },
    /// A filter with limits.
    Throttle {
        /// The child, on the same thread.
        child: NodeId,
        /// Its place in a group, which it keeps when it moves.
        member: Arc<Member>,
        /// What the client chose.
        options: ThrottleOptions,
    },
    /// A filter that saves what is about to be changed.
    CopyBeforeWrite {
        /// The child, on the same thread.
        child: NodeId,
        /// Where to, on the same thread, too.
        target: NodeId,
        /// Bytes of a cluster, a power of two.
        cluster_bytes: u64,
        /// How something is saved.
        cbw: CbwOptions,
        /// What the client chose.
        options: CbwNodeOptions,
        /// How far it has come, for when the node moves.
        progress: Progress,
    },
    /// What was below such a filter when it came.
    SnapshotAccess {
        /// The filter, on the same thread.
        child: NodeId,
        /// What the client chose.
        options: SnapshotAccessOptions,
    },
    /// A qcow2 image.
    Qcow2 {
        /// The node with the image, on the same thread.
        file: NodeId,
        /// The node with the guest's data, if that is outside.
        data_file: Option<NodeId>,
        /// The node below it in its chain, on the same thread, too.
        backing: Option<NodeId>,
        /// How it is used.
        plan: Qcow2Plan,
    },
    /// A job's filter.
    Filter {
        /// The child, on the same thread.
        child: NodeId,
        /// What becomes of writes.
        kind: FilterKind,
    },
    /// Not known yet: it has its place, but is still being opened.
    Opening,
}

impl NodePlan {
    /// Lets a node be written or not; it is `inactive` as long as somebody else may be changing what it shows.
    pub fn set_access(&mut self, is_read_only: bool, inactive: bool) {
        let refuses = is_read_only || inactive;
        match self {
            Self::File { options, .. } | Self::Nbd { options, .. } => options.read_only = refuses,
            Self::Raw { read_only, .. } => *read_only = refuses,
            Self::Null(options) => options.read_only = refuses,
            Self::CopyOnRead { options, .. } => options.read_only = refuses,
            Self::Throttle { options, .. } => options.read_only = refuses,
            Self::Blkdebug { options, .. } => options.read_only = refuses,
            Self::Qcow2 { plan, .. } => {
                plan.image.read_only = refuses;
                plan.node.inactive = inactive;
            }
            Self::CopyBeforeWrite { options, .. } => options.read_only = refuses,
            Self::Filter { .. } | Self::SnapshotAccess { .. } | Self::Opening => {}
        }
    }
}

/// A node on its thread.
pub struct Built {
    /// The node.
    pub node: Rc<dyn Node>,
    /// What its image says of itself, for formats that have something to say.
    pub info: Option<ImageInfo>,
}

/// Brings a node up on this thread, whose changes are marked in `bitmaps`; its children are there already. Only images wait for a disk, and not for ever.
///
/// # Errors
/// When an image is refused, or a child is not there, which is a bug of the caller.
pub async fn build(
    context: &DataContext,
    name: &str,
    plan: &NodePlan,
    bitmaps: Arc<NodeBitmaps>,
) -> Result<Built, EngineError> {
    let Built { node, info } = build_bare(context, name, plan, &bitmaps).await?;
    let spawner = context.spawner().clone();
    let node = Rc::new(RecordingNode::new(node, bitmaps, spawner));
    Ok(Built { node, info })
}

async fn build_bare(
    context: &DataContext,
    name: &str,
    plan: &NodePlan,
    bitmaps: &Arc<NodeBitmaps>,
) -> Result<Built, EngineError> {
    let child_of = |child| child_of(context, name, child);
    let name = name.to_owned();
    let node: Rc<dyn Node> = match plan {
        NodePlan::File { file, options } => {
            let storage = context.files().storage(file, options.read_only);
            Rc::new(FileNode::new(name, storage, *options))
        }
        NodePlan::Nbd { remote, options } => {
            let storage = NbdStorage::new(Arc::clone(remote), context);
            Rc::new(FileNode::new(name, Rc::new(storage), *options))
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
        NodePlan::CopyOnRead {
            child,
            bottom,
            options,
        } => Rc::new(CopyOnReadNode::new(
            name,
            child_of(*child)?,
            bottom.map(child_of).transpose()?,
            *options,
        )),
        NodePlan::Throttle {
            child,
            member,
            options,
        } => Rc::new(ThrottleNode::new(
            name,
            child_of(*child)?,
            member.clone(),
            *options,
            context.clock().clone(),
        )),
        NodePlan::CopyBeforeWrite {
            child,
            target,
            cluster_bytes,
            cbw,
            options,
            progress,
        } => {
            let (source, target) = (child_of(*child)?, child_of(*target)?);
            let lengths = (source.facts().length_bytes, *cluster_bytes);
            let saver = Saver::resumed(progress, lengths, *cbw, surroundings(context));
            let unit_bytes = target.facts().cluster_size_bytes.map_or(1, u64::from);
            let destination = Destination {
                recorder: None,
                source: source.clone(),
                target,
                layers_max: None,
                how: Writing {
                    unit_bytes,
                    compress: false,
                    may_unmap: false,
                },
            };
            saver.begin(destination, |_, _, _| {});
            let filter = CopyBeforeWrite::new(name, source, Rc::new(saver));
            Rc::new(filter.with_options(*options, progress.clone()))
        }
        NodePlan::SnapshotAccess { child, options } => {
            Rc::new(SnapshotAccess::new(name, child_of(*child)?, *options))
        }
        NodePlan::Filter {
            child,
            kind: FilterKind::Tracks {
                granularity_bytes, ..
            },
        } => {
            let child = child_of(*child)?;
            let tracker = Tracker::new(child.facts().length_bytes, *granularity_bytes);
            Rc::new(MirrorTop::new(name, child, Rc::new(tracker)))
        }
        NodePlan::Filter {
            child,
            kind:
                FilterKind::Saves {
                    cluster_bytes,
                    options,
                    ..
                },
        } => {
            let child = child_of(*child)?;
            let length_bytes = child.facts().length_bytes;
            let saver = Saver::new(
                length_bytes,
                *cluster_bytes,
                *options,
                surroundings(context),
            );
            Rc::new(CopyBeforeWrite::new(name, child, Rc::new(saver)))
        }
        NodePlan::Filter { child, kind } => {
            Rc::new(FilterNode::new(name, child_of(*child)?, *kind))
        }
        NodePlan::Qcow2 {
            file,
            data_file,
            backing,
            plan,
        } => {
            let files = Qcow2Files::new(child_of(*file)?, data_file.map(child_of).transpose()?);
            let backing = backing.map(child_of).transpose()?;
            let bitmaps = Arc::clone(bitmaps);
            let (node, info) = open(context, name, files, backing, *plan, bitmaps).await?;
            return Ok(Built {
                node,
                info: Some(info),
            });
        }
        NodePlan::Opening => {
            return Err(EngineError::generic(format!(
                "Node '{name}' is brought up before it is open (bug)"
            )));
        }
    };
    Ok(Built { node, info: None })
}

/// What a filter that saves what is about to be changed needs of its thread.
fn surroundings(context: &DataContext) -> Surroundings {
    Surroundings {
        clock: Rc::clone(context.clock()),
        spawner: context.spawner().clone(),
    }
}

/// A node below the one with this name.
///
/// # Errors
/// It is not on this thread, which is a bug of the caller.
pub(super) fn child_of(
    context: &DataContext,
    name: &str,
    child: NodeId,
) -> Result<Rc<dyn Node>, EngineError> {
    let lost = || EngineError::generic(format!("What is below node '{name}' is lost (bug)"));
    context.node(child).ok_or_else(lost)
}
