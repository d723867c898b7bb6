//! `blockdev-backup`: a copy of one point in time.
//!
//! The filter above the source saves what a writer is about to change; the job copies the rest. Both know from the same
//! [`Saver`] what is still to be copied, and nothing is copied twice. A bitmap says what that is at first, if the client wants so, and
//! gets to know in the end what was left.

use std::cell::RefCell;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;

use blockyard_storage::LocalFuture;
use futures_util::future::select;

use crate::bitmap::{FrozenBitmap, JobEnd};
use crate::error::JobError;
use crate::job::context::JobContext;
use crate::job::work::{Stop, Work};
use crate::jobs::copier::{Copier, CopyOptions, REMEMBER_BYTES, WindowLimits};
use crate::jobs::integrity::Integrity;
use crate::jobs::plan::Layers;
use crate::limits::COPY_CHUNK_BYTES;
use crate::node::Node;
use crate::node::copy_before_write::{Destination, Fate, Saver};
use crate::node::dirty_map::DirtyMap;
use crate::node::transfer::Writing;
use crate::request::{BackupSpec, BitmapMode, SyncMode};

/// Smallest unit in which progress is counted, in bytes.
const CLUSTER_MIN_BYTES: u64 = 64 << 10;

/// Bytes of the source discarded at once.
const DISCARD_BYTES: u64 = 64 << 20;

/// What has been copied, in whole clusters.
type Copied = Rc<RefCell<DirtyMap>>;

/// The work of a backup.
pub(crate) struct Backup {
    source: Rc<dyn Node>,
    target: Rc<dyn Node>,
    saver: Rc<Saver>,
    bitmap: Option<Arc<FrozenBitmap>>,
    spec: BackupSpec,
    /// What is discarded behind the copy.
    copied: Option<Copied>,
    integrity: Integrity,
    /// What is missing of a copy that has ended early, if the rest is known to be durable.
    missing: Option<DirtyMap>,
}

impl Backup {
    /// A backup of `source` onto `target`, which is as long. `saver` is that of the filter above the source, and `bitmap` was frozen
    /// when that came.
    pub(crate) fn new(
        source: Rc<dyn Node>,
        target: Rc<dyn Node>,
        saver: Rc<Saver>,
        bitmap: Option<Arc<FrozenBitmap>>,
        spec: BackupSpec,
    ) -> Self {
        let copied = || {
            let all = saver.clusters().unsaved();
            Rc::new(RefCell::new(all.emptied()))
        };
        Self {
            copied: spec.discard_source.then(copied),
            source,
            target,
            saver,
            bitmap,
            spec,
            integrity: Integrity::default(),
            missing: None,
        }
    }

    /// The same with checksums.
    pub(crate) fn keeping(mut self, integrity: Integrity) -> Self {
        self.integrity = integrity;
        self
    }

    fn cluster_bytes(&self) -> u64 {
        let of_target = self.target.facts().cluster_size_bytes.map_or(0, u64::from);
        CLUSTER_MIN_BYTES
            .max(of_target)
            .max(self.spec.perf.min_cluster_size)
    }

    /// What the target keeps together, in bytes.
    fn target_unit_bytes(&self) -> u64 {
        self.target.facts().cluster_size_bytes.map_or(1, u64::from)
    }

    /// What is to be copied in whole clusters, which is what progress counts.
    fn counted_bytes(&self) -> u64 {
        if self.changes().is_some() {
            return self.saver.clusters().unsaved_whole_bytes();
        }
        let length = self.source.facts().length_bytes;
        let whole = length.checked_next_multiple_of(self.cluster_bytes());
        whole.unwrap_or(length)
    }

    /// Only what so many layers hold is copied.
    fn layers_max(&self) -> Option<usize> {
        // A target that was made for the job has no earlier content that what is not held would leave to be seen.
        let is_whole = self.spec.new_target.is_some() && self.source.backing().is_none();
        (self.spec.sync == SyncMode::Top && !is_whole).then_some(1)
    }

    /// What had changed, if only that is copied.
    fn changes(&self) -> Option<&DirtyMap> {
        match self.spec.sync {
            SyncMode::Incremental | SyncMode::Bitmap => {
                self.bitmap.as_ref().map(|bitmap| bitmap.map())
            }
            SyncMode::Full | SyncMode::Top | SyncMode::None => None,
        }
    }

    /// Nothing is copied but what has changed; a manifest may want to know of more.
    fn keep_only(&self, changes: &DirtyMap) {
        let clusters = self.saver.clusters();
        clusters.keep_only(changes);
        let more = self.integrity.recorded_besides(&clusters.unsaved());
        if let (Some(recorder), Some(more)) = (self.integrity.recorder(), more) {
            recorder.copy_only(clusters.unsaved());
            clusters.keep_too(&more);
        }
    }

    /// Writers go on from here; what they are about to change is saved.
    pub(super) fn let_writers_in(&self, cx: &JobContext) {
        let destination = Destination {
            source: self.source.clone(),
            target: self.target.clone(),
            layers_max: self.layers_max(),
            how: Writing {
                unit_bytes: self.target_unit_bytes(),
                compress: self.spec.compress,
                may_unmap: false,
            },
            recorder: self.integrity.recorder().cloned(),
        };
        let (shared, copied) = (cx.shared(), self.copied.clone());
        self.saver
            .begin(destination, move |clusters, bytes, fate| match fate {
                Fate::Saved => {
                    shared.progress.done(bytes);
                    if let Some(copied) = &copied {
                        copied.borrow_mut().mark(clusters);
                    }
                }
                Fate::Skipped => shared.progress.decrease_remaining(bytes),
            });
    }

    async fn copy(&self, cx: &JobContext) -> Result<(), Stop> {
        let (length, counted) = (self.source.facts().length_bytes, self.counted_bytes());
        let cluster = self.saver.clusters().cluster_bytes();
        let workers = usize::try_from(self.spec.perf.max_workers).unwrap_or(usize::MAX);
        let max_chunk = u64::try_from(self.spec.perf.max_chunk).unwrap_or(0);
        // A cluster is copied as a whole, however long it is.
        let longest = COPY_CHUNK_BYTES.max(cluster);
        let chunk_max_bytes = if max_chunk == 0 {
            longest
        } else {
            // Whole clusters, so that no two requests share a block of the target.
            let whole = max_chunk.min(longest) / cluster * cluster;
            whole.max(cluster.min(longest))
        };
        let options = CopyOptions {
            layers: match self.layers_max() {
                Some(count) => Layers::Top {
                    count,
                    unit_bytes: cluster,
                },
                None => Layers::All,
            },
            unit_bytes: self.target_unit_bytes(),
            compress: self.spec.compress,
            window: WindowLimits::of(chunk_max_bytes).with_requests(workers),
            chunk_max_bytes,
            granularity_bytes: cluster.min(chunk_max_bytes),
            may_unmap: false,
            skips_first_zeroes: false,
            zeroes_are_free: false,
            one_error_a_round: true,
            counts_skipped: false,
            leaves_out_ignored: false,
            remember_bytes: REMEMBER_BYTES,
        };
        let (source, target, saver) = (&self.source, &self.target, &self.saver);
        let copier = Copier::new(source.clone(), target.clone(), options).beside(saver.clone());
        let copier = copier.recording(self.integrity.recorder().cloned());
        let mut copier = match self.changes() {
            Some(_) => copier.by_what_is_unsaved(),
            None => copier,
        };
        copier.run(cx).await?;
        if self.saver.clusters().unsaved_bytes() > 0 {
            let text = "Internal error: a backup has left something out (bug)";
            return Err(Stop::Failed(JobError::text(text)));
        }
        if self.changes().is_none() {
            // All clusters have been counted, but not what the client wants to be counted together.
            let copied = length.next_multiple_of(cluster);
            cx.progress().done(counted.saturating_sub(copied));
        }
        Ok(())
    }

    async fn back_up(&self, cx: &JobContext) -> Result<(), Stop> {
        if self.spec.sync == SyncMode::None {
            return self.stay(cx).await;
        }
        self.integrity.check(cx).await?;
        self.copy(cx).await?;
        self.integrity.write().await?;
        match self.copied.clone() {
            Some(copied) => self.discard_source(cx, &copied).await,
            None => Ok(()),
        }
    }

    /// A backup of what is about to be overwritten never ends by itself.
    async fn stay(&self, cx: &JobContext) -> Result<(), Stop> {
        loop {
            cx.checkpoint().await?;
            if let Some(error) = self.saver.broken() {
                return Err(Stop::Failed(JobError::from(error)));
            }
            cx.orders().set_busy(false);
            select(pin!(cx.orders_changed()), pin!(self.saver.changed())).await;
        }
    }

    /// The copy is durable: what was copied of its source is no longer needed.
    async fn discard_source(&self, cx: &JobContext, copied: &Copied) -> Result<(), Stop> {
        let (mut from, length_bytes) = (0, self.source.facts().length_bytes);
        // The end of the disk may be in the middle of a cluster, which is not looked at again then.
        while from < length_bytes {
            let run = copied.borrow().run_from(from, DISCARD_BYTES);
            let Some(run) = run else {
                break;
            };
            cx.checkpoint().await?;
            if let Err(error) = self.source.discard(run).await {
                return Err(Stop::Failed(JobError::from(error)));
            }
            from = run.end();
        }
        Ok(())
    }

    /// The copy has ended early. What has been copied is only forgotten once it is durable, as the next copy leaves it out then.
    async fn keep_what_is_missing(&mut self) {
        let is_wanted = |bitmap: &Arc<FrozenBitmap>| bitmap.mode() == BitmapMode::Always;
        if self.bitmap.as_ref().is_some_and(is_wanted) && self.target.flush().await.is_ok() {
            self.missing = Some(self.uncopied());
        }
    }

    /// What has not come to the target and has to.
    fn uncopied(&self) -> DirtyMap {
        let unsaved = self.saver.clusters().unsaved();
        match self.integrity.recorder() {
            Some(recorder) => recorder.copied_of(unsaved),
            None => unsaved,
        }
    }

    fn end(&self, end: JobEnd<'_>) {
        self.saver.end();
        if let Some(bitmap) = &self.bitmap {
            bitmap.settle(end);
        }
    }
}

impl Work for Backup {
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> LocalFuture<'a, Result<(), Stop>> {
        Box::pin(async move {
            // They were equal when the job was asked for; a file that shrank since would leave the target's end as it was.
            if self.source.facts().length_bytes != self.target.facts().length_bytes {
                let text = "Source and target image have different sizes";
                return Err(Stop::Failed(JobError::text(text)));
            }
            let begun = self.integrity.begin(self.source.facts().length_bytes).await;
            if let Some(changes) = self.changes() {
                self.keep_only(changes);
            }
            cx.progress().set_remaining(self.counted_bytes());
            self.let_writers_in(cx);
            let ended = match begun {
                Ok(_) => self.back_up(cx).await,
                Err(error) => Err(Stop::Failed(error)),
            };
            if ended.is_err() {
                self.saver.end();
                self.saver.left().await;
                self.integrity.remove();
                self.keep_what_is_missing().await;
            } else {
                // Another job of the group may still fail.
                self.missing = Some(self.uncopied());
            }
            ended
        })
    }

    fn prepare<'a>(&'a mut self, _: &'a JobContext) -> LocalFuture<'a, Result<(), JobError>> {
        Box::pin(self.integrity.publish())
    }

    fn apply(&mut self) {
        self.end(JobEnd::Success);
    }

    fn revert(&mut self) {
        self.integrity.remove();
        self.end(match &self.missing {
            Some(missing) => JobEnd::Part(missing),
            None => JobEnd::Failure,
        });
    }
}

impl Drop for Backup {
    fn drop(&mut self) {
        self.saver.end();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::job::context::ErrorPolicies;
    use crate::job::error_policy::OnError;
    use crate::jobs::test_support::{Running, VirtualClock, saver};
    use crate::node::null_node::{NullNode, NullOptions};
    use crate::request::{BackupPerf, CbwOptions, IntegritySpec};

    /// How a backup of a disk of one length to one of another ends.
    fn outcome(source: u64, target: u64, discard_source: bool) -> Option<Result<(), Stop>> {
        let clock = VirtualClock::default();
        let node = |length_bytes| -> Rc<dyn Node> {
            let options = NullOptions {
                length_bytes,
                latency: Duration::ZERO,
                read_zeroes: false,
                read_only: false,
            };
            Rc::new(NullNode::new(
                "null".to_owned(),
                options,
                Rc::new(clock.clone()),
            ))
        };
        let spec = BackupSpec {
            device: "s".to_owned(),
            target: "t".to_owned(),
            sync: SyncMode::Full,
            speed: 0,
            new_target: None,
            bitmap: None,
            bitmap_mode: None,
            compress: false,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            filter_node_name: None,
            discard_source,
            perf: BackupPerf::default(),
            cbw: CbwOptions::default(),
            integrity: IntegritySpec::default(),
        };
        let (source, target) = (node(source), node(target));
        let saver = saver(&source, &target, &clock);
        let mut work = Backup::new(source, target, saver, None, spec);
        let running = Running::new(&clock, 0, ErrorPolicies::default());
        running.drive(&mut work, |_| {}, |_| clock.advance())
    }

    #[test]
    fn a_source_that_has_become_shorter_is_no_success() {
        let text = "Source and target image have different sizes";
        let failed = Err(Stop::Failed(JobError::text(text)));
        assert_eq!(outcome(1 << 20, 2 << 20, false), Some(failed));
        assert_eq!(outcome(1 << 20, 1 << 20, false), Some(Ok(())));
    }

    #[test]
    fn a_source_that_ends_within_a_cluster_is_discarded_once() {
        for length_bytes in [512, 1 << 20, (1 << 20) + 512, (1 << 20) - 512] {
            assert_eq!(outcome(length_bytes, length_bytes, true), Some(Ok(())));
        }
    }
}
