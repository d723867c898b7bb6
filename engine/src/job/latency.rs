//! How long the requests of a job take, as percentiles.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;

/// Digits that a percentile is right to.
const SIGNIFICANT_DIGITS: u8 = 2;

/// Durations of requests. Work counts, queries read; neither waits longer than the other's few instructions.
#[derive(Debug)]
pub struct Latency {
    /// In microseconds.
    durations: Mutex<Histogram<u32>>,
}

/// Percentiles of one job's requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LatencyView {
    /// Requests counted.
    pub requests: u64,
    /// Half of them took at most this long.
    pub median: Duration,
    /// 99 % of them took at most this long.
    pub p99: Duration,
    /// The slowest took this long.
    pub max: Duration,
}

impl Default for Latency {
    fn default() -> Self {
        // A microsecond to an hour, which is more than any request takes before the kernel gives it up.
        let hour_us = 3_600_000_000;
        let histogram = Histogram::new_with_max(hour_us, SIGNIFICANT_DIGITS)
            .unwrap_or_else(|_| unreachable!("the bounds are valid"));
        Self {
            durations: Mutex::new(histogram),
        }
    }
}

impl Latency {
    /// Counts one request.
    pub fn count(&self, took: Duration) {
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.durations().saturating_record(took_us.max(1));
    }

    /// Percentiles of what was counted so far.
    pub fn view(&self) -> LatencyView {
        let durations = self.durations();
        let at = |quantile| Duration::from_micros(durations.value_at_quantile(quantile));
        LatencyView {
            requests: durations.len(),
            median: at(0.5),
            p99: at(0.99),
            max: Duration::from_micros(durations.max()),
        }
    }

    fn durations(&self) -> MutexGuard<'_, Histogram<u32>> {
        self.durations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_right_to_two_digits() {
        let latency = Latency::default();
        assert_eq!(latency.view(), LatencyView::default());
        for millis in 1..=1000 {
            latency.count(Duration::from_millis(millis));
        }
        let view = latency.view();
        assert_eq!(view.requests, 1000);
        for (found, expected) in [(view.median, 0.5), (view.p99, 0.99), (view.max, 1.0)] {
            let error = (found.as_secs_f64() - expected).abs() / expected;
            assert!(error < 0.01, "{found:?} instead of {expected} s");
        }
    }

    #[test]
    fn the_extremes_are_counted() {
        let latency = Latency::default();
        latency.count(Duration::ZERO);
        latency.count(Duration::MAX);
        assert_eq!(latency.view().requests, 2);
    }
}
