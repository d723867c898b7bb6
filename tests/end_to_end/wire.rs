//! The wire, byte by byte: the same input to both daemons gives the same output.

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use crate::daemon::Process;
use crate::tools;

/// Feeds bytes to a daemon's standard input and returns all it printed, without the greeting.
fn output(mut daemon: Command, input: &[u8]) -> String {
    let mut process = Process::start(
        daemon
            .args(["--chardev", "stdio,id=c", "--monitor", "c"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped()),
    );
    let mut stdin = process.child().stdin.take().expect("piped");
    let mut stdout = process.child().stdout.take().expect("piped");
    let reading = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).map(|_| bytes)
    });
    stdin.write_all(input).expect("sent");
    let printed = reading.join().expect("joined").expect("read");
    // Only now: what is still unread when its input ends, the oracle may drop.
    drop(stdin);
    assert!(process.wait().success());
    let printed = String::from_utf8(printed).expect("ASCII");
    let (greeting, rest) = printed.split_once("\r\n").expect("a greeting");
    assert!(greeting.starts_with("{\"QMP\": "), "{greeting}");
    rest.to_owned()
}

fn ours(input: &[u8]) -> String {
    let mut command = Command::new(tools::blockyard());
    command.arg("daemon");
    output(command, input)
}

/// Compares the answers to `input`; whatever state it leaves the reader in, `quit` is understood.
fn same(input: &[u8]) {
    let mut whole = input.to_vec();
    whole.extend_from_slice(b"\xff{\"execute\": \"quit\"}\n");
    let theirs = output(Command::new("qemu-storage-daemon"), &whole);
    let ours = ours(&whole);
    assert_eq!(ours, theirs, "input: {}", String::from_utf8_lossy(input));
}

const READY: &[u8] = b"{\"execute\": \"qmp_capabilities\"}\n";

#[test]
fn negotiation() {
    if !tools::have_oracle() {
        return;
    }
    same(
        br#"{"execute":"query-jobs"}
        {"execute":"nosuch","id":1}
        {"execute":"quit"}
        {"execute":"qmp_capabilities","arguments":{"enable":["nope"]}}
        {"execute":"qmp_capabilities","arguments":{"enable":"oob"}}
        {"exec-oob":"qmp_capabilities"}
        {"execute":"qmp_capabilities","id":"a"}
        {"execute":"qmp_capabilities"}
        {"execute":"nosuch","id":{"k":[1,null]}}
        {"execute":"query-jobs","arguments":{"x":1},"id":2}
        {"exec-oob":"query-jobs","id":3}
        "#,
    );
}

#[test]
fn out_of_band() {
    if !tools::have_oracle() {
        return;
    }
    // One at a time: how far an answer overtakes is not fixed.
    for line in [
        &br#"{"exec-oob":"query-jobs","id":"o1"}"#[..],
        br#"{"exec-oob":"nosuch","id":"o1"}"#,
        br#"{"execute":"query-jobs","exec-oob":"query-jobs","id":4}"#,
        br#"{"execute":"query-jobs","id":1}"#,
        br#"{"exec-oob":5,"id":1}"#,
        br#"{"exec-oob":"quit","id":1}"#,
        br#"{"execute":"quit","arguments":{"x":1}}{"execute":"query-jobs","id":1}"#,
    ] {
        let mut input =
            br#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#.to_vec();
        input.extend_from_slice(line);
        same(&input);
    }
}

#[test]
fn refused_input() {
    if !tools::have_oracle() {
        return;
    }
    let mut input = READY.to_vec();
    for line in [
        &b"[]"[..],
        b"{}",
        b"5",
        b"\"text\"",
        b"null",
        b"true",
        b"{\"execute\":5}",
        b"{\"execute\":null}",
        b"{\"execute\":\"query-jobs\",\"foo\":1}",
        b"{\"execute\":\"query-jobs\",\"arguments\":[]}",
        b"{\"execute\":\"query-jobs\",\"arguments\":null}",
        b"{\"execute\":}",
        b"{\"execute\" \"x\"}",
        b"{\"execute\":\"a\" \"b\"}",
        b"{\"a\":1,\"a\":2}",
        b"{1:2}",
        b"[1,]",
        b"[1 2]",
        b"nul",
        b"01",
        b"{\"a\":\"\\x\"}",
        b"{\"a\":\"\\ud800\"}",
        b"{\"a\":\"\\ud800\\u0041\"}",
        b"{\"a\":\"\\u12\"}",
        b"{\"a\":\"\\uffff\"}",
        b"{\"a\":\"\xc3\x28\"}",
        b"{\"execute\":\"a\tb\"}",
        b"{\"execute\":\"query-ver\xff{\"execute\":\"query-jobs\"}",
        b"{'execute':'query-jobs','id':'it\\'s'}{\"execute\":\"query-jobs\",\"id\":1e3}",
        b"{'execute':'query-jobs','id':[1.10,-0,-0.0,1e-7,18446744073709551615,18446744073709551616,-9223372036854775809]}",
        b"{'execute':'query-jobs','id':\"\\u00e9\\ud83d\\ude00\\u0000/\\/\"}",
        b"{'execute':'query-jobs','id':'\xc3\xa9'}",
        b"}",
        b"]",
        b"{]",
        b"[}",
        b",",
        b":",
        b"{\"execute\":\"query-jobs\"}}",
        b"\x01",
        b"\x00",
        b"-",
        b"-a",
        b"1.",
        b"1.e5",
        b"1e",
        b"tru",
        b"True",
        b"{\"id\":1}",
        b"{\"id\":1,\"execute\":1}",
        // Several faults, of which one is told.
        b"{\"foo\":1,\"execute\":2}",
        b"{\"foo\":1,\"bar\":2,\"id\":3}",
        b"{\"arguments\":1,\"execute\":2}",
        b"{\"zoo\":1,\"arguments\":1,\"execute\":2}",
        b"{\"a\":1,\"a\":2 3}",
        b"{\"a\":1,\"a\":[1 2]}",
        b"{{\"a\":1,\"a\":2}:3}",
        b"{[1]:2}",
        b"{\"a\":\"\\x\xc3(\"}",
        b"{\"a\":\"\xc3\\x\"}",
        b"{\"a\":\"\\u00\xc3\xa9\"}",
        b"/* */",
        b"%i",
    ] {
        input.extend_from_slice(line);
        input.push(b'\n');
    }
    same(&input);
}

#[test]
fn nesting_at_the_limit() {
    if !tools::have_oracle() {
        return;
    }
    for levels in [1024, 1025, 1030] {
        let mut input = READY.to_vec();
        input.extend(vec![b'['; levels]);
        input.extend(vec![b']'; levels]);
        same(&input);
    }
}

/// Pieces of messages, put together at random: both readers must stumble over the same places.
#[test]
fn random_pieces() {
    if !tools::have_oracle() {
        return;
    }
    let pieces: &[&[u8]] = &[
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"\"execute\"",
        b"'execute'",
        b"\"query-jobs\"",
        b"\"id\"",
        b"1",
        b"-1",
        b"1.5",
        b"1e5",
        b"0",
        b"00",
        b"true",
        b"false",
        b"null",
        b"nil",
        b"\"",
        b"'",
        b"\\",
        b"\\u0041",
        b"\\n",
        b" ",
        b"\n",
        b"\t",
        b"\x01",
        b"\xff",
        b"\xfe",
        b"\xc3\xa9",
        b"\xc0",
        b"+",
        b"-",
        b"{\"execute\":\"query-jobs\"}",
        b"{\"execute\":\"query-jobs\",\"id\":",
        b"A",
        b"%d",
        b"\x7f",
        b"\x00",
        b"e",
        b"E5",
        b".",
        b"\"arguments\"",
        b"{}",
    ];
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..40 {
        let mut input = READY.to_vec();
        let start = state;
        for _ in 0..400 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let index = usize::try_from(state % pieces.len() as u64).expect("small");
            input.extend_from_slice(pieces[index]);
        }
        eprintln!("round {round}, seed {start:#x}");
        same(&input);
    }
}
