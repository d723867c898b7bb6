//! What a write has to do: go where its bytes already are, or take new room first.
//!
//! ```text
//!   prepare_write -> in place: write, done
//!                 -> reservation: fill the edges from the old content, write, publish
//! ```
//! Until a reservation is published readers see the old content. Whoever reserves holds the turn on its clusters, so that the
//! old content does not change under it; writes in place need no turn, as they never touch what a reservation fills.

use std::rc::Rc;

use blockyard_storage::{ByteRange, Operation};

use crate::error::ImageError;
use crate::qcow2::claims::Claim;
use crate::qcow2::free_list::Why;
use crate::qcow2::fresh::TableKind;
use crate::qcow2::image::{ImageState, Qcow2};
use crate::qcow2::layout::entries::L1Entry;
use crate::qcow2::leases::Lease;
use crate::qcow2::lookup::{Look, TablePlace};
use crate::qcow2::open::DiskChange;
use crate::qcow2::units::{ClusterCount, GuestCluster, GuestOffset, HostCluster, HostOffset};
use crate::qcow2::waiting::Turn;
use crate::qcow2::write_plan::{Plan, Wanted};

/// Most bytes that one reservation takes.
pub(super) const RESERVATION_BYTES_MAX: u64 = 64 << 20;

/// What the front of a write has to do.
#[derive(Debug)]
pub enum WritePlan {
    /// Its bytes have their place already.
    InPlace(InPlace),
    /// New room was taken for it.
    Allocate(Reservation),
}

/// Room that the guest's bytes have already and that nobody shares.
#[must_use = "a write that is not said to be done keeps its clusters from being used again"]
pub struct InPlace {
    range: ByteRange,
    at: HostOffset,
    _lease: Lease,
    state: Rc<ImageState>,
    done: bool,
}

/// New room for a write. Dropping it says that the write may still be under way: its clusters are not used again then while the
/// image is open.
#[must_use = "a reservation is to be published, or given back"]
pub struct Reservation {
    range: ByteRange,
    at: HostOffset,
    cover: ByteRange,
    reads_zero: bool,
    /// Clusters that were free; `None`: the guest's clusters have their place already, and it is to be used.
    claim: Option<Claim>,
    _turn: Turn,
    state: Rc<ImageState>,
    done: bool,
}

impl Qcow2 {
    /// What a write of the front of `range` has to do. Nothing of it is visible to anybody before
    /// [`publish`](Self::publish). Waits for others who change the same clusters.
    ///
    /// # Errors
    /// `EBADF` for a read-only image, `EINVAL` behind the end of the disk, `ENOSPC` without room; corrupt, broken, or what the
    /// storage says.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing that anybody can see.
    pub async fn prepare_write(&self, range: ByteRange) -> Result<WritePlan, ImageError> {
        self.state.check_change(Operation::Write, range)?;
        self.told(self.find_room(range)).await
    }

    async fn find_room(&self, range: ByteRange) -> Result<WritePlan, ImageError> {
        self.before_change(DiskChange::Content).await?;
        match self.find_in_place(range).await? {
            Some(in_place) => Ok(WritePlan::InPlace(in_place)),
            None => self.reserve(range).await,
        }
    }

    /// The same without waiting, where the front of `range` has its place already and the tables are in memory; `None`: ask
    /// [`prepare_write`](Self::prepare_write).
    pub fn prepare_write_now(&self, range: ByteRange) -> Option<InPlace> {
        self.state.check_change(Operation::Write, range).ok()?;
        if !self.state.is_ready_for(DiskChange::Content) {
            return None;
        }
        match self.state.look_for_room(range, None) {
            Ok(Look::Is(Wanted::InPlace(range, at))) => Some(self.in_place(range, at)),
            _ => None,
        }
    }

    /// Where the front of `range` is, if it is to be written there. Waits for tables only.
    async fn find_in_place(&self, range: ByteRange) -> Result<Option<InPlace>, ImageError> {
        let _lease = self.state.leases.take();
        loop {
            match self.state.look_for_room(range, None)? {
                Look::Load(slice) => self.load_l2(slice).await?,
                Look::Is(Wanted::InPlace(range, at)) => return Ok(Some(self.in_place(range, at))),
                Look::Is(Wanted::Table | Wanted::Room(_)) => return Ok(None),
            }
        }
    }

    fn in_place(&self, range: ByteRange, at: HostOffset) -> InPlace {
        InPlace {
            range,
            at,
            _lease: self.state.leases.take(),
            state: Rc::clone(&self.state),
            done: false,
        }
    }

    async fn reserve(&self, range: ByteRange) -> Result<WritePlan, ImageError> {
        let range = range.split_at(RESERVATION_BYTES_MAX).0;
        let turn = self.state.turns.enter(self.state.slice_span(range)).await;
        self.reserve_in_turn(range, turn).await
    }

    /// The same for a range that is no longer than a reservation, by whoever has the turn on its clusters.
    pub(super) async fn reserve_in_turn(
        &self,
        range: ByteRange,
        turn: Turn,
    ) -> Result<WritePlan, ImageError> {
        let _lease = self.state.leases.take();
        let mut claim: Option<Claim> = None;
        loop {
            // It may have become shorter, or unusable.
            self.state.check_change(Operation::Write, range)?;
            let room = claim.as_ref().map(Claim::count);
            let plan = match self.state.look_for_room(range, room)? {
                Look::Load(slice) => {
                    self.load_l2(slice).await?;
                    continue;
                }
                Look::Is(Wanted::InPlace(range, at)) => {
                    return Ok(WritePlan::InPlace(self.in_place(range, at)));
                }
                Look::Is(Wanted::Table) => {
                    let cluster = self
                        .state
                        .geometry
                        .guest_cluster(GuestOffset(range.offset()));
                    self.own_table(cluster).await?;
                    continue;
                }
                Look::Is(Wanted::Room(plan)) => plan,
            };
            let cluster = self
                .state
                .geometry
                .guest_cluster(GuestOffset(range.offset()));
            if self.state.table_without_room(cluster)?.is_some() {
                self.reserve_entries(cluster).await?;
                continue;
            }
            if plan.kept.is_none() && claim.is_none() {
                claim = Some(self.claim(plan.clusters).await?);
                continue;
            }
            return self
                .state
                .reserved(plan, claim, turn)
                .map(WritePlan::Allocate);
        }
    }

    /// Sees to it that the L2 table of a cluster is there and belongs to nobody else.
    pub(super) async fn own_table(&self, cluster: GuestCluster) -> Result<(), ImageError> {
        loop {
            let before = match self.state.entry_place(cluster)? {
                TablePlace::Entry(place) if place.copied => return Ok(()),
                TablePlace::Entry(place) => Some(place.table),
                TablePlace::None => None,
            };
            let claim = self.claim(ClusterCount(1)).await?;
            self.reserve_table(claim.first()).await?;
            self.reserve_l1_entry(cluster).await?;
            let now = match self.state.entry_place(cluster)? {
                TablePlace::Entry(place) if place.copied => continue,
                TablePlace::Entry(place) => Some(place.table),
                TablePlace::None => None,
            };
            if now == before {
                return self.state.add_table(cluster, before, claim);
            }
        }
    }
}

impl ImageState {
    /// The clusters of the front of `range` whose entries are in one slice.
    pub(super) fn slice_span(&self, range: ByteRange) -> ByteRange {
        let slice_bytes = self.l2.slice_bytes() as u64;
        let covers = slice_bytes / self.geometry.l2_entry_bytes() * self.geometry.cluster_bytes();
        let end = (range.offset() / covers + 1).saturating_mul(covers);
        range
            .align_outward(self.geometry.cluster_bytes())
            .clamp_end(end)
    }

    fn reserved(
        self: &Rc<Self>,
        plan: Plan,
        mut claim: Option<Claim>,
        turn: Turn,
    ) -> Result<Reservation, ImageError> {
        let geometry = &self.geometry;
        let start = self.cluster_start(plan.range.offset());
        let length = plan.clusters.0 * geometry.cluster_bytes();
        let (at, reads_zero) = match (plan.kept, &mut claim) {
            (Some(at), _) => (at, false),
            (None, Some(claim)) => {
                claim.writing();
                (geometry.host_offset(claim.first()), claim.reads_zero())
            }
            (None, None) => return Err(ImageError::Broken("a write has no room".to_owned())),
        };
        if !self.has_data_file() {
            let whole = ByteRange::new(at.0, length);
            let checked = self.overlaps.check(self, whole, None);
            if let (Err(_), Some(claim)) = (&checked, &mut claim) {
                claim.settled();
            }
            checked.map_err(ImageError::Corrupt)?;
        }
        turn.shrink(ByteRange::new(start, length));
        Ok(Reservation {
            range: plan.range,
            at: at.plus(plan.range.offset() - start),
            cover: plan.cover,
            reads_zero,
            // What was claimed for nothing is given back here.
            claim: claim.filter(|_| plan.kept.is_none()),
            _turn: turn,
            state: Rc::clone(self),
            done: false,
        })
    }

    /// Puts an L2 table of its own there for a cluster: empty, or a copy of one that others share.
    fn add_table(
        &self,
        cluster: GuestCluster,
        shared: Option<HostOffset>,
        claim: Claim,
    ) -> Result<(), ImageError> {
        let geometry = &self.geometry;
        let at = geometry.host_offset(claim.first());
        let l1_index = geometry.l1_index(cluster);
        if !self.l1.borrow_mut().set(l1_index, L1Entry::copied(at).0) {
            return Err(ImageError::Broken(
                "a cluster is behind the end of the L1 table".to_owned(),
            ));
        }
        // Whatever stood there before is gone.
        self.l2.forget_table(at, geometry.cluster_bytes());
        self.fresh.borrow_mut().add(
            at,
            TableKind::L2,
            shared,
            geometry.cluster_bytes(),
            self.l2.slice_bytes(),
        );
        self.overlaps
            .add(ByteRange::new(at.0, geometry.cluster_bytes()));
        if let Some(shared) = shared {
            self.unlink_cluster(shared, Why::Other);
        }
        claim.keep();
        Ok(())
    }
}

impl InPlace {
    /// The guest bytes of the write that it takes.
    pub const fn range(&self) -> ByteRange {
        self.range
    }

    /// Where its first byte goes, in the data storage.
    pub const fn at(&self) -> HostOffset {
        self.at
    }

    /// The write has ended, well or not: nothing of it is under way any more.
    pub fn done(mut self) {
        self.done = true;
    }
}

impl Drop for InPlace {
    fn drop(&mut self) {
        if !self.done && !self.state.has_data_file() {
            self.state.strayed_in(self.at, self.range.length());
        }
    }
}

impl std::fmt::Debug for InPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InPlace")
            .field("range", &self.range)
            .field("at", &self.at)
            .finish_non_exhaustive()
    }
}

impl Reservation {
    /// The guest bytes of the write that it takes.
    pub const fn range(&self) -> ByteRange {
        self.range
    }

    /// Where the first byte of [`range`](Self::range) goes, in the data storage; others before and behind it accordingly.
    pub const fn at(&self) -> HostOffset {
        self.at
    }

    /// Guest bytes right before [`range`](Self::range) that have to be written too, with their old content.
    pub const fn fill_before(&self) -> ByteRange {
        ByteRange::between(self.cover.offset(), self.range.offset())
    }

    /// Guest bytes right behind [`range`](Self::range) that have to be written too, with their old content. May pass the end
    /// of the disk; zeroes there.
    pub const fn fill_after(&self) -> ByteRange {
        ByteRange::between(self.range.end(), self.cover.end())
    }

    /// Where a guest byte of [`range`](Self::range) or its edges goes.
    pub const fn at_of(&self, offset: u64) -> HostOffset {
        HostOffset(
            self.at
                .0
                .wrapping_add(offset.wrapping_sub(self.range.offset())),
        )
    }

    /// Whether all of it reads as zeroes where it goes, so that zeroes need not be written.
    pub const fn reads_zero(&self) -> bool {
        self.reads_zero
    }

    /// The write failed or was not begun, and nothing of it is under way: the room may be used again at once.
    pub fn give_back(mut self) {
        self.settle();
    }

    /// Nothing is written there any more.
    pub(super) fn settle(&mut self) {
        self.done = true;
        if let Some(claim) = &mut self.claim {
            claim.settled();
        }
    }

    /// All guest bytes that are written: [`range`](Self::range) and its edges.
    pub(super) const fn cover(&self) -> ByteRange {
        self.cover
    }

    /// Whether it goes to clusters that were free.
    pub(super) const fn is_new(&self) -> bool {
        self.claim.is_some()
    }

    /// Its clusters are in a table from now on.
    pub(super) fn published(&mut self) {
        self.done = true;
        if let Some(claim) = self.claim.take() {
            claim.keep();
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // Clusters that were free look after themselves.
        if self.done || self.claim.is_some() {
            return;
        }
        let at = self.at_of(self.cover.offset());
        self.state.tainted_in(at, self.cover.length());
    }
}

impl std::fmt::Debug for Reservation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reservation")
            .field("range", &self.range)
            .field("at", &self.at)
            .field("cover", &self.cover)
            .finish_non_exhaustive()
    }
}

impl ImageState {
    fn clusters_of(&self, at: HostOffset, length: u64) -> (HostCluster, ClusterCount) {
        let first = self.geometry.host_cluster(at);
        let last = self
            .geometry
            .host_cluster(at.plus(length.saturating_sub(1)));
        (first, ClusterCount(last.0.saturating_sub(first.0) + 1))
    }

    /// A change that nobody waits for may still reach more of these clusters than somebody wanted changed.
    pub(super) fn tainted_in(&self, at: HostOffset, length: u64) {
        if !self.has_data_file() {
            self.strayed_in(at, length);
        }
        let (first, count) = self.clusters_of(at, length);
        self.tainted.borrow_mut().insert(first, count);
    }

    /// A write that nobody waits for may still reach this place.
    fn strayed_in(&self, at: HostOffset, length: u64) {
        let (first, count) = self.clusters_of(at, length);
        self.strayed.borrow_mut().insert(first, count);
    }
}
