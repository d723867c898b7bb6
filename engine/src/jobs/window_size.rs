//! [`WindowSize`]: as many requests in flight as the disks need and no more, found by measuring what moves.
//!
//! A far end wants many in flight. A disk that is quick and takes one after the other gets slower the more wait for it: their
//! bytes have left the processor's caches by the time that they are written, and a guest's request waits behind all of them.
//! So the number doubles at first for as long as more moves; later a few more or a few less are tried by turns.

use std::time::Duration;

use crate::clock::Moment;
use crate::jobs::ceiling::Ceiling;
use crate::jobs::copy_options::{FOLLOWING_MAX, WindowLimits};

/// Requests in flight at first, before anything is known.
const START: usize = 4;

/// What twice as many requests have to move to be doubled again, in hundredths of before.
const GROWN_PERCENT: u128 = 125;

/// Rounds that may move less than that: one may have been held up by something else.
const GROWN_IN_VAIN_MAX: u32 = 2;

/// What more requests have to move to be kept, in hundredths.
const BETTER_PERCENT: u128 = 103;

/// What fewer requests have to move to be kept, in hundredths.
const EQUAL_PERCENT: u128 = 100;

/// Shortest time in which a number of requests is measured.
const MEASURED: Duration = Duration::from_millis(4);

/// Requests by which a number of them is measured, at least.
const MEASURED_REQUESTS: usize = 16;

/// Measurements between two trials at most, when none brings anything.
const REST_MAX: u32 = 64;

/// How much longer requests may take with all that there may be in flight than with the first few, in hundredths, where a
/// distance is what they wait for and not each other.
const FAR_PERCENT: u32 = 140;

/// Measurements until the first trial there.
const REST_FAR: u32 = 32;

/// Of how many of the last requests the length is looked at, by and large.
const LENGTHS: u64 = 8;

/// How many times as many short requests there may be for it to be found out anew how many are of use.
const MANY_MORE: usize = 2;

/// Requests of up to this length by and large are short: neighbours among those that are begun together reach the disk as one.
const SHORT_BYTES: u64 = 96 << 10;

/// Short requests that take no longer with all that are in flight hold nobody up: fewer that move as much are no gain then.
const QUICK: Duration = Duration::from_millis(5);

/// Short ones are begun by this part of all.
const HANDFULS: usize = 4;

/// How many requests one copy has in flight.
#[derive(Clone, Debug)]
pub(super) struct WindowSize {
    count: usize,
    limits: WindowLimits,
    /// What requests are long lately.
    length_bytes: u64,
    /// Whether there was one.
    has_begun: bool,
    /// There might have been so many when it was last found out how many are of use.
    looked_up_to: usize,
    /// More are not slower beside each other: it is a distance that they wait for.
    is_far: bool,
    /// What writers have changed is brought over.
    is_following: bool,
    /// Slow requests hold the number down to this.
    ceiling: Ceiling,
    phase: Phase,
    measure: Measure,
}

#[derive(Clone, Debug)]
enum Phase {
    /// One more for each that ends, in rounds, while that moves more.
    Growing {
        /// In flight when this round began.
        round: usize,
        best: Option<(usize, Rate)>,
        /// How long requests took in the first round.
        first_took: Option<Duration>,
        in_vain: u32,
    },
    Trying(Trial),
}

impl Phase {
    fn growing_from(count: usize) -> Self {
        Self::Growing {
            round: count,
            best: None,
            first_took: None,
            in_vain: 0,
        }
    }
}

/// A number of requests and a somewhat different one, by turns.
#[derive(Clone, Copy, Debug)]
struct Trial {
    base: usize,
    other: usize,
    /// Of `base`, `other` and `base`, as far as they are known.
    rates: [Option<Rate>; 3],
    /// Measurements until it begins.
    rest: u32,
    /// Twice or half as many; else a third or a quarter.
    is_wide: bool,
    /// Trials in a row that have brought nothing.
    in_vain: u32,
}

#[derive(Clone, Copy, Debug)]
struct Rate {
    bytes: u64,
    time: Duration,
    /// Each request, on average.
    took: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
struct Measure {
    /// Requests to let pass before it begins, as they were begun beside another number.
    to_pass: usize,
    from: Option<Moment>,
    bytes: u64,
    requests: usize,
    took: Duration,
}

impl WindowSize {
    /// At most as `limits` say, and at least one. No request is longer than `longest_bytes`.
    pub(super) fn new(limits: WindowLimits, longest_bytes: u64) -> Self {
        let count_max = most(limits, longest_bytes);
        let count = count_max.min(START);
        Self {
            count,
            limits,
            length_bytes: longest_bytes,
            has_begun: false,
            looked_up_to: count_max,
            is_far: false,
            is_following: false,
            ceiling: Ceiling::new(limits.requests.max(1)),
            phase: Phase::growing_from(count),
            measure: Measure::default(),
        }
    }

    /// Requests to have in flight, at least one.
    pub(super) fn requests(&self) -> usize {
        self.count.min(self.count_max()).min(self.ceiling.count())
    }

    /// How many more are begun at once, at least, as soon as there may be so many more: not each by itself when another has ended. A far end would
    /// have less to do meanwhile, and writers do not wait for more than they have to.
    pub(super) fn handful(&self) -> usize {
        match self.is_short() && !self.is_far && !self.is_following {
            true => (self.requests() / HANDFULS).max(1),
            false => 1,
        }
    }

    fn is_short(&self) -> bool {
        self.length_bytes <= SHORT_BYTES
    }

    /// From now on what others write is brought over.
    pub(super) fn follow_writers(&mut self) {
        self.is_following = true;
        self.limits = self.limits.with_requests(FOLLOWING_MAX);
    }

    /// As many as may be in flight of such as there were lately.
    fn count_max(&self) -> usize {
        most(self.limits, self.length_bytes)
    }

    /// A copy begins that counts for so many bytes in memory; none, if it is not carried through it.
    pub(super) fn begun(&mut self, now: Moment, bytes: u64) {
        if bytes > 0 {
            let before = match std::mem::replace(&mut self.has_begun, true) {
                true => self.length_bytes,
                false => bytes,
            };
            self.length_bytes = (before * (LENGTHS - 1) + bytes).div_ceil(LENGTHS);
            self.look_further();
        }
        if self.measure.to_pass == 0 {
            self.measure.from.get_or_insert(now);
        }
    }

    /// Where requests have become so short that many more of them may be in flight, trials of a few more would take long.
    fn look_further(&mut self) {
        let count_max = self.count_max();
        let is_trying = matches!(self.phase, Phase::Trying(_));
        if is_trying && count_max >= self.looked_up_to.saturating_mul(MANY_MORE) {
            self.looked_up_to = count_max;
            self.phase = Phase::growing_from(self.count);
            self.measure_anew(self.count);
        }
    }

    /// A request took this long.
    pub(super) fn took(&mut self, time: Duration) {
        self.ceiling.took(time, self.requests());
        if self.count > self.ceiling.count() {
            self.interrupted();
        }
    }

    /// A copy of `bytes` has ended that took this long, beside which there were as many as there may be.
    pub(super) fn ended(&mut self, now: Moment, bytes: u64, took: Duration) {
        if self.count > self.ceiling.count() {
            return;
        }
        if let Phase::Growing { .. } = self.phase {
            self.count = (self.count + 1).min(self.count_max());
        }
        let Some(rate) = self.measured(now, bytes, took) else {
            return;
        };
        match self.phase {
            Phase::Growing { .. } => self.grow(rate),
            Phase::Trying(trial) => self.try_on(trial, rate),
        }
        self.measure.from = Some(now);
    }

    /// Something else than the disks has held up the copy, as an order, a rate limit or an error does.
    pub(super) fn interrupted(&mut self) {
        self.measure_anew(self.requests());
    }

    fn measure_anew(&mut self, to_pass: usize) {
        self.measure = Measure {
            to_pass,
            ..Measure::default()
        };
    }

    /// What has moved, once it is enough.
    fn measured(&mut self, now: Moment, bytes: u64, took: Duration) -> Option<Rate> {
        let measure = &mut self.measure;
        if measure.to_pass > 0 {
            measure.to_pass -= 1;
            measure.from = (measure.to_pass == 0).then_some(now);
            return None;
        }
        let time = now.since(measure.from?);
        measure.bytes += bytes;
        measure.requests += 1;
        measure.took += took;
        let is_enough = match self.phase {
            Phase::Growing { round, .. } => measure.requests >= round,
            Phase::Trying(_) => {
                // What ends together, as at a far end, counts whole.
                let rounds = MEASURED_REQUESTS.div_ceil(self.count);
                measure.requests >= rounds * self.count && time >= MEASURED
            }
        };
        if !is_enough {
            return None;
        }
        let Measure {
            bytes,
            requests,
            took,
            ..
        } = std::mem::take(measure);
        let took = took / u32::try_from(requests).unwrap_or(u32::MAX);
        Some(Rate { bytes, time, took })
    }

    /// A round has ended in which the number grew.
    fn grow(&mut self, rate: Rate) {
        let Phase::Growing {
            round,
            best,
            first_took,
            in_vain,
        } = self.phase
        else {
            return;
        };
        let first_took = first_took.unwrap_or(rate.took);
        let has_grown = best.is_none_or(|(_, best)| rate.is_at_least(GROWN_PERCENT, best));
        let (best, in_vain) = match best {
            Some(best) if !has_grown => (best, in_vain + 1),
            _ => ((round, rate), 0),
        };
        // What is of use of quick short ones is found out from all there may be down: a few more after the other would take long.
        let is_quick = self.is_short() && rate.took <= QUICK;
        let may_grow = in_vain < GROWN_IN_VAIN_MAX || is_quick;
        if may_grow && round < self.count_max() {
            self.phase = Phase::Growing {
                round: self.count,
                best: Some(best),
                first_took: Some(first_took),
                in_vain,
            };
            return;
        }
        self.looked_up_to = self.count_max();
        let is_far = in_vain == 0 && rate.took * 100 <= first_took * FAR_PERCENT;
        self.is_far = is_far;
        let base = if is_quick { round } else { best.0 };
        self.start(Trial {
            base,
            other: fewer(base, true),
            rates: [None; 3],
            rest: if is_far { REST_FAR } else { 0 },
            is_wide: true,
            in_vain: 0,
        });
    }

    /// One of a trial's numbers has been measured.
    fn try_on(&mut self, mut trial: Trial, rate: Rate) {
        if trial.rest > 0 {
            trial.rest -= 1;
            self.phase = Phase::Trying(trial);
            return;
        }
        let [Some(base), Some(other), Some(base_again)] = trial.rates else {
            if let Some(next) = trial.rates.iter_mut().find(|rate| rate.is_none()) {
                *next = Some(rate);
            }
            self.start(trial);
            return;
        };
        let is_held_up = base.took > QUICK || !self.is_short();
        let wanted_percent = match trial.other > trial.base || !is_held_up {
            true => BETTER_PERCENT,
            false => EQUAL_PERCENT,
        };
        // Together: each by itself is off by more than what is looked for.
        let is_kept = other
            .and(rate)
            .is_at_least(wanted_percent, base.and(base_again));
        let next = self.next_trial(trial, is_kept);
        self.start(next);
    }

    /// On in the same direction from what is kept, else in the other one.
    fn next_trial(&self, trial: Trial, is_kept: bool) -> Trial {
        let base = if is_kept { trial.other } else { trial.base };
        let in_vain = if is_kept { 0 } else { trial.in_vain + 1 };
        let is_wide = trial.is_wide && in_vain < 2;
        let goes_up = (trial.other > trial.base) == is_kept;
        let can_go_up = base < self.count_max();
        let other = match can_go_up && (goes_up || base == 1) {
            true => more(base, is_wide).min(self.count_max()),
            false => fewer(base, is_wide),
        };
        let rest = match in_vain {
            0 | 1 => 0,
            many => 2_u32.saturating_pow(many).min(REST_MAX),
        };
        Trial {
            base,
            other,
            rates: [None; 3],
            rest,
            is_wide,
            in_vain,
        }
    }

    fn start(&mut self, mut trial: Trial) {
        let count_max = self.count_max();
        if trial.base > count_max {
            // Requests have become longer.
            self.looked_up_to = count_max;
            trial.base = count_max;
            trial.other = fewer(count_max, trial.is_wide);
            trial.rates = [None; 3];
        }
        let known = trial.rates.iter().flatten().count();
        let before = std::mem::replace(
            &mut self.count,
            match known % 2 {
                0 => trial.base,
                _ => trial.other,
            },
        );
        self.phase = Phase::Trying(trial);
        if before != self.count {
            self.measure_anew(before.max(self.count));
        }
    }
}

/// How many requests of this length may be in flight.
fn most(limits: WindowLimits, length_bytes: u64) -> usize {
    let fit = usize::try_from(limits.bytes / length_bytes.max(1));
    fit.unwrap_or(usize::MAX).min(limits.requests).max(1)
}

fn more(base: usize, is_wide: bool) -> usize {
    base + (base / if is_wide { 1 } else { 3 }).max(1)
}

fn fewer(base: usize, is_wide: bool) -> usize {
    (base - (base / if is_wide { 2 } else { 4 }).max(1)).max(1)
}

impl Rate {
    /// Of both measurements, the time of which is about as long.
    fn and(self, other: Rate) -> Rate {
        Rate {
            bytes: self.bytes + other.bytes,
            time: self.time + other.time,
            took: (self.took + other.took) / 2,
        }
    }

    /// Whether it is as much as so many hundredths of another.
    fn is_at_least(self, percent: u128, other: Rate) -> bool {
        let times = |rate: Rate, of: Rate| u128::from(rate.bytes) * of.time.as_nanos();
        times(self, other) * 100 >= times(other, self) * percent
    }
}

#[cfg(test)]
#[path = "window_size_tests.rs"]
mod tests;
