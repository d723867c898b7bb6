//! The fault filter above a file in memory: which requests reach the file, in which pieces, with which bytes, and which
//! rules they meet on their way.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockyard_storage::error::{EBADF, EIO, ENOSPC, EOPNOTSUPP};
use blockyard_storage::{Buffer, ByteRange, LocalFuture, MemoryStorage, ZeroMode};
use futures_util::future::join_all;

use crate::error::NodeError;
use crate::node::blkdebug_node::{BlkdebugNode, BlkdebugOptions, SharedFaults};
use crate::node::fault_rules::FaultRules;
use crate::node::file_node::{FileNode, FileOptions};
use crate::node::raw_node::{RawNode, Window};
use crate::node::{Node, NodeFacts, NodeTransfer, StatusExtent};
use crate::request::{BlkdebugIo, DetectZeroes, Discard, InjectError, SetState};

const LENGTH: u64 = 64 << 10;

/// A file in memory that writes down what it is asked for, and lets others go first.
struct Logged {
    file: FileNode,
    requests: RefCell<Vec<(&'static str, u64, u64)>>,
    refuses_zeroes: Cell<bool>,
}

impl Logged {
    fn new(length: u64) -> Rc<Self> {
        let options = FileOptions {
            discard: Discard::Unmap,
            ..FileOptions::default()
        };
        let storage = Rc::new(MemoryStorage::new(length));
        Rc::new(Self {
            file: FileNode::new("file".to_owned(), storage, options),
            requests: RefCell::default(),
            refuses_zeroes: Cell::new(false),
        })
    }

    async fn log(&self, what: &'static str, offset: u64, length: u64) {
        self.requests.borrow_mut().push((what, offset, length));
        tokio::task::yield_now().await;
    }

    /// The requests since the last call.
    fn take(&self) -> Vec<(&'static str, u64, u64)> {
        self.requests.take()
    }

    async fn content(&self) -> Vec<u8> {
        let length = usize::try_from(self.file.facts().length_bytes).expect("short");
        let read = self.file.read(0, Buffer::zeroed(length)).await;
        read.outcome.expect("read");
        read.buffer.as_slice().to_vec()
    }
}

impl Node for Logged {
    fn name(&self) -> String {
        self.file.name()
    }

    fn facts(&self) -> NodeFacts {
        self.file.facts()
    }

    fn status(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>> {
        self.file.status(range, extents_max)
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            self.log("read", offset, into.len() as u64).await;
            self.file.read(offset, into).await
        })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            self.log("write", offset, from.len() as u64).await;
            self.file.write(offset, from).await
        })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            self.log("zero", range.offset(), range.length()).await;
            if self.refuses_zeroes.get() {
                let past_the_end = ByteRange::new(u64::MAX, 0);
                let mut error = self.file.zero(past_the_end, mode).await.expect_err("no");
                error.source.errno = EOPNOTSUPP;
                return Err(error);
            }
            self.file.zero(range, mode).await
        })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            self.log("discard", range.offset(), range.length()).await;
            self.file.discard(range).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            self.log("flush", 0, 0).await;
            self.file.flush().await
        })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        self.file.resize(length_bytes)
    }

    fn host_extent(&self, _: ByteRange) -> Option<(std::sync::Arc<std::os::fd::OwnedFd>, u64)> {
        let null = std::fs::File::open("/dev/null").expect("opened");
        Some((std::sync::Arc::new(null.into()), 0))
    }
}

fn filter(
    child: &Rc<Logged>,
    options: BlkdebugOptions,
    faults: &[InjectError],
    changes: &[SetState],
) -> Rc<dyn Node> {
    let rules = FaultRules::new(faults, changes.to_vec()).expect("rules that can be");
    Rc::new(BlkdebugNode::new(
        "filter".to_owned(),
        child.clone(),
        options,
        SharedFaults::new(rules),
    ))
}

fn raw(child: Rc<dyn Node>) -> RawNode {
    let (window, discard) = (Window::default(), Discard::Unmap);
    let detect = DetectZeroes::Off;
    RawNode::new("raw".to_owned(), child, window, false, discard, detect)
}

fn fault(event: &str, iotype: BlkdebugIo) -> InjectError {
    InjectError {
        event: event.to_owned(),
        iotype: Some(iotype),
        errno: Some(28),
        ..InjectError::default()
    }
}

fn bytes(length: usize, value: u8) -> Buffer {
    Buffer::copy_of(&vec![value; length])
}

async fn write(node: &dyn Node, offset: u64, length: usize, value: u8) -> Result<(), i32> {
    let written = node.write(offset, bytes(length, value)).await;
    assert_eq!(written.buffer.as_slice(), vec![value; length]);
    written.outcome.map_err(|error| error.errno())
}

async fn read(node: &dyn Node, offset: u64, length: usize) -> Result<Vec<u8>, i32> {
    let read = node.read(offset, bytes(length, 0xee)).await;
    assert_eq!(read.buffer.len(), length);
    let content = read.buffer.as_slice().to_vec();
    read.outcome
        .map(|()| content)
        .map_err(|error| error.errno())
}

#[tokio::test]
async fn transfers_are_cut_and_a_fault_hits_one_piece() {
    let file = Logged::new(LENGTH);
    let options = BlkdebugOptions {
        max_transfer: 4096,
        ..BlkdebugOptions::default()
    };
    let at = InjectError {
        sector: Some(11),
        ..fault("none", BlkdebugIo::Write)
    };
    let node = filter(&file, options, &[at], &[]);
    assert_eq!(node.facts().transfer_max_bytes, 4096);
    assert_eq!(write(&*node, 1024, 10_240, 7).await, Err(ENOSPC));
    assert_eq!(
        file.take(),
        [("write", 1024, 4096)],
        "the rest never starts"
    );
    assert_eq!(write(&*node, 8192, 10_240, 8).await, Ok(()));
    file.take();
    let found = read(&*node, 0, LENGTH as usize).await.expect("read");
    assert_eq!(found, file.content().await);
    assert!(found[1024..5120].iter().all(|byte| *byte == 7));
    assert!(found[5120..8192].iter().all(|byte| *byte == 0));
    assert!(found[8192..18_432].iter().all(|byte| *byte == 8));
    assert_eq!(file.take().len(), 16);
    assert!(node.host_extent(ByteRange::new(0, 512)).is_none());
}

#[tokio::test]
async fn unaligned_requests_are_widened() {
    // The last block is not whole.
    let file = Logged::new(LENGTH + 1024);
    let options = BlkdebugOptions {
        align: 4096,
        ..BlkdebugOptions::default()
    };
    let node = filter(&file, options, &[], &[]);
    assert_eq!(node.facts().request_alignment, 4096);
    assert_eq!(write(&*node, 0, 16_384, 1).await, Ok(()));
    assert_eq!(file.take(), [("write", 0, 16_384)]);
    for (offset, length, requests) in [
        (512, 512, &[("read", 0, 4096), ("write", 0, 4096)][..]),
        (512, 7680, &[("read", 0, 4096), ("write", 0, 8192)]),
        (4608, 7168, &[("read", 4096, 8192), ("write", 4096, 8192)]),
        (8192, 4608, &[("read", 12_288, 4096), ("write", 8192, 8192)]),
        (
            512,
            12_288,
            &[
                ("read", 0, 4096),
                ("read", 12_288, 4096),
                ("write", 0, 16_384),
            ],
        ),
        (
            LENGTH + 512,
            512,
            &[("read", LENGTH, 1024), ("write", LENGTH, 1024)],
        ),
    ] {
        let mut expected = file.content().await;
        let range = offset as usize..offset as usize + length;
        expected[range.clone()].fill(9);
        assert_eq!(write(&*node, offset, length, 9).await, Ok(()));
        assert_eq!(file.take(), requests, "{range:?}");
        assert_eq!(file.content().await, expected);
        assert_eq!(read(&*node, offset, length).await, Ok(vec![9; length]));
        file.take();
    }
    assert_eq!(file.facts().length_bytes, LENGTH + 1024);
    assert_eq!(read(&*node, LENGTH, 1025).await, Err(EIO));
    assert_eq!(write(&*node, LENGTH, 1025, 0).await, Err(ENOSPC));
    assert_eq!(file.take(), []);
}

#[tokio::test]
async fn neighbours_in_one_block_do_not_undo_each_other() {
    let file = Logged::new(LENGTH);
    let options = BlkdebugOptions {
        align: 16_384,
        ..BlkdebugOptions::default()
    };
    let node = filter(&file, options, &[], &[]);
    let node = &*node;
    let writes = (0..32_u64).map(|index| write(node, index * 1024, 1024, index as u8 + 1));
    assert!(join_all(writes).await.iter().all(Result::is_ok));
    for (index, part) in file.content().await.chunks(1024).take(32).enumerate() {
        assert!(part.iter().all(|byte| *byte == index as u8 + 1), "{index}");
    }
}

#[tokio::test]
async fn zeroes_keep_to_the_limits_or_are_written() {
    let file = Logged::new(LENGTH);
    let options = BlkdebugOptions {
        align: 512,
        opt_write_zero: 4096,
        max_write_zero: 8192,
        ..BlkdebugOptions::default()
    };
    let node = filter(&file, options, &[], &[]);
    let mode = ZeroMode::default();
    assert_eq!(write(&*node, 0, LENGTH as usize, 5).await, Ok(()));
    file.take();
    node.zero(ByteRange::new(1000, 20_000), mode)
        .await
        .expect("zeroed");
    assert_eq!(
        file.take(),
        [
            ("read", 512, 512),
            ("write", 512, 512),
            ("write", 1024, 3072),
            ("zero", 4096, 8192),
            ("zero", 12_288, 8192),
            ("write", 20_480, 512),
            ("read", 20_992, 512),
            ("write", 20_992, 512),
        ]
    );
    let mut expected = vec![5; LENGTH as usize];
    expected[1000..21_000].fill(0);
    assert_eq!(file.content().await, expected);
    file.refuses_zeroes.set(true);
    node.zero(ByteRange::new(32_768, 4096), mode)
        .await
        .expect("written");
    assert_eq!(
        file.take(),
        [("zero", 32_768, 4096), ("write", 32_768, 4096)]
    );
    let no_fallback = ZeroMode {
        no_fallback: true,
        ..mode
    };
    let refused = node.zero(ByteRange::new(40_960, 4096), no_fallback).await;
    assert_eq!(refused.expect_err("refused").errno(), EOPNOTSUPP);
}

#[tokio::test]
async fn discards_keep_to_the_limits_or_are_dropped() {
    let file = Logged::new(LENGTH);
    let mut options = BlkdebugOptions {
        opt_discard: 4096,
        max_discard: 8192,
        ..BlkdebugOptions::default()
    };
    let ignoring = filter(&file, options, &[], &[]);
    ignoring
        .discard(ByteRange::new(0, 8192))
        .await
        .expect("ignored");
    assert_eq!(file.take(), []);
    options.discard = Discard::Unmap;
    let refuses = InjectError {
        errno: Some(i64::from(EOPNOTSUPP)),
        sector: Some(16),
        ..fault("none", BlkdebugIo::Discard)
    };
    let fails = InjectError {
        sector: Some(64),
        ..fault("none", BlkdebugIo::Discard)
    };
    let node = filter(&file, options, &[refuses, fails], &[]);
    node.discard(ByteRange::new(1000, 20_000))
        .await
        .expect("discarded");
    assert_eq!(file.take(), [("discard", 12_288, 8192)]);
    let failed = node.discard(ByteRange::new(0, LENGTH)).await;
    assert_eq!(failed.expect_err("failed").errno(), ENOSPC);
}

#[tokio::test]
async fn every_kind_of_request_meets_its_rules() {
    let file = Logged::new(LENGTH);
    let options = BlkdebugOptions {
        discard: Discard::Unmap,
        ..BlkdebugOptions::default()
    };
    for kind in BlkdebugIo::ALL {
        let node = filter(&file, options, &[fault("none", kind)], &[]);
        let range = ByteRange::new(0, 4096);
        let errno = |outcome: Result<(), NodeError>| outcome.err().map(|error| error.errno());
        let outcomes = [
            (BlkdebugIo::Read, read(&*node, 0, 512).await.err()),
            (BlkdebugIo::Write, write(&*node, 0, 512, 1).await.err()),
            (
                BlkdebugIo::WriteZeroes,
                errno(node.zero(range, ZeroMode::default()).await),
            ),
            (BlkdebugIo::Discard, errno(node.discard(range).await)),
            (BlkdebugIo::Flush, errno(node.flush().await)),
            (
                BlkdebugIo::BlockStatus,
                errno(node.status(range, 1).await.map(|_| ())),
            ),
        ];
        for (io, errno) in outcomes {
            assert_eq!(errno, (io == kind).then_some(ENOSPC), "{kind:?}: {io:?}");
        }
        assert_eq!(
            node.resize(LENGTH).await.map_err(|error| error.errno()),
            Ok(())
        );
    }
}

#[tokio::test]
async fn only_what_was_written_since_is_flushed() {
    let file = Logged::new(LENGTH);
    let once = InjectError {
        once: Some(true),
        ..fault("none", BlkdebugIo::Flush)
    };
    let node = filter(
        &file,
        BlkdebugOptions::default(),
        std::slice::from_ref(&once),
        &[],
    );
    let flush = async || node.flush().await.map_err(|error| error.errno());
    assert_eq!(flush().await, Ok(()), "nothing was written");
    assert_eq!(write(&*node, 0, 512, 1).await, Ok(()));
    assert_eq!(flush().await, Err(ENOSPC));
    assert_eq!(flush().await, Ok(()), "the rule is used up");
    assert_eq!(file.take().len(), 3);
    let options = BlkdebugOptions {
        read_only: true,
        ..BlkdebugOptions::default()
    };
    let read_only = filter(&file, options, &[once], &[]);
    assert_eq!(write(&*read_only, 0, 512, 1).await, Err(EBADF));
    let resized = read_only.resize(512).await.map_err(|error| error.errno());
    assert_eq!(resized, Err(EBADF));
}

/// For each event: what the filter meets by itself, and what it meets below a raw node.
#[tokio::test]
async fn events_come_about_where_they_should() {
    let armed = async |node: &dyn Node, file: &Logged| {
        // A read is never an event that arms it for itself.
        let hit = node.read(0, Buffer::zeroed(512)).await.outcome.is_err();
        file.take();
        hit
    };
    for (event, what, alone, below_raw) in [
        ("pwritev", "write", true, true),
        ("pwritev_done", "write", true, true),
        ("pwritev_zero", "write", false, false),
        ("pwritev_zero", "zero", true, true),
        ("pwritev_done", "zero", true, true),
        ("pwritev", "zero", false, false),
        ("write_aio", "write", false, true),
        ("write_aio", "zero", false, false),
        ("flush_to_os", "flush", false, true),
        ("flush_to_disk", "flush", false, false),
        ("flush_to_disk", "write and flush", false, true),
        ("pwritev_rmw_head", "write", true, true),
        ("pwritev_rmw_after_head", "write", true, true),
        ("pwritev_rmw_tail", "write", false, false),
        (
            "pwritev_rmw_tail",
            "write before the end of a block",
            true,
            true,
        ),
        (
            "pwritev_rmw_after_tail",
            "write before the end of a block",
            true,
            true,
        ),
        (
            "pwritev_rmw_head",
            "write before the end of a block",
            false,
            false,
        ),
        ("none", "nothing", true, true),
        ("cor_write", "write and flush", false, false),
    ] {
        for (is_raw, expected) in [(false, alone), (true, below_raw)] {
            let file = Logged::new(LENGTH);
            let options = BlkdebugOptions {
                align: 1024,
                ..BlkdebugOptions::default()
            };
            let node = filter(&file, options, &[fault(event, BlkdebugIo::Read)], &[]);
            let node: Rc<dyn Node> = if is_raw { Rc::new(raw(node)) } else { node };
            let range = ByteRange::new(0, 1024);
            match what {
                // Its second half: the block's end is also the write's.
                "write" => drop(node.write(512, Buffer::zeroed(512)).await),
                "write before the end of a block" => {
                    drop(node.write(0, Buffer::zeroed(512)).await);
                }
                "zero" => node.zero(range, ZeroMode::default()).await.expect("zeroed"),
                "flush" => node.flush().await.expect("flushed"),
                "write and flush" => {
                    drop(node.write(0, Buffer::zeroed(1024)).await);
                    node.flush().await.expect("flushed");
                }
                _ => {}
            }
            assert_eq!(
                armed(&*node, &file).await,
                expected,
                "{event}: {what}, {is_raw}"
            );
        }
    }
    // Reading arms by read_aio, and the request that does so is the first to fail.
    let file = Logged::new(LENGTH);
    let rules = [fault("read_aio", BlkdebugIo::Read)];
    let alone = filter(&file, BlkdebugOptions::default(), &rules, &[]);
    assert!(!armed(&*alone, &file).await);
    assert!(armed(&raw(alone), &file).await);
}

#[tokio::test]
async fn a_raw_node_above_keeps_to_the_limits_and_counts_pieces() {
    let file = Logged::new(LENGTH);
    let options = BlkdebugOptions {
        max_transfer: 4096,
        ..BlkdebugOptions::default()
    };
    // Three pieces are three events: the fault is armed in the third.
    let changes: Vec<SetState> = (1..=2)
        .map(|state| SetState {
            event: "write_aio".to_owned(),
            state: Some(state),
            new_state: state + 1,
        })
        .collect();
    let third = InjectError {
        state: Some(3),
        ..fault("write_aio", BlkdebugIo::Write)
    };
    let node = raw(filter(&file, options, &[third], &changes));
    assert_eq!(write(&node, 0, 16_384, 6).await, Err(ENOSPC));
    assert_eq!(file.take(), [("write", 0, 4096), ("write", 4096, 4096)]);
    assert_eq!(read(&node, 0, 8192).await, Ok(vec![6; 8192]));
    assert_eq!(file.take(), [("read", 0, 4096), ("read", 4096, 4096)]);
    assert!(node.host_extent(ByteRange::new(0, 512)).is_none());
}

#[tokio::test]
async fn written_zeroes_can_become_zero_requests() {
    let file = Logged::new(LENGTH);
    let options = BlkdebugOptions {
        detect_zeroes: DetectZeroes::On,
        ..BlkdebugOptions::default()
    };
    let node = filter(&file, options, &[], &[]);
    assert_eq!(write(&*node, 0, 4096, 0).await, Ok(()));
    assert_eq!(write(&*node, 4096, 4096, 1).await, Ok(()));
    assert_eq!(file.take(), [("zero", 0, 4096), ("write", 4096, 4096)]);
}
