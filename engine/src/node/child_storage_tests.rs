//! Nodes as storages: the suite of all storages, and what nodes do differently.

use std::rc::Rc;

use blockyard_simulator::{DiskOptions, World, each_seed};
use blockyard_storage::error::{EIO, ENOSPC};
use blockyard_storage::{
    Buffer, ByteRange, LocalFuture, MemoryStorage, Operation, Preallocation, Storage, ZeroMode,
    conformance,
};
use futures_util::future::{join, join_all};

use crate::node::Node;
use crate::node::blkdebug_node::{BlkdebugNode, BlkdebugOptions, SharedFaults};
use crate::node::child_storage::ChildStorage;
use crate::node::fault_rules::FaultRules;
use crate::node::file_node::{FileNode, FileOptions};
use crate::node::raw_node::{RawNode, Window};
use crate::request::{BlkdebugIo, DetectZeroes, Discard, InjectError};

fn file(storage: MemoryStorage) -> Rc<dyn Node> {
    let options = FileOptions {
        discard: Discard::Unmap,
        ..FileOptions::default()
    };
    Rc::new(FileNode::new("file".to_owned(), Rc::new(storage), options))
}

fn raw(child: Rc<dyn Node>, window: Window) -> Rc<dyn Node> {
    let (discard, detect) = (Discard::Unmap, DetectZeroes::Off);
    let raw = RawNode::new("raw".to_owned(), child, window, false, discard, detect);
    Rc::new(raw)
}

fn filter(child: Rc<dyn Node>, faults: &[InjectError]) -> Rc<dyn Node> {
    let options = BlkdebugOptions {
        discard: Discard::Unmap,
        ..BlkdebugOptions::default()
    };
    let rules = FaultRules::new(faults, Vec::new()).expect("rules that can be");
    let faults = SharedFaults::new(rules);
    let filter = BlkdebugNode::new("filter".to_owned(), child, options, faults);
    Rc::new(filter)
}

fn behind(offset_bytes: u64) -> Window {
    Window {
        offset_bytes,
        size_bytes: None,
    }
}

fn block_on(future: LocalFuture<'_, ()>) {
    let polled = blockyard_simulator::run(future, || true);
    assert!(polled.is_some());
}

#[test]
fn nodes_keep_what_storages_promise() {
    let kinds: [fn() -> Rc<dyn Node>; 6] = [
        || file(MemoryStorage::new(0)),
        || file(MemoryStorage::new(0).with_alignment(512)),
        || raw(file(MemoryStorage::new(0)), Window::default()),
        || raw(file(MemoryStorage::new(1 << 20)), behind(1 << 20)),
        || filter(file(MemoryStorage::new(0)), &[]),
        || {
            let filter = filter(file(MemoryStorage::new(4096)), &[]);
            raw(filter, behind(4096))
        },
    ];
    for make in kinds {
        conformance::run(&|| Rc::new(ChildStorage::new(make())), &block_on);
    }
}

#[test]
fn odd_lengths_are_kept() {
    for node in [
        file(MemoryStorage::new(0)),
        raw(file(MemoryStorage::new(512)), behind(512)),
        filter(file(MemoryStorage::new(0)), &[]),
    ] {
        let storage = ChildStorage::new(node);
        block_on(Box::pin(async {
            let write = |offset, length: usize, byte| {
                storage.write(offset, Buffer::copy_of(&vec![byte; length]))
            };
            write(3, 10, 7).await.outcome.expect("written");
            assert_eq!(storage.facts().length_bytes, 13);
            write(600, 8, 8).await.outcome.expect("written");
            assert_eq!(storage.facts().length_bytes, 608);
            let read = storage.read(0, Buffer::copy_of(&[0xee; 2000])).await;
            read.outcome.expect("read");
            let mut expected = vec![0; 2000];
            expected[3..13].fill(7);
            expected[600..608].fill(8);
            assert!(read.buffer.as_slice() == expected);
        }));
    }
}

#[test]
fn writers_that_grow_a_node_at_once_do_not_cut_each_other_off() {
    // The filter cannot grow by itself: every one of these changes its length.
    for node in [
        filter(file(MemoryStorage::new(0)), &[]),
        file(MemoryStorage::new(0)),
    ] {
        let storage = ChildStorage::new(node);
        block_on(Box::pin(async {
            let order = [5_u64, 1, 7, 0, 3, 6, 2, 4];
            let writes = order.map(|place| {
                let byte = u8::try_from(place).expect("small") + 1;
                storage.write(place * 1000, Buffer::copy_of(&[byte; 1000]))
            });
            for written in join_all(writes).await {
                written.outcome.expect("written");
            }
            assert_eq!(storage.facts().length_bytes, 8000);
            let read = storage.read(0, Buffer::zeroed(8000)).await;
            for (place, bytes) in read.buffer.as_slice().chunks(1000).enumerate() {
                assert!(bytes.iter().all(|byte| usize::from(*byte) == place + 1));
            }
        }));
    }
}

/// Zeroes behind the end of a file set its length, to what may be less than a write behind them has made of it meanwhile.
#[test]
fn zeroes_that_grow_a_file_do_not_cut_off_a_write_behind_them() {
    each_seed("blockyard-engine", "zeroes_that_grow", 50, |seed| {
        let world = World::new(seed);
        let disk = world.disk("disk", DiskOptions::default());
        let node = FileNode::new("file".to_owned(), disk.open(), FileOptions::default());
        let storage = ChildStorage::new(Rc::new(node));
        let mode = ZeroMode {
            may_unmap: true,
            no_fallback: false,
        };
        let zeroes = storage.zero(ByteRange::new(512, 1024), mode);
        let write = storage.write(1536, Buffer::copy_of(&[7; 700]));
        let both = blockyard_simulator::run(join(zeroes, write), || world.step());
        let (zeroed, written) = both.expect("it ends");
        zeroed.expect("zeroed");
        written.outcome.expect("written");
        assert_eq!(disk.bytes().len(), 2236, "seed {seed}");
        assert!(disk.bytes()[1536..].iter().all(|byte| *byte == 7));
    });
}

#[test]
fn what_is_cut_off_does_not_come_back_as_reserved_room() {
    each_seed("blockyard-engine", "what_is_cut_off", 20, |seed| {
        let world = World::new(seed);
        let options = DiskOptions {
            length_bytes: 1 << 20,
            ..DiskOptions::default()
        };
        let disk = world.disk("disk", options);
        let options = FileOptions::default();
        let node = FileNode::new("file".to_owned(), disk.open(), options);
        let storage = ChildStorage::new(Rc::new(node));
        let reserved = storage.preallocate(ByteRange::new(0, 1 << 20), Preallocation::Falloc);
        let cut = storage.resize(4096);
        let ended = blockyard_simulator::run(join(reserved, cut), || world.step());
        assert_eq!(ended, Some((Ok(()), Ok(()))));
        assert_eq!(storage.facts().length_bytes, 4096);
    });
}

#[test]
fn what_cannot_grow_says_so() {
    let window = Window {
        offset_bytes: 512,
        size_bytes: Some(1024),
    };
    for node in [
        file(MemoryStorage::new(1024).fixed_length()),
        raw(file(MemoryStorage::new(4096)), window),
    ] {
        let storage = ChildStorage::new(node);
        assert!(storage.facts().fixed_length);
        block_on(Box::pin(async {
            let bytes = Buffer::copy_of(&[1; 512]);
            let refused = storage.write(1024, bytes).await.outcome;
            assert_eq!(refused.expect_err("no room").errno, ENOSPC);
            let range = ByteRange::new(1000, 100);
            let refused = storage.preallocate(range, Preallocation::Off).await;
            assert_eq!(refused.expect_err("no room").errno, ENOSPC);
            assert_eq!(storage.facts().length_bytes, 1024);
        }));
    }
}

#[test]
fn a_failed_flush_is_the_last_word_and_names_its_node() {
    let once = InjectError {
        event: "flush_to_disk".to_owned(),
        iotype: Some(BlkdebugIo::Flush),
        errno: Some(i64::from(EIO)),
        once: Some(true),
        ..InjectError::default()
    };
    let storage = ChildStorage::new(raw(
        filter(file(MemoryStorage::new(4096)), &[once]),
        Window::default(),
    ));
    block_on(Box::pin(async {
        let write = || storage.write(0, Buffer::copy_of(&[1; 512]));
        write().await.outcome.expect("written");
        let error = storage.sync().await.expect_err("injected");
        assert_eq!((error.operation, error.errno), (Operation::Sync, EIO));
        assert_eq!(storage.node_error(&error).node, "filter");
        let error = storage.sync().await.expect_err("for ever");
        assert_eq!(error.errno, EIO);
        let error = write().await.outcome.expect_err("for ever");
        assert_eq!((error.operation, error.errno), (Operation::Write, EIO));
        assert_eq!(storage.node_error(&error).node, "raw", "refused here");
        storage
            .read(0, Buffer::zeroed(512))
            .await
            .outcome
            .expect("read");
    }));
}
