//! [`BackOff`]: when a copier tries again what has failed and is ignored.
//!
//! Each range that fails waits by itself, longer each time, and the others go on meanwhile. Where nothing is copied between two errors
//! everything waits, longer each time: a disk that is gone makes no busy loop, nor a flood of events.

use std::collections::BTreeMap;
use std::time::Duration;

use blockyard_storage::ByteRange;

use crate::clock::Moment;
use crate::jobs::plan::Step;

/// After an ignored error the next try waits this long at first, and twice as long each further time.
const DELAY: Duration = Duration::from_millis(10);

/// Longest wait after an ignored error.
const DELAY_MAX: Duration = Duration::from_secs(1);

/// Steps that wait for another try at most; then nothing else is begun: each that fails may be one more.
const STEPS_MAX: usize = 1024;

/// What has failed, and how long that is waited for.
#[derive(Default)]
pub(super) struct BackOff {
    /// Holds since something was copied.
    in_a_row: u32,
    hold_until: Option<Moment>,
    /// Steps that are to be tried again, by the moment and their offset.
    steps: BTreeMap<(Moment, u64), Step>,
    /// How often the steps at these offsets have failed and were ignored.
    tries: BTreeMap<u64, u32>,
    /// The last step that was begun is one of these.
    has_retried: bool,
}

impl BackOff {
    /// A step has failed. It is tried again at once, unless the error [is ignored](Self::ignored).
    pub(super) fn failed(&mut self, step: Step, now: Moment) {
        self.steps.insert((now, step.range.offset()), step);
    }

    /// An error of a step in `range`, or of a flush, is ignored. What was in flight with one that everything waits for tells nothing
    /// new.
    pub(super) fn ignored(&mut self, range: ByteRange, now: Moment) {
        if let Some(step) = self.leave_out(range) {
            let tries = self.tries.entry(range.offset()).or_default();
            let due = now.after(delay(*tries));
            *tries += 1;
            self.steps.insert((due, range.offset()), step);
        }
        if self.hold_until.is_none_or(|until| until <= now) {
            self.hold_until = Some(now.after(delay(self.in_a_row)));
            self.in_a_row += 1;
        }
    }

    /// Takes out the step of `range`.
    pub(super) fn leave_out(&mut self, range: ByteRange) -> Option<Step> {
        let (place, _) = self.steps.iter().find(|(_, step)| step.range == range)?;
        let place = *place;
        self.steps.remove(&place)
    }

    /// `range` was copied.
    pub(super) fn copied(&mut self, range: ByteRange) {
        self.in_a_row = 0;
        self.tries.remove(&range.offset());
    }

    /// Whether nothing is to be tried again.
    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Whether so much is to be tried again that nothing else may be begun.
    pub(super) fn is_full(&self) -> bool {
        self.steps.len() >= STEPS_MAX
    }

    /// The first byte that is to be tried again.
    pub(super) fn low_water(&self) -> Option<u64> {
        self.steps.values().map(|step| step.range.offset()).min()
    }

    /// What is to be tried again now. Beside others that is every second one at most, or many that fail would keep those back.
    pub(super) fn next(&mut self, now: Moment, beside_others: bool) -> Option<Step> {
        if std::mem::take(&mut self.has_retried) && beside_others {
            return None;
        }
        let first = self.steps.first_entry()?;
        if first.key().0 > now {
            return None;
        }
        self.has_retried = true;
        Some(first.remove())
    }

    /// Until when everything waits; `None`: it does not.
    pub(super) fn held_until(&self, now: Moment) -> Option<Moment> {
        self.hold_until.filter(|until| *until > now)
    }

    /// Until when nothing is to be tried again; `None`: something is by now, or nothing is at all.
    pub(super) fn due(&self, now: Moment) -> Option<Moment> {
        let ((due, _), _) = self.steps.first_key_value()?;
        Some(*due).filter(|due| *due > now)
    }
}

/// The wait after a failure behind so many others.
fn delay(failures: u32) -> Duration {
    let delay = DELAY * 2_u32.saturating_pow(failures.min(10));
    delay.min(DELAY_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jobs::plan::StepKind;

    fn at(millis: u64) -> Moment {
        Moment::new(Duration::from_millis(millis))
    }

    fn step(offset: u64) -> Step {
        Step {
            range: ByteRange::new(offset, 512),
            kind: StepKind::Copy,
        }
    }

    #[test]
    fn waits_grow_until_something_is_copied() {
        let mut back_off = BackOff::default();
        let mut now = at(0);
        for millis in [10, 20, 40, 80, 160, 320, 640, 1000, 1000] {
            back_off.ignored(ByteRange::default(), now);
            // Others that were in flight.
            back_off.ignored(ByteRange::default(), now);
            let until = back_off.held_until(now).expect("held");
            assert_eq!(until, now.after(Duration::from_millis(millis)));
            now = until;
            assert_eq!(back_off.held_until(now), None);
        }
        back_off.copied(ByteRange::new(0, 512));
        back_off.ignored(ByteRange::default(), now);
        let until = now.after(Duration::from_millis(10));
        assert_eq!(back_off.held_until(now), Some(until));
    }

    #[test]
    fn a_range_waits_by_itself_and_gives_way_to_others() {
        let mut back_off = BackOff::default();
        for offset in [0, 512] {
            back_off.failed(step(offset), at(0));
            back_off.ignored(step(offset).range, at(0));
        }
        assert_eq!(back_off.next(at(9), true), None);
        assert_eq!(back_off.due(at(9)), Some(at(10)));
        assert_eq!(back_off.next(at(10), true), Some(step(0)));
        assert_eq!(back_off.next(at(10), true), None, "others are next");
        assert_eq!(back_off.next(at(10), true), Some(step(512)));
        assert!(back_off.is_empty());
        back_off.failed(step(0), at(10));
        back_off.copied(step(512).range);
        back_off.ignored(step(0).range, at(10));
        assert_eq!(back_off.due(at(10)), Some(at(30)), "later than at first");
        back_off.failed(step(512), at(40));
        assert_eq!(back_off.next(at(40), false), Some(step(0)));
        assert_eq!(back_off.next(at(40), false), Some(step(512)));
    }

    #[test]
    fn no_more_are_kept_than_may_be() {
        let mut back_off = BackOff::default();
        for nth in 0..STEPS_MAX as u64 {
            assert!(!back_off.is_full(), "{nth}");
            back_off.failed(step(nth * 512), at(0));
            back_off.ignored(step(nth * 512).range, at(0));
        }
        assert!(back_off.is_full());
        assert!(back_off.next(at(10), false).is_some());
        assert!(!back_off.is_full());
    }
}
