//! [`BlkdebugSpec`]: what a `blkdebug` node is told: its limits, its faults and state changes, and the names of its events.

use std::path::PathBuf;

use crate::request::{NodeRef, Permission};

/// Options of `blkdebug`.
#[derive(Clone, Debug, PartialEq)]
pub struct BlkdebugSpec {
    /// The node below.
    pub image: NodeRef,
    /// A file of rules (QEMU's `config`).
    pub config: Option<PathBuf>,
    /// Request alignment in bytes.
    pub align: Option<i64>,
    /// Largest transfer in bytes.
    pub max_transfer: Option<i32>,
    /// Preferred zero request in bytes.
    pub opt_write_zero: Option<i32>,
    /// Largest zero request in bytes.
    pub max_write_zero: Option<i32>,
    /// Preferred discard in bytes.
    pub opt_discard: Option<i32>,
    /// Largest discard in bytes.
    pub max_discard: Option<i32>,
    /// Faults.
    pub inject_error: Vec<InjectError>,
    /// State changes.
    pub set_state: Vec<SetState>,
    /// Permissions additionally taken on the child.
    pub take_child_perms: Vec<Permission>,
    /// Permissions additionally not shared on the child.
    pub unshare_child_perms: Vec<Permission>,
}

impl BlkdebugSpec {
    /// A filter above `image` that changes nothing.
    pub const fn over(image: NodeRef) -> Self {
        Self {
            image,
            config: None,
            align: None,
            max_transfer: None,
            opt_write_zero: None,
            max_write_zero: None,
            opt_discard: None,
            max_discard: None,
            inject_error: Vec::new(),
            set_state: Vec::new(),
            take_child_perms: Vec::new(),
            unshare_child_perms: Vec::new(),
        }
    }
}

/// The events that rules of `blkdebug` may name. Those of formats that are not there never come about.
pub const BLKDEBUG_EVENTS: [&str; 48] = [
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_aio",
    "read_backing_aio",
    "read_compressed",
    "write_aio",
    "write_compressed",
    "vmstate_load",
    "vmstate_save",
    "cow_read",
    "cow_write",
    "reftable_load",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_update_part",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_free",
    "flush_to_os",
    "flush_to_disk",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "pwritev",
    "pwritev_zero",
    "pwritev_done",
    "empty_image_prepare",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
    "cor_write",
    "cluster_alloc_space",
    "none",
];

/// One fault of `blkdebug`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InjectError {
    /// Name of the event that arms it (`none`: armed from the start).
    pub event: String,
    /// State in which it is active; `None` or 0: any.
    pub state: Option<i64>,
    /// Which requests fail; `None`: read, write, write-zeroes, discard and flush.
    pub iotype: Option<BlkdebugIo>,
    /// Error number; `None`: `EIO`.
    pub errno: Option<i64>,
    /// Fail only requests that touch this 512-byte sector; `None` or -1: any.
    pub sector: Option<i64>,
    /// Fail once; `None`: every time.
    pub once: Option<bool>,
    /// Fail without letting others go first; `None`: let them.
    pub immediately: Option<bool>,
}

/// One state change of `blkdebug`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetState {
    /// Name of the event.
    pub event: String,
    /// State in which it acts; `None` or 0: any.
    pub state: Option<i64>,
    /// State afterwards.
    pub new_state: i64,
}

/// A kind of request, for `blkdebug`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlkdebugIo {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Zero requests.
    WriteZeroes,
    /// Discards.
    Discard,
    /// Flushes.
    Flush,
    /// Questions about allocation.
    BlockStatus,
}

impl BlkdebugIo {
    /// Every kind.
    pub const ALL: [Self; 6] = [
        BlkdebugIo::Read,
        BlkdebugIo::Write,
        BlkdebugIo::WriteZeroes,
        BlkdebugIo::Discard,
        BlkdebugIo::Flush,
        BlkdebugIo::BlockStatus,
    ];

    /// As clients spell it.
    pub const fn name(self) -> &'static str {
        match self {
            BlkdebugIo::Read => "read",
            BlkdebugIo::Write => "write",
            BlkdebugIo::WriteZeroes => "write-zeroes",
            BlkdebugIo::Discard => "discard",
            BlkdebugIo::Flush => "flush",
            BlkdebugIo::BlockStatus => "block-status",
        }
    }
}
