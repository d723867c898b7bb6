//! From the first cluster to a [`Header`]: every check that needs nothing else, in the order and with the texts of QEMU.

use std::borrow::Cow;

use crate::error::ImageError;
use crate::qcow2::layout::extensions::{
    CRYPT_LUKS, ExtensionRules, Extensions, FeatureNames, FeatureSet,
};
use crate::qcow2::layout::fields::{bytes_at, u32_at, u64_at, until_nul};
use crate::qcow2::layout::header::{
    Access, BACKING_NAME_BYTES_MAX, Header, L1_TABLE_BYTES_MAX, MAGIC, REFCOUNT_TABLE_BYTES_MAX,
    SNAPSHOTS_MAX, V2_HEADER_BYTES, V3_HEADER_BYTES_MIN, incompatible,
};
use crate::qcow2::units::{
    CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, Compression, Geometry, HostOffset, REFCOUNT_ORDER_MAX,
    Version,
};

impl Header {
    /// Reads and checks a header. `start` is the first cluster, or as much of it as the file has.
    ///
    /// # Errors
    /// [`ImageError::Refused`] with QEMU's texts; where several apply, with the one that QEMU gives.
    pub fn parse(start: &[u8], access: Access) -> Result<Self, ImageError> {
        let (version, cluster_bits) = parse_identity(start)?;
        let cluster_bytes = 1_usize << cluster_bits;
        let cluster = first_cluster(start, cluster_bytes);
        let header_bytes = parse_length(&cluster, version)?;
        let backing_offset = parse_backing_offset(&cluster)?;
        let extensions_end = match backing_offset {
            0 => cluster_bytes,
            offset => offset,
        };
        let area = cluster.get(header_bytes..extensions_end).unwrap_or(&[]);
        let compression = parse_compression(&cluster, version, header_bytes)?;
        check_features(&cluster, version, area, access)?;
        let geometry = parse_geometry(&cluster, version, cluster_bits)?;
        let mut header = Self::parse_fields(&cluster, geometry, compression, header_bytes);
        header.check_tables(access)?;
        header.check_crypt_method()?;
        let rules = ExtensionRules {
            geometry: header.geometry,
            crypt_method: header.crypt_method,
            bitmaps_valid: header.bitmaps_valid(),
        };
        header.extensions = Extensions::parse(area, &rules)?;
        header.check_companions(access)?;
        header.backing_name = parse_backing_name(&cluster, backing_offset)?;
        Ok(header)
    }

    /// The size of the first cluster in bytes, from the first 112 bytes of a file.
    ///
    /// # Errors
    /// As [`Header::parse`], where the file is no qcow2 image.
    pub fn cluster_bytes_of(start: &[u8]) -> Result<u64, ImageError> {
        let (_, cluster_bits) = parse_identity(start)?;
        Ok(1 << cluster_bits)
    }

    fn parse_fields(
        cluster: &[u8],
        geometry: Geometry,
        compression: Compression,
        header_bytes: usize,
    ) -> Self {
        let feature = |offset| feature_at(cluster, geometry.version(), offset);
        let extra_at = V3_HEADER_BYTES_MIN + 1;
        Self {
            geometry,
            size_bytes: u64_at(cluster, 24),
            crypt_method: u32_at(cluster, 32),
            l1_entries: u32_at(cluster, 36),
            l1_table: HostOffset(u64_at(cluster, 40)),
            refcount_table: HostOffset(u64_at(cluster, 48)),
            refcount_table_clusters: u32_at(cluster, 56),
            snapshots: u32_at(cluster, 60),
            snapshot_table: HostOffset(u64_at(cluster, 64)),
            backing_name: None,
            incompatible: feature(72),
            compatible: feature(80),
            autoclear: feature(88),
            compression,
            extra: bytes_at(cluster, extra_at, header_bytes.saturating_sub(extra_at)),
            extensions: Extensions::default(),
        }
    }

    fn check_tables(&self, access: Access) -> Result<(), ImageError> {
        let checked = access == Access::Check;
        if self.refcount_table_clusters == 0 && !checked {
            return Err(ImageError::refused(
                "Image does not contain a reference count table",
            ));
        }
        Table {
            name: "Reference count table",
            at: self.refcount_table,
            entries: u64::from(self.refcount_table_clusters),
            entry_bytes: self.geometry.cluster_bytes(),
            bytes_max: REFCOUNT_TABLE_BYTES_MAX,
        }
        .check(&self.geometry)?;
        if !checked {
            // The length of entries is not known yet: they are counted as if they were as short as can be.
            Table {
                name: "Snapshot table",
                at: self.snapshot_table,
                entries: u64::from(self.snapshots),
                entry_bytes: 40,
                bytes_max: 40 * u64::from(SNAPSHOTS_MAX),
            }
            .check(&self.geometry)?;
        }
        Table {
            name: "Active L1 table",
            at: self.l1_table,
            entries: u64::from(self.l1_entries),
            entry_bytes: 8,
            bytes_max: L1_TABLE_BYTES_MAX,
        }
        .check(&self.geometry)?;
        let covered_by_entry = self.geometry.l2_table_covers_bytes();
        if self.size_bytes > u64::MAX - (covered_by_entry - 1) {
            // QEMU's count of L1 entries wraps here, and the disk is refused later.
            return Err(ImageError::refused_because(
                "Could not refresh total sector count: File too large",
                format!("size is {} bytes", self.size_bytes),
            ));
        }
        let needed = self.geometry.l1_entries_for(self.size_bytes);
        if i32::try_from(needed).is_err() {
            return Err(ImageError::refused_because(
                "Image is too big",
                format!("{} bytes need {needed} L1 entries", self.size_bytes),
            ));
        }
        if u64::from(self.l1_entries) < needed {
            return Err(ImageError::refused_because(
                "L1 table is too small",
                format!(
                    "it has {} entries, {} bytes need {needed}",
                    self.l1_entries, self.size_bytes
                ),
            ));
        }
        Ok(())
    }

    fn check_crypt_method(&self) -> Result<(), ImageError> {
        if self.crypt_method > CRYPT_LUKS {
            // QEMU prints it as a signed number.
            return Err(ImageError::refused(format!(
                "Unsupported encryption method {}",
                self.crypt_method.cast_signed()
            )));
        }
        Ok(())
    }

    /// What must go together with a feature bit or field, outside of the tables.
    fn check_companions(&self, access: Access) -> Result<(), ImageError> {
        if self.is_data_file_raw() && !self.has_data_file() && access != Access::Metadata {
            return Err(ImageError::refused("data-file-raw requires a data file"));
        }
        if self.crypt_method == CRYPT_LUKS && self.extensions.crypto.is_none() {
            return Err(ImageError::refused(
                "Missing CRYPTO header for crypt method 2",
            ));
        }
        Ok(())
    }
}

/// A table that a header names.
struct Table {
    name: &'static str,
    at: HostOffset,
    entries: u64,
    entry_bytes: u64,
    bytes_max: u64,
}

impl Table {
    fn check(&self, geometry: &Geometry) -> Result<(), ImageError> {
        let entries_max = self.bytes_max / self.entry_bytes;
        if self.entries > entries_max {
            return Err(ImageError::refused_because(
                format!("{} too large", self.name),
                format!(
                    "{} entries of {} bytes, at most {entries_max} are possible",
                    self.entries, self.entry_bytes
                ),
            ));
        }
        // Below the limit just checked, so the product cannot wrap.
        let end = self.at.0.checked_add(self.entries * self.entry_bytes);
        let ends_in_reach = end.is_some_and(|end| i64::try_from(end).is_ok());
        if !ends_in_reach || !geometry.is_cluster_start(self.at) {
            return Err(ImageError::refused_because(
                format!("{} offset invalid", self.name),
                format!(
                    "{:#x} must be a multiple of {} and its end below 2^63",
                    self.at.0,
                    geometry.cluster_bytes()
                ),
            ));
        }
        Ok(())
    }
}

fn parse_identity(start: &[u8]) -> Result<(Version, u32), ImageError> {
    let magic = u32_at(start, 0);
    if magic != MAGIC {
        return Err(ImageError::refused_because(
            "Image is not in qcow2 format",
            format!("it begins with {magic:#010x}, not {MAGIC:#010x}"),
        ));
    }
    let version = match u32_at(start, 4) {
        2 => Version::V2,
        3 => Version::V3,
        other => {
            return Err(ImageError::refused(format!(
                "Unsupported qcow2 version {other}"
            )));
        }
    };
    let cluster_bits = u32_at(start, 20);
    if !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&cluster_bits) {
        return Err(ImageError::refused_because(
            format!("Unsupported cluster size: 2^{cluster_bits}"),
            format!("cluster_bits must be {CLUSTER_BITS_MIN} to {CLUSTER_BITS_MAX}"),
        ));
    }
    Ok((version, cluster_bits))
}

fn first_cluster(start: &[u8], cluster_bytes: usize) -> Cow<'_, [u8]> {
    match start.get(..cluster_bytes) {
        Some(cluster) => Cow::Borrowed(cluster),
        None => Cow::Owned(bytes_at(start, 0, cluster_bytes)),
    }
}

fn parse_length(cluster: &[u8], version: Version) -> Result<usize, ImageError> {
    if version == Version::V2 {
        return Ok(V2_HEADER_BYTES);
    }
    let field = u32_at(cluster, 100);
    let length = usize::try_from(field).unwrap_or(usize::MAX);
    let detail = || {
        format!(
            "header_length is {field}, it must be {V3_HEADER_BYTES_MIN} to {}",
            cluster.len()
        )
    };
    if length < V3_HEADER_BYTES_MIN {
        return Err(ImageError::refused_because(
            "qcow2 header too short",
            detail(),
        ));
    }
    if length > cluster.len() {
        return Err(ImageError::refused_because(
            "qcow2 header exceeds cluster size",
            detail(),
        ));
    }
    Ok(length)
}

fn parse_backing_offset(cluster: &[u8]) -> Result<usize, ImageError> {
    let field = u64_at(cluster, 8);
    match usize::try_from(field) {
        Ok(offset) if offset <= cluster.len() => Ok(offset),
        _ => Err(ImageError::refused_because(
            "Invalid backing file offset",
            format!("{field:#x} is behind the first cluster"),
        )),
    }
}

fn parse_backing_name(cluster: &[u8], offset: usize) -> Result<Option<Vec<u8>>, ImageError> {
    if offset == 0 {
        return Ok(None);
    }
    let field = u32_at(cluster, 16);
    let limit = BACKING_NAME_BYTES_MAX.min(cluster.len() - offset);
    match usize::try_from(field) {
        Ok(length) if length <= limit => {
            let name = bytes_at(cluster, offset, length);
            let name = until_nul(&name);
            Ok((!name.is_empty()).then(|| name.to_vec()))
        }
        _ => Err(ImageError::refused_because(
            "Backing file name too long",
            format!("backing_file_size is {field}, at most {limit} are possible"),
        )),
    }
}

/// A field of feature bits; version 2 has none.
fn feature_at(cluster: &[u8], version: Version, offset: usize) -> u64 {
    match version {
        Version::V2 => 0,
        Version::V3 => u64_at(cluster, offset),
    }
}

fn parse_compression(
    cluster: &[u8],
    version: Version,
    header_bytes: usize,
) -> Result<Compression, ImageError> {
    let field = match header_bytes > V3_HEADER_BYTES_MIN {
        true => cluster.get(V3_HEADER_BYTES_MIN).copied().unwrap_or(0),
        false => 0,
    };
    let marked = feature_at(cluster, version, 72) & incompatible::COMPRESSION != 0;
    match (field, marked) {
        (0, false) => Ok(Compression::Zlib),
        (1, true) => Ok(Compression::Zstd),
        (0, true) => Err(ImageError::refused(
            "qcow2: Compression type incompatible feature bit must not be set",
        )),
        (1, false) => Err(ImageError::refused(
            "qcow2: Compression type incompatible feature bit must be set",
        )),
        (other, _) => Err(ImageError::refused(format!(
            "qcow2: unknown compression type: {other}"
        ))),
    }
}

fn check_features(
    cluster: &[u8],
    version: Version,
    extensions: &[u8],
    access: Access,
) -> Result<(), ImageError> {
    let bits = feature_at(cluster, version, 72);
    let unknown = bits & !incompatible::KNOWN;
    if unknown != 0 {
        let names = FeatureNames::find(extensions);
        return Err(unsupported_features(unknown, names));
    }
    if bits & incompatible::CORRUPT != 0 && access == Access::ReadWrite {
        return Err(ImageError::refused(
            "qcow2: Image is corrupt; cannot be opened read/write",
        ));
    }
    Ok(())
}

fn parse_geometry(
    cluster: &[u8],
    version: Version,
    cluster_bits: u32,
) -> Result<Geometry, ImageError> {
    let extended_l2 = feature_at(cluster, version, 72) & incompatible::EXTENDED_L2 != 0;
    let refcount_order = match version {
        Version::V2 => 4,
        Version::V3 => u32_at(cluster, 96),
    };
    let geometry = Geometry::new(version, cluster_bits, refcount_order, extended_l2);
    geometry.ok_or_else(|| refused_geometry(cluster_bits, refcount_order, extended_l2))
}

fn unsupported_features(bits: u64, names: Option<FeatureNames>) -> ImageError {
    let mut unnamed = bits;
    let mut list = Vec::new();
    let table = names.unwrap_or(FeatureNames(Vec::new()));
    for (bit, name) in table.of(FeatureSet::Incompatible) {
        // A bit number above 63 has no meaning; QEMU counts it modulo 64.
        let mask = 1_u64.wrapping_shl(u32::from(bit));
        if unnamed & mask != 0 {
            list.push(String::from_utf8_lossy(name).into_owned());
            unnamed &= !mask;
        }
    }
    if unnamed != 0 {
        list.push(format!("Unknown incompatible feature: {unnamed:x}"));
    }
    ImageError::refused_because(
        format!("Unsupported qcow2 feature(s): {}", list.join(", ")),
        format!(
            "incompatible_features has {bits:#x} beyond {:#x}",
            incompatible::KNOWN
        ),
    )
}

fn refused_geometry(cluster_bits: u32, refcount_order: u32, extended_l2: bool) -> ImageError {
    let subcluster_bytes = (1_u32 << cluster_bits) / 32;
    if extended_l2 && subcluster_bytes < 1 << CLUSTER_BITS_MIN {
        return ImageError::refused(format!("Unsupported subcluster size: {subcluster_bytes}"));
    }
    ImageError::refused_because(
        "Reference count entry width too large; may not exceed 64 bits",
        format!("refcount_order is {refcount_order}, it must be 0 to {REFCOUNT_ORDER_MAX}"),
    )
}
