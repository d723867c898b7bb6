//! [`Buckets`]: what has passed fills them, time empties them; while one is too full, requests of its kind wait. Pure.
//!
//! A request that may pass does so whole, however long it is, and the ones behind it wait the longer. So the rate is exact in the
//! long run, and no request is too long to pass.

use std::time::Duration;

use crate::clock::Moment;
use crate::throttle::Direction;
use crate::throttle::limits::{Counted, Limits, Rate};

/// Longest time until a waiting request is looked at again. Clocks need not tell of longer ones.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// Part of a second that may pass at once where nothing is said of bursts.
const SHARE_AT_ONCE: f64 = 0.1;

/// One bucket for each limit.
#[derive(Clone, Debug)]
pub(super) struct Buckets {
    limits: Limits,
    levels: [Level; 6],
    /// `None`: nothing has happened yet.
    leaked: Option<Moment>,
}

/// How full a bucket is, in bytes or requests.
#[derive(Clone, Copy, Debug, Default)]
struct Level {
    /// Leaks at the average rate.
    long: f64,
    /// Leaks at the rate of bursts, where they may last longer than a second.
    burst: f64,
}

impl Buckets {
    /// Empty ones.
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            levels: Default::default(),
            leaked: None,
        }
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether there is a limit on reads and writes together.
    pub(super) fn limits_both(&self) -> bool {
        let totals = [Counted::Bytes, Counted::Requests];
        totals.iter().any(|one| self.limits.rate(*one).average > 0)
    }

    /// Lets time pass. It never goes back.
    pub(super) fn leak(&mut self, now: Moment) {
        let since = self.leaked.map_or(Duration::ZERO, |last| now.since(last));
        self.leaked = self.leaked.max(Some(now));
        let seconds = since.as_secs_f64();
        for (rate, level) in self.limits.rates.iter().zip(&mut self.levels) {
            level.long = (level.long - per_second(rate.average) * seconds).max(0.0);
            level.burst = (level.burst - per_second(rate.burst) * seconds).max(0.0);
        }
    }

    /// How long a request must wait; zero: it may pass. Time has been let [pass](Self::leak) before.
    pub(super) fn wait(&self, direction: Direction) -> Duration {
        let waits = counted(direction).map(|one| {
            let place = one as usize;
            self.levels[place].wait(&self.limits.rates[place])
        });
        let seconds = waits.into_iter().fold(0.0, f64::max);
        if seconds <= 0.0 {
            return Duration::ZERO;
        }
        // Not less than what clocks can tell apart, so that time passes.
        let wait = Duration::try_from_secs_f64(seconds).unwrap_or(WAIT_MAX);
        wait.clamp(Duration::from_nanos(1), WAIT_MAX)
    }

    /// A request of this length passes.
    pub(super) fn account(&mut self, direction: Direction, bytes: u64) {
        let longest = self.limits.request_bytes;
        let requests = match longest > 0 && bytes > longest {
            true => per_second(bytes) / per_second(longest),
            false => 1.0,
        };
        for one in counted(direction) {
            let counts_bytes = matches!(
                one,
                Counted::Bytes | Counted::BytesRead | Counted::BytesWritten
            );
            let amount = if counts_bytes {
                per_second(bytes)
            } else {
                requests
            };
            let level = &mut self.levels[one as usize];
            level.long += amount;
            if self.limits.rates[one as usize].burst_seconds > 1 {
                level.burst += amount;
            }
        }
    }
}

impl Level {
    /// Seconds until it is low enough.
    fn wait(&self, rate: &Rate) -> f64 {
        if rate.average == 0 {
            return 0.0;
        }
        let (average, burst) = (per_second(rate.average), per_second(rate.burst));
        let room = match rate.burst {
            0 => average * SHARE_AT_ONCE,
            _ => burst * per_second(rate.burst_seconds),
        };
        if self.long > room {
            return (self.long - room) / average;
        }
        // Within a long burst its own rate counts, with as much at once as without bursts.
        let room = burst * SHARE_AT_ONCE;
        if rate.burst_seconds > 1 && self.burst > room {
            return (self.burst - room) / burst;
        }
        0.0
    }
}

/// What counts requests of a direction.
const fn counted(direction: Direction) -> [Counted; 4] {
    match direction {
        Direction::Read => [
            Counted::Bytes,
            Counted::BytesRead,
            Counted::Requests,
            Counted::Reads,
        ],
        Direction::Write => [
            Counted::Bytes,
            Counted::BytesWritten,
            Counted::Requests,
            Counted::Writes,
        ],
    }
}

/// Rates are below 2^53; of a length that is not, the last bits do not matter.
fn per_second(amount: u64) -> f64 {
    amount as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::throttle::limits::LimitsChange;

    fn limits(set: impl FnOnce(&mut LimitsChange)) -> Limits {
        let mut change = LimitsChange::default();
        set(&mut change);
        Limits::default().with(&change).expect("makes sense")
    }

    fn rate(counted: Counted, average: i64, burst: i64, seconds: i64) -> Limits {
        limits(|change| {
            let rate = &mut change.rates[counted as usize];
            rate.average = Some(average);
            rate.burst = Some(burst);
            rate.burst_seconds = Some(seconds);
        })
    }

    /// Sends requests of one kind one behind the other for a while; how much has passed, and how much in the first second.
    fn run(limits: Limits, direction: Direction, bytes: u64, seconds: u64) -> (u64, u64) {
        let mut buckets = Buckets::new(limits);
        let mut now = Moment::default();
        let (end, mut passed, mut first) = (Duration::from_secs(seconds), 0, 0);
        while now.since_start() < end {
            buckets.leak(now);
            match buckets.wait(direction) {
                Duration::ZERO => {
                    buckets.account(direction, bytes);
                    passed += 1;
                    first += u64::from(now.since_start() < Duration::from_secs(1));
                    // Not even without limits all at once.
                    now = now.after(Duration::from_micros(1));
                }
                wait => now = now.after(wait),
            }
        }
        (passed, first)
    }

    #[test]
    fn each_limit_holds_for_what_it_counts_and_for_nothing_else() {
        use Counted::{Bytes, BytesRead, BytesWritten, Reads, Requests, Writes};
        for (counted, read_limited, write_limited) in [
            (Bytes, true, true),
            (BytesRead, true, false),
            (BytesWritten, false, true),
            (Requests, true, true),
            (Reads, true, false),
            (Writes, false, true),
        ] {
            let bytes = 4096;
            let counts_bytes = matches!(counted, Bytes | BytesRead | BytesWritten);
            let average = if counts_bytes { 100 * 4096 } else { 100 };
            let limits = rate(counted, average, 0, 1);
            for (direction, limited) in [
                (Direction::Read, read_limited),
                (Direction::Write, write_limited),
            ] {
                let (passed, _) = run(limits, direction, bytes, 2);
                match limited {
                    true => assert!((195..=215).contains(&passed), "{counted:?} {passed}"),
                    false => assert!(passed > 1_000_000, "{counted:?} {passed}"),
                }
            }
        }
    }

    #[test]
    fn a_burst_lasts_as_long_as_it_may_at_its_own_rate() {
        // 100 a second in the long run, 1000 a second for 10 seconds.
        let limits = rate(Counted::Reads, 100, 1000, 10);
        let (burst, first) = run(limits, Direction::Read, 512, 10);
        assert!((1000..=1110).contains(&first), "{first}");
        assert!((9_900..=10_200).contains(&burst), "{burst}");
        // Room for 10000 leaks at 100 a second: it is full after 11.1 s.
        let (passed, _) = run(limits, Direction::Read, 512, 100);
        assert!((19_500..=20_500).contains(&passed), "{passed}");
        // A burst of one second may come at once.
        let limits = rate(Counted::Reads, 100, 1000, 1);
        let (passed, first) = run(limits, Direction::Read, 512, 10);
        assert!((1000..=1110).contains(&first), "{first}");
        assert!((1980..=2020).contains(&passed), "{passed}");
    }

    #[test]
    fn long_requests_count_as_several() {
        let mut limits = rate(Counted::Writes, 100, 0, 1);
        limits.request_bytes = 4096;
        for (bytes, expected) in [(512, 1000), (4096, 1000), (6144, 667), (40_960, 100)] {
            let (passed, _) = run(limits, Direction::Write, bytes, 10);
            let (least, most) = (expected * 95 / 100, expected * 105 / 100 + 2);
            assert!((least..=most).contains(&passed), "{bytes}: {passed}");
        }
    }

    #[test]
    fn one_that_is_too_long_passes_and_those_behind_wait_for_it() {
        let mut buckets = Buckets::new(rate(Counted::Bytes, 1000, 0, 1));
        buckets.leak(Moment::default());
        assert_eq!(buckets.wait(Direction::Write), Duration::ZERO);
        buckets.account(Direction::Write, 10_100);
        assert_eq!(buckets.wait(Direction::Read), Duration::from_secs(10));
        buckets.account(Direction::Write, u64::MAX);
        assert_eq!(buckets.wait(Direction::Read), WAIT_MAX);
        buckets.leak(Moment::new(Duration::from_secs(5)));
        // A clock that is behind changes nothing.
        buckets.leak(Moment::default());
        assert_eq!(buckets.leaked, Some(Moment::new(Duration::from_secs(5))));
    }

    proptest! {
        /// Any limit, any length of requests: in the long run what passes is the rate within 5 %, once the room that may be
        /// used at once and the last request are taken off.
        #[test]
        fn the_rate_is_kept(
            counted in proptest::sample::select(Counted::ALL.to_vec()),
            average in 1_i64..200,
            factor in 0_i64..5,
            seconds in 1_i64..4,
            bytes in 512_u64..100_000,
        ) {
            let is_bytes =
                matches!(counted, Counted::Bytes | Counted::BytesRead | Counted::BytesWritten);
            let unit = if is_bytes { bytes } else { 1 };
            let unit_signed = i64::try_from(unit).expect("short");
            let burst = average * factor * unit_signed;
            let seconds = if factor == 0 { 1 } else { seconds };
            let limits = rate(counted, average * unit_signed, burst, seconds);
            let direction = match counted {
                Counted::BytesWritten | Counted::Writes => Direction::Write,
                _ => Direction::Read,
            };
            let during = 100;
            let (passed, _) = run(limits, direction, bytes, during);
            let (passed, average) = (per_second(passed), per_second(average.unsigned_abs()));
            let at_once = match factor {
                0 => average * SHARE_AT_ONCE,
                _ => per_second(burst.unsigned_abs() / unit) * per_second(seconds.unsigned_abs()),
            };
            let expected = average * per_second(during) + at_once;
            prop_assert!((passed - expected).abs() <= expected * 0.05 + 1.0, "{passed} of {expected}");
        }
    }
}
