//! Servers that begin TLS and then do as they like: it ends in time, and nothing unencrypted is believed.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockyard_nbd::Mode;
use blockyard_nbd::handshake::client::Wishes;

use crate::node::nbd::{NbdConnection, NbdEncryption, NbdTarget, connect_until};
use crate::sockets::Address;
use crate::tls::session::Session;
use crate::tls::session_tests::believed;

/// Answers STARTTLS, with `behind` in the same breath.
fn begin(stream: &mut UnixStream, behind: &[u8]) {
    stream
        .write_all(b"NBDMAGICIHAVEOPT\0\x03")
        .expect("greeted");
    let mut said = [0; 4 + 16];
    stream.read_exact(&mut said).expect("answered");
    assert_eq!(said[4..], *b"IHAVEOPT\0\0\0\x05\0\0\0\0");
    let mut answer = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    answer.extend(b"\0\0\0\x05\0\0\0\x01\0\0\0\0");
    answer.extend(behind);
    stream.write_all(&answer).expect("answered");
}

/// Connects to a server of one connection, with so much time.
fn connect(
    encryption: NbdEncryption,
    time: Duration,
    serve: impl FnOnce(UnixStream) + Send + 'static,
) -> Result<NbdConnection, String> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).expect("a socket");
    let server = std::thread::spawn(move || serve(listener.accept().expect("a client").0));
    let target = NbdTarget {
        address: Address::Path(path.display().to_string()),
        wishes: Wishes {
            export_name: String::new(),
            context: "base:allocation".to_owned(),
            tls: true,
            mode_max: Mode::Extended,
        },
        encryption: Some(encryption),
    };
    let now = Instant::now();
    let connected = connect_until(&target, now, now + time, &AtomicBool::new(false));
    server.join().expect("as told");
    connected
}

#[test]
fn a_server_that_stalls_is_given_up_in_time() {
    let Some((client, server)) = believed() else {
        return;
    };
    let encryption = NbdEncryption {
        credentials: Arc::new(client),
        hostname: Some("localhost".to_owned()),
    };
    let time = Duration::from_millis(500);
    let silent = connect(encryption.clone(), time, |mut stream| {
        begin(&mut stream, &[]);
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let text = "The NBD handshake failed: Connection timed out";
    assert_eq!(silent.err().as_deref(), Some(text));
    // One record that never ends.
    let slow = connect(encryption.clone(), time, |mut stream| {
        begin(&mut stream, &[]);
        // Each byte comes in a piece of its own, a moment after the one before.
        let pace = Some(Duration::from_millis(1));
        stream.set_read_timeout(pace).expect("a limit");
        let mut next = [0x16, 3, 3, 0x40, 0]
            .into_iter()
            .chain(std::iter::repeat(2));
        while let Some(byte) = next.next()
            && stream.write_all(&[byte]).is_ok()
        {
            let _ = stream.read(&mut [0]);
        }
    });
    assert!(slow.is_err());
    // One that is believed, and says nothing any more. A busy machine may take longer than that until it is, and gets more.
    let server = Arc::new(server);
    for time in (0..6).map(|doublings| time * (1 << doublings)) {
        let (server, is_believed) = (Arc::clone(&server), Arc::new(AtomicBool::new(false)));
        let tells = Arc::clone(&is_believed);
        let believed = connect(encryption.clone(), time, move |mut stream| {
            begin(&mut stream, &[]);
            let mut session = Session::server(server.accept().expect("a server"));
            while session.is_handshaking() {
                let mut bytes = [0; 4096];
                let Ok(count @ 1..) = stream.read(&mut bytes) else {
                    return;
                };
                session.receive(&bytes[..count], &mut []).expect("good");
                let mut output = Vec::new();
                session.output(&mut output).expect("good");
                if stream.write_all(&output).is_err() {
                    return;
                }
            }
            tells.store(true, Ordering::Release);
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
        assert_eq!(believed.err().as_deref(), Some(text));
        if is_believed.load(Ordering::Acquire) {
            return;
        }
    }
    panic!("nobody is believed");
}

#[test]
fn what_comes_unencrypted_behind_the_beginning_is_not_believed() {
    let Some((client, _)) = believed() else {
        return;
    };
    let encryption = NbdEncryption {
        credentials: Arc::new(client),
        hostname: Some("localhost".to_owned()),
    };
    let long = Duration::from_secs(60);
    let injected = connect(encryption.clone(), long, |mut stream| {
        begin(&mut stream, &[1]);
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let text = "Unencrypted data behind the beginning of TLS";
    assert_eq!(injected.err().as_deref(), Some(text));
    let no_tls = connect(encryption, long, |mut stream| {
        begin(&mut stream, &[]);
        let mut hello = [0; 1];
        stream.read_exact(&mut hello).expect("a client's hello");
        let _ = stream.write_all(&[b'x'; 600]);
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let error = no_tls.expect_err("no TLS");
    assert!(error.starts_with("TLS handshake failed: "), "{error}");
}
