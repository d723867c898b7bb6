//! Bytes from a peer that may say anything, given to every machine there is: nothing panics, nothing grows. Shared with the
//! fuzzer.

use blockyard_nbd::handshake::client::{self, ClientHandshake, Wishes};
use blockyard_nbd::handshake::server::{self, Security, ServerHandshake};
use blockyard_nbd::transmission::{
    Awaited, Command, Extent, Follows, Incoming, Reply, Request, StatusExtents, StatusQuery,
    parse_extents,
};
use blockyard_nbd::{BlockSizes, ExportDirectory, ExportFacts, Mode, Session};

/// Two exports: `ro`, and `rw` with every context.
pub(crate) struct Exports;

/// What an export of this name is.
pub(crate) fn facts(writable: bool) -> ExportFacts {
    ExportFacts {
        length_bytes: 1 << 20,
        writable,
        multi_conn: true,
        description: (!writable).then(|| "read only".to_owned()),
        block_sizes: BlockSizes::of_node(512, 0),
        allocation_depth: writable,
        dirty_bitmaps: vec!["b0".to_owned()],
    }
}

impl ExportDirectory for Exports {
    fn list(&self) -> Vec<(String, Option<String>)> {
        ["ro", "rw"].map(|name| (name.to_owned(), None)).to_vec()
    }

    fn find(&self, name: &str) -> Option<ExportFacts> {
        ["ro", "rw"].contains(&name).then(|| facts(name == "rw"))
    }
}

pub(crate) const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

/// What a client of the tests wants.
pub(crate) fn wishes(mode_max: Mode, tls: bool) -> Wishes {
    Wishes {
        export_name: "rw".to_owned(),
        context: "base:allocation".to_owned(),
        tls,
        mode_max,
    }
}

/// Lets `bytes` be what a peer says, to every machine.
pub(crate) fn try_everything(bytes: &[u8]) {
    let Some((choice, bytes)) = bytes.split_first() else {
        return;
    };
    let (security, mode) = match choice % 3 {
        0 => (Security::Plain, Mode::Simple),
        1 => (Security::TlsRequired, Mode::Structured),
        _ => (Security::Plain, Mode::Extended),
    };
    // How many bytes come at once.
    let pace = usize::from(choice / 3).max(1);
    serve(security, pace, bytes);
    connect(mode, pace, bytes);
    take_requests(mode, bytes);
    take_replies(mode, bytes);
}

fn serve(security: Security, pace: usize, bytes: &[u8]) {
    let mut server = ServerHandshake::new(security);
    let mut rest = bytes;
    let mut answered = server.output().len();
    loop {
        match server.step(&Exports) {
            server::Step::More => {}
            server::Step::StartTls => {
                if matches!(server.tls_started(b""), server::Step::Close) {
                    return;
                }
            }
            server::Step::Transmit(session) => return take_requests(session.mode, rest),
            server::Step::Close => return assert_eq!(server.receive(rest), 0),
        }
        answered += server.output().len();
        let taken = server.receive(&rest[..rest.len().min(pace)]);
        if taken == 0 {
            // An answer of at most a few hundred bytes for each of 16 that came.
            return assert!(answered <= 1000 + 100 * bytes.len(), "{answered}");
        }
        rest = &rest[taken..];
    }
}

fn connect(mode_max: Mode, pace: usize, bytes: &[u8]) {
    let mut client = ClientHandshake::new(wishes(mode_max, false));
    let mut rest = bytes;
    loop {
        match client.step() {
            Ok(client::Step::More) => {}
            Ok(client::Step::Transmit(agreement)) => {
                assert!(i64::try_from(agreement.length_bytes).is_ok());
                return take_replies(agreement.mode, rest);
            }
            Ok(client::Step::StartTls) => unreachable!("nobody wished for it"),
            Err(_) => return,
        }
        client.output();
        let taken = client.receive(&rest[..rest.len().min(pace)]);
        if taken == 0 {
            return;
        }
        rest = &rest[taken..];
    }
}

/// Requests as a server takes them.
pub(crate) fn take_requests(mode: Mode, mut bytes: &[u8]) {
    let facts = facts(true);
    let session = Session {
        export_name: "rw".to_owned(),
        flags: facts.transmission_flags(mode, true),
        contexts: facts.contexts(),
        facts,
        mode,
    };
    let mut out = Vec::new();
    while let Ok(Some(request)) = Request::parse(mode, bytes) {
        bytes = &bytes[Request::head_bytes(mode)..];
        let payload = usize::try_from(request.payload_bytes).unwrap_or(usize::MAX);
        let checked = request.check(&session);
        if checked.as_ref().is_err_and(|refusal| refusal.closes) {
            return;
        }
        let Some((payload, behind)) = bytes.split_at_checked(payload) else {
            return;
        };
        bytes = behind;
        let reply = Reply::to(&request, mode);
        out.clear();
        match checked.and_then(|()| StatusQuery::parse(&request, payload, &session)) {
            Ok(query) => {
                let end = request.offset.checked_add(query.length_bytes);
                let inside = end.is_some_and(|end| end <= session.facts.length_bytes);
                assert!(inside || request.command == Command::Disconnect);
                let mut extents = StatusExtents::new(mode, &request, query.length_bytes);
                // The query may be of a whole disk of exabytes, and equal extents become one.
                let length_bytes = (query.length_bytes / 512).max(4096);
                while extents.add(Extent {
                    length_bytes,
                    status: 3,
                }) {}
                if mode > Mode::Simple && !extents.extents().is_empty() {
                    reply.status(query.contexts[0].id, &extents, true, &mut out);
                }
            }
            Err(refusal) => reply.error(refusal.error, &refusal.text, &mut out),
        }
        assert!(out.len() < 5000);
    }
}

/// Replies as a client takes them, to requests of every kind.
pub(crate) fn take_replies(mode: Mode, bytes: &[u8]) {
    for (command, length_bytes) in [
        (Command::Read, 65536),
        (Command::BlockStatus, 1 << 20),
        (Command::Write, 512),
    ] {
        let request = Request {
            cookie: 0,
            command,
            flags: 0,
            offset: 512,
            length_bytes,
            payload_bytes: 0,
        };
        let mut awaited = Awaited::new(request, Some(0));
        let mut rest = bytes;
        while let Ok(Some((incoming, taken))) = Incoming::parse(mode, rest) {
            rest = &rest[taken..];
            let Ok((follows, last)) = awaited.accept(incoming, mode) else {
                break;
            };
            let skipped = match follows {
                Follows::Nothing => 0,
                Follows::Zeroes { from, length } | Follows::Data { from, length } => {
                    assert!(from + length <= 65536);
                    let follows = matches!(follows, Follows::Data { .. });
                    if follows { length } else { 0 }
                }
                Follows::Extents {
                    payload_bytes,
                    wide,
                } => {
                    let length = usize::try_from(payload_bytes).expect("32 bits");
                    let Some(payload) = rest.get(..length) else {
                        break;
                    };
                    match parse_extents(wide, payload) {
                        Ok((_, taken)) => assert_eq!(taken, length),
                        Err(_) => break,
                    }
                    length
                }
            };
            match rest.get(skipped..) {
                Some(behind) if !last => rest = behind,
                _ => break,
            }
        }
    }
}
