//! [`ThrottleGroup`]: nodes that share limits, from any thread. [`Member`]: one of them.
//!
//! Requests of one member pass in the order in which they came; members that have some waiting take turns; and where a limit is on
//! both, so do reads and writes. Only the request whose turn it is looks at the time, so that a group costs one timer for each
//! direction. It wakes the next one when it passes.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use crate::clock::{Clock, Moment};
use crate::throttle::Direction;
use crate::throttle::buckets::Buckets;
use crate::throttle::limits::{Limits, LimitsChange};

/// Nodes that share limits.
pub struct ThrottleGroup {
    name: String,
    state: Mutex<State>,
}

/// A node's place in a group.
pub struct Member {
    group: Arc<ThrottleGroup>,
    number: u64,
}

/// As long as it is there, nothing of the member waits.
#[must_use = "requests wait again when it is dropped"]
pub struct Suspended {
    member: Arc<Member>,
}

struct State {
    buckets: Buckets,
    lanes: [Lane; 2],
    /// Members that nothing waits of, as often as that was asked for.
    suspended: Vec<u64>,
    next_number: u64,
    next_turn: u64,
}

/// What waits of one direction.
#[derive(Default)]
struct Lane {
    /// Members that have something waiting; whose turn it is comes first.
    queues: VecDeque<Queue>,
    /// When the first request of the first member came to its turn.
    turn: u64,
}

struct Queue {
    member: u64,
    waiting: VecDeque<Waiter>,
}

struct Waiter {
    number: u64,
    waker: Option<Waker>,
}

/// What becomes of a request.
enum Outcome {
    Passes,
    /// It will be woken.
    Waits,
    WaitsUntil(Moment),
}

impl ThrottleGroup {
    /// A group without members.
    pub fn new(name: String, limits: Limits) -> Arc<Self> {
        let state = State {
            buckets: Buckets::new(limits),
            lanes: Default::default(),
            suspended: Vec::new(),
            next_number: 0,
            next_turn: 0,
        };
        Arc::new(Self {
            name,
            state: Mutex::new(state),
        })
    }

    /// Its id.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// One more member.
    pub fn join(self: &Arc<Self>) -> Arc<Member> {
        let number = self.state().new_number();
        Arc::new(Member {
            group: self.clone(),
            number,
        })
    }

    /// Its limits as of now.
    pub fn limits(&self) -> Limits {
        *self.state().buckets.limits()
    }

    /// Gives it other limits. What has passed before does not count any more, and what waits is looked at again.
    ///
    /// # Errors
    /// In QEMU's words, when they make no sense: they are what they were.
    pub fn change_limits(&self, change: &LimitsChange) -> Result<(), String> {
        let mut state = self.state();
        let limits = state.buckets.limits().with(change)?;
        state.buckets = Buckets::new(limits);
        for direction in Direction::BOTH {
            state.wake_first(direction);
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics halfway.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for ThrottleGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ThrottleGroup").field(&self.name).finish()
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_tuple("Member");
        shown.field(&self.group.name).field(&self.number).finish()
    }
}

impl Member {
    /// The group that it belongs to.
    pub fn group(&self) -> &Arc<ThrottleGroup> {
        &self.group
    }

    /// Waits until a request of this length may pass, which counts from then on.
    ///
    /// # Cancel safety
    /// It does not count then, and others do not wait for it.
    pub async fn pass(&self, direction: Direction, bytes: u64, clock: &dyn Clock) {
        let Some(number) = self.enter(direction, bytes, clock.now()) else {
            return;
        };
        let waiting = Waiting {
            member: self,
            direction,
            number,
        };
        let mut sleep = None;
        poll_fn(|cx| {
            loop {
                match waiting.look(bytes, clock.now(), cx.waker()) {
                    Outcome::Passes => return Poll::Ready(()),
                    Outcome::Waits => {
                        sleep = None;
                        return Poll::Pending;
                    }
                    Outcome::WaitsUntil(moment) => {
                        let sleep = sleep.insert(clock.sleep_until(moment));
                        if sleep.as_mut().poll(cx).is_pending() {
                            return Poll::Pending;
                        }
                    }
                }
            }
        })
        .await;
    }

    /// Lets everything of this member pass that waits, and what comes, until the guard goes. It counts all the same.
    pub fn suspend(self: &Arc<Self>) -> Suspended {
        self.suspend_for_good();
        Suspended {
            member: self.clone(),
        }
    }

    /// Lets everything of this member pass from now on: its node has left the group.
    pub fn suspend_for_good(&self) {
        let mut state = self.group.state();
        state.suspended.push(self.number);
        for lane in &mut state.lanes {
            let queues = lane.queues.iter_mut();
            let queue = queues.filter(|queue| queue.member == self.number);
            let waiters = queue.flat_map(|queue| queue.waiting.iter_mut());
            waiters.for_each(Waiter::wake);
        }
    }

    /// Lets a request pass, or puts it into the queue.
    fn enter(&self, direction: Direction, bytes: u64, now: Moment) -> Option<u64> {
        let mut state = self.group.state();
        state.buckets.leak(now);
        let is_first = state.lane(direction).queues.is_empty()
            && (!state.buckets.limits_both() || state.lane(direction.other()).queues.is_empty());
        let passes = state.is_suspended(self.number)
            || is_first && state.buckets.wait(direction) == Duration::ZERO;
        if passes {
            state.buckets.account(direction, bytes);
            return None;
        }
        let number = state.new_number();
        let waiter = Waiter {
            number,
            waker: None,
        };
        let was_empty = state.lane(direction).queues.is_empty();
        state.lane_mut(direction).enqueue(self.number, waiter);
        if was_empty {
            state.begin_turn(direction);
        }
        Some(number)
    }
}

impl Drop for Suspended {
    fn drop(&mut self) {
        let mut state = self.member.group.state();
        let mut suspended = state.suspended.iter();
        let place = suspended.position(|number| *number == self.member.number);
        if let Some(place) = place {
            state.suspended.swap_remove(place);
        }
    }
}

/// A request in a queue, which it leaves when it goes.
struct Waiting<'a> {
    member: &'a Member,
    direction: Direction,
    number: u64,
}

impl Waiting<'_> {
    /// Whether it may pass now; then it is not in the queue any more.
    fn look(&self, bytes: u64, now: Moment, waker: &Waker) -> Outcome {
        let mut state = self.member.group.state();
        state.buckets.leak(now);
        if state.is_suspended(self.member.number) {
            state.buckets.account(self.direction, bytes);
            state.take_out(self.member.number, self.direction, self.number);
            return Outcome::Passes;
        }
        let outcome = if state.lane(self.direction).first() != Some(self.number) {
            Outcome::Waits
        } else {
            match state.buckets.wait(self.direction) {
                Duration::ZERO if state.is_turn_of_other(self.direction) => {
                    state.wake_first(self.direction.other());
                    Outcome::Waits
                }
                Duration::ZERO => {
                    state.buckets.account(self.direction, bytes);
                    state.take_out(self.member.number, self.direction, self.number);
                    return Outcome::Passes;
                }
                wait => Outcome::WaitsUntil(now.after(wait)),
            }
        };
        state.wake_later(self.direction, self.number, waker);
        outcome
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.member.group.state();
        state.take_out(self.member.number, self.direction, self.number);
    }
}

impl State {
    fn new_number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    fn lane(&self, direction: Direction) -> &Lane {
        &self.lanes[direction.index()]
    }

    fn lane_mut(&mut self, direction: Direction) -> &mut Lane {
        &mut self.lanes[direction.index()]
    }

    fn is_suspended(&self, member: u64) -> bool {
        self.suspended.contains(&member)
    }

    /// A request has become the first of its direction.
    fn begin_turn(&mut self, direction: Direction) {
        self.next_turn += 1;
        self.lane_mut(direction).turn = self.next_turn;
    }

    /// Whether the first request of the other direction has waited longer and may pass, where both share a limit.
    fn is_turn_of_other(&self, direction: Direction) -> bool {
        let other = self.lane(direction.other());
        self.buckets.limits_both()
            && !other.queues.is_empty()
            && other.turn < self.lane(direction).turn
            && self.buckets.wait(direction.other()) == Duration::ZERO
    }

    fn wake_first(&mut self, direction: Direction) {
        if let Some(first) = self.lane_mut(direction).first_mut() {
            first.wake();
        }
    }

    fn wake_later(&mut self, direction: Direction, number: u64, waker: &Waker) {
        let queues = self.lane_mut(direction).queues.iter_mut();
        let mut waiters = queues.flat_map(|queue| queue.waiting.iter_mut());
        if let Some(waiter) = waiters.find(|waiter| waiter.number == number) {
            match &mut waiter.waker {
                Some(known) => known.clone_from(waker),
                none => *none = Some(waker.clone()),
            }
        }
    }

    /// Takes a request out of its queue, if it is there. Whose turn it is then wakes up.
    fn take_out(&mut self, member: u64, direction: Direction, number: u64) {
        let was_first = self.lane(direction).first() == Some(number);
        if !self.lane_mut(direction).take_out(member, number) {
            return;
        }
        if was_first {
            self.begin_turn(direction);
            self.wake_first(direction);
            if self.buckets.limits_both() {
                // It may have let this one go first.
                self.wake_first(direction.other());
            }
        }
    }
}

impl Lane {
    fn first(&self) -> Option<u64> {
        let queue = self.queues.front()?;
        queue.waiting.front().map(|waiter| waiter.number)
    }

    fn first_mut(&mut self) -> Option<&mut Waiter> {
        self.queues.front_mut()?.waiting.front_mut()
    }

    fn enqueue(&mut self, member: u64, waiter: Waiter) {
        match self.queues.iter_mut().find(|queue| queue.member == member) {
            Some(queue) => queue.waiting.push_back(waiter),
            None => self.queues.push_back(Queue {
                member,
                waiting: VecDeque::from([waiter]),
            }),
        }
    }

    /// Whether it was there. If it was the first of its member, whose turn it is, that of the next member comes.
    fn take_out(&mut self, member: u64, number: u64) -> bool {
        let Some(place) = self.queues.iter().position(|queue| queue.member == member) else {
            return false;
        };
        let Some(mut queue) = self.queues.remove(place) else {
            return false;
        };
        let found = queue.waiting.iter().position(|one| one.number == number);
        if let Some(index) = found {
            queue.waiting.remove(index);
        }
        if !queue.waiting.is_empty() {
            match found {
                Some(0) if place == 0 => self.queues.push_back(queue),
                _ => self.queues.insert(place, queue),
            }
        }
        found.is_some()
    }
}

impl Waiter {
    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}
