//! NBD clients that lie, stall, flood and leave: nobody else is harmed, nothing hangs, nothing stays behind.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::{Client, DEADLINE};
use crate::daemon::{Daemon, wait_until_exists};
use crate::nbd::{
    DISCONNECT, FLUSH, FUA, Nbd, READ, TRIM, WRITE, ZERO, connect, export, go, greeting, option,
    receive, request, start_server, until_end,
};
use crate::nbd_nodes::serve;
use crate::oracle::data_file;
use crate::tools;

const LENGTH: u64 = 40 << 20;

struct Yard {
    daemon: Daemon,
    client: Client,
    socket: PathBuf,
}

impl Yard {
    fn new(connections_max: u32) -> Self {
        let daemon = Daemon::start();
        data_file(&daemon.path("disk.raw"), LENGTH);
        let mut client = daemon.client();
        let node = json!({"driver": "file", "node-name": "disk", "filename": "disk.raw"});
        client.run("blockdev-add", node);
        start_server(&daemon, &mut client, connections_max);
        export(&mut client, "disk");
        let socket = daemon.path("nbd.sock");
        Self {
            daemon,
            client,
            socket,
        }
    }

    fn open(&self) -> Nbd {
        Nbd::open(&self.socket, "disk")
    }

    /// Waits until nobody uses the export, by deleting it the safe way.
    fn delete_when_unused(&mut self) {
        let started = Instant::now();
        loop {
            let deleted = self
                .client
                .command("block-export-del", json!({"id": "disk"}));
            if deleted.get("return").is_some() {
                return;
            }
            assert_eq!(deleted["error"]["desc"], "export 'disk' still in use");
            assert!(started.elapsed() < DEADLINE, "a client stays for ever");
        }
    }
}

/// A client beside all others that must not notice anything.
fn works(nbd: &mut Nbd) {
    nbd.write(8192, &[7; 512], 0);
    assert_eq!(nbd.read(8192, 512), [7; 512]);
}

#[test]
fn a_client_may_leave_after_any_byte_of_the_handshake() {
    let mut yard = Yard::new(0);
    let mut other = yard.open();
    let whole = [
        greeting().to_vec(),
        option(8, &[]),
        option(3, &[]),
        option(6, &go("disk")),
        option(99, b"what"),
        option(10, &[0, 0, 0, 4, b'd', b'i', b's', b'k', 0, 0, 0, 0]),
        option(7, &go("disk")),
        request(READ, 0, 1, (0, 512)),
    ]
    .concat();
    for length in 0..=whole.len() {
        let mut stream = connect(&yard.socket);
        stream.write_all(&whole[..length]).expect("sent");
        if length % 3 == 0 {
            // Reads all there is before it goes, or half of it, or nothing.
            stream.shutdown(std::net::Shutdown::Write).expect("shut");
            until_end(&mut stream);
        } else if length % 3 == 1 {
            let _ = stream.read(&mut [0; 10]);
        }
    }
    works(&mut other);
    drop(other);
    yard.delete_when_unused();
    yard.daemon.quit();
}

#[test]
fn garbage_ends_its_own_connection_only() {
    let mut yard = Yard::new(0);
    let mut other = yard.open();
    let mut state = 88_172_645_463_325_252_u64;
    for round in 0..200 {
        let mut garbage = Vec::new();
        for _ in 0..64 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            garbage.extend_from_slice(&state.to_le_bytes());
        }
        // In the handshake, behind a whole option, or among requests.
        let mut stream = if round % 3 == 2 {
            yard.open().stream
        } else {
            connect(&yard.socket)
        };
        if round % 3 == 1 {
            let mut begin = greeting().to_vec();
            begin.extend(option(
                u32::from(garbage[0]),
                &garbage[..usize::from(garbage[1])],
            ));
            let _ = stream.write_all(&begin);
        }
        // It may have been cut off already.
        let _ = stream.write_all(&garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        until_end(&mut stream);
    }
    works(&mut other);
    drop(other);
    yard.delete_when_unused();
    yard.daemon.quit();
}

#[test]
fn requests_that_make_no_sense_are_answered_and_the_next_ones_work() {
    let yard = Yard::new(0);
    let mut nbd = yard.open();
    assert_eq!(nbd.length, LENGTH);
    let (invalid, no_space) = (22, 28);
    for (command, range, data, error) in [
        (READ, (LENGTH, 1), 0, invalid),
        (READ, (u64::MAX, 1), 0, invalid),
        (READ, (0, u32::MAX), 0, invalid),
        (READ, (0, (32 << 20) + 1), 0, invalid),
        (WRITE, (LENGTH - 1, 2), 2, no_space),
        (WRITE, (u64::MAX, 1 << 20), 1 << 20, no_space),
        (ZERO, (LENGTH, 1), 0, no_space),
        (ZERO, (0, u32::MAX), 0, no_space),
        (TRIM, (LENGTH, 1), 0, invalid),
        (7, (0, 512), 0, invalid),
        (99, (0, 0), 0, invalid),
    ] {
        let refused = nbd.refusal(command, range, &vec![0; data]);
        assert_eq!(refused, error, "{command} {range:?}");
        works(&mut nbd);
    }
    // Nothing is there for nothing.
    assert!(nbd.read(0, 0).is_empty());
    nbd.write(0, &[], FUA);
    nbd.change(ZERO, (LENGTH, 0));
    nbd.change(TRIM, (0, 0));
    // As much as may be, in one request.
    let all = std::fs::read(yard.daemon.path("disk.raw")).expect("read");
    assert!(nbd.read(5, 32 << 20) == all[5..5 + (32 << 20)], "32 MiB");
    nbd.write(3, &all[..32 << 20], FUA);
    assert!(nbd.read(3, 32 << 20) == all[..32 << 20], "32 MiB written");
    // More than that is not read, so the connection ends.
    let cookie = nbd.send(WRITE, 0, (0, (32 << 20) + 1), &[]);
    assert_eq!(nbd.reply(), (cookie, invalid));
    until_end(&mut nbd.stream);
    yard.daemon.quit();
}

#[test]
fn a_client_may_leave_in_the_middle_of_anything() {
    let mut yard = Yard::new(0);
    let mut other = yard.open();
    for round in 0..120_u64 {
        let mut nbd = yard.open();
        let length = 1 << (10 + round % 12);
        for number in 0..round % 40 {
            let at = (20 << 20) + number * (64 << 10);
            match number % 4 {
                0 => drop(nbd.send(READ, 0, (at, length), &[])),
                1 => drop(nbd.send(WRITE, FUA, (at, 4096), &[1; 4096])),
                2 => drop(nbd.send(ZERO, 0, (at, length), &[])),
                _ => drop(nbd.send(FLUSH, 0, (0, 0), &[])),
            }
        }
        match round % 5 {
            0 => drop(nbd.send(DISCONNECT, 0, (0, 0), &[])),
            // A part of the data, or of a head.
            1 => drop(nbd.send(WRITE, 0, (20 << 20, 4 << 20), &[1; 100_000])),
            2 => nbd.stream.write_all(&[0x25, 0x60]).expect("sent"),
            3 => nbd.stream.shutdown(std::net::Shutdown::Read).expect("shut"),
            _ => {}
        }
    }
    works(&mut other);
    drop(other);
    yard.delete_when_unused();
    yard.daemon.quit();
}

/// Clients that do not take their replies hold memory: theirs, not that of others.
#[test]
fn clients_that_read_nothing_starve_nobody() {
    let mut yard = Yard::new(0);
    let greedy: Vec<Nbd> = (0..24)
        .map(|_| {
            let mut nbd = yard.open();
            let ask = request(READ, 0, 9, (0, 8 << 20));
            // Until it is not read any more.
            nbd.stream.set_nonblocking(true).expect("set");
            while nbd.stream.write_all(&ask).is_ok() {}
            nbd
        })
        .collect();
    let mut other = yard.open();
    let all = std::fs::read(yard.daemon.path("disk.raw")).expect("read");
    for round in 0..20_u32 {
        let at = u64::from(round) << 20;
        let wanted = &all[usize::try_from(at).expect("small")..][..1 << 20];
        assert!(other.read(at, 1 << 20) == wanted, "{round}");
        works(&mut other);
        other.write(8192, &all[8192..8704], FUA);
    }
    let used = yard.daemon.resident_bytes();
    assert!(used < 400 << 20, "{used} bytes of memory");
    drop((greedy, other));
    yard.delete_when_unused();
    yard.daemon.quit();
}

/// However many of them do nothing but hold what they have been given, it is little.
#[test]
fn a_crowd_that_stops_in_the_middle_of_its_writes_costs_little() {
    const CROWD: usize = 500;
    let mut yard = Yard::new(0);
    let mut other = yard.open();
    let all = std::fs::read(yard.daemon.path("disk.raw")).expect("read");
    let data = &all[..1 << 20];
    let crowd: Vec<Nbd> = (0..CROWD)
        .map(|_| {
            let mut nbd = yard.open();
            nbd.send(WRITE, 0, (0, 1 << 20), &data[..data.len() - 1]);
            nbd
        })
        .collect();
    // Data that is longer than what each has of its own comes whole, in both directions.
    for round in 0..5_u64 {
        assert!(
            other.read(round << 20, 3 << 20)
                == all[usize::try_from(round << 20).expect("small")..][..3 << 20]
        );
        other.write(
            round << 20,
            &all[usize::try_from(round << 20).expect("small")..][..2 << 20],
            0,
        );
        works(&mut other);
    }
    let used = yard.daemon.resident_bytes();
    assert!(used < 300 << 20, "{used} bytes of memory");
    drop((crowd, other));
    yard.delete_when_unused();
    yard.daemon.quit();
}

/// A disk whose every block is told by itself would keep a question about all of it going for an hour.
#[test]
fn nobody_looks_at_a_disk_for_a_client_that_has_left() {
    if !tools::have("nbdkit", "nbdkit") {
        return;
    }
    let daemon = Daemon::start();
    let asked = daemon.path("asked");
    let extents = format!("extents=echo >> {}; echo $4 4096", asked.display());
    let arguments = [
        "-f",
        "-U",
        "server.sock",
        "eval",
        "get_size=echo 4G",
        "pread=exit 1",
        "can_extents=exit 0",
        &extents,
    ];
    let server = serve(&daemon.path(""), "nbdkit", &arguments);
    let mut client = daemon.client();
    let address = json!({"type": "unix", "path": "server.sock"});
    client.run(
        "blockdev-add",
        json!({"driver": "nbd", "node-name": "disk", "server": address, "open-timeout": 20, "read-only": true}),
    );
    start_server(&daemon, &mut client, 0);
    client.run(
        "block-export-add",
        json!({"type": "nbd", "id": "disk", "node-name": "disk"}),
    );
    let mut stream = connect(&daemon.path("nbd.sock"));
    let name = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation";
    let all = (0, 4096 * (u32::MAX / 4096));
    for bytes in [
        greeting().as_slice(),
        // Structured replies, one context, this export.
        &option(8, &[]),
        &option(10, name),
        &option(7, &go("disk")),
        &request(7, 0, 1, all),
    ] {
        stream.write_all(bytes).expect("sent");
    }
    wait_until_exists(&asked);
    drop(stream);
    let mut yard = Yard {
        socket: daemon.path("nbd.sock"),
        daemon,
        client,
    };
    yard.delete_when_unused();
    yard.daemon.quit();
    drop(server);
}

#[test]
fn thousands_of_connections_leave_nothing_behind() {
    let mut yard = Yard::new(0);
    let mut other = yard.open();
    let descriptors = yard.daemon.descriptors().len();
    for round in 0..3_000 {
        let mut stream = connect(&yard.socket);
        if round % 10 == 0 {
            stream.write_all(&greeting()).expect("sent");
            stream.write_all(&option(7, &go("disk"))).expect("sent");
        }
    }
    // Some at once, all of them served.
    let mut crowd: Vec<Nbd> = (0..300).map(|_| yard.open()).collect();
    for nbd in &mut crowd {
        nbd.send(READ, 0, (4096, 512), &[]);
    }
    for nbd in &mut crowd {
        assert_eq!(nbd.reply().1, 0);
        receive(&mut nbd.stream, 512);
    }
    drop(crowd);
    works(&mut other);
    drop(other);
    yard.delete_when_unused();
    let left = yard.daemon.descriptors().len();
    assert!(left <= descriptors, "{left} of {descriptors} descriptors");
    yard.daemon.quit();
}

#[test]
fn beyond_the_limit_clients_wait_until_one_leaves() {
    let yard = Yard::new(2);
    let (one, mut other) = (yard.open(), yard.open());
    let mut late = connect(&yard.socket);
    works(&mut other);
    late.set_read_timeout(Some(Duration::from_millis(200)))
        .expect("set");
    assert!(late.read(&mut [0; 1]).is_err(), "it has to wait");
    late.set_read_timeout(Some(DEADLINE)).expect("set");
    drop(one);
    assert_eq!(receive(&mut late, 8), b"NBDMAGIC");
    drop((late, other));
    yard.daemon.quit();
}

#[test]
fn who_takes_too_long_is_cut_off() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let socket = daemon.path("nbd.sock");
    let address = json!({"type": "unix", "data": {"path": socket}});
    client.run(
        "nbd-server-start",
        json!({"addr": address, "handshake-max-seconds": 1}),
    );
    let mut silent = connect(&socket);
    let mut slow = connect(&socket);
    // Where this thread has to wait for long it is too late already.
    let _ = slow.write_all(&[&greeting()[..], &option(3, &[])[..10]].concat());
    // Both get the greeting, then the end.
    assert_eq!(until_end(&mut silent).len(), 18);
    assert_eq!(until_end(&mut slow).len(), 18);
    drop(client);
    daemon.quit();
}

/// The server is stopped, its exports deleted, their nodes too, while clients are at every stage; and again.
#[test]
fn it_ends_whatever_its_clients_are_doing() {
    let mut yard = Yard::new(0);
    for round in 0..30 {
        let mut silent = connect(&yard.socket);
        let mut half = connect(&yard.socket);
        half.write_all(&greeting()).expect("sent");
        half.write_all(&option(7, &go("disk"))[..15]).expect("sent");
        let mut idle = yard.open();
        let mut busy = yard.open();
        for number in 0..12 {
            busy.send(READ, 0, (number << 20, 1 << 20), &[]);
            busy.send(WRITE, 0, ((20 << 20) + (number << 12), 4096), &[3; 4096]);
        }
        let mut middle = yard.open();
        middle.send(WRITE, 0, (0, 1 << 20), &[1; 70_000]);
        match round % 3 {
            0 => drop(yard.client.run("nbd-server-stop", json!({}))),
            1 => {
                let refused = yard
                    .client
                    .refusal("block-export-del", json!({"id": "disk"}));
                assert_eq!(refused, "export 'disk' still in use");
                let hard = json!({"id": "disk", "mode": "hard"});
                yard.client.run("block-export-del", hard);
                yard.client.run("nbd-server-stop", json!({}));
            }
            _ => {
                let hard = json!({"name": "disk", "mode": "hard"});
                yard.client.run("nbd-server-remove", hard);
                yard.client.run("nbd-server-stop", json!({}));
            }
        }
        for stream in [
            &mut silent,
            &mut half,
            &mut idle.stream,
            &mut busy.stream,
            &mut middle.stream,
        ] {
            until_end(stream);
        }
        assert!(UnixStream::connect(&yard.socket).is_err(), "nobody listens");
        let deleted = yard.client.events.iter();
        let deleted = deleted.filter(|event| event["event"] == "BLOCK_EXPORT_DELETED");
        assert_eq!(deleted.count(), round + 1);
        yard.client
            .run("blockdev-del", json!({"node-name": "disk"}));
        let node = json!({"driver": "file", "node-name": "disk", "filename": "disk.raw"});
        yard.client.run("blockdev-add", node);
        start_server(&yard.daemon, &mut yard.client, 0);
        export(&mut yard.client, "disk");
    }
    let mut last = yard.open();
    works(&mut last);
    // The end of the daemon is the end of its clients.
    drop(yard.client);
    yard.daemon.quit();
    until_end(&mut last.stream);
}
