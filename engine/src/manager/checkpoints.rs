//! Checkpoints of several disks in two phases: begun at one moment of all disks, and later committed or aborted on all of them.
//!
//! Between the two a client fetches what had changed; only once it has all of it, the next increment may begin where this one did.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use tokio::sync::Mutex;

use crate::checkpoint::{CheckpointRequest, CheckpointSpec, CheckpointView};
use crate::error::EngineError;
use crate::graph::{ImageFile, PendingDisk};
use crate::manager::Manager;
use crate::manager::decisions::{self, Decision};
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
    /// `None`: nobody has looked yet.
    decided: Mutex<Option<Decided>>,
}

/// What has been decided and is not in every image yet.
#[derive(Default)]
struct Decided {
    /// By a daemon that was killed, for images that have not been opened since.
    inherited: Vec<Decision>,
    /// For images that have it in memory.
    own: Vec<Decision>,
}

impl Decided {
    fn all(&self) -> Vec<Decision> {
        [&*self.inherited, &self.own].concat()
    }

    /// These images have what was decided for them, durably; whether anything was.
    fn remove(&mut self, done: &[ImageFile]) -> bool {
        let before = self.inherited.len() + self.own.len();
        for list in [&mut self.inherited, &mut self.own] {
            list.retain(|one| !done.iter().any(|file| file.is(&one.path, one.identity)));
        }
        self.inherited.len() + self.own.len() < before
    }
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
        if let Err(error) = self.decide(&taken.disks, keep_previous).await {
            self.checkpoints.all.borrow_mut().insert(place, taken);
            return Err(error);
        }
        for disk in &mut taken.disks {
            if let Err(error) = disk.commit(keep_previous) {
                tracing::error!(%error, "a bitmap of a checkpoint is gone");
            }
        }
        let mut done = Vec::new();
        for disk in &taken.disks {
            match self.graph.settle_commit(disk, keep_previous).await {
                Ok(()) if self.graph.is_durable(disk) => done.extend(self.graph.file_of_disk(disk)),
                Ok(()) => {}
                Err(error) => {
                    tracing::error!(%error, "an image does not have a checkpoint's bitmaps yet");
                }
            }
        }
        let mut decided = self.checkpoints.decided.lock().await;
        self.set_done(&mut decided, &done).await;
        Ok(())
    }

    /// Makes durable that these disks are to have their new bitmaps, whatever happens before all of them do.
    ///
    /// # Errors
    /// It cannot be written down. It may take effect all the same if the daemon is killed before it has been committed or aborted.
    async fn decide(&self, disks: &[PendingDisk], keep_previous: bool) -> Result<(), EngineError> {
        let Some(state) = self.graph.state() else {
            return Ok(());
        };
        let mut decided = self.checkpoints.decided.lock().await;
        let known = self.known_decisions(&mut decided).await?;
        let before = known.own.len();
        for disk in disks {
            let Some(ImageFile { path, identity }) = self.graph.file_of_disk(disk) else {
                continue;
            };
            let view = disk.view();
            known.own.push(Decision {
                path,
                identity,
                bitmap: view.bitmap.clone(),
                previous: view.previous.clone(),
                granularity_bytes: self.graph.granularity_of(disk),
                keep_previous,
            });
        }
        let left = known.all();
        if left.len() > decisions::IMAGES_MAX {
            known.own.truncate(before);
            return Err(EngineError::generic(format!(
                "{} images wait to be opened again, as the daemon was killed while their checkpoints were committed",
                decisions::IMAGES_MAX
            )));
        }
        if let Err(error) = decisions::write(state, &left).await {
            known.own.truncate(before);
            if let Err(error) = decisions::write(state, &known.all()).await {
                tracing::error!(%error, "what has not been decided may be written down");
            }
            return Err(unwritten(&error));
        }
        Ok(())
    }

    /// What has been decided and is not in every image yet.
    async fn known_decisions<'a>(
        &self,
        decided: &'a mut Option<Decided>,
    ) -> Result<&'a mut Decided, EngineError> {
        if decided.is_none()
            && let Some(state) = self.graph.state()
        {
            let inherited = decisions::read(state).await;
            *decided = Some(Decided {
                inherited: inherited.map_err(|error| unwritten(&error))?,
                own: Vec::new(),
            });
        }
        Ok(decided.get_or_insert_default())
    }

    /// These images have what was decided for them.
    async fn set_done(&self, decided: &mut Option<Decided>, done: &[ImageFile]) {
        let (Some(state), Some(left)) = (self.graph.state(), decided.as_mut()) else {
            return;
        };
        if left.remove(done)
            && let Err(error) = decisions::write(state, &left.all()).await
        {
            tracing::warn!(%error, "what has been done about checkpoints will be done again");
        }
    }

    /// Images that have been opened have what was decided for them before the daemon was killed.
    pub(super) async fn go_on_with_checkpoints(&self) {
        if self.graph.state().is_none() {
            return;
        }
        let mut decided = self.checkpoints.decided.lock().await;
        let known = match self.known_decisions(&mut decided).await {
            Ok(known) if known.inherited.is_empty() => return,
            Ok(known) => known,
            Err(error) => {
                tracing::error!(%error, "checkpoints may have been committed on some disks only");
                return;
            }
        };
        let images = self.graph.open_images();
        let mut done = Vec::new();
        // In the order in which they were decided: one may go on from another.
        for one in std::mem::take(&mut known.inherited) {
            let is_of = |file: &ImageFile| file.is(&one.path, one.identity);
            let opened = images.iter().filter(|(_, file)| is_of(file));
            let mut is_open = false;
            for (node, file) in opened {
                is_open = true;
                done.retain(|other| other != file);
                let how = (one.granularity_bytes, one.keep_previous);
                let previous = one.previous.as_deref();
                match self.graph.succeed(*node, &one.bitmap, previous, how).await {
                    Ok(true) => done.push(file.clone()),
                    Ok(false) => {}
                    Err(error) => {
                        tracing::error!(%error, "an image does not have a checkpoint's bitmaps yet");
                    }
                }
            }
            match is_open {
                true => known.own.push(one),
                false => known.inherited.push(one),
            }
        }
        self.set_done(&mut decided, &done).await;
    }
}

fn unwritten(error: &std::io::Error) -> EngineError {
    EngineError::generic(format!(
        "State directory: a checkpoint cannot be written down: {error}"
    ))
}
