//! Types of checkpoints of several disks, which are ours.

use crate::schema::{Object, Type, optional, required};

static DISK: Object = Object::of(&[
    required("node", Type::Text),
    required("bitmap", Type::Text),
    optional("previous", Type::Text),
    optional("granularity", Type::Uint32),
]);

/// Arguments of `x-checkpoint-begin`.
pub static BEGIN: Object = Object::of(&[
    required("id", Type::Text),
    required("disks", Type::List(&Type::Object(&DISK))),
    optional("persistent", Type::Bool),
    optional("abort-on-disconnect", Type::Bool),
]);

/// Arguments of `x-checkpoint-commit`.
pub static COMMIT: Object = Object::of(&[
    required("id", Type::Text),
    optional("keep-previous", Type::Bool),
]);

/// Arguments of `x-checkpoint-abort`.
pub static ABORT: Object = Object::of(&[required("id", Type::Text)]);

static DISK_INFO: Object = Object::of(&[
    required("node", Type::Text),
    required("bitmap", Type::Text),
    required("persistent", Type::Bool),
    optional("previous", Type::Text),
    optional("changed", Type::Text),
]);

/// What `x-checkpoint-begin` returns, and `x-query-checkpoints` of each.
pub static CHECKPOINT: Object = Object::of(&[
    required("id", Type::Text),
    required("disks", Type::List(&Type::Object(&DISK_INFO))),
]);
