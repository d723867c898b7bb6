//! [`Chain`]: images of any kind above each other, what is seen through the top, and a job that takes layers out of it.

use std::cell::RefCell;
use std::rc::Rc;

use blockyard_images::qcow2::amend::AmendOptions;
use blockyard_images::qcow2::units::Version;
use blockyard_simulator::{Seed, run};
use blockyard_storage::{Buffer, ByteRange, LocalFuture};
use futures_util::future::join;

use super::amend::checked;
use crate::job::context::{CancelMode, ErrorPolicies, JobContext, JobShared, Report};
use crate::job::error_policy::OnError;
use crate::job::work::{Stop, Work};
use crate::jobs::commit::Commit;
use crate::jobs::stream::Stream;
use crate::jobs::test_support::{Running, VirtualClock};
use crate::node::Node;
use crate::node::qcow2::Qcow2Node;
use crate::node::qcow2::tests::model::{Model, Operation};
use crate::node::qcow2::tests::yard::{DataFile, Setup, Yard};

/// A job with so many errors gives up waiting for better times and is cancelled.
const ERRORS_MAX: usize = 8;

/// Whether the base would have to grow over what is below it, which an image of version 2 cannot hide.
fn is_refused(yards: &[Yard], top: usize, base: usize) -> bool {
    let length = |level: usize| match yards.get(level) {
        Some(yard) => Some(yard.setup.size_bytes),
        None => yards.last().and_then(|yard| yard.setup.backing_bytes),
    };
    let is_v2 = yards
        .get(base)
        .is_some_and(|yard| yard.setup.version == Version::V2);
    let below = match base + 1 < yards.len() {
        true => length(base + 1),
        false => yards.last().and_then(|yard| yard.setup.backing_bytes),
    };
    is_v2 && length(top) > length(base) && below > length(base)
}

/// Which layers go, counted from the top, which is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// All but the first of so many, into the first.
    Stream { layers: usize },
    /// So many from `top` on, into the next one.
    Commit { top: usize, layers: usize },
}

/// A chain, and what is seen through it.
pub(super) struct Chain {
    /// The images, from the top down.
    pub(super) yards: Vec<Yard>,
    /// A raw file is below them.
    pub(super) has_raw: bool,
    pub(super) kind: Kind,
    pub(super) policy: OnError,
    pub(super) model: Model,
    dice: Seed,
}

/// Its nodes, or some of them above each other, from the top down.
pub(super) struct Nodes {
    pub(super) top: Rc<Qcow2Node>,
    pub(super) all: Vec<Rc<dyn Node>>,
}

/// How a job ended.
pub(super) struct Ended {
    /// `None`: it was left, or the power went.
    pub(super) result: Option<Result<(), Stop>>,
    /// How many errors it told of.
    pub(super) errors: usize,
    /// How often it has parked.
    pub(super) parked: usize,
    /// Bytes that it says are done, and all.
    pub(super) progress: (u64, u64),
}

/// A job, and what goes on beside it.
struct Beside<'a> {
    work: Box<dyn Work>,
    others: Option<LocalFuture<'a, ()>>,
}

impl Work for Beside<'_> {
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> LocalFuture<'a, Result<(), Stop>> {
        let others = self.others.take();
        Box::pin(async move {
            let others = async move {
                if let Some(others) = others {
                    others.await;
                }
            };
            join(self.work.run(cx), others).await.0
        })
    }
}

impl Chain {
    /// Anything that can be, filled with this and that.
    pub(super) fn random(seed: u64) -> Self {
        let dice = Seed::new(seed ^ 0xc4a1);
        let count = 2 + dice.below(3) as usize;
        let common = Setup::random(dice.any()).size_bytes.max(512);
        let mut yards: Vec<Yard> = Vec::new();
        let mut has_raw = false;
        // From the bottom up: an image has to know whether something is below it.
        for level in (0..count).rev() {
            let setup = Setup::random(dice.any());
            let is_lowest = level == count - 1;
            let size_bytes = match dice.below(4) {
                0 => setup.size_bytes.max(512),
                1 => common.div_ceil(2).next_multiple_of(512),
                _ => common,
            };
            let backing_bytes = match is_lowest {
                true => setup
                    .backing_bytes
                    .map(|bytes| bytes.min(2 * size_bytes).max(512)),
                false => Some(512),
            };
            has_raw |= is_lowest && backing_bytes.is_some();
            let data_file = match setup.data_file {
                DataFile::Raw => DataFile::Inside,
                other => other,
            };
            yards.push(Yard::new(Setup {
                size_bytes,
                backing_bytes,
                data_file,
                // Counts of an image that was not closed are checked.
                lazy_refcounts: false,
                ..setup
            }));
        }
        yards.reverse();
        let nodes = yards.len() + usize::from(has_raw);
        let kind = match dice.one_in(2) || nodes < 3 {
            true => Kind::Stream {
                layers: 2 + dice.below(nodes as u64 - 1) as usize,
            },
            false => {
                let top = 1 + dice.below(nodes as u64 - 2) as usize;
                let layers = 1 + dice.below((nodes - 1 - top) as u64) as usize;
                Kind::Commit { top, layers }
            }
        };
        let kind = match kind {
            Kind::Commit { top, layers } if is_refused(&yards, top, top + layers) => {
                Kind::Stream { layers: top + 1 }
            }
            other => other,
        };
        let model = Model { bytes: Vec::new() };
        let mut chain = Self {
            yards,
            has_raw,
            kind,
            policy: OnError::Report,
            model,
            dice,
        };
        chain.fill();
        chain
    }

    /// Fills one layer after the other, each seen through itself.
    fn fill(&mut self) {
        let lowest = self.yards.last().expect("a layer");
        self.model.bytes = lowest.base_bytes.clone();
        for level in (0..self.yards.len()).rev() {
            let setup = self.yards[level].setup.clone();
            self.model.bytes.resize(setup.size_bytes as usize, 0);
            let kept: Vec<usize> = (level..self.count()).collect();
            let nodes = self.open(&kept);
            for _ in 0..self.dice.below(7) {
                let operation = Operation::random(&self.dice, &setup);
                self.drive(operation.carry_out(&nodes.top)).expect("done");
                self.model.apply(&operation, &setup);
            }
            self.drive(nodes.top.close()).expect("closed");
        }
    }

    /// Layers, with the raw file.
    pub(super) fn count(&self) -> usize {
        self.yards.len() + usize::from(self.has_raw)
    }

    /// All layers.
    pub(super) fn whole(&self) -> Vec<usize> {
        (0..self.count()).collect()
    }

    /// The layers that are left when the job has ended well.
    pub(super) fn kept(&self) -> Vec<usize> {
        let gone = match self.kind {
            Kind::Stream { layers } => 1..layers,
            Kind::Commit { top, layers } => top..top + layers,
        };
        let mut kept = self.whole();
        kept.retain(|level| !gone.contains(level));
        kept
    }

    /// The layer that the job writes to.
    pub(super) fn target(&self) -> usize {
        match self.kind {
            Kind::Stream { .. } => 0,
            Kind::Commit { top, layers } => top + layers,
        }
    }

    /// Nodes for these layers, newly opened.
    pub(super) fn open(&self, levels: &[usize]) -> Nodes {
        let (top, all) = self.open_any(levels);
        let top = top.expect("the top is an image");
        Nodes { top, all }
    }

    /// The layers from this one on, newly opened; `None`: there are none.
    pub(super) fn open_from(&self, level: usize) -> Option<Rc<dyn Node>> {
        let levels: Vec<usize> = (level..self.count()).collect();
        self.open_any(&levels).1.into_iter().next()
    }

    fn open_any(&self, levels: &[usize]) -> (Option<Rc<Qcow2Node>>, Vec<Rc<dyn Node>>) {
        let mut all: Vec<Rc<dyn Node>> = Vec::new();
        let mut top = None;
        for level in levels.iter().rev() {
            let below = all.first().cloned();
            match self.yards.get(*level) {
                Some(yard) => {
                    let file = yard.file("file", &yard.image, false);
                    let node = yard.open_over(file, below);
                    top = Some(Rc::clone(&node));
                    all.insert(0, node);
                }
                None => {
                    let yard = self.yards.last().expect("a layer");
                    let disk = yard.base.as_ref().expect("a raw file");
                    all.insert(0, yard.file("base", disk, false));
                }
            }
        }
        (top, all)
    }

    /// Lets something happen on one of the disks, and what nobody waits for go on; `false`: nothing can.
    pub(super) fn step(&self) -> bool {
        let stepped = self.step_a_disk();
        let go_on = |ended: bool, yard: &Yard| yard.go_on_with_what_is_left() || ended;
        let ended = self.yards.iter().fold(false, go_on);
        // It may have asked for something only now.
        stepped || ended || self.step_a_disk()
    }

    fn step_a_disk(&self) -> bool {
        let count = self.yards.len();
        let first = self.dice.below(count as u64) as usize;
        let mut order = (first..count).chain(0..first);
        order.any(|level| self.yards[level].world.step())
    }

    /// Steps of all disks so far.
    pub(super) fn steps(&self) -> u64 {
        self.yards.iter().map(|yard| yard.world.steps()).sum()
    }

    /// Runs to the end.
    pub(super) fn drive<T>(&self, future: impl Future<Output = T>) -> T {
        run(future, || self.step()).expect("waits for something that can happen")
    }

    pub(super) fn in_flight(&self) -> usize {
        self.yards.iter().map(|yard| yard.world.in_flight()).sum()
    }

    pub(super) fn failures(&self) -> u64 {
        self.yards.iter().map(|yard| yard.world.failures()).sum()
    }

    pub(super) fn cut_power(&self) {
        for yard in &self.yards {
            yard.cut_power();
        }
    }

    /// The job, on these nodes.
    pub(super) fn work(&self, nodes: &Nodes) -> Box<dyn Work> {
        let node = |level: usize| Rc::clone(&nodes.all[level]);
        match self.kind {
            Kind::Stream { layers } => Box::new(Stream::new(node(0), layers)),
            Kind::Commit { top, layers } => {
                let above = nodes.all[..top].iter();
                let seen_bytes = above.map(|node| node.facts().length_bytes).max();
                Box::new(Commit::new(
                    node(top),
                    node(top + layers),
                    layers,
                    seen_bytes.unwrap_or(0),
                ))
            }
        }
    }

    /// Runs the job on these nodes; `idle` is asked whenever nothing can go on by itself, and says whether it goes on.
    pub(super) fn run_job<'a>(
        &self,
        nodes: &Nodes,
        others: Option<LocalFuture<'a, ()>>,
        speed: i64,
        mut idle: impl FnMut(&JobShared) -> bool,
        mut error: impl FnMut(),
    ) -> Ended {
        let clock = VirtualClock::default();
        let policies = ErrorPolicies {
            on_source_error: self.policy,
            on_target_error: self.policy,
        };
        let running = Running::new(&clock, speed, policies);
        let orders = running.orders.clone();
        let counts = RefCell::new((0, 0));
        let is_alone = others.is_none();
        let look = |report: &Report| {
            let mut counts = counts.borrow_mut();
            match report {
                Report::IoError { .. } => {
                    counts.0 += 1;
                    error();
                    if counts.0 == ERRORS_MAX {
                        orders.order_cancel(CancelMode::Force);
                    }
                }
                Report::Parked => {
                    counts.1 += 1;
                    if is_alone {
                        assert_eq!(self.in_flight(), 0, "parked with something in flight");
                    }
                }
                _ => {}
            }
        };
        let mut work = Beside {
            work: self.work(nodes),
            others,
        };
        let result = running.drive(&mut work, look, |orders| {
            idle(orders) && (self.step() || clock.advance())
        });
        let (errors, parked) = *counts.borrow();
        Ended {
            result,
            errors,
            parked,
            progress: (
                orders.progress.current_bytes(),
                orders.progress.total_bytes(),
            ),
        }
    }

    /// Runs it to the end with nobody else about.
    pub(super) fn run_alone(&self, nodes: &Nodes) -> Ended {
        self.run_job(nodes, None, 0, |_| true, || {})
    }

    /// Links the chain as it is after the job.
    pub(super) fn relink(&self, nodes: &Nodes) {
        let (overlay, below) = match self.kind {
            Kind::Stream { layers } => (0, layers),
            Kind::Commit { top, layers } => (top - 1, top + layers),
        };
        nodes.all[overlay].set_backing(nodes.all.get(below).cloned());
    }

    /// The header of the overlay says so too.
    pub(super) fn new_header(&self) -> (usize, AmendOptions) {
        let kept = self.kept();
        let (overlay, below) = match self.kind {
            Kind::Stream { layers } => (0, layers),
            Kind::Commit { top, layers } => (top - 1, top + layers),
        };
        let name = kept.contains(&below).then(|| b"new".to_vec());
        let options = AmendOptions {
            backing_name: Some(name.unwrap_or_default()),
            is_overlay: true,
            ..AmendOptions::default()
        };
        (overlay, options)
    }

    /// Everything that is seen through the top.
    pub(super) fn read_all(&self, nodes: &Nodes) -> Vec<u8> {
        self.drive(self.reading(nodes))
    }

    /// The same, driven by somebody else.
    pub(super) async fn reading(&self, nodes: &Nodes) -> Vec<u8> {
        let all = ByteRange::new(0, self.model.bytes.len() as u64);
        let mut bytes = Vec::new();
        for piece in all.pieces(1 << 18) {
            let into = Buffer::zeroed(piece.length() as usize);
            let read = nodes.top.read(piece.offset(), into).await;
            read.outcome.expect("readable");
            bytes.extend_from_slice(read.buffer.as_slice());
        }
        bytes
    }

    /// What is seen through these nodes is what the model says.
    pub(super) fn assert_shows(&self, nodes: &Nodes, what: &str) {
        self.assert_is_seen(&self.read_all(nodes), what);
    }

    /// These bytes are what the model says.
    pub(super) fn assert_is_seen(&self, bytes: &[u8], what: &str) {
        if let Some(place) = (0..bytes.len()).find(|at| bytes[*at] != self.model.bytes[*at]) {
            let setups: Vec<_> = self.yards.iter().map(|yard| &yard.setup).collect();
            panic!("{what}: byte {place}, {:?}, {setups:#?}", self.kind);
        }
    }

    /// The same through these layers, newly opened.
    pub(super) fn assert_holds(&self, levels: &[usize], what: &str) {
        let nodes = self.open(levels);
        self.assert_shows(&nodes, what);
    }

    /// No image has anything wrong but leaks, and none of these unless they are `allowed`.
    pub(super) fn assert_sound(&self, leaks_allowed: bool, what: &str) {
        for yard in &self.yards {
            let report = checked(&yard.image.bytes());
            let wrong = (report.corruptions, report.check_errors);
            assert_eq!(wrong, (0, 0), "{what}: {:?}", yard.setup);
            assert!(
                leaks_allowed || report.leaks == 0,
                "{what}: {:?}",
                yard.setup
            );
        }
    }
}
