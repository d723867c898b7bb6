//! Where the guest's bytes are. With the table in memory an answer costs one look-up in the cache.
//!
//! Spec: qcow2, "Cluster mapping", "Extended L2 Entries".

use blockyard_storage::ByteRange;

use crate::error::{Corruption, ImageError};
use crate::qcow2::image::{ImageState, Qcow2};
use crate::qcow2::layout::entries::{
    COMPRESSED, CompressedAt, L1Entry, L2Entry, OFFSET_MASK, ZERO, l2_entry_at,
};
use crate::qcow2::leases::Lease;
use crate::qcow2::units::{GuestCluster, HostOffset, Version};

/// QEMU has a blank too many where it reads.
const INVALID_ENTRY: &str = "Invalid cluster entry found  ";

/// Where a run of the guest's bytes comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// They stand here, one after the other, in the [data storage](Qcow2::data_storage).
    Data {
        /// Where the first byte is.
        at: HostOffset,
    },
    /// They read as zeroes, whatever is below.
    Zero {
        /// Whether room is kept for them.
        allocated: bool,
    },
    /// The backing file decides; without one they read as zeroes.
    Unallocated,
    /// They are part of one compressed cluster, which begins at the multiple of the cluster size below them.
    Compressed(CompressedAt),
}

/// A run of the guest's bytes that come from one place.
#[derive(Clone, Debug)]
pub struct Extent {
    /// Which bytes of the guest's disk.
    pub range: ByteRange,
    /// Where they come from.
    pub source: Source,
    /// As long as this is held, what is named here is not used for anything else.
    pub lease: Lease,
}

/// The answer to a question about tables, or what has to be loaded before there is one.
pub(super) enum Look<T> {
    Is(T),
    Load(HostOffset),
}

/// Where the L2 entry of a cluster stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct EntryPlace {
    /// First byte of the slice that holds it.
    pub(super) slice: HostOffset,
    /// Its index there.
    pub(super) index: usize,
    /// Entries of a slice.
    pub(super) entries: usize,
    /// First byte of the table.
    pub(super) table: HostOffset,
    /// Whether the table has one reference only.
    pub(super) copied: bool,
}

/// Where an L1 entry leads to.
#[derive(Clone, Copy, Debug)]
pub(super) enum TablePlace {
    /// Nowhere: all its clusters are unallocated.
    None,
    Entry(EntryPlace),
}

impl Qcow2 {
    /// What is at the front of `range`, as far as it is of one kind and stands together; at least its first byte. `None`: a
    /// table has to be read first, see [`map`](Self::map). Nothing is checked against the length of the disk.
    ///
    /// # Errors
    /// As [`map`](Self::map).
    pub fn map_now(&self, range: ByteRange) -> Option<Result<Extent, ImageError>> {
        match self.state.look(range) {
            Ok(Look::Is((range, source))) => Some(Ok(Extent {
                range,
                source,
                lease: self.state.leases.take(),
            })),
            // A contradiction has to be noted in the header, which takes its time.
            Ok(Look::Load(_)) | Err(ImageError::Corrupt(_)) => None,
            Err(error) => Some(Err(error)),
        }
    }

    /// Where room is kept for the front of `range`, whether it holds data there or not, and how far that goes: to the end of a
    /// cluster that has room, or over all that have none. What is compressed has none, nor what a table says that is not in
    /// memory.
    pub fn kept_now(&self, range: ByteRange) -> (ByteRange, Option<HostOffset>) {
        let state = &self.state;
        let cluster_bytes = state.geometry.cluster_bytes();
        let mut rest = range;
        loop {
            let cluster = state.geometry.guest_cluster(guest(rest.offset()));
            let end = match state.entry_place(cluster) {
                Ok(TablePlace::None) => state.end_without_tables(rest),
                Ok(TablePlace::Entry(place)) => {
                    let first = ByteRange::new(rest.offset(), 1).align_outward(cluster_bytes);
                    match state.room_at(place, cluster) {
                        Some(at) if rest == range => {
                            let at = at.plus(state.geometry.in_cluster(range.offset()));
                            return (range.clamp_end(first.end()), Some(at));
                        }
                        Some(_) => return (range.clamp_end(rest.offset()), None),
                        None => first.end(),
                    }
                }
                Err(_) => rest.end(),
            };
            if end >= rest.end() {
                return (range, None);
            }
            rest = ByteRange::between(end, rest.end());
        }
    }

    /// What is at the front of `range`, as far as it is of one kind and stands together; at least its first byte. Nothing is
    /// checked against the length of the disk.
    ///
    /// # Errors
    /// Corrupt where the tables contradict themselves, else what the storage says.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn map(&self, range: ByteRange) -> Result<Extent, ImageError> {
        self.told(self.find(range)).await
    }

    pub(super) async fn find(&self, range: ByteRange) -> Result<Extent, ImageError> {
        let _lease = self.state.leases.take();
        loop {
            match self.state.look(range)? {
                Look::Is((range, source)) => {
                    return Ok(Extent {
                        range,
                        source,
                        lease: self.state.leases.take(),
                    });
                }
                Look::Load(slice) => self.load_l2(slice).await?,
            }
        }
    }
}

impl ImageState {
    fn look(&self, range: ByteRange) -> Result<Look<(ByteRange, Source)>, ImageError> {
        self.check_readable()?;
        let place = match self.entry_place(self.geometry.guest_cluster(guest(range.offset())))? {
            TablePlace::Entry(place) => place,
            TablePlace::None => {
                let end = self.end_without_tables(range);
                let run = range.clamp_end(end);
                return Ok(Look::Is((run, Source::Unallocated)));
            }
        };
        let looked = self.l2.read(place.slice, |slice| {
            self.run_at(slice, place, range, |_| true)
        });
        match looked {
            None => Ok(Look::Load(place.slice)),
            Some(Ok(found)) => Ok(Look::Is(found)),
            Some(Err(corruption)) => Err(ImageError::Corrupt(corruption)),
        }
    }

    /// The cluster that an entry keeps, as far as its table is in memory.
    fn room_at(&self, place: EntryPlace, cluster: GuestCluster) -> Option<HostOffset> {
        let entry = self.l2.read(place.slice, |slice| {
            self.entry_in(slice, place, place.index, cluster)
        });
        let entry = entry?.ok()?;
        match entry.word & COMPRESSED {
            0 => self.host_of(&entry),
            _ => None,
        }
    }

    /// Where the entry of a guest cluster stands.
    pub(super) fn entry_place(&self, cluster: GuestCluster) -> Result<TablePlace, ImageError> {
        let geometry = &self.geometry;
        let l1_index = geometry.l1_index(cluster);
        let entry = L1Entry(self.l1.borrow().word(l1_index));
        let Some(table) = entry.table() else {
            return Ok(TablePlace::None);
        };
        if !geometry.is_cluster_start(table) {
            return Err(ImageError::Corrupt(fatal(format!(
                "L2 table offset {:#x} unaligned (L1 index: {})",
                table.0,
                hexadecimal(l1_index)
            ))));
        }
        let entry_bytes = geometry.l2_entry_bytes();
        let slice_bytes = self.l2.slice_bytes() as u64;
        let in_table = geometry.l2_index(cluster) * entry_bytes;
        let in_slice = in_table & (slice_bytes - 1);
        Ok(TablePlace::Entry(EntryPlace {
            slice: HostOffset(table.0 + (in_table - in_slice)),
            // Both are below the size of a slice, which is a usize.
            index: (in_slice / entry_bytes) as usize,
            entries: (slice_bytes / entry_bytes) as usize,
            table,
            copied: entry.is_copied(),
        }))
    }

    /// Whether no table leads to the cluster that holds `offset`.
    pub(super) fn is_without_table(&self, offset: u64) -> Result<bool, ImageError> {
        let place = self.entry_place(self.geometry.guest_cluster(guest(offset)))?;
        Ok(matches!(place, TablePlace::None))
    }

    /// Up to where no L1 entry leads to a table, from the front of `range`, whose own does not.
    pub(super) fn end_without_tables(&self, range: ByteRange) -> u64 {
        let covers = self.geometry.l2_table_covers_bytes();
        let l1 = self.l1.borrow();
        let mut index = range.offset() / covers;
        loop {
            index += 1;
            let end = index.saturating_mul(covers);
            if end >= range.end() || L1Entry(l1.word(index)).table().is_some() {
                return end;
            }
        }
    }

    /// The run that begins at the front of `range`, whose entry is at `place` of `slice`. It ends before the first entry that is
    /// not `wanted`, but holds the one it begins with.
    pub(super) fn run_at(
        &self,
        slice: &[u8],
        place: EntryPlace,
        range: ByteRange,
        wanted: impl Fn(&L2Entry) -> bool,
    ) -> Result<(ByteRange, Source), Corruption> {
        let piece_bytes = self.geometry.subcluster_bytes();
        let mut cluster = self.geometry.guest_cluster(guest(range.offset()));
        let mut entry = self.entry_in(slice, place, place.index, cluster)?;
        let mut in_cluster = self.geometry.in_cluster(range.offset());
        let source = self.source_at(&entry, in_cluster);
        let source = match source {
            Source::Data { at } => Source::Data {
                at: at.plus(in_cluster),
            },
            other => other,
        };
        let mut end = range.offset() - in_cluster % piece_bytes;
        let mut index = place.index;
        loop {
            // Whole clusters at once where there are no subclusters, or they are all alike.
            let whole = in_cluster < piece_bytes && self.is_uniform(&entry);
            let step = match whole {
                true => self.geometry.cluster_bytes(),
                false => piece_bytes,
            };
            end = end.saturating_add(step);
            in_cluster = in_cluster - in_cluster % piece_bytes + step;
            if end >= range.end() {
                break;
            }
            if in_cluster >= self.geometry.cluster_bytes() {
                index += 1;
                if index >= place.entries {
                    break;
                }
                cluster.0 += 1;
                in_cluster = 0;
                entry = match self.entry_in(slice, place, index, cluster) {
                    Ok(entry) => entry,
                    // Whoever asks for it will hear of it.
                    Err(_) => break,
                };
                if !wanted(&entry) {
                    break;
                }
            }
            let next = match self.source_at(&entry, in_cluster) {
                Source::Data { at } => Source::Data {
                    at: at.plus(in_cluster),
                },
                other => other,
            };
            if !continues(source, range.offset(), next, end) {
                break;
            }
        }
        Ok((range.clamp_end(end), source))
    }

    /// Whether all subclusters of an entry are of one kind.
    fn is_uniform(&self, entry: &L2Entry) -> bool {
        !self.geometry.extended_l2()
            || entry.word & COMPRESSED != 0
            || matches!(entry.bitmap, 0 | 0xffff_ffff | 0xffff_ffff_0000_0000)
    }

    /// What an entry says of the subcluster at `in_cluster`; data with the first byte of its cluster.
    pub(super) fn source_at(&self, entry: &L2Entry, in_cluster: u64) -> Source {
        if entry.word & COMPRESSED != 0 {
            return Source::Compressed(CompressedAt::decode(&self.geometry, entry.word));
        }
        let at = self.host_of(entry);
        let allocated = at.is_some();
        let (data, zero) = if self.geometry.extended_l2() {
            let index = self.subcluster(in_cluster);
            (entry.has_data(index), entry.reads_zero(index))
        } else {
            (true, entry.word & ZERO != 0)
        };
        match at {
            _ if zero => Source::Zero { allocated },
            Some(at) if data => Source::Data { at },
            _ => Source::Unallocated,
        }
    }

    /// The cluster that an entry which is not compressed keeps, for data or for later.
    ///
    /// Spec: qcow2, "Standard Cluster Descriptor": with an external data file, offset 0 is a place as any other, and the flag
    /// says whether it is meant.
    pub(super) fn host_of(&self, entry: &L2Entry) -> Option<HostOffset> {
        match entry.word & OFFSET_MASK {
            0 => (self.has_data_file() && entry.is_copied() && entry.word & ZERO == 0)
                .then_some(HostOffset(0)),
            offset => Some(HostOffset(offset)),
        }
    }

    /// The index of the subcluster that holds a byte of a cluster.
    pub(super) fn subcluster(&self, in_cluster: u64) -> u32 {
        let index = in_cluster / self.geometry.subcluster_bytes();
        u32::try_from(index).unwrap_or(u32::MAX)
    }

    /// The entry at `index` of a slice, checked: what it leads to can be what it says.
    pub(super) fn entry_in(
        &self,
        slice: &[u8],
        place: EntryPlace,
        index: usize,
        cluster: GuestCluster,
    ) -> Result<L2Entry, Corruption> {
        let entry = l2_entry_at(&self.geometry, slice, index).unwrap_or_default();
        if self.is_plain(&entry, cluster) {
            return Ok(entry);
        }
        let in_table = (place.slice.0 - place.table.0) / self.geometry.l2_entry_bytes();
        let index = hexadecimal(in_table + index as u64);
        match self.flaw(&entry, cluster, place.table, &index) {
            None => Ok(entry),
            Some(text) => Err(fatal(text)),
        }
    }

    /// What is wrong with an entry, in QEMU's words.
    fn flaw(
        &self,
        entry: &L2Entry,
        cluster: GuestCluster,
        table: HostOffset,
        index: &str,
    ) -> Option<String> {
        let geometry = &self.geometry;
        let place = format!("(L2 offset: {:#x}, L2 index: {index})", table.0);
        if entry.word & COMPRESSED != 0 {
            let what = "Compressed cluster entry found in image with external data file";
            return self.has_data_file().then(|| format!("{what} {place}"));
        }
        if geometry.version() == Version::V2 && entry.word & ZERO != 0 {
            return Some(format!("Zero cluster entry found in pre-v3 image {place}"));
        }
        let offset = entry.word & OFFSET_MASK;
        if !geometry.is_cluster_start(HostOffset(offset)) {
            return Some(format!(
                "Cluster allocation offset {offset:#x} unaligned {place}"
            ));
        }
        let identity = self.identity(cluster);
        if offset != 0 && self.has_data_file() && HostOffset(offset) != identity {
            return Some(format!(
                "External data file host cluster offset {offset:#x} does not match guest cluster offset: {}, L2 index: {index})",
                hexadecimal(identity.0)
            ));
        }
        let data_and_zero = (entry.bitmap & entry.bitmap >> 32) as u32 != 0;
        let data_nowhere = entry.bitmap as u32 != 0 && self.host_of(entry).is_none();
        let contradicts = geometry.extended_l2() && (data_and_zero || data_nowhere);
        contradicts.then(|| format!("{INVALID_ENTRY}{place}"))
    }

    /// Whether an entry needs no closer look: nothing, or a cluster in its place.
    fn is_plain(&self, entry: &L2Entry, cluster: GuestCluster) -> bool {
        let offset = entry.word & OFFSET_MASK;
        let simple = entry.word & COMPRESSED == 0
            && !self.geometry.extended_l2()
            && self.geometry.version() == Version::V3;
        simple
            && self.geometry.is_cluster_start(HostOffset(offset))
            && (offset == 0
                || !self.has_data_file()
                || HostOffset(offset) == self.identity(cluster))
    }

    /// QEMU names what is wrong with an entry in other words when it is written to.
    pub(super) fn as_a_write_says(
        &self,
        corruption: Corruption,
        entry: &L2Entry,
        cluster: GuestCluster,
    ) -> Corruption {
        if let Some(place) = corruption.text.strip_prefix(INVALID_ENTRY) {
            return fatal(format!("Invalid cluster entry found {place}"));
        }
        let at = match self.host_of(entry) {
            Some(at) if entry.word & COMPRESSED == 0 && entry.is_copied() => at,
            _ => return corruption,
        };
        if self.geometry.is_cluster_start(at) {
            return corruption;
        }
        let kind = match self.source_at(entry, 0) {
            Source::Zero { .. } => "Preallocated zero",
            _ => "Data",
        };
        fatal(format!(
            "{kind} cluster offset {:#x} unaligned (guest offset: {})",
            at.0,
            hexadecimal(self.geometry.guest_offset(cluster).0)
        ))
    }

    /// Where a guest cluster is in an external data file.
    pub(super) fn identity(&self, cluster: GuestCluster) -> HostOffset {
        HostOffset(self.geometry.guest_offset(cluster).0)
    }
}

/// Whether a run that began with `source` at `start` goes on with `next` at `end`.
fn continues(source: Source, start: u64, next: Source, end: u64) -> bool {
    match (source, next) {
        (Source::Data { at }, Source::Data { at: next }) => at.plus(end - start) == next,
        (Source::Compressed(_), _) => false,
        (source, next) => source == next,
    }
}

/// A contradiction that makes further work impossible.
pub(super) fn fatal(text: String) -> Corruption {
    Corruption {
        text,
        at: None,
        length_bytes: None,
        fatal: true,
    }
}

/// As C's `%#x` prints it: 0 without a prefix.
pub(super) fn hexadecimal(number: u64) -> String {
    match number {
        0 => "0".to_owned(),
        other => format!("{other:#x}"),
    }
}

const fn guest(offset: u64) -> crate::qcow2::units::GuestOffset {
    crate::qcow2::units::GuestOffset(offset)
}
