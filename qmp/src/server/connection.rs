//! One client: reads its commands, runs them one at a time in their order, writes replies and events.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockyard_engine::engine::EngineHandle;
use blockyard_engine::error::EngineError;
use blockyard_engine::reply::Reply;
use blockyard_engine::request::{CheckpointRequest, Request};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot, watch};

use crate::error::QmpError;
use crate::replies;
use crate::server::clients::Clients;
use crate::server::outbox::Outbox;
use crate::session::{self, Answer, Message, Returned, Session, Step};
use crate::wire::document::Document;
use crate::wire::output::render;
use crate::wire::reader::Reader;

/// Bytes read from a client at once.
const READ_BYTES: usize = 256 << 10;
/// Messages taken before the replies to them are written, and others have their turn on this thread.
const MESSAGES_AT_ONCE: usize = 256;
/// Commands read ahead of the one that runs, when the client has enabled that.
const QUEUE_MAX: usize = 8;

/// What all connections share.
#[derive(Clone)]
pub struct Service {
    /// Carries requests out.
    pub engine: EngineHandle,
    /// Everybody who is connected.
    pub clients: Arc<Clients>,
    /// Set once the engine has carried out `quit`.
    pub ended: Arc<watch::Sender<bool>>,
}

impl Service {
    /// Waits until the engine has carried out `quit`.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn until_ended(&self) {
        let mut ended = self.ended.subscribe();
        // The sender lives as long as this service.
        let _ = ended.wait_for(|ended| *ended).await;
    }
}

/// Where a client's bytes come from.
pub type Input = Box<dyn AsyncRead + Send + Unpin>;
/// Where a client's bytes go.
pub type Output = Box<dyn AsyncWrite + Send + Unpin>;

/// A command whose turn will come, and who waits for its end: told whether it was the last one.
type Turn = (Message, Option<oneshot::Sender<bool>>);

/// Serves one client until it leaves, is cut off, or the daemon ends; its queue has been written by then.
///
/// The end of its input alone does not end it if `lasting`: events go on, as on standard output.
pub async fn serve(service: Service, input: Input, output: Output, pretty: bool, lasting: bool) {
    let outbox = Arc::new(Outbox::default());
    let connection = Connection {
        service: service.clone(),
        session: Arc::default(),
        outbox: outbox.clone(),
        pretty,
        checkpoints: Arc::default(),
    };
    service.clients.enter(outbox.clone(), pretty);
    if *service.ended.borrow() {
        outbox.close();
    }
    outbox.push(render(&session::greeting(), pretty));
    let (turns, queue) = mpsc::channel(QUEUE_MAX);
    let reading = connection.clone().read(input, turns);
    let running = connection.clone().run(queue);
    let commands = async {
        tokio::join!(reading, running);
        if lasting {
            outbox.closed().await;
        }
        outbox.close();
    };
    // Commands that were read are carried out even if nobody is left to hear of them.
    tokio::join!(commands, write(output, &outbox));
    service.clients.leave(&outbox);
    connection.abort_checkpoints().await;
}

#[derive(Clone)]
struct Connection {
    service: Service,
    session: Arc<Mutex<Session>>,
    outbox: Arc<Outbox>,
    pretty: bool,
    /// Serials of checkpoints that come to nothing with the client.
    checkpoints: Arc<Mutex<Vec<u64>>>,
}

impl Connection {
    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, serial: u64) {
        let mut all = self
            .checkpoints
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        all.push(serial);
    }

    /// The client has left: what it has begun on that condition comes to nothing, if it has not ended already.
    async fn abort_checkpoints(&self) {
        let all = {
            let mut all = self
                .checkpoints
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *all)
        };
        for serial in all {
            let lost = Request::Checkpoint(CheckpointRequest::AbortLost { serial });
            if let Err(error) = self.service.engine.call(lost).await {
                tracing::debug!(%error, "a checkpoint ends with the daemon");
            }
        }
    }

    fn send(&self, answer: &Answer) {
        self.outbox.push(answer.render(self.pretty));
    }

    /// Reads messages until the client leaves or the daemon ends.
    async fn read(self, mut input: Input, turns: mpsc::Sender<Turn>) {
        let mut reader = Reader::default();
        let mut buffer = vec![0; READ_BYTES];
        let mut taken = 0;
        loop {
            let read = tokio::select! {
                read = input.read(&mut buffer) => read,
                () = self.outbox.closed() => return,
            };
            let length = match read {
                Ok(0) => return,
                Ok(length) => length,
                Err(error) => {
                    tracing::debug!(%error, "a client's connection broke");
                    self.outbox.abandon();
                    return;
                }
            };
            let mut bytes = &buffer[..length];
            while let Some(value) = reader.next(&mut bytes) {
                if !self.outbox.room().await {
                    return;
                }
                let message = self.session().receive(value);
                if !self.pass_on(message, &turns).await {
                    return;
                }
                taken += 1;
                if taken % MESSAGES_AT_ONCE == 0 {
                    tokio::task::yield_now().await;
                }
            }
            tokio::task::consume_budget().await;
        }
    }

    /// Answers a message that overtakes, queues any other if the client lets us read ahead, and carries it out here and
    /// now if not; `false`: there is no use in reading on.
    async fn pass_on(&self, message: Message, turns: &mpsc::Sender<Turn>) -> bool {
        if message.overtakes() {
            let step = self.session().take(message);
            if let Step::Reply(reply) = step {
                self.send(&reply);
            }
            return true;
        }
        let (reads_ahead, quits) = (self.session().reads_ahead(), message.is_quit());
        if !reads_ahead {
            return !self.take(message).await;
        }
        if !quits {
            return turns.send((message, None)).await.is_ok();
        }
        // Nothing behind `quit` is read, but one that was refused is a command like any other.
        let (done, last) = oneshot::channel();
        turns.send((message, Some(done))).await.is_ok() && matches!(last.await, Ok(false))
    }

    /// Carries queued commands out, one at a time.
    async fn run(self, mut queue: mpsc::Receiver<Turn>) {
        while let Some((message, done)) = queue.recv().await {
            let last = self.take(message).await;
            if let Some(done) = done {
                // The reader may have left.
                let _ = done.send(last);
            }
            if last {
                return;
            }
        }
    }

    /// Carries out one command; `true`: it was the last one.
    async fn take(&self, message: Message) -> bool {
        let (step, begins) = {
            let mut session = self.session();
            let before = session.is_negotiated();
            let step = session.take(message);
            (step, !before && session.is_negotiated())
        };
        match step {
            Step::Reply(reply) => {
                self.send(&reply);
                if begins {
                    self.service.clients.hear(&self.outbox);
                }
                false
            }
            Step::Call { request, id } => {
                let quits = *request == Request::Quit;
                let ends_with_us = ends_with_client(&request);
                let (connection, of) = (self.clone(), id.clone());
                // In the queue before any later event: who reads a status after an event may rely on it being newer.
                let replied = self.service.engine.call_then(*request, move |outcome| {
                    if let (true, Ok(Reply::Checkpoint(begun))) = (ends_with_us, &outcome) {
                        connection.remember(begun.serial);
                    }
                    connection.send(&answer(outcome, of));
                    Ok(())
                });
                if let Err(gone) = replied.await {
                    self.send(&answer(Err(gone), id));
                }
                if quits {
                    self.service.ended.send_replace(true);
                }
                quits
            }
        }
    }
}

/// Whether what the request begins comes to nothing with the client that makes it.
fn ends_with_client(request: &Request) -> bool {
    matches!(
        request,
        Request::Checkpoint(CheckpointRequest::Begin(spec)) if spec.abort_on_disconnect
    )
}

fn answer(outcome: Result<Reply, EngineError>, id: Option<Document>) -> Answer {
    let outcome = match outcome {
        Ok(reply) => Ok(Returned::Value(replies::value(&reply))),
        Err(error) => Err(QmpError::from(error)),
    };
    Answer { outcome, id }
}

/// Writes the queue until it is closed and empty.
async fn write(mut output: Output, outbox: &Outbox) {
    while let Some(message) = outbox.next().await {
        let written = async {
            output.write_all(&message).await?;
            output.flush().await
        };
        let written = tokio::select! {
            written = written => written,
            () = outbox.abandoned() => return,
        };
        if let Err(error) = written {
            tracing::debug!(%error, "a client does not take its messages any more");
            outbox.abandon();
            return;
        }
        outbox.sent(&message);
    }
    // The peer may be gone already.
    let _ = output.shutdown().await;
}
