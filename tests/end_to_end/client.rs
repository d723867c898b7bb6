//! A QMP client that knows nothing of ours: lines in, lines out, with a deadline on everything.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long anything may take, on a machine that has much else to do. Only what hangs takes that long.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// One connection.
pub(crate) struct Client {
    lines: Receiver<String>,
    output: Box<dyn Write + Send>,
    /// Events that came while something else was waited for.
    pub(crate) events: Vec<Value>,
    /// Ends the connection when the client goes; its reading thread would keep it open.
    socket: Option<UnixStream>,
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            // The other side may have ended it.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Client {
    /// Speaks over two streams; a thread reads, so that waiting can have a deadline.
    pub(crate) fn over(
        input: impl Read + Send + 'static,
        output: impl Write + Send + 'static,
    ) -> Self {
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(input).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self {
            lines,
            output: Box::new(output),
            events: Vec::new(),
            socket: None,
        }
    }

    /// Connects to a UNIX socket. Its name is there a moment before anybody listens.
    pub(crate) fn connect(path: &Path) -> Self {
        let started = Instant::now();
        loop {
            match UnixStream::connect(path) {
                Err(error)
                    if error.kind() == ErrorKind::ConnectionRefused
                        && started.elapsed() < DEADLINE =>
                {
                    std::thread::yield_now();
                }
                connected => return Self::unix(connected.expect("the socket listens")),
            }
        }
    }

    /// Takes over a UNIX socket.
    pub(crate) fn unix(stream: UnixStream) -> Self {
        let (input, output) = (stream.try_clone(), stream.try_clone());
        let mut client = Self::over(input.expect("cloned"), output.expect("cloned"));
        client.socket = Some(stream);
        client
    }

    /// Takes over a TCP socket.
    pub(crate) fn tcp(stream: TcpStream) -> Self {
        Self::over(stream.try_clone().expect("cloned"), stream)
    }

    /// Connects and negotiates.
    pub(crate) fn ready(path: &Path) -> Self {
        let mut client = Self::connect(path);
        client.negotiate();
        client
    }

    /// Takes the greeting and negotiates.
    pub(crate) fn negotiate(&mut self) {
        let greeting = self.message().expect("a greeting");
        assert!(greeting.get("QMP").is_some(), "{greeting}");
        assert_eq!(
            self.command("qmp_capabilities", json!({})),
            json!({"return": {}})
        );
    }

    /// Sends bytes as they are.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.output.write_all(bytes).expect("sent");
        self.output.flush().expect("sent");
    }

    /// The next line; `None`: the connection has ended.
    pub(crate) fn line(&mut self) -> Option<String> {
        match self.lines.recv_timeout(DEADLINE) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("no message within {DEADLINE:?}"),
        }
    }

    /// The next message of any kind. What QEMU prints of the images that it makes, monitor or not, is none.
    pub(crate) fn message(&mut self) -> Option<Value> {
        let mut line = self.line()?;
        while line.starts_with("Formatting '") {
            line = self.line()?;
        }
        Some(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}")))
    }

    /// The next reply; events before it are kept.
    pub(crate) fn reply(&mut self) -> Value {
        loop {
            let message = self.message().expect("a reply, not the end");
            if message.get("event").is_none() {
                return message;
            }
            self.events.push(message);
        }
    }

    /// The next reply if it has come already; events before it are kept.
    pub(crate) fn reply_now(&mut self) -> Option<Value> {
        loop {
            let line = self.lines.try_recv().ok()?;
            let message: Value = serde_json::from_str(&line).expect("JSON");
            if message.get("event").is_none() {
                return Some(message);
            }
            self.events.push(message);
        }
    }

    /// Carries out a command and returns the whole reply.
    pub(crate) fn command(&mut self, name: &str, arguments: Value) -> Value {
        let request = json!({"execute": name, "arguments": arguments});
        self.send(format!("{request}\n").as_bytes());
        self.reply()
    }

    /// The same with a daemon that may be killed meanwhile; `None`: it was.
    pub(crate) fn try_command(&mut self, name: &str, arguments: &Value) -> Option<Value> {
        let request = json!({"execute": name, "arguments": arguments});
        let sent = self.output.write_all(format!("{request}\n").as_bytes());
        sent.and_then(|()| self.output.flush()).ok()?;
        loop {
            let message = self.message()?;
            if message.get("event").is_none() {
                return Some(message);
            }
        }
    }

    /// Carries out a command that must succeed, and returns its result.
    pub(crate) fn run(&mut self, name: &str, arguments: Value) -> Value {
        let mut reply = self.command(name, arguments);
        match reply.get_mut("return") {
            Some(result) => result.take(),
            None => panic!("{name}: {reply}"),
        }
    }

    /// The text of the error that a command must end with.
    pub(crate) fn refusal(&mut self, name: &str, arguments: Value) -> String {
        let reply = self.command(name, arguments);
        match reply["error"]["desc"].as_str() {
            Some(text) => text.to_owned(),
            None => panic!("{name} was not refused: {reply}"),
        }
    }

    /// Waits until a job has reached a status. What came before that, of other jobs too, is passed over.
    pub(crate) fn wait_for(&mut self, job: &str, status: &str) {
        let is_it = |event: &Value| {
            event["event"] == "JOB_STATUS_CHANGE"
                && event["data"] == json!({"id": job, "status": status})
        };
        loop {
            if let Some(place) = self.events.iter().position(is_it) {
                self.events.drain(..=place);
                return;
            }
            let message = self.message().expect("an event, not the end");
            assert!(message.get("event").is_some(), "{message}");
            self.events.push(message);
        }
    }

    /// Waits until the connection ends.
    pub(crate) fn end(&mut self) {
        while self.message().is_some() {}
    }
}
