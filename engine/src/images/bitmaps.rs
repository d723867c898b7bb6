//! The dirty bitmaps that a qcow2 image keeps, read from its file.

use std::rc::Rc;

use blockyard_images::qcow2::bitmaps::{LoadLimits, load_bitmap};
use blockyard_images::qcow2::info::BitmapInfo;
use blockyard_images::qcow2::layout::bitmaps::Bitmap;
use blockyard_images::qcow2::layout::header::Access;
use blockyard_images::qcow2::open::{OpenedImage, read_image};

use crate::error::EngineError;
use crate::images::watcher::{ImageEvent, ImageWatcher};
use crate::images::{cancelled, refused};
use crate::limits::STATUS_EXTENTS_MAX;
use crate::node::Node;
use crate::node::child_storage::ChildStorage;
use crate::node::dirty_map::DirtyMap;

/// What is to be looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapsSpec {
    /// All of them, and how much each says has changed.
    List,
    /// What one says has changed, which is told to the watcher.
    Dump {
        /// Its name.
        name: String,
    },
}

/// A bitmap of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptBitmapView {
    /// What the directory says of it.
    pub info: BitmapInfo,
    /// Bytes of the granules that have changed, each as a whole; `None`: nobody has stored it as he should have, or it cannot be read.
    pub dirty_bytes: Option<u64>,
    /// Why it cannot be read.
    pub problem: Option<String>,
}

/// Changed bytes side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyExtent {
    /// First byte on the disk.
    pub start: u64,
    /// Length in bytes.
    pub length_bytes: u64,
}

/// Looks at the bitmaps of the image on a node, in the order of their directory. The extents of a dump come in ascending order, apart
/// from each other.
///
/// # Errors
/// When the image is refused or cannot be read; for a dump, also when there is no such bitmap, or nothing can be said of what has
/// changed; when it was cancelled.
pub(super) async fn run(
    node: Rc<dyn Node>,
    spec: BitmapsSpec,
    watcher: &ImageWatcher,
) -> Result<Vec<KeptBitmapView>, EngineError> {
    let file = ChildStorage::new(node);
    let image = read_image(&file, Access::Metadata).await.map_err(refused)?;
    let limits = LoadLimits::of(&file);
    match spec {
        BitmapsSpec::List => list(&file, &image, limits, watcher).await,
        BitmapsSpec::Dump { name } => dump(&file, &image, limits, &name, watcher).await,
    }
}

async fn list(
    file: &ChildStorage,
    image: &OpenedImage,
    mut limits: LoadLimits,
    watcher: &ImageWatcher,
) -> Result<Vec<KeptBitmapView>, EngineError> {
    let mut all = Vec::new();
    for bitmap in &image.bitmaps {
        if watcher.is_cancelled() {
            return Err(cancelled());
        }
        let loaded = match bitmap.is_in_use() {
            true => None,
            false => Some(load(file, image, bitmap, &mut limits).await),
        };
        let problem = match &loaded {
            Some(Err(error)) => Some(error.text.clone()),
            _ => None,
        };
        all.push(KeptBitmapView {
            info: BitmapInfo::of(bitmap),
            dirty_bytes: loaded.and_then(Result::ok).map(|map| map.dirty_bytes()),
            problem,
        });
    }
    Ok(all)
}

async fn dump(
    file: &ChildStorage,
    image: &OpenedImage,
    mut limits: LoadLimits,
    name: &str,
    watcher: &ImageWatcher,
) -> Result<Vec<KeptBitmapView>, EngineError> {
    let mut named = image.bitmaps.iter();
    let bitmap = named.find(|bitmap| BitmapInfo::of(bitmap).name == name);
    let bitmap =
        bitmap.ok_or_else(|| EngineError::generic(format!("Dirty bitmap '{name}' not found")))?;
    if bitmap.is_in_use() {
        let text = format!("Bitmap '{name}' is inconsistent and cannot be used");
        return Err(EngineError::generic(text));
    }
    let map = load(file, image, bitmap, &mut limits).await?;
    let mut from = 0;
    let mut found = Vec::new();
    while from < map.length_bytes()
        && let Some(run) = map.run_from(from, u64::MAX)
    {
        if watcher.is_cancelled() {
            return Err(cancelled());
        }
        from = run.end();
        found.push(DirtyExtent {
            start: run.offset(),
            length_bytes: run.length(),
        });
        if found.len() >= STATUS_EXTENTS_MAX {
            watcher
                .tell(ImageEvent::Dirty(std::mem::take(&mut found)))
                .await;
        }
    }
    watcher.tell(ImageEvent::Dirty(found)).await;
    Ok(vec![KeptBitmapView {
        info: BitmapInfo::of(bitmap),
        dirty_bytes: Some(map.dirty_bytes()),
        problem: None,
    }])
}

async fn load(
    file: &ChildStorage,
    image: &OpenedImage,
    bitmap: &Bitmap,
    limits: &mut LoadLimits,
) -> Result<DirtyMap, EngineError> {
    let granularity_bytes = 1 << bitmap.granularity_bits;
    let mut map = DirtyMap::exactly(image.header.guest_bytes(), granularity_bytes);
    let loaded = load_bitmap(file, &image.header, bitmap, limits, &mut map).await;
    loaded.map_err(refused)?;
    Ok(map)
}
