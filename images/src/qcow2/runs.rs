//! [`ClusterRuns`]: a set of host clusters, kept as runs.

use std::collections::BTreeMap;

use crate::qcow2::units::{ClusterCount, HostCluster};

/// A set of host clusters. Runs that meet are one.
#[derive(Default, Debug)]
pub(super) struct ClusterRuns {
    /// First cluster of a run, and the first behind it.
    runs: BTreeMap<u64, u64>,
}

impl ClusterRuns {
    /// Adds clusters; those that are there already stay.
    pub(super) fn insert(&mut self, first: HostCluster, count: ClusterCount) {
        let (mut start, mut end) = (first.0, first.plus(count).0);
        if start >= end {
            return;
        }
        while let Some((&other, &other_end)) = self.runs.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.runs.remove(&other);
            start = start.min(other);
            end = end.max(other_end);
        }
        self.runs.insert(start, end);
    }

    /// Whether a cluster is one of them.
    pub(super) fn contains(&self, cluster: HostCluster) -> bool {
        let before = self.runs.range(..=cluster.0).next_back();
        before.is_some_and(|(_, end)| cluster.0 < *end)
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    proptest::proptest! {
        #[test]
        fn it_is_a_set(inserts in proptest::collection::vec((0_u64..40, 0_u64..10), 0..12)) {
            let mut runs = ClusterRuns::default();
            let mut model = BTreeSet::new();
            for (first, count) in inserts {
                runs.insert(HostCluster(first), ClusterCount(count));
                model.extend(first..first + count);
            }
            for cluster in 0..60 {
                proptest::prop_assert_eq!(runs.contains(HostCluster(cluster)), model.contains(&cluster));
            }
            let meets = runs.runs.iter().zip(runs.runs.iter().skip(1)).any(|(a, b)| a.1 >= b.0);
            proptest::prop_assert!(!meets);
        }
    }
}
