//! [`Rate`]: how fast something goes lately, and when it will be done. Pure: time comes in as a value.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How far back a rate looks.
const WINDOW: Duration = Duration::from_secs(10);
/// Closer observations than this are left out, which bounds how many are kept.
const SPACING: Duration = Duration::from_millis(200);

/// The mean rate over the last ten seconds.
#[derive(Clone, Debug, Default)]
pub struct Rate {
    /// When, and how many bytes were done by then. Oldest first.
    seen: VecDeque<(Instant, u64)>,
    newest: Option<(Instant, u64)>,
}

impl Rate {
    /// Takes note that `bytes` in all were done at `now`.
    pub fn observe(&mut self, now: Instant, bytes: u64) {
        self.newest = Some((now, bytes));
        let spaced = |(last, _): &(Instant, u64)| now.duration_since(*last) >= SPACING;
        if self.seen.back().is_none_or(spaced) {
            self.seen.push_back((now, bytes));
        }
        // The oldest kept is the newest that is outside, so that the window is always full.
        while self
            .seen
            .get(1)
            .is_some_and(|(second, _)| now.duration_since(*second) >= WINDOW)
        {
            self.seen.pop_front();
        }
    }

    /// Bytes per second; `None` until two moments were seen.
    pub fn bytes_per_second(&self) -> Option<f64> {
        let (from, before) = self.seen.front()?;
        let (to, after) = self.newest?;
        let seconds = to.duration_since(*from).as_secs_f64();
        (seconds > 0.0).then(|| after.saturating_sub(*before) as f64 / seconds)
    }

    /// How long `remaining_bytes` will take at this rate; `None` while nobody can know.
    pub fn time_for(&self, remaining_bytes: u64) -> Option<Duration> {
        let rate = self.bytes_per_second().filter(|rate| *rate >= 1.0)?;
        Duration::try_from_secs_f64(remaining_bytes as f64 / rate).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_ten_seconds() {
        let start = Instant::now();
        let mut rate = Rate::default();
        assert_eq!(rate.bytes_per_second(), None);
        // 100 bytes a second for 20 s, then 300.
        let mut bytes = 0;
        for tenth in 1..=400 {
            bytes += if tenth <= 200 { 10 } else { 30 };
            rate.observe(start + Duration::from_millis(tenth * 100), bytes);
            assert!(rate.seen.len() < 60, "bounded");
            if tenth == 200 {
                assert_eq!(rate.bytes_per_second().map(f64::round), Some(100.0));
                assert_eq!(rate.time_for(1000), Some(Duration::from_secs(10)));
            }
        }
        assert_eq!(rate.bytes_per_second().map(f64::round), Some(300.0));
    }

    #[test]
    fn a_standstill_has_no_end() {
        let start = Instant::now();
        let mut rate = Rate::default();
        rate.observe(start, 5);
        rate.observe(start + Duration::from_secs(1), 5);
        assert_eq!(rate.bytes_per_second(), Some(0.0));
        assert_eq!(rate.time_for(1), None);
    }
}
