//! Sockets with and without a ring: every byte arrives, in order; whatever waits ends when the socket does.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Waker};
use std::time::Duration;

use blockyard_ring::{BackendChoice, Fill, Part, Reactor, ReactorConfig, Socket};
use blockyard_storage::Buffer;
use blockyard_storage::buffer::BufferPool;
use futures_util::future::{join, join_all};

#[path = "support/forbid_ring.rs"]
mod forbid_ring;
mod support;
use forbid_ring::forbid_io_uring;
use support::block_on;

fn on_each_backend(test: impl Fn(&Reactor)) {
    for backend in [BackendChoice::Auto, BackendChoice::Threads] {
        eprintln!("{backend:?}");
        let config = ReactorConfig {
            backend,
            // Fewer entries than what the tests have in flight.
            depth: 16,
            ..ReactorConfig::new(BufferPool::new(8 << 20))
        };
        test(&Reactor::open(config).expect("a reactor"));
    }
}

fn pair(reactor: &Reactor) -> (Rc<dyn Socket>, Rc<dyn Socket>) {
    let (one, other) = UnixStream::pair().expect("a pair");
    // Whether it was told not to wait does not matter.
    one.set_nonblocking(true).expect("set");
    let socket = |stream: UnixStream| reactor.socket(OwnedFd::from(stream)).expect("a socket");
    (socket(one), socket(other))
}

/// Bytes that differ from their neighbours and from those a block away.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| ((at * 7) ^ (at >> 9)) as u8).collect()
}

async fn send(socket: &Rc<dyn Socket>, parts: Vec<Part>, skip: usize) -> Result<(), i32> {
    let lengths: Vec<_> = parts.iter().map(|part| part.as_slice().len()).collect();
    let sent = socket.send(parts, skip).await;
    let back: Vec<_> = sent
        .parts
        .iter()
        .map(|part| part.as_slice().len())
        .collect();
    assert_eq!(back, lengths, "all parts come back");
    sent.outcome
}

#[test]
fn the_end_of_a_peer_is_seen_without_receiving() {
    on_each_backend(|reactor| {
        let (one, other) = pair(reactor);
        assert!(!one.peer_has_ended());
        block_on(reactor, async {
            // Whatever has not been received yet.
            let sent = send(&other, vec![Part::Bytes(vec![7])], 0).await;
            assert_eq!(sent, Ok(()));
        });
        assert!(!one.peer_has_ended());
        drop(other);
        assert!(one.peer_has_ended());
        let (one, _other) = pair(reactor);
        one.shutdown();
        assert!(one.peer_has_ended());
    });
}

/// One reply of the length that copying clients ask for, on a system whose own setting is less.
#[test]
fn a_unix_socket_takes_a_quarter_mebibyte_that_nobody_has_received() {
    on_each_backend(|reactor| {
        let (one, _other) = UnixStream::pair().expect("a pair");
        let mut sender = one.try_clone().expect("another descriptor");
        let _socket = reactor.socket(OwnedFd::from(one)).expect("a socket");
        sender.set_nonblocking(true).expect("set");
        assert_eq!(sender.write(&pattern(256 << 10)).ok(), Some(256 << 10));
    });
}

#[test]
fn far_more_than_the_kernel_queues_arrives_in_order() {
    on_each_backend(|reactor| {
        let (one, other) = pair(reactor);
        let all = pattern(5 << 20);
        let mut parts = Vec::new();
        for (number, piece) in all.chunks(3_333).enumerate() {
            parts.push(match number % 2 {
                0 => Part::Bytes(piece.to_vec()),
                _ => Part::Buffer(Buffer::copy_of(piece)),
            });
        }
        let skip = 5_000;
        block_on(reactor, async {
            let receive = async {
                let wanted = all.len() - skip;
                let mut into = Buffer::zeroed(wanted + 100);
                into.set_length(100 + wanted / 2);
                let first = other.receive(into, 100, Fill::All).await;
                assert_eq!(first.outcome, Ok(wanted / 2));
                let (mut into, mut at) = (first.buffer, 100 + wanted / 2);
                into.set_length(wanted + 100);
                while at < wanted + 100 {
                    let next = other.receive(into, at, Fill::Some).await;
                    let count = next.outcome.expect("received");
                    assert!(count > 0);
                    (into, at) = (next.buffer, at + count);
                }
                assert_eq!(into.as_slice()[..100], [0; 100]);
                assert!(into.as_slice()[100..] == all[skip..], "the same bytes");
            };
            let (sent, ()) = join(send(&one, parts, skip), receive).await;
            assert_eq!(sent, Ok(()));
        });
    });
}

#[test]
fn the_end_of_the_other_side_is_told_and_so_is_what_came_before() {
    on_each_backend(|reactor| {
        let (one, other) = pair(reactor);
        block_on(reactor, async {
            let sent = send(&one, vec![Part::Bytes(vec![7; 10])], 0).await;
            assert_eq!(sent, Ok(()));
            drop(one);
            let received = other.receive(Buffer::zeroed(20), 0, Fill::All).await;
            assert_eq!(received.outcome, Ok(10));
            let received = other.receive(received.buffer, 0, Fill::Some).await;
            assert_eq!(received.outcome, Ok(0));
            let sent = send(&other, vec![Part::Bytes(vec![7; 10])], 0).await;
            assert_eq!(sent, Err(libc::EPIPE), "and no signal");
        });
    });
}

#[test]
fn a_shutdown_ends_what_waits() {
    on_each_backend(|reactor| {
        let (one, _other) = pair(reactor);
        block_on(reactor, async {
            let receive = one.receive(Buffer::zeroed(20), 0, Fill::All);
            let fills_the_queue = send(&one, vec![Part::Buffer(Buffer::zeroed(4 << 20))], 0);
            let shutdown = async {
                // Both are with the kernel by then.
                reactor.blocking(Box::new(|| ())).await;
                one.shutdown();
            };
            let (received, (sent, ())) = join(receive, join(fills_the_queue, shutdown)).await;
            assert_eq!(received.outcome, Ok(0));
            assert_eq!(sent, Err(libc::EPIPE));
        });
    });
}

#[test]
fn a_receive_that_nobody_waits_for_holds_nothing_up() {
    on_each_backend(|reactor| {
        let (one, other) = pair(reactor);
        let mut cx = Context::from_waker(Waker::noop());
        {
            let mut receive = pin!(one.receive(Buffer::zeroed(20), 0, Fill::All));
            assert!(receive.as_mut().poll(&mut cx).is_pending());
        }
        reactor.turn(Some(Duration::ZERO)).expect("a turn");
        drop(one);
        block_on(reactor, async {
            let received = other.receive(Buffer::zeroed(20), 0, Fill::Some).await;
            assert_eq!(received.outcome, Ok(0));
        });
        // One that its socket outlives for a moment ends with it.
        let mut receive = other.receive(Buffer::zeroed(20), 0, Fill::All);
        assert!(!receive.as_mut().poll(&mut cx).is_pending() || backend_is_ring(reactor));
    });
}

fn backend_is_ring(reactor: &Reactor) -> bool {
    reactor.backend() == blockyard_ring::BackendKind::Uring
}

#[test]
fn many_sockets_wait_at_once() {
    on_each_backend(|reactor| {
        let pairs: Vec<_> = (0..300_usize).map(|_| pair(reactor)).collect();
        block_on(reactor, async {
            let receives = pairs
                .iter()
                .enumerate()
                .map(|(number, (_, other))| async move {
                    let received = other.receive(Buffer::zeroed(8), 0, Fill::All).await;
                    assert_eq!(received.outcome, Ok(8));
                    let bytes = (number as u64).to_le_bytes();
                    assert_eq!(received.buffer.as_slice(), bytes);
                });
            let sends = async {
                for half in [0..4, 4..8] {
                    for (number, (one, _)) in pairs.iter().enumerate().rev() {
                        let bytes = (number as u64).to_le_bytes()[half.clone()].to_vec();
                        assert_eq!(send(one, vec![Part::Bytes(bytes)], 0).await, Ok(()));
                    }
                }
            };
            join(join_all(receives), sends).await;
        });
    });
}

#[test]
fn sockets_and_files_are_waited_for_together() {
    on_each_backend(|reactor| {
        let (one, other) = pair(reactor);
        block_on(reactor, async {
            for _ in 0..200 {
                let receive = other.receive(Buffer::zeroed(1), 0, Fill::Some);
                let blocked = reactor.blocking(Box::new(std::thread::yield_now));
                let send = async {
                    blocked.await;
                    assert_eq!(send(&one, vec![Part::Bytes(vec![1])], 0).await, Ok(()));
                };
                let (received, ()) = join(receive, send).await;
                assert_eq!(received.outcome, Ok(1));
            }
        });
        // Nothing comes: a turn ends when its time is over.
        let mut cx = Context::from_waker(Waker::noop());
        let mut idle = pin!(other.receive(Buffer::zeroed(1), 0, Fill::Some));
        assert!(idle.as_mut().poll(&mut cx).is_pending());
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_millis(5) {
            let turned = reactor.turn(Some(Duration::from_millis(5)));
            turned.expect("a turn");
        }
        assert!(start.elapsed() < Duration::from_secs(10));
        assert!(idle.as_mut().poll(&mut cx).is_pending());
    });
}

#[test]
fn what_cannot_be_waited_for_is_refused_or_fails() {
    on_each_backend(|reactor| {
        let file = tempfile::tempfile().expect("a file");
        match reactor.socket(OwnedFd::from(file)) {
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPERM)),
            Ok(socket) => block_on(reactor, async {
                let received = socket.receive(Buffer::zeroed(1), 0, Fill::Some).await;
                assert_eq!(received.outcome, Err(libc::ENOTSOCK));
            }),
        }
    });
}

/// The filter binds the thread that installs it and those it starts, so a thread of its own is enough.
#[test]
fn sockets_work_where_io_uring_is_forbidden() {
    std::thread::spawn(|| {
        forbid_io_uring(libc::EPERM);
        on_each_backend(|reactor| {
            assert!(!backend_is_ring(reactor));
            let (one, other) = pair(reactor);
            block_on(reactor, async {
                let send = send(&one, vec![Part::Buffer(Buffer::zeroed(1 << 20))], 0);
                let receive = other.receive(Buffer::zeroed(1 << 20), 0, Fill::All);
                let (sent, received) = join(send, receive).await;
                assert_eq!((sent, received.outcome), (Ok(()), Ok(1 << 20)));
            });
        });
    })
    .join()
    .expect("it works");
}
