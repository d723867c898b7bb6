//! Both backends, buffered and direct, against the suite every storage must pass; and the fall from io_uring to threads
//! where it is forbidden.

use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use blockyard_ring::{BackendChoice, BackendKind, HostFile, OpenMode, Reactor, ReactorConfig};
use blockyard_storage::buffer::BufferPool;
use blockyard_storage::{Buffer, LocalFuture, Storage, Transfer, conformance};

#[path = "support/forbid_ring.rs"]
mod forbid_ring;
mod support;
use forbid_ring::forbid_io_uring;
use support::block_on;

fn reactor(backend: BackendChoice) -> Reactor {
    let pool = BufferPool::new(8 << 20);
    let config = ReactorConfig {
        backend,
        depth: 16,
        ..ReactorConfig::new(pool)
    };
    Reactor::open(config).expect("a reactor")
}

/// Runs the suite on files of its own; `false` if the file system has no direct I/O.
fn check(reactor: &Reactor, direct: bool) -> bool {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let number = Cell::new(0);
    let path = || {
        number.set(number.get() + 1);
        folder.path().join(number.get().to_string())
    };
    let mode = OpenMode {
        write: true,
        direct,
        create: true,
    };
    let open = |path: PathBuf| HostFile::open(&path, mode);
    if direct && open(path()).is_err() {
        eprintln!("SKIPPED: no direct I/O on {}", folder.path().display());
        return false;
    }
    let make = || -> Rc<dyn Storage> { reactor.file(open(path()).expect("opened"), false) };
    conformance::run(&make, &|future| block_on(reactor, future));
    true
}

#[test]
fn threads_buffered_and_direct() {
    let reactor = reactor(BackendChoice::Threads);
    assert_eq!(reactor.backend(), BackendKind::Threads);
    check(&reactor, false);
    check(&reactor, true);
}

#[test]
fn io_uring_buffered_and_direct() {
    if let Err(error) = blockyard_ring::probe() {
        eprintln!("SKIPPED: no io_uring here: {error}");
        return;
    }
    let reactor = reactor(BackendChoice::Uring);
    assert_eq!(reactor.backend(), BackendKind::Uring);
    check(&reactor, false);
    check(&reactor, true);
}

/// Small buffers of a pool are parts of one slot, which the ring knows as a whole.
#[test]
fn small_buffers_of_a_pool_go_to_their_own_places_and_come_from_there() {
    const COUNT: usize = 20;
    for (backend, direct) in [
        (BackendChoice::Auto, true),
        (BackendChoice::Auto, false),
        (BackendChoice::Threads, false),
    ] {
        let pool = BufferPool::new(8 << 20);
        let config = ReactorConfig {
            backend,
            depth: 16,
            ..ReactorConfig::new(pool.clone())
        };
        let reactor = Reactor::open(config).expect("a reactor");
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        for length in [4096, 20 << 10, 64 << 10] {
            let path = folder.path().join(length.to_string());
            let mode = OpenMode {
                write: true,
                direct,
                create: true,
            };
            let Ok(file) = HostFile::open(&path, mode) else {
                eprintln!("SKIPPED: no direct I/O on {}", folder.path().display());
                continue;
            };
            let storage = reactor.file(file, false);
            let place = |nth: usize| (nth * length) as u64;
            let byte = |nth: usize, round: usize| (1 + nth * 7 + round) as u8;
            // More at once than a slot has parts of the longest kind.
            for round in 0..2 {
                let mut buffers: Vec<_> =
                    (0..COUNT).filter_map(|_| pool.try_take(length)).collect();
                assert_eq!(buffers.len(), COUNT);
                for (nth, buffer) in buffers.iter_mut().enumerate() {
                    buffer.as_mut_slice().fill(byte(nth, round));
                }
                let numbered = buffers.into_iter().enumerate();
                let writes = numbered.map(|(nth, buffer)| storage.write(place(nth), buffer));
                let mut buffers = all(&reactor, writes.collect());
                let on_disk = std::fs::read(&path).expect("read");
                for (nth, piece) in on_disk.chunks(length).enumerate() {
                    assert!(piece.iter().all(|found| *found == byte(nth, round)));
                }
                // Into other parts than they came from.
                buffers.rotate_left(7);
                let numbered = buffers.into_iter().enumerate();
                let reads = numbered.map(|(nth, buffer)| storage.read(place(nth), buffer));
                for (nth, buffer) in all(&reactor, reads.collect()).iter().enumerate() {
                    let bytes = buffer.as_slice();
                    assert!(bytes.iter().all(|found| *found == byte(nth, round)));
                }
            }
        }
    }
}

/// The buffers of transfers that were all in flight at once.
fn all(reactor: &Reactor, transfers: Vec<LocalFuture<'_, Transfer>>) -> Vec<Buffer> {
    let mut ended: Vec<Option<Buffer>> = transfers.iter().map(|_| None).collect();
    let mut flying: Vec<_> = transfers.into_iter().map(Some).collect();
    let all = std::future::poll_fn(|cx| {
        for (transfer, ended) in flying.iter_mut().zip(&mut ended) {
            if let Some(Poll::Ready(done)) = transfer.as_mut().map(|one| one.as_mut().poll(cx)) {
                assert_eq!(done.outcome, Ok(()));
                (*transfer, *ended) = (None, Some(done.buffer));
            }
        }
        match ended.iter().all(Option::is_some) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    });
    block_on(reactor, all);
    ended.into_iter().flatten().collect()
}

/// The filter binds the thread that installs it and those it starts, so a thread of its own is enough.
#[test]
fn threads_take_over_where_io_uring_is_forbidden() {
    for errno in [libc::EPERM, libc::ENOSYS] {
        std::thread::spawn(move || {
            forbid_io_uring(errno);
            let error = blockyard_ring::probe().expect_err("forbidden");
            assert_eq!(error.raw_os_error(), Some(errno));
            let config = ReactorConfig {
                backend: BackendChoice::Uring,
                ..ReactorConfig::new(BufferPool::new(0))
            };
            assert!(
                Reactor::open(config).is_err(),
                "not silently something else"
            );
            let reactor = reactor(BackendChoice::Auto);
            assert_eq!(reactor.backend(), BackendKind::Threads);
            check(&reactor, false);
        })
        .join()
        .expect("the suite passes");
    }
}

/// Calls from another thread end every wait, however they fall.
#[test]
fn no_call_is_lost() {
    for backend in [BackendChoice::Auto, BackendChoice::Threads] {
        let reactor = reactor(backend);
        let remote = reactor.waker();
        let (rung, heard) = (Arc::new(std::sync::Barrier::new(2)), 5_000);
        let barrier = rung.clone();
        let caller = std::thread::spawn(move || {
            for _ in 0..heard {
                barrier.wait();
                remote.wake();
            }
        });
        for call in 0..heard {
            rung.wait();
            let waker = reactor.waker();
            let mut turns = 0;
            while !waker.take_woken() {
                let start = std::time::Instant::now();
                reactor
                    .turn(Some(Duration::from_secs(20)))
                    .expect("the reactor goes on");
                turns += 1;
                assert!(
                    start.elapsed() < Duration::from_secs(10),
                    "call {call} was lost ({turns})"
                );
            }
        }
        caller.join().expect("the caller ends");
    }
}
