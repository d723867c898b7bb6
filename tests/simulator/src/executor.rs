//! [`run`]: polls one future while it can go on, and lets something happen when it cannot.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// Runs `future` to its end. Whenever it waits, `idle` makes something happen that it may wait for (a step of a world, a
/// timer); when `idle` says `false` the future is dropped where it is, and there is no result.
pub fn run<T>(future: impl Future<Output = T>, mut idle: impl FnMut() -> bool) -> Option<T> {
    let flag = Arc::new(Flag(AtomicBool::new(true)));
    let waker = Waker::from(flag.clone());
    let mut future = pin!(future);
    loop {
        while flag.0.swap(false, Ordering::AcqRel) {
            if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return Some(value);
            }
        }
        if !idle() {
            return None;
        }
    }
}
