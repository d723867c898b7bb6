//! Opening `copy-before-write` and `snapshot-access` nodes: a disk is saved before it changes, and shown as it was.

use std::sync::Arc;

use crate::bitmap::{Need, NodeBitmaps};
use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::Graph;
use crate::graph::add::{Below, Reserved, Site};
use crate::graph::options::{Inherits, Resolved};
use crate::graph::permissions::Permissions;
use crate::graph::records::{FILE_ROLE, NodeRecord, TARGET_ROLE};
use crate::node::build::NodePlan;
use crate::node::copy_before_write::{CbwNodeOptions, Progress, SnapshotAccessOptions};
use crate::node::dirty_map::DirtyMap;
use crate::request::{BitmapName, CbwBitmap, CbwSpec, NodeRef, Permission};

impl Graph {
    /// Opens a filter that saves what is about to be changed and, where they are described inline, its child and target.
    pub(super) async fn open_copy_before_write(
        &self,
        name: Option<&str>,
        spec: CbwSpec,
        resolved: Resolved,
        site: Site,
    ) -> Result<NodeId, EngineError> {
        let inherits = Inherits::Filtered(resolved);
        let file = self.open_below(spec.file.clone(), inherits, site).await?;
        let outcome = async {
            let reserved = self.reserve(name)?;
            let id = self.begin_cbw(reserved, &file, resolved, site).await?;
            match self.open_cbw(id, spec, resolved, site).await {
                Ok(()) => Ok(id),
                Err(error) => {
                    self.close(id).await;
                    Err(error)
                }
            }
        }
        .await;
        self.settle(file, outcome).await
    }

    /// Gives a filter that is going to be opened its place above its child.
    async fn begin_cbw(
        &self,
        reserved: Reserved<'_>,
        file: &Below,
        resolved: Resolved,
        site: Site,
    ) -> Result<NodeId, EngineError> {
        let _held = self.hold_still(&[file], site.batch).await;
        let child = self.child_now(file, site.batch)?;
        let record = NodeRecord {
            filename: self.filename(child),
            thread: self.thread_of(child),
            plan: NodePlan::Opening,
            ..reserved.record("copy-before-write", resolved, site)?
        };
        let id = self.record(record, Some((child, FILE_ROLE)))?;
        self.adopt(id, file);
        Ok(id)
    }

    /// Opens the target and brings the filter up.
    async fn open_cbw(
        &self,
        id: NodeId,
        spec: CbwSpec,
        resolved: Resolved,
        site: Site,
    ) -> Result<(), EngineError> {
        let inherits = Inherits::Held(resolved.passing_inactive());
        let opened = self.open_below(spec.target.clone(), inherits, site).await?;
        let outcome = async {
            let write = Permissions::NONE.with(Permission::Write);
            let keeps_length = Permissions::EVERY.without(Permission::Resize);
            let target = self
                .attach(id, &opened, TARGET_ROLE, (write, keeps_length), site)
                .await?;
            let bitmap = self.find_cbw_bitmap(&spec)?;
            let minimum = spec.min_cluster_size;
            check_cluster_size(minimum).map_err(EngineError::generic)?;
            let cluster_bytes = self.backup_cluster_bytes(target, minimum).await?;
            let file = self.records.borrow().file_of(id);
            let child = file.ok_or_else(|| EngineError::generic("The node is gone (bug)"))?;
            let progress = match bitmap {
                Some((bitmaps, name)) => {
                    let length_bytes = self.facts(child).await?.length_bytes;
                    let map = cbw_map(&bitmaps, name, length_bytes)?;
                    Progress::only(&map, cluster_bytes)
                }
                None => Progress::default(),
            };
            if let Some(record) = self.records.borrow_mut().node_mut(id) {
                record.plan = NodePlan::CopyBeforeWrite {
                    child,
                    target,
                    cluster_bytes,
                    cbw: spec.options,
                    options: CbwNodeOptions {
                        read_only: resolved.read_only,
                        discard: resolved.discard,
                        detect_zeroes: resolved.detect_zeroes,
                    },
                    progress,
                };
            }
            self.bring_up(id).await
        }
        .await;
        self.settle(opened, outcome).await
    }

    /// Where the bitmap is that says what is saved, and its name.
    fn find_cbw_bitmap<'a>(
        &self,
        spec: &'a CbwSpec,
    ) -> Result<Option<(Arc<NodeBitmaps>, &'a str)>, EngineError> {
        let Some(CbwBitmap { node, name }) = &spec.bitmap else {
            return Ok(None);
        };
        let bitmaps = self.bitmaps_of(&BitmapName {
            node: node.clone(),
            name: name.clone(),
        })?;
        bitmaps.check(name, Need::Show)?;
        Ok(Some((bitmaps, name)))
    }

    /// Opens what shows a disk as it was and, if that is described inline, the filter above the disk.
    pub(super) async fn open_snapshot_access(
        &self,
        name: Option<&str>,
        file: NodeRef,
        resolved: Resolved,
        site: Site,
    ) -> Result<NodeId, EngineError> {
        let inherits = Inherits::Held(resolved);
        let file = self.open_below(file, inherits, site).await?;
        let outcome = async {
            let reserved = self.reserve(name)?;
            let _held = self.hold_still(&[&file], site.batch).await;
            let child = self.child_now(&file, site.batch)?;
            let record = NodeRecord {
                filename: self.filename(child),
                plan: NodePlan::SnapshotAccess {
                    child,
                    options: SnapshotAccessOptions {
                        read_only: resolved.read_only,
                        discard: resolved.discard,
                    },
                },
                thread: self.thread_of(child),
                ..reserved.record("snapshot-access", resolved, site)?
            };
            let id = self.enlist(record, Some((child, FILE_ROLE))).await?;
            self.adopt(id, &file);
            Ok(id)
        }
        .await;
        self.settle(file, outcome).await
    }
}

/// What has changed according to a bitmap, as of now.
///
/// # Errors
/// In QEMU's words.
fn cbw_map(bitmaps: &NodeBitmaps, name: &str, length_bytes: u64) -> Result<DirtyMap, EngineError> {
    let map = bitmaps.with(name, Need::Read, |one| one.map().clone());
    let map = map.and_then(|map| match map.length_bytes() == length_bytes {
        true => Ok(map),
        false => Err(EngineError::generic(format!(
            "Bitmaps are of different sizes (destination size is {length_bytes}, source size is \
             {}) and can't be merged",
            map.length_bytes()
        ))),
    });
    map.map_err(|error| {
        error.prefixed(&format!(
            "Cannot create block-copy-state: Failed to merge bitmap '{name}' to internal \
             copy-bitmap: "
        ))
    })
}

/// Fails if this cannot be the smallest unit of copying.
///
/// # Errors
/// In QEMU's words.
fn check_cluster_size(minimum: u64) -> Result<(), String> {
    let before = "Cannot create block-copy-state: min-cluster-size";
    if i64::try_from(minimum).is_err() {
        return Err(format!("{before} too large: {minimum} > {}", i64::MAX));
    }
    match minimum == 0 || minimum.is_power_of_two() {
        true => Ok(()),
        false => Err(format!("{before} needs to be a power of 2")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_a_power_of_two_that_fits() {
        assert_eq!(
            (check_cluster_size(0), check_cluster_size(512)),
            (Ok(()), Ok(()))
        );
        assert!(check_cluster_size(3).is_err_and(|text| text.ends_with("a power of 2")));
        let huge = check_cluster_size(1 << 63).expect_err("too large");
        assert!(huge.ends_with("9223372036854775808 > 9223372036854775807"));
    }
}
