//! What stands in the measured files: the same bytes in every run, no block of zeroes among them.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use crate::Failure;

/// Data is written in pieces of this many bytes.
const PIECE_BYTES: usize = 1 << 20;

/// The unit in which a mixture changes from one kind of data to another.
const BLOCK_BYTES: usize = 4096;

/// Words that the text of a mixture is made of.
const WORDS: usize = 2048;

/// Writes a whole file with data that has no zero blocks and no two equal ones; another seed gives other data.
pub(crate) fn fill_with_noise(path: &Path, size_bytes: u64, seed: u64) -> Result<(), Failure> {
    let mut noise = Noise::new(seed);
    fill(path, size_bytes, |write| write(noise.piece()))
}

/// Writes a whole file with a mixture that compresses about as well as what disks hold: of its blocks of 4 KiB three
/// in eight are text, three in eight records of a table, two in eight noise, in no order.
pub(crate) fn fill_with_mixture(path: &Path, size_bytes: u64, seed: u64) -> Result<(), Failure> {
    let mut mixture = Mixture::new(seed);
    fill(path, size_bytes, |write| write(&mixture.piece()))
}

/// Makes a sparse file with `pieces` pieces of 1 MiB of noise at equal distances.
pub(crate) fn fill_sparsely(path: &Path, size_bytes: u64, pieces: u64) -> Result<(), Failure> {
    let failure = |error: std::io::Error| Failure::at(path, &error);
    let mut file = File::create(path).map_err(failure)?;
    file.set_len(size_bytes).map_err(failure)?;
    let mut noise = Noise::new(7);
    for index in 0..pieces {
        file.seek(SeekFrom::Start(size_bytes / pieces * index))
            .map_err(failure)?;
        file.write_all(noise.piece()).map_err(failure)?;
    }
    file.sync_all().map_err(failure)
}

/// Makes (or replaces) an empty file of this length.
pub(crate) fn make_sparse(path: &Path, size_bytes: u64) -> Result<(), Failure> {
    let failure = |error: std::io::Error| Failure::at(path, &error);
    if path.exists() {
        fs::remove_file(path).map_err(failure)?;
    }
    let file = File::create(path).map_err(failure)?;
    file.set_len(size_bytes).map_err(failure)?;
    file.sync_all().map_err(failure)
}

type Sink<'a> = dyn FnMut(&[u8]) -> std::io::Result<()> + 'a;

/// Writes pieces until the file has its length; `next` hands each to the sink.
fn fill(
    path: &Path,
    size_bytes: u64,
    mut next: impl FnMut(&mut Sink<'_>) -> std::io::Result<()>,
) -> Result<(), Failure> {
    let failure = |error: std::io::Error| Failure::at(path, &error);
    let mut file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(false)
        .open(path)
        .map_err(failure)?;
    let mut left = size_bytes;
    while left > 0 {
        next(&mut |piece| {
            let length = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
            left -= length as u64;
            file.write_all(&piece[..length])
        })
        .map_err(failure)?;
    }
    file.sync_all().map_err(failure)
}

/// Cheap pseudo-random data: one filled piece, of which every use changes one word per 512 bytes.
struct Noise {
    piece: Vec<u8>,
    state: u64,
}

impl Noise {
    fn new(seed: u64) -> Noise {
        let mut noise = Noise {
            piece: vec![0; PIECE_BYTES],
            state: seed ^ 0x9E37_79B9_7F4A_7C15,
        };
        for at in (0..PIECE_BYTES).step_by(8) {
            let word = noise.next() | 1;
            noise.piece[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        noise
    }

    /// xorshift64*: good enough to be no pattern.
    fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn piece(&mut self) -> &[u8] {
        for at in (0..PIECE_BYTES).step_by(512) {
            let word = self.next() | 1;
            self.piece[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        &self.piece
    }
}

/// Text, records and noise.
struct Mixture {
    noise: Noise,
    words: Vec<String>,
    record: u32,
    time: u64,
}

impl Mixture {
    fn new(seed: u64) -> Mixture {
        let mut noise = Noise::new(seed);
        let words = (0..WORDS).map(|_| word(noise.next())).collect();
        Mixture {
            noise,
            words,
            record: 0,
            time: 1_700_000_000,
        }
    }

    fn piece(&mut self) -> Vec<u8> {
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        while piece.len() < PIECE_BYTES {
            let end = piece.len() + BLOCK_BYTES;
            match self.noise.next() >> 61 {
                0..3 => self.text(&mut piece, end),
                3..6 => self.records(&mut piece, end),
                _ => {
                    while piece.len() < end {
                        piece.extend_from_slice(&self.noise.next().to_le_bytes());
                    }
                }
            }
            piece.truncate(end);
        }
        piece
    }

    /// Words, few of them often; now and then a number or the end of a line.
    fn text(&mut self, piece: &mut Vec<u8>, end: usize) {
        while piece.len() < end {
            let random = self.noise.next();
            // The product of three is mostly small.
            let (one, two, three) = (random >> 52, random >> 40 & 0xFFF, random >> 28 & 0xFFF);
            let rank = (one * two * three * WORDS as u64) >> 36;
            let word = usize::try_from(rank).ok().and_then(|at| self.words.get(at));
            piece.extend_from_slice(word.map_or(&b""[..], |word| word.as_bytes()));
            match random & 31 {
                0 => piece.push(b'\n'),
                1 => piece.extend_from_slice(format!(" {} ", random >> 8 & 0xFFF).as_bytes()),
                _ => piece.push(b' '),
            }
        }
    }

    /// Records of 32 bytes: a running number, a time, a kind, an amount, an unused field.
    fn records(&mut self, piece: &mut Vec<u8>, end: usize) {
        while piece.len() < end {
            let random = self.noise.next();
            self.record = self.record.wrapping_add(1);
            self.time += random & 63;
            piece.extend_from_slice(&self.record.to_le_bytes());
            piece.extend_from_slice(&self.time.to_le_bytes());
            piece.extend_from_slice(&(random >> 8 & 3).to_le_bytes());
            piece.extend_from_slice(&(random >> 52).to_le_bytes());
            piece.extend_from_slice(&[0; 4]);
        }
    }
}

/// A word of two to nine letters, the same for the same number.
fn word(random: u64) -> String {
    let length = 2 + (random & 7);
    (0..length)
        .map(|index| char::from(b'a' + (random >> (8 + 6 * index) & 63) as u8 % 26))
        .collect()
}
