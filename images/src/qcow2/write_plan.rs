//! What a write needs, from the tables in memory: which clusters, which of its edges have to be filled, and whether they have
//! their place already.

use blockyard_storage::error::EIO;
use blockyard_storage::{ByteRange, Operation, StorageError};

use crate::error::ImageError;
use crate::qcow2::image::ImageState;
use crate::qcow2::layout::entries::{COMPRESSED, L2Entry, l2_entry_at};
use crate::qcow2::lookup::{EntryPlace, Look, Source, TablePlace};
use crate::qcow2::units::{ClusterCount, GuestCluster, GuestOffset, HostOffset};

/// What is known of a write that needs room.
pub(super) struct Plan {
    /// Guest bytes of the write.
    pub(super) range: ByteRange,
    /// Guest bytes that have to be written.
    pub(super) cover: ByteRange,
    pub(super) clusters: ClusterCount,
    /// Where they are to go, if they have their place.
    pub(super) kept: Option<HostOffset>,
}

pub(super) enum Wanted {
    InPlace(ByteRange, HostOffset),
    /// First there has to be an L2 table of its own.
    Table,
    Room(Plan),
}

impl ImageState {
    /// What a write of the front of `range` needs. `room`: so many clusters, if they were taken for it already.
    pub(super) fn look_for_room(
        &self,
        range: ByteRange,
        room: Option<ClusterCount>,
    ) -> Result<Look<Wanted>, ImageError> {
        let cluster = self.geometry.guest_cluster(GuestOffset(range.offset()));
        let place = match self.entry_place(cluster)? {
            TablePlace::Entry(place) if place.copied => place,
            _ => return Ok(Look::Is(Wanted::Table)),
        };
        let wanted = self.l2.read(place.slice, |slice| {
            if let Some((range, at)) = self.in_place_at(slice, place, range)? {
                return Ok(Wanted::InPlace(range, at));
            }
            self.plan(slice, place, range, room).map(Wanted::Room)
        });
        let wanted = match wanted {
            None => return Ok(Look::Load(place.slice)),
            Some(wanted) => wanted?,
        };
        if let Wanted::InPlace(range, at) = &wanted
            && !self.has_data_file()
        {
            self.overlaps
                .check(self, ByteRange::new(at.0, range.length()), None)
                .map_err(ImageError::Corrupt)?;
        }
        Ok(Look::Is(wanted))
    }

    /// Where the front of `range` can be written as it is.
    fn in_place_at(
        &self,
        slice: &[u8],
        place: EntryPlace,
        range: ByteRange,
    ) -> Result<Option<(ByteRange, HostOffset)>, ImageError> {
        let cluster = self.geometry.guest_cluster(GuestOffset(range.offset()));
        let first = self
            .entry_in(slice, place, place.index, cluster)
            .map_err(|corruption| {
                let entry = l2_entry_at(&self.geometry, slice, place.index);
                let entry = entry.unwrap_or_default();
                ImageError::Corrupt(self.as_a_write_says(corruption, &entry, cluster))
            })?;
        if !first.is_copied() {
            return Ok(None);
        }
        let (run, source) = self
            .run_at(slice, place, range, L2Entry::is_copied)
            .map_err(ImageError::Corrupt)?;
        Ok(match source {
            Source::Data { at } => Some((run, at)),
            _ => None,
        })
    }

    /// What the front of `range`, which is not in place, has to write, and where it can go.
    fn plan(
        &self,
        slice: &[u8],
        place: EntryPlace,
        range: ByteRange,
        room: Option<ClusterCount>,
    ) -> Result<Plan, ImageError> {
        let geometry = &self.geometry;
        let first = geometry.guest_cluster(GuestOffset(range.offset()));
        let entry_of = |count: u64| {
            let index = usize::try_from(count)
                .ok()
                .and_then(|c| place.index.checked_add(c));
            let index = index.filter(|index| *index < place.entries)?;
            let entry = self.entry_in(slice, place, index, GuestCluster(first.0 + count));
            // Whoever asks for a later one will hear of it.
            entry.ok()
        };
        let front = entry_of(0).unwrap_or_default();
        let kept = self.kept(&front, first)?;
        let start = geometry.guest_offset(first).0;
        let wanted = geometry.clusters_for(range.end() - start);
        let wanted = room.map_or(wanted, |room| room.min(wanted));
        let mut last = front;
        let mut clusters = ClusterCount(1);
        while clusters < wanted {
            let Some(entry) = entry_of(clusters.0) else {
                break;
            };
            let cluster = GuestCluster(first.0 + clusters.0);
            let in_place =
                entry.is_copied() && matches!(self.source_at(&entry, 0), Source::Data { .. });
            let expected = kept.map(|at| at.plus(clusters.0 * geometry.cluster_bytes()));
            if in_place || self.kept(&entry, cluster).ok() != Some(expected) {
                break;
            }
            last = entry;
            clusters.0 += 1;
        }
        let end = start.saturating_add(clusters.0 * geometry.cluster_bytes());
        let range = range.clamp_end(end);
        let cover_start = start + self.cover_start(&front, kept.is_some(), range.offset() - start);
        let last_start = end - geometry.cluster_bytes();
        let cover_end =
            last_start + self.cover_end(&last, kept.is_some(), range.end() - last_start);
        Ok(Plan {
            range,
            cover: ByteRange::between(cover_start, cover_end),
            clusters,
            kept,
        })
    }

    /// The cluster that a write to an entry goes to although the entry has no data there yet.
    fn kept(
        &self,
        entry: &L2Entry,
        cluster: GuestCluster,
    ) -> Result<Option<HostOffset>, ImageError> {
        if self.has_data_file() {
            let at = self.identity(cluster);
            self.check_tainted(at)?;
            return Ok(Some(at));
        }
        if entry.word & COMPRESSED != 0 || !entry.is_copied() {
            return Ok(None);
        }
        let Some(at) = self.host_of(entry) else {
            return Ok(None);
        };
        if !self.geometry.extended_l2() {
            // All of it reads as zeroes, so that nothing is lost by leaving it.
            return Ok(self.check_tainted(at).is_ok().then_some(at));
        }
        self.check_tainted(at)?;
        Ok(Some(at))
    }

    /// Refuses a cluster where a write that nobody waits for may put back what was there before.
    fn check_tainted(&self, at: HostOffset) -> Result<(), ImageError> {
        let tainted = self.tainted.borrow();
        if tainted.is_empty() || !tainted.contains(self.geometry.host_cluster(at)) {
            return Ok(());
        }
        let range = ByteRange::new(at.0, self.geometry.cluster_bytes());
        Err(StorageError::new(Operation::Write, range, EIO).into())
    }

    /// From where the first cluster of a write has to be written, if the write itself begins at `start` of it.
    fn cover_start(&self, entry: &L2Entry, kept: bool, start: u64) -> u64 {
        let subcluster = self.geometry.subcluster_bytes();
        let aligned = start - start % subcluster;
        if kept {
            let data = matches!(self.source_at(entry, start), Source::Data { .. });
            // In an external data file a place says nothing about data.
            return if data { start } else { aligned };
        }
        match self.old_data(entry) {
            Some((from, _)) => from.min(aligned),
            None => aligned,
        }
    }

    /// Up to where the last cluster of a write has to be written, if the write itself ends at `end` of it.
    fn cover_end(&self, entry: &L2Entry, kept: bool, end: u64) -> u64 {
        let aligned = end.next_multiple_of(self.geometry.subcluster_bytes());
        if kept {
            let data = matches!(self.source_at(entry, end - 1), Source::Data { .. });
            return if data { end } else { aligned };
        }
        match self.old_data(entry) {
            Some((_, to)) => to.max(aligned),
            None => aligned,
        }
    }

    /// Which bytes of a cluster are data that goes away with its old place.
    fn old_data(&self, entry: &L2Entry) -> Option<(u64, u64)> {
        let whole = self.geometry.cluster_bytes();
        if entry.word & COMPRESSED != 0 {
            return Some((0, whole));
        }
        let subcluster = self.geometry.subcluster_bytes();
        let data = |index: &u32| {
            let source = self.source_at(entry, u64::from(*index) * subcluster);
            matches!(source, Source::Data { .. })
        };
        let mut indices = (0..self.geometry.subclusters()).filter(data);
        let first = indices.next()?;
        let last = indices.next_back().unwrap_or(first);
        Some((
            u64::from(first) * subcluster,
            (u64::from(last) + 1) * subcluster,
        ))
    }
}
