//! [`AmendOptions`]: what is to be changed, and every refusal that the header and the snapshot table are enough for, with
//! QEMU's texts and in QEMU's order.

use crate::error::ImageError;
use crate::qcow2::layout::extensions::FeatureNames;
use crate::qcow2::layout::header::{
    Header, REFCOUNT_BITS_MAX, V3_HEADER_BYTES, V3_HEADER_BYTES_MIN, autoclear, compatible,
    incompatible,
};
use crate::qcow2::open::OpenedImage;
use crate::qcow2::units::{Compression, Geometry, Version};

/// What is to be changed; `None` leaves what is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AmendOptions {
    /// Version of the format.
    pub version: Option<Version>,
    /// Length of the guest's disk in bytes. It is checked here and changed by whoever has the image open: before the rest,
    /// or after it where the version rises.
    pub size_bytes: Option<u64>,
    /// Name of the backing file: as it is. Only a rebase changes it.
    pub backing_name: Option<Vec<u8>>,
    /// Name of the backing file's format: as it is.
    pub backing_format: Option<Vec<u8>>,
    /// The external data file reads as the guest's disk does: that can only be given up.
    pub data_file_raw: Option<bool>,
    /// Let reference counts be written late.
    pub lazy_refcounts: Option<bool>,
    /// Width of a reference count in bits.
    pub refcount_bits: Option<u64>,
}

impl AmendOptions {
    /// The header that an image shall have, but for the places of its tables and the length of its disk.
    ///
    /// # Errors
    /// [`ImageError::Refused`] with QEMU's texts; where several apply, with the one that QEMU gives.
    pub fn check(&self, image: &OpenedImage) -> Result<Header, ImageError> {
        let old = &image.header;
        let version = self.version.unwrap_or(old.geometry.version());
        if self.data_file_raw == Some(true) && !old.is_data_file_raw() {
            let text = "data-file-raw cannot be set on existing images";
            return Err(ImageError::refused(text));
        }
        let geometry = self.geometry(old, version)?;
        self.check_backing(old)?;
        if version == Version::V2 && self.lazy_refcounts == Some(true) && !old.lazy_refcounts() {
            return Err(ImageError::refused(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
            ));
        }
        self.check_size(old, version)?;
        if version < old.geometry.version() {
            self.check_downgrade(image, geometry)?;
        }
        Ok(self.header(old, geometry))
    }

    fn geometry(&self, old: &Header, version: Version) -> Result<Geometry, ImageError> {
        let old = old.geometry;
        let bits = self.refcount_bits.unwrap_or(old.refcount_bits().into());
        if !bits.is_power_of_two() || bits > REFCOUNT_BITS_MAX {
            return Err(ImageError::refused_because(
                "Refcount width must be a power of two and may not exceed 64 bits",
                format!("{bits} bits"),
            ));
        }
        let changed = bits != u64::from(old.refcount_bits());
        if changed && version == Version::V2 && bits != 16 {
            return Err(ImageError::refused(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)",
            ));
        }
        let order = bits.trailing_zeros();
        Geometry::new(version, old.cluster_bits(), order, old.extended_l2())
            .ok_or_else(|| ImageError::refused("Refcount width and cluster size do not fit"))
    }

    fn check_backing(&self, old: &Header) -> Result<(), ImageError> {
        if self.backing_name.is_none() && self.backing_format.is_none() {
            return Ok(());
        }
        if self.backing_name != old.backing_name
            || self.backing_format != old.extensions.backing_format
        {
            return Err(ImageError::refused_because(
                "Cannot amend the backing file",
                "a rebase changes it",
            ));
        }
        Ok(())
    }

    fn check_size(&self, old: &Header, version: Version) -> Result<(), ImageError> {
        let Some(size_bytes) = self.size_bytes.filter(|size| *size != old.guest_bytes()) else {
            return Ok(());
        };
        if !size_bytes.is_multiple_of(512) {
            let text = "The new size must be a multiple of 512";
            return Err(ImageError::refused(text));
        }
        if version.max(old.geometry.version()) == Version::V2 && old.snapshots > 0 {
            let text = "Can't resize a v2 image which has snapshots";
            return Err(ImageError::refused(text));
        }
        Ok(())
    }

    fn check_downgrade(&self, image: &OpenedImage, geometry: Geometry) -> Result<(), ImageError> {
        let old = &image.header;
        if geometry.refcount_bits() != 16 {
            let text = "compat=0.10 requires refcount_bits=16";
            return Err(ImageError::refused(text));
        }
        if old.has_data_file() {
            let text = "Cannot downgrade an image with a data file";
            return Err(ImageError::refused(text));
        }
        let size_bytes = self.size_bytes.unwrap_or(old.guest_bytes());
        let prevented = image.snapshots.iter().any(|snapshot| {
            let other_length = snapshot
                .disk_bytes
                .is_some_and(|length| length != size_bytes);
            other_length || u32::try_from(snapshot.vm_state_bytes).is_err()
        });
        if prevented {
            return Err(ImageError::refused_because(
                "Internal snapshots prevent downgrade of image",
                "one has a disk of another length, or a state of the machine of 4 GiB or more",
            ));
        }
        let features = old.incompatible & !(incompatible::DIRTY | incompatible::COMPRESSION);
        if features != 0 {
            return Err(ImageError::refused(format!(
                "Cannot downgrade an image with incompatible features {features:#x} set"
            )));
        }
        if !image.bitmaps.is_empty() {
            return Err(ImageError::refused_because(
                "Cannot downgrade an image with bitmaps",
                "compat=0.10 has none, they would be lost",
            ));
        }
        Ok(())
    }

    fn header(&self, old: &Header, geometry: Geometry) -> Header {
        let mut header = Header {
            geometry,
            incompatible: old.incompatible & !incompatible::DIRTY,
            autoclear: old.autoclear & autoclear::KNOWN,
            ..old.clone()
        };
        if let Some(lazy) = self.lazy_refcounts {
            header.compatible &= !compatible::LAZY_REFCOUNTS;
            if lazy {
                header.compatible |= compatible::LAZY_REFCOUNTS;
            }
        }
        if self.data_file_raw == Some(false) {
            header.autoclear &= !autoclear::DATA_FILE_RAW;
        }
        match (old.geometry.version(), geometry.version()) {
            (Version::V2, Version::V3) => {
                header.extra = vec![0; V3_HEADER_BYTES - V3_HEADER_BYTES_MIN - 1];
                header.extensions.feature_names = FeatureNames::standard(&geometry);
            }
            (Version::V3, Version::V2) => {
                header.incompatible = 0;
                header.compatible = 0;
                header.autoclear = 0;
                header.compression = Compression::Zlib;
                header.extra = Vec::new();
                header.extensions.feature_names = None;
            }
            _ => {}
        }
        header
    }
}
