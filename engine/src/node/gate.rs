//! [`Gate`]: who may go on while what is behind it changes. While an image is amended readers do, but for the moment when its
//! node changes over; writers wait until it has. While its snapshots change, or the node is opened in another way, all wait, and
//! so do users of a root that the graph puts on another node.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// What somebody wants of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Read,
    Write,
}

/// Counts those who use a node, and keeps others waiting.
#[derive(Default)]
pub(crate) struct Gate {
    reads: Lane,
    writes: Lane,
    wakers: RefCell<Vec<Waker>>,
}

#[derive(Default)]
struct Lane {
    inside: Cell<usize>,
    waiting: Cell<usize>,
    /// How often it is closed.
    closed: Cell<usize>,
}

/// Whoever has it is using the node.
#[must_use = "the node may change over without it"]
pub(crate) struct Pass {
    gate: Rc<Gate>,
    way: Way,
}

/// As long as it is there, nobody is inside and others wait.
#[must_use = "opens again when dropped"]
pub(crate) struct Closed {
    gate: Rc<Gate>,
    way: Way,
}

impl Gate {
    /// Waits until the way is open.
    ///
    /// # Cancel safety
    /// Nobody is inside then.
    pub(crate) async fn enter(self: &Rc<Self>, way: Way) -> Pass {
        let lane = self.lane(way);
        if lane.is_closed() {
            let _waiting = Waiting::in_front_of(self, way);
            poll_fn(|cx| self.poll_when(cx, || !lane.is_closed())).await;
        }
        lane.inside.set(lane.inside.get() + 1);
        Pass {
            gate: Rc::clone(self),
            way,
        }
    }

    /// Closes a way, and waits until nobody is inside. One at a time.
    ///
    /// # Cancel safety
    /// It is open again then.
    pub(crate) async fn close(self: &Rc<Self>, way: Way) -> Closed {
        let lane = self.lane(way);
        poll_fn(|cx| self.poll_when(cx, || !lane.is_closed())).await;
        self.close_again(way).await
    }

    /// Closes a way that others may have closed too, and waits until nobody is inside. It opens with the last of them.
    ///
    /// # Cancel safety
    /// It is as it was then.
    pub(crate) async fn close_again(self: &Rc<Self>, way: Way) -> Closed {
        let lane = self.lane(way);
        lane.closed.set(lane.closed.get() + 1);
        let closed = Closed {
            gate: Rc::clone(self),
            way,
        };
        poll_fn(|cx| self.poll_when(cx, || lane.inside.get() == 0)).await;
        closed
    }

    /// Whether whoever comes now has to wait.
    pub(crate) fn is_closed(&self, way: Way) -> bool {
        self.lane(way).is_closed()
    }

    /// Waits until a way is open, without going in.
    pub(crate) async fn until_open(&self, way: Way) {
        let lane = self.lane(way);
        poll_fn(|cx| self.poll_when(cx, || !lane.is_closed())).await;
    }

    /// Waits until somebody waits in front of a way.
    pub(crate) async fn wanted(&self, way: Way) {
        let lane = self.lane(way);
        poll_fn(|cx| self.poll_when(cx, || lane.waiting.get() > 0)).await;
    }

    fn lane(&self, way: Way) -> &Lane {
        match way {
            Way::Read => &self.reads,
            Way::Write => &self.writes,
        }
    }

    fn poll_when(&self, cx: &Context<'_>, is_so: impl Fn() -> bool) -> Poll<()> {
        if is_so() {
            return Poll::Ready(());
        }
        let mut wakers = self.wakers.borrow_mut();
        if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
            wakers.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn changed(&self) {
        let wakers = self.wakers.take();
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Lane {
    fn is_closed(&self) -> bool {
        self.closed.get() > 0
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let lane = self.gate.lane(self.way);
        lane.inside.set(lane.inside.get() - 1);
        if lane.is_closed() {
            self.gate.changed();
        }
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        let lane = self.gate.lane(self.way);
        lane.closed.set(lane.closed.get() - 1);
        self.gate.changed();
    }
}

struct Waiting<'a> {
    gate: &'a Gate,
    way: Way,
}

impl<'a> Waiting<'a> {
    fn in_front_of(gate: &'a Gate, way: Way) -> Self {
        let lane = gate.lane(way);
        lane.waiting.set(lane.waiting.get() + 1);
        gate.changed();
        Self { gate, way }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let lane = self.gate.lane(self.way);
        lane.waiting.set(lane.waiting.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    fn poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn a_closed_way_is_empty_and_the_other_stays_open() {
        let gate = Rc::new(Gate::default());
        let Poll::Ready(inside) = poll(pin!(gate.enter(Way::Write))) else {
            panic!("nobody has closed it");
        };
        let mut closing = pin!(gate.close(Way::Write));
        assert!(poll(closing.as_mut()).is_pending(), "somebody is inside");
        let mut wanted = pin!(gate.wanted(Way::Write));
        assert!(poll(wanted.as_mut()).is_pending());
        {
            let mut late = pin!(gate.enter(Way::Write));
            assert!(poll(late.as_mut()).is_pending());
            assert!(poll(wanted.as_mut()).is_ready());
        }
        assert!(poll(pin!(gate.wanted(Way::Write))).is_pending(), "gave up");
        drop(inside);
        let Poll::Ready(closed) = poll(closing.as_mut()) else {
            panic!("nobody is inside");
        };
        assert!(poll(pin!(gate.enter(Way::Read))).is_ready());
        let mut late = pin!(gate.enter(Way::Write));
        assert!(poll(late.as_mut()).is_pending());
        drop(closed);
        assert!(poll(late.as_mut()).is_ready());
    }

    #[test]
    fn a_way_that_two_have_closed_opens_with_the_second() {
        let gate = Rc::new(Gate::default());
        let close = || match poll(pin!(gate.close_again(Way::Read))) {
            Poll::Ready(closed) => closed,
            Poll::Pending => panic!("nobody is inside"),
        };
        let (one, other) = (close(), close());
        let mut late = pin!(gate.enter(Way::Read));
        drop(one);
        assert!(poll(late.as_mut()).is_pending());
        drop(other);
        assert!(poll(late.as_mut()).is_ready());
    }

    #[test]
    fn giving_up_to_close_opens_it() {
        let gate = Rc::new(Gate::default());
        let Poll::Ready(_inside) = poll(pin!(gate.enter(Way::Read))) else {
            panic!("nobody has closed it");
        };
        {
            assert!(poll(pin!(gate.close(Way::Read))).is_pending());
        }
        assert!(poll(pin!(gate.enter(Way::Read))).is_ready());
    }
}
