//! Room for compressed clusters: they stand one behind the other, at any byte, and share host clusters. The count of a host
//! cluster says how many of them touch it.
//!
//! Spec: qcow2, "Compressed Clusters Descriptor".

use std::ops::Range;
use std::rc::Rc;

use blockyard_storage::error::{EFBIG, EINVAL, EOPNOTSUPP};
use blockyard_storage::{ByteRange, Operation, StorageError};

use crate::error::ImageError;
use crate::qcow2::claims::Claim;
use crate::qcow2::free_list::Why;
use crate::qcow2::image::{ImageState, Qcow2};
use crate::qcow2::layout::entries::{CompressedAt, L2Entry};
use crate::qcow2::lookup::Look;
use crate::qcow2::open::DiskChange;
use crate::qcow2::refcounts::Counted;
use crate::qcow2::units::{ClusterCount, GuestCluster, HostCluster, HostOffset};
use crate::qcow2::waiting::Turn;

/// Room for compressed clusters that follow each other on the disk. Dropping it says that the write may still be under way: its
/// room is not used again then while the image is open.
#[must_use = "a reservation is to be published, or given back"]
pub struct CompressedReservation {
    rooms: Vec<Room>,
    _turn: Turn,
    state: Rc<ImageState>,
}

/// Room for one compressed cluster.
struct Room {
    cluster: GuestCluster,
    place: CompressedAt,
    references: References,
}

/// References on the host clusters that a compressed cluster touches.
struct References {
    first: HostCluster,
    count: ClusterCount,
}

/// Bytes of compressed clusters that stand one behind the other in the image file, and are written together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CompressedRun {
    /// Where its first byte goes.
    pub at: HostOffset,
    /// Its clusters, counted from the reservation's first.
    pub clusters: Range<usize>,
    /// Length in bytes.
    pub length_bytes: u64,
}

/// Room that was taken so far; given back where it does not become a reservation.
struct Taken {
    rooms: Vec<Room>,
    state: Rc<ImageState>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.state.unlink_rooms(std::mem::take(&mut self.rooms));
    }
}

impl Qcow2 {
    /// Room for clusters from `first` on that have been compressed to `lengths_bytes`, in place of all that was there. Nothing
    /// of it is visible before [`publish_compressed`](Self::publish_compressed). Waits for others who change the same clusters.
    ///
    /// # Errors
    /// `EOPNOTSUPP` with an external data file, `EINVAL` for a length of 0 or more than a cluster, and as
    /// [`prepare_write`](Self::prepare_write).
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing that anybody can see.
    pub async fn prepare_compressed(
        &self,
        first: GuestCluster,
        lengths_bytes: &[u64],
    ) -> Result<CompressedReservation, ImageError> {
        let geometry = self.state.geometry;
        let cluster_bytes = geometry.cluster_bytes();
        let start = geometry.guest_offset(first).0;
        let length = cluster_bytes.saturating_mul(lengths_bytes.len() as u64);
        let range = ByteRange::new(start, length);
        self.state.check_change(Operation::Write, range)?;
        let fits = |length: &u64| (1..=cluster_bytes).contains(length);
        let refusal = match () {
            () if self.state.has_data_file() => Some(EOPNOTSUPP),
            () if !lengths_bytes.iter().all(fits) => Some(EINVAL),
            () => None,
        };
        if let Some(errno) = refusal {
            return Err(StorageError::new(Operation::Write, range, errno).into());
        }
        self.told(self.reserve_compressed(first, range, lengths_bytes))
            .await
    }

    /// The compressed bytes have been written: readers see them from now on; durable with the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// As [`publish`](Self::publish); some of the clusters may have been published then.
    ///
    /// # Cancel safety
    /// As [`publish`](Self::publish).
    pub async fn publish_compressed(
        &self,
        mut written: CompressedReservation,
    ) -> Result<(), ImageError> {
        let rooms = std::mem::take(&mut written.rooms);
        let mut rooms = rooms.into_iter();
        while let Some(room) = rooms.next() {
            if let Err(error) = self.told(self.link_compressed(&room)).await {
                self.state.unlink_rooms([room]);
                self.state.unlink_rooms(rooms);
                return Err(error);
            }
        }
        Ok(())
    }

    async fn link_compressed(&self, written: &Room) -> Result<(), ImageError> {
        let _lease = self.state.leases.take();
        loop {
            self.state.check_sound()?;
            match self.state.publish_compressed_now(written)? {
                Look::Is(()) => return Ok(()),
                Look::Load(slice) => self.load_l2(slice).await?,
            }
        }
    }

    async fn reserve_compressed(
        &self,
        first: GuestCluster,
        range: ByteRange,
        lengths_bytes: &[u64],
    ) -> Result<CompressedReservation, ImageError> {
        self.before_change(DiskChange::Content).await?;
        // One turn for all of them: whoever held one and waited for the next could wait for somebody who waits for him.
        let turn = self.state.turns.enter(range).await;
        self.state.check_change(Operation::Write, range)?;
        let mut taken = Taken {
            rooms: Vec::with_capacity(lengths_bytes.len()),
            state: Rc::clone(&self.state),
        };
        for (index, length_bytes) in (first.0..).zip(lengths_bytes) {
            let room = self.take_room(GuestCluster(index), *length_bytes).await?;
            let whole = ByteRange::new(room.place.at.0, *length_bytes);
            let encoded = room.place.encode(&self.state.geometry);
            taken.rooms.push(room);
            if encoded.is_none() {
                return Err(StorageError::new(Operation::Write, whole, EFBIG).into());
            }
            if let Err(corruption) = self.state.overlaps.check(&self.state, whole, None) {
                return Err(ImageError::Corrupt(corruption));
            }
        }
        Ok(CompressedReservation {
            rooms: std::mem::take(&mut taken.rooms),
            _turn: turn,
            state: Rc::clone(&self.state),
        })
    }

    async fn take_room(
        &self,
        cluster: GuestCluster,
        length_bytes: u64,
    ) -> Result<Room, ImageError> {
        self.own_table(cluster).await?;
        self.reserve_entries(cluster).await?;
        let (at, references) = self.claim_bytes(length_bytes).await?;
        Ok(Room {
            cluster,
            place: CompressedAt { at, length_bytes },
            references,
        })
    }

    /// Takes `length_bytes` behind the last compressed cluster if that is possible, else at the start of a free one.
    async fn claim_bytes(&self, length_bytes: u64) -> Result<(HostOffset, References), ImageError> {
        loop {
            match self.state.append_now(length_bytes)? {
                Counted::Done(Some(taken)) => return Ok(taken),
                Counted::Done(None) | Counted::Full => {}
                Counted::Load(slice) => {
                    self.load_counts(slice).await?;
                    continue;
                }
                Counted::Write => {
                    self.commit_counts().await?;
                    continue;
                }
                Counted::Reserve(cluster) => {
                    self.reserve_table(cluster).await?;
                    continue;
                }
                Counted::GrowTable => {
                    self.grow_refcount_table().await?;
                    continue;
                }
                Counted::Wait => {
                    self.wait_for_claims().await;
                    continue;
                }
            }
            let claim = self.claim(ClusterCount(1)).await?;
            return Ok(self.state.begin_compressed(claim, length_bytes));
        }
    }
}

impl ImageState {
    /// Takes room behind the last compressed cluster; `None`: there is none.
    fn append_now(
        self: &Rc<Self>,
        length_bytes: u64,
    ) -> Result<Counted<Option<(HostOffset, References)>>, ImageError> {
        let Some(at) = self.compressed_end.get() else {
            return Ok(Counted::Done(None));
        };
        let cluster = self.geometry.host_cluster(at);
        let room = self.geometry.cluster_bytes() - self.geometry.in_cluster(at.0);
        let next = cluster.plus(ClusterCount(1));
        let mut behind: Option<Claim> = None;
        if length_bytes > room {
            match self.claim_cluster(next)? {
                Counted::Done(true) => behind = Some(self.claimed_cluster(next)),
                Counted::Done(false) | Counted::Full => return Ok(Counted::Done(None)),
                Counted::Load(slice) => return Ok(Counted::Load(slice)),
                Counted::Write => return Ok(Counted::Write),
                Counted::Reserve(cluster) => return Ok(Counted::Reserve(cluster)),
                Counted::GrowTable => return Ok(Counted::GrowTable),
                Counted::Wait => return Ok(Counted::Wait),
            }
        }
        // What was taken behind goes back where this fails.
        match self.raise(cluster)? {
            Counted::Done(true) => {}
            Counted::Load(slice) => return Ok(Counted::Load(slice)),
            _ => return Ok(Counted::Done(None)),
        }
        let count = ClusterCount(1 + u64::from(behind.is_some()));
        if let Some(claim) = behind {
            claim.keep();
        }
        self.set_compressed_end(at.plus(length_bytes));
        let references = References {
            first: cluster,
            count,
        };
        Ok(Counted::Done(Some((at, references))))
    }

    /// A compressed cluster goes to the start of a free one.
    fn begin_compressed(&self, claim: Claim, length_bytes: u64) -> (HostOffset, References) {
        let at = self.geometry.host_offset(claim.first());
        let references = References {
            first: claim.first(),
            count: ClusterCount(1),
        };
        claim.keep();
        self.set_compressed_end(at.plus(length_bytes));
        (at, references)
    }

    fn set_compressed_end(&self, end: HostOffset) {
        let room = !self.geometry.is_cluster_start(end);
        self.compressed_end.set(room.then_some(end));
    }

    /// Gives up what nothing leads to.
    fn unlink_rooms(&self, rooms: impl IntoIterator<Item = Room>) {
        for Room { references, .. } in rooms {
            self.unlink(references.first, references.count, Why::Other);
        }
    }

    fn publish_compressed_now(&self, written: &Room) -> Result<Look<()>, ImageError> {
        let place = match self.own_entry_place(written.cluster)? {
            Look::Is(place) => place,
            Look::Load(slice) => return Ok(Look::Load(slice)),
        };
        let word = written.place.encode(&self.geometry).unwrap_or(0);
        let changed = self.change_entry(place, written.cluster, 0, |old| {
            self.unlink_entry(old, Why::Other);
            L2Entry { word, bitmap: 0 }
        })?;
        Ok(match changed {
            true => Look::Is(()),
            false => Look::Load(place.slice),
        })
    }
}

impl CompressedReservation {
    /// Where its bytes go in the image file, as few runs as there are.
    pub fn runs(&self) -> Vec<CompressedRun> {
        let mut runs: Vec<CompressedRun> = Vec::new();
        for (index, room) in self.rooms.iter().enumerate() {
            let CompressedAt { at, length_bytes } = room.place;
            match runs.last_mut() {
                Some(last) if last.at.plus(last.length_bytes) == at => {
                    last.length_bytes += length_bytes;
                    last.clusters.end = index + 1;
                }
                _ => runs.push(CompressedRun {
                    at,
                    clusters: index..index + 1,
                    length_bytes,
                }),
            }
        }
        runs
    }

    /// The write failed or was not begun, and nothing of it is under way.
    pub fn give_back(mut self) {
        // Nothing leads there, but it has neighbours: it goes the way of what is unlinked.
        self.state.unlink_rooms(std::mem::take(&mut self.rooms));
    }
}

impl std::fmt::Debug for CompressedReservation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CompressedReservation")
            .field("runs", &self.runs())
            .finish_non_exhaustive()
    }
}
