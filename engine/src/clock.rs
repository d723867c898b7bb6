//! Time as a value: a monotonic clock that tests can own.

use std::time::Duration;

use blockyard_storage::LocalFuture;

/// A point in monotonic time, measured from an arbitrary start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct Moment(Duration);

impl Moment {
    /// The moment `since_start` after the clock's start.
    pub const fn new(since_start: Duration) -> Self {
        Self(since_start)
    }

    /// Time since the clock's start.
    pub const fn since_start(self) -> Duration {
        self.0
    }

    /// This moment moved by `delay`; saturates.
    pub const fn after(self, delay: Duration) -> Self {
        Self(self.0.saturating_add(delay))
    }

    /// Time from `earlier` to this moment, zero if it is not earlier.
    pub const fn since(self, earlier: Moment) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// A source of time for one data thread.
pub trait Clock {
    /// The time now; never goes back.
    fn now(&self) -> Moment;

    /// Ends once `moment` has come. Dropping it forgets the timer.
    fn sleep_until(&self, moment: Moment) -> LocalFuture<'static, ()>;
}
