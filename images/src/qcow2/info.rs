//! What an image says of itself, as plain data for `query-named-block-nodes` and `blockyard info`.

use crate::qcow2::layout::bitmaps::Bitmap;
use crate::qcow2::layout::fields::until_nul;
use crate::qcow2::layout::snapshots::Snapshot;
use crate::qcow2::open::OpenedImage;
use crate::qcow2::units::{Compression, Version};

/// The description of an image. Names may be any bytes in the file; those that are no text are replaced here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageInfo {
    /// Length of the guest's disk in bytes.
    pub virtual_size_bytes: u64,
    /// Size of a cluster in bytes.
    pub cluster_bytes: u64,
    /// `None`: version 2, whose `compat` is 0.10.
    pub version_3: Option<Version3Info>,
    /// Width of reference counts in bits.
    pub refcount_bits: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Whether guest data is encrypted.
    pub encrypted: bool,
    /// Whether it was not closed after a use with lazy refcounts.
    pub dirty: bool,
    /// Name of the backing file as it stands in the header.
    pub backing_file: Option<String>,
    /// Driver of the backing file, if there is one and the header says so.
    pub backing_format: Option<String>,
    /// The internal snapshots, in the order of their table.
    pub snapshots: Vec<SnapshotInfo>,
}

/// What only version 3 has; `compat` is 1.1.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Version3Info {
    /// Whether reference counts may be written late.
    pub lazy_refcounts: bool,
    /// Whether it has been found corrupt.
    pub corrupt: bool,
    /// Whether L2 entries tell subclusters apart.
    pub extended_l2: bool,
    /// Name of the external data file, if the header names one, as QEMU shows it: whether it has a meaning or not.
    pub data_file: Option<String>,
    /// Whether the external data file reads as the guest's disk does; `None`: guest data is in the image.
    pub data_file_raw: Option<bool>,
    /// The bitmaps, in the order of their directory.
    pub bitmaps: Vec<BitmapInfo>,
}

/// A bitmap that is kept in the image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes that one bit stands for.
    pub granularity_bytes: u64,
    /// Its content is out of date (`in-use`).
    pub in_use: bool,
    /// It records every change (`auto`).
    pub auto: bool,
}

/// An internal snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotInfo {
    /// Unique.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Length of the saved state of the machine in bytes; 0: none.
    pub vm_state_bytes: u64,
    /// When it was made, in seconds since 1970.
    pub date_seconds: u32,
    /// And nanoseconds.
    pub date_nanoseconds: u32,
    /// How long the guest had been running, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Instructions the guest had executed, if that is known.
    pub icount: Option<u64>,
    /// Length of the guest's disk in bytes.
    pub disk_bytes: u64,
}

impl ImageInfo {
    /// Of an image as it was opened.
    pub fn of(image: &OpenedImage) -> Self {
        let header = &image.header;
        let version_3 = match header.geometry.version() {
            Version::V2 => None,
            Version::V3 => Some(Version3Info::of(image)),
        };
        let backing_format = header.extensions.backing_format.as_deref();
        Self {
            virtual_size_bytes: header.guest_bytes(),
            cluster_bytes: header.geometry.cluster_bytes(),
            version_3,
            refcount_bits: header.geometry.refcount_bits(),
            compression: header.compression,
            encrypted: header.crypt_method != 0,
            dirty: header.is_dirty(),
            backing_file: header.backing_name.as_deref().map(text),
            backing_format: backing_format
                .filter(|_| header.backing_name.is_some())
                .map(text),
            snapshots: snapshots(image),
        }
    }
}

impl Version3Info {
    fn of(image: &OpenedImage) -> Self {
        let header = &image.header;
        let bitmaps = image.bitmaps.iter().map(BitmapInfo::of);
        Self {
            lazy_refcounts: header.lazy_refcounts(),
            corrupt: header.is_corrupt(),
            extended_l2: header.geometry.extended_l2(),
            data_file: header.extensions.data_file_name.as_deref().map(text),
            data_file_raw: header.has_data_file().then_some(header.is_data_file_raw()),
            bitmaps: bitmaps.collect(),
        }
    }
}

impl BitmapInfo {
    /// Of a bitmap as its directory describes it.
    pub fn of(bitmap: &Bitmap) -> Self {
        Self {
            name: text(&bitmap.name),
            granularity_bytes: 1 << bitmap.granularity_bits.min(63),
            in_use: bitmap.is_in_use(),
            auto: bitmap.is_auto(),
        }
    }
}

fn snapshots(image: &OpenedImage) -> Vec<SnapshotInfo> {
    let of = |snapshot: &Snapshot| SnapshotInfo {
        id: text(&snapshot.id),
        name: text(&snapshot.name),
        vm_state_bytes: snapshot.vm_state_bytes,
        date_seconds: snapshot.date_seconds,
        date_nanoseconds: snapshot.date_nanoseconds,
        vm_clock_nanoseconds: snapshot.vm_clock_nanoseconds,
        icount: snapshot.icount.filter(|count| *count != u64::MAX),
        disk_bytes: snapshot
            .disk_bytes
            .unwrap_or_else(|| image.header.guest_bytes()),
    };
    image.snapshots.iter().map(of).collect()
}

fn text(name: &[u8]) -> String {
    String::from_utf8_lossy(until_nul(name)).into_owned()
}
