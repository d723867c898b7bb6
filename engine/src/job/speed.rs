//! Rate limit arithmetic: bytes per second, in slices of 100 ms, without bursts above one slice. Pure.
//!
//! What was handed out beyond a slice's quota stretches the slice (it is paid back by waiting), so that the long-run rate
//! is the limit whatever the size of the requests.

use std::time::Duration;

use crate::clock::Moment;

/// Length of one slice.
pub const SLICE: Duration = Duration::from_millis(100);

/// A rate limiter of one job.
#[derive(Clone, Debug, Default)]
pub struct RateLimit {
    bytes_per_second: u64,
    slice_start: Moment,
    slice_end: Moment,
    dispatched_bytes: u64,
}

impl RateLimit {
    /// A limiter that lets `bytes_per_second` pass; 0: no limit.
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second,
            ..Self::default()
        }
    }

    /// Replaces the limit; what was handed out in this slice still counts.
    pub fn set_speed(&mut self, bytes_per_second: u64) {
        self.bytes_per_second = bytes_per_second;
    }

    /// The limit in bytes per second; 0: none.
    pub fn speed(&self) -> u64 {
        self.bytes_per_second
    }

    /// Bytes per slice.
    fn quota_bytes(&self) -> u64 {
        (self.bytes_per_second / 10).max(1)
    }

    /// Until when to wait before the next request may start, `None`: it may start now.
    pub fn wait_until(&mut self, now: Moment) -> Option<Moment> {
        if self.bytes_per_second == 0 {
            return None;
        }
        if self.slice_end <= now {
            self.slice_start = now;
            self.slice_end = now.after(SLICE);
            self.dispatched_bytes = 0;
        }
        let quota = self.quota_bytes();
        if self.dispatched_bytes < quota {
            return None;
        }
        let stretched = SLICE.as_secs_f64() * (self.dispatched_bytes as f64 / quota as f64);
        let stretched = Duration::try_from_secs_f64(stretched).unwrap_or(Duration::MAX);
        self.slice_end = self.slice_start.after(stretched);
        (self.slice_end > now).then_some(self.slice_end)
    }

    /// Counts `bytes` as handed out in the current slice.
    pub fn charge(&mut self, bytes: u64) {
        if self.bytes_per_second != 0 {
            self.dispatched_bytes = self.dispatched_bytes.saturating_add(bytes);
        }
    }

    /// Largest request that does not burst above one slice: the quota, cut to `granularity`-aligned pieces of at least
    /// one and at most `chunk_max_bytes`.
    pub fn chunk_bytes(&self, granularity: u64, chunk_max_bytes: u64) -> u64 {
        if self.bytes_per_second == 0 {
            return chunk_max_bytes;
        }
        let whole = self.quota_bytes() / granularity * granularity;
        whole.clamp(granularity.min(chunk_max_bytes), chunk_max_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs for ten seconds of its own time and returns the bytes that passed.
    fn bytes_in_ten_seconds(speed: u64, granularity: u64) -> u64 {
        let mut limit = RateLimit::new(speed);
        let end = Moment::new(Duration::from_secs(10));
        let (mut now, mut bytes) = (Moment::default(), 0);
        while now < end {
            match limit.wait_until(now) {
                Some(moment) => now = moment,
                None => {
                    let chunk = limit.chunk_bytes(granularity, 1 << 20);
                    limit.charge(chunk);
                    bytes += chunk;
                }
            }
        }
        bytes
    }

    #[test]
    fn rate_is_within_three_percent_over_ten_seconds() {
        for speed in [1 << 20, 3 << 20, 10_000_000, 64 << 20, 333 << 20, 1 << 30] {
            let bytes = bytes_in_ten_seconds(speed, 4096) as f64;
            let wanted = speed as f64 * 10.0;
            assert!(
                (bytes / wanted - 1.0).abs() < 0.03,
                "{speed}: {bytes} of {wanted}"
            );
        }
    }

    #[test]
    fn a_huge_debt_is_paid_back_and_a_raised_limit_forgives_it() {
        let mut limit = RateLimit::new(1000);
        assert_eq!(limit.wait_until(Moment::default()), None);
        limit.charge(1_000_000);
        let moment = limit.wait_until(Moment::default()).expect("in debt");
        assert_eq!(moment.since_start(), Duration::from_secs(1000));
        limit.set_speed(0);
        assert_eq!(limit.wait_until(Moment::default()), None);
    }

    #[test]
    fn chunks_follow_the_rate() {
        assert_eq!(RateLimit::new(65536).chunk_bytes(4096, 1 << 20), 4096);
        assert_eq!(RateLimit::new(1 << 20).chunk_bytes(4096, 1 << 20), 102_400);
        assert_eq!(RateLimit::new(0).chunk_bytes(4096, 1 << 20), 1 << 20);
        assert_eq!(RateLimit::new(1).chunk_bytes(65536, 1 << 20), 65536);
    }
}
