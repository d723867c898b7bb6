//! What an open file of the host knows of itself, and what stays with it when it changes its reactor.

use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::task::Poll;

use blockyard_ring::{BackendChoice, HostFile, OpenMode, Reactor, ReactorConfig};
use blockyard_storage::buffer::BufferPool;
use blockyard_storage::{Buffer, ByteRange, Preallocation, ZeroMode};
use futures_util::future::{join, join_all};

mod support;
use support::block_on;

fn reactor(backend: BackendChoice) -> Reactor {
    let config = ReactorConfig {
        backend,
        ..ReactorConfig::new(BufferPool::new(1 << 20))
    };
    Reactor::open(config).expect("a reactor")
}

/// A device that takes every byte and refuses every flush.
#[test]
fn a_failed_flush_stays_with_the_file_on_every_reactor() {
    let mode = OpenMode {
        write: true,
        ..OpenMode::default()
    };
    let file = HostFile::open(Path::new("/dev/null"), mode).expect("opened");
    let first = reactor(BackendChoice::Auto);
    let storage = first.file(file.clone(), false);
    let mut errno = 0;
    block_on(&first, async {
        errno = storage.sync().await.expect_err("no flush here").errno;
    });
    drop((storage, first));
    let second = reactor(BackendChoice::Auto);
    let storage = second.file(file, false);
    block_on(&second, async {
        let written = storage.write(0, Buffer::zeroed(4096)).await;
        assert_eq!(written.outcome.expect_err("poisoned").errno, errno);
    });
}

#[test]
fn what_others_have_made_of_a_file_is_seen_once_it_is_taken_over() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("file");
    std::fs::write(&path, vec![1; 8192]).expect("written");
    for direct in [false, true] {
        for write in [false, true] {
            let mode = OpenMode {
                write,
                direct,
                ..OpenMode::default()
            };
            // Not every file system can do without its cache.
            let Ok(file) = HostFile::open(&path, mode) else {
                assert!(direct);
                continue;
            };
            for length in [4096, 16384, 8192] {
                let before = file.length_bytes();
                std::fs::write(&path, vec![2; length]).expect("written");
                assert_eq!(file.length_bytes(), before);
                let seen = file.look_anew().expect("looked");
                assert_eq!((seen, file.length_bytes()), (length as u64, before));
                file.taken_over(seen);
                assert_eq!(file.length_bytes(), seen);
            }
        }
    }
    let file = HostFile::open(&path, OpenMode::default()).expect("opened");
    std::fs::remove_file(&path).expect("removed");
    assert_eq!(file.look_anew().expect("it has no name"), 8192);
}

#[test]
fn a_failed_flush_that_nobody_waits_for_stays_too() {
    let mode = OpenMode {
        write: true,
        ..OpenMode::default()
    };
    let file = HostFile::open(Path::new("/dev/null"), mode).expect("opened");
    let config = ReactorConfig {
        workers_max: 1,
        ..ReactorConfig::new(BufferPool::new(1 << 20))
    };
    let reactor = Reactor::open(config).expect("a reactor");
    let storage = reactor.file(file.clone(), false);
    block_on(&reactor, async {
        let mut abandoned = storage.sync();
        poll_fn(|cx| Poll::Ready(abandoned.as_mut().poll(cx).is_ready())).await;
        drop(abandoned);
        // The only worker does one thing after the other.
        let range = ByteRange::new(0, 4096);
        storage.allocation(range, 1).await.expect("mapped");
        assert!(file.failed_sync().is_some(), "whoever comes next is told");
    });
}

#[test]
fn a_hole_shows_however_it_was_made_through_the_file() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = folder.path().join("image");
    let mode = OpenMode {
        write: true,
        ..OpenMode::default()
    };
    let (hole, whole) = (ByteRange::new(1 << 20, 1 << 20), ByteRange::new(0, 4 << 20));
    for how in ["discard", "zero", "resize", "through another descriptor"] {
        std::fs::write(&path, vec![7; 4 << 20]).expect("written");
        let file = HostFile::open(&path, mode).expect("opened");
        let reactor = reactor(BackendChoice::Auto);
        let storage = reactor.file(file.clone(), false);
        let other = reactor.file(file.reopened(mode).expect("opened again"), false);
        block_on(&reactor, async {
            let is_data = async || {
                let told = storage.allocation(hole, 1).await.expect("mapped");
                assert_eq!(told.first().map(|extent| extent.range), Some(hole));
                told.iter().all(|extent| extent.data)
            };
            storage.allocation(whole, 8).await.expect("mapped");
            assert!(is_data().await, "{how}");
            match how {
                "discard" => storage.discard(hole).await,
                "zero" => {
                    let unmaps = ZeroMode {
                        may_unmap: true,
                        no_fallback: false,
                    };
                    storage.zero(hole, unmaps).await
                }
                "resize" => {
                    storage.resize(hole.offset()).await.expect("shorter");
                    storage.resize(whole.end()).await
                }
                _ => other.discard(hole).await,
            }
            .expect(how);
            assert!(!is_data().await, "{how}");
        });
    }
}

#[test]
fn the_same_file_is_opened_once_more_whatever_its_name_is() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = folder.path().join("image");
    std::fs::write(&path, vec![7; 64 << 10]).expect("written");
    let reads = HostFile::open(&path, OpenMode::default()).expect("opened");
    std::fs::rename(&path, folder.path().join("moved")).expect("moved");
    std::fs::write(&path, b"another").expect("written");
    let mode = OpenMode {
        write: true,
        ..OpenMode::default()
    };
    let writes = reads.reopened(mode).expect("opened again");
    assert_eq!(writes.identity(), reads.identity());
    assert!(writes.is_writable() && !reads.is_writable());
    let reactor = reactor(BackendChoice::Auto);
    let (old, new) = (
        reactor.file(reads.clone(), true),
        reactor.file(writes, false),
    );
    block_on(&reactor, async {
        let written = new.write(64 << 10, Buffer::zeroed(4096)).await;
        assert_eq!(written.outcome, Ok(()));
        assert_eq!(reads.length_bytes(), (64 << 10) + 4096, "both know of it");
        let read = old.read(64 << 10, Buffer::zeroed(4096)).await;
        assert_eq!(read.outcome, Ok(()));
        let refused = old.write(0, Buffer::zeroed(4096)).await;
        assert!(refused.outcome.is_err());
    });
    assert_eq!(std::fs::read(&path).expect("read"), b"another");
}

/// A device that takes every byte and refuses every flush.
#[test]
fn a_failed_flush_is_remembered_however_the_file_is_opened() {
    let mode = OpenMode {
        write: true,
        ..OpenMode::default()
    };
    let file = HostFile::open(Path::new("/dev/null"), mode).expect("opened");
    let again = file.reopened(mode).expect("opened again");
    let reactor = reactor(BackendChoice::Auto);
    let (old, new) = (reactor.file(file, false), reactor.file(again, false));
    block_on(&reactor, async {
        let errno = old.sync().await.expect_err("no flush here").errno;
        let written = new.write(0, Buffer::zeroed(4096)).await;
        assert_eq!(written.outcome.expect_err("poisoned").errno, errno);
    });
}

/// What somebody else cut off is not taken for zeroes.
#[test]
fn a_file_cut_short_by_others_fails_to_read() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = folder.path().join("image");
    for backend in [BackendChoice::Auto, BackendChoice::Threads] {
        std::fs::write(&path, vec![7; 64 << 10]).expect("written");
        let file = HostFile::open(&path, OpenMode::default()).expect("opened");
        let flags = rustix::fs::fcntl_getfl(file.descriptor()).expect("told");
        assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
        let reactor = reactor(backend);
        let storage = reactor.file(file, true);
        std::fs::File::options()
            .write(true)
            .open(&path)
            .and_then(|other| other.set_len(10_000))
            .expect("cut");
        block_on(&reactor, async {
            let read = storage.read(0, Buffer::zeroed(8192)).await;
            assert_eq!(read.outcome, Ok(()));
            let read = storage.read(8192, Buffer::zeroed(8192)).await;
            assert_eq!(read.outcome.expect_err("cut off").errno, 5);
            let behind = storage.read(64 << 10, Buffer::zeroed(4096)).await;
            assert_eq!(behind.outcome, Ok(()), "behind the end there are zeroes");
        });
    }
}

/// A file system on a disk with sectors of 4 KiB; taken apart when dropped.
struct LargeSectors {
    device: String,
    folder: tempfile::TempDir,
}

impl LargeSectors {
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let image = folder.path().join("disk");
        let file = std::fs::File::create(&image).expect("made");
        file.set_len(64 << 20).expect("sized");
        let attached = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", "4096"])
            .arg(&image)
            .output();
        let device = match attached {
            Ok(output) if output.status.success() => {
                String::from_utf8_lossy(&output.stdout).trim().to_owned()
            }
            _ => return None,
        };
        let mounted = Self { device, folder };
        std::fs::create_dir(mounted.path("")).expect("made");
        let works = |command: &mut Command| command.output().is_ok_and(|out| out.status.success());
        let ready = works(Command::new("mkfs.ext4").arg("-qF").arg(&mounted.device))
            && works(
                Command::new("mount")
                    .arg(&mounted.device)
                    .arg(mounted.path("")),
            );
        ready.then_some(mounted)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("mounted").join(name)
    }
}

impl Drop for LargeSectors {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path("")).output();
        let _ = Command::new("losetup").arg("-d").arg(&self.device).output();
    }
}

/// Reads of a hole pass at any alignment there; writes do not.
#[test]
fn the_alignment_of_a_hole_is_that_of_its_disk() {
    let Some(disk) = LargeSectors::mount() else {
        eprintln!("SKIPPED: needs root, loop devices and the packages mount and e2fsprogs");
        return;
    };
    let mode = OpenMode {
        write: true,
        direct: true,
        create: true,
    };
    for (name, length_bytes) in [("empty", 0), ("hole", 1 << 20)] {
        let path = disk.path(name);
        let made = std::fs::File::create(&path).expect("made");
        made.set_len(length_bytes).expect("sized");
        let file = HostFile::open(&path, mode).expect("opened");
        assert_eq!(file.request_alignment(), 4096, "{name}");
    }
}

/// A file system may go through its cache to make a file longer whose last block is a part of one: what is on its way to that block
/// past the cache must not be undone by it.
#[test]
fn writes_to_the_last_block_survive_that_the_file_becomes_longer() {
    const SECTOR: usize = 512;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = folder.path().join("image");
    let mode = OpenMode {
        write: true,
        direct: true,
        create: true,
    };
    for backend in [BackendChoice::Auto, BackendChoice::Threads] {
        for round in 0..140_u32 {
            let _ = std::fs::remove_file(&path);
            let opened = HostFile::open(&path, mode).ok();
            let Some(file) = opened.filter(|file| file.request_alignment() as usize <= SECTOR)
            else {
                eprintln!(
                    "SKIPPED: no direct I/O of sectors on {}",
                    folder.path().display()
                );
                return;
            };
            let reactor = reactor(backend);
            let storage = reactor.file(file, false);
            let sectors = 1 + round as usize % 7;
            block_on(&reactor, async {
                let whole = Buffer::copy_of(&[1; 8192]);
                storage.write(0, whole).await.outcome.expect("written");
                let length = 4096 + (sectors * SECTOR) as u64;
                storage.resize(length).await.expect("cut");
                storage.sync().await.expect("synced");
                let writes = (0..sectors).map(|nth| {
                    let byte = 2 + nth as u8;
                    storage.write(
                        4096 + (nth * SECTOR) as u64,
                        Buffer::copy_of(&[byte; SECTOR]),
                    )
                });
                let more = [SECTOR as u64, 100 * 4096][round as usize / 7 % 2];
                let added = ByteRange::new(length, more);
                let longer = async {
                    match round as usize / 14 % 5 {
                        0 => storage.resize(added.end()).await,
                        1 => storage.zero(added, ZeroMode::default()).await,
                        2 => {
                            let may_unmap = true;
                            let holes = ZeroMode {
                                may_unmap,
                                ..ZeroMode::default()
                            };
                            storage.zero(added, holes).await
                        }
                        3 => storage.preallocate(added, Preallocation::Falloc).await,
                        _ => {
                            storage
                                .write(added.end(), Buffer::zeroed(SECTOR))
                                .await
                                .outcome
                        }
                    }
                };
                let (written, longer) = join(join_all(writes), longer).await;
                longer.expect("longer");
                assert!(written.iter().all(|one| one.outcome.is_ok()));
                assert_eq!(storage.sync().await, Ok(()), "{backend:?}, round {round}");
            });
            drop(storage);
            let found = std::fs::read(&path).expect("read");
            let (kept, added) = found[4096..].split_at(sectors * SECTOR);
            for (nth, sector) in kept.chunks(SECTOR).enumerate() {
                assert_eq!(
                    sector,
                    [2 + nth as u8; SECTOR],
                    "{backend:?}, round {round}"
                );
            }
            assert!(added.iter().all(|byte| *byte == 0));
        }
    }
}
