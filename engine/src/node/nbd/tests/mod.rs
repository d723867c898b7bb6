//! Disks of other hosts whose servers know less, stall, end at every byte, or lie; and that move between threads.

mod server;
mod tls;

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockyard_nbd::handshake::client::Wishes;
use blockyard_nbd::{BlockSizes, ExportFacts, Mode};
use blockyard_ring::BackendChoice;
use blockyard_storage::buffer::BufferPool;
use blockyard_storage::error::{EIO, ENOSPC, EOPNOTSUPP};
use blockyard_storage::{Aligned, Buffer, ByteRange, Storage, ZeroMode};

use self::server::{Fate, Server, facts};
use crate::data::{ThreadId, ThreadSet};
use crate::node::nbd::{NbdStorage, NbdTarget, Remote, connect_until};
use crate::node::news::News;
use crate::sockets::Address;

const UNMAP: ZeroMode = ZeroMode {
    may_unmap: true,
    no_fallback: false,
};
const BACKENDS: [BackendChoice; 2] = [BackendChoice::Auto, BackendChoice::Threads];

fn target(server: &Server, mode_max: Mode) -> NbdTarget {
    NbdTarget {
        address: Address::Path(server.path.display().to_string()),
        wishes: Wishes {
            export_name: String::new(),
            context: "base:allocation".to_owned(),
            tls: false,
            mode_max,
        },
        encryption: None,
    }
}

/// Connects, with patience enough for servers whose first connections break in the handshake.
fn remote(server: &Server, mode: Mode, delay: Duration, connections: usize) -> Arc<Remote> {
    let target = target(server, mode);
    let end = Instant::now() + Duration::from_secs(20);
    let first = connect_until(&target, end, end, &AtomicBool::new(false));
    Arc::new(Remote::new(
        target,
        first.expect("connects"),
        delay,
        connections,
    ))
}

fn threads(count: usize, backend: BackendChoice) -> ThreadSet {
    let pool = BufferPool::new(4 << 20);
    ThreadSet::start(count, backend, pool, News::channel().0).expect("threads")
}

/// Runs something with the disk on a thread, and lets the disk go.
fn on_thread<T: Send + 'static, F: Future<Output = T> + 'static>(
    threads: &ThreadSet,
    thread: ThreadId,
    remote: &Arc<Remote>,
    work: impl FnOnce(Rc<dyn Storage>) -> F + Send + 'static,
) -> T {
    let remote = Arc::clone(remote);
    let run = threads.run(thread, move |context| {
        Box::pin(async move {
            let storage = NbdStorage::new(remote, &context);
            work(Aligned::over(Rc::new(storage))).await
        })
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    let limited = async { tokio::time::timeout(Duration::from_secs(60), run).await };
    let outcome = runtime.expect("a runtime").block_on(limited);
    outcome
        .expect("it must not hang")
        .expect("the thread lives")
}

async fn read(storage: &Rc<dyn Storage>, offset: u64, length: usize) -> Result<Vec<u8>, i32> {
    let mut buffer = Buffer::zeroed(length);
    buffer.as_mut_slice().fill(0xee);
    let transfer = storage.read(offset, buffer).await;
    assert_eq!(transfer.buffer.len(), length);
    transfer.outcome.map_err(|error| error.errno)?;
    Ok(transfer.buffer.as_slice().to_vec())
}

async fn write(storage: &Rc<dyn Storage>, offset: u64, bytes: &[u8]) -> Result<(), i32> {
    let transfer = storage.write(offset, Buffer::copy_of(bytes)).await;
    assert_eq!(
        transfer.buffer.as_slice(),
        bytes,
        "the buffer comes back as it was"
    );
    transfer.outcome.map_err(|error| error.errno)
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length)
        .map(|index| (index % 251) as u8 ^ seed | 1)
        .collect()
}

/// A little of everything, held against what the disk must be: what went wrong first, with the disk as far as it is known.
async fn session(storage: &Rc<dyn Storage>) -> Result<Vec<u8>, i32> {
    let mut model = vec![0; 16384];
    let errno = |error: blockyard_storage::StorageError| error.errno;
    let first = pattern(5000, 7);
    write(storage, 3000, &first).await?;
    model[3000..8000].copy_from_slice(&first);
    assert_eq!(read(storage, 0, 16384).await?, model);
    storage
        .zero(ByteRange::new(4096, 1024), UNMAP)
        .await
        .map_err(errno)?;
    model[4096..5120].fill(0);
    storage.sync().await.map_err(errno)?;
    let extents = storage.allocation(ByteRange::new(0, 16384), 64).await;
    let mut at = 0;
    for extent in extents.map_err(errno)? {
        assert_eq!(extent.range.offset(), at);
        at = extent.range.end();
        let bytes = &model[extent.range.offset() as usize..at as usize];
        assert!(
            extent.data || bytes.iter().all(|byte| *byte == 0),
            "{extent:?}"
        );
    }
    let second = pattern(600, 99);
    let (one, other) =
        futures_util::future::join(write(storage, 12000, &second), read(storage, 2500, 3000)).await;
    one?;
    assert_eq!(other?, model[2500..5500]);
    model[12000..12600].copy_from_slice(&second);
    storage
        .discard(ByteRange::new(3072, 512))
        .await
        .map_err(errno)?;
    model[3072..3584].fill(0);
    storage.sync().await.map_err(errno)?;
    Ok(model)
}

#[test]
fn a_disk_holds_what_is_written_in_every_mode_on_every_back_end() {
    for backend in BACKENDS {
        let threads = threads(1, backend);
        for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
            for (minimum, connections) in [(1, 1), (512, 1), (1, 4)] {
                let export = ExportFacts {
                    block_sizes: BlockSizes {
                        minimum,
                        preferred: 4096,
                        maximum: 4096,
                    },
                    ..facts(16384)
                };
                let server = Server::start(export, &[]);
                let remote = remote(&server, mode, Duration::ZERO, connections);
                let model = on_thread(&threads, threads.choose(), &remote, |storage| async move {
                    session(&storage).await
                });
                let model = model.expect("goes well");
                assert_eq!(*server.disk.bytes.lock().expect("whole"), model);
            }
        }
        threads.end();
    }
}

#[test]
fn a_connection_may_end_at_every_byte_and_requests_go_on_over_the_next() {
    let threads = threads(1, BackendChoice::Auto);
    for mode in [Mode::Simple, Mode::Extended] {
        // A few more than the session has, so that the last ones meet no end.
        let (mut cut, mut whole) = (0, 0);
        while whole < 3 {
            let fates = [
                Fate {
                    sent_max: Some(cut),
                    ..Fate::default()
                },
                Fate {
                    received_max: Some(cut),
                    ..Fate::default()
                },
            ];
            let server = Server::start(facts(16384), &fates);
            let remote = remote(&server, mode, Duration::from_secs(20), 1);
            let model = on_thread(&threads, threads.choose(), &remote, |storage| async move {
                session(&storage).await
            });
            let model = model.unwrap_or_else(|errno| panic!("{mode:?}, cut at {cut}: {errno}"));
            assert_eq!(
                *server.disk.bytes.lock().expect("whole"),
                model,
                "{mode:?} {cut}"
            );
            whole += usize::from(server.disk.connections.load(Ordering::SeqCst) == 1);
            // Every byte of the handshake and the first replies, and of the rest some.
            cut += if cut < 700 { 1 } else { 61 };
        }
    }
    threads.end();
}

#[test]
fn without_a_delay_requests_fail_at_once_and_later_ones_find_the_server_again() {
    let threads = threads(1, BackendChoice::Auto);
    for cut in (400..4000).step_by(37) {
        let fate = Fate {
            sent_max: Some(cut),
            ..Fate::default()
        };
        let server = Server::start(facts(16384), &[fate]);
        let remote = remote(&server, Mode::Structured, Duration::ZERO, 1);
        let later = on_thread(&threads, threads.choose(), &remote, |storage| async move {
            let first = session(&storage).await;
            // As soon as there is a connection again, what can be read is read.
            let later = loop {
                match read(&storage, 0, 16384).await {
                    Err(EIO) => tokio::task::yield_now().await,
                    later => break later,
                }
            };
            (
                first,
                later,
                storage.sync().await.map_err(|error| error.errno),
            )
        });
        let (first, later, synced) = later;
        let held = server.disk.bytes.lock().expect("whole").clone();
        assert_eq!(later, Ok(held), "{cut}");
        match first {
            Ok(_) => assert_eq!(synced, Ok(())),
            Err(errno) => {
                assert_eq!(errno, EIO);
                // Nobody can say whether a server that was lost with what it had answered has kept it.
                assert!(synced == Ok(()) || synced == Err(EIO), "{synced:?}");
            }
        }
    }
    threads.end();
}

#[test]
fn an_outage_is_waited_for_once_by_all_requests_together() {
    const DELAY: Duration = Duration::from_millis(300);
    const REQUESTS: u32 = 60;
    let threads = threads(1, BackendChoice::Auto);
    let server = Server::start(facts(16384), &[]);
    let length = handshake_bytes(&server);
    let fate = Fate {
        sent_max: Some(length),
        ..Fate::default()
    };
    let server = Server::start(facts(16384), &[fate]);
    let remote = remote(&server, Mode::Simple, DELAY, 1);
    let (here, away) = (server.path.clone(), server.path.with_extension("away"));
    std::fs::rename(&here, &away).expect("nobody is let in any more");
    on_thread(&threads, threads.choose(), &remote, |storage| async move {
        for round in 0..2 {
            let started = Instant::now();
            // Those that come at once wait together; those that come later do not wait at all.
            let (one, other) =
                futures_util::future::join(read(&storage, 0, 512), read(&storage, 512, 512)).await;
            assert_eq!((one, other), (Err(EIO), Err(EIO)), "{round}");
            assert!(round > 0 || started.elapsed() >= DELAY, "it is waited for");
            for _ in 0..REQUESTS {
                assert_eq!(read(&storage, 0, 512).await, Err(EIO), "{round}");
            }
            let took = started.elapsed();
            assert!(took < DELAY * REQUESTS / 2, "{took:?} for one outage");
        }
        std::fs::rename(&away, &here).expect("it is back");
        while read(&storage, 0, 512).await == Err(EIO) {
            tokio::task::yield_now().await;
        }
        write(&storage, 0, &[1; 512])
            .await
            .expect("it goes on as before");
    });
    threads.end();
}

#[test]
fn writes_that_were_not_safe_when_a_connection_broke_make_every_flush_fail() {
    let threads = threads(1, BackendChoice::Auto);
    // Two simple replies after a handshake whose length is known.
    let server = Server::start(facts(16384), &[]);
    let length = handshake_bytes(&server);
    for (delay, flushes) in [(Duration::ZERO, false), (Duration::from_secs(20), true)] {
        let fate = Fate {
            sent_max: Some(length + 16),
            ..Fate::default()
        };
        let server = Server::start(facts(16384), &[fate]);
        let remote = remote(&server, Mode::Simple, delay, 1);
        let outcome = on_thread(&threads, threads.choose(), &remote, |storage| async move {
            write(&storage, 0, &[1; 512]).await.expect("answered");
            let _ = write(&storage, 512, &[2; 512]).await;
            let first = storage.sync().await.is_ok();
            (
                first,
                storage.sync().await.is_ok(),
                write(&storage, 0, &[3; 512]).await.is_ok(),
            )
        });
        assert_eq!(outcome, (flushes, flushes, flushes));
    }
    threads.end();
}

/// The server is gone when there is nothing left to make safe: only what comes then fails.
#[test]
fn a_flush_of_what_is_safe_already_needs_no_server() {
    let threads = threads(1, BackendChoice::Auto);
    let server = Server::start(facts(16384), &[]);
    let length = handshake_bytes(&server);
    let answers = |count: usize| Fate {
        sent_max: Some(length + 16 * count),
        ..Fate::default()
    };
    let gone = Fate {
        sent_max: Some(0),
        ..Fate::default()
    };
    let server = Server::start(facts(16384), &[answers(2), gone, gone, gone]);
    let remote = remote(&server, Mode::Simple, Duration::ZERO, 1);
    on_thread(&threads, threads.choose(), &remote, |storage| async move {
        assert!(storage.sync().await.is_ok(), "nothing was written");
        write(&storage, 0, &[1; 512]).await.expect("answered");
        assert!(storage.sync().await.is_ok());
        assert!(read(&storage, 0, 512).await.is_err(), "the server goes");
        assert!(storage.sync().await.is_ok());
        assert!(write(&storage, 0, &[2; 512]).await.is_err());
        let flushed = storage.sync().await;
        assert!(flushed.is_err(), "some of it may have been written");
    });
    threads.end();
}

/// What a server says before the first reply, with simple replies.
fn handshake_bytes(server: &Server) -> usize {
    for length in 0.. {
        let fate = Fate {
            sent_max: Some(length),
            ..Fate::default()
        };
        server.disk.fates.lock().expect("whole").push_back(fate);
        let end = Instant::now();
        let given_up = AtomicBool::new(false);
        let patience = end + Duration::from_secs(20);
        if connect_until(&target(server, Mode::Simple), end, patience, &given_up).is_ok() {
            return length;
        }
    }
    unreachable!("a handshake has an end");
}

#[test]
fn a_server_that_falls_silent_holds_up_no_one_who_gives_up() {
    let server = Server::start(facts(16384), &[]);
    let length = handshake_bytes(&server);
    let threads = threads(1, BackendChoice::Auto);
    for after in [0, 8, 15] {
        let fate = Fate {
            silent_after: Some(length + after),
            ..Fate::default()
        };
        let server = Server::start(facts(16384), &[fate]);
        let remote = remote(&server, Mode::Simple, Duration::ZERO, 1);
        on_thread(&threads, threads.choose(), &remote, |storage| async move {
            let mut reading = Box::pin(read(&storage, 0, 4096));
            for _ in 0..50 {
                let waits = futures_util::future::poll_immediate(&mut reading).await;
                assert!(waits.is_none());
                tokio::task::yield_now().await;
            }
            drop(reading);
        });
    }
    // In the handshake there is a deadline, and somebody who gives up.
    for (given_up, patience) in [
        (false, Duration::from_millis(50)),
        (true, Duration::from_secs(60)),
    ] {
        let fate = Fate {
            silent_after: Some(20),
            ..Fate::default()
        };
        let server = Server::start(facts(16384), &[fate]);
        let now = Instant::now();
        let given_up = AtomicBool::new(given_up);
        let ended = connect_until(
            &target(&server, Mode::Simple),
            now,
            now + patience,
            &given_up,
        );
        assert!(ended.is_err());
    }
    threads.end();
}

#[test]
fn a_disk_goes_from_thread_to_thread_on_one_connection() {
    for backend in BACKENDS {
        let threads = threads(3, backend);
        let server = Server::start(facts(16384), &[]);
        let remote = remote(&server, Mode::Extended, Duration::ZERO, 1);
        for round in 0..12_u8 {
            let thread = threads.choose();
            threads.load(thread, 1);
            on_thread(&threads, thread, &remote, move |storage| async move {
                let last = pattern(4096, round.wrapping_sub(1));
                let expected = if round == 0 { vec![0; 4096] } else { last };
                assert_eq!(read(&storage, 8192, 4096).await, Ok(expected));
                write(&storage, 8192, &pattern(4096, round))
                    .await
                    .expect("written");
            });
        }
        assert_eq!(server.disk.connections.load(Ordering::SeqCst), 1);
        drop(remote);
        threads.end();
    }
}

#[test]
fn a_disk_that_is_no_whole_sectors_ends_in_zeroes() {
    let threads = threads(1, BackendChoice::Auto);
    let server = Server::start(facts(1000), &[]);
    let remote = remote(&server, Mode::Structured, Duration::ZERO, 1);
    on_thread(&threads, threads.choose(), &remote, |storage| async move {
        let mut bytes = pattern(1000, 3);
        bytes.extend([0; 24]);
        write(&storage, 0, &bytes).await.expect("zeroes have room");
        assert_eq!(read(&storage, 0, 1024).await, Ok(bytes));
        assert_eq!(read(&storage, 1000, 24).await, Ok(vec![0; 24]));
        assert_eq!(write(&storage, 512, &[1; 512]).await, Err(ENOSPC));
        storage
            .zero(ByteRange::new(512, 512), UNMAP)
            .await
            .expect("zeroes have room");
        assert_eq!(read(&storage, 512, 512).await, Ok(vec![0; 512]));
        let extents = storage
            .allocation(ByteRange::new(0, 1024), 9)
            .await
            .expect("told");
        assert!(extents[0].data && extents[0].range.end() >= 512);
    });
    threads.end();
}

#[test]
fn zeroes_are_only_fast_where_a_server_says_so() {
    let threads = threads(1, BackendChoice::Auto);
    let export = ExportFacts {
        writable: false,
        ..facts(16384)
    };
    let server = Server::start(export, &[]);
    let remote = remote(&server, Mode::Structured, Duration::ZERO, 1);
    assert!(remote.agreement().flags & 2 != 0);
    on_thread(&threads, threads.choose(), &remote, |storage| async move {
        assert!(storage.facts().read_only);
        let fast = ZeroMode {
            may_unmap: true,
            no_fallback: true,
        };
        let zeroed = storage.zero(ByteRange::new(0, 512), fast).await;
        assert_eq!(zeroed.expect_err("not known").errno, EOPNOTSUPP);
    });
    threads.end();
}
