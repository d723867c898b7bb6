//! The room that a change of snapshots takes until the header leads to what was made, at most.
//!
//! ```text
//!   tables  the L1 table of the disk, that of a new snapshot, the snapshot table, all L2 tables of the disk
//!   counts  of the whole file and of what comes to it, with their table
//! ```

use std::rc::Rc;

use blockyard_storage::Storage;

use super::changing::{SnapshotChange, SnapshotError};
use super::switching::Goal;
use crate::more_room::MoreRoom;
use crate::qcow2::layout::entries::L1Entry;
use crate::qcow2::layout::header::Access;
use crate::qcow2::open::read_image;
use crate::qcow2::units::Geometry;

/// What a change of snapshots takes in addition, at most; nothing is changed. What is not needed any more afterwards is free then.
///
/// # Errors
/// As of the change, as far as it is known before all of the image has been looked at.
pub async fn room(
    file: &Rc<dyn Storage>,
    change: &SnapshotChange<'_>,
) -> Result<MoreRoom, SnapshotError> {
    let image = read_image(&**file, Access::ReadWrite).await?;
    change.check(&image)?;
    let goal = change.goal(file, &image).await?;
    let geometry = &image.header.geometry;
    let tables = goal.clusters_at_most(geometry)?;
    let before = geometry.clusters_for(file.facts().length_bytes).0;
    let counts = counts_of(geometry, before.saturating_add(tables));
    let metadata = tables.saturating_add(counts);
    Ok(MoreRoom {
        metadata_bytes: metadata.saturating_mul(geometry.cluster_bytes()),
        ..MoreRoom::default()
    })
}

impl Goal {
    fn clusters_at_most(&self, geometry: &Geometry) -> Result<u64, SnapshotError> {
        let clusters = |bytes: usize| geometry.clusters_for(bytes as u64).0;
        let l1 = |entries: usize| clusters(entries.saturating_mul(8));
        let l2 = self
            .l1
            .iter()
            .filter(|word| L1Entry(**word).table().is_some());
        let parts = [
            l1(self.l1.len()),
            l1(self.new_l1_entries.unwrap_or(0)),
            clusters(self.table_of_snapshots()?.len()),
            l2.count() as u64,
        ];
        Ok(parts.into_iter().fold(0, u64::saturating_add))
    }
}

/// Clusters that count `clusters` and themselves, and of the table that leads to them.
fn counts_of(geometry: &Geometry, clusters: u64) -> u64 {
    let mut counts = 0;
    loop {
        let all = clusters.saturating_add(counts);
        let blocks = all.div_ceil(geometry.refcounts_per_block());
        let table = geometry.clusters_for(blocks.saturating_mul(8)).0;
        let needed = blocks.saturating_add(table);
        if needed <= counts {
            return counts;
        }
        counts = needed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::units::Version;

    #[test]
    fn counts_count_themselves_and_no_figure_overflows() {
        for (cluster_bits, order) in [(9, 6), (16, 4), (21, 0)] {
            let geometry = Geometry::new(Version::V3, cluster_bits, order, false).expect("valid");
            let per_block = geometry.refcounts_per_block();
            for clusters in [1, per_block - 1, per_block, 1 << 24, 1 << 40] {
                let counts = counts_of(&geometry, clusters);
                let blocks = (clusters + counts).div_ceil(per_block);
                assert!(blocks + geometry.clusters_for(blocks * 8).0 <= counts);
            }
            assert!(counts_of(&geometry, u64::MAX) > 0);
        }
    }
}
