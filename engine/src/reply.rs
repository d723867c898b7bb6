//! [`Reply`]: the answers to requests and the views that queries return, as plain data.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use blockyard_images::qcow2::info::{BitmapInfo, SnapshotInfo, Version3Info};
pub use blockyard_images::qcow2::units::Compression;

use crate::images::ImageReply;
use crate::job::latency::LatencyView;
use crate::job::rates::RatesView;
use crate::job::status::Status;
use crate::job::verb::JobType;
use crate::request::{DetectZeroes, Permission};

pub use crate::checkpoint::{CheckpointDiskView, CheckpointView};
pub use crate::throttle::limits::{Counted, Limits, Rate};
pub use crate::tls::authorization::{Format, Rule};

/// The answer to a request that succeeded.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Done, nothing to tell.
    Done,
    /// A node is closed; what was lost by that, in words, naming nodes. It is logged, too.
    Closed {
        /// Last flushes that failed, bitmaps that could not be stored.
        lost: Vec<String>,
    },
    /// All jobs, newest first.
    Jobs(Vec<JobView>),
    /// All block jobs, newest first.
    BlockJobs(Vec<BlockJobView>),
    /// All nodes, newest first.
    Nodes(Vec<NodeView>),
    /// The graph with permissions.
    Graph(GraphView),
    /// A chain, from the top down.
    Chain(Vec<LayerView>),
    /// What a job would come to.
    Plan(Box<PlanView>),
    /// All exports, newest first.
    Exports(Vec<ExportView>),
    /// An internal snapshot that is gone.
    Snapshot(SnapshotInfo),
    /// SHA-256 of the bits of a bitmap.
    BitmapDigest([u8; 32]),
    /// A checkpoint that has begun.
    Checkpoint(CheckpointView),
    /// All checkpoints that have begun and have not ended, oldest first.
    Checkpoints(Vec<CheckpointView>),
    /// What work on an image came to.
    Image(ImageReply),
    /// What an object has.
    Properties(Vec<PropertyView>),
    /// The value of a property.
    Property(PropertyValue),
}

/// A property of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PropertyView {
    /// Its name.
    pub name: String,
    /// Its type.
    pub kind: String,
}

/// The value of a property.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PropertyValue {
    /// A string.
    Text(String),
    /// A number.
    Int(i64),
    /// A boolean.
    Flag(bool),
    /// Rules of who may come in.
    Rules(Vec<Rule>),
    /// Limits of a group.
    Limits(Box<Limits>),
}

/// A job as `query-jobs` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobView {
    /// Job id.
    pub id: String,
    /// Its type.
    pub job_type: JobType,
    /// Its status.
    pub status: Status,
    /// Bytes done.
    pub current_progress: u64,
    /// Bytes expected in all.
    pub total_progress: u64,
    /// Why it failed.
    pub error: Option<String>,
    /// The chain it has worked on, as it is now that the job has concluded, from the top down.
    pub chain: Option<Vec<LayerView>>,
    /// For those that keep both sides equal: how fast the source changes and is copied, once somebody has written.
    pub rates: Option<RatesView>,
    /// On which node and bytes it failed, where it was a request that failed. Not on the wire.
    pub failed_at: Option<String>,
    /// How long its requests took. Not on the wire.
    pub latency: LatencyView,
}

/// An export as `query-block-exports` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportView {
    /// Its id.
    pub id: String,
    /// The node it is on now.
    pub node_name: String,
    /// It is being deleted.
    pub shutting_down: bool,
}

/// One image of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerView {
    /// Its node.
    pub node_name: String,
    /// The node's driver, which is the image's format.
    pub driver: &'static str,
    /// The file, as all queries show it.
    pub filename: String,
    /// The host file that the image is in, whatever it stands on; `None`: it is in none.
    pub path: Option<PathBuf>,
    /// Writes are refused.
    pub read_only: bool,
    /// What its header says is below it.
    pub backing_filename: Option<String>,
}

impl LayerView {
    /// The host file, for people; without one, what queries show.
    pub fn file(&self) -> Cow<'_, str> {
        file_or(self.path.as_deref(), &self.filename)
    }
}

impl ImageView {
    /// The host file, for people; without one, what queries show.
    pub fn file(&self) -> Cow<'_, str> {
        file_or(self.path.as_deref(), &self.filename)
    }
}

fn file_or<'a>(path: Option<&'a Path>, shown: &'a str) -> Cow<'a, str> {
    path.map_or(Cow::Borrowed(shown), Path::to_string_lossy)
}

/// What a job within a chain would come to, if it were started now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanView {
    /// The images that give what they hold away, from the top down.
    pub layers: Vec<LayerView>,
    /// The image that takes it.
    pub target: LayerView,
    /// Bytes that are copied.
    pub copy_bytes: u64,
    /// Bytes that become zeroes.
    pub zero_bytes: u64,
    /// The room that the target takes for it.
    pub room: RoomView,
}

/// The room that an image takes in addition on its file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoomView {
    /// For data, in bytes.
    pub data_bytes: u64,
    /// For tables at most, in bytes.
    pub metadata_bytes: u64,
    /// For the bitmaps that the image keeps at most, in bytes: they are stored anew, beside the old ones.
    pub bitmaps_bytes: u64,
    /// What is free where the data goes, in bytes; `None`: a device, or not known.
    pub free_bytes: Option<u64>,
    /// Whether there is enough; `None`: not known.
    pub fits: Option<bool>,
}

impl RoomView {
    /// All of it together, in bytes.
    pub fn needed_bytes(&self) -> u64 {
        let parts = [self.data_bytes, self.metadata_bytes, self.bitmaps_bytes];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

/// What errors have done to a block job so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoStatus {
    /// Nothing.
    #[default]
    Ok,
    /// Stopped by an error.
    Failed,
    /// Stopped because room is missing.
    NoSpace,
}

/// A block job as `query-block-jobs` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockJobView {
    /// Job id.
    pub id: String,
    /// Its type.
    pub job_type: JobType,
    /// Bytes expected in all.
    pub total_bytes: u64,
    /// Bytes done.
    pub current_bytes: u64,
    /// Whether it has work in hand.
    pub busy: bool,
    /// Whether a pause is asked for or in effect.
    pub paused: bool,
    /// Rate limit in bytes per second; 0: none.
    pub speed: i64,
    /// What errors did to it.
    pub io_status: IoStatus,
    /// Whether it may be completed.
    pub ready: bool,
    /// Its status.
    pub status: Status,
    /// Finalizes by itself.
    pub auto_finalize: bool,
    /// Dismisses by itself.
    pub auto_dismiss: bool,
    /// Why it failed.
    pub error: Option<String>,
    /// For mirrors: whether the target is equal and stays so.
    pub actively_synced: Option<bool>,
    /// For those that keep both sides equal: how fast the source changes and is copied, once somebody has written.
    pub rates: Option<RatesView>,
}

/// A node as `query-named-block-nodes` shows it.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeView {
    /// Its name.
    pub node_name: String,
    /// Its driver.
    pub driver: String,
    /// Its display file name.
    pub filename: String,
    /// Whether writers are refused.
    pub read_only: bool,
    /// Whether it is active.
    pub active: bool,
    /// Zero detection.
    pub detect_zeroes: DetectZeroes,
    /// Page cache bypassed.
    pub cache_direct: bool,
    /// Flushes ignored.
    pub cache_no_flush: bool,
    /// Name of its backing file.
    pub backing_file: Option<String>,
    /// Length of its backing chain.
    pub backing_file_depth: u32,
    /// The image behind it.
    pub image: ImageView,
    /// What is recorded of its changes, newest first.
    pub bitmaps: Vec<BitmapView>,
}

/// A dirty bitmap as queries show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapView {
    /// Its name; those of jobs have none.
    pub name: Option<String>,
    /// Bytes of the granules that have changed, each as a whole.
    pub count_bytes: u64,
    /// Bytes of a granule.
    pub granularity_bytes: u64,
    /// Writes are marked in it.
    pub recording: bool,
    /// Somebody uses it.
    pub busy: bool,
    /// It is kept in the image.
    pub persistent: bool,
    /// The image was not closed after its last use, so that nothing can be said of what is in it.
    pub inconsistent: bool,
}

/// An image as queries show it.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageView {
    /// Display file name.
    pub filename: String,
    /// The host file that it is in, whatever it stands on; `None`: it is in none.
    pub path: Option<PathBuf>,
    /// Format.
    pub format: String,
    /// Guest-visible length in bytes.
    pub virtual_size_bytes: u64,
    /// Room taken on the host in bytes.
    pub actual_size_bytes: Option<u64>,
    /// Cluster size in bytes.
    pub cluster_size_bytes: Option<u64>,
    /// The image was not closed cleanly; `None` where nothing can tell.
    pub dirty_flag: Option<bool>,
    /// Name of the backing file as the image has it.
    pub backing_filename: Option<String>,
    /// The same, from where the image is.
    pub full_backing_filename: Option<String>,
    /// Format of the backing file as the image has it.
    pub backing_filename_format: Option<String>,
    /// Snapshots inside the image, in its order.
    pub snapshots: Vec<SnapshotInfo>,
    /// What only this format has to say.
    pub format_specific: Option<FormatSpecific>,
    /// The image behind it, or below a filter, shared by all that stand on it; left out where views are flat.
    pub backing_image: Option<Arc<ImageView>>,
}

/// What one format has to say of an image.
#[derive(Clone, Debug, PartialEq)]
pub enum FormatSpecific {
    /// `file`: nothing but an optional extent size hint.
    File {
        /// The file system's extent size hint in bytes, if set.
        extent_size_hint: Option<u64>,
    },
    /// `qcow2`.
    Qcow2 {
        /// Widths of reference counts in bits.
        refcount_bits: u32,
        /// How compressed clusters are compressed.
        compression: Compression,
        /// What only version 3 has.
        version_3: Option<Version3Info>,
    },
}

/// The graph as `x-debug-query-block-graph` shows it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GraphView {
    /// Nodes, backends and jobs.
    pub nodes: Vec<GraphNodeView>,
    /// Who uses whom.
    pub edges: Vec<GraphEdgeView>,
}

/// One vertex of the graph.
#[derive(Clone, Debug, PartialEq)]
pub struct GraphNodeView {
    /// A number that only means something inside this answer.
    pub id: u64,
    /// What it is.
    pub kind: GraphNodeKind,
    /// Its name.
    pub name: String,
}

/// What a vertex of the graph is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GraphNodeKind {
    /// A node.
    BlockDriver,
    /// A job.
    BlockJob,
    /// A job's or export's access to a node.
    BlockBackend,
}

/// One edge of the graph.
#[derive(Clone, Debug, PartialEq)]
pub struct GraphEdgeView {
    /// Number of the user.
    pub parent: u64,
    /// Number of the node.
    pub child: u64,
    /// Role name.
    pub name: String,
    /// Permissions taken.
    pub taken: Vec<Permission>,
    /// Permissions shared with others.
    pub shared: Vec<Permission>,
}
