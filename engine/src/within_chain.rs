//! What is done within one chain, as clients describe it: [`CommitSpec`], [`StreamSpec`], [`PlanSpec`], [`NewOverlaySpec`].

use crate::images::ImageWatcher;
use crate::job::error_policy::OnError;

/// Arguments of `block-commit`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommitSpec {
    /// Root node of the chain.
    pub device: String,
    /// The image that takes in what those above it hold; `None`: the lowest.
    pub base_node: Option<String>,
    /// The same by its file name.
    pub base: Option<String>,
    /// The highest image that is taken in; `None`: the device.
    pub top_node: Option<String>,
    /// The same by its file name.
    pub top: Option<String>,
    /// What the overlay's header calls its new backing file; `None`: the base's file name, as it is seen from the overlay's folder.
    pub backing_file: Option<String>,
    /// A base that is a file itself is called raw in the header.
    pub backing_mask_protocol: bool,
    /// Limit in bytes per second; 0: none.
    pub speed: i64,
    /// When reading or writing fails.
    pub on_error: OnError,
    /// Nobody writes to the chain as long as the job runs, its top included: the job ends by itself, and the chain stays linked
    /// as it is above the top. Not on the wire.
    pub top_is_quiet: bool,
    /// Name of the filter node.
    pub filter_node_name: Option<String>,
}

/// Arguments of `block-stream`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamSpec {
    /// The node that comes to hold what is below it.
    pub device: String,
    /// File name of the first image below it that stays where it is; `None`: none does.
    pub base: Option<String>,
    /// The same by its node.
    pub base_node: Option<String>,
    /// Node of the last image that does not stay below it.
    pub bottom: Option<String>,
    /// What the device's header calls its new backing file; `None`: the base's file name, as it is seen from the device's folder.
    pub backing_file: Option<String>,
    /// A base that is a file itself is called raw in the header.
    pub backing_mask_protocol: bool,
    /// Limit in bytes per second; 0: none.
    pub speed: i64,
    /// When reading or writing fails.
    pub on_error: OnError,
    /// Name of the filter node.
    pub filter_node_name: Option<String>,
}

/// A job within a chain that is not started, only looked at beforehand.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanSpec {
    /// The job.
    pub job: PlannedJob,
    /// Who looks on.
    pub watcher: ImageWatcher,
}

/// The jobs that can be planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlannedJob {
    /// `block-commit`.
    Commit(CommitSpec),
    /// `block-stream`.
    Stream(StreamSpec),
}

/// Arguments of `blockdev-snapshot-sync`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewOverlaySpec {
    /// Name of a device; there are none, so only good for an error.
    pub device: Option<String>,
    /// Name of the node.
    pub node_name: Option<String>,
    /// File of the overlay, as its header and queries show it.
    pub filename: String,
    /// Name of the overlay's node.
    pub overlay_name: Option<String>,
    /// Its format.
    pub format: String,
    /// It is there already.
    pub exists: bool,
}
