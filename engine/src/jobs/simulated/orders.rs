//! Pause, resume and cancel at every step while requests fail: nothing is in flight when a job has parked or ended (every
//! run is judged for that), and what was paused goes on to the right end.

use blockyard_simulator::trace::Happened;
use blockyard_simulator::{Fault, Seed, each_seed};
use blockyard_storage::Operation;
use blockyard_storage::error::{EIO, ENOSPC};

use super::yard::{KINDS, Kind, Setup, Watch, Yard};
use crate::job::context::{CancelMode, JobShared};
use crate::job::error_policy::OnError;
use crate::job::work::Stop;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Pause,
    Cancel(CancelMode),
}

/// Gives an order after so many steps, once.
struct OrderAfter {
    steps: u64,
    order: Order,
    given: bool,
    /// The job has parked since.
    parked: bool,
    /// Reads of the source issued until then.
    reads: usize,
}

impl OrderAfter {
    fn new(steps: u64, order: Order) -> Self {
        Self {
            steps,
            order,
            given: false,
            parked: false,
            reads: 0,
        }
    }

    /// Only what was being planned when the order came is still carried out.
    fn assert_obeyed(&self, yard: &Yard) {
        let since = reads_of_source(yard) - self.reads;
        assert!(
            // The parts of one unit come one after the other, and one may be a hole.
            since
                <= if yard.setup.kind == Kind::Backup {
                    4
                } else {
                    1
                },
            "{since} reads since {:?} was ordered",
            self.order
        );
    }
}

fn reads_of_source(yard: &Yard) -> usize {
    let trace = yard.world.trace();
    let reads = trace.entries().filter(|entry| {
        entry.happened == Happened::Issued
            && entry.operation == Operation::Read
            && entry.disk == "source"
    });
    reads.count()
}

impl Watch for OrderAfter {
    fn idle(&mut self, yard: &Yard, orders: &JobShared) -> bool {
        if !self.given && yard.world.steps() >= self.steps {
            self.given = true;
            self.reads = reads_of_source(yard);
            match self.order {
                Order::Pause => orders.order_pause(true),
                Order::Cancel(mode) => orders.order_cancel(mode),
            }
        }
        true
    }

    fn parked(&mut self, yard: &Yard) {
        if self.given && !self.parked {
            self.parked = true;
            if self.order == Order::Pause {
                self.assert_obeyed(yard);
            }
        }
    }
}

#[test]
fn an_order_at_every_step_while_requests_fail() {
    let orders = [
        Order::Pause,
        Order::Cancel(CancelMode::Force),
        Order::Cancel(CancelMode::Soft),
    ];
    for kind in KINDS {
        for policy in [OnError::Stop, OnError::Ignore] {
            for order in orders {
                let (mut parked, mut cancelled) = (0, 0);
                for steps in 0.. {
                    let yard = Yard::new(Setup::new(3, kind, policy));
                    for operation in [Operation::Read, Operation::Write, Operation::Zero] {
                        yard.world.add_fault(Fault::fails(EIO).of(operation).nth(2));
                    }
                    let mut watch = OrderAfter::new(steps, order);
                    let ended = yard.run(&mut watch);
                    let result = ended.result.expect("the power stays");
                    if !watch.given {
                        break;
                    }
                    let what = format!("{kind:?} {policy:?} {order:?} after {steps}: {result:?}");
                    assert!(yard.world.failures() <= 3, "{what}");
                    parked += u64::from(watch.parked);
                    match result {
                        Ok(()) => {}
                        Err(Stop::Cancelled) => {
                            assert_eq!(order, Order::Cancel(CancelMode::Force), "{what}");
                            watch.assert_obeyed(&yard);
                            cancelled += 1;
                        }
                        Err(Stop::Failed(_)) => panic!("{what}"),
                    }
                }
                if order == Order::Pause {
                    assert!(parked > 10, "{kind:?} {policy:?}: {parked}");
                }
                let forced = order == Order::Cancel(CancelMode::Force);
                assert_eq!(cancelled > 10, forced, "{kind:?} {policy:?}: {cancelled}");
            }
        }
    }
}

/// Orders at random.
struct Storm(Seed);

impl Watch for Storm {
    fn idle(&mut self, _: &Yard, orders: &JobShared) -> bool {
        match self.0.below(60) {
            0..5 => orders.order_pause(true),
            5 => orders.order_cancel(CancelMode::Soft),
            6 if self.0.one_in(5) => orders.order_cancel(CancelMode::Force),
            7 => orders.order_speed(1 << self.0.below(24)),
            8 => orders.order_speed(0),
            _ => {}
        }
        true
    }
}

#[test]
fn storms_of_orders_and_faults() {
    each_seed("blockyard-engine", "storms_of_orders", 600, |seed| {
        let yard = Yard::new(Setup::random(seed));
        yard.world.add_fault(Fault::slow(5).one_in(3));
        let errno = if seed % 2 == 0 { ENOSPC } else { EIO };
        yard.world
            .add_fault(Fault::fails(errno).one_in(10 + seed % 50));
        yard.run(&mut Storm(Seed::new(seed)));
    });
}

#[test]
fn a_mirror_that_is_ready_ends_well_when_it_is_let_go() {
    for seed in 0..40 {
        let yard = Yard::new(Setup::new(seed, Kind::Mirror, OnError::Report));
        let mut watch = OrderAfter::new(seed * 3, Order::Cancel(CancelMode::Soft));
        assert_eq!(yard.run(&mut watch).result, Some(Ok(())));
    }
}
