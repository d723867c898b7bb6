//! Bitmaps of an image as they are written down in the state directory, and what becomes of them after a crash.
//!
//! ```text
//!   0   4   version: 1; little-endian, as all that follows
//!   4   8   length of the disk in bytes
//!   12  8   bytes of a region of the disk, for each of which the field has a bit
//!   20  4   number of bitmaps; then for each of them
//!           2   length of its name in the image, and the name
//!           1   binary logarithm of its granularity
//!           1   1: it records changes
//!           8   number of pages; then for each of them
//!               8   its number
//!               1   0: its 4096 bytes of bits follow, the lowest of each byte first; 1: all of its bits are set
//! ```
//! Only pages are there in which some bit is set.

use blockyard_images::qcow2::bitmaps::{BitSink, BitSource};
use blockyard_storage::ByteRange;

use crate::bitmap::BitmapInMemory;
use crate::bitmap::activity::Regions;
use crate::node::dirty_map::DirtyMap;
use crate::state::MarkField;

const VERSION: u32 = 1;
const PAGE_BYTES: usize = 4096;
const PAGE_BITS: u64 = 8 * PAGE_BYTES as u64;
/// Granularities that an image can keep.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;

/// Bitmaps of a disk of this length that is divided like this, in their order.
pub(crate) fn encode(length_bytes: u64, regions: Regions, bitmaps: &[BitmapInMemory]) -> Vec<u8> {
    let mut bytes = VERSION.to_le_bytes().to_vec();
    bytes.extend(length_bytes.to_le_bytes());
    bytes.extend(regions.region_bytes().to_le_bytes());
    bytes.extend(
        u32::try_from(bitmaps.len())
            .unwrap_or(u32::MAX)
            .to_le_bytes(),
    );
    for bitmap in bitmaps {
        let name = &bitmap.name_in_image;
        bytes.extend(u16::try_from(name.len()).unwrap_or(u16::MAX).to_le_bytes());
        bytes.extend(name);
        let granularity = bitmap.map.granularity_bytes().trailing_zeros();
        bytes.push(u8::try_from(granularity).unwrap_or(u8::MAX));
        bytes.push(u8::from(bitmap.records));
        encode_bits(&bitmap.map, &mut bytes);
    }
    bytes
}

fn encode_bits(map: &DirtyMap, bytes: &mut Vec<u8>) {
    let count_at = bytes.len();
    bytes.extend([0; 8]);
    let mut count: u64 = 0;
    let mut page_bytes = [0; PAGE_BYTES];
    let mut next = map.next_set(0);
    while let Some(bit) = next {
        let page = bit / PAGE_BITS;
        map.copy_to(page * PAGE_BITS, &mut page_bytes);
        bytes.extend(page.to_le_bytes());
        let is_full = page_bytes.iter().all(|byte| *byte == u8::MAX);
        bytes.push(u8::from(is_full));
        if !is_full {
            bytes.extend(page_bytes);
        }
        count += 1;
        next = map.next_set((page + 1).saturating_mul(PAGE_BITS));
    }
    if let Some(place) = bytes.get_mut(count_at..count_at + 8) {
        place.copy_from_slice(&count.to_le_bytes());
    }
}

/// What bitmaps of an image whose disk has `length_bytes` now are after a crash: what was written down, and all that may have changed
/// since then in those that record. `None`: this is not what was written.
pub(crate) fn decode(
    content: &[u8],
    field: &[u8],
    length_bytes: u64,
) -> Option<Vec<BitmapInMemory>> {
    let mut rest = content;
    if u32::from_le_bytes(take(&mut rest)?) != VERSION {
        return None;
    }
    let old_length_bytes = u64::from_le_bytes(take(&mut rest)?);
    let region_bytes = u64::from_le_bytes(take(&mut rest)?);
    if !region_bytes.is_power_of_two() {
        return None;
    }
    let regions = Regions::of(old_length_bytes, region_bytes);
    let field = MarkField::found(regions.bits(), field)?;
    let count = u32::from_le_bytes(take(&mut rest)?);
    let mut bitmaps = Vec::new();
    for _ in 0..count {
        let name_bytes = usize::from(u16::from_le_bytes(take(&mut rest)?));
        let (name, behind) = rest.split_at_checked(name_bytes)?;
        rest = behind;
        let [granularity, records] = take(&mut rest)?;
        if !GRANULARITY_BITS.contains(&granularity) || records > 1 {
            return None;
        }
        let mut map = DirtyMap::exactly(length_bytes, 1 << granularity);
        decode_bits(&mut rest, &mut map)?;
        if records == 1 {
            let touched = (0..regions.bits()).filter(|bit| field.has(*bit));
            for bit in touched {
                map.mark(regions.range_of(bit));
            }
        }
        bitmaps.push(BitmapInMemory {
            name_in_image: name.to_vec(),
            map,
            records: records == 1,
        });
    }
    rest.is_empty().then_some(bitmaps)
}

fn decode_bits(rest: &mut &[u8], map: &mut DirtyMap) -> Option<()> {
    let pages = u64::from_le_bytes(take(rest)?);
    for _ in 0..pages {
        let page = u64::from_le_bytes(take(rest)?);
        let first = page.checked_mul(PAGE_BITS)?;
        match take(rest)? {
            [0] => {
                let (bits, behind) = rest.split_at_checked(PAGE_BYTES)?;
                *rest = behind;
                map.put(first, bits);
            }
            [1] => {
                let granularity = map.granularity_bytes();
                let start = first.saturating_mul(granularity);
                let end = (first + PAGE_BITS).saturating_mul(granularity);
                map.mark(ByteRange::between(start, end));
            }
            _ => return None,
        }
    }
    Some(())
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (first, behind) = rest.split_first_chunk()?;
    *rest = behind;
    Some(*first)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const REGION: u64 = 1 << 22;

    fn field(regions: &Regions, touched: &[u64]) -> Vec<u8> {
        let mut field = MarkField::new(regions.bits());
        touched.iter().for_each(|bit| field.set(*bit..bit + 1));
        field.bytes().to_vec()
    }

    fn bitmap(
        length_bytes: u64,
        granularity: u8,
        records: bool,
        runs: &[(u64, u64)],
    ) -> BitmapInMemory {
        let mut map = DirtyMap::exactly(length_bytes, 1 << granularity);
        for (offset, length) in runs {
            map.mark(ByteRange::new(offset % length_bytes, *length));
        }
        BitmapInMemory {
            name_in_image: format!("{granularity}\u{fffd}{records}").into_bytes(),
            map,
            records,
        }
    }

    fn mark_all(map: &mut DirtyMap, regions: &Regions, touched: &[u64]) {
        for bit in touched {
            map.mark(regions.range_of(*bit));
        }
    }

    fn same(one: &DirtyMap, other: &DirtyMap) -> bool {
        one.sha256() == other.sha256()
            && one.dirty_bytes() == other.dirty_bytes()
            && one.granularity_bytes() == other.granularity_bytes()
    }

    proptest! {
        #[test]
        fn what_was_written_down_comes_back(
            length_bytes in 1_u64..1 << 36,
            granularity in 12_u8..=20,
            runs in vec((any::<u64>(), 1_u64..1 << 33), 0..10),
            records: bool,
            touched in vec(any::<u64>(), 0..10),
            new_length_bytes in 1_u64..1 << 36,
        ) {
            let bitmaps = [bitmap(length_bytes, granularity, records, &runs), bitmap(length_bytes, 16, false, &[])];
            let regions = Regions::of(length_bytes, REGION);
            let content = encode(length_bytes, regions, &bitmaps);
            let touched: Vec<u64> = touched.into_iter().map(|bit| bit % regions.bits()).collect();
            let read = decode(&content, &field(&regions, &touched), length_bytes).unwrap();
            prop_assert_eq!(read.len(), 2);
            let [first, second] = &bitmaps;
            let mut expected = first.map.clone();
            if records {
                mark_all(&mut expected, &regions, &touched);
            }
            prop_assert!(same(&read[0].map, &expected));
            prop_assert!(same(&read[1].map, &second.map));
            prop_assert_eq!(&read[0].name_in_image, &first.name_in_image);
            prop_assert_eq!((read[0].records, read[1].records), (records, false));
            // The disk has got another length since: what is behind the old end was touched if anything was.
            let read = decode(&content, &field(&regions, &touched), new_length_bytes).unwrap();
            expected.resize(new_length_bytes, false);
            if records {
                mark_all(&mut expected, &regions, &touched);
            }
            prop_assert!(same(&read[0].map, &expected));
        }

        #[test]
        fn anything_is_read_or_refused(mut content: Vec<u8>, version: bool, field: Vec<u8>) {
            if version {
                content.splice(..0, VERSION.to_le_bytes());
            }
            let _ = decode(&content, &field, 1 << 20);
        }

        #[test]
        fn what_is_cut_off_is_refused(end in any::<prop::sample::Index>()) {
            let bitmaps = [bitmap(1 << 30, 16, true, &[(0, 1), (1 << 20, 1 << 29)])];
            let regions = Regions::of(1 << 30, REGION);
            let content = encode(1 << 30, regions, &bitmaps);
            let field = field(&regions, &[]);
            prop_assert!(decode(&content[..end.index(content.len())], &field, 1 << 30).is_none());
            prop_assert!(decode(&content, &field[1..], 1 << 30).is_none());
        }
    }
}
