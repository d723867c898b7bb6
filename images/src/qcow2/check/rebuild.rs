//! A new refcount structure (and snapshot table) for an image whose own cannot be repaired where it is.
//!
//! It is written to clusters that nothing leads to, behind the end of the file where that can grow, and takes effect with one
//! write within the header's first sector. Until then the image is what it was.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::counters::Counters;
use super::findings::FindingKind;
use super::observer::CheckStop;
use super::read_ahead::ReadAhead;
use super::refcounts::Block;
use super::references::{CLUSTERS_MAX, References};
use super::repair::Fixer;
use super::scan::{Extent, Scan};
use super::tables::Tables;
use crate::error::ImageError;
use crate::qcow2::layout::entries::put_word;
use crate::qcow2::layout::header::{Header, REFCOUNT_TABLE_BYTES_MAX};
use crate::qcow2::layout::refcounts::{put_refcount, refcount_at};
use crate::qcow2::units::{Geometry, HostCluster, HostOffset};

/// Where `refcount_table_offset`, `refcount_table_clusters`, `nb_snapshots` and `snapshots_offset` stand in the header, one
/// after the other.
const PLACES_OFFSET: u64 = 48;

/// Where a new structure goes.
pub(in crate::qcow2) struct Plan {
    /// What the widths of its counts follow from.
    geometry: Geometry,
    /// First cluster of the table, and how many.
    table: (u64, u64),
    /// Cluster of each block, by its index in the table.
    blocks: BTreeMap<u64, u64>,
    /// First cluster of the snapshot table, if it moves.
    snapshot_table: Option<u64>,
}

/// Makes the refcount structure anew, and the snapshot table if `replaces_snapshots`. `scan` says what was wrong.
pub(in crate::qcow2) async fn rebuild(
    fixer: &mut Fixer,
    scan: &mut Scan<'_>,
    replaces_snapshots: bool,
) -> Result<(), CheckStop> {
    if scan.must_rebuild {
        scan.sink.found(FindingKind::Rebuilding, 1);
    }
    if replaces_snapshots {
        for index in scan.snapshots.incomplete.clone() {
            scan.sink
                .repairing(FindingKind::SnapshotIncomplete { index });
        }
    }
    scan.sink.step(0).await?;
    // What it counted is not needed any more, and takes as much memory as what is counted now.
    scan.references = References::new(scan.geometry, 0);
    scan.tables = Tables::new(scan.geometry, 0);
    let mut fresh = Scan::begin(&fixer.file, scan.sink.observer(), true).await?;
    let extent = Extent::WithoutRefcounts {
        snapshot_table: replaces_snapshots,
    };
    fresh.count(extent).await?;
    fresh.read_refcount_table().await?;
    let keeps_leaks = scan.sink.hides_references && scan.sink.report.leaks > 0;
    if keeps_leaks {
        scan.sink.found(FindingKind::LeaksKept, 1);
        fresh.keep_stored_counts().await?;
    }
    let snapshots = match replaces_snapshots {
        true => Some(fresh.complete_snapshot_table().await?),
        false => None,
    };
    let mut room = Room::of(&fresh);
    let geometry = fresh.geometry;
    let plan = room.plan(&mut fresh, geometry, snapshots.as_ref().map(Vec::len))?;
    write(fixer, &mut fresh, &plan, snapshots.as_deref()).await?;
    fixer.sync().await?;
    switch(fixer, &fresh, &plan).await?;
    fixer.sync().await?;
    fixer.corruptions_fixed += scan.sink.of_refcounts;
    if replaces_snapshots {
        fixer.corruptions_fixed += scan.snapshots.incomplete.len() as u64;
    }
    if !keeps_leaks {
        fixer.leaks_fixed += scan.sink.report.leaks;
    }
    Ok(())
}

impl Scan<'_> {
    /// Gives clusters without references the counts that are stored for them.
    async fn keep_stored_counts(&mut self) -> Result<(), CheckStop> {
        let per_block = self.geometry.refcounts_per_block();
        let clusters = self.references.counters.clusters();
        let blocks = clusters
            .div_ceil(per_block)
            .min(self.refcount_table.len() as u64);
        let file = self.file.clone();
        for index in 0..blocks {
            let pieces = self.block_pieces(index);
            let mut reads = ReadAhead::new(&file, pieces.into_iter());
            while let Some((range, first, buffer)) = reads.next().await? {
                let counts = (range.length() * 8) >> self.geometry.refcount_order();
                for place in 0..usize::try_from(counts).unwrap_or(0) {
                    let cluster = first + place as u64;
                    let count = refcount_at(&self.geometry, buffer.as_slice(), place).unwrap_or(0);
                    if cluster < clusters && self.references.counters.of(cluster) == 0 {
                        self.references.counters.set(cluster, count);
                    }
                }
                reads.give_back(buffer);
                self.sink.step(range.length()).await?;
            }
        }
        Ok(())
    }
}

impl Plan {
    /// Lets a header lead to the new structure.
    pub(in crate::qcow2) fn place_in(&self, header: &mut Header) {
        header.refcount_table = self.geometry.host_offset(HostCluster(self.table.0));
        // At most 8 MiB of clusters.
        header.refcount_table_clusters = u32::try_from(self.table.1).unwrap_or(0);
        if let Some(cluster) = self.snapshot_table {
            header.snapshot_table = self.geometry.host_offset(HostCluster(cluster));
        }
    }
}

/// Finds clusters for a new structure.
pub(in crate::qcow2) struct Room {
    /// Clusters that the present structure takes, which is used until the new one takes its place.
    present: Counters,
    /// Where to begin to look.
    from: u64,
    /// First cluster that cannot be had.
    end: u64,
}

impl Room {
    /// The clusters of `file` from its front on that `present` says are not in use.
    pub(in crate::qcow2) fn beside(present: Counters, fresh: &Scan<'_>) -> Self {
        let facts = fresh.file.facts();
        Self {
            present,
            from: 1,
            end: match facts.fixed_length {
                true => facts.length_bytes / fresh.geometry.cluster_bytes(),
                false => CLUSTERS_MAX,
            },
        }
    }

    /// Whatever neither `fresh`, whose references have been counted, nor the present structure takes.
    pub(in crate::qcow2) fn of(fresh: &Scan<'_>) -> Self {
        let clusters = fresh.references.counters.clusters();
        let facts = fresh.file.facts();
        if !facts.fixed_length {
            return Self {
                present: Counters::default(),
                from: clusters,
                end: CLUSTERS_MAX,
            };
        }
        let geometry = &fresh.geometry;
        let mut present = Counters::new(clusters);
        let mut keep = |at: HostOffset, length_bytes: u64| {
            if let Some((first, end)) = fresh.references.clusters_of(at, length_bytes) {
                (first..end.min(clusters)).for_each(|cluster| present.set(cluster, 1));
            }
        };
        keep(
            fresh.header.refcount_table,
            fresh.header.refcount_table_bytes(),
        );
        keep(fresh.header.snapshot_table, fresh.snapshots.length_bytes);
        for index in 0..fresh.refcount_table.len() as u64 {
            if let Block::At(at) = fresh.block(index) {
                keep(at, geometry.cluster_bytes());
            }
        }
        Self {
            present,
            from: 1,
            end: facts.length_bytes / geometry.cluster_bytes(),
        }
    }

    /// The clusters that cannot be had.
    pub(in crate::qcow2) const fn present(&self) -> &Counters {
        &self.present
    }

    /// Takes a run of clusters: they have one reference from now on.
    ///
    /// # Errors
    /// When there is no room.
    pub(in crate::qcow2) fn take(
        &mut self,
        fresh: &mut Scan<'_>,
        length: u64,
    ) -> Result<u64, ImageError> {
        let references = &mut fresh.references;
        let mut start = self.from;
        let mut run = 0;
        while run < length {
            let cluster = start + run;
            if cluster >= self.end {
                return Err(ImageError::refused_because(
                    "No space left on device",
                    format!(
                        "{length} free clusters in a row are needed for a new refcount structure"
                    ),
                ));
            }
            let free = references.is_free(cluster) && self.present.of(cluster) == 0;
            match free {
                true => run += 1,
                false => (start, run) = (cluster + 1, 0),
            }
        }
        if length == 1 || start == self.from {
            // Nothing before it is free.
            self.from = start + length;
        }
        references.place(start, start + length);
        Ok(start)
    }

    /// Takes clusters for a structure with counts as wide as `geometry` says, and for a snapshot table of so many bytes.
    ///
    /// # Errors
    /// When there is no room.
    pub(in crate::qcow2) fn plan(
        &mut self,
        fresh: &mut Scan<'_>,
        geometry: Geometry,
        snapshot_bytes: Option<usize>,
    ) -> Result<Plan, ImageError> {
        let snapshot_table = match snapshot_bytes {
            Some(bytes) => {
                let clusters = geometry.clusters_for(bytes as u64).0;
                Some(self.take(fresh, clusters)?)
            }
            None => None,
        };
        let mut blocks = BTreeMap::new();
        self.place_blocks(fresh, geometry, &mut blocks)?;
        let mut length = 1;
        let table = loop {
            if length * geometry.cluster_bytes() > REFCOUNT_TABLE_BYTES_MAX {
                return Err(ImageError::refused_because(
                    "File too large",
                    "its refcount table would be larger than 8 MiB",
                ));
            }
            // As if the table needed another block for each cluster of its own.
            let entries = blocks.last_key_value().map_or(0, |(last, _)| last + 1) + length + 1;
            let needed = geometry.clusters_for(entries * 8).0;
            if needed > length {
                length = needed;
                continue;
            }
            break self.take(fresh, length)?;
        };
        self.place_blocks(fresh, geometry, &mut blocks)?;
        let entries = blocks.last_key_value().map_or(0, |(last, _)| last + 1);
        if entries * 8 > length * geometry.cluster_bytes() {
            return Err(ImageError::refused("No place for the new refcount table"));
        }
        Ok(Plan {
            geometry,
            table: (table, length),
            blocks,
            snapshot_table,
        })
    }

    /// Takes a cluster for each block that has to be there and is not, also for those that others of them need.
    fn place_blocks(
        &mut self,
        fresh: &mut Scan<'_>,
        geometry: Geometry,
        blocks: &mut BTreeMap<u64, u64>,
    ) -> Result<(), ImageError> {
        let per_block = geometry.refcounts_per_block();
        loop {
            let mut from = 0;
            let mut missing = None;
            while let Some(cluster) = fresh.references.counters.next_counted(from) {
                let index = cluster / per_block;
                if let Entry::Vacant(block) = blocks.entry(index) {
                    missing = Some(index);
                    block.insert(self.take(fresh, 1)?);
                }
                from = (index + 1) * per_block;
            }
            if missing.is_none() {
                return Ok(());
            }
        }
    }
}

/// Writes everything that the header does not lead to yet.
///
/// # Errors
/// When a count does not fit or something cannot be written, or the observer cancels. The image is what it was.
pub(in crate::qcow2) async fn write(
    fixer: &mut Fixer,
    fresh: &mut Scan<'_>,
    plan: &Plan,
    snapshots: Option<&[u8]>,
) -> Result<(), CheckStop> {
    let geometry = plan.geometry;
    let cluster_bytes = usize::try_from(geometry.cluster_bytes()).unwrap_or(0);
    let offset_of = |cluster: u64| cluster << geometry.cluster_bits();
    let table_bytes = cluster_bytes.saturating_mul(usize::try_from(plan.table.1).unwrap_or(0));
    let mut table = vec![0; table_bytes];
    let mut block = vec![0; cluster_bytes];
    for (index, cluster) in &plan.blocks {
        block.fill(0);
        let first = index * geometry.refcounts_per_block();
        let end = first + geometry.refcounts_per_block();
        let mut from = first;
        while let Some(counted) = fresh
            .references
            .counters
            .next_counted(from)
            .filter(|counted| *counted < end)
        {
            let place = usize::try_from(counted - first).unwrap_or(usize::MAX);
            let count = fresh.references.counters.of(counted);
            if !put_refcount(&geometry, &mut block, place, count) {
                return Err(ImageError::refused("A reference count does not fit").into());
            }
            from = counted + 1;
        }
        fixer.write(fresh, offset_of(*cluster), &block).await?;
        let place = usize::try_from(*index).unwrap_or(usize::MAX);
        if !put_word(&mut table, place, offset_of(*cluster)) {
            return Err(ImageError::refused("The refcount table is too short").into());
        }
        fresh.sink.step(geometry.cluster_bytes()).await?;
    }
    fixer.write(fresh, offset_of(plan.table.0), &table).await?;
    if let Some((cluster, bytes)) = plan.snapshot_table.zip(snapshots) {
        let mut padded = bytes.to_vec();
        padded.resize(padded.len().next_multiple_of(cluster_bytes.max(1)), 0);
        fixer.write(fresh, offset_of(cluster), &padded).await?;
    }
    Ok(())
}

/// Lets the header lead to the new structure: 24 bytes of its first sector.
async fn switch(fixer: &mut Fixer, fresh: &Scan<'_>, plan: &Plan) -> Result<(), CheckStop> {
    let mut header = fresh.header.clone();
    plan.place_in(&mut header);
    let mut fields = Vec::with_capacity(24);
    fields.extend(header.refcount_table.0.to_be_bytes());
    fields.extend(header.refcount_table_clusters.to_be_bytes());
    fields.extend(header.snapshots.to_be_bytes());
    fields.extend(header.snapshot_table.0.to_be_bytes());
    fixer.write(fresh, PLACES_OFFSET, &fields).await
}
