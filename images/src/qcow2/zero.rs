//! Zeroes and discards by metadata alone: what reads as zeroes needs no bytes.
//!
//! What an entry becomes (version 3; subclusters accordingly):
//!
//! | | it had | it becomes |
//! |---|---|---|
//! | zeroes | a cluster | zeroes, the cluster kept |
//! | zeroes, may unmap | a cluster | zeroes, the cluster freed |
//! | zeroes | nothing | zeroes |
//! | discard | a cluster | zeroes, the cluster freed |
//! | discard | nothing | zeroes if there is a backing file, else nothing |
//! | either | compressed | zeroes, freed |
//! | filled with zeroes | nothing | zeroes |
//! | filled with zeroes | anything else | the same |
//!
//! With `discard-no-unref` a cluster is kept where it would be freed, and is discarded in the file. In version 2 nothing
//! reads as zeroes by itself: there what nothing is below is given up, whether it may be or not, as QEMU does, and the rest
//! is for the caller to write.
//!
//! Spec: qcow2, "Standard Cluster Descriptor", "Extended L2 Entries".

use blockyard_storage::{ByteRange, Operation, ZeroMode};

use crate::error::ImageError;
use crate::qcow2::free_list::Why;
use crate::qcow2::image::{ImageState, Qcow2};
use crate::qcow2::layout::entries::{COMPRESSED, L2Entry, ZERO};
use crate::qcow2::lookup::{EntryPlace, Look, Source, TablePlace};
use crate::qcow2::open::DiskChange;
use crate::qcow2::publish::lost_table;
use crate::qcow2::units::{GuestCluster, GuestOffset, HostOffset, Version};
use crate::qcow2::waiting::give_way;

/// What is to read as zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ZeroRequest {
    /// Which bytes.
    pub range: ByteRange,
    /// Whether room may be given up.
    pub may_unmap: bool,
    /// What lies below reads as zeroes, or nothing does, everywhere in the subclusters (without extended L2 entries: clusters)
    /// that `range` touches.
    pub zero_below: bool,
}

/// How far zeroes came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Zeroing {
    /// The front of the range reads as zeroes.
    Done(ByteRange),
    /// The front of the range can only be made to by writing zeroes.
    Write(ByteRange),
}

/// What becomes of clusters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Change {
    Zero {
        may_unmap: bool,
    },
    Discard {
        has_backing: bool,
    },
    /// They are not there any more: nothing is behind them, whatever is below.
    Forget,
    /// They read as zeroes as far as nothing is there.
    Fill,
}

impl Qcow2 {
    /// Makes the front of a range read as zeroes, at least one byte of it, or says that zeroes have to be written there. Visible
    /// at once, durable with the next [`flush`](Self::flush). Waits for others who change the same clusters.
    ///
    /// # Errors
    /// As [`prepare_write`](Self::prepare_write).
    ///
    /// # Cancel safety
    /// Dropping the future leaves the old content or zeroes in every cluster.
    pub async fn zero(&self, request: ZeroRequest) -> Result<Zeroing, ImageError> {
        self.state.check_change(Operation::Zero, request.range)?;
        self.told(self.zero_front(request)).await
    }

    /// Gives up the whole clusters in `range`, as far as they need not be kept to hide what is below; the last cluster of the
    /// disk is whole up to the disk's end. What was given up reads as zeroes (version 2: as nothing). Visible at once, durable
    /// with the next [`flush`](Self::flush); used again no sooner.
    ///
    /// # Errors
    /// As [`prepare_write`](Self::prepare_write); a part may have been given up.
    ///
    /// # Cancel safety
    /// As [`zero`](Self::zero).
    pub async fn discard(&self, range: ByteRange, has_backing: bool) -> Result<(), ImageError> {
        if range.is_empty() {
            return Ok(());
        }
        self.state.check_change(Operation::Discard, range)?;
        if has_backing && self.state.geometry.version() == Version::V2 {
            return Ok(());
        }
        let range = self.state.whole_clusters(range);
        self.told(self.give_up(range, Change::Discard { has_backing }))
            .await
    }

    async fn give_up(&self, range: ByteRange, change: Change) -> Result<(), ImageError> {
        let mut rest = range;
        while !rest.is_empty() {
            self.before_change(DiskChange::Content).await?;
            let done = self.change_front(rest, change).await?;
            give_way().await;
            rest = rest.split_at(done.length().max(1)).1;
        }
        Ok(())
    }

    async fn zero_front(&self, request: ZeroRequest) -> Result<Zeroing, ImageError> {
        self.before_change(DiskChange::Content).await?;
        let range = request.range;
        let span = self.state.slice_span(range);
        let turn = self.state.turns.enter(span).await;
        let _lease = self.state.leases.take();
        let done = loop {
            self.state.check_change(Operation::Zero, range)?;
            match self.state.zeroing(request, span)? {
                Look::Load(slice) => self.load_l2(slice).await?,
                Look::Is(Zeroing::Done(done)) => break done,
                Look::Is(write) => return Ok(write),
            }
        };
        turn.shrink(done.align_outward(self.state.geometry.cluster_bytes()));
        let change = match self.state.geometry.version() {
            // What is below reads as zeroes, or it would not have come to this.
            Version::V2 => Change::Discard { has_backing: false },
            Version::V3 => Change::Zero {
                may_unmap: request.may_unmap,
            },
        };
        self.change(done, change).await?;
        Ok(Zeroing::Done(done))
    }

    pub(super) async fn change_front(
        &self,
        range: ByteRange,
        change: Change,
    ) -> Result<ByteRange, ImageError> {
        let span = self.state.slice_span(range);
        let _turn = self.state.turns.enter(span).await;
        let _lease = self.state.leases.take();
        self.state.check_change(Operation::Discard, range)?;
        let hides = matches!(change, Change::Discard { has_backing: true } | Change::Fill);
        if !hides && self.state.is_without_table(range.offset())? {
            // Nothing is there, as far as there are no tables.
            return Ok(range.clamp_end(self.state.end_without_tables(range)));
        }
        let front = range.intersection(&span);
        self.change(front, change).await?;
        Ok(front)
    }

    /// Changes the entries of a range, all of them in one slice. The caller has the turn.
    pub(super) async fn change(&self, range: ByteRange, change: Change) -> Result<(), ImageError> {
        let state = &self.state;
        let leaves_nothing = match change {
            Change::Zero { .. } | Change::Discard { has_backing: true } | Change::Fill => false,
            Change::Discard { has_backing: false } | Change::Forget => true,
        };
        if leaves_nothing && state.is_without_table(range.offset())? {
            return Ok(());
        }
        let cluster = state.geometry.guest_cluster(GuestOffset(range.offset()));
        self.own_table(cluster).await?;
        // What only takes from entries needs no more room than they have.
        if !leaves_nothing {
            self.reserve_entries(cluster).await?;
        }
        if state.header.borrow().is_data_file_raw()
            && change != Change::Forget
            && let Some(data_file) = &state.data_file
        {
            // Whoever reads that file as it is has to see the same.
            let may_unmap = !matches!(change, Change::Zero { may_unmap: false });
            let mode = ZeroMode {
                may_unmap,
                no_fallback: false,
            };
            let length = state.header.borrow().guest_bytes();
            data_file.zero(range.clamp_end(length), mode).await?;
        }
        let mut gone = Vec::new();
        loop {
            match state.change_now(range, change, &mut gone)? {
                Look::Is(()) => break,
                Look::Load(slice) => self.load_l2(slice).await?,
            }
        }
        let mut discarding = Discarding { state, gone };
        while let Some(range) = discarding.gone.last().copied() {
            // Only room is lost where it fails.
            let _ = state.data_storage().discard(range).await;
            discarding.gone.pop();
        }
        Ok(())
    }
}

/// Places that are being discarded and may be used again afterwards. Dropped early, they are not: the discard may still be
/// under way.
struct Discarding<'a> {
    state: &'a ImageState,
    gone: Vec<ByteRange>,
}

impl Drop for Discarding<'_> {
    fn drop(&mut self) {
        for range in &self.gone {
            self.state
                .tainted_in(HostOffset(range.offset()), range.length());
        }
    }
}

impl ImageState {
    /// The clusters that lie in `range` as a whole.
    fn whole_clusters(&self, range: ByteRange) -> ByteRange {
        let cluster_bytes = self.geometry.cluster_bytes();
        let length = self.header.borrow().guest_bytes();
        let to_the_end = match range.end() >= length {
            true => range.align_outward(cluster_bytes).end(),
            false => range.end(),
        };
        ByteRange::between(range.offset(), to_the_end).align_inward(cluster_bytes)
    }

    /// How the front of a range can be made to read as zeroes.
    fn zeroing(&self, request: ZeroRequest, span: ByteRange) -> Result<Look<Zeroing>, ImageError> {
        let range = request.range.intersection(&span);
        let cluster = self.geometry.guest_cluster(GuestOffset(range.offset()));
        let place = match self.entry_place(cluster)? {
            TablePlace::Entry(place) => place,
            TablePlace::None => {
                let empty = L2Entry::default();
                return Ok(Look::Is(self.zeroing_of(request, range, |_| Some(empty))));
            }
        };
        let zeroing = self.l2.read(place.slice, |slice| {
            let first = self.entry_in(slice, place, place.index, cluster);
            first.map_err(ImageError::Corrupt)?;
            Ok(self.zeroing_of(request, range, |step| {
                let index = place.index + usize::try_from(step).ok()?;
                let cluster = GuestCluster(cluster.0 + step);
                // Whoever asks for a later one will hear of it.
                self.entry_in(slice, place, index, cluster).ok()
            }))
        });
        match zeroing {
            None => Ok(Look::Load(place.slice)),
            Some(zeroing) => zeroing.map(Look::Is),
        }
    }

    fn zeroing_of(
        &self,
        request: ZeroRequest,
        range: ByteRange,
        entry_of: impl Fn(u64) -> Option<L2Entry>,
    ) -> Zeroing {
        let unit = self.geometry.subcluster_bytes();
        let length = self.header.borrow().guest_bytes();
        let start = self.cluster_start(range.offset());
        let mut done = range.offset();
        let mut to_write = None;
        for piece in range.pieces(unit) {
            let step = (piece.offset() - start) / self.geometry.cluster_bytes();
            let Some(entry) = entry_of(step) else {
                break;
            };
            let is_whole = piece.length() == unit
                || piece.offset().is_multiple_of(unit) && piece.end() >= length;
            let cluster_in_range = self.has_whole_cluster(range, piece, length);
            if !self.can_zero(&entry, request, piece, is_whole, cluster_in_range) {
                to_write = Some(piece);
                break;
            }
            done = piece.end();
        }
        match to_write {
            Some(piece) if done == range.offset() => Zeroing::Write(piece),
            _ => Zeroing::Done(ByteRange::between(range.offset(), done)),
        }
    }

    /// Whether `range` holds all of the cluster that `piece` is part of.
    fn has_whole_cluster(&self, range: ByteRange, piece: ByteRange, length: u64) -> bool {
        let start = self.cluster_start(piece.offset());
        let end = start.saturating_add(self.geometry.cluster_bytes());
        range.offset() <= start && (range.end() >= end || range.end() >= length)
    }

    /// Whether a piece of a subcluster can read as zeroes without being written.
    fn can_zero(
        &self,
        entry: &L2Entry,
        request: ZeroRequest,
        piece: ByteRange,
        is_whole: bool,
        cluster_in_range: bool,
    ) -> bool {
        let source = self.source_at(entry, self.geometry.in_cluster(piece.offset()));
        if !is_whole {
            // The rest of it must be zeroes already, and stay so.
            let empty = matches!(source, Source::Unallocated | Source::Zero { .. });
            if !empty || !request.zero_below {
                return false;
            }
        }
        if self.geometry.version() == Version::V2 {
            let nothing = source == Source::Unallocated;
            return request.zero_below && (nothing || is_whole);
        }
        // A compressed cluster has no subclusters.
        entry.word & COMPRESSED == 0 || cluster_in_range
    }

    /// Changes the entries of a range; `gone` is what is to be discarded in the data storage afterwards.
    fn change_now(
        &self,
        range: ByteRange,
        change: Change,
        gone: &mut Vec<ByteRange>,
    ) -> Result<Look<()>, ImageError> {
        let cluster = self.geometry.guest_cluster(GuestOffset(range.offset()));
        let place = match self.own_entry_place(cluster)? {
            Look::Is(place) => place,
            Look::Load(slice) => return Ok(Look::Load(slice)),
        };
        let start = self.geometry.guest_offset(cluster).0;
        let clusters = self.geometry.clusters_for(range.end() - start).0;
        for step in 0..clusters {
            let whole = ByteRange::new(
                start + step * self.geometry.cluster_bytes(),
                self.geometry.cluster_bytes(),
            );
            let part = range.intersection(&whole);
            self.change_one(place, cluster, step, part, change, gone)?;
        }
        Ok(Look::Is(()))
    }

    fn change_one(
        &self,
        place: EntryPlace,
        cluster: GuestCluster,
        step: u64,
        part: ByteRange,
        change: Change,
        gone: &mut Vec<ByteRange>,
    ) -> Result<(), ImageError> {
        let is_there = self.change_entry(place, cluster, step, |old| {
            let new = self.changed_entry(old, part, change);
            let before = self.host_of(old);
            let frees = change != Change::Fill
                && (old.word & COMPRESSED != 0
                    || before.is_some() && self.gives_up(old, part, change));
            if !frees {
                return new;
            }
            let is_kept = self.keeps_place(old, change);
            let discards = self.options.pass_discard_request;
            match before {
                // With an external data file a place is not counted.
                Some(at) if self.has_data_file() || is_kept => {
                    let raw = self.header.borrow().is_data_file_raw();
                    if discards && !raw && (old.is_copied() || self.has_data_file()) {
                        push_range(gone, ByteRange::new(at.0, self.geometry.cluster_bytes()));
                    }
                }
                _ => self.unlink_entry(old, Why::Request),
            }
            new
        })?;
        // It was there a moment ago, and nothing was waited for.
        is_there.then_some(()).ok_or_else(lost_table)
    }

    /// Whether the cluster that an entry leads to is not needed any more after a change of `part` of it.
    fn gives_up(&self, old: &L2Entry, part: ByteRange, change: Change) -> bool {
        match change {
            Change::Zero { may_unmap } => may_unmap && self.is_all_of_it(old, part),
            Change::Discard { .. } | Change::Forget => true,
            Change::Fill => false,
        }
    }

    /// Whether a cluster that is given up keeps its place all the same.
    fn keeps_place(&self, old: &L2Entry, change: Change) -> bool {
        self.options.discard_no_unref && old.word & COMPRESSED == 0 && change != Change::Forget
    }

    /// Whether nothing of a cluster is left when `part` is taken from it. Without subclusters it always is: parts of clusters only
    /// come here where the rest reads as zeroes.
    fn is_all_of_it(&self, old: &L2Entry, part: ByteRange) -> bool {
        if !self.geometry.extended_l2() || old.word & COMPRESSED != 0 {
            return true;
        }
        self.part_mask(part) == u64::from(u32::MAX)
    }

    /// The bits of the subclusters that hold bytes of `part`, which lies in one cluster; the last subcluster of the disk may be
    /// short, and those behind it count with it.
    fn part_mask(&self, part: ByteRange) -> u64 {
        let start = self.cluster_start(part.offset());
        let length = self.header.borrow().guest_bytes();
        let end = match part.end() >= length {
            true => self.geometry.cluster_bytes(),
            false => part.end() - start,
        };
        self.subcluster_mask(part.offset() - start, end)
    }

    fn changed_entry(&self, old: &L2Entry, part: ByteRange, change: Change) -> L2Entry {
        if change == Change::Fill {
            return self.filled_entry(old, part);
        }
        let is_compressed = old.word & COMPRESSED != 0;
        let allocated = is_compressed || self.host_of(old).is_some();
        let is_kept =
            !is_compressed && (!self.gives_up(old, part, change) || self.keeps_place(old, change));
        let word = if is_kept { old.word } else { 0 };
        let reads_zero = match change {
            Change::Zero { .. } => true,
            Change::Discard { has_backing } => allocated || has_backing,
            Change::Forget | Change::Fill => false,
        };
        if change == Change::Forget {
            return L2Entry::default();
        }
        if !reads_zero || self.geometry.version() == Version::V2 {
            return L2Entry {
                word,
                bitmap: old.bitmap,
            };
        }
        if !self.geometry.extended_l2() {
            return L2Entry {
                word: word | ZERO,
                bitmap: 0,
            };
        }
        let mask = match change {
            Change::Zero { .. } if !is_compressed => self.part_mask(part),
            _ => u64::from(u32::MAX),
        };
        let before = if is_compressed { 0 } else { old.bitmap };
        L2Entry {
            word,
            bitmap: (before | mask << 32) & !mask,
        }
    }

    /// An entry that reads as zeroes in `part` as far as nothing is there.
    fn filled_entry(&self, old: &L2Entry, part: ByteRange) -> L2Entry {
        if old.word & COMPRESSED != 0 {
            return *old;
        }
        if self.geometry.extended_l2() {
            let held = old.bitmap | old.bitmap >> 32;
            let mask = self.part_mask(part) & !held;
            return L2Entry {
                word: old.word,
                bitmap: old.bitmap | mask << 32,
            };
        }
        match self.source_at(old, 0) {
            Source::Unallocated => L2Entry {
                word: old.word | ZERO,
                bitmap: 0,
            },
            _ => *old,
        }
    }
}

fn push_range(ranges: &mut Vec<ByteRange>, range: ByteRange) {
    match ranges.last_mut() {
        Some(last) if last.end() == range.offset() => {
            *last = ByteRange::between(last.offset(), range.end());
        }
        _ => ranges.push(range),
    }
}
