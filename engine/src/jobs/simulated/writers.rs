//! Mirrors and active commits beside writers, on simulated disks: whatever fails, pauses or ends early, what a writer was told
//! to be written is there, and when the job succeeds the target is what the source is.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blockyard_simulator::{Disk, DiskOptions, Fault, Seed, World, each_seed, run};
use blockyard_storage::error::{EIO, ENOSPC};
use blockyard_storage::{Buffer, ByteRange, Operation, ZeroMode};
use futures_util::future::{Either, join, join_all, select};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::bitmap::FrozenBitmap;
use crate::clock::Clock;
use crate::data::Spawner;
use crate::job::context::{CancelMode, ErrorPolicies, JobKey, JobShared, Report};
use crate::job::error_policy::{ErrorAction, OnError};
use crate::job::work::{Stop, Work};
use crate::jobs::active_commit::ActiveCommit;
use crate::jobs::integrity::Integrity;
use crate::jobs::mirror::Mirror;
use crate::jobs::test_support::{Running, VirtualClock};
use crate::manifest::Recorder;
use crate::manifest::onto::Earlier;
use crate::node::Node;
use crate::node::file_node::{FileNode, FileOptions};
use crate::node::mirror_top::{MirrorTop, Tracker};
use crate::node::qcow2::tests::yard::{DataFile, Setup as ImageSetup, Yard as ImageYard};
use crate::node::root::Root;
use crate::request::{CopyMode, Discard, MirrorSpec, SyncMode};

/// A job that meets so many errors is cancelled.
const ERRORS_MAX: usize = 12;

/// How a job ends once it is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Complete,
    LetGo,
    Cancel,
}

/// What happens to a job and its writers.
#[derive(Clone, Debug)]
struct Setup {
    seed: u64,
    copy_mode: CopyMode,
    /// The copy mode changes on the way.
    changes_mode: bool,
    end: End,
    /// Steps of the disks between ready and the end.
    ready_for: u64,
    policy: OnError,
    /// The job is paused at every so many looks on average; 0: never.
    pauses: u64,
    writers: usize,
    operations: usize,
    /// Steps after which nothing happens any more.
    steps_max: u64,
    /// Writers are dropped where they are when the job has succeeded.
    stops_at_success: bool,
    /// What is below the target is still missing.
    misses_backing: bool,
    /// The speed changes at every so many looks on average; 0: never.
    speeds: u64,
    /// Zeroes on the target may become holes.
    unmap: bool,
    /// The target is said to read as zeroes.
    target_is_zero: bool,
}

impl Setup {
    fn random(seed: u64) -> Self {
        let dice = Seed::new(seed ^ 0x11fe);
        Self {
            seed,
            copy_mode: *dice.pick(&[CopyMode::Background, CopyMode::WriteBlocking]),
            changes_mode: dice.one_in(3),
            end: *dice.pick(&[End::Complete, End::Complete, End::LetGo, End::Cancel]),
            ready_for: dice.below(200),
            policy: *dice.pick(&[OnError::Stop, OnError::Ignore, OnError::Report]),
            pauses: *dice.pick(&[0, 0, 40]),
            writers: 1 + dice.below(4) as usize,
            operations: 5 + dice.below(40) as usize,
            steps_max: u64::MAX,
            stops_at_success: false,
            misses_backing: false,
            speeds: *dice.pick(&[0, 0, 30]),
            unmap: dice.one_in(2),
            target_is_zero: false,
        }
    }
}

/// A job, its nodes and its writers.
struct Stage {
    setup: Setup,
    dice: Seed,
    clock: VirtualClock,
    source: Rc<dyn Node>,
    target: Rc<dyn Node>,
    tracker: Rc<Tracker>,
    /// What the job goes by, frozen when the filter came.
    bitmap: Option<Arc<FrozenBitmap>>,
    root: Root,
    /// Which part of the disk is whose.
    stripes: Vec<(ByteRange, usize)>,
    /// What is known to be there.
    model: RefCell<Vec<Option<u8>>>,
    writing: Cell<usize>,
    is_ready: Cell<bool>,
    errors: Cell<usize>,
    /// Who is told what the job reads.
    recorder: Option<Rc<Recorder>>,
    /// What the manifest is laid onto.
    earlier: Option<Earlier>,
}

impl Stage {
    fn new(
        setup: Setup,
        bytes: &[u8],
        source: Rc<dyn Node>,
        target: Rc<dyn Node>,
        granularity_bytes: u64,
    ) -> Self {
        let dice = Seed::new(setup.seed);
        let length = source.facts().length_bytes;
        let tracker = Rc::new(Tracker::new(length, granularity_bytes));
        let top: Rc<dyn Node> = Rc::new(MirrorTop::new(
            "top".to_owned(),
            source.clone(),
            tracker.clone(),
        ));
        let (mut stripes, mut at) = (Vec::new(), 0);
        while at < length {
            let longest = *dice.pick(&[512, 2048, 20_000]);
            let (stripe, _) = ByteRange::between(at, length).split_at(1 + dice.below(longest));
            at = stripe.end();
            stripes.push((stripe, stripes.len() % setup.writers));
        }
        let mut model: Vec<Option<u8>> = bytes.iter().copied().map(Some).collect();
        model.resize(length as usize, Some(0));
        Self {
            dice,
            clock: VirtualClock::default(),
            source,
            target,
            tracker,
            bitmap: None,
            // Nobody gives up, but for when all is over.
            root: Root::new(top, true, Spawner::new(drop)),
            stripes,
            model: model.into(),
            writing: Cell::new(0),
            is_ready: Cell::new(false),
            errors: Cell::new(0),
            recorder: None,
            earlier: None,
            setup,
        }
    }

    fn learn(&self, range: ByteRange, byte: Option<u8>) {
        let place = range.offset() as usize..range.end() as usize;
        self.model.borrow_mut()[place].fill(byte);
    }

    /// These bytes of the disk are what is known of them.
    fn assert_known(&self, offset: u64, bytes: &[u8], what: &str) {
        let model = self.model.borrow();
        let known = &model[offset as usize..offset as usize + bytes.len()];
        for (index, (byte, known)) in bytes.iter().zip(known).enumerate() {
            let at = offset + index as u64;
            assert!(
                known.is_none_or(|known| known == *byte),
                "{what}: {byte} at {at}, not {known:?}, {:?}",
                self.setup
            );
        }
    }

    async fn write_this_and_that(&self, me: usize) {
        let dice = &self.dice;
        let mine: Vec<ByteRange> = self
            .stripes
            .iter()
            .filter(|(_, owner)| *owner == me)
            .map(|(stripe, _)| *stripe)
            .collect();
        for _ in 0..self.setup.operations {
            if mine.is_empty() {
                return;
            }
            if dice.one_in(3) {
                let rest = Duration::from_millis(dice.below(300));
                let until = self.clock.now().after(rest);
                self.clock.sleep_until(until).await;
            }
            let stripe = *dice.pick(&mine);
            let start = match dice.one_in(2) {
                true => stripe.offset(),
                false => stripe.offset() + dice.below(stripe.length()),
            };
            let (range, _) =
                ByteRange::between(start, stripe.end()).split_at(1 + dice.below(stripe.length()));
            self.writing.set(self.writing.get() + 1);
            self.make_request(range).await;
            self.writing.set(self.writing.get() - 1);
        }
    }

    async fn make_request(&self, range: ByteRange) {
        let (length, value) = (range.length() as usize, 1 + self.dice.below(250) as u8);
        let left = match self.dice.below(8) {
            0 => {
                let read = self.root.read(range.offset(), Buffer::zeroed(length)).await;
                if read.outcome.is_ok() {
                    self.assert_known(range.offset(), read.buffer.as_slice(), "read");
                }
                return;
            }
            1 => {
                // Who has not been told has no reason to complain.
                let _ = self.root.flush().await;
                return;
            }
            2 => {
                self.learn(range, None);
                let mode = ZeroMode {
                    may_unmap: self.dice.one_in(2),
                    no_fallback: false,
                };
                let zeroed = self.root.zero(range, mode).await;
                zeroed.ok().map(|()| 0)
            }
            3 => {
                self.learn(range, None);
                let _ = self.root.discard(range).await;
                None
            }
            _ => {
                self.learn(range, None);
                let bytes = Buffer::copy_of(&vec![value; length]);
                let written = self.root.write(range.offset(), bytes).await;
                written.outcome.ok().map(|()| value)
            }
        };
        self.learn(range, left);
    }

    async fn contents(&self, node: &Rc<dyn Node>) -> Vec<u8> {
        let length = self.source.facts().length_bytes as usize;
        // A fault may be left that strikes once.
        for _ in 0..20 {
            let read = node.read(0, Buffer::zeroed(length)).await;
            if read.outcome.is_ok() {
                return read.buffer.as_slice().to_vec();
            }
        }
        panic!("{} cannot be read: {:?}", node.name(), self.setup)
    }

    /// Plays the manager, but for the end.
    async fn manage(&self, orders: &JobShared, mut reports: UnboundedReceiver<(JobKey, Report)>) {
        while let Some((_, report)) = reports.recv().await {
            match report {
                Report::IoError { action, heard, .. } => {
                    if action == ErrorAction::Stop {
                        orders.order_pause(true);
                    }
                    self.errors.set(self.errors.get() + 1);
                    if self.errors.get() == ERRORS_MAX {
                        orders.order_cancel(CancelMode::Force);
                    }
                    let _ = heard.send(());
                }
                Report::Parked => orders.order_pause(false),
                Report::Converged { heard } => {
                    self.is_ready.set(true);
                    let _ = heard.send(());
                }
                Report::Remember { .. } => panic!("nothing is durable that may change"),
                Report::Unparked | Report::Ended(_) => {}
            }
        }
    }

    /// Runs the job and its writers until both have ended, or the job has succeeded if that is all that is wanted.
    /// `step` makes something happen on a disk; `quiet` is called when nothing is under way.
    fn run(
        &self,
        mut work: Box<dyn Work>,
        step: impl Fn() -> bool,
        mut quiet: impl FnMut(),
    ) -> Option<Result<(), Stop>> {
        let policies = ErrorPolicies {
            on_source_error: self.setup.policy,
            on_target_error: self.setup.policy,
        };
        let Running {
            cx,
            orders,
            reports,
        } = Running::new(&self.clock, 0, policies);
        orders.order_copy_mode(self.setup.copy_mode);
        let job = async {
            let ended = work.run(&cx).await;
            // Nothing is kept equal any more.
            self.is_ready.set(false);
            if ended.is_ok() && !self.setup.misses_backing {
                let (source, target) = (&self.source, &self.target);
                let (old, new) = (self.contents(source).await, self.contents(target).await);
                self.assert_known(0, &new, "the target");
                let differs = old.iter().zip(&new).position(|(old, new)| old != new);
                assert_eq!(differs, None, "{:?}", self.setup);
                self.assert_recorded(&new).await;
            }
            if ended.is_ok() {
                let progress = &orders.progress;
                assert_eq!(progress.current_bytes(), progress.total_bytes());
            }
            if ended.is_ok() && self.setup.stops_at_success {
                return ended;
            }
            match &ended {
                Ok(()) if self.setup.end == End::Complete => {
                    self.tracker.go_over_to(self.target.clone());
                    self.root.put_on(self.target.clone());
                    work.apply();
                }
                Ok(()) => {
                    work.apply();
                    self.root.put_on(self.source.clone());
                }
                Err(_) => {
                    work.revert();
                    self.root.put_on(self.source.clone());
                }
            }
            ended
        };
        let writers = join_all((0..self.setup.writers).map(|me| self.write_this_and_that(me)));
        let all = async {
            match self.setup.stops_at_success {
                true => match select(pin!(job), pin!(writers)).await {
                    Either::Left((ended, _)) => ended,
                    Either::Right((_, job)) => job.await,
                },
                false => join(job, writers).await.0,
            }
        };
        let manager = self.manage(&orders, reports);
        let both = async {
            match select(pin!(all), pin!(manager)).await {
                Either::Left((ended, _)) => ended,
                Either::Right(_) => unreachable!("the manager ends last"),
            }
        };
        let (mut steps, mut ready_at, mut is_told) = (0, None, false);
        let ended = run(both, || {
            steps += 1;
            if steps > self.setup.steps_max {
                return false;
            }
            let has_disturbed = self.disturb(&orders);
            let ready_for = match self.is_ready.get() {
                true => Some(steps - *ready_at.get_or_insert(steps)),
                false => None,
            };
            let mut tell = |is_due: bool| {
                let tells = is_due && !is_told;
                if tells {
                    is_told = true;
                    self.order_end(&orders);
                }
                tells
            };
            let has_told = tell(ready_for.is_some_and(|steps| steps >= self.setup.ready_for));
            if step() {
                return true;
            }
            if self.writing.get() == 0 {
                quiet();
            }
            self.clock.advance() || has_told || has_disturbed || tell(ready_for.is_some())
        });
        if steps <= self.setup.steps_max {
            assert!(ended.is_some(), "a job or a writer hangs: {:?}", self.setup);
        }
        ended
    }

    fn order_end(&self, orders: &Arc<JobShared>) {
        match self.setup.end {
            End::Complete => orders.order_complete(),
            End::LetGo => orders.order_cancel(CancelMode::Soft),
            End::Cancel => orders.order_cancel(CancelMode::Force),
        }
    }

    /// Whether a pause is ordered.
    fn disturb(&self, orders: &JobShared) -> bool {
        let pauses = self.setup.pauses > 0 && self.dice.one_in(self.setup.pauses);
        if pauses {
            orders.order_pause(true);
        }
        let changes_speed = self.setup.speeds > 0 && self.dice.one_in(self.setup.speeds);
        if changes_speed {
            orders.order_speed(*self.dice.pick(&[0, 1, 10_000, 1 << 20]));
        }
        if self.setup.changes_mode && self.dice.one_in(60) {
            orders.order_copy_mode(CopyMode::WriteBlocking);
        }
        pauses || changes_speed
    }
}

/// Two plain disks.
struct Disks {
    world: World,
    source: Disk,
    target: Disk,
    bytes: Vec<u8>,
    unmaps: bool,
    granularity_bytes: u64,
}

impl Disks {
    fn random(seed: u64) -> Self {
        Self::holding(seed, None)
    }

    /// Disks with this content on source and target, or any.
    fn holding(seed: u64, contents: Option<(&[u8], &[u8])>) -> Self {
        let dice = Seed::new(seed ^ 0xd15c);
        let world = World::new(seed);
        let length = match contents {
            Some((source, _)) => source.len() as u64,
            None => 512 * (20 + dice.below(300)),
        };
        let options = DiskOptions {
            length_bytes: length,
            request_alignment: *dice.pick(&[1, 1, 512, 4096]),
            ..DiskOptions::default()
        };
        let options = match length % 4096 {
            0 => options,
            _ => DiskOptions {
                request_alignment: options.request_alignment.min(512),
                ..options
            },
        };
        let source = world.disk("source", options.clone());
        let target = world.disk("target", options);
        for disk in [&source, &target] {
            let mut at = 0;
            while contents.is_none() && at < length {
                let run = (4096 * (1 + dice.below(4))).min(length - at);
                if dice.one_in(2) {
                    let bytes: Vec<u8> = (0..run).map(|_| dice.any() as u8).collect();
                    disk.fill(at, &bytes);
                }
                at += run;
            }
        }
        if let Some((of_source, of_target)) = contents {
            mirror_bitmaps::fill(&source, of_source);
            mirror_bitmaps::fill(&target, of_target);
        }
        Self {
            bytes: source.bytes(),
            world,
            source,
            target,
            unmaps: dice.one_in(2),
            granularity_bytes: *dice.pick(&[512, 4096, 4096, 65536]),
        }
    }

    fn node(&self, disk: &Disk, name: &str) -> Rc<dyn Node> {
        let options = FileOptions {
            discard: match self.unmaps {
                true => Discard::Unmap,
                false => Discard::Ignore,
            },
            ..FileOptions::default()
        };
        Rc::new(FileNode::new(name.to_owned(), disk.open(), options))
    }

    fn stage(&self, setup: Setup) -> Stage {
        let source = self.node(&self.source, "source");
        let target = self.node(&self.target, "target");
        Stage::new(setup, &self.bytes, source, target, self.granularity_bytes)
    }

    /// Runs a mirror. How often the sides were compared while nothing was under way.
    fn run(&self, stage: &Stage, sync: SyncMode) -> (Option<Result<(), Stop>>, usize) {
        let work = mirror(stage, sync);
        let mut compared = 0;
        let quiet = || {
            let is_synced = stage.is_ready.get()
                && stage.setup.copy_mode == CopyMode::WriteBlocking
                && stage.tracker.dirty_bytes() == 0
                && !stage.tracker.is_planned()
                && self.world.in_flight() == 0;
            if is_synced {
                compared += 1;
                assert!(
                    self.source.bytes() == self.target.bytes(),
                    "{:?}",
                    stage.setup
                );
            }
        };
        let ended = stage.run(work, || self.world.step(), quiet);
        (ended, compared)
    }
}

fn mirror(stage: &Stage, sync: SyncMode) -> Box<dyn Work> {
    let spec = MirrorSpec {
        device: "s".to_owned(),
        target: "t".to_owned(),
        sync,
        on_source_error: stage.setup.policy,
        on_target_error: stage.setup.policy,
        unmap: stage.setup.unmap,
        target_is_zero: stage.setup.target_is_zero,
        copy_mode: stage.setup.copy_mode,
        ..MirrorSpec::default()
    };
    let mirror = Mirror::new(
        stage.source.clone(),
        stage.target.clone(),
        stage.tracker.clone(),
        stage.bitmap.clone(),
        &spec,
    );
    let integrity = Integrity::with_recorder(stage.recorder.clone());
    Box::new(mirror.keeping(integrity.onto(stage.earlier.clone())))
}

#[test]
fn a_mirror_beside_writers_is_equal_when_it_ends() {
    let compared = Cell::new(0);
    each_seed("blockyard-engine", "a_mirror_beside_writers", 600, |seed| {
        let disks = Disks::random(seed);
        let stage = disks.stage(Setup::random(seed));
        let (ended, count) = disks.run(&stage, SyncMode::Full);
        compared.set(compared.get() + count);
        let ended = ended.expect("it ends");
        assert_eq!(stage.errors.get(), 0);
        assert_eq!(ended.is_ok(), stage.setup.end != End::Cancel, "{ended:?}");
        stage.assert_end(&ended, || disks.world.step());
    });
    assert!(compared.get() > 100, "compared {} times", compared.get());
}

#[test]
fn a_mirror_onto_zeroes_writes_no_others_than_those_that_come() {
    each_seed("blockyard-engine", "a_mirror_onto_zeroes", 300, |seed| {
        let disks = Disks::random(seed);
        disks.target.fill(0, &vec![0; disks.bytes.len()]);
        let setup = Setup {
            target_is_zero: true,
            ..Setup::random(seed)
        };
        let stage = disks.stage(setup);
        let one_in = 20 + seed % 60;
        disks.world.add_fault(Fault::fails(EIO).one_in(one_in));
        let ended = disks.run(&stage, SyncMode::Full).0.expect("it ends");
        stage.assert_end(&ended, || disks.world.step());
    });
}

#[test]
fn a_mirror_of_what_changes_from_now_on_has_all_of_it() {
    each_seed(
        "blockyard-engine",
        "a_mirror_of_what_changes",
        200,
        |seed| {
            let disks = Disks::random(seed);
            // What was there before is on both sides.
            disks.target.fill(0, &disks.bytes);
            let stage = disks.stage(Setup::random(seed));
            let ended = disks.run(&stage, SyncMode::None).0.expect("it ends");
            stage.assert_end(&ended, || disks.world.step());
        },
    );
}

#[test]
fn whichever_request_fails_no_answered_write_is_lost() {
    let (mut succeeded, mut failed) = (0, 0);
    for seed in 0..8 {
        for nth in 1.. {
            let disks = Disks::random(seed);
            let errno = if nth % 2 == 0 { EIO } else { ENOSPC };
            disks.world.add_fault(Fault::fails(errno).nth(nth));
            let setup = Setup {
                operations: 6,
                ready_for: 30,
                ..Setup::random(seed)
            };
            let stage = disks.stage(setup);
            let ended = disks.run(&stage, SyncMode::Full).0.expect("it ends");
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
    assert!(succeeded > 100 && failed > 100, "{succeeded}, {failed}");
}

#[test]
fn storms_of_faults_beside_writers_end_in_no_wrong_bytes() {
    each_seed("blockyard-engine", "storms_beside_writers", 400, |seed| {
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
        let ended = disks.run(&stage, SyncMode::Full).0.expect("it ends");
        stage.assert_end(&ended, || disks.world.step());
    });
}

#[test]
fn an_end_at_every_step_takes_no_write_with_it() {
    for end in [End::Complete, End::LetGo, End::Cancel] {
        for ready_for in 0..60 {
            let disks = Disks::random(ready_for % 7);
            let setup = Setup {
                end,
                ready_for,
                operations: 30,
                writers: 3,
                ..Setup::random(ready_for % 7)
            };
            let stage = disks.stage(setup);
            let ended = disks.run(&stage, SyncMode::Full).0.expect("it ends");
            stage.assert_end(&ended, || disks.world.step());
        }
    }
}

#[test]
fn what_has_succeeded_survives_the_power() {
    each_seed("blockyard-engine", "what_has_succeeded", 200, |seed| {
        let disks = Disks::random(seed);
        let setup = Setup {
            end: End::Complete,
            stops_at_success: true,
            ..Setup::random(seed)
        };
        let stage = disks.stage(setup);
        let ended = disks.run(&stage, SyncMode::Full).0;
        assert_eq!(ended, Some(Ok(())));
        for cut in 0..4 {
            stage.assert_known(0, &disks.target.bytes_after_cut(cut), "after a cut");
        }
    });
}

#[path = "active_commits.rs"]
mod active_commits;

#[path = "mirror_ends.rs"]
mod mirror_ends;

#[path = "mirror_bitmaps.rs"]
mod mirror_bitmaps;
