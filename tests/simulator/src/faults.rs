//! [`Fault`]: what goes wrong with which operation: the n-th of its kind, or any of them by chance.

use blockyard_storage::Operation;

use crate::disk::Disk;
use crate::seed::Seed;

/// What becomes of an operation.
#[derive(Clone, Copy, Debug)]
enum Effect {
    Fail(i32),
    Slow(u64),
}

/// When a fault strikes.
#[derive(Clone, Copy, Debug)]
enum When {
    Nth(u64),
    From(u64),
    OneIn(u64),
}

/// Something that goes wrong. As made it strikes the first operation of any kind on any disk, once.
#[derive(Clone, Debug)]
pub struct Fault {
    effect: Effect,
    when: When,
    operation: Option<Operation>,
    disk: Option<usize>,
    seen: u64,
}

impl Fault {
    /// The operation fails with `errno`. Of a write, zero, discard, reservation or sharing nothing, a part or all may
    /// have taken effect.
    pub const fn fails(errno: i32) -> Self {
        Self::new(Effect::Fail(errno))
    }

    /// The operation does not end before `steps` others have, unless it is alone.
    pub const fn slow(steps: u64) -> Self {
        Self::new(Effect::Slow(steps))
    }

    const fn new(effect: Effect) -> Self {
        Self {
            effect,
            when: When::Nth(1),
            operation: None,
            disk: None,
            seen: 0,
        }
    }

    /// Only operations of this kind count.
    pub const fn of(self, operation: Operation) -> Self {
        Self {
            operation: Some(operation),
            ..self
        }
    }

    /// Only operations on `disk` count.
    pub const fn on(self, disk: &Disk) -> Self {
        Self {
            disk: Some(disk.index()),
            ..self
        }
    }

    /// The `nth` that counts is struck, in order of issue from 1.
    pub const fn nth(self, nth: u64) -> Self {
        Self {
            when: When::Nth(nth),
            ..self
        }
    }

    /// The `nth` that counts and all later ones are struck.
    pub const fn from(self, nth: u64) -> Self {
        Self {
            when: When::From(nth),
            ..self
        }
    }

    /// Each that counts is struck with the chance of one in `count`.
    pub const fn one_in(self, count: u64) -> Self {
        Self {
            when: When::OneIn(count),
            ..self
        }
    }

    fn strikes(&mut self, disk: usize, operation: Operation, seed: &Seed) -> bool {
        let counts = self.operation.is_none_or(|wanted| wanted == operation)
            && self.disk.is_none_or(|wanted| wanted == disk);
        if !counts {
            return false;
        }
        self.seen += 1;
        match self.when {
            When::Nth(nth) => self.seen == nth,
            When::From(nth) => self.seen >= nth,
            When::OneIn(count) => seed.one_in(count),
        }
    }
}

/// What the faults of a world do to one operation.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) errno: Option<i32>,
    pub(crate) slow_steps: u64,
}

/// Every fault takes note of the operation; the first failure holds, delays add up.
pub(crate) fn decide(
    faults: &mut [Fault],
    disk: usize,
    operation: Operation,
    seed: &Seed,
) -> Verdict {
    let mut verdict = Verdict::default();
    for fault in faults {
        if fault.strikes(disk, operation, seed) {
            match fault.effect {
                Effect::Fail(errno) => {
                    verdict.errno.get_or_insert(errno);
                }
                Effect::Slow(steps) => {
                    verdict.slow_steps = verdict.slow_steps.saturating_add(steps);
                }
            }
        }
    }
    verdict
}
