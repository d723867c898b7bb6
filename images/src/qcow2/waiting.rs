//! How tasks of one thread wait for each other: wakers, turns on ranges of the guest's disk, and work that must not stop in
//! the middle. No runtime is needed, and whoever gives up waiting leaves nothing behind.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use blockyard_storage::{ByteRange, LocalFuture};

/// Tasks that wait for something to change.
#[derive(Default)]
pub(super) struct Wakers(RefCell<Vec<Waker>>);

impl Wakers {
    /// The task behind `cx` is woken by the next [`wake_all`](Self::wake_all).
    pub(super) fn add(&self, cx: &Context<'_>) {
        let mut waiting = self.0.borrow_mut();
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
    }

    /// Wakes everybody who waits.
    pub(super) fn wake_all(&self) {
        let waiting = std::mem::take(&mut *self.0.borrow_mut());
        for waker in waiting {
            waker.wake();
        }
    }
}

/// Who may change what of the guest's disk: first come, first served among ranges that overlap.
#[derive(Default)]
pub(super) struct Turns(RefCell<Queue>);

#[derive(Default)]
struct Queue {
    next: u64,
    /// In order of arrival: those who wait and those who have their turn.
    entries: Vec<Entry>,
}

struct Entry {
    number: u64,
    range: ByteRange,
    waker: Option<Waker>,
}

impl Turns {
    /// Waits for everybody who came before with a range that overlaps. Others wait until the answer is dropped.
    ///
    /// # Cancel safety
    /// Dropping the future gives the place in the queue up.
    pub(super) async fn enter(self: &Rc<Self>, range: ByteRange) -> Turn {
        let turn = self.join(range);
        poll_fn(|cx| self.poll_turn(turn.number, cx)).await;
        turn
    }

    fn join(self: &Rc<Self>, range: ByteRange) -> Turn {
        let mut queue = self.0.borrow_mut();
        let number = queue.next;
        queue.next += 1;
        queue.entries.push(Entry {
            number,
            range,
            waker: None,
        });
        Turn {
            turns: Rc::clone(self),
            number,
        }
    }

    fn poll_turn(&self, number: u64, cx: &mut Context<'_>) -> Poll<()> {
        let mut queue = self.0.borrow_mut();
        let Some(place) = queue.place(number) else {
            return Poll::Ready(());
        };
        let (before, from_here) = queue.entries.split_at_mut(place);
        let Some(own) = from_here.first_mut() else {
            return Poll::Ready(());
        };
        if before.iter().any(|other| other.range.overlaps(&own.range)) {
            own.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(())
    }
}

impl Queue {
    fn place(&self, number: u64) -> Option<usize> {
        self.entries
            .binary_search_by_key(&number, |entry| entry.number)
            .ok()
    }

    /// Those who wait for `range`.
    fn waiting_for(&mut self, range: ByteRange) -> Vec<Waker> {
        let waiting = self.entries.iter_mut();
        waiting
            .filter(|entry| entry.range.overlaps(&range))
            .filter_map(|entry| entry.waker.take())
            .collect()
    }
}

/// The right to change a range of the guest's disk, until dropped.
#[derive(Debug)]
pub(super) struct Turn {
    turns: Rc<Turns>,
    number: u64,
}

impl std::fmt::Debug for Turns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Turns")
            .field("entries", &self.0.borrow().entries.len())
            .finish()
    }
}

impl Turn {
    /// Gives up what lies outside of `range`.
    pub(super) fn shrink(&self, range: ByteRange) {
        let mut queue = self.turns.0.borrow_mut();
        let Some(place) = queue.place(self.number) else {
            return;
        };
        let Some(entry) = queue.entries.get_mut(place) else {
            return;
        };
        let before = entry.range;
        entry.range = before.intersection(&range);
        let woken = queue.waiting_for(before);
        drop(queue);
        woken.into_iter().for_each(Waker::wake);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut queue = self.turns.0.borrow_mut();
        let Some(place) = queue.place(self.number) else {
            return;
        };
        let gone = queue.entries.remove(place);
        let woken = queue.waiting_for(gone.range);
        drop(queue);
        woken.into_iter().for_each(Waker::wake);
    }
}

/// Work that must not stop in the middle, one piece at a time. Whoever waits for a piece drives it, and drives what is there
/// before it; a piece whose starter has given up goes on with the next one who comes.
#[derive(Default)]
pub(super) struct Serial {
    work: RefCell<Option<LocalFuture<'static, ()>>>,
    /// Wakes everybody who waits, since any of them may drive.
    all: Arc<Everybody>,
}

#[derive(Default)]
struct Everybody(Mutex<Vec<Waker>>);

impl Everybody {
    fn add(&self, waker: &Waker) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiting.iter().any(|other| other.will_wake(waker)) {
            waiting.push(waker.clone());
        }
    }
}

impl Wake for Everybody {
    fn wake(self: Arc<Self>) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = std::mem::take(&mut *waiting);
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Serial {
    /// Drives what is there until `done` has an answer. Returns `None` instead when there is nothing to drive and no answer.
    pub(super) async fn drive<T>(&self, mut done: impl FnMut() -> Option<T>) -> Option<T> {
        poll_fn(|cx| {
            loop {
                if let Some(answer) = done() {
                    return Poll::Ready(Some(answer));
                }
                let Some(mut work) = self.work.borrow_mut().take() else {
                    return Poll::Ready(None);
                };
                self.all.add(cx.waker());
                let waker = Waker::from(Arc::clone(&self.all));
                let polled = Pin::new(&mut work).poll(&mut Context::from_waker(&waker));
                if polled.is_pending() {
                    *self.work.borrow_mut() = Some(work);
                    return Poll::Pending;
                }
                drop(work);
                waker.wake();
            }
        })
        .await
    }

    /// Waits until nothing is there and starts `work`; the caller has to [`drive`](Self::drive) it.
    pub(super) fn start(&self, work: LocalFuture<'static, ()>) {
        let mut place = self.work.borrow_mut();
        debug_assert!(place.is_none(), "one piece at a time");
        *place = Some(work);
    }

    /// Carries `work` out when everything that is there has ended. It goes on when the caller gives up waiting, as far as
    /// somebody else comes to drive it.
    pub(super) async fn run<T: 'static>(
        &self,
        work: impl FnOnce() -> LocalFuture<'static, T>,
    ) -> Option<T> {
        self.drive(|| None::<()>).await;
        let answer = Rc::new(RefCell::new(None));
        let for_work = Rc::clone(&answer);
        let work = work();
        self.start(Box::pin(async move {
            let made = work.await;
            *for_work.borrow_mut() = Some(made);
        }));
        self.drive(|| answer.borrow_mut().take()).await
    }
}

/// Lets others go on: long work in memory must not keep a thread for itself.
pub(super) async fn give_way() {
    let mut has_waited = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut has_waited, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Drives all `pending` futures at once and gives the first error when all have ended.
pub(super) async fn all_of<E>(mut pending: Vec<LocalFuture<'_, Result<(), E>>>) -> Result<(), E> {
    let mut outcome = Ok(());
    poll_fn(|cx| {
        pending.retain_mut(|future| match future.as_mut().poll(cx) {
            Poll::Ready(Ok(())) => false,
            Poll::Ready(Err(error)) => {
                if outcome.is_ok() {
                    outcome = Err(error);
                }
                false
            }
            Poll::Pending => true,
        });
        if pending.is_empty() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
    outcome
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn poll<T>(future: &mut LocalFuture<'_, T>) -> Poll<T> {
        future
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
    }

    fn enter(turns: &Rc<Turns>, offset: u64, length: u64) -> LocalFuture<'static, Turn> {
        let turns = Rc::clone(turns);
        Box::pin(async move { turns.enter(ByteRange::new(offset, length)).await })
    }

    #[test]
    fn turns_are_taken_in_order_where_ranges_overlap() {
        let turns = Rc::new(Turns::default());
        let Poll::Ready(first) = poll(&mut enter(&turns, 0, 10)) else {
            panic!("nobody else is there");
        };
        let mut second = enter(&turns, 5, 10);
        assert!(poll(&mut second).is_pending());
        let mut third = enter(&turns, 12, 10);
        assert!(poll(&mut third).is_pending(), "the second came before");
        let Poll::Ready(_apart) = poll(&mut enter(&turns, 30, 1)) else {
            panic!("nothing overlaps");
        };
        drop(second);
        assert!(poll(&mut third).is_ready(), "the second gave up");
        let mut fourth = enter(&turns, 0, 2);
        let mut fifth = enter(&turns, 8, 2);
        assert!(poll(&mut fourth).is_pending());
        first.shrink(ByteRange::new(8, 2));
        assert!(poll(&mut fourth).is_ready());
        assert!(poll(&mut fifth).is_pending());
        drop(first);
        assert!(poll(&mut fifth).is_ready());
    }

    #[test]
    fn work_goes_on_when_its_starter_gives_up() {
        let serial = Rc::new(Serial::default());
        let steps = Rc::new(Cell::new(0));
        let (seen, gate) = (Rc::clone(&steps), Rc::new(Cell::new(false)));
        let opened = Rc::clone(&gate);
        let work = move || -> LocalFuture<'static, u32> {
            Box::pin(async move {
                seen.set(1);
                poll_fn(|_| match opened.get() {
                    true => Poll::Ready(()),
                    false => Poll::Pending,
                })
                .await;
                seen.set(2);
                7
            })
        };
        let starter = Rc::clone(&serial);
        let mut first: LocalFuture<'_, _> = Box::pin(async move { starter.run(work).await });
        assert!(poll(&mut first).is_pending());
        drop(first);
        assert_eq!(steps.get(), 1);
        let next = Rc::clone(&serial);
        let mut second: LocalFuture<'_, _> =
            Box::pin(async move { next.run(|| Box::pin(async { 8 })).await });
        assert!(poll(&mut second).is_pending());
        gate.set(true);
        assert_eq!(poll(&mut second), Poll::Ready(Some(8)));
        assert_eq!(steps.get(), 2);
    }
}
