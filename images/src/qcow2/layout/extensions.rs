//! Header extensions: those that are known by their meaning, the others byte for byte.
//!
//! Spec: qcow2, "Header extensions", "String header extensions", "Feature name table", "Bitmaps extension", "Full disk
//! encryption header pointer".

use crate::error::ImageError;
use crate::qcow2::layout::fields::{bytes_at, u32_at, u64_at, until_nul};
use crate::qcow2::units::{Geometry, HostOffset};

/// Ends the list.
const END: u32 = 0;
/// Format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Name of the external data file.
const DATA_FILE_NAME: u32 = 0x4441_5441;
/// Where the encryption header is.
const CRYPTO_POINTER: u32 = 0x0537_be77;
/// Names of feature bits.
const FEATURE_NAMES: u32 = 0x6803_f857;
/// Where the bitmap directory is.
const BITMAPS: u32 = 0x2385_2875;
/// What writers record their changes under: not of the specification, "BYac".
const ACTIVITY: u32 = 0x4259_6163;

/// Longest name of a backing format, in bytes.
pub const BACKING_FORMAT_BYTES_MAX: usize = 15;
/// Most bitmaps of an image.
pub const BITMAPS_MAX: u32 = 65_535;
/// Largest bitmap directory in bytes, just below 64 MiB.
pub const BITMAP_DIRECTORY_BYTES_MAX: u64 = 1024 * BITMAPS_MAX as u64;
/// `crypt_method` of LUKS, the only one with an extension.
pub const CRYPT_LUKS: u32 = 2;

/// Largest cluster that leaves no room for the names of feature bits.
const CLUSTER_BYTES_WITHOUT_NAMES: u64 = 4096;
const CRYPTO_POINTER_BYTES: usize = 16;
const BITMAPS_BYTES: usize = 24;
const FEATURE_NAME_BYTES: usize = 48;

/// All extensions of a header. Where an image has one of a known kind twice, the last one counts.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Extensions {
    /// Driver of the backing file, without NUL, at most [`BACKING_FORMAT_BYTES_MAX`] bytes.
    pub backing_format: Option<Vec<u8>>,
    /// Name of the external data file, without NUL. It has a meaning only with the feature bit.
    pub data_file_name: Option<Vec<u8>>,
    /// Where the encryption header is.
    pub crypto: Option<CryptoPointer>,
    /// Names of feature bits, for programs that do not know them.
    pub feature_names: Option<FeatureNames>,
    /// Where the bitmap directory is. Valid only while the autoclear bit is set.
    pub bitmaps: Option<BitmapsExtension>,
    /// What writers record their changes under. Valid only while the autoclear bit is set.
    pub activity: Option<ActivityId>,
    /// The others, in the order of the image.
    pub unknown: Vec<UnknownExtension>,
}

/// Tells the record of an image's recent changes from all others. A new one is taken whenever a record begins.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ActivityId(pub [u8; 16]);

/// The place of the encryption header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CryptoPointer {
    /// First byte.
    pub at: HostOffset,
    /// Its length in bytes.
    pub length_bytes: u64,
}

/// The place of the bitmap directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BitmapsExtension {
    /// Number of bitmaps.
    pub bitmaps: u32,
    /// Zero in a valid extension.
    pub reserved: u32,
    /// Length of the directory in bytes.
    pub directory_bytes: u64,
    /// First byte of the directory.
    pub directory: HostOffset,
}

/// An extension of a kind that is not known here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnknownExtension {
    /// Which.
    pub kind: u32,
    /// Its bytes, without padding.
    pub data: Vec<u8>,
}

/// A table of names of feature bits, as it stands in the image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FeatureNames(pub Vec<u8>);

/// Which set a feature bit belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FeatureSet {
    /// Who does not know the bit must not open the image.
    Incompatible = 0,
    /// Who does not know the bit may ignore it.
    Compatible = 1,
    /// Who does not know the bit clears it before writing.
    Autoclear = 2,
}

/// What decides which extensions are valid.
#[derive(Clone, Copy, Debug)]
pub struct ExtensionRules {
    /// Of the image.
    pub geometry: Geometry,
    /// `crypt_method` of the header.
    pub crypt_method: u32,
    /// Whether the autoclear bit says that the bitmaps extension is valid; if not, its content does not matter.
    pub bitmaps_valid: bool,
}

impl Extensions {
    /// Reads the extensions that fill `area`: from the end of the header's fields to the backing file's name, or to the end
    /// of the first cluster.
    ///
    /// # Errors
    /// [`ImageError::Refused`] with QEMU's texts.
    pub fn parse(area: &[u8], rules: &ExtensionRules) -> Result<Self, ImageError> {
        let mut extensions = Self::default();
        for found in Walk::new(area) {
            let (kind, data) = found?;
            extensions.take(kind, data, rules)?;
        }
        Ok(extensions)
    }

    /// The extensions as they stand in the image, in QEMU's order, with the end mark.
    ///
    /// # Errors
    /// [`ImageError::Refused`] where one is longer than its length field can say.
    pub fn encode(&self) -> Result<Vec<u8>, ImageError> {
        let mut area = Vec::new();
        if let Some(format) = &self.backing_format {
            push(&mut area, BACKING_FORMAT, format)?;
        }
        if let Some(name) = &self.data_file_name {
            push(&mut area, DATA_FILE_NAME, name)?;
        }
        if let Some(crypto) = &self.crypto {
            push(&mut area, CRYPTO_POINTER, &crypto.encode())?;
        }
        if let Some(names) = &self.feature_names {
            push(&mut area, FEATURE_NAMES, &names.0)?;
        }
        if let Some(bitmaps) = &self.bitmaps {
            push(&mut area, BITMAPS, &bitmaps.encode())?;
        }
        if let Some(ActivityId(id)) = &self.activity {
            push(&mut area, ACTIVITY, id)?;
        }
        for other in &self.unknown {
            push(&mut area, other.kind, &other.data)?;
        }
        push(&mut area, END, &[])?;
        Ok(area)
    }

    /// How much of `area` is read as extensions: up to the end of the end mark, and whether there is one.
    pub(crate) fn read_of(area: &[u8]) -> (usize, bool) {
        let mut walk = Walk::new(area);
        while walk.next().is_some_and(|found| found.is_ok()) {}
        let before = area.len() - walk.rest.len();
        match walk.ended {
            true => (area.len().min(before + 8), true),
            false => (before, false),
        }
    }

    fn take(&mut self, kind: u32, data: &[u8], rules: &ExtensionRules) -> Result<(), ImageError> {
        match kind {
            BACKING_FORMAT => {
                let length = data.len();
                let limit = BACKING_FORMAT_BYTES_MAX + 1;
                if length >= limit {
                    return Err(ImageError::refused(format!(
                        "ERROR: ext_backing_format: len={length} too large (>={limit})"
                    )));
                }
                self.backing_format = Some(until_nul(data).to_vec());
            }
            DATA_FILE_NAME => self.data_file_name = Some(until_nul(data).to_vec()),
            CRYPTO_POINTER => self.crypto = Some(CryptoPointer::parse(data, rules)?),
            FEATURE_NAMES => self.feature_names = Some(FeatureNames(data.to_vec())),
            BITMAPS => self.bitmaps = Some(BitmapsExtension::parse(data, rules)?),
            // Of another length it is somebody else's.
            ACTIVITY if let Ok(id) = data.try_into() => self.activity = Some(ActivityId(id)),
            kind => self.unknown.push(UnknownExtension {
                kind,
                data: data.to_vec(),
            }),
        }
        Ok(())
    }
}

impl CryptoPointer {
    fn parse(data: &[u8], rules: &ExtensionRules) -> Result<Self, ImageError> {
        if rules.crypt_method != CRYPT_LUKS {
            return Err(ImageError::refused_because(
                "CRYPTO header extension only expected with LUKS encryption method",
                format!("crypt_method is {}, not 2", rules.crypt_method),
            ));
        }
        if data.len() != CRYPTO_POINTER_BYTES {
            return Err(ImageError::refused(format!(
                "CRYPTO header extension size {}, but expected size {CRYPTO_POINTER_BYTES}",
                data.len()
            )));
        }
        let pointer = Self {
            at: HostOffset(u64_at(data, 0)),
            length_bytes: u64_at(data, 8),
        };
        if !rules.geometry.is_cluster_start(pointer.at) {
            return Err(ImageError::refused(format!(
                "Encryption header offset '{}' is not a multiple of cluster size '{}'",
                pointer.at.0,
                rules.geometry.cluster_bytes()
            )));
        }
        Ok(pointer)
    }

    fn encode(&self) -> Vec<u8> {
        let mut data = self.at.0.to_be_bytes().to_vec();
        data.extend(self.length_bytes.to_be_bytes());
        data
    }
}

impl BitmapsExtension {
    /// An extension for a directory of `bitmaps` entries.
    pub const fn new(bitmaps: u32, directory: HostOffset, directory_bytes: u64) -> Self {
        Self {
            bitmaps,
            reserved: 0,
            directory_bytes,
            directory,
        }
    }

    fn parse(data: &[u8], rules: &ExtensionRules) -> Result<Self, ImageError> {
        if data.len() != BITMAPS_BYTES {
            return Err(ImageError::refused_because(
                "bitmaps_ext: Invalid extension length",
                format!("it is {} bytes, not {BITMAPS_BYTES}", data.len()),
            ));
        }
        let extension = Self {
            bitmaps: u32_at(data, 0),
            reserved: u32_at(data, 4),
            directory_bytes: u64_at(data, 8),
            directory: HostOffset(u64_at(data, 16)),
        };
        if rules.bitmaps_valid {
            extension.validate(&rules.geometry)?;
        }
        Ok(extension)
    }

    fn validate(&self, geometry: &Geometry) -> Result<(), ImageError> {
        if self.reserved != 0 {
            return Err(ImageError::refused_because(
                "bitmaps_ext: Reserved field is not zero",
                format!("it is {:#x}", self.reserved),
            ));
        }
        if self.bitmaps > BITMAPS_MAX {
            return Err(ImageError::refused(format!(
                "bitmaps_ext: Image has {} bitmaps, exceeding the QEMU supported maximum of {BITMAPS_MAX}",
                self.bitmaps
            )));
        }
        if self.bitmaps == 0 {
            return Err(ImageError::refused(
                "found bitmaps extension with zero bitmaps",
            ));
        }
        if !geometry.is_cluster_start(self.directory) {
            return Err(ImageError::refused_because(
                "bitmaps_ext: invalid bitmap directory offset",
                format!(
                    "{:#x} is not a multiple of the cluster size, {}",
                    self.directory.0,
                    geometry.cluster_bytes()
                ),
            ));
        }
        if self.directory_bytes > BITMAP_DIRECTORY_BYTES_MAX {
            return Err(ImageError::refused(format!(
                "bitmaps_ext: bitmap directory size ({}) exceeds the maximum supported size ({BITMAP_DIRECTORY_BYTES_MAX})",
                self.directory_bytes
            )));
        }
        Ok(())
    }

    fn encode(&self) -> Vec<u8> {
        let mut data = self.bitmaps.to_be_bytes().to_vec();
        data.extend(self.reserved.to_be_bytes());
        data.extend(self.directory_bytes.to_be_bytes());
        data.extend(self.directory.0.to_be_bytes());
        data
    }
}

impl FeatureNames {
    /// The table that QEMU 10.0 writes into an image of this geometry; `None`: it writes none (version 2, and where the
    /// cluster is needed for other things).
    pub fn standard(geometry: &Geometry) -> Option<Self> {
        use crate::qcow2::units::Version;
        use FeatureSet::{Autoclear, Compatible, Incompatible};
        const NAMES: [(FeatureSet, u8, &str); 8] = [
            (Incompatible, 0, "dirty bit"),
            (Incompatible, 1, "corrupt bit"),
            (Incompatible, 2, "external data file"),
            (Incompatible, 3, "compression type"),
            (Incompatible, 4, "extended L2 entries"),
            (Compatible, 0, "lazy refcounts"),
            (Autoclear, 0, "bitmaps"),
            (Autoclear, 1, "raw external data"),
        ];
        if geometry.version() == Version::V2
            || geometry.cluster_bytes() <= CLUSTER_BYTES_WITHOUT_NAMES
        {
            return None;
        }
        let mut table = Vec::with_capacity(NAMES.len() * FEATURE_NAME_BYTES);
        for (set, bit, name) in NAMES {
            table.extend([set as u8, bit]);
            table.extend(bytes_at(name.as_bytes(), 0, FEATURE_NAME_BYTES - 2));
        }
        Some(Self(table))
    }

    /// The table of an area of extensions that may be invalid otherwise: nothing else is looked at.
    pub(crate) fn find(area: &[u8]) -> Option<Self> {
        Walk::new(area)
            .map_while(Result::ok)
            .filter(|(kind, _)| *kind == FEATURE_NAMES)
            .last()
            .map(|(_, data)| Self(data.to_vec()))
    }

    /// Which bits of `set` have names, in the order of the table. Ends at the first empty name, as QEMU does.
    pub fn of(&self, set: FeatureSet) -> impl Iterator<Item = (u8, &[u8])> {
        self.0
            .chunks(FEATURE_NAME_BYTES)
            .map(|entry| (entry, until_nul(entry.get(2..).unwrap_or(&[]))))
            .take_while(|(_, name)| !name.is_empty())
            .filter(move |(entry, _)| entry.first() == Some(&(set as u8)))
            .map(|(entry, name)| (entry.get(1).copied().unwrap_or(0), name))
    }
}

/// Extensions one after the other, until the end mark or the end of the area.
struct Walk<'a> {
    rest: &'a [u8],
    ended: bool,
}

impl<'a> Walk<'a> {
    fn new(area: &'a [u8]) -> Self {
        Self {
            rest: area,
            ended: false,
        }
    }
}

impl<'a> Iterator for Walk<'a> {
    type Item = Result<(u32, &'a [u8]), ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended || self.rest.is_empty() {
            return None;
        }
        let length = u32_at(self.rest, 4);
        let body = self.rest.get(8..).zip(usize::try_from(length).ok());
        let Some((body, data)) = body.and_then(|(body, length)| Some((body, body.get(..length)?)))
        else {
            self.ended = true;
            return Some(Err(ImageError::refused_because(
                "Header extension too large",
                format!(
                    "extension {:#x} is {length} bytes, {} are left",
                    u32_at(self.rest, 0),
                    self.rest.len().saturating_sub(8)
                ),
            )));
        };
        let kind = u32_at(self.rest, 0);
        if kind == END {
            self.ended = true;
            return None;
        }
        self.rest = body.get(data.len().next_multiple_of(8)..).unwrap_or(&[]);
        Some(Ok((kind, data)))
    }
}

fn push(area: &mut Vec<u8>, kind: u32, data: &[u8]) -> Result<(), ImageError> {
    let length = u32::try_from(data.len()).map_err(|_| {
        ImageError::refused_because(
            "Header extension too large",
            format!("extension {kind:#x} is {} bytes", data.len()),
        )
    })?;
    area.extend(kind.to_be_bytes());
    area.extend(length.to_be_bytes());
    area.extend(data);
    area.resize(area.len().next_multiple_of(8), 0);
    Ok(())
}
