//! What sound peers say, and what a fuzzer has found worth saying, with a few numbers changed and pieces left out, repeated or
//! put elsewhere: everything is tried with each. `BLOCKYARD_SEEDS=1000000` tries as many, `BLOCKYARD_SEED=7` that one alone.

use crate::any_bytes::try_everything;
use crate::sound;

/// Conversations of a fuzzer that was led by what code they reach, one in each line, as hexadecimal digits. Those of
/// `BLOCKYARD_FOUND` are tried, too, by [`crate::sound_conversations_and_what_the_fuzzer_has_found_are_survived`].
const CORPUS: &str = include_str!("corpus.txt");

/// Seeds of an ordinary run.
const SEEDS: u64 = 20_000;

/// Longest conversation, in bytes.
const BYTES_MAX: usize = 8192;

/// Numbers on which machines decide: limits, their neighbours, and what is short in one width and long in another.
const NUMBERS: [u64; 20] = [
    0,
    1,
    2,
    3,
    7,
    8,
    255,
    256,
    512,
    4095,
    4096,
    4097,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    32 << 20,
    (32 << 20) + 1,
    1 << 63,
    u64::MAX - 511,
    u64::MAX,
];

/// Random numbers that a seed decides (splitmix64).
struct Dice(u64);

impl Dice {
    fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Less than `limit`, or 0.
    fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit.max(1)).expect("64 bits");
        usize::try_from(self.any() % limit).expect("small")
    }
}

fn corpus() -> Vec<Vec<u8>> {
    let byte = |digits: &[u8]| {
        let digits = std::str::from_utf8(digits).expect("digits");
        u8::from_str_radix(digits, 16).expect("digits")
    };
    let lines = CORPUS.lines().filter(|line| !line.is_empty());
    lines
        .map(|line| line.as_bytes().chunks(2).map(byte).collect())
        .collect()
}

/// Puts a number somewhere, as wide as numbers of the protocol are.
fn put_number(bytes: &mut [u8], dice: &mut Dice) {
    let width = [1, 2, 4, 8][dice.below(4)];
    if bytes.len() < width {
        return;
    }
    let at = dice.below(bytes.len() - width + 1);
    let place = &mut bytes[at..at + width];
    let old = place
        .iter()
        .fold(0, |old, byte| old << 8 | u64::from(*byte));
    let new = match dice.below(6) {
        0 => old.wrapping_add(1),
        1 => old.wrapping_sub(1),
        2 => old ^ 1 << dice.below(width * 8),
        3 => dice.any() >> dice.below(64),
        4 => old.wrapping_mul(2),
        _ => NUMBERS[dice.below(NUMBERS.len())],
    };
    place.copy_from_slice(&new.to_be_bytes()[8 - width..]);
}

/// One to six changes.
fn mutate(bytes: &mut Vec<u8>, others: &[Vec<u8>], dice: &mut Dice) {
    for _ in 0..1 + dice.below(6) {
        let at = dice.below(bytes.len() + 1);
        let length = dice.below(1 + (bytes.len() - at).min(64));
        match dice.below(8) {
            0 => drop(bytes.drain(at..at + length)),
            1 => {
                let piece = bytes[at..at + length].to_vec();
                let to = dice.below(bytes.len() + 1);
                bytes.splice(to..to, piece);
            }
            2 => {
                let other = &others[dice.below(others.len())];
                let from = dice.below(other.len());
                let piece = other[from..].iter().take(1 + dice.below(600)).copied();
                bytes.splice(at..at + length, piece);
            }
            3 => bytes.truncate(at.max(2)),
            _ => put_number(bytes, dice),
        }
    }
    bytes.truncate(BYTES_MAX);
}

#[test]
fn conversations_with_anything_changed_are_survived() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let all: Vec<_> = sound().into_iter().chain(corpus()).collect();
    let seeds = match number("BLOCKYARD_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("BLOCKYARD_SEEDS").unwrap_or(SEEDS),
    };
    for seed in seeds {
        let mut dice = Dice(seed);
        let mut bytes = all[dice.below(all.len())].clone();
        mutate(&mut bytes, &all, &mut dice);
        let tried = std::panic::catch_unwind(|| try_everything(&bytes));
        assert!(
            tried.is_ok(),
            "BLOCKYARD_SEED={seed} cargo test -p blockyard-nbd conversations_with_anything"
        );
    }
}

#[test]
fn what_a_fuzzer_was_led_to_is_survived() {
    let all = corpus();
    assert!(!all.is_empty());
    for bytes in all {
        for end in 0..=bytes.len() {
            try_everything(&bytes[..end]);
        }
    }
}
