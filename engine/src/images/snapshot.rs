//! Internal snapshots of a qcow2 image on the node of its file.

use std::cell::Cell;
use std::rc::Rc;

use blockyard_images::qcow2::snapshot::{self, NewSnapshot, SnapshotChoice, SnapshotError};
use blockyard_images::{Cancelled, Pace};
use blockyard_storage::{LocalFuture, Storage};

use crate::error::EngineError;
use crate::images::watcher::ImageWatcher;
use crate::images::{cancelled, refused};
use crate::node::Node;
use crate::node::child_storage::ChildStorage;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotSpec {
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

/// Changes the snapshots of the image on a node; durable when this returns.
///
/// # Errors
/// As [`snapshot`] says, with what says more in brackets; when it was cancelled. But for a failed write of the header, the
/// image is what it was.
pub(super) async fn run(
    node: Rc<dyn Node>,
    spec: SnapshotSpec,
    watcher: &ImageWatcher,
) -> Result<(), EngineError> {
    let file: Rc<dyn Storage> = Rc::new(ChildStorage::new(node));
    let pace = WatchedPace {
        watcher,
        done_bytes: Cell::new(0),
        expected_bytes: Cell::new(0),
    };
    let changed = match spec {
        SnapshotSpec::Create {
            name,
            date_seconds,
            date_nanoseconds,
        } => {
            let new = NewSnapshot {
                name: name.into_bytes(),
                date_seconds,
                date_nanoseconds,
                vm_clock_nanoseconds: 0,
            };
            snapshot::create(&file, &new, true, &pace).await.map(drop)
        }
        SnapshotSpec::Apply { id_or_name } => {
            let choice = SnapshotChoice::IdOrName(id_or_name.into_bytes());
            snapshot::apply(&file, &choice, true, &pace).await
        }
        SnapshotSpec::Delete { name } => {
            let choice = SnapshotChoice::Name(name.into_bytes());
            snapshot::delete(&file, &choice, true, &pace)
                .await
                .map(drop)
        }
    };
    changed.map_err(|error| match error {
        SnapshotError::Cancelled => cancelled(),
        SnapshotError::Failed(error) => refused(error),
    })
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
