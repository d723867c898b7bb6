//! A blocking QMP client: one command, one reply; events that come in between are kept.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Failure;

/// No reply may take longer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of equal messages that are compared at once.
const REPEATED_BYTES: usize = 256 << 10;

/// No job may take longer, or be silent for so long.
const WORK_PATIENCE: Duration = Duration::from_secs(1200);

/// One connection, past the greeting and `qmp_capabilities`.
#[derive(Debug)]
pub(crate) struct Client {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    events: VecDeque<Value>,
}

impl Client {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// Nobody listens, or what comes is no QMP.
    pub(crate) fn connect(socket: &Path) -> Result<Client, Failure> {
        let writer = UnixStream::connect(socket).map_err(|error| Failure::at(socket, &error))?;
        writer
            .set_read_timeout(Some(PATIENCE))
            .map_err(|error| Failure::at(socket, &error))?;
        let reader = BufReader::new(
            writer
                .try_clone()
                .map_err(|error| Failure::at(socket, &error))?,
        );
        let mut client = Client {
            reader,
            writer,
            events: VecDeque::new(),
        };
        let greeting = client.message()?;
        if greeting.get("QMP").is_none() {
            return Err(Failure::new(format!("no QMP greeting: {greeting}")));
        }
        client.call("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Sends bytes as they are.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.writer
            .write_all(bytes)
            .map_err(|error| Failure::new(format!("cannot send: {error}")))
    }

    /// A second handle to send with while this one receives.
    pub(crate) fn sender(&self) -> Result<UnixStream, Failure> {
        self.writer
            .try_clone()
            .map_err(|error| Failure::new(error.to_string()))
    }

    /// The next message of any kind.
    pub(crate) fn message(&mut self) -> Result<Value, Failure> {
        let line = self.line()?;
        serde_json::from_str(&line)
            .map_err(|error| Failure::new(format!("not JSON: {error}: {line}")))
    }

    /// The bytes of the next message.
    pub(crate) fn line(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => Err(Failure::new("the daemon closed the connection")),
            Ok(_) => Ok(line),
            Err(error) => Err(Failure::new(format!("cannot receive: {error}"))),
        }
    }

    /// Takes messages that have to be this one again, as many times as that; comparing them costs less than reading them
    /// would, so that the daemon is what is measured.
    pub(crate) fn take_again(&mut self, line: &str, times: usize) -> Result<(), Failure> {
        let together = (REPEATED_BYTES / line.len()).max(1);
        let expected = line.repeat(together);
        let mut bytes = vec![0; expected.len()];
        let mut left = times;
        while left > 0 {
            let count = left.min(together);
            let length = count * line.len();
            self.reader
                .read_exact(&mut bytes[..length])
                .map_err(|error| Failure::new(format!("cannot receive: {error}")))?;
            if bytes[..length] != expected.as_bytes()[..length] {
                return Err(Failure::new(format!("not again what it was: {line}")));
            }
            left -= count;
        }
        Ok(())
    }

    /// The next message that is no event.
    pub(crate) fn reply(&mut self) -> Result<Value, Failure> {
        loop {
            let message = self.message()?;
            match message.get("event") {
                Some(_) => self.events.push_back(message),
                None => return Ok(message),
            }
        }
    }

    /// Sends a command and takes its answer, whatever it is.
    pub(crate) fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value, Failure> {
        self.send(format!("{}\n", json!({"execute": command, "arguments": arguments})).as_bytes())?;
        self.reply()
    }

    /// Sends a command that has to succeed and takes what it returns.
    pub(crate) fn call(&mut self, command: &str, arguments: Value) -> Result<Value, Failure> {
        let mut reply = self.ask(command, &arguments)?;
        match reply.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(Failure::new(format!("{command} {arguments}: {reply}"))),
        }
    }

    /// Takes events until one matches; the rest before it is dropped.
    pub(crate) fn wait_for(
        &mut self,
        what: &str,
        matches: impl Fn(&Value) -> bool,
    ) -> Result<Value, Failure> {
        self.be_patient(WORK_PATIENCE)?;
        let deadline = Instant::now() + WORK_PATIENCE;
        while Instant::now() < deadline {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.message()?,
            };
            if matches(&event) {
                self.be_patient(PATIENCE)?;
                return Ok(event);
            }
        }
        Err(Failure::new(format!("{what} did not come")))
    }

    fn be_patient(&self, time: Duration) -> Result<(), Failure> {
        self.writer
            .set_read_timeout(Some(time))
            .map_err(|error| Failure::new(format!("a timeout cannot be set: {error}")))
    }
}
