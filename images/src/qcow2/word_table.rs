//! [`WordTable`]: a table of 64-bit words that is in memory as a whole (L1, the refcount table), and which of its sectors
//! were changed.

use std::collections::BTreeSet;

use crate::qcow2::units::HostOffset;

/// Words that are written together: those of a sector, which no power cut tears.
const WORDS_PER_SECTOR: usize = 64;

/// A table of words in the image file.
pub(super) struct WordTable {
    words: Vec<u64>,
    at: HostOffset,
    changed: BTreeSet<usize>,
}

/// Sectors of a table that were changed, as they were at one instant.
pub(super) struct ChangedSectors {
    /// Where they stand in the file.
    pub(super) at: HostOffset,
    /// Their bytes.
    pub(super) bytes: Vec<u8>,
    first: usize,
    count: usize,
}

impl WordTable {
    /// A table that stands at `at` with these words.
    pub(super) fn new(words: Vec<u64>, at: HostOffset) -> Self {
        Self {
            words,
            at,
            changed: BTreeSet::new(),
        }
    }

    /// Its words.
    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    /// Where it stands.
    pub(super) const fn at(&self) -> HostOffset {
        self.at
    }

    /// Where a word stands.
    pub(super) const fn at_of(&self, index: u64) -> HostOffset {
        self.at.plus(index.saturating_mul(8))
    }

    /// A word; 0 behind the end.
    pub(super) fn word(&self, index: u64) -> u64 {
        let word = usize::try_from(index).ok().and_then(|i| self.words.get(i));
        word.copied().unwrap_or(0)
    }

    /// Number of words.
    pub(super) fn len(&self) -> u64 {
        self.words.len() as u64
    }

    /// Changes a word; `false`, and nothing done, behind the end.
    #[must_use]
    pub(super) fn set(&mut self, index: u64, word: u64) -> bool {
        let Ok(index) = usize::try_from(index) else {
            return false;
        };
        let Some(place) = self.words.get_mut(index) else {
            return false;
        };
        *place = word;
        self.changed.insert(index / WORDS_PER_SECTOR);
        true
    }

    /// Everything that was changed, neighbours together. What could not be written is to be given to
    /// [`not_written`](Self::not_written).
    pub(super) fn take_changed(&mut self) -> Vec<ChangedSectors> {
        let mut taken: Vec<ChangedSectors> = Vec::new();
        for sector in std::mem::take(&mut self.changed) {
            let start = sector * WORDS_PER_SECTOR;
            let end = (start + WORDS_PER_SECTOR).min(self.words.len());
            let words = self.words.get(start..end).unwrap_or(&[]);
            let bytes = words.iter().flat_map(|word| word.to_be_bytes());
            match taken.last_mut() {
                Some(last) if last.first + last.count == sector => {
                    last.bytes.extend(bytes);
                    last.count += 1;
                }
                _ => taken.push(ChangedSectors {
                    at: self.at.plus(start as u64 * 8),
                    bytes: bytes.collect(),
                    first: sector,
                    count: 1,
                }),
            }
        }
        taken
    }

    /// Sectors that were handed out may not have been written: they count as changed again.
    pub(super) fn not_written(&mut self, sectors: &ChangedSectors) {
        self.changed
            .extend(sectors.first..sectors.first + sectors.count);
    }

    /// The table has moved: at `at` there stand `words` now. What they say behind the old end is so; where they say something
    /// else than the table before it, that is to be written.
    pub(super) fn moved(&mut self, at: HostOffset, words: &[u64]) {
        self.at = at;
        let behind = words.get(self.words.len()..).unwrap_or(&[]);
        self.words.extend_from_slice(behind);
        self.changed.clear();
        for (index, word) in self.words.iter().enumerate() {
            if words.get(index) != Some(word) {
                self.changed.insert(index / WORDS_PER_SECTOR);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_sectors_are_handed_out_once_neighbours_together() {
        let mut table = WordTable::new(vec![0; 200], HostOffset(0x10000));
        for index in [0, 70, 199] {
            assert!(table.set(index, index + 1));
        }
        assert!(!table.set(200, 1));
        let taken = table.take_changed();
        let places: Vec<_> = taken.iter().map(|t| (t.at.0, t.bytes.len())).collect();
        assert_eq!(places, [(0x10000, 1024), (0x10000 + 1536, 64)]);
        assert!(table.take_changed().is_empty());
        table.not_written(&taken[1]);
        let again = table.take_changed();
        assert_eq!(again[0].bytes, taken[1].bytes);
        assert_eq!(again[0].bytes[56..], 200_u64.to_be_bytes());
    }

    #[test]
    fn a_table_that_moved_is_to_be_written_where_it_says_something_else() {
        let mut table = WordTable::new(vec![1; 70], HostOffset(0x10000));
        assert!(table.set(3, 7));
        assert!(table.set(69, 9));
        let mut there = vec![1; 140];
        there[69] = 9;
        table.moved(HostOffset(0x50000), &there);
        assert_eq!(table.len(), 140);
        assert_eq!(table.word(139), 1);
        let places: Vec<_> = table.take_changed().iter().map(|t| t.at.0).collect();
        assert_eq!(places, [0x50000]);
    }
}
