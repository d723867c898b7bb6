//! `blockdev-mirror`: a copy that is kept equal until the client switches over or lets go. An active commit is one too: onto the
//! base of the source's own chain.
//!
//! ```text
//!   copy everything, and what changes meanwhile -> flush -> ready: copy what changes, wait for orders
//!     -> copy until little is left -> writers wait: copy the rest -> flush -> end
//! ```
//! Writers wait on until the job's end is final: by then their requests go to the target, if it takes the source's place.

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blockyard_storage::{ByteRange, LocalFuture};
use futures_util::future::{Either, select};

use crate::bitmap::{FrozenBitmap, JobEnd};
use crate::error::{JobError, NodeError};
use crate::job::context::JobContext;
use crate::job::work::{Stop, Work};
use crate::jobs::changes::Goal;
use crate::jobs::copier::{Copier, CopyOptions, REMEMBER_BYTES, WindowLimits};
use crate::jobs::integrity::Integrity;
use crate::jobs::plan::Layers;
use crate::limits::COPY_CHUNK_BYTES;
use crate::manifest::Recorder;
use crate::node::Node;
use crate::node::dirty_map::DirtyMap;
use crate::node::mirror_top::{OtherSide, Quiet, Tracker};
use crate::node::transfer::{Failed, Writing, bring_over};
use crate::request::{BitmapMode, CopyMode, MirrorSpec, SyncMode};

/// Bytes in flight if the client does not say.
const BUF_SIZE_BYTES: u64 = 16 << 20;

/// Requests are multiples of this, whatever the client says of sizes.
const BLOCK_BYTES: u64 = 4096;

/// What changes while the two sides are equal is copied after so long: the next write is often beside it.
const SETTLE: Duration = Duration::from_millis(100);

/// Changed bytes that are copied before orders are looked at again.
const ROUND_BYTES: u64 = 64 << 20;

/// Changed bytes that writers wait for at the end.
const LEFT_MAX_BYTES: u64 = 4 << 20;

/// How often it is tried to leave no more than that to be waited for; writers may be faster.
const ROUNDS_MAX: u32 = 8;

/// What of the source is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// All that is seen.
    All,
    /// What so many layers hold.
    Layers(usize),
    /// What has changed since the target was equal, as a bitmap says.
    Changes,
    /// What changes from now on.
    Nothing,
}

/// The work of a mirror.
pub(crate) struct Mirror {
    source: Rc<dyn Node>,
    target: Rc<dyn Node>,
    /// What is known of the writers above the source.
    tracker: Rc<Tracker>,
    bitmap: Option<Arc<FrozenBitmap>>,
    /// What differs after a job that has ended early, if the rest is known to be durable.
    missing: Option<DirtyMap>,
    /// What is not marked or planned is equal on both sides.
    knows_what_differs: bool,
    extent: Extent,
    buf_size_bytes: u64,
    /// Zeroed ranges of the target may become holes.
    may_unmap: bool,
    /// The target reads as zeroes everywhere when the job begins.
    target_is_zero: bool,
    /// The target is longer, or is made so.
    grows_target: bool,
    /// Writers wait for the end.
    quiet: Option<Quiet>,
    integrity: Integrity,
}

impl Mirror {
    /// A mirror of `source` on `target`. `tracker` is that of the filter above the source, and `bitmap` was frozen when that came.
    pub(crate) fn new(
        source: Rc<dyn Node>,
        target: Rc<dyn Node>,
        tracker: Rc<Tracker>,
        bitmap: Option<Arc<FrozenBitmap>>,
        spec: &MirrorSpec,
    ) -> Self {
        let extent = match spec.sync {
            SyncMode::None => Extent::Nothing,
            // A top layer without anything below it is the whole disk.
            SyncMode::Top if source.backing().is_some() => Extent::Layers(1),
            SyncMode::Incremental | SyncMode::Bitmap => Extent::Changes,
            SyncMode::Full | SyncMode::Top => Extent::All,
        };
        let asked = spec.buf_size.and_then(|bytes| u64::try_from(bytes).ok());
        Self {
            source,
            target,
            tracker,
            bitmap,
            missing: None,
            knows_what_differs: false,
            extent,
            buf_size_bytes: asked.filter(|bytes| *bytes != 0).unwrap_or(BUF_SIZE_BYTES),
            may_unmap: spec.unmap,
            target_is_zero: spec.target_is_zero || makes_zeroes(spec),
            grows_target: false,
            quiet: None,
            integrity: Integrity::default(),
        }
    }

    /// The same with checksums.
    pub(crate) fn keeping(mut self, integrity: Integrity) -> Self {
        self.integrity = integrity;
        self
    }

    /// A commit of the first `layers` layers of `device`'s chain to `base`, the next one, which becomes as long as the device if
    /// it is shorter. `tracker` is that of the filter above the device.
    pub(super) fn to_base(
        device: Rc<dyn Node>,
        base: Rc<dyn Node>,
        layers: usize,
        tracker: Rc<Tracker>,
    ) -> Self {
        Self {
            source: device,
            target: base,
            tracker,
            bitmap: None,
            missing: None,
            knows_what_differs: false,
            extent: Extent::Layers(layers),
            buf_size_bytes: BUF_SIZE_BYTES,
            may_unmap: true,
            target_is_zero: false,
            grows_target: true,
            quiet: None,
            integrity: Integrity::default(),
        }
    }

    /// What the target keeps together, in bytes.
    fn target_unit_bytes(&self) -> u64 {
        self.target.facts().cluster_size_bytes.map_or(1, u64::from)
    }

    fn copier(&self) -> Copier {
        // A buffer holds at least what is tracked as one, as QEMU's does.
        let granularity = self.tracker.granularity_bytes();
        let in_flight = self.buf_size_bytes.next_multiple_of(granularity);
        // Whole blocks, so that no two requests share one of the target.
        let chunk = COPY_CHUNK_BYTES.min(in_flight.max(BLOCK_BYTES)) / BLOCK_BYTES * BLOCK_BYTES;
        let layers = match self.extent {
            Extent::Layers(count) => Layers::Top {
                count,
                unit_bytes: self.top_unit_bytes(),
            },
            Extent::All | Extent::Changes | Extent::Nothing => Layers::All,
        };
        let options = CopyOptions {
            layers,
            unit_bytes: self.target_unit_bytes(),
            compress: false,
            window: WindowLimits::of(chunk).with_bytes(in_flight),
            chunk_max_bytes: chunk,
            granularity_bytes: granularity.clamp(BLOCK_BYTES, chunk),
            may_unmap: self.may_unmap,
            skips_first_zeroes: self.target_is_zero && self.extent == Extent::All,
            // As QEMU's: zero requests cost nothing where the target unmaps.
            zeroes_are_free: self.may_unmap && self.target.facts().unmaps,
            one_error_a_round: false,
            counts_skipped: false,
            leaves_out_ignored: false,
            remember_bytes: REMEMBER_BYTES,
        };
        let all = match self.extent {
            Extent::Changes | Extent::Nothing => ByteRange::default(),
            Extent::All | Extent::Layers(_) => self.everything(),
        };
        let (source, target) = (self.source.clone(), self.target.clone());
        Copier::of(all, source, target, options)
            .with_changes(self.tracker.clone())
            .recording(self.integrity.recorder().cloned())
    }

    /// A manifest may want to know of more than what has changed, which is read and not written then.
    fn record_besides(&self, recorder: &Rc<Recorder>) {
        // What writers have changed since the filter came is in there as well.
        let changed = self.tracker.unequal();
        let Some(more) = self.integrity.recorded_besides(&changed) else {
            return;
        };
        let mut copied = DirtyMap::new(changed.length_bytes(), self.top_unit_bytes());
        copied.merge(&changed);
        recorder.copy_only(copied);
        self.tracker.mark_all(&more);
        self.tracker.record(Rc::clone(recorder), more);
    }

    /// What is copied together of layers that hold only parts. A part of a cluster that the target does not have yet would be
    /// filled up from below, where the backing that it has in the end may be missing still.
    fn top_unit_bytes(&self) -> u64 {
        let granularity = self.tracker.granularity_bytes();
        granularity.max(self.target_unit_bytes()).max(BLOCK_BYTES)
    }

    /// Whether a unit of the target that is written for the first time has to be written as a whole, as nothing else of it is
    /// copied, and what is below it may be missing still.
    fn fills_whole_units(&self) -> bool {
        match self.extent {
            Extent::Layers(_) => true,
            Extent::Changes | Extent::Nothing => {
                self.target.names_backing() && self.target.backing().is_none()
            }
            Extent::All => false,
        }
    }

    /// Lets writes reach the target, if they are to.
    fn show_target(&self, cx: &JobContext) {
        let writes_both = cx.orders().copy_mode() == CopyMode::WriteBlocking;
        self.tracker.set_writes_both(writes_both);
        let (source, target) = (self.source.clone(), self.target.clone());
        let (pool, may_unmap) = (cx.pool().clone(), self.may_unmap);
        self.tracker.show_other_side(OtherSide {
            target: self.target.clone(),
            bring_over: Rc::new(
                move |range| -> LocalFuture<'static, Result<(), NodeError>> {
                    let (source, target) = (source.clone(), target.clone());
                    let pool = pool.clone();
                    let how = Writing {
                        unit_bytes: 1,
                        compress: false,
                        may_unmap,
                    };
                    Box::pin(async move {
                        let brought = bring_over(range, &source, &*target, &pool, how, None).await;
                        brought.map_err(Failed::error)
                    })
                },
            ),
            unit_bytes: match self.fills_whole_units() {
                true => self.top_unit_bytes(),
                false => 1,
            },
            may_unmap: self.may_unmap,
        });
    }

    /// Whether the two sides are equal and no write could leave them unequal: where nothing can be written, none can.
    fn actively_synced(&self, cx: &JobContext) -> bool {
        let writes_both = cx.orders().copy_mode() == CopyMode::WriteBlocking;
        self.source.facts().length_bytes == 0 || writes_both && self.tracker.dirty_bytes() == 0
    }

    async fn mirror(&mut self, cx: &JobContext) -> Result<(), Stop> {
        let (source, target) = (self.source.facts(), self.target.facts());
        let fits = match self.grows_target {
            true => source.length_bytes <= target.length_bytes,
            false => source.length_bytes == target.length_bytes,
        };
        if !fits {
            let text = "Source and target image have different sizes";
            return Err(Stop::Failed(JobError::text(text)));
        }
        cx.checkpoint().await?;
        match (self.extent, &self.bitmap) {
            (Extent::All | Extent::Layers(_), _) => {
                self.tracker
                    .set_planned(self.everything(), self.everything());
                cx.progress().set_remaining(source.length_bytes);
            }
            (Extent::Changes, Some(bitmap)) => self.tracker.mark_all(bitmap.map()),
            (Extent::Changes, None) => {
                let text = "Internal error: a mirror has lost its bitmap (bug)";
                return Err(Stop::Failed(JobError::text(text)));
            }
            (Extent::Nothing, _) => {}
        }
        if let Some(recorder) = self.integrity.begin(source.length_bytes).await? {
            self.tracker.copy_again();
            if self.extent == Extent::Changes {
                self.record_besides(&recorder);
            }
        }
        self.integrity.check(cx).await?;
        self.knows_what_differs = true;
        self.show_target(cx);
        let mut copier = self.copier();
        if self.extent != Extent::Nothing {
            copier.run(cx).await?;
        }
        // The sides are equal. Only now is it read once more what was written on both: waiting for that to come to an end would keep
        // a job with checksums from ever being ready beside writers that never pause.
        self.tracker.copy_again_now();
        cx.orders().set_actively_synced(self.actively_synced(cx));
        cx.orders().set_busy(false);
        cx.converged().await;
        let mut rounds = 0;
        loop {
            self.stay_ready(cx, &mut copier).await?;
            if let Some(quiet) = self.finish(cx, &mut copier, &mut rounds).await? {
                self.quiet = Some(quiet);
                return Ok(());
            }
        }
    }

    /// Keeps the two sides equal until the client switches over or lets go.
    async fn stay_ready(&self, cx: &JobContext, copier: &mut Copier) -> Result<(), Stop> {
        let round = Goal {
            budget_bytes: ROUND_BYTES,
            ..Goal::CLEAN
        };
        let orders = cx.orders();
        loop {
            // An order alone is nothing in hand: a job that waits for writes shows no work when it is asked for something else.
            orders.set_busy(self.has_work());
            // A write that did not reach the target is copied now.
            orders.set_actively_synced(self.actively_synced(cx));
            copier.copy_to(cx, round).await?;
            copier.flush_and_verify(cx).await?;
            orders.set_actively_synced(self.actively_synced(cx));
            if orders.complete_ordered() || orders.cancel_ordered().is_some() {
                orders.set_busy(true);
                return Ok(());
            }
            if !self.has_work() && !cx.must_stop() {
                orders.set_busy(false);
                let (ordered, changed) = (cx.orders_changed(), self.tracker.changed());
                let measured = pin!(copier.until_measured(cx));
                select(select(pin!(ordered), pin!(changed)), measured).await;
                orders.set_actively_synced(self.actively_synced(cx));
                if self.has_work() {
                    let settled = cx.clock().now().after(SETTLE);
                    while !cx.must_stop()
                        && !orders.complete_ordered()
                        && orders.cancel_ordered().is_none()
                        && cx.clock().now() < settled
                    {
                        cx.rest_until(settled).await;
                    }
                }
            }
        }
    }

    fn has_work(&self) -> bool {
        self.tracker.dirty_bytes() > 0
    }

    /// Copies until little is left, and the rest while writers wait. `None`: it is to be tried again.
    async fn finish(
        &self,
        cx: &JobContext,
        copier: &mut Copier,
        rounds: &mut u32,
    ) -> Result<Option<Quiet>, Stop> {
        copier.rest_after_error(cx).await;
        cx.checkpoint().await?;
        if self.tracker.dirty_bytes() > LEFT_MAX_BYTES && *rounds < ROUNDS_MAX {
            *rounds += 1;
            let round = Goal {
                left_bytes: LEFT_MAX_BYTES,
                budget_bytes: self.tracker.dirty_bytes(),
                holds_writers: false,
            };
            copier.copy_to(cx, round).await?;
            return Ok(None);
        }
        let Some(quiet) = self.quiet(cx).await else {
            return Ok(None);
        };
        let rest = Goal {
            holds_writers: true,
            ..Goal::CLEAN
        };
        let whole = copier.copy_to(cx, rest).await? && copier.flush_once(cx).await?;
        let whole = whole && copier.verify(cx).await?;
        if whole {
            self.integrity.write().await?;
        }
        // Whoever goes on does so beside writers.
        copier.aim(Goal::CLEAN);
        Ok(whole.then_some(quiet))
    }

    /// Keeps writers waiting, unless the job has to stop before those inside have ended.
    async fn quiet(&self, cx: &JobContext) -> Option<Quiet> {
        let mut quiet = pin!(self.tracker.quiet());
        loop {
            match select(quiet.as_mut(), pin!(cx.orders_changed())).await {
                Either::Left((quiet, _)) => return Some(quiet),
                Either::Right(_) if cx.must_stop() => return None,
                Either::Right(_) => {}
            }
        }
    }

    fn everything(&self) -> ByteRange {
        ByteRange::new(0, self.source.facts().length_bytes)
    }

    /// The job has ended early. What has been copied is only forgotten once it is durable, as the next copy leaves it out then.
    async fn stop_early(&mut self) {
        let is_wanted = |bitmap: &Arc<FrozenBitmap>| bitmap.mode() == BitmapMode::Always;
        let is_wanted = self.knows_what_differs && self.bitmap.as_ref().is_some_and(is_wanted);
        // Writes that are on their way to both sides have been marked beside the bitmap.
        let unequal = is_wanted.then(|| {
            let unequal = self.tracker.unequal();
            match self.integrity.recorder() {
                Some(recorder) => recorder.copied_of(unequal),
                None => unequal,
            }
        });
        self.let_go();
        self.tracker.other_side_left().await;
        if let Some(unequal) = unequal
            && self.target.flush().await.is_ok()
        {
            self.missing = Some(unequal);
        }
    }

    fn settle(&self, end: JobEnd<'_>) {
        if let Some(bitmap) = &self.bitmap {
            bitmap.settle(end);
        }
    }

    /// Nothing goes to the target any more.
    fn let_go(&mut self) {
        self.tracker.end();
        self.quiet = None;
    }
}

/// Whether the target was made for the job, without anything below it that would show.
fn makes_zeroes(spec: &MirrorSpec) -> bool {
    let is_new = spec.new_target.as_ref().is_some_and(|new| !new.exists);
    is_new && spec.sync == SyncMode::Full
}

impl Work for Mirror {
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> LocalFuture<'a, Result<(), Stop>> {
        Box::pin(async move {
            let ended = self.mirror(cx).await;
            if ended.is_err() {
                self.stop_early().await;
                self.integrity.remove();
            }
            ended
        })
    }

    fn prepare<'a>(&'a mut self, _: &'a JobContext) -> LocalFuture<'a, Result<(), JobError>> {
        Box::pin(self.integrity.publish())
    }

    fn apply(&mut self) {
        // Writers still wait.
        self.settle(JobEnd::Equal);
        self.let_go();
    }

    fn revert(&mut self) {
        self.integrity.remove();
        self.settle(match &self.missing {
            Some(missing) => JobEnd::Part(missing),
            None => JobEnd::Failure,
        });
        self.let_go();
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.let_go();
    }
}
