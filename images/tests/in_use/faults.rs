//! Operations that fail: never a wrong success, never a wrong byte later on.

use blockyard_images::qcow2::create::CreateOptions;
use blockyard_images::qcow2::{Options, Qcow2};
use blockyard_simulator::disk::DiskOptions;
use blockyard_simulator::{Disk, Fault, World, each_seed, run};
use blockyard_storage::error::{EIO, ENOSPC};
use blockyard_storage::{ByteRange, Operation};

use crate::mover::Mover;
use crate::setup::{Setup, all_bytes};
use crate::yard::{Failures, Yard, all};

/// Clients work while something fails; the power may go at every step.
fn work(yard: &Yard, fault: Fault, count: u64, steps: u64) {
    let mover = yard.mover();
    // Opening is not what is tried here.
    yard.world.add_fault(fault);
    let mut tasks = yard.clients(&mover, count, steps, Failures::Allowed);
    let ended = run(all(&mut tasks), || {
        yard.check_after_cut(yard.world.steps());
        yard.world.step()
    });
    assert!(ended.is_some(), "somebody waits for ever");
    drop(tasks);
    let flushing = yard.cells.flush();
    let flushed = run(mover.image.flush(), || yard.world.step()).expect("it ends");
    if flushed.is_ok() {
        assert!(
            !yard.unflushed.get(),
            "a flush is never tried again to success"
        );
        yard.cells.flushed(flushing);
    }
    yard.check_after_cut(1);
    let closed = run(mover.image.close(), || yard.world.step()).expect("it ends");
    if closed.is_ok() {
        yard.check_bytes(
            yard.image.bytes(),
            yard.data.as_ref().map(|data| data.bytes()),
        );
    }
}

#[test]
fn any_one_operation_fails() {
    each_seed("blockyard-images", "any_one_operation_fails", 6, |number| {
        for nth in 1.. {
            let yard = Yard::new(2_000_000 + number);
            let errno = if nth % 2 == 0 { EIO } else { ENOSPC };
            work(&yard, Fault::fails(errno).nth(nth), 2, 10);
            if yard.world.failures() == 0 {
                assert!(nth > 5);
                break;
            }
        }
    });
}

#[test]
fn many_operations_fail_by_chance() {
    each_seed(
        "blockyard-images",
        "many_operations_fail_by_chance",
        150,
        |number| {
            let yard = Yard::new(3_000_000 + number);
            let kinds = [
                Operation::Read,
                Operation::Write,
                Operation::Zero,
                Operation::Discard,
                Operation::Resize,
            ];
            let kind = *yard.seed.pick(&kinds);
            let errno = *yard.seed.pick(&[EIO, ENOSPC]);
            let chance = 4 + yard.seed.below(20);
            let fault = Fault::fails(errno).of(kind).one_in(chance);
            work(&yard, fault, 3, 12);
        },
    );
}

#[test]
fn a_sync_fails_and_nothing_is_promised_any_more() {
    each_seed(
        "blockyard-images",
        "a_sync_fails_and_nothing_is_promised_any_more",
        100,
        |number| {
            let yard = Yard::new(4_000_000 + number);
            let nth = 1 + yard.seed.below(12);
            let fault = Fault::fails(EIO).of(Operation::Sync).nth(nth);
            work(&yard, fault, 3, 12);
        },
    );
}

#[test]
fn a_full_disk_gets_room_and_all_is_well() {
    each_seed(
        "blockyard-images",
        "a_full_disk_gets_room_and_all_is_well",
        100,
        |number| {
            let yard = Yard::new(5_000_000 + number);
            if yard.setup.device.is_some() {
                return;
            }
            let mover = yard.mover();
            let taken = yard.image.allocated_bytes();
            let room = yard.seed.below(10) * 4096;
            yard.image.set_capacity(Some(taken + room));
            let mut tasks = yard.clients(&mover, 3, 10, Failures::Allowed);
            let step = || {
                yard.check_after_cut(yard.world.steps());
                yard.world.step()
            };
            assert!(
                run(all(&mut tasks), step).is_some(),
                "somebody waits for ever"
            );
            yard.image.set_capacity(None);
            let flushing = yard.cells.flush();
            let flushed = run(mover.image.flush(), step).expect("it ends");
            flushed.expect("there is room now");
            yard.cells.flushed(flushing);
            let mut tasks = yard.clients(&mover, 3, 5, Failures::Never);
            assert!(
                run(all(&mut tasks), step).is_some(),
                "somebody waits for ever"
            );
            let closed = run(mover.image.close(), step).expect("it ends");
            closed.expect("closed");
            yard.check_bytes(
                yard.image.bytes(),
                yard.data.as_ref().map(|data| data.bytes()),
            );
        },
    );
}

#[test]
fn a_full_disk_has_room_for_the_tables_of_what_was_written() {
    each_seed(
        "blockyard-images",
        "a_full_disk_has_room_for_the_tables_of_what_was_written",
        200,
        |number| {
            let yard = Yard::new(7_000_000 + number);
            if yard.setup.device.is_some() {
                return;
            }
            let mover = yard.mover();
            let taken = yard.image.allocated_bytes();
            let room = yard.seed.below(30) * 4096;
            yard.image.set_capacity(Some(taken + room));
            let mut tasks = yard.clients(&mover, 3, 10, Failures::Allowed);
            let step = || yard.world.step();
            assert!(
                run(all(&mut tasks), step).is_some(),
                "somebody waits for ever"
            );
            let flushing = yard.cells.flush();
            let flushed = run(mover.image.flush(), step).expect("it ends");
            flushed.expect("what was answered has its room");
            yard.cells.flushed(flushing);
            yard.check_after_cut(1);
            let closed = run(mover.image.close(), step).expect("it ends");
            closed.expect("closed");
            yard.check_bytes(
                yard.image.bytes(),
                yard.data.as_ref().map(|data| data.bytes()),
            );
        },
    );
}

/// Writes of 4 KiB, so far apart, to an image of this shape; the disk is full some time after the first `before` are durable.
struct Filling {
    cluster_bytes: u64,
    refcount_bits: u64,
    stride_bytes: u64,
    before: u64,
    /// It goes on with a copy of these, in which every block of zeroes is a hole.
    on_a_copy: bool,
}

/// A file without room for its zeroes.
fn copy_sparsely(world: &World, file: &[u8]) -> Disk {
    let copy = world.disk("copy", DiskOptions::default());
    let end = file.len().saturating_sub(1);
    copy.fill(end as u64, &file[end..]);
    for (block, bytes) in (0..).zip(file.chunks(4096)) {
        if bytes.iter().any(|byte| *byte != 0) {
            copy.fill(block * 4096, bytes);
        }
    }
    copy
}

impl Filling {
    const WRITE_BYTES: u64 = 4096;

    fn open(&self, world: &World, disk: &Disk) -> Mover {
        let options = Options {
            l2_cache_entry_bytes: 4096,
            ..Options::default()
        };
        let opening = Qcow2::open(disk.open(), None, options);
        let image = run(opening, || world.step()).expect("it ends");
        Mover::new(image.expect("sound"), None, true)
    }

    fn place(&self, index: u64) -> ByteRange {
        ByteRange::new(index * self.stride_bytes, Self::WRITE_BYTES)
    }

    /// How many were answered with so much room behind the first ones: all of them are there.
    fn with_room(&self, room_bytes: u64) -> u64 {
        let mut create = CreateOptions::new(1 << 30);
        create.cluster_bytes = self.cluster_bytes;
        create.refcount_bits = self.refcount_bits;
        let setup = Setup {
            create,
            options: Options::default(),
            below: None,
            skips_zeroes: true,
            device: None,
        };
        let world = World::new(room_bytes);
        let mut disk = world.disk("image", DiskOptions::default());
        disk.fill(0, &all_bytes(&setup.memory().0));
        let mut mover = self.open(&world, &disk);
        let step = || world.step();
        let bytes = [0x55; Self::WRITE_BYTES as usize];
        let mut answered = 0;
        loop {
            if answered == self.before {
                let flushed = run(mover.image.flush(), step).expect("it ends");
                flushed.expect("there is room");
                if self.on_a_copy {
                    let closed = run(mover.image.close(), step).expect("it ends");
                    closed.expect("there is room");
                    disk = copy_sparsely(&world, &disk.bytes());
                    mover = self.open(&world, &disk);
                }
                disk.set_capacity(Some(disk.allocated_bytes() + room_bytes));
            }
            let writing = mover.write(self.place(answered).offset(), &bytes);
            match run(writing, step).expect("it ends") {
                Ok(()) => answered += 1,
                Err(_) => break,
            }
        }
        let closed = run(mover.image.close(), step).expect("it ends");
        closed.expect("all that was answered has its room");
        let mover = self.open(&world, &disk);
        for index in 0..answered {
            let read = run(mover.read(self.place(index)), step).expect("it ends");
            assert!(read.expect("read") == bytes, "{room_bytes}: {index}");
        }
        answered
    }
}

#[test]
fn whatever_fills_a_disk_leaves_room_for_the_tables() {
    for filling in [
        // Each goes to a slice of its own of an L2 table that is there, then to the next table.
        Filling {
            cluster_bytes: 64 << 10,
            refcount_bits: 16,
            stride_bytes: 32 << 20,
            before: 1,
            on_a_copy: false,
        },
        // The same where such a table is mostly a hole.
        Filling {
            cluster_bytes: 64 << 10,
            refcount_bits: 16,
            stride_bytes: 32 << 20,
            before: 1,
            on_a_copy: true,
        },
        // Tables of all kinds are holes: nothing has been written.
        Filling {
            cluster_bytes: 64 << 10,
            refcount_bits: 16,
            stride_bytes: 1 << 20,
            before: 0,
            on_a_copy: true,
        },
        // They come to the end of what a refcount block counts, and what an L2 table leads to.
        Filling {
            cluster_bytes: 4096,
            refcount_bits: 64,
            stride_bytes: 4096,
            before: 500,
            on_a_copy: false,
        },
        // Most of what a refcount block counts is free yet.
        Filling {
            cluster_bytes: 16 << 10,
            refcount_bits: 64,
            stride_bytes: 4096,
            before: 700,
            on_a_copy: true,
        },
    ] {
        let answered: Vec<u64> = (0..80)
            .map(|blocks| filling.with_room(blocks * 4096))
            .collect();
        assert!(answered.is_sorted(), "{answered:?}");
        assert!(answered.last() > answered.first(), "{answered:?}");
    }
}

#[test]
fn requests_are_given_up_midway() {
    each_seed(
        "blockyard-images",
        "requests_are_given_up_midway",
        200,
        |number| {
            let yard = Yard::new(6_000_000 + number);
            let mover = yard.mover();
            for _ in 0..4 {
                let mut tasks = yard.clients(&mover, 4, 10, Failures::Allowed);
                let mut left = yard.seed.below(60);
                run(all(&mut tasks), || {
                    yard.check_after_cut(yard.world.steps());
                    left = left.saturating_sub(1);
                    left > 0 && yard.world.step()
                });
                // Some go on, with operations of others still under way.
                while tasks.len() > 1 {
                    drop(tasks.swap_remove(yard.seed.below(tasks.len() as u64) as usize));
                }
                let ended = run(all(&mut tasks), || {
                    yard.check_after_cut(yard.world.steps());
                    yard.world.step()
                });
                assert!(ended.is_some(), "somebody waits for ever");
            }
            let closed = run(mover.image.close(), || yard.world.step()).expect("it ends");
            closed.expect("closed");
            yard.check_bytes(
                yard.image.bytes(),
                yard.data.as_ref().map(|data| data.bytes()),
            );
        },
    );
}
