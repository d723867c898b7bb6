//! The copier on nodes in memory and in virtual time: never success with wrong bytes, every error reported, nothing in
//! flight when it stops, and the speed that was asked for.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blockyard_simulator::Seed;
use blockyard_storage::error::EOPNOTSUPP;
use blockyard_storage::{Buffer, ByteRange, LocalFuture, Operation, StorageError, ZeroMode};
use futures_util::future::{Either, select};
use tokio::sync::mpsc;

use super::copier::{Copier, CopyOptions, REMEMBER_BYTES, WindowLimits};
use super::plan::Layers;
use super::test_support::{Running, VirtualClock, answer};
use crate::clock::{Clock, Moment};
use crate::error::NodeError;
use crate::job::context::{CancelMode, ErrorPolicies, JobKey, JobShared, Report};
use crate::job::error_policy::OnError;
use crate::job::work::Stop;
use crate::node::turns::{Doing, Turn, Turns};
use crate::node::{Node, NodeFacts, NodeTransfer, StatusExtent};

const EIO: i32 = 5;
const CLUSTER: u64 = 64 << 10;

/// Bytes in memory that fail and take their time as told. Without `bytes` it only counts.
struct MemoryNode {
    length: u64,
    bytes: RefCell<Vec<u8>>,
    clock: VirtualClock,
    latency: Duration,
    /// What all requests together move in a second; 0: any amount.
    bytes_per_second: u64,
    free_at: Cell<Moment>,
    dice: Seed,
    /// One request in so many fails; 0: none.
    fails_one_in: u64,
    /// Requests here fail.
    bad: ByteRange,
    faults: Cell<u64>,
    in_flight: Cell<usize>,
    in_flight_max: Cell<usize>,
    unflushed: Cell<bool>,
    moved_bytes: Cell<u64>,
    /// Shares extents of this node, in ranges that end at or below the offset.
    shares: Option<(Rc<MemoryNode>, u64)>,
    /// Whoever comes waits for those who came before, also to look something up and to flush.
    queue: Option<Rc<Turns>>,
}

impl MemoryNode {
    fn new(clock: &VirtualClock, bytes: Vec<u8>, seed: u64) -> Self {
        Self {
            length: bytes.len() as u64,
            bytes: bytes.into(),
            clock: clock.clone(),
            latency: Duration::from_millis(3),
            bytes_per_second: 0,
            free_at: Cell::default(),
            dice: Seed::new(seed),
            fails_one_in: 0,
            bad: ByteRange::default(),
            faults: Cell::new(0),
            in_flight: Cell::new(0),
            in_flight_max: Cell::new(0),
            unflushed: Cell::new(false),
            moved_bytes: Cell::new(0),
            shares: None,
            queue: None,
        }
    }

    /// A long node whose bytes nobody looks at, quicker than any limit.
    fn counting(clock: &VirtualClock) -> Self {
        Self {
            length: 1 << 40,
            latency: Duration::from_micros(10),
            ..Self::new(clock, Vec::new(), 1)
        }
    }

    /// The place of a request behind all others, if there is a queue. It is kept until dropped.
    async fn turn(&self) -> Option<Turn> {
        let everything = ByteRange::new(0, u64::MAX);
        let queue = self.queue.as_ref()?;
        let turn = queue.take(everything, Doing::WriteBoth);
        turn.come().await;
        Some(turn)
    }

    async fn request(&self, operation: Operation, range: ByteRange) -> Result<(), NodeError> {
        assert!(range.end() <= self.length, "{range} passes the end");
        let _turn = self.turn().await;
        self.in_flight.set(self.in_flight.get() + 1);
        let most = self.in_flight_max.get().max(self.in_flight.get());
        self.in_flight_max.set(most);
        let mut moment = self.clock.now().after(self.latency);
        if let Some(nanos) = (range.length() * 1_000_000_000).checked_div(self.bytes_per_second) {
            let free_at = self.free_at.get().max(moment);
            moment = free_at.after(Duration::from_nanos(nanos));
            self.free_at.set(moment);
        }
        self.clock.sleep_until(moment).await;
        self.in_flight.set(self.in_flight.get() - 1);
        if self.dice.one_in(self.fails_one_in) || self.bad.overlaps(&range) {
            self.faults.set(self.faults.get() + 1);
            return Err(self.error(operation, range, EIO));
        }
        Ok(())
    }

    fn error(&self, operation: Operation, range: ByteRange, errno: i32) -> NodeError {
        NodeError {
            node: self.name(),
            source: StorageError::new(operation, range, errno),
        }
    }

    fn place(range: ByteRange) -> std::ops::Range<usize> {
        range.offset() as usize..range.end() as usize
    }
}

impl Node for MemoryNode {
    fn name(&self) -> String {
        "memory".to_owned()
    }

    fn facts(&self) -> NodeFacts {
        NodeFacts {
            length_bytes: self.length,
            request_alignment: 1,
            transfer_max_bytes: 1 << 20,
            cluster_size_bytes: None,
            read_only: false,
            unmaps: false,
            fixed_length: true,
        }
    }

    fn status(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<StatusExtent>, NodeError>> {
        Box::pin(async move {
            let _turn = self.turn().await;
            let bytes = self.bytes.borrow();
            let mut extents: Vec<StatusExtent> = Vec::new();
            // A node that only counts is one long extent.
            let piece_bytes = if bytes.is_empty() { 1 << 62 } else { CLUSTER };
            for piece in range.pieces(piece_bytes) {
                let zero = bytes
                    .get(Self::place(piece))
                    .is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0));
                let mut range = piece;
                if extents.last().is_some_and(|last| last.zero == zero) {
                    let last = extents.pop().map_or(piece, |last| last.range);
                    range = ByteRange::between(last.offset(), piece.end());
                } else if extents.len() == extents_max {
                    break;
                }
                extents.push(StatusExtent {
                    range,
                    zero,
                    allocated: true,
                });
            }
            Ok(extents)
        })
    }

    fn read(&self, offset: u64, mut into: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, into.len() as u64);
            let outcome = self.request(Operation::Read, range).await;
            if let Some(bytes) = self.bytes.borrow().get(Self::place(range)) {
                into.as_mut_slice().copy_from_slice(bytes);
            }
            if outcome.is_err() {
                into.as_mut_slice().fill(0xee);
            }
            NodeTransfer {
                buffer: into,
                outcome,
            }
        })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, NodeTransfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, from.len() as u64);
            let outcome = self.request(Operation::Write, range).await;
            if outcome.is_ok() {
                self.unflushed.set(true);
                self.moved_bytes
                    .set(self.moved_bytes.get() + range.length());
                if let Some(bytes) = self.bytes.borrow_mut().get_mut(Self::place(range)) {
                    bytes.copy_from_slice(from.as_slice());
                }
            }
            NodeTransfer {
                buffer: from,
                outcome,
            }
        })
    }

    fn zero(&self, range: ByteRange, _: ZeroMode) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            self.request(Operation::Zero, range).await?;
            self.unflushed.set(true);
            self.bytes.borrow_mut()[Self::place(range)].fill(0);
            Ok(())
        })
    }

    fn discard(&self, _: ByteRange) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async { Ok(()) })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            self.request(Operation::Sync, ByteRange::new(0, 0)).await?;
            self.unflushed.set(false);
            Ok(())
        })
    }

    fn resize(&self, _: u64) -> LocalFuture<'_, Result<(), NodeError>> {
        let error = self.error(Operation::Resize, ByteRange::new(0, 0), EOPNOTSUPP);
        Box::pin(async move { Err(error) })
    }

    fn host_extent(&self, range: ByteRange) -> Option<(Arc<OwnedFd>, u64)> {
        let file = std::fs::File::open("/dev/null").ok()?;
        (!self.bytes.borrow().is_empty()).then(|| (Arc::new(file.into()), range.offset()))
    }

    fn share(
        &self,
        _: Arc<OwnedFd>,
        _: u64,
        to: ByteRange,
    ) -> LocalFuture<'_, Result<(), NodeError>> {
        Box::pin(async move {
            match &self.shares {
                Some((source, limit)) if to.end() <= *limit => {
                    let bytes = source.bytes.borrow()[Self::place(to)].to_vec();
                    self.bytes.borrow_mut()[Self::place(to)].copy_from_slice(&bytes);
                    self.unflushed.set(true);
                    Ok(())
                }
                _ => Err(self.error(Operation::Share, to, EOPNOTSUPP)),
            }
        })
    }
}

/// What became of one copy.
struct Outcome {
    result: Result<(), Stop>,
    errors: u64,
    parked_after: Option<Duration>,
}

/// What is ordered, and when.
#[derive(Clone, Copy)]
enum Order {
    Nothing,
    Pause(Duration),
    Cancel(Duration),
}

struct Case {
    clock: VirtualClock,
    source: Rc<MemoryNode>,
    target: Rc<MemoryNode>,
    policies: ErrorPolicies,
    speed: i64,
    order: Order,
    options: CopyOptions,
}

impl Case {
    fn new(clock: &VirtualClock, source: MemoryNode, target: MemoryNode) -> Self {
        Self {
            clock: clock.clone(),
            source: Rc::new(source),
            target: Rc::new(target),
            policies: ErrorPolicies::default(),
            speed: 0,
            order: Order::Nothing,
            options: CopyOptions {
                layers: Layers::All,
                unit_bytes: 1,
                compress: false,
                window: WindowLimits {
                    requests: 4,
                    bytes: 16 << 20,
                },
                chunk_max_bytes: 1 << 20,
                granularity_bytes: CLUSTER,
                may_unmap: false,
                skips_first_zeroes: false,
                zeroes_are_free: false,
                one_error_a_round: false,
                counts_skipped: false,
                leaves_out_ignored: false,
                remember_bytes: REMEMBER_BYTES,
            },
        }
    }

    fn run(&self) -> Outcome {
        let Running {
            cx,
            orders,
            reports,
        } = Running::new(&self.clock, self.speed, self.policies);
        let mut copier = Copier::new(self.source.clone(), self.target.clone(), self.options);
        let mut outcome = Outcome {
            result: Ok(()),
            errors: 0,
            parked_after: None,
        };
        let seen = RefCell::new(&mut outcome);
        let manager = self.manage(&orders, reports, &seen);
        let result = self.clock.block_on(async {
            match select(pin!(copier.run(&cx)), pin!(manager)).await {
                Either::Left((result, _)) => result,
                Either::Right(((), _)) => unreachable!("the manager ends last"),
            }
        });
        assert_eq!(self.source.in_flight.get() + self.target.in_flight.get(), 0);
        outcome.result = result;
        outcome
    }

    /// Plays the manager: orders at their time, answers reports, resumes what parked.
    async fn manage(
        &self,
        shared: &JobShared,
        heard: mpsc::UnboundedReceiver<(JobKey, Report)>,
        seen: &RefCell<&mut Outcome>,
    ) {
        let ordering = async {
            match self.order {
                Order::Nothing => {}
                Order::Pause(after) => {
                    self.clock.sleep_until(Moment::new(after)).await;
                    shared.order_pause(true);
                }
                Order::Cancel(after) => {
                    self.clock.sleep_until(Moment::new(after)).await;
                    shared.order_cancel(CancelMode::Force);
                }
            }
            std::future::pending::<()>().await;
        };
        let answering = answer(shared, heard, |report| match report {
            Report::IoError { .. } => seen.borrow_mut().errors += 1,
            Report::Parked => {
                assert_eq!(self.source.in_flight.get() + self.target.in_flight.get(), 0);
                if let Order::Pause(after) = self.order {
                    let now = self.clock.now().since_start();
                    seen.borrow_mut().parked_after = Some(now.saturating_sub(after));
                }
            }
            _ => {}
        });
        select(pin!(ordering), pin!(answering)).await;
    }

    fn assert_copied(&self, what: &str) {
        assert!(
            *self.source.bytes.borrow() == *self.target.bytes.borrow(),
            "{what}: bytes"
        );
        assert!(
            !self.target.unflushed.get(),
            "{what}: success before it is durable"
        );
    }
}

/// Data, zeroes and a tail that fills no cluster.
fn random_bytes(dice: &Seed, clusters_max: u64) -> Vec<u8> {
    let length = (dice.below(clusters_max) * CLUSTER + dice.below(128) * 512) as usize;
    let mut bytes = vec![0; length];
    for cluster in bytes.chunks_mut(CLUSTER as usize) {
        if dice.below(3) != 0 {
            cluster.fill(dice.below(256) as u8);
        }
    }
    bytes
}

fn random_case(seed: u64) -> Case {
    let dice = Seed::new(seed);
    let clock = VirtualClock::default();
    let bytes = random_bytes(&dice, 48);
    let garbage = vec![0x55; bytes.len()];
    let source = MemoryNode::new(&clock, bytes, dice.any());
    let target = MemoryNode::new(&clock, garbage, dice.any());
    let mut case = Case::new(&clock, source, target);
    case.options.window.requests = 1 + dice.below(8) as usize;
    case.options.chunk_max_bytes = CLUSTER << dice.below(5);
    case
}

fn with_faults(case: &mut Case, one_in: u64) {
    for node in [&mut case.source, &mut case.target] {
        Rc::get_mut(node).expect("not shared yet").fails_one_in = one_in;
    }
}

#[test]
fn faults_under_every_policy_never_end_in_wrong_bytes() {
    for seed in 0..400_u64 {
        let mut case = random_case(seed);
        let policy = [
            OnError::Report,
            OnError::Ignore,
            OnError::Stop,
            OnError::Enospc,
        ];
        let policy = policy[seed as usize % 4];
        case.policies = ErrorPolicies {
            on_source_error: policy,
            on_target_error: policy,
        };
        case.options.one_error_a_round = seed / 4 % 2 == 0;
        with_faults(&mut case, 2 + seed / 8 % 6);
        let outcome = case.run();
        let faults = case.source.faults.get() + case.target.faults.get();
        let what = format!("seed {seed}, {policy:?}, {faults} faults");
        match outcome.result {
            Ok(()) => case.assert_copied(&what),
            Err(Stop::Failed(error)) => {
                assert_eq!(error.errno, Some(EIO), "{what}");
                assert!(faults > 0, "{what}");
            }
            Err(Stop::Cancelled) => panic!("{what}: nobody cancelled"),
        }
        if matches!(policy, OnError::Report | OnError::Enospc) {
            assert_eq!(faults > 0, outcome.errors > 0, "{what}");
            assert!(outcome.errors <= 1, "{what}: {} reports", outcome.errors);
        } else if !case.options.one_error_a_round {
            assert_eq!(outcome.errors, faults, "{what}");
        }
    }
}

/// As where a table is being read for a request, while others need the same one.
#[test]
fn what_is_in_flight_goes_on_while_something_is_looked_up_or_flushed() {
    for seed in 0..300_u64 {
        let mut case = random_case(seed);
        case.options.remember_bytes = CLUSTER;
        case.options.window.requests = 2 + seed as usize % 4;
        for node in [&mut case.source, &mut case.target] {
            Rc::get_mut(node).expect("not shared yet").queue = Some(Rc::default());
        }
        let outcome = case.run();
        assert_eq!(outcome.result, Ok(()), "seed {seed}");
        case.assert_copied(&format!("seed {seed}"));
    }
}

#[test]
fn ignored_errors_are_no_busy_loop() {
    let mut case = random_case(7);
    case.policies.on_source_error = OnError::Ignore;
    case.order = Order::Cancel(Duration::from_secs(100));
    Rc::get_mut(&mut case.source)
        .expect("not shared yet")
        .fails_one_in = 1;
    let outcome = case.run();
    assert_eq!(outcome.result, Err(Stop::Cancelled));
    // The delay grows to a second; a window's worth may fail at each try.
    assert!(
        outcome.errors > 50 && outcome.errors < 1100,
        "{}",
        outcome.errors
    );
}

/// As many ranges as are in flight at once fail for good, and what is behind them is copied all the same, at the speed of the disk.
#[test]
fn what_fails_for_good_holds_nothing_else_up() {
    let clock = VirtualClock::default();
    let source = MemoryNode::new(&clock, vec![7; 256 << 20], 1);
    let mut target = MemoryNode::new(&clock, vec![0; 256 << 20], 2);
    target.bad = ByteRange::new(8 << 20, 16 << 20);
    let mut case = Case::new(&clock, source, target);
    case.options.window.requests = 16;
    case.policies.on_target_error = OnError::Ignore;
    case.order = Order::Cancel(Duration::from_secs(10));
    let outcome = case.run();
    assert_eq!(outcome.result, Err(Stop::Cancelled));
    let bytes = case.target.bytes.borrow();
    let copied = bytes.chunks(1 << 20).map(|piece| piece == [7; 1 << 20]);
    let missing: Vec<_> = copied.enumerate().filter(|(_, copied)| !copied).collect();
    let bad: Vec<_> = (8..24).map(|place| (place, false)).collect();
    assert_eq!(missing, bad);
    // Each of them is tried about once a second in the end.
    assert!(outcome.errors < 16 * 18, "{}", outcome.errors);
}

#[test]
fn pause_and_cancel_at_any_moment() {
    for millis in 0..60 {
        let mut case = random_case(millis + 1000);
        case.speed = 16 << 20;
        let at = Duration::from_millis(millis * 3);
        case.order = Order::Pause(at);
        let outcome = case.run();
        assert_eq!(outcome.result, Ok(()), "pause at {at:?}");
        case.assert_copied(&format!("pause at {at:?}"));
        if let Some(after) = outcome.parked_after {
            assert!(
                after <= Duration::from_millis(200),
                "parked {after:?} after {at:?}"
            );
        }

        let mut case = random_case(millis + 1000);
        case.speed = 16 << 20;
        case.order = Order::Cancel(at);
        match case.run().result {
            Ok(()) => case.assert_copied(&format!("cancel at {at:?} came too late")),
            other => assert_eq!(other, Err(Stop::Cancelled), "cancel at {at:?}"),
        }
        let late = case.clock.now().since_start().saturating_sub(at);
        assert!(
            late <= Duration::from_millis(200),
            "cancelled {late:?} after {at:?}"
        );
    }
}

#[test]
fn the_speed_is_within_three_percent_over_ten_seconds() {
    for speed in [1 << 20, 10_000_000, 64 << 20, 1 << 30] {
        let clock = VirtualClock::default();
        let nodes = (MemoryNode::counting(&clock), MemoryNode::counting(&clock));
        let mut case = Case::new(&clock, nodes.0, nodes.1);
        case.speed = speed;
        case.order = Order::Cancel(Duration::from_secs(10));
        assert_eq!(case.run().result, Err(Stop::Cancelled));
        let (moved, wanted) = (case.target.moved_bytes.get() as f64, speed as f64 * 10.0);
        assert!(
            (moved / wanted - 1.0).abs() < 0.03,
            "{speed}: {moved} of {wanted}"
        );
    }
}

#[test]
fn where_sharing_is_refused_half_way_the_rest_is_copied_and_holes_stay() {
    let clock = VirtualClock::default();
    let mut bytes = vec![0; 8 << 20];
    bytes[..1 << 20].fill(1);
    bytes[5 << 20..6 << 20].fill(2);
    let mut target = MemoryNode::new(&clock, vec![0; 8 << 20], 2);
    let source = MemoryNode::new(&clock, bytes, 1);
    let mut case = Case::new(&clock, source, MemoryNode::new(&clock, Vec::new(), 3));
    target.shares = Some((case.source.clone(), 3 << 20));
    case.target = Rc::new(target);
    case.speed = 10 << 20;
    assert_eq!(case.run().result, Ok(()));
    case.assert_copied("half shared");
    assert_eq!(
        case.target.moved_bytes.get(),
        1 << 20,
        "only what was not shared is copied"
    );
}

#[test]
fn a_slow_disk_still_pauses_soon() {
    let clock = VirtualClock::default();
    let source = MemoryNode::new(&clock, vec![7; 64 << 20], 1);
    let mut target = MemoryNode::new(&clock, vec![0; 64 << 20], 2);
    target.bytes_per_second = 8 << 20;
    let mut case = Case::new(&clock, source, target);
    case.options.window.requests = 16;
    case.order = Order::Pause(Duration::from_millis(1500));
    let outcome = case.run();
    assert_eq!(outcome.result, Ok(()));
    case.assert_copied("slow disk");
    let after = outcome.parked_after.expect("parked");
    assert!(after <= Duration::from_millis(200), "parked {after:?} late");
}

/// Buffers of more than 64 KiB are whole slots of a pool that all jobs and exports share.
#[test]
fn short_requests_are_many_and_take_no_more_memory() {
    for (kib, most) in [(64, 64), (128, 16), (1024, 16)] {
        let clock = VirtualClock::default();
        let far = |seed| MemoryNode {
            latency: Duration::from_millis(10),
            ..MemoryNode::new(&clock, vec![7; 64 << 20], seed)
        };
        let mut case = Case::new(&clock, far(1), far(2));
        case.options.window = WindowLimits::of(1 << 20);
        case.options.chunk_max_bytes = kib << 10;
        let outcome = case.run();
        assert_eq!(outcome.result, Ok(()));
        case.assert_copied("far");
        let reached = case
            .source
            .in_flight_max
            .get()
            .max(case.target.in_flight_max.get());
        assert!(reached <= most, "{reached} of {kib} KiB");
        assert!(reached >= most * 3 / 4, "{reached} of {kib} KiB");
    }
}
