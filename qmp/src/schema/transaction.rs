//! Types of transactions.

use crate::schema::bitmaps::{ADD, BITMAP, MERGE};
use crate::schema::jobs::{BACKUP, COMMIT, DRIVE_BACKUP, MIRROR, STREAM};
use crate::schema::nodes::{INTERNAL_SNAPSHOT, SNAPSHOT, SNAPSHOT_SYNC};
use crate::schema::{EMPTY, Object, Type, Words, optional, required};

/// `ActionCompletionMode`.
pub static COMPLETION_MODE: Words = Words::of(&["individual", "grouped"]);

/// `TransactionActionKind`, and the jobs that only Blockyard takes.
pub static ACTION_KIND: Words = Words::of(&[
    "abort",
    "block-dirty-bitmap-add",
    "block-dirty-bitmap-remove",
    "block-dirty-bitmap-clear",
    "block-dirty-bitmap-enable",
    "block-dirty-bitmap-disable",
    "block-dirty-bitmap-merge",
    "blockdev-backup",
    "blockdev-snapshot",
    "blockdev-snapshot-internal-sync",
    "blockdev-snapshot-sync",
    "drive-backup",
    "blockdev-mirror",
    "block-commit",
    "block-stream",
]);

macro_rules! wrapped {
    ($name:ident, $arguments:expr) => {
        static $name: Object = Object::of(&[required("data", Type::Object(&$arguments))]);
    };
}

wrapped!(WITH_NOTHING, EMPTY);
wrapped!(WITH_ADD, ADD);
wrapped!(WITH_BITMAP, BITMAP);
wrapped!(WITH_MERGE, MERGE);
wrapped!(WITH_BACKUP, BACKUP);
wrapped!(WITH_SNAPSHOT, SNAPSHOT);
wrapped!(WITH_INTERNAL_SNAPSHOT, INTERNAL_SNAPSHOT);
wrapped!(WITH_SNAPSHOT_SYNC, SNAPSHOT_SYNC);
wrapped!(WITH_DRIVE_BACKUP, DRIVE_BACKUP);
wrapped!(WITH_MIRROR, MIRROR);
wrapped!(WITH_COMMIT, COMMIT);
wrapped!(WITH_STREAM, STREAM);

/// `TransactionAction`.
pub static ACTION: Object = Object::union(
    &[required("type", Type::Word(&ACTION_KIND))],
    "type",
    &[
        ("abort", &WITH_NOTHING),
        ("block-dirty-bitmap-add", &WITH_ADD),
        ("block-dirty-bitmap-remove", &WITH_BITMAP),
        ("block-dirty-bitmap-clear", &WITH_BITMAP),
        ("block-dirty-bitmap-enable", &WITH_BITMAP),
        ("block-dirty-bitmap-disable", &WITH_BITMAP),
        ("block-dirty-bitmap-merge", &WITH_MERGE),
        ("blockdev-backup", &WITH_BACKUP),
        ("blockdev-snapshot", &WITH_SNAPSHOT),
        ("blockdev-snapshot-internal-sync", &WITH_INTERNAL_SNAPSHOT),
        ("blockdev-snapshot-sync", &WITH_SNAPSHOT_SYNC),
        ("drive-backup", &WITH_DRIVE_BACKUP),
        ("blockdev-mirror", &WITH_MIRROR),
        ("block-commit", &WITH_COMMIT),
        ("block-stream", &WITH_STREAM),
    ],
);

/// `TransactionProperties`.
pub static PROPERTIES: Object =
    Object::of(&[optional("completion-mode", Type::Word(&COMPLETION_MODE))]);

/// Arguments of `transaction`.
pub static TRANSACTION: Object = Object::of(&[
    required("actions", Type::List(&Type::Object(&ACTION))),
    optional("properties", Type::Object(&PROPERTIES)),
]);
