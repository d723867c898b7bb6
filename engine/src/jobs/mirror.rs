//! `blockdev-mirror`: a copy that is kept equal until the client switches over or lets go.
//!
//! ```text
//!   copy everything -> flush -> ready: wait for orders -> flush -> end
//! ```
//! Nobody can write to the source while the job holds it, so a mirror that is equal stays so.

use std::rc::Rc;

use blockyard_storage::LocalFuture;

use crate::error::JobError;
use crate::job::context::JobContext;
use crate::job::work::{Stop, Work};
use crate::jobs::copier::{Copier, CopyOptions, REMEMBER_BYTES};
use crate::jobs::plan::Layers;
use crate::limits::COPY_CHUNK_BYTES;
use crate::node::Node;
use crate::request::{CopyMode, MirrorSpec, SyncMode};

/// Bytes in flight if the client does not say.
const BUF_SIZE_BYTES: u64 = 16 << 20;

/// Unit of tracking if the client does not say.
const GRANULARITY_BYTES: u64 = 64 << 10;

/// Requests are multiples of this, whatever the client says of sizes.
const BLOCK_BYTES: u64 = 4096;

/// The work of a mirror.
pub(crate) struct Mirror {
    source: Rc<dyn Node>,
    target: Rc<dyn Node>,
    spec: MirrorSpec,
}

impl Mirror {
    /// A mirror of `source` on `target`.
    pub(crate) fn new(source: Rc<dyn Node>, target: Rc<dyn Node>, spec: MirrorSpec) -> Self {
        Self {
            source,
            target,
            spec,
        }
    }

    /// What of the source is copied. A top layer without anything below it is the whole disk.
    fn layers(&self, granularity: u64) -> Layers {
        if self.spec.sync != SyncMode::Top || self.source.backing().is_none() {
            return Layers::All;
        }
        // A part of a cluster that the target does not have yet would be filled up from below, where the backing that it
        // has in the end may be missing still.
        let of_target = self.target.facts().cluster_size_bytes.map_or(0, u64::from);
        Layers::Top {
            count: 1,
            unit_bytes: granularity.max(of_target).max(BLOCK_BYTES),
        }
    }

    fn copier(&self) -> Copier {
        let granularity = self.spec.granularity.map_or(GRANULARITY_BYTES, u64::from);
        let asked = self
            .spec
            .buf_size
            .and_then(|bytes| u64::try_from(bytes).ok())
            .unwrap_or(0);
        let in_flight = if asked == 0 { BUF_SIZE_BYTES } else { asked };
        // Whole blocks, so that no two requests share one of the target.
        let chunk = COPY_CHUNK_BYTES.min(in_flight.max(BLOCK_BYTES)) / BLOCK_BYTES * BLOCK_BYTES;
        let granularity_bytes = granularity.clamp(BLOCK_BYTES, chunk);
        let options = CopyOptions {
            layers: self.layers(granularity),
            unit_bytes: self.target.facts().cluster_size_bytes.map_or(1, u64::from),
            compress: false,
            window_max: usize::try_from(in_flight / chunk)
                .unwrap_or(usize::MAX)
                .clamp(1, 16),
            chunk_max_bytes: chunk,
            granularity_bytes,
            may_unmap: true,
            // As QEMU's: zero requests cost nothing where the target unmaps.
            zeroes_are_free: self.target.facts().unmaps,
            one_error_a_round: false,
            counts_skipped: false,
            leaves_out_ignored: false,
            remember_bytes: REMEMBER_BYTES,
        };
        Copier::new(self.source.clone(), self.target.clone(), options)
    }

    /// Whether no write could leave the two sides unequal: where nothing can be written, none can.
    fn actively_synced(&self, cx: &JobContext) -> bool {
        self.source.facts().length_bytes == 0 || cx.orders().copy_mode() == CopyMode::WriteBlocking
    }

    /// Waits until the client switches over or lets go.
    async fn stay_ready(&self, cx: &JobContext) -> Result<(), Stop> {
        loop {
            cx.checkpoint().await?;
            let orders = cx.orders();
            orders.set_actively_synced(self.actively_synced(cx));
            if orders.complete_ordered() || orders.cancel_ordered().is_some() {
                return Ok(());
            }
            orders.set_busy(false);
            cx.orders_changed().await;
            orders.set_busy(true);
        }
    }
}

impl Work for Mirror {
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> LocalFuture<'a, Result<(), Stop>> {
        Box::pin(async move {
            let (source, target) = (self.source.facts(), self.target.facts());
            if source.length_bytes != target.length_bytes {
                let text = "Source and target image have different sizes";
                return Err(Stop::Failed(JobError::text(text)));
            }
            cx.checkpoint().await?;
            let mut copier = self.copier();
            if self.spec.sync != SyncMode::None {
                cx.progress().set_remaining(source.length_bytes);
                copier.run(cx).await?;
            }
            cx.orders().set_actively_synced(self.actively_synced(cx));
            cx.orders().set_busy(false);
            cx.converged().await;
            self.stay_ready(cx).await?;
            copier.flush(cx).await
        })
    }
}
