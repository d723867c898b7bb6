//! [`Gate`]: requests wait while the image behind a node is another one for a moment.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// Where requests come in.
#[derive(Default)]
pub(super) struct Gate {
    inside: Cell<usize>,
    closed: Cell<bool>,
    waiting: RefCell<Vec<Waker>>,
}

/// A request that has come in.
pub(super) struct Inside(Rc<Gate>);

/// Nobody is inside, and nobody comes in as long as this is there.
pub(super) struct Closed(Rc<Gate>);

impl Gate {
    /// Comes in, once the gate is open.
    ///
    /// # Cancel safety
    /// Dropping the future, nothing has happened.
    pub(super) async fn enter(self: &Rc<Self>) -> Inside {
        self.until(|| !self.closed.get()).await;
        self.inside.set(self.inside.get() + 1);
        Inside(Rc::clone(self))
    }

    /// Lets nobody in any more, and waits until those who are inside have gone. One after the other.
    ///
    /// # Cancel safety
    /// Dropping the future opens the gate again.
    pub(super) async fn close(self: &Rc<Self>) -> Closed {
        self.until(|| !self.closed.get()).await;
        self.closed.set(true);
        let closed = Closed(Rc::clone(self));
        self.until(|| self.inside.get() == 0).await;
        closed
    }

    async fn until(&self, is_so: impl Fn() -> bool) {
        poll_fn(|cx| match is_so() {
            true => Poll::Ready(()),
            false => self.wait(cx),
        })
        .await;
    }

    fn wait(&self, cx: &Context<'_>) -> Poll<()> {
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn wake_all(&self) {
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.inside.set(self.0.inside.get().saturating_sub(1));
        if self.0.closed.get() {
            self.0.wake_all();
        }
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        self.0.closed.set(false);
        self.0.wake_all();
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    fn poll<T>(future: &mut std::pin::Pin<Box<impl Future<Output = T>>>) -> Option<T> {
        match future
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
        {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        }
    }

    #[test]
    fn nobody_is_inside_while_it_is_closed() {
        let gate = Rc::new(Gate::default());
        let first = poll(&mut Box::pin(gate.enter())).expect("it is open");
        let second = poll(&mut Box::pin(gate.enter())).expect("for many");
        let mut closing = Box::pin(gate.close());
        assert!(poll(&mut closing).is_none());
        let mut late = Box::pin(gate.enter());
        assert!(poll(&mut late).is_none());
        drop(first);
        assert!(poll(&mut closing).is_none());
        drop(second);
        let closed = poll(&mut closing).expect("all have gone");
        assert!(poll(&mut late).is_none());
        let mut next = Box::pin(gate.close());
        assert!(poll(&mut next).is_none());
        drop(closed);
        assert!(poll(&mut late).is_some());
        assert!(poll(&mut next).is_some());
    }

    #[test]
    fn who_gives_up_closing_lets_others_in() {
        let gate = Rc::new(Gate::default());
        let inside = poll(&mut Box::pin(gate.enter())).expect("it is open");
        let mut closing = Box::pin(gate.close());
        assert!(poll(&mut closing).is_none());
        drop(closing);
        assert!(poll(&mut Box::pin(gate.enter())).is_some());
        drop(inside);
    }
}
