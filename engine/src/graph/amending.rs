//! What amending an image needs of the graph: its node, and what is known of the image afterwards.

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::amend::AmendOptions;
use blockyard_storage::error::{ENOSPC, errno_text};

use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::image_names::BackingName;
use crate::graph::jobs::{JobNodes, edge};
use crate::graph::permissions::Permissions;
use crate::graph::records::{Edge, Records, User};
use crate::graph::reopen::pin;
use crate::graph::{Graph, not_found};
use crate::node::AmendStop;
use crate::node::build::NodePlan;
use crate::request::{AmendSpec, Permission};

/// What amending an image changes for those who use its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AmendEffect {
    /// Nothing is done at all.
    None,
    /// How the image says what it holds. An overlay may stand on it, and others may use it.
    Form,
    /// The length of the disk.
    Length,
}

impl AmendEffect {
    /// What the job takes, and what it leaves to others.
    pub(super) fn permissions(self) -> (Permissions, Permissions) {
        let reads = Permissions::NONE.with(Permission::ConsistentRead);
        match self {
            Self::None => (Permissions::NONE, Permissions::EVERY),
            Self::Form => (
                reads.with(Permission::WriteUnchanged),
                Permissions::EVERY.without(Permission::Resize),
            ),
            Self::Length => {
                let writes = reads.with(Permission::Write);
                (writes.with(Permission::Resize), Permissions::NONE)
            }
        }
    }
}

impl Graph {
    /// The node of an image that is to be amended.
    ///
    /// # Errors
    /// In QEMU's words and order.
    pub(super) fn prepare_amend(&self, spec: &AmendSpec) -> Result<JobNodes, EngineError> {
        let target = self
            .find(&spec.node)
            .ok_or_else(|| not_found("", &spec.node))?;
        let records = self.records.borrow();
        let driver = records.node(target).map(|node| node.driver);
        if driver != Some(&*spec.driver) {
            return Err(EngineError::generic(
                "x-blockdev-amend doesn't support changing the block driver",
            ));
        }
        if spec.driver != "qcow2" {
            let text = "Driver does not support x-blockdev-amend";
            return Err(EngineError::generic(text));
        }
        // What encryption needs is told by the job.
        let effect = match spec {
            AmendSpec { encrypt: true, .. } => AmendEffect::None,
            AmendSpec { size: Some(_), .. } => AmendEffect::Length,
            spec if spec.changes_something() => AmendEffect::Form,
            _ => AmendEffect::None,
        };
        if effect != AmendEffect::None {
            records.check_active(target)?;
        }
        match effect {
            AmendEffect::None => {}
            AmendEffect::Form => records.check_no_job(target)?,
            AmendEffect::Length => records.check_free(target)?,
        }
        Ok(JobNodes {
            target: Some(target),
            amends: Some(effect),
            ..JobNodes::default()
        })
    }

    /// Rewrites what the header of an image says of its backing file. The graph stays as it is.
    ///
    /// # Errors
    /// In QEMU's words and order; nothing has changed then.
    pub async fn change_backing_file(
        &self,
        device: &str,
        image_node_name: &str,
        backing_file: &str,
    ) -> Result<(), EngineError> {
        let (image, format) = {
            let _held = self.hold_named(&[device, image_node_name]).await;
            let root = self.look_up(device)?;
            if self.records.borrow().has_node_or_job_parent(root) {
                return Err(EngineError::generic("Need a root block node"));
            }
            let image = self
                .find(image_node_name)
                .ok_or_else(|| not_found("", image_node_name))?;
            let mut records = self.records.borrow_mut();
            let format = format_below(&records, image).ok_or_else(|| {
                EngineError::generic(
                    "not allowing backing file change on an image without a backing file",
                )
            })?;
            records.check_no_job(root)?;
            check_same_chain(&records, (root, device), image)?;
            records.check_no_job(image)?;
            records.check_active(image)?;
            records.check_unpinned(&records.component(image), None)?;
            records.change_edges(|edges| edges.push(pin(image)))?;
            (image, format)
        };
        let changed = self.rewrite_backing(image, format, backing_file).await;
        self.release(image, &pin(image)).await;
        changed
    }

    /// Rewrites what the header of an image says, which an edge keeps where it is, and which may be read-only.
    pub(super) async fn rewrite_backing(
        &self,
        image: NodeId,
        format: &str,
        backing_file: &str,
    ) -> Result<(), EngineError> {
        let writable = self.make_writable(image).await?;
        let taken = {
            let mut records = self.records.borrow_mut();
            records.change_edges(|edges| edges.push(header_writer(image)))
        };
        let changed = match taken {
            Ok(()) => self.write_backing(image, format, backing_file).await,
            Err(error) => Err(error),
        };
        self.make_read_only(writable).await;
        changed
    }

    /// Rewrites what the header of an image says that may be written.
    async fn write_backing(
        &self,
        image: NodeId,
        format: &str,
        backing_file: &str,
    ) -> Result<(), EngineError> {
        let options = AmendOptions {
            backing_name: Some(backing_file.as_bytes().to_vec()),
            backing_format: Some(format.as_bytes().to_vec()).filter(|_| !backing_file.is_empty()),
            ..AmendOptions::default()
        };
        // The edge keeps the node where it is. Writing a header may wait for a disk.
        let changed = self.threads.run(self.thread_of(image), move |context| {
            Box::pin(async move {
                match context.node(image) {
                    Some(node) => node.amend(&options, &Unwatched).await,
                    None => Err(AmendStop::Refused("The node is gone".to_owned())),
                }
            })
        });
        let changed = changed.await;
        self.take_in_amended(image).await;
        self.release(image, &header_writer(image)).await;
        changed?.map_err(|stop| {
            let reason = reason_of(stop);
            EngineError::generic(format!(
                "Could not change backing file to '{backing_file}': {reason}"
            ))
        })
    }

    /// Takes note of what an image has become, for queries and for moves to another thread; its bitmaps are written down anew.
    pub(super) async fn take_in_amended(&self, id: NodeId) {
        let reopened = self.threads.run(self.thread_of(id), move |context| {
            Box::pin(async move {
                let node = context.node(id)?;
                let reopened = node.take_reopened()?;
                node.record_bitmaps().await;
                Some(reopened)
            })
        });
        let Ok(Some(reopened)) = reopened.await else {
            return;
        };
        let mut records = self.records.borrow_mut();
        let Some(record) = records.node_mut(id) else {
            return;
        };
        if let NodePlan::Qcow2 { plan, .. } = &mut record.plan {
            plan.image = reopened.options;
        }
        if let Some(image) = &mut record.image {
            image.info = Some(reopened.info);
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let backing = reopened.backing.map(|(name, format)| BackingName {
                name,
                format: format.as_deref().map(text),
            });
            if image.backing != backing {
                // What is below now is not what it names any more, as far as can be told.
                image.own_backing = backing.as_ref().map(BackingName::shown).unwrap_or_default();
                image.backing = backing;
            }
        }
        for id in records.component(id) {
            records.name_image(id);
        }
    }
}

/// Fails if the image is not of a chain that begins with `device`.
fn check_same_chain(
    records: &Records,
    device: (NodeId, &str),
    image: NodeId,
) -> Result<(), EngineError> {
    let mut next = Some(device.0);
    while let Some(node) = next {
        if node == image {
            return Ok(());
        }
        next = records.next_in_chain(node);
    }
    let text = format!("'{}' and image file are not in the same chain", device.1);
    Err(EngineError::generic(text))
}

/// Format of what is below an image, behind filters.
fn format_below(records: &Records, image: NodeId) -> Option<&'static str> {
    let mut node = records.node(records.next_in_chain(image)?)?;
    while node.is_filter() {
        node = records.node(records.next_in_chain(node.id)?)?;
    }
    Some(node.driver)
}

/// What a command takes while it changes what the header of an image says.
fn header_writer(image: NodeId) -> Edge {
    let (taken, shared) = AmendEffect::Form.permissions();
    edge(User::Command, image, "root", taken, shared)
}

/// Why a backing file was not changed, as `change-backing-file` says it.
fn reason_of(stop: AmendStop) -> String {
    match stop {
        AmendStop::Cancelled => "Operation canceled".to_owned(),
        AmendStop::Failed(error) => errno_text(error.errno()),
        AmendStop::Refused(text) => match text.rsplit_once(": ") {
            Some((_, "No space left in the file header")) => errno_text(ENOSPC),
            Some((_, reason)) => reason.to_owned(),
            None => text,
        },
    }
}
