//! [`ClusterMarks`]: host clusters, each as often as it was added, in a bit for each time.

use std::collections::BTreeMap;

use crate::qcow2::units::{ClusterCount, HostCluster};

/// Words of a page, which stands for 64 clusters for each of them.
const PAGE_WORDS: usize = 64;

/// Clusters that one page stands for.
const PAGE_CLUSTERS: u64 = 64 * PAGE_WORDS as u64;

/// Host clusters, each as often as it was added. However they are scattered they take a bit each time, in pages of 512 bytes: at
/// most one page for 4096 clusters of the file, that is 2 MiB for a TiB in clusters of 64 KiB, and as much again where clusters are
/// added a second time.
#[derive(Default)]
pub(super) struct ClusterMarks {
    /// Those that were added once at least, twice at least, and so on.
    layers: Vec<BTreeMap<u64, Box<Page>>>,
    count: u64,
}

type Page = [u64; PAGE_WORDS];

impl ClusterMarks {
    /// How many there are.
    pub(super) const fn count(&self) -> ClusterCount {
        ClusterCount(self.count)
    }

    /// Adds a run of clusters.
    pub(super) fn add(&mut self, first: HostCluster, count: ClusterCount) {
        let end = first.plus(count).0;
        let mut from = first.0;
        while from < end {
            let behind = end.min((from / 64 + 1) * 64);
            let wanted = bits(behind - from) << (from % 64);
            self.add_to_word(from / 64, wanted);
            self.count += behind - from;
            from = behind;
        }
    }

    fn add_to_word(&mut self, index: u64, wanted: u64) {
        let (page, word) = (index / PAGE_WORDS as u64, index % PAGE_WORDS as u64);
        let mut left = wanted;
        for layer in 0.. {
            if left == 0 {
                return;
            }
            if self.layers.len() <= layer {
                self.layers.push(BTreeMap::new());
            }
            let page = self.layers.get_mut(layer).map(|pages| {
                let page = pages.entry(page);
                page.or_insert_with(|| Box::new([0; PAGE_WORDS]))
            });
            let place = page.zip(usize::try_from(word).ok());
            let Some(marks) = place.and_then(|(page, word)| page.get_mut(word)) else {
                return;
            };
            let there = *marks & left;
            *marks |= left;
            left = there;
        }
    }

    /// Takes clusters that stand together, once each; `None`: there are none.
    pub(super) fn take(&mut self) -> Option<(HostCluster, ClusterCount)> {
        while self.layers.last().is_some_and(BTreeMap::is_empty) {
            self.layers.pop();
        }
        let mut entry = self.layers.last_mut()?.first_entry()?;
        let start = entry.key() * PAGE_CLUSTERS;
        let (skip, count) = take_run(entry.get_mut());
        if entry.get().iter().all(|word| *word == 0) {
            entry.remove();
        }
        self.count = self.count.saturating_sub(count);
        Some((HostCluster(start + skip), ClusterCount(count)))
    }
}

/// Takes the first run of a page and says where it begins and how long it is.
fn take_run(page: &mut Page) -> (u64, u64) {
    let mut words = page.iter_mut().enumerate();
    let Some((index, word)) = words.find(|(_, word)| **word != 0) else {
        return (0, 0);
    };
    let skip = u64::from(word.trailing_zeros());
    let first = index as u64 * 64 + skip;
    let mut count = u64::from((*word >> skip).trailing_ones());
    *word &= !(bits(count) << skip);
    let mut goes_on = skip + count == 64;
    for (_, word) in words {
        if !goes_on {
            break;
        }
        let more = u64::from(word.trailing_ones());
        *word &= !bits(more);
        count += more;
        goes_on = more == 64;
    }
    (first, count)
}

/// So many bits from the lowest on, 64 at most.
const fn bits(count: u64) -> u64 {
    match count {
        0..64 => (1 << count) - 1,
        _ => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    proptest::proptest! {
        #[test]
        fn each_comes_back_as_often_as_it_was_added(
            adds in proptest::collection::vec((0_u64..9000, 0_u64..5000), 0..12),
            taken_between in 0_usize..6,
        ) {
            let mut marks = ClusterMarks::default();
            let mut model: BTreeMap<u64, u64> = BTreeMap::new();
            let take = |marks: &mut ClusterMarks, model: &mut BTreeMap<u64, u64>| {
                let (first, count) = marks.take()?;
                for cluster in first.0..first.plus(count).0 {
                    let times = model.get_mut(&cluster).expect("it was added");
                    *times -= 1;
                    if *times == 0 {
                        model.remove(&cluster);
                    }
                }
                (count.0 > 0).then_some(())
            };
            for (first, count) in adds {
                marks.add(HostCluster(first), ClusterCount(count));
                for cluster in first..first + count {
                    *model.entry(cluster).or_default() += 1;
                }
                for _ in 0..taken_between {
                    take(&mut marks, &mut model);
                }
                proptest::prop_assert_eq!(marks.count().0, model.values().sum::<u64>());
            }
            while take(&mut marks, &mut model).is_some() {}
            proptest::prop_assert!(model.is_empty());
            proptest::prop_assert_eq!(marks.count().0, 0);
        }
    }

    #[test]
    fn what_stands_together_is_taken_together() {
        let mut marks = ClusterMarks::default();
        marks.add(HostCluster(4000), ClusterCount(200));
        let runs: Vec<_> = std::iter::from_fn(|| marks.take()).collect();
        let run = |first, count| (HostCluster(first), ClusterCount(count));
        assert_eq!(runs, [run(4000, 96), run(4096, 104)]);
    }
}
