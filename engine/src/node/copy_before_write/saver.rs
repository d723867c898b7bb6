//! [`Saver`]: what the filter above a disk and whoever uses what is saved know of each other: a backup, or a node that shows the
//! disk as it was.
//!
//! ```text
//!   a write:    its clusters' turn, save what is still to be saved, let go, write
//!   a backup:   a step's turn, copy what of it is still to be saved, let go
//! ```
//! Until somebody says where to, writes wait: the point in time is when the filter came. After the end they pass.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use blockyard_storage::buffer::BufferPool;
use blockyard_storage::error::{EACCES, ETIMEDOUT};
use blockyard_storage::{ByteRange, Operation, StorageError};
use futures_util::FutureExt;
use futures_util::future::{Either, select};
use tokio::sync::Notify;

use super::clusters::Clusters;
use super::ordered::Ordered;
use crate::clock::Clock;
use crate::data::Spawner;
use crate::error::NodeError;
use crate::limits::CBW_BUFFERS_BYTES;
use crate::manifest::Recorder;
use crate::node::Node;
use crate::node::dirty_map::DirtyMap;
use crate::node::gate::{Closed, Gate, Way};
use crate::node::runs::{Runs, Seen};
use crate::node::transfer::{Failed, Writing, bring_over, look_ahead, read_for_sums};
use crate::node::turns::{Doing, Turn};
use crate::request::{CbwOptions, OnCbwError};

/// Saved as one piece, at most, unless a cluster is longer.
const SPAN_MAX_BYTES: u64 = 16 << 20;

/// Where old data goes to.
#[derive(Clone)]
pub(crate) struct Destination {
    /// Below the filter.
    pub(crate) source: Rc<dyn Node>,
    /// As long.
    pub(crate) target: Rc<dyn Node>,
    /// Only what so many layers of the source hold is saved; `None`: all that is seen.
    pub(crate) layers_max: Option<usize>,
    /// How the target is written.
    pub(crate) how: Writing,
    /// Who is told what was read.
    pub(crate) recorder: Option<Rc<Recorder>>,
}

impl Destination {
    /// Where it is read what has been saved, or has not.
    pub(super) fn of(&self, is_saved: bool) -> &Rc<dyn Node> {
        match is_saved {
            true => &self.target,
            false => &self.source,
        }
    }
}

/// What became of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// They are on the target.
    Saved,
    /// They do not come to the target: the layers that are saved do not hold them, or they have not changed.
    Skipped,
}

/// Hears which clusters have met their fate, and how many bytes of them were to be saved.
type Count = Rc<dyn Fn(ByteRange, u64, Fate)>;

/// How far a saver has come when its node was closed, for the next one in its place.
#[derive(Clone, Default)]
pub struct Progress(Arc<Mutex<Option<Unsaved>>>);

/// What a saver knows of its disk.
#[derive(Clone)]
struct Unsaved {
    /// What is still to be saved.
    map: DirtyMap,
    /// What has been or will be; `None`: all.
    kept: Option<DirtyMap>,
    /// Why what has been is worth nothing.
    broken: Option<NodeError>,
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Progress")
    }
}

impl Progress {
    /// Of a saver that has not begun, for a disk of which only what has changed according to `map` is to be saved, in clusters of
    /// `cluster_bytes`.
    pub(crate) fn only(map: &DirtyMap, cluster_bytes: u64) -> Self {
        let mut unsaved = DirtyMap::new(map.length_bytes(), cluster_bytes);
        unsaved.merge(map);
        Self(Arc::new(Mutex::new(Some(Unsaved {
            kept: Some(unsaved.clone()),
            map: unsaved,
            broken: None,
        }))))
    }

    /// Remembers how far a saver has come.
    pub(super) fn remember(&self, saver: &Saver) {
        let unsaved = Unsaved {
            map: saver.clusters.unsaved(),
            kept: saver.kept.borrow().clone(),
            broken: saver.broken(),
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(unsaved);
    }

    fn recall(&self) -> Option<Unsaved> {
        let remembered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        remembered.clone()
    }
}

/// What a filter needs of its thread.
#[derive(Clone)]
pub struct Surroundings {
    /// Its time.
    pub(crate) clock: Rc<dyn Clock>,
    /// Who brings to an end what nobody waits for any more.
    pub(crate) spawner: Spawner,
}

/// What the filter above a disk and whoever uses what is saved know of each other.
pub struct Saver {
    clusters: Clusters,
    /// What is saved before it changes; `None`: all.
    kept: RefCell<Option<DirtyMap>>,
    options: CbwOptions,
    surroundings: Surroundings,
    /// Apart from those of jobs, whose writes may be what waits for a copy.
    pool: BufferPool,
    /// Where writers wait until it is known where to.
    gate: Rc<Gate>,
    closed: RefCell<Option<Closed>>,
    destination: RefCell<Option<Rc<Destination>>>,
    ordered: RefCell<Option<Ordered>>,
    count: RefCell<Option<Count>>,
    /// Why what was saved is no whole point in time any more.
    broken: RefCell<Option<NodeError>>,
    is_over: Cell<bool>,
    is_written: Cell<bool>,
    changed: Notify,
}

impl Saver {
    /// Of a disk of this length, all of which is to be saved in clusters of `cluster_bytes`, a power of two. Writes wait.
    pub(crate) fn new(
        length_bytes: u64,
        cluster_bytes: u64,
        options: CbwOptions,
        surroundings: Surroundings,
    ) -> Self {
        Self::with(
            Clusters::new(length_bytes, cluster_bytes),
            options,
            surroundings,
        )
    }

    /// The same, which goes on where another one has stopped.
    pub(crate) fn resumed(
        progress: &Progress,
        (length_bytes, cluster_bytes): (u64, u64),
        options: CbwOptions,
        surroundings: Surroundings,
    ) -> Self {
        let Some(Unsaved { map, kept, broken }) = progress.recall() else {
            return Self::new(length_bytes, cluster_bytes, options, surroundings);
        };
        Self {
            kept: kept.into(),
            broken: broken.into(),
            ..Self::with(Clusters::with(map), options, surroundings)
        }
    }

    fn with(clusters: Clusters, options: CbwOptions, surroundings: Surroundings) -> Self {
        let gate = Rc::new(Gate::default());
        // Nobody is inside.
        let closed = gate.close_again(Way::Write).now_or_never();
        Self {
            clusters,
            kept: RefCell::default(),
            options,
            surroundings,
            pool: BufferPool::new(CBW_BUFFERS_BYTES),
            gate,
            closed: closed.into(),
            destination: RefCell::default(),
            ordered: RefCell::default(),
            count: RefCell::default(),
            broken: RefCell::default(),
            is_over: Cell::new(false),
            is_written: Cell::new(false),
            changed: Notify::new(),
        }
    }

    /// Where buffers come from, once the turn has come.
    pub(super) fn pool(&self) -> &BufferPool {
        &self.pool
    }

    /// What is still to be saved.
    pub(crate) fn clusters(&self) -> &Clusters {
        &self.clusters
    }

    /// Writes go on, and what they are about to change is saved there. `count` hears of what has been.
    pub(crate) fn begin(
        &self,
        destination: Destination,
        count: impl Fn(ByteRange, u64, Fate) + 'static,
    ) {
        if self.is_over.get() {
            return;
        }
        let ordered = Ordered::new(&destination.target, &destination.source);
        *self.ordered.borrow_mut() = Some(ordered);
        *self.destination.borrow_mut() = Some(Rc::new(destination));
        *self.count.borrow_mut() = Some(Rc::new(count));
        drop(self.closed.borrow_mut().take());
    }

    /// What is saved is read there from now on, which holds the same.
    pub(super) fn read_from(&self, source: Rc<dyn Node>) {
        let mut place = self.destination.borrow_mut();
        if let Some(before) = place.as_deref().cloned() {
            *place = Some(Rc::new(Destination { source, ..before }));
        }
    }

    /// Where what was there can be read: what is still to be saved, and what has been.
    ///
    /// # Errors
    /// `EACCES` once nobody knows what was there.
    pub(super) fn sides(&self) -> Result<Rc<Destination>, i32> {
        let destination = self.destination.borrow().clone();
        destination.filter(|_| self.saves()).ok_or(EACCES)
    }

    /// Whether what was in all of `range` is known and stays so.
    pub(super) fn keeps(&self, range: ByteRange) -> bool {
        self.kept.borrow().as_ref().is_none_or(|kept| {
            let run = kept.run_in(range);
            run.is_some_and(|run| run.contains(&range)) || range.is_empty()
        })
    }

    /// Nobody wants to know any more what was in the clusters that lie in `range` as a whole: they are not saved, and the target has
    /// their room back, if it gives any.
    ///
    /// # Errors
    /// The target's; nobody knows what was there then either.
    pub(super) async fn give_up(&self, range: ByteRange) -> Result<(), NodeError> {
        let clusters = range.align_inward(self.clusters.cluster_bytes());
        let destination = self.destination.borrow().clone();
        let Some(destination) = destination.filter(|_| !clusters.is_empty()) else {
            return Ok(());
        };
        let turn = self.clusters.turn(clusters, Doing::GiveUp);
        turn.come().await;
        let length_bytes = destination.source.facts().length_bytes;
        self.kept
            .borrow_mut()
            .get_or_insert_with(|| self.clusters.all(length_bytes))
            .clear(clusters);
        self.clusters.set_saved(clusters);
        destination.target.discard(clusters).await
    }

    /// Nothing is saved any more, and writes pass. What is being saved ends by itself: see [`left`](Self::left).
    pub(crate) fn end(&self) {
        self.is_over.set(true);
        self.destination.borrow_mut().take();
        self.ordered.borrow_mut().take();
        self.count.borrow_mut().take();
        drop(self.closed.borrow_mut().take());
    }

    /// Waits until nothing that began before is on its way to the target.
    pub(crate) async fn left(&self) {
        let everything = ByteRange::new(0, u64::MAX);
        self.clusters.turn(everything, Doing::Copy).come().await;
    }

    /// Whether somebody has written.
    pub(crate) fn is_written(&self) -> bool {
        self.is_written.get()
    }

    /// Why what was saved is worth nothing.
    pub(crate) fn broken(&self) -> Option<NodeError> {
        self.broken.borrow().clone()
    }

    /// Ends when it has broken since the last call. One caller at a time.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Clusters have met their fate.
    pub(crate) fn settle(&self, clusters: ByteRange, fate: Fate) {
        if self.is_over.get() {
            // Somebody may have written meanwhile.
            return;
        }
        let bytes = self.clusters.set_saved(clusters);
        let count = self.count.borrow().clone();
        if let Some(count) = count.filter(|_| bytes > 0) {
            count(clusters, bytes, fate);
        }
    }

    /// What a step of a copy, in its turn, still has to do.
    pub(crate) fn rest_of(&self, step: ByteRange) -> Option<ByteRange> {
        match self.is_over.get() {
            true => None,
            false => self.clusters.first_unsaved(step),
        }
    }

    /// Takes the turn of a step.
    pub(crate) fn turn(&self, step: ByteRange) -> Turn {
        self.clusters.turn(self.clusters.outward(step), Doing::Copy)
    }

    /// Whether what is about to be changed has to be saved.
    fn saves(&self) -> bool {
        !self.is_over.get() && self.broken.borrow().is_none()
    }

    /// Ends when `range` may be changed.
    ///
    /// # Errors
    /// What was there could not be saved, and must not be lost.
    ///
    /// # Cancel safety
    /// What is being saved is saved all the same.
    pub(super) async fn before_change(self: &Rc<Self>, range: ByteRange) -> Result<(), NodeError> {
        drop(self.gate.enter(Way::Write).await);
        self.is_written.set(true);
        let clusters = self.clusters.outward(range);
        let is_saved = self.clusters.first_unsaved(clusters).is_none();
        if clusters.is_empty() || !self.saves() || is_saved && self.clusters.is_free(clusters) {
            return Ok(());
        }
        let saver = Rc::clone(self);
        let work = Box::pin(async move { saver.save_in_turn(clusters).await });
        // What is under way on the target is not forgotten when nobody waits for it any more.
        let work = self.surroundings.spawner.to_the_end(work);
        let seconds = self.options.timeout_seconds;
        let saved = if seconds == 0 {
            work.await
        } else {
            let clock = &self.surroundings.clock;
            let until = clock.now().after(Duration::from_secs(u64::from(seconds)));
            match select(work, clock.sleep_until(until)).await {
                Either::Left((saved, _)) => saved,
                Either::Right(_) => Err(self.timed_out(clusters)),
            }
        };
        match (saved, self.options.on_error) {
            (Err(error), OnCbwError::BreakGuestWrite) if self.saves() => Err(error),
            (Err(error), OnCbwError::BreakSnapshot) => {
                self.break_with(error);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn timed_out(&self, clusters: ByteRange) -> NodeError {
        let destination = self.destination.borrow();
        let target = destination.as_ref().map(|known| known.target.name());
        NodeError {
            node: target.unwrap_or_default(),
            source: StorageError::new(Operation::Write, clusters, ETIMEDOUT),
        }
    }

    fn break_with(&self, error: NodeError) {
        if self.saves() {
            self.broken.borrow_mut().get_or_insert(error);
            self.changed.notify_one();
        }
    }

    /// Saves what is still to be saved of these clusters, and waits for those who read what was there.
    async fn save_in_turn(&self, clusters: ByteRange) -> Result<(), NodeError> {
        while let Some(first) = self.clusters.first_unsaved(clusters) {
            let mut rest = ByteRange::between(first.offset(), clusters.end());
            let turn = self.clusters.turn(rest, Doing::Copy);
            turn.come().await;
            loop {
                let destination = self.destination.borrow().clone();
                let Some(destination) = destination.filter(|_| self.saves()) else {
                    return Ok(());
                };
                let Some(run) = self.clusters.first_unsaved(rest) else {
                    break;
                };
                let saved = self.save(&destination, run).await;
                saved.map_err(Failed::error)?;
                rest = ByteRange::between(run.end(), rest.end());
            }
        }
        if !self.clusters.is_free(clusters) {
            self.clusters.turn(clusters, Doing::Overwrite).come().await;
        }
        Ok(())
    }

    async fn save(&self, destination: &Destination, clusters: ByteRange) -> Result<(), Failed> {
        let cluster_bytes = self.clusters.cluster_bytes();
        let (mut known, mut rest) = (Runs::default(), clusters);
        while !rest.is_empty() {
            let (mut span, mut fate) = (rest, Fate::Saved);
            if destination.layers_max.is_some() {
                let (layers_max, source) = (destination.layers_max, &destination.source);
                known.go_on_to(rest.offset());
                look_ahead(&mut known, source, layers_max, rest, cluster_bytes).await;
                let is_held;
                (span, is_held) = known.front_units(rest, cluster_bytes, Seen::is_held);
                if !is_held {
                    fate = Fate::Skipped;
                }
            }
            let Destination {
                source,
                target,
                how,
                recorder,
                ..
            } = destination;
            let recorder = recorder.as_deref();
            if let Some(recorder) = recorder {
                let is_copied;
                (span, is_copied) = recorder.first_part(span);
                if !is_copied {
                    fate = Fate::Skipped;
                }
            }
            let is_read = recorder.is_some_and(Recorder::needs_every_byte);
            if fate == Fate::Saved || is_read {
                (span, _) = span.split_at(SPAN_MAX_BYTES.max(cluster_bytes));
            }
            if fate == Fate::Skipped
                && is_read
                && let Some(recorder) = recorder
            {
                read_for_sums(span, source, &self.pool, recorder).await?;
            }
            if fate == Fate::Saved {
                bring_over(span, source, &**target, &self.pool, *how, recorder).await?;
            }
            self.settle(span, fate);
            rest = ByteRange::between(span.end(), rest.end());
        }
        Ok(())
    }
}
