//! Bitmaps of a checkpoint on one disk: a new one beside that of the checkpoint before, until it is certain which of them it is.
//!
//! ```text
//!   before      previous records
//!   begun       previous records | new records, no image keeps it | a copy of previous stays as it was
//!   committed   new records, the image keeps it
//!   aborted     previous records
//! ```
//! As the older one goes on recording all the time, nothing is lost whichever way it ends, and a crash is an end of the second kind.

use std::sync::Arc;

use crate::bitmap::{Bitmap, HeldBitmap, Need, NodeBitmaps, Succession};
use crate::checkpoint::{CheckpointDiskSpec, CheckpointDiskView};
use crate::data::NodeId;
use crate::error::EngineError;
use crate::graph::Graph;
use crate::graph::records::{NodeRecord, Records};
use crate::node::build::NodePlan;
use crate::node::dirty_map::DirtyMap;
use crate::request::{BitmapChange, BitmapName};

/// Which file holds an image: its path, and its device and inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFile {
    /// As the kernel knows it; empty: it has none any more.
    pub path: Vec<u8>,
    /// Device and inode.
    pub identity: (u64, u64),
}

impl ImageFile {
    /// Whether both are of one file.
    pub fn is(&self, path: &[u8], identity: (u64, u64)) -> bool {
        self.identity == identity || !path.is_empty() && self.path == path
    }
}

impl Records {
    /// The file below an image and whatever filters are in between.
    fn image_file(&self, image: NodeId) -> Option<ImageFile> {
        let mut node = image;
        loop {
            node = self.primary(node)?;
            if let NodePlan::File { file, .. } = &self.node(node)?.plan {
                return Some(ImageFile {
                    path: file.path(),
                    identity: file.identity(),
                });
            }
        }
    }
}

/// The bitmaps of a checkpoint that has begun, on one disk.
pub struct PendingDisk {
    view: CheckpointDiskView,
    bitmaps: Arc<NodeBitmaps>,
    granularity_bytes: u64,
    /// Others neither change nor remove them.
    held: Vec<HeldBitmap>,
}

/// What has changed since a checkpoint according to its bitmap, as of now.
///
/// # Errors
/// In QEMU's words; also where it does not record.
pub(crate) fn changed_since(
    bitmaps: &NodeBitmaps,
    previous: Option<&str>,
) -> Result<Option<DirtyMap>, EngineError> {
    let before = previous.map(|previous| {
        let read = |one: &mut Bitmap| (one.map().clone(), one.records());
        let (map, records) = bitmaps.with(previous, Need::Read, read)?;
        match records {
            true => Ok(map),
            false => Err(EngineError::generic(format!(
                "Bitmap '{previous}' does not record: what has changed since then is not known"
            ))),
        }
    });
    before.transpose()
}

impl PendingDisk {
    /// A disk whose new bitmap has just been added; `before`: what has changed since the checkpoint before.
    ///
    /// # Errors
    /// In QEMU's words; the new bitmap is gone then, too.
    pub(crate) fn begin(
        id: &str,
        spec: &CheckpointDiskSpec,
        bitmaps: Arc<NodeBitmaps>,
        before: Option<DirtyMap>,
        persistent: bool,
    ) -> Result<Self, EngineError> {
        let granularity_bytes = bitmaps.with(&spec.bitmap, Need::Show, |one| {
            one.keep_not_yet();
            one.map().granularity_bytes()
        })?;
        let mut disk = Self {
            granularity_bytes,
            view: CheckpointDiskView {
                node: spec.node.clone(),
                bitmap: spec.bitmap.clone(),
                previous: spec.previous.clone(),
                changed: None,
                persistent,
            },
            bitmaps,
            held: Vec::new(),
        };
        let done = before.map_or(Ok(None), |map| {
            let name = format!("x-checkpoint-{id}");
            let (length, granularity) = (map.length_bytes(), map.granularity_bytes());
            let mut copy = Bitmap::new(name.clone(), length, granularity);
            copy.set_recording(false);
            copy.merge(&map);
            disk.bitmaps.add(copy).map(|()| Some(name))
        });
        let done = done.and_then(|changed| {
            disk.view.changed = changed;
            disk.hold()
        });
        match done {
            Ok(()) => Ok(disk),
            Err(error) => {
                disk.abort();
                Err(error)
            }
        }
    }

    /// What clients see of it.
    pub fn view(&self) -> &CheckpointDiskView {
        &self.view
    }

    /// As long as the checkpoint is neither committed nor aborted.
    fn hold(&mut self) -> Result<(), EngineError> {
        let names = self.view.previous.iter().chain([&self.view.bitmap]);
        let held: Result<Vec<_>, _> = names.map(|name| self.bitmaps.hold(name)).collect();
        self.held = held?;
        Ok(())
    }

    /// Whether nobody is in the way of its end.
    ///
    /// # Errors
    /// In QEMU's words: somebody shows the copy.
    pub fn check_end(&self) -> Result<(), EngineError> {
        let changed = self.view.changed.as_deref();
        let free = changed.map(|name| self.bitmaps.with(name, Need::Remove, |_| ()));
        free.unwrap_or(Ok(())).map_err(|error| self.named(error))
    }

    /// It comes to nothing, whoever shows the copy.
    pub fn abort(mut self) {
        self.held.clear();
        let names = self.view.changed.iter().chain([&self.view.bitmap]);
        for name in names {
            if let Err(error) = self.bitmaps.take_out(name) {
                tracing::error!(%error, "a bitmap of a checkpoint is gone");
            }
        }
    }

    /// The new bitmap takes the place of the older one, in memory.
    pub fn commit(&mut self, keep_previous: bool) -> Result<(), EngineError> {
        self.held.clear();
        if let Some(changed) = &self.view.changed {
            self.bitmaps.take_out(changed)?;
        }
        if self.view.persistent {
            self.bitmaps
                .with(&self.view.bitmap, Need::Show, Bitmap::keep)?;
        }
        if let Some(previous) = self.view.previous.as_deref().filter(|_| !keep_previous) {
            self.bitmaps
                .with(previous, Need::Show, |one| one.set_going(true))?;
        }
        Ok(())
    }

    fn named(&self, error: EngineError) -> EngineError {
        error.prefixed(&format!("Node '{}': ", self.view.node))
    }
}

impl Graph {
    /// Has a new bitmap record from now on, and keeps a copy of the older one as it is now. Users of the disk are drained.
    ///
    /// # Errors
    /// In QEMU's words; nothing has changed then.
    pub async fn begin_on_disk(
        &self,
        id: &str,
        spec: &CheckpointDiskSpec,
        persistent: Option<bool>,
    ) -> Result<PendingDisk, EngineError> {
        let name = BitmapName {
            node: spec.node.clone(),
            name: spec.bitmap.clone(),
        };
        let bitmaps = self.bitmaps_of(&name)?;
        let begun = self
            .begin_bitmaps(id, spec, (name, bitmaps), persistent)
            .await;
        begun.map_err(|error| error.prefixed(&format!("Node '{}': ", spec.node)))
    }

    async fn begin_bitmaps(
        &self,
        id: &str,
        spec: &CheckpointDiskSpec,
        (name, bitmaps): (BitmapName, Arc<NodeBitmaps>),
        persistent: Option<bool>,
    ) -> Result<PendingDisk, EngineError> {
        if let Some(node) = self.find(&spec.node) {
            self.records.borrow().check_active(node)?;
        }
        let before = changed_since(&bitmaps, spec.previous.as_deref())?;
        let persistent = self.add_pending(spec, name, persistent).await?;
        PendingDisk::begin(id, spec, bitmaps, before, persistent)
    }

    /// Adds a bitmap that no image keeps yet. Whether one will.
    async fn add_pending(
        &self,
        spec: &CheckpointDiskSpec,
        name: BitmapName,
        persistent: Option<bool>,
    ) -> Result<bool, EngineError> {
        let add = |persistent| BitmapChange::Add {
            bitmap: name.clone(),
            granularity_bytes: spec.granularity_bytes,
            persistent,
            disabled: false,
        };
        let wanted = persistent.unwrap_or(true);
        match self.change_bitmap(&add(wanted)).await {
            // Where nobody insists, memory will do.
            Err(_) if persistent.is_none() => {
                self.change_bitmap(&add(false)).await?.settle();
                Ok(false)
            }
            added => {
                added?.settle();
                Ok(wanted)
            }
        }
    }

    /// Whether a checkpoint can be committed on one disk.
    ///
    /// # Errors
    /// In QEMU's words.
    pub async fn check_checkpoint(&self, disk: &mut PendingDisk) -> Result<(), EngineError> {
        disk.check_end()?;
        // Nobody else can do so meanwhile.
        disk.held.clear();
        let checked = self.check_held(disk).await;
        let held = disk.hold();
        checked.and(held).map_err(|error| disk.named(error))
    }

    async fn check_held(&self, disk: &PendingDisk) -> Result<(), EngineError> {
        let view = &disk.view;
        let gone = || EngineError::generic("It has been closed since the checkpoint began");
        let node = self.find(&view.node).ok_or_else(gone)?;
        if !Arc::ptr_eq(&self.bitmaps_on(node)?, &disk.bitmaps) {
            return Err(gone());
        }
        if let Some(previous) = &view.previous {
            disk.bitmaps.with(previous, Need::Remove, |_| ())?;
        }
        disk.bitmaps.with(&view.bitmap, Need::Change, |_| ())?;
        if !view.persistent {
            return Ok(());
        }
        let (name, granularity_bytes) = (view.bitmap.clone(), disk.granularity_bytes);
        let asked = self.threads.run(self.thread_of(node), move |context| {
            Box::pin(async move { context.node(node)?.bitmap_refusal(&name, granularity_bytes) })
        });
        match asked.await? {
            Some(refusal) => Err(EngineError::generic(refusal)),
            None => Ok(()),
        }
    }

    /// What a checkpoint that has been committed means for one disk's image: the older bitmap goes, the new one is kept.
    ///
    /// # Errors
    /// What the image says. The bitmaps in memory are right all the same.
    pub async fn settle_commit(
        &self,
        disk: &PendingDisk,
        keep_previous: bool,
    ) -> Result<(), EngineError> {
        let view = &disk.view;
        let removed = match view.previous.as_deref().filter(|_| !keep_previous) {
            Some(previous) => {
                let name = BitmapName {
                    node: view.node.clone(),
                    name: previous.to_owned(),
                };
                let removed = self.change_bitmap(&BitmapChange::Remove(name)).await;
                match removed {
                    Ok(removed) => {
                        removed.settle();
                        Ok(())
                    }
                    Err(error) => disk.bitmaps.take_out(previous).and(Err(error)),
                }
            }
            None => Ok(()),
        };
        // Not into the image itself, which others may be writing: it has them when it is closed.
        self.record_bitmaps(&view.node).await;
        removed.map_err(|error| disk.named(error))
    }

    /// The file of the image that is to keep the bitmap of a checkpoint: its path, and its device and inode. `None`: nothing that has
    /// a file here keeps it.
    pub fn file_of_disk(&self, disk: &PendingDisk) -> Option<ImageFile> {
        let node = self
            .find(&disk.view.node)
            .filter(|_| disk.view.persistent)?;
        self.records.borrow().image_file(node)
    }

    /// Bytes of a granule of a checkpoint's new bitmap.
    pub fn granularity_of(&self, disk: &PendingDisk) -> u64 {
        disk.granularity_bytes
    }

    /// Whether what the image of a checkpoint's disk keeps survives a crash as it is now.
    pub fn is_durable(&self, disk: &PendingDisk) -> bool {
        disk.bitmaps.is_recorded()
    }

    /// Images that are open, by their files.
    pub fn open_images(&self) -> Vec<(NodeId, ImageFile)> {
        let records = self.records.borrow();
        // What an inactive one keeps of bitmaps is not here.
        let is_open = |node: &&NodeRecord| node.driver == "qcow2" && !node.inactive;
        let images = records.nodes.iter().filter(is_open);
        images
            .filter_map(|node| Some((node.id, records.image_file(node.id)?)))
            .collect()
    }

    /// Lets a bitmap take the place of another one in an image that a crash has left between the two; whether that is durable now.
    ///
    /// # Errors
    /// What the image says; in memory it is done.
    pub async fn succeed(
        &self,
        node: NodeId,
        bitmap: &str,
        previous: Option<&str>,
        (granularity_bytes, keep_previous): (u64, bool),
    ) -> Result<bool, EngineError> {
        let bitmaps = self.bitmaps_on(node)?;
        let length_bytes = self.facts(node).await?.length_bytes;
        let how = Succession {
            bitmap,
            previous,
            granularity_bytes,
            keep_previous,
        };
        bitmaps.succeed(how, length_bytes);
        let read_only = |node: &NodeRecord| node.read_only;
        if self.records.borrow().node(node).is_none_or(read_only) {
            return Ok(false);
        }
        if let Some(previous) = previous.filter(|_| !keep_previous) {
            let name = previous.as_bytes().to_vec();
            let removed = self.threads.run(self.thread_of(node), move |context| {
                Box::pin(async move {
                    match context.node(node) {
                        Some(node) => node.remove_bitmap(name).await,
                        None => Ok(()),
                    }
                })
            });
            removed.await??;
        }
        self.record_bitmaps_of(node).await;
        Ok(bitmaps.is_recorded())
    }
}
