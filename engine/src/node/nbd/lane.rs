//! [`Lane`]: one connection after the other to the same server. One that breaks is replaced, as soon as the server is there
//! again and as long as somebody has the node.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use crate::clock::{Clock, Moment};
use crate::data::Spawner;
use crate::data::context::HostFiles;
use crate::node::nbd::connecting::connect_until;
use crate::node::nbd::link::Link;
use crate::node::nbd::{NbdConnection, Remote};

/// How long one attempt to connect may take.
const ATTEMPT: Duration = Duration::from_secs(10);
/// Between two attempts: doubled from the first to the last of these.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(2));

/// Attempts at a connection besides the first.
const FURTHER_ATTEMPTS: u32 = 5;

/// What a lane needs of its thread.
#[derive(Clone)]
pub(super) struct Surroundings {
    pub(super) files: Rc<dyn HostFiles>,
    pub(super) clock: Rc<dyn Clock>,
    pub(super) spawner: Spawner,
}

/// One connection after the other.
pub(super) struct Lane {
    remote: Arc<Remote>,
    index: usize,
    around: Surroundings,
    link: RefCell<Option<Rc<Link>>>,
    connecting: Cell<bool>,
    /// What to wait before the next attempt.
    pause: Cell<Duration>,
    changed: Notify,
}

impl Lane {
    pub(super) fn new(remote: Arc<Remote>, index: usize, around: Surroundings) -> Rc<Self> {
        Rc::new(Self {
            remote,
            index,
            around,
            link: RefCell::default(),
            connecting: Cell::new(false),
            pause: Cell::new(Duration::ZERO),
            changed: Notify::new(),
        })
    }

    /// Requests in flight; `None`: there is no connection.
    pub(super) fn depth(&self) -> Option<usize> {
        let link = self.link.borrow();
        let link = link.as_ref().filter(|link| !link.is_broken())?;
        Some(link.depth())
    }

    /// Whether there is a connection that nobody here has used yet.
    pub(super) fn has_connection(&self) -> bool {
        self.remote.connection(self.index).is_some()
    }

    /// A connection that takes a request at once.
    pub(super) fn ready(&self) -> Option<Rc<Link>> {
        let link = self.link.borrow().clone();
        if let Some(link) = link.filter(|link| link.enter()) {
            if link.has_answered() {
                self.pause.set(Duration::ZERO);
            }
            return Some(link);
        }
        self.link.replace(None);
        let connection = self.remote.connection(self.index)?;
        let Surroundings { files, spawner, .. } = &self.around;
        let link = Link::new(connection, files, spawner.clone());
        let link = link.inspect_err(|error| tracing::warn!(%error, "a socket cannot be used"));
        let link = link.ok().filter(|link| link.enter())?;
        self.link.replace(Some(Rc::clone(&link)));
        Some(link)
    }

    /// Waits for such a connection until `until`; `None`: there is none by then.
    pub(super) async fn ready_until(self: &Rc<Self>, until: Moment) -> Option<Rc<Link>> {
        loop {
            let changed = self.changed.notified();
            if let Some(link) = self.ready() {
                return Some(link);
            }
            self.connect_in_background();
            if self.around.clock.now() >= until {
                return None;
            }
            tokio::select! {
                () = changed => {}
                () = self.around.clock.sleep_until(until) => {}
            }
        }
    }

    /// Sees to it that there will be a connection.
    pub(super) fn connect_in_background(self: &Rc<Self>) {
        if self.connecting.replace(true) {
            return;
        }
        let around = self.around.clone();
        let lane = Rc::downgrade(self);
        let spawner = around.spawner.clone();
        spawner.spawn(Box::pin(connect_again(lane, around)));
    }

    /// Makes the next attempt come later than the one before.
    fn next_pause(&self) -> Duration {
        let pause = self.pause.get();
        let (first, last) = PAUSES;
        self.pause.set((pause * 2).clamp(first, last));
        pause
    }
}

/// Connects until it succeeds or the lane is gone.
async fn connect_again(lane: Weak<Lane>, around: Surroundings) {
    for attempt in 1_u32.. {
        let Some((pause, remote)) = lane
            .upgrade()
            .map(|lane| (lane.next_pause(), Arc::clone(&lane.remote)))
        else {
            return;
        };
        let until = around.clock.now().after(pause);
        around.clock.sleep_until(until).await;
        let connected = connect(remote).await;
        let Some(lane) = lane.upgrade() else {
            return;
        };
        match connected.and_then(|new| lane.remote.replace(lane.index, new)) {
            Ok(()) => {
                tracing::info!("connected to an NBD server again");
                lane.connecting.set(false);
                lane.changed.notify_waiters();
                return;
            }
            // The server may not want more than there are.
            Err(text) if lane.index > 0 && attempt >= FURTHER_ATTEMPTS => {
                tracing::info!(text, "no further connection to an NBD server");
                return;
            }
            Err(text) => tracing::debug!(text, "no NBD server yet"),
        }
    }
}

/// One attempt, on a thread of its own: servers that are gone for long would keep those that wait for the disks.
async fn connect(remote: Arc<Remote>) -> Result<NbdConnection, String> {
    let (told, outcome) = oneshot::channel();
    let (target, given_up) = (remote.target().clone(), Arc::clone(remote.closed()));
    // Whoever connects does not keep the node.
    drop(remote);
    let thread = std::thread::Builder::new().name("nbd-connect".to_owned());
    let started = thread.spawn(move || {
        let now = Instant::now();
        // Nobody hears it once the lane has gone.
        let _ = told.send(connect_until(&target, now, now + ATTEMPT, &given_up));
    });
    started.map_err(|error| format!("Failed to start a thread: {error}"))?;
    let outcome = outcome.await;
    outcome.unwrap_or_else(|_| Err("the attempt came to nothing".to_owned()))
}
