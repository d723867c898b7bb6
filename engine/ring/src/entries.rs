//! Transfers of files as entries of a submission queue.

use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::{opcode, squeue, types};

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

/// A file as an entry names it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// By its place in the ring's table.
    Fixed(types::Fixed),
    /// By its descriptor.
    Plain(types::Fd),
}

/// The four opcodes for one kind of file; the crate's trait for kinds of files cannot be named outside it.
macro_rules! entry_for {
    ($file:expr, $direction:expr, $address:expr, $length:expr, $offset:expr, $buffer:expr) => {
        match ($direction, $buffer) {
            (Direction::Read, Some(index)) => {
                opcode::ReadFixed::new($file, $address, $length, index)
                    .offset($offset)
                    .build()
            }
            (Direction::Read, None) => opcode::Read::new($file, $address, $length)
                .offset($offset)
                .build(),
            (Direction::Write, Some(index)) => {
                let address = $address.cast_const();
                opcode::WriteFixed::new($file, address, $length, index)
                    .offset($offset)
                    .build()
            }
            (Direction::Write, None) => {
                let address = $address.cast_const();
                opcode::Write::new($file, address, $length)
                    .offset($offset)
                    .build()
            }
        }
    };
}

/// The two of many buffers.
macro_rules! vectored_entry_for {
    ($file:expr, $direction:expr, $vectors:expr, $count:expr, $offset:expr) => {
        match $direction {
            Direction::Read => opcode::Readv::new($file, $vectors, $count)
                .offset($offset)
                .build(),
            Direction::Write => opcode::Writev::new($file, $vectors, $count)
                .offset($offset)
                .build(),
        }
    };
}

impl Target {
    /// `file`, which is at `place` of the ring's table, if it is there.
    pub(crate) fn of(file: &OwnedFd, place: Option<u32>) -> Self {
        match place {
            Some(place) => Self::Fixed(types::Fixed(place)),
            None => Self::Plain(types::Fd(file.as_raw_fd())),
        }
    }

    /// A transfer of `length` bytes at `address`, which are part of the ring's buffer of the number `buffer`, if it knows it.
    pub(crate) fn entry(
        self,
        direction: Direction,
        address: *mut u8,
        length: u32,
        offset: u64,
        buffer: Option<u16>,
    ) -> squeue::Entry {
        match self {
            Self::Fixed(file) => entry_for!(file, direction, address, length, offset, buffer),
            Self::Plain(file) => entry_for!(file, direction, address, length, offset, buffer),
        }
    }

    /// A transfer of all that `vectors` name, which have to stay where they are until it has ended.
    pub(crate) fn vectored_entry(
        self,
        direction: Direction,
        vectors: &[libc::iovec],
        offset: u64,
    ) -> squeue::Entry {
        let (first, count) = (vectors.as_ptr(), u32::try_from(vectors.len()).unwrap_or(0));
        match self {
            Self::Fixed(file) => vectored_entry_for!(file, direction, first, count, offset),
            Self::Plain(file) => vectored_entry_for!(file, direction, first, count, offset),
        }
    }
}
