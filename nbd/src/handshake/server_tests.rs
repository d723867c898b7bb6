//! What a server answers to options, held against what qemu-storage-daemon 10.0 answers.

use super::option::{ContextQuery, ExportQuery, OptionReplyHead, put_option};
use super::server::{Security, ServerHandshake, Step};
use super::{BlockSizes, ContextKind, ExportDirectory, ExportFacts, Mode, Session};
use crate::constants::{OPTION_BYTES_READ_MAX, info, option, option_reply};

/// Two exports: `ro`, and `rw` with every context.
struct Exports;

impl ExportDirectory for Exports {
    fn list(&self) -> Vec<(String, Option<String>)> {
        vec![
            ("ro".to_owned(), Some("hello".to_owned())),
            ("rw".to_owned(), None),
        ]
    }

    fn find(&self, name: &str) -> Option<ExportFacts> {
        let writable = name == "rw";
        (writable || name == "ro").then(|| ExportFacts {
            length_bytes: 1 << 20,
            writable,
            multi_conn: true,
            description: (!writable).then(|| "hello".to_owned()),
            block_sizes: BlockSizes::of_node(if writable { 512 } else { 1 }, 0),
            allocation_depth: writable,
            dirty_bitmaps: if writable {
                vec!["b0".to_owned(), "b1".to_owned()]
            } else {
                Vec::new()
            },
        })
    }
}

/// A handshake whose greeting is over, with these flags from the client.
fn begun(security: Security, flags: u32) -> ServerHandshake {
    let mut server = ServerHandshake::new(security);
    assert_eq!(server.output(), b"NBDMAGICIHAVEOPT\x00\x03");
    assert_eq!(server.receive(&flags.to_be_bytes()), 4);
    server
}

/// Gives it bytes until it has taken all of them or the handshake is over.
fn feed(server: &mut ServerHandshake, mut bytes: &[u8]) -> Step {
    loop {
        let taken = server.receive(bytes);
        bytes = &bytes[taken..];
        match server.step(&Exports) {
            Step::More if bytes.is_empty() => return Step::More,
            Step::More => {}
            over => return over,
        }
    }
}

/// Replies in order: option, kind, payload.
fn replies(mut bytes: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let head = OptionReplyHead::parse(&bytes[..20]).expect("a reply");
        let end = 20 + head.payload_bytes as usize;
        found.push((head.option, head.kind, bytes[20..end].to_vec()));
        bytes = &bytes[end..];
    }
    found
}

fn ask(server: &mut ServerHandshake, kind: u32, payload: &[u8]) -> (Step, Vec<(u32, Vec<u8>)>) {
    let mut bytes = Vec::new();
    put_option(&mut bytes, kind, payload);
    let step = feed(server, &bytes);
    let answers = replies(&server.output());
    assert!(answers.iter().all(|(option, ..)| *option == kind));
    let answers = answers
        .into_iter()
        .map(|(_, kind, payload)| (kind, payload));
    (step, answers.collect())
}

/// The only answer is this error.
fn refused(server: &mut ServerHandshake, kind: u32, payload: &[u8], error: u32, text: &str) {
    let (step, answers) = ask(server, kind, payload);
    let texts: Vec<_> = answers
        .iter()
        .map(|(kind, payload)| (*kind, String::from_utf8_lossy(payload)))
        .collect();
    assert_eq!(texts, [(error, text.into())], "option {kind}");
    assert!(matches!(step, Step::More), "{step:?}");
}

fn acknowledged(server: &mut ServerHandshake, kind: u32, payload: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let (_, mut answers) = ask(server, kind, payload);
    assert_eq!(answers.pop(), Some((option_reply::ACK, Vec::new())));
    answers
}

fn export(name: &[u8], infos: &[u16]) -> Vec<u8> {
    let infos = infos.to_vec();
    ExportQuery { name, infos }.encode()
}

fn contexts(name: &[u8], queries: &[&str]) -> Vec<u8> {
    let queries = Some(queries.iter().map(|query| query.as_bytes()).collect());
    ContextQuery { name, queries }.encode()
}

fn go(server: &mut ServerHandshake, name: &[u8]) -> Session {
    match ask(server, option::GO, &export(name, &[])).0 {
        Step::Transmit(session) => *session,
        other => panic!("{other:?}"),
    }
}

#[test]
fn options_that_make_no_sense_get_an_error_and_the_next_one_is_heard() {
    let server = &mut begun(Security::Plain, 3);
    for unknown in [0, 4, 12, 99, u32::MAX] {
        let text = format!("Unsupported option {unknown} (<unknown>)");
        refused(server, unknown, b"whatever", option_reply::ERR_UNSUP, &text);
    }
    let invalid = option_reply::ERR_INVALID;
    let before = "request option 'set meta context' when structured reply is not negotiated";
    for (kind, payload, text) in [
        (
            option::LIST,
            &b"x"[..],
            "option 'list' has unexpected length",
        ),
        (
            option::STARTTLS,
            b"x",
            "option 'starttls' has unexpected length",
        ),
        (
            option::STRUCTURED_REPLY,
            b"x",
            "option 'structured reply' has unexpected length",
        ),
        (
            option::EXTENDED_HEADERS,
            b"x",
            "option 'extended headers' has unexpected length",
        ),
        (option::INFO, b"", "Inconsistent lengths in option info"),
        (option::INFO, b"abc", "Inconsistent lengths in option info"),
        (
            option::INFO,
            b"\0\0\0\x02ro",
            "Inconsistent lengths in option info",
        ),
        (
            option::GO,
            b"\0\0\0\x02ro\0\x02\0\x03",
            "Inconsistent lengths in option go",
        ),
        (
            option::GO,
            b"\0\0\0\x02ro\0\x01\0",
            "Inconsistent lengths in option go",
        ),
        (
            option::GO,
            b"\0\0\0\xc8ro\0\0",
            "Inconsistent lengths in option go",
        ),
        (
            option::GO,
            b"\xff\xff\xff\xffro\0\0",
            "Invalid name length: 4294967295",
        ),
        (
            option::INFO,
            b"\0\0\0\x02ro\0\0x",
            "option 'info' has unexpected length",
        ),
        (
            option::INFO,
            b"\0\0\0\x03a\0b\0\0",
            "Unexpected embedded NUL in option info",
        ),
        (
            option::LIST_META_CONTEXT,
            b"",
            "Inconsistent lengths in option list meta context",
        ),
        (
            option::LIST_META_CONTEXT,
            b"\0\0\0\x02r",
            "Inconsistent lengths in option list meta context",
        ),
        (
            option::LIST_META_CONTEXT,
            b"\0\0\0\x02rw\x80\0\0\0",
            "Inconsistent lengths in option list meta context",
        ),
        (
            option::SET_META_CONTEXT,
            b"\0\0\0\x02rw\0\0\0\x01\0\0\0\x04base",
            before,
        ),
    ] {
        refused(server, kind, payload, invalid, text);
    }
    refused(
        server,
        option::STARTTLS,
        b"",
        option_reply::ERR_POLICY,
        "TLS not configured",
    );
}

#[test]
fn a_name_is_quoted_up_to_80_bytes() {
    let server = &mut begun(Security::Plain, 3);
    let unknown = option_reply::ERR_UNKNOWN;
    for (name, quoted) in [
        ("nope".to_owned(), "nope".to_owned()),
        ("y".repeat(79), "y".repeat(79)),
        ("y".repeat(80), format!("{}...", "y".repeat(80))),
        ("y".repeat(4096), format!("{}...", "y".repeat(80))),
    ] {
        let text = format!("export '{quoted}' not present");
        refused(
            server,
            option::GO,
            &export(name.as_bytes(), &[]),
            unknown,
            &text,
        );
        refused(
            server,
            option::LIST_META_CONTEXT,
            &contexts(name.as_bytes(), &[]),
            unknown,
            &text,
        );
    }
    let text = "Invalid name length: 4097";
    refused(
        server,
        option::GO,
        &export(&[b'y'; 4097], &[]),
        option_reply::ERR_INVALID,
        text,
    );
    // Not a character, so it names nothing.
    let text = "export '\u{fffd}' not present";
    refused(server, option::GO, &export(b"\xff", &[]), unknown, text);
}

#[test]
fn the_list_has_names_and_descriptions() {
    let server = &mut begun(Security::Plain, 1);
    let listed = acknowledged(server, option::LIST, b"");
    assert_eq!(
        listed,
        [
            (option_reply::SERVER, b"\0\0\0\x02rohello".to_vec()),
            (option_reply::SERVER, b"\0\0\0\x02rw".to_vec()),
        ]
    );
}

#[test]
fn information_comes_in_qemus_order_and_block_sizes_have_to_be_asked_for() {
    let server = &mut begun(Security::Plain, 3);
    let piece = |bytes: &[u8]| (option_reply::INFO, bytes.to_vec());
    assert_eq!(
        acknowledged(server, option::INFO, &export(b"ro", &[9, info::NAME])),
        [
            piece(b"\0\x01ro"),
            piece(b"\0\x02hello"),
            piece(b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0"),
            piece(b"\0\0\0\0\0\0\0\x10\0\0\x05\x0f"),
        ]
    );
    let (_, answers) = ask(server, option::INFO, &export(b"rw", &[]));
    assert_eq!(
        answers,
        [
            piece(b"\0\x03\0\0\x02\0\0\0\x10\0\x02\0\0\0"),
            piece(b"\0\0\0\0\0\0\0\x10\0\0\x0d\x6d"),
            (
                option_reply::ERR_BLOCK_SIZE_REQD,
                b"request NBD_INFO_BLOCK_SIZE to use this export".to_vec()
            ),
        ]
    );
    acknowledged(server, option::INFO, &export(b"rw", &[info::BLOCK_SIZE]));
    assert_eq!(
        acknowledged(server, option::GO, &export(b"rw", &[])),
        [
            piece(b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0"),
            piece(b"\0\0\0\0\0\0\0\x10\0\0\x0d\x6d"),
        ]
    );
}

#[test]
fn flags_say_what_qemus_say() {
    for (name, set, mode, expected) in [
        (&b"ro"[..], &[][..], Mode::Simple, 0x050f),
        (b"rw", &[], Mode::Simple, 0x0d6d),
        (b"ro", &[], Mode::Structured, 0x058f),
        (b"ro", &[], Mode::Extended, 0x058f),
        (b"rw", &[], Mode::Extended, 0x0ded),
        (b"ro", &["base:allocation"], Mode::Extended, 0x158f),
        (b"rw", &["base:allocation"], Mode::Extended, 0x1ded),
        (b"rw", &["base:allocation"], Mode::Structured, 0x0ded),
    ] {
        let server = &mut begun(Security::Plain, 3);
        if mode >= Mode::Structured {
            acknowledged(server, option::STRUCTURED_REPLY, b"");
            acknowledged(server, option::SET_META_CONTEXT, &contexts(name, set));
        }
        if mode == Mode::Extended {
            acknowledged(server, option::EXTENDED_HEADERS, b"");
        }
        let session = go(server, name);
        assert_eq!(session.flags, expected, "{name:?} {set:?} {mode:?}");
        assert_eq!(session.mode, mode);
    }
}

#[test]
fn replies_in_chunks_and_long_headers_are_agreed_on_once() {
    let server = &mut begun(Security::Plain, 3);
    let invalid = option_reply::ERR_INVALID;
    acknowledged(server, option::STRUCTURED_REPLY, b"");
    let text = "structured reply already negotiated";
    refused(server, option::STRUCTURED_REPLY, b"", invalid, text);
    acknowledged(server, option::EXTENDED_HEADERS, b"");
    let text = "extended headers already negotiated";
    refused(server, option::EXTENDED_HEADERS, b"", invalid, text);
    let needed = option_reply::ERR_EXT_HEADER_REQD;
    refused(server, option::STRUCTURED_REPLY, b"", needed, text);
    let (step, answers) = ask(server, option::EXPORT_NAME, b"rw");
    assert!(matches!(step, Step::Close) && answers.is_empty());
}

#[test]
fn contexts_are_listed_by_beginning_and_chosen_by_name() {
    let all = [
        "base:allocation",
        "qemu:allocation-depth",
        "qemu:dirty-bitmap:b0",
        "qemu:dirty-bitmap:b1",
    ];
    let bitmaps = &all[2..];
    let server = &mut begun(Security::Plain, 3);
    acknowledged(server, option::STRUCTURED_REPLY, b"");
    let too_long = "q".repeat(5000);
    let table: [(&[&str], &[&str], &[&str]); 12] = [
        // Queries, what is listed, what is chosen.
        (&["base:"], &all[..1], &[]),
        (&["qemu:"], &all[1..], &[]),
        (&["qemu:dirty-bitmap:"], bitmaps, &[]),
        (&["qemu:alloc"], &[], &[]),
        (&["qemu:allocation-depth"], &all[1..2], &all[1..2]),
        (&["qemu:dirty-bitmap:b0"], &all[2..3], &all[2..3]),
        (&["qemu:dirty-bitmap:b0x", "qemu:dirty-bitmap"], &[], &[]),
        (&["base:x", "x:y", "", "base"], &[], &[]),
        (
            &["base:allocation", "base:allocation"],
            &all[..1],
            &all[..1],
        ),
        (&[all[3], all[2], all[1], all[0]], &all, &all),
        (&[&too_long, "base:allocation"], &all[..1], &all[..1]),
        (&["qemu:", "base:allocation"], &all, &all[..1]),
    ];
    for (queries, listed, chosen) in table {
        let entries = acknowledged(server, option::LIST_META_CONTEXT, &contexts(b"rw", queries));
        let names: Vec<_> = entries.iter().map(|(_, entry)| &entry[4..]).collect();
        assert_eq!(
            names,
            listed
                .iter()
                .map(|name| name.as_bytes())
                .collect::<Vec<_>>()
        );
        assert!(entries.iter().all(|(_, entry)| entry.starts_with(&[0; 4])));
        let entries = acknowledged(server, option::SET_META_CONTEXT, &contexts(b"rw", queries));
        let expected: Vec<_> = (0u32..)
            .zip(all)
            .filter(|(_, name)| chosen.contains(name))
            .map(|(id, name)| [&id.to_be_bytes(), name.as_bytes()].concat())
            .collect();
        let entries: Vec<_> = entries.into_iter().map(|(_, entry)| entry).collect();
        assert_eq!(entries, expected, "{queries:?}");
    }
    let none = ContextQuery {
        name: b"rw",
        queries: None,
    }
    .encode();
    let listed = acknowledged(server, option::LIST_META_CONTEXT, &none);
    assert_eq!(listed.len(), all.len());
    assert_eq!(acknowledged(server, option::SET_META_CONTEXT, &none), []);
}

#[test]
fn contexts_hold_for_the_export_they_were_chosen_for_until_something_else_is_chosen() {
    let name = ["base:allocation"];
    for (then, exported, left) in [
        (None, b"rw", true),
        (None, b"ro", false),
        (Some((option::INFO, export(b"ro", &[]))), b"rw", true),
        (
            Some((option::LIST_META_CONTEXT, contexts(b"ro", &[]))),
            b"rw",
            true,
        ),
        (
            Some((option::SET_META_CONTEXT, contexts(b"nope", &name))),
            b"rw",
            false,
        ),
        (
            Some((option::SET_META_CONTEXT, b"rubbish".to_vec())),
            b"rw",
            false,
        ),
        (
            Some((option::SET_META_CONTEXT, vec![0; 300 << 10])),
            b"rw",
            false,
        ),
        (
            Some((option::SET_META_CONTEXT, contexts(b"ro", &name))),
            b"rw",
            false,
        ),
        (
            Some((option::SET_META_CONTEXT, contexts(b"ro", &name))),
            b"ro",
            true,
        ),
    ] {
        let server = &mut begun(Security::Plain, 3);
        acknowledged(server, option::STRUCTURED_REPLY, b"");
        acknowledged(server, option::SET_META_CONTEXT, &contexts(b"rw", &name));
        if let Some((option, payload)) = &then {
            ask(server, *option, payload);
        }
        let session = go(server, exported);
        let kinds: Vec<_> = session
            .contexts
            .iter()
            .map(|context| &context.kind)
            .collect();
        let expected: &[_] = if left {
            &[&ContextKind::Allocation]
        } else {
            &[]
        };
        assert_eq!(kinds, expected, "{then:?} {exported:?}");
    }
}

#[test]
fn an_export_named_the_old_way_is_sent_with_or_without_zeroes() {
    for (flags, zeroes) in [(0, 124), (1, 124), (2, 0), (3, 0)] {
        let server = &mut begun(Security::Plain, flags);
        let mut bytes = Vec::new();
        put_option(&mut bytes, option::EXPORT_NAME, b"ro");
        let step = feed(server, &bytes);
        assert!(matches!(step, Step::Transmit(_)), "{step:?}");
        let mut expected = b"\0\0\0\0\0\x10\0\0\x05\x0f".to_vec();
        expected.extend(vec![0; zeroes]);
        assert_eq!(server.output(), expected);
    }
    for name in [&b"nope"[..], b"", b"\xff", &[b'n'; 4096], &[b'n'; 4097]] {
        let (step, answers) = ask(&mut begun(Security::Plain, 3), option::EXPORT_NAME, name);
        assert!(matches!(step, Step::Close) && answers.is_empty());
    }
}

#[test]
fn whoever_breaks_the_rules_is_shown_the_door() {
    for flags in [4, 0x1_0003, u32::MAX] {
        assert!(matches!(
            feed(&mut begun(Security::Plain, flags), b""),
            Step::Close
        ));
    }
    // Options of fixed newstyle from a client that has not said that it knows them.
    for flags in [0, 2] {
        let (step, answers) = ask(&mut begun(Security::Plain, flags), option::LIST, b"");
        assert!(matches!(step, Step::Close) && answers.is_empty());
    }
    let step = feed(
        &mut begun(Security::Plain, 3),
        b"IHAVEOPX\0\0\0\x03\0\0\0\0",
    );
    assert!(matches!(step, Step::Close));
    for declared in [OPTION_BYTES_READ_MAX + 1, u32::MAX] {
        let head = [&b"IHAVEOPT\0\0\0\x63"[..], &declared.to_be_bytes()].concat();
        assert!(matches!(
            feed(&mut begun(Security::Plain, 3), &head),
            Step::Close
        ));
    }
    for payload in [&b""[..], b"xyz"] {
        let server = &mut begun(Security::Plain, 3);
        let (step, answers) = ask(server, option::ABORT, payload);
        assert_eq!(answers, [(option_reply::ACK, Vec::new())]);
        assert!(matches!(step, Step::Close));
        assert_eq!(server.receive(b"more"), 0);
        assert!(matches!(server.step(&Exports), Step::Close));
    }
}

#[test]
fn a_long_payload_is_dropped_as_it_comes() {
    let server = &mut begun(Security::Plain, 3);
    let long = vec![7; 1 << 20];
    let text = "Unsupported option 99 (<unknown>)";
    refused(server, 99, &long, option_reply::ERR_UNSUP, text);
    let text = "option 'go' is too long";
    refused(server, option::GO, &long, option_reply::ERR_TOO_BIG, text);
    acknowledged(server, option::LIST, b"");
}

#[test]
fn nothing_is_told_before_tls_and_nothing_survives_it() {
    let server = &mut begun(Security::TlsRequired, 3);
    for (kind, text) in [
        (option::LIST, "Option 0x3 not permitted before TLS"),
        (option::GO, "Option 0x7 not permitted before TLS"),
        (
            option::STRUCTURED_REPLY,
            "Option 0x8 not permitted before TLS",
        ),
        (99, "Option 0x63 not permitted before TLS"),
    ] {
        refused(server, kind, b"zz", option_reply::ERR_TLS_REQD, text);
    }
    let (step, answers) = ask(server, option::STARTTLS, b"");
    assert!(matches!(step, Step::StartTls));
    assert_eq!(answers, [(option_reply::ACK, Vec::new())]);
    assert!(matches!(server.tls_started(b""), Step::More));
    let text = "TLS already enabled";
    refused(
        server,
        option::STARTTLS,
        b"",
        option_reply::ERR_INVALID,
        text,
    );
    assert_eq!(go(server, b"rw").mode, Mode::Simple);

    for name in [option::EXPORT_NAME, option::ABORT] {
        let (step, _) = ask(&mut begun(Security::TlsRequired, 3), name, b"");
        assert!(matches!(step, Step::Close), "{name}");
    }
}

#[test]
fn bytes_between_starttls_and_tls_end_the_connection() {
    let server = &mut begun(Security::TlsRequired, 3);
    let mut bytes = Vec::new();
    put_option(&mut bytes, option::STARTTLS, b"");
    put_option(&mut bytes, option::STRUCTURED_REPLY, b"");
    server.step(&Exports);
    let mut rest = &bytes[..];
    while !matches!(server.step(&Exports), Step::StartTls) {
        rest = &rest[server.receive(rest)..];
    }
    assert_eq!(rest.len(), 16, "what is behind the option is not taken");
    assert!(matches!(server.tls_started(rest), Step::Close));
    assert_eq!(server.receive(rest), 0);
}
