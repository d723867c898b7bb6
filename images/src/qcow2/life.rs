//! What comes before the first change and after the last: stale bitmaps, the dirty bit, and closing.

use std::rc::Rc;

use blockyard_storage::{ByteRange, Operation};

use crate::error::ImageError;
use crate::qcow2::header_updates::interrupted;
use crate::qcow2::image::{ImageState, Qcow2};
use crate::qcow2::layout::entries::{L1Entry, word_at};
use crate::qcow2::layout::header::incompatible;
use crate::qcow2::open::DiskChange;
use crate::qcow2::overlap::Metadata;
use crate::qcow2::stale_bitmaps::BeforeWriting;
use crate::qcow2::units::HostOffset;

/// Commits in a row that closing takes without any of them freeing something: counts cannot be read or written then.
const COMMITS_IN_VAIN_MAX: usize = 8;

/// L1 entries of internal snapshots whose tables are protected with `overlap-check=all`, of all snapshots together: 32 MiB.
const INACTIVE_ENTRIES_MAX: u64 = 4 << 20;

/// L1 tables of snapshots are read in pieces of so many bytes.
const PIECE_BYTES: u64 = 1 << 20;

impl Qcow2 {
    /// Before anything is changed: what was given up comes back, nobody takes bitmaps for valid that are not, and an
    /// image with lazy counts says that it is in use.
    pub(super) async fn before_change(&self, change: DiskChange) -> Result<(), ImageError> {
        if self.state.has_much_unlinked() {
            self.commit().await?;
        }
        if !self.state.is_ready_for(change) {
            let state = Rc::clone(&self.state);
            let marked = self
                .serial
                .run(move || Box::pin(async move { state.make_ready_for(change).await }))
                .await;
            marked.unwrap_or_else(|| Err(interrupted()))?;
        }
        Ok(())
    }

    /// Says in the image that the bitmaps are in use, durably: what stands there is not to be relied on until they are stored.
    ///
    /// # Errors
    /// `EBADF` for a read-only image; what the storage says.
    pub async fn mark_bitmaps_in_use(&self) -> Result<(), ImageError> {
        let nowhere = ByteRange::default();
        self.state.check_unlimited(Operation::Write, nowhere)?;
        let state = Rc::clone(&self.state);
        let marked = self
            .serial
            .run(move || Box::pin(async move { state.mark_bitmaps_in_use().await }))
            .await;
        self.told(async { marked.unwrap_or_else(|| Err(interrupted())) })
            .await
    }

    /// Makes everything durable, gives back all that was given up, and says that the reference counts are right. Nothing else may
    /// be in flight. The image can be used on afterwards.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    pub async fn close(&self) -> Result<(), ImageError> {
        if self.state.options.read_only {
            return Ok(());
        }
        self.told(self.finish()).await
    }

    /// Clusters that were given up and are counted yet. After [`close`](Self::close) there are none, unless their counts could not
    /// be read or somebody still holds a lease: they are leaks then, for a check to give back.
    pub fn given_up_clusters(&self) -> u64 {
        self.state.given_up().0
    }

    async fn finish(&self) -> Result<(), ImageError> {
        let state = &self.state;
        let (mut least, mut in_vain) = (u64::MAX, 0);
        while in_vain < COMMITS_IN_VAIN_MAX {
            self.commit_counts().await?;
            let left = state.given_up().0;
            if left == 0 && !state.counts.blocks.has_changes() {
                break;
            }
            in_vain = if left < least { 0 } else { in_vain + 1 };
            least = least.min(left);
        }
        if self.state.made_dirty.get() {
            self.write_header(|header| header.incompatible &= !incompatible::DIRTY)
                .await?;
            self.state.made_dirty.set(false);
        }
        Ok(())
    }
}

impl ImageState {
    /// Whether everything that has to stand in the image before such a change is durable there.
    pub(super) fn is_ready_for(&self, change: DiskChange) -> bool {
        let marked = match self.marked.get() {
            None => false,
            Some(DiskChange::Content) => change == DiskChange::Content,
            Some(DiskChange::Length) => true,
        };
        marked && (!self.options.lazy_refcounts || self.header.borrow().is_dirty())
    }

    async fn mark_bitmaps_in_use(&self) -> Result<(), ImageError> {
        let mut bitmaps = self.bitmaps.borrow().clone();
        let changes = BeforeWriting::mark(&self.header.borrow(), &mut bitmaps, DiskChange::Length)?;
        if changes.overwrites.is_empty() {
            return Ok(());
        }
        self.overwrite_directory(&changes).await?;
        self.sync().await?;
        *self.bitmaps.borrow_mut() = bitmaps;
        Ok(())
    }

    async fn overwrite_directory(&self, changes: &BeforeWriting) -> Result<(), ImageError> {
        for overwrite in &changes.overwrites {
            let kind = Some(Metadata::BitmapDirectory);
            self.write_metadata(overwrite.at, &overwrite.bytes, kind)
                .await?;
        }
        Ok(())
    }

    async fn make_ready_for(&self, change: DiskChange) -> Result<(), ImageError> {
        if self.is_ready_for(change) {
            return Ok(());
        }
        if self.overlaps.wants_inactive_l2() && self.marked.get().is_none() {
            self.read_inactive_l2().await?;
        }
        let mut bitmaps = self.bitmaps.borrow().clone();
        let changes = BeforeWriting::mark(&self.header.borrow(), &mut bitmaps, change)?;
        self.overwrite_directory(&changes).await?;
        let dirties = self.options.lazy_refcounts && !self.header.borrow().is_dirty();
        let clear_autoclear = self.broken_promises(changes.clear_autoclear);
        if clear_autoclear != 0 || dirties {
            self.write_header(|header| {
                header.autoclear &= !clear_autoclear;
                if dirties {
                    header.incompatible |= incompatible::DIRTY;
                }
            })
            .await?;
        } else if !changes.is_empty() {
            self.sync().await?;
        }
        self.made_dirty.set(self.made_dirty.get() || dirties);
        *self.bitmaps.borrow_mut() = bitmaps;
        self.marked.set(Some(change));
        Ok(())
    }

    /// Finds the L2 tables of internal snapshots, which are to be protected.
    async fn read_inactive_l2(&self) -> Result<(), ImageError> {
        let mut tables = Vec::new();
        let mut left = INACTIVE_ENTRIES_MAX;
        for snapshot in &self.snapshots {
            let entries = u64::from(snapshot.l1_entries).min(left);
            left -= entries;
            let table = ByteRange::new(snapshot.l1_table.0, entries * 8);
            for piece in table.pieces(PIECE_BYTES) {
                let length = usize::try_from(piece.length()).unwrap_or(0);
                let bytes = self
                    .read_metadata(HostOffset(piece.offset()), length)
                    .await?;
                let words = (0..length / 8).filter_map(|index| word_at(&bytes, index));
                tables.extend(words.filter_map(|word| L1Entry(word).table()));
            }
            if left == 0 {
                break;
            }
        }
        tables.sort_unstable();
        tables.dedup();
        self.overlaps
            .set_inactive_l2(tables, self.geometry.cluster_bytes());
        Ok(())
    }
}
