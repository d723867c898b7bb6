//! Attributes that some file systems keep of a file: whether it is copied on write, and how large its extents should be.

use std::os::fd::{AsRawFd, OwnedFd};

use blockyard_storage::error::EIO;
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

use crate::file_calls::Failed;

/// `FS_XFLAG_EXTSIZE`: the size of extents below counts.
const EXTENT_SIZE_COUNTS: u32 = 0x800;

/// `struct fsxattr` of the kernel's interface.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ExtendedAttributes {
    flags: u32,
    extent_size_bytes: u32,
    extents: u32,
    project: u32,
    copy_on_write_extent_size_bytes: u32,
    padding: [u8; 8],
}

/// `FS_IOC_FSGETXATTR`: `_IOR('X', 31, struct fsxattr)`.
const GET: u32 = request(2, 31);
/// `FS_IOC_FSSETXATTR`: `_IOW('X', 32, struct fsxattr)`.
const SET: u32 = request(1, 32);

/// The number of a request, as ioctl(2) composes it on most architectures.
const fn request(direction: u32, number: u32) -> u32 {
    direction << 30 | (size_of::<ExtendedAttributes>() as u32) << 16 | (b'X' as u32) << 8 | number
}

/// Asks the file system to overwrite the file in place from now on; only for files without content yet.
///
/// # Errors
/// What ioctl(2) says: most file systems cannot.
pub fn avoid_copy_on_write(file: &OwnedFd) -> Result<(), Failed> {
    let flags = ioctl_getflags(file).map_err(|error| error.raw_os_error())?;
    ioctl_setflags(file, flags | IFlags::NOCOW).map_err(|error| error.raw_os_error())
}

/// Whether the file is overwritten in place.
///
/// # Errors
/// What ioctl(2) says: some file systems keep no such flags.
pub fn avoids_copy_on_write(file: &OwnedFd) -> Result<bool, Failed> {
    let flags = ioctl_getflags(file).map_err(|error| error.raw_os_error())?;
    Ok(flags.contains(IFlags::NOCOW))
}

/// Asks the file system to give the file room in extents of this many bytes; only for files without content yet. Some
/// file systems take the hint and forget it.
///
/// # Errors
/// What ioctl(2) says: many file systems take no hint, or not this one.
pub fn set_extent_size_hint(file: &OwnedFd, bytes: u32) -> Result<(), Failed> {
    let mut attributes = get(file)?;
    attributes.flags |= EXTENT_SIZE_COUNTS;
    attributes.extent_size_bytes = bytes;
    call(file, SET, &mut attributes)
}

/// The hint in bytes, if the file has one.
///
/// # Errors
/// What ioctl(2) says: some file systems keep no hints.
pub fn extent_size_hint(file: &OwnedFd) -> Result<Option<u32>, Failed> {
    let attributes = get(file)?;
    let counts = attributes.flags & EXTENT_SIZE_COUNTS != 0;
    Ok(counts.then_some(attributes.extent_size_bytes))
}

fn get(file: &OwnedFd) -> Result<ExtendedAttributes, Failed> {
    let mut attributes = ExtendedAttributes::default();
    call(file, GET, &mut attributes)?;
    Ok(attributes)
}

fn call(file: &OwnedFd, request: u32, attributes: &mut ExtendedAttributes) -> Result<(), Failed> {
    // SAFETY: the descriptor is open while borrowed, and both requests read or write exactly one `fsxattr`, which
    // `attributes` is, padding included.
    let outcome = unsafe { libc::ioctl(file.as_raw_fd(), request as _, attributes as *mut _) };
    if outcome == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(EIO))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> OwnedFd {
        tempfile::tempfile().expect("a file").into()
    }

    #[test]
    fn requests_are_those_of_the_kernel() {
        assert_eq!(size_of::<ExtendedAttributes>(), 28);
        assert_eq!((GET, SET), (0x801c_581f, 0x401c_5820));
    }

    #[test]
    fn in_place_where_the_file_system_can() {
        let file = file();
        match avoid_copy_on_write(&file) {
            Ok(()) => assert_eq!(avoids_copy_on_write(&file), Ok(true)),
            Err(errno) => {
                eprintln!("SKIPPED: no file without copy-on-write here (errno {errno})");
                assert_ne!(avoids_copy_on_write(&file), Ok(true));
            }
        }
    }

    #[test]
    fn the_hint_is_kept_where_the_file_system_keeps_hints() {
        let file = file();
        if let Err(errno) = set_extent_size_hint(&file, 1 << 20) {
            eprintln!("SKIPPED: no hints of extent sizes here (errno {errno})");
            assert!(!matches!(extent_size_hint(&file), Ok(Some(_))));
            return;
        }
        match extent_size_hint(&file) {
            Ok(None) => eprintln!("SKIPPED: hints of extent sizes are not kept here"),
            kept => assert_eq!(kept, Ok(Some(1 << 20))),
        }
    }

    #[test]
    fn what_is_no_file_says_so() {
        let (pipe, _other_end) = std::io::pipe().expect("a pipe");
        let pipe = OwnedFd::from(pipe);
        assert!(avoid_copy_on_write(&pipe).is_err());
        assert!(set_extent_size_hint(&pipe, 4096).is_err());
        assert!(extent_size_hint(&pipe).is_err());
    }
}
