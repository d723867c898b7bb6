//! An NBD client that knows nothing of ours, and does what it is told, also what no client should: requests are bytes, sent and
//! answered one by one or many at once.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::json;

use crate::client::{Client, DEADLINE};
use crate::daemon::Daemon;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISCONNECT: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const ZERO: u16 = 6;
/// Durable before it is answered.
pub(crate) const FUA: u16 = 1;

/// Option that ends the handshake with an export.
const GO: u32 = 7;

/// A connection with simple replies.
pub(crate) struct Nbd {
    pub(crate) stream: UnixStream,
    /// Length of the export in bytes.
    pub(crate) length: u64,
    cookie: u64,
}

impl Nbd {
    /// Connects and chooses an export.
    pub(crate) fn open(path: &Path, export: &str) -> Self {
        let mut stream = connect(path);
        stream.write_all(&greeting()).expect("sent");
        stream.write_all(&option(GO, &go(export))).expect("sent");
        assert_eq!(receive(&mut stream, 18)[..8], *b"NBDMAGIC");
        let mut length = 0;
        loop {
            let head = receive(&mut stream, 20);
            let kind = u32::from_be_bytes(head[12..16].try_into().expect("four"));
            let bytes = u32::from_be_bytes(head[16..20].try_into().expect("four"));
            let payload = receive(&mut stream, bytes as usize);
            match kind {
                1 => break,
                // NBD_INFO_EXPORT
                3 if payload[..2] == [0, 0] => {
                    length = u64::from_be_bytes(payload[2..10].try_into().expect("eight"));
                }
                3 => {}
                other => panic!("{other:#x}: {}", String::from_utf8_lossy(&payload)),
            }
        }
        Self {
            stream,
            length,
            cookie: 0,
        }
    }

    /// Sends a request, and what belongs to it. Its cookie.
    pub(crate) fn send(&mut self, command: u16, flags: u16, range: (u64, u32), data: &[u8]) -> u64 {
        self.cookie += 1;
        let mut bytes = request(command, flags, self.cookie, range);
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes).expect("sent");
        self.cookie
    }

    /// The cookie and the error of the next reply.
    pub(crate) fn reply(&mut self) -> (u64, u32) {
        let head = receive(&mut self.stream, 16);
        assert_eq!(head[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(head[4..8].try_into().expect("four"));
        (
            u64::from_be_bytes(head[8..16].try_into().expect("eight")),
            error,
        )
    }

    fn ask(&mut self, command: u16, flags: u16, range: (u64, u32), data: &[u8]) -> u32 {
        let cookie = self.send(command, flags, range, data);
        let (answered, error) = self.reply();
        assert_eq!(answered, cookie);
        error
    }

    pub(crate) fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        assert_eq!(self.ask(READ, 0, (offset, length), &[]), 0, "read {offset}");
        receive(&mut self.stream, length as usize)
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8], flags: u16) {
        let length = u32::try_from(data.len()).expect("short");
        assert_eq!(self.ask(WRITE, flags, (offset, length), data), 0);
    }

    /// Writes to a daemon that may be killed meanwhile; `false`: it was, and nobody knows what became of the write.
    pub(crate) fn try_write(&mut self, offset: u64, data: &[u8]) -> bool {
        self.cookie += 1;
        let length = u32::try_from(data.len()).expect("short");
        let mut bytes = request(WRITE, 0, self.cookie, (offset, length));
        bytes.extend_from_slice(data);
        let mut head = [0; 16];
        let answered = self.stream.write_all(&bytes);
        let answered = answered.and_then(|()| self.stream.read_exact(&mut head));
        answered.is_ok() && head[4..8] == [0; 4]
    }

    /// Zeroes, trims, or flushes.
    pub(crate) fn change(&mut self, command: u16, range: (u64, u32)) {
        assert_eq!(self.ask(command, 0, range, &[]), 0, "{command} {range:?}");
    }

    /// The error that a request must end with.
    pub(crate) fn refusal(&mut self, command: u16, range: (u64, u32), data: &[u8]) -> u32 {
        let error = self.ask(command, 0, range, data);
        assert_ne!(error, 0);
        error
    }
}

/// Connects, with the deadline of everything.
pub(crate) fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("somebody listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("set");
    stream.set_write_timeout(Some(DEADLINE)).expect("set");
    stream
}

/// The flags that a client begins with.
pub(crate) fn greeting() -> [u8; 4] {
    3_u32.to_be_bytes()
}

/// An option as bytes.
pub(crate) fn option(number: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short");
    [
        b"IHAVEOPT".as_slice(),
        &number.to_be_bytes(),
        &length.to_be_bytes(),
        payload,
    ]
    .concat()
}

/// The payload that chooses an export.
pub(crate) fn go(export: &str) -> Vec<u8> {
    let length = u32::try_from(export.len()).expect("short");
    [&length.to_be_bytes(), export.as_bytes(), &[0, 0]].concat()
}

/// The head of a request.
pub(crate) fn request(
    command: u16,
    flags: u16,
    cookie: u64,
    (offset, length): (u64, u32),
) -> Vec<u8> {
    [
        0x2560_9513_u32.to_be_bytes().as_slice(),
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

/// Exactly so many bytes.
pub(crate) fn receive(stream: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).expect("received");
    bytes
}

/// Whatever comes until the end of the connection.
pub(crate) fn until_end(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => bytes,
        // Bytes that it did not read make the end a reset.
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => bytes,
        Err(error) => panic!("{error} after {} bytes", bytes.len()),
    }
}

/// Starts the server of a daemon at `nbd.sock`.
pub(crate) fn start_server(daemon: &Daemon, client: &mut Client, connections_max: u32) {
    let path = daemon.path("nbd.sock");
    let address = json!({"type": "unix", "data": {"path": path}});
    client.run(
        "nbd-server-start",
        json!({"addr": address, "max-connections": connections_max}),
    );
}

/// Exports a node for writing, under its name.
pub(crate) fn export(client: &mut Client, node: &str) {
    client.run(
        "block-export-add",
        json!({"type": "nbd", "id": node, "node-name": node, "writable": true}),
    );
}
