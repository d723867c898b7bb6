//! Types of images: how they are created and how queries show them.

use crate::schema::nodes::{DETECT_ZEROES, REFERENCE};
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
static QCOW2_VERSION: Words = Words::of(&["v2", "v3"]);
static QCOW2_COMPRESSION: Words = Words::of(&["zlib", "zstd"]);
/// `BlockdevDriver`, all of it: what stands in an image as its backing file's format need not be a driver of ours.
static BACKING_FORMAT: Words = Words::of(&[
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "blkverify",
    "bochs",
    "cloop",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "dmg",
    "file",
    "snapshot-access",
    "ftp",
    "ftps",
    "gluster",
    "host_cdrom",
    "host_device",
    "http",
    "https",
    "iscsi",
    "luks",
    "nbd",
    "nfs",
    "null-aio",
    "null-co",
    "nvme",
    "parallels",
    "preallocate",
    "qcow",
    "qcow2",
    "qed",
    "quorum",
    "raw",
    "rbd",
    "replication",
    "ssh",
    "throttle",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
    "vvfat",
]);
static CREATE_QCOW2: Object = Object::of(&[
    required("file", Type::Alternate(&REFERENCE)),
    optional("data-file", Type::Alternate(&REFERENCE)),
    optional("data-file-raw", Type::Bool),
    optional("extended-l2", Type::Bool),
    required("size", Type::Size),
    optional("version", Type::Word(&QCOW2_VERSION)),
    optional("backing-file", Type::Text),
    optional("backing-fmt", Type::Word(&BACKING_FORMAT)),
    optional("encrypt", Type::Object(&CREATE_ENCRYPTION)),
    optional("cluster-size", Type::Size),
    optional("preallocation", Type::Word(&PREALLOCATION)),
    optional("lazy-refcounts", Type::Bool),
    optional("refcount-bits", Type::Int),
    optional("compression-type", Type::Word(&QCOW2_COMPRESSION)),
]);

static ENCRYPTION: Words = Words::of(&["qcow", "luks"]);
static CIPHER: Words = Words::of(&[
    "aes-128",
    "aes-192",
    "aes-256",
    "des",
    "3des",
    "cast5-128",
    "serpent-128",
    "serpent-192",
    "serpent-256",
    "twofish-128",
    "twofish-192",
    "twofish-256",
    "sm4",
]);
static CIPHER_MODE: Words = Words::of(&["ecb", "cbc", "xts", "ctr"]);
static IV_GENERATOR: Words = Words::of(&["plain", "plain64", "essiv"]);
static HASH: Words = Words::of(&[
    "md5",
    "sha1",
    "sha224",
    "sha256",
    "sha384",
    "sha512",
    "ripemd160",
    "sm3",
]);
static CREATE_ENCRYPTION: Object = Object::union(
    &[required("format", Type::Word(&ENCRYPTION))],
    "format",
    &[("qcow", &CREATE_AES), ("luks", &CREATE_LUKS)],
);
static CREATE_AES: Object = Object::of(&[optional("key-secret", Type::Text)]);
static CREATE_LUKS: Object = Object::of(&[
    optional("key-secret", Type::Text),
    optional("cipher-alg", Type::Word(&CIPHER)),
    optional("cipher-mode", Type::Word(&CIPHER_MODE)),
    optional("ivgen-alg", Type::Word(&IV_GENERATOR)),
    optional("ivgen-hash-alg", Type::Word(&HASH)),
    optional("hash-alg", Type::Word(&HASH)),
    optional("iter-time", Type::Int),
]);

/// Drivers that images can be made for.
static CREATE_DRIVER: Words = Words::of(&[
    "blkdebug",
    "file",
    "host_device",
    "null-aio",
    "null-co",
    "qcow2",
    "raw",
]);
/// `BlockdevCreateOptions`.
pub static CREATE_OPTIONS: Object = Object::union(
    &[required("driver", Type::Word(&CREATE_DRIVER))],
    "driver",
    &[
        ("file", &CREATE_FILE),
        ("qcow2", &CREATE_QCOW2),
        ("raw", &CREATE_RAW),
    ],
);

static AMEND_LUKS_STATE: Words = Words::of(&["active", "inactive"]);
static AMEND_LUKS: Object = Object::of(&[
    required("state", Type::Word(&AMEND_LUKS_STATE)),
    optional("new-secret", Type::Text),
    optional("old-secret", Type::Text),
    optional("keyslot", Type::Int),
    optional("iter-time", Type::Int),
    optional("secret", Type::Text),
]);
static AMEND_ENCRYPTION: Object = Object::union(
    &[required("format", Type::Word(&ENCRYPTION))],
    "format",
    &[("luks", &AMEND_LUKS)],
);
static AMEND_QCOW2: Object = Object::of(&[
    optional("encrypt", Type::Object(&AMEND_ENCRYPTION)),
    // Ours, named as in `blockdev-create`.
    optional("version", Type::Word(&QCOW2_VERSION)),
    optional("size", Type::Size),
    optional("backing-file", Type::Text),
    optional("backing-fmt", Type::Word(&BACKING_FORMAT)),
    optional("data-file-raw", Type::Bool),
    optional("lazy-refcounts", Type::Bool),
    optional("refcount-bits", Type::Int),
]);
/// `BlockdevAmendOptions`.
pub static AMEND_OPTIONS: Object = Object::union(
    &[required("driver", Type::Word(&CREATE_DRIVER))],
    "driver",
    &[("qcow2", &AMEND_QCOW2)],
);

static FORMAT_SPECIFIC_TYPE: Words = Words::of(&["qcow2", "file"]);
static FILE_DATA: Object = Object::of(&[optional("extent-size-hint", Type::Size)]);
static FILE_SPECIFIC: Object = Object::of(&[required("data", Type::Object(&FILE_DATA))]);
static BITMAP_FLAG: Words = Words::of(&["in-use", "auto"]);
static BITMAP_INFO: Object = Object::of(&[
    required("name", Type::Text),
    required("granularity", Type::Int),
    required("flags", Type::List(&Type::Word(&BITMAP_FLAG))),
]);
static COMPRESSION_TYPE: Words = Words::of(&["zlib", "zstd"]);
static QCOW2_DATA: Object = Object::of(&[
    required("compat", Type::Text),
    optional("data-file", Type::Text),
    optional("data-file-raw", Type::Bool),
    optional("extended-l2", Type::Bool),
    optional("lazy-refcounts", Type::Bool),
    optional("corrupt", Type::Bool),
    required("refcount-bits", Type::Int),
    optional("bitmaps", Type::List(&Type::Object(&BITMAP_INFO))),
    required("compression-type", Type::Word(&COMPRESSION_TYPE)),
]);
static QCOW2_SPECIFIC: Object = Object::of(&[required("data", Type::Object(&QCOW2_DATA))]);
static FORMAT_SPECIFIC: Object = Object::union(
    &[required("type", Type::Word(&FORMAT_SPECIFIC_TYPE))],
    "type",
    &[("qcow2", &QCOW2_SPECIFIC), ("file", &FILE_SPECIFIC)],
);
/// `SnapshotInfo`.
pub static SNAPSHOT_INFO: Object = Object::of(&[
    required("id", Type::Text),
    required("name", Type::Text),
    required("vm-state-size", Type::Int),
    required("date-sec", Type::Int),
    required("date-nsec", Type::Int),
    required("vm-clock-sec", Type::Int),
    required("vm-clock-nsec", Type::Int),
    optional("icount", Type::Int),
]);
static IMAGE_INFO: Object = Object::of(&[
    required("filename", Type::Text),
    required("format", Type::Text),
    optional("dirty-flag", Type::Bool),
    optional("actual-size", Type::Int),
    required("virtual-size", Type::Int),
    optional("cluster-size", Type::Int),
    optional("backing-filename", Type::Text),
    optional("full-backing-filename", Type::Text),
    optional("backing-filename-format", Type::Text),
    optional("snapshots", Type::List(&Type::Object(&SNAPSHOT_INFO))),
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
    optional("dirty-bitmaps", Type::List(&Type::Object(&DIRTY_INFO))),
]);

static DIRTY_INFO: Object = Object::of(&[
    optional("name", Type::Text),
    required("count", Type::Int),
    required("granularity", Type::Int),
    required("recording", Type::Bool),
    required("busy", Type::Bool),
    required("persistent", Type::Bool),
    optional("inconsistent", Type::Bool),
]);

/// An element of what `query-block` returns; without a machine there are none.
pub static BLOCK_INFO: Object = Object::of(&[
    required("device", Type::Text),
    required("type", Type::Text),
    required("removable", Type::Bool),
    required("locked", Type::Bool),
    optional("inserted", Type::Object(&DEVICE_INFO)),
]);
