//! [`JobContext`]: all that running work may do to the world outside its nodes, and [`JobShared`]: the few words that
//! manager and work share without waiting for each other.
//!
//! The manager writes *orders* (pause, cancel, complete, speed) and wakes the work; the work reads them at checkpoints and
//! sends *reports*. Only the manager turns a report into a change of status.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, Ordering};

use blockyard_storage::ByteRange;
use blockyard_storage::buffer::BufferPool;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::clock::{Clock, Moment};
use crate::error::{JobError, NodeError};
use crate::job::error_policy::{ErrorAction, OnError, Side, decide};
use crate::job::latency::Latency;
use crate::job::progress::Progress;
use crate::job::rates::Rates;
use crate::job::speed::RateLimit;
use crate::job::work::Stop;
use crate::request::CopyMode;

/// A job inside the engine; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobKey(pub u64);

/// How a job was asked to end early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CancelMode {
    /// Ready mirrors converge and end well; everything else as `Force`.
    Soft,
    /// As soon as possible.
    Force,
}

/// What manager and work share: orders one way, figures the other. Read and written without waiting.
#[derive(Debug, Default)]
pub struct JobShared {
    /// Bytes done and expected.
    pub progress: Progress,
    /// How long its requests take.
    pub latency: Latency,
    /// How fast its source changes, and how fast it is copied.
    pub rates: Rates,
    pause: AtomicBool,
    cancel: AtomicU8,
    complete: AtomicBool,
    speed: AtomicI64,
    write_blocking: AtomicBool,
    busy: AtomicBool,
    actively_synced: AtomicBool,
    changed: Notify,
}

impl JobShared {
    /// Orders for a job that is to run with this limit and copy mode.
    pub fn new(speed: i64, copy_mode: CopyMode) -> Self {
        let shared = Self::default();
        shared.speed.store(speed, Ordering::Release);
        shared
            .write_blocking
            .store(copy_mode == CopyMode::WriteBlocking, Ordering::Release);
        shared.busy.store(true, Ordering::Release);
        shared
    }

    /// Manager: be quiet, or go on.
    pub fn order_pause(&self, pause: bool) {
        self.pause.store(pause, Ordering::Release);
        self.changed.notify_one();
    }

    /// Manager: end early. A soft order never takes back a forced one.
    pub fn order_cancel(&self, mode: CancelMode) {
        let level = match mode {
            CancelMode::Soft => 1,
            CancelMode::Force => 2,
        };
        self.cancel.fetch_max(level, Ordering::AcqRel);
        self.changed.notify_one();
    }

    /// Manager: switch over and end.
    pub fn order_complete(&self) {
        self.complete.store(true, Ordering::Release);
        self.changed.notify_one();
    }

    /// Manager: new rate limit in bytes per second; 0: none.
    pub fn order_speed(&self, speed: i64) {
        self.speed.store(speed, Ordering::Release);
        self.changed.notify_one();
    }

    /// Manager: new copy mode.
    pub fn order_copy_mode(&self, mode: CopyMode) {
        self.write_blocking
            .store(mode == CopyMode::WriteBlocking, Ordering::Release);
        self.changed.notify_one();
    }

    /// Whether quiet is ordered.
    pub fn pause_ordered(&self) -> bool {
        self.pause.load(Ordering::Acquire)
    }

    /// Whether and how the job was asked to end early.
    pub fn cancel_ordered(&self) -> Option<CancelMode> {
        match self.cancel.load(Ordering::Acquire) {
            0 => None,
            1 => Some(CancelMode::Soft),
            _ => Some(CancelMode::Force),
        }
    }

    /// Whether the job was asked to switch over and end.
    pub fn complete_ordered(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Rate limit in bytes per second; 0: none.
    pub fn speed(&self) -> i64 {
        self.speed.load(Ordering::Acquire)
    }

    /// Copy mode now.
    pub fn copy_mode(&self) -> CopyMode {
        if self.write_blocking.load(Ordering::Acquire) {
            CopyMode::WriteBlocking
        } else {
            CopyMode::Background
        }
    }

    /// Whether the work has something in hand (not parked, idle or held by the rate limit).
    pub fn busy(&self) -> bool {
        self.busy.load(Ordering::Acquire)
    }

    /// Work: says whether it has something in hand.
    pub fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::Release);
    }

    /// Whether target and source are equal and writes keep them so.
    pub fn actively_synced(&self) -> bool {
        self.actively_synced.load(Ordering::Acquire)
    }

    /// Work: says whether target and source are equal and writes keep them so.
    pub fn set_actively_synced(&self, synced: bool) {
        self.actively_synced.store(synced, Ordering::Release);
    }
}

/// A durable point from which a job may go on after a crash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Everything in these ranges is durable on the target.
    pub done: Vec<ByteRange>,
}

/// What the work tells the manager. Each report is answered through its channel once its consequences are public.
#[derive(Debug)]
pub enum Report {
    /// Quiet, as ordered.
    Parked,
    /// Going on after quiet.
    Unparked,
    /// Source and target agree for the first time.
    Converged {
        /// Answered when the status says so.
        heard: oneshot::Sender<()>,
    },
    /// A read or write failed.
    IoError {
        /// On which side.
        side: Side,
        /// What is done about it.
        action: ErrorAction,
        /// Whether room was missing.
        no_space: bool,
        /// The failure, for logs.
        error: NodeError,
        /// Answered when the event is out and, for a stop, the pause is ordered.
        heard: oneshot::Sender<()>,
    },
    /// Everything up to the cursor is durable.
    Remember {
        /// The point.
        cursor: Cursor,
        /// Answered when it is recorded.
        recorded: oneshot::Sender<Result<(), JobError>>,
    },
    /// The work has returned.
    Ended(Result<(), Stop>),
}

/// The policies of one job for failed reads and writes.
#[derive(Clone, Copy, Debug, Default)]
pub struct ErrorPolicies {
    /// When reading fails.
    pub on_source_error: OnError,
    /// When writing fails.
    pub on_target_error: OnError,
}

/// All that running work may do to the world outside its nodes.
pub struct JobContext {
    key: JobKey,
    shared: Arc<JobShared>,
    reports: mpsc::UnboundedSender<(JobKey, Report)>,
    clock: Rc<dyn Clock>,
    pool: BufferPool,
    policies: ErrorPolicies,
    limit: RefCell<RateLimit>,
}

impl JobContext {
    /// The context of one job. The manager (or a test in its place) listens at the other end of `reports`.
    pub fn new(
        key: JobKey,
        shared: Arc<JobShared>,
        reports: mpsc::UnboundedSender<(JobKey, Report)>,
        clock: Rc<dyn Clock>,
        pool: BufferPool,
        policies: ErrorPolicies,
    ) -> Self {
        let speed = u64::try_from(shared.speed()).unwrap_or(0);
        Self {
            key,
            shared,
            reports,
            clock,
            pool,
            policies,
            limit: RateLimit::new(speed).into(),
        }
    }

    /// Bytes done and expected.
    pub fn progress(&self) -> &Progress {
        &self.shared.progress
    }

    /// How long its requests take.
    pub fn latency(&self) -> &Latency {
        &self.shared.latency
    }

    /// Orders as of now.
    pub fn orders(&self) -> &JobShared {
        &self.shared
    }

    /// The same, for somebody who goes on beside the work.
    pub fn shared(&self) -> Arc<JobShared> {
        Arc::clone(&self.shared)
    }

    /// Where transfer buffers come from.
    pub fn pool(&self) -> &BufferPool {
        &self.pool
    }

    /// The thread's time.
    pub fn clock(&self) -> &Rc<dyn Clock> {
        &self.clock
    }

    /// Whether the work must let what is in flight end and then call [`checkpoint`](Self::checkpoint).
    pub fn must_stop(&self) -> bool {
        self.shared.pause_ordered() || self.must_end()
    }

    /// Whether a cancel in force says to end now (soft cancels count unless `converging` work handles them itself).
    fn must_end(&self) -> bool {
        self.shared.cancel_ordered() == Some(CancelMode::Force)
    }

    /// A point where the work may be paused or cancelled: call it between chunks, with nothing in flight. Returns at once
    /// if nothing was ordered; while a pause is in force it stays here.
    ///
    /// # Errors
    /// [`Stop::Cancelled`] once a forced cancel is ordered; the work returns it.
    pub async fn checkpoint(&self) -> Result<(), Stop> {
        if self.shared.pause_ordered() && !self.must_end() {
            let was_busy = self.shared.busy();
            self.shared.set_busy(false);
            self.report(Report::Parked);
            while self.shared.pause_ordered() {
                self.shared.changed.notified().await;
            }
            self.shared.set_busy(was_busy);
            self.report(Report::Unparked);
        }
        if self.must_end() {
            Err(Stop::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Ends when any order has changed since the last call; for work that waits for something else as well. At most one
    /// caller a job waits at a time.
    pub async fn orders_changed(&self) {
        self.shared.changed.notified().await;
    }

    /// Until when the rate limit holds back the next request; `None`: not at all.
    pub fn held_until(&self) -> Option<Moment> {
        let mut limit = self.limit.borrow_mut();
        limit.set_speed(u64::try_from(self.shared.speed()).unwrap_or(0));
        limit.wait_until(self.clock.now())
    }

    /// Counts `bytes` against the rate limit.
    pub fn charge(&self, bytes: u64) {
        self.limit.borrow_mut().charge(bytes);
    }

    /// Largest request that keeps to the rate limit, in bytes.
    pub fn chunk_bytes(&self, granularity: u64, chunk_max_bytes: u64) -> u64 {
        let mut limit = self.limit.borrow_mut();
        limit.set_speed(u64::try_from(self.shared.speed()).unwrap_or(0));
        limit.chunk_bytes(granularity, chunk_max_bytes)
    }

    /// Waits until `moment`, or until an order changes, whichever is first. Not busy meanwhile.
    pub async fn rest_until(&self, moment: Moment) {
        self.shared.set_busy(false);
        let timer = self.clock.sleep_until(moment);
        let changed = std::pin::pin!(self.shared.changed.notified());
        futures_util::future::select(timer, changed).await;
        self.shared.set_busy(true);
    }

    /// Says that source and target agree. Returns when clients can see it.
    pub async fn converged(&self) {
        let (heard, answer) = oneshot::channel();
        self.report(Report::Converged { heard });
        let _ = answer.await;
    }

    /// Decides by the job's policy what to do about a failed request, and lets clients know. After
    /// [`ErrorAction::Stop`] a pause is in force: let what is in flight end, then call
    /// [`checkpoint`](Self::checkpoint), then try again. After [`ErrorAction::Ignore`] try again too, but not at once.
    pub async fn on_error(&self, side: Side, error: &NodeError) -> ErrorAction {
        let policy = match side {
            Side::Source => self.policies.on_source_error,
            Side::Target => self.policies.on_target_error,
        };
        let action = decide(policy, error.is_no_space());
        let (heard, answer) = oneshot::channel();
        self.report(Report::IoError {
            side,
            action,
            no_space: error.is_no_space(),
            error: error.clone(),
            heard,
        });
        let _ = answer.await;
        action
    }

    /// Records that everything up to `cursor` is durable on the target; call it only when that is so.
    pub async fn remember(&self, cursor: Cursor) -> Result<(), Stop> {
        let (recorded, answer) = oneshot::channel();
        self.report(Report::Remember { cursor, recorded });
        match answer.await {
            Ok(outcome) => outcome.map_err(Stop::Failed),
            Err(_) => Ok(()),
        }
    }

    /// The manager outlives its jobs; when it is gone the daemon is ending, and nobody is left to hear.
    fn report(&self, report: Report) {
        let _ = self.reports.send((self.key, report));
    }
}
