//! [`WritesInFlight`]: who is writing where, so that two writes that widen what they were asked for never change one block
//! at the same time, not even when the caller of one has given up waiting for it.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use crate::range::ByteRange;
use crate::storage::LocalFuture;

/// The ranges being written, and who waits for one of them.
#[derive(Default)]
pub struct WritesInFlight(Rc<State>);

#[derive(Default)]
struct State {
    ranges: RefCell<Vec<ByteRange>>,
    /// What nobody waits for any more; it has its turn until it has ended.
    abandoned: RefCell<Vec<LocalFuture<'static, ()>>>,
    waiting: Arc<Everybody>,
}

/// All who wait for a turn: any of them may have to carry on with what is abandoned.
#[derive(Default)]
struct Everybody(Mutex<Vec<Waker>>);

impl Everybody {
    fn add(&self, waker: &Waker) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiting.iter().any(|other| other.will_wake(waker)) {
            waiting.push(waker.clone());
        }
    }

    fn wake_all(&self) {
        let waiting = {
            let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Wake for Everybody {
    fn wake(self: Arc<Self>) {
        self.wake_all();
    }
}

impl WritesInFlight {
    /// Waits until no write in flight overlaps `range`, and counts as one until the answer is dropped.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind.
    pub async fn enter(&self, range: ByteRange) -> Turn {
        poll_fn(|cx| {
            if !self.0.abandoned.borrow().is_empty() {
                // First, so that what is carried on finds somebody to wake.
                self.0.waiting.add(cx.waker());
                self.0.carry_on();
            }
            let mut ranges = self.0.ranges.borrow_mut();
            if ranges.iter().any(|other| other.overlaps(&range)) {
                self.0.waiting.add(cx.waker());
                return Poll::Pending;
            }
            ranges.push(range);
            Poll::Ready(())
        })
        .await;
        Turn {
            state: Rc::clone(&self.0),
            range,
        }
    }

    /// Work that has to end once it has begun, before others get the turns it holds: whoever gives up waiting for it leaves
    /// it to those who come next.
    pub fn finish<T: 'static>(&self, work: impl Future<Output = T> + 'static) -> Finishing<T> {
        Finishing {
            work: Some(Box::pin(work)),
            begun: false,
            state: Rc::clone(&self.0),
        }
    }
}

impl State {
    /// Goes on with what is abandoned, as far as it can.
    fn carry_on(&self) {
        let mut abandoned = std::mem::take(&mut *self.abandoned.borrow_mut());
        if abandoned.is_empty() {
            return;
        }
        let waker = Waker::from(Arc::clone(&self.waiting));
        let mut cx = Context::from_waker(&waker);
        abandoned.retain_mut(|work| work.as_mut().poll(&mut cx).is_pending());
        self.abandoned.borrow_mut().append(&mut abandoned);
    }

    fn wake_all(&self) {
        self.waiting.wake_all();
    }
}

/// A write in flight, until dropped.
pub struct Turn {
    state: Rc<State>,
    range: ByteRange,
}

impl Turn {
    /// What it keeps others off.
    pub const fn range(&self) -> ByteRange {
        self.range
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut ranges = self.state.ranges.borrow_mut();
        if let Some(place) = ranges.iter().position(|range| *range == self.range) {
            ranges.swap_remove(place);
        }
        drop(ranges);
        self.state.wake_all();
    }
}

/// Waits for work that ends in any case, see [`WritesInFlight::finish`].
pub struct Finishing<T: 'static> {
    work: Option<LocalFuture<'static, T>>,
    begun: bool,
    state: Rc<State>,
}

impl<T> Future for Finishing<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        self.begun = true;
        let Some(work) = self.work.as_mut() else {
            return Poll::Pending;
        };
        let polled = work.as_mut().poll(cx);
        if polled.is_ready() {
            self.work = None;
        }
        polled
    }
}

impl<T> Drop for Finishing<T> {
    fn drop(&mut self) {
        if let Some(work) = self.work.take()
            && self.begun
        {
            let work = Box::pin(async move {
                work.await;
            });
            self.state.abandoned.borrow_mut().push(work);
            self.state.wake_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::pin::pin;

    use super::*;

    fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn overlapping_writes_follow_each_other() {
        let writes = WritesInFlight::default();
        let mut first = pin!(writes.enter(ByteRange::new(0, 10)));
        let Poll::Ready(first) = poll(first.as_mut()) else {
            panic!("nobody else is there");
        };
        let mut second = pin!(writes.enter(ByteRange::new(5, 10)));
        assert!(poll(second.as_mut()).is_pending());
        assert!(poll(pin!(writes.enter(ByteRange::new(10, 10)))).is_ready());
        drop(first);
        assert!(poll(second.as_mut()).is_ready());
    }

    #[test]
    fn what_is_abandoned_keeps_its_turn_until_somebody_has_brought_it_to_its_end() {
        let writes = WritesInFlight::default();
        let gate = Rc::new(Cell::new(false));
        let open = Rc::clone(&gate);
        let ended = Rc::new(Cell::new(false));
        let end = Rc::clone(&ended);
        let Poll::Ready(turn) = poll(pin!(writes.enter(ByteRange::new(0, 10)))) else {
            panic!("nobody else is there");
        };
        {
            let mut work = pin!(writes.finish(async move {
                let _turn = turn;
                poll_fn(|_| match open.get() {
                    true => Poll::Ready(()),
                    false => Poll::Pending,
                })
                .await;
                end.set(true);
            }));
            assert!(poll(work.as_mut()).is_pending());
        }
        let mut next = pin!(writes.enter(ByteRange::new(5, 1)));
        assert!(poll(next.as_mut()).is_pending());
        gate.set(true);
        assert!(poll(next.as_mut()).is_ready());
        assert!(ended.get());
    }

    #[test]
    fn what_was_never_begun_is_dropped() {
        let writes = WritesInFlight::default();
        let Poll::Ready(turn) = poll(pin!(writes.enter(ByteRange::new(0, 10)))) else {
            panic!("nobody else is there");
        };
        drop(writes.finish(async move {
            let _turn = turn;
            unreachable!("nobody began it");
        }));
        assert!(poll(pin!(writes.enter(ByteRange::new(0, 1)))).is_ready());
    }
}
