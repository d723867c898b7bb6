//! Steps on their way: each waits for its turn where others write, is carried out, and ends with what it took.

use std::collections::VecDeque;
use std::future::{poll_fn, ready};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use blockyard_storage::{ByteRange, LocalFuture};
use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};

use crate::job::context::JobContext;
use crate::jobs::copier::CopyOptions;
use crate::jobs::plan::Step;
use crate::jobs::steps::{Failure, carry_out, first_part};
use crate::manifest::Recorder;
use crate::node::Node;
use crate::node::copy_before_write::{Fate, Saver};
use crate::node::turns::Turn;

/// How one range ended.
pub(super) struct Ended {
    pub(super) step: Step,
    pub(super) took: Duration,
    /// Somebody waited for it at its end.
    pub(super) waited: bool,
    pub(super) outcome: Result<(), Failure>,
}

/// Ranges in flight, and those that have ended and were not looked at yet.
#[derive(Default)]
pub(super) struct Window<'a> {
    flying: FuturesUnordered<LocalFuture<'a, Ended>>,
    ended: VecDeque<Ended>,
}

impl<'a> Window<'a> {
    pub(super) fn push(&self, step: LocalFuture<'a, Ended>) {
        self.flying.push(step);
    }

    pub(super) fn len(&self) -> usize {
        self.flying.len() + self.ended.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next one that ends, unless something else does before; `None`: that did, or nothing is in flight.
    pub(super) async fn next_unless<T>(&mut self, other: impl Future<Output = T>) -> Option<Ended> {
        match self.ended.pop_front() {
            Some(ended) => Some(ended),
            None => match select(self.flying.next(), pin!(other)).await {
                Either::Left((ended, _)) => ended,
                Either::Right(_) => None,
            },
        }
    }

    /// Does something else while what is in flight goes on. It has to: a node that looks something up, or flushes, may have to wait
    /// for a request that only goes on as the future of its range does.
    pub(super) async fn beside<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        poll_fn(|cx| {
            if let Poll::Ready(done) = work.as_mut().poll(cx) {
                return Poll::Ready(done);
            }
            while let Poll::Ready(Some(ended)) = self.flying.poll_next_unpin(cx) {
                self.ended.push_back(ended);
            }
            Poll::Pending
        })
        .await
    }
}

/// A step that waits for its turn among the writers.
pub(super) async fn in_its_turn(turn: Turn, step: impl Future<Output = Ended>) -> Ended {
    turn.come().await;
    step.await
}

/// A step that has begun already: what has changed is planned in small pieces, and each plan may wait for a disk.
pub(super) async fn begun(mut step: LocalFuture<'_, Ended>) -> LocalFuture<'_, Ended> {
    match poll_fn(|cx| Poll::Ready(step.as_mut().poll(cx))).await {
        Poll::Ready(ended) => Box::pin(ready(ended)),
        Poll::Pending => step,
    }
}

/// A step on its way, with its time.
pub(super) async fn timed(
    step: Step,
    outcome: impl Future<Output = Result<(), Failure>>,
    cx: &JobContext,
) -> Ended {
    let start = cx.clock().now();
    let outcome = outcome.await;
    Ended {
        step,
        took: cx.clock().now().since(start),
        waited: false,
        outcome,
    }
}

/// A step that is recorded.
pub(super) async fn carried_out(
    step: Step,
    nodes: (&Rc<dyn Node>, &dyn Node),
    cx: &JobContext,
    options: CopyOptions,
    recorder: Option<Rc<Recorder>>,
) -> Result<(), Failure> {
    carry_out(step, nodes, cx, options, recorder.as_deref()).await
}

/// A step of what is still to be saved at its turn.
pub(super) async fn saved(
    saver: Rc<Saver>,
    step: Step,
    nodes: (&Rc<dyn Node>, &dyn Node),
    cx: &JobContext,
    (options, recorder): (CopyOptions, Option<Rc<Recorder>>),
) -> Ended {
    let turn = saver.turn(step.range);
    turn.come().await;
    let start = cx.clock().now();
    let (mut rest, mut outcome) = (step.range, Ok(()));
    while let Some(range) = saver.rest_of(rest) {
        let (part, is_copied) = first_part(Step { range, ..step }, recorder.as_deref());
        outcome = carry_out(part, nodes, cx, options, recorder.as_deref()).await;
        if outcome.is_err() {
            break;
        }
        saver.settle(
            part.range,
            match is_copied {
                true => Fate::Saved,
                false => Fate::Skipped,
            },
        );
        rest = ByteRange::between(part.range.end(), rest.end());
    }
    Ended {
        step,
        took: cx.clock().now().since(start),
        waited: turn.is_waited_for(),
        outcome,
    }
}

/// Lets other tasks of the thread go on first.
pub(super) async fn give_way() {
    let mut gave = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut gave, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
