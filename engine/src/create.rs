//! How images are made by `blockdev-create`, as plain data.

use std::path::PathBuf;

use crate::request::NodeRef;

/// Arguments of `blockdev-create`.
#[derive(Clone, Debug, PartialEq)]
pub enum CreateSpec {
    /// A host file.
    File {
        /// Path on the host.
        filename: PathBuf,
        /// Length in bytes.
        size: u64,
        /// How room is reserved.
        preallocation: Option<CreatePreallocation>,
        /// Switch copy-on-write of the file system off for it.
        nocow: bool,
        /// Hint for the file system's extents in bytes; `None`: 1 MiB, 0: leave.
        extent_size_hint: Option<u64>,
    },
    /// Raw data on an existing node: its length, and room for it.
    Raw {
        /// The node; one that is described inline is opened for the job.
        file: NodeRef,
        /// Length in bytes.
        size: u64,
        /// How room is reserved.
        preallocation: Option<CreatePreallocation>,
    },
    /// A qcow2 image on an existing node.
    Qcow2(Box<CreateQcow2Spec>),
    /// A driver that QEMU lists without create options.
    Unsupported {
        /// Its name.
        driver: String,
    },
}

/// Preallocation of a new image, as clients can ask for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CreatePreallocation {
    /// None.
    Off,
    /// Metadata only.
    Metadata,
    /// Room reserved.
    Falloc,
    /// Zeroes written.
    Full,
}

/// A qcow2 image to make. Options left out are `None` and get QEMU's defaults; values are as the client gave them.
#[derive(Clone, Debug, PartialEq)]
pub struct CreateQcow2Spec {
    /// The node that the image goes to.
    pub file: NodeRef,
    /// The node for guest data outside of it.
    pub data_file: Option<NodeRef>,
    /// The data file reads as the guest's disk does.
    pub data_file_raw: bool,
    /// Tell subclusters apart.
    pub extended_l2: bool,
    /// Length of the guest's disk in bytes.
    pub size: u64,
    /// Version 2 of the format, not 3.
    pub version_2: bool,
    /// Name of the backing file.
    pub backing_file: Option<String>,
    /// Name of its format.
    pub backing_fmt: Option<String>,
    /// How to encrypt it.
    pub encrypt: Option<CreateEncryption>,
    /// Size of a cluster in bytes.
    pub cluster_size: Option<u64>,
    /// What is assigned and reserved.
    pub preallocation: Option<CreatePreallocation>,
    /// Let reference counts be written late.
    pub lazy_refcounts: bool,
    /// Width of a reference count in bits.
    pub refcount_bits: Option<i64>,
    /// Compressed clusters will be of zstd, not of zlib.
    pub zstd: bool,
}

/// How to encrypt a new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateEncryption {
    /// Id of the object that holds the key.
    pub key_secret: Option<String>,
}
