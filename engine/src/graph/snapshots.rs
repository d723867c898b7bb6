//! Internal snapshots of images that nodes show: checks in QEMU's words and order, and what is known of the image afterwards.

use std::time::{SystemTime, UNIX_EPOCH};

use blockyard_images::qcow2::info::{SnapshotInfo, Version3Info};
use blockyard_images::qcow2::snapshot::{NewSnapshot, SnapshotChoice};
use blockyard_storage::error::{ECANCELED, errno_text};

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::permissions::Permissions;
use crate::graph::records::{Edge, NodeRecord, Records, User};
use crate::graph::{Graph, not_found};
use crate::node::build::NodePlan;
use crate::node::{AmendStop, SnapshotChange};

impl Graph {
    /// Makes an internal snapshot of the image that a node shows; durable when this returns.
    ///
    /// # Errors
    /// In QEMU's words and order; the image is what it was.
    pub async fn create_snapshot(&self, device: &str, name: &str) -> Result<(), EngineError> {
        let id = {
            let _held = self.hold_named(&[device]).await;
            let mut records = self.records.borrow_mut();
            let node = root(&records, device)?;
            records.check_no_job(node.id)?;
            check_writable(node)?;
            let image = records.snapshot_image(node.id);
            let Some(image) = image.filter(|image| !node.inactive && !image.inactive) else {
                return Err(EngineError::generic(format!(
                    "Block format '{}' used by device '{device}' does not support internal snapshots",
                    node.driver
                )));
            };
            records.check_no_job(image.id)?;
            check_writable(image)?;
            if name.is_empty() {
                return Err(EngineError::generic("Name is empty"));
            }
            if snapshots(Some(image))?
                .iter()
                .any(|other| other.name == name)
            {
                return Err(EngineError::generic(format!(
                    "Snapshot with name '{name}' already exists on device '{device}'"
                )));
            }
            let id = image.id;
            pin(&mut records, id)?;
            id
        };
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let new = NewSnapshot {
            name: name.as_bytes().to_vec(),
            date_seconds: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
            date_nanoseconds: now.subsec_nanos(),
            // There is no guest that runs.
            vm_clock_nanoseconds: 0,
        };
        let changed = self.change_pinned(id, SnapshotChange::Create(new)).await;
        changed.map_err(|why| {
            EngineError::generic(format!(
                "Failed to create snapshot '{name}' on device '{device}': {why}"
            ))
        })
    }

    /// Deletes an internal snapshot of the image that a node shows, durably, and tells what it was.
    ///
    /// # Errors
    /// In QEMU's words and order; the image is what it was.
    pub async fn delete_snapshot(
        &self,
        device: &str,
        id: Option<&str>,
        name: Option<&str>,
    ) -> Result<SnapshotInfo, EngineError> {
        let (node, gone) = {
            let _held = self.hold_named(&[device]).await;
            let mut records = self.records.borrow_mut();
            let node = root(&records, device)?;
            if id.is_none() && name.is_none() {
                return Err(EngineError::generic("Name or id must be provided"));
            }
            records.check_no_job(node.id)?;
            let is_meant = |other: &&SnapshotInfo| {
                id.is_none_or(|id| other.id == id) && name.is_none_or(|name| other.name == name)
            };
            let image = records.snapshot_image(node.id);
            let Some(gone) = snapshots(image)?.iter().find(is_meant).cloned() else {
                return Err(EngineError::generic(format!(
                    "Snapshot with id '{}' and name '{}' does not exist on device '{device}'",
                    id.unwrap_or("null"),
                    name.unwrap_or("null")
                )));
            };
            let image = image.unwrap_or(node);
            check_writable(node)?;
            check_writable(image)?;
            records.check_active(image.id)?;
            records.check_no_job(image.id)?;
            let image = image.id;
            pin(&mut records, image)?;
            (image, gone)
        };
        // What the client has said: names are any bytes in the file.
        let bytes = |text: &str| text.as_bytes().to_vec();
        let choice = match (id, name) {
            (Some(id), Some(name)) => SnapshotChoice::Both {
                id: bytes(id),
                name: bytes(name),
            },
            (Some(id), None) => SnapshotChoice::Id(bytes(id)),
            (None, name) => SnapshotChoice::Name(bytes(name.unwrap_or_default())),
        };
        let changed = self
            .change_pinned(node, SnapshotChange::Delete(choice))
            .await;
        match changed {
            Ok(()) => Ok(gone),
            Err(why) => Err(EngineError::generic(format!(
                "Failed to delete snapshot '{}' on device '{device}': {why}",
                gone.name
            ))),
        }
    }

    /// Changes the snapshots of a node that is kept where it is, and lets it go. Why not, as a text.
    async fn change_pinned(&self, id: NodeId, change: SnapshotChange) -> Result<(), String> {
        let changed = self.threads.run(self.thread_of(id), move |context| {
            Box::pin(async move {
                match context.node(id) {
                    Some(node) => node.change_snapshots(change).await,
                    None => Err(AmendStop::Refused("The node is gone (bug)".to_owned())),
                }
            })
        });
        let changed = changed.await;
        self.take_in_amended(id).await;
        self.release(id, &user(id)).await;
        match changed.map_err(|error| error.text)? {
            Ok(()) => Ok(()),
            Err(AmendStop::Refused(text)) => Err(text),
            Err(AmendStop::Failed(error)) => Err(errno_text(error.errno())),
            Err(AmendStop::Cancelled) => Err(errno_text(ECANCELED)),
        }
    }
}

impl Records {
    /// The image whose internal snapshots are those of a node: its own, or that of the only node that it passes everything on to.
    pub(super) fn snapshot_image(&self, id: NodeId) -> Option<&NodeRecord> {
        let mut node = self.node(id)?;
        while passes_on(node) {
            let mut children = self.children(node.id);
            let below = children.next()?.child;
            if children.next().is_some() {
                // What goes elsewhere as well is no part of the snapshot.
                return None;
            }
            node = self.node(below)?;
        }
        matches!(node.plan, NodePlan::Qcow2 { .. }).then_some(node)
    }
}

/// Whether a node that a client has added holds nothing itself.
fn passes_on(node: &NodeRecord) -> bool {
    matches!(
        node.plan,
        NodePlan::Raw { .. }
            | NodePlan::Blkdebug { .. }
            | NodePlan::CopyOnRead { .. }
            | NodePlan::Throttle { .. }
            | NodePlan::CopyBeforeWrite { .. }
    )
}

/// The node that a command names, if no other node and no job stands on it.
fn root<'a>(records: &'a Records, device: &str) -> Result<&'a NodeRecord, EngineError> {
    let node = records
        .by_name(device, None)
        .ok_or_else(|| not_found(device, device))?;
    match records.has_node_or_job_parent(node.id) {
        true => Err(EngineError::generic("Need a root block node")),
        false => Ok(node),
    }
}

fn check_writable(node: &NodeRecord) -> Result<(), EngineError> {
    match node.read_only {
        true => Err(EngineError::generic(format!(
            "Device '{}' is read only",
            node.name
        ))),
        false => Ok(()),
    }
}

/// The internal snapshots of a node's image.
fn snapshots(image: Option<&NodeRecord>) -> Result<&[SnapshotInfo], EngineError> {
    let image = image.and_then(|node| node.image.as_ref());
    let info = image.and_then(|image| image.info.as_ref());
    let has_data_file = |version_3: &Version3Info| version_3.data_file_raw.is_some();
    match info {
        Some(info) if !info.version_3.as_ref().is_some_and(has_data_file) => Ok(&info.snapshots),
        _ => Err(EngineError::generic(
            "Failed to get a snapshot list: Operation not supported",
        )),
    }
}

/// Keeps a node where it is.
fn pin(records: &mut Records, id: NodeId) -> Result<(), EngineError> {
    records.check_unpinned(&records.component(id), None)?;
    records.change_edges(|edges| edges.push(user(id)))
}

fn user(id: NodeId) -> Edge {
    Edge {
        user: User::Command,
        child: id,
        role: "root",
        taken: Permissions::NONE,
        shared: Permissions::EVERY,
    }
}
