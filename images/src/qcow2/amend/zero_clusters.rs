//! Zero clusters on the way to version 2, which has none: those with something below get clusters that hold zeroes, the
//! others become unallocated, in the active tables and in those of internal snapshots.
//!
//! Every change of an entry leaves what the guest reads. A cluster that is kept for zeroes is written only where nothing else
//! refers to it: a snapshot may have data in it (`qemu-img amend` writes zeroes over that data).
//!
//! Spec: qcow2, "Standard Cluster Descriptor" (bit 0), "Snapshots".

use blockyard_storage::{Buffer, ByteRange, ZeroMode};

use crate::error::ImageError;
use crate::qcow2::check::CheckStop;
use crate::qcow2::check::counters::Counters;
use crate::qcow2::check::l2::pieces_of;
use crate::qcow2::check::read_ahead::ReadAhead;
use crate::qcow2::check::rebuild::Room;
use crate::qcow2::check::repair::{Changed, Fixer};
use crate::qcow2::check::scan::Scan;
use crate::qcow2::check::tables::Tables;
use crate::qcow2::layout::entries::{Cluster, L2Entry, l2_entry_at, put_l2_entry};
use crate::qcow2::units::{HostCluster, HostOffset};

/// Pieces of tables whose changes wait for one sync: 4 MiB.
const BATCH_PIECES: usize = 16;
/// Most bytes that are zeroed at once; pause and cancel wait for that long.
const ZERO_BYTES_MAX: u64 = 64 << 20;

/// What all L2 tables hold, as far as it matters, and the clusters that were found for their zeroes.
#[derive(Default)]
pub(super) struct ZeroClusters {
    /// What is unallocated does not read as zeroes.
    shows_below: bool,
    /// Entries that read as zeroes.
    pub(super) entries: u64,
    /// Some entry is compressed.
    pub(super) has_compressed: bool,
    /// Some entry gives up a cluster.
    pub(super) gives_up: bool,
    /// 1 for each cluster that is going to be used, in the order of the entries.
    taken: Counters,
    /// How many there are.
    pub(super) clusters: u64,
}

/// What becomes of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Becomes {
    /// Unallocated: nothing is below.
    Nothing,
    /// The cluster that was kept for it, with zeroes in it.
    Kept(HostOffset),
    /// Another cluster.
    New,
}

fn becomes(
    scan: &Scan<'_>,
    entry: &L2Entry,
    times: u64,
    shows_below: bool,
) -> Option<(Becomes, bool)> {
    let Cluster::Zero { at } = entry.cluster(&scan.geometry) else {
        return None;
    };
    let references = at.map(|at| {
        let cluster = scan.geometry.host_cluster(at).0;
        (at, scan.references.counters.of(cluster))
    });
    Some(match references {
        Some((at, references)) if references == times => (Becomes::Kept(at), false),
        _ => {
            let new = match shows_below {
                true => Becomes::New,
                false => Becomes::Nothing,
            };
            (new, at.is_some())
        }
    })
}

impl ZeroClusters {
    /// Looks at all entries and takes a cluster for each that needs one: it counts as often as something leads to its table.
    ///
    /// # Errors
    /// When a table cannot be read, there is no room, or the observer cancels. Nothing has been written.
    pub(super) async fn find(
        scan: &mut Scan<'_>,
        room: &mut Room,
        shows_below: bool,
    ) -> Result<Self, CheckStop> {
        let mut found = Self {
            shows_below,
            ..Self::default()
        };
        let file = scan.file.clone();
        let geometry = scan.geometry;
        let tables = std::mem::replace(&mut scan.tables, Tables::new(geometry, 0));
        scan.sink.total_bytes += tables.bytes().0;
        let mut reads = ReadAhead::new(&file, pieces_of(tables.all(), &geometry));
        while let Some((range, (_, links), buffer)) = reads.next().await? {
            let mut index = 0;
            while let Some(entry) = l2_entry_at(&geometry, buffer.as_slice(), index) {
                index += 1;
                found.has_compressed |= matches!(entry.cluster(&geometry), Cluster::Compressed(_));
                let Some((becomes, gives_up)) = becomes(scan, &entry, links.times, shows_below)
                else {
                    continue;
                };
                found.entries += 1;
                found.gives_up |= gives_up;
                if becomes == Becomes::New {
                    let cluster = room.take(scan, 1)?;
                    scan.references.counters.set(cluster, links.times);
                    found.taken.grow(cluster + 1);
                    found.taken.set(cluster, 1);
                    found.clusters += 1;
                }
            }
            reads.give_back(buffer);
            scan.sink.step(range.length()).await?;
        }
        drop(reads);
        scan.tables = tables;
        Ok(found)
    }

    /// Changes the entries. The clusters that were taken are counted on the medium.
    ///
    /// # Errors
    /// When something cannot be read or written, or the observer cancels. Some entries have changed then, and what the guest
    /// reads has not; clusters that were taken may be leaked.
    pub(super) async fn replace(
        &self,
        scan: &mut Scan<'_>,
        fixer: &mut Fixer,
    ) -> Result<(), CheckStop> {
        let file = scan.file.clone();
        let geometry = scan.geometry;
        let tables = std::mem::replace(&mut scan.tables, Tables::new(geometry, 0));
        scan.sink.total_bytes += tables.bytes().0;
        let mut batch = Batch::default();
        let mut next = 0;
        let mut reads = ReadAhead::new(&file, pieces_of(tables.all(), &geometry));
        while let Some((range, (_, links), mut buffer)) = reads.next().await? {
            let mut changed = Changed::default();
            let (mut index, mut is_changed) = (0, false);
            while let Some(entry) = l2_entry_at(&geometry, buffer.as_slice(), index) {
                let place = index;
                index += 1;
                let Some((becomes, _)) = becomes(scan, &entry, links.times, self.shows_below)
                else {
                    continue;
                };
                let at = match becomes {
                    Becomes::Nothing => None,
                    Becomes::Kept(at) => Some(at),
                    Becomes::New => {
                        let cluster = self.taken.next_counted(next).ok_or_else(moved)?;
                        next = cluster + 1;
                        Some(geometry.host_offset(HostCluster(cluster)))
                    }
                };
                let new = at.map_or(L2Entry::default(), |at| {
                    L2Entry::copied(&geometry, at).with_copied(links.times == 1)
                });
                if let Some(at) = at {
                    batch.zero(ByteRange::new(at.0, geometry.cluster_bytes()));
                }
                // It was read from there.
                if put_l2_entry(&geometry, buffer.as_mut_slice(), place, new) {
                    changed.bytes(place * 8, place * 8 + 8);
                    is_changed = true;
                }
            }
            match is_changed {
                true => batch.pieces.push((range, buffer, changed)),
                false => reads.give_back(buffer),
            }
            if batch.pieces.len() >= BATCH_PIECES {
                batch.write(scan, fixer).await?;
            }
            scan.sink.step(range.length()).await?;
        }
        drop(reads);
        batch.write(scan, fixer).await?;
        fixer.sync().await?;
        scan.tables = tables;
        Ok(())
    }
}

/// Changes that wait for one sync.
#[derive(Default)]
struct Batch {
    /// Clusters to fill with zeroes, neighbours together.
    zeroes: Vec<ByteRange>,
    pieces: Vec<(ByteRange, Buffer, Changed)>,
}

impl Batch {
    fn zero(&mut self, range: ByteRange) {
        match self.zeroes.last_mut() {
            Some(last) if last.end() == range.offset() => {
                *last = ByteRange::between(last.offset(), range.end());
            }
            _ => self.zeroes.push(range),
        }
    }

    async fn write(&mut self, scan: &mut Scan<'_>, fixer: &mut Fixer) -> Result<(), CheckStop> {
        if self.pieces.is_empty() {
            return Ok(());
        }
        fixer.begin(scan).await?;
        for range in std::mem::take(&mut self.zeroes) {
            for piece in range.pieces(ZERO_BYTES_MAX) {
                let mode = ZeroMode {
                    may_unmap: true,
                    no_fallback: false,
                };
                scan.file.zero(piece, mode).await?;
                scan.sink.step(0).await?;
            }
        }
        fixer.sync().await?;
        for (range, buffer, changed) in std::mem::take(&mut self.pieces) {
            fixer.write_back(scan, range, &buffer, changed).await?;
        }
        Ok(())
    }
}

/// Nobody else may have changed the tables.
fn moved() -> ImageError {
    ImageError::refused("The image was changed by somebody else")
}
