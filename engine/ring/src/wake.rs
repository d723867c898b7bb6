//! [`RemoteWaker`]: makes a waiting reactor return from any thread, without a system call while it is awake.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Wakes one reactor.
#[derive(Clone)]
pub struct RemoteWaker {
    shared: Arc<Shared>,
}

struct Shared {
    /// Somebody wants the thread to look around.
    woken: AtomicBool,
    /// The thread waits, or is about to: only then a wake needs the bell.
    asleep: AtomicBool,
    bell: Bell,
}

enum Bell {
    /// A ring reads this descriptor all the time.
    EventFd(OwnedFd),
    /// A thread without a ring waits here.
    Condition(Mutex<bool>, Condvar),
}

impl RemoteWaker {
    /// A waker whose bell is an event descriptor.
    pub(crate) fn with_eventfd(eventfd: OwnedFd) -> Self {
        Self::with(Bell::EventFd(eventfd))
    }

    /// A waker whose bell is a condition variable.
    pub(crate) fn with_condition() -> Self {
        Self::with(Bell::Condition(Mutex::new(false), Condvar::new()))
    }

    fn with(bell: Bell) -> Self {
        let shared = Shared {
            woken: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            bell,
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Makes the turn in progress, or the next one, return soon. Never lost, cheap while the thread is awake.
    pub fn wake(&self) {
        self.shared.woken.store(true, Ordering::SeqCst);
        if !self.shared.asleep.swap(false, Ordering::SeqCst) {
            return;
        }
        match &self.shared.bell {
            Bell::EventFd(eventfd) => {
                // A full counter (EAGAIN) is a bell that rings already.
                let _ = rustix::io::write(eventfd.as_fd(), &1_u64.to_le_bytes());
            }
            Bell::Condition(rung, condition) => {
                *rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
                condition.notify_one();
            }
        }
    }

    /// Whether somebody called since the last look.
    pub fn take_woken(&self) -> bool {
        self.shared.woken.swap(false, Ordering::SeqCst)
    }

    /// Whether somebody has called since the last look, which this is not: the next [`turn`](crate::Reactor::turn) does not wait
    /// either.
    pub fn is_woken(&self) -> bool {
        self.shared.woken.load(Ordering::SeqCst)
    }

    /// Announces that the thread is about to wait; `false`: it must not, somebody called.
    pub(crate) fn fall_asleep(&self) -> bool {
        self.shared.asleep.store(true, Ordering::SeqCst);
        if self.shared.woken.load(Ordering::SeqCst) {
            self.shared.asleep.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    /// The wait is over.
    pub(crate) fn wake_up(&self) {
        self.shared.asleep.store(false, Ordering::SeqCst);
    }

    /// The bell of a waker made with [`with_eventfd`](Self::with_eventfd).
    pub(crate) fn eventfd(&self) -> Option<&OwnedFd> {
        match &self.shared.bell {
            Bell::EventFd(eventfd) => Some(eventfd),
            Bell::Condition(..) => None,
        }
    }

    /// Waits for the bell of a waker made with [`with_condition`](Self::with_condition), at most `timeout`.
    pub(crate) fn wait(&self, timeout: Option<Duration>) {
        let Bell::Condition(rung, condition) = &self.shared.bell else {
            return;
        };
        let mut guard = rung.lock().unwrap_or_else(PoisonError::into_inner);
        match timeout {
            Some(timeout) if !*guard => {
                guard = condition
                    .wait_timeout(guard, timeout)
                    .map_or_else(|poisoned| poisoned.into_inner().0, |(guard, _)| guard);
            }
            Some(_) => {}
            None => {
                while !*guard {
                    guard = condition
                        .wait(guard)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
        *guard = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_was_only_seen_still_keeps_the_thread_awake() {
        let waker = RemoteWaker::with_condition();
        assert!(!waker.is_woken());
        waker.wake();
        assert!(waker.is_woken() && waker.is_woken());
        assert!(!waker.fall_asleep(), "somebody has called");
        assert!(waker.take_woken());
        assert!(!waker.is_woken());
        assert!(waker.fall_asleep());
    }
}
