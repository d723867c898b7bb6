//! What moving data within a chain would come to, found without moving any: by the plan that the copier goes by.

use std::rc::Rc;
use std::time::Duration;

use blockyard_images::more_room::{MoreRoom, Qcow2MoreRoom};
use blockyard_images::qcow2::bitmaps::BitmapSize;
use blockyard_images::qcow2::units::{Geometry, Version};
use blockyard_storage::ByteRange;

use crate::error::EngineError;
use crate::images::cancelled;
use crate::images::watcher::ImageWatcher;
use crate::jobs::plan::{Plan, StepKind};
use crate::node::{Fill, Node, Place};

/// What is looked at in one step, in bytes.
const STEP_MAX_BYTES: u64 = 64 << 20;

/// File systems give room in blocks of at least so many bytes.
pub(crate) const BLOCK_BYTES: u64 = 4096;

/// What is known of the image that is written to before it is looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TargetForm {
    /// Of a qcow2 image; `None`: it is raw.
    pub(crate) geometry: Option<Geometry>,
    /// Internal snapshots have clusters in common with the disk: each that is written to takes another.
    pub(crate) has_snapshots: bool,
    /// The bitmaps that it keeps: it is written to, so they are stored anew when that is over.
    pub(crate) bitmaps: Vec<BitmapSize>,
    /// Length of its file, in bytes.
    pub(crate) file_bytes: u64,
    /// Of the file that takes the guest's data: length without the room that it has, in bytes. Writing into its holes takes no
    /// more. `None`: not known.
    pub(crate) unallocated_bytes: Option<u64>,
    /// Its disk gets this long, in bytes, if it gets longer.
    pub(crate) grown_to_bytes: Option<u64>,
}

/// What a move comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    /// Bytes that are copied.
    pub(crate) copy_bytes: u64,
    /// Bytes that are made zeroes.
    pub(crate) zero_bytes: u64,
    /// What the target takes for it.
    pub(crate) room: MoreRoom,
}

/// Goes through `plans`, one after the other and each in ascending order, and carries nothing out. Takes memory for one answer
/// of the source, however long the disk is.
///
/// # Errors
/// When it was cancelled. What source or target cannot tell counts as data that takes new room.
pub(crate) async fn run(
    source: &Rc<dyn Node>,
    target: &Rc<dyn Node>,
    plans: Vec<Plan>,
    form: TargetForm,
    watcher: &ImageWatcher,
) -> Result<Moved, EngineError> {
    let total_bytes = source.facts().length_bytes;
    let mut room = Room::new(target, form);
    let mut moved = Moved::default();
    for mut plan in plans {
        while let Some(step) = plan
            .next(source, &**target, STEP_MAX_BYTES, true, |longest| longest)
            .await
        {
            if watcher.is_cancelled() {
                return Err(cancelled());
            }
            let range = step.range;
            watcher.set_progress(range.end().min(total_bytes), total_bytes);
            match step.kind {
                StepKind::Copy
                | StepKind::Parts
                | StepKind::Share
                | StepKind::Fill(Fill::Bytes) => {
                    moved.copy_bytes = moved.copy_bytes.saturating_add(range.length());
                    room.written(range).await;
                }
                StepKind::Zero | StepKind::Fill(Fill::Zeroes) => {
                    moved.zero_bytes = moved.zero_bytes.saturating_add(range.length());
                    room.zeroed(range).await;
                }
                StepKind::Sum | StepKind::Skip => {}
            }
            // It costs nothing here.
            plan.took(step.kind, Duration::ZERO, false);
            // What tables say may all be in memory, and the thread has other work.
            tokio::task::yield_now().await;
        }
    }
    moved.room = room.finish();
    Ok(moved)
}

/// Counts what the target takes for what is written to it in ascending order.
pub(crate) struct Room<'a> {
    target: &'a Rc<dyn Node>,
    form: TargetForm,
    qcow2: Option<Qcow2MoreRoom>,
    /// Holes of its file that are written into.
    hole_bytes: u64,
    holes_counted_to: u64,
}

impl<'a> Room<'a> {
    /// Nothing is written yet.
    pub(crate) fn new(target: &'a Rc<dyn Node>, form: TargetForm) -> Self {
        let mut qcow2 = form.geometry.map(Qcow2MoreRoom::new);
        if let Some(room) = &mut qcow2 {
            let length_bytes = target.facts().length_bytes;
            let grown_bytes = form.grown_to_bytes.unwrap_or(length_bytes);
            room.bitmaps(length_bytes.max(grown_bytes), form.bitmaps.iter().copied());
        }
        Self {
            target,
            form,
            qcow2,
            hole_bytes: 0,
            holes_counted_to: 0,
        }
    }

    /// Data is written there.
    pub(crate) async fn written(&mut self, range: ByteRange) {
        let mut rest = range;
        while !rest.is_empty() {
            let place = self.place(rest).await;
            let is_shared = self.form.has_snapshots || place.compressed;
            match &mut self.qcow2 {
                Some(room) if is_shared || place.host_offset.is_none() => room.data(place.range),
                _ if place.zero => self.fill_hole(place.range),
                _ => {}
            }
            rest = ByteRange::between(place.range.end(), rest.end());
        }
    }

    /// Zeroes are written there.
    pub(crate) async fn zeroed(&mut self, range: ByteRange) {
        let Some(geometry) = self.form.geometry else {
            // Where there is nothing, nothing is written; what is there becomes a hole or is written over.
            return;
        };
        let names_backing = self.target.names_backing();
        if geometry.version() == Version::V2 {
            // It has no zeroes of its own: without anything below, clusters are given up; else zeroes are data.
            if names_backing {
                self.written(range).await;
            }
            return;
        }
        let mut rest = range;
        while !rest.is_empty() {
            let place = self.place(rest).await;
            // What reads as zeroes and goes on to is left alone.
            if !(place.zero && (place.allocated || !names_backing)) {
                let whole = place.range.align_inward(geometry.cluster_bytes());
                if let Some(room) = &mut self.qcow2 {
                    room.entries(place.range);
                }
                // Parts of clusters are written.
                let (front, back) = match whole.is_empty() {
                    true => (place.range, ByteRange::default()),
                    false => (
                        ByteRange::between(place.range.offset(), whole.offset()),
                        ByteRange::between(whole.end(), place.range.end()),
                    ),
                };
                for part in [front, back] {
                    Box::pin(self.written(part)).await;
                }
            }
            rest = ByteRange::between(place.range.end(), rest.end());
        }
    }

    /// Where the front of a range is now; what is behind the end, or what the target cannot tell of, is nowhere.
    async fn place(&self, range: ByteRange) -> Place {
        let nowhere = |range| Place {
            range,
            zero: true,
            allocated: false,
            data: false,
            compressed: false,
            host_offset: None,
        };
        let inside = range.clamp_end(self.target.facts().length_bytes);
        if inside.is_empty() {
            return nowhere(range);
        }
        match self.target.place(inside, true).await {
            Ok(place) => {
                let within = place.range.intersection(&inside);
                match within.offset() == inside.offset() && !within.is_empty() {
                    true => Place {
                        range: within,
                        ..place
                    },
                    false => nowhere(inside),
                }
            }
            Err(error) => {
                tracing::debug!(%error, "what the target holds is not known, it counts as nothing");
                nowhere(inside)
            }
        }
    }

    fn fill_hole(&mut self, range: ByteRange) {
        let blocks = range.align_outward(BLOCK_BYTES);
        let from = blocks.offset().max(self.holes_counted_to);
        if from < blocks.end() {
            self.hole_bytes = self.hole_bytes.saturating_add(blocks.end() - from);
            self.holes_counted_to = blocks.end();
        }
    }

    /// All of it, at most.
    pub(crate) fn finish(&self) -> MoreRoom {
        let grown_bytes = match self.form.geometry {
            Some(_) => 0,
            None => self
                .form
                .grown_to_bytes
                .map_or(0, |bytes| bytes.saturating_sub(self.form.file_bytes)),
        };
        let most = self
            .form
            .unallocated_bytes
            .map(|bytes| bytes.saturating_add(grown_bytes));
        let holes = most.map_or(self.hole_bytes, |most| self.hole_bytes.min(most));
        let of_image = self.qcow2.as_ref().map_or(MoreRoom::default(), |room| {
            room.finish(self.form.file_bytes, self.form.grown_to_bytes)
        });
        MoreRoom {
            data_bytes: of_image.data_bytes.saturating_add(holes),
            ..of_image
        }
    }
}
