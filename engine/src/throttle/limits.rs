//! [`Limits`]: what may pass in a second, and which combinations make no sense, in QEMU's order and words. Pure.

/// What one of the limits counts, in the order in which they are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// Bytes, read or written.
    Bytes,
    /// Bytes read.
    BytesRead,
    /// Bytes written.
    BytesWritten,
    /// Requests of any kind.
    Requests,
    /// Requests that read.
    Reads,
    /// Requests that write.
    Writes,
}

impl Counted {
    /// All of them, in their order.
    pub const ALL: [Counted; 6] = [
        Counted::Bytes,
        Counted::BytesRead,
        Counted::BytesWritten,
        Counted::Requests,
        Counted::Reads,
        Counted::Writes,
    ];

    /// How clients spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Counted::Bytes => "bps-total",
            Counted::BytesRead => "bps-read",
            Counted::BytesWritten => "bps-write",
            Counted::Requests => "iops-total",
            Counted::Reads => "iops-read",
            Counted::Writes => "iops-write",
        }
    }
}

/// One limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// In a second, in the long run; 0: no limit.
    pub average: u64,
    /// In a second, during a burst; 0: there are no bursts.
    pub burst: u64,
    /// How long a burst may last, in seconds.
    pub burst_seconds: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self {
            average: 0,
            burst: 0,
            burst_seconds: 1,
        }
    }
}

/// Limits on what passes. The default is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// In the order of [`Counted::ALL`].
    pub rates: [Rate; 6],
    /// A request longer than this counts as several, by its length; 0: every request counts once.
    pub request_bytes: u64,
}

/// What a client says of one limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateChange {
    /// See [`Rate::average`].
    pub average: Option<i64>,
    /// See [`Rate::burst`].
    pub burst: Option<i64>,
    /// See [`Rate::burst_seconds`].
    pub burst_seconds: Option<i64>,
}

/// What a client says of limits; the rest stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitsChange {
    /// In the order of [`Counted::ALL`].
    pub rates: [RateChange; 6],
    /// See [`Limits::request_bytes`].
    pub request_bytes: Option<i64>,
}

/// What a group is created with: its limits at once, and one by one as properties that cannot be set later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NewLimits {
    /// At once.
    pub limits: LimitsChange,
    /// One by one.
    pub properties: LimitsChange,
}

/// Largest rate.
const RATE_MAX: u64 = 1_000_000_000_000_000;

impl Limits {
    /// The rate of what is counted so.
    pub const fn rate(&self, counted: Counted) -> Rate {
        self.rates[counted as usize]
    }

    /// These limits with what a client says of them.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn with(&self, change: &LimitsChange) -> Result<Limits, String> {
        let mut limits = *self;
        for counted in Counted::ALL {
            let change = &change.rates[counted as usize];
            let rate = &mut limits.rates[counted as usize];
            // Negative ones become large and are refused as such.
            set(&mut rate.average, change.average);
            set(&mut rate.burst, change.burst);
            if let Some(seconds) = change.burst_seconds
                && seconds > i64::from(u32::MAX)
            {
                return Err(format!(
                    "{}-max-length value must be in the range [0, {}]",
                    counted.name(),
                    u32::MAX
                ));
            }
            set(&mut rate.burst_seconds, change.burst_seconds);
        }
        set(&mut limits.request_bytes, change.request_bytes);
        limits.check()?;
        Ok(limits)
    }

    /// The limits of a new group.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn new(given: &NewLimits) -> Result<Limits, String> {
        // Properties are set in an order that shows where both are given.
        let mut limits = Limits::default();
        limits.set_properties(&given.properties, true)?;
        if given.limits != LimitsChange::default() {
            limits = limits.with(&given.limits)?;
        }
        limits.set_properties(&given.properties, false)?;
        limits.check()?;
        Ok(limits)
    }

    /// Sets the properties that come before all limits at once, or those that come after.
    fn set_properties(&mut self, properties: &LimitsChange, before: bool) -> Result<(), String> {
        let value = |value: Option<i64>, comes_before: bool| match value {
            Some(value) if comes_before == before => match u64::try_from(value) {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err("Property values cannot be negative".to_owned()),
            },
            _ => Ok(None),
        };
        for counted in Counted::ALL {
            let change = &properties.rates[counted as usize];
            let rate = &mut self.rates[counted as usize];
            if let Some(average) = value(change.average, counted == Counted::Requests)? {
                rate.average = average;
            }
            if let Some(burst) = value(change.burst, counted == Counted::BytesRead)? {
                rate.burst = burst;
            }
            let is_early = matches!(counted, Counted::Bytes | Counted::Requests | Counted::Reads);
            if let Some(seconds) = value(change.burst_seconds, is_early)? {
                if seconds > u64::from(u32::MAX) {
                    // The missing blank is what clients see elsewhere.
                    return Err(format!(
                        "x-{}-max-length value must be in therange [0, {}]",
                        counted.name(),
                        u32::MAX
                    ));
                }
                rate.burst_seconds = seconds;
            }
        }
        if let Some(bytes) = value(properties.request_bytes, true)? {
            self.request_bytes = bytes;
        }
        Ok(())
    }

    /// That the limits make sense together.
    ///
    /// # Errors
    /// In QEMU's words.
    fn check(&self) -> Result<(), String> {
        let conflicts = |of: fn(&Rate) -> u64, total: Counted, read: Counted, written: Counted| {
            let is_set = |counted| of(&self.rate(counted)) > 0;
            is_set(total) && (is_set(read) || is_set(written))
        };
        let conflicting = [|rate: &Rate| rate.average, |rate: &Rate| rate.burst]
            .into_iter()
            .any(|of| {
                use Counted::{Bytes, BytesRead, BytesWritten, Reads, Requests, Writes};
                conflicts(of, Bytes, BytesRead, BytesWritten)
                    || conflicts(of, Requests, Reads, Writes)
            });
        if conflicting {
            return Err(
                "bps/iops/max total values and read/write values cannot be used at the \
                        same time"
                    .to_owned(),
            );
        }
        let counts = [Counted::Requests, Counted::Reads, Counted::Writes];
        if self.request_bytes > 0 && counts.iter().all(|one| self.rate(*one).average == 0) {
            return Err("iops size requires an iops value to be set".to_owned());
        }
        self.rates.iter().try_for_each(Rate::check)
    }
}

impl Rate {
    fn check(&self) -> Result<(), String> {
        let text = if self.average > RATE_MAX || self.burst > RATE_MAX {
            return Err(format!(
                "bps/iops/max values must be within [0, {RATE_MAX}]"
            ));
        } else if self.burst_seconds == 0 {
            "the burst length cannot be 0"
        } else if self.burst_seconds > 1 && self.burst == 0 {
            "burst length set without burst rate"
        } else if self.burst > 0 && self.burst_seconds > RATE_MAX / self.burst {
            "burst length too high for this burst rate"
        } else if self.burst > 0 && self.average == 0 {
            "bps_max/iops_max require corresponding bps/iops values"
        } else if self.burst > 0 && self.burst < self.average {
            "bps_max/iops_max cannot be lower than bps/iops"
        } else {
            return Ok(());
        };
        Err(text.to_owned())
    }
}

fn set(value: &mut u64, given: Option<i64>) {
    if let Some(given) = given {
        *value = given.cast_unsigned();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(members: &[(Counted, &str, i64)]) -> LimitsChange {
        let mut change = LimitsChange::default();
        for (counted, what, value) in members {
            let rate = &mut change.rates[*counted as usize];
            let place = match *what {
                "avg" => &mut rate.average,
                "max" => &mut rate.burst,
                "length" => &mut rate.burst_seconds,
                _ => &mut change.request_bytes,
            };
            *place = Some(*value);
        }
        change
    }

    fn text(members: &[(Counted, &str, i64)]) -> String {
        match Limits::default().with(&change(members)) {
            Ok(_) => String::new(),
            Err(text) => text,
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_order() {
        use Counted::{Bytes, BytesRead, BytesWritten, Reads, Requests};
        let together =
            "bps/iops/max total values and read/write values cannot be used at the same time";
        let range = "bps/iops/max values must be within [0, 1000000000000000]";
        let most = 1_000_000_000_000_000;
        for (members, expected) in [
            (&[(Bytes, "avg", 1), (BytesRead, "avg", 1)][..], together),
            (&[(Requests, "max", 1), (Reads, "max", 1)], together),
            (
                &[(Bytes, "size", 5), (Bytes, "length", 0)],
                "iops size requires an iops value to be set",
            ),
            (&[(Bytes, "size", 5), (Reads, "avg", 1)], ""),
            (&[(Bytes, "avg", most)], ""),
            (&[(Bytes, "avg", most + 1), (Bytes, "length", 0)], range),
            (&[(Bytes, "max", -1)], range),
            (
                &[(Bytes, "length", 0), (Bytes, "max", 5)],
                "the burst length cannot be 0",
            ),
            (
                &[(Bytes, "length", -(1 << 32))],
                "burst length set without burst rate",
            ),
            (
                &[(Bytes, "length", 1 << 32)],
                "bps-total-max-length value must be in the range [0, 4294967295]",
            ),
            (
                &[(Bytes, "length", 2), (Bytes, "max", most)],
                "burst length too high for this burst rate",
            ),
            (
                &[
                    (Bytes, "avg", 5),
                    (Bytes, "max", most / 2),
                    (Bytes, "length", 2),
                ],
                "",
            ),
            (
                &[(BytesRead, "avg", 5), (Bytes, "max", 5)],
                "bps_max/iops_max require corresponding bps/iops values",
            ),
            (
                &[
                    (BytesRead, "avg", 5),
                    (BytesRead, "max", 4),
                    (BytesWritten, "max", 1),
                ],
                "bps_max/iops_max cannot be lower than bps/iops",
            ),
        ] {
            assert_eq!(text(members), expected, "{members:?}");
        }
    }

    #[test]
    fn what_is_left_out_stays() {
        use Counted::{Bytes, Reads};
        let first = change(&[(Bytes, "avg", 5), (Bytes, "max", 10), (Bytes, "length", 3)]);
        let limits = Limits::default().with(&first).expect("makes sense");
        let limits = limits.with(&change(&[(Reads, "avg", 7)])).expect("too");
        let limits = limits.with(&change(&[(Bytes, "max", 8)])).expect("too");
        let bytes = Rate {
            average: 5,
            burst: 8,
            burst_seconds: 3,
        };
        assert_eq!(limits.rate(Bytes), bytes);
        assert_eq!(limits.rate(Reads).average, 7);
        let refused = limits.with(&change(&[(Bytes, "max", 0)]));
        let expected = "burst length set without burst rate".to_owned();
        assert_eq!(refused, Err(expected));
    }

    #[test]
    fn properties_are_set_around_the_limits() {
        use Counted::{Bytes, Requests};
        let limits = change(&[(Bytes, "avg", 7), (Requests, "avg", 7)]);
        let properties = change(&[(Bytes, "avg", 5), (Requests, "avg", 5)]);
        let new = Limits::new(&NewLimits { limits, properties }).expect("makes sense");
        assert_eq!(new.rate(Bytes).average, 5);
        assert_eq!(new.rate(Requests).average, 7);
        for (properties, expected) in [
            (
                change(&[(Bytes, "avg", -1)]),
                "Property values cannot be negative",
            ),
            (
                change(&[(Bytes, "length", 1 << 32)]),
                "x-bps-total-max-length value must be in therange [0, 4294967295]",
            ),
        ] {
            let limits = LimitsChange::default();
            let refused = Limits::new(&NewLimits { limits, properties });
            assert_eq!(refused, Err(expected.to_owned()));
        }
    }
}
