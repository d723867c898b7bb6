//! Transactions: several commands that all come about, or none of them, at one moment of every disk that they name.
//!
//! Users outside of the graph are drained from before the first action until the last one is final, so that what is written
//! before is in every snapshot, backup and bitmap, and what is written afterwards in none of them. No command that would meet with
//! what may yet be taken back comes in between. Each action is carried out in
//! turn and keeps what takes it back; the first one that fails has all before it taken back, newest first.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{MutexGuard, RwLockWriteGuard};

use crate::error::EngineError;
use crate::graph::{ChangedBitmap, PutOverlay};
use crate::manager::Manager;
use crate::manager::record::GroupKey;
use crate::manager::start::Admitted;
use crate::request::{TransactionAction, WorkSpec};

/// How long commands that are on their way may keep a transaction, and with it those behind it, waiting.
const ALONE_WAIT: Duration = Duration::from_secs(30);

/// Whoever has it is alone with what may yet be taken back.
type Alone<'a> = (RwLockWriteGuard<'a, ()>, MutexGuard<'a, ()>);

/// An action that has been carried out and is not final yet.
enum Prepared {
    Bitmap(ChangedBitmap),
    Overlay(PutOverlay),
    Snapshot { device: String, name: String },
    Job(Box<Admitted>),
}

impl Manager {
    /// Does all of this or nothing. Jobs are created in order and start in reverse order; `grouped` jobs also end together or
    /// not at all.
    ///
    /// # Errors
    /// That of the first action that cannot be carried out; those before it have come to nothing, newest first. What they made
    /// in files may be left.
    pub(super) async fn transact(
        self: &Rc<Self>,
        actions: Vec<TransactionAction>,
        grouped: bool,
    ) -> Result<(), EngineError> {
        let _alone = self.come_alone().await?;
        let names: Vec<&str> = actions.iter().filter_map(node_of).collect();
        let drained = self.graph.drain_named(&names).await?;
        let common = self.new_group();
        let mut prepared = Vec::new();
        for action in &actions {
            let group = if grouped { common } else { self.new_group() };
            match self.carry_out(action, group).await {
                Ok(done) => prepared.push(done),
                Err(error) => {
                    for done in prepared.into_iter().rev() {
                        self.take_back(done).await;
                    }
                    return Err(error);
                }
            }
        }
        for done in prepared.into_iter().rev() {
            match done {
                Prepared::Bitmap(changed) => changed.settle(),
                Prepared::Overlay(put) => self.graph.settle_overlay(put).await,
                Prepared::Snapshot { .. } => {}
                Prepared::Job(job) => self.launch(*job),
            }
        }
        // Before anybody writes on, and before the client hears of it.
        let changed: BTreeSet<&str> = actions.iter().filter_map(bitmaps_changed).collect();
        for node in changed {
            self.graph.record_bitmaps(node).await;
        }
        drop(drained);
        Ok(())
    }

    /// Waits until no command is on its way that would meet with what may be taken back. None begins as long as the answer is kept.
    ///
    /// # Errors
    /// They do not end in time, or the daemon ends.
    pub(super) async fn come_alone(&self) -> Result<Alone<'_>, EngineError> {
        let alone = tokio::time::timeout(ALONE_WAIT, self.transacting.write());
        let Ok(alone) = alone.await else {
            return Err(EngineError::generic(format!(
                "Other commands do not end within {} s",
                ALONE_WAIT.as_secs()
            )));
        };
        let carried_out = self.transaction.lock().await;
        match self.ending.get() {
            true => Err(EngineError::generic("The daemon is ending")),
            false => Ok((alone, carried_out)),
        }
    }

    async fn carry_out(
        &self,
        action: &TransactionAction,
        group: GroupKey,
    ) -> Result<Prepared, EngineError> {
        match action {
            TransactionAction::Abort => {
                let text = "Transaction aborted using Abort action";
                Err(EngineError::generic(text))
            }
            TransactionAction::ChangeBitmap(change) => {
                let changed = self.graph.change_bitmap(change).await?;
                Ok(Prepared::Bitmap(changed))
            }
            TransactionAction::BlockdevSnapshot { node, overlay } => {
                let put = self.graph.put_overlay(node, overlay).await?;
                Ok(Prepared::Overlay(put))
            }
            TransactionAction::NewOverlay(spec) => {
                let put = self.graph.put_new_overlay(spec).await?;
                Ok(Prepared::Overlay(put))
            }
            TransactionAction::CreateInternalSnapshot { device, name } => {
                self.graph.create_snapshot(device, name).await?;
                let (device, name) = (device.clone(), name.clone());
                Ok(Prepared::Snapshot { device, name })
            }
            TransactionAction::StartJob(spec) => {
                let job = self.admit(spec.as_ref().clone(), group).await?;
                Ok(Prepared::Job(Box::new(job)))
            }
        }
    }

    async fn take_back(&self, done: Prepared) {
        let outcome = match done {
            Prepared::Bitmap(changed) => {
                changed.undo();
                Ok(())
            }
            Prepared::Overlay(put) => self.graph.take_overlay_off(put).await,
            Prepared::Snapshot { device, name } => {
                let deleted = self.graph.delete_snapshot(&device, None, Some(&name)).await;
                deleted.map(drop)
            }
            Prepared::Job(job) => {
                self.cancel(job.key, true).await;
                Ok(())
            }
        };
        if let Err(error) = outcome {
            tracing::error!(%error, "a part of a transaction that failed could not be taken back");
        }
    }
}

/// The node whose bitmaps are others afterwards.
fn bitmaps_changed(action: &TransactionAction) -> Option<&str> {
    match action {
        TransactionAction::ChangeBitmap(change) => Some(change.node()),
        _ => None,
    }
}

/// The node whose users must not write while an action is carried out.
fn node_of(action: &TransactionAction) -> Option<&str> {
    match action {
        TransactionAction::Abort => None,
        TransactionAction::ChangeBitmap(change) => Some(change.node()),
        TransactionAction::BlockdevSnapshot { node, .. } => Some(node),
        TransactionAction::NewOverlay(spec) => spec.node_name.as_deref().or(spec.device.as_deref()),
        TransactionAction::CreateInternalSnapshot { device, .. } => Some(device),
        TransactionAction::StartJob(job) => match &job.work {
            WorkSpec::Backup(backup) => Some(&backup.device),
            WorkSpec::Mirror(mirror) => Some(&mirror.device),
            WorkSpec::Commit(commit) => Some(&commit.device),
            WorkSpec::Stream(stream) => Some(&stream.device),
            WorkSpec::Create(_) | WorkSpec::Amend(_) => None,
        },
    }
}
