//! `blockdev-create` for `raw`: a node of a given length, its room reserved as asked, with real progress.
//!
//! What the node held stays, as far as the new length reaches. If the job fails or is cancelled, the length is what it was:
//! a node grows before its room is reserved, and back if that fails; it shrinks as the last thing of all.

use std::rc::Rc;

use blockyard_storage::error::errno_text;
use blockyard_storage::{ByteRange, LocalFuture, Preallocation};

use crate::error::{JobError, NodeError};
use crate::job::context::JobContext;
use crate::job::work::{Stop, Work};
use crate::jobs::create::{checked, count_failed_step};
use crate::node::Node;
use crate::request::CreatePreallocation;

/// The work of giving a node a length and room.
pub(crate) struct CreateRaw {
    node: Rc<dyn Node>,
    size_bytes: u64,
    preallocation: CreatePreallocation,
    piece_bytes: u64,
}

impl CreateRaw {
    /// A length of `size_bytes` for `node`, its room reserved `piece_bytes` (a power of two) at once.
    pub(crate) fn new(
        node: Rc<dyn Node>,
        size_bytes: u64,
        preallocation: CreatePreallocation,
        piece_bytes: u64,
    ) -> Self {
        Self {
            node,
            size_bytes,
            preallocation,
            piece_bytes,
        }
    }

    async fn create(&self, cx: &JobContext) -> Result<(), Stop> {
        cx.progress().set_remaining(1);
        let how = checked(self.preallocation).map_err(Stop::Failed)?;
        let reserves = how != Preallocation::Off && self.size_bytes > 0;
        cx.progress()
            .set_remaining(if reserves { self.size_bytes } else { 1 });
        cx.checkpoint().await?;
        let length_before = self.node.exact_length_bytes();
        if let Err(stop) = self.make(cx, reserves.then_some(how), length_before).await {
            self.shrink_back(length_before).await;
            return Err(stop);
        }
        if !reserves {
            cx.progress().done(1);
        }
        Ok(())
    }

    async fn make(
        &self,
        cx: &JobContext,
        how: Option<Preallocation>,
        length_before: u64,
    ) -> Result<(), Stop> {
        if self.size_bytes > length_before {
            self.resize(self.size_bytes).await?;
        }
        if let Some(how) = how {
            self.reserve(cx, how, length_before).await?;
            self.flush().await?;
        }
        // Writing whole sectors may have made it a little too long.
        if self.node.exact_length_bytes() != self.size_bytes {
            self.resize(self.size_bytes).await?;
        }
        self.flush().await
    }

    async fn flush(&self) -> Result<(), Stop> {
        let flushed = self.node.flush().await;
        flushed.map_err(|error| Stop::Failed(JobError::from(error)))
    }

    /// Reserves room; zeroes are only written behind what the node held before.
    async fn reserve(
        &self,
        cx: &JobContext,
        how: Preallocation,
        length_before: u64,
    ) -> Result<(), Stop> {
        let held = ByteRange::new(0, self.size_bytes.min(length_before));
        let new = ByteRange::between(held.end(), self.size_bytes);
        let held = held
            .pieces(self.piece_bytes)
            .map(|piece| (piece, Preallocation::Falloc));
        for (piece, how) in held.chain(new.pieces(self.piece_bytes).map(|piece| (piece, how))) {
            cx.checkpoint().await?;
            let reserved = self.node.preallocate(piece, how).await;
            reserved.map_err(|error| failed(&error, &format!("Could not preallocate {piece}")))?;
            cx.progress().done(piece.length());
        }
        cx.checkpoint().await
    }

    async fn resize(&self, length_bytes: u64) -> Result<(), Stop> {
        let resized = self.node.resize(length_bytes).await;
        resized.map_err(|error| failed(&error, "Could not resize file"))
    }

    async fn shrink_back(&self, length_before: u64) {
        if self.size_bytes > length_before
            && let Err(error) = self.node.resize(length_before).await
        {
            tracing::warn!(%error, "a half-made image keeps its new length");
        }
    }
}

impl Work for CreateRaw {
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> LocalFuture<'a, Result<(), Stop>> {
        Box::pin(async move {
            let outcome = self.create(cx).await;
            if outcome.is_err() {
                count_failed_step(cx);
            }
            outcome
        })
    }
}

fn failed(error: &NodeError, what: &str) -> Stop {
    let reason = errno_text(error.errno());
    Stop::Failed(JobError {
        text: format!("{what}: {reason}"),
        ..JobError::from(error.clone())
    })
}
