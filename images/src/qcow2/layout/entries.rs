//! L1 and L2 entries, standard and extended.
//!
//! Spec: qcow2, "Cluster mapping", "L1 table entry", "L2 table entry", "Standard Cluster Descriptor", "Compressed Clusters
//! Descriptor", "Extended L2 Entries".

use crate::qcow2::units::{Geometry, HostOffset, Version};

/// The cluster has exactly one reference and may be written in place.
pub const COPIED: u64 = 1 << 63;
/// The entry describes a compressed cluster.
pub const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes (version 3, without extended entries).
pub const ZERO: u64 = 1;
/// Bits of a host offset in L1 entries and standard L2 entries.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits that are reserved in an L1 entry.
pub const L1_RESERVED: u64 = !(OFFSET_MASK | COPIED);
/// Bits that are reserved in the first word of a standard L2 entry.
pub const L2_RESERVED: u64 = !(OFFSET_MASK | COPIED | COMPRESSED | ZERO);

/// An L1 entry as it stands in the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// An entry that leads to a table which nobody shares.
    pub const fn copied(table: HostOffset) -> Self {
        Self(table.0 & OFFSET_MASK | COPIED)
    }

    /// Where the L2 table is; `None`: all its clusters are unallocated.
    pub const fn table(self) -> Option<HostOffset> {
        match self.0 & OFFSET_MASK {
            0 => None,
            offset => Some(HostOffset(offset)),
        }
    }

    /// Whether the table has one reference only.
    pub const fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The same entry with the flag set or cleared.
    pub const fn with_copied(self, copied: bool) -> Self {
        Self(if copied {
            self.0 | COPIED
        } else {
            self.0 & !COPIED
        })
    }
}

/// An L2 entry as it stands in the table; `bitmap` is 0 where entries are not extended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct L2Entry {
    /// The cluster's descriptor.
    pub word: u64,
    /// Bits 0 to 31: subcluster has data here; bits 32 to 63: subcluster reads as zeroes.
    pub bitmap: u64,
}

/// What an L2 entry says of its whole cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cluster {
    /// Nothing here: the backing file decides, or it reads as zeroes.
    Unallocated,
    /// Reads as zeroes; `at`: room that is kept for it.
    Zero {
        /// The cluster that is kept, if one is.
        at: Option<HostOffset>,
    },
    /// A cluster of data. With extended entries the bitmap says which of its subclusters count.
    Allocated {
        /// First byte.
        at: HostOffset,
    },
    /// Compressed data.
    Compressed(CompressedAt),
}

/// Where the bytes of a compressed cluster are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CompressedAt {
    /// First byte, at no particular alignment.
    pub at: HostOffset,
    /// Bytes up to the end of the last 512-byte sector that holds any of them; the stream may end before.
    pub length_bytes: u64,
}

impl CompressedAt {
    /// Reads a descriptor. Never fails: every pattern is a place, which may lie outside of the file.
    pub const fn decode(geometry: &Geometry, word: u64) -> Self {
        let offset_bits = offset_bits(geometry);
        let at = word & ((1 << offset_bits) - 1);
        let sectors = (word & !(COPIED | COMPRESSED)) >> offset_bits;
        Self {
            at: HostOffset(at),
            length_bytes: (sectors + 1) * 512 - (at & 511),
        }
    }

    /// The descriptor; `None` where place or length do not fit into its bits.
    pub const fn encode(&self, geometry: &Geometry) -> Option<u64> {
        let offset_bits = offset_bits(geometry);
        if self.length_bytes == 0 || self.at.0 >> offset_bits != 0 {
            return None;
        }
        let last = self.at.0 + (self.length_bytes - 1);
        let sectors = last / 512 - self.at.0 / 512;
        if sectors >> (62 - offset_bits) != 0 {
            return None;
        }
        Some(COMPRESSED | sectors << offset_bits | self.at.0)
    }
}

const fn offset_bits(geometry: &Geometry) -> u32 {
    62 - (geometry.cluster_bits() - 8)
}

impl L2Entry {
    /// An entry that leads to a cluster of data which nobody shares. With extended entries all its subclusters count.
    pub const fn copied(geometry: &Geometry, at: HostOffset) -> Self {
        Self {
            word: at.0 & OFFSET_MASK | COPIED,
            bitmap: if geometry.extended_l2() {
                0xffff_ffff
            } else {
                0
            },
        }
    }

    /// An entry that reads as zeroes and takes no room (version 3).
    pub const fn zero(geometry: &Geometry) -> Self {
        if geometry.extended_l2() {
            Self {
                word: 0,
                bitmap: 0xffff_ffff << 32,
            }
        } else {
            Self {
                word: ZERO,
                bitmap: 0,
            }
        }
    }

    /// Whether the cluster has one reference only and may be written in place.
    pub const fn is_copied(&self) -> bool {
        self.word & COPIED != 0
    }

    /// The same entry with the flag set or cleared.
    pub const fn with_copied(self, copied: bool) -> Self {
        let word = if copied {
            self.word | COPIED
        } else {
            self.word & !COPIED
        };
        Self { word, ..self }
    }

    /// What the entry says of its cluster as a whole. With extended entries, [`Cluster::Zero`] means that every
    /// subcluster reads as zeroes, [`Cluster::Allocated`] that there is a cluster and the bitmap decides, and
    /// [`Cluster::Unallocated`] that there is none; some subclusters may still read as zeroes then.
    pub const fn cluster(&self, geometry: &Geometry) -> Cluster {
        if self.word & COMPRESSED != 0 {
            return Cluster::Compressed(CompressedAt::decode(geometry, self.word));
        }
        let offset = self.word & OFFSET_MASK;
        let at = if offset == 0 {
            None
        } else {
            Some(HostOffset(offset))
        };
        let zero = if geometry.extended_l2() {
            self.bitmap == 0xffff_ffff << 32
        } else {
            matches!(geometry.version(), Version::V3) && self.word & ZERO != 0
        };
        match at {
            _ if zero => Cluster::Zero { at },
            Some(at) => Cluster::Allocated { at },
            None => Cluster::Unallocated,
        }
    }

    /// Whether subcluster `index` has data in the entry's own cluster.
    pub const fn has_data(&self, index: u32) -> bool {
        index < 32 && self.bitmap >> index & 1 != 0
    }

    /// Whether subcluster `index` reads as zeroes.
    pub const fn reads_zero(&self, index: u32) -> bool {
        index < 32 && self.bitmap >> (32 + index) & 1 != 0
    }

    /// Whether reserved bits are set, or a subcluster has data and reads as zeroes at once.
    pub const fn is_invalid(&self, geometry: &Geometry) -> bool {
        if self.word & COMPRESSED != 0 {
            return geometry.extended_l2() && self.bitmap != 0;
        }
        let reserved = match geometry.version() {
            Version::V3 if !geometry.extended_l2() => L2_RESERVED,
            _ => L2_RESERVED | ZERO,
        };
        self.word & reserved != 0 || (self.bitmap & (self.bitmap >> 32)) as u32 != 0
    }
}

/// A big-endian word at `index` of a table; `None` behind its end.
pub fn word_at(table: &[u8], index: usize) -> Option<u64> {
    let start = index.checked_mul(8)?;
    let bytes = table.get(start..start.checked_add(8)?)?;
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}

/// Puts a big-endian word at `index` of a table; `false`, and nothing done, behind its end.
#[must_use]
pub fn put_word(table: &mut [u8], index: usize, word: u64) -> bool {
    let Some(start) = index.checked_mul(8) else {
        return false;
    };
    match start
        .checked_add(8)
        .and_then(|end| table.get_mut(start..end))
    {
        Some(bytes) => {
            bytes.copy_from_slice(&word.to_be_bytes());
            true
        }
        None => false,
    }
}

/// The entry at `index` of (a piece of) an L2 table; `None` behind its end.
pub fn l2_entry_at(geometry: &Geometry, table: &[u8], index: usize) -> Option<L2Entry> {
    if geometry.extended_l2() {
        let first = index.checked_mul(2)?;
        return Some(L2Entry {
            word: word_at(table, first)?,
            bitmap: word_at(table, first + 1)?,
        });
    }
    Some(L2Entry {
        word: word_at(table, index)?,
        bitmap: 0,
    })
}

/// Puts an entry at `index` of (a piece of) an L2 table; `false`, and nothing done, behind its end.
#[must_use]
pub fn put_l2_entry(geometry: &Geometry, table: &mut [u8], index: usize, entry: L2Entry) -> bool {
    if !geometry.extended_l2() {
        return put_word(table, index, entry.word);
    }
    let Some(first) = index.checked_mul(2) else {
        return false;
    };
    put_word(table, first + 1, entry.bitmap) && put_word(table, first, entry.word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(cluster_bits: u32, extended: bool) -> Geometry {
        Geometry::new(Version::V3, cluster_bits, 4, extended).expect("allowed")
    }

    #[test]
    fn what_entries_mean() {
        let plain = geometry(16, false);
        let v2 = Geometry::new(Version::V2, 16, 4, false).expect("allowed");
        let at = HostOffset(0x50000);
        let word = |word| L2Entry { word, bitmap: 0 };
        for (entry, of, meaning) in [
            (word(0), &plain, Cluster::Unallocated),
            (word(1), &plain, Cluster::Zero { at: None }),
            (word(0x50001), &plain, Cluster::Zero { at: Some(at) }),
            (word(COPIED | 0x50000), &plain, Cluster::Allocated { at }),
            (word(1), &v2, Cluster::Unallocated),
        ] {
            assert_eq!(entry.cluster(of), meaning, "{entry:x?}");
        }
        assert!(word(1).is_invalid(&v2));
        assert!(word(0x0200_0000_0005_0000).is_invalid(&plain));
        assert!(!L2Entry::copied(&plain, at).is_invalid(&plain));
        let both = L2Entry {
            word: 0x50000,
            bitmap: 1 << 32 | 1,
        };
        assert!(both.is_invalid(&geometry(16, true)));
    }

    #[test]
    fn zero_entries_of_both_kinds() {
        for extended in [false, true] {
            let geometry = geometry(16, extended);
            let zero = L2Entry::zero(&geometry);
            assert_eq!(zero.cluster(&geometry), Cluster::Zero { at: None });
            assert!(!zero.is_invalid(&geometry));
        }
    }

    proptest::proptest! {
        #[test]
        fn compressed_places_come_back(
            bits in 9_u32..=21, sector in 0_u64..1 << 40, skew in 0_u64..512, length in 1_u64..1 << 21,
        ) {
            let geometry = geometry(bits, false);
            let length_bytes = length.min(geometry.cluster_bytes());
            let place = CompressedAt { at: HostOffset(sector * 512 + skew), length_bytes };
            let word = place.encode(&geometry).expect("fits");
            let read = CompressedAt::decode(&geometry, word);
            proptest::prop_assert_eq!(read.at, place.at);
            let end = place.at.0 + place.length_bytes;
            proptest::prop_assert_eq!(read.at.0 + read.length_bytes, end.next_multiple_of(512));
        }

        #[test]
        fn tables_hold_what_was_put(word: u64, bitmap: u64, index in 0_usize..40, extended: bool) {
            let geometry = geometry(16, extended);
            let mut table = vec![0; 512];
            let entry = L2Entry { word, bitmap: if extended { bitmap } else { 0 } };
            let fits = index < 512 / if extended { 16 } else { 8 };
            proptest::prop_assert_eq!(put_l2_entry(&geometry, &mut table, index, entry), fits);
            proptest::prop_assert_eq!(l2_entry_at(&geometry, &table, index), fits.then_some(entry));
        }
    }
}
