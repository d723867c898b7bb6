//! Dirty bitmaps of nodes: found by name, made, changed, merged. None of it waits for a disk.

use std::sync::Arc;

use crate::bitmap::{Bitmap, HeldBitmap, Need, NodeBitmaps};
use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::{Graph, not_found};
use crate::node::dirty_map::DirtyMap;
use crate::request::{BitmapChange, BitmapName};

/// Bytes of a granule at least.
const GRANULARITY_MIN_BYTES: u32 = 512;

/// What a granule is where the node's clusters are no measure, and at most where they are.
const GRANULARITY_BYTES: u32 = 64 << 10;

/// What a granule is where the node's clusters are shorter.
const GRANULARITY_OF_CLUSTERS_MIN_BYTES: u32 = 4 << 10;

/// Granules of a bitmap at most: 4 GiB of memory if every other one has changed.
const GRANULES_MAX: u64 = 1 << 35;

/// A change of a bitmap that has been carried out, and can still be taken back.
#[must_use = "it is settled or taken back"]
pub enum ChangedBitmap {
    /// A new one.
    Added(Arc<NodeBitmaps>, String),
    /// What one says, or whether it records.
    Content(Arc<NodeBitmaps>, String),
    /// One that goes, and is in use until then.
    Removing(Arc<NodeBitmaps>, HeldBitmap),
}

impl ChangedBitmap {
    /// It is final.
    pub fn settle(self) {
        let settled = match self {
            Self::Added(..) => Ok(()),
            Self::Content(bitmaps, name) => bitmaps.with(&name, Need::Show, Bitmap::forget),
            Self::Removing(bitmaps, held) => {
                let name = held.name().to_owned();
                drop(held);
                bitmaps.take_out(&name).map(drop)
            }
        };
        if let Err(error) = settled {
            tracing::error!(%error, "a bitmap has gone during a transaction");
        }
    }

    /// It is taken back; what was written meanwhile stays marked.
    pub fn undo(self) {
        let undone = match self {
            Self::Added(bitmaps, name) => bitmaps.take_out(&name).map(drop),
            Self::Content(bitmaps, name) => bitmaps.with(&name, Need::Show, Bitmap::restore),
            Self::Removing(bitmaps, held) => {
                bitmaps.with(held.name(), Need::Show, |one| one.set_going(false))
            }
        };
        if let Err(error) = undone {
            tracing::error!(%error, "a bitmap has gone during a transaction");
        }
    }
}

impl Graph {
    /// Makes, changes or removes a bitmap.
    ///
    /// # Errors
    /// In QEMU's words and order; nothing has changed then.
    pub async fn change_bitmap(&self, change: &BitmapChange) -> Result<ChangedBitmap, EngineError> {
        match change {
            BitmapChange::Add {
                bitmap,
                granularity_bytes,
                persistent,
                disabled,
            } => {
                self.add_bitmap(bitmap, *granularity_bytes, *persistent, *disabled)
                    .await
            }
            BitmapChange::Remove(bitmap) => self.remove_bitmap(bitmap).await,
            BitmapChange::Clear(bitmap) => {
                let bitmaps = self.bitmaps_of(bitmap)?;
                bitmaps.with(&bitmap.name, Need::Change, |one| {
                    one.keep_content();
                    one.clear();
                })?;
                Ok(ChangedBitmap::Content(bitmaps, bitmap.name.clone()))
            }
            BitmapChange::Enable(bitmap) => self.set_recording(bitmap, true),
            BitmapChange::Disable(bitmap) => self.set_recording(bitmap, false),
            BitmapChange::Merge { target, sources } => self.merge_bitmaps(target, sources),
        }
    }

    /// Has what the image of a node keeps of bitmaps written down as it is now, so that a crash does not lose what has been done with
    /// them. Waits for disks.
    pub async fn record_bitmaps(&self, node: &str) {
        if self.state.is_none() {
            return;
        }
        let Some(node) = self.find(node) else {
            return;
        };
        self.record_bitmaps_of(node).await;
    }

    /// SHA-256 of a bitmap's bits.
    ///
    /// # Errors
    /// In QEMU's words: it is not there, or cannot be used.
    pub async fn digest_bitmap(&self, bitmap: &BitmapName) -> Result<[u8; 32], EngineError> {
        let bitmaps = self.bitmaps_of(bitmap)?;
        let map = bitmaps.with(&bitmap.name, Need::Show, |one| one.map().clone())?;
        // Fine bits of a long disk take a while.
        let digest = tokio::task::spawn_blocking(move || map.sha256()).await;
        digest.map_err(|_| EngineError::generic("Internal error: a digest is lost (bug)"))
    }

    async fn add_bitmap(
        &self,
        bitmap: &BitmapName,
        granularity_bytes: Option<u32>,
        persistent: bool,
        disabled: bool,
    ) -> Result<ChangedBitmap, EngineError> {
        if bitmap.name.is_empty() {
            return Err(EngineError::generic("Bitmap name cannot be empty"));
        }
        let _held = self.hold_named(&[&bitmap.node]).await;
        let node = self.find(&bitmap.node);
        let node = node.ok_or_else(|| not_found(&bitmap.node, &bitmap.node))?;
        let facts = self.facts(node).await?;
        let granularity_bytes = match granularity_bytes {
            Some(bytes) if bytes < GRANULARITY_MIN_BYTES || !bytes.is_power_of_two() => {
                let text = "Granularity must be power of 2 and at least 512";
                return Err(EngineError::generic(text));
            }
            Some(bytes) => bytes,
            None => facts
                .cluster_size_bytes
                .map_or(GRANULARITY_BYTES, |cluster| {
                    cluster.clamp(GRANULARITY_OF_CLUSTERS_MIN_BYTES, GRANULARITY_BYTES)
                }),
        };
        let bitmaps = self.bitmaps_on(node)?;
        if persistent {
            self.records.borrow().check_active(node)?;
            let name = bitmap.name.clone();
            let asked = self.threads.run(self.thread_of(node), move |context| {
                Box::pin(async move {
                    context
                        .node(node)?
                        .bitmap_refusal(&name, u64::from(granularity_bytes))
                })
            });
            if let Some(refusal) = asked.await? {
                return Err(EngineError::generic(refusal));
            }
        }
        bitmaps.check_new(&bitmap.name)?;
        self.check_not_kept(node, &bitmap.name)?;
        let granularity_bytes = u64::from(granularity_bytes);
        if facts.length_bytes / granularity_bytes > GRANULES_MAX {
            return Err(EngineError::generic(format!(
                "Granularity of {granularity_bytes} bytes is too small for a node of {} bytes; use at least {}",
                facts.length_bytes,
                facts
                    .length_bytes
                    .div_ceil(GRANULES_MAX)
                    .next_power_of_two()
            )));
        }
        let mut new = Bitmap::new(bitmap.name.clone(), facts.length_bytes, granularity_bytes);
        new.set_recording(!disabled);
        if persistent {
            new.keep();
        }
        bitmaps.add(new)?;
        Ok(ChangedBitmap::Added(bitmaps, bitmap.name.clone()))
    }

    /// That an inactive image has kept no bitmap of this name when it was given away: it could not be activated then.
    ///
    /// # Errors
    /// QEMU's text for an active one.
    fn check_not_kept(&self, node: NodeId, name: &str) -> Result<(), EngineError> {
        let records = self.records.borrow();
        let node = records.node(node).filter(|node| node.inactive);
        let image = node.and_then(|node| node.image.as_ref());
        let version_3 = image
            .and_then(|image| image.info.as_ref())
            .and_then(|info| info.version_3.as_ref());
        let mut kept = version_3.into_iter().flat_map(|known| &known.bitmaps);
        match kept.any(|one| one.name == name) {
            true => Err(EngineError::generic(format!(
                "Bitmap already exists: {name}"
            ))),
            false => Ok(()),
        }
    }

    /// Takes a bitmap out of the image that keeps it. It is in use by its removal from then on.
    async fn remove_bitmap(&self, bitmap: &BitmapName) -> Result<ChangedBitmap, EngineError> {
        let _held = self.hold_named(&[&bitmap.node]).await;
        let bitmaps = self.bitmaps_of(bitmap)?;
        let name_in_image = bitmaps.with(&bitmap.name, Need::Remove, |one| {
            one.name_in_image().map(<[u8]>::to_vec)
        })?;
        let held = bitmaps.hold(&bitmap.name)?;
        if let (Some(name), Some(node)) = (name_in_image, self.find(&bitmap.node)) {
            let removed = self.threads.run(self.thread_of(node), move |context| {
                Box::pin(async move {
                    let lost = || EngineError::generic("Internal error: a node is lost (bug)");
                    let node = context.node(node).ok_or_else(lost)?;
                    node.remove_bitmap(name).await?;
                    Ok::<_, EngineError>(node.kept_bitmaps())
                })
            });
            let kept = removed.await??;
            let mut records = self.records.borrow_mut();
            let image = records.node_mut(node).and_then(|node| node.image.as_mut());
            let info = image.and_then(|image| image.info.as_mut());
            if let Some(version_3) = info.and_then(|info| info.version_3.as_mut()) {
                version_3.bitmaps = kept;
            }
        }
        bitmaps.with(&bitmap.name, Need::Show, |one| one.set_going(true))?;
        Ok(ChangedBitmap::Removing(bitmaps, held))
    }

    fn set_recording(
        &self,
        bitmap: &BitmapName,
        records: bool,
    ) -> Result<ChangedBitmap, EngineError> {
        let bitmaps = self.bitmaps_of(bitmap)?;
        bitmaps.with(&bitmap.name, Need::Switch, |one| {
            one.keep_content();
            one.set_recording(records);
        })?;
        Ok(ChangedBitmap::Content(bitmaps, bitmap.name.clone()))
    }

    /// Everything is looked up before anything changes.
    fn merge_bitmaps(
        &self,
        target: &BitmapName,
        sources: &[BitmapName],
    ) -> Result<ChangedBitmap, EngineError> {
        let into = self.bitmaps_of(target)?;
        let length_bytes = |one: &mut Bitmap| one.map().length_bytes();
        let target_bytes = into.with(&target.name, Need::Change, length_bytes)?;
        let mut maps: Vec<DirtyMap> = Vec::new();
        for source in sources {
            let from = self.bitmaps_of(source)?;
            let map = from.with(&source.name, Need::Read, |one| one.map().clone())?;
            if map.length_bytes() != target_bytes {
                return Err(EngineError::generic(format!(
                    "Bitmaps are of different sizes (destination size is {target_bytes}, \
                     source size is {}) and can't be merged",
                    map.length_bytes()
                )));
            }
            maps.push(map);
        }
        into.with(&target.name, Need::Change, |one| {
            one.keep_content();
            maps.iter().for_each(|map| one.merge(map));
        })?;
        Ok(ChangedBitmap::Content(into, target.name.clone()))
    }

    /// The bitmaps of the first node that has one of this name: of `node` and what is below it in its chain.
    pub fn bitmaps_in_chain(&self, node: NodeId, name: &str) -> Option<Arc<NodeBitmaps>> {
        let records = self.records.borrow();
        let nodes = records.chain(node).filter_map(|node| records.node(node));
        let mut bitmaps = nodes.map(|node| &node.bitmaps);
        bitmaps.find(|bitmaps| bitmaps.has(name)).cloned()
    }

    /// The bitmaps among which one is looked for.
    ///
    /// # Errors
    /// In QEMU's words: the node is not there.
    pub fn bitmaps_of(&self, bitmap: &BitmapName) -> Result<Arc<NodeBitmaps>, EngineError> {
        let not_found = || EngineError::generic(format!("Node '{}' not found", bitmap.node));
        self.bitmaps_on(self.find(&bitmap.node).ok_or_else(not_found)?)
    }

    pub(super) fn bitmaps_on(&self, node: NodeId) -> Result<Arc<NodeBitmaps>, EngineError> {
        let records = self.records.borrow();
        let node = records.node(node);
        let lost = || EngineError::generic("Internal error: a node is lost (bug)");
        node.map(|node| Arc::clone(&node.bitmaps)).ok_or_else(lost)
    }
}
