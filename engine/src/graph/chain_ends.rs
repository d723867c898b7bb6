//! The good end of commit and stream: headers tell of the new backing, then the chain is linked like that.
//!
//! What is seen through every overlay is the same before and after, so the two may be apart: a power cut in between leaves
//! a header that tells of either, and requests in flight end on the old chain.

use crate::data::NodeId;
use crate::error::{EngineError, JobError};
use crate::graph::Graph;
use crate::graph::chain_jobs::{ChainPart, NewBacking};
use crate::graph::jobs::JobNodes;
use crate::graph::records::{BACKING_ROLE, Records, User};
use crate::graph::reopen::{Writable, pin};
use crate::job::context::JobKey;
use crate::node::build::NodePlan;

impl Graph {
    /// Links the chain anew for a commit or a stream that has moved everything, durably.
    ///
    /// # Errors
    /// When a header cannot be written. Everything reads as before, whichever way its header tells of the chain.
    pub async fn finish_chain(&self, key: JobKey, nodes: &JobNodes) -> Result<(), JobError> {
        let (Some(part), Some(source), Some(target)) = (&nodes.chain, nodes.source, nodes.target)
        else {
            return Ok(());
        };
        let finished = match source == target {
            true => self.finish_stream(source, part).await,
            false => self.finish_commit(key, nodes, part, target).await,
        };
        finished.map_err(|error| JobError::text(error.text))
    }

    async fn finish_stream(&self, device: NodeId, part: &ChainPart) -> Result<(), EngineError> {
        let device = self.records.borrow().unfiltered(device);
        if self.records.borrow().backing(device).is_none() {
            return Ok(());
        }
        let last = part.inner.last().copied().unwrap_or(device);
        if self.records.borrow().node(last).is_none() {
            // Without it nothing tells what stays. Never nothing: the disk would lose all that is below.
            return Err(EngineError::generic(
                "The last node of the stream is gone; the chain stays as it was",
            ));
        }
        // What is there then: it may have been replaced meanwhile.
        let stays = move |records: &Records| match part.is_whole {
            true => None,
            false => records.next_in_chain(last),
        };
        self.relink(device, stays, &part.named).await
    }

    async fn finish_commit(
        &self,
        key: JobKey,
        nodes: &JobNodes,
        part: &ChainPart,
        base: NodeId,
    ) -> Result<(), EngineError> {
        let Some(filter) = nodes.filter else {
            return Ok(());
        };
        self.let_go_of_base(key, base);
        let mut put = Vec::new();
        let finished = async {
            for overlay in self.overlays_of(filter) {
                self.relink(overlay, |_| Some(base), &part.named).await?;
                put.push(overlay);
            }
            // Users that are no images see the same from the base on.
            self.move_users(filter, base, Some(key), |_| ()).await
        };
        let finished: Result<(), EngineError> = finished.await;
        // Their headers tell of the base, and nothing is wrong with that: writing them back would be one more thing to fail.
        finished.map_err(|error| match put.is_empty() {
            true => error,
            false => self.stays_on(base, &put, error),
        })
    }

    /// What is above an active commit that is being completed goes to its base: first images, whose headers stay what they are,
    /// then all others. A base that was opened for writing stays so where the device may be written. All or nothing, as the
    /// device goes on to be written if the job fails.
    ///
    /// # Errors
    /// When the users of the device cannot live with the base. Everybody is where he was then; an image that could not be put
    /// back is named.
    pub async fn finish_active_commit(
        &self,
        key: JobKey,
        nodes: &JobNodes,
    ) -> Result<(), JobError> {
        let (Some(filter), Some(base)) = (nodes.filter, nodes.target) else {
            return Ok(());
        };
        self.let_go_of_base(key, base);
        let mut put = Vec::new();
        let finished = async {
            for overlay in self.overlays_of(filter) {
                let on_base = self.put_image_on(overlay, base).await;
                on_base.map_err(|error| JobError::text(error.text))?;
                put.push(overlay);
            }
            self.pivot(key, nodes, None).await
        };
        let Err(error) = finished.await else {
            return Ok(());
        };
        let mut stay = Vec::new();
        for overlay in put.into_iter().rev() {
            if let Err(error) = self.put_image_on(overlay, filter).await {
                tracing::error!(%error, "an image stays on the base of a commit that has failed");
                stay.push(overlay);
            }
        }
        Err(match stay.is_empty() {
            true => error,
            false => {
                let told = self.stays_on(base, &stay, EngineError::generic(&*error.text));
                JobError::text(told.text)
            }
        })
    }

    /// Tells of images that are on the base of a commit although it has failed.
    fn stays_on(&self, base: NodeId, images: &[NodeId], error: EngineError) -> EngineError {
        let records = self.records.borrow();
        let names = images
            .iter()
            .map(|id| format!("'{}'", records.name_of(*id)));
        let names = names.collect::<Vec<_>>().join(", ");
        EngineError::generic(format!(
            "{} (on '{}' now, which shows the same: {names})",
            error.text,
            records.name_of(base)
        ))
    }

    /// Puts an image on another backing, where it is kept from others meanwhile.
    async fn put_image_on(&self, image: NodeId, backing: NodeId) -> Result<(), EngineError> {
        self.pin(image).await?;
        let put = self.put_on_backing(image, Some(backing)).await;
        self.release(image, &pin(image)).await;
        put
    }

    /// A commit that has moved everything does not write to its base any more. What comes to stand on the base now may be written
    /// to by another job, which wants all that is below it to stay as it is.
    fn let_go_of_base(&self, key: JobKey, base: NodeId) {
        let mut records = self.records.borrow_mut();
        let let_go = records.change_edges(|edges| {
            edges.retain(|edge| edge.child != base || edge.user != User::Backend(key));
        });
        if let Err(error) = let_go {
            tracing::error!(%error, "a job keeps its base");
        }
    }

    /// The base of an active commit that has not failed stays writable where its device is.
    pub fn keep_writable(&self, key: JobKey, nodes: &JobNodes) {
        let mut records = self.records.borrow_mut();
        let device = nodes.source.and_then(|device| records.node(device));
        if device.is_some_and(|device| !device.read_only) {
            records.writable.retain(|(job, _)| *job != key);
        }
    }

    fn overlays_of(&self, filter: NodeId) -> Vec<NodeId> {
        let records = self.records.borrow();
        let users = records.users(filter);
        let overlays = users.filter(|edge| edge.role == BACKING_ROLE);
        overlays
            .filter_map(|edge| match edge.user {
                User::Node(overlay) => Some(overlay),
                _ => None,
            })
            .collect()
    }

    /// Lets the header of an image tell of another backing, and puts the image on it. Nobody opens it in another way in between.
    async fn relink(
        &self,
        image: NodeId,
        backing: impl Fn(&Records) -> Option<NodeId>,
        named: &NewBacking,
    ) -> Result<(), EngineError> {
        self.pin(image).await?;
        let now = || backing(&self.records.borrow());
        let linked = async {
            self.name_backing(image, now(), named).await?;
            // Another job may have put its filter there, or taken it away.
            self.put_on_backing(image, now()).await
        };
        let linked = linked.await;
        self.release(image, &pin(image)).await;
        linked
    }

    /// Puts an image on another backing, unless it was closed while others were changing it.
    async fn put_on_backing(
        &self,
        image: NodeId,
        backing: Option<NodeId>,
    ) -> Result<(), EngineError> {
        if self.records.borrow().node(image).is_none() {
            return Ok(());
        }
        self.set_backing_live(image, backing).await
    }

    /// Lets the header of an image tell of another backing, durably, where an edge of the caller keeps it. An image that is
    /// read-only is opened for writing for it.
    async fn name_backing(
        &self,
        image: NodeId,
        backing: Option<NodeId>,
        named: &NewBacking,
    ) -> Result<(), EngineError> {
        let (name, format, shown) = {
            let records = self.records.borrow();
            let is_image = records
                .node(image)
                .is_some_and(|node| matches!(node.plan, NodePlan::Qcow2 { .. }));
            if !is_image {
                return Ok(());
            }
            let shown = backing.and_then(|backing| records.node(records.unfiltered(backing)));
            match shown {
                None => (String::new(), "", String::new()),
                Some(node) => {
                    let folder = records.folder(image).unwrap_or_default();
                    let seen = node.filename.seen_from(folder);
                    let format = match named.mask_protocol && node.is_protocol() {
                        true => "raw",
                        false => node.driver,
                    };
                    let name = named.name.clone().unwrap_or(seen);
                    (name, format, node.filename.to_string())
                }
            }
        };
        self.rewrite_backing(image, format, &name).await?;
        if named.name.is_none() {
            // The header leads there, however it names it.
            let mut records = self.records.borrow_mut();
            let image = records.node_mut(image).and_then(|node| node.image.as_mut());
            if let Some(image) = image {
                image.own_backing = shown;
            }
        }
        Ok(())
    }

    /// What was opened for writing for a job is read-only again.
    pub(super) async fn close_for_writing(&self, key: JobKey) {
        let opened: Vec<Writable> = {
            let mut records = self.records.borrow_mut();
            let mut all = std::mem::take(&mut records.writable);
            let own = all.extract_if(.., |(job, _)| *job == key);
            let own = own.map(|(_, writable)| writable).collect();
            records.writable = all;
            own
        };
        for writable in opened {
            self.restore_read_only(writable).await;
        }
    }

    /// What is not of a chain any more goes, unless somebody has named it or uses it.
    pub(super) async fn drop_out_of_chain(&self, part: &ChainPart) {
        for id in &part.inner {
            let is_owned = {
                let records = self.records.borrow();
                records.node(*id).is_none_or(|node| node.monitor_owned)
            };
            if !is_owned {
                self.close_unused(*id).await;
            }
        }
    }
}

#[cfg(test)]
#[path = "chain_ends_tests.rs"]
mod tests;
