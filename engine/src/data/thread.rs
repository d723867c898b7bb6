//! One data thread: an OS thread with its reactor, its timers and a hand-driven local executor. The reactor's `turn` is
//! the only place it waits.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Weak};
use std::task::{Context, Wake, Waker};
use std::thread::JoinHandle;
use std::time::Instant;

use blockyard_ring::{Reactor, ReactorConfig, RemoteWaker};
use blockyard_storage::LocalFuture;
use blockyard_storage::buffer::BufferPool;
use tokio::task::LocalSet;

use crate::data::context::DataContext;
use crate::data::cpu_pool::CpuPool;
use crate::data::opener::ReactorOpener;
use crate::data::timers::ThreadClock;
use crate::error::EngineError;
use crate::node::news::News;

/// Work sent to a data thread.
pub(crate) type Task = Box<dyn FnOnce(Rc<DataContext>) -> LocalFuture<'static, ()> + Send>;

/// The handle of a running data thread. Dropping it ends the thread once its tasks in flight have been abandoned.
pub(super) struct DataThread {
    mailbox: Option<Arc<Sender<Task>>>,
    waker: RemoteWaker,
    join: Option<JoinHandle<()>>,
}

/// Sends tasks to a data thread from anywhere, as long as it lives; it does not keep it alive.
#[derive(Clone)]
pub(crate) struct Mailbox {
    tasks: Weak<Sender<Task>>,
    waker: RemoteWaker,
}

impl Mailbox {
    /// Hands a task over; `false`: the thread has ended.
    pub(crate) fn send(&self, task: Task) -> bool {
        let sent = self
            .tasks
            .upgrade()
            .is_some_and(|mailbox| mailbox.send(task).is_ok());
        self.waker.wake();
        sent
    }
}

impl DataThread {
    /// Starts a thread and waits until its reactor is open.
    ///
    /// # Errors
    /// When neither the thread nor its reactor can be had; the text names the reason.
    pub(super) fn start(
        name: &str,
        config: ReactorConfig,
        clock_start: Instant,
        pool: BufferPool,
        cpu: CpuPool,
        news: News,
    ) -> Result<Self, EngineError> {
        let (mailbox, tasks) = channel();
        let (opened, answer) = channel();
        let join = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || match Reactor::open(config) {
                Ok(reactor) => {
                    let reactor = Rc::new(reactor);
                    let _ = opened.send(Ok(reactor.waker()));
                    let clock = Rc::new(ThreadClock::new(clock_start));
                    run(&reactor, &tasks, &clock, pool, cpu, news);
                }
                Err(error) => {
                    let _ = opened.send(Err(error.to_string()));
                }
            })
            .map_err(|error| {
                EngineError::generic(format!("Cannot start a data thread: {error}"))
            })?;
        match answer.recv() {
            Ok(Ok(waker)) => Ok(Self {
                mailbox: Some(Arc::new(mailbox)),
                waker,
                join: Some(join),
            }),
            Ok(Err(reason)) => Err(EngineError::generic(format!(
                "Cannot open a data thread's reactor: {reason}"
            ))),
            Err(_) => Err(EngineError::generic("A data thread ended while it started")),
        }
    }

    /// A way to send tasks from anywhere.
    pub(super) fn mailbox(&self) -> Mailbox {
        Mailbox {
            tasks: self
                .mailbox
                .as_ref()
                .map(Arc::downgrade)
                .unwrap_or_default(),
            waker: self.waker.clone(),
        }
    }

    /// Hands a task over; `false`: the thread has ended.
    pub(super) fn send(&self, task: Task) -> bool {
        let sent = self
            .mailbox
            .as_ref()
            .is_some_and(|mailbox| mailbox.send(task).is_ok());
        self.waker.wake();
        sent
    }
}

impl Drop for DataThread {
    fn drop(&mut self) {
        drop(self.mailbox.take());
        self.waker.wake();
        if let Some(join) = self.join.take()
            && join.join().is_err()
        {
            tracing::error!("a data thread ended by a panic outside its tasks");
        }
    }
}

/// Wakes the loop from anywhere.
struct LoopWaker(RemoteWaker);

impl Wake for LoopWaker {
    fn wake(self: Arc<Self>) {
        self.0.wake();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.wake();
    }
}

/// The loop: take in tasks, poll what is awake, submit and wait once, wake what is due.
fn run(
    reactor: &Rc<Reactor>,
    tasks: &Receiver<Task>,
    clock: &Rc<ThreadClock>,
    pool: BufferPool,
    cpu: CpuPool,
    news: News,
) {
    let opener = Rc::new(ReactorOpener::new(reactor.clone()));
    let context = Rc::new(DataContext::new(clock.clone(), pool, cpu, news, opener));
    let mut local = LocalSet::new();
    let remote = reactor.waker();
    let waker = Waker::from(Arc::new(LoopWaker(remote.clone())));
    loop {
        let take = |task: Task| drop(local.spawn_local(task(context.clone())));
        let Some(awake) = look(&remote, tasks, take, || clock.wake_due()) else {
            return;
        };
        if awake {
            // One round polls a bounded number of tasks and wakes itself if more are ready, so that requests queued
            // meanwhile reach the kernel in between.
            let _ = Pin::new(&mut local).poll(&mut Context::from_waker(&waker));
        }
        if let Err(error) = reactor.turn(clock.until_next()) {
            tracing::error!(%error, "a data thread cannot go on");
            return;
        }
    }
}

/// Takes in tasks and wakes what is due; whether anything may be ready after that. `None`: nobody can send any more.
fn look(
    remote: &RemoteWaker,
    tasks: &Receiver<Task>,
    mut take: impl FnMut(Task),
    wake_due: impl FnOnce(),
) -> Option<bool> {
    // Looked at before the mailbox: whoever sends after this look wakes the turn that follows.
    let mut awake = remote.take_woken();
    loop {
        match tasks.try_recv() {
            Ok(task) => {
                take(task);
                awake = true;
            }
            Err(TryRecvError::Empty) => break,
            Err(TryRecvError::Disconnected) => return None,
        }
    }
    wake_due();
    // What was due has called, but so may have somebody who has sent a task by now: the call is left for the turn, which must
    // not wait then.
    Some(awake || remote.is_woken())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_that_comes_behind_the_look_keeps_the_turn_from_waiting() {
        let config = ReactorConfig::new(BufferPool::new(0));
        let remote = Reactor::open(config).expect("a reactor").waker();
        let (mailbox, tasks) = channel::<Task>();
        let send = || {
            let sent = mailbox.send(Box::new(|_| Box::pin(std::future::ready(()))));
            assert!(sent.is_ok());
            remote.wake();
        };
        let mut taken = 0;
        let mut round = |late: bool| {
            let wake_due = || {
                if late {
                    send()
                }
            };
            look(&remote, &tasks, |_| taken += 1, wake_due)
        };
        assert_eq!(round(false), Some(false), "nobody is there");
        assert_eq!(round(true), Some(true));
        assert!(
            remote.is_woken(),
            "the turn would wait beside a full mailbox"
        );
        assert_eq!(round(false), Some(true));
        assert!(!remote.is_woken());
        assert_eq!(taken, 1);
    }
}
