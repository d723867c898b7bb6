//! [`create`], [`apply`] and [`delete`]: what each makes of an image.

use std::rc::Rc;

use blockyard_storage::{Storage, StorageError};

use super::choosing::{NewSnapshot, SnapshotChoice};
use super::switching::{Goal, Switching};
use crate::error::ImageError;
use crate::pace::{Cancelled, Pace};
use crate::qcow2::check::{CheckStop, repair_dirty};
use crate::qcow2::layout::header::{Access, L1_TABLE_BYTES_MAX, SNAPSHOTS_MAX};
use crate::qcow2::layout::snapshots::Snapshot;
use crate::qcow2::open::{OpenedImage, read_image};
use crate::qcow2::reading::read_words;
use crate::qcow2::watching::Watching;

/// What becomes of the snapshots of an image.
#[derive(Clone, Copy, Debug)]
pub enum SnapshotChange<'a> {
    /// See [`create`].
    Create(&'a NewSnapshot),
    /// See [`apply`].
    Apply(&'a SnapshotChoice),
    /// See [`delete`].
    Delete(&'a SnapshotChoice),
}

/// Why the snapshots of an image are what they were. After a failure of the storage they may be the new ones.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SnapshotError {
    /// On request.
    #[error("Operation canceled")]
    Cancelled,
    /// It is refused, or a storage failed.
    #[error(transparent)]
    Failed(#[from] ImageError),
}

impl From<CheckStop> for SnapshotError {
    fn from(stop: CheckStop) -> Self {
        match stop {
            CheckStop::Cancelled => Self::Cancelled,
            CheckStop::Failed(error) => Self::Failed(error),
        }
    }
}

impl From<Cancelled> for SnapshotError {
    fn from(Cancelled: Cancelled) -> Self {
        Self::Cancelled
    }
}

impl From<StorageError> for SnapshotError {
    fn from(error: StorageError) -> Self {
        Self::Failed(error.into())
    }
}

/// Makes a snapshot of the disk; it is durable when this returns. What the guest reads is unchanged, bitmaps stay valid.
/// Nobody else uses the image; `file` takes requests of any alignment. Room that is given up is discarded if `discards`.
///
/// # Errors
/// [`SnapshotError::Failed`] with QEMU's texts: for images with a data file, for counts that are too narrow, for too many
/// snapshots; where the image is damaged, there is no room, or a storage fails. [`SnapshotError::Cancelled`] when `pace` says
/// so.
///
/// # Cancel safety
/// Dropping the future leaves what a power cut leaves: the image with the snapshot or without it, and nothing leaked.
pub async fn create(
    file: &Rc<dyn Storage>,
    new: &NewSnapshot,
    discards: bool,
    pace: &dyn Pace,
) -> Result<Snapshot, SnapshotError> {
    let change = SnapshotChange::Create(new);
    let image = read(file, &change).await?;
    let goal = change.goal(file, &image).await?;
    let mut snapshots = switch(file, &image, goal, discards, pace).await?;
    let made = snapshots.pop();
    made.ok_or_else(|| ImageError::refused("The snapshot is gone (bug)").into())
}

/// Gives the disk the content and length that it had when a snapshot was made; durable when this returns. The snapshot stays.
/// A state of the machine that was saved with it is not part of the disk and stays with the snapshot alone. The rest is as
/// with [`create`].
///
/// # Errors
/// As [`create`]; where there is no such snapshot; where there are bitmaps, which would not know of the change.
///
/// # Cancel safety
/// As [`create`].
pub async fn apply(
    file: &Rc<dyn Storage>,
    choice: &SnapshotChoice,
    discards: bool,
    pace: &dyn Pace,
) -> Result<(), SnapshotError> {
    let change = SnapshotChange::Apply(choice);
    let image = read(file, &change).await?;
    let goal = change.goal(file, &image).await?;
    switch(file, &image, goal, discards, pace).await?;
    Ok(())
}

/// Takes a snapshot away, durably; its entry is returned. What the guest reads is unchanged. The rest is as with [`create`].
///
/// # Errors
/// As [`create`], and where there is no such snapshot.
///
/// # Cancel safety
/// As [`create`].
pub async fn delete(
    file: &Rc<dyn Storage>,
    choice: &SnapshotChoice,
    discards: bool,
    pace: &dyn Pace,
) -> Result<Snapshot, SnapshotError> {
    let change = SnapshotChange::Delete(choice);
    let image = read(file, &change).await?;
    let goal = change.goal(file, &image).await?;
    let gone = choice.find_in(&image)?.1.clone();
    switch(file, &image, goal, discards, pace).await?;
    Ok(gone)
}

impl SnapshotChange<'_> {
    /// What can be refused at once.
    pub(super) fn check(&self, image: &OpenedImage) -> Result<(), ImageError> {
        match self {
            Self::Create(_) => {
                refuse_data_file(image)?;
                if image.header.snapshots >= SNAPSHOTS_MAX {
                    let detail =
                        format!("there are {SNAPSHOTS_MAX} snapshots, more are not possible");
                    return Err(ImageError::refused_because("File too large", detail));
                }
                Ok(())
            }
            Self::Apply(choice) => {
                if !image.bitmaps.is_empty() {
                    return Err(ImageError::refused("Device has active dirty bitmaps"));
                }
                refuse_data_file(image).map_err(not_loaded)?;
                let found = choice.find(&image.snapshots);
                found.map(drop).ok_or_else(|| {
                    ImageError::refused("Failed to load snapshot: No such file or directory")
                })
            }
            Self::Delete(choice) => {
                choice.find_in(image)?;
                refuse_data_file(image)
            }
        }
    }

    /// What the image is going to be.
    pub(super) async fn goal(
        &self,
        file: &Rc<dyn Storage>,
        image: &OpenedImage,
    ) -> Result<Goal, SnapshotError> {
        let mut goal = Goal::of(image);
        match self {
            Self::Create(new) => {
                let disk_bytes = image.header.guest_bytes();
                let entry = new.entry(&image.snapshots, disk_bytes)?;
                goal.snapshots.push(entry);
                // What stands behind the end of the disk is none of it.
                let needed = image.header.geometry.l1_entries_for(disk_bytes);
                let needed = usize::try_from(needed).unwrap_or(usize::MAX);
                goal.new_l1_entries = Some(needed.min(goal.l1.len()));
            }
            Self::Apply(choice) => {
                let snapshot = choice.find_in(image)?.1;
                (goal.l1, goal.size_bytes) = disk_of(file, image, snapshot).await?;
            }
            Self::Delete(choice) => {
                goal.snapshots.remove(choice.find_in(image)?.0);
            }
        }
        Ok(goal)
    }
}

/// The L1 table and the length in bytes that the disk has in a snapshot.
async fn disk_of(
    file: &Rc<dyn Storage>,
    image: &OpenedImage,
    snapshot: &Snapshot,
) -> Result<(Vec<u64>, u64), SnapshotError> {
    snapshot
        .check_l1_table(&image.header.geometry, file.facts().length_bytes)
        .map_err(not_loaded)?;
    let disk_bytes = snapshot.disk_bytes.unwrap_or(image.header.guest_bytes());
    let needed = image.header.geometry.l1_entries_for(disk_bytes);
    if needed > L1_TABLE_BYTES_MAX / 8 {
        let detail = format!("its disk of {disk_bytes} bytes needs {needed} L1 entries");
        return Err(not_loaded(ImageError::refused_because("File too large", detail)).into());
    }
    let needed = usize::try_from(needed).unwrap_or(usize::MAX);
    let entries = usize::try_from(snapshot.l1_entries).unwrap_or(usize::MAX);
    let text = "Failed to load snapshot";
    let mut l1 = read_words(&**file, snapshot.l1_table.0, entries.min(needed), text).await?;
    l1.resize(needed, 0);
    Ok((l1, disk_bytes))
}

/// The image as it is, with counts that can be relied on.
async fn read(
    file: &Rc<dyn Storage>,
    change: &SnapshotChange<'_>,
) -> Result<OpenedImage, SnapshotError> {
    let image = read_image(&**file, Access::ReadWrite).await?;
    change.check(&image)?;
    if !image.header.is_dirty() {
        return Ok(image);
    }
    repair_dirty(file).await?;
    let image = read_image(&**file, Access::ReadWrite).await?;
    change.check(&image)?;
    match image.header.is_dirty() {
        true => Err(ImageError::refused("Could not repair dirty image").into()),
        false => Ok(image),
    }
}

async fn switch(
    file: &Rc<dyn Storage>,
    image: &OpenedImage,
    goal: Goal,
    discards: bool,
    pace: &dyn Pace,
) -> Result<Vec<Snapshot>, SnapshotError> {
    let length_before = file.facts().length_bytes;
    let watching = Watching::new(pace);
    let mut switching = Switching::new(file, image, goal)?;
    let outcome = switching.run(image, discards, &watching).await;
    if outcome.is_err() && switching.is_unchanged() && !file.facts().fixed_length {
        // Nothing leads behind the old end. Best effort: it is only room.
        let _ = file.resize(length_before).await;
    }
    outcome?;
    watching.end_of_scan();
    Ok(switching.into_snapshots())
}

/// Snapshots hold what is in the image file only.
fn refuse_data_file(image: &OpenedImage) -> Result<(), ImageError> {
    match image.header.has_data_file() {
        true => Err(ImageError::refused_because(
            "Operation not supported",
            "images with an external data file have no internal snapshots",
        )),
        false => Ok(()),
    }
}

fn not_loaded(error: ImageError) -> ImageError {
    match error {
        ImageError::Refused { text, detail } => ImageError::Refused {
            text: format!("Failed to load snapshot: {text}"),
            detail,
        },
        other => other,
    }
}
