//! [`Yard`]: one job with its disks, nodes and time, and what has to hold for it whatever happens.

use std::cell::RefCell;
use std::rc::Rc;

use blockyard_simulator::trace::Happened;
use blockyard_simulator::{Disk, DiskOptions, Seed, World};
use blockyard_storage::{ByteRange, Operation};

use crate::error::{JobError, NodeError};
use crate::job::context::{CancelMode, Cursor, ErrorPolicies, JobShared, Report};
use crate::job::error_policy::{ErrorAction, OnError, Side, decide};
use crate::job::work::{Stop, Work};
use crate::jobs::backup::Backup;
use crate::jobs::mirror::Mirror;
use crate::jobs::test_support::{Running, VirtualClock, saver};
use crate::node::Node;
use crate::node::file_node::{FileNode, FileOptions};
use crate::node::mirror_top::Tracker;
use crate::node::raw_node::{RawNode, Window};
use crate::request::{
    BackupPerf, BackupSpec, CbwOptions, DetectZeroes, Discard, IntegritySpec, MirrorSpec, SyncMode,
};

/// Unit in which disks take room.
pub(super) const BLOCK: u64 = 4096;

/// Where the window of a target begins and what lies around it.
pub(super) const BEFORE_WINDOW: u64 = 8192;
const BEHIND_WINDOW: usize = 1024;
const AROUND_WINDOW: u8 = 0x77;

/// A job with so many errors gives up waiting for better times and is cancelled.
const ERRORS_MAX: usize = 12;

pub(super) const POLICIES: [OnError; 5] = [
    OnError::Report,
    OnError::Ignore,
    OnError::Stop,
    OnError::Enospc,
    OnError::Auto,
];

/// Which work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Backup,
    Mirror,
}

pub(super) const KINDS: [Kind; 2] = [Kind::Backup, Kind::Mirror];

/// How a job and its disks are.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    /// Of the contents and of the world.
    pub(super) seed: u64,
    pub(super) kind: Kind,
    pub(super) policy: OnError,
    /// Of requests on both disks.
    pub(super) alignment: u32,
    /// The target is a part of its disk.
    pub(super) windowed: bool,
    /// The disks share extents.
    pub(super) shares: bool,
    /// The target gives room back.
    pub(super) unmaps: bool,
    /// The length of the files is no multiple of a sector.
    pub(super) odd_length: bool,
    /// The backup discards its source at the end.
    pub(super) discards_source: bool,
    /// The target turns written zeroes into zero requests.
    pub(super) detects_zeroes: bool,
    /// What the client says of a mirror's bytes in flight; 0: nothing.
    pub(super) buf_size: i64,
    /// Limit in bytes per second; 0: none.
    pub(super) speed: i64,
}

impl Setup {
    pub(super) fn new(seed: u64, kind: Kind, policy: OnError) -> Self {
        Self {
            seed,
            kind,
            policy,
            alignment: 1,
            windowed: false,
            shares: false,
            unmaps: false,
            odd_length: false,
            discards_source: false,
            detects_zeroes: false,
            buf_size: 0,
            speed: 0,
        }
    }

    /// Anything.
    pub(super) fn random(seed: u64) -> Self {
        let dice = Seed::new(seed ^ 0x5e7_0000);
        Self {
            alignment: *dice.pick(&[1, 512, 4096]),
            windowed: dice.one_in(2),
            shares: dice.one_in(3),
            unmaps: dice.one_in(2),
            odd_length: dice.one_in(2),
            discards_source: dice.one_in(4),
            detects_zeroes: dice.one_in(3),
            buf_size: *dice.pick(&[0, 0, 1, 20_000]),
            speed: *dice.pick(&[0, 0, 1 << 20]),
            ..Self::new(seed, *dice.pick(&KINDS), *dice.pick(&POLICIES))
        }
    }
}

/// Disks, nodes and time of one job.
pub(super) struct Yard {
    pub(super) setup: Setup,
    pub(super) world: World,
    pub(super) clock: VirtualClock,
    pub(super) source: Disk,
    pub(super) target: Disk,
    /// What the source's disk holds.
    pub(super) original: Vec<u8>,
    /// Length of the target's disk at first, in bytes.
    target_length: u64,
    /// What the target's disk has to hold in the end, in whole sectors.
    pub(super) wanted: Vec<u8>,
}

/// Runs of data and holes. Data may be zeroes too.
fn random_runs(dice: &Seed, length: u64, mut put: impl FnMut(u64, &[u8])) {
    let mut at = 0;
    while at < length {
        let run = ((1 + dice.below(4)) * BLOCK).min(length - at);
        if !dice.one_in(3) {
            let mut bytes: Vec<u8> = (0..run).map(|_| dice.any() as u8).collect();
            if dice.one_in(5) {
                bytes.fill(0);
            }
            put(at, &bytes);
        }
        at += run;
    }
}

/// What a test does and looks at while a job runs.
pub(super) trait Watch {
    /// Nothing can go on by itself; `false`: the power goes.
    fn idle(&mut self, yard: &Yard, orders: &JobShared) -> bool {
        let _ = (yard, orders);
        true
    }

    /// An error was reported; what is done about it comes next.
    fn error(&mut self, yard: &Yard) {
        let _ = yard;
    }

    /// The job has parked.
    fn parked(&mut self, yard: &Yard) {
        let _ = yard;
    }

    /// The job says what is durable.
    fn remembered(&mut self, yard: &Yard, cursor: &Cursor) {
        let _ = (yard, cursor);
    }
}

/// Looks at nothing.
pub(super) struct Nothing;

impl Watch for Nothing {}

/// What a job said.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) errors: Vec<(Side, ErrorAction, NodeError)>,
    pub(super) parked: usize,
}

/// How a job ended; without a result the power went before.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) result: Option<Result<(), Stop>>,
    pub(super) told: Told,
}

impl Yard {
    pub(super) fn new(setup: Setup) -> Self {
        let dice = Seed::new(setup.seed);
        let world = World::new(setup.seed);
        let sectors = (16 + dice.below(32)) * 8 + dice.below(8);
        let length = sectors * 512
            - if setup.odd_length {
                1 + dice.below(511)
            } else {
                0
            };
        let options = DiskOptions {
            length_bytes: length,
            request_alignment: setup.alignment,
            shares_extents: setup.shares,
            ..DiskOptions::default()
        };
        let source = world.disk("source", options.clone());
        random_runs(&dice, length, |at, bytes| source.fill(at, bytes));
        let original = source.bytes();
        let mut wanted = original.clone();
        wanted.resize(sectors as usize * 512, 0);
        let mut target_length = *dice.pick(&[length, sectors * 512]);
        let mut start = 0;
        if setup.windowed {
            start = BEFORE_WINDOW;
            target_length = BEFORE_WINDOW + sectors * 512 + BEHIND_WINDOW as u64;
            let around = [AROUND_WINDOW; BEHIND_WINDOW];
            wanted.splice(0..0, [AROUND_WINDOW; BEFORE_WINDOW as usize]);
            wanted.extend(around);
        }
        let target = world.disk(
            "target",
            DiskOptions {
                length_bytes: target_length,
                ..options
            },
        );
        random_runs(&dice, length, |at, bytes| target.fill(start + at, bytes));
        if setup.windowed {
            target.fill(0, &[AROUND_WINDOW; BEFORE_WINDOW as usize]);
            target.fill(start + sectors * 512, &[AROUND_WINDOW; BEHIND_WINDOW]);
        }
        let clock = VirtualClock::default();
        Self {
            setup,
            world,
            clock,
            source,
            target,
            original,
            target_length,
            wanted,
        }
    }

    fn node(&self, name: &str, disk: &Disk, window: Window, unmaps: bool) -> Rc<dyn Node> {
        let discard = if unmaps {
            Discard::Unmap
        } else {
            Discard::Ignore
        };
        let options = FileOptions {
            discard,
            ..FileOptions::default()
        };
        let file = Rc::new(FileNode::new(name.to_owned(), disk.open(), options));
        let zeroes = match self.setup.detects_zeroes {
            true if unmaps => DetectZeroes::Unmap,
            true => DetectZeroes::On,
            false => DetectZeroes::Off,
        };
        Rc::new(RawNode::new(
            format!("raw-{name}"),
            file,
            window,
            false,
            discard,
            zeroes,
        ))
    }

    /// The nodes of source and target, newly opened.
    pub(super) fn nodes(&self) -> (Rc<dyn Node>, Rc<dyn Node>) {
        let setup = &self.setup;
        let window = match setup.windowed {
            true => Window {
                offset_bytes: BEFORE_WINDOW,
                size_bytes: Some(self.wanted.len() as u64 - BEFORE_WINDOW - BEHIND_WINDOW as u64),
            },
            false => Window::default(),
        };
        let source = self.node(
            "source",
            &self.source,
            Window::default(),
            setup.discards_source,
        );
        (
            source,
            self.node("target", &self.target, window, setup.unmaps),
        )
    }

    pub(super) fn policies(&self) -> ErrorPolicies {
        ErrorPolicies {
            on_source_error: self.setup.policy,
            on_target_error: self.setup.policy,
        }
    }

    fn work(&self) -> Box<dyn Work> {
        let (source, target) = self.nodes();
        let Setup {
            policy,
            speed,
            discards_source,
            ..
        } = self.setup;
        let (device, on) = ("s".to_owned(), "t".to_owned());
        match self.setup.kind {
            Kind::Backup => {
                let spec = BackupSpec {
                    device,
                    target: on,
                    sync: SyncMode::Full,
                    speed,
                    new_target: None,
                    bitmap: None,
                    bitmap_mode: None,
                    compress: false,
                    on_source_error: policy,
                    on_target_error: policy,
                    filter_node_name: None,
                    discard_source: discards_source,
                    perf: BackupPerf::default(),
                    cbw: CbwOptions::default(),
                    integrity: IntegritySpec::default(),
                };
                let saver = saver(&source, &target, &self.clock);
                Box::new(Backup::new(source, target, saver, None, spec))
            }
            Kind::Mirror => {
                let spec = MirrorSpec {
                    device,
                    target: on,
                    speed,
                    buf_size: Some(self.setup.buf_size),
                    on_source_error: policy,
                    on_target_error: policy,
                    ..MirrorSpec::default()
                };
                let tracker = Tracker::new(source.facts().length_bytes, 64 << 10);
                Box::new(Mirror::new(source, target, Rc::new(tracker), None, &spec))
            }
        }
    }

    /// Runs the job until it ends or the power goes, and judges what it did.
    pub(super) fn run(&self, watch: &mut dyn Watch) -> Ended {
        self.run_work(&mut *self.work(), watch)
    }

    /// The same with other work on the same disks.
    pub(super) fn run_work(&self, work: &mut dyn Work, watch: &mut dyn Watch) -> Ended {
        let running = Running::new(&self.clock, self.setup.speed, self.policies());
        let orders = running.orders.clone();
        let told = RefCell::new(Told::default());
        let watch = RefCell::new(watch);
        let look = |report: &Report| {
            let mut told = told.borrow_mut();
            match report {
                Report::IoError {
                    side,
                    action,
                    no_space,
                    error,
                    ..
                } => {
                    told.errors.push((*side, *action, error.clone()));
                    assert_eq!(*no_space, error.is_no_space());
                    watch.borrow_mut().error(self);
                    if told.errors.len() == ERRORS_MAX {
                        orders.order_cancel(CancelMode::Force);
                    }
                }
                Report::Parked => {
                    told.parked += 1;
                    watch.borrow_mut().parked(self);
                    assert_eq!(self.world.in_flight(), 0, "parked with something in flight");
                }
                Report::Converged { .. } => self.assert_copied(),
                Report::Remember { cursor, .. } => watch.borrow_mut().remembered(self, cursor),
                Report::Unparked | Report::Ended(_) => {}
            }
        };
        let mut power_is_on = true;
        let result = running.drive(work, look, |orders| {
            power_is_on = watch.borrow_mut().idle(self, orders);
            power_is_on && (self.world.step() || self.clock.advance())
        });
        assert!(result.is_some() || !power_is_on, "the job hangs");
        let ended = Ended {
            result,
            told: told.into_inner(),
        };
        self.judge(&ended, orders.cancel_ordered().is_some());
        ended
    }

    /// Everything is on the target and stays there whatever happens, and nothing beside it has changed.
    pub(super) fn assert_copied(&self) {
        for (what, mut bytes) in [
            ("visible", self.target.bytes()),
            ("durable", self.target.durable_bytes()),
            ("after a cut", self.target.bytes_after_cut(1)),
            ("after a cut", self.target.bytes_after_cut(2)),
        ] {
            let length = bytes.len();
            // A file of an odd length may grow to whole sectors.
            assert!(
                length == self.wanted.len() || length as u64 == self.target_length,
                "{what}: {length} bytes long"
            );
            bytes.resize(self.wanted.len(), 0);
            assert!(bytes == self.wanted, "{what}: wrong bytes on the target");
        }
    }

    pub(super) fn assert_source_untouched(&self) {
        assert!(
            self.source.bytes() == self.original,
            "the source has changed"
        );
        assert!(
            self.source.bytes_after_cut(1) == self.original,
            "the source may have changed"
        );
    }

    /// Whatever happens, a target that is a part of its disk is all that changes.
    fn assert_surroundings_untouched(&self) {
        if self.setup.windowed {
            let before = BEFORE_WINDOW as usize;
            let behind = self.wanted.len() - BEHIND_WINDOW..self.wanted.len();
            for bytes in [self.target.bytes(), self.target.bytes_after_cut(3)] {
                let around = bytes[..before].iter().chain(&bytes[behind.clone()]);
                let mut around = around.copied();
                assert!(
                    around.all(|byte| byte == AROUND_WINDOW),
                    "changes beside the target"
                );
            }
        }
    }

    /// The failures that the disks know of: disk, operation, errno.
    fn failures(&self) -> Vec<(String, Operation, ByteRange, i32)> {
        let trace = self.world.trace();
        let failed = trace.entries().filter_map(|entry| match entry.happened {
            Happened::Ended(Some(errno)) => {
                Some((entry.disk.clone(), entry.operation, entry.range, errno))
            }
            _ => None,
        });
        failed.collect()
    }

    /// What holds for every job, however it ended.
    fn judge(&self, ended: &Ended, cancelled: bool) {
        let failures = self.failures();
        let policy = self.setup.policy;
        // After a failed sync every change is refused with its errno.
        let poisoned = |node: &str, errno| {
            let known = |failure: &(String, Operation, ByteRange, i32)| {
                failure.0 == node && failure.1 == Operation::Sync && failure.3 == errno
            };
            failures.iter().any(known)
        };
        let is_real = |node: &str, range: Option<ByteRange>, errno: i32| {
            let known = |failure: &(String, Operation, ByteRange, i32)| {
                failure.0 == node && failure.3 == errno && range == Some(failure.2)
            };
            poisoned(node, errno) || failures.iter().any(known)
        };
        for (side, action, error) in &ended.told.errors {
            let node = match side {
                Side::Source => "source",
                Side::Target => "target",
            };
            assert_eq!(error.node, node, "on the wrong side: {error}");
            assert!(
                is_real(node, error.range(), error.errno()),
                "made up: {error}"
            );
            assert_eq!(*action, decide(policy, error.is_no_space()), "{error}");
        }
        if !self.setup.discards_source {
            self.assert_source_untouched();
        }
        self.assert_surroundings_untouched();
        let Some(result) = &ended.result else {
            return;
        };
        assert_eq!(self.world.in_flight(), 0, "ended with something in flight");
        match result {
            Ok(()) => {
                self.assert_copied();
                assert!(
                    !failures.iter().any(|failure| failure.1 == Operation::Sync),
                    "success after a failed flush"
                );
            }
            Err(Stop::Cancelled) => assert!(cancelled, "nobody cancelled"),
            Err(Stop::Failed(error)) => {
                let (node, errno) = (error.node.as_deref(), error.errno);
                let (node, errno) = (node.expect("a node"), errno.expect("an errno"));
                assert!(is_real(node, error.range, errno), "made up: {error:?}");
                // Discarding the source is no part of the copy: no policy is asked.
                if node == "target" || !self.setup.discards_source {
                    let last = ended.told.errors.last().expect("reported");
                    assert_eq!(last.1, ErrorAction::Report);
                    assert_eq!(JobError::from(last.2.clone()), *error);
                }
            }
        }
    }
}
