//! [`Qcow2Spec`]: what a `qcow2` node is told: what it stands on, and how it uses it.

use crate::request::NodeRef;

/// Options of `qcow2`.
#[derive(Clone, Debug, PartialEq)]
pub struct Qcow2Spec {
    /// The node that holds the image.
    pub file: NodeRef,
    /// Where what the image does not hold comes from.
    pub backing: BackingRef,
    /// The node that holds the guest's data, for images that keep it outside; `None`: as the image says.
    pub data_file: Option<NodeRef>,
    /// Put writing reference counts off; `None`: as the image says.
    pub lazy_refcounts: Option<bool>,
    /// Hand on discards that a guest asks for; `None`: as the node's `discard` says.
    pub pass_discard_request: Option<bool>,
    /// Give up the room of what a deleted snapshot held.
    pub pass_discard_snapshot: Option<bool>,
    /// Give up the room of everything else that is freed.
    pub pass_discard_other: Option<bool>,
    /// Keep discarded clusters for the guest addresses they had.
    pub discard_no_unref: Option<bool>,
    /// Which structures are looked after before each write.
    pub overlap_check: OverlapCheckSpec,
    /// Bytes of both caches together.
    pub cache_size: Option<i64>,
    /// Bytes of the cache of L2 tables.
    pub l2_cache_size: Option<i64>,
    /// Bytes of one entry of it.
    pub l2_cache_entry_size: Option<i64>,
    /// Bytes of the cache of reference counts.
    pub refcount_cache_size: Option<i64>,
    /// Seconds after which unused entries of the caches go; 0: never.
    pub cache_clean_interval: Option<i64>,
    /// The encryption that the client expects.
    pub encrypt: Option<EncryptionFormat>,
}

impl Qcow2Spec {
    /// The image in `file`, and everything else as it says and as usual.
    pub const fn over(file: NodeRef) -> Self {
        Self {
            file,
            backing: BackingRef::FromImage,
            data_file: None,
            lazy_refcounts: None,
            pass_discard_request: None,
            pass_discard_snapshot: None,
            pass_discard_other: None,
            discard_no_unref: None,
            overlap_check: OverlapCheckSpec::usual(),
            cache_size: None,
            l2_cache_size: None,
            l2_cache_entry_size: None,
            refcount_cache_size: None,
            cache_clean_interval: None,
            encrypt: None,
        }
    }
}

/// Which backing a client wants.
#[derive(Clone, Debug, PartialEq)]
pub enum BackingRef {
    /// What the image names, if it names one.
    FromImage,
    /// None, whatever the image names.
    Nothing,
    /// This one, whatever the image names.
    Node(NodeRef),
}

/// Structures that a write must not hit: a set to begin with, and changes to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlapCheckSpec {
    /// What to begin with; `None`: [`OverlapTemplate::Cached`].
    pub template: Option<OverlapTemplate>,
    /// The header.
    pub main_header: Option<bool>,
    /// The L1 table in use.
    pub active_l1: Option<bool>,
    /// The L2 tables in use.
    pub active_l2: Option<bool>,
    /// The refcount table.
    pub refcount_table: Option<bool>,
    /// The refcount blocks.
    pub refcount_block: Option<bool>,
    /// The snapshot table.
    pub snapshot_table: Option<bool>,
    /// L1 tables of snapshots.
    pub inactive_l1: Option<bool>,
    /// L2 tables of snapshots.
    pub inactive_l2: Option<bool>,
    /// The directory of bitmaps.
    pub bitmap_directory: Option<bool>,
}

impl OverlapCheckSpec {
    /// What is checked if nobody says anything.
    pub const fn usual() -> Self {
        Self {
            template: None,
            main_header: None,
            active_l1: None,
            active_l2: None,
            refcount_table: None,
            refcount_block: None,
            snapshot_table: None,
            inactive_l1: None,
            inactive_l2: None,
            bitmap_directory: None,
        }
    }
}

/// Sets of overlap checks that have a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverlapTemplate {
    /// Nothing.
    None,
    /// What never moves while the image is in use.
    Constant,
    /// What is known without reading anything.
    Cached,
    /// Everything.
    All,
}

/// Kinds of encryption that a qcow2 image can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncryptionFormat {
    /// The old one.
    Aes,
    /// LUKS inside qcow2.
    Luks,
}

impl EncryptionFormat {
    /// As clients spell it.
    pub const fn name(self) -> &'static str {
        match self {
            EncryptionFormat::Aes => "aes",
            EncryptionFormat::Luks => "luks",
        }
    }
}
