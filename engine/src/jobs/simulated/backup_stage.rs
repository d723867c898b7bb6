//! What backups beside writers are tried on: a job, its nodes and its writers, on simulated disks.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blockyard_simulator::{Disk, DiskOptions, Seed, World, run};
use blockyard_storage::{Buffer, ByteRange, LocalFuture, ZeroMode};
use futures_util::future::{Either, join, join_all, select};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::bitmap::{FrozenBitmap, NodeBitmaps};
use crate::clock::Clock;
use crate::data::Spawner;
use crate::job::context::{CancelMode, ErrorPolicies, JobKey, JobShared, Report};
use crate::job::error_policy::{ErrorAction, OnError};
use crate::job::work::{Stop, Work};
use crate::jobs::backup::Backup;
use crate::jobs::integrity::Integrity;
use crate::jobs::test_support::{Running, VirtualClock};
use crate::manifest::Recorder;
use crate::manifest::onto::Earlier;
use crate::node::Node;
use crate::node::copy_before_write::{CopyBeforeWrite, Saver, Surroundings};
use crate::node::file_node::{FileNode, FileOptions};
use crate::node::recording_node::RecordingNode;
use crate::node::root::Root;
use crate::request::{
    BackupPerf, BackupSpec, BitmapMode, CbwOptions, Discard, IntegritySpec, SyncMode,
};

/// A job that meets so many errors is cancelled.
pub(super) const ERRORS_MAX: usize = 12;

/// What happens to a job and its writers.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub(super) seed: u64,
    pub(super) sync: SyncMode,
    pub(super) compress: bool,
    pub(super) cluster_bytes: u64,
    pub(super) perf: BackupPerf,
    pub(super) cbw: CbwOptions,
    pub(super) policy: OnError,
    pub(super) speed: i64,
    /// The job is paused at every so many looks on average; 0: never.
    pub(super) pauses: u64,
    /// The job is cancelled after so many steps of the disks.
    pub(super) cancel_at: Option<u64>,
    pub(super) writers: usize,
    pub(super) operations: usize,
    /// What cannot be saved is not overwritten: only the target fails, and the model knows.
    pub(super) only_target_fails: bool,
    /// Writers are dropped where they are when the job has succeeded.
    pub(super) stops_at_success: bool,
}

impl Setup {
    pub(super) fn random(seed: u64) -> Self {
        let dice = Seed::new(seed ^ 0xbac2);
        let cluster_bytes = *dice.pick(&[512, 4096, 4096, 65536]);
        Self {
            seed,
            sync: SyncMode::Full,
            compress: false,
            cluster_bytes,
            perf: BackupPerf {
                max_workers: *dice.pick(&[1, 3, 64]),
                max_chunk: *dice.pick(&[0, 1, 4]) * i64::try_from(cluster_bytes).expect("small"),
                ..BackupPerf::default()
            },
            cbw: CbwOptions::default(),
            policy: *dice.pick(&[OnError::Stop, OnError::Ignore, OnError::Report]),
            speed: *dice.pick(&[0, 0, 0, 1 << 20]),
            pauses: *dice.pick(&[0, 0, 40]),
            cancel_at: dice.one_in(6).then(|| dice.below(60)),
            writers: 1 + dice.below(4) as usize,
            operations: 5 + dice.below(40) as usize,
            only_target_fails: false,
            stops_at_success: false,
        }
    }
}

/// A job, its nodes and its writers.
pub(super) struct Stage {
    pub(super) setup: Setup,
    pub(super) dice: Seed,
    pub(super) clock: VirtualClock,
    pub(super) source: Rc<dyn Node>,
    pub(super) target: Rc<dyn Node>,
    pub(super) saver: Rc<Saver>,
    /// What the job goes by, frozen when the filter came.
    pub(super) bitmap: Option<Arc<FrozenBitmap>>,
    pub(super) root: Root,
    /// Which part of the disk is whose.
    pub(super) stripes: Vec<(ByteRange, usize)>,
    /// What was there when the filter came.
    pub(super) original: Vec<u8>,
    /// What is known to be there.
    pub(super) model: RefCell<Vec<Option<u8>>>,
    pub(super) abandoned: Rc<RefCell<Vec<LocalFuture<'static, ()>>>>,
    surroundings: Surroundings,
    pub(super) errors: Cell<usize>,
    pub(super) failed_writes: RefCell<Vec<i32>>,
    /// Who is told what the job reads.
    pub(super) recorder: Option<Rc<Recorder>>,
    /// What its manifest is laid onto.
    pub(super) earlier: Option<Earlier>,
}

impl Stage {
    pub(super) fn new(
        setup: Setup,
        original: Vec<u8>,
        source: Rc<dyn Node>,
        target: Rc<dyn Node>,
    ) -> Self {
        Self::with_bitmaps(setup, original, source, target, None)
    }

    /// The same, where what changes is marked in bitmaps, and the job goes by the one of this name.
    pub(super) fn with_bitmaps(
        setup: Setup,
        original: Vec<u8>,
        source: Rc<dyn Node>,
        target: Rc<dyn Node>,
        bitmaps: Option<(&Arc<NodeBitmaps>, &str, BitmapMode)>,
    ) -> Self {
        let dice = Seed::new(setup.seed);
        let length = source.facts().length_bytes;
        let abandoned: Rc<RefCell<Vec<LocalFuture<'static, ()>>>> = Rc::default();
        let taken = Rc::clone(&abandoned);
        let spawner = Spawner::new(move |work| taken.borrow_mut().push(work));
        let clock = VirtualClock::default();
        let surroundings = Surroundings {
            clock: Rc::new(clock.clone()),
            spawner: spawner.clone(),
        };
        let kept = surroundings.clone();
        let (source, bitmap) = match bitmaps {
            None => (source, None),
            Some((bitmaps, name, mode)) => {
                let frozen = bitmaps.freeze(name, mode).expect("frozen");
                let all = Arc::clone(bitmaps);
                let recorded = RecordingNode::new(source, all, spawner.clone());
                let recorded: Rc<dyn Node> = Rc::new(recorded);
                (recorded, Some(Arc::new(frozen)))
            }
        };
        let of_target = target.facts().cluster_size_bytes.map_or(0, u64::from);
        let cluster_bytes = setup.cluster_bytes.max(of_target);
        let saver = Rc::new(Saver::new(length, cluster_bytes, setup.cbw, surroundings));
        let filter = CopyBeforeWrite::new("cbw".to_owned(), source.clone(), saver.clone());
        let (mut stripes, mut at) = (Vec::new(), 0);
        while at < length {
            let longest = *dice.pick(&[512, 2048, 20_000]);
            let (stripe, _) = ByteRange::between(at, length).split_at(1 + dice.below(longest));
            at = stripe.end();
            stripes.push((stripe, stripes.len() % setup.writers));
        }
        Self {
            dice,
            clock,
            source,
            target,
            saver,
            bitmap,
            root: Root::new(Rc::new(filter), true, spawner),
            stripes,
            model: RefCell::new(original.iter().copied().map(Some).collect()),
            original,
            abandoned,
            surroundings: kept,
            errors: Cell::new(0),
            failed_writes: RefCell::default(),
            recorder: None,
            earlier: None,
            setup,
        }
    }

    /// What a filter needs here.
    pub(super) fn surroundings(&self) -> Surroundings {
        self.surroundings.clone()
    }

    pub(super) fn learn(&self, range: ByteRange, bytes: &[Option<u8>]) {
        let place = range.offset() as usize..range.end() as usize;
        self.model.borrow_mut()[place].copy_from_slice(bytes);
    }

    pub(super) fn known(&self, range: ByteRange) -> Vec<Option<u8>> {
        self.model.borrow()[range.offset() as usize..range.end() as usize].to_vec()
    }

    pub(super) fn assert_known(&self, offset: u64, bytes: &[u8], what: &str) {
        let known = self.known(ByteRange::new(offset, bytes.len() as u64));
        for (index, (byte, known)) in bytes.iter().zip(known).enumerate() {
            let at = offset + index as u64;
            assert!(
                known.is_none_or(|known| known == *byte),
                "{what}: {byte} at {at}, not {known:?}, {:?}",
                self.setup
            );
        }
    }

    pub(super) async fn write_this_and_that(&self, me: usize) {
        let dice = &self.dice;
        let mine = self.stripes.iter().filter(|(_, owner)| *owner == me);
        let mine: Vec<ByteRange> = mine.map(|(stripe, _)| *stripe).collect();
        for _ in 0..self.setup.operations {
            if mine.is_empty() {
                return;
            }
            if dice.one_in(12) {
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
            self.make_request(range).await;
        }
    }

    pub(super) async fn make_request(&self, range: ByteRange) {
        let (length, value) = (range.length() as usize, 1 + self.dice.below(250) as u8);
        let before = self.known(range);
        let unknown = vec![None; length];
        let (written, left) = match self.dice.below(8) {
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
                self.learn(range, &unknown);
                let mode = ZeroMode {
                    may_unmap: self.dice.one_in(2),
                    no_fallback: false,
                };
                (self.root.zero(range, mode).await, vec![Some(0); length])
            }
            3 => {
                self.learn(range, &unknown);
                (self.root.discard(range).await, unknown.clone())
            }
            _ => {
                self.learn(range, &unknown);
                let bytes = Buffer::copy_of(&vec![value; length]);
                let written = self.root.write(range.offset(), bytes).await;
                (written.outcome, vec![Some(value); length])
            }
        };
        match written {
            Ok(()) => self.learn(range, &left),
            Err(error) => {
                self.failed_writes.borrow_mut().push(error.errno());
                if self.setup.only_target_fails {
                    // It never reached the source.
                    self.learn(range, &before);
                }
            }
        }
    }

    pub(super) async fn contents(&self, node: &Rc<dyn Node>) -> Vec<u8> {
        let length = self.source.facts().length_bytes as usize;
        let mut why = None;
        // A fault may be left that strikes once.
        for _ in 0..40 {
            let read = node.read(0, Buffer::zeroed(length)).await;
            match read.outcome {
                Ok(()) => return read.buffer.as_slice().to_vec(),
                Err(error) => why = Some(error),
            }
        }
        let (name, setup) = (node.name(), &self.setup);
        panic!("{name} cannot be read: {why:?}, {setup:?}")
    }

    /// What is on the target is what was there, all of it if the job says so.
    pub(super) async fn assert_point_in_time(&self, is_whole: bool) {
        let (target, original) = (self.contents(&self.target).await, &self.original);
        let clusters = self.saver.clusters();
        assert!(
            !is_whole || clusters.unsaved_bytes() == 0,
            "{:?}",
            self.setup
        );
        let all = ByteRange::new(0, original.len() as u64);
        for cluster in all.pieces(clusters.cluster_bytes()) {
            let place = cluster.offset() as usize..cluster.end() as usize;
            if clusters.first_unsaved(cluster).is_none() {
                let is_there = target[place.clone()] == original[place];
                assert!(is_there, "{cluster} on the target, {:?}", self.setup);
            }
        }
    }

    /// Plays the manager, but for the end.
    pub(super) async fn manage(
        &self,
        orders: &JobShared,
        mut reports: UnboundedReceiver<(JobKey, Report)>,
    ) {
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
                Report::Parked => {
                    // Writers go on meanwhile.
                    let until = self.clock.now().after(Duration::from_millis(50));
                    self.clock.sleep_until(until).await;
                    orders.order_pause(false);
                }
                Report::Remember { recorded, .. } => {
                    let _ = recorded.send(Ok(()));
                }
                Report::Converged { .. } => panic!("a backup is never ready"),
                Report::Unparked | Report::Ended(_) => {}
            }
        }
    }

    pub(super) fn work(&self) -> Backup {
        let setup = &self.setup;
        let spec = BackupSpec {
            device: "s".to_owned(),
            target: "t".to_owned(),
            sync: setup.sync,
            speed: setup.speed,
            new_target: None,
            bitmap: None,
            bitmap_mode: None,
            compress: setup.compress,
            on_source_error: setup.policy,
            on_target_error: setup.policy,
            filter_node_name: None,
            discard_source: false,
            perf: setup.perf,
            cbw: setup.cbw,
            integrity: IntegritySpec::default(),
        };
        Backup::new(
            self.source.clone(),
            self.target.clone(),
            self.saver.clone(),
            self.bitmap.clone(),
            spec,
        )
        .keeping(Integrity::with_recorder(self.recorder.clone()).onto(self.earlier.clone()))
    }

    /// Runs the job and its writers until both have ended, or the job has succeeded if that is all that is wanted.
    /// `step` makes something happen on a disk.
    pub(super) fn run(&self, step: impl Fn() -> bool) -> Result<(), Stop> {
        let policies = ErrorPolicies {
            on_source_error: self.setup.policy,
            on_target_error: self.setup.policy,
        };
        let running = Running::new(&self.clock, self.setup.speed, policies);
        let (cx, orders) = (running.cx, running.orders);
        let job = async {
            // The filter comes before the job runs.
            let until = self.clock.now().after(Duration::from_millis(20));
            self.clock.sleep_until(until).await;
            let mut work = self.work();
            let ended = work.run(&cx).await;
            if self.saver.broken().is_none() {
                self.assert_point_in_time(ended.is_ok()).await;
            } else {
                assert!(ended.is_err(), "{:?}", self.setup);
            }
            match &ended {
                Ok(()) => {
                    let progress = &orders.progress;
                    assert_eq!(progress.current_bytes(), progress.total_bytes());
                    work.apply();
                }
                Err(_) => work.revert(),
            }
            if !self.setup.stops_at_success {
                self.root.put_on(self.source.clone());
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
        let manager = self.manage(&orders, running.reports);
        let mut both = pin!(async {
            match select(pin!(all), pin!(manager)).await {
                Either::Left((ended, _)) => ended,
                Either::Right(_) => unreachable!("the manager ends last"),
            }
        });
        let with_what_is_left = poll_fn(|cx| {
            let mut left = self.abandoned.take();
            left.retain_mut(|work| work.as_mut().poll(cx).is_pending());
            self.abandoned.borrow_mut().append(&mut left);
            both.as_mut().poll(cx)
        });
        let mut steps = 0;
        let ended = run(with_what_is_left, || {
            steps += 1;
            if self.setup.pauses > 0 && self.dice.one_in(self.setup.pauses) {
                orders.order_pause(true);
            }
            if self.setup.cancel_at == Some(steps) {
                orders.order_cancel(CancelMode::Force);
            }
            if step() || self.clock.advance() {
                return true;
            }
            let cancels = self.setup.sync == SyncMode::None && orders.cancel_ordered().is_none();
            if cancels {
                orders.order_cancel(CancelMode::Force);
            }
            cancels
        });
        ended.unwrap_or_else(|| panic!("a job or a writer hangs: {:?}", self.setup))
    }

    /// After the end: all that writers know is there.
    pub(super) fn assert_end(&self, ended: &Result<(), Stop>, step: impl Fn() -> bool) {
        match ended {
            Ok(()) => assert_ne!(self.setup.sync, SyncMode::None),
            Err(Stop::Cancelled) => assert!(
                self.setup.cancel_at.is_some() || self.errors.get() >= ERRORS_MAX,
                "{:?}",
                self.setup
            ),
            Err(Stop::Failed(_)) => {
                assert!(self.errors.get() > 0 || self.saver.broken().is_some());
            }
        }
        let bytes = run(self.contents(&self.source), step).expect("read");
        self.assert_known(0, &bytes, "in the end");
    }
}

/// Two plain disks.
pub(super) struct Disks {
    pub(super) world: World,
    pub(super) source: Disk,
    pub(super) target: Disk,
    pub(super) unmaps: bool,
}

impl Disks {
    pub(super) fn random(seed: u64) -> Self {
        let dice = Seed::new(seed ^ 0xd15c);
        let world = World::new(seed);
        let length = 512 * (20 + dice.below(300));
        let alignment = *dice.pick(&[1, 1, 512, 4096]);
        let options = DiskOptions {
            length_bytes: length,
            request_alignment: match length % 4096 {
                0 => alignment,
                _ => alignment.min(512),
            },
            shares_extents: dice.one_in(3),
            ..DiskOptions::default()
        };
        let source = world.disk("source", options.clone());
        let target = world.disk("target", options);
        for disk in [&source, &target] {
            let mut at = 0;
            while at < length {
                let run = (512 * (1 + dice.below(32))).min(length - at);
                if dice.one_in(2) {
                    let bytes: Vec<u8> = (0..run).map(|_| dice.any() as u8).collect();
                    disk.fill(at, &bytes);
                }
                at += run;
            }
        }
        Self {
            world,
            source,
            target,
            unmaps: dice.one_in(2),
        }
    }

    pub(super) fn node(&self, disk: &Disk, name: &str) -> Rc<dyn Node> {
        let options = FileOptions {
            discard: match self.unmaps {
                true => Discard::Unmap,
                false => Discard::Ignore,
            },
            ..FileOptions::default()
        };
        Rc::new(FileNode::new(name.to_owned(), disk.open(), options))
    }

    pub(super) fn stage(&self, setup: Setup) -> Stage {
        let source = self.node(&self.source, "source");
        let target = self.node(&self.target, "target");
        Stage::new(setup, self.source.bytes(), source, target)
    }
}
