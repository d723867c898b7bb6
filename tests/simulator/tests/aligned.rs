//! `Aligned` over disks that take whole blocks only: what it adds to a request never shows, whatever else is in flight or
//! goes wrong.
#![forbid(unsafe_code)]

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

use blockyard_simulator::{Disk, DiskOptions, Fault, Seed, World, each_seed, run};
use blockyard_storage::error::EIO;
use blockyard_storage::{Aligned, Buffer, ByteRange, Operation, Storage, StorageError, ZeroMode};

type Job<'a> = Pin<Box<dyn Future<Output = Result<(), StorageError>> + 'a>>;

/// A file of `length` ones on blocks of 4096 bytes.
fn ones(world: &World, length: usize) -> (Disk, Rc<dyn Storage>) {
    let options = DiskOptions {
        request_alignment: 4096,
        ..DiskOptions::default()
    };
    let disk = world.disk("disk", options);
    disk.fill(0, &vec![1; length]);
    let storage = Aligned::over(disk.open());
    (disk, storage)
}

fn write(storage: &dyn Storage, offset: u64, length: usize, byte: u8) -> Job<'_> {
    let from = Buffer::copy_of(&vec![byte; length]);
    Box::pin(async move { storage.write(offset, from).await.outcome })
}

/// Everything at once; all outcomes in order.
fn all(world: &World, mut jobs: Vec<Job<'_>>) -> Vec<Result<(), StorageError>> {
    let mut outcomes = vec![None; jobs.len()];
    let both = std::future::poll_fn(|cx| {
        for (job, outcome) in jobs.iter_mut().zip(&mut outcomes) {
            if outcome.is_none()
                && let Poll::Ready(ended) = job.as_mut().poll(cx)
            {
                *outcome = Some(ended);
            }
        }
        match outcomes.iter().all(Option::is_some) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    });
    run(both, || world.step()).expect("everything ends");
    outcomes.into_iter().flatten().collect()
}

/// What the bytes have to be where `pieces` were written over a file of ones.
fn overwritten(length: usize, pieces: &[(u64, usize, u8)]) -> Vec<u8> {
    let mut bytes = vec![1; length];
    for (offset, count, byte) in pieces {
        let (start, end) = (*offset as usize, *offset as usize + count);
        bytes.resize(bytes.len().max(end), 0);
        bytes[start..end].fill(*byte);
    }
    bytes
}

#[test]
fn a_write_inside_the_file_never_cuts_what_another_one_adds() {
    for (inside, added) in [(100, 8192), (5000, 8192), (5000, 12_288), (7900, 8192)] {
        for seed in 0..50 {
            let world = World::new(seed);
            let (disk, storage) = ones(&world, 8192);
            let storage = &*storage;
            let jobs = vec![
                write(storage, inside, 200, 2),
                write(storage, added, 4096, 3),
                write(storage, added + 4096, 4096, 4),
            ];
            assert_eq!(all(&world, jobs), [Ok(()), Ok(()), Ok(())]);
            let pieces = [(inside, 200, 2), (added, 4096, 3), (added + 4096, 4096, 4)];
            assert!(
                disk.bytes() == overwritten(8192, &pieces),
                "seed {seed}: {inside}, {added}"
            );
        }
    }
}

#[test]
fn what_is_widened_at_the_end_is_cut_again_whatever_is_added_behind_it() {
    for seed in 0..100 {
        let world = World::new(seed);
        let (disk, storage) = ones(&world, 8192 + 512);
        let storage = &*storage;
        let jobs = vec![
            write(storage, 8192, 600, 2),
            write(storage, 12_288, 4096, 3),
        ];
        assert_eq!(all(&world, jobs), [Ok(()), Ok(())]);
        let pieces = [(8192, 600, 2), (12_288, 4096, 3)];
        assert!(disk.bytes() == overwritten(8704, &pieces), "seed {seed}");

        world.add_fault(Fault::slow(seed % 5).of(Operation::Resize));
        let jobs = vec![
            write(storage, 20_000, 10, 4),
            Box::pin(storage.resize(1 << 20)),
        ];
        assert_eq!(all(&world, jobs), [Ok(()), Ok(())]);
        assert_eq!(
            disk.bytes().len(),
            1 << 20,
            "seed {seed}: the last word on the length"
        );
    }
}

#[test]
fn a_failed_write_that_is_tried_again_leaves_the_length_as_asked() {
    for seed in 0..20 {
        for operation in [Operation::Read, Operation::Write, Operation::Resize] {
            for zeroes in [false, true] {
                let world = World::new(seed);
                let (disk, storage) = ones(&world, 5000);
                let storage = &*storage;
                // The first write is the neighbour's, which is not widened.
                let nth = 1 + u64::from(operation == Operation::Write);
                world.add_fault(Fault::fails(EIO).of(operation).nth(nth));
                let request = || match zeroes {
                    true => Box::pin(storage.zero(ByteRange::new(4500, 600), ZeroMode::default())),
                    false => write(storage, 4500, 600, 0),
                };
                let mut ended = all(&world, vec![request(), write(storage, 0, 4096, 1)]);
                assert_eq!(ended.pop(), Some(Ok(())));
                let failed = ended.remove(0);
                assert_eq!(failed.expect_err("as told").errno, EIO);
                assert_eq!(storage.facts().length_bytes, 5000, "nothing was added");
                assert_eq!(all(&world, vec![request()]), [Ok(())]);
                assert_eq!(storage.facts().length_bytes, 5120, "whole sectors");
                let wanted = overwritten(5000, &[(4500, 620, 0)]);
                assert!(disk.bytes() == wanted, "seed {seed}, {operation:?}");
            }
        }
    }
}

#[test]
fn a_write_that_waits_for_the_file_to_shrink_finds_its_new_end() {
    for seed in 0..50 {
        let world = World::new(seed);
        let (disk, storage) = ones(&world, 16_384);
        let storage = &*storage;
        let jobs = vec![
            Box::pin(storage.resize(5120)),
            write(storage, 8292, 100, 2),
            write(storage, 12_288, 4096, 3),
        ];
        assert_eq!(all(&world, jobs), [Ok(()), Ok(()), Ok(())]);
        let wanted = overwritten(5120, &[(8292, 100, 2), (12_288, 4096, 3)]);
        assert!(disk.bytes() == wanted, "seed {seed}");
    }
}

/// What a failed write has left behind the end is cut off by the next one, not together with what a neighbour adds there.
#[test]
fn what_a_neighbour_adds_is_not_cut_with_what_a_failed_write_has_left() {
    for seed in 0..100 {
        let world = World::new(seed);
        let (disk, storage) = ones(&world, 7 * 512);
        let storage = &*storage;
        world.add_fault(Fault::fails(EIO).of(Operation::Resize));
        let twice: Job<'_> = Box::pin(async move {
            let failed = write(storage, 4196, 100, 3).await;
            assert_eq!(failed.expect_err("as told").errno, EIO);
            write(storage, 4196, 100, 3).await
        });
        // Up to the end of a block, so that it adds nothing that has to be cut off again.
        let neighbour = write(storage, 3500, 596, 2);
        assert_eq!(all(&world, vec![neighbour, twice]), [Ok(()), Ok(())]);
        let mut wanted = overwritten(7 * 512, &[(3500, 596, 2), (4196, 100, 3)]);
        wanted.resize(9 * 512, 0);
        assert!(disk.bytes() == wanted, "seed {seed}");
    }
}

#[test]
fn what_is_added_after_a_failed_write_counts() {
    for operation in [Operation::Write, Operation::Resize] {
        let world = World::new(2);
        let (disk, storage) = ones(&world, 5120);
        let storage = &*storage;
        world.add_fault(Fault::fails(EIO).of(operation));
        assert!(all(&world, vec![write(storage, 5000, 200, 2)])[0].is_err());
        assert_eq!(all(&world, vec![write(storage, 8192, 4096, 3)]), [Ok(())]);
        assert_eq!(storage.facts().length_bytes, 12_288);
        assert_eq!(all(&world, vec![write(storage, 5000, 200, 2)]), [Ok(())]);
        let wanted = overwritten(5120, &[(5000, 200, 2), (8192, 4096, 3)]);
        assert!(disk.bytes() == wanted, "{operation:?}");
    }
}

#[test]
fn what_a_failed_write_has_left_behind_the_end_never_comes_to_light() {
    for seed in 0..50 {
        let world = World::new(seed);
        let (disk, storage) = ones(&world, 5120);
        let storage = &*storage;
        // Some of these leave nothing, a part or all of 12,288 bytes.
        world.add_fault(Fault::fails(EIO).of(Operation::Write));
        assert!(all(&world, vec![write(storage, 5000, 9000, 2)])[0].is_err());
        assert_eq!(storage.facts().length_bytes, 5120);
        for (offset, length) in [(4096, 16_384), (5120, 1000), (8192, 4096)] {
            let read = run(storage.read(offset, Buffer::zeroed(length)), || {
                world.step()
            });
            let read = read.expect("ends");
            assert_eq!(read.outcome, Ok(()));
            let behind = (5120_u64.saturating_sub(offset) as usize).min(length);
            let behind = &read.buffer.as_slice()[behind..];
            assert!(behind.iter().all(|byte| *byte == 0), "seed {seed}");
        }
        // Up to the end of a block, and not: neither is cut afterwards.
        let (offset, length) = [(16_384, 4096), (20_000, 480), (20_000, 100)][seed as usize % 3];
        assert_eq!(
            all(&world, vec![write(storage, offset, length, 3)]),
            [Ok(())]
        );
        let end = (offset + length as u64).next_multiple_of(512);
        assert_eq!(storage.facts().length_bytes, end);
        let bytes = disk.bytes();
        assert_eq!(bytes.len() as u64, end);
        assert!(
            bytes[5120..offset as usize].iter().all(|byte| *byte == 0),
            "seed {seed}"
        );
        assert!(
            bytes[offset as usize..][..length]
                .iter()
                .all(|byte| *byte == 3)
        );
    }
}

#[test]
fn a_widened_write_that_is_given_up_undoes_nothing() {
    for seed in 0..200 {
        let world = World::new(seed);
        let (disk, storage) = ones(&world, 8192);
        let storage = &*storage;
        let steps = world.steps() + seed % 4;
        let _ = run(write(storage, 100, 5000, 2), || {
            world.steps() < steps && world.step()
        });
        // Neighbours in the same blocks, whatever becomes of it.
        let jobs = vec![
            write(storage, 0, 100, 3),
            write(storage, 5100, 100, 4),
            write(storage, 8100, 500, 5),
        ];
        assert_eq!(all(&world, jobs), [Ok(()), Ok(()), Ok(())]);
        while world.step() {}
        let bytes = disk.bytes();
        let found = |range: std::ops::Range<usize>, byte| bytes[range].iter().all(|b| *b == byte);
        assert!(found(0..100, 3), "seed {seed}");
        assert!(found(5100..5200, 4), "seed {seed}");
        assert!(found(5200..8100, 1), "seed {seed}");
        assert!(found(8100..8600, 5), "seed {seed}");
        assert!(bytes[100..5100].iter().all(|byte| [1, 2].contains(byte)));
        assert_eq!(bytes.len(), 8704);
    }
}

#[test]
fn anything_at_once_on_bytes_of_its_own_ends_as_if_it_were_alone() {
    each_seed("blockyard-simulator", "anything_at_once", 300, |seed| {
        let (world, dice) = (World::new(seed), Seed::new(!seed));
        let mut length = 512 * (1 + dice.below(20) as usize);
        let (disk, storage) = ones(&world, length);
        let storage = &*storage;
        for _ in 0..6 {
            let (mut jobs, mut pieces): (Vec<Job<'_>>, Vec<_>) = (Vec::new(), Vec::new());
            let mut at = dice.below(2000);
            for byte in 2..10 {
                let count = 1 + dice.below(*dice.pick(&[100, 3000, 9000]));
                match dice.below(3) {
                    0 => {
                        let range = ByteRange::new(at, count);
                        jobs.push(Box::pin(storage.zero(range, ZeroMode::default())));
                        pieces.push((at, count as usize, 0));
                    }
                    1 => {
                        jobs.push(write(storage, at, count as usize, byte));
                        pieces.push((at, count as usize, byte));
                    }
                    _ => {}
                }
                at += count;
            }
            let before = disk.bytes();
            assert!(all(&world, jobs).iter().all(Result::is_ok));
            let end = pieces
                .iter()
                .map(|(at, count, _)| *at as usize + count)
                .max();
            length = length.max(end.unwrap_or(0).next_multiple_of(512));
            let mut wanted = before;
            for (offset, count, byte) in pieces {
                let (start, end) = (offset as usize, offset as usize + count);
                wanted.resize(wanted.len().max(end), 0);
                wanted[start..end].fill(byte);
            }
            wanted.resize(length, 0);
            assert!(disk.bytes() == wanted, "wrong bytes");
            assert_eq!(storage.facts().length_bytes, length as u64);
        }
    });
}
