//! Types of images: how they are created and how queries show them.

use crate::schema::nodes::{DETECT_ZEROES, DRIVER, REFERENCE};
use crate::schema::{Object, Type, Words, optional, required};

static PREALLOCATION: Words = Words::of(&["off", "metadata", "falloc", "full"]);
static CREATE_FILE: Object = Object::of(&[
    required("filename", Type::Text),
    required("size", Type::Size),
    optional("preallocation", Type::Word(&PREALLOCATION)),
    optional("nocow", Type::Bool),
    optional("extent-size-hint", Type::Size),
]);
static CREATE_RAW: Object = Object::of(&[
    required("file", Type::Alternate(&REFERENCE)),
    required("size", Type::Size),
    optional("preallocation", Type::Word(&PREALLOCATION)),
]);
/// `BlockdevCreateOptions`.
pub static CREATE_OPTIONS: Object = Object::union(
    &[required("driver", Type::Word(&DRIVER))],
    "driver",
    &[("file", &CREATE_FILE), ("raw", &CREATE_RAW)],
);

static FORMAT_SPECIFIC_TYPE: Words = Words::of(&["file"]);
static FILE_DATA: Object = Object::of(&[optional("extent-size-hint", Type::Size)]);
static FILE_SPECIFIC: Object = Object::of(&[required("data", Type::Object(&FILE_DATA))]);
static FORMAT_SPECIFIC: Object = Object::union(
    &[required("type", Type::Word(&FORMAT_SPECIFIC_TYPE))],
    "type",
    &[("file", &FILE_SPECIFIC)],
);
static IMAGE_INFO: Object = Object::of(&[
    required("filename", Type::Text),
    required("format", Type::Text),
    optional("dirty-flag", Type::Bool),
    optional("actual-size", Type::Int),
    required("virtual-size", Type::Int),
    optional("cluster-size", Type::Int),
    optional("format-specific", Type::Object(&FORMAT_SPECIFIC)),
    optional("backing-image", Type::Object(&IMAGE_INFO)),
]);

static CACHE_INFO: Object = Object::of(&[
    required("writeback", Type::Bool),
    required("direct", Type::Bool),
    required("no-flush", Type::Bool),
]);
/// `BlockDeviceInfo`.
pub static DEVICE_INFO: Object = Object::of(&[
    required("file", Type::Text),
    optional("node-name", Type::Text),
    required("ro", Type::Bool),
    required("drv", Type::Text),
    optional("backing_file", Type::Text),
    required("backing_file_depth", Type::Int),
    required("active", Type::Bool),
    required("encrypted", Type::Bool),
    required("detect_zeroes", Type::Word(&DETECT_ZEROES)),
    required("bps", Type::Int),
    required("bps_rd", Type::Int),
    required("bps_wr", Type::Int),
    required("iops", Type::Int),
    required("iops_rd", Type::Int),
    required("iops_wr", Type::Int),
    required("image", Type::Object(&IMAGE_INFO)),
    required("cache", Type::Object(&CACHE_INFO)),
    required("write_threshold", Type::Int),
]);

/// An element of what `query-block` returns; without a machine there are none.
pub static BLOCK_INFO: Object = Object::of(&[
    required("device", Type::Text),
    required("type", Type::Text),
    required("removable", Type::Bool),
    required("locked", Type::Bool),
    optional("inserted", Type::Object(&DEVICE_INFO)),
]);
