//! [`Reactor`]: what one data thread waits on, with a ring or without.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use blockyard_storage::buffer::BufferPool;
use blockyard_storage::{LocalFuture, Storage};
use rustix::event::{EventfdFlags, eventfd};

use crate::host_file::HostFile;
use crate::host_storage::HostStorage;
use crate::polled_socket::{PolledSocket, Poller};
use crate::ring_file::RingFile;
use crate::ring_socket::RingSocket;
use crate::socket::{Socket, widen};
use crate::uring::{Uring, set_up};
use crate::wake::RemoteWaker;
use crate::workers::Workers;

/// How files are to be read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// io_uring where it is allowed, else threads.
    #[default]
    Auto,
    /// io_uring or nothing.
    Uring,
    /// Threads.
    Threads,
}

/// How files are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// Through io_uring.
    Uring,
    /// By threads.
    Threads,
}

/// How a reactor is set up.
#[derive(Clone, Debug)]
pub struct ReactorConfig {
    /// With a ring or without.
    pub backend: BackendChoice,
    /// Entries of the submission queue.
    pub depth: u32,
    /// Threads for blocking calls at most.
    pub workers_max: usize,
    /// Whose buffers may be registered.
    pub pool: BufferPool,
}

impl ReactorConfig {
    /// The usual set-up.
    pub fn new(pool: BufferPool) -> Self {
        Self {
            backend: BackendChoice::Auto,
            depth: 128,
            workers_max: 16,
            pool,
        }
    }
}

/// A reactor that cannot be had or cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct ReactorError {
    what: &'static str,
    source: io::Error,
}

/// Whether io_uring can be used here.
///
/// # Errors
/// Why not, in the kernel's words.
pub fn probe() -> Result<(), io::Error> {
    set_up(8).map(drop)
}

/// On what a thread waits.
enum WayOfWaiting {
    /// For completions.
    Ring(Rc<Uring>),
    /// Until the bell rings or a socket can go on.
    Poll(Rc<Poller>),
}

/// What one thread waits on. Does not leave its thread.
pub struct Reactor {
    way: WayOfWaiting,
    workers: Workers,
    waker: RemoteWaker,
}

impl Reactor {
    /// Opens a reactor for this thread.
    ///
    /// # Errors
    /// When a ring was asked for and cannot be had, or no event descriptor.
    pub fn open(config: ReactorConfig) -> Result<Self, ReactorError> {
        let workers = Workers::new(config.workers_max);
        if config.backend != BackendChoice::Threads {
            let waker = RemoteWaker::new(bell(EventfdFlags::CLOEXEC)?);
            match Uring::open(config.depth, config.pool, waker.clone()) {
                Ok(uring) => {
                    return Ok(Self {
                        way: WayOfWaiting::Ring(uring),
                        workers,
                        waker,
                    });
                }
                Err(source) if config.backend == BackendChoice::Uring => {
                    return Err(ReactorError {
                        what: "Cannot set an io_uring up",
                        source,
                    });
                }
                Err(error) => tracing::debug!(%error, "no io_uring, threads instead"),
            }
        }
        let poller = Poller::new().map_err(|source| ReactorError {
            what: "Cannot make a descriptor to wait with",
            source,
        })?;
        Ok(Self {
            way: WayOfWaiting::Poll(Rc::new(poller)),
            workers,
            waker: RemoteWaker::new(bell(EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?),
        })
    }

    /// With a ring or without.
    pub fn backend(&self) -> BackendKind {
        match self.way {
            WayOfWaiting::Ring(_) => BackendKind::Uring,
            WayOfWaiting::Poll(_) => BackendKind::Threads,
        }
    }

    /// What ends a wait of this reactor from any thread.
    pub fn waker(&self) -> RemoteWaker {
        self.waker.clone()
    }

    /// Submits everything queued, waits for an end, a call or the timeout (`None`: without limit, zero: not at all), and
    /// wakes the futures whose operation has ended. The only place where the thread waits.
    ///
    /// # Errors
    /// When the ring itself fails.
    pub fn turn(&self, timeout: Option<Duration>) -> Result<(), ReactorError> {
        match &self.way {
            WayOfWaiting::Ring(uring) => uring.turn(timeout).map_err(|source| ReactorError {
                what: "The io_uring failed",
                source,
            }),
            WayOfWaiting::Poll(poller) => {
                if timeout != Some(Duration::ZERO) && self.waker.fall_asleep() {
                    poller.wait(self.waker.bell(), timeout);
                    self.waker.wake_up();
                } else {
                    poller.look();
                }
                Ok(())
            }
        }
    }

    /// A host file as a storage on this reactor.
    pub fn file(&self, file: HostFile, read_only: bool) -> Rc<dyn Storage> {
        let ring = match &self.way {
            WayOfWaiting::Ring(uring) => Some(RingFile::new(uring.clone(), file.clone())),
            WayOfWaiting::Poll(_) => None,
        };
        Rc::new(HostStorage::new(
            file,
            read_only,
            self.workers.clone(),
            ring,
        ))
    }

    /// A connected socket on this reactor. It is shut down when it is dropped.
    ///
    /// # Errors
    /// When the descriptor cannot be waited for, as a file's.
    pub fn socket(&self, socket: OwnedFd) -> io::Result<Rc<dyn Socket>> {
        widen(&socket);
        Ok(match &self.way {
            WayOfWaiting::Ring(uring) => Rc::new(RingSocket::new(uring.clone(), socket)?),
            WayOfWaiting::Poll(poller) => Rc::new(PolledSocket::new(poller.clone(), socket)?),
        })
    }

    /// Carries out a call that may block on a worker; ends with it, also when it panicked.
    pub fn blocking(&self, call: Box<dyn FnOnce() + Send>) -> LocalFuture<'static, ()> {
        let answer = self.workers.run(call);
        Box::pin(async move {
            let _ = answer.await;
        })
    }
}

fn bell(flags: EventfdFlags) -> Result<OwnedFd, ReactorError> {
    eventfd(0, flags).map_err(|error| ReactorError {
        what: "Cannot make an event descriptor",
        source: error.into(),
    })
}
