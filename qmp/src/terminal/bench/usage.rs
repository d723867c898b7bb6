//! What this process costs, and what a folder lies on.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Processor time of all threads of this process so far, those that the kernel starts for it included.
pub(super) fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Lets the peak of memory begin anew.
pub(super) fn reset_peak() {
    // Where this is not permitted the peak is that of the whole run, which is more, never less.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// Most memory in use so far in bytes, where the kernel tells.
pub(super) fn peak_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Type of the file system that holds `path`, where the kernel tells.
pub(super) fn file_system(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    file_system_in(&fs::read_to_string("/proc/self/mountinfo").ok()?, &path)
}

/// The same from a list of mounts: of the deepest one above the path, the last, which hides the others.
fn file_system_in(mounts: &str, path: &Path) -> Option<String> {
    let mount = |line: &str| {
        let (place, device) = line.split_once(" - ")?;
        let mount_point = unescape(place.split(' ').nth(4)?);
        path.starts_with(&mount_point)
            .then(|| Some((mount_point.len(), device.split(' ').next()?.to_owned())))?
    };
    let deepest = mounts
        .lines()
        .filter_map(mount)
        .max_by_key(|(depth, _)| *depth);
    deepest.map(|(_, kind)| kind)
}

/// Blanks and the like stand in the list as three octal digits behind a backslash.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok())
        {
            Some(byte) => {
                plain.push(char::from(byte));
                plain += &part[3..];
            }
            None => {
                plain.push('\\');
                plain += part;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deepest_mount_above_the_path_counts() {
        let mounts = "\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:25 / /mnt/a\\040b rw - tmpfs none rw
31 22 0:26 / /mnt/data rw - btrfs /dev/vdb rw
32 22 0:27 / /mnt/data rw - xfs /dev/vdc rw
";
        for (path, expected) in [
            ("/home/x", "ext4"),
            ("/mnt/a b/c", "tmpfs"),
            ("/mnt/a", "ext4"),
            ("/mnt/data", "xfs"),
            ("/mnt/database", "ext4"),
        ] {
            let found = file_system_in(mounts, Path::new(path));
            assert_eq!(found.as_deref(), Some(expected), "{path}");
        }
        assert_eq!(file_system_in("nonsense\n - \n", Path::new("/")), None);
    }

    #[test]
    fn figures_of_this_process_are_there() {
        assert!(cpu_time() > Duration::ZERO);
        assert!(peak_bytes() > Some(0));
        assert!(file_system(Path::new(".")).is_some());
    }
}
