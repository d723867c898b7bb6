//! Users outside of the graph on real files: what they may do, and where they are while jobs come and go.
#![forbid(unsafe_code)]

mod backups;
mod fleecing;
mod records;
mod yard;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;

use blockyard_engine::job::status::Status;
use blockyard_engine::job::verb::VerbCall;
use blockyard_engine::reply::{Counted, Reply};
use blockyard_engine::request::{
    BackupSpec, CommitSpec, CommonOptions, CopyMode, DriverSpec, LimitsChange, NewLimits, NodeRef,
    NodeSpec, ObjectKind, ObjectSpec, Request, StreamSpec, WorkSpec,
};
use blockyard_engine::root_handle::RootHandle;
use blockyard_storage::ByteRange;

use yard::*;

#[test]
fn a_root_reads_and_writes_and_keeps_its_node() {
    block_on(async {
        let yard = Yard::new();
        let path = yard.add("s", 1).await;
        let error = yard.engine.open_root("none", false).await.map(drop);
        let text = "Cannot find device='none' nor node-name='none'";
        assert_eq!(error.expect_err("refused").text, text);
        let root = yard.engine.open_root("s", true).await.expect("opened");
        assert_eq!(root.length_bytes().await, Ok(LENGTH));
        root.write(1000, vec![7; 5000]).await.expect("written");
        root.zero(ByteRange::new(2000, 100), true)
            .await
            .expect("zeroed");
        root.flush().await.expect("flushed");
        let read = root.read(ByteRange::new(1990, 20)).await.expect("read");
        assert_eq!(read, [[7; 10], [0; 10]].concat());
        assert!(holds(&path, ByteRange::new(2100, 3900), 7));
        assert!(root.read(ByteRange::new(LENGTH - 1, 2)).await.is_err());
        let error = yard.remove("s").await.expect_err("in use");
        assert_eq!(error.text, "Node s is in use");
        let reader = yard.engine.open_root("s", false).await.expect("opened");
        assert!(reader.write(0, vec![0; 512]).await.is_err(), "read only");
        reader.close().await.expect("closed");
        assert_eq!(yard.roots().await, ["s"]);
        drop(root);
        // Closing waits behind nothing, and the next request comes behind it.
        while !yard.roots().await.is_empty() {}
        yard.remove("s").await.expect("nobody uses it");
    });
}

#[test]
fn a_writer_keeps_a_backup_off_that_discards_and_a_reader_goes_with_a_mirror() {
    block_on(async {
        let yard = Yard::new();
        yard.add("s", 1).await;
        yard.add("t", 2).await;
        let writer = yard.engine.open_root("s", true).await.expect("opened");
        let WorkSpec::Backup(spec) = backup() else {
            unreachable!("it is one");
        };
        // What is discarded behind the copy may have been written meanwhile.
        let discards = WorkSpec::Backup(BackupSpec {
            discard_source: true,
            ..spec
        });
        let text = "Could not replace node: Node 's' is the source of a block job and cannot be \
                    changed meanwhile";
        let refused = yard.start(discards).await.expect_err("refused");
        assert_eq!(refused.text, text);
        writer.write(0, vec![3; 512]).await.expect("goes on");
        writer.close().await.expect("closed");
        let reader = yard.engine.open_root("s", false).await.expect("opened");
        yard.start(mirror(CopyMode::Background))
            .await
            .expect("started");
        yard.until(Status::Ready);
        assert!(yard.roots().await.contains(&"filter".to_owned()));
        let text = "Permission conflict on node 't': permissions 'consistent read' are both \
                    required by an unnamed block device (uses node 't' as 'root' child) and \
                    unshared by an unnamed block device (uses node 't' as 'root' child).";
        let refused = yard.engine.open_root("t", false).await.map(drop);
        assert_eq!(refused.expect_err("in use").text, text);
        yard.verb(VerbCall::Complete).await;
        yard.until(Status::Null);
        assert_eq!(yard.roots().await, ["t"]);
        yard.remove("s").await.expect("nobody uses it");
        let read = reader.read(ByteRange::new(0, 1024)).await.expect("read");
        assert_eq!(read, [[3; 512], [1; 512]].concat());
        reader.close().await.expect("closed");
        yard.remove("t").await.expect("nobody uses it");
    });
}

/// Writes here and there until it is told to stop, always something else, and says what it has been told to be there.
async fn write_until(root: &RootHandle, stop: &AtomicBool, written: &AtomicU64) -> Vec<u8> {
    let mut model = vec![1; LENGTH as usize];
    let mut number = 0_u64;
    while !stop.load(Ordering::Acquire) {
        number += 1;
        let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        let offset = mixed % (LENGTH - 100_000);
        let length = 1 + mixed
            % if number.is_multiple_of(8) {
                100_000
            } else {
                5000
            };
        let place = offset as usize..(offset + length) as usize;
        match number % 11 {
            0 => {
                let range = ByteRange::new(offset, length);
                root.zero(range, true).await.expect("zeroed");
                model[place].fill(0);
            }
            5 => {
                let range = ByteRange::new(offset, length);
                let read = root.read(range).await.expect("read");
                assert!(read == model[place], "wrong bytes at {offset}");
            }
            7 => root.flush().await.expect("flushed"),
            _ => {
                let byte = (number % 251) as u8;
                root.write(offset, vec![byte; length as usize])
                    .await
                    .expect("written");
                model[place].fill(byte);
            }
        }
        written.fetch_add(1, Ordering::AcqRel);
    }
    model
}

/// A writer on a thread of its own while a mirror begins, gets ready and ends. Names of the file that has all in the end.
fn writer_beside_mirror(copy_mode: CopyMode, last: VerbCall, end: Status, winner: &str) {
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let go_on = |count: u64| {
        let goal = written.load(Ordering::Acquire) + count;
        while written.load(Ordering::Acquire) < goal {
            std::thread::yield_now();
        }
    };
    block_on(async {
        let yard = Yard::new();
        let paths = [yard.add("s", 1).await, yard.add("t", 2).await];
        let root = yard.engine.open_root("s", true).await.expect("opened");
        let model = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().build();
                let runtime = runtime.expect("a runtime");
                runtime.block_on(write_until(&root, &stop, &written))
            });
            let jobs = scope.spawn(|| {
                block_on(async {
                    go_on(20);
                    yard.start(mirror(copy_mode)).await.expect("started");
                    yard.until(Status::Ready);
                    go_on(100);
                    yard.verb(last.clone()).await;
                    yard.until(end);
                    go_on(50);
                });
                stop.store(true, Ordering::Release);
            });
            if let Err(panic) = jobs.join() {
                stop.store(true, Ordering::Release);
                std::panic::resume_unwind(panic);
            }
            writer.join().expect("the writer")
        });
        root.flush().await.expect("flushed");
        assert_eq!(yard.roots().await, [winner]);
        root.close().await.expect("closed");
        let path = paths.iter().find(|path| path.ends_with(winner));
        let bytes = std::fs::read(path.expect("one of them")).expect("read");
        let differs = bytes
            .iter()
            .zip(&model)
            .position(|(one, other)| one != other);
        assert_eq!(differs, None);
    });
}

#[test]
fn a_writer_goes_over_to_the_target_with_all_that_it_has_written() {
    for copy_mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        writer_beside_mirror(copy_mode, VerbCall::Complete, Status::Null, "t");
    }
}

#[test]
fn a_writer_stays_when_a_mirror_is_cancelled() {
    for force in [false, true] {
        let last = VerbCall::Cancel { force };
        writer_beside_mirror(CopyMode::WriteBlocking, last, Status::Null, "s");
    }
}

/// Small neighbours of one cluster go to the node or to its overlay, while that comes between them.
#[test]
fn what_is_written_while_an_overlay_comes_is_in_it_or_below_it() {
    block_on(async {
        let yard = Yard::new();
        let path = yard.add("s", 1).await;
        for name in ["o1", "o2", "o3"] {
            yard.add_image(name).await;
        }
        let root = yard.engine.open_root("s", true).await.expect("opened");
        let mut node = "s";
        for (round, overlay) in ["o1", "o2", "o3"].into_iter().enumerate() {
            let byte = u8::try_from(round).expect("few") + 10;
            let writes = (0..256_u64).map(|place| root.write(place * 4096, vec![byte; 4096]));
            let put = yard.call(Request::BlockdevSnapshot {
                node: node.to_owned(),
                overlay: overlay.to_owned(),
            });
            let (written, put) =
                futures_util::future::join(futures_util::future::join_all(writes), put).await;
            put.expect("put there");
            for written in written {
                written.expect("written");
            }
            assert_eq!(yard.roots().await, [overlay]);
            let read = root.read(ByteRange::new(0, 2 << 20)).await.expect("read");
            assert!(read[..1 << 20].iter().all(|other| *other == byte));
            assert!(read[1 << 20..].iter().all(|other| *other == 1));
            let frozen = std::fs::read(&path).expect("read");
            root.write(1 << 20, vec![1; 4096]).await.expect("written");
            root.flush().await.expect("flushed");
            assert!(std::fs::read(&path).expect("read") == frozen, "it is kept");
            let writer = yard.engine.open_root(node, true).await.map(drop);
            writer.expect_err("read-only");
            node = overlay;
        }
        let again = Request::BlockdevSnapshot {
            node: "s".to_owned(),
            overlay: "o3".to_owned(),
        };
        let refused = yard.call(again).await.expect_err("refused");
        let text = "Node 's' is busy: node is used as backing hd of 'o1'";
        assert_eq!(refused.text, text);
        root.close().await.expect("closed");
        yard.remove("o3").await.expect("nobody uses it");
    });
}

/// How the last layer of a chain ends beside its writer.
#[derive(Clone, Copy, PartialEq)]
enum Last {
    Streamed,
    Committed,
}

/// A writer goes on while overlays come, those below it are committed, and its own layer is.
fn writer_beside_chain(last: Last) {
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let go_on = |count: u64| {
        let goal = written.load(Ordering::Acquire) + count;
        while written.load(Ordering::Acquire) < goal {
            std::thread::yield_now();
        }
    };
    block_on(async {
        let yard = Yard::new();
        let path = yard.add("s", 1).await;
        for name in ["o1", "o2", "o3"] {
            yard.add_image(name).await;
        }
        let root = yard.engine.open_root("s", true).await.expect("opened");
        let change = async || {
            for (node, overlay) in [("s", "o1"), ("o1", "o2"), ("o2", "o3")] {
                go_on(30);
                let (node, overlay) = (node.to_owned(), overlay.to_owned());
                let put = yard.call(Request::BlockdevSnapshot { node, overlay });
                put.await.expect("put there");
            }
            go_on(30);
            let below = CommitSpec {
                device: "o3".to_owned(),
                top_node: Some("o2".to_owned()),
                base_node: Some("s".to_owned()),
                ..CommitSpec::default()
            };
            yard.start(WorkSpec::Commit(below)).await.expect("started");
            yard.until(Status::Null);
            go_on(30);
            if last == Last::Streamed {
                let whole = StreamSpec {
                    device: "o3".to_owned(),
                    ..StreamSpec::default()
                };
                yard.start(WorkSpec::Stream(whole)).await.expect("started");
            } else {
                let top = CommitSpec {
                    device: "o3".to_owned(),
                    ..CommitSpec::default()
                };
                yard.start(WorkSpec::Commit(top)).await.expect("started");
                yard.until(Status::Ready);
                go_on(50);
                yard.verb(VerbCall::Complete).await;
            }
            yard.until(Status::Null);
            go_on(30);
        };
        let model = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().build();
                let runtime = runtime.expect("a runtime");
                runtime.block_on(write_until(&root, &stop, &written))
            });
            let jobs = scope.spawn(|| {
                block_on(change());
                stop.store(true, Ordering::Release);
            });
            if let Err(panic) = jobs.join() {
                stop.store(true, Ordering::Release);
                std::panic::resume_unwind(panic);
            }
            writer.join().expect("the writer")
        });
        root.flush().await.expect("flushed");
        let read = root.read(ByteRange::new(0, LENGTH)).await.expect("read");
        assert!(read == model, "not what was written");
        let winner = match last {
            Last::Streamed => "o3",
            Last::Committed => "s",
        };
        assert_eq!(yard.roots().await, [winner]);
        let node_name = winner.to_owned();
        let chain = yard.call(Request::QueryChain { node_name }).await;
        let Ok(Reply::Chain(layers)) = chain else {
            panic!("not a chain");
        };
        let names: Vec<&str> = layers.iter().map(|layer| &*layer.node_name).collect();
        assert_eq!(names, [winner], "nothing is below");
        root.close().await.expect("closed");
        if last == Last::Committed {
            assert!(std::fs::read(path).expect("read") == model);
        }
    });
}

#[test]
fn a_writer_goes_on_while_its_chain_changes() {
    for last in [Last::Streamed, Last::Committed] {
        writer_beside_chain(last);
    }
}

/// A node in the middle that is shorter than what is above and below it: nobody writes to it.
#[test]
fn what_a_short_layer_hides_becomes_zeroes_in_the_base() {
    block_on(async {
        let yard = Yard::new();
        yard.add("s", 1).await;
        for name in ["o1", "o2"] {
            yard.add_image(name).await;
        }
        let resize = Request::BlockResize {
            device: None,
            node_name: Some("o1".to_owned()),
            size: 1 << 20,
        };
        yard.call(resize).await.expect("shorter");
        let put = |node: &str, overlay: &str| Request::BlockdevSnapshot {
            node: node.to_owned(),
            overlay: overlay.to_owned(),
        };
        yard.call(put("s", "o1")).await.expect("put there");
        yard.call(put("o1", "o2")).await.expect("put there");
        let middle = CommitSpec {
            device: "o2".to_owned(),
            top_node: Some("o1".to_owned()),
            base_node: Some("s".to_owned()),
            ..CommitSpec::default()
        };
        let path = yard.path("s");
        yard.start(WorkSpec::Commit(middle)).await.expect("started");
        yard.until(Status::Null);
        assert!(holds(&path, ByteRange::new(1 << 20, 3 << 20), 0));
        assert!(holds(&path, ByteRange::new(0, 1 << 20), 1));
    });
}

/// At this limit the second write would wait for twelve days.
#[test]
fn what_waits_for_a_limit_keeps_nobody_from_draining_it() {
    block_on(async {
        let yard = Yard::new();
        let path = yard.add("s", 1).await;
        let mut limits = LimitsChange::default();
        limits.rates[Counted::BytesWritten as usize].average = Some(1);
        let group = ObjectSpec {
            id: "g".to_owned(),
            kind: ObjectKind::ThrottleGroup(Box::new(NewLimits {
                limits,
                ..NewLimits::default()
            })),
        };
        yard.call(Request::ObjectAdd(group)).await.expect("made");
        let above = |name: &str, driver| NodeSpec {
            node_name: Some(name.to_owned()),
            common: CommonOptions::default(),
            driver,
        };
        let file = NodeRef::Name("s".to_owned());
        let group = "g".to_owned();
        let filter = above("f", DriverSpec::Throttle { file, group });
        yard.call(Request::BlockdevAdd(filter))
            .await
            .expect("added");
        let root = yard.engine.open_root("f", true).await.expect("opened");
        root.write(0, vec![2; 1 << 20]).await.expect("the first");
        let second = root.write(1 << 20, vec![3; 1 << 20]);
        let draining = async {
            // Reads are not limited, and come behind the write.
            root.read(ByteRange::new(0, 512)).await.expect("read");
            let passes = |file: &str| DriverSpec::Raw {
                file: NodeRef::Name(file.to_owned()),
                offset: None,
                size: None,
            };
            let other = above("s2", passes("s"));
            yard.call(Request::BlockdevAdd(other)).await.expect("added");
            let driver = DriverSpec::Throttle {
                file: NodeRef::Name("s2".to_owned()),
                group: "g".to_owned(),
            };
            let nodes = vec![above("f", driver)];
            let reopened = yard.call(Request::BlockdevReopen { nodes }).await;
            reopened.expect("another child");
        };
        let (written, ()) = tokio::join!(second, draining);
        written.expect("passed for the drain");
        assert!(holds(&path, ByteRange::new(0, 1 << 20), 2));
        assert!(holds(&path, ByteRange::new(1 << 20, 1 << 20), 3));
        // Closing waits for what is inside, too.
        let third = root.write(2 << 20, vec![4; 1 << 20]);
        let mut third = std::pin::pin!(third);
        let begun = std::future::poll_fn(|cx| Poll::Ready(third.as_mut().poll(cx)));
        assert!(begun.await.is_pending());
        yard.call(Request::Quit).await.expect("ends");
    });
}
