//! Byte locks that belong to an open file (OFD locks), as QEMU uses them to keep two programs off one image.
//!
//! Nothing here waits: a lock is had at once or not at all.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::fstat;

/// Somebody else who holds a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockHolder {
    /// Its process, where the kernel and /proc tell.
    pub pid: Option<i32>,
}

/// Takes a shared lock on one byte.
///
/// # Errors
/// `EAGAIN` when somebody holds it exclusively, else what fcntl(2) says.
pub fn lock_shared(file: &OwnedFd, byte: u64) -> io::Result<()> {
    control(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte).map(|_| ())
}

/// Gives the lock on one byte back.
///
/// # Errors
/// What fcntl(2) says.
pub fn unlock(file: &OwnedFd, byte: u64) -> io::Result<()> {
    control(file, libc::F_OFD_SETLK, libc::F_UNLCK, byte).map(|_| ())
}

/// Whether anybody else holds a lock on one byte, of any kind.
///
/// # Errors
/// What fcntl(2) says.
pub fn other_holder(file: &OwnedFd, byte: u64) -> io::Result<Option<LockHolder>> {
    let found = control(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte)?;
    if found.l_type == libc::F_UNLCK as libc::c_short {
        return Ok(None);
    }
    let pid = if found.l_pid > 0 {
        Some(found.l_pid)
    } else {
        holder_by_proc(file, byte)
    };
    Ok(Some(LockHolder { pid }))
}

fn control(
    file: &OwnedFd,
    command: libc::c_int,
    kind: libc::c_int,
    byte: u64,
) -> io::Result<libc::flock> {
    // SAFETY: `flock` is plain data for which all zeroes is a valid value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = i64::try_from(byte).map_err(|_| io::ErrorKind::InvalidInput)?;
    lock.l_len = 1;
    // SAFETY: the descriptor is open while `file` is borrowed, and `lock` is a valid, exclusively borrowed `flock`, which
    // is what the three OFD commands read and write.
    let outcome = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
    if outcome == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(lock)
    }
}

/// The kernel keeps no process for an OFD lock. Whoever has this file open and shows the lock among its descriptors' is
/// the holder; processes that may not be looked at are passed over.
fn holder_by_proc(file: &OwnedFd, byte: u64) -> Option<i32> {
    let stat = fstat(file).ok()?;
    let own = i32::try_from(std::process::id()).ok()?;
    let needle = format!(":{} {byte} ", stat.st_ino);
    let ranged = format!(":{} ", stat.st_ino);
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        let Ok(infos) = std::fs::read_dir(entry.path().join("fdinfo")) else {
            continue;
        };
        for info in infos.flatten() {
            let Ok(text) = std::fs::read_to_string(info.path()) else {
                continue;
            };
            let holds = text
                .lines()
                .filter(|line| line.starts_with("lock:"))
                .any(|line| {
                    line.contains(&needle) || (line.contains(&ranged) && covers(line, byte))
                });
            let is_own_descriptor = pid == own
                && info.file_name().to_str() == Some(file.as_raw_fd().to_string().as_str());
            if holds && !is_own_descriptor {
                return Some(pid);
            }
        }
    }
    None
}

/// Whether the range at the end of a lock line holds `byte`.
fn covers(line: &str, byte: u64) -> bool {
    let mut fields = line.split_whitespace().rev();
    let end = fields
        .next()
        .map_or(0, |end| end.parse().unwrap_or(u64::MAX));
    let start: u64 = fields
        .next()
        .and_then(|start| start.parse().ok())
        .unwrap_or(u64::MAX);
    (start..=end).contains(&byte)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::host_file::{HostFile, OpenMode};

    fn open(path: &Path) -> HostFile {
        HostFile::open(
            path,
            OpenMode {
                write: true,
                create: true,
                ..OpenMode::default()
            },
        )
        .expect("opened")
    }

    #[test]
    fn two_descriptors_see_each_other_and_the_holder_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("image");
        let (one, two) = (open(&path), open(&path));
        lock_shared(one.descriptor(), 101).expect("locked");
        assert_eq!(other_holder(one.descriptor(), 101).expect("asked"), None);
        let holder = other_holder(two.descriptor(), 101)
            .expect("asked")
            .expect("held");
        assert_eq!(holder.pid, i32::try_from(std::process::id()).ok());
        lock_shared(two.descriptor(), 101).expect("shared");
        unlock(one.descriptor(), 101).expect("unlocked");
        assert_eq!(other_holder(two.descriptor(), 101).expect("asked"), None);
        drop(two);
        assert_eq!(other_holder(one.descriptor(), 101).expect("asked"), None);
    }
}
