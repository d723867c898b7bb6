//! Types of nodes and objects: how they are described, and how the graph is shown.

use crate::schema::exports::ADDRESS;
use crate::schema::jobs::ON_CBW_ERROR;
use crate::schema::{Alternate, Object, Type, Words, optional, required};

/// Drivers that nodes can have.
pub static DRIVER: Words = Words::of(&[
    "blkdebug",
    "copy-before-write",
    "copy-on-read",
    "file",
    "host_device",
    "nbd",
    "null-aio",
    "null-co",
    "qcow2",
    "raw",
    "throttle",
    "snapshot-access",
]);
static DISCARD: Words = Words::of(&["ignore", "unmap"]);
/// `BlockdevDetectZeroesOptions`.
pub static DETECT_ZEROES: Words = Words::of(&["off", "on", "unmap"]);
static ON_OFF_AUTO: Words = Words::of(&["auto", "on", "off"]);
static AIO: Words = Words::of(&["threads", "native", "io_uring"]);
/// `BlockPermission`.
pub static PERMISSION: Words =
    Words::of(&["consistent-read", "write", "write-unchanged", "resize"]);

static CACHE: Object = Object::of(&[
    optional("direct", Type::Bool),
    optional("no-flush", Type::Bool),
]);

/// `BlockdevRef`.
pub static REFERENCE: Alternate = Alternate {
    name: "BlockdevRef",
    kinds: &[Type::Object(&OPTIONS), Type::Text],
};

static FILE: Object = Object {
    members: &[
        required("filename", Type::Text),
        optional("pr-manager", Type::Text),
        optional("locking", Type::Word(&ON_OFF_AUTO)),
        optional("aio", Type::Word(&AIO)),
        optional("aio-max-batch", Type::Int),
        optional("drop-cache", Type::Bool),
        optional("x-check-cache-dropped", Type::Bool).unstable(),
    ],
    union: None,
    features: &["dynamic-auto-read-only"],
};
static NULL: Object = Object::of(&[
    optional("size", Type::Int),
    optional("latency-ns", Type::Uint64),
    optional("read-zeroes", Type::Bool),
]);
static NBD: Object = Object::of(&[
    required("server", Type::Object(&ADDRESS)),
    optional("export", Type::Text),
    optional("tls-creds", Type::Text),
    optional("tls-hostname", Type::Text),
    optional("x-dirty-bitmap", Type::Text).unstable(),
    optional("reconnect-delay", Type::Uint32),
    optional("open-timeout", Type::Uint32),
    optional("x-connections", Type::Uint32).unstable(),
]);
static RAW: Object = Object::of(&[
    required("file", Type::Alternate(&REFERENCE)),
    optional("offset", Type::Int),
    optional("size", Type::Int),
]);

/// `BlockdevRefOrNull`.
static REFERENCE_OR_NULL: Alternate = Alternate {
    name: "BlockdevRefOrNull",
    kinds: &[Type::Object(&OPTIONS), Type::Text, Type::Null],
};
static OVERLAP_TEMPLATE: Words = Words::of(&["none", "constant", "cached", "all"]);
static OVERLAP_FLAGS: Object = Object::of(&[
    optional("template", Type::Word(&OVERLAP_TEMPLATE)),
    optional("main-header", Type::Bool),
    optional("active-l1", Type::Bool),
    optional("active-l2", Type::Bool),
    optional("refcount-table", Type::Bool),
    optional("refcount-block", Type::Bool),
    optional("snapshot-table", Type::Bool),
    optional("inactive-l1", Type::Bool),
    optional("inactive-l2", Type::Bool),
    optional("bitmap-directory", Type::Bool),
]);
static OVERLAP_CHECKS: Alternate = Alternate {
    name: "Qcow2OverlapChecks",
    kinds: &[Type::Object(&OVERLAP_FLAGS), Type::Word(&OVERLAP_TEMPLATE)],
};
/// `BlockdevQcow2EncryptionFormat`.
pub static ENCRYPTION_FORMAT: Words = Words::of(&["aes", "luks"]);
static KEY_SECRET: Object = Object::of(&[optional("key-secret", Type::Text)]);
static ENCRYPTION: Object = Object::union(
    &[required("format", Type::Word(&ENCRYPTION_FORMAT))],
    "format",
    &[("aes", &KEY_SECRET), ("luks", &KEY_SECRET)],
);
static QCOW2: Object = Object::of(&[
    required("file", Type::Alternate(&REFERENCE)),
    optional("backing", Type::Alternate(&REFERENCE_OR_NULL)),
    optional("lazy-refcounts", Type::Bool),
    optional("pass-discard-request", Type::Bool),
    optional("pass-discard-snapshot", Type::Bool),
    optional("pass-discard-other", Type::Bool),
    optional("discard-no-unref", Type::Bool),
    optional("overlap-check", Type::Alternate(&OVERLAP_CHECKS)),
    optional("cache-size", Type::Int),
    optional("l2-cache-size", Type::Int),
    optional("l2-cache-entry-size", Type::Int),
    optional("refcount-cache-size", Type::Int),
    optional("cache-clean-interval", Type::Int),
    optional("encrypt", Type::Object(&ENCRYPTION)),
    optional("data-file", Type::Alternate(&REFERENCE)),
]);

/// `BlkdebugEvent`.
pub static BLKDEBUG_EVENT: Words = Words::of(&[
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
]);
static BLKDEBUG_IOTYPE: Words = Words::of(&[
    "read",
    "write",
    "write-zeroes",
    "discard",
    "flush",
    "block-status",
]);
static INJECT_ERROR: Object = Object::of(&[
    required("event", Type::Word(&BLKDEBUG_EVENT)),
    optional("state", Type::Int),
    optional("iotype", Type::Word(&BLKDEBUG_IOTYPE)),
    optional("errno", Type::Int),
    optional("sector", Type::Int),
    optional("once", Type::Bool),
    optional("immediately", Type::Bool),
]);
static SET_STATE: Object = Object::of(&[
    required("event", Type::Word(&BLKDEBUG_EVENT)),
    optional("state", Type::Int),
    required("new_state", Type::Int),
]);
static BLKDEBUG: Object = Object::of(&[
    required("image", Type::Alternate(&REFERENCE)),
    optional("config", Type::Text),
    optional("align", Type::Int),
    optional("max-transfer", Type::Int32),
    optional("opt-write-zero", Type::Int32),
    optional("max-write-zero", Type::Int32),
    optional("opt-discard", Type::Int32),
    optional("max-discard", Type::Int32),
    optional("inject-error", Type::List(&Type::Object(&INJECT_ERROR))),
    optional("set-state", Type::List(&Type::Object(&SET_STATE))),
    optional("take-child-perms", Type::List(&Type::Word(&PERMISSION))),
    optional("unshare-child-perms", Type::List(&Type::Word(&PERMISSION))),
]);

static DIRTY_BITMAP: Object =
    Object::of(&[required("node", Type::Text), required("name", Type::Text)]);

static COPY_BEFORE_WRITE: Object = Object::of(&[
    required("file", Type::Alternate(&REFERENCE)),
    required("target", Type::Alternate(&REFERENCE)),
    optional("bitmap", Type::Object(&DIRTY_BITMAP)),
    optional("on-cbw-error", Type::Word(&ON_CBW_ERROR)),
    optional("cbw-timeout", Type::Uint32),
    optional("min-cluster-size", Type::Size),
]);

static SNAPSHOT_ACCESS: Object = Object::of(&[required("file", Type::Alternate(&REFERENCE))]);

static COPY_ON_READ: Object = Object::of(&[
    required("file", Type::Alternate(&REFERENCE)),
    optional("bottom", Type::Text),
]);

static THROTTLE: Object = Object::of(&[
    required("throttle-group", Type::Text),
    required("file", Type::Alternate(&REFERENCE)),
]);

/// `BlockdevOptions`.
pub static OPTIONS: Object = Object::union(
    &[
        required("driver", Type::Word(&DRIVER)),
        optional("node-name", Type::Text),
        optional("discard", Type::Word(&DISCARD)),
        optional("cache", Type::Object(&CACHE)),
        optional("active", Type::Bool),
        optional("read-only", Type::Bool),
        optional("auto-read-only", Type::Bool),
        optional("force-share", Type::Bool),
        optional("detect-zeroes", Type::Word(&DETECT_ZEROES)),
    ],
    "driver",
    &[
        ("blkdebug", &BLKDEBUG),
        ("copy-before-write", &COPY_BEFORE_WRITE),
        ("copy-on-read", &COPY_ON_READ),
        ("file", &FILE),
        ("host_device", &FILE),
        ("nbd", &NBD),
        ("null-aio", &NULL),
        ("null-co", &NULL),
        ("qcow2", &QCOW2),
        ("raw", &RAW),
        ("throttle", &THROTTLE),
        ("snapshot-access", &SNAPSHOT_ACCESS),
    ],
);

/// Arguments of `blockdev-del`.
pub static BY_NAME: Object = Object::of(&[required("node-name", Type::Text)]);
/// Arguments of `blockdev-reopen`.
pub static REOPEN: Object = Object::of(&[required("options", Type::List(&Type::Object(&OPTIONS)))]);
/// Arguments of `blockdev-set-active`.
pub static SET_ACTIVE: Object = Object::of(&[
    optional("node-name", Type::Text),
    required("active", Type::Bool),
]);
/// `BlockdevSnapshot`.
pub static SNAPSHOT: Object = Object::of(&[
    required("node", Type::Text),
    required("overlay", Type::Text),
]);
/// Whether an image is there already.
pub static NEW_IMAGE_MODE: Words = Words::of(&["existing", "absolute-paths"]);
/// `BlockdevSnapshotSync`.
pub static SNAPSHOT_SYNC: Object = Object::of(&[
    optional("device", Type::Text),
    optional("node-name", Type::Text),
    required("snapshot-file", Type::Text),
    optional("snapshot-node-name", Type::Text),
    optional("format", Type::Text),
    optional("mode", Type::Word(&NEW_IMAGE_MODE)),
]);
/// Arguments of `x-blockdev-change`.
pub static CHANGE: Object = Object::of(&[
    required("parent", Type::Text),
    optional("child", Type::Text),
    optional("node", Type::Text),
]);
/// Arguments of `block_resize`.
pub static RESIZE: Object = Object::of(&[
    optional("device", Type::Text),
    optional("node-name", Type::Text),
    required("size", Type::Int),
]);
/// `BlockdevSnapshotInternal`.
pub static INTERNAL_SNAPSHOT: Object =
    Object::of(&[required("device", Type::Text), required("name", Type::Text)]);
/// Arguments of `blockdev-snapshot-delete-internal-sync`.
pub static INTERNAL_SNAPSHOT_BY_NAME: Object = Object::of(&[
    required("device", Type::Text),
    optional("id", Type::Text),
    optional("name", Type::Text),
]);
/// Arguments of `change-backing-file`.
pub static CHANGE_BACKING_FILE: Object = Object::of(&[
    required("device", Type::Text),
    required("image-node-name", Type::Text),
    required("backing-file", Type::Text),
]);
/// Arguments of `query-named-block-nodes`.
pub static QUERY: Object = Object::of(&[optional("flat", Type::Bool)]);

static TEXT_OR_NULL: Alternate = Alternate {
    name: "StrOrNull",
    kinds: &[Type::Text, Type::Null],
};
/// Arguments of `x-blockdev-set-iothread`.
pub static SET_IOTHREAD: Object = Object::of(&[
    required("node-name", Type::Text),
    required("iothread", Type::Alternate(&TEXT_OR_NULL)),
    optional("force", Type::Bool),
]);

/// Data of `BLOCK_IMAGE_CORRUPTED`.
pub static IMAGE_CORRUPTED: Object = Object::of(&[
    required("device", Type::Text),
    optional("node-name", Type::Text),
    required("msg", Type::Text),
    optional("offset", Type::Int),
    optional("size", Type::Int),
    required("fatal", Type::Bool),
]);

static GRAPH_NODE_TYPE: Words = Words::of(&["block-backend", "block-job", "block-driver"]);
static GRAPH_NODE: Object = Object::of(&[
    required("id", Type::Uint64),
    required("type", Type::Word(&GRAPH_NODE_TYPE)),
    required("name", Type::Text),
]);
static GRAPH_EDGE: Object = Object::of(&[
    required("parent", Type::Uint64),
    required("child", Type::Uint64),
    required("name", Type::Text),
    required("perm", Type::List(&Type::Word(&PERMISSION))),
    required("shared-perm", Type::List(&Type::Word(&PERMISSION))),
]);
/// `XDbgBlockGraph`.
pub static GRAPH: Object = Object::of(&[
    required("nodes", Type::List(&Type::Object(&GRAPH_NODE))),
    required("edges", Type::List(&Type::Object(&GRAPH_EDGE))),
]);
