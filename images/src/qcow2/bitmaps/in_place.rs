//! Storing without room: where the file system is full, bitmaps go where the image has clusters for them already. What would need
//! one more is said to have changed as a whole: a bitmap may say too much, never too little.
//!
//! ```text
//!   1  the directory says that those are in use which the bitmaps to be stored take the place of; sync
//!   2  clusters of bits and tables overwritten where they stand; sync (everything that was written to the disk before is durable
//!      then, too)
//!   3  the directory says that they are valid; sync
//!   4  header: nothing is recorded outside any more
//! ```
//! A power cut in between leaves bitmaps that are in use, or what was recorded outside. No cluster changes its owner.
//!
//! Spec: qcow2, "Bitmaps", "Bitmap table" (an entry that says that all bits are set takes no cluster).

use std::rc::Rc;

use blockyard_storage::StorageError;

use super::BitSource;
use super::storing::{BitmapToStore, Stored, is_all_set};
use crate::error::ImageError;
use crate::qcow2::header_updates::interrupted;
use crate::qcow2::image::{ImageState, Qcow2};
use crate::qcow2::layout::bitmaps::{Bitmap, BitmapCluster, flags};
use crate::qcow2::layout::entries::word_at;
use crate::qcow2::layout::header::autoclear;
use crate::qcow2::overlap::Metadata;
use crate::qcow2::units::HostOffset;

impl Qcow2 {
    /// Puts bitmaps in the place of those with their names, as `no_room` says that there is none for new ones.
    ///
    /// # Errors
    /// Which bitmaps the image has no place for; all others are stored. What the storage says: the bitmaps are in use then.
    pub(super) async fn store_in_place(
        &self,
        bitmaps: &[BitmapToStore<'_>],
        no_room: StorageError,
    ) -> Result<Stored, ImageError> {
        let before = self.bitmaps().to_vec();
        let (mut in_use, mut valid) = (before.clone(), before);
        let (mut places, mut homeless) = (Vec::new(), Vec::new());
        for bitmap in bitmaps {
            match valid.iter().position(|old| self.has_place(old, bitmap)) {
                Some(place) => places.push((place, bitmap)),
                None => homeless.push(String::from_utf8_lossy(bitmap.name)),
            }
        }
        for (place, bitmap) in &places {
            if let (Some(old), Some(new)) = (in_use.get_mut(*place), valid.get_mut(*place)) {
                old.flags |= flags::IN_USE;
                new.flags = if bitmap.auto { flags::AUTO } else { 0 };
            }
        }
        if !places.is_empty() {
            self.put_directory(in_use).await?;
        }
        let mut stored = Stored::default();
        for (place, bitmap) in &places {
            if let Some(old) = valid.get(*place)
                && !self.overwrite_bits(old.table, bitmap.bits, old).await?
            {
                stored.says_too_much.push(bitmap.name.to_vec());
            }
        }
        if !places.is_empty() {
            self.commit_counts().await?;
            self.put_directory(valid).await?;
        }
        if homeless.is_empty() {
            self.end_activity_in_place().await?;
            return Ok(stored);
        }
        let names = homeless.join("', '");
        Err(ImageError::refused(format!("'{names}': {no_room}")))
    }

    /// Whether a bitmap can be stored where this one stands.
    fn has_place(&self, old: &Bitmap, bitmap: &BitmapToStore<'_>) -> bool {
        let bits = self.length_bytes().div_ceil(bitmap.granularity_bytes);
        old.name == bitmap.name
            && 1 << old.granularity_bits == bitmap.granularity_bytes
            && u64::from(old.table_entries) == bits.div_ceil(self.bits_per_cluster())
    }

    fn bits_per_cluster(&self) -> u64 {
        self.geometry().cluster_bytes().saturating_mul(8)
    }

    /// Overwrites bits and table of a bitmap; whether they say exactly what `source` says, not more.
    async fn overwrite_bits(
        &self,
        table_at: HostOffset,
        source: &dyn BitSource,
        old: &Bitmap,
    ) -> Result<bool, ImageError> {
        let (geometry, per_cluster) = (self.geometry(), self.bits_per_cluster());
        let bits = self.length_bytes().div_ceil(1 << old.granularity_bits);
        let length = usize::try_from(old.table_bytes()).unwrap_or(0);
        let table = self.state.read_metadata(table_at, length).await?;
        let cluster_bytes = usize::try_from(geometry.cluster_bytes()).unwrap_or(0);
        let (mut new_table, mut is_exact) = (table.clone(), true);
        let mut wanted = vec![0; cluster_bytes];
        for index in 0..length / 8 {
            let first = (index as u64).saturating_mul(per_cluster);
            let end = first.saturating_add(per_cluster).min(bits);
            let is_clear = source.next_set(first).is_none_or(|bit| bit >= end);
            wanted.fill(0);
            if !is_clear {
                source.copy_to(first, &mut wanted);
            }
            let word = word_at(&table, index).unwrap_or(0);
            let entry = match BitmapCluster::decode(&geometry, word) {
                Some(BitmapCluster::Stored(at)) => {
                    if self.state.read_metadata(at, cluster_bytes).await? != wanted {
                        self.state.write_metadata(at, &wanted, None).await?;
                    }
                    continue;
                }
                _ if is_clear => BitmapCluster::Clear,
                _ => {
                    is_exact &= is_all_set(&wanted);
                    BitmapCluster::Set
                }
            };
            if let Some(place) = new_table.get_mut(index * 8..index * 8 + 8) {
                place.copy_from_slice(&entry.encode().to_be_bytes());
            }
        }
        if new_table != table {
            self.state
                .write_metadata(table_at, &new_table, None)
                .await?;
        }
        Ok(is_exact)
    }

    /// Overwrites what the directory says of its bitmaps, durably.
    async fn put_directory(&self, bitmaps: Vec<Bitmap>) -> Result<(), ImageError> {
        let state = Rc::clone(&self.state);
        let put = self
            .serial
            .run(move || Box::pin(async move { state.put_directory(bitmaps).await }));
        put.await.unwrap_or_else(|| Err(interrupted()))
    }

    async fn end_activity_in_place(&self) -> Result<(), ImageError> {
        if self.header().activity().is_none() {
            return Ok(());
        }
        let state = Rc::clone(&self.state);
        let ended = self
            .serial
            .run(move || Box::pin(async move { state.end_activity_in_place().await }));
        ended.await.unwrap_or_else(|| Err(interrupted()))
    }
}

impl ImageState {
    /// Nothing else writes metadata meanwhile.
    async fn put_directory(&self, bitmaps: Vec<Bitmap>) -> Result<(), ImageError> {
        self.check_sound()?;
        let mut at = HostOffset(self.directory().offset());
        let before = self.bitmaps.borrow().clone();
        for (old, new) in before.iter().zip(&bitmaps) {
            // Names and so lengths are the same.
            let entry = new.encode()?;
            if old.flags != new.flags {
                let kind = Some(Metadata::BitmapDirectory);
                self.write_metadata(at, &entry, kind).await?;
            }
            at = at.plus(entry.len() as u64);
        }
        self.sync().await?;
        *self.bitmaps.borrow_mut() = bitmaps;
        // What is valid from now on is to be marked before the disk changes again.
        self.marked.set(None);
        Ok(())
    }

    async fn end_activity_in_place(&self) -> Result<(), ImageError> {
        self.check_sound()?;
        let mut new = self.header.borrow().clone();
        new.extensions.activity = None;
        new.autoclear &= !autoclear::ACTIVITY;
        self.switch_header(new).await?;
        self.activity_goes_on.set(false);
        Ok(())
    }
}
