//! A small NBD server of the tests, on threads of its own: a disk in memory, and connections that can be cut after any byte.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use blockyard_nbd::handshake::server::{Security, ServerHandshake, Step};
use blockyard_nbd::transmission::{Command, Extent, Reply, Request, StatusExtents, StatusQuery};
use blockyard_nbd::{BlockSizes, ExportDirectory, ExportFacts, Mode, Session};

/// What becomes of one connection.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fate {
    /// It ends after so many bytes from the server.
    pub(super) sent_max: Option<usize>,
    /// It ends after so many bytes from the client.
    pub(super) received_max: Option<usize>,
    /// From here on the server says nothing any more, after so many bytes from it.
    pub(super) silent_after: Option<usize>,
}

/// The disk and what its connections do.
pub(super) struct Disk {
    pub(super) bytes: Mutex<Vec<u8>>,
    pub(super) fates: Mutex<VecDeque<Fate>>,
    pub(super) connections: AtomicUsize,
    pub(super) facts: ExportFacts,
}

/// A server that listens until it is dropped.
pub(super) struct Server {
    pub(super) path: PathBuf,
    pub(super) disk: Arc<Disk>,
    _folder: tempfile::TempDir,
}

impl Server {
    /// A disk of zeroes, whose connections end one after the other as told, and then not.
    pub(super) fn start(facts: ExportFacts, fates: &[Fate]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).expect("a socket");
        let length = usize::try_from(facts.length_bytes).expect("short");
        let disk = Arc::new(Disk {
            bytes: Mutex::new(vec![0; length]),
            fates: Mutex::new(fates.iter().copied().collect()),
            connections: AtomicUsize::new(0),
            facts,
        });
        let shared = Arc::clone(&disk);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                shared.connections.fetch_add(1, Ordering::SeqCst);
                let fate = shared.fates.lock().expect("whole").pop_front();
                let wire = Wire::new(stream, fate.unwrap_or_default());
                let disk = Arc::clone(&shared);
                std::thread::spawn(move || serve(wire, &disk));
            }
        });
        Self {
            path,
            disk,
            _folder: folder,
        }
    }
}

/// An export of so many bytes.
pub(super) fn facts(length_bytes: u64) -> ExportFacts {
    ExportFacts {
        length_bytes,
        writable: true,
        multi_conn: true,
        description: None,
        block_sizes: BlockSizes::of_node(1, 0),
        allocation_depth: false,
        dirty_bitmaps: Vec::new(),
    }
}

impl ExportDirectory for Disk {
    fn list(&self) -> Vec<(String, Option<String>)> {
        Vec::new()
    }

    fn find(&self, _: &str) -> Option<ExportFacts> {
        Some(self.facts.clone())
    }
}

/// A connection with its fate. `None` from its methods: it is over.
struct Wire {
    stream: UnixStream,
    fate: Fate,
    sent: usize,
    received: usize,
}

impl Wire {
    fn new(stream: UnixStream, fate: Fate) -> Self {
        Self {
            stream,
            fate,
            sent: 0,
            received: 0,
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Option<()> {
        let silent = self.fate.silent_after.unwrap_or(usize::MAX);
        if self.sent + bytes.len() > silent {
            // Says no more, and hears no more, until the client goes.
            let _ = self.stream.write_all(&bytes[..silent - self.sent]);
            let _ = std::io::copy(&mut self.stream, &mut std::io::sink());
            return None;
        }
        let allowed = self.fate.sent_max.unwrap_or(usize::MAX) - self.sent;
        let (now, cut) = bytes.split_at(bytes.len().min(allowed));
        self.stream.write_all(now).ok()?;
        self.sent += now.len();
        if !cut.is_empty() {
            let _ = self.stream.shutdown(Shutdown::Both);
            return None;
        }
        Some(())
    }

    fn receive(&mut self, length: usize) -> Option<Vec<u8>> {
        let allowed = self.fate.received_max.unwrap_or(usize::MAX) - self.received;
        let mut bytes = vec![0; length.min(allowed)];
        self.stream.read_exact(&mut bytes).ok()?;
        self.received += bytes.len();
        if bytes.len() < length {
            let _ = self.stream.shutdown(Shutdown::Both);
            return None;
        }
        Some(bytes)
    }
}

fn serve(mut wire: Wire, disk: &Disk) -> Option<()> {
    let mut handshake = ServerHandshake::new(Security::Plain);
    let session = loop {
        let step = handshake.step(disk);
        wire.send(&handshake.output())?;
        match step {
            Step::Transmit(session) => break *session,
            Step::More => {}
            Step::StartTls | Step::Close => return None,
        }
        let byte = wire.receive(1)?;
        assert_eq!(handshake.receive(&byte), 1);
    };
    loop {
        let head = wire.receive(Request::head_bytes(session.mode))?;
        let request = Request::parse(session.mode, &head).ok()??;
        let payload = wire.receive(usize::try_from(request.payload_bytes).ok()?)?;
        if request.command == Command::Disconnect {
            return None;
        }
        let answer = answer(&request, &payload, &session, disk);
        wire.send(&answer)?;
    }
}

fn answer(request: &Request, payload: &[u8], session: &Session, disk: &Disk) -> Vec<u8> {
    let reply = Reply::to(request, session.mode);
    let mut out = Vec::new();
    if let Err(refusal) = request.check(session) {
        reply.error(refusal.error, &refusal.text, &mut out);
        return out;
    }
    let mut bytes = disk.bytes.lock().expect("whole");
    let start = usize::try_from(request.offset).expect("checked");
    let length = usize::try_from(request.length_bytes).expect("checked");
    let range = &mut bytes[start..start + length];
    match request.command {
        Command::Read if session.mode == Mode::Simple => {
            reply.data(
                request.offset,
                u32::try_from(length).expect("short"),
                true,
                &mut out,
            );
            out.extend_from_slice(range);
        }
        Command::Read => {
            // In pieces of a prime length, the last first, zeroes as holes.
            let pieces: Vec<_> = range.chunks(1009).enumerate().collect();
            for (index, piece) in pieces.into_iter().rev() {
                let at = request.offset + (index * 1009) as u64;
                let count = u32::try_from(piece.len()).expect("short");
                if piece.iter().all(|byte| *byte == 0) {
                    reply.hole(at, count, false, &mut out);
                } else {
                    reply.data(at, count, false, &mut out);
                    out.extend_from_slice(piece);
                }
            }
            reply.end(&mut out);
        }
        Command::Write => {
            range.copy_from_slice(payload);
            reply.done(&mut out);
        }
        Command::WriteZeroes | Command::Trim => {
            range.fill(0);
            reply.done(&mut out);
        }
        Command::BlockStatus => {
            let query = StatusQuery::parse(request, payload, session).expect("checked");
            let mut extents = StatusExtents::new(session.mode, request, query.length_bytes);
            for block in range.chunks(512) {
                let zero = block.iter().all(|byte| *byte == 0);
                extents.add(Extent {
                    length_bytes: block.len() as u64,
                    status: if zero { 3 } else { 0 },
                });
            }
            reply.status(query.contexts[0].id, &extents, true, &mut out);
        }
        _ => reply.done(&mut out),
    }
    out
}
