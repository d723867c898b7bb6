//! The power goes at every step: the source is whole, what was said to be durable is, and the next try ends well.

use blockyard_simulator::{Fault, each_seed};
use blockyard_storage::error::EIO;
use blockyard_storage::{LocalFuture, Operation};

use super::yard::{BEFORE_WINDOW, KINDS, Kind, Nothing, Setup, Watch, Yard};
use crate::job::context::{Cursor, JobContext, JobShared};
use crate::job::error_policy::OnError;
use crate::job::work::{Stop, Work};
use crate::jobs::copier::{Copier, CopyOptions, WindowLimits};
use crate::jobs::plan::Layers;

/// Cuts the power after so many steps.
struct CutAfter(u64);

impl Watch for CutAfter {
    fn idle(&mut self, yard: &Yard, _: &JobShared) -> bool {
        yard.world.steps() < self.0
    }
}

#[test]
fn after_a_cut_at_any_step_the_source_is_whole_and_the_next_try_ends_well() {
    for kind in KINDS {
        for seed in 0..8 {
            for steps in 0.. {
                let yard = Yard::new(Setup {
                    windowed: seed % 2 == 0,
                    shares: seed % 3 == 0,
                    unmaps: seed % 4 < 2,
                    alignment: if seed < 4 { 1 } else { 512 },
                    ..Setup::new(seed, kind, OnError::Report)
                });
                let ended = yard.run(&mut CutAfter(steps));
                if ended.result.is_some() {
                    assert!(steps >= 2, "{kind:?}: {steps} steps");
                    break;
                }
                yard.world.cut_power();
                yard.assert_source_untouched();
                let again = yard.run(&mut Nothing);
                assert_eq!(
                    again.result,
                    Some(Ok(())),
                    "{kind:?}, seed {seed}, cut after {steps}"
                );
            }
        }
    }
}

/// Copies and nothing else, with a durable point every few blocks.
struct Copy(Copier);

impl Work for Copy {
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> LocalFuture<'a, Result<(), Stop>> {
        Box::pin(self.0.run(cx))
    }
}

impl Copy {
    fn on(yard: &Yard) -> Self {
        let (source, target) = yard.nodes();
        let options = CopyOptions {
            layers: Layers::All,
            unit_bytes: 1,
            compress: false,
            window: WindowLimits::of(8192).with_requests(8),
            chunk_max_bytes: 8192,
            granularity_bytes: 4096,
            may_unmap: yard.setup.unmaps,
            skips_first_zeroes: false,
            zeroes_are_free: yard.setup.seed.is_multiple_of(2),
            one_error_a_round: yard.setup.seed.is_multiple_of(3),
            counts_skipped: false,
            leaves_out_ignored: false,
            remember_bytes: 16_384,
        };
        Self(Copier::new(source, target, options))
    }
}

/// Holds the job to its last cursor at every step.
#[derive(Default)]
struct HoldsToCursors {
    last: Option<Cursor>,
    count: usize,
}

impl HoldsToCursors {
    fn look(&self, yard: &Yard) {
        let Some(cursor) = &self.last else {
            return;
        };
        let start = if yard.setup.windowed {
            BEFORE_WINDOW
        } else {
            0
        };
        let mut bytes = yard.target.bytes_after_cut(yard.world.steps());
        bytes.resize(yard.wanted.len(), 0);
        for range in &cursor.done {
            let place = (start + range.offset()) as usize..(start + range.end()) as usize;
            assert!(
                bytes[place.clone()] == yard.wanted[place],
                "{range:?} is not durable"
            );
        }
    }
}

impl Watch for HoldsToCursors {
    fn idle(&mut self, yard: &Yard, _: &JobShared) -> bool {
        self.look(yard);
        true
    }

    fn remembered(&mut self, yard: &Yard, cursor: &Cursor) {
        self.last = Some(cursor.clone());
        self.count += 1;
        self.look(yard);
    }
}

#[test]
fn what_a_cursor_holds_is_durable_from_then_on() {
    each_seed("blockyard-engine", "what_a_cursor_holds", 600, |seed| {
        let mut setup = Setup::random(seed);
        setup.discards_source = false;
        let yard = Yard::new(setup);
        yard.world.add_fault(Fault::slow(8).one_in(4));
        if seed % 4 != 0 {
            for operation in [
                Operation::Read,
                Operation::Write,
                Operation::Zero,
                Operation::Share,
            ] {
                yard.world
                    .add_fault(Fault::fails(EIO).of(operation).one_in(6));
            }
            let failing_sync = Fault::fails(EIO).of(Operation::Sync).one_in(6);
            yard.world.add_fault(failing_sync);
        }
        let mut watch = HoldsToCursors::default();
        yard.run_work(&mut Copy::on(&yard), &mut watch);
        if yard.world.failures() == 0 {
            assert!(watch.count > 0, "no cursor");
        }
    });
}

/// At every step one side has everything.
struct OneSideIsWhole;

impl Watch for OneSideIsWhole {
    fn idle(&mut self, yard: &Yard, _: &JobShared) -> bool {
        for cut in 0..2 {
            let seed = yard.world.steps() * 2 + cut;
            if yard.source.bytes_after_cut(seed) != yard.original {
                yard.assert_copied();
            }
        }
        true
    }
}

#[test]
fn a_source_is_discarded_only_behind_a_durable_copy() {
    let mut discarded = 0;
    for seed in 0..60 {
        let mut setup = Setup::random(seed);
        setup.kind = Kind::Backup;
        setup.discards_source = true;
        let yard = Yard::new(setup);
        let failing_sync = Fault::fails(EIO).of(Operation::Sync).one_in(4);
        yard.world.add_fault(failing_sync);
        yard.run(&mut OneSideIsWhole);
        discarded += usize::from(yard.source.bytes() != yard.original);
    }
    assert!(
        discarded > 20 && discarded < 60,
        "{discarded} of 60 sources were discarded"
    );
}
