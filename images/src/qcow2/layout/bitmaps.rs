//! Entries of the bitmap directory and of a bitmap's table.
//!
//! Spec: qcow2, "Bitmaps", "Bitmap directory", "Bitmap table".

use crate::error::ImageError;
use crate::qcow2::layout::fields::{bytes_at, u16_at, u32_at, u64_at};
use crate::qcow2::units::{Geometry, HostOffset};

/// Bytes of an entry before its extra data.
pub const BITMAP_HEAD_BYTES: usize = 24;
/// Longest name in bytes.
pub const BITMAP_NAME_BYTES_MAX: u16 = 1023;
/// Smallest and largest `granularity_bits`: 512 bytes and 2 GiB.
pub const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Most entries of a bitmap's table.
pub const BITMAP_TABLE_ENTRIES_MAX: u32 = 0x0800_0000;
/// Most bytes of a bitmap in the file.
pub const BITMAP_BYTES_MAX: u64 = 512 << 20;
/// Where an entry of the directory begins, from its start.
pub const BITMAP_ALIGNMENT_BYTES: u64 = 8;

/// Bits of [`Bitmap::flags`].
pub mod flags {
    /// Was not saved as it should be: its content is out of date.
    pub const IN_USE: u32 = 1 << 0;
    /// Records every change of the disk, whoever makes it.
    pub const AUTO: u32 = 1 << 1;
    /// Its extra data may be ignored. QEMU refuses it all the same.
    pub const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
}

/// The only type there is: dirty tracking.
const DIRTY_TRACKING: u8 = 1;
const KNOWN_FLAGS: u32 = flags::IN_USE | flags::AUTO;

/// A bitmap, as its directory entry describes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bitmap {
    /// First byte of its table.
    pub table: HostOffset,
    /// Entries of its table.
    pub table_entries: u32,
    /// See [`flags`].
    pub flags: u32,
    /// Binary logarithm of the bytes that one bit stands for.
    pub granularity_bits: u8,
    /// As any bytes.
    pub name: Vec<u8>,
}

/// The lengths that an entry begins with.
#[derive(Clone, Copy, Debug)]
pub struct BitmapHead {
    extra_bytes: u32,
    name_bytes: u16,
}

impl BitmapHead {
    /// Reads the first [`BITMAP_HEAD_BYTES`] of an entry.
    pub fn parse(entry: &[u8]) -> Self {
        Self {
            extra_bytes: u32_at(entry, 20),
            name_bytes: u16_at(entry, 18),
        }
    }

    /// Length of the head and, without extra data, of the name behind it in bytes.
    pub fn known_bytes(&self) -> usize {
        BITMAP_HEAD_BYTES + usize::from(self.name_bytes)
    }

    /// Length of the entry in bytes, with the padding before the next one.
    pub fn entry_bytes(&self) -> u64 {
        let bytes =
            BITMAP_HEAD_BYTES as u64 + u64::from(self.extra_bytes) + u64::from(self.name_bytes);
        bytes.next_multiple_of(BITMAP_ALIGNMENT_BYTES)
    }
}

impl Bitmap {
    /// Reads and checks an entry of a directory of an image whose disk has `guest_bytes`.
    ///
    /// # Errors
    /// [`ImageError::Refused`] with QEMU's texts.
    pub fn parse(entry: &[u8], geometry: &Geometry, guest_bytes: u64) -> Result<Self, ImageError> {
        let head = BitmapHead::parse(entry);
        if head.extra_bytes != 0 {
            return Err(ImageError::refused_because(
                "Bitmap extra data is not supported",
                format!("there are {} bytes", head.extra_bytes),
            ));
        }
        let bitmap = Self {
            table: HostOffset(u64_at(entry, 0)),
            table_entries: u32_at(entry, 8),
            flags: u32_at(entry, 12),
            granularity_bits: bytes_at(entry, 17, 1).first().copied().unwrap_or(0),
            name: bytes_at(entry, BITMAP_HEAD_BYTES, usize::from(head.name_bytes)),
        };
        let kind = bytes_at(entry, 16, 1).first().copied().unwrap_or(0);
        if kind != DIRTY_TRACKING {
            return Err(bitmap.refused(&format!("type is {kind}, not {DIRTY_TRACKING}")));
        }
        bitmap.check(geometry, guest_bytes)?;
        Ok(bitmap)
    }

    /// The entry as it stands in the directory, padded for the next one.
    ///
    /// # Errors
    /// [`ImageError::Refused`] where the name is too long.
    pub fn encode(&self) -> Result<Vec<u8>, ImageError> {
        let name_bytes = match u16::try_from(self.name.len()) {
            Ok(bytes) if bytes <= BITMAP_NAME_BYTES_MAX => bytes,
            _ => {
                return Err(ImageError::refused(format!(
                    "Bitmap name too long: {}",
                    String::from_utf8_lossy(&self.name)
                )));
            }
        };
        let mut entry = self.table.0.to_be_bytes().to_vec();
        entry.extend(self.table_entries.to_be_bytes());
        entry.extend(self.flags.to_be_bytes());
        entry.extend([DIRTY_TRACKING, self.granularity_bits]);
        entry.extend(name_bytes.to_be_bytes());
        entry.extend([0; 4]);
        entry.extend(&self.name);
        entry.resize(entry.len().next_multiple_of(8), 0);
        Ok(entry)
    }

    /// Whether its content is out of date.
    pub const fn is_in_use(&self) -> bool {
        self.flags & flags::IN_USE != 0
    }

    /// Whether every change of the disk must be recorded in it.
    pub const fn is_auto(&self) -> bool {
        self.flags & flags::AUTO != 0
    }

    /// Length of its table in bytes.
    pub const fn table_bytes(&self) -> u64 {
        self.table_entries as u64 * 8
    }

    /// The sentence that every other contradiction of the entry has.
    pub fn refused(&self, detail: &str) -> ImageError {
        ImageError::refused_because(
            format!(
                "Bitmap '{}' doesn't satisfy the constraints",
                String::from_utf8_lossy(&self.name)
            ),
            detail,
        )
    }

    fn check(&self, geometry: &Geometry, guest_bytes: u64) -> Result<(), ImageError> {
        let Self {
            table_entries,
            granularity_bits,
            ..
        } = *self;
        let name_bytes = self.name.len();
        if name_bytes > usize::from(BITMAP_NAME_BYTES_MAX) {
            return Err(self.refused(&format!(
                "the name has {name_bytes} bytes, {BITMAP_NAME_BYTES_MAX} at most are possible"
            )));
        }
        if self.flags & !KNOWN_FLAGS != 0 {
            return Err(self.refused(&format!(
                "flags are {:#x}, {KNOWN_FLAGS:#x} are possible",
                self.flags
            )));
        }
        if !GRANULARITY_BITS.contains(&granularity_bits) {
            return Err(self.refused(&format!(
                "granularity_bits is {granularity_bits}, not 9 to 31"
            )));
        }
        if self.table.0 == 0 || !geometry.is_cluster_start(self.table) {
            return Err(self.refused(&format!(
                "the table's offset is {:#x}, the cluster size {}",
                self.table.0,
                geometry.cluster_bytes()
            )));
        }
        let entries_max =
            u64::from(BITMAP_TABLE_ENTRIES_MAX).min(BITMAP_BYTES_MAX / geometry.cluster_bytes());
        if table_entries == 0 || u64::from(table_entries) > entries_max {
            return Err(self.refused(&format!(
                "the table has {table_entries} entries, not 1 to {entries_max}"
            )));
        }
        if self.is_in_use() {
            // Its size may be out of date too.
            return Ok(());
        }
        let covered_per_entry = (geometry.cluster_bytes() * 8) << granularity_bits;
        let needed = guest_bytes.div_ceil(covered_per_entry);
        match u64::from(table_entries) {
            entries if entries < needed => Err(self.refused(&format!(
                "the table has {entries} entries, {guest_bytes} bytes need {needed}"
            ))),
            entries if entries > needed => Err(ImageError::refused_because(
                format!(
                    "Could not read bitmap '{}' from image: Invalid argument",
                    String::from_utf8_lossy(&self.name)
                ),
                format!("the table has {entries} entries, {guest_bytes} bytes need {needed}"),
            )),
            _ => Ok(()),
        }
    }
}

/// An entry of a bitmap's table: what a cluster of the bitmap's bits is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BitmapCluster {
    /// All bits are clear.
    Clear,
    /// All bits are set.
    Set,
    /// The bits are in this cluster.
    Stored(HostOffset),
}

impl BitmapCluster {
    /// `None`: reserved bits are set, or it is at no cluster.
    pub const fn decode(geometry: &Geometry, word: u64) -> Option<Self> {
        const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
        let at = HostOffset(word & OFFSET_MASK);
        if word & !(OFFSET_MASK | 1) != 0 {
            return None;
        }
        match (at.0, word & 1) {
            (0, 0) => Some(Self::Clear),
            (0, _) => Some(Self::Set),
            (_, 0) if geometry.is_cluster_start(at) => Some(Self::Stored(at)),
            _ => None,
        }
    }

    /// The word in the table.
    pub const fn encode(self) -> u64 {
        match self {
            Self::Clear => 0,
            Self::Set => 1,
            Self::Stored(at) => at.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::qcow2::units::Version;

    fn geometry(cluster_bits: u32) -> Geometry {
        Geometry::new(Version::V3, cluster_bits, 4, false).expect("allowed")
    }

    fn usual() -> Bitmap {
        Bitmap {
            table: HostOffset(0x60000),
            table_entries: 1,
            flags: flags::AUTO,
            granularity_bits: 16,
            name: b"b0".to_vec(),
        }
    }

    #[test]
    fn each_contradiction_is_refused() {
        let refused = |change: &dyn Fn(&mut Bitmap)| {
            let mut bitmap = usual();
            change(&mut bitmap);
            let entry = bitmap.encode().expect("short enough");
            Bitmap::parse(&entry, &geometry(16), 64 << 20).err()
        };
        assert_eq!(refused(&|_| ()), None);
        for change in [
            (&|b: &mut Bitmap| b.table.0 = 0) as &dyn Fn(&mut Bitmap),
            &|b| b.table.0 = 0x60200,
            &|b| b.table_entries = 0,
            &|b| b.table_entries = 8193,
            &|b| b.flags = flags::EXTRA_DATA_COMPATIBLE,
            &|b| b.granularity_bits = 8,
            &|b| b.granularity_bits = 32,
        ] {
            let text = refused(change).map(|error| error.to_string());
            assert_eq!(
                text.as_deref(),
                Some("Bitmap 'b0' doesn't satisfy the constraints")
            );
        }
        assert_eq!(refused(&|b| b.name.clear()), None, "QEMU takes it too");
        assert_eq!(
            refused(&|b| b.table_entries = 8192)
                .map(|e| e.to_string())
                .as_deref(),
            Some("Could not read bitmap 'b0' from image: Invalid argument")
        );
        let in_use = |b: &mut Bitmap| {
            b.flags |= flags::IN_USE;
            b.table_entries = 8192;
        };
        assert_eq!(refused(&in_use), None, "its size may be out of date");
    }

    proptest! {
        #[test]
        fn entries_come_back(
            cluster in 1_u64..1 << 40, in_use: bool, auto: bool, bits in 9_u8..=31,
            name in vec(any::<u8>(), 1..1024), cluster_bits in 9_u32..=21, guest_bytes in 1_u64..1 << 30,
        ) {
            let geometry = geometry(cluster_bits);
            let needed = guest_bytes.div_ceil((geometry.cluster_bytes() * 8) << bits);
            let bitmap = Bitmap {
                table: HostOffset(cluster << cluster_bits),
                table_entries: u32::try_from(needed).expect("small"),
                flags: u32::from(in_use) | u32::from(auto) << 1,
                granularity_bits: bits,
                name,
            };
            let entry = bitmap.encode().expect("short enough");
            prop_assert_eq!(BitmapHead::parse(&entry).entry_bytes(), entry.len() as u64);
            let read = Bitmap::parse(&entry, &geometry, guest_bytes);
            prop_assert_eq!(read.expect("valid"), bitmap);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..100), guest_bytes: u64) {
            for cluster_bits in [9, 21] {
                let _ = Bitmap::parse(&bytes, &geometry(cluster_bits), guest_bytes);
            }
        }

        #[test]
        fn clusters_of_bits_come_back(word: u64, cluster_bits in 9_u32..=21) {
            let decoded = BitmapCluster::decode(&geometry(cluster_bits), word);
            if let Some(cluster) = decoded {
                prop_assert_eq!(cluster.encode(), word);
            }
        }
    }

    #[test]
    fn what_words_of_a_table_mean() {
        for (word, meaning) in [
            (0, Some(BitmapCluster::Clear)),
            (1, Some(BitmapCluster::Set)),
            (0x10000, Some(BitmapCluster::Stored(HostOffset(0x10000)))),
            (2, None),
            (0x10001, None),
            (0x200, None),
            (1 << 56, None),
        ] {
            assert_eq!(
                BitmapCluster::decode(&geometry(16), word),
                meaning,
                "{word:#x}"
            );
        }
    }
}
