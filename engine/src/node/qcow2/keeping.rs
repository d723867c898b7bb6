//! The bitmaps that an image keeps: loaded when its node is opened, marked as in use while it may be written, stored when it may not
//! be any more.

use std::io;
use std::sync::Arc;

use blockyard_images::ImageError;
use blockyard_images::qcow2::Qcow2;
use blockyard_images::qcow2::bitmaps::{BitmapToStore, LoadLimits, load_bitmap};
use blockyard_images::qcow2::info::BitmapInfo;
use blockyard_images::qcow2::layout::header::Header;
use blockyard_images::qcow2::units::Version;
use blockyard_storage::LocalFuture;

use crate::bitmap::{Bitmap, BitmapInMemory, NodeBitmaps};
use crate::data::DataContext;
use crate::error::EngineError;
use crate::node::dirty_map::DirtyMap;
use crate::node::qcow2::Qcow2Node;
use crate::node::qcow2::opening::{in_time, refusal};
use crate::node::qcow2::recording;

/// Loads what an image keeps, unless `bitmaps` have it already: whoever moves takes them with him. What may be written says that
/// its bitmaps are in use from now on. A bitmap that cannot be loaded of what is only read is taken for one that nobody has stored:
/// the disk can be saved all the same. Where that is because of the state directory, it is loaded once the image is to be written.
///
/// # Errors
/// In QEMU's words; also when a disk does not answer in time, or the state directory has what cannot be read of an image that is to
/// be written: once it is, that would be worth nothing.
pub(super) async fn take_in(
    context: &DataContext,
    image: &Qcow2,
    bitmaps: &NodeBitmaps,
) -> Result<(), EngineError> {
    let read_only = image.options().read_only;
    if !bitmaps.are_loaded() || (!read_only && bitmaps.are_unread()) {
        // The state directory has deadlines of its own.
        let recovered = recording::recover(image, bitmaps).await;
        in_time(context, Box::pin(load(image, bitmaps, recovered))).await?;
    }
    bitmaps.set_read_only(read_only);
    if !read_only {
        go_on(image, bitmaps).await.map_err(refusal)?;
    }
    Ok(())
}

/// What is written to the image from now on is recorded, and its bitmaps say that they are in use.
///
/// # Errors
/// As [`Qcow2::mark_bitmaps_in_use`].
pub(super) async fn go_on(image: &Qcow2, bitmaps: &NodeBitmaps) -> Result<(), ImageError> {
    // Killed in between, they are recorded and still valid.
    recording::go_on(image, bitmaps).await;
    image.mark_bitmaps_in_use().await
}

async fn load(
    image: &Qcow2,
    bitmaps: &NodeBitmaps,
    recovered: io::Result<Option<Vec<BitmapInMemory>>>,
) -> Result<(), EngineError> {
    let (header, kept) = (image.header().clone(), image.bitmaps().to_vec());
    let read_only = image.options().read_only;
    let (is_unread, mut recovered) = match recovered {
        Ok(recovered) => (false, recovered.unwrap_or_default()),
        Err(error) if read_only => {
            tracing::warn!(%error, "bitmaps are taken for inconsistent as long as their record cannot be read");
            (true, Vec::new())
        }
        Err(error) => {
            return Err(EngineError::generic(format!(
                "State directory: what was recorded of the image's bitmaps cannot be read: {error}"
            )));
        }
    };
    let mut limits = LoadLimits::of(&**image.file());
    let mut loaded = Vec::new();
    for bitmap in kept {
        let place = recovered
            .iter()
            .position(|one| one.name_in_image == bitmap.name);
        if let Some(place) = place {
            loaded.push(good_again(recovered.remove(place)));
            continue;
        }
        let mut map = DirtyMap::exactly(header.guest_bytes(), 1 << bitmap.granularity_bits);
        // The record counts for all, whatever stands in the image.
        let mut is_inconsistent = is_unread || bitmap.is_in_use();
        if !is_inconsistent {
            let file = &**image.file();
            let done = load_bitmap(file, &header, &bitmap, &mut limits, &mut map).await;
            match done.map_err(refusal) {
                Ok(()) => {}
                Err(error) if read_only => {
                    tracing::warn!(%error, "a bitmap is taken for inconsistent");
                    map.clear_all();
                    is_inconsistent = true;
                }
                Err(error) => return Err(error),
            }
        }
        let records = bitmap.is_auto();
        loaded.push(Bitmap::loaded(bitmap.name, map, records, is_inconsistent));
    }
    // Those that had come since bitmaps were stored last.
    loaded.extend(recovered.into_iter().map(good_again));
    bitmaps.take_in(loaded, is_unread)
}

fn good_again(bitmap: BitmapInMemory) -> Bitmap {
    Bitmap::loaded(bitmap.name_in_image, bitmap.map, bitmap.records, false)
}

/// Puts into an image what it is to keep, once all is durable that has been written: a crash takes nothing back of what bitmaps had said
/// before they were cleared. What was written down of that outside of it is not needed any more.
///
/// # Errors
/// As [`Qcow2::store_bitmaps`].
pub(super) async fn store(image: &Qcow2, bitmaps: &NodeBitmaps) -> Result<(), ImageError> {
    let all = bitmaps.to_store();
    let to_store: Vec<BitmapToStore<'_>> = all
        .iter()
        .map(|bitmap| BitmapToStore {
            name: &bitmap.name_in_image,
            granularity_bytes: bitmap.map.granularity_bytes(),
            auto: bitmap.records,
            bits: &bitmap.map,
        })
        .collect();
    if to_store.is_empty() {
        return match image.options().read_only {
            true => Ok(()),
            false => recording::give_up(image, bitmaps).await,
        };
    }
    if image.options().read_only {
        return Err(ImageError::refused("No write access"));
    }
    let _alone = bitmaps.write_down_alone().await;
    let recorded_as = image.header().activity();
    image.flush().await?;
    let stored = image.store_bitmaps(&to_store).await?;
    for name in &stored.says_too_much {
        let bitmap = String::from_utf8_lossy(name);
        tracing::warn!(%bitmap, "there is no room for all of a bitmap: it says that more has changed than has");
    }
    recording::end(bitmaps, recorded_as).await;
    Ok(())
}

/// The bitmaps of an image, as it has them now.
pub(super) fn kept_by(image: &Qcow2) -> Vec<BitmapInfo> {
    image.bitmaps().iter().map(BitmapInfo::of).collect()
}

impl Qcow2Node {
    /// Its bitmaps are `bitmaps`.
    pub(super) fn with_bitmaps(mut self, bitmaps: Arc<NodeBitmaps>) -> Self {
        self.bitmaps = bitmaps;
        self
    }

    pub(super) fn store_kept(&self) -> LocalFuture<'static, Result<(), EngineError>> {
        let bitmaps = Arc::clone(&self.bitmaps);
        self.change(move |mover| async move {
            match mover.lost.get() {
                // Nobody knows any more what the image is like.
                true => Ok(()),
                false => store(&mover.image, &bitmaps).await.map_err(refusal),
            }
        })
    }

    /// See [`Node::record_bitmaps`](crate::node::Node::record_bitmaps).
    pub(super) fn write_down_kept(&self) -> LocalFuture<'static, ()> {
        let bitmaps = Arc::clone(&self.bitmaps);
        self.change(move |mover| async move {
            if mover.lost.get() || mover.read_only() {
                return;
            }
            recording::write_down(&mover.image, &bitmaps).await;
            if let Err(error) = mover.image.mark_bitmaps_in_use().await {
                tracing::error!(%error, "bitmaps cannot be marked as in use");
            }
        })
    }

    /// See [`Node::stop_recording`](crate::node::Node::stop_recording).
    pub(super) fn stop_recording_kept(&self) -> LocalFuture<'static, Result<(), EngineError>> {
        let bitmaps = Arc::clone(&self.bitmaps);
        self.change(move |mover| async move {
            match bitmaps.is_recorded() {
                true => recording::give_up(&mover.image, &bitmaps)
                    .await
                    .map_err(refusal),
                false => Ok(()),
            }
        })
    }

    pub(super) fn remove_kept(
        &self,
        name_in_image: Vec<u8>,
    ) -> LocalFuture<'static, Result<(), EngineError>> {
        self.change(move |mover| async move {
            let removed = mover.image.remove_bitmap(&name_in_image).await;
            removed.map(drop).map_err(refusal)
        })
    }

    /// Whether an image can become what is wanted of it without losing a bitmap, also one that it has not got yet.
    ///
    /// # Errors
    /// Why not, in QEMU's words.
    pub(super) fn check_kept(&self, wanted: &Header, old_bytes: u64) -> Result<(), String> {
        let keeps_any = !self.bitmaps.kept_names_bytes().is_empty();
        if keeps_any && wanted.geometry.version() == Version::V2 {
            return Err("Cannot downgrade an image with bitmaps".to_owned());
        }
        match self.bitmaps.resize_refusal() {
            Some(refusal) if wanted.guest_bytes() != old_bytes => Err(refusal),
            _ => Ok(()),
        }
    }

    pub(super) fn refusal_of_new(&self, name: &str, granularity_bytes: u64) -> Option<String> {
        let mover = self.mover();
        let others = self.bitmaps.kept_names_bytes();
        let checked = mover
            .image
            .check_new_bitmap(name.as_bytes(), granularity_bytes, others);
        let error = checked.err()?;
        let node = &mover.name;
        Some(format!(
            "Can't make bitmap '{name}' persistent in '{node}': {error}"
        ))
    }
}
