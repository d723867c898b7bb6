//! [`Qcow2`]: an image in use.
//!
//! All of its metadata is changed in memory and at once; only reading a table, and writing what was changed, wait for the
//! storage. So no lock is ever held while something is waited for, except turns on clusters of the guest's disk, and whoever
//! gives up waiting leaves tables that are whole.

use std::cell::{Cell, Ref, RefCell};
use std::rc::Rc;

use blockyard_storage::error::{EBADF, EINVAL};
use blockyard_storage::{Buffer, ByteRange, Operation, Storage, StorageError};

use crate::error::{Corruption, ImageError};
use crate::qcow2::check::repair_dirty;
use crate::qcow2::free_list::FreeList;
use crate::qcow2::fresh::{FreshTables, SliceSource};
use crate::qcow2::fresh_room::TableRooms;
use crate::qcow2::layout::bitmaps::Bitmap;
use crate::qcow2::layout::entries::{l2_entry_at, put_l2_entry};
use crate::qcow2::layout::header::{Access, Header, L1_TABLE_BYTES_MAX, incompatible};
use crate::qcow2::layout::snapshots::Snapshot;
use crate::qcow2::leases::Leases;
use crate::qcow2::open::{DiskChange, OpenedImage, read_image};
use crate::qcow2::options::Options;
use crate::qcow2::overlap::{Metadata, Overlaps};
use crate::qcow2::refcounts::Refcounts;
use crate::qcow2::runs::ClusterRuns;
use crate::qcow2::table_cache::{Begin, TableCache};
use crate::qcow2::units::{Geometry, GuestOffset, HostOffset, Version};
use crate::qcow2::waiting::{Serial, Turns};
use crate::qcow2::word_table::WordTable;

/// Smallest slice of a refcount block that is read at once, in bytes; a cluster where that is smaller.
const REFCOUNT_SLICE_BYTES: u64 = 4096;

/// A qcow2 image in use. Its methods may be called while others are in flight.
pub struct Qcow2 {
    pub(super) state: Rc<ImageState>,
    /// Whatever writes metadata.
    pub(super) serial: Serial,
    pub(super) commits: Rc<Commits>,
}

/// How many commits have begun and ended, and how the last one ended.
#[derive(Default)]
pub(super) struct Commits {
    pub(super) begun: Cell<u64>,
    pub(super) ended: Cell<u64>,
    pub(super) last: RefCell<Option<ImageError>>,
}

/// Everything that is known of an image, apart from the work that is under way.
pub(super) struct ImageState {
    pub(super) file: Rc<dyn Storage>,
    pub(super) data_file: Option<Rc<dyn Storage>>,
    pub(super) geometry: Geometry,
    pub(super) options: Options,
    pub(super) header: RefCell<Header>,
    pub(super) l1: RefCell<WordTable>,
    pub(super) l2: TableCache,
    pub(super) counts: Refcounts,
    pub(super) fresh: RefCell<FreshTables>,
    pub(super) table_rooms: TableRooms,
    /// Given up, but something on the medium may lead there yet.
    pub(super) unlinked: RefCell<FreeList>,
    /// Room that was given up since the last commit began.
    pub(super) given_up_bytes: Cell<u64>,
    pub(super) leases: Leases<FreeList>,
    /// A write that nobody waits for may still reach these clusters: they are not used again while the image is open.
    pub(super) strayed: RefCell<ClusterRuns>,
    /// Of the clusters that have a place in the guest's disk, those where such a write may reach more than it was asked for.
    pub(super) tainted: RefCell<ClusterRuns>,
    pub(super) turns: Rc<Turns>,
    pub(super) overlaps: Overlaps,
    pub(super) health: RefCell<Health>,
    /// Where the next compressed cluster goes, if the last one left room behind it.
    pub(super) compressed_end: Cell<Option<HostOffset>>,
    pub(super) snapshots: Vec<Snapshot>,
    pub(super) bitmaps: RefCell<Vec<Bitmap>>,
    /// For which changes the bitmaps and the header have been made ready.
    pub(super) marked: Cell<Option<DiskChange>>,
    /// It was marked dirty here.
    pub(super) made_dirty: Cell<bool>,
    /// All changes are recorded outside, as the header says.
    pub(super) activity_goes_on: Cell<bool>,
    /// Nobody is given a cluster for now: the end of the file is being cut off, or taken as a whole.
    pub(super) claims_wait: Cell<bool>,
    /// Reference counts are to be written although they may be late.
    pub(super) counts_wanted: Cell<bool>,
}

/// Whether an image can be worked with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Health {
    Sound,
    /// What was written last may be lost; reads go on.
    Unflushed(String),
    /// It contradicts itself.
    Corrupt(String),
}

/// Clusters of L1 tables of internal snapshots that are protected, of all snapshots together: they cost 8 MiB.
const INACTIVE_L1_CLUSTERS_MAX: u64 = 4 << 20;

impl Qcow2 {
    /// Reads, checks and uses an image. One that was left dirty is repaired first, unless it is only read. `file` and `data_file`
    /// take any offset and length.
    ///
    /// # Errors
    /// As [`read_image`], [`repair_dirty`] and [`new`](Self::new).
    ///
    /// # Cancel safety
    /// As [`repair_dirty`].
    pub async fn open(
        file: Rc<dyn Storage>,
        data_file: Option<Rc<dyn Storage>>,
        options: Options,
    ) -> Result<Rc<Self>, ImageError> {
        let access = match options.read_only {
            true => Access::ReadOnly,
            false => Access::ReadWrite,
        };
        let mut image = read_image(&*file, access).await?;
        if image.header.is_dirty() && !options.read_only {
            repair_dirty(&file).await?;
            image = read_image(&*file, access).await?;
        }
        Self::new(file, data_file, image, options)
    }

    /// Uses an image that has been read and checked, for reading and writing unless `options` say otherwise.
    ///
    /// # Errors
    /// Refused where `data_file` is missing, or is there for an image that has its data in its own file, and where the image
    /// was not read for what `options` want.
    pub fn new(
        file: Rc<dyn Storage>,
        data_file: Option<Rc<dyn Storage>>,
        image: OpenedImage,
        options: Options,
    ) -> Result<Rc<Self>, ImageError> {
        let state = ImageState::new(file, data_file, image, options)?;
        Ok(Rc::new(Self {
            state: Rc::new(state),
            serial: Serial::default(),
            commits: Rc::default(),
        }))
    }

    /// Length of the guest's disk in bytes.
    pub fn length_bytes(&self) -> u64 {
        self.state.header.borrow().guest_bytes()
    }

    /// The sizes that all arithmetic depends on.
    pub fn geometry(&self) -> Geometry {
        self.state.geometry
    }

    /// The header as of now. Not to be held while something is waited for.
    pub fn header(&self) -> Ref<'_, Header> {
        self.state.header.borrow()
    }

    /// Its internal snapshots, in the order of their table.
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.state.snapshots
    }

    /// Its bitmaps as they stand in the image now. Not to be held while something is waited for.
    pub fn bitmaps(&self) -> Ref<'_, [Bitmap]> {
        Ref::map(self.state.bitmaps.borrow(), Vec::as_slice)
    }

    /// How it is used.
    pub fn options(&self) -> &Options {
        &self.state.options
    }

    /// The storage that [`Source::Data`](crate::qcow2::lookup::Source) refers to: the data file if there is one, else the image
    /// file.
    pub fn data_storage(&self) -> &Rc<dyn Storage> {
        self.state.data_storage()
    }

    /// The image file, where metadata and compressed clusters are.
    pub fn file(&self) -> &Rc<dyn Storage> {
        &self.state.file
    }

    /// Gives memory back that was not used since the last call: what `cache-clean-interval` is for. Whoever owns a clock
    /// calls it.
    pub fn clean_caches(&self) {
        self.state.l2.drop_unused();
        self.state.counts.blocks.drop_unused();
    }

    /// Reads the slice of an L2 table at `at` into the cache.
    pub(super) async fn load_l2(&self, at: HostOffset) -> Result<(), ImageError> {
        self.load(at, &self.state.l2).await
    }

    /// Reads the slice of a refcount block at `at` into the cache.
    pub(super) async fn load_counts(&self, at: HostOffset) -> Result<(), ImageError> {
        self.load(at, &self.state.counts.blocks).await
    }

    async fn load(&self, at: HostOffset, cache: &TableCache) -> Result<(), ImageError> {
        while !self.state.load(at, cache).await? {
            self.commit_counts().await?;
        }
        Ok(())
    }

    /// What a caller hears of a contradiction. A fatal one ends the image and is noted in its header, if it can be written.
    async fn corrupt(&self, mut corruption: Corruption) -> ImageError {
        corruption.fatal &= !self.state.options.read_only;
        if !corruption.fatal {
            return ImageError::Corrupt(corruption);
        }
        let text = corruption.text.clone();
        let before = self.state.health.replace(Health::Corrupt(text.clone()));
        if matches!(before, Health::Corrupt(_)) {
            self.state.health.replace(before);
            return ImageError::Broken(text);
        }
        if self.state.geometry.version() == Version::V3 {
            // A failure changes nothing: the image takes no further request anyway.
            let _ = self
                .write_header(|header| header.incompatible |= incompatible::CORRUPT)
                .await;
        }
        ImageError::Corrupt(corruption)
    }

    /// What a caller hears of `work`. Everything that callers may ask for goes through here once, and nothing else does.
    pub(super) async fn told<T>(
        &self,
        work: impl Future<Output = Result<T, ImageError>>,
    ) -> Result<T, ImageError> {
        match work.await {
            Err(ImageError::Corrupt(corruption)) => Err(self.corrupt(corruption).await),
            other => other,
        }
    }
}

impl ImageState {
    fn new(
        file: Rc<dyn Storage>,
        data_file: Option<Rc<dyn Storage>>,
        image: OpenedImage,
        options: Options,
    ) -> Result<Self, ImageError> {
        let wanted = match options.read_only {
            true => matches!(image.access, Access::ReadOnly | Access::ReadWrite),
            false => image.access == Access::ReadWrite,
        };
        if !wanted {
            return Err(ImageError::refused_because(
                "The image was not opened for this",
                format!("it was opened for {:?}", image.access),
            ));
        }
        let others = other_metadata(&image, file.facts().length_bytes);
        let header = image.header;
        let geometry = header.geometry;
        if header.has_data_file() != data_file.is_some() {
            return Err(ImageError::refused(match data_file {
                None => "'data-file' is required for this image",
                Some(_) => "'data-file' can only be set for images with an external data file",
            }));
        }
        let cluster_bytes = geometry.cluster_bytes();
        let entry_bytes = options.l2_cache_entry_bytes.clamp(512, cluster_bytes);
        let counts = Refcounts::new(
            WordTable::new(image.refcount_table, header.refcount_table),
            TableCache::new(
                slice_bytes(REFCOUNT_SLICE_BYTES.min(cluster_bytes)),
                options.refcount_cache_bytes,
            ),
            geometry.clusters_for(file.facts().length_bytes),
        );
        let state = Self {
            file,
            data_file,
            geometry,
            l1: RefCell::new(WordTable::new(image.l1_table, header.l1_table)),
            l2: TableCache::new(slice_bytes(entry_bytes), options.l2_cache_bytes),
            counts,
            fresh: RefCell::default(),
            table_rooms: TableRooms::default(),
            unlinked: RefCell::default(),
            given_up_bytes: Cell::new(0),
            leases: Leases::default(),
            strayed: RefCell::default(),
            tainted: RefCell::default(),
            turns: Rc::default(),
            overlaps: Overlaps::new(options.overlap_checks, &geometry, others),
            health: RefCell::new(Health::Sound),
            compressed_end: Cell::new(None),
            snapshots: image.snapshots,
            bitmaps: RefCell::new(image.bitmaps),
            marked: Cell::new(None),
            made_dirty: Cell::new(false),
            activity_goes_on: Cell::new(false),
            claims_wait: Cell::new(false),
            counts_wanted: Cell::new(false),
            header: RefCell::new(header),
            options,
        };
        if !options.read_only {
            state.overlaps.rebuild(&state);
        }
        Ok(state)
    }

    pub(super) fn data_storage(&self) -> &Rc<dyn Storage> {
        self.data_file.as_ref().unwrap_or(&self.file)
    }

    /// Whether guest data lives at the guest's own offsets in a file of its own.
    pub(super) fn has_data_file(&self) -> bool {
        self.data_file.is_some()
    }

    /// Refuses to read from an image that contradicts itself.
    pub(super) fn check_readable(&self) -> Result<(), ImageError> {
        match &*self.health.borrow() {
            Health::Corrupt(text) => Err(ImageError::Broken(text.clone())),
            Health::Sound | Health::Unflushed(_) => Ok(()),
        }
    }

    /// Refuses to change an image that must not be changed.
    pub(super) fn check_sound(&self) -> Result<(), ImageError> {
        match &*self.health.borrow() {
            Health::Corrupt(text) | Health::Unflushed(text) => {
                Err(ImageError::Broken(text.clone()))
            }
            Health::Sound => Ok(()),
        }
    }

    /// Refuses a change of `range` that the image cannot take. The last cluster may be used as a whole.
    pub(super) fn check_change(
        &self,
        operation: Operation,
        range: ByteRange,
    ) -> Result<(), ImageError> {
        self.check_unlimited(operation, range)?;
        let length = self.header.borrow().guest_bytes();
        let clusters = self.geometry.clusters_for(length);
        let end = clusters.0.saturating_mul(self.geometry.cluster_bytes());
        if range.is_empty() || range.end() > end {
            return Err(StorageError::new(operation, range, EINVAL).into());
        }
        Ok(())
    }

    /// Refuses a change that the image cannot take wherever it is.
    pub(super) fn check_unlimited(
        &self,
        operation: Operation,
        range: ByteRange,
    ) -> Result<(), ImageError> {
        if self.options.read_only {
            return Err(StorageError::new(operation, range, EBADF).into());
        }
        self.check_sound()
    }

    /// Reads a slice into its cache; `false`: there is no room before something is written. The caller holds a lease on
    /// the table.
    pub(super) async fn load(
        &self,
        at: HostOffset,
        cache: &TableCache,
    ) -> Result<bool, ImageError> {
        let loading = match cache.begin_load(at).await {
            Begin::Present => return Ok(true),
            Begin::Full => return Ok(false),
            Begin::Load(loading) => loading,
        };
        let cluster = self.geometry.host_cluster(at);
        let table = self.geometry.host_offset(cluster);
        let source = self.fresh.borrow().source(table, at);
        let slice_bytes = cache.slice_bytes();
        let from = match source {
            SliceSource::Zeroes => None,
            SliceSource::File => Some(at),
            SliceSource::Copy(from) => Some(from),
        };
        let mut bytes = match from {
            None => vec![0; slice_bytes],
            Some(from) => {
                let kind = match std::ptr::eq(cache, &self.l2) {
                    true => "L2 table",
                    false => "Refcount block",
                };
                self.check_within(kind, ByteRange::new(from.0, slice_bytes as u64))?;
                self.read_metadata(from, slice_bytes).await?
            }
        };
        if let SliceSource::Copy(_) = source {
            self.clear_copied(&mut bytes);
        }
        let new = source != SliceSource::File;
        loading.finish(bytes, new);
        if new {
            self.fresh.borrow_mut().loaded(table, at);
        }
        Ok(true)
    }

    /// Refuses a table that the file does not hold: it would read as zeroes, which is an empty disk, or free clusters that are in
    /// use. A file that was cut off looks like that.
    fn check_within(&self, kind: &str, range: ByteRange) -> Result<(), ImageError> {
        let length = self.file.facts().length_bytes;
        let is_held = range.length() <= length && range.offset() <= length - range.length();
        match is_held {
            true => Ok(()),
            false => Err(ImageError::Corrupt(Corruption {
                text: format!(
                    "{kind} at {:#x} is behind the end of the image file",
                    range.offset()
                ),
                at: Some(HostOffset(range.offset())),
                length_bytes: Some(range.length()),
                fatal: false,
            })),
        }
    }

    /// Reads metadata; what lies behind the end of the file is zeroes.
    pub(super) async fn read_metadata(
        &self,
        at: HostOffset,
        length: usize,
    ) -> Result<Vec<u8>, ImageError> {
        let read = self.file.read(at.0, Buffer::zeroed(length)).await;
        read.outcome?;
        Ok(read.buffer.as_slice().to_vec())
    }

    /// Writes metadata of a kind, if nothing else stands there.
    pub(super) async fn write_metadata(
        &self,
        at: HostOffset,
        bytes: &[u8],
        kind: Option<Metadata>,
    ) -> Result<(), ImageError> {
        let range = ByteRange::new(at.0, bytes.len() as u64);
        self.overlaps
            .check(self, range, kind)
            .map_err(ImageError::Corrupt)?;
        let written = self.file.write(at.0, Buffer::copy_of(bytes)).await;
        Ok(written.outcome?)
    }

    /// Takes the flag from L2 entries that are copied: their clusters are shared with the table they come from.
    pub(super) fn clear_copied(&self, slice: &mut [u8]) {
        // Entries are as long as a slice is short: the division has no rest.
        let entries = slice.len() / self.geometry.l2_entry_bytes() as usize;
        for index in 0..entries {
            if let Some(entry) = l2_entry_at(&self.geometry, slice, index)
                && entry.is_copied()
            {
                let _ = put_l2_entry(&self.geometry, slice, index, entry.with_copied(false));
            }
        }
    }

    /// First byte of the guest's cluster that holds `offset`.
    pub(super) fn cluster_start(&self, offset: u64) -> u64 {
        let cluster = self.geometry.guest_cluster(GuestOffset(offset));
        self.geometry.guest_offset(cluster).0
    }
}

/// Metadata that neither the L1 table nor the refcount table leads to.
fn other_metadata(image: &OpenedImage, file_bytes: u64) -> Vec<(Metadata, ByteRange)> {
    let inactive = inactive_l1_tables(image, file_bytes).into_iter();
    let l1_tables = inactive.map(|range| (Metadata::InactiveL1, range));
    let mut others = vec![(Metadata::SnapshotTable, image.snapshot_table)];
    others.extend(l1_tables);
    if let Some(directory) = image.header.extensions.bitmaps
        && image.header.bitmaps_valid()
    {
        let range = ByteRange::new(directory.directory.0, directory.directory_bytes);
        others.push((Metadata::BitmapDirectory, range));
    }
    others
}

/// Where L1 tables of internal snapshots are, as far as they are in the file. An image may have 65535 of them that say they are
/// 32 GiB long, all in one place: overlapping ones become one, and [`INACTIVE_L1_CLUSTERS_MAX`] bounds what is kept.
fn inactive_l1_tables(image: &OpenedImage, file_bytes: u64) -> Vec<ByteRange> {
    let cluster_bytes = image.header.geometry.cluster_bytes();
    let tables = image.snapshots.iter().map(|snapshot| {
        let length = (u64::from(snapshot.l1_entries) * 8).min(L1_TABLE_BYTES_MAX);
        ByteRange::new(snapshot.l1_table.0, length).clamp_end(file_bytes)
    });
    let mut tables: Vec<ByteRange> = tables.filter(|table| !table.is_empty()).collect();
    tables.sort_unstable_by_key(ByteRange::offset);
    let mut merged: Vec<ByteRange> = Vec::new();
    let mut clusters = 0;
    for table in tables {
        match merged.last_mut() {
            Some(last) if table.offset() <= last.end() => {
                let end = last.end().max(table.end());
                clusters += (end - last.end()).div_ceil(cluster_bytes);
                *last = ByteRange::between(last.offset(), end);
            }
            _ => {
                clusters += table.length().div_ceil(cluster_bytes);
                merged.push(table);
            }
        }
        if clusters > INACTIVE_L1_CLUSTERS_MAX {
            break;
        }
    }
    merged
}

/// Slices are not longer than a cluster, which is far below what a `usize` holds.
fn slice_bytes(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
