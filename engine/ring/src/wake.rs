//! [`RemoteWaker`]: makes a waiting reactor return from any thread, without a system call while it is awake.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
    /// A ring reads this descriptor all the time; a thread without a ring waits until it can be read.
    bell: OwnedFd,
}

impl RemoteWaker {
    /// A waker whose bell is an event descriptor.
    pub(crate) fn new(bell: OwnedFd) -> Self {
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
        // A full counter (EAGAIN) is a bell that rings already.
        let _ = rustix::io::write(self.shared.bell.as_fd(), &1_u64.to_le_bytes());
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

    /// The bell.
    pub(crate) fn bell(&self) -> &OwnedFd {
        &self.shared.bell
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_was_only_seen_still_keeps_the_thread_awake() {
        let bell = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC);
        let waker = RemoteWaker::new(bell.expect("a descriptor"));
        assert!(!waker.is_woken());
        waker.wake();
        assert!(waker.is_woken() && waker.is_woken());
        assert!(!waker.fall_asleep(), "somebody has called");
        assert!(waker.take_woken());
        assert!(!waker.is_woken());
        assert!(waker.fall_asleep());
    }
}
