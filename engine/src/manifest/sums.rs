//! [`Summing`]: checksums of the extents of one range, of which bytes come piece by piece. Pure.

use blockyard_storage::ByteRange;

use crate::manifest::EXTENT_BYTES;
use crate::node::zeroes::is_zero;

/// Bytes of an [`ExtentSum`] where it is kept.
pub(crate) const SUM_BYTES: usize = 36;

/// What is known of the content of an extent that is not all zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExtentSum {
    /// Its CRC-32, as zlib's.
    pub(crate) crc32: u32,
    /// Its BLAKE3, if that was asked for; else zeroes.
    pub(crate) digest: [u8; 32],
}

impl ExtentSum {
    /// The sum of these bytes.
    pub(crate) fn of(bytes: &[u8], wants_digest: bool) -> Self {
        Self {
            crc32: crc32fast::hash(bytes),
            digest: match wants_digest {
                true => *blake3::hash(bytes).as_bytes(),
                false => [0; 32],
            },
        }
    }

    /// As it is kept.
    pub(crate) fn to_bytes(self) -> [u8; SUM_BYTES] {
        let mut bytes = [0; SUM_BYTES];
        let (crc32, digest) = bytes.split_at_mut(4);
        crc32.copy_from_slice(&self.crc32.to_le_bytes());
        digest.copy_from_slice(&self.digest);
        bytes
    }

    /// What was kept.
    pub(crate) fn from_bytes(bytes: &[u8; SUM_BYTES]) -> Self {
        let [a, b, c, d, rest @ ..] = bytes;
        Self {
            crc32: u32::from_le_bytes([*a, *b, *c, *d]),
            digest: *rest,
        }
    }
}

/// What became known of a run of extents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Summed {
    /// All of it is zeroes.
    Zeroes(ByteRange),
    /// None of its extents is all zeroes; their sums.
    Data(ByteRange, Vec<ExtentSum>),
}

/// Checksums of the extents of one range.
#[derive(Debug)]
pub(crate) struct Summing {
    next: u64,
    end: u64,
    wants_digest: bool,
    /// The front of the extent that is not complete yet.
    partial: Vec<u8>,
    runs: Vec<Summed>,
}

impl Summing {
    /// Of `range`, which begins with an extent and ends with one, or at the end of the disk.
    pub(crate) fn new(range: ByteRange, wants_digest: bool) -> Self {
        Self {
            next: range.offset(),
            end: range.end(),
            wants_digest,
            partial: Vec::new(),
            runs: Vec::new(),
        }
    }

    /// The next bytes.
    pub(crate) fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.next < self.end {
            let (extent, missing) = self.ahead();
            let (front, rest) = bytes.split_at(bytes.len().min(missing));
            bytes = rest;
            if self.partial.is_empty() && front.len() == missing {
                self.found(extent, front);
            } else {
                self.partial.extend_from_slice(front);
                if front.len() == missing {
                    let whole = std::mem::take(&mut self.partial);
                    self.found(extent, &whole);
                }
            }
            self.next += front.len() as u64;
        }
    }

    /// The next `length` bytes, which are zeroes.
    pub(crate) fn push_zeroes(&mut self, mut length: u64) {
        while length > 0 && self.next < self.end {
            let (_, missing) = self.ahead();
            if self.partial.is_empty() && length >= missing as u64 {
                let until = (self.next + length).min(self.end);
                let until = match until == self.end {
                    true => until,
                    false => until - until % EXTENT_BYTES,
                };
                self.add_zeroes(ByteRange::between(self.next, until));
                length -= until - self.next;
                self.next = until;
            } else {
                let front = missing.min(usize::try_from(length).unwrap_or(missing));
                length -= front as u64;
                self.push(&vec![0; front]);
            }
        }
    }

    /// The extent ahead, and how many of its bytes are missing.
    fn ahead(&self) -> (ByteRange, usize) {
        let start = self.next - self.next % EXTENT_BYTES;
        let extent = ByteRange::between(start, (start + EXTENT_BYTES).min(self.end));
        // No more than an extent has.
        let missing = usize::try_from(extent.end() - self.next).unwrap_or(usize::MAX);
        (extent, missing)
    }

    fn found(&mut self, extent: ByteRange, bytes: &[u8]) {
        if is_zero(bytes) {
            return self.add_zeroes(extent);
        }
        let sum = ExtentSum::of(bytes, self.wants_digest);
        match self.runs.last_mut() {
            Some(Summed::Data(range, sums)) if range.end() == extent.offset() => {
                *range = ByteRange::between(range.offset(), extent.end());
                sums.push(sum);
            }
            _ => self.runs.push(Summed::Data(extent, vec![sum])),
        }
    }

    fn add_zeroes(&mut self, zeroes: ByteRange) {
        match self.runs.last_mut() {
            Some(Summed::Zeroes(range)) if range.end() == zeroes.offset() => {
                *range = ByteRange::between(range.offset(), zeroes.end());
            }
            _ => self.runs.push(Summed::Zeroes(zeroes)),
        }
    }

    /// What became known of whole extents since this was asked.
    pub(crate) fn take_runs(&mut self) -> Vec<Summed> {
        std::mem::take(&mut self.runs)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What one piece after the other comes to when each extent is looked at by itself.
    fn expected(start: u64, disk: &[u8]) -> Vec<Summed> {
        let mut runs: Vec<Summed> = Vec::new();
        let mut at = start;
        for extent in disk.chunks(EXTENT_BYTES as usize) {
            let range = ByteRange::new(at, extent.len() as u64);
            at = range.end();
            let zero = extent.iter().all(|byte| *byte == 0);
            match (zero, runs.last_mut()) {
                (true, Some(Summed::Zeroes(run))) => {
                    *run = ByteRange::between(run.offset(), range.end());
                }
                (true, _) => runs.push(Summed::Zeroes(range)),
                (false, Some(Summed::Data(run, sums))) => {
                    *run = ByteRange::between(run.offset(), range.end());
                    sums.push(ExtentSum::of(extent, true));
                }
                (false, _) => {
                    runs.push(Summed::Data(range, vec![ExtentSum::of(extent, true)]));
                }
            }
        }
        runs
    }

    proptest! {
        #[test]
        fn pieces_of_any_length_come_to_the_same(
            first in 0_u64..4,
            pieces in proptest::collection::vec((any::<bool>(), 1_usize..150_000, 0_u8..3), 1..8),
        ) {
            let start = first * EXTENT_BYTES;
            let mut disk = Vec::new();
            for (_, length, fill) in &pieces {
                disk.extend(std::iter::repeat_n(*fill, *length));
            }
            let range = ByteRange::new(start, disk.len() as u64);
            let mut summing = Summing::new(range, true);
            let mut at = 0;
            for (told, length, fill) in &pieces {
                match *told && *fill == 0 {
                    true => summing.push_zeroes(*length as u64),
                    false => summing.push(&disk[at..at + length]),
                }
                at += length;
            }
            prop_assert_eq!(summing.take_runs(), expected(start, &disk));
        }
    }

    #[test]
    fn sums_are_what_other_programs_find() {
        // printf 123456789 | gzip -c | tail -c8 | head -c4 | xxd -e; printf 123456789 | b3sum
        let sum = ExtentSum::of(b"123456789", true);
        assert_eq!(sum.crc32, 0xcbf4_3926);
        let digest: String = sum
            .digest
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(
            digest,
            "b7d65b48420d1033cb2595293263b6f72eabee20d55e699d0df1973b3c9deed1"
        );
        assert_eq!(ExtentSum::from_bytes(&sum.to_bytes()), sum);
    }

    #[test]
    fn endless_zeroes_cost_nothing() {
        let range = ByteRange::new(0, 8 << 40);
        let mut summing = Summing::new(range, true);
        summing.push_zeroes(3 << 40);
        summing.push(&[1]);
        summing.push_zeroes(5 << 40);
        let runs = summing.take_runs();
        let middle = ByteRange::new(3 << 40, EXTENT_BYTES);
        assert_eq!(runs.len(), 3);
        assert_eq!(
            runs.first(),
            Some(&Summed::Zeroes(ByteRange::new(0, 3 << 40)))
        );
        let rest = ByteRange::between(middle.end(), range.end());
        assert_eq!(runs.last(), Some(&Summed::Zeroes(rest)));
    }
}
