//! `blockdev-backup`: a copy of one point in time.
//!
//! The filter above the source saves what a writer is about to change; the job copies the rest. Both know from the same
//! [`Saver`] what is still to be copied, and nothing is copied twice.

use std::pin::pin;
use std::rc::Rc;

use blockyard_storage::{ByteRange, LocalFuture};
use futures_util::future::select;

use crate::error::JobError;
use crate::job::context::JobContext;
use crate::job::work::{Stop, Work};
use crate::jobs::copier::{Copier, CopyOptions, REMEMBER_BYTES};
use crate::jobs::plan::Layers;
use crate::limits::COPY_CHUNK_BYTES;
use crate::node::Node;
use crate::node::copy_before_write::{Destination, Fate, Saver};
use crate::node::transfer::Writing;
use crate::request::{BackupSpec, SyncMode};

/// Smallest unit in which progress is counted, in bytes.
const CLUSTER_MIN_BYTES: u64 = 64 << 10;

/// Requests in flight, however many workers the client allows.
const WINDOW_MAX: usize = 16;

/// Bytes of the source discarded at once.
const DISCARD_BYTES: u64 = 64 << 20;

/// The work of a backup.
pub(crate) struct Backup {
    source: Rc<dyn Node>,
    target: Rc<dyn Node>,
    saver: Rc<Saver>,
    spec: BackupSpec,
}

impl Backup {
    /// A backup of `source` onto `target`, which is as long. `saver` is that of the filter above the source.
    pub(crate) fn new(
        source: Rc<dyn Node>,
        target: Rc<dyn Node>,
        saver: Rc<Saver>,
        spec: BackupSpec,
    ) -> Self {
        Self {
            source,
            target,
            saver,
            spec,
        }
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

    /// The source's length in whole clusters, which is what progress counts.
    fn counted_bytes(&self) -> u64 {
        let length = self.source.facts().length_bytes;
        let whole = length.checked_next_multiple_of(self.cluster_bytes());
        whole.unwrap_or(length)
    }

    /// Only what so many layers hold is copied.
    fn layers_max(&self) -> Option<usize> {
        (self.spec.sync == SyncMode::Top).then_some(1)
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
        };
        let shared = cx.shared();
        self.saver
            .begin(destination, move |bytes, fate| match fate {
                Fate::Saved => shared.progress.done(bytes),
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
            window_max: workers.min(WINDOW_MAX),
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
        Copier::new(self.source.clone(), self.target.clone(), options)
            .beside(self.saver.clone())
            .run(cx)
            .await?;
        if self.saver.clusters().unsaved_bytes() > 0 {
            let text = "Internal error: a backup has left something out (bug)";
            return Err(Stop::Failed(JobError::text(text)));
        }
        // All clusters have been counted, but not what the client wants to be counted together.
        let copied = length.next_multiple_of(cluster);
        cx.progress().done(counted.saturating_sub(copied));
        Ok(())
    }

    async fn back_up(&self, cx: &JobContext) -> Result<(), Stop> {
        if self.spec.sync == SyncMode::None {
            return self.stay(cx).await;
        }
        self.copy(cx).await?;
        if self.spec.discard_source {
            self.discard_source(cx).await?;
        }
        Ok(())
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

    /// The copy is durable: its source is no longer needed.
    async fn discard_source(&self, cx: &JobContext) -> Result<(), Stop> {
        let all = ByteRange::new(0, self.source.facts().length_bytes);
        for piece in all.pieces(DISCARD_BYTES) {
            cx.checkpoint().await?;
            if let Err(error) = self.source.discard(piece).await {
                return Err(Stop::Failed(JobError::from(error)));
            }
        }
        Ok(())
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
            cx.progress().set_remaining(self.counted_bytes());
            self.let_writers_in(cx);
            let ended = self.back_up(cx).await;
            if ended.is_err() {
                self.saver.end();
                self.saver.left().await;
            }
            ended
        })
    }

    fn apply(&mut self) {
        self.saver.end();
    }

    fn revert(&mut self) {
        self.saver.end();
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
    use crate::request::{BackupPerf, CbwOptions};

    #[test]
    fn a_source_that_has_become_shorter_is_no_success() {
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
            bitmap: None,
            bitmap_mode: None,
            compress: false,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            filter_node_name: None,
            discard_source: false,
            perf: BackupPerf::default(),
            cbw: CbwOptions::default(),
        };
        let outcome = |source, target| {
            let (source, target) = (node(source), node(target));
            let saver = saver(&source, &target, &clock);
            let mut work = Backup::new(source, target, saver, spec.clone());
            let running = Running::new(&clock, 0, ErrorPolicies::default());
            running.drive(&mut work, |_| {}, |_| clock.advance())
        };
        let text = "Source and target image have different sizes";
        let failed = Err(Stop::Failed(JobError::text(text)));
        assert_eq!(outcome(1 << 20, 2 << 20), Some(failed));
        assert_eq!(outcome(1 << 20, 1 << 20), Some(Ok(())));
    }
}
