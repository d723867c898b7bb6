//! [`Change`]: one change of a disk's bytes or length, and what a power cut may leave of it.

use std::task::{Context, Poll, Waker};

use blockyard_storage::{
    Buffer, ByteRange, LocalFuture, MemoryStorage, Preallocation, Storage, ZeroMode,
};

use crate::seed::Seed;

/// What a disk writes whole or not at all, in bytes.
const SECTOR_BYTES: u64 = 512;

/// A change of a disk.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Write {
        offset: u64,
        bytes: Vec<u8>,
    },
    Zero {
        range: ByteRange,
        mode: ZeroMode,
    },
    Discard {
        range: ByteRange,
    },
    Resize {
        length_bytes: u64,
    },
    Preallocate {
        range: ByteRange,
        how: Preallocation,
    },
}

impl Change {
    /// The bytes it is about.
    pub(crate) fn range(&self) -> ByteRange {
        match self {
            Change::Write { offset, bytes } => ByteRange::new(*offset, bytes.len() as u64),
            Change::Zero { range, .. }
            | Change::Discard { range }
            | Change::Preallocate { range, .. } => *range,
            Change::Resize { length_bytes } => ByteRange::new(0, *length_bytes),
        }
    }

    /// Whether it takes room where there was a hole.
    pub(crate) fn takes_room(&self) -> bool {
        match self {
            Change::Write { .. } => true,
            Change::Preallocate { how, .. } => *how != Preallocation::Off,
            Change::Zero { .. } | Change::Discard { .. } | Change::Resize { .. } => false,
        }
    }

    /// Carries it out.
    pub(crate) fn apply(&self, disk: &MemoryStorage) {
        let outcome = match self {
            Change::Write { offset, bytes } => {
                now(disk.write(*offset, Buffer::copy_of(bytes))).outcome
            }
            Change::Zero { range, mode } => now(disk.zero(*range, *mode)),
            Change::Discard { range } => now(disk.discard(*range)),
            Change::Resize { length_bytes } => now(disk.resize(*length_bytes)),
            Change::Preallocate { range, how } => now(disk.preallocate(*range, *how)),
        };
        outcome.expect("memory takes every change");
    }

    /// The same on a part of its bytes.
    pub(crate) fn part(&self, part: ByteRange) -> Change {
        let part = part.intersection(&self.range());
        match self {
            Change::Write { offset, bytes } => {
                let start = (part.offset() - offset) as usize;
                Change::Write {
                    offset: part.offset(),
                    bytes: bytes[start..start + part.length() as usize].to_vec(),
                }
            }
            Change::Zero { mode, .. } => Change::Zero {
                range: part,
                mode: *mode,
            },
            Change::Discard { .. } => Change::Discard { range: part },
            Change::Preallocate { how, .. } => Change::Preallocate {
                range: part,
                how: *how,
            },
            Change::Resize { .. } => self.clone(),
        }
    }

    /// Runs of sectors that are carried out and left out in turn; the file may have grown all the same.
    pub(crate) fn torn(&self, seed: &Seed) -> Vec<Change> {
        if matches!(self, Change::Resize { .. }) {
            return if seed.one_in(2) {
                vec![self.clone()]
            } else {
                Vec::new()
            };
        }
        let mut pieces = Vec::new();
        let mut rest = self.range();
        let longest = (rest.length() / SECTOR_BYTES / 2).max(1);
        let mut kept = seed.one_in(2);
        while !rest.is_empty() {
            let to_boundary = SECTOR_BYTES - rest.offset() % SECTOR_BYTES;
            let (run, after) = rest.split_at(to_boundary + seed.below(longest) * SECTOR_BYTES);
            if kept {
                pieces.push(self.part(run));
            }
            (rest, kept) = (after, !kept);
        }
        if !matches!(self, Change::Discard { .. }) && seed.one_in(2) {
            pieces.push(Change::Preallocate {
                range: self.range(),
                how: Preallocation::Off,
            });
        }
        pieces
    }
}

/// Carries out on `disk` what is left of `changes` when they were not made durable in time: often all or nothing, else
/// each kept, lost or torn by itself.
pub(crate) fn settle<'a>(
    changes: impl Iterator<Item = &'a Change>,
    disk: &MemoryStorage,
    seed: &Seed,
) {
    let mood = seed.below(6);
    for change in changes {
        match (mood, seed.below(3)) {
            (0, _) | (2.., 0) => {}
            (1, _) | (2.., 1) => change.apply(disk),
            _ => change.torn(seed).iter().for_each(|piece| piece.apply(disk)),
        }
    }
}

/// Memory answers at once.
pub(crate) fn now<T>(mut future: LocalFuture<'_, T>) -> T {
    match future
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
    {
        Poll::Ready(value) => value,
        Poll::Pending => unreachable!("memory waits for nothing"),
    }
}
