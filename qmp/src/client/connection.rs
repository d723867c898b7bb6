//! [`Client`]: one connection. Messages go out and come in by turns of one loop, replies and events are kept apart.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use rustix::event::{PollFd, PollFlags};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout_at};

use crate::client::address::{Address, Streams};
use crate::client::error::{CallError, ClientError, Refusal};
use crate::client::transcript::Transcript;
use crate::wire::output::render;
use crate::wire::reader::{ReadError, Reader};

/// Bytes to make room for before each read.
const READ_BYTES: usize = 64 << 10;
/// Events that are kept while nobody asks for them; older ones are dropped.
const EVENTS_MAX: usize = 16 << 10;
/// Between two attempts at a socket where too many wait already.
const RETRY: Duration = Duration::from_millis(50);
/// Bytes of a foreign greeting that an error shows.
const SHOWN_BYTES_MAX: usize = 60;

/// A negotiated connection.
pub struct Client {
    address: Address,
    streams: Streams,
    reader: Reader,
    received: BytesMut,
    unsent: BytesMut,
    events: VecDeque<Event>,
    greeting: Value,
    id_last: u64,
    transcript: Option<Transcript>,
}

/// An event as it came.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name.
    pub name: String,
    /// Its data, or null.
    pub data: Value,
    /// When it was, by the daemon's clock, since the epoch.
    pub time: Option<Duration>,
    /// The whole message.
    pub message: Value,
}

/// One message from the daemon.
enum Incoming {
    Event(Event),
    Reply {
        id: Option<u64>,
        outcome: Result<Value, Refusal>,
    },
}

impl Client {
    /// Connects, waits for the greeting and negotiates, all within `patience`.
    ///
    /// # Errors
    /// Nobody there, nobody who speaks, or somebody who speaks something else.
    pub async fn connect(
        address: &Address,
        patience: Duration,
        transcript: Option<Transcript>,
    ) -> Result<Self, ClientError> {
        let deadline = Instant::now() + patience;
        let silent = |_| ClientError::Silent {
            address: address.to_string(),
            waited: patience,
        };
        let streams = timeout_at(deadline, reach(address)).await.map_err(silent)?;
        let mut client = Self {
            address: address.clone(),
            streams: streams.map_err(|error| ClientError::unreachable(address, &error))?,
            reader: Reader::default(),
            received: BytesMut::new(),
            unsent: BytesMut::new(),
            events: VecDeque::new(),
            greeting: Value::Null,
            id_last: 0,
            transcript,
        };
        timeout_at(deadline, client.negotiate())
            .await
            .map_err(silent)??;
        Ok(client)
    }

    /// Carries out a command and waits for its result, however long that takes. Events that come meanwhile are kept.
    ///
    /// When the future is dropped the command may or may not be carried out; the connection goes on.
    ///
    /// # Errors
    /// The daemon's refusal, or the end of the connection.
    pub async fn execute(
        &mut self,
        command: &str,
        arguments: Map<String, Value>,
    ) -> Result<Value, CallError> {
        let wanted = self.enqueue(command, arguments);
        loop {
            match self.receive().await? {
                Incoming::Event(event) => self.keep(event),
                Incoming::Reply { id, outcome } => match (id, outcome) {
                    (Some(id), outcome) if id == wanted => return Ok(outcome?),
                    // The reply to a command whose future was dropped.
                    (Some(_), _) => {}
                    // A message that was not understood has no id to give back.
                    (None, outcome) => return Ok(outcome?),
                },
            }
        }
    }

    /// The next event, an earlier one that was kept first. Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// The end of the connection.
    pub async fn event(&mut self) -> Result<Event, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(event);
        }
        loop {
            if let Incoming::Event(event) = self.receive().await? {
                return Ok(event);
            }
        }
    }

    /// Waits until a daemon that was told to end has done so: the connection is closed, and where the kernel tells about its
    /// process, that has gone, and its sockets and locks with it. Events that come meanwhile are kept.
    pub async fn until_ended(&mut self) {
        while let Ok(incoming) = self.receive().await {
            if let Incoming::Event(event) = incoming {
                self.keep(event);
            }
        }
        let Some(process) = self.streams.server.take() else {
            return;
        };
        // A process descriptor is readable from the end of its process on. A thread waits, which nothing else would do
        // without unsafe code.
        let waited = spawn_blocking(move || {
            let mut polled = [PollFd::new(&process, PollFlags::IN)];
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, None))
        });
        // If the kernel does not wait for it, that the connection is closed has to do.
        let _ = waited.await;
    }

    /// An event that is there already.
    pub fn kept_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Whom this is connected to.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The daemon's first message, which tells its version.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// The transcript, for remarks.
    pub fn transcript(&mut self) -> Option<&mut Transcript> {
        self.transcript.as_mut()
    }

    /// Ends the connection; its transcript is complete now.
    pub fn close(self) -> Option<Transcript> {
        self.transcript
    }

    async fn negotiate(&mut self) -> Result<(), ClientError> {
        self.greeting = match self.message().await {
            Ok(Ok(message)) if message.get("QMP").is_some() => message,
            Ok(Ok(other)) => return Err(self.no_qmp(&other.to_string())),
            Ok(Err(error)) => return Err(self.no_qmp(&error.0)),
            Err(ClientError::Gone { .. }) => {
                return Err(self.no_qmp_because("it has closed the connection at once".into()));
            }
            Err(error) => return Err(error),
        };
        match self.execute("qmp_capabilities", Map::new()).await {
            Ok(_) => Ok(()),
            Err(CallError::Refused(refusal)) => Err(self.no_qmp_because(refusal.to_string())),
            Err(CallError::Lost(error)) => Err(error),
        }
    }

    fn no_qmp(&self, said: &str) -> ClientError {
        let shown: String = said.chars().take(SHOWN_BYTES_MAX).collect();
        self.no_qmp_because(format!("it begins with {}", shown.escape_debug()))
    }

    fn no_qmp_because(&self, detail: String) -> ClientError {
        ClientError::NotQmp {
            address: self.address.to_string(),
            detail,
        }
    }

    /// Puts a command on its way; returns its id.
    fn enqueue(&mut self, command: &str, arguments: Map<String, Value>) -> u64 {
        self.id_last += 1;
        let mut message = json!({"execute": command});
        if !arguments.is_empty() {
            message["arguments"] = Value::Object(arguments);
        }
        message["id"] = json!(self.id_last);
        let line = message.to_string();
        self.unsent.extend_from_slice(line.as_bytes());
        self.unsent.extend_from_slice(b"\n");
        if let Some(transcript) = &mut self.transcript {
            transcript.sent(&line);
        }
        self.id_last
    }

    fn keep(&mut self, event: Event) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    async fn receive(&mut self) -> Result<Incoming, ClientError> {
        let message = match self.message().await? {
            Ok(message) => message,
            Err(error) => return Err(self.no_qmp(&error.0)),
        };
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            return Ok(Incoming::Event(Event {
                name: name.to_owned(),
                data: message.get("data").cloned().unwrap_or_default(),
                time: time(&message["timestamp"]),
                message,
            }));
        }
        let id = message.get("id").and_then(Value::as_u64);
        if let Some(result) = message.get("return") {
            let outcome = Ok(result.clone());
            return Ok(Incoming::Reply { id, outcome });
        }
        let Some(error) = message.get("error") else {
            return Err(self.no_qmp(&message.to_string()));
        };
        let text = |member: &str| error[member].as_str().unwrap_or_default().to_owned();
        let outcome = Err(Refusal {
            class: text("class"),
            text: text("desc"),
        });
        Ok(Incoming::Reply { id, outcome })
    }

    /// The next message of any kind. Sends what is unsent meanwhile, so that neither side can wait for the other with both
    /// directions full. What has been read or written when the future is dropped stays so.
    async fn message(&mut self) -> Result<Result<Value, ReadError>, ClientError> {
        loop {
            if let Some(message) = self.buffered() {
                if let (Some(transcript), Ok(message)) = (&mut self.transcript, &message) {
                    let line = render(message, false);
                    transcript.received(&String::from_utf8_lossy(&line));
                }
                return Ok(message);
            }
            self.received.reserve(READ_BYTES);
            let Streams { input, output, .. } = &mut self.streams;
            let read = tokio::select! {
                sent = output.write_buf(&mut self.unsent), if !self.unsent.is_empty() => {
                    // It has closed its side; what it said before that can still be read.
                    if sent.is_err() {
                        self.unsent.clear();
                    }
                    continue;
                }
                read = input.read_buf(&mut self.received) => read,
            };
            match read {
                Ok(1..) => {}
                Ok(0) => return Err(self.gone(None)),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(self.gone(None));
                }
                Err(error) => return Err(self.gone(Some(error))),
            }
        }
    }

    /// A message from what has been received, if a whole one is there.
    fn buffered(&mut self) -> Option<Result<Value, ReadError>> {
        let mut rest = &self.received[..];
        let message = self.reader.next(&mut rest);
        let taken = self.received.len() - rest.len();
        self.received.advance(taken);
        message.map(|read| read.map(|document| Value::from(document.root())))
    }

    fn gone(&self, reason: Option<io::Error>) -> ClientError {
        ClientError::Gone {
            address: self.address.to_string(),
            reason,
        }
    }
}

/// Connects, again and again while too many others wait at the socket.
async fn reach(address: &Address) -> io::Result<Streams> {
    loop {
        match address.connect().await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(RETRY).await,
            outcome => return outcome,
        }
    }
}

fn time(timestamp: &Value) -> Option<Duration> {
    let seconds = timestamp["seconds"].as_u64()?;
    let microseconds = timestamp["microseconds"].as_u64()?;
    Some(Duration::from_secs(seconds).saturating_add(Duration::from_micros(microseconds)))
}
