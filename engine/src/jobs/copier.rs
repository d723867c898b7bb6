//! The copier: many ranges in flight, bounded, paced, errors by policy. The one piece of code that moves a job's bytes.
//!
//! Ranges are issued in ascending order and may end in any order. Pause and cancel stop the issuing at once; what is in
//! flight ends first, and the window shrinks when requests are slow for waiting for each other, so that this takes a fraction of a
//! second, or as long as one request.

use std::future::pending;
use std::pin::pin;
use std::rc::Rc;

use blockyard_storage::{ByteRange, LocalFuture};
use futures_util::future::select;

use crate::clock::Moment;
use crate::error::{JobError, NodeError};
use crate::job::context::{Cursor, JobContext};
use crate::job::error_policy::{ErrorAction, Side};
use crate::job::work::Stop;
use crate::jobs::back_off::BackOff;
use crate::jobs::changes::{Changes, Goal};
pub(crate) use crate::jobs::copy_options::{CopyOptions, REMEMBER_BYTES, WindowLimits};
use crate::jobs::in_flight::{
    Ended, Window, begun, carried_out, give_way, in_its_turn, saved, timed,
};
use crate::jobs::plan::{Layers, Plan, Step, StepKind};
use crate::jobs::steps::Failure;
use crate::jobs::verifying::Verification;
use crate::jobs::window_size::WindowSize;
use crate::manifest::{EXTENT_BYTES, Recorder};
use crate::node::Node;
use crate::node::copy_before_write::{Fate, Saver};
use crate::node::mirror_top::Tracker;
use crate::node::turns::{Doing, Turn};

/// Ranges that need nothing, after which other tasks have their turn.
const SKIPPED_IN_A_ROW: usize = 64;

/// Copies ranges of one node to another.
pub(crate) struct Copier {
    source: Rc<dyn Node>,
    target: Rc<dyn Node>,
    options: CopyOptions,
    plan: Plan,
    back_off: BackOff,
    window_size: WindowSize,
    in_flight: Vec<ByteRange>,
    remembered_bytes: u64,
    /// What has come over since the last durable point, wherever it is: of a long disk it may be little.
    moved_bytes: u64,
    /// The first error that was ignored for good.
    left_out: Option<JobError>,
    skipped_in_a_row: usize,
    changes: Option<Changes>,
    /// What is planned was never copied before.
    is_first: bool,
    saver: Option<Rc<Saver>>,
    recorder: Option<Rc<Recorder>>,
    /// Behind the last run of what is to be saved, if only that is looked at.
    unsaved_from: Option<u64>,
}

impl Copier {
    /// A copier of the whole of `source` onto `target`, which is as long.
    pub(crate) fn new(source: Rc<dyn Node>, target: Rc<dyn Node>, options: CopyOptions) -> Self {
        let all = ByteRange::new(0, source.facts().length_bytes);
        Self::of(all, source, target, options)
    }

    /// A copier of `range`, whose ends are multiples of all units or the end of the target.
    pub(crate) fn of(
        range: ByteRange,
        source: Rc<dyn Node>,
        target: Rc<dyn Node>,
        options: CopyOptions,
    ) -> Self {
        let plan = Plan::new(range, options.layers, options.unit_bytes);
        Self {
            source,
            target,
            window_size: WindowSize::new(options.window, options.chunk_max_bytes),
            options,
            plan,
            back_off: BackOff::default(),
            in_flight: Vec::new(),
            remembered_bytes: 0,
            moved_bytes: 0,
            left_out: None,
            skipped_in_a_row: 0,
            changes: None,
            is_first: true,
            saver: None,
            recorder: None,
            unsaved_from: None,
        }
    }

    /// Tells `recorder` what is read, in whole extents, and reads back what it wants to be read back.
    pub(crate) fn recording(self, recorder: Option<Rc<Recorder>>) -> Self {
        let Some(known) = &recorder else {
            return self;
        };
        Self {
            plan: self.plan.in_units(EXTENT_BYTES, known.needs_every_byte()),
            recorder,
            ..self
        }
    }

    /// Copies what is still to be saved before it may change, while the filter above the source saves some of it. What either has
    /// copied counts there. There are no durable points once somebody has written.
    pub(crate) fn beside(self, saver: Rc<Saver>) -> Self {
        Self {
            plan: self.plan.beside_writers(saver.clusters().cluster_bytes()),
            saver: Some(saver),
            ..self
        }
    }

    /// Looks at nothing but what is to be saved when it begins: time follows that, and not the length of the disk.
    pub(crate) fn by_what_is_unsaved(mut self) -> Self {
        self.plan.add(ByteRange::default());
        Self {
            unsaved_from: Some(0),
            ..self
        }
    }

    /// Copies what `tracker` says has changed as well. Durable points are none any more then: nobody would know after a crash
    /// what has changed since.
    pub(crate) fn with_changes(self, tracker: Rc<Tracker>) -> Self {
        let changes = Some(Changes::new(tracker));
        Self { changes, ..self }
    }

    /// How far it has to come from now on.
    pub(crate) fn aim(&mut self, goal: Goal) {
        if let Some(changes) = &mut self.changes {
            changes.aim(goal);
        }
    }

    /// Copies until everything is copied, and of what has changed no more is left than `goal` says; `false`: it stopped before,
    /// as [`Goal::holds_writers`] wants. When it returns nothing is in flight.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(crate) async fn copy_to(&mut self, cx: &JobContext, goal: Goal) -> Result<bool, Stop> {
        self.aim(goal);
        let whole = self.copy_all(cx).await?;
        if let Some(changes) = &self.changes {
            changes.count(cx);
        }
        Ok(whole)
    }

    /// Ends when the rates of the job tell something new although nothing happens; never, if nobody writes.
    pub(crate) async fn until_measured(&mut self, cx: &JobContext) {
        let next = self.changes.as_ref();
        match next.and_then(|changes| changes.next_measure(cx)) {
            Some(moment) => cx.clock().sleep_until(moment).await,
            None => std::future::pending().await,
        }
        if let Some(changes) = &mut self.changes {
            changes.measure(cx);
        }
    }

    /// Copies everything. When it returns nothing is in flight; on success everything is on the target and durable.
    ///
    /// # Errors
    /// [`Stop::Cancelled`] after a forced cancel; [`Stop::Failed`] with the error that the policy reports.
    pub(crate) async fn run(&mut self, cx: &JobContext) -> Result<(), Stop> {
        self.copy_all(cx).await?;
        self.check_whole()?;
        self.flush(cx).await?;
        self.verify(cx).await.map(drop)
    }

    /// Reads back what was copied, if that is wanted, and is not known to be right; it is durable by now. `false`: it stopped
    /// before, as [`Goal::holds_writers`] wants.
    ///
    /// # Errors
    /// What differs; else as [`run`](Self::run).
    pub(crate) async fn verify(&self, cx: &JobContext) -> Result<bool, Stop> {
        let Some(recorder) = self.recorder.as_deref() else {
            return Ok(true);
        };
        let verification = Verification {
            recorder,
            target: &self.target,
            tracker: self.changes.as_ref().map(|changes| &*changes.tracker),
            cx,
            holds_writers: self.holds_writers(),
        };
        verification.run().await
    }

    /// Makes durable what is to be read back, and reads it back.
    ///
    /// # Errors
    /// As [`verify`](Self::verify).
    pub(crate) async fn flush_and_verify(&self, cx: &JobContext) -> Result<bool, Stop> {
        let recorder = self.recorder.as_ref();
        if recorder.is_none_or(|recorder| !recorder.has_unverified()) {
            return Ok(true);
        }
        let flushed = self.target.flush().await;
        flushed.map_err(|error| Stop::Failed(JobError::from(error)))?;
        self.verify(cx).await
    }

    /// Whether something has to be read back before more is copied.
    fn must_verify(&self) -> bool {
        let recorder = self.recorder.as_ref();
        recorder.is_some_and(|recorder| recorder.is_full())
    }

    /// # Errors
    /// The first error that something was left out for.
    fn check_whole(&self) -> Result<(), Stop> {
        match &self.left_out {
            None => Ok(()),
            Some(error) => Err(Stop::Failed(error.clone())),
        }
    }

    /// Makes what was copied durable, with the policy for writes.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(crate) async fn flush(&mut self, cx: &JobContext) -> Result<(), Stop> {
        let target = self.target.clone();
        self.until_done(cx, async || target.flush().await).await
    }

    /// Changes something of the target, with the policy for writes. Nothing may be in flight.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(crate) async fn until_done(
        &mut self,
        cx: &JobContext,
        change: impl AsyncFn() -> Result<(), NodeError>,
    ) -> Result<(), Stop> {
        while let Err(error) = change().await {
            self.before_next_try(cx, error).await?;
        }
        Ok(())
    }

    /// `false`: it stopped because writers wait.
    async fn copy_all(&mut self, cx: &JobContext) -> Result<bool, Stop> {
        // The window borrows only clones of the nodes, so that `self` stays free.
        let (source, target) = (self.source.clone(), self.target.clone());
        let mut window = Window::default();
        let mut failed: Option<Stop> = None;
        let mut round_error: Option<(ByteRange, Side, NodeError)> = None;
        let mut interrupted = false;
        loop {
            if let (Some(error), None) = (self.broken(), &failed) {
                failed = Some(Stop::Failed(error));
            }
            let failure = self.changes.as_mut().and_then(|changes| changes.look(cx));
            if let (Some(error), None) = (failure, &failed) {
                // What it has not written is copied in any case, and no try of the job's own has failed: nothing waits for it.
                let action = cx.on_error(Side::Target, &error).await;
                failed = (action == ErrorAction::Report).then(|| Stop::Failed(error.into()));
            }
            let stopping =
                failed.is_some() || round_error.is_some() || interrupted || cx.must_stop();
            let stopping = stopping || self.must_verify();
            if stopping {
                self.window_size.interrupted();
            }
            if stopping && window.is_empty() {
                if let Some((range, side, error)) = round_error.take() {
                    failed = self.by_policy(cx, range, side, error).await;
                    continue;
                }
                if let Some(stop) = failed {
                    return Err(stop);
                }
                if self.must_verify() && !interrupted && !cx.must_stop() {
                    failed = self.flush_and_verify(cx).await.err();
                    continue;
                }
                if self.holds_writers() {
                    return Ok(false);
                }
                cx.checkpoint().await?;
                if let Some(changes) = &self.changes {
                    changes.forget_failures();
                }
                continue;
            }
            let mut wait_until = None;
            let may_begin =
                window.len() + self.window_size.handful() <= self.window_size.requests();
            // Planning takes its time: an order may come meanwhile.
            while may_begin
                && !stopping
                && !cx.must_stop()
                && window.len() < self.window_size.requests()
                && !self.must_verify()
            {
                wait_until = self.held_until(cx);
                if wait_until.is_some() {
                    self.window_size.interrupted();
                    break;
                }
                let Some(step) = window.beside(self.next_step(cx)).await else {
                    break;
                };
                if step.kind == StepKind::Skip {
                    self.skip(cx, step.range).await;
                    continue;
                }
                if !(self.options.zeroes_are_free && step.kind == StepKind::Zero) {
                    cx.charge(step.range.length());
                }
                self.in_flight.push(step.range);
                let now = cx.clock().now();
                self.window_size.begun(now, step.counted_bytes());
                if let Some(saver) = self.saver.clone() {
                    let nodes = (&source, &*target);
                    let how = (self.options, self.recorder.clone());
                    let step = Box::pin(saved(saver, step, nodes, cx, how));
                    window.push(match self.unsaved_from {
                        None => step,
                        Some(_) => begun(step).await,
                    });
                    continue;
                }
                let turn = self.begin(step);
                let nodes = (&source, &*target);
                let outcome = carried_out(step, nodes, cx, self.options, self.recorder.clone());
                let outcome = timed(step, outcome, cx);
                window.push(match turn {
                    None => Box::pin(outcome),
                    Some(turn) => begun(Box::pin(in_its_turn(turn, outcome))).await,
                });
            }
            if window.is_empty() {
                match wait_until {
                    Some(moment) => cx.rest_until(moment).await,
                    None if round_error.is_none() && failed.is_none() && self.is_done() => {
                        return Ok(true);
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
                    self.back_off.copied(ended.step.range);
                    if self.saver.is_none() {
                        cx.progress().done(ended.step.range.length());
                    }
                    cx.latency().count(ended.took);
                    self.measure(cx, &ended, window.len());
                    self.moved_bytes += ended.step.range.length();
                    self.plan.took(ended.step.kind, ended.took, ended.waited);
                    if failed.is_none() {
                        failed = window.beside(self.remember(cx)).await.err();
                    }
                }
                Err(Failure::NotShared) => {
                    self.window_size.interrupted();
                    self.plan.give_back_unshared(ended.step.range);
                    self.tell_planned(false);
                }
                Err(Failure::Io(side, error)) => {
                    self.window_size.interrupted();
                    interrupted = self.holds_writers();
                    match &self.changes {
                        // It may have changed by the time that it is tried again.
                        Some(changes) => changes.give_back(cx, ended.step.range),
                        None => self.back_off.failed(ended.step, cx.clock().now()),
                    }
                    if self.options.one_error_a_round {
                        round_error.get_or_insert((ended.step.range, side, error));
                    } else if failed.is_none() {
                        let range = ended.step.range;
                        failed = self.by_policy(cx, range, side, error).await;
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
            return window.next_unless(pending::<()>()).await;
        }
        let broken: LocalFuture<'_, ()> = match &self.saver {
            Some(saver) => Box::pin(saver.changed()),
            None => Box::pin(pending()),
        };
        let orders = pin!(cx.orders_changed());
        let orders = select(orders, broken);
        let timer = match until {
            Some(moment) => cx.clock().sleep_until(moment),
            None => Box::pin(pending()),
        };
        window.next_unless(select(timer, orders)).await
    }

    /// Begins a step, which has its place among the writers from now on.
    fn begin(&self, step: Step) -> Option<Turn> {
        let changes = self.changes.as_ref()?;
        let doing = match step.kind {
            StepKind::Zero => Doing::CopyKnown,
            _ => Doing::Copy,
        };
        let turn = changes.tracker.turn(step.range, doing);
        self.tell_planned(false);
        Some(turn)
    }

    /// Writers have to know what is planned by what was known before; where it looks, any of what is planned may be.
    fn tell_planned(&self, is_looking: bool) {
        if let Some(changes) = &self.changes {
            let (planned, known) = (self.plan.planned(), self.plan.looked_at());
            let looked_at = if is_looking { planned } else { known };
            changes.tracker.set_planned(planned, looked_at);
        }
    }

    /// Whether a step that has been planned fits no more, as somebody has written there on both sides since; it is planned anew then, or,
    /// where that has come to the same too often, what was written is copied once more.
    fn is_overtaken(&mut self, step: Step, looks: usize) -> bool {
        let changes = self
            .changes
            .as_ref()
            .filter(|_| step.kind == StepKind::Zero);
        let is_overtaken = changes.is_some_and(|changes| changes.overtake(step.range, looks));
        if is_overtaken {
            self.plan.look_again(step.range);
        }
        is_overtaken
    }

    /// Why what the filter above the source has saved is worth nothing.
    fn broken(&self) -> Option<JobError> {
        let saved = self.saver.as_ref().and_then(|saver| saver.broken());
        let recorded = || {
            self.recorder
                .as_ref()
                .and_then(|recorder| recorder.failure())
        };
        saved.map(JobError::from).or_else(recorded)
    }

    fn holds_writers(&self) -> bool {
        self.changes.as_ref().is_some_and(Changes::holds_writers)
    }

    /// Whether there is something to begin that has not failed.
    fn has_others(&self) -> bool {
        !self.back_off.is_full() && (!self.plan.is_done() || self.next_unsaved().is_some())
    }

    fn held_until(&self, cx: &JobContext) -> Option<Moment> {
        let now = cx.clock().now();
        let held = self.back_off.held_until(now);
        let held = held.or_else(|| match self.back_off.due(now) {
            Some(due) if !self.has_others() => Some(due),
            _ => None,
        });
        if held.is_some() {
            return held;
        }
        // Whoever waits for the copy has written at his own speed.
        match self.holds_writers() {
            true => None,
            false => cx.held_until(),
        }
    }

    async fn next_step(&mut self, cx: &JobContext) -> Option<Step> {
        if !self.back_off.is_empty() {
            let beside_others = self.has_others();
            let step = self.back_off.next(cx.clock().now(), beside_others);
            if step.is_some() {
                return step;
            }
        }
        let whole_bytes = self.recorder.as_ref().map_or(1, |_| EXTENT_BYTES);
        let unit_bytes = self.options.unit_bytes.max(whole_bytes);
        if self.plan.is_done()
            && let Some(changes) = &mut self.changes
            && let Some(run) = changes.next_run(cx, unit_bytes)
        {
            self.plan.add(run);
            self.is_first = false;
            self.window_size.follow_writers();
        }
        if self.plan.is_done()
            && let Some(run) = self.next_unsaved()
        {
            self.plan.add(run);
            self.unsaved_from = Some(run.end());
        }
        let options = self.options;
        let is_paced = !self.holds_writers();
        let chunk = |longest: u64| match is_paced {
            true => cx.chunk_bytes(options.granularity_bytes, longest),
            false => longest,
        };
        let mut looks = 1;
        let step = loop {
            self.tell_planned(true);
            let next = self.plan.next(
                &self.source,
                &*self.target,
                options.chunk_max_bytes,
                options.zeroes_are_free,
                chunk,
            );
            let next = next.await;
            let step = next?;
            if !self.is_overtaken(step, looks) {
                break step;
            }
            looks += 1;
        };
        let skips = options.skips_first_zeroes && self.is_first && step.kind == StepKind::Zero;
        if let (true, Some(recorder)) = (skips, &self.recorder) {
            recorder.zeroes(step.range).await;
        }
        let kind = if skips { StepKind::Skip } else { step.kind };
        Some(Step { kind, ..step })
    }

    /// What is to be saved next, if only that is looked at.
    fn next_unsaved(&self) -> Option<ByteRange> {
        let from = self.unsaved_from?;
        if from >= self.source.facts().length_bytes {
            return None;
        }
        let rest = ByteRange::between(from, u64::MAX);
        self.saver.as_ref()?.clusters().first_unsaved(rest)
    }

    async fn skip(&mut self, cx: &JobContext, range: ByteRange) {
        match &self.saver {
            Some(saver) => saver.settle(range, Fate::Skipped),
            None if self.options.counts_skipped => cx.progress().done(range.length()),
            None => cx.progress().decrease_remaining(range.length()),
        }
        self.skipped_in_a_row += 1;
        if self.skipped_in_a_row == SKIPPED_IN_A_ROW {
            self.skipped_in_a_row = 0;
            give_way().await;
        }
    }

    fn is_done(&self) -> bool {
        let changes = self.changes.as_ref();
        self.back_off.is_empty()
            && self.plan.is_done()
            && self.next_unsaved().is_none()
            && changes.is_none_or(|changes| !changes.wants_more())
    }

    /// Asks the policy about `range`, which is to be tried again; what the job has to end with, if it has to.
    async fn by_policy(
        &mut self,
        cx: &JobContext,
        range: ByteRange,
        side: Side,
        error: NodeError,
    ) -> Option<Stop> {
        match cx.on_error(side, &error).await {
            ErrorAction::Report => Some(Stop::Failed(JobError::from(error))),
            ErrorAction::Stop => None,
            ErrorAction::Ignore if self.options.leaves_out_ignored => {
                self.back_off.leave_out(range);
                cx.progress().done(range.length());
                self.left_out.get_or_insert(JobError::from(error));
                None
            }
            ErrorAction::Ignore => {
                self.back_off.ignored(range, cx.clock().now());
                None
            }
        }
    }

    /// Learns from a range that has ended how many there should be in flight; so many are left.
    fn measure(&mut self, cx: &JobContext, ended: &Ended, left: usize) {
        let was_full = left + self.window_size.handful() >= self.window_size.requests();
        self.window_size.took(ended.took);
        match ended.step.kind {
            StepKind::Copy | StepKind::Parts | StepKind::Fill(_) if was_full => {
                let bytes = ended.step.range.length();
                self.window_size.ended(cx.clock().now(), bytes, ended.took);
            }
            _ if !was_full => self.window_size.interrupted(),
            _ => {}
        }
    }

    fn forget_in_flight(&mut self, range: ByteRange) {
        if let Some(place) = self.in_flight.iter().position(|other| *other == range) {
            self.in_flight.swap_remove(place);
        }
    }

    /// Everything before this offset is on the target.
    fn low_water(&self) -> u64 {
        let flying = self.in_flight.iter().map(ByteRange::offset);
        flying
            .chain(self.back_off.low_water())
            .min()
            .unwrap_or(u64::MAX)
            .min(self.plan.position())
    }

    /// Makes a durable point when enough was copied since the last one.
    async fn remember(&mut self, cx: &JobContext) -> Result<(), Stop> {
        let low_water = self.low_water();
        // What was left out has to be tried again by whoever goes on from there; what has changed, nobody knows then.
        if self.left_out.is_some()
            || self.changes.is_some()
            || self.saver.as_ref().is_some_and(|saver| saver.is_written())
            || self.moved_bytes < self.options.remember_bytes
            || low_water <= self.remembered_bytes
        {
            return Ok(());
        }
        self.moved_bytes = 0;
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

    /// A change of the target has failed. Ends when it is to be tried again.
    async fn before_next_try(&mut self, cx: &JobContext, error: NodeError) -> Result<(), Stop> {
        let side = match self.options.layers {
            // Source and target are one.
            Layers::Below { .. } => Side::Source,
            Layers::All | Layers::Top { .. } | Layers::Zeroes => Side::Target,
        };
        if let Some(stop) = self.by_policy(cx, ByteRange::default(), side, error).await {
            return Err(stop);
        }
        self.check_whole()?;
        self.rest_after_error(cx).await;
        cx.checkpoint().await
    }

    /// Makes the copy durable while writers wait; `false`: it failed, and is to be tried again once they do not.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(crate) async fn flush_once(&mut self, cx: &JobContext) -> Result<bool, Stop> {
        let Err(error) = self.target.flush().await else {
            return Ok(true);
        };
        match self
            .by_policy(cx, ByteRange::default(), Side::Target, error)
            .await
        {
            Some(stop) => Err(stop),
            None => Ok(false),
        }
    }

    /// Waits as long as an ignored error wants, unless the job has to stop.
    pub(crate) async fn rest_after_error(&mut self, cx: &JobContext) {
        while !cx.must_stop()
            && let Some(moment) = self.back_off.held_until(cx.clock().now())
        {
            cx.rest_until(moment).await;
        }
    }
}
