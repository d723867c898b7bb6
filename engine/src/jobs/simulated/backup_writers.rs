//! Backups beside writers, on simulated disks: whatever fails, pauses or ends early, what is on the target is what the source was
//! when the filter came, and what a writer was told to be written is on the source.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use blockyard_simulator::{Fault, Seed, each_seed, run};
use blockyard_storage::error::{EIO, ENOSPC, ETIMEDOUT};
use blockyard_storage::{Buffer, ByteRange, Operation};

use super::backup_stage::{Disks, Setup, Stage};
use crate::clock::Clock;
use crate::job::context::ErrorPolicies;
use crate::job::error_policy::OnError;
use crate::job::work::Stop;
use crate::jobs::test_support::Running;
use crate::node::Node;
use crate::node::qcow2::tests::yard::{DataFile, Setup as ImageSetup, Yard as ImageYard};
use crate::request::{CbwOptions, OnCbwError, SyncMode};

fn errors_of_target(disks: &Disks, operations: &[Operation], errno: i32, one_in: u64) {
    for operation in operations {
        let fault = Fault::fails(errno).of(*operation).on(&disks.target);
        disks.world.add_fault(fault.one_in(one_in));
    }
}

#[test]
fn a_backup_beside_writers_is_what_the_source_was() {
    let (mut whole, mut cancelled) = (0, 0);
    let counted = RefCell::new((&mut whole, &mut cancelled));
    each_seed("blockyard-engine", "a_backup_beside_writers", 800, |seed| {
        let disks = Disks::random(seed);
        let stage = disks.stage(Setup::random(seed));
        let ended = stage.run(|| disks.world.step());
        assert_eq!(
            (stage.errors.get(), stage.failed_writes.borrow().len()),
            (0, 0)
        );
        stage.assert_end(&ended, || disks.world.step());
        let mut counted = counted.borrow_mut();
        match ended {
            Ok(()) => *counted.0 += 1,
            Err(_) => *counted.1 += 1,
        }
    });
    assert!(whole > 300 && cancelled > 20, "{whole}, {cancelled}");
}

#[test]
fn a_backup_of_what_is_overwritten_has_what_was_there() {
    each_seed(
        "blockyard-engine",
        "a_backup_of_what_is_overwritten",
        200,
        |seed| {
            let disks = Disks::random(seed);
            let stage = disks.stage(Setup {
                sync: SyncMode::None,
                cancel_at: Some(20 + seed % 700),
                ..Setup::random(seed)
            });
            let ended = stage.run(|| disks.world.step());
            assert_eq!(ended, Err(Stop::Cancelled));
            stage.assert_end(&ended, || disks.world.step());
        },
    );
}

#[test]
fn whichever_request_fails_beside_writers_the_point_in_time_is_kept() {
    let (mut succeeded, mut failed) = (0, 0);
    for seed in 0..8 {
        for nth in 1.. {
            let disks = Disks::random(seed);
            let errno = if nth % 2 == 0 { EIO } else { ENOSPC };
            disks.world.add_fault(Fault::fails(errno).nth(nth));
            let stage = disks.stage(Setup {
                operations: 6,
                cancel_at: None,
                ..Setup::random(seed)
            });
            let ended = stage.run(|| disks.world.step());
            if disks.world.failures() == 0 {
                break;
            }
            match ended {
                Ok(()) => succeeded += 1,
                Err(_) => failed += 1,
            }
            stage.assert_end(&ended, || disks.world.step());
        }
    }
    assert!(succeeded > 100 && failed > 10, "{succeeded}, {failed}");
}

#[test]
fn what_cannot_be_saved_is_not_overwritten() {
    let refused = Cell::new(0);
    each_seed(
        "blockyard-engine",
        "what_cannot_be_saved_is_not",
        400,
        |seed| {
            let disks = Disks::random(seed);
            let changes = [Operation::Write, Operation::Zero, Operation::Read];
            errors_of_target(&disks, &changes, ENOSPC, 2 + seed % 8);
            let stage = disks.stage(Setup {
                only_target_fails: true,
                ..Setup::random(seed)
            });
            let ended = stage.run(|| disks.world.step());
            let failed = stage.failed_writes.borrow().clone();
            assert!(failed.iter().all(|errno| *errno == ENOSPC), "{failed:?}");
            refused.set(refused.get() + failed.len());
            stage.assert_end(&ended, || disks.world.step());
        },
    );
    assert!(refused.get() > 200, "{} refused", refused.get());
}

#[test]
fn a_writer_is_never_the_one_who_suffers_if_the_backup_may() {
    let broken = Cell::new(0);
    each_seed(
        "blockyard-engine",
        "a_writer_is_never_the_one",
        400,
        |seed| {
            let disks = Disks::random(seed);
            let changes = [Operation::Write, Operation::Zero, Operation::Read];
            errors_of_target(&disks, &changes, EIO, 3 + seed % 12);
            let stage = disks.stage(Setup {
                cbw: CbwOptions {
                    on_error: OnCbwError::BreakSnapshot,
                    timeout_seconds: 0,
                },
                ..Setup::random(seed)
            });
            let ended = stage.run(|| disks.world.step());
            assert!(stage.failed_writes.borrow().is_empty(), "{:?}", stage.setup);
            stage.assert_end(&ended, || disks.world.step());
            broken.set(broken.get() + usize::from(stage.saver.broken().is_some()));
        },
    );
    assert!(broken.get() > 100, "{} broken", broken.get());
}

#[test]
fn storms_of_faults_beside_a_backup_end_in_no_wrong_bytes() {
    each_seed("blockyard-engine", "storms_beside_a_backup", 400, |seed| {
        let disks = Disks::random(seed);
        let one_in = 20 + seed % 60;
        disks.world.add_fault(Fault::slow(5).one_in(3));
        for operation in [
            Operation::Read,
            Operation::Write,
            Operation::Zero,
            Operation::Allocation,
            Operation::Discard,
        ] {
            let errno = if seed % 3 == 0 { ENOSPC } else { EIO };
            disks
                .world
                .add_fault(Fault::fails(errno).of(operation).one_in(one_in));
        }
        let stage = disks.stage(Setup::random(seed));
        let ended = stage.run(|| disks.world.step());
        stage.assert_end(&ended, || disks.world.step());
    });
}

#[test]
fn a_finished_backup_survives_the_power_whatever_writers_do() {
    each_seed(
        "blockyard-engine",
        "a_finished_backup_survives",
        200,
        |seed| {
            let disks = Disks::random(seed);
            let stage = disks.stage(Setup {
                cancel_at: None,
                stops_at_success: true,
                ..Setup::random(seed)
            });
            assert_eq!(stage.run(|| disks.world.step()), Ok(()));
            for cut in 0..4 {
                assert!(
                    disks.target.bytes_after_cut(cut) == stage.original,
                    "seed {seed}"
                );
            }
        },
    );
}

/// An image backed up to another one; both may have the same below.
struct Images {
    source: ImageYard,
    target: ImageYard,
    sync: SyncMode,
    compress: bool,
}

impl Images {
    fn random(seed: u64) -> Self {
        let dice = Seed::new(seed);
        let inside = |setup: ImageSetup| ImageSetup {
            alignment: 1,
            data_file: match setup.data_file {
                DataFile::Raw => DataFile::Inside,
                other => other,
            },
            ..setup
        };
        let setup = inside(ImageSetup::random(seed));
        let source = ImageYard::new(ImageSetup {
            size_bytes: setup.size_bytes.max(4096),
            ..setup
        });
        let sync = *dice.pick(&[SyncMode::Full, SyncMode::Top]);
        let target = ImageYard::new(ImageSetup {
            // So that both have the same below.
            seed,
            size_bytes: source.setup.size_bytes,
            backing_bytes: match sync {
                SyncMode::Top => source.setup.backing_bytes,
                _ => None,
            },
            ..inside(ImageSetup::random(seed ^ 0x7a26e7))
        });
        Self {
            compress: target.setup.data_file == DataFile::Inside && dice.one_in(3),
            source,
            target,
            sync,
        }
    }

    fn step(&self) -> bool {
        let worlds = [&self.source.world, &self.target.world];
        let first = (self.source.world.steps() % 2) as usize;
        worlds[first].step() || worlds[1 - first].step()
    }
}

#[test]
fn an_image_backed_up_beside_writers_is_what_it_was() {
    each_seed(
        "blockyard-engine",
        "an_image_backed_up_beside",
        200,
        |seed| {
            let images = Images::random(seed);
            let source: Rc<dyn Node> = images.source.open();
            let target: Rc<dyn Node> = images.target.open();
            let dice = Seed::new(seed ^ 0xf111);
            let length = source.facts().length_bytes;
            for value in 1..8 {
                let start = dice.below(length);
                let (range, _) =
                    ByteRange::between(start, length).split_at(1 + dice.below(length.min(30_000)));
                let bytes = Buffer::copy_of(&vec![value; range.length() as usize]);
                let written = images.source.drive(source.write(range.offset(), bytes));
                written.outcome.expect("written");
            }
            let read = source.read(0, Buffer::zeroed(length as usize));
            let original = images.source.drive(read).buffer.as_slice().to_vec();
            let setup = Setup {
                sync: images.sync,
                compress: images.compress,
                cluster_bytes: 512,
                ..Setup::random(seed)
            };
            // An image whose tables fail the job has its own tests.
            let stage = Stage::new(setup, original, source, target);
            let ended = stage.run(|| images.step());
            stage.assert_end(&ended, || images.step());
        },
    );
}

#[test]
fn a_target_that_hangs_stops_no_writer_for_longer_than_it_may() {
    for (on_error, seed) in [
        (OnCbwError::BreakGuestWrite, 1),
        (OnCbwError::BreakSnapshot, 2),
    ] {
        let disks = Disks::random(seed);
        let stage = disks.stage(Setup {
            cbw: CbwOptions {
                on_error,
                timeout_seconds: 3,
            },
            policy: OnError::Report,
            pauses: 0,
            cancel_at: None,
            sync: SyncMode::None,
            ..Setup::random(seed)
        });
        let work = stage.work();
        let running = Running::new(&stage.clock, 0, ErrorPolicies::default());
        work.let_writers_in(&running.cx);
        let mut write = pin!(stage.root.write(0, Buffer::copy_of(&[7; 512])));
        let start = stage.clock.now();
        // Only time passes: the disks do nothing.
        let ended = run(write.as_mut(), || stage.clock.advance());
        let took = stage.clock.now().since(start);
        assert_eq!(took, Duration::from_secs(3));
        match on_error {
            OnCbwError::BreakGuestWrite => {
                let written = ended.expect("it ends");
                let error = written.outcome.expect_err("what was there stays");
                assert_eq!((error.errno(), &*error.node), (ETIMEDOUT, "target"));
                assert!(stage.saver.broken().is_none());
            }
            OnCbwError::BreakSnapshot => {
                assert!(ended.is_none(), "it waits for the source");
                let broken = stage.saver.broken().expect("broken");
                assert_eq!(broken.errno(), ETIMEDOUT);
                let step = || disks.world.step();
                run(write, step).expect("it ends").outcome.expect("written");
            }
        }
        // What nobody waits for still has its turn, and ends.
        assert_eq!(stage.abandoned.borrow().len(), 1);
        let mut left = pin!(stage.saver.left());
        let both = poll_fn(|cx| {
            let mut abandoned = stage.abandoned.borrow_mut();
            abandoned.retain_mut(|work| work.as_mut().poll(cx).is_pending());
            left.as_mut().poll(cx)
        });
        assert!(run(both, || disks.world.step()).is_some());
        assert!(stage.abandoned.borrow().is_empty());
    }
}
