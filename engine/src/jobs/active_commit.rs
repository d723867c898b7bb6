//! Commit of the layer that is written to: a mirror onto the base of its own chain, which then takes its place.

use std::rc::Rc;

use blockyard_storage::LocalFuture;

use crate::error::JobError;
use crate::job::context::JobContext;
use crate::job::work::{Stop, Work};
use crate::jobs::mirror::Mirror;
use crate::node::Node;
use crate::node::mirror_top::Tracker;

/// The work of an active commit.
pub(crate) struct ActiveCommit {
    device: Rc<dyn Node>,
    base: Rc<dyn Node>,
    mirror: Mirror,
}

impl ActiveCommit {
    /// A commit of the first `layers` layers of `device`'s chain to `base`, the next one; filters do not count. `tracker` is that
    /// of the filter above the device. The base becomes as long as the device, if it is shorter.
    pub(crate) fn new(
        device: Rc<dyn Node>,
        base: Rc<dyn Node>,
        layers: usize,
        tracker: Rc<Tracker>,
    ) -> Self {
        let mirror = Mirror::to_base(device.clone(), base.clone(), layers, tracker);
        Self {
            device,
            base,
            mirror,
        }
    }

    /// Zeroes are what the device has shown where the base had ended.
    async fn lengthen_base(&self) -> Result<(), Stop> {
        let length_bytes = self.device.facts().length_bytes;
        if self.base.facts().length_bytes >= length_bytes {
            return Ok(());
        }
        let resized = self.base.resize(length_bytes).await;
        resized.map_err(|error| Stop::Failed(JobError::from(error)))
    }
}

impl Work for ActiveCommit {
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> LocalFuture<'a, Result<(), Stop>> {
        Box::pin(async move {
            cx.checkpoint().await?;
            self.lengthen_base().await?;
            self.mirror.run(cx).await
        })
    }

    fn apply(&mut self) {
        self.mirror.apply();
    }

    fn revert(&mut self) {
        self.mirror.revert();
    }
}
