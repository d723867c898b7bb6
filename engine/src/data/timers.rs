//! [`ThreadClock`]: the monotonic clock of one data thread and its timers. The loop asks for the nearest one and wakes
//! what is due; nothing here waits.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use blockyard_storage::LocalFuture;

use crate::clock::{Clock, Moment};

/// Timers by due time; the number keeps those of one moment apart.
type Queue = RefCell<(u64, BTreeMap<(Moment, u64), Waker>)>;

/// The clock of one data thread.
pub(super) struct ThreadClock {
    start: Instant,
    queue: Rc<Queue>,
}

impl ThreadClock {
    /// A clock without timers. Moments of those with one start can be compared.
    pub(super) fn new(start: Instant) -> Self {
        Self {
            start,
            queue: Rc::default(),
        }
    }

    /// How long until the nearest timer is due; `None`: there is none.
    pub(super) fn until_next(&self) -> Option<Duration> {
        let queue = self.queue.borrow();
        queue
            .1
            .first_key_value()
            .map(|((due, _), _)| due.since(self.now()))
    }

    /// Wakes everything that is due.
    pub(super) fn wake_due(&self) {
        let now = self.now();
        loop {
            let waker = {
                let mut queue = self.queue.borrow_mut();
                match queue.1.first_entry() {
                    Some(entry) if entry.key().0 <= now => entry.remove(),
                    _ => return,
                }
            };
            waker.wake();
        }
    }
}

impl Clock for ThreadClock {
    fn now(&self) -> Moment {
        Moment::new(self.start.elapsed())
    }

    fn sleep_until(&self, moment: Moment) -> LocalFuture<'static, ()> {
        Box::pin(Sleep {
            start: self.start,
            due: moment,
            number: None,
            queue: self.queue.clone(),
        })
    }
}

/// Waits for its moment; leaves the queue when dropped.
struct Sleep {
    start: Instant,
    due: Moment,
    number: Option<u64>,
    queue: Rc<Queue>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Moment::new(self.start.elapsed()) >= self.due {
            return Poll::Ready(());
        }
        let number = {
            let mut queue = self.queue.borrow_mut();
            let number = self.number.unwrap_or_else(|| {
                queue.0 += 1;
                queue.0
            });
            queue.1.insert((self.due, number), cx.waker().clone());
            number
        };
        self.number = Some(number);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.queue.borrow_mut().1.remove(&(self.due, number));
        }
    }
}
