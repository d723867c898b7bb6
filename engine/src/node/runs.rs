//! What is known of the bytes ahead of a copy, and whole units of it that are to be treated alike. Pure.

use std::collections::VecDeque;

use blockyard_storage::ByteRange;

/// What a run of bytes is to somebody who copies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// There may be data.
    Data,
    /// Reads as zeroes for certain.
    Zero,
    /// None of the layers that are copied holds it.
    Nothing,
    /// Who would get it holds it already.
    Own,
}

/// What there is within one unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Some of it may be data.
    pub(crate) data: bool,
    /// Some of it reads as zeroes.
    pub(crate) zero: bool,
    /// Some of it is not held by any layer that is copied.
    pub(crate) nothing: bool,
}

impl Seen {
    /// Whether all of it reads as zeroes for certain. What no copied layer holds does not: nobody has asked below them.
    pub(crate) fn is_zero(self) -> bool {
        self.zero && !self.data && !self.nothing
    }

    /// Whether some of it is held by a layer that is copied.
    pub(crate) fn is_held(self) -> bool {
        self.data || self.zero
    }

    fn add(&mut self, known: Known) {
        match known {
            Known::Data => self.data = true,
            Known::Zero => self.zero = true,
            Known::Nothing => self.nothing = true,
            Known::Own => {}
        }
    }
}

/// Runs of bytes in ascending order, without a gap.
#[derive(Debug, Default)]
pub(crate) struct Runs(VecDeque<(ByteRange, Known)>);

impl Runs {
    /// Nothing is known any more.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// Up to where everything from `offset` is known.
    pub(crate) fn known_to(&self, offset: u64) -> u64 {
        self.0.back().map_or(offset, |(range, _)| range.end())
    }

    /// Forgets what ends at or before `offset`.
    pub(crate) fn go_on_to(&mut self, offset: u64) {
        while self.0.front().is_some_and(|run| run.0.end() <= offset) {
            self.0.pop_front();
        }
    }

    /// One more run, behind all others. Neighbours of one kind become one.
    pub(crate) fn push(&mut self, range: ByteRange, known: Known) {
        match self.0.back_mut() {
            Some(last) if last.1 == known => {
                last.0 = ByteRange::between(last.0.offset(), range.end());
            }
            _ => self.0.push_back((range, known)),
        }
    }

    /// The front of `ahead` in whole units of `unit_bytes`, a power of two, that meet one fate, and which; units end at
    /// multiples of that, and at the end of `ahead`. At least the first unit has to be known.
    pub(crate) fn front_units<F: PartialEq>(
        &self,
        ahead: ByteRange,
        unit_bytes: u64,
        fate_of: impl Fn(Seen) -> F,
    ) -> (ByteRange, F) {
        let known_to = self.known_to(ahead.offset()).min(ahead.end());
        let unit_end = |offset: u64| {
            let end = (offset + 1).checked_next_multiple_of(unit_bytes);
            end.map_or(ahead.end(), |end| end.min(ahead.end()))
        };
        let (mut at, mut fate) = (ahead.offset(), None);
        let mut runs = self.0.iter().peekable();
        loop {
            let mut end = unit_end(at);
            if fate.is_some() && (at >= known_to || end > known_to) {
                break;
            }
            let mut seen = Seen::default();
            while let Some((range, known)) = runs.peek() {
                if range.end() > at && range.offset() < end {
                    seen.add(*known);
                }
                if range.end() > end {
                    // Whole units of the same run are alike.
                    let whole = range.end() - range.end() % unit_bytes;
                    if range.offset() <= at {
                        end = end.max(whole.min(ahead.end()));
                    }
                    break;
                }
                runs.next();
            }
            let this = fate_of(seen);
            match &fate {
                Some(fate) if *fate != this => break,
                Some(_) => {}
                None => fate = Some(this),
            }
            at = end;
        }
        let fate = fate.unwrap_or_else(|| fate_of(Seen::default()));
        (ByteRange::between(ahead.offset(), at), fate)
    }
}

#[cfg(test)]
mod tests {
    use blockyard_simulator::Seed;

    use super::*;

    const KINDS: [Known; 4] = [Known::Data, Known::Zero, Known::Nothing, Known::Own];

    /// What stands at each byte that is known.
    fn seen_in(bytes: &[Known], unit: ByteRange) -> Seen {
        let mut seen = Seen::default();
        for known in &bytes[unit.offset() as usize..unit.end() as usize] {
            seen.add(*known);
        }
        seen
    }

    #[test]
    fn units_of_one_fate_come_together() {
        for seed in 0..2000 {
            let dice = Seed::new(seed);
            let unit = 1 << dice.below(5);
            let mut runs = Runs::default();
            let mut bytes = Vec::new();
            while bytes.len() < 200 {
                let (known, length) = (*dice.pick(&KINDS), 1 + dice.below(60));
                runs.push(ByteRange::new(bytes.len() as u64, length), known);
                bytes.extend(std::iter::repeat_n(known, length as usize));
            }
            let known_to = bytes.len() as u64;
            // What is asked for may end before what is known, or behind.
            let end = known_to - 20 + dice.below(40);
            let (mut at, fates) = (0, |seen: Seen| (seen.data, seen.nothing && seen.zero));
            while at < end.min(known_to) && (at + 1).next_multiple_of(unit).min(end) <= known_to {
                runs.go_on_to(at);
                let ahead = ByteRange::between(at, end);
                let (range, fate) = runs.front_units(ahead, unit, fates);
                assert_eq!(range.offset(), at, "seed {seed}");
                assert!(!range.is_empty() && range.end() <= end, "seed {seed}");
                assert!(range.end() % unit == 0 || range.end() == end);
                for piece in range.pieces(unit) {
                    assert_eq!(fates(seen_in(&bytes, piece)), fate, "seed {seed}, {piece}");
                }
                // Nothing of the same fate is left out that is known.
                let next = (range.end() + 1).next_multiple_of(unit).min(end);
                if range.end() < end && next <= known_to {
                    let next = seen_in(&bytes, ByteRange::between(range.end(), next));
                    assert_ne!(fates(next), fate, "seed {seed}, behind {range}");
                }
                // A copy may take a part only, of a unit, too.
                at = match dice.one_in(3) {
                    true => at + 1 + dice.below(range.length()),
                    false => range.end(),
                };
            }
        }
    }
}
