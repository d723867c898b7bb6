//! Storing: the directory is always written anew, beside the old one.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use blockyard_storage::{ByteRange, Operation};

use super::BitSource;
use crate::error::ImageError;
use crate::qcow2::claims::Claim;
use crate::qcow2::free_list::Why;
use crate::qcow2::growth::Together;
use crate::qcow2::header_updates::interrupted;
use crate::qcow2::image::{ImageState, Qcow2};
use crate::qcow2::layout::bitmaps::{Bitmap, BitmapCluster, flags};
use crate::qcow2::layout::entries::word_at;
use crate::qcow2::layout::extensions::{
    ActivityId, BITMAP_DIRECTORY_BYTES_MAX, BITMAPS_MAX, BitmapsExtension,
};
use crate::qcow2::layout::header::autoclear;
use crate::qcow2::units::{ClusterCount, HostOffset, Version};

/// Longest write in bytes; a cluster where that is longer.
const WRITE_BYTES: u64 = 1 << 20;

/// A bitmap that is to be kept in an image.
pub struct BitmapToStore<'a> {
    /// Its name.
    pub name: &'a [u8],
    /// Bytes that one bit stands for: a power of two.
    pub granularity_bytes: u64,
    /// Whether it records every change (`auto`).
    pub auto: bool,
    /// Its bits, for the whole disk.
    pub bits: &'a dyn BitSource,
}

/// How bitmaps have been stored.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Stored {
    /// Names of those that say that more has changed than has, as there was no room for all of their bits.
    pub says_too_much: Vec<Vec<u8>>,
}

impl Qcow2 {
    /// Puts bitmaps into the image, valid; durable afterwards, with everything that was written to the disk before. They take the
    /// place of those with their names, others come behind. Nobody changes the disk meanwhile; who does so later marks what records
    /// changes as in use. What has been recorded outside ([`begin_activity`](Self::begin_activity)) counts no more.
    ///
    /// Where there is no room, they are stored in the place of those with their names, and say that more has changed than has where
    /// that takes more clusters than these have.
    ///
    /// # Errors
    /// Refused with QEMU's texts where an image cannot keep them; `EBADF` for a read-only image; which bitmaps the image has no place
    /// for where there is no room (all others are stored); what the storage says. The image has its old bitmaps then. If not even
    /// that is known, it takes no change any more.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the old bitmaps or the new ones, without room such as are in use; clusters may be leaked.
    pub async fn store_bitmaps(&self, bitmaps: &[BitmapToStore<'_>]) -> Result<Stored, ImageError> {
        self.state
            .check_unlimited(Operation::Write, ByteRange::default())?;
        self.told(async {
            match self.store(bitmaps).await {
                Ok(()) => Ok(Stored::default()),
                Err(ImageError::Storage(error)) if error.is_out_of_room() => {
                    self.store_in_place(bitmaps, error).await
                }
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Takes a bitmap out of the image, durably; whether it was there. Those that are left stay as they are.
    ///
    /// # Errors
    /// As [`store_bitmaps`](Self::store_bitmaps).
    ///
    /// # Cancel safety
    /// As [`store_bitmaps`](Self::store_bitmaps).
    pub async fn remove_bitmap(&self, name: &[u8]) -> Result<bool, ImageError> {
        self.state
            .check_unlimited(Operation::Write, ByteRange::default())?;
        let mut left = self.bitmaps().to_vec();
        let before = left.len();
        left.retain(|bitmap| bitmap.name != name);
        if left.len() == before {
            return Ok(false);
        }
        let activity = match self.state.activity_goes_on.get() {
            true => self.header().activity(),
            false => None,
        };
        let replaced = self.told(self.replace_directory(left, Placed::default(), activity));
        replaced.await.map(|()| true)
    }

    async fn store(&self, bitmaps: &[BitmapToStore<'_>]) -> Result<(), ImageError> {
        if bitmaps.is_empty() {
            return Ok(());
        }
        if self.geometry().version() == Version::V2 {
            return Err(ImageError::refused(
                "Cannot store dirty bitmaps in qcow2 v2 files",
            ));
        }
        for bitmap in bitmaps {
            self.check_bitmap(bitmap.name, bitmap.granularity_bytes)?;
        }
        let mut placed = Placed::default();
        let mut next = self.bitmaps().to_vec();
        let names = next.iter().map(|old| old.name.clone());
        let places: HashMap<Vec<u8>, usize> = names.zip(0..).collect();
        for bitmap in bitmaps {
            let written = self.write_bitmap(bitmap, &mut placed).await?;
            let place = places.get(bitmap.name);
            match place.and_then(|place| next.get_mut(*place)) {
                Some(old) => *old = written,
                None => next.push(written),
            }
        }
        self.replace_directory(next, placed, None).await
    }

    /// Writes bits and table of one bitmap to free clusters.
    async fn write_bitmap(
        &self,
        bitmap: &BitmapToStore<'_>,
        placed: &mut Placed,
    ) -> Result<Bitmap, ImageError> {
        let guest_bytes = self.length_bytes();
        let bits = guest_bytes.div_ceil(bitmap.granularity_bytes);
        let table = self.write_bits(bitmap.bits, bits, placed).await?;
        // It has been checked.
        let table_entries = u32::try_from(table.len()).unwrap_or(u32::MAX);
        let words = table.into_iter().map(BitmapCluster::encode);
        let bytes = words.flat_map(u64::to_be_bytes).collect();
        Ok(Bitmap {
            table: self.write_together(bytes, placed).await?,
            table_entries,
            flags: if bitmap.auto { flags::AUTO } else { 0 },
            granularity_bits: u8::try_from(bitmap.granularity_bytes.trailing_zeros()).unwrap_or(0),
            name: bitmap.name.to_vec(),
        })
    }

    /// Writes bits to free clusters and says what the table has to lead to.
    async fn write_bits(
        &self,
        source: &dyn BitSource,
        bits: u64,
        placed: &mut Placed,
    ) -> Result<Vec<BitmapCluster>, ImageError> {
        let cluster_bytes = self.geometry().cluster_bytes();
        let per_cluster = cluster_bytes.saturating_mul(8);
        let entries = bits.div_ceil(per_cluster);
        let entries = usize::try_from(entries).unwrap_or(usize::MAX);
        let mut table = vec![BitmapCluster::Clear; entries];
        // Clusters that wait to be written, and which entries are going to lead to them.
        let (mut pending, mut indices) = (Vec::new(), Vec::new());
        let mut next = source.next_set(0);
        while let Some(bit) = next.filter(|bit| *bit < bits) {
            let index = bit / per_cluster;
            let first = index.saturating_mul(per_cluster);
            let length = usize::try_from(cluster_bytes).unwrap_or(0);
            let start = pending.len();
            pending.resize(start + length, 0);
            let cluster = pending.get_mut(start..).unwrap_or(&mut []);
            source.copy_to(first, cluster);
            let place = usize::try_from(index).unwrap_or(usize::MAX);
            if is_all_set(cluster) {
                pending.truncate(start);
                if let Some(entry) = table.get_mut(place) {
                    *entry = BitmapCluster::Set;
                }
            } else {
                indices.push(place);
            }
            if pending.len() as u64 >= WRITE_BYTES {
                self.write_pending(&mut pending, &mut indices, &mut table, placed)
                    .await?;
            }
            next = source.next_set(first.saturating_add(per_cluster));
        }
        self.write_pending(&mut pending, &mut indices, &mut table, placed)
            .await?;
        Ok(table)
    }

    async fn write_pending(
        &self,
        pending: &mut Vec<u8>,
        indices: &mut Vec<usize>,
        table: &mut [BitmapCluster],
        placed: &mut Placed,
    ) -> Result<(), ImageError> {
        let cluster_bytes = self.geometry().cluster_bytes();
        let mut clusters = indices.drain(..);
        let mut rest = pending.as_slice();
        while !rest.is_empty() {
            let wanted = ClusterCount(rest.len() as u64 / cluster_bytes);
            let mut claim = self.claim(wanted).await?;
            let count = claim.count().0.min(wanted.0);
            let at = self.geometry().host_offset(claim.first());
            let length = usize::try_from(count * cluster_bytes).unwrap_or(rest.len());
            let (front, behind) = rest.split_at(length.min(rest.len()));
            claim.writing();
            let written = self.state.write_metadata(at, front, None).await;
            claim.settled();
            placed.claims.push(claim);
            written?;
            for (number, place) in (0..count).zip(&mut clusters) {
                if let Some(entry) = table.get_mut(place) {
                    *entry = BitmapCluster::Stored(at.plus(number * cluster_bytes));
                }
            }
            rest = behind;
        }
        drop(clusters);
        pending.clear();
        Ok(())
    }

    /// Writes bytes to free clusters that stand together.
    async fn write_together(
        &self,
        mut bytes: Vec<u8>,
        placed: &mut Placed,
    ) -> Result<HostOffset, ImageError> {
        let geometry = self.geometry();
        let clusters = geometry.clusters_for(bytes.len() as u64);
        let whole = clusters.0.saturating_mul(geometry.cluster_bytes());
        bytes.resize(usize::try_from(whole).unwrap_or(bytes.len()), 0);
        let mut place = self.claim_together(clusters).await?;
        let at = geometry.host_offset(place.first);
        let piece_bytes = usize::try_from(WRITE_BYTES).unwrap_or(usize::MAX);
        place.writing();
        let mut written = Ok(());
        for (number, piece) in bytes.chunks(piece_bytes).enumerate() {
            let to = at.plus(number as u64 * WRITE_BYTES);
            written = self.state.write_metadata(to, piece, None).await;
            if written.is_err() {
                break;
            }
        }
        place.settled();
        placed.tables.push(place);
        written.map(|()| at)
    }

    /// Makes `next` the bitmaps of the image; what `placed` holds is in use then. What is not among them any more is given up.
    async fn replace_directory(
        &self,
        next: Vec<Bitmap>,
        mut placed: Placed,
        activity: Option<ActivityId>,
    ) -> Result<(), ImageError> {
        let old_directory = self.state.directory();
        let old = self.bitmaps().to_vec();
        let extension = match next.is_empty() {
            true => None,
            false => Some(self.write_directory(&next, &mut placed).await?),
        };
        // The counts of what is new, and all that was written to the disk before.
        self.commit_counts().await?;
        let kept: HashSet<HostOffset> = next.iter().map(|kept| kept.table).collect();
        let mut gone = old;
        gone.retain(|old| !kept.contains(&old.table));
        let state = Rc::clone(&self.state);
        let switched = self
            .serial
            .run(move || {
                Box::pin(async move { state.switch_bitmaps(extension, next, activity).await })
            })
            .await;
        match switched.unwrap_or_else(|| Err(interrupted())) {
            Ok(()) => placed.keep(),
            // Something on the medium may lead there.
            Err(error) if self.state.check_sound().is_err() => {
                placed.keep();
                return Err(error);
            }
            Err(error) => return Err(error),
        }
        self.unlink_table(HostOffset(old_directory.offset()), old_directory.length());
        for bitmap in &gone {
            self.unlink_bitmap(bitmap).await;
        }
        Ok(())
    }

    async fn write_directory(
        &self,
        bitmaps: &[Bitmap],
        placed: &mut Placed,
    ) -> Result<BitmapsExtension, ImageError> {
        let mut directory = Vec::new();
        for bitmap in bitmaps {
            directory.extend(bitmap.encode()?);
        }
        let length_bytes = directory.len() as u64;
        let count = u32::try_from(bitmaps.len()).unwrap_or(u32::MAX);
        if count > BITMAPS_MAX || length_bytes > BITMAP_DIRECTORY_BYTES_MAX {
            return Err(ImageError::refused(
                "Not enough space in the bitmap directory",
            ));
        }
        let at = self.write_together(directory, placed).await?;
        Ok(BitmapsExtension::new(count, at, length_bytes))
    }

    /// Gives up the clusters of a bitmap that nothing on the medium leads to. What cannot be read is leaked.
    async fn unlink_bitmap(&self, bitmap: &Bitmap) {
        let geometry = self.geometry();
        let length = usize::try_from(bitmap.table_bytes()).unwrap_or(0);
        if let Ok(table) = self.state.read_metadata(bitmap.table, length).await {
            for index in 0..length / 8 {
                let word = word_at(&table, index).unwrap_or(0);
                if let Some(BitmapCluster::Stored(at)) = BitmapCluster::decode(&geometry, word) {
                    self.state.unlink_cluster(at, Why::Other);
                }
                if self.state.has_much_unlinked() && self.commit_counts().await.is_err() {
                    return;
                }
            }
        }
        self.unlink_table(bitmap.table, bitmap.table_bytes());
    }

    fn unlink_table(&self, at: HostOffset, length_bytes: u64) {
        let geometry = self.geometry();
        let clusters = geometry.clusters_for(length_bytes);
        if clusters.0 > 0 {
            let first = geometry.host_cluster(at);
            self.state.unlink(first, clusters, Why::Other);
        }
    }
}

/// Clusters that have been written and that nothing leads to yet. Given back when it is dropped.
#[derive(Default)]
struct Placed {
    claims: Vec<Claim>,
    tables: Vec<Together>,
}

impl Placed {
    fn keep(self) {
        self.claims.into_iter().for_each(Claim::keep);
        self.tables.into_iter().for_each(Together::keep);
    }
}

impl ImageState {
    /// Where the directory stands; empty if there is none that is valid.
    pub(super) fn directory(&self) -> ByteRange {
        let header = self.header.borrow();
        let extension = header.extensions.bitmaps;
        let extension = extension.filter(|_| header.bitmaps_valid());
        extension.map_or(ByteRange::default(), |extension| {
            ByteRange::new(extension.directory.0, extension.directory_bytes)
        })
    }

    /// Lets the header say where the directory is. Nothing else writes metadata meanwhile.
    async fn switch_bitmaps(
        &self,
        extension: Option<BitmapsExtension>,
        bitmaps: Vec<Bitmap>,
        activity: Option<ActivityId>,
    ) -> Result<(), ImageError> {
        self.check_sound()?;
        let mut new = self.header.borrow().clone();
        new.extensions.bitmaps = extension;
        new.extensions.activity = activity;
        new.autoclear &= autoclear::KNOWN & !autoclear::BITMAPS;
        if extension.is_some() {
            new.autoclear |= autoclear::BITMAPS;
        }
        if activity.is_some() {
            new.autoclear |= autoclear::ACTIVITY;
        }
        self.switch_header(new).await?;
        self.activity_goes_on.set(activity.is_some());
        *self.bitmaps.borrow_mut() = bitmaps;
        // What is valid from now on is to be marked before the disk changes again.
        self.marked.set(None);
        self.overlaps.set_bitmap_directory(self.directory());
        self.overlaps.rebuild(self);
        Ok(())
    }
}

/// Whether all bits of a cluster are set. The last one of a bitmap has some that stand for nothing, and have to be clear: QEMU takes
/// them for changes once the disk is longer.
///
/// Spec: qcow2, "Bitmap data" (unused tail bits must be zero).
pub(super) fn is_all_set(cluster: &[u8]) -> bool {
    cluster.iter().all(|byte| *byte == u8::MAX)
}
