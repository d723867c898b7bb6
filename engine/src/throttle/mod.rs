//! Limits on what passes nodes: what they may be, buckets that fill and leak, groups of nodes that share them. Knows no node and
//! no thread; time comes from whoever passes.

mod buckets;
pub mod group;
#[cfg(test)]
mod group_tests;
pub mod limits;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It reads.
    Read,
    /// It writes, makes zeroes or discards.
    Write,
}

impl Direction {
    /// Both.
    pub const BOTH: [Direction; 2] = [Direction::Read, Direction::Write];

    const fn index(self) -> usize {
        match self {
            Direction::Read => 0,
            Direction::Write => 1,
        }
    }

    const fn other(self) -> Direction {
        match self {
            Direction::Read => Direction::Write,
            Direction::Write => Direction::Read,
        }
    }
}
