//! Internal snapshots of the image of a node that may be in use: requests wait, the image is closed, changed below the node,
//! and opened again.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::snapshot::{self, SnapshotError};
use blockyard_storage::Storage;

use crate::bitmap::NodeBitmaps;
use crate::node::gate::{Gate, Way};
use crate::node::qcow2::amending::reopen;
use crate::node::qcow2::mover::Mover;
use crate::node::qcow2::recording;
use crate::node::{AmendStop, Reopened, SnapshotChange};

/// See [`Node::change_snapshots`](crate::node::Node::change_snapshots).
pub(super) async fn change_snapshots(
    gate: Rc<Gate>,
    mover: Rc<RefCell<Rc<Mover>>>,
    reopened: Rc<RefCell<Option<Reopened>>>,
    bitmaps: Arc<NodeBitmaps>,
    change: SnapshotChange,
) -> Result<(), AmendStop> {
    // Tables that readers know of may be gone before the node changes over.
    let _writers = gate.close(Way::Write).await;
    let _readers = gate.close(Way::Read).await;
    let old = Rc::clone(&mover.borrow());
    old.close().await.map_err(AmendStop::Failed)?;
    old.away.set(true);
    let file: Rc<dyn Storage> = old.files.file.clone();
    let discards = old.image.options().pass_discard_snapshot;
    let changed = match &change {
        SnapshotChange::Create(new) => snapshot::create(&file, new, discards, &Unwatched)
            .await
            .map(drop),
        SnapshotChange::Delete(choice) => snapshot::delete(&file, choice, discards, &Unwatched)
            .await
            .map(drop),
    };
    reopen(None, &mover, &reopened, &old).await?;
    // Its disk shows what it showed, and nobody has written meanwhile.
    recording::continues(&mover.borrow().image, &bitmaps);
    match changed {
        Ok(()) => Ok(()),
        Err(SnapshotError::Cancelled) => Err(AmendStop::Cancelled),
        Err(SnapshotError::Failed(error)) => Err(old.amend_stop(error)),
    }
}
