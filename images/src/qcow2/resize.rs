//! Another length of the guest's disk. What a guest has lost by a shorter length is gone from the image before the length
//! changes, so that it never comes back.

use std::rc::Rc;

use blockyard_storage::error::EOPNOTSUPP;
use blockyard_storage::{ByteRange, Operation, StorageError};

use crate::error::ImageError;
use crate::pace::{Cancelled, Pace, Unwatched};
use crate::qcow2::amend::AmendError;
use crate::qcow2::free_list::Why;
use crate::qcow2::growth::l1_entries;
use crate::qcow2::header_updates::interrupted;
use crate::qcow2::image::{ImageState, Qcow2};
use crate::qcow2::layout::entries::L1Entry;
use crate::qcow2::lookup::{Look, Source};
use crate::qcow2::open::DiskChange;
use crate::qcow2::units::{ClusterCount, HostCluster, Version};
use crate::qcow2::waiting::{Turn, give_way};
use crate::qcow2::zero::Change;

impl Qcow2 {
    /// Makes the guest's disk `length_bytes` long; durable afterwards. What is cut off is lost and its room given back; nothing
    /// may be in flight there. What is added reads as zeroes: what is below would show up to `below_bytes`, so that there are
    /// zero clusters there before the length changes. In the last cluster of the old length stands what stood there; it is for
    /// the caller to [`zero`](Self::zero) or write it before.
    ///
    /// # Errors
    /// Refused with QEMU's texts for lengths that cannot be; what the storage says, and then the length is the old one, though
    /// a part of what was to be cut off may be lost.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the old length or the new one, as an error does.
    pub async fn resize(&self, length_bytes: u64, below_bytes: u64) -> Result<(), ImageError> {
        self.state.check_resize(length_bytes)?;
        self.told(self.change_length(length_bytes, below_bytes))
            .await
    }

    async fn change_length(&self, length_bytes: u64, below_bytes: u64) -> Result<(), ImageError> {
        self.before_change(DiskChange::Length).await?;
        match length_bytes < self.length_bytes() {
            true => self.shrink(length_bytes).await,
            false => self.grow(length_bytes, below_bytes).await,
        }
    }

    /// Whether [`resize`](Self::resize) would refuse this length before it has changed anything.
    ///
    /// # Errors
    /// As it would.
    pub fn check_resize(&self, length_bytes: u64) -> Result<(), ImageError> {
        self.state.check_resize(length_bytes)
    }

    /// Everything that a disk of `length_bytes` needs which is longer than this one, apart from its length, which
    /// [`amend`](crate::qcow2::amend::amend) puts into the header: room in the L1 table, zero clusters where what is below
    /// would show up to `below_bytes`, a longer data file. Durable afterwards. Nothing else may change the length meanwhile.
    ///
    /// # Errors
    /// [`AmendError::Failed`] as [`resize`](Self::resize), [`AmendError::Cancelled`] when `pace` says so. The disk is what it
    /// was; some of what it would need may be there.
    ///
    /// # Cancel safety
    /// As an error.
    pub async fn prepare_growth(
        &self,
        length_bytes: u64,
        below_bytes: u64,
        pace: &dyn Pace,
    ) -> Result<(), AmendError> {
        self.state.check_resize(length_bytes)?;
        let prepared = self.told(async {
            self.before_change(DiskChange::Length).await?;
            let _turn = self.turn_of_growing().await;
            self.make_longer(length_bytes, below_bytes, pace).await
        });
        match prepared.await? {
            Ok(()) => Ok(()),
            Err(Cancelled) => Err(AmendError::Cancelled),
        }
    }

    /// What a disk that was made shorter by [`amend`](crate::qcow2::amend::amend) has left over goes, in both files.
    ///
    /// # Errors
    /// What the storage says.
    ///
    /// # Cancel safety
    /// What is left over may stay.
    pub async fn give_back_the_end(&self) -> Result<(), ImageError> {
        let length_bytes = self.length_bytes();
        self.told(async {
            self.resize_data_file(move |length| length > length_bytes, length_bytes)
                .await?;
            self.cut_off_the_end().await
        })
        .await
    }

    async fn grow(&self, length_bytes: u64, below_bytes: u64) -> Result<(), ImageError> {
        let _turn = self.turn_of_growing().await;
        // Nobody watches who could cancel it.
        if self
            .make_longer(length_bytes, below_bytes, &Unwatched)
            .await?
            .is_ok()
        {
            self.write_header(move |header| header.size_bytes = length_bytes)
                .await?;
        }
        Ok(())
    }

    /// One after the other: two tables cannot move at once.
    async fn turn_of_growing(&self) -> Turn {
        self.state
            .turns
            .enter(ByteRange::new(u64::MAX - 1, 1))
            .await
    }

    /// All that comes before another length stands in the header.
    async fn make_longer(
        &self,
        length_bytes: u64,
        below_bytes: u64,
        pace: &dyn Pace,
    ) -> Result<Result<(), Cancelled>, ImageError> {
        let state = &self.state;
        let hidden = self.seen_behind_end(length_bytes.min(below_bytes));
        if !hidden.is_empty() && state.geometry.version() == Version::V2 {
            // It cannot say "zeroes" where something is below, and QEMU does not write them either.
            return Err(StorageError::new(Operation::Zero, hidden, EOPNOTSUPP).into());
        }
        let entries = state.geometry.l1_entries_for(length_bytes);
        if entries > state.l1.borrow().len() {
            self.grow_l1_table(entries).await?;
        }
        let hidden = self.hide_below(hidden, pace).await?;
        if hidden.is_ok() {
            self.resize_data_file(move |length| length < length_bytes, length_bytes)
                .await?;
        }
        Ok(hidden)
    }

    /// The clusters behind the last one of the disk in which something would show that reaches up to `end`.
    fn seen_behind_end(&self, end: u64) -> ByteRange {
        let cluster_bytes = self.state.geometry.cluster_bytes();
        let old = ByteRange::new(0, self.length_bytes()).align_outward(cluster_bytes);
        ByteRange::between(old.end(), end).align_outward(cluster_bytes)
    }

    /// Zero clusters in `hidden`, behind the end of the disk; durable afterwards.
    async fn hide_below(
        &self,
        hidden: ByteRange,
        pace: &dyn Pace,
    ) -> Result<Result<(), Cancelled>, ImageError> {
        if hidden.is_empty() {
            return Ok(Ok(()));
        }
        let geometry = self.state.geometry;
        // As much as is written.
        let entry_bytes = |range: &ByteRange| {
            geometry
                .clusters_for(range.length())
                .0
                .saturating_mul(geometry.l2_entry_bytes())
        };
        pace.expect(entry_bytes(&hidden));
        let mut rest = hidden;
        while !rest.is_empty() {
            if let Err(cancelled) = pace.checkpoint().await {
                return Ok(Err(cancelled));
            }
            let front = rest.intersection(&self.state.slice_span(rest));
            self.change(front, Change::Zero { may_unmap: false })
                .await?;
            pace.done(entry_bytes(&front));
            rest = rest.split_at(front.length().max(1)).1;
            give_way().await;
        }
        self.commit().await?;
        Ok(Ok(()))
    }

    async fn shrink(&self, length_bytes: u64) -> Result<(), ImageError> {
        let state = &self.state;
        let cluster_bytes = state.geometry.cluster_bytes();
        let old = ByteRange::new(0, self.length_bytes()).align_outward(cluster_bytes);
        let kept = ByteRange::new(0, length_bytes).align_outward(cluster_bytes);
        let gone = ByteRange::between(kept.end(), old.end());
        let turn = state
            .turns
            .enter(ByteRange::between(gone.offset(), u64::MAX))
            .await;
        let mut rest = gone;
        while !rest.is_empty() {
            self.before_change(DiskChange::Length).await?;
            rest = self.forget_front(rest).await?;
            give_way().await;
        }
        state.forget_tables(length_bytes);
        self.commit().await?;
        self.write_header(move |header| header.size_bytes = length_bytes)
            .await?;
        self.resize_data_file(move |length| length > length_bytes, length_bytes)
            .await?;
        drop(turn);
        self.cut_off_the_end().await
    }

    /// Gives the data file the length of the disk, if there is one whose length is to change and can.
    async fn resize_data_file(
        &self,
        is_wanted: impl FnOnce(u64) -> bool + 'static,
        length_bytes: u64,
    ) -> Result<(), ImageError> {
        let state = Rc::clone(&self.state);
        let resized = self
            .serial
            .run(move || {
                Box::pin(async move {
                    let Some(data_file) = &state.data_file else {
                        return Ok(());
                    };
                    let facts = data_file.facts();
                    if !facts.fixed_length && is_wanted(facts.length_bytes) {
                        data_file.resize(length_bytes).await?;
                    }
                    state.sync_data_file().await
                })
            })
            .await;
        resized.unwrap_or_else(|| Err(interrupted()))
    }

    /// Takes everything from the front of a range; what is left is returned. The caller has the turn.
    async fn forget_front(&self, range: ByteRange) -> Result<ByteRange, ImageError> {
        let state = &self.state;
        if let Some(end) = state.end_of_nothing(range)? {
            return Ok(ByteRange::between(end.min(range.end()), range.end()));
        }
        let front = range.intersection(&state.slice_span(range));
        // Where nothing is, nothing changes: a table that snapshots share would have to be copied, for which there may be no room.
        let there = self.find(front).await?;
        if there.source == Source::Unallocated && !state.geometry.extended_l2() {
            return Ok(ByteRange::between(there.range.end(), range.end()));
        }
        drop(there);
        self.change(front, Change::Forget).await?;
        Ok(range.split_at(front.length()).1)
    }

    /// Waits until clusters are given out again.
    pub(super) async fn wait_for_claims(&self) {
        let claims_wait = &self.state.claims_wait;
        let ended = self
            .serial
            .drive(|| (!claims_wait.get()).then_some(()))
            .await;
        if ended.is_none() {
            // Whoever stopped that was torn down with its work.
            claims_wait.set(false);
        }
    }

    /// Gives the end of the file back, behind the last cluster that is in use.
    async fn cut_off_the_end(&self) -> Result<(), ImageError> {
        self.commit().await?;
        let state = Rc::clone(&self.state);
        let cut = self
            .serial
            .run(move || Box::pin(async move { state.cut_off_the_end().await }))
            .await;
        cut.unwrap_or_else(|| Err(interrupted()))
    }
}

impl ImageState {
    fn check_resize(&self, length_bytes: u64) -> Result<(), ImageError> {
        if !length_bytes.is_multiple_of(512) {
            return Err(ImageError::refused(
                "The new size must be a multiple of 512",
            ));
        }
        let header = self.header.borrow();
        if header.geometry.version() == Version::V2 && header.snapshots > 0 {
            return Err(ImageError::refused(
                "Can't resize a v2 image which has snapshots",
            ));
        }
        drop(header);
        l1_entries(self.geometry.l1_entries_for(length_bytes))?;
        self.check_unlimited(Operation::Resize, ByteRange::new(0, length_bytes))
    }

    /// Up to where nothing is known of the clusters from the front of `range`, if nothing is.
    fn end_of_nothing(&self, range: ByteRange) -> Result<Option<u64>, ImageError> {
        self.check_sound()?;
        Ok(self
            .is_without_table(range.offset())?
            .then(|| self.end_without_tables(range)))
    }

    /// Gives up L2 tables that are not needed for a disk of `length_bytes`. Their entries are empty.
    fn forget_tables(&self, length_bytes: u64) {
        let needed = self.geometry.l1_entries_for(length_bytes);
        let mut l1 = self.l1.borrow_mut();
        for index in needed..l1.len() {
            let Some(table) = L1Entry(l1.word(index)).table() else {
                continue;
            };
            if !l1.set(index, 0) {
                continue;
            }
            // Changes that were not written must never be: the cluster may become something else.
            self.l2.forget_table(table, self.geometry.cluster_bytes());
            self.fresh.borrow_mut().remove(table);
            self.unlink_cluster(table, Why::Other);
        }
    }

    /// Nothing else writes metadata meanwhile, and nobody is given a cluster.
    async fn cut_off_the_end(&self) -> Result<(), ImageError> {
        let facts = self.file.facts();
        if facts.fixed_length {
            return Ok(());
        }
        self.claims_wait.set(true);
        let cut = self.cut_behind_last_cluster().await;
        self.claims_wait.set(false);
        cut
    }

    async fn cut_behind_last_cluster(&self) -> Result<(), ImageError> {
        let Some(last) = self.last_counted().await else {
            return Ok(());
        };
        let end = self.geometry.host_offset(last.plus(ClusterCount(1))).0;
        if end >= self.file.facts().length_bytes {
            return Ok(());
        }
        Ok(self.file.resize(end).await?)
    }

    /// The last cluster whose count is not 0; `None`: it could not be found, which costs room only.
    async fn last_counted(&self) -> Option<HostCluster> {
        let entries = self.counts.table.borrow().len();
        let mut empty_blocks = 0;
        for index in (0..entries).rev() {
            if self.counts.table.borrow().word(index) == 0 {
                continue;
            }
            match self.last_counted_by(index).await? {
                Some(last) => return Some(last),
                None => empty_blocks += 1,
            }
            if empty_blocks == EMPTY_BLOCKS_MAX {
                return None;
            }
        }
        None
    }

    /// The last cluster with a count in the block at an index of the refcount table.
    async fn last_counted_by(&self, index: u64) -> Option<Option<HostCluster>> {
        let per_block = self.geometry.refcounts_per_block();
        let mut end = HostCluster((index + 1).checked_mul(per_block)?);
        let start = HostCluster(index * per_block);
        while end > start {
            match self.last_counted_before(end)? {
                Look::Load(slice) => {
                    let loaded = self.load(slice, &self.counts.blocks).await;
                    loaded.ok().filter(|loaded| *loaded)?;
                }
                Look::Is(Ok(last)) => return Some(Some(last)),
                Look::Is(Err(first)) => end = first,
            }
        }
        Some(None)
    }
}

/// Blocks that count nothing which are read for the end of the file to be found.
const EMPTY_BLOCKS_MAX: u32 = 64;
