//! [`EventLoopSpec`]: what an event loop of QEMU's could be tuned to. It is kept to be shown: the loop of a data thread has nothing
//! of it. Pure.

use crate::error::EngineError;

/// The tuning of an event loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventLoopSpec {
    /// In the order of the names.
    values: [i64; 6],
}

impl EventLoopSpec {
    /// Names of its properties.
    pub const NAMES: [&'static str; 6] = [
        "thread-pool-min",
        "aio-max-batch",
        "thread-pool-max",
        "poll-max-ns",
        "poll-grow",
        "poll-shrink",
    ];

    /// With these properties, the rest as QEMU has it.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn new(given: impl Fn(&'static str) -> Option<i64>) -> Result<Self, EngineError> {
        let mut new = Self::default();
        for (name, place) in Self::NAMES.into_iter().zip(&mut new.values) {
            if let Some(value) = given(name) {
                *place = in_range(name, value)?;
            }
        }
        new.check()?;
        Ok(new)
    }

    /// The value of a property.
    pub fn value(&self, name: &str) -> Option<i64> {
        let place = Self::NAMES.iter().position(|known| *known == name)?;
        self.values.get(place).copied()
    }

    /// Gives a property another value.
    ///
    /// # Errors
    /// In QEMU's words; it is what it was.
    pub fn set(&mut self, name: &str, value: i64) -> Result<(), EngineError> {
        let mut changed = *self;
        for (known, place) in Self::NAMES.into_iter().zip(&mut changed.values) {
            if known == name {
                *place = in_range(name, value)?;
            }
        }
        changed.check()?;
        *self = changed;
        Ok(())
    }

    /// That there can be as many workers as wanted.
    fn check(&self) -> Result<(), EngineError> {
        let [least, _, most, ..] = self.values;
        if least > most || most == 0 || most > i64::from(i32::MAX) {
            let text = "bad thread-pool-min/thread-pool-max values";
            return Err(EngineError::generic(text));
        }
        Ok(())
    }
}

impl Default for EventLoopSpec {
    fn default() -> Self {
        Self {
            values: [0, 0, 64, 32768, 0, 0],
        }
    }
}

fn in_range(name: &str, value: i64) -> Result<i64, EngineError> {
    if value < 0 {
        let most = i64::MAX;
        let text = format!("{name} value must be in range [0, {most}]");
        return Err(EngineError::generic(text));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stay_within_their_ranges() {
        let given = |name| (name == "thread-pool-min").then_some(65);
        assert!(EventLoopSpec::new(given).is_err());
        let given = |name| (name == "poll-grow").then_some(-1);
        let text = EventLoopSpec::new(given).expect_err("negative").text;
        assert_eq!(
            text,
            "poll-grow value must be in range [0, 9223372036854775807]"
        );
        let mut spec = EventLoopSpec::new(|_| None).expect("the defaults");
        spec.set("thread-pool-max", 5).expect("fits");
        assert!(spec.set("thread-pool-min", 6).is_err());
        assert_eq!(spec.value("thread-pool-min"), Some(0));
        assert_eq!(spec.value("thread-pool-max"), Some(5));
        assert_eq!(spec.value("poll-max-ns"), Some(32768));
        assert_eq!(spec.value("type"), None);
    }
}
