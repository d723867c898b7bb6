//! Types of jobs: verbs, starters, queries and events.

use crate::schema::images::{AMEND_OPTIONS, CREATE_OPTIONS};
use crate::schema::nodes::NEW_IMAGE_MODE;
use crate::schema::{EMPTY, Object, Type, Words, optional, required};

static JOB_TYPE: Words = Words::of(&["commit", "stream", "mirror", "backup", "create", "amend"]);
static JOB_STATUS: Words = Words::of(&[
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
]);
static IO_STATUS: Words = Words::of(&["ok", "failed", "nospace"]);
static COPY_MODE: Words = Words::of(&["background", "write-blocking"]);
static SYNC_MODE: Words = Words::of(&["top", "full", "none", "incremental", "bitmap"]);
static BITMAP_MODE: Words = Words::of(&["on-success", "never", "always"]);
static ON_ERROR: Words = Words::of(&["report", "ignore", "enospc", "stop", "auto"]);
static OPERATION: Words = Words::of(&["read", "write"]);
static ACTION: Words = Words::of(&["ignore", "report", "stop"]);

/// Arguments of commands that only name a job by `id`.
pub static BY_ID: Object = Object::of(&[required("id", Type::Text)]);
/// Arguments of commands that only name a job by `device`.
pub static BY_DEVICE: Object = Object::of(&[required("device", Type::Text)]);
/// Arguments of `block-job-cancel`.
pub static CANCEL: Object = Object::of(&[
    required("device", Type::Text),
    optional("force", Type::Bool),
]);
/// Arguments of `block-job-set-speed`.
pub static SET_SPEED: Object =
    Object::of(&[required("device", Type::Text), required("speed", Type::Int)]);

static CHANGE_MIRROR: Object = Object::of(&[required("copy-mode", Type::Word(&COPY_MODE))]);
/// Arguments of `block-job-change`.
pub static CHANGE: Object = Object::union(
    &[
        required("id", Type::Text),
        required("type", Type::Word(&JOB_TYPE)),
    ],
    "type",
    &[("mirror", &CHANGE_MIRROR)],
);

static BACKUP_PERF: Object = Object::of(&[
    optional("use-copy-range", Type::Bool),
    optional("max-workers", Type::Int),
    optional("max-chunk", Type::Int),
    optional("min-cluster-size", Type::Size),
]);
/// What becomes of a write when what it is about to change cannot be saved.
pub(super) static ON_CBW_ERROR: Words = Words::of(&["break-guest-write", "break-snapshot"]);
/// Arguments of `blockdev-backup`.
pub static BACKUP: Object = Object::of(&[
    optional("job-id", Type::Text),
    required("device", Type::Text),
    required("sync", Type::Word(&SYNC_MODE)),
    optional("speed", Type::Int),
    optional("bitmap", Type::Text),
    optional("bitmap-mode", Type::Word(&BITMAP_MODE)),
    optional("compress", Type::Bool),
    optional("on-source-error", Type::Word(&ON_ERROR)),
    optional("on-target-error", Type::Word(&ON_ERROR)),
    optional("auto-finalize", Type::Bool),
    optional("auto-dismiss", Type::Bool),
    optional("filter-node-name", Type::Text),
    optional("discard-source", Type::Bool),
    optional("x-perf", Type::Object(&BACKUP_PERF)).unstable(),
    // As of QEMU 10.1.
    optional("on-cbw-error", Type::Word(&ON_CBW_ERROR)),
    optional("x-cbw-timeout", Type::Uint32).unstable(),
    optional("x-manifest", Type::Text).unstable(),
    optional("x-onto-manifest", Type::Text).unstable(),
    optional("x-verify", Type::Bool).unstable(),
    required("target", Type::Text),
]);
/// Arguments of `drive-backup`.
pub static DRIVE_BACKUP: Object = Object::of(&[
    optional("job-id", Type::Text),
    required("device", Type::Text),
    required("sync", Type::Word(&SYNC_MODE)),
    optional("speed", Type::Int),
    optional("bitmap", Type::Text),
    optional("bitmap-mode", Type::Word(&BITMAP_MODE)),
    optional("compress", Type::Bool),
    optional("on-source-error", Type::Word(&ON_ERROR)),
    optional("on-target-error", Type::Word(&ON_ERROR)),
    optional("auto-finalize", Type::Bool),
    optional("auto-dismiss", Type::Bool),
    optional("filter-node-name", Type::Text),
    optional("discard-source", Type::Bool),
    optional("x-perf", Type::Object(&BACKUP_PERF)).unstable(),
    // As of QEMU 10.1.
    optional("on-cbw-error", Type::Word(&ON_CBW_ERROR)),
    optional("x-cbw-timeout", Type::Uint32).unstable(),
    optional("x-manifest", Type::Text).unstable(),
    optional("x-onto-manifest", Type::Text).unstable(),
    optional("x-verify", Type::Bool).unstable(),
    required("target", Type::Text),
    optional("format", Type::Text),
    optional("mode", Type::Word(&NEW_IMAGE_MODE)),
]);
/// Arguments of `blockdev-mirror`.
pub static MIRROR: Object = Object::of(&[
    optional("job-id", Type::Text),
    required("device", Type::Text),
    required("target", Type::Text),
    optional("replaces", Type::Text),
    required("sync", Type::Word(&SYNC_MODE)),
    optional("speed", Type::Int),
    optional("granularity", Type::Uint32),
    optional("buf-size", Type::Int),
    optional("on-source-error", Type::Word(&ON_ERROR)),
    optional("on-target-error", Type::Word(&ON_ERROR)),
    optional("filter-node-name", Type::Text),
    optional("copy-mode", Type::Word(&COPY_MODE)),
    optional("auto-finalize", Type::Bool),
    optional("auto-dismiss", Type::Bool),
    optional("target-is-zero", Type::Bool),
    optional("bitmap", Type::Text),
    optional("bitmap-mode", Type::Word(&BITMAP_MODE)),
    optional("x-manifest", Type::Text).unstable(),
    optional("x-onto-manifest", Type::Text).unstable(),
    optional("x-verify", Type::Bool).unstable(),
]);
/// Arguments of `drive-mirror`.
pub static DRIVE_MIRROR: Object = Object::of(&[
    optional("job-id", Type::Text),
    required("device", Type::Text),
    required("target", Type::Text),
    optional("format", Type::Text),
    optional("node-name", Type::Text),
    optional("replaces", Type::Text),
    required("sync", Type::Word(&SYNC_MODE)),
    optional("mode", Type::Word(&NEW_IMAGE_MODE)),
    optional("speed", Type::Int),
    optional("granularity", Type::Uint32),
    optional("buf-size", Type::Int),
    optional("on-source-error", Type::Word(&ON_ERROR)),
    optional("on-target-error", Type::Word(&ON_ERROR)),
    optional("unmap", Type::Bool),
    optional("copy-mode", Type::Word(&COPY_MODE)),
    optional("auto-finalize", Type::Bool),
    optional("auto-dismiss", Type::Bool),
    optional("bitmap", Type::Text),
    optional("bitmap-mode", Type::Word(&BITMAP_MODE)),
    optional("x-manifest", Type::Text).unstable(),
    optional("x-onto-manifest", Type::Text).unstable(),
    optional("x-verify", Type::Bool).unstable(),
]);
/// Arguments of `block-commit`.
pub static COMMIT: Object = Object::of(&[
    optional("job-id", Type::Text),
    required("device", Type::Text),
    optional("base-node", Type::Text),
    optional("base", Type::Text).deprecated(),
    optional("top-node", Type::Text),
    optional("top", Type::Text).deprecated(),
    optional("backing-file", Type::Text),
    optional("backing-mask-protocol", Type::Bool),
    optional("speed", Type::Int),
    optional("on-error", Type::Word(&ON_ERROR)),
    optional("filter-node-name", Type::Text),
    optional("auto-finalize", Type::Bool),
    optional("auto-dismiss", Type::Bool),
]);
/// Arguments of `block-stream`.
pub static STREAM: Object = Object::of(&[
    optional("job-id", Type::Text),
    required("device", Type::Text),
    optional("base", Type::Text),
    optional("base-node", Type::Text),
    optional("backing-file", Type::Text),
    optional("backing-mask-protocol", Type::Bool),
    optional("bottom", Type::Text),
    optional("speed", Type::Int),
    optional("on-error", Type::Word(&ON_ERROR)),
    optional("filter-node-name", Type::Text),
    optional("auto-finalize", Type::Bool),
    optional("auto-dismiss", Type::Bool),
]);
static PLANNED: Words = Words::of(&["commit", "stream"]);
/// Arguments of `x-plan`: those of the job, and which it is.
pub static PLAN: Object = Object::union(
    &[required("job", Type::Word(&PLANNED))],
    "job",
    &[("commit", &COMMIT), ("stream", &STREAM)],
);
static ROOM: Object = Object::of(&[
    required("data", Type::Int),
    required("metadata", Type::Int),
    required("bitmaps", Type::Int),
]);
/// What `x-plan` returns.
pub static PLAN_INFO: Object = Object::of(&[
    required("layers", Type::List(&Type::Object(&CHAIN_LAYER))),
    required("target", Type::Object(&CHAIN_LAYER)),
    required("bytes-to-copy", Type::Int),
    required("bytes-to-zero", Type::Int),
    required("space-needed", Type::Object(&ROOM)),
    optional("space-free", Type::Int),
    optional("fits", Type::Bool),
]);
/// Arguments of `blockdev-create`.
pub static CREATE: Object = Object::of(&[
    required("job-id", Type::Text),
    required("options", Type::Object(&CREATE_OPTIONS)),
]);

/// Arguments of `x-blockdev-amend`.
pub static AMEND: Object = Object::of(&[
    required("job-id", Type::Text),
    required("node-name", Type::Text),
    required("options", Type::Object(&AMEND_OPTIONS)),
    optional("force", Type::Bool),
]);

/// `JobInfo`.
pub static JOB_INFO: Object = Object::of(&[
    required("id", Type::Text),
    required("type", Type::Word(&JOB_TYPE)),
    required("status", Type::Word(&JOB_STATUS)),
    required("current-progress", Type::Int),
    required("total-progress", Type::Int),
    optional("error", Type::Text),
    optional("x-chain", Type::List(&Type::Object(&CHAIN_LAYER))).unstable(),
    optional("x-dirty-bytes", Type::Int).unstable(),
    optional("x-dirty-rate", Type::Int).unstable(),
    optional("x-copy-rate", Type::Int).unstable(),
    optional("x-converges", Type::Bool).unstable(),
]);
/// One image of a chain.
pub static CHAIN_LAYER: Object = Object::of(&[
    required("node-name", Type::Text),
    required("driver", Type::Text),
    required("filename", Type::Text),
    required("read-only", Type::Bool),
    optional("backing-filename", Type::Text),
]);
static MIRROR_INFO: Object = Object::of(&[required("actively-synced", Type::Bool)]);
/// `BlockJobInfo`.
pub static BLOCK_JOB_INFO: Object = Object::union(
    &[
        required("type", Type::Word(&JOB_TYPE)),
        required("device", Type::Text),
        required("len", Type::Int),
        required("offset", Type::Int),
        required("busy", Type::Bool),
        required("paused", Type::Bool),
        required("speed", Type::Int),
        required("io-status", Type::Word(&IO_STATUS)),
        required("ready", Type::Bool),
        required("status", Type::Word(&JOB_STATUS)),
        required("auto-finalize", Type::Bool),
        required("auto-dismiss", Type::Bool),
        optional("error", Type::Text),
        optional("x-dirty-bytes", Type::Int).unstable(),
        optional("x-dirty-rate", Type::Int).unstable(),
        optional("x-copy-rate", Type::Int).unstable(),
        optional("x-converges", Type::Bool).unstable(),
    ],
    "type",
    &[("mirror", &MIRROR_INFO), ("backup", &EMPTY)],
);

/// Data of `JOB_STATUS_CHANGE`.
pub static JOB_STATUS_CHANGE: Object = Object::of(&[
    required("id", Type::Text),
    required("status", Type::Word(&JOB_STATUS)),
]);
/// Data of `BLOCK_JOB_CANCELLED` and `BLOCK_JOB_READY`.
pub static BLOCK_JOB_ENDED: Object = Object::of(&[
    required("type", Type::Word(&JOB_TYPE)),
    required("device", Type::Text),
    required("len", Type::Int),
    required("offset", Type::Int),
    required("speed", Type::Int),
]);
/// Data of `BLOCK_JOB_COMPLETED`.
pub static BLOCK_JOB_FAILED: Object = Object::of(&[
    required("type", Type::Word(&JOB_TYPE)),
    required("device", Type::Text),
    required("len", Type::Int),
    required("offset", Type::Int),
    required("speed", Type::Int),
    optional("error", Type::Text),
]);
/// Data of `BLOCK_JOB_ERROR`.
pub static BLOCK_JOB_ERROR: Object = Object::of(&[
    required("device", Type::Text),
    required("operation", Type::Word(&OPERATION)),
    required("action", Type::Word(&ACTION)),
]);
/// Data of `BLOCK_JOB_PENDING`.
pub static BLOCK_JOB_PENDING: Object = Object::of(&[
    required("type", Type::Word(&JOB_TYPE)),
    required("id", Type::Text),
]);
