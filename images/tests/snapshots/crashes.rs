//! Whenever the power goes and whatever fails: the image is the old one or the new one, sound, and nothing leaks.

use std::rc::Rc;

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::snapshot::SnapshotError;
use blockyard_simulator::{Fault, run};
use blockyard_storage::Storage;
use blockyard_storage::error::EIO;

use crate::cases::{Judge, cases};

#[test]
fn every_deed_is_done_durably() {
    for case in cases() {
        let judge = Judge::of(&case);
        assert!(!judge.look(&case.image, &case.told));
        let (world, disk) = case.disk(1);
        let file: Rc<dyn Storage> = disk.open();
        let ended = run(case.run(&file, &Unwatched), || world.step());
        ended.expect("it ends").expect(&case.told);
        assert!(judge.look(&disk.bytes(), &case.told), "{}", case.told);
        for seed in 0..5 {
            let kept = disk.bytes_after_cut(seed);
            assert!(
                judge.look(&kept, &case.told),
                "{}: it is durable",
                case.told
            );
        }
    }
}

#[test]
fn a_power_cut_at_any_step_leaves_the_old_or_the_new() {
    let mut cuts = [0, 0];
    for case in cases() {
        let judge = Judge::of(&case);
        for steps in 0.. {
            let told = format!("{} cut after {steps}", case.told);
            let (world, disk) = case.disk(steps * 31 + 7);
            let file: Rc<dyn Storage> = disk.open();
            let ended = run(case.run(&file, &Unwatched), || {
                world.steps() < steps && world.step()
            });
            if let Some(ended) = ended {
                ended.expect("done");
                assert!(steps > 5, "{told}");
                break;
            }
            for seed in 0..2 {
                let is_new = judge.look(&disk.bytes_after_cut(seed), &told);
                cuts[usize::from(is_new)] += 1;
            }
        }
    }
    assert!(cuts[0] > 500 && cuts[1] > 30, "{cuts:?}");
}

#[test]
fn whatever_fails_the_image_is_whole() {
    let mut failures = 0;
    for case in cases() {
        let judge = Judge::of(&case);
        for nth in 1.. {
            let told = format!("{} operation {nth} fails", case.told);
            let (world, disk) = case.disk(nth);
            world.add_fault(Fault::fails(EIO).nth(nth));
            let file: Rc<dyn Storage> = disk.open();
            let ended = run(case.run(&file, &Unwatched), || world.step());
            let ended = ended.expect("it ends");
            let is_new = judge.look(&disk.bytes(), &told);
            judge.look(&disk.bytes_after_cut(nth), &told);
            if world.failures() == 0 {
                ended.expect("done");
                break;
            }
            failures += 1;
            match ended {
                // Room that could not be given back.
                Ok(()) => assert!(is_new, "{told}"),
                Err(error) => {
                    assert!(matches!(error, SnapshotError::Failed(_)), "{told}: {error}");
                }
            }
        }
    }
    assert!(failures > 100, "{failures}");
}
