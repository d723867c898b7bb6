//! Copies of images with backing chains: the target reads as the source does, with whatever backing it has in the end, and
//! takes room for data only.

use std::rc::Rc;

use blockyard_images::qcow2::units::Version;
use blockyard_simulator::{Fault, Seed, each_seed};
use blockyard_storage::ByteRange;
use blockyard_storage::error::{EIO, ENOSPC};
use futures_util::future::join_all;

use crate::job::context::ErrorPolicies;
use crate::job::error_policy::OnError;
use crate::job::work::{Stop, Work};
use crate::jobs::backup::Backup;
use crate::jobs::mirror::Mirror;
use crate::jobs::test_support::{Running, VirtualClock, saver};
use crate::node::Node;
use crate::node::mirror_top::Tracker;
use crate::node::qcow2::tests::model::{Model, Operation, assert_holds};
use crate::node::qcow2::tests::yard::{DataFile, Setup, Yard};
use crate::request::{BackupPerf, BackupSpec, CbwOptions, IntegritySpec, MirrorSpec, SyncMode};

/// A copy of an image.
struct Copy {
    source: Yard,
    model: Model,
    target: Yard,
    sync: SyncMode,
    /// A backup, compressed or not; `None`: a mirror.
    backup: Option<bool>,
}

impl Copy {
    fn random(seed: u64) -> Self {
        let dice = Seed::new(seed);
        let setup = Setup::random(seed);
        let source = Yard::new(Setup {
            size_bytes: setup.size_bytes.max(512),
            ..setup
        });
        let sync = *dice.pick(&[SyncMode::Full, SyncMode::Top]);
        let other = Setup::random(seed ^ 0x7a26e7);
        let target = Yard::new(Setup {
            // So that both have the same below.
            seed,
            size_bytes: source.setup.size_bytes,
            backing_bytes: match sync == SyncMode::Top || dice.one_in(2) {
                true => source.setup.backing_bytes,
                false => None,
            },
            // A raw data file has no backing.
            data_file: match other.data_file {
                DataFile::Raw => DataFile::Inside,
                other => other,
            },
            ..other
        });
        let compresses = target.setup.data_file == DataFile::Inside;
        let backup = *dice.pick(&[None, Some(false), Some(compresses)]);
        let model = Model::of(&source);
        Self {
            source,
            model,
            target,
            sync,
            backup,
        }
    }

    /// Writes this and that to the source.
    fn fill_source(&mut self, dice: &Seed) {
        let node = self.source.open();
        let setup = &self.source.setup;
        for _ in 0..8 {
            let operation = Operation::random(dice, setup);
            let done = self.source.drive(operation.carry_out(&node));
            done.expect("done");
            self.model.apply(&operation, setup);
        }
        self.source.drive(node.close()).expect("closed");
    }

    fn work(&self, source: Rc<dyn Node>, target: Rc<dyn Node>) -> Box<dyn Work> {
        let (device, on) = ("s".to_owned(), "t".to_owned());
        match self.backup {
            Some(compress) => Box::new(Backup::new(
                source.clone(),
                target.clone(),
                saver(&source, &target, &VirtualClock::default()),
                None,
                BackupSpec {
                    device,
                    target: on,
                    sync: self.sync,
                    speed: 0,
                    new_target: None,
                    bitmap: None,
                    bitmap_mode: None,
                    compress,
                    on_source_error: OnError::Report,
                    on_target_error: OnError::Report,
                    filter_node_name: None,
                    discard_source: false,
                    perf: BackupPerf::default(),
                    cbw: CbwOptions::default(),
                    integrity: IntegritySpec::default(),
                },
            )),
            None => Box::new(Mirror::new(
                source.clone(),
                target,
                Rc::new(Tracker::new(source.facts().length_bytes, 64 << 10)),
                None,
                &MirrorSpec {
                    device,
                    target: on,
                    sync: self.sync,
                    ..MirrorSpec::default()
                },
            )),
        }
    }

    /// Copies and closes both images.
    fn run(&self) {
        let (source, target) = self.nodes();
        self.run_on(&source, &target).expect("copied");
        self.target.drive(target.close()).expect("closed");
        self.source.drive(source.close()).expect("closed");
    }

    /// Source and target, which is opened without a backing, whatever its image names.
    fn nodes(&self) -> (Rc<dyn Node>, Rc<dyn Node>) {
        let file = self.target.file("file", &self.target.image, false);
        (self.source.open(), self.target.open_over(file, None))
    }

    /// Copies, and says how it ended.
    fn run_on(&self, source: &Rc<dyn Node>, target: &Rc<dyn Node>) -> Result<(), Stop> {
        let ended = self.run_for(source, target, u64::MAX);
        ended.expect("waits for something that can happen")
    }

    /// The same, for so many steps of the disks; `None`: it goes on yet.
    fn run_for(
        &self,
        source: &Rc<dyn Node>,
        target: &Rc<dyn Node>,
        steps: u64,
    ) -> Option<Result<(), Stop>> {
        let steps_of = || self.source.world.steps() + self.target.world.steps();
        let last = steps_of().saturating_add(steps);
        let clock = VirtualClock::default();
        let mut work = self.work(source.clone(), target.clone());
        let running = Running::new(&clock, 0, ErrorPolicies::default());
        let orders = running.orders.clone();
        let ended = running.drive(
            &mut *work,
            |_| {},
            |_| {
                if steps_of() >= last {
                    return false;
                }
                let here = self.source.world.step();
                self.target.world.step() || here || clock.advance()
            },
        );
        if ended == Some(Ok(())) {
            let progress = &orders.progress;
            assert_eq!(progress.current_bytes(), progress.total_bytes());
        }
        ended
    }
}

#[test]
fn copies_of_chains_read_as_their_source_does() {
    each_seed("blockyard-engine", "copies_of_chains", 150, |seed| {
        let dice = Seed::new(seed);
        let mut copy = Copy::random(seed);
        copy.fill_source(&dice);
        copy.run();
        let node = copy.target.open();
        assert_holds(&copy.target, &node, &copy.model, &dice);
    });
}

#[test]
fn a_copy_takes_room_for_data_only() {
    each_seed("blockyard-engine", "a_copy_takes_room", 40, |seed| {
        let dice = Seed::new(seed);
        let mut copy = Copy::random(seed);
        if copy.sync != SyncMode::Full || copy.target.setup.backing_bytes.is_some() {
            return;
        }
        copy.fill_source(&dice);
        copy.run();
        let node = copy.target.open();
        let cluster = copy.target.setup.cluster_bytes();
        let all = ByteRange::new(0, copy.model.bytes.len() as u64);
        let statuses = all.pieces(cluster).map(|piece| node.status(piece, 9));
        let statuses = copy.target.drive(join_all(statuses));
        let source = copy.source.open();
        for (piece, status) in all.pieces(cluster).zip(statuses) {
            let zero = copy.model.slice(piece).iter().all(|byte| *byte == 0);
            let data = status.expect("told").iter().any(|extent| !extent.zero);
            if zero && data {
                // Zeroes that the source holds as data are data.
                let chain: Rc<dyn Node> = source.clone();
                let status = crate::node::chain::chain_status(&chain, None, piece, 99);
                let told = copy.source.drive(status).expect("told");
                let known = told
                    .iter()
                    .all(|extent| extent.content == crate::node::chain::Content::Zero);
                assert!(!known, "{piece} of {:?}", copy.target.setup);
            }
        }
        assert!([Version::V2, Version::V3].contains(&copy.target.setup.version));
    });
}

#[test]
fn a_copy_that_has_succeeded_survives_the_power() {
    each_seed(
        "blockyard-engine",
        "a_copy_that_has_succeeded",
        100,
        |seed| {
            let dice = Seed::new(seed);
            let mut copy = Copy::random(seed);
            copy.fill_source(&dice);
            let (source, target) = copy.nodes();
            assert_eq!(copy.run_on(&source, &target), Ok(()));
            drop(target);
            copy.target.cut_power();
            let node = copy.target.open();
            assert_holds(&copy.target, &node, &copy.model, &dice);
        },
    );
}

#[test]
fn whichever_request_fails_success_means_that_everything_is_there() {
    each_seed("blockyard-engine", "whichever_request_fails", 12, |seed| {
        for on_source in [false, true] {
            for nth in 1.. {
                let dice = Seed::new(seed);
                let mut copy = Copy::random(seed);
                copy.fill_source(&dice);
                let (source, target) = copy.nodes();
                let world = match on_source {
                    true => &copy.source.world,
                    false => &copy.target.world,
                };
                let errno = if nth % 2 == 0 { EIO } else { ENOSPC };
                world.add_fault(Fault::fails(errno).nth(nth));
                let ended = copy.run_on(&source, &target);
                if world.failures() == 0 {
                    assert_eq!(ended, Ok(()));
                    assert!(nth > 1, "nothing was asked of it");
                    break;
                }
                match ended {
                    // What was promised is there although nobody closes the image.
                    Ok(()) => {
                        drop(target);
                        copy.target.cut_power();
                        let node = copy.target.open();
                        assert_holds(&copy.target, &node, &copy.model, &dice);
                    }
                    Err(Stop::Failed(error)) => assert_eq!(error.errno, Some(errno), "{error:?}"),
                    Err(stop) => panic!("{stop:?}"),
                }
                // Whatever happened, the source is what it was.
                drop(source);
                let node = copy.source.open();
                assert_holds(&copy.source, &node, &copy.model, &dice);
            }
        }
    });
}

#[test]
fn after_a_cut_at_any_step_the_next_copy_of_an_image_ends_well() {
    each_seed("blockyard-engine", "after_a_cut_at_any_step", 10, |seed| {
        for steps in 0.. {
            let dice = Seed::new(seed);
            let mut copy = Copy::random(seed);
            copy.fill_source(&dice);
            let (source, target) = copy.nodes();
            let ended = copy.run_for(&source, &target, steps);
            drop((source, target));
            copy.source.cut_power();
            copy.target.cut_power();
            let node = copy.source.open();
            assert_holds(&copy.source, &node, &copy.model, &dice);
            if ended.is_some() {
                let node = copy.target.open();
                assert_holds(&copy.target, &node, &copy.model, &dice);
                assert!(steps > 1, "{steps} steps");
                return;
            }
            // Whatever is left of the target, it is an image that can be written.
            let (source, target) = copy.nodes();
            assert_eq!(copy.run_on(&source, &target), Ok(()), "cut after {steps}");
            copy.target.drive(target.close()).expect("closed");
            let node = copy.target.open();
            assert_holds(&copy.target, &node, &copy.model, &dice);
        }
    });
}
