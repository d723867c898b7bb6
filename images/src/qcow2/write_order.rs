//! The order on disk: how what was changed in memory gets to the medium, so that a power cut at any instant leaves a sound
//! image that has lost no more than what was not flushed, and at most room.
//!
//! ```text
//!   all that was changed is taken at one instant; what changes later belongs to the next commit
//!   1  refcount blocks, L2 tables that nothing leads to yet      sync (guest data written before is covered by it)
//!   2  entries of the refcount table, if any were changed        sync
//!   3  L2 tables in use, L1 entries, if any were changed         sync
//!   4  what was unlinked by 3 is given up, see `frees`
//! ```
//! So an L2 entry never leads to a cluster whose count or data is not durable, and nothing is used again before its unlinking
//! is durable.
//!
//! A write that fails leaves everything counted as changed, and the next commit begins anew. A sync that fails is never
//! tried again: nobody knows what it lost.

use std::rc::Rc;

use blockyard_storage::{Buffer, ByteRange, LocalFuture, ZeroMode};

use crate::error::ImageError;
use crate::qcow2::free_list::FreeList;
use crate::qcow2::fresh::{FreshPart, TableKind};
use crate::qcow2::image::{ImageState, Qcow2};
use crate::qcow2::overlap::Metadata;
use crate::qcow2::table_cache::ChangedSlice;
use crate::qcow2::units::HostOffset;
use crate::qcow2::waiting::all_of;
use crate::qcow2::word_table::ChangedSectors;

/// Longest write of metadata in bytes, and the piece in which tables are copied.
const WRITE_BYTES_MAX: usize = 1 << 20;

/// Writes of metadata in flight together.
const WRITES_MAX: usize = 16;

/// What was changed, as it was at one instant.
struct Batch {
    counts: Vec<ChangedSlice>,
    count_table: Vec<ChangedSectors>,
    /// Slices of L2 tables that nothing on the medium leads to.
    fresh_l2: Vec<ChangedSlice>,
    /// What of fresh tables is in no cache.
    fresh_parts: Vec<(Metadata, FreshPart)>,
    /// First bytes of the fresh tables.
    fresh: Vec<HostOffset>,
    l2: Vec<ChangedSlice>,
    l1: Vec<ChangedSectors>,
    unlinked: FreeList,
    /// Room that comes back with it.
    given_up_bytes: u64,
}

/// Bytes on their way to the file.
struct Piece {
    at: HostOffset,
    bytes: Vec<u8>,
    kind: Metadata,
}

impl Qcow2 {
    /// Makes everything durable that completed before: data that was written and published, zeroes, discards.
    ///
    /// # Errors
    /// What the storage says. A failed write may succeed the next time; after a failed sync the image refuses every change and
    /// every flush, for good.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the flush to whoever comes next; nothing is written by halves.
    pub async fn flush(&self) -> Result<(), ImageError> {
        if self.state.options.read_only {
            return Ok(());
        }
        self.told(self.commit()).await
    }

    /// Whether so much room was given up that a flush is worth it, so that others may have it. Twice as much is flushed by the
    /// next change, which waits for it: whoever can has it done before.
    pub fn wants_flush(&self) -> bool {
        self.state.has_unlinked()
    }

    /// A commit that begins from now on, alone or together with others who want one.
    pub(super) async fn commit(&self) -> Result<(), ImageError> {
        let commits = &self.commits;
        let wanted = commits.begun.get() + 1;
        let ended = || {
            (commits.ended.get() >= wanted).then(|| match commits.last.borrow().clone() {
                None => Ok(()),
                Some(error) => Err(error),
            })
        };
        loop {
            if let Some(outcome) = self.serial.drive(ended).await {
                return outcome;
            }
            self.begin_commit();
        }
    }

    /// The same, reference counts included where they may be late otherwise.
    pub(super) async fn commit_counts(&self) -> Result<(), ImageError> {
        self.state.counts_wanted.set(true);
        self.commit().await
    }

    fn begin_commit(&self) {
        let (state, commits) = (Rc::clone(&self.state), Rc::clone(&self.commits));
        self.serial.start(Box::pin(async move {
            // Nothing is taken before this is polled first, and from then on nobody can join.
            commits.begun.set(commits.begun.get() + 1);
            let outcome = state.commit().await;
            *commits.last.borrow_mut() = outcome.err();
            commits.ended.set(commits.begun.get());
        }));
    }
}

impl ImageState {
    pub(super) async fn commit(&self) -> Result<(), ImageError> {
        self.check_sound()?;
        self.free_released().await;
        let batch = self.take_changed();
        let outcome = self.write(&batch).await;
        self.after(batch, outcome.is_ok());
        outcome?;
        self.free_released().await;
        Ok(())
    }

    fn take_changed(&self) -> Batch {
        let late = self.options.lazy_refcounts
            && !self.counts_wanted.replace(false)
            && !self.counts.blocks.is_mostly_changed();
        let (counts, count_table) = match late {
            true => (Vec::new(), Vec::new()),
            false => (
                self.counts.blocks.take_changed(),
                self.counts.table.borrow_mut().take_changed(),
            ),
        };
        let fresh = self.fresh.borrow();
        let of_fresh = |slice: &ChangedSlice| {
            let cluster = self.geometry.host_cluster(slice.at);
            fresh.contains(self.geometry.host_offset(cluster))
        };
        let (fresh_l2, l2) = self.l2.take_changed().into_iter().partition(of_fresh);
        let mut written = fresh.places(TableKind::L2);
        let mut parts: Vec<(Metadata, FreshPart)> = Vec::new();
        let mut add_parts = |tables: &[HostOffset], kind| {
            let parts_of = |table: &HostOffset| fresh.parts(*table);
            parts.extend(tables.iter().flat_map(parts_of).map(|part| (kind, part)));
        };
        add_parts(&written, Metadata::ActiveL2);
        if !late {
            let blocks = fresh.places(TableKind::RefcountBlock);
            add_parts(&blocks, Metadata::RefcountBlock);
            written.extend(blocks);
        }
        drop(fresh);
        Batch {
            counts,
            count_table,
            fresh_l2,
            fresh_parts: parts,
            fresh: written,
            l2,
            l1: self.l1.borrow_mut().take_changed(),
            unlinked: self.unlinked.take(),
            given_up_bytes: self.given_up_bytes.take(),
        }
    }

    async fn write(&self, batch: &Batch) -> Result<(), ImageError> {
        let counts = slice_pieces(&batch.counts, Metadata::RefcountBlock);
        let fresh = slice_pieces(&batch.fresh_l2, Metadata::ActiveL2);
        self.write_pieces(counts.chain(fresh)).await?;
        for (kind, part) in &batch.fresh_parts {
            self.write_fresh(*kind, part).await?;
        }
        self.sync_data_file().await?;
        self.sync().await?;
        {
            let mut fresh = self.fresh.borrow_mut();
            // From here on something on the medium may lead to them.
            batch.fresh.iter().for_each(|table| fresh.remove(*table));
        }
        if !batch.count_table.is_empty() {
            let table = sector_pieces(&batch.count_table, Metadata::RefcountTable);
            self.write_pieces(table).await?;
            self.sync().await?;
        }
        if !batch.l2.is_empty() || !batch.l1.is_empty() {
            let l2 = slice_pieces(&batch.l2, Metadata::ActiveL2);
            let l1 = sector_pieces(&batch.l1, Metadata::ActiveL1);
            self.write_pieces(l2.chain(l1)).await?;
            self.sync().await?;
        }
        Ok(())
    }

    /// Gives back what was taken: written, or changed as before.
    fn after(&self, batch: Batch, written: bool) {
        self.counts.blocks.given_back(&batch.counts, written);
        self.l2.given_back(&batch.fresh_l2, written);
        self.l2.given_back(&batch.l2, written);
        if written {
            self.retire(batch.unlinked);
            return;
        }
        let mut table = self.counts.table.borrow_mut();
        batch.count_table.iter().for_each(|s| table.not_written(s));
        let mut l1 = self.l1.borrow_mut();
        batch.l1.iter().for_each(|sectors| l1.not_written(sectors));
        self.unlinked.borrow_mut().append(batch.unlinked);
        self.gives_up_room(batch.given_up_bytes);
    }

    /// Writes counts that were changed without a sync, so that they may go from the cache; `false`: there are none, or they cannot
    /// be written. Counts may get to the medium at any time: one that is too high there costs room, and it is lowered only when
    /// nothing on the medium leads to its cluster. Blocks that stand nowhere yet stay, as they are read from nowhere else.
    pub(super) async fn write_counts_back(&self) -> bool {
        let slices = {
            let fresh = self.fresh.borrow();
            self.counts.blocks.take_changed_of(|slice| {
                let table = self.geometry.host_cluster(slice);
                !fresh.contains(self.geometry.host_offset(table))
            })
        };
        if slices.is_empty() {
            return false;
        }
        let pieces = slice_pieces(&slices, Metadata::RefcountBlock);
        let written = self.write_pieces(pieces).await.is_ok();
        self.counts.blocks.given_back(&slices, written);
        written
    }

    /// Writes a part of a fresh table that is in no cache.
    async fn write_fresh(&self, kind: Metadata, part: &FreshPart) -> Result<(), ImageError> {
        let range = ByteRange::new(part.at.0, part.length_bytes);
        let Some(origin) = part.origin else {
            self.overlaps
                .check(self, range, Some(kind))
                .map_err(ImageError::Corrupt)?;
            // It keeps the room that was reserved for it, for entries to come.
            let mode = ZeroMode {
                may_unmap: false,
                no_fallback: false,
            };
            return Ok(self.file.zero(range, mode).await?);
        };
        for piece in range.pieces(WRITE_BYTES_MAX as u64) {
            let from = origin.plus(piece.offset() - range.offset());
            let length = usize::try_from(piece.length()).unwrap_or(WRITE_BYTES_MAX);
            let mut bytes = self.read_metadata(from, length).await?;
            self.clear_copied(&mut bytes);
            self.write_metadata(HostOffset(piece.offset()), &bytes, Some(kind))
                .await?;
        }
        Ok(())
    }

    /// Writes metadata, neighbours together, a few writes at a time; nothing of it is in flight when this ends.
    async fn write_pieces(&self, pieces: impl Iterator<Item = Piece>) -> Result<(), ImageError> {
        let facts = self.file.facts();
        let bytes_max = WRITE_BYTES_MAX.min(facts.transfer_max_bytes as usize);
        let mut joined: Option<Piece> = None;
        let mut group: Vec<Piece> = Vec::new();
        for piece in pieces {
            match &mut joined {
                Some(last)
                    if last.at.plus(last.bytes.len() as u64) == piece.at
                        && last.kind == piece.kind
                        && last.bytes.len() + piece.bytes.len() <= bytes_max =>
                {
                    last.bytes.extend(piece.bytes);
                }
                _ => {
                    group.extend(joined.replace(piece));
                    if group.len() == WRITES_MAX {
                        self.write_group(std::mem::take(&mut group)).await?;
                    }
                }
            }
        }
        group.extend(joined);
        self.write_group(group).await
    }

    async fn write_group(&self, group: Vec<Piece>) -> Result<(), ImageError> {
        let mut writes: Vec<LocalFuture<'_, Result<(), ImageError>>> = Vec::new();
        for piece in &group {
            let range = ByteRange::new(piece.at.0, piece.bytes.len() as u64);
            self.overlaps
                .check(self, range, Some(piece.kind))
                .map_err(ImageError::Corrupt)?;
        }
        for Piece { at, bytes, .. } in group {
            writes.push(Box::pin(async move {
                let written = self.file.write(at.0, Buffer::copy_of(&bytes)).await;
                Ok(written.outcome?)
            }));
        }
        all_of(writes).await
    }
}

/// What was changed in slices, as bytes to write.
fn slice_pieces(slices: &[ChangedSlice], kind: Metadata) -> impl Iterator<Item = Piece> {
    slices.iter().map(move |slice| Piece {
        at: slice.at.plus(slice.changed.start as u64),
        bytes: slice
            .bytes
            .get(slice.changed.clone())
            .unwrap_or(&[])
            .to_vec(),
        kind,
    })
}

fn sector_pieces(sectors: &[ChangedSectors], kind: Metadata) -> impl Iterator<Item = Piece> {
    sectors.iter().map(move |sectors| Piece {
        at: sectors.at,
        bytes: sectors.bytes.clone(),
        kind,
    })
}
