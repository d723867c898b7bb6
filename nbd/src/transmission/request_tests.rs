//! Requests that are refused, with which error and text, held against qemu-storage-daemon 10.0; and what replies look like.

use super::reply::Reply;
use super::request::{Command, Request};
use super::{Extent, StatusExtents, StatusQuery};
use crate::constants::command_flags as flags;
use crate::errors::NbdError;
use crate::handshake::{BlockSizes, ContextKind, ExportFacts, MetaContext, Mode, Session};

const MIB: u64 = 1 << 20;
const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

fn session(mode: Mode, writable: bool) -> Session {
    let facts = ExportFacts {
        length_bytes: MIB,
        writable,
        multi_conn: true,
        description: None,
        block_sizes: BlockSizes::of_node(1, 0),
        allocation_depth: true,
        dirty_bitmaps: vec!["b".to_owned()],
    };
    Session {
        export_name: "e".to_owned(),
        flags: facts.transmission_flags(mode, true),
        contexts: if mode >= Mode::Structured {
            facts.contexts()
        } else {
            Vec::new()
        },
        facts,
        mode,
    }
}

fn request(command: Command, offset: u64, length_bytes: u64, flags: u16) -> Request {
    Request {
        cookie: 0x1122_3344_5566_7788,
        command,
        flags,
        offset,
        length_bytes,
        payload_bytes: if command == Command::Write {
            length_bytes
        } else {
            0
        },
    }
}

#[test]
fn heads_are_read_back_as_they_were_put() {
    for mode in MODES {
        for number in 0..=9 {
            let command = Command::of_number(number);
            let request = request(command, 1 << 40, 4096, flags::FUA);
            let mut bytes = Vec::new();
            request.put_head(mode, &mut bytes);
            assert_eq!(bytes.len(), Request::head_bytes(mode));
            for end in 0..bytes.len() {
                assert_eq!(Request::parse(mode, &bytes[..end]), Ok(None));
            }
            let parsed = Request::parse(mode, &bytes).expect("valid").expect("whole");
            let counted = mode == Mode::Extended && command == Command::Write;
            let flags = if counted { flags::PAYLOAD_LEN } else { 0 } | request.flags;
            assert_eq!(parsed, Request { flags, ..request });
        }
    }
}

#[test]
fn another_magic_is_a_violation_as_soon_as_it_is_there() {
    for mode in MODES {
        let other = if mode == Mode::Extended {
            Mode::Simple
        } else {
            Mode::Extended
        };
        let mut bytes = Vec::new();
        request(Command::Read, 0, 1, 0).put_head(other, &mut bytes);
        assert!(Request::parse(mode, &bytes[..4]).is_err());
    }
    let error = Request::parse(Mode::Structured, &[0; 28]).expect_err("no request");
    assert_eq!(error.text, "invalid magic (got 0x0, expected 0x25609513)");
}

#[test]
fn requests_that_cannot_be_meant_are_refused_as_by_qemu() {
    use Command as C;
    use NbdError::{Invalid, NoSpace, NotPermitted};
    let large = (32 << 20) + 1;
    type Row = (Command, u64, u64, u16, Option<(NbdError, &'static str)>);
    let table: &[Row] = &[
        (C::Read, 0, 16, 0, None),
        (C::Read, 0, 0, 0, None),
        (C::Read, MIB, 0, 0, None),
        (
            C::Read,
            MIB - 8,
            16,
            0,
            Some((
                Invalid,
                "operation past EOF; From: 1048568, Len: 16, Size: 1048576",
            )),
        ),
        (
            C::Read,
            u64::MAX - 7,
            16,
            0,
            Some((
                Invalid,
                "operation past EOF; From: 18446744073709551608, Len: 16, Size: 1048576",
            )),
        ),
        (
            C::Read,
            0,
            large,
            0,
            Some((Invalid, "len (33554433) is larger than max len (33554432)")),
        ),
        (C::Read, 0, 16, flags::FUA, None),
        (C::Read, 0, 16, flags::DF, None),
        (
            C::Read,
            0,
            16,
            2,
            Some((Invalid, "unsupported flags for command read (got 0x2)")),
        ),
        (
            C::Read,
            0,
            16,
            0x8000,
            Some((Invalid, "unsupported flags for command read (got 0x8000)")),
        ),
        (C::Write, 0, 512, flags::FUA, None),
        (
            C::Write,
            MIB - 256,
            512,
            0,
            Some((
                NoSpace,
                "operation past EOF; From: 1048320, Len: 512, Size: 1048576",
            )),
        ),
        (
            C::Write,
            0,
            512,
            2,
            Some((Invalid, "unsupported flags for command write (got 0x2)")),
        ),
        (C::WriteZeroes, 0, 512, 19, None),
        (
            C::WriteZeroes,
            0,
            512,
            4,
            Some((
                Invalid,
                "unsupported flags for command write zeroes (got 0x4)",
            )),
        ),
        (
            C::WriteZeroes,
            MIB,
            512,
            0,
            Some((
                NoSpace,
                "operation past EOF; From: 1048576, Len: 512, Size: 1048576",
            )),
        ),
        (C::Trim, 0, 512, flags::FUA, None),
        (
            C::Trim,
            0,
            512,
            2,
            Some((Invalid, "unsupported flags for command trim (got 0x2)")),
        ),
        (
            C::Trim,
            MIB - 256,
            512,
            0,
            Some((
                Invalid,
                "operation past EOF; From: 1048320, Len: 512, Size: 1048576",
            )),
        ),
        (C::Flush, 0, 0, flags::FUA, None),
        (
            C::Flush,
            0,
            0,
            2,
            Some((Invalid, "unsupported flags for command flush (got 0x2)")),
        ),
        (C::Cache, 0, 512, 0, None),
        (
            C::Cache,
            0,
            large,
            0,
            Some((Invalid, "len (33554433) is larger than max len (33554432)")),
        ),
        (
            C::Unknown(8),
            0,
            0,
            0,
            Some((Invalid, "invalid request type (8) received")),
        ),
        (
            C::Unknown(100),
            0,
            512,
            1,
            Some((Invalid, "invalid request type (100) received")),
        ),
        (
            C::Unknown(100),
            0,
            512,
            2,
            Some((Invalid, "unsupported flags for command <unknown> (got 0x2)")),
        ),
        (C::BlockStatus, 0, MIB, flags::REQ_ONE, None),
        (
            C::BlockStatus,
            0,
            0,
            0,
            Some((Invalid, "need non-zero length")),
        ),
        (
            C::BlockStatus,
            0,
            MIB,
            4,
            Some((
                Invalid,
                "unsupported flags for command block status (got 0x4)",
            )),
        ),
        (
            C::BlockStatus,
            MIB - 512,
            1024,
            0,
            Some((
                Invalid,
                "operation past EOF; From: 1048064, Len: 1024, Size: 1048576",
            )),
        ),
    ];
    for (command, offset, length, flags, expected) in table {
        for mode in [Mode::Structured, Mode::Extended] {
            let checked = request(*command, *offset, *length, *flags).check(&session(mode, true));
            let found = checked.as_ref().err();
            let found = found.map(|refusal| (refusal.error, refusal.text.as_str()));
            assert_eq!(found, *expected, "{command:?} {offset} {length} {flags:#x}");
        }
    }
    let checked = request(C::Read, 0, 16, flags::DF).check(&session(Mode::Simple, true));
    assert_eq!(checked.expect_err("not without chunks").error, Invalid);
    for command in [C::Write, C::WriteZeroes, C::Trim] {
        for offset in [0, 2 * MIB] {
            let checked = request(command, offset, 512, 0).check(&session(Mode::Simple, false));
            let refusal = checked.expect_err("read-only");
            assert_eq!(
                (refusal.error, refusal.text.as_str()),
                (NotPermitted, "Export is read-only")
            );
        }
    }
    let mut bare = session(Mode::Structured, true);
    bare.contexts.clear();
    let refusal = request(C::BlockStatus, 0, 512, 0)
        .check(&bare)
        .expect_err("no context");
    assert_eq!(refusal.text, "CMD_BLOCK_STATUS not negotiated");
}

#[test]
fn only_a_payload_that_nobody_would_read_closes_the_connection() {
    for mode in MODES {
        let writable = session(mode, true);
        let closes = |length| {
            request(Command::Write, 0, length, 0)
                .check(&writable)
                .expect_err("beyond the end")
                .closes
        };
        assert!(!closes(32 << 20));
        assert!(closes((32 << 20) + 1));
        let read = request(Command::Read, 0, 1 << 31, 0).check(&writable);
        assert!(!read.expect_err("too long").closes);
    }
    let flush = Request {
        payload_bytes: 1 << 40,
        ..request(Command::Flush, 0, 1 << 40, flags::PAYLOAD_LEN)
    };
    assert!(
        flush
            .check(&session(Mode::Extended, true))
            .expect_err("too long")
            .closes
    );
}

/// Payload of a status request.
fn status_payload(length_bytes: u64, contexts: &[u32]) -> Vec<u8> {
    let ids = contexts.iter().flat_map(|id| id.to_be_bytes());
    length_bytes.to_be_bytes().into_iter().chain(ids).collect()
}

#[test]
fn a_status_request_may_name_its_contexts() {
    let session = session(Mode::Extended, true);
    let not_valid = "CMD_BLOCK_STATUS payload not valid";
    for (payload, expected) in [
        (status_payload(MIB, &[0]), Ok(vec![0])),
        (status_payload(MIB, &[2, 1]), Ok(vec![2, 1])),
        (status_payload(MIB, &[]), Err(not_valid)),
        (status_payload(MIB, &[9]), Err(not_valid)),
        (status_payload(MIB, &[0, 0]), Err(not_valid)),
        (status_payload(MIB, &[0, 1, 2, 0]), Err(not_valid)),
        (status_payload(0, &[0]), Err("need non-zero length")),
        (
            status_payload(2 * MIB, &[0]),
            Err("operation past EOF; From: 0, Len: 2097152, Size: 1048576"),
        ),
        (b"abcd".to_vec(), Err(not_valid)),
        (status_payload(MIB, &[0])[..11].to_vec(), Err(not_valid)),
    ] {
        let request = Request {
            payload_bytes: payload.len() as u64,
            ..request(
                Command::BlockStatus,
                0,
                payload.len() as u64,
                flags::PAYLOAD_LEN,
            )
        };
        let found = request
            .check(&session)
            .and_then(|()| StatusQuery::parse(&request, &payload, &session))
            .map(|query| {
                query
                    .contexts
                    .iter()
                    .map(|context| context.id)
                    .collect::<Vec<_>>()
            })
            .map_err(|refusal| refusal.text);
        assert_eq!(found, expected.map_err(str::to_owned), "{payload:?}");
    }
    let plain = request(Command::BlockStatus, 0, 4096, 0);
    let query = StatusQuery::parse(&plain, b"", &session).expect("every context");
    assert_eq!(
        (query.length_bytes, query.contexts),
        (4096, session.contexts)
    );
}

#[test]
fn extents_are_joined_and_end_where_the_request_ends() {
    let status = |mode, flags, length: u64, extents: &[(u64, u32)]| {
        let request = request(Command::BlockStatus, 0, length, flags);
        let mut gathered = StatusExtents::new(mode, &request, length);
        let mut more = true;
        for (length_bytes, status) in extents {
            more = gathered.add(Extent {
                length_bytes: *length_bytes,
                status: *status,
            });
            if !more {
                break;
            }
        }
        let found: Vec<_> = gathered
            .extents()
            .iter()
            .map(|extent| (extent.length_bytes, extent.status))
            .collect();
        (found, more)
    };
    let three = [(4096, 0), (4096, 0), (4096, 3), (9000, 1)];
    assert_eq!(
        status(Mode::Structured, 0, 1 << 20, &three),
        (vec![(8192, 0), (4096, 3), (9000, 1)], true)
    );
    assert_eq!(
        status(Mode::Structured, 0, 10000, &three),
        (vec![(8192, 0), (1808, 3)], false)
    );
    assert_eq!(
        status(Mode::Structured, flags::REQ_ONE, 1 << 20, &three),
        (vec![(8192, 0)], false)
    );
    // What 32 bits cannot say is said in parts.
    let long = [(10 << 30, 3)];
    let part = 0xffff_0000;
    assert_eq!(
        status(Mode::Structured, 0, 10 << 30, &long),
        (
            vec![(part, 3), (part, 3), ((10 << 30) - 2 * part, 3)],
            false
        )
    );
    assert_eq!(
        status(Mode::Structured, flags::REQ_ONE, 10 << 30, &long),
        (vec![(part, 3)], false)
    );
    assert_eq!(
        status(Mode::Extended, 0, 1 << 50, &[(1 << 60, 3)]),
        (vec![(1 << 50, 3)], false)
    );
}

#[test]
fn no_more_extents_are_gathered_than_a_reply_may_have() {
    let request = request(Command::BlockStatus, 0, u64::MAX, 0);
    let mut gathered = StatusExtents::new(Mode::Extended, &request, u64::MAX);
    let mut count = 0u32;
    while gathered.add(Extent {
        length_bytes: 512,
        status: count % 2,
    }) {
        count += 1;
    }
    assert_eq!(gathered.extents().len(), 131_072);
    assert_eq!(gathered.left_bytes(), u64::MAX - 131_072 * 512);
}

#[test]
fn replies_are_qemus_byte_by_byte() {
    let read = request(Command::Read, 0xffff8, 16, 0);
    let of = |mode, build: &dyn Fn(&Reply, &mut Vec<u8>)| {
        let mut out = Vec::new();
        build(&Reply::to(&read, mode), &mut out);
        out.iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let cookie = "1122334455667788";
    let offset = "00000000000ffff8";
    let simple = |error| format!("67446698{error:08x}{cookie}");
    let structured = |flags, kind, length, payload: &str| {
        format!("668e33ef{flags:04x}{kind:04x}{cookie}{length:08x}{payload}")
    };
    let extended = |flags, kind, length, payload: &str| {
        format!("6e8a278c{flags:04x}{kind:04x}{cookie}{offset}{length:016x}{payload}")
    };
    for mode in [Mode::Simple, Mode::Structured] {
        assert_eq!(of(mode, &|reply, out| reply.done(out)), simple(0));
    }
    assert_eq!(
        of(Mode::Extended, &|reply, out| reply.done(out)),
        extended(1, 0, 0, "")
    );
    let failed = |reply: &Reply, out: &mut Vec<u8>| reply.error(NbdError::Invalid, "no", out);
    assert_eq!(of(Mode::Simple, &failed), simple(22));
    assert_eq!(
        of(Mode::Structured, &failed),
        structured(1, 0x8001, 8, "0000001600026e6f")
    );
    assert_eq!(
        of(Mode::Extended, &failed),
        extended(1, 0x8001, 8, "0000001600026e6f")
    );
    let data = |reply: &Reply, out: &mut Vec<u8>| reply.data(0xffff8, 16, true, out);
    assert_eq!(of(Mode::Simple, &data), simple(0));
    assert_eq!(of(Mode::Structured, &data), structured(1, 1, 24, offset));
    assert_eq!(of(Mode::Extended, &data), extended(1, 1, 24, offset));
    let hole = |reply: &Reply, out: &mut Vec<u8>| reply.hole(0xffff8, 16, false, out);
    assert_eq!(
        of(Mode::Structured, &hole),
        structured(0, 2, 12, &format!("{offset}00000010"))
    );
    let error_at = |reply: &Reply, out: &mut Vec<u8>| {
        reply.error_at(NbdError::Io, "no", 0xffff8, false, out);
    };
    assert_eq!(
        of(Mode::Structured, &error_at),
        structured(0, 0x8002, 16, &format!("0000000500026e6f{offset}"))
    );
    let status = |mode| {
        of(mode, &|reply, out| {
            let mut extents = StatusExtents::new(mode, &read, MIB);
            extents.add(Extent {
                length_bytes: 0x10000,
                status: 0,
            });
            extents.add(Extent {
                length_bytes: 0xf0000,
                status: 3,
            });
            reply.status(2, &extents, true, out);
        })
    };
    assert_eq!(
        status(Mode::Structured),
        structured(1, 5, 20, "000000020001000000000000000f000000000003")
    );
    assert_eq!(
        status(Mode::Extended),
        extended(
            1,
            6,
            40,
            "00000002000000020000000000010000000000000000000000000000000f00000000000000000003"
        )
    );
}

#[test]
fn a_long_message_is_cut_between_characters() {
    let mut out = Vec::new();
    let reply = Reply::to(&request(Command::Read, 0, 1, 0), Mode::Structured);
    reply.error(NbdError::Io, &"ä".repeat(4000), &mut out);
    assert_eq!(out.len(), 20 + 6 + 4096);
    out.clear();
    reply.error(NbdError::Io, &format!("x{}", "ä".repeat(4000)), &mut out);
    assert_eq!(out.len(), 20 + 6 + 4095);
}

#[test]
fn contexts_have_qemus_names_and_ids() {
    let found: Vec<_> = session(Mode::Structured, true)
        .contexts
        .iter()
        .map(|MetaContext { id, kind }| (*id, kind.name()))
        .collect();
    let expected = [
        (0, "base:allocation"),
        (1, "qemu:allocation-depth"),
        (2, "qemu:dirty-bitmap:b"),
    ];
    assert_eq!(found, expected.map(|(id, name)| (id, name.to_owned())));
    assert_eq!(
        ContextKind::DirtyBitmap(String::new()).name(),
        "qemu:dirty-bitmap:"
    );
}
