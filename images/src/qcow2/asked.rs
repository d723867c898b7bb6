//! [`Asked`]: how a client wants to use an image, held against its header. In the order and with the texts of QEMU.

use crate::error::ImageError;
use crate::qcow2::layout::extensions::CRYPT_LUKS;
use crate::qcow2::layout::header::Header;
use crate::qcow2::units::Version;

/// Most memory for L2 tables, if nobody says anything, in bytes.
const L2_CACHE_BYTES_DEFAULT: u64 = 32 << 20;
/// Bytes of an L2 table that are read at once where the cache cannot hold all of them.
const L2_ENTRY_BYTES_SMALL: u64 = 4096;
const L2_CACHE_ENTRIES_MIN: u64 = 2;
const REFCOUNT_CACHE_CLUSTERS_MIN: u64 = 4;
/// Most entries of a cache.
const CACHE_ENTRIES_MAX: u64 = i32::MAX as u64;
const CLEAN_INTERVAL_SECONDS_DEFAULT: u32 = 600;

/// Options of `qcow2` as a client gives them; `None`: it says nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Asked {
    /// `cache-size`: bytes of both caches.
    pub cache_bytes: Option<i64>,
    /// `l2-cache-size`: bytes of the cache of L2 tables.
    pub l2_cache_bytes: Option<i64>,
    /// `l2-cache-entry-size`: bytes of an L2 table that are read at once.
    pub l2_cache_entry_bytes: Option<i64>,
    /// `refcount-cache-size`: bytes of the cache of refcount blocks.
    pub refcount_cache_bytes: Option<i64>,
    /// `cache-clean-interval`: after so many seconds unused memory goes; 0: never.
    pub cache_clean_interval_seconds: Option<i64>,
    /// `lazy-refcounts`.
    pub lazy_refcounts: Option<bool>,
    /// `discard-no-unref`.
    pub discard_no_unref: Option<bool>,
    /// `encrypt.format`.
    pub encryption: Option<Encryption>,
    /// Whether a `data-file` is given.
    pub data_file: bool,
}

/// Kinds of encryption.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encryption {
    /// The old one of qcow.
    Aes,
    /// LUKS within the image.
    Luks,
}

/// What a client gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settled {
    /// Memory for L2 tables in bytes: two entries at least, no more than all tables of the disk take unless asked for.
    pub l2_cache_bytes: u64,
    /// Bytes of an L2 table that are read at once: a power of two from 512 to the cluster size.
    pub l2_cache_entry_bytes: u64,
    /// Memory for refcount blocks in bytes: four clusters at least.
    pub refcount_cache_bytes: u64,
    /// After so many seconds unused memory goes; 0: never.
    pub cache_clean_interval_seconds: u32,
    /// Whether reference counts are written late.
    pub lazy_refcounts: bool,
    /// Whether discarded clusters keep their place.
    pub discard_no_unref: bool,
}

impl Asked {
    /// What comes of it for an image with this header.
    ///
    /// # Errors
    /// [`ImageError::Refused`] with QEMU's texts.
    pub fn settle(&self, header: &Header) -> Result<Settled, ImageError> {
        let (l2_cache_bytes, l2_cache_entry_bytes, refcount_cache_bytes) = self.caches(header)?;
        let cache_clean_interval_seconds = match self.cache_clean_interval_seconds {
            None => CLEAN_INTERVAL_SECONDS_DEFAULT,
            Some(seconds) => u32::try_from(seconds).map_err(|_| {
                ImageError::refused_because(
                    "Cache clean interval too big",
                    format!("{seconds} seconds, 0 to {} are possible", u32::MAX),
                )
            })?,
        };
        let v2 = header.geometry.version() == Version::V2;
        let lazy_refcounts = self.lazy_refcounts.unwrap_or(header.lazy_refcounts());
        if lazy_refcounts && v2 {
            return Err(ImageError::refused(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
            ));
        }
        let discard_no_unref = self.discard_no_unref.unwrap_or(false);
        if discard_no_unref && v2 {
            return Err(ImageError::refused(
                "discard-no-unref is only supported since qcow2 version 3",
            ));
        }
        self.check_encryption(header)?;
        self.check_data_file(header)?;
        Ok(Settled {
            l2_cache_bytes,
            l2_cache_entry_bytes,
            refcount_cache_bytes,
            cache_clean_interval_seconds,
            lazy_refcounts,
            discard_no_unref,
        })
    }

    /// Sizes of the cache of L2 tables, of its entries and of the cache of refcount blocks.
    fn caches(&self, header: &Header) -> Result<(u64, u64, u64), ImageError> {
        let total = size("cache-size", self.cache_bytes)?;
        let l2 = size("l2-cache-size", self.l2_cache_bytes)?;
        let entry = size("l2-cache-entry-size", self.l2_cache_entry_bytes)?;
        let refcounts = size("refcount-cache-size", self.refcount_cache_bytes)?;
        let cluster_bytes = header.geometry.cluster_bytes();
        let whole_disk = l2_tables_bytes(header);
        let refcounts_min = REFCOUNT_CACHE_CLUSTERS_MIN * cluster_bytes;
        let l2_wanted = l2.unwrap_or(L2_CACHE_BYTES_DEFAULT).min(whole_disk);
        let (l2_bytes, refcount_bytes) = match (total, l2, refcounts) {
            (None, ..) => (l2_wanted, refcounts.unwrap_or(0)),
            (Some(_), Some(_), Some(_)) => {
                return Err(ImageError::refused(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
                ));
            }
            (Some(total), Some(l2), None) if l2 > total => {
                return Err(ImageError::refused_because(
                    "l2-cache-size may not exceed cache-size",
                    format!("{l2} and {total} bytes"),
                ));
            }
            (Some(total), None, Some(refcounts)) if refcounts > total => {
                return Err(ImageError::refused_because(
                    "refcount-cache-size may not exceed cache-size",
                    format!("{refcounts} and {total} bytes"),
                ));
            }
            (Some(total), Some(_), None) => (l2_wanted, total.saturating_sub(l2_wanted)),
            (Some(total), None, Some(refcounts)) => (total.saturating_sub(refcounts), refcounts),
            // Refcount blocks get what L2 tables do not need.
            (Some(total), None, None) if total >= whole_disk.saturating_add(refcounts_min) => {
                (whole_disk, total - whole_disk)
            }
            (Some(total), None, None) => {
                let refcounts = total.min(refcounts_min);
                (total - refcounts, refcounts)
            }
        };
        let entry_bytes = entry.unwrap_or(match l2_bytes < whole_disk {
            true => L2_ENTRY_BYTES_SMALL.min(cluster_bytes),
            false => cluster_bytes,
        });
        if !entry_bytes.is_power_of_two() || !(512..=cluster_bytes).contains(&entry_bytes) {
            return Err(ImageError::refused_because(
                format!(
                    "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster_bytes})"
                ),
                format!("it is {entry_bytes}"),
            ));
        }
        if refcount_bytes / cluster_bytes > CACHE_ENTRIES_MAX {
            return Err(ImageError::refused_because(
                "Refcount cache size too big",
                format!(
                    "{refcount_bytes} bytes, {CACHE_ENTRIES_MAX} clusters of {cluster_bytes} at most are possible"
                ),
            ));
        }
        Ok((
            l2_bytes.max(L2_CACHE_ENTRIES_MIN * entry_bytes),
            entry_bytes,
            refcount_bytes.max(refcounts_min),
        ))
    }

    fn check_encryption(&self, header: &Header) -> Result<(), ImageError> {
        let Some(asked) = self.encryption else {
            return Ok(());
        };
        let held = match header.crypt_method {
            0 => {
                return Err(ImageError::refused(format!(
                    "No encryption in image header, but options specified format '{}'",
                    asked.name()
                )));
            }
            CRYPT_LUKS => Encryption::Luks,
            _ => Encryption::Aes,
        };
        if held != asked {
            return Err(ImageError::refused(format!(
                "Header reported '{}' encryption format but options specify '{}'",
                held.name(),
                asked.name()
            )));
        }
        Ok(())
    }

    /// An image that needs a data file gets the one that it names, if the policy allows that: so a missing one is no error yet.
    fn check_data_file(&self, header: &Header) -> Result<(), ImageError> {
        if self.data_file && !header.has_data_file() {
            return Err(ImageError::refused(
                "'data-file' can only be set for images with an external data file",
            ));
        }
        Ok(())
    }
}

impl Encryption {
    /// As clients spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aes => "aes",
            Self::Luks => "luks",
        }
    }
}

fn size(name: &str, asked: Option<i64>) -> Result<Option<u64>, ImageError> {
    asked
        .map(|bytes| {
            u64::try_from(bytes).map_err(|_| {
                ImageError::refused(format!(
                    "Value '{bytes}' is out of range for parameter '{name}'"
                ))
            })
        })
        .transpose()
}

/// Bytes of all L2 tables that the disk can have.
fn l2_tables_bytes(header: &Header) -> u64 {
    let geometry = header.geometry;
    let entries = geometry.clusters_for(header.guest_bytes()).0;
    let bytes = entries.saturating_mul(geometry.l2_entry_bytes());
    bytes
        .checked_next_multiple_of(geometry.cluster_bytes())
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::layout::extensions::Extensions;
    use crate::qcow2::units::{Compression, Geometry, HostOffset};

    const MIB: i64 = 1 << 20;

    fn header(version: Version, size_bytes: u64) -> Header {
        Header {
            geometry: Geometry::new(version, 16, 4, false).expect("allowed"),
            size_bytes,
            crypt_method: 0,
            l1_entries: 0,
            l1_table: HostOffset(0),
            refcount_table: HostOffset(0),
            refcount_table_clusters: 1,
            snapshots: 0,
            snapshot_table: HostOffset(0),
            backing_name: None,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            compression: Compression::Zlib,
            extra: Vec::new(),
            extensions: Extensions::default(),
        }
    }

    fn sizes(asked: Asked, size_bytes: u64) -> (u64, u64, u64) {
        let header = header(Version::V3, size_bytes);
        let settled = asked.settle(&header).expect("allowed");
        (
            settled.l2_cache_bytes,
            settled.l2_cache_entry_bytes,
            settled.refcount_cache_bytes,
        )
    }

    #[test]
    fn caches_follow_the_disk_until_somebody_says_otherwise() {
        let nothing = Asked::default();
        // 8 MiB of tables describe 64 GiB.
        assert_eq!(sizes(nothing, 64 << 30), (8 << 20, 65_536, 256 << 10));
        assert_eq!(sizes(nothing, 0), (128 << 10, 65_536, 256 << 10));
        assert_eq!(sizes(nothing, 8 << 40), (32 << 20, 4096, 256 << 10));
        let total = |bytes| Asked {
            cache_bytes: Some(bytes),
            ..nothing
        };
        assert_eq!(sizes(total(9 * MIB), 64 << 30), (8 << 20, 65_536, 1 << 20));
        assert_eq!(sizes(total(MIB), 64 << 30), (768 << 10, 4096, 256 << 10));
        assert_eq!(sizes(total(0), 64 << 30), (8192, 4096, 256 << 10));
        let l2 = Asked {
            l2_cache_bytes: Some(2 * MIB),
            ..total(3 * MIB)
        };
        assert_eq!(sizes(l2, 64 << 30), (2 << 20, 4096, 1 << 20));
        let refcounts = Asked {
            refcount_cache_bytes: Some(2 * MIB),
            ..total(3 * MIB)
        };
        assert_eq!(sizes(refcounts, 64 << 30), (1 << 20, 4096, 2 << 20));
        let whole_tables = Asked {
            l2_cache_entry_bytes: Some(65_536),
            ..nothing
        };
        assert_eq!(sizes(whole_tables, 8 << 40), (32 << 20, 65_536, 256 << 10));
    }
}
