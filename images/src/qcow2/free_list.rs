//! [`FreeList`]: clusters that are given up, in memory that does not depend on how they are scattered.

use crate::qcow2::cluster_marks::ClusterMarks;
use crate::qcow2::units::{ClusterCount, HostCluster};

/// Runs that are kept as such, of 24 bytes each.
const RUNS_MAX: usize = 8192;

/// Host clusters that lose one reference each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Free {
    pub(super) first: HostCluster,
    pub(super) count: ClusterCount,
    pub(super) why: Why,
}

/// Why clusters are given up, which decides whether they are discarded in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Why {
    /// The guest discarded them.
    Request,
    /// Anything else.
    Other,
}

/// Clusters that are given up, each as often as it loses a reference. Up to [`RUNS_MAX`] runs are kept as they come; what is more
/// becomes [marks](ClusterMarks).
#[derive(Default)]
pub(super) struct FreeList {
    runs: Vec<Free>,
    requested: ClusterMarks,
    others: ClusterMarks,
}

impl FreeList {
    /// Adds a run.
    pub(super) fn push(&mut self, free: Free) {
        if free.count.0 == 0 {
            return;
        }
        match self.runs.last_mut() {
            Some(last) if goes_on(last, &free) => last.count.0 += free.count.0,
            _ => self.runs.push(free),
        }
        if self.runs.len() > RUNS_MAX {
            self.mark();
        }
    }

    /// Adds everything of another list.
    pub(super) fn append(&mut self, mut other: Self) {
        while let Some(free) = other.pop() {
            self.push(free);
        }
    }

    /// Takes a run; in the order of the file after [`sort`](Self::sort).
    pub(super) fn pop(&mut self) -> Option<Free> {
        if let Some(free) = self.runs.pop() {
            return Some(free);
        }
        let marked = |marks: &mut ClusterMarks, why| {
            let (first, count) = marks.take()?;
            Some(Free { first, count, why })
        };
        marked(&mut self.requested, Why::Request).or_else(|| marked(&mut self.others, Why::Other))
    }

    /// Puts runs in the order of the file, so that each slice of counts is needed once, and makes one of those that meet.
    pub(super) fn sort(&mut self) {
        self.runs.sort_unstable_by_key(|free| free.first);
        self.runs.dedup_by(|next, before| {
            let one = goes_on(before, next);
            if one {
                before.count.0 += next.count.0;
            }
            one
        });
        // They are taken from the end.
        self.runs.reverse();
    }

    /// Whether nothing is there.
    pub(super) fn is_empty(&self) -> bool {
        let marked = self.requested.count().0 + self.others.count().0;
        self.runs.is_empty() && marked == 0
    }

    /// How many runs are kept as such.
    pub(super) fn runs(&self) -> usize {
        self.runs.len()
    }

    /// How many clusters there are, each as often as it loses a reference.
    pub(super) fn clusters(&self) -> ClusterCount {
        let runs = self.runs.iter().map(|free| free.count.0);
        let marked = [self.requested.count().0, self.others.count().0];
        ClusterCount(runs.chain(marked).fold(0, u64::saturating_add))
    }

    /// Makes marks of all runs.
    pub(super) fn mark(&mut self) {
        for free in std::mem::take(&mut self.runs) {
            let marks = match free.why {
                Why::Request => &mut self.requested,
                Why::Other => &mut self.others,
            };
            marks.add(free.first, free.count);
        }
    }
}

fn goes_on(before: &Free, next: &Free) -> bool {
    before.why == next.why && before.first.plus(before.count) == next.first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free(first: u64, count: u64) -> Free {
        Free {
            first: HostCluster(first),
            count: ClusterCount(count),
            why: Why::Request,
        }
    }

    #[test]
    fn runs_come_in_the_order_of_the_file_and_together() {
        let mut list = FreeList::default();
        for free in [free(9, 1), free(3, 2), free(5, 1), free(4, 1)] {
            list.push(free);
        }
        list.sort();
        let taken: Vec<Free> = std::iter::from_fn(|| list.pop()).collect();
        // Cluster 4 loses two references.
        assert_eq!(taken.iter().map(|free| free.count.0).sum::<u64>(), 5);
        assert_eq!(taken.last(), Some(&free(9, 1)));
        assert!(taken.is_sorted_by_key(|free| free.first));
    }

    #[test]
    fn what_is_too_scattered_for_runs_is_kept_all_the_same() {
        let mut list = FreeList::default();
        let clusters = 3 * RUNS_MAX as u64;
        (0..clusters).for_each(|index| list.push(free(index * 2, 1)));
        (0..clusters).for_each(|index| list.push(free(index * 2, 1)));
        assert!(list.runs() <= RUNS_MAX);
        assert_eq!(list.clusters().0, 2 * clusters);
        let mut all = FreeList::default();
        all.append(list);
        let mut taken: Vec<u64> = std::iter::from_fn(|| all.pop())
            .flat_map(|free| free.first.0..free.first.plus(free.count).0)
            .collect();
        taken.sort_unstable();
        let wanted: Vec<u64> = (0..clusters).flat_map(|index| [index * 2; 2]).collect();
        assert_eq!(taken, wanted);
    }
}
