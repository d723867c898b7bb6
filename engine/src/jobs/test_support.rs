//! What every test of running work needs: virtual time, a context, and somebody who plays the manager.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use blockyard_storage::LocalFuture;
use blockyard_storage::buffer::BufferPool;
use futures_util::future::{Either, select};
use tokio::sync::mpsc;

use crate::clock::{Clock, Moment};
use crate::data::Spawner;
use crate::job::context::{ErrorPolicies, JobContext, JobKey, JobShared, Report};
use crate::job::error_policy::ErrorAction;
use crate::job::work::{Stop, Work};
use crate::limits::BUFFER_BUDGET_BYTES;
use crate::node::Node;
use crate::node::copy_before_write::{Saver, Surroundings};
use crate::request::{CbwOptions, CopyMode};

/// Time that passes only when nothing else is left to do.
#[derive(Clone, Default)]
pub(crate) struct VirtualClock(Rc<VirtualTime>);

#[derive(Default)]
struct VirtualTime {
    now: Cell<Moment>,
    timers: RefCell<BTreeMap<(Moment, u64), Waker>>,
    next_id: Cell<u64>,
}

impl VirtualClock {
    /// Goes on to the next timer; `false`: there is none.
    pub(crate) fn advance(&self) -> bool {
        let first = self.0.timers.borrow_mut().pop_first();
        let Some(((moment, _), timer)) = first else {
            return false;
        };
        self.0.now.set(moment);
        timer.wake();
        true
    }

    /// Runs to the end; a task that waits for nothing fails the test.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let result = blockyard_simulator::run(future, || self.advance());
        result.expect("waits for something that can happen")
    }
}

struct Timer {
    time: Rc<VirtualTime>,
    key: (Moment, u64),
}

impl Future for Timer {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.time.now.get() >= self.key.0 {
            return Poll::Ready(());
        }
        let mut timers = self.time.timers.borrow_mut();
        timers.insert(self.key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.time.timers.borrow_mut().remove(&self.key);
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Moment {
        self.0.now.get()
    }

    fn sleep_until(&self, moment: Moment) -> LocalFuture<'static, ()> {
        let id = self.0.next_id.get();
        self.0.next_id.set(id + 1);
        Box::pin(Timer {
            time: self.0.clone(),
            key: (moment, id),
        })
    }
}

/// What the filter above the source of a backup has, which nobody writes through.
pub(super) fn saver(
    source: &Rc<dyn Node>,
    target: &Rc<dyn Node>,
    clock: &VirtualClock,
) -> Rc<Saver> {
    let of_target = target.facts().cluster_size_bytes.map_or(0, u64::from);
    let surroundings = Surroundings {
        clock: Rc::new(clock.clone()),
        spawner: Spawner::new(drop),
    };
    Rc::new(Saver::new(
        source.facts().length_bytes,
        of_target.max(64 << 10),
        CbwOptions::default(),
        surroundings,
    ))
}

/// The two ends of a job's context.
pub(super) struct Running {
    /// The work's.
    pub(super) cx: JobContext,
    /// The manager's, to order.
    pub(super) orders: Arc<JobShared>,
    /// The manager's, to listen.
    pub(super) reports: mpsc::UnboundedReceiver<(JobKey, Report)>,
}

impl Running {
    /// A job that may run.
    pub(super) fn new(clock: &VirtualClock, speed: i64, policies: ErrorPolicies) -> Self {
        let orders = Arc::new(JobShared::new(speed, CopyMode::Background));
        let (reports, heard) = mpsc::unbounded_channel();
        let pool = BufferPool::new(BUFFER_BUDGET_BYTES);
        let clock = Rc::new(clock.clone());
        Self {
            cx: JobContext::new(JobKey(1), orders.clone(), reports, clock, pool, policies),
            orders,
            reports: heard,
        }
    }

    /// Runs `work` beside [`answer`]. Whenever both wait, `idle` makes something happen; without a result it said that
    /// nothing can.
    pub(super) fn drive(
        self,
        work: &mut dyn Work,
        look: impl FnMut(&Report),
        mut idle: impl FnMut(&JobShared) -> bool,
    ) -> Option<Result<(), Stop>> {
        let manager = answer(&self.orders, self.reports, look);
        let both = async {
            match select(work.run(&self.cx), pin!(manager)).await {
                Either::Left((result, _)) => result,
                Either::Right(_) => unreachable!("the manager ends last"),
            }
        };
        blockyard_simulator::run(both, || idle(&self.orders))
    }
}

/// Plays the manager after `look` has seen the report: pauses after an error that stops, resumes what has parked,
/// completes what is ready, records every durable point.
pub(super) async fn answer(
    orders: &JobShared,
    mut reports: mpsc::UnboundedReceiver<(JobKey, Report)>,
    mut look: impl FnMut(&Report),
) {
    while let Some((_, report)) = reports.recv().await {
        look(&report);
        match report {
            Report::IoError { action, heard, .. } => {
                if action == ErrorAction::Stop {
                    orders.order_pause(true);
                }
                let _ = heard.send(());
            }
            Report::Parked => orders.order_pause(false),
            Report::Converged { heard } => {
                let _ = heard.send(());
                orders.order_complete();
            }
            Report::Remember { recorded, .. } => {
                let _ = recorded.send(Ok(()));
            }
            Report::Unparked | Report::Ended(_) => {}
        }
    }
}
