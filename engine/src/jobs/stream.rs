//! `block-stream`: a disk gets what layers below it hold, so that they can go, while everybody goes on using it.

use std::rc::Rc;

use blockyard_storage::{ByteRange, LocalFuture};

use crate::job::context::JobContext;
use crate::job::work::{Stop, Work};
use crate::jobs::copier::{Copier, CopyOptions, REMEMBER_BYTES, WindowLimits};
use crate::jobs::plan::{Layers, Plan};
use crate::limits::{COPY_CHUNK_BYTES, SECTOR_BYTES};
use crate::node::Node;

/// Bytes in flight.
const IN_FLIGHT_BYTES: u64 = 16 << 20;

/// Requests are multiples of this where the rate limit cuts them, in bytes.
const GRANULARITY_BYTES: u64 = 64 << 10;

/// The work of a stream.
pub(crate) struct Stream {
    device: Rc<dyn Node>,
    layers: usize,
}

impl Stream {
    /// A stream of what is in the first `layers` layers of `device`'s chain into the first of them, which is `device` itself.
    /// Nobody changes the others meanwhile; whoever writes to `device` goes on. What is below them stays, if anything is,
    /// and gets no longer than the longest node of today that has it anywhere below, unless with zeroes.
    pub(crate) fn new(device: Rc<dyn Node>, layers: usize) -> Self {
        Self { device, layers }
    }

    /// Length of what stays below the layers; 0: nothing does.
    fn below_bytes(&self) -> u64 {
        let mut below = Some(self.device.clone());
        for _ in 0..self.layers {
            below = below.and_then(|layer| layer.backing());
        }
        below.map_or(0, |node| node.facts().length_bytes)
    }

    /// What a run goes by.
    pub(crate) fn plans(&self) -> Vec<Plan> {
        if self.layers <= 1 || self.device.backing().is_none() {
            return Vec::new();
        }
        let whole = ByteRange::new(0, self.device.facts().length_bytes);
        vec![Plan::new(whole, self.filled(), self.unit_bytes())]
    }

    fn filled(&self) -> Layers {
        Layers::Below {
            count: self.layers,
            below_bytes: self.below_bytes(),
        }
    }

    fn unit_bytes(&self) -> u64 {
        let cluster_bytes = self.device.facts().cluster_size_bytes.map(u64::from);
        cluster_bytes.unwrap_or(SECTOR_BYTES).max(SECTOR_BYTES)
    }

    fn copier(&self) -> Copier {
        let unit_bytes = self.unit_bytes();
        let chunk_bytes = COPY_CHUNK_BYTES.max(unit_bytes);
        let options = CopyOptions {
            layers: self.filled(),
            unit_bytes,
            compress: false,
            window: WindowLimits::of(chunk_bytes).with_bytes(IN_FLIGHT_BYTES),
            chunk_max_bytes: chunk_bytes,
            granularity_bytes: GRANULARITY_BYTES.max(unit_bytes),
            may_unmap: false,
            skips_first_zeroes: false,
            zeroes_are_free: false,
            one_error_a_round: true,
            counts_skipped: true,
            leaves_out_ignored: true,
            remember_bytes: REMEMBER_BYTES,
        };
        Copier::new(self.device.clone(), self.device.clone(), options)
    }
}

impl Work for Stream {
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> LocalFuture<'a, Result<(), Stop>> {
        Box::pin(async move {
            if self.layers <= 1 || self.device.backing().is_none() {
                return Ok(());
            }
            cx.progress()
                .set_remaining(self.device.facts().length_bytes);
            cx.checkpoint().await?;
            self.copier().run(cx).await
        })
    }
}
