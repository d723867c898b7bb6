//! [`Unverified`]: what a job has copied and not read back yet. Pure.
//!
//! Memory is bounded by whoever reads back as soon as it [is full](Unverified::is_full).

use std::collections::BTreeMap;

use blockyard_storage::ByteRange;

use crate::manifest::EXTENT_BYTES;
use crate::manifest::sums::Summed;
use crate::node::dirty_map::DirtyMap;

/// Extents of a page of checksums.
const PAGE_EXTENTS: usize = 256;

/// Bytes of disk that a page is about.
const PAGE_DISK_BYTES: u64 = PAGE_EXTENTS as u64 * EXTENT_BYTES;

/// Pages that are kept before it is full: 16 MiB, of 256 GiB side by side.
const PAGES_MAX: usize = 16 << 10;

/// Data that is read back at once, in bytes.
const DATA_MAX_BYTES: u64 = 1 << 20;

/// Zeroes that are looked at at once, in bytes.
const ZEROES_MAX_BYTES: u64 = 1 << 30;

/// What was copied and not read back.
pub(crate) struct Unverified {
    pages: BTreeMap<u64, Box<[u32; PAGE_EXTENTS]>>,
    data: DirtyMap,
    zeroes: DirtyMap,
}

/// What a part of the target has to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// All zeroes.
    Zeroes,
    /// Bytes with this CRC-32. One extent.
    Data(u32),
}

impl Unverified {
    /// Of a disk of this length, nothing of which was copied.
    pub(crate) fn new(length_bytes: u64) -> Self {
        let map = DirtyMap::exactly(length_bytes, EXTENT_BYTES);
        Self {
            pages: BTreeMap::new(),
            zeroes: map.clone(),
            data: map,
        }
    }

    /// It was copied, perhaps again.
    pub(crate) fn add(&mut self, run: &Summed) {
        match run {
            Summed::Zeroes(range) => {
                self.forget(*range);
                self.zeroes.mark(*range);
            }
            Summed::Data(range, sums) => {
                self.zeroes.clear(*range);
                self.data.mark(*range);
                let first = range.offset() / EXTENT_BYTES;
                for (extent, sum) in (first..).zip(sums) {
                    let page = self.pages.entry(extent / PAGE_EXTENTS as u64);
                    let page = page.or_insert_with(|| Box::new([0; PAGE_EXTENTS]));
                    if let Some(place) = page.get_mut(place_in_page(extent)) {
                        *place = sum.crc32;
                    }
                }
            }
        }
    }

    /// Whether it has to become less before more is copied.
    pub(crate) fn is_full(&self) -> bool {
        self.pages.len() >= PAGES_MAX
    }

    /// Bytes that are to be read back.
    pub(crate) fn bytes(&self) -> u64 {
        self.data.dirty_bytes() + self.zeroes.dirty_bytes()
    }

    /// What is to be read back next at or behind `from`: a part of one kind.
    pub(crate) fn next_from(&self, from: u64) -> Option<ByteRange> {
        // The last extent may be cut by the end, and would be found again behind it.
        if from >= self.data.length_bytes() {
            return None;
        }
        let data = self.data.run_from(from, DATA_MAX_BYTES);
        let zeroes = self.zeroes.run_from(from, ZEROES_MAX_BYTES);
        match (data, zeroes) {
            (Some(data), Some(zeroes)) if zeroes.offset() < data.offset() => Some(zeroes),
            (data, zeroes) => data.or(zeroes),
        }
    }

    /// What of `range` is to be read back, in pieces.
    pub(crate) fn expected(&self, range: ByteRange) -> Vec<(ByteRange, Expected)> {
        let mut expected = Vec::new();
        let mut rest = range;
        while let Some(run) = self.zeroes.run_in(rest) {
            expected.push((run, Expected::Zeroes));
            rest = ByteRange::between(run.end(), range.end());
        }
        rest = range;
        while let Some(run) = self.data.run_in(rest) {
            for extent in run.pieces(EXTENT_BYTES) {
                let number = extent.offset() / EXTENT_BYTES;
                let page = self.pages.get(&(number / PAGE_EXTENTS as u64));
                let crc32 = page.and_then(|page| page.get(place_in_page(number)));
                expected.push((extent, Expected::Data(crc32.copied().unwrap_or_default())));
            }
            rest = ByteRange::between(run.end(), range.end());
        }
        expected
    }

    /// It was read back, or will be copied again.
    pub(crate) fn forget(&mut self, range: ByteRange) {
        self.zeroes.clear(range);
        if self.data.clear(range) == 0 {
            return;
        }
        let pages = range.offset() / PAGE_DISK_BYTES..=range.end() / PAGE_DISK_BYTES;
        let touched: Vec<u64> = self.pages.range(pages).map(|(page, _)| *page).collect();
        for page in touched {
            let of_page = ByteRange::new(page * PAGE_DISK_BYTES, PAGE_DISK_BYTES);
            if self.data.run_in(of_page).is_none() {
                self.pages.remove(&page);
            }
        }
    }
}

fn place_in_page(extent: u64) -> usize {
    // Less than a page has.
    usize::try_from(extent % PAGE_EXTENTS as u64).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::manifest::sums::ExtentSum;

    const EXTENTS: u64 = 3 * PAGE_EXTENTS as u64;

    fn sum(crc32: u32) -> ExtentSum {
        ExtentSum {
            crc32,
            digest: [0; 32],
        }
    }

    proptest! {
        #[test]
        fn it_is_a_list_of_the_last_sums(
            changes in proptest::collection::vec((0..EXTENTS, 1..400_u64, 0..3_u8), 1..30),
        ) {
            let length = EXTENTS * EXTENT_BYTES - 512;
            let mut unverified = Unverified::new(length);
            let mut model: BTreeMap<u64, Expected> = BTreeMap::new();
            for (nth, (first, count, what)) in changes.into_iter().enumerate() {
                let count = count.min(EXTENTS - first);
                let range = ByteRange::new(first * EXTENT_BYTES, count * EXTENT_BYTES);
                let range = range.clamp_end(length);
                let crc = |extent| nth as u32 * 1000 + extent as u32;
                match what {
                    0 => unverified.add(&Summed::Zeroes(range)),
                    1 => {
                        let sums = (first..first + count).map(|extent| sum(crc(extent)));
                        unverified.add(&Summed::Data(range, sums.collect()));
                    }
                    _ => unverified.forget(range),
                }
                for extent in first..first + count {
                    match what {
                        0 => model.insert(extent, Expected::Zeroes),
                        1 => model.insert(extent, Expected::Data(crc(extent))),
                        _ => model.remove(&extent),
                    };
                }
            }
            let mut found = BTreeMap::new();
            let mut from = 0;
            while let Some(range) = unverified.next_from(from) {
                for (part, expected) in unverified.expected(range) {
                    for extent in part.pieces(EXTENT_BYTES) {
                        found.insert(extent.offset() / EXTENT_BYTES, expected.clone());
                    }
                }
                from = range.end();
            }
            prop_assert_eq!(&found, &model);
            let pages = model.iter().filter(|(_, expected)| **expected != Expected::Zeroes);
            let pages: std::collections::BTreeSet<u64> =
                pages.map(|(extent, _)| extent / PAGE_EXTENTS as u64).collect();
            prop_assert_eq!(unverified.pages.keys().copied().collect::<Vec<_>>(), pages.into_iter().collect::<Vec<_>>());
        }
    }
}
