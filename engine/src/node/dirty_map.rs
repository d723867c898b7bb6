//! [`DirtyMap`]: which parts of a disk have changed: one bit for each granule. Pure.
//!
//! Bits are kept in pages of 4 KiB, and only where some are set and others are not, so that memory follows what has changed: at most
//! one bit a granule, 2 MiB for each TiB at 64 KiB.

use std::collections::BTreeMap;

use blockyard_storage::ByteRange;
use sha2::{Digest, Sha256};

const WORDS: u64 = 512;
const WORD_BITS: u64 = 64;
const PAGE_BITS: u64 = WORDS * WORD_BITS;

/// Bits of a map at most; granules are longer where a disk has more. 256 MiB of memory.
const GRANULES_MAX: u64 = 1 << 31;

/// Memory of a page whose bits are all set, in bytes.
const PAGE_MEMORY_BYTES: u64 = 64;

/// Bytes of a disk that are carried over from one map to another in one step.
const MERGED_AT_ONCE_BYTES: u64 = 1 << 40;

/// Changed parts of a disk.
#[derive(Clone, Debug)]
pub(crate) struct DirtyMap {
    length_bytes: u64,
    /// The disk may have been so long since what is told began.
    longest_bytes: u64,
    granularity_bytes: u64,
    pages: BTreeMap<u64, Page>,
    dirty_bytes: u64,
}

#[derive(Clone, Debug)]
struct Page {
    /// None: all bits are set.
    words: Box<[u64]>,
    /// How many bits are set.
    set: u32,
}

impl DirtyMap {
    /// A map of a disk, nothing of which has changed, in granules of `granularity_bytes` (a power of two) or, on a very long disk,
    /// more.
    pub(crate) fn new(length_bytes: u64, granularity_bytes: u64) -> Self {
        let mut granularity_bytes = granularity_bytes.max(1);
        while length_bytes.div_ceil(granularity_bytes) > GRANULES_MAX {
            granularity_bytes *= 2;
        }
        Self::exactly(length_bytes, granularity_bytes)
    }

    /// The same, in granules of exactly this many bytes (a power of two) however many there are.
    pub(crate) fn exactly(length_bytes: u64, granularity_bytes: u64) -> Self {
        Self {
            length_bytes,
            longest_bytes: length_bytes,
            granularity_bytes,
            pages: BTreeMap::new(),
            dirty_bytes: 0,
        }
    }

    /// Another map of the same disk in the same granules, nothing of which has changed.
    pub(crate) fn emptied(&self) -> Self {
        Self::exactly(self.length_bytes, self.granularity_bytes)
    }

    /// Length of the disk in bytes.
    pub(crate) fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// Bytes of a granule.
    pub(crate) fn granularity_bytes(&self) -> u64 {
        self.granularity_bytes
    }

    /// Bytes of all granules that have changed.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.dirty_bytes
    }

    /// `range` in whole granules of the disk.
    pub(crate) fn outward(&self, range: ByteRange) -> ByteRange {
        let range = range.clamp_end(self.length_bytes);
        if range.is_empty() {
            return ByteRange::default();
        }
        range
            .align_outward(self.granularity_bytes)
            .clamp_end(self.length_bytes)
    }

    /// The granules that lie in `range` as a whole, up to the end of the disk.
    fn inward(&self, range: ByteRange) -> ByteRange {
        let start = range
            .offset()
            .checked_next_multiple_of(self.granularity_bytes);
        let start = start.unwrap_or(u64::MAX);
        let end = match range.end() >= self.length_bytes {
            true => self.length_bytes,
            false => range.end() - range.end() % self.granularity_bytes,
        };
        ByteRange::between(start.min(end), end)
    }

    /// All granules that `range` touches have changed. How many bytes more have than before.
    pub(crate) fn mark(&mut self, range: ByteRange) -> u64 {
        let before = self.dirty_bytes;
        self.change(self.outward(range), true);
        self.dirty_bytes - before
    }

    /// The granules that lie in `range` as a whole are what they were. How many bytes less have changed.
    pub(crate) fn clear(&mut self, range: ByteRange) -> u64 {
        let before = self.dirty_bytes;
        self.change(self.inward(range), false);
        before - self.dirty_bytes
    }

    /// All granules are what they were.
    pub(crate) fn clear_all(&mut self) {
        self.pages.clear();
        self.dirty_bytes = 0;
        self.longest_bytes = self.length_bytes;
    }

    /// The disk may have been longer than it is, nobody knows by how much.
    pub(crate) fn disk_was_longer(&mut self) {
        self.longest_bytes = u64::MAX;
    }

    /// The disk has another length. `regrowth_is_change`: what is new has changed where the disk may have been as long before, as there
    /// was something else then.
    pub(crate) fn resize(&mut self, length_bytes: u64, regrowth_is_change: bool) {
        let before_bytes = self.length_bytes;
        self.set_length(length_bytes);
        if regrowth_is_change {
            let again = length_bytes.min(self.longest_bytes);
            self.mark(ByteRange::between(before_bytes, again));
        }
        self.longest_bytes = self.longest_bytes.max(length_bytes);
    }

    fn set_length(&mut self, length_bytes: u64) {
        let granularity = self.granularity_bytes;
        if length_bytes < self.length_bytes {
            // A granule that is cut stays what it is.
            let end = length_bytes
                .div_ceil(granularity)
                .saturating_mul(granularity);
            self.clear(ByteRange::between(
                end.min(self.length_bytes),
                self.length_bytes,
            ));
        }
        // The last granule counts as far as the disk goes.
        let was_cut = self.cut_bytes();
        self.length_bytes = length_bytes;
        self.dirty_bytes = (self.dirty_bytes + was_cut).saturating_sub(self.cut_bytes());
    }

    /// What the end of the disk cuts off of a last granule that has changed.
    fn cut_bytes(&self) -> u64 {
        let granules = self.length_bytes.div_ceil(self.granularity_bytes);
        match granules.checked_sub(1) {
            Some(last) if self.is_dirty(last) => granules
                .saturating_mul(self.granularity_bytes)
                .saturating_sub(self.length_bytes),
            _ => 0,
        }
    }

    /// What has changed according to `other`, whatever its granularity, has changed here, too.
    pub(crate) fn merge(&mut self, other: &Self) {
        let mut from = 0;
        while from < other.length_bytes
            && let Some(run) = other.run_from(from, MERGED_AT_ONCE_BYTES)
        {
            self.mark(run);
            from = run.end();
        }
        self.longest_bytes = self.longest_bytes.max(other.longest_bytes);
    }

    /// What has not changed according to `other`, in whole granules of this map, is what it was.
    pub(crate) fn keep_only(&mut self, other: &Self) {
        let mut from = 0;
        while from < self.length_bytes
            && let Some(run) = self.run_from(from, MERGED_AT_ONCE_BYTES)
        {
            let kept = other.run_in(run).map(|kept| kept.intersection(&run));
            let kept = kept.unwrap_or(ByteRange::between(run.end(), run.end()));
            self.clear(ByteRange::between(run.offset(), kept.offset()));
            // What is kept of a granule keeps all of it.
            from = self.outward(kept).end().max(run.offset() + 1);
        }
    }

    /// SHA-256 of the bits, one for each granule, in words of 64 bits whose first byte has the first granules; the rest of the last
    /// word is zero.
    pub(crate) fn sha256(&self) -> [u8; 32] {
        let words = self
            .length_bytes
            .div_ceil(self.granularity_bytes)
            .div_ceil(WORD_BITS);
        let granules_of_last = self.length_bytes.div_ceil(self.granularity_bytes) % WORD_BITS;
        let (clean, mut digest) = (Page::empty(), Sha256::new());
        let mut bytes = Vec::with_capacity(usize::try_from(WORDS * 8).unwrap_or(0));
        for page in 0..words.div_ceil(WORDS) {
            let entry = self.pages.get(&page).unwrap_or(&clean);
            bytes.clear();
            for index in 0..WORDS.min(words - page * WORDS) {
                let is_last = page * WORDS + index + 1 == words && granules_of_last > 0;
                let mask = if is_last {
                    (1 << granules_of_last) - 1
                } else {
                    u64::MAX
                };
                bytes.extend_from_slice(&(entry.word(index) & mask).to_le_bytes());
            }
            digest.update(&bytes);
        }
        digest.finalize().into()
    }

    /// Granules have changed as these bits say: from granule `first` on, a multiple of 64, the lowest bit of each byte first. What is
    /// behind the end of the disk does not count.
    pub(crate) fn mark_bits(&mut self, first: u64, bytes: &[u8]) {
        let granules = self.length_bytes.div_ceil(self.granularity_bytes);
        let was_cut = self.cut_bytes();
        let mut changed = 0;
        let mut start = first;
        let mut rest = bytes;
        while !rest.is_empty() && start < granules {
            let (page, in_page) = (start / PAGE_BITS, start % PAGE_BITS);
            let bytes_of_page = usize::try_from((PAGE_BITS - in_page) / 8).unwrap_or(rest.len());
            let (piece, behind) = rest.split_at(rest.len().min(bytes_of_page));
            if piece.iter().any(|byte| *byte != 0) {
                let left = granules - start;
                let entry = self.pages.entry(page).or_insert_with(Page::empty);
                entry.open_up();
                for (index, word) in (0..).zip(piece.chunks(8)) {
                    let mut word = word_of(word);
                    match left.saturating_sub(index * WORD_BITS) {
                        0 => break,
                        some if some < WORD_BITS => word &= (1 << some) - 1,
                        _ => {}
                    }
                    let flipped = entry.change(in_page / WORD_BITS + index, word, true);
                    changed += u64::from(flipped.count_ones());
                }
                match u64::from(entry.set) {
                    0 => drop(self.pages.remove(&page)),
                    PAGE_BITS => *entry = Page::full(),
                    _ => {}
                }
            }
            start += piece.len() as u64 * 8;
            rest = behind;
        }
        let is_cut = self.cut_bytes() - was_cut;
        self.dirty_bytes += (changed * self.granularity_bytes).saturating_sub(is_cut);
    }

    /// The bits from granule `first` on, a multiple of 64; behind the end of the disk there are none.
    pub(crate) fn bits_into(&self, first: u64, bytes: &mut [u8]) {
        for (word, piece) in (first / WORD_BITS..).zip(bytes.chunks_mut(8)) {
            let page = self.pages.get(&(word / WORDS));
            let bits = page.map_or(0, |page| page.word(word % WORDS));
            let bits = bits & self.mask_of_word(word);
            piece.copy_from_slice(bits.to_le_bytes().get(..piece.len()).unwrap_or(&[]));
        }
    }

    /// Which bits of a word stand for granules of the disk.
    fn mask_of_word(&self, word: u64) -> u64 {
        let granules = self.length_bytes.div_ceil(self.granularity_bytes);
        match granules.saturating_sub(word.saturating_mul(WORD_BITS)) {
            0 => 0,
            some if some < WORD_BITS => (1 << some) - 1,
            _ => u64::MAX,
        }
    }

    /// Memory that it takes, in bytes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let of_page = |page: &Page| PAGE_MEMORY_BYTES + page.words.len() as u64 * 8;
        self.pages.values().map(of_page).sum()
    }

    fn change(&mut self, granules: ByteRange, dirty: bool) {
        if granules.is_empty() {
            return;
        }
        let (first, last) = (
            granules.offset() / self.granularity_bytes,
            (granules.end() - 1) / self.granularity_bytes,
        );
        let mut changed = 0;
        let mut was_last_changed = false;
        for page in first / PAGE_BITS..=last / PAGE_BITS {
            if !dirty && !self.pages.contains_key(&page) {
                continue;
            }
            let start = page * PAGE_BITS;
            let (from, to) = (
                first.max(start) - start,
                last.min(start + PAGE_BITS - 1) - start,
            );
            let entry = self.pages.entry(page).or_insert_with(Page::empty);
            if dirty && u64::from(entry.set) == PAGE_BITS {
                continue;
            }
            if dirty && to - from == PAGE_BITS - 1 {
                changed += PAGE_BITS - u64::from(entry.set);
                was_last_changed = start + to == last && entry.word(WORDS - 1) >> 63 == 0;
                *entry = Page::full();
                continue;
            }
            entry.open_up();
            for index in from / WORD_BITS..=to / WORD_BITS {
                let low = from.max(index * WORD_BITS) % WORD_BITS;
                let high = to.min(index * WORD_BITS + WORD_BITS - 1) % WORD_BITS;
                let mask = (u64::MAX << low) & (u64::MAX >> (WORD_BITS - 1 - high));
                let flipped = entry.change(index, mask, dirty);
                changed += u64::from(flipped.count_ones());
                let is_end = start + (index + 1) * WORD_BITS > last;
                was_last_changed = is_end && flipped & (1 << (last % WORD_BITS)) != 0;
            }
            match u64::from(entry.set) {
                0 => drop(self.pages.remove(&page)),
                PAGE_BITS => *entry = Page::full(),
                _ => {}
            }
        }
        // The last granule of the disk may be cut.
        let cut = match was_last_changed {
            true => (last + 1)
                .saturating_mul(self.granularity_bytes)
                .saturating_sub(self.length_bytes),
            false => 0,
        };
        let bytes = (changed * self.granularity_bytes).saturating_sub(cut);
        self.dirty_bytes = match dirty {
            true => self.dirty_bytes + bytes,
            false => self.dirty_bytes.saturating_sub(bytes),
        };
    }

    /// The first granules at or behind `from` that have changed, side by side, of at most `longest` bytes but one granule.
    pub(crate) fn run_from(&self, from: u64, longest: u64) -> Option<ByteRange> {
        let first = self.first_from(from / self.granularity_bytes)?;
        let longest = (longest / self.granularity_bytes).max(1);
        let end = self.end_of_run(first, first.saturating_add(longest));
        let start = first * self.granularity_bytes;
        let end = end.saturating_mul(self.granularity_bytes);
        Some(ByteRange::between(start, end.min(self.length_bytes)))
    }

    /// The first granules that `range` touches and that have changed, side by side, as far as it touches them.
    pub(crate) fn run_in(&self, range: ByteRange) -> Option<ByteRange> {
        let range = self.outward(range);
        if range.is_empty() {
            return None;
        }
        let last = (range.end() - 1) / self.granularity_bytes;
        let first = self.first_within(range.offset() / self.granularity_bytes, last)?;
        let rest = ByteRange::between(first * self.granularity_bytes, range.end());
        // The last granule of a disk may be a part of one.
        let longest = rest
            .length()
            .checked_next_multiple_of(self.granularity_bytes);
        let run = self.run_from(rest.offset(), longest.unwrap_or(u64::MAX))?;
        Some(run.intersection(&rest))
    }

    /// The first granule at or behind `granule` that has changed.
    pub(crate) fn first_from(&self, granule: u64) -> Option<u64> {
        self.first_within(granule, u64::MAX)
    }

    /// The first one from `granule` to `last` that has changed.
    fn first_within(&self, granule: u64, last: u64) -> Option<u64> {
        let page = granule / PAGE_BITS;
        let mut pages = self.pages.range(page..=last / PAGE_BITS);
        let first = pages.find_map(|(number, entry)| {
            let from = match *number == page {
                true => granule % PAGE_BITS,
                false => 0,
            };
            entry.first_from(from).map(|bit| number * PAGE_BITS + bit)
        });
        first.filter(|first| *first <= last)
    }

    /// The first granule behind `granule` that has not changed, or `end`.
    fn end_of_run(&self, granule: u64, end: u64) -> u64 {
        let mut at = granule;
        while at < end {
            let Some(page) = self.pages.get(&(at / PAGE_BITS)) else {
                return at;
            };
            at = match page.first_clean_from(at % PAGE_BITS) {
                Some(bit) => return (at / PAGE_BITS * PAGE_BITS + bit).min(end),
                None => (at / PAGE_BITS + 1) * PAGE_BITS,
            };
        }
        end
    }

    fn is_dirty(&self, granule: u64) -> bool {
        let page = self.pages.get(&(granule / PAGE_BITS));
        page.is_some_and(|page| {
            let bit = granule % PAGE_BITS;
            page.word(bit / WORD_BITS) & (1 << (bit % WORD_BITS)) != 0
        })
    }
}

fn word_of(bytes: &[u8]) -> u64 {
    let bytes = bytes.iter().rev();
    bytes.fold(0, |word, byte| word << 8 | u64::from(*byte))
}

impl Page {
    fn empty() -> Self {
        let words = usize::try_from(WORDS).unwrap_or_default();
        Self {
            words: vec![0; words].into_boxed_slice(),
            set: 0,
        }
    }

    fn full() -> Self {
        Self {
            words: Box::default(),
            set: u32::try_from(PAGE_BITS).unwrap_or(u32::MAX),
        }
    }

    /// Keeps each bit by itself.
    fn open_up(&mut self) {
        if self.words.is_empty() {
            let words = usize::try_from(WORDS).unwrap_or_default();
            self.words = vec![u64::MAX; words].into_boxed_slice();
        }
    }

    fn word(&self, index: u64) -> u64 {
        if self.words.is_empty() {
            return u64::MAX;
        }
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.words.get(index).copied().unwrap_or(0)
    }

    /// Sets or clears the bits of `mask` in a word. Those that were not so before.
    fn change(&mut self, index: u64, mask: u64, dirty: bool) -> u64 {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let Some(word) = self.words.get_mut(index) else {
            return 0;
        };
        let flipped = match dirty {
            true => mask & !*word,
            false => mask & *word,
        };
        *word ^= flipped;
        self.set = match dirty {
            true => self.set + flipped.count_ones(),
            false => self.set - flipped.count_ones(),
        };
        flipped
    }

    fn first_clean_from(&self, bit: u64) -> Option<u64> {
        if self.words.is_empty() {
            return None;
        }
        (bit / WORD_BITS..WORDS).find_map(|index| {
            let low = match index == bit / WORD_BITS {
                true => bit % WORD_BITS,
                false => 0,
            };
            let clean = !self.word(index) & (u64::MAX << low);
            (clean != 0).then(|| index * WORD_BITS + u64::from(clean.trailing_zeros()))
        })
    }

    fn first_from(&self, bit: u64) -> Option<u64> {
        (bit / WORD_BITS..WORDS).find_map(|index| {
            let low = match index == bit / WORD_BITS {
                true => bit % WORD_BITS,
                false => 0,
            };
            let word = self.word(index) & (u64::MAX << low);
            (word != 0).then(|| index * WORD_BITS + u64::from(word.trailing_zeros()))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_knows_what_a_set_of_granules_knows(
            length in 1_u64..3_000_000,
            bits in 0_u32..7,
            changes in prop::collection::vec(
                (any::<bool>(), 0_u64..3_000_000, 1_u64..1_000_000), 0..20
            ),
            from in 0_u64..3_000_000,
            longest in 0_u64..2_000,
        ) {
            let granularity = 1 << bits;
            let mut map = DirtyMap::new(length, granularity);
            let mut model = BTreeSet::new();
            let bytes = |model: &BTreeSet<u64>| -> u64 {
                let lengths = model.iter().map(|one| granularity.min(length - one * granularity));
                lengths.sum()
            };
            for (mark, offset, run) in changes {
                let range = ByteRange::new(offset, run);
                let before = bytes(&model);
                if mark {
                    let end = range.end().min(length);
                    let touched = (offset / granularity)..end.div_ceil(granularity);
                    if offset < length {
                        model.extend(touched);
                    }
                    prop_assert_eq!(map.mark(range), bytes(&model) - before);
                } else {
                    model.retain(|one| {
                        let granule = ByteRange::new(one * granularity, granularity);
                        !range.contains(&granule.clamp_end(length))
                    });
                    prop_assert_eq!(map.clear(range), before - bytes(&model));
                }
                prop_assert_eq!(map.dirty_bytes(), bytes(&model));
            }
            let first = model.range(from / granularity..).next().copied();
            let run = map.run_from(from, longest);
            prop_assert_eq!(run.map(|run| run.offset()), first.map(|one| one * granularity));
            if let (Some(run), Some(first)) = (run, first) {
                let end = run.end().div_ceil(granularity);
                prop_assert!((first..end).all(|one| model.contains(&one)));
                let is_long = end - first >= (longest / granularity).max(1);
                prop_assert!(is_long || !model.contains(&end));
            }
            prop_assert!(map.pages.values().all(|page| page.set > 0));
            let all_set = |page: &Page| u64::from(page.set) == PAGE_BITS;
            prop_assert!(map.pages.values().all(|page| page.words.is_empty() == all_set(page)));
            let range = ByteRange::new(from, longest + 1);
            let last = (range.end().min(length).max(1) - 1) / granularity;
            let within = first.filter(|one| from < length && *one <= last);
            let run = map.run_in(range);
            prop_assert_eq!(run.map(|run| run.offset()), within.map(|one| one * granularity));
            if let (Some(run), Some(first)) = (run, within) {
                let end = run.end().div_ceil(granularity);
                prop_assert!((first..end).all(|one| one <= last && model.contains(&one)));
                prop_assert!(end > last || !model.contains(&end));
            }
        }
    }

    proptest! {
        #[test]
        fn another_length_or_granularity_loses_nothing(
            lengths in (1_u64..3_000_000, 1_u64..3_000_000),
            bits in (0_u32..9, 0_u32..9),
            marks in prop::collection::vec((0_u64..3_000_000, 1_u64..100_000), 0..8),
        ) {
            let (length, after) = lengths;
            let (granularity, other) = (1 << bits.0, 1 << bits.1);
            let mut map = DirtyMap::new(length, granularity);
            for (offset, run) in &marks {
                map.mark(ByteRange::new(*offset, *run));
            }
            let mut merged = DirtyMap::new(length, other);
            merged.merge(&map);
            let mut resized = map.clone();
            resized.resize(after, true);
            let (mut of_merged, mut of_resized) = (0, 0);
            let bytes = |granule: u64, unit: u64, end: u64| unit.min(end - granule * unit);
            for granule in 0..length.div_ceil(other) {
                let of_disk = ByteRange::new(granule * other, other).clamp_end(length);
                let expected = map.run_in(of_disk).is_some();
                prop_assert_eq!(merged.is_dirty(granule), expected);
                of_merged += if expected { bytes(granule, other, length) } else { 0 };
            }
            for granule in 0..after.div_ceil(granularity) {
                prop_assert_eq!(resized.is_dirty(granule), map.is_dirty(granule));
                let is_dirty = map.is_dirty(granule);
                of_resized += if is_dirty { bytes(granule, granularity, after) } else { 0 };
            }
            prop_assert_eq!(merged.dirty_bytes(), of_merged);
            prop_assert_eq!(resized.dirty_bytes(), of_resized);
            prop_assert_eq!(resized.length_bytes(), after);
        }
    }

    #[test]
    fn what_was_cut_off_has_changed_when_it_is_back() {
        let changed = |map: &DirtyMap| map.run_from(0, u64::MAX);
        let mut map = DirtyMap::new(100, 1);
        map.resize(200, true);
        assert_eq!(changed(&map), None, "it was never as long");
        map.resize(150, false);
        map.resize(160, false);
        assert_eq!(changed(&map), None, "nobody wants to know");
        map.resize(50, true);
        let mut other = DirtyMap::new(50, 1);
        other.merge(&map);
        for map in [&mut map, &mut other] {
            map.resize(80, true);
            assert_eq!(changed(map), Some(ByteRange::between(50, 80)));
            map.resize(300, true);
            assert_eq!(changed(map), Some(ByteRange::between(50, 200)));
            map.clear_all();
            map.resize(400, true);
            assert_eq!(changed(map), None, "it is told from now on");
            map.disk_was_longer();
            map.resize(500, true);
            assert_eq!(changed(map), Some(ByteRange::between(400, 500)));
        }
    }

    proptest! {
        #[test]
        fn bits_come_back(
            length in 1_u64..40_000_000,
            bits in 0_u32..10,
            marks in prop::collection::vec((0_u64..40_000_000, 1_u64..9_000_000), 0..8),
            words_at_once in 1_usize..2000,
            behind_end: u8,
        ) {
            let mut map = DirtyMap::new(length, 1 << bits);
            for (offset, run) in &marks {
                map.mark(ByteRange::new(*offset, *run));
            }
            let granules = length.div_ceil(1 << bits);
            let mut again = DirtyMap::new(length, 1 << bits);
            let mut first = 0;
            while first < granules {
                let mut bytes = vec![0xa5; words_at_once * 8];
                map.bits_into(first, &mut bytes);
                for (index, byte) in bytes.iter_mut().enumerate() {
                    let granule = first + index as u64 * 8;
                    for bit in 0..8 {
                        let is_dirty = granule + bit < granules && map.is_dirty(granule + bit);
                        prop_assert_eq!(*byte & 1 << bit != 0, is_dirty);
                    }
                    if granule >= granules {
                        *byte = behind_end;
                    }
                }
                again.mark_bits(first, &bytes);
                first += bytes.len() as u64 * 8;
            }
            prop_assert_eq!(again.dirty_bytes(), map.dirty_bytes());
            prop_assert_eq!(again.sha256(), map.sha256());
            let kinds = |map: &DirtyMap| -> Vec<(u64, u32, bool)> {
                let pages = map.pages.iter();
                pages.map(|(at, page)| (*at, page.set, page.words.is_empty())).collect()
            };
            prop_assert_eq!(kinds(&again), kinds(&map));
        }
    }

    #[test]
    fn a_run_goes_on_to_the_end_of_a_disk_that_cuts_a_granule() {
        let mut map = DirtyMap::exactly(10_000, 4096);
        map.mark(ByteRange::new(0, 10_000));
        let to_the_end = ByteRange::between(5000, 10_000);
        let run = map.run_in(to_the_end);
        assert_eq!(run, Some(ByteRange::between(4096, 10_000)));
    }

    #[test]
    fn the_longest_disk_has_a_map_of_bounded_size() {
        let mut map = DirtyMap::new(u64::MAX >> 1, 512);
        assert_eq!(map.granularity_bytes(), 1 << 32);
        map.mark(ByteRange::new((u64::MAX >> 1) - 10, 10));
        assert_eq!(map.dirty_bytes(), (1 << 32) - 1);
        assert_eq!(map.run_from(0, 1).map(|run| run.end()), Some(u64::MAX >> 1));
    }
}
