//! Internal snapshots of a qcow2 image on the node of its file.

use std::cell::Cell;
use std::rc::Rc;

use blockyard_images::more_room::MoreRoom;
use blockyard_images::qcow2::snapshot::{self, NewSnapshot, SnapshotChoice, SnapshotError};
use blockyard_images::{Cancelled, Pace};
use blockyard_storage::{LocalFuture, Storage};

use crate::error::EngineError;
use crate::images::watcher::ImageWatcher;
use crate::images::{cancelled, refused};
use crate::node::Node;
use crate::node::child_storage::ChildStorage;
use crate::reply::RoomView;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotSpec {
    /// What becomes of the snapshots.
    pub change: SnapshotChange,
    /// Whether to find out only what room that takes.
    pub dry_run: bool,
    /// Whether to begin although its file system has too little room for what may be needed.
    pub force: bool,
}

/// What becomes of the snapshots of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotChange {
    /// A snapshot is made of the disk.
    Create {
        /// Its name. Others may have it, too.
        name: String,
        /// When it is made, in seconds since 1970.
        date_seconds: u32,
        /// And nanoseconds.
        date_nanoseconds: u32,
    },
    /// The disk gets what a snapshot holds.
    Apply {
        /// Id of the snapshot or, if none has it, its name.
        id_or_name: String,
    },
    /// A snapshot is taken away.
    Delete {
        /// Its name; the first of several.
        name: String,
    },
}

/// What it came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotsView {
    /// Whether the snapshots are what was asked for.
    pub is_done: bool,
    /// What the image takes until then. Nothing unless that was to be found out, or is too much.
    pub room: RoomView,
}

/// Changes the snapshots of the image on a node; durable when this returns.
///
/// # Errors
/// As [`snapshot`] says, with what says more in brackets; when it was cancelled. But for a failed write of the header, the
/// image is what it was.
pub(super) async fn run(
    node: Rc<dyn Node>,
    spec: SnapshotSpec,
    watcher: &ImageWatcher,
) -> Result<SnapshotsView, EngineError> {
    let file: Rc<dyn Storage> = Rc::new(ChildStorage::new(node));
    let pace = WatchedPace {
        watcher,
        done_bytes: Cell::new(0),
        expected_bytes: Cell::new(0),
    };
    let changed = match Change::of(&spec.change) {
        Change::Create(new) => snapshot::create(&file, &new, true, &pace).await.map(drop),
        Change::Apply(choice) => snapshot::apply(&file, &choice, true, &pace).await,
        Change::Delete(choice) => snapshot::delete(&file, &choice, true, &pace)
            .await
            .map(drop),
    };
    changed.map_err(failed)?;
    Ok(SnapshotsView {
        is_done: true,
        ..SnapshotsView::default()
    })
}

/// What that takes at most, until it is done. Nothing is changed.
///
/// # Errors
/// As of [`run`].
pub(crate) async fn room(
    node: Rc<dyn Node>,
    change: &SnapshotChange,
) -> Result<MoreRoom, EngineError> {
    let file: Rc<dyn Storage> = Rc::new(ChildStorage::new(node));
    let change = Change::of(change);
    let change = match &change {
        Change::Create(new) => snapshot::SnapshotChange::Create(new),
        Change::Apply(choice) => snapshot::SnapshotChange::Apply(choice),
        Change::Delete(choice) => snapshot::SnapshotChange::Delete(choice),
    };
    snapshot::room(&file, &change).await.map_err(failed)
}

/// A change in the words of images.
enum Change {
    Create(NewSnapshot),
    Apply(SnapshotChoice),
    Delete(SnapshotChoice),
}

impl Change {
    fn of(change: &SnapshotChange) -> Self {
        match change.clone() {
            SnapshotChange::Create {
                name,
                date_seconds,
                date_nanoseconds,
            } => Self::Create(NewSnapshot {
                name: name.into_bytes(),
                date_seconds,
                date_nanoseconds,
                vm_clock_nanoseconds: 0,
            }),
            SnapshotChange::Apply { id_or_name } => {
                Self::Apply(SnapshotChoice::IdOrName(id_or_name.into_bytes()))
            }
            SnapshotChange::Delete { name } => {
                Self::Delete(SnapshotChoice::Name(name.into_bytes()))
            }
        }
    }
}

fn failed(error: SnapshotError) -> EngineError {
    match error {
        SnapshotError::Cancelled => cancelled(),
        SnapshotError::Failed(error) => refused(error),
    }
}

/// Tells the watcher how far it is.
struct WatchedPace<'a> {
    watcher: &'a ImageWatcher,
    done_bytes: Cell<u64>,
    expected_bytes: Cell<u64>,
}

impl WatchedPace<'_> {
    fn tell(&self) {
        self.watcher
            .set_progress(self.done_bytes.get(), self.expected_bytes.get());
    }
}

impl Pace for WatchedPace<'_> {
    fn expect(&self, bytes: u64) {
        let expected = self.expected_bytes.get().saturating_add(bytes);
        self.expected_bytes.set(expected);
        self.tell();
    }

    fn done(&self, bytes: u64) {
        self.done_bytes
            .set(self.done_bytes.get().saturating_add(bytes));
        self.tell();
    }

    fn checkpoint(&self) -> LocalFuture<'_, Result<(), Cancelled>> {
        let outcome = match self.watcher.is_cancelled() {
            true => Err(Cancelled),
            false => Ok(()),
        };
        Box::pin(std::future::ready(outcome))
    }
}
