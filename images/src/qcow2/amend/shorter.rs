//! A shorter disk: the active tables without what is cut off, beside those that have it. One switch of the header leads to
//! them, so that until then nothing is lost, and nothing that was cut off comes back when the disk grows again.
//!
//! ```text
//!   L1 table    | kept | kept | cut by the end | gone | gone |
//!   another one | kept | kept |       |        |  only where the L2 table that the end cuts has entries behind it
//!                                      '-> another L2 table, without those
//! ```
//!
//! Spec: qcow2, "Header" (`l1_size`, `l1_table_offset`), "Cluster mapping".

use std::rc::Rc;

use blockyard_storage::Storage;

use crate::error::ImageError;
use crate::qcow2::check::CheckStop;
use crate::qcow2::check::rebuild::Room;
use crate::qcow2::check::repair::Fixer;
use crate::qcow2::check::scan::Scan;
use crate::qcow2::layout::entries::{L1Entry, L2Entry, l2_entry_at, put_l2_entry};
use crate::qcow2::layout::header::Header;
use crate::qcow2::open::OpenedImage;
use crate::qcow2::reading::read_bytes;
use crate::qcow2::units::{Geometry, HostCluster, HostOffset};

/// The tables of a shorter disk.
pub(super) struct Shorter {
    geometry: Geometry,
    /// Entries that the disk needs.
    l1: Vec<u64>,
    /// The last table, if it has to be another one.
    last: Option<LastTable>,
}

struct LastTable {
    bytes: Vec<u8>,
    places: Option<Places>,
}

/// Where the new tables go.
#[derive(Clone, Copy)]
struct Places {
    l1: HostOffset,
    l2: HostOffset,
}

impl Shorter {
    /// Looks at what a disk of `size_bytes` keeps of an image.
    ///
    /// # Errors
    /// When a table cannot be read.
    pub(super) async fn find(
        file: &Rc<dyn Storage>,
        image: &OpenedImage,
        size_bytes: u64,
    ) -> Result<Self, ImageError> {
        let geometry = image.header.geometry;
        let needed = geometry.l1_entries_for(size_bytes);
        let mut l1 = image.l1_table.clone();
        l1.truncate(usize::try_from(needed).unwrap_or(usize::MAX));
        let kept = geometry.clusters_for(size_bytes).0 % geometry.l2_entries();
        let table = l1.last().and_then(|word| L1Entry(*word).table());
        let last = match table.filter(|_| kept > 0) {
            Some(at) => {
                let length = usize::try_from(geometry.cluster_bytes()).unwrap_or(0);
                let table = read_bytes(&**file, at.0, length, "Could not read L2 table").await?;
                without_entries(&geometry, table, kept)
            }
            None => None,
        };
        let last = last.map(|bytes| LastTable {
            bytes,
            places: None,
        });
        Ok(Self { geometry, l1, last })
    }

    /// Whether there have to be other tables.
    pub(super) fn needs_room(&self) -> bool {
        self.last.is_some()
    }

    /// Takes clusters for them. What they take the place of stays counted.
    ///
    /// # Errors
    /// When there is no room.
    pub(super) fn take_room(
        &mut self,
        scan: &mut Scan<'_>,
        room: &mut Room,
    ) -> Result<(), ImageError> {
        let Some(last) = &mut self.last else {
            return Ok(());
        };
        let clusters = self.geometry.clusters_for(self.l1.len() as u64 * 8).0;
        let l1 = room.take(scan, clusters)?;
        let l2 = room.take(scan, 1)?;
        let place = |cluster| self.geometry.host_offset(HostCluster(cluster));
        let places = Places {
            l1: place(l1),
            l2: place(l2),
        };
        if let Some(word) = self.l1.last_mut() {
            *word = L1Entry::copied(places.l2).0;
        }
        last.places = Some(places);
        Ok(())
    }

    /// Writes them; nothing leads there yet.
    ///
    /// # Errors
    /// When that fails.
    pub(super) async fn write(&self, scan: &Scan<'_>, fixer: &mut Fixer) -> Result<(), CheckStop> {
        let Some((last, places)) = self
            .last
            .as_ref()
            .and_then(|last| Some((last, last.places?)))
        else {
            return Ok(());
        };
        fixer.write(scan, places.l2.0, &last.bytes).await?;
        let mut bytes: Vec<u8> = self.l1.iter().flat_map(|word| word.to_be_bytes()).collect();
        let cluster_bytes = usize::try_from(self.geometry.cluster_bytes()).unwrap_or(1);
        bytes.resize(bytes.len().next_multiple_of(cluster_bytes), 0);
        fixer.write(scan, places.l1.0, &bytes).await
    }

    /// Lets a header lead to them, and to nothing that is cut off.
    pub(super) fn place_in(&self, header: &mut Header) {
        // No more than there were.
        header.l1_entries = u32::try_from(self.l1.len()).unwrap_or(header.l1_entries);
        if let Some(places) = self.last.as_ref().and_then(|last| last.places) {
            header.l1_table = places.l1;
        }
    }
}

/// A table without the entries from `kept` on; `None`: it has none there.
fn without_entries(geometry: &Geometry, mut table: Vec<u8>, kept: u64) -> Option<Vec<u8>> {
    let mut is_changed = false;
    let mut index = usize::try_from(kept).ok()?;
    while let Some(entry) = l2_entry_at(geometry, &table, index) {
        if entry != L2Entry::default() {
            is_changed |= put_l2_entry(geometry, &mut table, index, L2Entry::default());
        }
        index += 1;
    }
    is_changed.then_some(table)
}
