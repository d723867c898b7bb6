//! A client against servers that know less than it asks for, refuse, or lie.

use super::client::{Agreement, ClientHandshake, HandshakeError, Step, Wishes};
use super::info::{Info, context_entry};
use super::option::{OPTION_HEAD_BYTES, OptionHead, put_option_reply};
use super::{BlockSizes, Mode};
use crate::constants::{option, option_reply};

fn wishes() -> Wishes {
    Wishes {
        export_name: "disk".to_owned(),
        context: "base:allocation".to_owned(),
        tls: false,
        mode_max: Mode::Extended,
    }
}

/// What a server says to an option: kind and payload of each reply.
type Answers = Vec<(u32, Vec<u8>)>;

/// Lets a client talk to a server that greets with `flags` and answers as told. Which options came, and the end.
fn talk(
    wishes: Wishes,
    flags: u16,
    answer: &dyn Fn(u32) -> Answers,
) -> (Vec<u32>, Result<Step, HandshakeError>) {
    let mut client = ClientHandshake::new(wishes);
    let mut options = Vec::new();
    let mut incoming = b"NBDMAGICIHAVEOPT".to_vec();
    incoming.extend(flags.to_be_bytes());
    let mut greeted = false;
    loop {
        let taken = client.receive(&incoming);
        incoming.drain(..taken);
        match client.step() {
            Ok(Step::More) => {}
            over => return (options, over),
        }
        let mut output = client.output();
        if !greeted && !output.is_empty() {
            output.drain(..4);
            greeted = true;
        }
        while !output.is_empty() {
            let head = OptionHead::parse(&output[..OPTION_HEAD_BYTES]).expect("an option");
            output.drain(..OPTION_HEAD_BYTES + head.payload_bytes as usize);
            options.push(head.option);
            if head.option == option::EXPORT_NAME {
                incoming.extend(1000u64.to_be_bytes());
                incoming.extend(1u16.to_be_bytes());
                incoming.extend([0; 124]);
                continue;
            }
            for (kind, payload) in answer(head.option) {
                put_option_reply(&mut incoming, head.option, kind, &payload);
            }
        }
        assert!(
            !incoming.is_empty(),
            "waits for a server that has nothing to say"
        );
    }
}

/// What a server that knows everything says.
fn knows_everything(kind: u32) -> Answers {
    let mut answers = match kind {
        option::SET_META_CONTEXT => vec![(
            option_reply::META_CONTEXT,
            context_entry(7, "base:allocation"),
        )],
        option::GO => vec![
            info(Info::Other(77)),
            info(Info::Name(b"disk".to_vec())),
            info(Info::BlockSizes(sizes(512, 4096, 1 << 20))),
            info(export(1 << 30)),
        ],
        _ => Vec::new(),
    };
    answers.push((option_reply::ACK, Vec::new()));
    answers
}

fn info(info: Info) -> (u32, Vec<u8>) {
    (option_reply::INFO, info.encode())
}

fn export(length_bytes: u64) -> Info {
    Info::Export {
        length_bytes,
        flags: 0x0ded,
    }
}

fn sizes(minimum: u32, preferred: u32, maximum: u32) -> BlockSizes {
    BlockSizes {
        minimum,
        preferred,
        maximum,
    }
}

fn agreed(end: Result<Step, HandshakeError>) -> Agreement {
    match end {
        Ok(Step::Transmit(agreement)) => *agreement,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_most_is_asked_for_and_taken() {
    let (options, end) = talk(wishes(), 3, &knows_everything);
    let expected = [
        option::EXTENDED_HEADERS,
        option::SET_META_CONTEXT,
        option::GO,
    ];
    assert_eq!(options, expected);
    let expected = Agreement {
        mode: Mode::Extended,
        length_bytes: 1 << 30,
        flags: 0x0ded,
        block_sizes: Some(sizes(512, 4096, 1 << 20)),
        context: Some(7),
    };
    assert_eq!(agreed(end), expected);
}

#[test]
fn what_a_server_does_not_know_is_done_without() {
    let unsupported = || vec![(option_reply::ERR_UNSUP, Vec::new())];
    let all = [
        option::EXTENDED_HEADERS,
        option::STRUCTURED_REPLY,
        option::SET_META_CONTEXT,
        option::GO,
    ];
    for known in 0..16u8 {
        let knows = |kind: u32| {
            let index = all.iter().position(|option| *option == kind);
            index.is_some_and(|index| known & (1 << index) != 0)
        };
        // Nobody has written a server with extended headers and without GO.
        if knows(option::EXTENDED_HEADERS) && !knows(option::GO) {
            continue;
        }
        let (options, end) = talk(wishes(), 3, &|kind| match knows(kind) {
            true => knows_everything(kind),
            false => unsupported(),
        });
        let mode = match (knows(all[0]), knows(all[1])) {
            (true, _) => Mode::Extended,
            (false, true) => Mode::Structured,
            (false, false) => Mode::Simple,
        };
        let agreement = agreed(end);
        assert_eq!(agreement.mode, mode, "{options:?}");
        let context = knows(option::SET_META_CONTEXT) && mode > Mode::Simple;
        assert_eq!(agreement.context, context.then_some(7));
        let named = options.last() == Some(&option::EXPORT_NAME);
        assert_eq!(named, !knows(option::GO));
        assert_eq!(agreement.length_bytes, if named { 1000 } else { 1 << 30 });
    }
}

#[test]
fn a_server_without_options_is_named_an_export_and_needs_zeroes() {
    for flags in [0, 2] {
        let mut client = ClientHandshake::new(wishes());
        let greeting = [&b"NBDMAGICIHAVEOPT"[..], &[0, flags]].concat();
        assert_eq!(client.receive(&greeting), 16);
        assert!(matches!(client.step(), Ok(Step::More)));
        assert_eq!(client.receive(&greeting[16..]), 2);
        assert!(matches!(client.step(), Ok(Step::More)));
        let answer = [&[0, 0, 0, flags][..], b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk"].concat();
        assert_eq!(client.output(), answer);
        let mut reply = [&1000u64.to_be_bytes()[..], &[0, 1]].concat();
        reply.extend(vec![0; if flags == 2 { 0 } else { 124 }]);
        assert_eq!(client.receive(&reply), reply.len());
        let agreement = agreed(client.step());
        assert_eq!((agreement.length_bytes, agreement.flags), (1000, 1));
    }
}

#[test]
fn an_oldstyle_server_has_one_export_without_a_name() {
    let mut greeting = b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53".to_vec();
    greeting.extend([0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3]);
    greeting.extend([0; 124]);
    let run = |wishes| {
        let mut client = ClientHandshake::new(wishes);
        let mut rest = &greeting[..];
        loop {
            rest = &rest[client.receive(rest)..];
            match client.step() {
                Ok(Step::More) => {}
                over => return over,
            }
        }
    };
    let refusal = run(wishes()).expect_err("has no names").to_string();
    assert_eq!(refusal, "Server does not support non-empty export names");
    let unnamed = Wishes {
        export_name: String::new(),
        ..wishes()
    };
    let agreement = agreed(run(unnamed.clone()));
    assert_eq!((agreement.length_bytes, agreement.flags), (512, 3));
    greeting[24] = 1;
    let mut client = ClientHandshake::new(unnamed);
    client.receive(&greeting);
    assert!(matches!(client.step(), Ok(Step::More)));
    client.receive(&greeting[16..]);
    assert!(client.step().is_err(), "flags of another world");
}

#[test]
fn refusals_are_told_in_qemus_words() {
    for (kind, text) in [
        (option_reply::ERR_UNKNOWN, "Requested export not available"),
        (
            option_reply::ERR_TLS_REQD,
            "TLS negotiation required before option 7 (go)",
        ),
        (
            option_reply::ERR_POLICY,
            "Denied by server for option 7 (go)",
        ),
        (
            option_reply::ERR_INVALID,
            "Invalid parameters for option 7 (go)",
        ),
        (
            option_reply::ERR_PLATFORM,
            "Server lacks support for option 7 (go)",
        ),
        (
            option_reply::ERR_SHUTDOWN,
            "Server shutting down before option 7 (go)",
        ),
        (
            option_reply::ERR_BLOCK_SIZE_REQD,
            "Server requires INFO_BLOCK_SIZE for option 7 (go)",
        ),
        (
            option_reply::ERROR_BIT | 99,
            "Unknown error code when asking for option 7 (go)",
        ),
    ] {
        let (_, end) = talk(wishes(), 3, &|asked| match asked {
            option::GO => vec![(kind, b"why".to_vec())],
            other => knows_everything(other),
        });
        let text = text.to_owned();
        let reason = "why".to_owned();
        assert_eq!(
            end.expect_err("refused"),
            HandshakeError::Refused { text, reason }
        );
    }
}

#[test]
fn tls_comes_before_everything_or_not_at_all() {
    let with_tls = Wishes {
        tls: true,
        ..wishes()
    };
    let (options, end) = talk(with_tls.clone(), 3, &knows_everything);
    assert_eq!(options, [option::STARTTLS]);
    assert!(matches!(end, Ok(Step::StartTls)));
    for (flags, kind) in [
        (0, 0),
        (3, option_reply::ERR_UNSUP),
        (3, option_reply::ERR_POLICY),
    ] {
        let (_, end) = talk(with_tls.clone(), flags, &|_| vec![(kind, Vec::new())]);
        assert!(end.is_err(), "{flags} {kind:#x}");
    }
    for (unread, accepted) in [(&b""[..], true), (b"x", false)] {
        let mut client = ClientHandshake::new(with_tls.clone());
        assert_eq!(client.tls_started(unread).is_ok(), accepted);
    }
}

#[test]
fn lies_end_the_handshake() {
    let ack = (option_reply::ACK, Vec::new());
    let context = |name: &str| (option_reply::META_CONTEXT, context_entry(0, name));
    let block_sizes = |minimum, preferred, maximum| {
        let block_sizes = sizes(minimum, preferred, maximum);
        vec![
            info(Info::BlockSizes(block_sizes)),
            info(export(512)),
            ack.clone(),
        ]
    };
    let lies: Vec<(u32, Answers)> = vec![
        (option::EXTENDED_HEADERS, vec![(option_reply::ACK, vec![1])]),
        (
            option::EXTENDED_HEADERS,
            vec![(option_reply::INFO, Vec::new())],
        ),
        (option::EXTENDED_HEADERS, vec![(5, Vec::new())]),
        (
            option::SET_META_CONTEXT,
            vec![context("qemu:allocation-depth"), ack.clone()],
        ),
        (
            option::SET_META_CONTEXT,
            vec![
                context("base:allocation"),
                context("base:allocation"),
                ack.clone(),
            ],
        ),
        (
            option::SET_META_CONTEXT,
            vec![(option_reply::META_CONTEXT, vec![0; 3])],
        ),
        (
            option::SET_META_CONTEXT,
            vec![(option_reply::META_CONTEXT, vec![0; 70_000])],
        ),
        (option::GO, vec![ack.clone()]),
        (option::GO, vec![(option_reply::INFO, vec![0; 11])]),
        (option::GO, vec![(option_reply::INFO, vec![0; 13])]),
        (option::GO, vec![(option_reply::INFO, vec![0])]),
        (option::GO, vec![info(export(1 << 63)), ack.clone()]),
        (option::GO, vec![info(export(u64::MAX)), ack.clone()]),
        (option::GO, vec![info(Info::Other(9)); 10_001]),
        (option::GO, block_sizes(0, 4096, 4096)),
        (option::GO, block_sizes(3, 4096, 4096)),
        (option::GO, block_sizes(1 << 17, 1 << 17, 1 << 17)),
        (option::GO, block_sizes(512, 1, 4096)),
        (option::GO, block_sizes(512, 4096, 1)),
        (option::GO, block_sizes(512, 4096, 4097)),
    ];
    for (asked, lie) in lies {
        let (_, end) = talk(wishes(), 3, &|kind| match kind == asked {
            true => lie.clone(),
            false => knows_everything(kind),
        });
        assert!(end.is_err(), "{asked}: {end:?}");
    }
    // Sizes that exist.
    for (sizes, length) in [
        (block_sizes(1, 1, u32::MAX), 512),
        (block_sizes(1 << 16, 1 << 16, 1 << 16), 512),
    ] {
        let (_, end) = talk(wishes(), 3, &|kind| match kind {
            option::GO => sizes.clone(),
            other => knows_everything(other),
        });
        assert_eq!(agreed(end).length_bytes, length);
    }
}

#[test]
fn a_reply_to_something_else_ends_the_handshake() {
    for greeting in [&b"NBDMAGICXXXXXXXX"[..], b"XXXXXXXXIHAVEOPT"] {
        let mut client = ClientHandshake::new(wishes());
        client.receive(greeting);
        assert!(client.step().is_err());
    }
    let mut client = ClientHandshake::new(wishes());
    for part in [&b"NBDMAGICIHAVEOPT"[..], b"\0\x03"] {
        client.receive(part);
        assert!(matches!(client.step(), Ok(Step::More)));
    }
    let mut other = Vec::new();
    put_option_reply(&mut other, option::GO, option_reply::ACK, b"");
    client.receive(&other);
    assert!(client.step().is_err());
}
