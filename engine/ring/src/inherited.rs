//! Descriptors that the process was started with, given by number on its command line.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

/// Descriptors that were handed out.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Descriptors up to here are standard input, output and error.
const STANDARD_MAX: RawFd = 2;

/// Takes over an inherited descriptor, which then closes with its owner. Each can be taken once, and only while it lacks
/// close-on-exec: everything this process opens itself has that flag, so that none of its own files can be taken.
///
/// # Errors
/// `EBADF` for a number that is not open, was taken before, or was not inherited.
pub fn inherited_descriptor(number: RawFd) -> io::Result<OwnedFd> {
    let bad = || io::Error::from_raw_os_error(libc::EBADF);
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if number <= STANDARD_MAX || taken.contains(&number) {
        return Err(bad());
    }
    // SAFETY: F_GETFD reads one flag; a number that is not open makes it fail.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 || flags & libc::FD_CLOEXEC != 0 {
        return Err(bad());
    }
    // SAFETY: as above; sets one flag of an open descriptor.
    let set = unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    taken.insert(number);
    // SAFETY: it is open, it was inherited (so nothing in this process owns it), and it is taken only once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
