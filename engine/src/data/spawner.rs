//! [`Spawner`]: work of a data thread that goes on although nobody waits for it any more.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use blockyard_storage::LocalFuture;

/// Takes work that is to be brought to its end.
#[derive(Clone)]
pub struct Spawner(Rc<dyn Fn(LocalFuture<'static, ()>)>);

impl Spawner {
    /// A spawner that hands work to `take`.
    pub fn new(take: impl Fn(LocalFuture<'static, ()>) + 'static) -> Self {
        Self(Rc::new(take))
    }

    /// The spawner of a task set of tokio, to be used from its tasks.
    pub fn of_the_task_set() -> Self {
        Self::new(|work| drop(tokio::task::spawn_local(work)))
    }

    /// Hands work over.
    pub fn spawn(&self, work: LocalFuture<'static, ()>) {
        (self.0)(work);
    }

    /// `work`, which once it has begun goes on to its end also when the answer is dropped.
    pub fn to_the_end<T: 'static>(&self, work: LocalFuture<'static, T>) -> ToTheEnd<T> {
        ToTheEnd {
            work: Some(work),
            begun: false,
            spawner: self.clone(),
        }
    }
}

/// Waits for work that ends in any case.
#[must_use = "work begins when it is polled"]
pub struct ToTheEnd<T: 'static> {
    work: Option<LocalFuture<'static, T>>,
    begun: bool,
    spawner: Spawner,
}

impl<T> Future for ToTheEnd<T> {
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

impl<T> Drop for ToTheEnd<T> {
    fn drop(&mut self) {
        // After a panic nobody knows what it would do.
        if let Some(work) = self.work.take()
            && self.begun
            && !std::thread::panicking()
        {
            self.spawner.spawn(Box::pin(async move {
                work.await;
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::pin::pin;
    use std::task::Waker;

    use super::*;

    fn poll<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn begun_work_is_handed_over_and_other_work_is_not() {
        let taken = Rc::new(RefCell::new(Vec::new()));
        let take = Rc::clone(&taken);
        let spawner = Spawner::new(move |work| take.borrow_mut().push(work));
        let ends = Rc::new(Cell::new(0));
        let work = || {
            let ends = Rc::clone(&ends);
            async move {
                let mut first = true;
                std::future::poll_fn(|_| match std::mem::take(&mut first) {
                    true => Poll::Pending,
                    false => Poll::Ready(()),
                })
                .await;
                ends.set(ends.get() + 1);
            }
        };
        drop(spawner.to_the_end(Box::pin(work())));
        {
            let mut ended = pin!(spawner.to_the_end(Box::pin(work())));
            assert!(poll(ended.as_mut()).is_pending());
            assert!(poll(ended.as_mut()).is_ready());
        }
        assert!(taken.borrow().is_empty());
        {
            let mut left = pin!(spawner.to_the_end(Box::pin(work())));
            assert!(poll(left.as_mut()).is_pending());
        }
        assert_eq!(ends.get(), 1);
        let mut work = taken.borrow_mut().pop().expect("handed over");
        assert!(poll(work.as_mut()).is_ready());
        assert_eq!(ends.get(), 2);
    }
}
