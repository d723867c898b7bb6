//! Replies of servers that lie, held against the request that they answer.

use super::incoming::{Awaited, Content, Follows, HEAD_BYTES_MAX, Incoming, parse_extents};
use super::reply::Reply;
use super::request::{Command, Request};
use super::{Extent, StatusExtents};
use crate::errors::NbdError;
use crate::handshake::Mode;

const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

fn request(command: Command, offset: u64, length_bytes: u64) -> Request {
    Request {
        cookie: 9,
        command,
        flags: 0,
        offset,
        length_bytes,
        payload_bytes: 0,
    }
}

/// One head after the other, as long as nothing follows them.
fn heads(mode: Mode, mut bytes: &[u8]) -> Vec<Incoming> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (head, taken) = Incoming::parse(mode, bytes).expect("valid").expect("whole");
        assert!(taken <= HEAD_BYTES_MAX);
        for end in 0..taken {
            assert_eq!(Incoming::parse(mode, &bytes[..end]), Ok(None), "{end}");
        }
        found.push(head);
        bytes = &bytes[taken..];
    }
    found
}

#[test]
fn replies_of_our_server_are_read_back() {
    let read = request(Command::Read, 4096, 1024);
    for mode in [Mode::Structured, Mode::Extended] {
        let reply = Reply::to(&read, mode);
        let mut out = Vec::new();
        reply.hole(4096, 512, false, &mut out);
        reply.error_at(NbdError::Io, "bad sector", 4608, false, &mut out);
        reply.end(&mut out);
        let chunk = |last, content| Incoming::Chunk {
            cookie: 9,
            last,
            content,
        };
        let expected = [
            Content::Hole {
                offset: 4096,
                length_bytes: 512,
            },
            Content::Error(super::Failure {
                error: NbdError::Io,
                text: "bad sector".to_owned(),
            }),
            Content::None,
        ];
        let found = heads(mode, &out);
        let lasts = [false, false, true];
        let expected: Vec<_> = lasts.into_iter().zip(expected).collect();
        let expected: Vec<_> = expected
            .into_iter()
            .map(|(last, content)| chunk(last, content))
            .collect();
        assert_eq!(found, expected);
        let mut awaited = Awaited::new(read, None);
        let ends: Vec<_> = found
            .into_iter()
            .map(|head| awaited.accept(head, mode).expect("valid"))
            .collect();
        let zeroes = Follows::Zeroes {
            from: 0,
            length: 512,
        };
        assert_eq!(
            ends,
            [
                (zeroes, false),
                (Follows::Nothing, false),
                (Follows::Nothing, true)
            ]
        );
        let failure = awaited.outcome().expect_err("failed");
        assert_eq!(
            (failure.error, failure.text.as_str()),
            (NbdError::Io, "bad sector")
        );
    }
    for mode in MODES {
        let mut out = Vec::new();
        Reply::to(&read, mode).data(4096, 1024, true, &mut out);
        let head = heads(mode, &out).remove(0);
        let mut awaited = Awaited::new(read, None);
        let data = Follows::Data {
            from: 0,
            length: 1024,
        };
        assert_eq!(awaited.accept(head, mode), Ok((data, true)));
        assert_eq!(awaited.outcome(), Ok(()));
        out.clear();
        Reply::to(&read, mode).error(NbdError::NoSpace, "full", &mut out);
        let mut awaited = Awaited::new(read, None);
        let head = heads(mode, &out).remove(0);
        assert_eq!(awaited.accept(head, mode), Ok((Follows::Nothing, true)));
        assert_eq!(
            awaited.outcome().expect_err("failed").error,
            NbdError::NoSpace
        );
    }
}

#[test]
fn extents_of_our_server_are_read_back() {
    let status = request(Command::BlockStatus, 0, 1 << 20);
    for mode in [Mode::Structured, Mode::Extended] {
        let mut extents = StatusExtents::new(mode, &status, 1 << 20);
        let told =
            [(4096, 3), (8192, 0), ((1 << 20) - 12288, 3)].map(|(length_bytes, status)| Extent {
                length_bytes,
                status,
            });
        for extent in told {
            extents.add(extent);
        }
        let mut out = Vec::new();
        Reply::to(&status, mode).status(7, &extents, true, &mut out);
        let (head, taken) = Incoming::parse(mode, &out).expect("valid").expect("whole");
        let mut awaited = Awaited::new(status, Some(7));
        let wide = mode == Mode::Extended;
        let payload_bytes = u32::try_from(out.len() - taken).expect("short");
        let follows = Follows::Extents {
            payload_bytes,
            wide,
        };
        assert_eq!(awaited.accept(head, mode), Ok((follows, true)));
        let payload = &out[taken..];
        assert_eq!(
            parse_extents(wide, payload),
            Ok((told.to_vec(), payload.len()))
        );
        let (some, taken) = parse_extents(wide, &payload[..payload.len() - 1]).expect("valid");
        assert_eq!((some.len(), taken), (2, payload.len() * 2 / 3));
    }
    assert!(parse_extents(false, &[0; 8]).is_err(), "no length");
    let unknown_flags = [0, 0, 0, 0, 0, 0, 2, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 3];
    let (extents, _) = parse_extents(true, &unknown_flags).expect("valid");
    assert_eq!(extents[0].status, 3);
}

fn chunk(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short");
    let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(9u64.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn long_chunk(kind: u16, payload_bytes: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x6e8a_278c_u32.to_be_bytes().to_vec();
    bytes.extend([0, 1]);
    bytes.extend(kind.to_be_bytes());
    bytes.extend([0; 16]);
    bytes.extend(payload_bytes.to_be_bytes());
    bytes.extend(payload);
    bytes
}

#[test]
fn heads_that_make_no_sense_are_violations() {
    for bytes in [
        chunk(0, 1, &[0]),
        chunk(0, 0, &[]),
        chunk(1, 1, &[0; 8]),
        chunk(1, 1, &[0; 4]),
        chunk(2, 1, &[0; 11]),
        chunk(2, 1, &[0; 13]),
        chunk(2, 1, &[0; 12]),
        chunk(5, 1, &[0; 4]),
        chunk(5, 1, &[0; 11]),
        chunk(5, 1, &[0; 20 + 1]),
        chunk(6, 1, &[0; 8]),
        chunk(6, 1, &[0; 24]),
        chunk(7, 1, &[0; 16]),
        chunk(0x8001, 1, &[0; 5]),
        chunk(0x8001, 1, &[0; 6]),
        chunk(0x8001, 1, &[0, 0, 0, 5, 0, 1]),
        chunk(0x8001, 1, &[1; 5000]),
        chunk(0x8fff, 1, &[0; 2]),
    ] {
        assert!(
            Incoming::parse(Mode::Structured, &bytes).is_err(),
            "{bytes:?}"
        );
    }
    for (kind, payload_bytes) in [
        (1, u64::MAX),
        (1, (32 << 20) + 9),
        (5, 4 + 8 * 131_073),
        (6, u64::MAX),
        (0x8001, 1 << 40),
    ] {
        let bytes = long_chunk(kind, payload_bytes, &[1; 16]);
        assert!(
            Incoming::parse(Mode::Extended, &bytes).is_err(),
            "{kind} {payload_bytes}"
        );
    }
    // Errors of a kind that is not known are errors.
    let unknown = chunk(0x8fff, 1, &[0, 0, 0, 28, 0, 2, b'n', b'o', 1, 2, 3]);
    let (head, taken) = Incoming::parse(Mode::Structured, &unknown)
        .expect("valid")
        .expect("whole");
    assert_eq!(taken, unknown.len());
    let mut awaited = Awaited::new(request(Command::Write, 0, 512), None);
    assert_eq!(
        awaited.accept(head, Mode::Structured),
        Ok((Follows::Nothing, true))
    );
    assert_eq!(
        awaited.outcome().expect_err("failed").error,
        NbdError::NoSpace
    );
}

#[test]
fn another_magic_is_a_violation() {
    let mut simple = Vec::new();
    Reply::to(&request(Command::Flush, 0, 0), Mode::Simple).done(&mut simple);
    assert!(Incoming::parse(Mode::Extended, &simple[..4]).is_err());
    assert!(Incoming::parse(Mode::Structured, &simple).is_ok());
    assert!(Incoming::parse(Mode::Simple, &chunk(0, 1, &[])).is_err());
    assert!(Incoming::parse(Mode::Extended, &chunk(0, 1, &[])).is_err());
    assert!(Incoming::parse(Mode::Structured, &long_chunk(0, 0, &[])).is_err());
    assert!(Incoming::parse(Mode::Structured, &[0; 4]).is_err());
}

/// Gives these chunks to a request, until one is refused or the last is there.
fn answered(request: Request, chunks: &[(Content, bool)]) -> bool {
    let mut awaited = Awaited::new(request, Some(7));
    chunks.iter().all(|(content, last)| {
        let (content, last) = (content.clone(), *last);
        let chunk = Incoming::Chunk {
            cookie: 9,
            last,
            content,
        };
        awaited.accept(chunk, Mode::Structured).is_ok()
    })
}

#[test]
fn a_read_gets_all_it_asked_for_once_and_nothing_else() {
    let read = request(Command::Read, 1000, 100);
    let data = |offset, length_bytes| Content::Data {
        offset,
        length_bytes,
    };
    let hole = |offset, length_bytes| Content::Hole {
        offset,
        length_bytes,
    };
    for (sound, chunks) in [
        (true, vec![data(1000, 100)]),
        (true, vec![data(1050, 50), hole(1000, 50)]),
        (
            true,
            vec![
                data(1010, 10),
                data(1030, 70),
                data(1020, 10),
                hole(1000, 10),
            ],
        ),
        (false, vec![data(1000, 99)]),
        (false, vec![data(1001, 99)]),
        (false, vec![data(1000, 50), data(1051, 49)]),
        (false, vec![data(1000, 101)]),
        (false, vec![data(999, 101)]),
        (false, vec![data(0, 100)]),
        (false, vec![hole(1000, u32::MAX)]),
        (false, vec![hole(u64::MAX, 1)]),
        (false, vec![data(1000, 100), data(1000, 1)]),
        (false, vec![data(1000, 50), data(1049, 51)]),
        (false, vec![data(1020, 10), data(1040, 10), hole(1000, 100)]),
    ] {
        let chunks: Vec<_> = chunks.into_iter().map(|content| (content, false)).collect();
        let chunks = [chunks, vec![(Content::None, true)]].concat();
        assert_eq!(answered(read, &chunks), sound, "{chunks:?}");
    }
    assert!(answered(
        request(Command::Read, 1000, 0),
        &[(Content::None, true)]
    ));
    for other in [Command::Write, Command::Flush, Command::BlockStatus] {
        assert!(!answered(
            request(other, 1000, 100),
            &[(data(1000, 100), false)]
        ));
    }
}

#[test]
fn pieces_of_a_read_are_bounded() {
    let mut awaited = Awaited::new(request(Command::Read, 0, 1 << 20), None);
    let accepted = (0..10_000u64).take_while(|index| {
        let content = Content::Data {
            offset: index * 2,
            length_bytes: 1,
        };
        let chunk = Incoming::Chunk {
            cookie: 9,
            last: false,
            content,
        };
        awaited.accept(chunk, Mode::Structured).is_ok()
    });
    assert_eq!(accepted.count(), 4096);
}

#[test]
fn a_status_comes_once_and_of_the_context_that_was_asked_for() {
    let status = request(Command::BlockStatus, 0, 4096);
    let of = |context| Content::Status {
        context,
        payload_bytes: 8,
        wide: false,
    };
    assert!(answered(status, &[(of(7), true)]));
    assert!(answered(status, &[(of(7), false), (Content::None, true)]));
    assert!(!answered(status, &[(of(6), true)]));
    assert!(!answered(status, &[(of(7), false), (of(7), true)]));
    assert!(!answered(status, &[(Content::None, true)]));
    assert!(!answered(request(Command::Read, 0, 4096), &[(of(7), true)]));
    let simple = Incoming::Simple {
        cookie: 9,
        error: None,
    };
    for command in [Command::Read, Command::BlockStatus] {
        let mut awaited = Awaited::new(request(command, 0, 4096), Some(7));
        assert!(awaited.accept(simple.clone(), Mode::Structured).is_err());
    }
    let mut awaited = Awaited::new(request(Command::Write, 0, 4096), Some(7));
    assert_eq!(
        awaited.accept(simple, Mode::Structured),
        Ok((Follows::Nothing, true))
    );
}
