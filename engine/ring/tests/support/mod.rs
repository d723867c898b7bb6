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

/// From now on this thread, and those it starts, cannot set a ring up.
#[allow(dead_code, reason = "not every test that shares this file needs it")]
pub(crate) fn forbid_io_uring(errno: i32) {
    use seccompiler::{SeccompAction, SeccompFilter};
    let arch = std::env::consts::ARCH.try_into().expect("a known machine");
    let rules = [(libc::SYS_io_uring_setup, vec![])].into_iter().collect();
    let refuse = SeccompAction::Errno(errno.unsigned_abs());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).expect("a filter");
    let program: seccompiler::BpfProgram = filter.try_into().expect("compiles");
    seccompiler::apply_filter(&program).expect("installed");
}
