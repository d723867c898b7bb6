//! `block-commit` of layers that nobody writes to: what they hold goes down into the base, which takes their place.
//!
//! Through the layers the disk looks the same all the time: what they hold is what the base gets.

use std::rc::Rc;

use blockyard_storage::{ByteRange, LocalFuture};

use crate::job::context::JobContext;
use crate::job::work::{Stop, Work};
use crate::jobs::copier::{Copier, CopyOptions, REMEMBER_BYTES, WindowLimits};
use crate::jobs::plan::{Layers, Plan};
use crate::limits::{COPY_CHUNK_BYTES, SECTOR_BYTES};
use crate::node::Node;

/// Requests are multiples of this where the rate limit cuts them, in bytes.
const GRANULARITY_BYTES: u64 = 64 << 10;

/// The work of a commit.
pub(crate) struct Commit {
    top: Rc<dyn Node>,
    base: Rc<dyn Node>,
    layers: usize,
    seen_bytes: u64,
}

impl Commit {
    /// A commit of the first `layers` layers of `top`'s chain to `base`, which is the next one. Nobody changes any of them
    /// meanwhile. The base is read as far as `seen_bytes` afterwards, through what is above: the length of the longest node
    /// that has `top` anywhere below it.
    pub(crate) fn new(
        top: Rc<dyn Node>,
        base: Rc<dyn Node>,
        layers: usize,
        seen_bytes: u64,
    ) -> Self {
        Self {
            top,
            base,
            layers,
            seen_bytes,
        }
    }

    fn options(&self, layers: Layers) -> CopyOptions {
        CopyOptions {
            layers,
            unit_bytes: self.unit_bytes(),
            compress: false,
            window: WindowLimits::of(COPY_CHUNK_BYTES),
            chunk_max_bytes: COPY_CHUNK_BYTES,
            granularity_bytes: GRANULARITY_BYTES,
            may_unmap: true,
            skips_first_zeroes: false,
            zeroes_are_free: false,
            one_error_a_round: true,
            counts_skipped: true,
            leaves_out_ignored: false,
            remember_bytes: REMEMBER_BYTES,
        }
    }

    /// What is written together: no more than a block. A part of a cluster is the base's own business, while all of it might
    /// hold what only the base has.
    fn unit_bytes(&self) -> u64 {
        SECTOR_BYTES.max(u64::from(self.base.facts().request_alignment))
    }

    /// What a run goes by, one after the other.
    pub(crate) fn plans(&self) -> Vec<Plan> {
        let whole = ByteRange::new(0, self.top.facts().length_bytes);
        let copied = Layers::Top {
            count: self.layers,
            unit_bytes: self.unit_bytes(),
        };
        [(whole, copied), (self.hidden(), Layers::Zeroes)]
            .map(|(range, layers)| Plan::new(range, layers, self.unit_bytes()))
            .into()
    }

    /// What the base holds behind the end of `top`, where everybody above has read zeroes so far.
    fn hidden(&self) -> ByteRange {
        let base_bytes = self.base.facts().length_bytes;
        let hidden_to = self.seen_bytes.min(base_bytes);
        ByteRange::between(self.top.facts().length_bytes, hidden_to)
    }
}

impl Work for Commit {
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> LocalFuture<'a, Result<(), Stop>> {
        Box::pin(async move {
            let hidden = self.hidden();
            let length_bytes = self.top.facts().length_bytes;
            cx.progress()
                .set_remaining(length_bytes.saturating_add(hidden.length()));
            cx.checkpoint().await?;
            let (top, base) = (self.top.clone(), self.base.clone());
            let copied = self.options(Layers::Top {
                count: self.layers,
                unit_bytes: self.unit_bytes(),
            });
            let mut copier = Copier::new(top.clone(), base.clone(), copied);
            if base.facts().length_bytes < length_bytes {
                let longer = async || base.resize(length_bytes).await;
                copier.until_done(cx, longer).await?;
            }
            copier.run(cx).await?;
            if hidden.is_empty() {
                return Ok(());
            }
            let zeroed = self.options(Layers::Zeroes);
            Copier::of(hidden, top, base, zeroed).run(cx).await
        })
    }
}
