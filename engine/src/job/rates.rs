//! [`Rates`]: how fast a mirror's source changes, and how fast it is copied, which tells whether the job will ever be done.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::Moment;

/// How long one measurement takes.
const PERIOD: Duration = Duration::from_secs(1);

/// Changed bytes that are no sign of falling behind: a job's end copies as much while writers wait.
const LEFT_MAX_BYTES: u64 = 4 << 20;

/// What was measured last. Work measures, queries read.
#[derive(Debug, Default)]
pub struct Rates {
    view: Mutex<Option<RatesView>>,
}

/// Rates of one job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RatesView {
    /// Bytes that have changed on the source and are not copied yet.
    pub dirty_bytes: u64,
    /// Bytes a second that came to be so, and were equal on both sides before.
    pub dirtied_a_second: u64,
    /// Bytes a second that were copied.
    pub copied_a_second: u64,
    /// There was something to copy all the time, and nothing was.
    pub stands_still: bool,
}

impl RatesView {
    /// Whether the copy gains on the writers, or keeps up with them.
    pub fn converges(&self) -> bool {
        let little_is_left = self.dirty_bytes <= LEFT_MAX_BYTES;
        let gains = little_is_left || self.copied_a_second > self.dirtied_a_second;
        self.dirty_bytes == 0 || gains && !self.stands_still
    }
}

impl Rates {
    /// What was measured last; `None`: nobody has written yet.
    pub fn view(&self) -> Option<RatesView> {
        *self.locked()
    }

    fn locked(&self) -> MutexGuard<'_, Option<RatesView>> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Measures, period by period. Of the work's thread.
#[derive(Debug, Default)]
pub(crate) struct RateMeter {
    /// When the period began, and what had been dirtied and copied by then.
    begin: Option<(Moment, u64, u64)>,
    /// At each look since there was something to copy.
    always_dirty: bool,
}

impl RateMeter {
    /// Looks at what has been `dirtied_bytes` and `copied_bytes` in all so far, and is `dirty_bytes` now.
    pub(crate) fn look(
        &mut self,
        rates: &Rates,
        now: Moment,
        (dirtied_bytes, copied_bytes): (u64, u64),
        dirty_bytes: u64,
    ) {
        if dirtied_bytes == 0 {
            return;
        }
        let (since, dirtied, copied) = *self.begin.get_or_insert_with(|| {
            self.always_dirty = true;
            (now, 0, copied_bytes)
        });
        self.always_dirty &= dirty_bytes > 0;
        let mut view = rates.locked();
        let shown = view.get_or_insert_default();
        shown.dirty_bytes = dirty_bytes;
        let took = now.since(since);
        if took >= PERIOD {
            shown.dirtied_a_second = a_second(dirtied_bytes.saturating_sub(dirtied), took);
            shown.copied_a_second = a_second(copied_bytes.saturating_sub(copied), took);
            shown.stands_still = self.always_dirty && copied_bytes <= copied;
            self.begin = Some((now, dirtied_bytes, copied_bytes));
            self.always_dirty = dirty_bytes > 0;
        }
    }

    /// When the next look tells something new although nothing happens until then; `None`: never.
    pub(crate) fn next_look(&self, rates: &Rates, dirtied_bytes: u64) -> Option<Moment> {
        let (since, dirtied, _) = self.begin?;
        let shown = rates.view()?;
        let is_over =
            dirtied == dirtied_bytes && shown.dirtied_a_second == 0 && shown.copied_a_second == 0;
        (!is_over).then(|| since.after(PERIOD))
    }
}

/// A rate in bytes a second.
fn a_second(bytes: u64, took: Duration) -> u64 {
    let micros = took.as_micros().max(1);
    let rate = u128::from(bytes).saturating_mul(1_000_000) / micros;
    u64::try_from(rate).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn at(millis: u64) -> Moment {
        Moment::new(Duration::from_millis(millis))
    }

    #[test]
    fn nothing_is_told_until_somebody_writes() {
        let (mut meter, rates) = (RateMeter::default(), Rates::default());
        for second in 0..5 {
            meter.look(&rates, at(second * 1000), (0, second * MIB), 0);
        }
        assert_eq!(rates.view(), None);
        assert_eq!(meter.next_look(&rates, 0), None);
    }

    #[test]
    fn rates_are_those_of_the_last_period() {
        let (mut meter, rates) = (RateMeter::default(), Rates::default());
        meter.look(&rates, at(0), (1, 0), 1);
        meter.look(&rates, at(500), (6 * MIB, 2 * MIB), 5 * MIB);
        let soon = rates.view().expect("told");
        assert_eq!((soon.dirty_bytes, soon.dirtied_a_second), (5 * MIB, 0));
        meter.look(&rates, at(2000), (20 * MIB, 4 * MIB), 16 * MIB);
        let behind = RatesView {
            dirty_bytes: 16 * MIB,
            dirtied_a_second: 10 * MIB,
            copied_a_second: 2 * MIB,
            stands_still: false,
        };
        assert_eq!(rates.view(), Some(behind));
        assert!(!behind.converges());
        assert_eq!(meter.next_look(&rates, 20 * MIB), Some(at(3000)));
        meter.look(&rates, at(3000), (20 * MIB, 20 * MIB), 0);
        assert!(rates.view().expect("told").converges());
        meter.look(&rates, at(4000), (20 * MIB, 20 * MIB), 0);
        assert_eq!(meter.next_look(&rates, 20 * MIB), None);
    }

    #[test]
    fn equal_rates_converge_only_where_little_is_left() {
        let view = |dirty_bytes| RatesView {
            dirty_bytes,
            dirtied_a_second: MIB,
            copied_a_second: MIB,
            stands_still: false,
        };
        assert!(view(LEFT_MAX_BYTES).converges());
        assert!(!view(LEFT_MAX_BYTES + 1).converges());
    }

    #[test]
    fn a_copy_that_stands_still_does_not_converge_however_little_is_left() {
        let (mut meter, rates) = (RateMeter::default(), Rates::default());
        let converges = || rates.view().expect("told").converges();
        meter.look(&rates, at(0), (1, 0), 1);
        assert!(converges(), "nothing is known yet");
        meter.look(&rates, at(1000), (1, 0), 1);
        assert!(!converges());
        meter.look(&rates, at(1500), (2, 1), 1);
        assert!(!converges());
        meter.look(&rates, at(2000), (2, 1), 1);
        assert!(converges(), "something was copied");
        meter.look(&rates, at(2500), (2, 1), 0);
        meter.look(&rates, at(2600), (3, 1), 1);
        meter.look(&rates, at(3000), (3, 1), 1);
        assert!(converges(), "there was nothing to copy");
        meter.look(&rates, at(4000), (3, 1), 1);
        assert!(!converges());
        meter.look(&rates, at(4100), (3, 2), 0);
        assert!(converges(), "both sides are equal");
    }

    #[test]
    fn the_longest_times_and_most_bytes_are_no_overflow() {
        assert_eq!(a_second(u64::MAX, Duration::from_micros(1)), u64::MAX);
        assert_eq!(a_second(u64::MAX, Duration::ZERO), u64::MAX);
        assert_eq!(a_second(1, Duration::MAX), 0);
    }
}
