//! `blockdev-backup`: a copy of one point in time.
//!
//! Nobody can write to the source while the job holds it, so the point in time is kept by copying.

use std::rc::Rc;

use blockyard_storage::{ByteRange, LocalFuture};

use crate::error::JobError;
use crate::job::context::JobContext;
use crate::job::work::{Stop, Work};
use crate::jobs::copier::{Copier, CopyOptions, REMEMBER_BYTES};
use crate::jobs::plan::Layers;
use crate::limits::COPY_CHUNK_BYTES;
use crate::node::Node;
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
    spec: BackupSpec,
}

impl Backup {
    /// A backup of `source` onto `target`, which is as long.
    pub(crate) fn new(source: Rc<dyn Node>, target: Rc<dyn Node>, spec: BackupSpec) -> Self {
        Self {
            source,
            target,
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

    async fn copy(&self, cx: &JobContext) -> Result<(), Stop> {
        let (length, counted) = (self.source.facts().length_bytes, self.counted_bytes());
        let cluster = self.cluster_bytes();
        cx.progress().set_remaining(counted);
        let workers = usize::try_from(self.spec.perf.max_workers).unwrap_or(usize::MAX);
        let max_chunk = u64::try_from(self.spec.perf.max_chunk).unwrap_or(0);
        let longest = match self.spec.compress {
            // A cluster is compressed as a whole, however long it is.
            true => COPY_CHUNK_BYTES.max(self.target_unit_bytes()),
            false => COPY_CHUNK_BYTES,
        };
        let chunk_max_bytes = if max_chunk == 0 {
            longest
        } else {
            // Whole clusters, so that no two requests share a block of the target.
            let whole = max_chunk.min(longest) / cluster * cluster;
            whole.max(cluster.min(longest))
        };
        let options = CopyOptions {
            layers: match self.spec.sync {
                SyncMode::Top => Layers::Top {
                    count: 1,
                    unit_bytes: cluster,
                },
                _ => Layers::All,
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
            .run(cx)
            .await?;
        // Also the cluster that the end of the disk cuts.
        cx.progress().done(counted - length);
        Ok(())
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
            if self.spec.sync == SyncMode::None {
                cx.progress().set_remaining(self.counted_bytes());
                return idle(cx).await;
            }
            self.copy(cx).await?;
            if self.spec.discard_source {
                self.discard_source(cx).await?;
            }
            Ok(())
        })
    }
}

/// A backup of what is about to be overwritten never ends by itself.
async fn idle(cx: &JobContext) -> Result<(), Stop> {
    cx.orders().set_busy(false);
    loop {
        cx.checkpoint().await?;
        cx.orders().set_busy(false);
        cx.orders_changed().await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::job::context::ErrorPolicies;
    use crate::job::error_policy::OnError;
    use crate::jobs::test_support::{Running, VirtualClock};
    use crate::node::null_node::{NullNode, NullOptions};
    use crate::request::BackupPerf;

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
        };
        let outcome = |source, target| {
            let mut work = Backup::new(node(source), node(target), spec.clone());
            let running = Running::new(&clock, 0, ErrorPolicies::default());
            running.drive(&mut work, |_| {}, |_| clock.advance())
        };
        let text = "Source and target image have different sizes";
        let failed = Err(Stop::Failed(JobError::text(text)));
        assert_eq!(outcome(1 << 20, 2 << 20), Some(failed));
        assert_eq!(outcome(1 << 20, 1 << 20), Some(Ok(())));
    }
}
