//! Clients at the same time, and the power that may go at every step.

use blockyard_simulator::{each_seed, run};

use crate::yard::{Failures, Yard, all};

#[test]
fn a_power_cut_at_any_step_leaves_what_was_flushed_and_leaks_at_most() {
    each_seed(
        "blockyard-images",
        "a_power_cut_at_any_step_leaves_what_was_flushed_and_leaks_at_most",
        150,
        |number| {
            let yard = Yard::new(number);
            let mover = yard.mover();
            let count = 1 + yard.seed.below(5);
            let mut tasks = yard.clients(&mover, count, 12, Failures::Never);
            let ended = run(all(&mut tasks), || {
                yard.check_after_cut(yard.world.steps());
                yard.world.step()
            });
            assert!(ended.is_some(), "somebody waits for ever");
            drop(tasks);
            let closed = run(mover.image.close(), || yard.world.step());
            closed.expect("it ends").expect("closed");
            let data = yard.data.as_ref().map(|data| data.bytes());
            yard.check_bytes(yard.image.bytes(), data);
        },
    );
}

#[test]
fn after_a_power_cut_an_image_is_used_on() {
    each_seed(
        "blockyard-images",
        "after_a_power_cut_an_image_is_used_on",
        150,
        |number| {
            let yard = Yard::new(500_000 + number);
            for _ in 0..4 {
                let mover = yard.mover();
                let mut tasks = yard.clients(&mover, 3, 10, Failures::Never);
                let mut left = yard.seed.below(200);
                let ended = run(all(&mut tasks), || {
                    left = left.saturating_sub(1);
                    left > 0 && yard.world.step()
                });
                if ended.is_none() && left > 0 {
                    panic!("somebody waits for ever");
                }
                drop((tasks, mover));
                yard.world.cut_power();
                yard.settle();
            }
        },
    );
}
