//! Errors of requests as the wire names them, and what breaks the protocol.

/// Why a request failed. Spec: NBD, "Error values".
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u32)]
pub enum NbdError {
    /// Not allowed; the export is read-only.
    NotPermitted = 1,
    /// The storage failed.
    Io = 5,
    /// No memory.
    NoMemory = 12,
    /// The request makes no sense.
    Invalid = 22,
    /// No room, or beyond the end.
    NoSpace = 28,
    /// Too much in one piece.
    Overflow = 75,
    /// Not possible, or not fast.
    NotSupported = 95,
    /// The server is about to end.
    Shutdown = 108,
}

/// Errno of Linux that the wire has under another name.
const EFBIG: i32 = 27;
const EROFS: i32 = 30;
const EDQUOT: i32 = 122;

impl NbdError {
    const ALL: [Self; 8] = [
        Self::NotPermitted,
        Self::Io,
        Self::NoMemory,
        Self::Invalid,
        Self::NoSpace,
        Self::Overflow,
        Self::NotSupported,
        Self::Shutdown,
    ];

    /// The number on the wire.
    pub const fn number(self) -> u32 {
        self as u32
    }

    /// The same as an errno of Linux, positive.
    pub const fn errno(self) -> i32 {
        // The numbers are Linux's.
        self.number().cast_signed()
    }

    /// What a server says of an errno (positive), as QEMU does: what the wire has no word for is `Invalid`.
    pub fn from_errno(errno: i32) -> Self {
        match errno {
            EROFS => Self::NotPermitted,
            EFBIG | EDQUOT => Self::NoSpace,
            other => Self::ALL
                .into_iter()
                .find(|error| error.errno() == other)
                .unwrap_or(Self::Invalid),
        }
    }

    /// What a number other than 0 from the wire means. Spec: NBD, "Error values": what is not known is `Invalid`.
    pub fn from_number(number: u32) -> Self {
        Self::ALL
            .into_iter()
            .find(|error| error.number() == number)
            .unwrap_or(Self::Invalid)
    }
}

/// The peer has broken the protocol: nothing it says can be trusted from here on, so the connection has to be closed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{text}")]
pub struct Violation {
    /// What it did: one sentence, without full stop.
    pub text: String,
}

impl Violation {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self { text: text.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_becomes_what_qemu_makes_of_it() {
        for (errno, number) in [
            (1, 1),     // EPERM
            (5, 5),     // EIO
            (12, 12),   // ENOMEM
            (13, 22),   // EACCES
            (16, 22),   // EBUSY
            (22, 22),   // EINVAL
            (27, 28),   // EFBIG
            (28, 28),   // ENOSPC
            (30, 1),    // EROFS
            (75, 75),   // EOVERFLOW
            (95, 95),   // ENOTSUP
            (108, 108), // ESHUTDOWN
            (122, 28),  // EDQUOT
            (123, 22),  // ENOMEDIUM
            (0, 22),
            (-5, 22),
        ] {
            assert_eq!(NbdError::from_errno(errno).number(), number, "{errno}");
        }
    }

    #[test]
    fn every_number_is_read_back_and_unknown_ones_are_invalid() {
        for error in NbdError::ALL {
            assert_eq!(NbdError::from_number(error.number()), error);
        }
        for number in [0, 2, 13, 0x8000_0005, u32::MAX] {
            assert_eq!(NbdError::from_number(number), NbdError::Invalid);
        }
    }
}
