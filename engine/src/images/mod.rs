//! Work on whole images that is no job: a command begins it, looks on and waits for its end. Runs on a data thread.
//!
//! Each kind of work is a file with its description, its result and the function that does it; [`ImageSpec`] and
//! [`ImageReply`] list them. What they share is in [`watcher`]: progress, cancelling and what is told meanwhile.

pub mod bitmaps;
pub mod check;
pub mod compare;
pub mod create;
pub mod info;
pub mod manifest_onto;
pub mod map;
pub mod measure;
pub(crate) mod plan;
pub mod rebase;
pub mod resize;
pub mod snapshot;
pub mod verify;
pub mod watcher;

use std::rc::Rc;

use blockyard_images::ImageError;
use blockyard_storage::error::{ECANCELED, errno_text};

use crate::data::{CpuPool, HostFiles};
use crate::error::EngineError;
use crate::node::Node;
use crate::node::dirty_map::DirtyMap;

pub use bitmaps::{BitmapsSpec, DirtyExtent, KeptBitmapView};
pub use check::{CheckSpec, CheckView, FindingView, RepairChoice, Severity};
pub use compare::{CompareSpec, CompareView, Difference};
pub use info::{InfoSpec, InfoView};
pub use manifest_onto::ManifestOntoSpec;
pub use map::{MapExtent, MapSpec};
pub use measure::{MeasureSpec, MeasureTarget, MeasureView};
pub use rebase::{RebaseSpec, RebaseView};
pub use resize::{NewLength, ResizeSpec, ResizeView};
pub use snapshot::{SnapshotChange, SnapshotSpec, SnapshotsView};
pub use verify::{VerifySpec, VerifyView};
pub use watcher::{ImageEvent, ImageWatch, ImageWatcher};

/// What to do, and with which node.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageSpec {
    /// Name of the node that holds the image's file. Nobody else uses it meanwhile.
    pub node: String,
    /// What to do.
    pub work: ImageWork,
    /// Who looks on.
    pub watcher: ImageWatcher,
}

/// Formats that images have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// The file is the disk.
    Raw,
    /// The file begins with a header that says where the disk is.
    Qcow2,
}

/// The kinds of work.
#[derive(Clone, Debug, PartialEq)]
pub enum ImageWork {
    /// Looks at the dirty bitmaps that a qcow2 image keeps.
    Bitmaps(BitmapsSpec),
    /// Checks a qcow2 image, and repairs it if wanted.
    Check(CheckSpec),
    /// Compares the disk with another one.
    Compare(CompareSpec),
    /// Tells what an image says of itself.
    Info(InfoSpec),
    /// Writes a checksum manifest of the disk, of which most is taken over from an earlier one.
    ManifestOnto(ManifestOntoSpec),
    /// Tells where the disk is kept.
    Map(MapSpec),
    /// Finds out how much room an image with the same content needs.
    Measure(MeasureSpec),
    /// Puts a qcow2 image on another backing file.
    Rebase(RebaseSpec),
    /// Gives the disk another length.
    Resize(ResizeSpec),
    /// Makes, applies or deletes an internal snapshot of a qcow2 image.
    Snapshot(SnapshotSpec),
    /// Holds the disk against a checksum manifest.
    Verify(VerifySpec),
}

impl ImageWork {
    /// Whether the first node is written to. The other one is only read.
    pub(crate) const fn writes(&self) -> bool {
        match self {
            ImageWork::Check(spec) => spec.repair.is_some(),
            ImageWork::Rebase(spec) => !spec.dry_run,
            ImageWork::Snapshot(spec) => !spec.dry_run,
            ImageWork::Resize(_) => true,
            ImageWork::Bitmaps(_)
            | ImageWork::Compare(_)
            | ImageWork::Info(_)
            | ImageWork::ManifestOnto(_)
            | ImageWork::Map(_)
            | ImageWork::Measure(_)
            | ImageWork::Verify(_) => false,
        }
    }

    /// The other node that is needed, by name.
    pub(crate) fn other(&self) -> Option<&str> {
        match self {
            ImageWork::Compare(spec) => Some(&spec.other),
            ImageWork::ManifestOnto(spec) => Some(&spec.previous),
            ImageWork::Rebase(spec) => spec.backing.as_deref(),
            ImageWork::Verify(spec) => Some(&spec.manifest),
            _ => None,
        }
    }
}

/// What a piece of work came to.
#[derive(Clone, Debug, PartialEq)]
pub enum ImageReply {
    /// Of [`ImageWork::Bitmaps`]: those that were looked at.
    Bitmaps(Vec<KeptBitmapView>),
    /// Of [`ImageWork::Check`].
    Checked(CheckView),
    /// Of [`ImageWork::Compare`].
    Compared(CompareView),
    /// Of [`ImageWork::Info`].
    Described(Box<InfoView>),
    /// Of [`ImageWork::ManifestOnto`]: it is there.
    ManifestWritten,
    /// Of [`ImageWork::Map`], once all of it has been told.
    Mapped,
    /// Of [`ImageWork::Measure`].
    Measured(MeasureView),
    /// Of [`ImageWork::Rebase`].
    Rebased(RebaseView),
    /// Of [`ImageWork::Resize`].
    Resized(ResizeView),
    /// Of [`ImageWork::Snapshot`].
    Snapshots(SnapshotsView),
    /// Of [`ImageWork::Verify`].
    Verified(VerifyView),
}

/// What work is done with.
pub(crate) struct Means {
    /// Whoever keeps a core busy.
    pub(crate) cpu: CpuPool,
    /// Whoever makes files.
    pub(crate) files: Rc<dyn HostFiles>,
    /// What has changed of the first node's disk, where the work goes by a bitmap.
    pub(crate) changed: Option<DirtyMap>,
}

/// Carries the work out on the nodes' thread.
///
/// # Errors
/// As the work's.
pub(crate) async fn run(
    node: Rc<dyn Node>,
    other: Option<Rc<dyn Node>>,
    work: ImageWork,
    watcher: ImageWatcher,
    with: Means,
) -> Result<ImageReply, EngineError> {
    match work {
        ImageWork::Bitmaps(spec) => bitmaps::run(node, spec, &watcher)
            .await
            .map(ImageReply::Bitmaps),
        ImageWork::Check(spec) => check::run(node, spec, &watcher)
            .await
            .map(ImageReply::Checked),
        ImageWork::Compare(spec) => {
            let other = other.ok_or_else(|| EngineError::generic("A node is missing (bug)"))?;
            let compared = compare::run(node, other, spec.strict, &watcher).await;
            compared.map(ImageReply::Compared)
        }
        ImageWork::Info(spec) => {
            let view = info::run(node, spec).await?;
            Ok(ImageReply::Described(Box::new(view)))
        }
        ImageWork::ManifestOnto(spec) => {
            let (Some(previous), Some(changed)) = (other, with.changed) else {
                return Err(EngineError::generic("A node or a bitmap is missing (bug)"));
            };
            let with = (with.cpu, with.files);
            manifest_onto::run(node, previous, changed, spec, with, &watcher).await?;
            Ok(ImageReply::ManifestWritten)
        }
        ImageWork::Map(spec) => {
            map::run(node, spec, &watcher).await?;
            Ok(ImageReply::Mapped)
        }
        ImageWork::Measure(spec) => measure::run(node, spec, &watcher)
            .await
            .map(ImageReply::Measured),
        ImageWork::Rebase(spec) => rebase::run(node, other, spec, &watcher)
            .await
            .map(ImageReply::Rebased),
        ImageWork::Snapshot(spec) => snapshot::run(node, spec, &watcher)
            .await
            .map(ImageReply::Snapshots),
        ImageWork::Resize(spec) => resize::run(node, spec, &watcher)
            .await
            .map(ImageReply::Resized),
        ImageWork::Verify(_) => {
            let manifest = other.ok_or_else(|| EngineError::generic("A node is missing (bug)"))?;
            let verified = verify::run(node, manifest, with.cpu, &watcher).await;
            verified.map(ImageReply::Verified)
        }
    }
}

/// An image is refused: with what says more, in brackets.
fn refused(error: ImageError) -> EngineError {
    match error {
        ImageError::Refused {
            text,
            detail: Some(detail),
        } => EngineError::generic(format!("{text} ({detail})")),
        error => EngineError::generic(error.to_string()),
    }
}

fn cancelled() -> EngineError {
    EngineError::generic(errno_text(ECANCELED))
}
