//! Layers are taken out of chains: whatever happens, whoever looks through the top sees what was there, and once the job
//! has succeeded the layers are not needed any more.

use std::cell::RefCell;

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::layout::header::{Access, Header};
use blockyard_simulator::{Fault, Seed, each_seed, run};
use blockyard_storage::error::{EIO, ENOSPC};
use blockyard_storage::{ByteRange, LocalFuture, Operation as StorageOperation};

use super::chain::{Chain, Kind, Nodes};
use crate::job::context::{CancelMode, JobShared};
use crate::job::error_policy::OnError;
use crate::job::work::Stop;
use crate::node::qcow2::tests::model::{Model, Operation};

/// Writes to the top and reads from it, one after the other, and keeps the model.
fn writer<'a>(
    chain: &'a Chain,
    nodes: &'a Nodes,
    model: &'a RefCell<Model>,
    seed: u64,
    count: u64,
) -> LocalFuture<'a, ()> {
    let dice = Seed::new(seed);
    let setup = &chain.yards[0].setup;
    Box::pin(async move {
        for _ in 0..count {
            let operation = Operation::random(&dice, setup);
            let done = operation.carry_out(&nodes.top).await.expect("done");
            model.borrow_mut().apply(&operation, setup);
            let range = operation.range();
            if let Some(read) = done {
                assert!(read == model.borrow().slice(range), "{operation:?}");
            }
            let read = Operation::Read(ByteRange::new(0, setup.size_bytes));
            let read = read.carry_out(&nodes.top).await.expect("readable");
            let bytes = read.expect("bytes");
            let wrong = (0..bytes.len()).find(|at| bytes[*at] != model.borrow().bytes[*at]);
            assert_eq!(wrong, None, "after {operation:?}");
        }
    })
}

#[test]
fn whoever_writes_meanwhile_finds_all_of_it_without_the_layers() {
    each_seed(
        "blockyard-engine",
        "whoever_writes_meanwhile",
        150,
        |seed| {
            let mut chain = Chain::random(seed);
            let nodes = chain.open(&chain.whole());
            let model = RefCell::new(chain.model.clone());
            let others = writer(&chain, &nodes, &model, seed, seed % 12);
            let ended = chain.run_job(&nodes, Some(others), 0, |_| true, || {});
            assert_eq!(ended.result, Some(Ok(())));
            assert_eq!(ended.progress.0, ended.progress.1);
            chain.model = model.into_inner();
            chain.assert_shows(&nodes, "before the chain is linked anew");
            chain.relink(&nodes);
            chain.assert_shows(&nodes, "after");
            for node in &nodes.all {
                chain.drive(node.close()).expect("closed");
            }
            drop(nodes);
            chain.assert_sound(false, "closed");
            chain.assert_holds(&chain.kept(), "opened without the layers");
        },
    );
}

#[test]
fn progress_is_over_the_length_of_what_is_looked_at() {
    each_seed("blockyard-engine", "progress_is_over", 40, |seed| {
        let chain = Chain::random(seed);
        let nodes = chain.open(&chain.whole());
        let length = |level: usize| nodes.all[level].facts().length_bytes;
        let expected = match chain.kind {
            Kind::Stream { .. } => length(0),
            Kind::Commit { top, .. } => {
                let seen = (0..top).map(length).max().expect("an overlay");
                let hidden = seen.min(length(chain.target()));
                length(top) + hidden.saturating_sub(length(top))
            }
        };
        let ended = chain.run_alone(&nodes);
        assert_eq!(ended.progress, (expected, expected));
    });
}

#[test]
fn what_has_succeeded_survives_the_power() {
    each_seed("blockyard-engine", "what_has_succeeded", 60, |seed| {
        let chain = Chain::random(seed);
        let nodes = chain.open(&chain.whole());
        let ended = chain.run_alone(&nodes);
        assert_eq!(ended.result, Some(Ok(())));
        drop(nodes);
        chain.cut_power();
        chain.assert_sound(true, "cut");
        // The link may have been changed or not.
        chain.assert_holds(&chain.whole(), "with the layers");
        chain.assert_holds(&chain.kept(), "without them");
    });
}

#[test]
fn a_cut_at_any_step_harms_nothing_and_the_next_try_ends_well() {
    each_seed("blockyard-engine", "a_cut_at_any_step_harms", 10, |seed| {
        for steps in 0.. {
            let chain = Chain::random(seed);
            let nodes = chain.open(&chain.whole());
            let last = chain.steps() + steps;
            let ended = chain.run_job(&nodes, None, 0, |_| chain.steps() < last, || {});
            drop(nodes);
            chain.cut_power();
            chain.assert_sound(true, "cut");
            chain.assert_holds(&chain.whole(), "cut");
            if let Some(result) = ended.result {
                assert_eq!(result, Ok(()));
                chain.assert_holds(&chain.kept(), "cut at the end");
                return;
            }
            let nodes = chain.open(&chain.whole());
            let again = chain.run_alone(&nodes);
            assert_eq!(again.result, Some(Ok(())), "after a cut at step {steps}");
            drop(nodes);
            chain.cut_power();
            chain.assert_holds(&chain.kept(), "again");
        }
    });
}

#[test]
fn a_cut_while_the_header_is_written_leaves_one_chain_or_the_other() {
    let (mut old, mut new) = (0, 0);
    for seed in 0..10 {
        for steps in 0.. {
            let chain = Chain::random(seed);
            let nodes = chain.open(&chain.whole());
            assert_eq!(chain.run_alone(&nodes).result, Some(Ok(())));
            let (overlay, options) = chain.new_header();
            let last = chain.steps() + steps;
            let ended = run(nodes.all[overlay].amend(&options, &Unwatched), || {
                chain.steps() < last && chain.step()
            });
            drop(nodes);
            chain.cut_power();
            chain.assert_sound(true, "cut");
            let image = chain.yards[overlay].image.bytes();
            let header = Header::parse(&image, Access::ReadWrite).expect("it opens");
            let is_new = match header.backing_name.as_deref() {
                None | Some(b"new") => true,
                Some(b"base") => false,
                Some(other) => panic!("{other:?}"),
            };
            let levels = if is_new { chain.kept() } else { chain.whole() };
            chain.assert_holds(&levels, "as the header says");
            if let Some(ended) = ended {
                ended.expect("amended");
                assert!(is_new, "seed {seed}");
                break;
            }
            old += usize::from(!is_new);
            new += usize::from(is_new);
        }
    }
    assert!(old > 20 && new > 5, "{old} old, {new} new");
}

#[test]
fn whichever_request_fails_nothing_is_lost() {
    let policies = [OnError::Report, OnError::Stop, OnError::Ignore];
    each_seed(
        "blockyard-engine",
        "whichever_request_fails_nothing",
        9,
        |seed| {
            let policy = policies[seed as usize % policies.len()];
            let levels = Chain::random(seed).yards.len();
            for level in 0..levels {
                for nth in 1.. {
                    let mut chain = Chain::random(seed);
                    chain.policy = policy;
                    let nodes = chain.open(&chain.whole());
                    let errno = if nth % 2 == 0 { EIO } else { ENOSPC };
                    chain.yards[level]
                        .world
                        .add_fault(Fault::fails(errno).nth(nth));
                    let ended = chain.run_alone(&nodes);
                    let what = format!("seed {seed}, {policy:?}, {nth} of layer {level}");
                    let result = ended.result.unwrap_or_else(|| panic!("{what} hangs"));
                    let failures = chain.failures();
                    drop(nodes);
                    chain.cut_power();
                    chain.assert_sound(true, &what);
                    chain.assert_holds(&chain.whole(), &what);
                    match &result {
                        Ok(()) => chain.assert_holds(&chain.kept(), &what),
                        Err(Stop::Failed(error)) => {
                            assert_eq!(error.errno, Some(errno), "{what}: {error:?}");
                            assert!(failures > 0 && ended.errors > 0, "{what}: {error:?}");
                        }
                        // It goes on failing: a sync.
                        Err(Stop::Cancelled) => assert!(ended.errors > 1, "{what}"),
                    }
                    if failures == 0 {
                        assert_eq!((result, ended.errors), (Ok(()), 0), "{what}");
                        break;
                    }
                }
            }
        },
    );
}

#[test]
fn a_stream_that_ignores_errors_goes_on_and_fails_in_the_end() {
    let mut failed = 0;
    for seed in 0..60 {
        let mut chain = Chain::random(seed);
        if !matches!(chain.kind, Kind::Stream { .. }) {
            continue;
        }
        chain.policy = OnError::Ignore;
        let nodes = chain.open(&chain.whole());
        // Nothing can be read from the second layer's image.
        let Some(yard) = chain.yards.get(1) else {
            continue;
        };
        let fault = Fault::fails(EIO).of(StorageOperation::Read).from(1);
        yard.world.add_fault(fault.on(&yard.image));
        let ended = chain.run_alone(&nodes);
        let result = ended.result.expect("it ends");
        assert_eq!(ended.progress.0, ended.progress.1, "seed {seed}");
        match result {
            Ok(()) => assert_eq!(ended.errors, 0, "seed {seed}"),
            Err(Stop::Failed(error)) => {
                assert_eq!(error.errno, Some(EIO), "seed {seed}");
                assert!(ended.errors > 0, "seed {seed}");
                failed += 1;
            }
            Err(Stop::Cancelled) => assert_eq!(ended.errors, 8, "seed {seed}"),
        }
    }
    assert!(failed > 5, "{failed} have failed");
}

#[test]
fn a_full_disk_waits_for_room() {
    let mut waited = 0;
    for seed in 0..80 {
        let mut chain = Chain::random(seed);
        chain.policy = if seed % 2 == 0 {
            OnError::Stop
        } else {
            OnError::Enospc
        };
        let nodes = chain.open(&chain.whole());
        let target = chain.target();
        let disk = match chain.yards.get(target) {
            Some(yard) => yard.data.as_ref().unwrap_or(&yard.image),
            None => chain
                .yards
                .last()
                .and_then(|yard| yard.base.as_ref())
                .expect("a raw file"),
        };
        disk.set_capacity(Some(disk.allocated_bytes() + 4096 * (seed % 5)));
        let more_room = || disk.set_capacity(Some(disk.allocated_bytes() + (1 << 18)));
        let ended = chain.run_job(&nodes, None, 0, |_| true, more_room);
        assert_eq!(ended.result, Some(Ok(())), "seed {seed}");
        assert_eq!(ended.parked, ended.errors, "seed {seed}");
        assert_eq!(ended.progress.0, ended.progress.1, "seed {seed}");
        waited += usize::from(ended.parked > 0);
        disk.set_capacity(None);
        drop(nodes);
        chain.cut_power();
        chain.assert_holds(&chain.kept(), "with room");
    }
    assert!(waited > 10, "{waited} of 80 have waited");
}

/// Orders after so many steps, once.
fn order_after<'a>(
    chain: &'a Chain,
    steps: u64,
    order: impl Fn(&JobShared) + 'a,
) -> impl FnMut(&JobShared) -> bool + 'a {
    let at = chain.steps() + steps;
    let mut given = false;
    move |orders| {
        if !given && chain.steps() >= at {
            given = true;
            order(orders);
        }
        true
    }
}

#[test]
fn a_pause_or_a_cancel_at_any_step() {
    each_seed("blockyard-engine", "a_pause_or_a_cancel", 8, |seed| {
        for steps in 0.. {
            let chain = Chain::random(seed);
            let nodes = chain.open(&chain.whole());
            let speed = if seed % 2 == 0 { 0 } else { 1 << 20 };
            let pause = order_after(&chain, steps, |orders| orders.order_pause(true));
            let ended = chain.run_job(&nodes, None, speed, pause, || {});
            assert_eq!(ended.result, Some(Ok(())), "paused after {steps}");
            let was_paused = ended.parked > 0;
            drop(nodes);
            chain.cut_power();
            chain.assert_holds(&chain.kept(), "resumed");

            let chain = Chain::random(seed);
            let nodes = chain.open(&chain.whole());
            let cancel = order_after(&chain, steps, |orders| {
                orders.order_cancel(CancelMode::Force);
            });
            let ended = chain.run_job(&nodes, None, speed, cancel, || {});
            assert_eq!(chain.in_flight(), 0, "ended with something in flight");
            match ended.result.expect("it ends") {
                Ok(()) => {}
                Err(stop) => assert_eq!(stop, Stop::Cancelled),
            }
            chain.assert_shows(&nodes, "cancelled");
            drop(nodes);
            chain.cut_power();
            chain.assert_sound(true, "cancelled");
            chain.assert_holds(&chain.whole(), "cancelled");
            if !was_paused {
                return;
            }
        }
    });
}
