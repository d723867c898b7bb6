//! [`Ceiling`]: fewer requests in flight where they are slow because they wait for each other, so that a pause or a cancel does not
//! take as long as all of them.
//!
//! Whether they do is tried: half as many must be quicker. Where a distance is what they wait for, or a server that takes now this
//! long and now that, half as many take as long, and all of them are let go again.

use std::time::Duration;

/// Requests slower than this are tried with fewer beside them.
const SLOW: Duration = Duration::from_millis(100);

/// After so many slow requests, one at a time, two are tried.
const SLOW_ALONE: u32 = 8;

/// What half as many may take at most of what they took before, in hundredths, to stay so many.
const QUICKER_PERCENT: u128 = 66;

/// With so few in flight one round of them has to tell, else two: those that end first are the quick ones.
const FEW: usize = 2;

/// Requests until the next trial, after one that brought nothing; twice as many after each further one.
const REST: u32 = 64;

/// The most of them.
const REST_MAX: u32 = 1024;

/// How many requests there may be at most.
#[derive(Clone, Debug)]
pub(super) struct Ceiling {
    count: usize,
    count_max: usize,
    /// What a request takes that waits for no other: the quickest so far, or the last that was alone.
    alone: Option<Duration>,
    /// Slow requests that were alone.
    slow_alone: u32,
    trial: Option<Trial>,
    /// Requests until a trial may begin.
    rest: u32,
    /// Trials that have brought nothing.
    in_vain: u32,
}

/// Half as many.
#[derive(Clone, Copy, Debug)]
struct Trial {
    /// What there may be again if that is not quicker.
    before: usize,
    /// Requests that were begun beside more and have not ended.
    to_pass: usize,
    /// What those took.
    beside_more: Mean,
    beside_fewer: Mean,
}

#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    sum: Duration,
    requests: usize,
}

impl Ceiling {
    /// None, at first: as many as `count_max`.
    pub(super) fn new(count_max: usize) -> Self {
        Self {
            count: count_max,
            count_max,
            alone: None,
            slow_alone: 0,
            trial: None,
            rest: 0,
            in_vain: 0,
        }
    }

    /// At least one.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// A request took this long, while there might be so many in flight.
    pub(super) fn took(&mut self, time: Duration, in_flight: usize) {
        let is_alone = in_flight == 1;
        let alone = match self.alone {
            Some(alone) if !is_alone => alone.min(time),
            _ => time,
        };
        self.alone = Some(alone);
        if let Some(trial) = &mut self.trial {
            if trial.to_pass > 0 {
                trial.to_pass -= 1;
                trial.beside_more.add(time);
                return;
            }
            trial.beside_fewer.add(time);
            let rounds = if in_flight <= FEW { 1 } else { 2 };
            if trial.beside_fewer.requests >= rounds * in_flight {
                self.end_trial();
            }
            return;
        }
        self.rest = self.rest.saturating_sub(1);
        if time < SLOW / 2 || (!is_alone && time * 2 <= alone * 3) {
            self.count = (self.count + 1).min(self.count_max);
        } else if is_alone {
            // Slow by itself: whether two take longer has to be tried now and then.
            self.slow_alone += 1;
            if self.slow_alone.is_multiple_of(SLOW_ALONE) {
                self.count = self.count_max.min(2);
            }
        } else if time > SLOW && time * 4 > alone * 7 && self.rest == 0 {
            // This one is left out: it was looked for because it was slow.
            self.trial = Some(Trial {
                before: self.count,
                to_pass: in_flight - 1,
                beside_more: Mean::default(),
                beside_fewer: Mean::default(),
            });
            self.count = in_flight / 2;
        }
    }

    fn end_trial(&mut self) {
        let Some(trial) = self.trial.take() else {
            return;
        };
        if trial
            .beside_fewer
            .is_within(QUICKER_PERCENT, trial.beside_more)
        {
            return;
        }
        self.count = trial.before;
        self.rest = (REST << self.in_vain.min(16)).min(REST_MAX);
        self.in_vain += 1;
    }
}

impl Mean {
    fn add(&mut self, time: Duration) {
        self.sum += time;
        self.requests += 1;
    }

    /// Whether it is no more than so many hundredths of another.
    fn is_within(self, percent: u128, other: Self) -> bool {
        let times = |one: Self, requests: usize| one.sum.as_nanos() * requests as u128;
        times(self, other.requests) * 100 <= times(other, self.requests) * percent
    }
}
