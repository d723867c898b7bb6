//! What can go wrong below an image: the operation, the bytes it was about, and the errno.

use std::fmt;

use crate::range::ByteRange;

/// The operation that failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Operation {
    /// Reading data.
    Read,
    /// Writing data.
    Write,
    /// Making a range read as zeroes.
    Zero,
    /// Giving a range's room back.
    Discard,
    /// Asking where data is.
    Allocation,
    /// Changing the length.
    Resize,
    /// Reserving room.
    Preallocate,
    /// Sharing extents with another file.
    Share,
    /// Making earlier writes durable.
    Sync,
}

impl Operation {
    /// The operation as a verb for messages.
    pub const fn name(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Zero => "write zeroes to",
            Operation::Discard => "discard",
            Operation::Allocation => "map",
            Operation::Resize => "resize",
            Operation::Preallocate => "preallocate",
            Operation::Share => "share",
            Operation::Sync => "flush",
        }
    }
}

/// A failed operation on a [`Storage`](crate::Storage).
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub struct StorageError {
    /// What was tried.
    pub operation: Operation,
    /// Which bytes; absent for operations on the whole file.
    pub range: Option<ByteRange>,
    /// The operating system's error number, positive (`ENOSPC`, `EIO`, ...).
    pub errno: i32,
}

/// `EIO`: the medium failed.
pub const EIO: i32 = 5;
/// `EAGAIN`: try again.
pub const EAGAIN: i32 = 11;
/// `EBADF`: not open for this operation.
pub const EBADF: i32 = 9;
/// `EPERM`: not permitted.
pub const EPERM: i32 = 1;
/// `EISDIR`: a directory where a file has to be.
pub const EISDIR: i32 = 21;
/// `ENOMEM`: more memory than there is, or than may be taken.
pub const ENOMEM: i32 = 12;
/// `EINVAL`: an argument the operation cannot take.
pub const EINVAL: i32 = 22;
/// `EFBIG`: past the largest file the file system allows.
pub const EFBIG: i32 = 27;
/// `ENOSPC`: the file system is full.
pub const ENOSPC: i32 = 28;
/// `EDQUOT`: no more of the file system is for this user.
pub const EDQUOT: i32 = 122;
/// `EOPNOTSUPP`: not supported by this file or file system.
pub const EOPNOTSUPP: i32 = 95;
/// `EXDEV`: two files on different file systems.
pub const EXDEV: i32 = 18;
/// `EBUSY`: somebody else works on it.
pub const EBUSY: i32 = 16;
/// `ENOMEDIUM`: nothing there to work on.
pub const ENOMEDIUM: i32 = 123;
/// `EACCES`: it may not be had.
pub const EACCES: i32 = 13;
/// `ETIMEDOUT`: it took too long.
pub const ETIMEDOUT: i32 = 110;
/// `ECANCELED`: given up on request.
pub const ECANCELED: i32 = 125;

impl StorageError {
    /// A failure of `operation` on `range`.
    pub const fn new(operation: Operation, range: ByteRange, errno: i32) -> Self {
        Self {
            operation,
            range: Some(range),
            errno,
        }
    }

    /// A failure of an operation on the whole file.
    pub const fn whole(operation: Operation, errno: i32) -> Self {
        Self {
            operation,
            range: None,
            errno,
        }
    }

    /// Whether room was missing (what the `enospc` error policy stops for).
    pub const fn is_no_space(&self) -> bool {
        self.errno == ENOSPC
    }

    /// Whether nothing more can be stored: the file system is full, this user's part of it, or the file has its largest length.
    pub const fn is_out_of_room(&self) -> bool {
        matches!(self.errno, ENOSPC | EDQUOT | EFBIG)
    }

    /// Whether the file or file system does not offer the operation at all.
    pub const fn is_unsupported(&self) -> bool {
        matches!(self.errno, EOPNOTSUPP | EXDEV)
    }
}

impl fmt::Display for StorageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.range {
            // Nobody flushes a part.
            _ if self.operation == Operation::Sync => f.write_str("Cannot flush: ")?,
            Some(range) => write!(f, "Cannot {} {range}: ", self.operation.name())?,
            None => write!(f, "Cannot {} the file: ", self.operation.name())?,
        }
        f.write_str(&errno_text(self.errno))
    }
}

/// The operating system's words for an error number, as `strerror` has them (`No space left on device`).
pub fn errno_text(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    match text.rfind(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_those_of_strerror() {
        assert_eq!(errno_text(ENOSPC), "No space left on device");
        assert_eq!(errno_text(EIO), "Input/output error");
        assert_eq!(errno_text(ECANCELED), "Operation canceled");
    }

    #[test]
    fn message_names_operation_range_and_reason() {
        let error = StorageError::new(Operation::Write, ByteRange::new(4096, 512), ENOSPC);
        assert_eq!(
            error.to_string(),
            "Cannot write 512 bytes at offset 4096: No space left on device"
        );
        let flushes = [
            StorageError::whole(Operation::Sync, EIO),
            StorageError::new(Operation::Sync, ByteRange::default(), EIO),
        ];
        for error in flushes {
            assert_eq!(error.to_string(), "Cannot flush: Input/output error");
        }
    }
}
