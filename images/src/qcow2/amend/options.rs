//! [`AmendOptions`]: what is to be changed, and every refusal that the header and the snapshot table are enough for, with
//! QEMU's texts and in QEMU's order.

use crate::error::ImageError;
use crate::qcow2::growth::l1_entries;
use crate::qcow2::layout::extensions::{BACKING_FORMAT_BYTES_MAX, FeatureNames};
use crate::qcow2::layout::header::{
    BACKING_NAME_BYTES_MAX, Header, REFCOUNT_BITS_MAX, V3_HEADER_BYTES, V3_HEADER_BYTES_MIN,
    autoclear, compatible, incompatible,
};
use crate::qcow2::open::OpenedImage;
use crate::qcow2::units::{Compression, Geometry, Version};

/// What is to be changed; `None` leaves what is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AmendOptions {
    /// Version of the format.
    pub version: Option<Version>,
    /// Length of the guest's disk in bytes. What is cut off is lost. A longer disk has to be prepared by whoever has the
    /// image open: [`Qcow2::prepare_growth`](crate::qcow2::Qcow2::prepare_growth).
    pub size_bytes: Option<u64>,
    /// Name of the backing file, in the header only: what is seen through the image may be something else afterwards, which
    /// is the caller's business. An empty one takes name and format away.
    pub backing_name: Option<Vec<u8>>,
    /// Name of the backing file's format.
    pub backing_format: Option<Vec<u8>>,
    /// Something is below the image as it is used, whatever its header says: what reads as zeroes must not become
    /// unallocated.
    pub is_overlay: bool,
    /// Whoever has the image open goes on recording its changes, also with another length of the disk.
    pub is_recorded: bool,
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
        let backing = self.backing(old)?;
        if version == Version::V2 && self.lazy_refcounts == Some(true) && !old.lazy_refcounts() {
            return Err(ImageError::refused(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
            ));
        }
        self.check_size(old, version)?;
        if version < old.geometry.version() {
            self.check_downgrade(image, geometry)?;
        }
        let header = self.header(old, geometry, &backing);
        if backing.differs_from(old) && header.encode().is_err() {
            return Err(backing.refused("No space left in the file header"));
        }
        Ok(header)
    }

    /// Whether a longer disk can be prepared only once the image has its new version. Version 2 cannot say "zeroes" where
    /// what is below would show, and has no place for the length of the disk in its snapshots.
    pub fn grows_behind(&self, old: &Header, below_bytes: u64) -> bool {
        let rises = self
            .version
            .is_some_and(|version| version > old.geometry.version());
        let cluster_bytes = old.geometry.cluster_bytes();
        let seen_bytes = below_bytes.min(self.size_bytes.unwrap_or(0));
        let shows = seen_bytes > old.guest_bytes().next_multiple_of(cluster_bytes);
        rises && (shows || old.snapshots > 0)
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

    fn backing(&self, old: &Header) -> Result<Backing, ImageError> {
        let old_format = &old.extensions.backing_format;
        let name = match &self.backing_name {
            None => old.backing_name.clone(),
            Some(name) => Some(name.clone()).filter(|name| !name.is_empty()),
        };
        if name.is_none() {
            if self.backing_name.is_none() && self.backing_format.is_some() {
                let text = "Backing format cannot be used without backing file";
                return Err(ImageError::refused(text));
            }
            let format = old_format.clone().filter(|_| self.backing_name.is_none());
            return Ok(Backing { name, format });
        }
        let kept = || old_format.clone().filter(|_| old.backing_name.is_some());
        let backing = Backing {
            name,
            format: self.backing_format.clone().or_else(kept),
        };
        if backing.differs_from(old) {
            let keeps_raw = old.is_data_file_raw() && self.data_file_raw != Some(false);
            backing.check(keeps_raw)?;
        }
        Ok(backing)
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
        l1_entries(old.geometry.l1_entries_for(size_bytes))?;
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

    fn header(&self, old: &Header, geometry: Geometry, backing: &Backing) -> Header {
        let new_bytes = self.size_bytes.filter(|size| *size != old.guest_bytes());
        // What is recorded of the disk's changes stays true as long as nobody changes the disk who does not record it.
        let kept = match self.is_recorded || new_bytes.is_none() {
            true => autoclear::KNOWN | autoclear::ACTIVITY,
            false => autoclear::KNOWN,
        };
        let mut header = Header {
            geometry,
            backing_name: backing.name.clone(),
            incompatible: old.incompatible & !incompatible::DIRTY,
            autoclear: old.autoclear & kept,
            ..old.clone()
        };
        header.extensions.backing_format = backing.format.clone();
        if let Some(size_bytes) = new_bytes {
            header.size_bytes = size_bytes;
        }
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

/// What an image is going to say of its backing file.
struct Backing {
    name: Option<Vec<u8>>,
    format: Option<Vec<u8>>,
}

impl Backing {
    fn differs_from(&self, old: &Header) -> bool {
        self.name != old.backing_name || self.format != old.extensions.backing_format
    }

    fn check(&self, data_file_is_raw: bool) -> Result<(), ImageError> {
        let name = self.name.as_deref().unwrap_or(&[]);
        let Some(format) = self.format.as_deref().filter(|format| !format.is_empty()) else {
            // What is in it must not decide how it is read.
            return Err(self.refused("backing format must be specified"));
        };
        let is_invalid = data_file_is_raw
            || name.len() > BACKING_NAME_BYTES_MAX
            || name.contains(&0)
            || format.len() > BACKING_FORMAT_BYTES_MAX
            || format.contains(&0);
        match is_invalid {
            true => Err(self.refused("Invalid argument")),
            false => Ok(()),
        }
    }

    fn refused(&self, reason: &str) -> ImageError {
        let name = String::from_utf8_lossy(self.name.as_deref().unwrap_or(&[]));
        ImageError::refused(format!(
            "Could not change the backing file to '{name}': {reason}"
        ))
    }
}
