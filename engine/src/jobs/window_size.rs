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
const MANY_MORE: usize = 4;

/// How many requests one copy has in flight.
#[derive(Clone, Debug)]
pub(super) struct WindowSize {
    count: usize,
    limits: WindowLimits,
    /// What requests are long lately.
    length_bytes: u64,
    /// There might have been so many when it was last found out how many are of use.
    looked_up_to: usize,
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
    /// At most as `limits` say, and at least one. No request is longer than `longest_bytes`, as the first ones are taken to be.
    pub(super) fn new(limits: WindowLimits, longest_bytes: u64) -> Self {
        let count_max = most(limits, longest_bytes);
        let count = count_max.min(START);
        Self {
            count,
            limits,
            length_bytes: longest_bytes,
            looked_up_to: count_max,
            ceiling: Ceiling::new(limits.requests.max(1)),
            phase: Phase::growing_from(count),
            measure: Measure::default(),
        }
    }

    /// Requests to have in flight, at least one.
    pub(super) fn requests(&self) -> usize {
        self.count.min(self.count_max()).min(self.ceiling.count())
    }

    /// From now on what others write is brought over.
    pub(super) fn follow_writers(&mut self) {
        self.limits = self.limits.with_requests(FOLLOWING_MAX);
    }

    /// As many as may be in flight of such as there were lately.
    fn count_max(&self) -> usize {
        most(self.limits, self.length_bytes)
    }

    /// A copy begins that counts for so many bytes in memory; none, if it is not carried through it.
    pub(super) fn begun(&mut self, now: Moment, bytes: u64) {
        if bytes > 0 {
            self.length_bytes = (self.length_bytes * (LENGTHS - 1) + bytes).div_ceil(LENGTHS);
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
        if in_vain < GROWN_IN_VAIN_MAX && round < self.count_max() {
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
        self.start(Trial {
            base: best.0,
            other: fewer(best.0, true),
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
        let wanted_percent = match trial.other > trial.base {
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
mod tests {
    use super::*;

    /// Takes `lanes` requests at a time, and each so long.
    struct Disk<F: Fn(usize) -> Duration> {
        lanes: usize,
        service: F,
        noise_percent: u64,
    }

    const MIB: u64 = 1 << 20;

    /// For requests of 1 MiB each.
    fn of_long(count_max: usize) -> WindowSize {
        let limits = WindowLimits {
            requests: count_max,
            bytes: count_max as u64 * MIB,
        };
        WindowSize::new(limits, MIB)
    }

    /// Runs so many requests; what was in flight over the last quarter of them, on average.
    fn settled<F: Fn(usize) -> Duration>(
        size: &mut WindowSize,
        disk: &Disk<F>,
        requests: u64,
    ) -> f64 {
        settled_with(size, disk, requests, MIB)
    }

    /// The same of requests of so many bytes each.
    fn settled_with<F: Fn(usize) -> Duration>(
        size: &mut WindowSize,
        disk: &Disk<F>,
        requests: u64,
        bytes: u64,
    ) -> f64 {
        let mut now = Duration::ZERO;
        let mut state = 7_u64;
        let mut lanes = vec![Duration::ZERO; disk.lanes];
        let mut flying: Vec<(Duration, Duration)> = Vec::new();
        let (mut sum, mut seen) = (0, 0);
        for number in 0..requests {
            while flying.len() < size.requests() {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let noise = 100 + (state >> 33) % (disk.noise_percent + 1);
                let time = (disk.service)(flying.len() + 1) * u32::try_from(noise).unwrap() / 100;
                let lane = lanes.iter_mut().min().unwrap();
                *lane = now.max(*lane) + time;
                flying.push((*lane, now));
                size.begun(Moment::new(now), bytes);
            }
            flying.sort();
            let (end, begun) = flying.remove(0);
            let was_full = flying.len() + 1 >= size.requests();
            now = end;
            let took = end.saturating_sub(begun);
            size.took(took);
            if was_full {
                size.ended(Moment::new(now), bytes, took);
            }
            if number >= requests - requests / 4 {
                sum += size.requests();
                seen += 1;
            }
        }
        sum as f64 / f64::from(seen)
    }

    #[test]
    fn a_far_end_gets_all_there_may_be_within_few_round_trips() {
        let far = Disk {
            lanes: 1000,
            service: |_| Duration::from_millis(10),
            noise_percent: 5,
        };
        for count_max in [1, 3, 16, 64] {
            let mut size = of_long(count_max);
            settled(&mut size, &far, 2 * count_max as u64);
            assert_eq!(size.requests(), count_max);
            let long = settled(&mut size, &far, 40_000);
            assert!(long > 0.7 * count_max as f64, "{long} of {count_max}");
        }
    }

    #[test]
    fn a_far_end_gets_more_of_short_requests_and_no_more_bytes_of_long_ones() {
        let far = Disk {
            lanes: 1000,
            service: |_| Duration::from_millis(10),
            noise_percent: 5,
        };
        let mut size = WindowSize::new(WindowLimits::of(MIB), MIB);
        for _ in 0..3 {
            let short = settled_with(&mut size, &far, 4_000, 64 << 10);
            assert!(short > 0.7 * 64.0, "{short}");
            let middle = settled_with(&mut size, &far, 4_000, 512 << 10);
            assert!((0.7 * 32.0..=32.0).contains(&middle), "{middle}");
            let long = settled(&mut size, &far, 4_000);
            assert!((0.7 * 16.0..=16.0).contains(&long), "{long}");
        }
        // What is in flight while they become longer.
        settled_with(&mut size, &far, 4_000, 64 << 10);
        let mut flying = size.requests() as u64 * (64 << 10);
        for _ in 0..100 {
            size.begun(Moment::default(), MIB);
            // The oldest short one has ended.
            flying = (flying + MIB).saturating_sub(64 << 10);
            if flying.div_ceil(MIB) >= size.requests() as u64 {
                break;
            }
        }
        assert!(flying <= 24 * MIB, "{flying}");
    }

    #[test]
    fn a_worker_less_is_a_worker_less() {
        let limits = WindowLimits::of(MIB).with_requests(3);
        let far = Disk {
            lanes: 1000,
            service: |_| Duration::from_millis(10),
            noise_percent: 5,
        };
        let mut size = WindowSize::new(limits, MIB);
        for bytes in [4096, MIB, 4096] {
            let few = settled_with(&mut size, &far, 1_000, bytes);
            assert!((2.0..=3.0).contains(&few), "{few}");
        }
        let mut size = WindowSize::new(WindowLimits::of(MIB), MIB);
        settled_with(&mut size, &far, 1_000, 4096);
        size.follow_writers();
        assert!(size.requests() <= FOLLOWING_MAX, "{}", size.requests());
        let one = WindowLimits::of(MIB).with_bytes(1);
        assert_eq!(WindowSize::new(one, MIB).requests(), 1);
    }

    #[test]
    fn a_disk_that_takes_one_after_the_other_gets_few() {
        for noise_percent in [0, 10, 40] {
            let one = Disk {
                lanes: 1,
                service: |waiting| Duration::from_micros(280 + 6 * waiting as u64),
                noise_percent,
            };
            let mut size = of_long(16);
            settled(&mut size, &one, 64);
            assert!(size.requests() <= 8, "{}", size.requests());
            let long = settled(&mut size, &one, 20_000);
            assert!(long <= 6.0, "{long} with {noise_percent} % of noise");
        }
    }

    #[test]
    fn a_disk_of_eight_lanes_gets_about_eight() {
        for noise_percent in [0, 10, 40] {
            let lanes = Disk {
                lanes: 8,
                service: |_| Duration::from_millis(1),
                noise_percent,
            };
            let mut size = of_long(64);
            let long = settled(&mut size, &lanes, 40_000);
            assert!(
                (6.0..=16.0).contains(&long),
                "{long} with {noise_percent} % of noise"
            );
        }
    }

    #[test]
    fn slow_requests_make_it_few_if_they_wait_for_each_other_and_quick_ones_many_again() {
        for (bytes, many) in [(MIB, 16), (64 << 10, 64)] {
            let mut size = WindowSize::new(WindowLimits::of(MIB), MIB);
            let slow = Disk {
                lanes: 1,
                service: |_| Duration::from_millis(300),
                noise_percent: 10,
            };
            let few = settled_with(&mut size, &slow, 400, bytes);
            assert!(few <= 3.0, "{few}");
            let far = Disk {
                lanes: 1000,
                service: |_| Duration::from_millis(10),
                noise_percent: 0,
            };
            settled_with(&mut size, &far, 4_000, bytes);
            assert!(size.requests() * 4 >= many * 3, "{}", size.requests());
        }
    }

    #[test]
    fn however_far_an_end_is_it_gets_all_there_may_be() {
        for (milliseconds, noise_percent) in [
            (90, 20),
            (150, 20),
            (1_000, 20),
            (10, 200),
            (40, 100),
            (90, 100),
            (90, 200),
            (150, 400),
        ] {
            let far = Disk {
                lanes: 1000,
                service: |_| Duration::from_millis(milliseconds),
                noise_percent,
            };
            for requests in [400, 4_000, 40_000] {
                let mut size = of_long(16);
                let many = settled(&mut size, &far, requests);
                assert!(
                    many > 12.0,
                    "{many} at {milliseconds} ms with {noise_percent} % of noise after {requests}"
                );
            }
        }
    }

    #[test]
    fn a_disk_that_becomes_slow_gets_few_and_many_again_when_it_turns_out_to_be_far() {
        let mut size = of_long(16);
        let quick = Disk {
            lanes: 4,
            service: |_| Duration::from_millis(1),
            noise_percent: 10,
        };
        settled(&mut size, &quick, 1_000);
        let far = Disk {
            lanes: 1000,
            service: |_| Duration::from_millis(300),
            noise_percent: 10,
        };
        settled(&mut size, &far, 2_000);
        assert!(size.requests() > 8, "{}", size.requests());
    }

    #[test]
    fn a_copy_that_something_else_holds_up_is_no_measure() {
        let mut size = of_long(16);
        for second in 0..1_000 {
            size.begun(Moment::new(Duration::from_secs(second)), MIB);
            size.took(Duration::from_millis(1));
            size.ended(
                Moment::new(Duration::from_secs(second)),
                MIB,
                Duration::ZERO,
            );
            size.interrupted();
        }
        assert!(size.requests() >= START, "{}", size.requests());
    }
}
