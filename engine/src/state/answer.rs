//! Answers that are waited for as long as is reasonable: a stuck file system holds up neither clients nor disks.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

/// How long the state directory may take for what it is asked for.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where an answer goes: the first one counts.
pub(super) struct Answer<T>(Arc<Mutex<Option<oneshot::Sender<io::Result<T>>>>>);

impl<T> Clone for Answer<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Answer<T> {
    /// An answer, and where it is waited for.
    pub(super) fn new() -> (Self, oneshot::Receiver<io::Result<T>>) {
        let (sender, receiver) = oneshot::channel();
        (Self(Arc::new(Mutex::new(Some(sender)))), receiver)
    }

    /// Answers, if nobody has. Whether that was so.
    pub(super) fn give(&self, outcome: io::Result<T>) -> bool {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Whoever asked may have given up.
        sender.is_some_and(|sender| sender.send(outcome).is_ok())
    }
}

/// Ends waiting that takes too long.
#[derive(Clone, Debug)]
pub(super) struct Patience {
    watched: Sender<Watched>,
    has_ended: Arc<AtomicBool>,
}

/// Somebody waits.
struct Watched {
    until: Instant,
    /// Answers that it takes too long, unless there is an answer.
    give_up: Box<dyn FnOnce() -> bool + Send>,
}

impl Patience {
    /// Starts a thread that watches.
    ///
    /// # Errors
    /// When there is none to be had.
    pub(super) fn start() -> io::Result<Self> {
        let (watched, waiting) = channel();
        let has_ended = Arc::<AtomicBool>::default();
        let ends = Arc::clone(&has_ended);
        std::thread::Builder::new()
            .name("state-watch".to_owned())
            .spawn(move || watch(&waiting, &ends))?;
        Ok(Self { watched, has_ended })
    }

    /// Whether it makes sense to ask.
    ///
    /// # Errors
    /// `TimedOut` once the directory has not answered in time.
    pub(super) fn check(&self) -> io::Result<()> {
        match self.has_ended.load(Ordering::Acquire) {
            true => Err(too_long()),
            false => Ok(()),
        }
    }

    /// Somebody waits for `answer` from now on.
    pub(super) fn watch<T: Send + 'static>(&self, answer: Answer<T>) {
        // Nobody watches only when the daemon ends.
        let _ = self.watched.send(Watched {
            until: Instant::now() + PATIENCE,
            give_up: Box::new(move || answer.give(Err(too_long()))),
        });
    }
}

/// Who has asked first has the first deadline.
fn watch(waiting: &Receiver<Watched>, has_ended: &AtomicBool) {
    while let Ok(Watched { until, give_up }) = waiting.recv() {
        if !has_ended.load(Ordering::Acquire) {
            std::thread::sleep(until.saturating_duration_since(Instant::now()));
        }
        if give_up() {
            has_ended.store(true, Ordering::Release);
            tracing::error!("the state directory does not answer and is given up");
        }
    }
}

fn too_long() -> io::Error {
    let text = format!("it does not answer within {} s", PATIENCE.as_secs());
    io::Error::new(io::ErrorKind::TimedOut, text)
}
