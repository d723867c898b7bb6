//! [`Tables`]: which L2 tables there are, and how many L1 entries lead to each.
//!
//! Each table is read once, whatever leads to it, and what is in it counts as often as something leads to it. An L1 table
//! with four million entries that all lead to one table costs no more than that table, and snapshots that share most of
//! their tables cost no more than one of them.

use std::collections::BTreeMap;

use super::counters::Counters;
use crate::qcow2::units::{Geometry, HostOffset};

/// Most tables in the middle of clusters that are read. They are all wrong; overlapping ones are read more than once.
const UNALIGNED_MAX: usize = 65_536;
/// Reading them may take as much as the whole file and this.
const UNALIGNED_BYTES_MIN: u64 = 64 << 20;

/// How many L1 entries lead to a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(in crate::qcow2) struct Links {
    /// Of all L1 tables.
    pub(in crate::qcow2) times: u64,
    /// Of the active one.
    pub(in crate::qcow2) active: u64,
}

/// The L2 tables of an image.
pub(in crate::qcow2) struct Tables {
    geometry: Geometry,
    file_bytes: u64,
    /// Number of links, by cluster.
    times: Counters,
    active: Counters,
    unaligned: BTreeMap<HostOffset, Links>,
    distinct: u64,
    distinct_active: u64,
}

impl Tables {
    pub(in crate::qcow2) fn new(geometry: Geometry, file_bytes: u64) -> Self {
        let clusters = geometry.clusters_for(file_bytes).0;
        Self {
            geometry,
            file_bytes,
            times: Counters::new(clusters),
            active: Counters::new(clusters),
            unaligned: BTreeMap::new(),
            distinct: 0,
            distinct_active: 0,
        }
    }

    /// Counts links to a table. What lies behind the end of the file has no entries and is left out. `false`: there are too
    /// many unaligned tables, this one is not read.
    #[must_use]
    pub(in crate::qcow2) fn add(&mut self, at: HostOffset, links: Links) -> bool {
        if at.0 >= self.file_bytes {
            return true;
        }
        if self.geometry.is_cluster_start(at) {
            let cluster = self.geometry.host_cluster(at).0;
            self.distinct += u64::from(self.times.of(cluster) == 0);
            self.times.add(cluster, links.times, u64::MAX);
            if links.active > 0 {
                self.distinct_active += u64::from(self.active.of(cluster) == 0);
                self.active.add(cluster, links.active, u64::MAX);
            }
            return true;
        }
        let bytes = (self.unaligned.len() as u64).saturating_mul(self.geometry.cluster_bytes());
        let full = self.unaligned.len() >= UNALIGNED_MAX
            || bytes > self.file_bytes.saturating_add(UNALIGNED_BYTES_MIN);
        if full && !self.unaligned.contains_key(&at) {
            return false;
        }
        let known = self.unaligned.entry(at).or_default();
        known.times = known.times.saturating_add(links.times);
        known.active = known.active.saturating_add(links.active);
        true
    }

    /// Every table in the order of the file, the unaligned ones last.
    pub(in crate::qcow2) fn all(&self) -> impl Iterator<Item = (HostOffset, Links)> {
        self.within(&self.times)
    }

    /// Those that the active L1 table leads to. An entry with no offset at all does not count as one that does.
    pub(in crate::qcow2) fn active(&self) -> impl Iterator<Item = (HostOffset, Links)> {
        self.within(&self.active)
            .filter(|(at, links)| links.active > 0 && at.0 != 0)
    }

    fn within<'a>(
        &'a self,
        counters: &'a Counters,
    ) -> impl Iterator<Item = (HostOffset, Links)> + 'a {
        let mut from = 0;
        let aligned = std::iter::from_fn(move || {
            let cluster = counters.next_counted(from)?;
            from = cluster + 1;
            let links = Links {
                times: self.times.of(cluster),
                active: self.active.of(cluster),
            };
            Some((HostOffset(cluster << self.geometry.cluster_bits()), links))
        });
        aligned.chain(self.unaligned.iter().map(|(at, links)| (*at, *links)))
    }

    /// How many L1 entries lead to the table in a cluster.
    pub(in crate::qcow2) fn links_of(&self, cluster: u64) -> u64 {
        self.times.of(cluster)
    }

    /// Bytes of all tables, and of the active ones.
    pub(in crate::qcow2) fn bytes(&self) -> (u64, u64) {
        let unaligned = self.unaligned.len() as u64;
        let bytes = |tables: u64| {
            tables
                .saturating_add(unaligned)
                .saturating_mul(self.geometry.cluster_bytes())
        };
        (bytes(self.distinct), bytes(self.distinct_active))
    }
}
