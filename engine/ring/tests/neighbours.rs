//! Short transfers beside each other in a file, which reach the kernel as one: each keeps its own bytes and its own answer.

use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::task::{Context, Waker};

use blockyard_ring::{BackendChoice, HostFile, OpenMode, Reactor, ReactorConfig};
use blockyard_storage::buffer::BufferPool;
use blockyard_storage::{Buffer, LocalFuture, Storage, Transfer};
use futures_util::future::join_all;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

mod support;
use support::block_on;

const PAGE: usize = 4096;

/// Taken for a file with direct I/O, whatever it is.
const DIRECT: OpenMode = OpenMode {
    write: true,
    direct: true,
    create: false,
};

fn reactor(backend: BackendChoice) -> Reactor {
    let config = ReactorConfig {
        backend,
        ..ReactorConfig::new(BufferPool::new(1 << 20))
    };
    Reactor::open(config).expect("a reactor")
}

/// A file in memory that has so many bytes, each the number of its page, and cannot get more.
fn sealed(length: usize) -> std::fs::File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file: std::fs::File = memfd_create("sealed", flags).expect("made").into();
    let bytes: Vec<u8> = (0..length).map(|at| (at / PAGE) as u8).collect();
    file.write_all(&bytes).expect("written");
    fcntl_add_seals(&file, SealFlags::GROW).expect("sealed");
    file
}

fn on(reactor: &Reactor, file: &std::fs::File) -> Rc<dyn Storage> {
    let descriptor: OwnedFd = file.try_clone().expect("cloned").into();
    reactor.file(
        HostFile::from_fd(descriptor, DIRECT).expect("taken over"),
        false,
    )
}

fn page(byte: u8) -> Buffer {
    Buffer::copy_of(&[byte; PAGE])
}

fn writes<'a>(storage: &'a dyn Storage, count: usize, byte: u8) -> Vec<LocalFuture<'a, Transfer>> {
    let pages = (0..count).map(|nth| storage.write((nth * PAGE) as u64, page(byte + nth as u8)));
    pages.collect()
}

#[test]
fn where_a_file_ends_or_takes_no_more_each_gets_its_own_answer() {
    for backend in [BackendChoice::Auto, BackendChoice::Threads] {
        let reactor = reactor(backend);
        let file = sealed(5 * PAGE + 100);
        let storage = on(&reactor, &file);
        block_on(&reactor, async {
            let reads = (0..8).map(|nth| storage.read((nth * PAGE) as u64, page(0xEE)));
            for (nth, read) in join_all(reads).await.into_iter().enumerate() {
                assert_eq!(read.outcome, Ok(()), "{backend:?}, page {nth}");
                let in_file = (5 * PAGE + 100).saturating_sub(nth * PAGE).min(PAGE);
                let (bytes, behind) = read.buffer.as_slice().split_at(in_file);
                assert!(bytes.iter().all(|byte| usize::from(*byte) == nth));
                assert!(behind.iter().all(|byte| *byte == 0), "page {nth}");
            }
            let written = join_all(writes(&*storage, 8, 10)).await;
            for (nth, written) in written.into_iter().enumerate() {
                match nth {
                    0..5 => assert_eq!(written.outcome, Ok(()), "{backend:?}, page {nth}"),
                    _ => {
                        let error = written.outcome.expect_err("no room");
                        assert_eq!(error.errno, libc::EPERM, "{backend:?}, page {nth}");
                    }
                }
            }
        });
        let mut bytes = vec![0; 5 * PAGE];
        file.read_exact_at(&mut bytes, 0).expect("read");
        let wanted: Vec<u8> = (0..5 * PAGE).map(|at| 10 + (at / PAGE) as u8).collect();
        assert!(bytes == wanted, "{backend:?}");
    }
}

#[test]
fn where_none_can_be_written_each_is_told_so() {
    for backend in [BackendChoice::Auto, BackendChoice::Threads] {
        let reactor = reactor(backend);
        let whole = sealed(8 * PAGE);
        let name = format!("/proc/self/fd/{}", whole.as_raw_fd());
        let descriptor: OwnedFd = std::fs::File::open(name).expect("opened").into();
        let file = HostFile::from_fd(descriptor, DIRECT).expect("taken over");
        let storage = reactor.file(file, false);
        block_on(&reactor, async {
            for written in join_all(writes(&*storage, 8, 0)).await {
                let error = written.outcome.expect_err("open for reading only");
                assert_eq!(error.errno, libc::EBADF, "{backend:?}");
            }
        });
    }
}

/// Whoever leaves takes nothing from those beside him, before the kernel has heard of any and after.
#[test]
fn those_beside_one_that_was_given_up_go_on() {
    for backend in [BackendChoice::Auto, BackendChoice::Threads] {
        for is_told in [false, true] {
            let reactor = reactor(backend);
            let file = sealed(8 * PAGE);
            let storage = on(&reactor, &file);
            let mut flying = writes(&*storage, 8, 20);
            let mut cx = Context::from_waker(Waker::noop());
            let mut ended: Vec<bool> = flying
                .iter_mut()
                .map(|write| write.as_mut().poll(&mut cx).is_ready())
                .collect();
            if is_told {
                reactor
                    .turn(Some(std::time::Duration::ZERO))
                    .expect("the reactor goes on");
            }
            let mut kept = Vec::new();
            for (nth, write) in flying.into_iter().enumerate() {
                if nth % 3 == 1 {
                    ended[nth] = true;
                    drop(write);
                } else if !ended[nth] {
                    kept.push(write);
                }
            }
            block_on(&reactor, async {
                for written in join_all(kept).await {
                    assert_eq!(written.outcome, Ok(()));
                }
                storage.sync().await.expect("synced");
            });
            let mut bytes = vec![0; 8 * PAGE];
            file.read_exact_at(&mut bytes, 0).expect("read");
            for (nth, page) in bytes.chunks(PAGE).enumerate() {
                let is_new = page.iter().all(|byte| usize::from(*byte) == 20 + nth);
                let is_old = page.iter().all(|byte| usize::from(*byte) == nth);
                assert!(
                    is_new || (is_old && nth % 3 == 1),
                    "{backend:?}, page {nth}"
                );
            }
        }
    }
}

/// Files of their own, in turn, and one that is not in order.
#[test]
fn files_and_places_are_not_mixed_up() {
    let reactor = reactor(BackendChoice::Auto);
    let files: Vec<_> = (0..12).map(|_| sealed(16 * PAGE)).collect();
    let storages: Vec<_> = files.iter().map(|file| on(&reactor, file)).collect();
    let order = |nth: usize| (nth * 5 + nth / 4) % 16;
    block_on(&reactor, async {
        let mut all = Vec::new();
        for nth in 0..16 {
            for (number, storage) in storages.iter().enumerate() {
                let place = if number % 2 == 0 { nth } else { order(nth) };
                let byte = (number * 16 + place) as u8;
                all.push(storage.write((place * PAGE) as u64, page(byte)));
            }
        }
        for written in join_all(all).await {
            assert_eq!(written.outcome, Ok(()));
        }
    });
    for (number, file) in files.iter().enumerate() {
        let mut bytes = vec![0; 16 * PAGE];
        file.read_exact_at(&mut bytes, 0).expect("read");
        let placed = (0..16)
            .map(order)
            .collect::<std::collections::BTreeSet<_>>();
        for (place, page) in bytes.chunks(PAGE).enumerate() {
            let is_written = number % 2 == 0 || placed.contains(&place);
            let wanted = if is_written {
                number * 16 + place
            } else {
                place
            };
            assert!(
                page.iter().all(|byte| *byte == wanted as u8),
                "{number}, {place}"
            );
        }
    }
}
