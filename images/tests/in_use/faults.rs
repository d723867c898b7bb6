//! Operations that fail: never a wrong success, never a wrong byte later on.

use blockyard_simulator::{Fault, each_seed, run};
use blockyard_storage::Operation;
use blockyard_storage::error::{EIO, ENOSPC};

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
