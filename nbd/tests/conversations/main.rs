//! Both machines talk to each other in every way, however their bytes are cut; and to peers that say anything.
#![forbid(unsafe_code)]

mod any_bytes;
mod mutations;

use std::path::Path;

use any_bytes::{Exports, MODES, facts, try_everything, wishes};
use blockyard_nbd::Mode;
use blockyard_nbd::constants::option;
use blockyard_nbd::handshake::client::{self, Agreement, ClientHandshake};
use blockyard_nbd::handshake::option::{ContextQuery, ExportQuery, put_option};
use blockyard_nbd::handshake::server::{self, Security, ServerHandshake};
use blockyard_nbd::transmission::{
    Awaited, Command, Extent, Follows, Incoming, Reply, Request, StatusExtents, parse_extents,
};
use proptest::prelude::*;

/// Lengths of the pieces in which bytes arrive, used in turn.
fn cuts() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(1usize..40, 1..8)
}

/// Bytes on their way.
#[derive(Default)]
struct Wire {
    bytes: Vec<u8>,
    cuts: Vec<usize>,
    turn: usize,
    all: Vec<u8>,
}

impl Wire {
    fn new(cuts: &[usize]) -> Self {
        Self {
            cuts: cuts.to_vec(),
            ..Self::default()
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        self.all.extend(bytes);
    }

    /// The next piece, of which so many are taken.
    fn take(&mut self, take: impl FnOnce(&[u8]) -> usize) {
        let length = self.cuts[self.turn % self.cuts.len()].min(self.bytes.len());
        self.turn += 1;
        let taken = take(&self.bytes[..length]);
        self.bytes.drain(..taken);
    }
}

/// What each side has agreed to, and all that each has said.
struct Talk {
    session: blockyard_nbd::Session,
    agreement: Agreement,
    said_by_client: Vec<u8>,
    said_by_server: Vec<u8>,
}

fn talk(mode_max: Mode, tls: bool, cuts: &[usize]) -> Talk {
    let security = if tls {
        Security::TlsRequired
    } else {
        Security::Plain
    };
    let mut server = ServerHandshake::new(security);
    let mut client = ClientHandshake::new(wishes(mode_max, tls));
    let (mut to_server, mut to_client) = (Wire::new(cuts), Wire::new(cuts));
    let (mut session, mut agreement) = (None, None);
    for _ in 0..10_000 {
        if session.is_none() {
            match server.step(&Exports) {
                server::Step::More => {}
                server::Step::StartTls => {
                    assert!(matches!(server.tls_started(b""), server::Step::More));
                }
                server::Step::Transmit(agreed) => session = Some(*agreed),
                server::Step::Close => panic!("closed"),
            }
        }
        to_client.put(&server.output());
        if agreement.is_none() {
            match client.step().expect("goes well") {
                client::Step::More => {}
                client::Step::StartTls => client.tls_started(b"").expect("nothing between"),
                client::Step::Transmit(agreed) => agreement = Some(*agreed),
            }
        }
        to_server.put(&client.output());
        if let (Some(session), Some(agreement)) = (&session, &agreement) {
            assert!(to_server.bytes.is_empty() && to_client.bytes.is_empty());
            return Talk {
                session: session.clone(),
                agreement: agreement.clone(),
                said_by_client: to_server.all,
                said_by_server: to_client.all,
            };
        }
        to_server.take(|piece| server.receive(piece));
        to_client.take(|piece| client.receive(piece));
    }
    panic!("they talk for ever");
}

proptest! {
    #[test]
    fn both_sides_agree_however_their_bytes_are_cut(
        mode in prop::sample::select(&MODES),
        tls: bool,
        cuts in cuts(),
    ) {
        let Talk { session, agreement, .. } = talk(mode, tls, &cuts);
        prop_assert_eq!(session.mode, mode);
        prop_assert_eq!(agreement.mode, mode);
        prop_assert_eq!(session.flags, agreement.flags);
        prop_assert_eq!(session.facts.length_bytes, agreement.length_bytes);
        prop_assert_eq!(agreement.block_sizes, Some(session.facts.block_sizes));
        let chosen: Vec<_> = session.contexts.iter().map(|context| context.id).collect();
        let expected = agreement.context.into_iter().collect::<Vec<_>>();
        prop_assert_eq!(chosen, expected);
        prop_assert_eq!(agreement.context.is_some(), mode > Mode::Simple);
    }

    #[test]
    fn options_may_come_in_any_order(
        order in Just([
            option::LIST,
            option::INFO,
            option::STRUCTURED_REPLY,
            option::LIST_META_CONTEXT,
            option::SET_META_CONTEXT,
            option::EXTENDED_HEADERS,
            option::STARTTLS,
            99,
        ]).prop_shuffle(),
        cuts in cuts(),
    ) {
        let mut bytes = vec![0, 0, 0, 3];
        let name = b"rw";
        for kind in order {
            let payload = match kind {
                option::INFO => ExportQuery { name, infos: vec![3] }.encode(),
                option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                    ContextQuery { name, queries: Some(vec![b"base:allocation"]) }.encode()
                }
                _ => Vec::new(),
            };
            put_option(&mut bytes, kind, &payload);
        }
        put_option(&mut bytes, option::GO, &ExportQuery { name, infos: vec![] }.encode());
        let mut wire = Wire::new(&cuts);
        wire.put(&bytes);
        let mut server = ServerHandshake::new(Security::Plain);
        let session = loop {
            match server.step(&Exports) {
                server::Step::More => prop_assert!(!wire.bytes.is_empty()),
                server::Step::Transmit(session) => break session,
                other => panic!("{other:?}"),
            }
            wire.take(|piece| server.receive(piece));
        };
        let before = |one, other| {
            let place = |kind| order.iter().position(|option| *option == kind);
            place(one) < place(other)
        };
        let extended = Mode::Extended;
        prop_assert_eq!(session.mode, extended);
        // Contexts can be chosen once replies have the room for them.
        let structured = before(option::STRUCTURED_REPLY, option::SET_META_CONTEXT)
            || before(option::EXTENDED_HEADERS, option::SET_META_CONTEXT);
        prop_assert_eq!(session.contexts.len(), usize::from(structured));
    }

    #[test]
    fn a_read_is_put_together_from_chunks_in_any_order_and_cut(
        mode in prop::sample::select(&[Mode::Structured, Mode::Extended][..]),
        order in Just([0usize, 1, 2, 3, 4, 5, 6, 7]).prop_shuffle(),
        holes: u8,
        offset in 0u64..1 << 40,
        cuts in cuts(),
    ) {
        const PIECE: usize = 100;
        let request = Request {
            cookie: 77,
            command: Command::Read,
            flags: 0,
            offset,
            length_bytes: 800,
            payload_bytes: 0,
        };
        let reply = Reply::to(&request, mode);
        let mut out = Vec::new();
        for (count, index) in order.into_iter().enumerate() {
            let at = offset + (index * PIECE) as u64;
            let last = count == 7 && holes & 1 == 0;
            if holes & (1 << index) != 0 {
                reply.hole(at, 100, last, &mut out);
            } else {
                reply.data(at, 100, last, &mut out);
                out.extend(vec![u8::try_from(index).expect("small") + 1; PIECE]);
            }
        }
        if holes & 1 != 0 {
            reply.end(&mut out);
        }
        let mut wire = Wire::new(&cuts);
        wire.put(&out);
        let mut awaited = Awaited::new(request, None);
        let mut buffer = vec![0xff; 800];
        let mut came: Vec<u8> = Vec::new();
        let mut ended = false;
        while !ended {
            prop_assert!(!wire.bytes.is_empty(), "the reply has an end");
            wire.take(|piece| { came.extend(piece); piece.len() });
            while let Some((head, taken)) = Incoming::parse(mode, &came).expect("valid") {
                let (follows, last) = awaited.accept(head, mode).expect("sound");
                came.drain(..taken);
                match follows {
                    Follows::Data { from, length } => {
                        while came.len() < length {
                            wire.take(|piece| { came.extend(piece); piece.len() });
                        }
                        buffer[from..from + length].copy_from_slice(&came[..length]);
                        came.drain(..length);
                    }
                    Follows::Zeroes { from, length } => buffer[from..from + length].fill(0),
                    _ => {}
                }
                ended |= last;
            }
        }
        prop_assert!(came.is_empty() && wire.bytes.is_empty());
        for (index, piece) in buffer.chunks(PIECE).enumerate() {
            let hole = holes & (1 << index) != 0;
            let byte = if hole { 0 } else { u8::try_from(index).expect("small") + 1 };
            prop_assert!(piece.iter().all(|found| *found == byte), "{index}");
        }
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        try_everything(&bytes);
    }

    #[test]
    fn sound_conversations_with_changed_bytes_are_survived(
        index in 0usize..20,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let all = sound();
        let mut bytes = all[index % all.len()].clone();
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        try_everything(&bytes);
        try_everything(&bytes[..cut.index(bytes.len())]);
    }
}

/// What sound peers say: handshakes, requests, replies, each behind the byte that chooses.
fn sound() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (choice, mode) in (0u8..).zip(MODES) {
        let Talk {
            said_by_client,
            said_by_server,
            ..
        } = talk(mode, choice == 1, &[39]);
        all.extend(
            [said_by_client, said_by_server].map(|bytes| [vec![90 + choice], bytes].concat()),
        );
        all.extend(
            [requests(mode), replies(mode)].map(|bytes| [vec![90 + choice], bytes].concat()),
        );
    }
    all
}

fn requests(mode: Mode) -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in (0..=8).chain([2]) {
        let command = Command::of_number(number);
        let payload_bytes = if command == Command::Write { 512 } else { 0 };
        let request = Request {
            cookie: u64::from(number),
            command,
            flags: 0,
            offset: 4096,
            length_bytes: 512,
            payload_bytes,
        };
        request.put_head(mode, &mut bytes);
        bytes.extend(vec![7; usize::try_from(payload_bytes).expect("short")]);
    }
    bytes
}

fn replies(mode: Mode) -> Vec<u8> {
    let request = Request {
        cookie: 0,
        command: Command::Read,
        flags: 0,
        offset: 512,
        length_bytes: 65536,
        payload_bytes: 0,
    };
    let mut bytes = Vec::new();
    let reply = Reply::to(&request, mode);
    if mode == Mode::Simple {
        reply.data(512, 65536, true, &mut bytes);
        bytes.extend(vec![1; 65536]);
        return bytes;
    }
    reply.data(512, 1024, false, &mut bytes);
    bytes.extend(vec![1; 1024]);
    reply.hole(1536, 65536 - 1024, false, &mut bytes);
    let mut extents = StatusExtents::new(mode, &request, 4096);
    extents.add(Extent {
        length_bytes: 4096,
        status: 3,
    });
    reply.status(0, &extents, false, &mut bytes);
    reply.error_at(blockyard_nbd::NbdError::Io, "no", 600, false, &mut bytes);
    reply.end(&mut bytes);
    bytes
}

/// What the fuzzer begins with, and what it has found: see nbd/fuzz.
#[test]
fn sound_conversations_and_what_the_fuzzer_has_found_are_survived() {
    let corpus = std::env::var_os("BLOCKYARD_CORPUS");
    for (index, bytes) in sound().into_iter().enumerate() {
        try_everything(&bytes);
        for end in 0..bytes.len().min(400) {
            try_everything(&bytes[..end]);
        }
        if let Some(folder) = &corpus {
            let file = Path::new(folder).join(format!("sound-{index}"));
            std::fs::write(file, &bytes).expect("the folder is there");
        }
    }
    if let Some(folder) = std::env::var_os("BLOCKYARD_FOUND") {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            try_everything(&std::fs::read(entry.expect("an entry").path()).expect("a file"));
        }
    }
}

#[test]
fn extents_of_a_whole_disk_cross_in_both_widths() {
    let length_bytes = facts(true).length_bytes;
    for mode in [Mode::Structured, Mode::Extended] {
        let request = Request {
            cookie: 1,
            command: Command::BlockStatus,
            flags: 0,
            offset: 0,
            length_bytes,
            payload_bytes: 0,
        };
        let mut extents = StatusExtents::new(mode, &request, length_bytes);
        let mut status = 0;
        while extents.add(Extent {
            length_bytes: 512,
            status,
        }) {
            status ^= 3;
        }
        let mut out = Vec::new();
        Reply::to(&request, mode).status(0, &extents, true, &mut out);
        let (head, taken) = Incoming::parse(mode, &out).expect("valid").expect("whole");
        let mut awaited = Awaited::new(request, Some(0));
        let (follows, last) = awaited.accept(head, mode).expect("sound");
        assert!(last);
        let Follows::Extents { wide, .. } = follows else {
            panic!("{follows:?}");
        };
        let (found, _) = parse_extents(wide, &out[taken..]).expect("valid");
        assert_eq!(found, extents.extents());
        assert_eq!(found.len(), 2048);
    }
}
