//! [`Lane`]: a thread of the state directory that does what it is asked for in order, and for how long that is waited for: a stuck
//! file system holds up neither clients nor disks.
//!
//! Patience is with a thread that does not get on, not with a queue that is long: it is counted in looks at the thread which show no
//! progress, so that a process that was stopped for a while gives nothing up. Whoever has waited that long hears so, and so does
//! everybody who asks while it lasts; what they have asked for stays in the queue, and is done in its order once the thread gets on,
//! from when on it is waited for again.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::state::gone;

/// How long a thread of the state directory may get nowhere.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Looks at a thread within that time.
const LOOKS: u32 = 10;

/// What waits in the queue of a thread that gets nowhere, at most; more is refused.
const QUEUED_MAX: usize = 4096;

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

    /// Answers, if nobody has. Whether that was so, and somebody waits.
    pub(super) fn give(&self, outcome: io::Result<T>) -> bool {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Whoever asked may have given up.
        sender.is_some_and(|sender| sender.send(outcome).is_ok())
    }

    /// Whether nobody needs another.
    fn is_over(&self) -> bool {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sender.as_ref().is_none_or(oneshot::Sender::is_closed)
    }
}

/// What a thread shows of how it gets on.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    beats: AtomicU64,
    is_stuck: AtomicBool,
    queued: AtomicUsize,
}

impl Pulse {
    /// Something has been done.
    pub(super) fn beat(&self) {
        self.beats.fetch_add(1, Ordering::AcqRel);
        if self.is_stuck.swap(false, Ordering::AcqRel) {
            tracing::info!("the state directory answers again");
        }
    }
}

/// A thread that does what it is asked for.
pub(super) struct Lane<W> {
    asked: Sender<W>,
    watched: Sender<Box<dyn Waiting>>,
    pulse: Arc<Pulse>,
}

impl<W> Clone for Lane<W> {
    fn clone(&self) -> Self {
        Self {
            asked: self.asked.clone(),
            watched: self.watched.clone(),
            pulse: Arc::clone(&self.pulse),
        }
    }
}

impl<W> std::fmt::Debug for Lane<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane")
            .field("pulse", &self.pulse)
            .finish_non_exhaustive()
    }
}

/// What a lane's thread takes its work from.
pub(super) struct Asked<W> {
    asked: Receiver<W>,
    pulse: Arc<Pulse>,
}

/// Somebody waits.
trait Waiting: Send {
    fn is_over(&self) -> bool;

    /// Answers that it takes too long, unless there is an answer; whether there was none.
    fn give_up(&self, patience: Duration) -> bool;
}

impl<T: Send> Waiting for Answer<T> {
    fn is_over(&self) -> bool {
        Self::is_over(self)
    }

    fn give_up(&self, patience: Duration) -> bool {
        self.give(Err(too_long(patience)))
    }
}

impl<W: Send + 'static> Lane<W> {
    /// Starts a thread of this name that does what `serve` says until nobody can ask any more, and one that watches it.
    ///
    /// # Errors
    /// When there is none to be had.
    pub(super) fn start(
        name: &str,
        patience: Duration,
        serve: impl FnOnce(&Asked<W>) + Send + 'static,
    ) -> io::Result<Self> {
        let (asked, work) = channel();
        let (watched, waiting) = channel();
        let pulse = Arc::new(Pulse::default());
        let (taken_from, seen) = (Arc::clone(&pulse), Arc::clone(&pulse));
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                serve(&Asked {
                    asked: work,
                    pulse: taken_from,
                });
            })?;
        std::thread::Builder::new()
            .name(format!("{name}-watch"))
            .spawn(move || watch(&waiting, &seen, patience))?;
        Ok(Self {
            asked,
            watched,
            pulse,
        })
    }

    /// Asks for `work`, which gives `answer`.
    ///
    /// # Errors
    /// Too much waits already; the thread is gone, which is a bug. Nothing is done then.
    pub(super) fn ask<T: Send + 'static>(&self, work: W, answer: Answer<T>) -> io::Result<()> {
        if self.pulse.queued.fetch_add(1, Ordering::AcqRel) >= QUEUED_MAX {
            self.pulse.queued.fetch_sub(1, Ordering::AcqRel);
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{QUEUED_MAX} requests wait for it"),
            ));
        }
        self.asked.send(work).map_err(|_| gone())?;
        // Nobody watches only when the daemon ends.
        let _ = self.watched.send(Box::new(answer));
        Ok(())
    }
}

impl<W> Asked<W> {
    /// To be told of all that has been done, also behind each answer.
    pub(super) fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// The next; `None`: nobody can ask any more.
    pub(super) fn next(&self) -> Option<W> {
        let work = self.asked.recv().ok();
        self.taken(work)
    }

    /// The next if it waits already.
    pub(super) fn next_now(&self) -> Option<W> {
        let work = self.asked.try_recv().ok();
        self.taken(work)
    }

    fn taken(&self, work: Option<W>) -> Option<W> {
        if work.is_some() {
            self.pulse.queued.fetch_sub(1, Ordering::AcqRel);
            self.pulse.beat();
        }
        work
    }
}

/// Tells those who wait, in the order in which they have asked, when the thread gets nowhere.
fn watch(waiting: &Receiver<Box<dyn Waiting>>, pulse: &Pulse, patience: Duration) {
    while let Ok(answer) = waiting.recv() {
        let mut seen = pulse.beats.load(Ordering::Acquire);
        let mut looks = 0;
        while !answer.is_over() {
            let is_known = pulse.is_stuck.load(Ordering::Acquire);
            if looks < LOOKS && !is_known {
                std::thread::sleep(patience / LOOKS);
                let now = pulse.beats.load(Ordering::Acquire);
                looks = match now == seen {
                    true => looks + 1,
                    false => 0,
                };
                seen = now;
                continue;
            }
            // Said first: an answer that comes later is followed by a beat.
            pulse.is_stuck.store(true, Ordering::Release);
            match answer.give_up(patience) {
                true if !is_known => {
                    tracing::error!("the state directory does not answer and is not waited for");
                }
                true => {}
                false => pulse.is_stuck.store(is_known, Ordering::Release),
            }
        }
    }
}

fn too_long(patience: Duration) -> io::Error {
    let text = format!("it has not got on for {} s", patience.as_secs());
    io::Error::new(io::ErrorKind::TimedOut, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(500);

    /// What a lane of the tests does: waits, as often as there is something to wait for; then answers.
    struct Work {
        steps: Receiver<()>,
        done: Answer<u32>,
    }

    fn lane() -> Lane<Work> {
        let lane = Lane::start("test", SHORT, |asked: &Asked<Work>| {
            while let Some(Work { steps, done }) = asked.next() {
                while steps.recv().is_ok() {
                    asked.pulse().beat();
                }
                done.give(Ok(7));
                asked.pulse().beat();
            }
        });
        lane.expect("threads")
    }

    fn ask(lane: &Lane<Work>) -> (Sender<()>, oneshot::Receiver<io::Result<u32>>) {
        let (step, steps) = channel();
        let (done, outcome) = Answer::new();
        let work = Work {
            steps,
            done: done.clone(),
        };
        lane.ask(work, done).expect("taken");
        (step, outcome)
    }

    fn ended(outcome: oneshot::Receiver<io::Result<u32>>) -> Result<u32, io::ErrorKind> {
        let outcome = outcome.blocking_recv().expect("answered");
        outcome.map_err(|error| error.kind())
    }

    #[test]
    fn nobody_waits_for_what_gets_nowhere_and_everybody_again_once_it_does() {
        let lane = lane();
        let (first_step, first) = ask(&lane);
        let (second_step, second) = ask(&lane);
        assert_eq!(ended(first), Err(io::ErrorKind::TimedOut));
        assert_eq!(ended(second), Err(io::ErrorKind::TimedOut));
        let (third_step, third) = ask(&lane);
        assert!(lane.pulse.is_stuck.load(Ordering::Acquire));
        assert_eq!(ended(third), Err(io::ErrorKind::TimedOut));
        // All of it is done after all, in order, and what is asked for then is waited for.
        drop((first_step, second_step, third_step));
        while lane.pulse.queued.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
        loop {
            let (step, fourth) = ask(&lane);
            drop(step);
            match ended(fourth) {
                Ok(answer) => break assert_eq!(answer, 7),
                // The third has just been begun.
                Err(kind) => assert_eq!(kind, io::ErrorKind::TimedOut),
            }
        }
    }

    #[test]
    fn what_gets_on_is_waited_for_however_long_it_takes() {
        let lane = lane();
        let (step, first) = ask(&lane);
        let (behind, second) = ask(&lane);
        // Longer than the patience, and as often as it is looked at.
        let paced = std::thread::spawn(move || {
            for _ in 0..10 * LOOKS {
                std::thread::sleep(SHORT / LOOKS / 2);
                step.send(()).expect("it goes on");
            }
        });
        assert_eq!(ended(first), Ok(7));
        drop(behind);
        assert_eq!(ended(second), Ok(7));
        paced.join().expect("paced");
    }

    #[test]
    fn no_queue_grows_without_end() {
        let lane = lane();
        let all: Vec<_> = (0..QUEUED_MAX).map(|_| ask(&lane)).collect();
        let refused = (0..2).find_map(|_| {
            let (_, steps) = channel();
            let (done, _) = Answer::new();
            let work = Work {
                steps,
                done: done.clone(),
            };
            lane.ask(work, done).err()
        });
        let refused = refused.expect("one may have been taken out of it");
        assert_eq!(refused.kind(), io::ErrorKind::TimedOut);
        drop(all);
    }
}
