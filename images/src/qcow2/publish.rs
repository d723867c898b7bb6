//! Published: what was written becomes what the guest reads, in the tables in memory; durable with the next flush.

use blockyard_storage::ByteRange;

use crate::error::ImageError;
use crate::qcow2::free_list::Why;
use crate::qcow2::image::{ImageState, Qcow2};
use crate::qcow2::layout::entries::{
    COMPRESSED, COPIED, CompressedAt, L2Entry, OFFSET_MASK, put_l2_entry,
};
use crate::qcow2::lookup::{EntryPlace, Look, TablePlace};
use crate::qcow2::reserve::Reservation;
use crate::qcow2::units::{GuestCluster, GuestOffset, HostOffset};

impl Qcow2 {
    /// The data of a reservation and its edges has been written: readers see it from now on. Its place is durable after the
    /// next [`flush`](Self::flush), and no sooner than the data.
    ///
    /// # Errors
    /// What the storage says where a table has to be read again. The old content stays then.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the old content, unless it has ended.
    pub async fn publish(&self, mut written: Reservation) -> Result<(), ImageError> {
        written.settle();
        self.told(self.link(written)).await
    }

    async fn link(&self, mut written: Reservation) -> Result<(), ImageError> {
        let _lease = self.state.leases.take();
        loop {
            self.state.check_sound()?;
            match self.state.publish_now(&mut written)? {
                Look::Is(()) => return Ok(()),
                Look::Load(slice) => self.load_l2(slice).await?,
            }
        }
    }
}

impl ImageState {
    fn publish_now(&self, written: &mut Reservation) -> Result<Look<()>, ImageError> {
        let cover = written.cover();
        let cluster = self
            .geometry
            .guest_cluster(GuestOffset(written.range().offset()));
        let place = match self.own_entry_place(cluster)? {
            Look::Is(place) => place,
            Look::Load(slice) => return Ok(Look::Load(slice)),
        };
        let start = self.geometry.guest_offset(cluster).0;
        let at = written.at_of(start);
        let clusters = self.geometry.clusters_for(cover.end() - start).0;
        // Either all of them change or none: what can fail is tried before.
        for step in 0..clusters {
            if !self.change_entry(place, cluster, step, |old| *old)? {
                return Ok(Look::Load(place.slice));
            }
        }
        let is_new = written.is_new();
        written.published();
        for step in 0..clusters {
            let skip = step * self.geometry.cluster_bytes();
            let is_there = self.change_entry(place, cluster, step, |old| {
                if is_new {
                    self.unlink_entry(old, Why::Other);
                }
                self.written_entry(old, at.plus(skip), start + skip, cover, is_new)
            })?;
            if !is_there {
                return Err(lost_table());
            }
        }
        Ok(Look::Is(()))
    }

    /// The place of an entry in a slice that is in the cache, of a table that may be changed.
    pub(super) fn own_entry_place(
        &self,
        cluster: GuestCluster,
    ) -> Result<Look<EntryPlace>, ImageError> {
        let TablePlace::Entry(place) = self.entry_place(cluster)? else {
            return Err(lost_table());
        };
        if !place.copied {
            return Err(lost_table());
        }
        match self.l2.read(place.slice, |_| ()) {
            Some(()) => Ok(Look::Is(place)),
            None => Ok(Look::Load(place.slice)),
        }
    }

    /// Changes the entry `step` clusters behind the one at `place`, which is that of `cluster`. `false`, and nothing done: the
    /// slice is not in the cache.
    pub(super) fn change_entry(
        &self,
        place: EntryPlace,
        cluster: GuestCluster,
        step: u64,
        change: impl FnOnce(&L2Entry) -> L2Entry,
    ) -> Result<bool, ImageError> {
        let index = usize::try_from(step)
            .ok()
            .and_then(|step| place.index.checked_add(step))
            .filter(|index| *index < place.entries)
            .ok_or_else(lost_table)?;
        let old = self.l2.read(place.slice, |slice| {
            self.entry_in(slice, place, index, GuestCluster(cluster.0 + step))
        });
        let old = match old {
            None => return Ok(false),
            Some(old) => old.map_err(ImageError::Corrupt)?,
        };
        let new = change(&old);
        if new == old {
            return Ok(true);
        }
        let entry_bytes = self.geometry.l2_entry_bytes() as usize;
        let bytes = index * entry_bytes..(index + 1) * entry_bytes;
        let put = self.l2.change(place.slice, bytes, |slice| {
            put_l2_entry(&self.geometry, slice, index, new)
        });
        match put {
            Some(true) => Ok(true),
            _ => Err(lost_table()),
        }
    }

    /// The entry of a cluster that begins at guest offset `start`, after its part of `cover` has been written to the cluster at
    /// `at`, which is a new one or its old one.
    fn written_entry(
        &self,
        old: &L2Entry,
        at: HostOffset,
        start: u64,
        cover: ByteRange,
        is_new: bool,
    ) -> L2Entry {
        let word = at.0 & OFFSET_MASK | COPIED;
        if !self.geometry.extended_l2() {
            return L2Entry { word, bitmap: 0 };
        }
        let end = start + self.geometry.cluster_bytes();
        let from = cover.offset().max(start) - start;
        let to = cover.end().min(end) - start;
        let before = match old.word & COMPRESSED {
            0 => old.bitmap,
            _ => 0,
        };
        let touched = self.subcluster_mask(from, to);
        // Data elsewhere in a cluster that is left has been copied, so that it is in `touched`.
        let before = match is_new {
            true => before & !u64::from(u32::MAX),
            false => before,
        };
        L2Entry {
            word,
            bitmap: (before | touched) & !(touched << 32),
        }
    }

    /// The bits of the subclusters that hold bytes `from` to `to` of a cluster.
    pub(super) fn subcluster_mask(&self, from: u64, to: u64) -> u64 {
        let subcluster = self.geometry.subcluster_bytes();
        let (first, behind) = (from / subcluster, to.div_ceil(subcluster).min(32));
        let bits_below = |count: u64| (1_u64 << count) - 1;
        bits_below(behind) & !bits_below(first.min(32))
    }

    /// What an entry led to has one reference less.
    pub(super) fn unlink_entry(&self, old: &L2Entry, why: Why) {
        if old.word & COMPRESSED != 0 {
            let place = CompressedAt::decode(&self.geometry, old.word);
            self.gives_up_room(place.length_bytes);
            self.unlink_compressed(place, why);
        } else if let Some(at) = self.host_of(old)
            && !self.has_data_file()
        {
            if old.is_copied() {
                self.gives_up_room(self.geometry.cluster_bytes());
            }
            self.unlink_cluster(at, why);
        }
    }
}

/// A table went although somebody held the turn on its clusters: a mistake in here.
pub(super) fn lost_table() -> ImageError {
    ImageError::Broken("an L2 table went while it was in use".to_owned())
}
