//! Checkpoints of several disks in two phases: begun at one moment of all disks, and later committed or aborted on all of them.
//!
//! Between the two a client fetches what had changed; only once it has all of it, the next increment may begin where this one did.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use crate::checkpoint::{CheckpointRequest, CheckpointSpec, CheckpointView};
use crate::error::EngineError;
use crate::graph::PendingDisk;
use crate::manager::Manager;
use crate::reply::Reply;

/// Checkpoints that have begun at most.
const CHECKPOINTS_MAX: usize = 64;

/// Disks of one of them at most.
const DISKS_MAX: usize = 256;

/// Longest name of one in bytes.
const ID_BYTES_MAX: usize = 255;

/// Checkpoints that have begun and have not ended, oldest first.
#[derive(Default)]
pub(super) struct Checkpoints {
    all: RefCell<Vec<Checkpoint>>,
    last_serial: Cell<u64>,
}

struct Checkpoint {
    id: String,
    serial: u64,
    disks: Vec<PendingDisk>,
}

impl Checkpoint {
    fn view(&self) -> CheckpointView {
        CheckpointView {
            id: self.id.clone(),
            serial: self.serial,
            disks: self.disks.iter().map(|disk| disk.view().clone()).collect(),
        }
    }

    fn abort(self) {
        self.disks.into_iter().for_each(PendingDisk::abort);
    }
}

impl Checkpoints {
    fn place(&self, id: &str) -> Result<usize, EngineError> {
        let all = self.all.borrow();
        let place = all.iter().position(|one| one.id == id);
        place.ok_or_else(|| EngineError::generic(format!("Checkpoint '{id}' not found")))
    }

    /// Whether another one may begin.
    fn check_new(&self, spec: &CheckpointSpec) -> Result<(), EngineError> {
        let refused = |text: String| Err(EngineError::generic(text));
        let id = &spec.id;
        if !(1..=ID_BYTES_MAX).contains(&id.len()) {
            return refused(format!("A checkpoint's id has 1 to {ID_BYTES_MAX} bytes"));
        }
        let all = self.all.borrow();
        if all.iter().any(|one| one.id == *id) {
            return refused(format!("Checkpoint already exists: {id}"));
        }
        if all.len() >= CHECKPOINTS_MAX {
            return refused(format!("{CHECKPOINTS_MAX} checkpoints have begun already"));
        }
        if !(1..=DISKS_MAX).contains(&spec.disks.len()) {
            return refused(format!("A checkpoint has 1 to {DISKS_MAX} disks"));
        }
        let mut nodes = BTreeSet::new();
        match spec.disks.iter().find(|disk| !nodes.insert(&disk.node)) {
            Some(twice) => refused(format!("Node '{}' is named twice", twice.node)),
            None => Ok(()),
        }
    }
}

impl Manager {
    /// Carries out what a client asks of checkpoints.
    ///
    /// # Errors
    /// In QEMU's words, with the disk; nothing has changed then.
    pub(super) async fn handle_checkpoint(
        &self,
        request: CheckpointRequest,
    ) -> Result<Reply, EngineError> {
        let all = &self.checkpoints.all;
        if request == CheckpointRequest::Query {
            return Ok(Reply::Checkpoints(
                all.borrow().iter().map(Checkpoint::view).collect(),
            ));
        }
        let _alone = self.come_alone().await?;
        match request {
            CheckpointRequest::Begin(spec) => {
                return self.begin_checkpoint(spec).await.map(Reply::Checkpoint);
            }
            CheckpointRequest::Commit { id, keep_previous } => {
                self.commit_checkpoint(&id, keep_previous).await?;
            }
            CheckpointRequest::Abort { id } => {
                let place = self.checkpoints.place(&id)?;
                let checks = all.borrow();
                let disks = checks.get(place).map(|one| &one.disks);
                let mut disks = disks.into_iter().flatten();
                disks.try_for_each(PendingDisk::check_end)?;
                drop(checks);
                let aborted = all.borrow_mut().remove(place);
                aborted.abort();
            }
            CheckpointRequest::AbortLost { serial } => {
                let place = all.borrow().iter().position(|one| one.serial == serial);
                let lost = place.map(|place| all.borrow_mut().remove(place));
                lost.into_iter().for_each(Checkpoint::abort);
            }
            CheckpointRequest::Query => {}
        }
        Ok(Reply::Done)
    }

    async fn begin_checkpoint(&self, spec: CheckpointSpec) -> Result<CheckpointView, EngineError> {
        self.checkpoints.check_new(&spec)?;
        let names: Vec<&str> = spec.disks.iter().map(|disk| &*disk.node).collect();
        let drained = self.graph.drain_named(&names).await?;
        let mut disks: Vec<PendingDisk> = Vec::new();
        for disk in &spec.disks {
            let begun = self.graph.begin_on_disk(&spec.id, disk, spec.persistent);
            match begun.await {
                Ok(begun) => disks.push(begun),
                Err(error) => {
                    disks.into_iter().rev().for_each(PendingDisk::abort);
                    return Err(error);
                }
            }
        }
        drop(drained);
        let serial = self.checkpoints.last_serial.get() + 1;
        self.checkpoints.last_serial.set(serial);
        let begun = Checkpoint {
            id: spec.id,
            serial,
            disks,
        };
        let view = begun.view();
        self.checkpoints.all.borrow_mut().push(begun);
        Ok(view)
    }

    /// All disks or none: what can be refused is refused before anything changes.
    async fn commit_checkpoint(&self, id: &str, keep_previous: bool) -> Result<(), EngineError> {
        let place = self.checkpoints.place(id)?;
        // Nobody else changes the list meanwhile, who only reads it finds it without this one.
        let mut taken = self.checkpoints.all.borrow_mut().remove(place);
        let mut checked = Ok(());
        for disk in &mut taken.disks {
            checked = self.graph.check_checkpoint(disk).await;
            if checked.is_err() {
                break;
            }
        }
        if let Err(error) = checked {
            self.checkpoints.all.borrow_mut().insert(place, taken);
            return Err(error);
        }
        for disk in &mut taken.disks {
            if let Err(error) = disk.commit(keep_previous) {
                tracing::error!(%error, "a bitmap of a checkpoint is gone");
            }
        }
        for disk in &taken.disks {
            if let Err(error) = self.graph.settle_commit(disk, keep_previous).await {
                tracing::error!(%error, "an image does not have a checkpoint's bitmaps yet");
            }
        }
        Ok(())
    }
}
