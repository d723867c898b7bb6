//! Running futures on a reactor, and a kernel without rings.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use blockyard_ring::{Reactor, RemoteWaker};

struct Bell(RemoteWaker);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.wake();
    }
}

/// Runs a future on the reactor, waiting only in its turns.
pub(crate) fn block_on(reactor: &Reactor, future: impl Future<Output = ()>) {
    let mut future = pin!(future);
    let remote = reactor.waker();
    let waker = Waker::from(Arc::new(Bell(remote.clone())));
    let mut cx = Context::from_waker(&waker);
    loop {
        remote.take_woken();
        if future.as_mut().poll(&mut cx) == Poll::Ready(()) {
            return;
        }
        reactor
            .turn(Some(Duration::from_secs(20)))
            .expect("the reactor goes on");
    }
}
