//! The copier: many ranges in flight, bounded, paced, errors by policy. The one piece of code that moves a job's bytes.
//!
//! Ranges are issued in ascending order and may end in any order. Pause and cancel stop the issuing at once; what is in
//! flight ends first, and the window shrinks when requests are slow, so that this takes a fraction of a second.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use blockyard_storage::buffer::BUFFER_SLOT_BYTES;
use blockyard_storage::{Buffer, ByteRange, LocalFuture, ZeroMode};
use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};

use crate::clock::Moment;
use crate::error::{JobError, NodeError};
use crate::job::context::{Cursor, JobContext};
use crate::job::error_policy::{ErrorAction, Side};
use crate::job::work::Stop;
use crate::jobs::plan::{Layers, Plan, Step, StepKind};
use crate::node::Node;

/// Requests in flight at first, before it is known how slow they are.
const WINDOW_START: usize = 4;

/// A request slower than this shrinks the window.
const SLOW: Duration = Duration::from_millis(100);

/// After an ignored error the next try waits this long at first, and twice as long each further time.
const IGNORE_DELAY: Duration = Duration::from_millis(10);

/// Longest wait after an ignored error.
const IGNORE_DELAY_MAX: Duration = Duration::from_secs(1);

/// Bytes between two durable points, if nothing else is wanted.
pub(crate) const REMEMBER_BYTES: u64 = 1 << 30;

/// How one job copies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyOptions {
    /// Requests in flight at most.
    pub(crate) window_max: usize,
    /// What of the source is copied.
    pub(crate) layers: Layers,
    /// What the target keeps together, in bytes, a power of two.
    pub(crate) unit_bytes: u64,
    /// Units are written compressed, one or more at a time.
    pub(crate) compress: bool,
    /// Bytes per request at most.
    pub(crate) chunk_max_bytes: u64,
    /// Pieces are multiples of this where the rate limit cuts them.
    pub(crate) granularity_bytes: u64,
    /// Zeroed ranges of the target may become holes.
    pub(crate) may_unmap: bool,
    /// Zero requests do not count against the rate limit.
    pub(crate) zeroes_are_free: bool,
    /// Several failures of one round count as one.
    pub(crate) one_error_a_round: bool,
    /// Bytes between two durable points.
    pub(crate) remember_bytes: u64,
}

/// How one range ended.
struct Ended {
    step: Step,
    took: Duration,
    outcome: Result<(), Failure>,
}

/// Why one range was not copied.
enum Failure {
    /// A request failed.
    Io(Side, NodeError),
    /// Its extents cannot be shared; nothing is wrong with copying it.
    NotShared,
}

type Window<'a> = FuturesUnordered<LocalFuture<'a, Ended>>;

/// Copies ranges of one node to another.
pub(crate) struct Copier {
    source: Rc<dyn Node>,
    target: Rc<dyn Node>,
    options: CopyOptions,
    plan: Plan,
    retry: VecDeque<Step>,
    window_now: usize,
    ignored_in_a_row: u32,
    hold_until: Option<Moment>,
    in_flight: Vec<ByteRange>,
    remembered_bytes: u64,
}

impl Copier {
    /// A copier of the whole of `source` onto `target`, which is as long.
    pub(crate) fn new(source: Rc<dyn Node>, target: Rc<dyn Node>, options: CopyOptions) -> Self {
        let length = source.facts().length_bytes;
        let plan = Plan::new(
            ByteRange::new(0, length),
            options.layers,
            options.unit_bytes,
        );
        Self {
            source,
            target,
            window_now: options.window_max.clamp(1, WINDOW_START),
            options,
            plan,
            retry: VecDeque::new(),
            ignored_in_a_row: 0,
            hold_until: None,
            in_flight: Vec::new(),
            remembered_bytes: 0,
        }
    }

    /// Copies everything. When it returns nothing is in flight; on success everything is on the target and durable.
    ///
    /// # Errors
    /// [`Stop::Cancelled`] after a forced cancel; [`Stop::Failed`] with the error that the policy reports.
    pub(crate) async fn run(&mut self, cx: &JobContext) -> Result<(), Stop> {
        self.copy_all(cx).await?;
        self.flush(cx).await
    }

    /// Makes what was copied durable, with the policy for writes.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(crate) async fn flush(&mut self, cx: &JobContext) -> Result<(), Stop> {
        while !self.flush_target(cx).await? {}
        Ok(())
    }

    async fn copy_all(&mut self, cx: &JobContext) -> Result<(), Stop> {
        // The window borrows only clones of the nodes, so that `self` stays free.
        let (source, target) = (self.source.clone(), self.target.clone());
        let mut window: Window<'_> = FuturesUnordered::new();
        let mut failed: Option<Stop> = None;
        let mut round_error: Option<(Side, NodeError)> = None;
        loop {
            let stopping = failed.is_some() || round_error.is_some() || cx.must_stop();
            if stopping && window.is_empty() {
                if let Some((side, error)) = round_error.take() {
                    failed = self.by_policy(cx, side, error).await;
                    continue;
                }
                if let Some(stop) = failed {
                    return Err(stop);
                }
                cx.checkpoint().await?;
                continue;
            }
            let mut wait_until = None;
            // Planning takes its time: an order may come meanwhile.
            while !stopping && !cx.must_stop() && window.len() < self.window_now {
                wait_until = self.held_until(cx);
                if wait_until.is_some() {
                    break;
                }
                let Some(step) = self.next_step(cx).await else {
                    break;
                };
                if step.kind == StepKind::Skip {
                    cx.progress().decrease_remaining(step.range.length());
                    continue;
                }
                if !(self.options.zeroes_are_free && step.kind == StepKind::Zero) {
                    cx.charge(step.range.length());
                }
                self.in_flight.push(step.range);
                window.push(carry_out(step, &*source, &*target, cx, self.options));
            }
            if window.is_empty() {
                match wait_until {
                    Some(moment) => cx.rest_until(moment).await,
                    None if round_error.is_none() && failed.is_none() && self.is_done() => {
                        return Ok(());
                    }
                    None => {}
                }
                continue;
            }
            let Some(ended) = self.wait(cx, &mut window, wait_until, stopping).await else {
                continue;
            };
            self.forget_in_flight(ended.step.range);
            match ended.outcome {
                Ok(()) => {
                    self.ignored_in_a_row = 0;
                    cx.progress().done(ended.step.range.length());
                    cx.latency().count(ended.took);
                    self.adapt(ended.took);
                    self.plan.took(ended.step.kind, ended.took);
                    if failed.is_none() {
                        failed = self.remember(cx).await.err();
                    }
                }
                Err(Failure::NotShared) => self.plan.give_back_unshared(ended.step.range),
                Err(Failure::Io(side, error)) => {
                    self.retry.push_back(ended.step);
                    if self.options.one_error_a_round {
                        round_error.get_or_insert((side, error));
                    } else if failed.is_none() {
                        failed = self.by_policy(cx, side, error).await;
                    }
                }
            }
        }
    }

    /// Waits for the end of a range, the end of a hold, or an order.
    async fn wait(
        &self,
        cx: &JobContext,
        window: &mut Window<'_>,
        until: Option<Moment>,
        stopping: bool,
    ) -> Option<Ended> {
        if stopping {
            return window.next().await;
        }
        let orders = std::pin::pin!(cx.orders_changed());
        let timer = match until {
            Some(moment) => cx.clock().sleep_until(moment),
            None => Box::pin(std::future::pending()),
        };
        match select(window.next(), select(timer, orders)).await {
            Either::Left((ended, _)) => ended,
            Either::Right(_) => None,
        }
    }

    fn held_until(&mut self, cx: &JobContext) -> Option<Moment> {
        if let Some(moment) = self.hold_until {
            if moment > cx.clock().now() {
                return Some(moment);
            }
            self.hold_until = None;
        }
        cx.held_until()
    }

    async fn next_step(&mut self, cx: &JobContext) -> Option<Step> {
        if let Some(step) = self.retry.pop_front() {
            return Some(step);
        }
        let options = self.options;
        let chunk = |longest: u64| cx.chunk_bytes(options.granularity_bytes, longest);
        self.plan
            .next(
                &self.source,
                &*self.target,
                options.chunk_max_bytes,
                options.zeroes_are_free,
                chunk,
            )
            .await
    }

    fn is_done(&self) -> bool {
        self.retry.is_empty() && self.plan.is_done()
    }

    /// Asks the policy; what the job has to end with, if it has to.
    async fn by_policy(&mut self, cx: &JobContext, side: Side, error: NodeError) -> Option<Stop> {
        match cx.on_error(side, &error).await {
            ErrorAction::Report => Some(Stop::Failed(JobError::from(error))),
            ErrorAction::Stop => None,
            ErrorAction::Ignore => {
                let delay = IGNORE_DELAY * 2_u32.saturating_pow(self.ignored_in_a_row.min(10));
                self.ignored_in_a_row += 1;
                let delay = delay.min(IGNORE_DELAY_MAX);
                self.hold_until = Some(cx.clock().now().after(delay));
                None
            }
        }
    }

    /// Slow requests make the window smaller, quick ones larger again.
    fn adapt(&mut self, took: Duration) {
        if took > SLOW {
            self.window_now = (self.window_now - 1).max(1);
        } else if took < SLOW / 2 && self.window_now < self.options.window_max {
            self.window_now += 1;
        }
    }

    fn forget_in_flight(&mut self, range: ByteRange) {
        if let Some(place) = self.in_flight.iter().position(|other| *other == range) {
            self.in_flight.swap_remove(place);
        }
    }

    /// Everything before this offset is on the target.
    fn low_water(&self) -> u64 {
        let retried = self.retry.iter().map(|step| step.range.offset());
        let flying = self.in_flight.iter().map(ByteRange::offset);
        retried
            .chain(flying)
            .min()
            .unwrap_or(u64::MAX)
            .min(self.plan.position())
    }

    /// Makes a durable point when enough was copied since the last one.
    async fn remember(&mut self, cx: &JobContext) -> Result<(), Stop> {
        let low_water = self.low_water();
        if low_water < self.remembered_bytes + self.options.remember_bytes {
            return Ok(());
        }
        if self.target.flush().await.is_err() {
            // The failure is the target's for good; the last flush reports it.
            return Ok(());
        }
        self.remembered_bytes = low_water;
        cx.remember(Cursor {
            done: vec![ByteRange::new(0, low_water)],
        })
        .await
    }

    /// Makes the copy durable; `false`: it failed and is to be tried again.
    async fn flush_target(&mut self, cx: &JobContext) -> Result<bool, Stop> {
        let Err(error) = self.target.flush().await else {
            return Ok(true);
        };
        if let Some(stop) = self.by_policy(cx, Side::Target, error).await {
            return Err(stop);
        }
        while let Some(moment) = self.hold_until.take() {
            while !cx.must_stop() && cx.clock().now() < moment {
                cx.rest_until(moment).await;
            }
        }
        cx.checkpoint().await?;
        Ok(false)
    }
}

/// Carries one step out.
fn carry_out<'a>(
    step: Step,
    source: &'a dyn Node,
    target: &'a dyn Node,
    cx: &'a JobContext,
    options: CopyOptions,
) -> LocalFuture<'a, Ended> {
    Box::pin(async move {
        let start = cx.clock().now();
        let outcome = match step.kind {
            StepKind::Copy if options.compress => {
                compress(step.range, source, target, cx, options.unit_bytes).await
            }
            StepKind::Copy => copy(step.range, source, target, cx).await,
            StepKind::Zero => zero(step.range, target, options.may_unmap)
                .await
                .map_err(|error| Failure::Io(Side::Target, error)),
            StepKind::Share => share(step.range, source, target).await,
            StepKind::Skip => Ok(()),
        };
        Ended {
            step,
            took: cx.clock().now().since(start),
            outcome,
        }
    })
}

/// Reads and writes one range, in pieces of a buffer slot.
async fn copy(
    range: ByteRange,
    source: &dyn Node,
    target: &dyn Node,
    cx: &JobContext,
) -> Result<(), Failure> {
    let mut rest = range;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(BUFFER_SLOT_BYTES as u64);
        rest = after;
        let length = usize::try_from(piece.length()).unwrap_or(usize::MAX);
        let buffer = cx.pool().take(length).await;
        let read = source.read(piece.offset(), buffer).await;
        read.outcome
            .map_err(|error| Failure::Io(Side::Source, error))?;
        let written = target.write(piece.offset(), read.buffer).await;
        written
            .outcome
            .map_err(|error| Failure::Io(Side::Target, error))?;
    }
    Ok(())
}

/// Reads one range and writes it compressed, in pieces of whole units.
async fn compress(
    range: ByteRange,
    source: &dyn Node,
    target: &dyn Node,
    cx: &JobContext,
    unit_bytes: u64,
) -> Result<(), Failure> {
    for piece in range.pieces(unit_bytes.max(BUFFER_SLOT_BYTES as u64)) {
        let length = usize::try_from(piece.length()).unwrap_or(usize::MAX);
        let buffer = match length <= BUFFER_SLOT_BYTES {
            true => cx.pool().take(length).await,
            // The longest clusters are two slots long, and have to be written as a whole.
            false => Buffer::zeroed(length),
        };
        let read = source.read(piece.offset(), buffer).await;
        read.outcome
            .map_err(|error| Failure::Io(Side::Source, error))?;
        let written = target.write_compressed(piece.offset(), read.buffer).await;
        written
            .outcome
            .map_err(|error| Failure::Io(Side::Target, error))?;
    }
    Ok(())
}

/// Makes one range of the target read as zeroes, leaving alone what does already and will: holes stay holes.
async fn zero(range: ByteRange, target: &dyn Node, may_unmap: bool) -> Result<(), NodeError> {
    let mode = ZeroMode {
        may_unmap,
        no_fallback: false,
    };
    let mut rest = range;
    while !rest.is_empty() {
        let answer = target.status(rest, crate::limits::STATUS_EXTENTS_MAX).await;
        let extents = answer.unwrap_or_else(|error| {
            tracing::debug!(%error, "what the target holds is not known, it is zeroed");
            Vec::new()
        });
        let mut covered = rest.offset();
        for extent in extents {
            let stays = extent.allocated || !target.names_backing();
            if !extent.zero || !stays {
                target.zero(extent.range, mode).await?;
            }
            covered = extent.range.end();
        }
        if covered <= rest.offset() {
            // A node that says nothing is taken at its word: nothing is known to be zero.
            return target.zero(rest, mode).await;
        }
        rest = ByteRange::between(covered, rest.end());
    }
    Ok(())
}

/// Shares one range. Whatever goes wrong, copying tells better what it is.
async fn share(range: ByteRange, source: &dyn Node, target: &dyn Node) -> Result<(), Failure> {
    let Some((file, offset)) = source.host_extent(range) else {
        return Err(Failure::NotShared);
    };
    target.share(file, offset, range).await.map_err(|error| {
        tracing::debug!(%error, "extents cannot be shared, bytes are copied");
        Failure::NotShared
    })
}
