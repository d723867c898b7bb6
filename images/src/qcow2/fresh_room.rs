//! Room in the file for tables that are not written yet.
//!
//! Data is written before a write ends, the tables that lead to it only with the next flush. On a disk that fills up meanwhile
//! the data would take the tables' room, and all of it would be lost. So a table has its room before anything relies on it: what
//! does not fit is the write that needs the table, which is told. That holds for new tables, and for those that were there before:
//! in an image that was copied sparsely, what of a table leads nowhere is a hole.

use std::cell::RefCell;
use std::collections::BTreeSet;

use blockyard_storage::{ByteRange, Preallocation};

use crate::error::ImageError;
use crate::qcow2::image::{ImageState, Qcow2};
use crate::qcow2::lookup::TablePlace;
use crate::qcow2::units::{GuestCluster, HostCluster};

/// Clusters that are remembered; the room of others is asked for again, which costs a call.
const REMEMBERED_MAX: usize = 16_384;

/// Clusters of tables that have their room in the file, as far as it can reserve.
#[derive(Default)]
pub(super) struct TableRooms(RefCell<BTreeSet<HostCluster>>);

impl TableRooms {
    /// Whether a cluster is known to have its room.
    pub(super) fn contains(&self, cluster: HostCluster) -> bool {
        self.0.borrow().contains(&cluster)
    }

    fn insert(&self, cluster: HostCluster) {
        let mut rooms = self.0.borrow_mut();
        if rooms.len() >= REMEMBERED_MAX {
            rooms.clear();
        }
        rooms.insert(cluster);
    }
}

impl Qcow2 {
    /// Reserves room for a table, or a part of one, in a cluster. What stands there stays.
    ///
    /// # Errors
    /// `ENOSPC`, `EDQUOT`, `EFBIG`: there is none. A storage that cannot reserve is no error: the table takes its room when it is
    /// written.
    pub(super) async fn reserve_table(&self, cluster: HostCluster) -> Result<(), ImageError> {
        let geometry = &self.state.geometry;
        let at = geometry.host_offset(cluster);
        let range = ByteRange::new(at.0, geometry.cluster_bytes());
        let file = &self.state.file;
        match file.preallocate(range, Preallocation::Falloc).await {
            Err(error) if error.is_out_of_room() => Err(error.into()),
            _ => {
                self.state.table_rooms.insert(cluster);
                Ok(())
            }
        }
    }

    /// Sees to it that the L2 table of a cluster, if there is one, can be written.
    ///
    /// # Errors
    /// As [`reserve_table`](Self::reserve_table).
    pub(super) async fn reserve_entries(&self, cluster: GuestCluster) -> Result<(), ImageError> {
        while let Some(table) = self.state.table_without_room(cluster)? {
            self.reserve_table(table).await?;
        }
        Ok(())
    }

    /// The same for the L1 entry of a cluster.
    ///
    /// # Errors
    /// As [`reserve_table`](Self::reserve_table).
    pub(super) async fn reserve_l1_entry(&self, cluster: GuestCluster) -> Result<(), ImageError> {
        let geometry = &self.state.geometry;
        loop {
            let entry = self.state.l1.borrow().at_of(geometry.l1_index(cluster));
            let place = geometry.host_cluster(entry);
            if self.state.table_rooms.contains(place) {
                return Ok(());
            }
            self.reserve_table(place).await?;
        }
    }
}

impl ImageState {
    /// The cluster of the L2 table that leads to a guest's cluster, unless it is known to have its room.
    pub(super) fn table_without_room(
        &self,
        cluster: GuestCluster,
    ) -> Result<Option<HostCluster>, ImageError> {
        let TablePlace::Entry(place) = self.entry_place(cluster)? else {
            return Ok(None);
        };
        let table = self.geometry.host_cluster(place.table);
        Ok((!self.table_rooms.contains(table)).then_some(table))
    }
}
