//! The simulator against the suite for storages, and proof that its faults have teeth: everything a disk may do to pending
//! bytes really happens for some seed, and what is durable stays.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use blockyard_simulator::trace::Happened;
use blockyard_simulator::{Disk, DiskOptions, Fault, SimulatedStorage, World, run};
use blockyard_storage::error::{EBADF, EINVAL, EIO, ENOSPC};
use blockyard_storage::{
    Buffer, ByteRange, Operation, Preallocation, Storage, ZeroMode, conformance,
};

const SECTOR: usize = 512;

/// Runs to the end; a future that waits for nothing fails the test.
fn block_on<T>(world: &World, future: impl Future<Output = T>) -> T {
    run(future, || world.step()).expect("waits for something that can happen")
}

fn poll_once<F: Future>(future: &mut std::pin::Pin<&mut F>) -> Poll<F::Output> {
    future
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
}

fn buffer(length: usize, byte: u8) -> Buffer {
    Buffer::copy_of(&vec![byte; length])
}

async fn write(
    storage: &SimulatedStorage,
    offset: u64,
    length: usize,
    byte: u8,
) -> Result<(), i32> {
    let written = storage.write(offset, buffer(length, byte)).await;
    written.outcome.map_err(|error| error.errno)
}

/// A disk of 16 durable sectors of 1.
fn ones(seed: u64, options: DiskOptions) -> (World, Disk, Rc<SimulatedStorage>) {
    let world = World::new(seed);
    let disk = world.disk("disk", options);
    disk.fill(0, &[1; 16 * SECTOR]);
    let storage = disk.open();
    (world, disk, storage)
}

/// What became of the sectors of a disk: `true` where all bytes are `byte`, `false` where all are 1.
fn sectors(bytes: &[u8], byte: u8) -> Vec<bool> {
    let whole = |sector: &[u8]| {
        let first = sector[0];
        assert!(
            sector.iter().all(|other| *other == first),
            "a sector is whole or not at all"
        );
        assert!(first == byte || first == 1, "neither old nor new: {first}");
        first == byte
    };
    bytes.chunks(SECTOR).map(whole).collect()
}

/// Which of lost, kept and torn these sectors show.
fn fate(sectors: &[bool]) -> &'static str {
    match (sectors.contains(&true), sectors.contains(&false)) {
        (true, false) => "kept",
        (false, _) => "lost",
        (true, true) => "torn",
    }
}

#[test]
fn it_is_a_storage() {
    for seed in 0..4 {
        for alignment in [1, 512, 4096] {
            let world = World::new(seed);
            let options = DiskOptions {
                request_alignment: alignment,
                ..DiskOptions::default()
            };
            conformance::run(&|| world.disk("disk", options.clone()).open(), &|future| {
                block_on(&world, future);
            });
        }
    }
}

#[test]
fn what_is_pending_is_kept_lost_or_torn_and_what_is_durable_stays() {
    let all = ByteRange::new(0, 16 * SECTOR as u64);
    for kind in [Operation::Write, Operation::Zero] {
        let mut fates = BTreeSet::new();
        for seed in 0..100 {
            let (world, disk, storage) = ones(seed, DiskOptions::default());
            block_on(&world, async {
                let outcome = match kind {
                    Operation::Zero => storage.zero(all, ZeroMode::default()).await,
                    _ => storage.write(0, buffer(16 * SECTOR, 0)).await.outcome,
                };
                outcome.expect("done");
            });
            assert_eq!(disk.bytes(), [0; 16 * SECTOR], "visible");
            assert_eq!(disk.durable_bytes(), [1; 16 * SECTOR], "not durable");
            world.cut_power();
            let left = disk.bytes();
            fates.insert(fate(&sectors(&left, 0)));
            assert_eq!(
                disk.durable_bytes(),
                left,
                "what a cut left is there to stay"
            );

            let storage = disk.open();
            block_on(&world, async {
                write(&storage, 0, 16 * SECTOR, 2).await.expect("written");
                storage.sync().await.expect("flushed");
            });
            for cut in 0..8 {
                assert_eq!(disk.bytes_after_cut(cut), [2; 16 * SECTOR], "durable");
            }
        }
        assert_eq!(fates, BTreeSet::from(["kept", "lost", "torn"]), "{kind:?}");
    }
}

#[test]
fn pending_writes_survive_or_not_each_by_itself() {
    let mut seen = BTreeSet::new();
    let (world, disk, storage) = ones(0, DiskOptions::default());
    block_on(&world, async {
        for sector in 0..3 {
            write(&storage, sector * SECTOR as u64, SECTOR, 7)
                .await
                .expect("written");
        }
    });
    for cut in 0..300 {
        seen.insert(sectors(&disk.bytes_after_cut(cut)[..3 * SECTOR], 7));
    }
    assert_eq!(seen.len(), 8, "every combination: {seen:?}");
}

#[test]
fn a_sync_covers_only_what_had_ended_when_it_began() {
    for seed in 0..20 {
        let (world, disk, storage) = ones(seed, DiskOptions::default());
        block_on(&world, write(&storage, 0, SECTOR, 2)).expect("written");
        world.add_fault(Fault::slow(1).of(Operation::Sync));
        let mut sync = storage.sync();
        let mut sync = pin!(&mut sync);
        assert!(poll_once(&mut sync).is_pending());
        block_on(&world, write(&storage, SECTOR as u64, SECTOR, 3)).expect("written");
        block_on(&world, sync).expect("flushed");
        assert_eq!(disk.durable_bytes()[..SECTOR], [2; SECTOR]);
        assert_eq!(
            disk.durable_bytes()[SECTOR..],
            [1; 15 * SECTOR],
            "ended after the sync began"
        );
    }
}

#[test]
fn what_is_in_flight_may_be_there_after_a_cut_and_its_storage_is_dead() {
    let mut fates = BTreeSet::new();
    for seed in 0..60 {
        let (world, disk, storage) = ones(seed, DiskOptions::default());
        let mut in_flight = storage.write(0, buffer(16 * SECTOR, 5));
        let mut in_flight = pin!(&mut in_flight);
        assert!(poll_once(&mut in_flight).is_pending());
        world.cut_power();
        assert!(!world.step(), "nothing waits any more");
        assert!(
            poll_once(&mut in_flight).is_pending(),
            "nobody is left to answer"
        );
        fates.insert(fate(&sectors(&disk.bytes(), 5)));
        assert_eq!(block_on(&world, write(&storage, 0, SECTOR, 6)), Err(EIO));
        assert_eq!(block_on(&world, write(&disk.open(), 0, SECTOR, 6)), Ok(()));
    }
    assert_eq!(fates, BTreeSet::from(["kept", "lost", "torn"]));
}

#[test]
fn lengths_are_pending_too() {
    let mut lengths = BTreeSet::new();
    for seed in 0..60 {
        let (world, disk, storage) = ones(seed, DiskOptions::default());
        block_on(&world, async {
            storage.resize(SECTOR as u64).await.expect("shrunk");
            write(&storage, SECTOR as u64, SECTOR, 2)
                .await
                .expect("written");
        });
        assert_eq!(disk.bytes().len(), 2 * SECTOR);
        assert_eq!(disk.durable_bytes().len(), 16 * SECTOR);
        lengths.insert(disk.bytes_after_cut(seed).len() / SECTOR);
    }
    assert_eq!(lengths, BTreeSet::from([1, 2, 16]));
}

#[test]
fn a_failed_sync_is_for_good() {
    let mut fates = BTreeSet::new();
    for seed in 0..60 {
        let (world, disk, storage) = ones(seed, DiskOptions::default());
        world.add_fault(Fault::fails(ENOSPC).of(Operation::Sync));
        block_on(&world, async {
            write(&storage, 0, 16 * SECTOR, 2).await.expect("written");
            for _ in 0..2 {
                assert_eq!(storage.sync().await.expect_err("poisoned").errno, ENOSPC);
            }
            assert_eq!(write(&storage, 0, SECTOR, 3).await, Err(ENOSPC));
            let range = ByteRange::new(0, SECTOR as u64);
            let refused = [
                storage.zero(range, ZeroMode::default()).await,
                storage.discard(range).await,
                storage.resize(1).await,
                storage.preallocate(range, Preallocation::Full).await,
            ];
            for outcome in refused {
                assert_eq!(outcome.expect_err("poisoned").errno, ENOSPC);
            }
            // Whoever opens it anew is told that all is well.
            disk.open().sync().await.expect("nothing is left to flush");
        });
        assert_eq!(disk.bytes(), [2; 16 * SECTOR], "still visible");
        world.cut_power();
        fates.insert(fate(&sectors(&disk.bytes(), 2)));
    }
    assert_eq!(fates, BTreeSet::from(["kept", "lost", "torn"]));
}

#[test]
fn a_sync_that_nobody_waits_for_poisons_as_well() {
    let (world, _, storage) = ones(0, DiskOptions::default());
    world.add_fault(Fault::fails(EIO).of(Operation::Sync));
    let mut abandoned = storage.sync();
    assert!(poll_once(&mut pin!(&mut abandoned)).is_pending());
    drop(abandoned);
    assert_eq!(world.in_flight(), 1, "abandoned, not undone");
    assert!(world.step());
    assert_eq!(block_on(&world, write(&storage, 0, SECTOR, 3)), Err(EIO));
}

#[test]
fn the_nth_operation_of_a_kind_fails_and_leaves_nothing_a_part_or_all() {
    let mut fates = BTreeSet::new();
    for seed in 0..60 {
        let (world, disk, storage) = ones(seed, DiskOptions::default());
        let other = world.disk("other", DiskOptions::default());
        world.add_fault(Fault::fails(EIO).of(Operation::Write).on(&disk).nth(2));
        block_on(&world, async {
            write(&other.open(), 0, SECTOR, 9)
                .await
                .expect("another disk");
            write(&storage, 0, SECTOR, 1).await.expect("the first");
            storage.sync().await.expect("another kind");
            assert_eq!(world.failures(), 0);
            assert_eq!(write(&storage, 0, 16 * SECTOR, 4).await, Err(EIO));
            fates.insert(fate(&sectors(&disk.bytes(), 4)));
            write(&storage, 0, 16 * SECTOR, 4).await.expect("the third");
        });
        assert_eq!(world.failures(), 1);
    }
    assert_eq!(fates, BTreeSet::from(["kept", "lost", "torn"]));
    let (world, _, storage) = ones(0, DiskOptions::default());
    world.add_fault(Fault::fails(EIO).of(Operation::Read).from(2));
    let read = || block_on(&world, storage.read(0, Buffer::zeroed(SECTOR)));
    read().outcome.expect("the first");
    for _ in 0..3 {
        let failed = read();
        assert_eq!(failed.outcome.expect_err("from the second on").errno, EIO);
        assert!(
            failed.buffer.as_slice().iter().all(|byte| *byte != 1),
            "no use in the bytes"
        );
    }
}

#[test]
fn a_full_disk_takes_what_it_has_room_for_and_more_when_there_is_more() {
    let options = DiskOptions {
        capacity_bytes: Some(4 * 4096),
        ..DiskOptions::default()
    };
    let (world, disk, storage) = ones(0, options);
    assert_eq!(disk.allocated_bytes(), 2 * 4096);
    block_on(&world, async {
        write(&storage, 0, 8192, 2)
            .await
            .expect("takes no more room");
        storage
            .resize(1 << 30)
            .await
            .expect("a hole takes none either");
        assert_eq!(write(&storage, 8192, 3 * 4096, 2).await, Err(ENOSPC));
        assert_eq!(disk.allocated_bytes(), 4 * 4096, "what fits is there");
        let reserve = ByteRange::new(1 << 20, 4096);
        let full = storage.preallocate(reserve, Preallocation::Falloc).await;
        assert!(full.expect_err("full").is_no_space());
        storage
            .discard(ByteRange::new(0, 4096))
            .await
            .expect("discarded");
        storage
            .preallocate(reserve, Preallocation::Falloc)
            .await
            .expect("room given back");
        disk.set_capacity(Some(16 * 4096));
        write(&storage, 8192, 3 * 4096, 2)
            .await
            .expect("room added");
    });
}

#[test]
fn operations_end_in_another_order_than_issued_and_slow_ones_last() {
    let ended = |seed, slow: bool| {
        let (world, _, storage) = ones(seed, DiskOptions::default());
        if slow {
            world.add_fault(Fault::slow(u64::MAX).of(Operation::Write).nth(1));
        }
        let writes: Vec<_> = (0..8)
            .map(|sector| write(&storage, sector * 512, 512, 2))
            .collect();
        let mut writes: Vec<_> = writes.into_iter().map(Box::pin).collect();
        for write in &mut writes {
            assert!(poll_once(&mut write.as_mut()).is_pending());
        }
        while world.step() {}
        let trace = world.trace();
        let ended = trace
            .entries()
            .filter(|entry| entry.happened == Happened::Ended(None));
        ended.map(|entry| entry.number).collect::<Vec<_>>()
    };
    let orders: BTreeSet<_> = (0..10).map(|seed| ended(seed, false)).collect();
    assert!(orders.len() > 5, "{orders:?}");
    for seed in 0..10 {
        assert_eq!(ended(seed, true).last(), Some(&1));
        assert_eq!(
            ended(seed, false),
            ended(seed, false),
            "the same seed, the same order"
        );
    }
}

#[test]
fn shared_extents_are_pending_as_written_bytes_are() {
    let options = DiskOptions {
        shares_extents: true,
        length_bytes: 8192,
        ..DiskOptions::default()
    };
    let world = World::new(0);
    let (from, to) = (
        world.disk("from", options.clone()),
        world.disk("to", options),
    );
    let plain = world.disk("plain", DiskOptions::default());
    from.fill(0, &[3; 8192]);
    let all = ByteRange::new(0, 8192);
    let source = || from.open().host_file().expect("shares");
    block_on(&world, async {
        to.open().share(source(), 0, all).await.expect("shared");
        assert_eq!(to.bytes(), [3; 8192]);
        assert_eq!(to.durable_bytes(), [0; 8192]);
        let refused = plain.open().share(source(), 0, all).await;
        assert!(refused.expect_err("another kind of disk").is_unsupported());
    });
    assert!(plain.open().host_file().is_none());
}

#[test]
fn what_a_disk_cannot_take_is_refused_before_it_is_tried() {
    let options = DiskOptions {
        fixed_length: true,
        length_bytes: 8192,
        ..DiskOptions::default()
    };
    let (world, disk, storage) = ones(0, options);
    let read_only = disk.open_read_only();
    block_on(&world, async {
        assert_eq!(write(&read_only, 0, SECTOR, 2).await, Err(EBADF));
        read_only.sync().await.expect("nothing to flush");
        assert_eq!(write(&storage, 8192, SECTOR, 2).await, Err(ENOSPC));
        let resized = storage.resize(4096).await;
        assert_eq!(resized.expect_err("fixed").errno, EINVAL);
        storage.resize(8192).await.expect("it is that long");
    });
    assert_eq!(disk.bytes(), [1; 16 * SECTOR]);
    assert_eq!(
        world.trace().entries().count(),
        2,
        "only the last resize was tried"
    );
}
