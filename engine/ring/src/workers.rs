//! [`Workers`]: a few threads for calls that block, and for everything where there is no ring.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

type Call = Box<dyn FnOnce() + Send>;

/// How long an idle thread stays.
const IDLE: Duration = Duration::from_secs(5);

/// Threads that carry out blocking calls; started when needed, bounded, ended when idle.
#[derive(Clone)]
pub(crate) struct Workers {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    threads_max: usize,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Call>,
    threads: usize,
    idle: usize,
}

impl Workers {
    /// No thread yet, `threads_max` at most.
    pub(crate) fn new(threads_max: usize) -> Self {
        let shared = Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            threads_max: threads_max.max(1),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Carries out `call` on a worker. The call happens even if the future is dropped. `None` if the call panicked.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Answer<T> {
        let cell = Arc::new(Mutex::new(Cell {
            value: None,
            ended: false,
            waker: None,
        }));
        let answer = Answer { cell: cell.clone() };
        let guard = EndGuard(cell);
        self.push(Box::new(move || {
            let value = call();
            lock(&guard.0).value = Some(value);
        }));
        answer
    }

    fn push(&self, call: Call) {
        let mut state = lock(&self.shared.state);
        state.queue.push_back(call);
        let is_idle = state.idle > 0;
        // A thread that was called but has not come yet still counts as idle: it takes one call, not two, and none may
        // wait behind another that is stuck.
        let starts = state.idle < state.queue.len() && state.threads < self.shared.threads_max;
        state.threads += usize::from(starts);
        // A thread that wakes would wait for the lock at once.
        drop(state);
        if is_idle {
            self.shared.work.notify_one();
        }
        if !starts {
            return;
        }
        let shared = self.shared.clone();
        let started = std::thread::Builder::new()
            .name("io-worker".to_owned())
            .spawn(move || shared.serve());
        if started.is_err() {
            let mut state = lock(&self.shared.state);
            state.threads -= 1;
            // Better slow than stuck: without any worker the caller's thread does it.
            while state.threads == 0
                && let Some(call) = state.queue.pop_front()
            {
                drop(state);
                call();
                state = lock(&self.shared.state);
            }
        }
    }
}

impl Shared {
    fn serve(&self) {
        let mut state = lock(&self.state);
        loop {
            if let Some(call) = state.queue.pop_front() {
                drop(state);
                // The end guard inside the call answers even when it panics.
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call));
                state = lock(&self.state);
                continue;
            }
            state.idle += 1;
            let (guard, waited) = self
                .work
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if waited.timed_out() && state.queue.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Cell<T> {
    value: Option<T>,
    ended: bool,
    waker: Option<Waker>,
}

/// Wakes whoever waits when the call is over, however it ended.
struct EndGuard<T>(Arc<Mutex<Cell<T>>>);

impl<T> Drop for EndGuard<T> {
    fn drop(&mut self) {
        let mut cell = lock(&self.0);
        cell.ended = true;
        if let Some(waker) = cell.waker.take() {
            drop(cell);
            waker.wake();
        }
    }
}

/// Waits for a call's result; `None` if it panicked.
pub(crate) struct Answer<T> {
    cell: Arc<Mutex<Cell<T>>>,
}

impl<T> Future for Answer<T> {
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut cell = lock(&self.cell);
        if cell.ended {
            return Poll::Ready(cell.value.take());
        }
        cell.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    /// Two calls come before the one idle thread has woken: the second must not wait behind the first.
    #[test]
    fn no_call_waits_behind_a_stuck_one_while_threads_may_start() {
        for _ in 0..100 {
            let workers = Workers::new(4);
            drop(workers.run(|| ()));
            while lock(&workers.shared.state).idle == 0 {
                std::thread::yield_now();
            }
            let (release, released) = channel();
            let (done, ended) = channel();
            drop(workers.run(move || {
                // Only the second call ends this one; without it the wait is given up.
                let _ = done.send(released.recv_timeout(Duration::from_secs(60)).is_ok());
            }));
            drop(workers.run(move || release.send(())));
            assert_eq!(ended.recv(), Ok(true));
        }
    }
}
