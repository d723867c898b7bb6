//! Ranges of bytes on a disk: overlap, split, align, clamp. Never wraps, never panics on any input.

use std::fmt;

/// A half-open range of bytes, `offset..offset + length`, whose end never passes `u64::MAX`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ByteRange {
    offset: u64,
    length: u64,
}

impl ByteRange {
    /// A range of `length` bytes from `offset`; a length that would pass the end of the address space is cut there.
    pub const fn new(offset: u64, length: u64) -> Self {
        let room = u64::MAX - offset;
        Self {
            offset,
            length: if length > room { room } else { length },
        }
    }

    /// The range from `start` up to, not including, `end`; empty when `end` is not behind `start`.
    pub const fn between(start: u64, end: u64) -> Self {
        Self {
            offset: start,
            length: end.saturating_sub(start),
        }
    }

    /// First byte, in bytes from the start of the disk.
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Number of bytes.
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// First byte behind the range.
    pub const fn end(&self) -> u64 {
        self.offset + self.length
    }

    /// Whether the range holds no byte.
    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Whether both ranges hold at least one byte in common.
    pub const fn overlaps(&self, other: &ByteRange) -> bool {
        !self.is_empty()
            && !other.is_empty()
            && self.offset < other.end()
            && other.offset < self.end()
    }

    /// Whether every byte of `other` lies in this range.
    pub const fn contains(&self, other: &ByteRange) -> bool {
        other.offset >= self.offset && other.end() <= self.end()
    }

    /// The bytes both ranges hold; empty when they do not meet.
    pub fn intersection(&self, other: &ByteRange) -> ByteRange {
        let start = self.offset.max(other.offset);
        ByteRange::between(start, self.end().min(other.end()))
    }

    /// The part below `limit`.
    pub fn clamp_end(&self, limit: u64) -> ByteRange {
        ByteRange::between(self.offset.min(limit), self.end().min(limit))
    }

    /// Splits into the first `length` bytes and the rest.
    pub fn split_at(&self, length: u64) -> (ByteRange, ByteRange) {
        let first = length.min(self.length);
        (
            ByteRange::new(self.offset, first),
            ByteRange::new(self.offset + first, self.length - first),
        )
    }

    /// Grown outward until both ends are multiples of `alignment` (a power of two). The end saturates at the largest
    /// multiple that fits.
    pub fn align_outward(&self, alignment: u64) -> ByteRange {
        let mask = alignment - 1;
        let start = self.offset & !mask;
        let end = match self.end().checked_add(mask) {
            Some(end) => end & !mask,
            None => !mask,
        };
        ByteRange::between(start, end)
    }

    /// Shrunk inward until both ends are multiples of `alignment` (a power of two); may become empty.
    pub fn align_inward(&self, alignment: u64) -> ByteRange {
        let mask = alignment - 1;
        let start = match self.offset.checked_add(mask) {
            Some(start) => start & !mask,
            None => return ByteRange::new(self.offset, 0),
        };
        ByteRange::between(start, self.end() & !mask)
    }

    /// Whether both ends are multiples of `alignment` (a power of two).
    pub const fn is_aligned(&self, alignment: u64) -> bool {
        (self.offset | self.length) & (alignment - 1) == 0
    }

    /// The range in pieces that end at multiples of `piece` bytes (a power of two), in ascending order.
    pub fn pieces(&self, piece: u64) -> impl Iterator<Item = ByteRange> + use<> {
        let mut rest = *self;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let to_boundary = piece - (rest.offset & (piece - 1));
            let (first, tail) = rest.split_at(to_boundary);
            rest = tail;
            Some(first)
        })
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset, self.length)
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at offset {}", self.length, self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::ByteRange;

    #[test]
    fn ends_never_wrap() {
        let range = ByteRange::new(u64::MAX - 3, 100);
        assert_eq!(range.length(), 3);
        assert_eq!(range.end(), u64::MAX);
        assert!(range.align_inward(4096).is_empty());
        assert_eq!(range.align_outward(4096).end(), !4095);
    }

    #[test]
    fn alignment_grows_and_shrinks() {
        let range = ByteRange::new(1000, 10_000);
        assert_eq!(range.align_outward(4096), ByteRange::new(0, 12_288));
        assert_eq!(range.align_inward(4096), ByteRange::new(4096, 4096));
        assert!(ByteRange::new(100, 50).align_inward(512).is_empty());
        assert!(ByteRange::new(4096, 8192).is_aligned(4096));
        assert!(!ByteRange::new(4096, 100).is_aligned(4096));
    }

    #[test]
    fn pieces_cover_the_range_once() {
        let range = ByteRange::new(1000, 10_000);
        let pieces: Vec<_> = range.pieces(4096).collect();
        assert_eq!(pieces.first(), Some(&ByteRange::new(1000, 3096)));
        assert_eq!(pieces.iter().map(ByteRange::length).sum::<u64>(), 10_000);
        assert!(
            pieces
                .windows(2)
                .all(|pair| pair[0].end() == pair[1].offset())
        );
    }

    #[test]
    fn overlap_and_intersection_agree() {
        let a = ByteRange::new(10, 10);
        for offset in 0..30 {
            for length in 0..30 {
                let b = ByteRange::new(offset, length);
                assert_eq!(a.overlaps(&b), !a.intersection(&b).is_empty(), "{b:?}");
            }
        }
    }
}
