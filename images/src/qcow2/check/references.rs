//! [`References`]: how many references to each cluster of the image file were found.

use std::collections::BTreeMap;

use super::counters::Counters;
use super::findings::FindingKind;
use super::observer::Sink;
use crate::qcow2::units::{Geometry, HostOffset};

/// Most clusters of an image file that can be checked, QEMU's limit. It bounds the memory of a check.
pub const CLUSTERS_MAX: u64 = i32::MAX as u64;

/// Clusters behind the end of the file that are remembered because something refers to them.
const WANTED_MAX: usize = 4096;

/// References to clusters, and what bounds them.
pub(in crate::qcow2) struct References {
    pub(in crate::qcow2) counters: Counters,
    geometry: Geometry,
    file_bytes: u64,
    /// Clusters of what is behind the end of the file, with the references that would count; the first ones.
    wanted: BTreeMap<u64, u64>,
    /// From here on, clusters may be wanted without being in the list.
    wanted_unknown: u64,
}

impl References {
    /// No references yet, to the clusters of a file of so many bytes.
    pub(in crate::qcow2) fn new(geometry: Geometry, file_bytes: u64) -> Self {
        Self {
            counters: Counters::new(geometry.clusters_for(file_bytes).0),
            geometry,
            file_bytes,
            wanted: BTreeMap::new(),
            wanted_unknown: u64::MAX,
        }
    }

    /// Counts `times` references to each cluster of a run of bytes. Bytes that end more than a cluster behind the end of the
    /// file are found and not counted; the last cluster of a file may be incomplete.
    pub(in crate::qcow2) fn add(
        &mut self,
        at: HostOffset,
        length_bytes: u64,
        times: u64,
        sink: &mut Sink,
    ) {
        let cluster_bytes = self.geometry.cluster_bytes();
        if length_bytes == cluster_bytes
            && self.geometry.is_cluster_start(at)
            && at.plus(cluster_bytes).0 <= self.file_bytes
        {
            // Nearly all references there are.
            self.add_cluster(self.geometry.host_cluster(at).0, times, sink);
            return;
        }
        if self.is_in_file(at, length_bytes, times, sink)
            && let Some((first, end)) = self.clusters_of(at, length_bytes)
        {
            self.add_clusters(first, end, times, sink);
        }
    }

    /// The same for clusters `first..end`, which are known to be in the file.
    pub(in crate::qcow2) fn add_clusters(
        &mut self,
        first: u64,
        end: u64,
        times: u64,
        sink: &mut Sink,
    ) {
        self.counters.grow(end);
        (first..end).for_each(|cluster| self.add_cluster(cluster, times, sink));
    }

    fn add_cluster(&mut self, cluster: u64, times: u64, sink: &mut Sink) {
        let over = self
            .counters
            .add(cluster, times, self.geometry.refcount_max());
        if over > 0 {
            let at = HostOffset(cluster << self.geometry.cluster_bits());
            sink.found(FindingKind::Overflow { at }, over);
        }
    }

    /// Whether bytes are in the file as far as they have to be; if not, that is found.
    pub(in crate::qcow2) fn is_in_file(
        &mut self,
        at: HostOffset,
        length_bytes: u64,
        times: u64,
        sink: &mut Sink,
    ) -> bool {
        let behind = at.plus(length_bytes).0.saturating_sub(self.file_bytes);
        let inside = length_bytes == 0 || behind < self.geometry.cluster_bytes();
        if !inside {
            sink.found(FindingKind::BehindEnd { at, length_bytes }, times);
            self.remember_wanted(at, length_bytes, times);
        }
        inside
    }

    fn remember_wanted(&mut self, at: HostOffset, length_bytes: u64, times: u64) {
        let Some((first, end)) = self.clusters_of(at, length_bytes) else {
            return;
        };
        for cluster in first..end.min(self.wanted_unknown) {
            let known = self.wanted.entry(cluster).or_insert(0);
            *known = known.saturating_add(times);
            if self.wanted.len() > WANTED_MAX
                && let Some((dropped, _)) = self.wanted.pop_last()
            {
                self.wanted_unknown = dropped;
            }
            if cluster >= self.wanted_unknown {
                return;
            }
        }
    }

    /// Whether a new table can be put into a cluster: nothing refers to it, not even a damaged entry that leads behind the end
    /// of the file, which would lead to that table then.
    pub(in crate::qcow2) fn is_free(&self, cluster: u64) -> bool {
        self.counters.of(cluster) == 0
            && cluster < self.wanted_unknown
            && !self.wanted.contains_key(&cluster)
    }

    /// Counts clusters of a new table, with one reference each. What damaged entries refer to before their end is in the file
    /// from now on, and counts as well.
    pub(in crate::qcow2) fn place(&mut self, first: u64, end: u64) {
        self.counters.grow(end);
        (first..end).for_each(|cluster| self.counters.set(cluster, 1));
        let behind = self.wanted.split_off(&end);
        for (cluster, times) in std::mem::replace(&mut self.wanted, behind) {
            self.counters
                .add(cluster, times, self.geometry.refcount_max());
        }
    }

    /// The clusters that hold some bytes: the first, and the one behind the last. `None`: there are no bytes.
    pub(in crate::qcow2) fn clusters_of(
        &self,
        at: HostOffset,
        length_bytes: u64,
    ) -> Option<(u64, u64)> {
        let last = at.plus(length_bytes.checked_sub(1)?);
        Some((
            self.geometry.host_cluster(at).0,
            self.geometry.host_cluster(last).0 + 1,
        ))
    }

    /// Length of the file in bytes.
    pub(in crate::qcow2) const fn file_bytes(&self) -> u64 {
        self.file_bytes
    }
}
