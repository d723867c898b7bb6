//! [`RootHandle`]: a way to read and write a node from any thread. Each request is a task on the node's data thread, so that it goes
//! on to its end whoever gives up.

use std::rc::Rc;

use blockyard_storage::error::EIO;
use blockyard_storage::{Buffer, ByteRange, LocalFuture, Operation, StorageError, ZeroMode};
use tokio::sync::{mpsc, oneshot};

use crate::error::{EngineError, NodeError};
use crate::graph::RootPlace;
use crate::manager::Call;
use crate::node::root::Root;

/// A user of a node. Closed when it is dropped, then without waiting for what is in flight.
pub struct RootHandle {
    place: RootPlace,
    calls: mpsc::WeakUnboundedSender<Call>,
}

impl RootHandle {
    pub(crate) fn new(place: RootPlace, calls: mpsc::WeakUnboundedSender<Call>) -> Self {
        Self { place, calls }
    }

    /// Length of the node in bytes.
    ///
    /// # Errors
    /// When it is closed.
    pub async fn length_bytes(&self) -> Result<u64, NodeError> {
        let none = (Operation::Read, ByteRange::default());
        let ask = |root: Rc<Root>| -> LocalFuture<'static, _> {
            Box::pin(async move { root.facts().map(|facts| facts.length_bytes) })
        };
        self.run(none, ask).await
    }

    /// The bytes of `range`.
    ///
    /// # Errors
    /// As the node's.
    pub async fn read(&self, range: ByteRange) -> Result<Vec<u8>, NodeError> {
        let length = usize::try_from(range.length()).unwrap_or(usize::MAX);
        self.run((Operation::Read, range), move |root| {
            Box::pin(async move {
                let read = root.read(range.offset(), Buffer::zeroed(length)).await;
                read.outcome.map(|()| read.buffer.as_slice().to_vec())
            })
        })
        .await
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// As the node's.
    pub async fn write(&self, offset: u64, bytes: Vec<u8>) -> Result<(), NodeError> {
        let range = ByteRange::new(offset, bytes.len() as u64);
        self.run((Operation::Write, range), move |root| {
            Box::pin(async move { root.write(offset, Buffer::copy_of(&bytes)).await.outcome })
        })
        .await
    }

    /// Makes `range` read as zeroes.
    ///
    /// # Errors
    /// As the node's.
    pub async fn zero(&self, range: ByteRange, may_unmap: bool) -> Result<(), NodeError> {
        let mode = ZeroMode {
            may_unmap,
            no_fallback: false,
        };
        self.run((Operation::Zero, range), move |root| {
            Box::pin(async move { root.zero(range, mode).await })
        })
        .await
    }

    /// Gives room back where that is possible.
    ///
    /// # Errors
    /// As the node's.
    pub async fn discard(&self, range: ByteRange) -> Result<(), NodeError> {
        self.run((Operation::Discard, range), move |root| {
            Box::pin(async move { root.discard(range).await })
        })
        .await
    }

    /// Makes everything that completed before this call durable.
    ///
    /// # Errors
    /// As the node's.
    pub async fn flush(&self) -> Result<(), NodeError> {
        let all = (Operation::Sync, ByteRange::default());
        self.run(all, |root| Box::pin(async move { root.flush().await }))
            .await
    }

    /// Ends the use of the node, once what is in flight has ended.
    ///
    /// # Errors
    /// When the engine has ended.
    pub async fn close(self) -> Result<(), EngineError> {
        let gone = || EngineError::generic("The daemon is ending");
        let (done, closed) = oneshot::channel();
        let calls = self.calls.upgrade().ok_or_else(gone)?;
        let close = Call::CloseRoot(self.place.id, Some(done));
        calls.send(close).map_err(|_| gone())?;
        closed.await.map_err(|_| gone())
    }

    /// Runs a request on the data thread.
    async fn run<T: Send + 'static>(
        &self,
        (operation, range): (Operation, ByteRange),
        request: impl FnOnce(Rc<Root>) -> LocalFuture<'static, Result<T, NodeError>> + Send + 'static,
    ) -> Result<T, NodeError> {
        let lost = || NodeError {
            node: String::new(),
            source: StorageError::new(operation, range, EIO),
        };
        let (id, (done, answer)) = (self.place.id, oneshot::channel());
        self.place.mailbox.send(Box::new(move |context| {
            Box::pin(async move {
                // Nobody is told by whom the root was closed: the channel is.
                if let Some(root) = context.root(id) {
                    let _ = done.send(request(root).await);
                }
            })
        }));
        answer.await.unwrap_or_else(|_| Err(lost()))
    }
}

impl Drop for RootHandle {
    fn drop(&mut self) {
        if let Some(calls) = self.calls.upgrade() {
            let _ = calls.send(Call::CloseRoot(self.place.id, None));
        }
    }
}
