//! Room in the file for tables that are not written yet.
//!
//! Data is written before a write ends, the tables that lead to it only with the next flush. On a disk that fills up meanwhile
//! the data would take the tables' room, and all of it would be lost. So a table has its room before anything relies on it: what
//! does not fit is the write that needs the table, which is told.

use blockyard_storage::error::{EDQUOT, EFBIG, ENOSPC};
use blockyard_storage::{ByteRange, Preallocation};

use crate::error::ImageError;
use crate::qcow2::image::Qcow2;
use crate::qcow2::units::HostCluster;

impl Qcow2 {
    /// Reserves room for a table in a cluster that was claimed for it.
    ///
    /// # Errors
    /// There is none. A storage that cannot reserve is no error: the table takes its room when it is written.
    pub(super) async fn reserve_table(&self, cluster: HostCluster) -> Result<(), ImageError> {
        let geometry = &self.state.geometry;
        let at = geometry.host_offset(cluster);
        let range = ByteRange::new(at.0, geometry.cluster_bytes());
        let file = &self.state.file;
        match file.preallocate(range, Preallocation::Falloc).await {
            Err(error) if [ENOSPC, EDQUOT, EFBIG].contains(&error.errno) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Reserves room for a refcount block in a cluster that no block counts yet.
    ///
    /// # Errors
    /// As [`reserve_table`](Self::reserve_table).
    pub(super) async fn reserve_block(&self, cluster: HostCluster) -> Result<(), ImageError> {
        self.reserve_table(cluster).await?;
        self.state.counts.room_for_block.set(cluster);
        Ok(())
    }
}
