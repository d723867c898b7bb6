//! The filter with limits above a file in memory, in virtual time: what waits for how long, what does not wait, and what arrives below.

use std::rc::Rc;
use std::time::Duration;

use blockyard_storage::error::{EBADF, EIO, ENOSPC};
use blockyard_storage::{Buffer, ByteRange, MemoryStorage, ZeroMode};
use futures_util::future::join_all;

use crate::clock::Clock;
use crate::jobs::test_support::VirtualClock;
use crate::node::Node;
use crate::node::file_node::{FileNode, FileOptions};
use crate::node::throttle_node::{ThrottleNode, ThrottleOptions};
use crate::request::{DetectZeroes, Discard};
use crate::throttle::group::ThrottleGroup;
use crate::throttle::limits::{Counted, Limits, LimitsChange};

const LENGTH: u64 = 1 << 20;
/// Bytes in a second.
const RATE: u64 = 64 << 10;

struct Yard {
    clock: VirtualClock,
    file: Rc<FileNode>,
    nodes: Vec<ThrottleNode>,
}

/// Several filters of one group above one file.
fn yard(counted: Counted, nodes: usize, options: ThrottleOptions) -> Yard {
    let clock = VirtualClock::default();
    let mut change = LimitsChange::default();
    change.rates[counted as usize].average = Some(RATE.cast_signed());
    let limits = Limits::default().with(&change).expect("makes sense");
    let group = ThrottleGroup::new("group".to_owned(), limits);
    let storage = Rc::new(MemoryStorage::new(LENGTH));
    let file_options = FileOptions {
        discard: Discard::Unmap,
        ..FileOptions::default()
    };
    let file = Rc::new(FileNode::new("file".to_owned(), storage, file_options));
    let node = |_| {
        let clock = Rc::new(clock.clone());
        ThrottleNode::new("t".to_owned(), file.clone(), group.join(), options, clock)
    };
    let nodes = (0..nodes).map(node).collect();
    Yard { clock, file, nodes }
}

const UNMAP: ThrottleOptions = ThrottleOptions {
    read_only: false,
    discard: Discard::Unmap,
    detect_zeroes: DetectZeroes::Off,
};

const ZEROES: ZeroMode = ZeroMode {
    may_unmap: false,
    no_fallback: false,
};

impl Yard {
    /// Tenths of a second until a future has ended.
    fn tenths<T>(&self, future: impl Future<Output = T>) -> (u64, T) {
        let begun = self.clock.now();
        let result = self.clock.block_on(future);
        let nanoseconds = self.clock.now().since(begun).as_nanos();
        let tenths = (nanoseconds + 50_000_000) / 100_000_000;
        (u64::try_from(tenths).expect("short"), result)
    }

    /// Lets the room for what may pass at once come back.
    fn rest(&self) {
        let later = self.clock.now().after(Duration::from_secs(1000));
        self.clock.block_on(self.clock.sleep_until(later));
    }
}

#[test]
fn each_kind_of_request_counts_by_its_length() {
    let yard = yard(Counted::Bytes, 1, UNMAP);
    let node = &yard.nodes[0];
    let length = 2 * RATE;
    let range = ByteRange::new(0, length);
    let long = usize::try_from(length).expect("short");
    // The first passes at once, and the one behind it waits for it but for a tenth of a second.
    let behind = async {
        let read = node.read(0, Buffer::zeroed(512)).await;
        read.outcome.expect("read");
    };
    yard.clock.block_on(async {
        let written = node.write(0, Buffer::copy_of(&vec![7; long])).await;
        written.outcome.expect("written");
    });
    assert_eq!(yard.tenths(behind).0, 19);
    yard.rest();
    yard.clock
        .block_on(node.zero(range, ZEROES))
        .expect("zeroed");
    let behind = node.zero(ByteRange::new(0, 512), ZEROES);
    assert_eq!(yard.tenths(behind).0, 19);
    yard.rest();
    yard.clock.block_on(node.discard(range)).expect("discarded");
    // What does not move bytes does not wait.
    let (waited, ()) = yard.tenths(async {
        node.flush().await.expect("flushed");
        node.status(range, 5).await.expect("told");
        node.place(range, false).await.expect("told");
    });
    assert_eq!(waited, 0);
    let behind = node.discard(ByteRange::new(0, 512));
    assert_eq!(yard.tenths(behind).0, 19);
}

#[test]
fn what_is_refused_or_ignored_neither_waits_nor_counts() {
    let ignores = ThrottleOptions::default();
    let yard = yard(Counted::Bytes, 1, ignores);
    let node = &yard.nodes[0];
    let outside = ByteRange::new(LENGTH - 512, 4 * RATE);
    let (waited, ()) = yard.tenths(async {
        for _ in 0..10 {
            let bytes = || Buffer::zeroed(usize::try_from(outside.length()).expect("short"));
            let read = node.read(outside.offset(), bytes()).await.outcome;
            assert_eq!(read.map_err(|error| error.errno()), Err(EIO));
            let written = node.write(outside.offset(), bytes()).await.outcome;
            assert_eq!(written.map_err(|error| error.errno()), Err(ENOSPC));
            let zeroed = node.zero(outside, ZEROES).await;
            assert_eq!(zeroed.map_err(|error| error.errno()), Err(ENOSPC));
            let discarded = node.discard(outside).await;
            assert_eq!(discarded.map_err(|error| error.errno()), Err(ENOSPC));
            node.discard(ByteRange::new(0, LENGTH))
                .await
                .expect("ignored");
        }
        node.write(0, Buffer::zeroed(512))
            .await
            .outcome
            .expect("written");
    });
    assert_eq!(waited, 0);
    let read_only = ThrottleOptions {
        read_only: true,
        ..ignores
    };
    let yard = self::yard(Counted::Bytes, 1, read_only);
    let node = &yard.nodes[0];
    assert!(node.facts().read_only);
    let written = yard.clock.block_on(node.write(0, Buffer::zeroed(512)));
    let errno = written.outcome.map_err(|error| error.errno());
    assert_eq!(errno, Err(EBADF));
}

#[test]
fn an_image_may_make_its_file_longer_through_it() {
    let yard = yard(Counted::Writes, 1, UNMAP);
    let node = &yard.nodes[0];
    assert!(node.grows());
    yard.clock.block_on(async {
        let written = node
            .write_growing(LENGTH, Buffer::copy_of(&[5; 1024]))
            .await;
        written.outcome.expect("longer");
        let range = ByteRange::new(LENGTH + 1024, 512);
        node.zero_growing(range, ZEROES).await.expect("longer");
    });
    assert_eq!(node.facts().length_bytes, LENGTH + 1536);
    let written = yard
        .clock
        .block_on(node.write(LENGTH + 1536, Buffer::zeroed(512)));
    assert!(written.outcome.is_err());
}

#[test]
fn nodes_of_a_group_share_what_may_pass_and_lose_no_byte() {
    let yard = yard(Counted::BytesWritten, 3, UNMAP);
    let chunk = 4096;
    // Each node writes its third, eight requests at a time.
    let writer = async |index: usize| {
        let node = &yard.nodes[index];
        let write = async |lane: u64| {
            for round in 0..8 {
                let offset = (index as u64 * 64 + round * 8 + lane) * chunk;
                let byte = u8::try_from(index + 1).expect("few");
                let written = node.write(offset, Buffer::copy_of(&[byte; 4096])).await;
                written.outcome.expect("written");
            }
        };
        join_all((0..8).map(write)).await;
    };
    let (waited, _) = yard.tenths(join_all((0..3).map(writer)));
    // 768 KiB at 64 KiB a second.
    assert!((118..=120).contains(&waited), "{waited}");
    let read = yard.file.read(0, Buffer::zeroed(3 * 64 * 4096));
    let read = yard.clock.block_on(read);
    read.outcome.expect("read");
    for (index, third) in read.buffer.as_slice().chunks(64 * 4096).enumerate() {
        assert!(third.iter().all(|byte| usize::from(*byte) == index + 1));
    }
}
