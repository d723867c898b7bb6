//! The header: what stands in the first cluster, and how it is written. `header_parse` reads and checks it.
//!
//! It knows nothing of the file's length and of what lies behind the first cluster.
//!
//! Spec: qcow2, "Header", "Additional fields", "Header padding".

use crate::error::ImageError;
use crate::qcow2::layout::extensions::{ActivityId, Extensions};
use crate::qcow2::units::{Compression, Geometry, HostOffset, Version};

/// The first four bytes.
pub const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");
/// Length of a version 2 header in bytes.
pub const V2_HEADER_BYTES: usize = 72;
/// Shortest version 3 header in bytes.
pub const V3_HEADER_BYTES_MIN: usize = 104;
/// Length of the version 3 headers that QEMU writes.
pub const V3_HEADER_BYTES: usize = 112;
/// Largest L1 table in bytes.
pub const L1_TABLE_BYTES_MAX: u64 = 32 << 20;
/// Largest refcount table in bytes.
pub const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// Most internal snapshots.
pub const SNAPSHOTS_MAX: u32 = 65_536;
/// Widest reference count in bits.
pub const REFCOUNT_BITS_MAX: u64 = 64;
/// Longest name of a backing file in bytes.
pub const BACKING_NAME_BYTES_MAX: usize = 1023;

/// Bits of [`Header::incompatible`].
pub mod incompatible {
    /// Reference counts may be too low or too high: somebody used lazy refcounts and did not close the image.
    pub const DIRTY: u64 = 1 << 0;
    /// The image contradicts itself and must not be written.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest data is in a file of its own.
    pub const DATA_FILE: u64 = 1 << 2;
    /// The compression type is not zlib.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries tell subclusters apart.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All of them.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Bits of [`Header::compatible`].
pub mod compatible {
    /// Reference counts may be written late.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Bits of [`Header::autoclear`].
pub mod autoclear {
    /// The bitmaps extension is valid.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file reads as the guest's disk does.
    pub const DATA_FILE_RAW: u64 = 1 << 1;
    /// Not of the specification, which leaves it to nobody: everybody who has written since it was set has recorded what he has
    /// changed where [`Extensions::activity`](crate::qcow2::layout::extensions::Extensions::activity) says. Whoever does not know
    /// the bit clears it before writing, as the specification demands, and so does everything here that does not record.
    pub const ACTIVITY: u64 = 1 << 63;
    /// Those of the specification.
    pub const KNOWN: u64 = BITMAPS | DATA_FILE_RAW;
}

/// What an image is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Looking at metadata only (`qemu-img info`): what guest data needs may be missing.
    Metadata,
    /// Reading: what only writers depend on may be broken.
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
    /// A check or repair, which finds out itself what is broken.
    Check,
}

/// A header whose fields fit to each other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// Version, cluster size, width of reference counts, kind of L2 entries.
    pub geometry: Geometry,
    /// Length of the guest's disk as it stands in the image; see [`Header::guest_bytes`].
    pub size_bytes: u64,
    /// 0: not encrypted, 1: AES, 2: LUKS.
    pub crypt_method: u32,
    /// Entries of the L1 table.
    pub l1_entries: u32,
    /// First byte of the L1 table.
    pub l1_table: HostOffset,
    /// First byte of the refcount table.
    pub refcount_table: HostOffset,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// First byte of the snapshot table.
    pub snapshot_table: HostOffset,
    /// Name of the backing file, as any bytes but NUL; never empty.
    pub backing_name: Option<Vec<u8>>,
    /// Features without which the image cannot be understood: see [`incompatible`].
    pub incompatible: u64,
    /// Features that may be ignored: see [`compatible`].
    pub compatible: u64,
    /// Features that do not survive a writer who ignores them: see [`autoclear`].
    pub autoclear: u64,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Bytes of a version 3 header behind the compression type; the first seven are padding. A new header has seven.
    pub extra: Vec<u8>,
    /// The extensions.
    pub extensions: Extensions,
}

impl Header {
    /// The header, its extensions and the name of the backing file, as they stand in the image: not longer than a cluster,
    /// not padded to one. What stood behind them may stay. The feature bits that [`Header::geometry`] and
    /// [`Header::compression`] decide are set and cleared accordingly; all other fields are written as they are.
    ///
    /// # Errors
    /// [`ImageError::Refused`] where it does not fit into a cluster, or a version 2 header cannot say it.
    pub fn encode(&self) -> Result<Vec<u8>, ImageError> {
        self.encode_with_name_at(0)
    }

    /// The same with the name of the backing file at `name_offset`, or directly behind the extensions where that is further
    /// on. What lies between is zeroes.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_with_name_at(&self, name_offset: usize) -> Result<Vec<u8>, ImageError> {
        let extensions = self.extensions.encode()?;
        let name = self.backing_name.as_deref().unwrap_or(&[]);
        if name.len() > BACKING_NAME_BYTES_MAX {
            return Err(ImageError::refused_because(
                "Backing file name too long",
                format!(
                    "it has {} bytes, {BACKING_NAME_BYTES_MAX} at most are possible",
                    name.len()
                ),
            ));
        }
        let extensions_end = self.header_bytes() + extensions.len();
        let name_offset = match name.is_empty() {
            true => extensions_end,
            false => name_offset.max(extensions_end),
        };
        let length = name_offset + name.len();
        if length as u64 > self.geometry.cluster_bytes() {
            return Err(ImageError::refused_because(
                "The header does not fit into the first cluster",
                format!(
                    "header, extensions and backing file name take {length} bytes, a cluster has {}",
                    self.geometry.cluster_bytes()
                ),
            ));
        }
        let mut bytes = Vec::with_capacity(length);
        self.encode_fields(&mut bytes, name_offset, name.len())?;
        bytes.extend(extensions);
        bytes.resize(name_offset, 0);
        bytes.extend(name);
        Ok(bytes)
    }

    /// Length of the header's fields in bytes: where the extensions begin.
    pub fn header_bytes(&self) -> usize {
        match self.geometry.version() {
            Version::V2 => V2_HEADER_BYTES,
            Version::V3 if self.is_without_compression_type() => V3_HEADER_BYTES_MIN,
            Version::V3 => V3_HEADER_BYTES_MIN + 1 + self.extra.len(),
        }
    }

    /// Length of the guest's disk in bytes: the field, rounded down to sectors of 512 bytes.
    pub const fn guest_bytes(&self) -> u64 {
        self.size_bytes & !511
    }

    /// Length of the L1 table in bytes.
    pub const fn l1_table_bytes(&self) -> u64 {
        self.l1_entries as u64 * 8
    }

    /// Length of the refcount table in bytes.
    pub const fn refcount_table_bytes(&self) -> u64 {
        (self.refcount_table_clusters as u64) << self.geometry.cluster_bits()
    }

    /// Whether reference counts are not to be trusted.
    pub const fn is_dirty(&self) -> bool {
        self.incompatible & incompatible::DIRTY != 0
    }

    /// Whether the image has been found corrupt.
    pub const fn is_corrupt(&self) -> bool {
        self.incompatible & incompatible::CORRUPT != 0
    }

    /// Whether guest data is in a file of its own.
    pub const fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// Whether the external data file reads as the guest's disk does.
    pub const fn is_data_file_raw(&self) -> bool {
        self.autoclear & autoclear::DATA_FILE_RAW != 0
    }

    /// Whether the bitmaps extension, if there is one, says what is so.
    pub const fn bitmaps_valid(&self) -> bool {
        self.autoclear & autoclear::BITMAPS != 0
    }

    /// What all who have written recently have recorded their changes under.
    pub fn activity(&self) -> Option<ActivityId> {
        let activity = self.extensions.activity;
        activity.filter(|_| self.autoclear & autoclear::ACTIVITY != 0)
    }

    /// Whether reference counts may be written late.
    pub const fn lazy_refcounts(&self) -> bool {
        self.compatible & compatible::LAZY_REFCOUNTS != 0
    }

    fn is_without_compression_type(&self) -> bool {
        self.extra.is_empty() && self.compression == Compression::Zlib
    }

    fn encode_fields(
        &self,
        bytes: &mut Vec<u8>,
        name_offset: usize,
        name_bytes: usize,
    ) -> Result<(), ImageError> {
        let version: u32 = match self.geometry.version() {
            Version::V2 => 2,
            Version::V3 => 3,
        };
        let name_offset = if name_bytes == 0 { 0 } else { name_offset };
        bytes.extend(MAGIC.to_be_bytes());
        bytes.extend(version.to_be_bytes());
        bytes.extend((name_offset as u64).to_be_bytes());
        bytes.extend(word(name_bytes)?);
        bytes.extend(self.geometry.cluster_bits().to_be_bytes());
        bytes.extend(self.size_bytes.to_be_bytes());
        bytes.extend(self.crypt_method.to_be_bytes());
        bytes.extend(self.l1_entries.to_be_bytes());
        bytes.extend(self.l1_table.0.to_be_bytes());
        bytes.extend(self.refcount_table.0.to_be_bytes());
        bytes.extend(self.refcount_table_clusters.to_be_bytes());
        bytes.extend(self.snapshots.to_be_bytes());
        bytes.extend(self.snapshot_table.0.to_be_bytes());
        let incompatible = self.encoded_incompatible();
        if self.geometry.version() == Version::V2 {
            return self.check_v2_suffices(incompatible);
        }
        bytes.extend(incompatible.to_be_bytes());
        bytes.extend(self.compatible.to_be_bytes());
        bytes.extend(self.autoclear.to_be_bytes());
        bytes.extend(self.geometry.refcount_order().to_be_bytes());
        bytes.extend(word(self.header_bytes())?);
        if !self.is_without_compression_type() {
            bytes.push(match self.compression {
                Compression::Zlib => 0,
                Compression::Zstd => 1,
            });
            bytes.extend(&self.extra);
        }
        Ok(())
    }

    fn encoded_incompatible(&self) -> u64 {
        let mut bits = self.incompatible & !(incompatible::EXTENDED_L2 | incompatible::COMPRESSION);
        if self.geometry.extended_l2() {
            bits |= incompatible::EXTENDED_L2;
        }
        if self.compression != Compression::Zlib {
            bits |= incompatible::COMPRESSION;
        }
        bits
    }

    fn check_v2_suffices(&self, incompatible: u64) -> Result<(), ImageError> {
        let features = incompatible | self.compatible | self.autoclear;
        let order = self.geometry.refcount_order();
        if features != 0 || order != 4 || !self.extra.is_empty() {
            return Err(ImageError::refused_because(
                "A version 2 header cannot describe this image",
                format!(
                    "feature bits {incompatible:#x} {:#x} {:#x}, refcount_order {order}, {} bytes more",
                    self.compatible,
                    self.autoclear,
                    self.extra.len()
                ),
            ));
        }
        Ok(())
    }
}

fn word(length: usize) -> Result<[u8; 4], ImageError> {
    // Within a cluster, so it always fits.
    let length = u32::try_from(length)
        .map_err(|_| ImageError::refused("The header does not fit into the first cluster"))?;
    Ok(length.to_be_bytes())
}
