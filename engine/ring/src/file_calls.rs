//! The blocking calls on a host file, each whole or failed: what workers carry out for both backends.

use std::cmp::Ordering;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use blockyard_storage::error::{EAGAIN, EINVAL, EIO, ENOSPC, EOPNOTSUPP, EXDEV};
use blockyard_storage::{Buffer, ByteRange, Extent, Preallocation, ZeroMode};
use rustix::fs::{
    FallocateFlags, OFlags, SeekFrom, fallocate, fcntl_getfl, fstat, ftruncate, seek,
};
use rustix::io::Errno;

use crate::host_file::FileKind;

/// Zeroes written at once where the file system has no better way.
const ZERO_PIECE_BYTES: usize = 1 << 20;

/// What a file system may take for a block, in bytes; network ones say what they like to be asked for.
const BLOCK_BYTES_MIN: u64 = 4096;
const BLOCK_BYTES_MAX: u64 = 64 << 10;

/// `ENXIO`: no more data behind this offset.
const ENXIO: i32 = 6;
/// `EINTR`: interrupted.
const EINTR: i32 = 4;

/// An error number.
pub type Failed = i32;

/// What a file turned out not to be able to do; found out once.
#[derive(Debug, Default)]
pub struct Abilities {
    no_zero_range: AtomicBool,
    no_punch_hole: AtomicBool,
    no_seek_data: AtomicBool,
}

fn call<T>(mut attempt: impl FnMut() -> Result<T, Errno>) -> Result<T, Failed> {
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if matches!(error.raw_os_error(), EINTR | EAGAIN) => {}
            Err(error) => return Err(error.raw_os_error()),
        }
    }
}

/// Fills `bytes` from `offset` and says how much of it was in the file; what lies behind the end is zeroes.
///
/// # Errors
/// What the kernel says.
pub fn read_whole(
    file: &OwnedFd,
    offset: u64,
    bytes: &mut [u8],
    alignment: u32,
) -> Result<usize, Failed> {
    let mut done = 0;
    let mut stuck = false;
    while done < bytes.len() {
        let at = offset + done as u64;
        match rustix::io::pread(file, &mut bytes[done..], at) {
            Ok(0) => break,
            Ok(count) => {
                let before = done;
                done += count;
                if !done.is_multiple_of(alignment as usize) {
                    // Direct I/O stops between blocks only at the end of the file.
                    if offset + done as u64 >= length_of(file)? {
                        break;
                    }
                    done -= done % alignment as usize;
                    if done == before && std::mem::replace(&mut stuck, true) {
                        return Err(EIO);
                    }
                }
            }
            Err(error) if matches!(error.raw_os_error(), EINTR | EAGAIN) => {}
            Err(error) => return Err(error.raw_os_error()),
        }
    }
    bytes[done..].fill(0);
    Ok(done)
}

/// Writes all of `bytes` at `offset`.
///
/// # Errors
/// What the kernel says; `ENOSPC` when it takes nothing more.
pub fn write_whole(file: &OwnedFd, offset: u64, bytes: &[u8]) -> Result<(), Failed> {
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pwrite(file, &bytes[done..], offset + done as u64) {
            Ok(0) => return Err(ENOSPC),
            Ok(count) => done += count,
            Err(error) if matches!(error.raw_os_error(), EINTR | EAGAIN) => {}
            Err(error) => return Err(error.raw_os_error()),
        }
    }
    Ok(())
}

/// Length in bytes now; for block devices too.
///
/// # Errors
/// What the kernel says.
pub fn length_of(file: &OwnedFd) -> Result<u64, Failed> {
    let stat = call(|| fstat(file))?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::BlockDevice {
        return call(|| seek(file, SeekFrom::End(0)));
    }
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

fn is_refused(errno: i32) -> bool {
    // A file system that does not know a mode says EOPNOTSUPP; block devices say EINVAL or EPERM-like things for some.
    matches!(errno, EOPNOTSUPP | EINVAL) || errno == Errno::NOSYS.raw_os_error()
}

/// Makes `range` read as zeroes.
///
/// # Errors
/// What the kernel says; `EOPNOTSUPP` when only writing would do and `mode` forbids it.
pub fn zero(
    file: &OwnedFd,
    kind: FileKind,
    abilities: &Abilities,
    range: ByteRange,
    mode: ZeroMode,
) -> Result<(), Failed> {
    if range.is_empty() {
        return Ok(());
    }
    if mode.may_unmap && !abilities.no_punch_hole.load(Relaxed) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match call(|| fallocate(file, flags, range.offset(), range.length())) {
            Ok(()) => return grow_to(file, kind, range.end()),
            Err(errno) if is_refused(errno) => abilities.no_punch_hole.store(true, Relaxed),
            Err(errno) => return Err(errno),
        }
    }
    if !abilities.no_zero_range.load(Relaxed) {
        // Block devices refuse to be kept from growing; they never do.
        let flags = FallocateFlags::ZERO_RANGE;
        match call(|| fallocate(file, flags, range.offset(), range.length())) {
            Ok(()) => return Ok(()),
            Err(errno) if is_refused(errno) => abilities.no_zero_range.store(true, Relaxed),
            Err(errno) => return Err(errno),
        }
    }
    if kind == FileKind::Regular && range.offset() >= length_of(file)? {
        // Behind the end everything reads as zeroes once the file is long enough.
        return grow_to(file, kind, range.end());
    }
    if mode.no_fallback {
        return Err(EOPNOTSUPP);
    }
    write_zeroes(file, range)
}

fn grow_to(file: &OwnedFd, kind: FileKind, end: u64) -> Result<(), Failed> {
    if kind == FileKind::Regular {
        let length = length_of(file)?;
        if length < end {
            return lengthen(file, length, end);
        }
    }
    Ok(())
}

/// Makes a file of `length` bytes longer.
///
/// ext4 fills the rest of the last block with zeroes in its cache then, also where all else goes past the cache, and does not wait for
/// what is on its way to that block: the cache's copy may be from before, and is written over it later (Linux 6.18; the next flush
/// mostly fails with EIO). Reserving the rest of that block makes the file longer as well, and does wait. What is left begins with
/// a block.
fn lengthen(file: &OwnedFd, length: u64, end: u64) -> Result<(), Failed> {
    let past_cache = fcntl_getfl(file).is_ok_and(|flags| flags.contains(OFlags::DIRECT));
    if past_cache {
        let block = u64::try_from(call(|| fstat(file))?.st_blksize).unwrap_or(0);
        let block = block.clamp(BLOCK_BYTES_MIN, BLOCK_BYTES_MAX);
        let rest = length.next_multiple_of(block).min(end) - length;
        let reserve = || fallocate(file, FallocateFlags::empty(), length, rest);
        // Where that is not known, or finds no room, there is no such block or no better way. Setting the length that it has
        // already would do to the last block what has to be avoided.
        if rest > 0 && call(reserve).is_ok() && length + rest == end {
            return Ok(());
        }
    }
    call(|| ftruncate(file, end))
}

/// Writes zeroes as data, in bounded pieces.
fn write_zeroes(file: &OwnedFd, range: ByteRange) -> Result<(), Failed> {
    let longest = usize::try_from(range.length())
        .unwrap_or(usize::MAX)
        .min(ZERO_PIECE_BYTES);
    let zeroes = Buffer::zeroed(longest);
    for piece in range.pieces(ZERO_PIECE_BYTES as u64) {
        let length = usize::try_from(piece.length()).map_err(|_| EINVAL)?;
        write_whole(file, piece.offset(), &zeroes.as_slice()[..length])?;
    }
    Ok(())
}

/// Gives room back where that is possible. Not supported is success.
///
/// # Errors
/// What the kernel says.
pub fn discard(file: &OwnedFd, abilities: &Abilities, range: ByteRange) -> Result<(), Failed> {
    if range.is_empty() || abilities.no_punch_hole.load(Relaxed) {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match call(|| fallocate(file, flags, range.offset(), range.length())) {
        Err(errno) if is_refused(errno) => {
            abilities.no_punch_hole.store(true, Relaxed);
            Ok(())
        }
        outcome => outcome,
    }
}

/// Where data and holes are.
pub struct Allocation {
    /// Of the range that was asked for, or the front of it.
    pub extents: Vec<Extent>,
    /// The run of data that was come across last, as far as it goes beyond the range.
    pub data_run: Option<ByteRange>,
}

/// Where data and holes are in `range`.
///
/// # Errors
/// What the kernel says.
pub fn allocation(
    file: &OwnedFd,
    kind: FileKind,
    abilities: &Abilities,
    range: ByteRange,
    extents_max: usize,
) -> Result<Allocation, Failed> {
    let length = length_of(file)?;
    let mut data_run = None;
    let mut extents: Vec<Extent> = Vec::new();
    let mut rest = range;
    while !rest.is_empty() && extents.len() < extents_max.max(1) {
        let (data, end) = if rest.offset() >= length {
            (false, rest.end())
        } else if kind != FileKind::Regular || abilities.no_seek_data.load(Relaxed) {
            (true, length.min(rest.end()))
        } else {
            match run_at(file, rest.offset(), length) {
                Ok(run) => run,
                Err(errno) if is_refused(errno) => {
                    abilities.no_seek_data.store(true, Relaxed);
                    continue;
                }
                Err(errno) => return Err(errno),
            }
        };
        if data {
            data_run = Some(ByteRange::between(rest.offset(), end));
        }
        let (run, after) =
            rest.split_at(end.max(rest.offset() + 1).min(rest.end()) - rest.offset());
        rest = after;
        match extents.last_mut() {
            Some(last) if last.data == data => {
                last.range = ByteRange::between(last.range.offset(), run.end());
            }
            _ => extents.push(Extent { range: run, data }),
        }
    }
    Ok(Allocation { extents, data_run })
}

/// Whether there is data at `offset`, and where that changes.
fn run_at(file: &OwnedFd, offset: u64, length: u64) -> Result<(bool, u64), Failed> {
    let data = match call(|| seek(file, SeekFrom::Data(offset))) {
        Ok(data) => data,
        Err(ENXIO) => return Ok((false, length)),
        Err(errno) => return Err(errno),
    };
    if data > offset {
        return Ok((false, data));
    }
    match call(|| seek(file, SeekFrom::Hole(offset))) {
        Ok(hole) if hole > offset => Ok((true, hole)),
        // The file changed between the two questions: call it data, which is never wrong.
        Ok(_) | Err(ENXIO) => Ok((true, length.max(offset + 1))),
        Err(errno) => Err(errno),
    }
}

/// Sets the length in bytes.
///
/// # Errors
/// What the kernel says.
pub fn resize(file: &OwnedFd, length_bytes: u64) -> Result<(), Failed> {
    if i64::try_from(length_bytes).is_err() {
        return Err(EINVAL);
    }
    let length = length_of(file)?;
    match length_bytes.cmp(&length) {
        Ordering::Less => call(|| ftruncate(file, length_bytes)),
        // Not even a call: see [`lengthen`].
        Ordering::Equal => Ok(()),
        Ordering::Greater => lengthen(file, length, length_bytes),
    }
}

/// Reserves room for `range`.
///
/// # Errors
/// What the kernel says.
pub fn preallocate(
    file: &OwnedFd,
    kind: FileKind,
    range: ByteRange,
    how: Preallocation,
) -> Result<(), Failed> {
    match how {
        Preallocation::Off => grow_to(file, kind, range.end()),
        Preallocation::Falloc if range.is_empty() => Ok(()),
        Preallocation::Falloc => call(|| {
            fallocate(
                file,
                FallocateFlags::empty(),
                range.offset(),
                range.length(),
            )
        }),
        Preallocation::Full => {
            grow_to(file, kind, range.end())?;
            write_zeroes(file, range)
        }
    }
}

/// Makes everything before durable.
///
/// # Errors
/// What the kernel says.
pub fn sync(file: &OwnedFd) -> Result<(), Failed> {
    match rustix::fs::fdatasync(file) {
        Ok(()) => Ok(()),
        // Never again: after a failed flush the kernel has forgotten what was not written.
        Err(error) => Err(error.raw_os_error()),
    }
}

/// Makes `to` of `file` share the extents of `source` at `from`.
///
/// # Errors
/// What ioctl(2) says; nothing has changed then.
pub fn share(file: &OwnedFd, source: &OwnedFd, from: u64, to: ByteRange) -> Result<(), Failed> {
    let arguments = libc::file_clone_range {
        src_fd: i64::from(source.as_raw_fd()),
        src_offset: from,
        src_length: to.length(),
        dest_offset: to.offset(),
    };
    // SAFETY: both descriptors are open while borrowed, and `FICLONERANGE` reads exactly one `file_clone_range`, which
    // `arguments` is.
    let outcome = unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::FICLONERANGE as _,
            &raw const arguments,
        )
    };
    if outcome == 0 {
        return Ok(());
    }
    match std::io::Error::last_os_error().raw_os_error() {
        // "Not a thing this file can do" comes in many numbers.
        Some(errno) if errno == libc::ENOTTY || errno == EXDEV => Err(EOPNOTSUPP),
        Some(errno) => Err(errno),
        None => Err(EIO),
    }
}

/// Whether a block device refuses writes although it may be opened for them.
///
/// # Errors
/// What ioctl(2) says.
pub(crate) fn is_write_protected(file: &OwnedFd) -> std::io::Result<bool> {
    /// `BLKROGET` of linux/fs.h: `_IO(0x12, 94)`.
    const BLKROGET: libc::Ioctl = 0x125e;
    let mut flag: libc::c_int = 0;
    // SAFETY: BLKROGET stores one int, and `flag` is one that nothing else refers to during the call.
    let outcome = unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET, &raw mut flag) };
    if outcome == -1 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(flag != 0)
    }
}
