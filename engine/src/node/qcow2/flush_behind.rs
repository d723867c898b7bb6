//! [`FlushBehind`]: room that a guest has given up becomes free although nobody flushes.
//!
//! A cluster is not used again before it is durable that nothing leads there, so somebody who writes and discards without ever
//! flushing would take more and more of the file. The image is flushed behind such requests: none of them waits, unless they give
//! up as much again meanwhile.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use crate::data::Spawner;
use crate::node::gate::Pass;
use crate::node::qcow2::mover::Mover;

/// The flush behind an image's requests, of which there is one at a time.
#[derive(Default)]
pub(super) struct FlushBehind {
    /// Hears when it has ended.
    running: RefCell<Option<oneshot::Receiver<()>>>,
    /// It failed, and is not tried again before somebody else's flush has ended well.
    failed: Cell<bool>,
}

impl FlushBehind {
    /// Somebody has flushed the image.
    pub(super) fn flushed(&self) {
        self.failed.set(false);
    }

    /// Waits for the one that is running.
    pub(super) async fn end(&self) {
        let running = self.running.take();
        if let Some(running) = running {
            // Whoever runs it says nothing, but goes.
            let _ = running.await;
        }
    }

    fn is_running(&self) -> bool {
        let mut running = self.running.borrow_mut();
        let heard = running.as_mut().map(oneshot::Receiver::try_recv);
        heard == Some(Err(TryRecvError::Empty))
    }
}

impl Mover {
    /// Lets the image be flushed if so much was given up that it is worth it. Whoever has to wait for changes under way waits for
    /// that as well: it has `pass`.
    pub(super) fn flush_behind(self: &Rc<Self>, spawner: &Spawner, pass: Pass) {
        let behind = &self.behind;
        if !self.image.wants_flush() || behind.failed.get() || behind.is_running() {
            return;
        }
        let (ends, ended) = oneshot::channel::<()>();
        behind.running.replace(Some(ended));
        let mover = Rc::clone(self);
        spawner.spawn(Box::pin(async move {
            if let Err(error) = mover.image.flush().await {
                tracing::error!(
                    %error,
                    node = mover.name,
                    "an image could not be flushed behind what was discarded"
                );
                mover.behind.failed.set(true);
            }
            drop((mover, pass));
            drop(ends);
        }));
    }
}
