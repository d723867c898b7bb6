//! Active commits beside writers, and mirrors of a top layer: what stands on chains of images.

use super::*;

/// An overlay and its base.
struct Chain(ImageYard);

impl Chain {
    fn random(seed: u64) -> Self {
        let setup = ImageSetup::random(seed);
        let size_bytes = setup.size_bytes.max(4096);
        let dice = Seed::new(seed ^ 0xc4a1);
        Self(ImageYard::new(ImageSetup {
            size_bytes,
            backing_bytes: Some(match dice.below(3) {
                0 => 512 * (1 + dice.below(size_bytes / 512)),
                _ => size_bytes,
            }),
            alignment: 1,
            data_file: match setup.data_file {
                DataFile::Raw => DataFile::Inside,
                other => other,
            },
            ..setup
        }))
    }

    fn base(&self) -> Rc<dyn Node> {
        self.0
            .file("base", self.0.base.as_ref().expect("there"), false)
    }

    fn stage(&self, setup: Setup, base: Rc<dyn Node>) -> Stage {
        let file = self.0.file("file", &self.0.image, false);
        let device: Rc<dyn Node> = self.0.open_over(file, Some(base.clone()));
        let mut bytes = self.0.base_bytes.clone();
        bytes.truncate(self.0.setup.size_bytes as usize);
        Stage::new(setup, &bytes, device, base, 4096)
    }

    fn run(&self, stage: &Stage) -> Option<Result<(), Stop>> {
        let work = ActiveCommit::new(
            stage.source.clone(),
            stage.target.clone(),
            1,
            stage.tracker.clone(),
        );
        stage.run(Box::new(work), || self.0.world.step(), || {})
    }
}

/// Never writes to both sides: an active commit cannot be told to.
fn for_commit(setup: Setup) -> Setup {
    Setup {
        copy_mode: CopyMode::Background,
        changes_mode: false,
        ..setup
    }
}

#[test]
fn an_active_commit_beside_writers_leaves_the_base_as_the_device_was() {
    each_seed("blockyard-engine", "an_active_commit_beside", 200, |seed| {
        let chain = Chain::random(seed);
        let stage = chain.stage(for_commit(Setup::random(seed)), chain.base());
        let ended = chain.run(&stage).expect("it ends");
        assert_eq!(ended.is_ok(), stage.setup.end != End::Cancel, "{ended:?}");
        stage.assert_end(&ended, || chain.0.world.step());
    });
}

#[test]
fn whichever_request_of_an_active_commit_fails_no_answered_write_is_lost() {
    for seed in 0..5 {
        for nth in 1.. {
            let chain = Chain::random(seed);
            let setup = Setup {
                operations: 5,
                writers: 2,
                ready_for: 20,
                ..Setup::random(seed)
            };
            let stage = chain.stage(for_commit(setup), chain.base());
            let errno = if nth % 2 == 0 { EIO } else { ENOSPC };
            chain.0.world.add_fault(Fault::fails(errno).nth(nth));
            let ended = chain.run(&stage).expect("it ends");
            if chain.0.world.failures() == 0 {
                break;
            }
            if matches!(ended, Err(Stop::Failed(_))) {
                // The length of the base is no request that a policy is asked for.
                stage.errors.set(stage.errors.get().max(1));
            }
            stage.assert_end(&ended, || chain.0.world.step());
        }
    }
}

#[test]
fn after_a_cut_at_any_step_of_an_active_commit_the_device_has_what_was_flushed() {
    each_seed(
        "blockyard-engine",
        "a_cut_at_any_step_of_an_active",
        6,
        |seed| {
            for steps_max in (0..).step_by(3) {
                let chain = Chain::random(seed);
                let setup = Setup {
                    steps_max,
                    // What is written beside it is not durable, so nothing is.
                    operations: 0,
                    ..for_commit(Setup::random(seed))
                };
                let stage = chain.stage(setup, chain.base());
                // Something to commit, durably.
                for place in 0..6 {
                    let stripe = stage.stripes[place % stage.stripes.len()].0;
                    let bytes = Buffer::copy_of(&vec![place as u8 + 1; stripe.length() as usize]);
                    let written = chain.0.drive(stage.root.write(stripe.offset(), bytes));
                    written.outcome.expect("written");
                    stage.learn(stripe, Some(place as u8 + 1));
                }
                chain.0.drive(stage.root.flush()).expect("flushed");
                let ended = chain.run(&stage);
                let was_completed = ended == Some(Ok(())) && stage.setup.end == End::Complete;
                chain.0.cut_power();
                let again = chain.stage(stage.setup.clone(), chain.base());
                let bytes = run(again.contents(&again.source), || chain.0.world.step());
                stage.assert_known(0, &bytes.expect("read"), "the device after a cut");
                if was_completed {
                    let bytes = run(again.contents(&again.target), || chain.0.world.step());
                    stage.assert_known(0, &bytes.expect("read"), "the base after a cut");
                }
                if ended.is_some() {
                    assert!(steps_max > 3);
                    break;
                }
            }
        },
    );
}

/// A mirror of only a part of what the source shows, whose target gets the rest from below it afterwards: from what is below
/// the source, or from the source.
fn mirror_of_a_part(seed: u64, sync: SyncMode) {
    let chain = Chain::random(seed);
    let other = ImageSetup::random(seed ^ 0x70b);
    let target = ImageYard::new(ImageSetup {
        // So that both have the same below.
        seed,
        size_bytes: chain.0.setup.size_bytes,
        backing_bytes: chain.0.setup.backing_bytes,
        alignment: 1,
        data_file: match other.data_file {
            DataFile::Raw => DataFile::Inside,
            other => other,
        },
        ..other
    });
    let setup = Setup {
        end: End::Complete,
        stops_at_success: true,
        misses_backing: true,
        ..Setup::random(seed)
    };
    let over = |backing| -> Rc<dyn Node> {
        let file = target.file("file", &target.image, false);
        target.open_over(file, backing)
    };
    let bare = over(None);
    let stage = Stage {
        target: bare.clone(),
        ..chain.stage(setup, chain.base())
    };
    let step = || {
        let here = chain.0.world.step();
        target.world.step() || here
    };
    let ended = stage.run(mirror(&stage, sync), step, || {});
    assert_eq!(ended, Some(Ok(())));
    target.drive(bare.close()).expect("closed");
    let whole = match sync {
        SyncMode::None => over(Some(stage.source.clone())),
        _ => over(target.backing()),
    };
    let bytes = run(stage.contents(&whole), step).expect("read");
    stage.assert_known(0, &bytes, "with its backing");
}

#[test]
fn a_mirror_of_the_top_layer_is_whole_once_it_has_its_backing() {
    each_seed(
        "blockyard-engine",
        "a_mirror_of_the_top_layer",
        200,
        |seed| {
            mirror_of_a_part(seed, SyncMode::Top);
        },
    );
}

#[test]
fn a_mirror_of_what_changes_is_whole_once_it_is_on_its_source() {
    each_seed("blockyard-engine", "a_mirror_on_its_source", 200, |seed| {
        mirror_of_a_part(seed, SyncMode::None);
    });
}
