//! [`Counters`]: a number for every cluster of a file, in memory that follows what was counted.
//!
//! A chunk of 1024 clusters takes no memory until one of its numbers is not zero. It takes one byte a cluster then, two once a
//! number is above 255, and eight above 65535. The list of chunks takes 16 bytes a chunk, and is only there for groups of 256
//! chunks in which something was counted: a file can claim any length and hold nothing.

/// Clusters of a chunk.
const CHUNK: usize = 1024;
/// Chunks of a group.
const GROUP: usize = 256;

type Group = [Option<Chunk>; GROUP];

enum Chunk {
    Bytes(Box<[u8; CHUNK]>),
    Words(Box<[u16; CHUNK]>),
    Wide(Box<[u64; CHUNK]>),
}

/// A number for each of the first [`clusters`](Counters::clusters) clusters of a file; all of them begin as 0.
#[derive(Default)]
pub(in crate::qcow2) struct Counters {
    groups: Vec<Option<Box<Group>>>,
    clusters: u64,
}

impl Counters {
    /// Zeroes for so many clusters. The caller bounds the number.
    pub(in crate::qcow2) fn new(clusters: u64) -> Self {
        let mut counters = Self::default();
        counters.grow(clusters);
        counters
    }

    /// How many clusters have a number.
    pub(in crate::qcow2) const fn clusters(&self) -> u64 {
        self.clusters
    }

    /// Gives at least so many clusters a number.
    pub(in crate::qcow2) fn grow(&mut self, clusters: u64) {
        self.clusters = self.clusters.max(clusters);
        let (chunks, _) = split(self.clusters.next_multiple_of(CHUNK as u64));
        let groups = chunks.div_ceil(GROUP);
        if self.groups.len() < groups {
            self.groups.resize_with(groups, || None);
        }
    }

    /// The number of a cluster; 0 behind the last.
    pub(in crate::qcow2) fn of(&self, cluster: u64) -> u64 {
        let (chunk, place) = split(cluster);
        let group = self.groups.get(chunk / GROUP).and_then(Option::as_ref);
        group
            .and_then(|group| group.get(chunk % GROUP)?.as_ref())
            .map_or(0, |chunk| chunk.at(place))
    }

    /// Gives a cluster another number; behind the last, nothing happens.
    pub(in crate::qcow2) fn set(&mut self, cluster: u64, number: u64) {
        let (chunk, place) = split(cluster);
        if let Some(chunk) = self.chunk_mut(chunk) {
            chunk.set(place, number);
            return;
        }
        let Some(group) = self.groups.get_mut(chunk / GROUP) else {
            return;
        };
        if number == 0 {
            return;
        }
        let group = group.get_or_insert_with(|| Box::new([const { None }; GROUP]));
        if let Some(slot) = group.get_mut(chunk % GROUP) {
            slot.insert(Chunk::Bytes(Box::new([0; CHUNK])))
                .set(place, number);
        }
    }

    fn chunk_mut(&mut self, chunk: usize) -> Option<&mut Chunk> {
        let group = self.groups.get_mut(chunk / GROUP)?.as_mut()?;
        group.get_mut(chunk % GROUP)?.as_mut()
    }

    /// Adds `times` to the number of a cluster, up to `number_max`. Returns what did not fit.
    pub(in crate::qcow2) fn add(&mut self, cluster: u64, times: u64, number_max: u64) -> u64 {
        // The usual case: one more, and it fits where the others are.
        let (chunk, place) = split(cluster);
        if let Some(Chunk::Bytes(numbers)) = self.chunk_mut(chunk)
            && let Some(slot) = numbers.get_mut(place)
            && let Some(sum) = u64::from(*slot).checked_add(times)
            && sum <= number_max
            && let Ok(sum) = u8::try_from(sum)
        {
            *slot = sum;
            return 0;
        }
        let number = self.of(cluster);
        let added = times.min(number_max.saturating_sub(number));
        self.set(cluster, number + added);
        times - added
    }

    /// The first cluster from `cluster` on whose number is not 0.
    pub(in crate::qcow2) fn next_counted(&self, cluster: u64) -> Option<u64> {
        let (first, place) = split(cluster);
        for (number, group) in self.groups.iter().enumerate().skip(first / GROUP) {
            let Some(group) = group else {
                continue;
            };
            for (index, chunk) in group.iter().enumerate() {
                let index = number * GROUP + index;
                let Some(chunk) = chunk.as_ref().filter(|_| index >= first) else {
                    continue;
                };
                let start = if index == first { place } else { 0 };
                if let Some(found) = (start..CHUNK).find(|place| chunk.at(*place) != 0) {
                    return Some((index * CHUNK + found) as u64);
                }
            }
        }
        None
    }

    /// Memory of the numbers in bytes.
    #[cfg(test)]
    pub(in crate::qcow2) fn memory_bytes(&self) -> usize {
        let chunks = self.groups.iter().flatten().flat_map(|group| group.iter());
        let chunks = chunks.flatten().map(|chunk| match chunk {
            Chunk::Bytes(_) => CHUNK,
            Chunk::Words(_) => 2 * CHUNK,
            Chunk::Wide(_) => 8 * CHUNK,
        });
        let groups = self.groups.iter().flatten().count() * size_of::<Group>();
        chunks.sum::<usize>() + groups + self.groups.len() * size_of::<Option<Box<Group>>>()
    }
}

impl Chunk {
    fn at(&self, place: usize) -> u64 {
        let found = match self {
            Chunk::Bytes(numbers) => numbers.get(place).copied().map(u64::from),
            Chunk::Words(numbers) => numbers.get(place).copied().map(u64::from),
            Chunk::Wide(numbers) => numbers.get(place).copied(),
        };
        found.unwrap_or(0)
    }

    fn set(&mut self, place: usize, number: u64) {
        let fits = match self {
            Chunk::Bytes(numbers) => u8::try_from(number)
                .ok()
                .zip(numbers.get_mut(place))
                .map(|(number, slot)| *slot = number),
            Chunk::Words(numbers) => u16::try_from(number)
                .ok()
                .zip(numbers.get_mut(place))
                .map(|(number, slot)| *slot = number),
            Chunk::Wide(numbers) => numbers.get_mut(place).map(|slot| *slot = number),
        };
        if fits.is_none() && !matches!(self, Chunk::Wide(_)) {
            self.widen(number);
            self.set(place, number);
        }
    }

    /// Makes room for numbers like this one.
    fn widen(&mut self, number: u64) {
        let mut wide: Box<[u64; CHUNK]> = Box::new([0; CHUNK]);
        for (place, slot) in wide.iter_mut().enumerate() {
            *slot = self.at(place);
        }
        if u16::try_from(number).is_err() {
            *self = Chunk::Wide(wide);
            return;
        }
        let mut words: Box<[u16; CHUNK]> = Box::new([0; CHUNK]);
        for (slot, number) in words.iter_mut().zip(wide.iter()) {
            // They were bytes.
            *slot = u16::try_from(*number).unwrap_or(u16::MAX);
        }
        *self = Chunk::Words(words);
    }
}

/// The chunk that holds a cluster, and its place there.
fn split(cluster: u64) -> (usize, usize) {
    let chunk = usize::try_from(cluster / CHUNK as u64).unwrap_or(usize::MAX);
    // Below CHUNK.
    let place = usize::try_from(cluster % CHUNK as u64).unwrap_or(0);
    (chunk, place)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn memory_follows_what_is_counted() {
        let mut counters = Counters::new(1 << 27);
        let groups = (1 << 27) / (1024 * 256) * 8;
        assert_eq!(counters.memory_bytes(), groups);
        // 1024 chunks in 4 groups.
        let list = groups + 1024 * 16;
        for cluster in 0..1 << 20 {
            counters.add(cluster, 1, u64::MAX);
        }
        assert_eq!(counters.memory_bytes(), list + (1 << 20));
        counters.set(5, 256);
        counters.set(2000, 65_536);
        assert_eq!(counters.memory_bytes(), list + (1 << 20) + 1024 + 7 * 1024);
        assert_eq!((counters.of(5), counters.of(2000)), (256, 65_536));
        assert_eq!((counters.of(4), counters.of(2001)), (1, 1));
    }

    #[test]
    fn sums_stop_at_the_maximum() {
        let mut counters = Counters::new(10);
        assert_eq!(counters.add(3, 2, 3), 0);
        assert_eq!(counters.add(3, 5, 3), 4);
        assert_eq!(counters.of(3), 3);
        assert_eq!(counters.add(4, u64::MAX, u64::MAX), 0);
        assert_eq!(counters.add(4, 7, u64::MAX), 7);
    }

    proptest::proptest! {
        #[test]
        fn it_is_a_map(
            steps in proptest::collection::vec((proptest::prop_oneof![0_u64..5000, 0_u64..600_000], proptest::sample::select(vec![0, 1, 255, 256, 70_000])), 0..200),
        ) {
            let mut counters = Counters::new(4000);
            let mut map = BTreeMap::new();
            for (cluster, number) in steps {
                counters.grow(cluster + 1);
                counters.set(cluster, number);
                map.insert(cluster, number);
            }
            let counted: Vec<_> = map.iter().filter(|(_, number)| **number != 0).collect();
            let mut from = 0;
            for (cluster, number) in counted {
                proptest::prop_assert_eq!(counters.next_counted(from), Some(*cluster));
                proptest::prop_assert_eq!(counters.of(*cluster), *number);
                from = cluster + 1;
            }
            proptest::prop_assert_eq!(counters.next_counted(from), None);
        }
    }
}
