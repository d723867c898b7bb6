//! [`Seed`]: the one source of chance, small and repeatable (splitmix64), and [`each_seed`], which runs a test once a seed.

use std::cell::Cell;

/// Chance that repeats itself.
#[derive(Debug)]
pub struct Seed(Cell<u64>);

impl Seed {
    /// The chance that `seed` stands for.
    pub const fn new(seed: u64) -> Self {
        Self(Cell::new(seed))
    }

    /// Any number.
    pub fn any(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`; 0 when `limit` is 0.
    pub fn below(&self, limit: u64) -> u64 {
        self.any().checked_rem(limit).unwrap_or(0)
    }

    /// True once in `count` times; never when `count` is 0.
    pub fn one_in(&self, count: u64) -> bool {
        count != 0 && self.below(count) == 0
    }

    /// One of `choices`.
    ///
    /// # Panics
    /// When there are none.
    pub fn pick<'a, T>(&self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len() as u64) as usize]
    }
}

/// Runs `test` for the seeds 0 to `count`, as many as `BLOCKYARD_SEEDS` says if it is set, or only for `BLOCKYARD_SEED`.
/// When one fails, the command that replays it is printed.
///
/// # Panics
/// When `test` does, or when a variable is no number.
pub fn each_seed(package: &str, name: &str, count: u64, test: impl Fn(u64)) {
    let variable = |name| {
        let value = std::env::var(name).ok()?;
        Some(
            value
                .parse()
                .unwrap_or_else(|_| panic!("{name} is no number: {value}")),
        )
    };
    let seeds = match variable("BLOCKYARD_SEED") {
        Some(only) => only..only + 1,
        None => 0..variable("BLOCKYARD_SEEDS").unwrap_or(count),
    };
    for seed in seeds {
        let _told = Told {
            package,
            name,
            seed,
        };
        test(seed);
    }
}

/// Tells how to run the same again, when it is dropped by a panic.
struct Told<'a> {
    package: &'a str,
    name: &'a str,
    seed: u64,
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Told {
                package,
                name,
                seed,
            } = self;
            eprintln!(
                "seed {seed} failed; again: BLOCKYARD_SEED={seed} cargo test -p {package} {name}"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_numbers_and_others_give_others() {
        let numbers = |seed| {
            let seed = Seed::new(seed);
            (0..8).map(|_| seed.any()).collect::<Vec<_>>()
        };
        assert_eq!(numbers(7), numbers(7));
        assert_ne!(numbers(7), numbers(8));
        let seed = Seed::new(1);
        let mut seen = [0; 6];
        for _ in 0..600 {
            seen[seed.below(6) as usize] += 1;
        }
        assert!(seen.iter().all(|count| *count > 50), "{seen:?}");
        assert_eq!(seed.below(0), 0);
    }
}
