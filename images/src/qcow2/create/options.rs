//! What a new image is to be, and every refusal that needs no look at a file, with QEMU's texts and in QEMU's order.

use crate::error::ImageError;
use crate::qcow2::layout::extensions::{Extensions, FeatureNames};
use crate::qcow2::layout::header::{
    BACKING_NAME_BYTES_MAX, Header, autoclear, compatible, incompatible,
};
use crate::qcow2::units::{CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, Compression, Geometry, Version};

use super::plan::{CreatePlan, Placement};

/// Smallest cluster that can have subclusters, in bytes.
const EXTENDED_L2_CLUSTER_BYTES_MIN: u64 = 16 << 10;
/// Bytes of padding behind the compression type.
const HEADER_PADDING_BYTES: usize = 7;

/// What is assigned and reserved before the guest writes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum ImagePreallocation {
    /// Nothing.
    #[default]
    Off,
    /// Every guest cluster has its place in the file, which has holes there.
    Metadata,
    /// And the file system has reserved the room.
    Falloc,
    /// And zeroes were written there.
    Full,
}

/// A new image, as a client describes it: anything goes, [`check`](CreateOptions::check) says what cannot be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CreateOptions {
    /// Version of the format.
    pub version: Version,
    /// Length of the guest's disk in bytes.
    pub size_bytes: u64,
    /// Size of a cluster in bytes.
    pub cluster_bytes: u64,
    /// Width of a reference count in bits.
    pub refcount_bits: u64,
    /// Let reference counts be written late.
    pub lazy_refcounts: bool,
    /// Tell subclusters apart.
    pub extended_l2: bool,
    /// How compressed clusters will be compressed.
    pub compression: Compression,
    /// What is assigned and reserved.
    pub preallocation: ImagePreallocation,
    /// Name of the backing file as it goes into the header; an empty one is none.
    pub backing_name: Option<Vec<u8>>,
    /// Name of the backing file's format.
    pub backing_format: Option<String>,
    /// Name of the external data file as it goes into the header.
    pub data_file_name: Option<Vec<u8>>,
    /// The external data file reads as the guest's disk does.
    pub data_file_raw: bool,
}

impl CreateOptions {
    /// QEMU's defaults for a disk of so many bytes.
    pub fn new(size_bytes: u64) -> Self {
        Self {
            version: Version::V3,
            size_bytes,
            cluster_bytes: 65_536,
            refcount_bits: 16,
            lazy_refcounts: false,
            extended_l2: false,
            compression: Compression::Zlib,
            preallocation: ImagePreallocation::Off,
            backing_name: None,
            backing_format: None,
            data_file_name: None,
            data_file_raw: false,
        }
    }

    /// The first half of the checks: what contradicts itself. QEMU looks at the nodes after it.
    ///
    /// # Errors
    /// [`ImageError::Refused`] with QEMU's texts; where several apply, with the one that QEMU gives.
    pub fn check(&self) -> Result<Geometry, ImageError> {
        let v2 = self.version == Version::V2;
        if !self.size_bytes.is_multiple_of(512) {
            let text = "Image size must be a multiple of 512 bytes";
            return Err(ImageError::refused(text));
        }
        if v2 && self.extended_l2 {
            return Err(needs_v3("Extended L2 entries are only supported"));
        }
        let cluster_bits = self.cluster_bits()?;
        if self.extended_l2 && self.cluster_bytes < EXTENDED_L2_CLUSTER_BYTES_MIN {
            return Err(ImageError::refused(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ));
        }
        self.check_backing()?;
        if v2 && self.lazy_refcounts {
            return Err(needs_v3("Lazy refcounts only supported"));
        }
        let refcount_order = self.refcount_order()?;
        self.check_data_file()?;
        if v2 && self.compression != Compression::Zlib {
            return Err(needs_v3("Non-zlib compression type is only supported"));
        }
        Geometry::new(self.version, cluster_bits, refcount_order, self.extended_l2).ok_or_else(
            || ImageError::refused("Cluster size and kind of L2 entries do not fit to each other"),
        )
    }

    /// The second half: what is too large. Then nothing is left to refuse but what the files say.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn plan(&self) -> Result<Creation, ImageError> {
        let geometry = self.check()?;
        let preallocation = self.effective_preallocation();
        let placement = match (preallocation, &self.data_file_name) {
            (ImagePreallocation::Off, _) => Placement::None,
            (_, Some(_)) => Placement::InDataFile {
                raw: self.data_file_raw,
            },
            (ImagePreallocation::Metadata, None) => Placement::InImage {
                whole_clusters: false,
            },
            (_, None) => Placement::InImage {
                whole_clusters: true,
            },
        };
        let plan = CreatePlan::new(geometry, self.size_bytes, placement)?;
        let header = self.header(&plan)?;
        let header_bytes = header.encode().map_err(|error| self.header_error(error))?;
        Ok(Creation {
            plan,
            preallocation,
            header,
            header_bytes,
        })
    }

    /// A raw data file needs its places in the metadata, as there is nowhere else to put them.
    fn effective_preallocation(&self) -> ImagePreallocation {
        match self.data_file_raw {
            true => self.preallocation.max(ImagePreallocation::Metadata),
            false => self.preallocation,
        }
    }

    fn cluster_bits(&self) -> Result<u32, ImageError> {
        let bits = self.cluster_bytes.trailing_zeros();
        let possible = (CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&bits);
        if !self.cluster_bytes.is_power_of_two() || !possible {
            return Err(ImageError::refused_because(
                "Cluster size must be a power of two between 512 and 2048k",
                format!("it is {} bytes", self.cluster_bytes),
            ));
        }
        Ok(bits)
    }

    fn refcount_order(&self) -> Result<u32, ImageError> {
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err(ImageError::refused_because(
                "Refcount width must be a power of two and may not exceed 64 bits",
                format!("it is {} bits", self.refcount_bits),
            ));
        }
        if self.version == Version::V2 && self.refcount_bits != 16 {
            return Err(ImageError::refused(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use version=v3 or greater)",
            ));
        }
        Ok(self.refcount_bits.trailing_zeros())
    }

    fn check_backing(&self) -> Result<(), ImageError> {
        let preallocates = self.preallocation != ImagePreallocation::Off;
        if preallocates && self.backing_name.is_some() && !self.extended_l2 {
            return Err(ImageError::refused(
                "Backing file and preallocation can only be used at the same time if extended_l2 \
                 is on",
            ));
        }
        if self.backing_format.is_some() && self.backing_name.is_none() {
            let text = "Backing format cannot be used without backing file";
            return Err(ImageError::refused(text));
        }
        Ok(())
    }

    fn check_data_file(&self) -> Result<(), ImageError> {
        if self.data_file_raw && self.data_file_name.is_none() {
            return Err(ImageError::refused("data-file-raw requires data-file"));
        }
        if self.data_file_raw && self.backing_name.is_some() {
            let text = "Backing file and data-file-raw cannot be used at the same time";
            return Err(ImageError::refused(text));
        }
        if self.data_file_name.is_some() && self.version == Version::V2 {
            return Err(needs_v3("External data files are only supported"));
        }
        Ok(())
    }

    fn header(&self, plan: &CreatePlan) -> Result<Header, ImageError> {
        let geometry = *plan.geometry();
        let has_data_file = self.data_file_name.is_some();
        let set = |condition, bit| if condition { bit } else { 0 };
        let l1_entries = u32::try_from(plan.l1_entries());
        let table_clusters = u32::try_from(plan.refcount_table_clusters().0);
        let (Ok(l1_entries), Ok(refcount_table_clusters)) = (l1_entries, table_clusters) else {
            return Err(ImageError::refused("Image is too big"));
        };
        let backing_name = self.backing_name.clone().filter(|name| !name.is_empty());
        if backing_name
            .as_ref()
            .is_some_and(|name| name.len() > BACKING_NAME_BYTES_MAX)
        {
            return Err(self.unfit_backing("Invalid argument"));
        }
        Ok(Header {
            geometry,
            size_bytes: self.size_bytes,
            crypt_method: 0,
            l1_entries,
            l1_table: plan.l1_table(),
            refcount_table: plan.refcount_table(),
            refcount_table_clusters,
            snapshots: 0,
            snapshot_table: Default::default(),
            backing_name,
            incompatible: set(has_data_file, incompatible::DATA_FILE)
                | set(
                    self.compression != Compression::Zlib,
                    incompatible::COMPRESSION,
                )
                | set(self.extended_l2, incompatible::EXTENDED_L2),
            compatible: set(self.lazy_refcounts, compatible::LAZY_REFCOUNTS),
            autoclear: set(self.data_file_raw, autoclear::DATA_FILE_RAW),
            compression: self.compression,
            extra: match self.version {
                Version::V2 => Vec::new(),
                Version::V3 => vec![0; HEADER_PADDING_BYTES],
            },
            extensions: Extensions {
                backing_format: self.backing_format.clone().map(String::into_bytes),
                data_file_name: self.data_file_name.clone(),
                feature_names: FeatureNames::standard(&geometry),
                ..Extensions::default()
            },
        })
    }

    /// The header does not fit. QEMU adds the backing file last, so that it is blamed if there is one.
    fn header_error(&self, error: ImageError) -> ImageError {
        let detail = match error {
            ImageError::Refused { text, detail } => {
                detail.map_or(text.clone(), |detail| format!("{text}: {detail}"))
            }
            other => return other,
        };
        let text = match self.backing_name {
            Some(_) => self.unfit_backing("No space left on device").to_string(),
            None => "Could not update qcow2 header: No space left on device".to_owned(),
        };
        ImageError::refused_because(text, detail)
    }

    fn unfit_backing(&self, reason: &str) -> ImageError {
        let name = self.backing_name.as_deref().unwrap_or_default();
        let format = self.backing_format.as_deref().unwrap_or("(null)");
        ImageError::refused(format!(
            "Could not assign backing file '{}' with format '{format}': {reason}",
            String::from_utf8_lossy(name)
        ))
    }
}

fn needs_v3(what: &str) -> ImageError {
    ImageError::refused(format!(
        "{what} with compatibility level 1.1 and above (use version=v3 or greater)"
    ))
}

/// An image that can be made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Creation {
    plan: CreatePlan,
    preallocation: ImagePreallocation,
    header: Header,
    header_bytes: Vec<u8>,
}

impl Creation {
    /// Where everything goes.
    pub const fn plan(&self) -> &CreatePlan {
        &self.plan
    }

    /// What is assigned and reserved; more than was asked for where the image cannot be without.
    pub const fn preallocation(&self) -> ImagePreallocation {
        self.preallocation
    }

    /// The header.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// The header as it will stand at the start of the file.
    pub fn header_bytes(&self) -> &[u8] {
        &self.header_bytes
    }
}
