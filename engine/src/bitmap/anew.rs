//! When bitmaps are written down anew by themselves: whatever was touched once counts as changed after a crash, so what has gone
//! cold since is forgotten from time to time.
//!
//! Writing down costs the bitmaps' bytes, and another sync for each region that is written again. Where most of what had been touched
//! is touched again at once, nothing was gained, and the next time comes later.

use std::time::Duration;

use crate::state::MarkField;

/// How often it is looked at whether it pays.
pub(crate) const LOOK_PAUSE: Duration = Duration::from_secs(600);

/// Touched regions that are worth it: 1 GiB of a disk of up to 16 TiB.
const WORTH_REGIONS: u64 = 64;

/// Looks that are let pass at most where nothing is gained: six hours.
const PASSED_MAX: u32 = 35;

/// Which regions were touched when they were last forgotten.
#[derive(Debug, Default)]
pub(super) struct Anew {
    before: Option<MarkField>,
    /// Looks to let pass after each time, and of those to come.
    pause: u32,
    left: u32,
}

impl Anew {
    /// Whether it pays now, `touched` having been touched since the last time. It is done then.
    pub(super) fn is_due(&mut self, touched: MarkField) -> bool {
        if self.left > 0 {
            self.left -= 1;
            return false;
        }
        let count = touched.count();
        if count < WORTH_REGIONS {
            return false;
        }
        let again = self.before.as_ref();
        let again = again.map_or(0, |before| before.count_common(&touched));
        let gains = 2 * again < self.before.as_ref().map_or(1, MarkField::count);
        self.pause = match gains {
            true => 0,
            false => (2 * self.pause + 1).min(PASSED_MAX),
        };
        self.left = self.pause;
        self.before = Some(touched);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    fn touched(regions: Range<u64>) -> MarkField {
        let mut field = MarkField::new(10_000);
        field.set(regions);
        field
    }

    #[test]
    fn little_is_left_and_what_goes_cold_is_forgotten() {
        let mut anew = Anew::default();
        assert!(!anew.is_due(touched(0..WORTH_REGIONS - 1)));
        // A writer that goes on and on touches other regions each time.
        for look in 0..20 {
            assert!(anew.is_due(touched(look * 100..look * 100 + 100)));
            assert!(!anew.is_due(touched(0..3)));
        }
    }

    #[test]
    fn who_writes_everywhere_all_the_time_pays_less_and_less_often() {
        let mut anew = Anew::default();
        let looks = (0..200).filter(|_| anew.is_due(touched(0..9000)));
        let (looks, rare) = (looks.count(), 200 / (PASSED_MAX as usize + 1));
        assert!(looks > rare && looks < rare + 8, "{looks}");
        // As soon as that is over, it is as before.
        while !anew.is_due(touched(0..100)) {}
        assert!(anew.is_due(touched(100..200)));
    }
}
