//! [`Trace`]: what happened in a world, in order, for people who read a failed test.

use std::collections::VecDeque;
use std::fmt;

use blockyard_storage::error::errno_text;
use blockyard_storage::{ByteRange, Operation};

/// Entries kept; older ones are forgotten.
const ENTRIES_MAX: usize = 4096;

/// How an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happened {
    /// It was asked for.
    Issued,
    /// It ended; with this errno if it failed.
    Ended(Option<i32>),
    /// The power went while it was in flight.
    Cut,
}

/// One line of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Operations that had ended before.
    pub step: u64,
    /// Number of the operation, in order of issue.
    pub number: u64,
    /// Name of the disk.
    pub disk: String,
    /// What was asked.
    pub operation: Operation,
    /// About which bytes.
    pub range: ByteRange,
    /// How it stands.
    pub happened: Happened,
}

/// What happened, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    entries: VecDeque<Entry>,
}

impl Trace {
    pub(crate) fn push(&mut self, entry: Entry) {
        if self.entries.len() == ENTRIES_MAX {
            self.entries.pop_front();
        }
        self.entries.push_back(entry);
    }

    /// The last entries, oldest first.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            step,
            number,
            disk,
            operation,
            range,
            happened,
        } = self;
        write!(f, "{step:>5} #{number:<4} {disk}: {operation:?} {range:?} ")?;
        match happened {
            Happened::Issued => f.write_str("issued"),
            Happened::Ended(None) => f.write_str("done"),
            Happened::Ended(Some(errno)) => write!(f, "failed: {}", errno_text(*errno)),
            Happened::Cut => f.write_str("cut off"),
        }
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.entries
            .iter()
            .try_for_each(|entry| writeln!(f, "{entry}"))
    }
}
