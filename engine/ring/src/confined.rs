//! Opening files whose names nobody vouches for, such as those that stand in images: looked at before they are opened, so that
//! a name can neither block, nor wake a device that only had to be looked at, nor lead out of where it may lead.
//!
//! What is looked at is what is opened: both go by one descriptor, not twice by the name, and it is compared in the end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    CWD, FileType, Mode, OFlags, PROC_SUPER_MAGIC, ResolveFlags, fstat, fstatfs, open, openat2,
};
use rustix::io::Errno;

use crate::host_file::{FileKind, HostFile, OpenMode};

/// File systems that show the kernel and processes as files: proc, sysfs, debugfs, tracefs, securityfs, configfs, efivarfs,
/// cgroup, cgroup2, bpf.
const KERNEL_FILE_SYSTEMS: [u64; 10] = [
    PROC_SUPER_MAGIC as u64,
    0x6265_6572,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0x6265_6570,
    0xde5e_81e4,
    0x0027_e0eb,
    0x6367_7270,
    0xcafe_4a11,
];

/// Where a file may be, once all symbolic links are resolved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confinement {
    /// Below one of these folders, whose own names hold no symbolic link; empty: anywhere.
    pub roots: Vec<PathBuf>,
    /// Right in this folder.
    pub folder: Option<PathBuf>,
}

/// Why a file was not opened.
#[derive(Debug)]
pub enum Refusal {
    /// It is neither a regular file nor a block device.
    Kind(FileKind),
    /// It belongs to a file system that shows the kernel, or its name goes through one.
    Kernel,
    /// It is outside of where it may be: where it is.
    Outside(PathBuf),
    /// What the kernel says.
    Failed(io::Error),
}

impl<E: Into<io::Error>> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// Opens a regular file or a block device.
///
/// # Errors
/// Says why, without having opened the file for reading or writing.
pub fn open_confined(
    path: &Path,
    mode: OpenMode,
    confinement: &Confinement,
) -> Result<HostFile, Refusal> {
    let found = look_up(path)?;
    let stat = fstat(&found)?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => FileKind::Regular,
        FileType::BlockDevice => FileKind::BlockDevice,
        FileType::Directory => return Err(Refusal::Kind(FileKind::Directory)),
        _ => return Err(Refusal::Kind(FileKind::Other)),
    };
    // A device is what it is wherever its name stands.
    if kind == FileKind::Regular {
        let file_system = u64::try_from(fstatfs(&found)?.f_type).unwrap_or(0);
        if KERNEL_FILE_SYSTEMS.contains(&file_system) {
            return Err(Refusal::Kernel);
        }
    }
    check_place(path, &found, confinement)?;
    let file = match HostFile::open(&by_descriptor(&found), mode) {
        // There is no /proc.
        Err(error) if error.kind() == io::ErrorKind::NotFound => HostFile::open(path, mode)?,
        opened => opened?,
    };
    if file.identity() != (stat.st_dev, stat.st_ino) {
        return Err(io::Error::other("another file took its place while it was opened").into());
    }
    Ok(file)
}

/// Finds what a name stands for without opening it. The links of /proc to what processes have open are not followed.
fn look_up(path: &Path) -> Result<OwnedFd, Refusal> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    match openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS) {
        Ok(found) => Ok(found),
        // Such a link ends like a loop does; a loop also ends without the flag.
        Err(Errno::LOOP) => match open(path, flags, Mode::empty()) {
            Ok(_) => Err(Refusal::Kernel),
            Err(error) => Err(error.into()),
        },
        // Older than Linux 5.6, or forbidden.
        Err(Errno::NOSYS | Errno::PERM) => {
            if goes_through_processes(path)? {
                return Err(Refusal::Kernel);
            }
            Ok(open(path, flags, Mode::empty())?)
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether the folder of a name is, by name, one that shows a process.
fn goes_through_processes(path: &Path) -> io::Result<bool> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let folder = open(folder, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let file_system = u64::try_from(fstatfs(&folder)?.f_type).unwrap_or(0);
    Ok(KERNEL_FILE_SYSTEMS.contains(&file_system))
}

fn check_place(path: &Path, found: &OwnedFd, confinement: &Confinement) -> Result<(), Refusal> {
    let Confinement { roots, folder } = confinement;
    if roots.is_empty() && folder.is_none() {
        return Ok(());
    }
    let place = place_of(path, found)?;
    let in_root = roots.is_empty() || roots.iter().any(|root| place.starts_with(root));
    let in_folder = match folder {
        None => true,
        Some(folder) => place.parent() == Some(&std::fs::canonicalize(folder)?),
    };
    if in_root && in_folder {
        Ok(())
    } else {
        Err(Refusal::Outside(place))
    }
}

/// Where a file that has been found is, without symbolic links.
fn place_of(path: &Path, found: &OwnedFd) -> Result<PathBuf, Refusal> {
    if let Ok(place) = std::fs::read_link(by_descriptor(found)) {
        return Ok(place);
    }
    // Without /proc by name, which must still stand for the same file.
    let place = std::fs::canonicalize(path)?;
    let again = open(
        &place,
        OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
    )?;
    let (one, other) = (fstat(found)?, fstat(&again)?);
    if (one.st_dev, one.st_ino) != (other.st_dev, other.st_ino) {
        return Err(io::Error::other("another file took its place while it was opened").into());
    }
    Ok(place)
}

fn by_descriptor(found: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", found.as_fd().as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn opened(path: &Path, confinement: &Confinement) -> Result<u64, String> {
        match open_confined(path, OpenMode::default(), confinement) {
            Ok(file) => Ok(file.length_bytes()),
            Err(Refusal::Kind(kind)) => Err(format!("{kind:?}")),
            Err(Refusal::Kernel) => Err("kernel".to_owned()),
            Err(Refusal::Outside(_)) => Err("outside".to_owned()),
            Err(Refusal::Failed(error)) => Err(error.to_string()),
        }
    }

    fn refused(text: &str) -> Result<u64, String> {
        Err(text.to_owned())
    }

    #[test]
    fn files_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let anywhere = Confinement::default();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("file"), [0; 5]).expect("written");
        symlink("file", at("link")).expect("linked");
        symlink("loop", at("loop")).expect("linked");
        rustix::fs::mkfifoat(CWD, at("fifo"), Mode::from_raw_mode(0o600)).expect("made");
        assert_eq!(opened(&at("file"), &anywhere), Ok(5));
        assert_eq!(opened(&at("link"), &anywhere), Ok(5));
        assert_eq!(opened(&at("fifo"), &anywhere), refused("Other"));
        assert_eq!(opened(folder.path(), &anywhere), refused("Directory"));
        assert_eq!(opened(Path::new("/dev/null"), &anywhere), refused("Other"));
        assert!(opened(&at("none"), &anywhere).is_err());
        assert!(
            opened(&at("loop"), &anywhere)
                .expect_err("a loop")
                .contains("symbolic links")
        );
        for name in ["/proc/self/status", "/proc/self/environ", "/proc/1/cmdline"] {
            assert_eq!(
                opened(Path::new(name), &anywhere),
                refused("kernel"),
                "{name}"
            );
        }
        symlink("/proc/self/status", at("status")).expect("linked");
        assert_eq!(opened(&at("status"), &anywhere), refused("kernel"));
        let file = std::fs::File::open(at("file")).expect("opened");
        for fd_folder in ["/dev/fd", "/proc/self/fd", "/proc/thread-self/fd"] {
            let name = Path::new(fd_folder).join(file.as_raw_fd().to_string());
            assert_eq!(opened(&name, &anywhere), refused("kernel"), "{fd_folder}");
            assert!(
                goes_through_processes(&name).expect("looked"),
                "{fd_folder}"
            );
        }
        assert!(!goes_through_processes(&at("file")).expect("looked"));
    }

    #[test]
    fn links_lead_out_of_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let real = std::fs::canonicalize(folder.path()).expect("it is there");
        let at = |name: &str| folder.path().join(name);
        for name in ["in", "in/deep", "in-not", "out"] {
            std::fs::create_dir(at(name)).expect("made");
            std::fs::write(at(name).join("file"), [0; 5]).expect("written");
        }
        symlink("../out/file", at("in/leads-out")).expect("linked");
        symlink("in", at("leads-in")).expect("linked");
        let below = Confinement {
            roots: vec![real.join("deep"), real.join("in")],
            folder: None,
        };
        for (name, expected) in [
            ("in/file", Ok(5)),
            ("in/deep/file", Ok(5)),
            ("leads-in/file", Ok(5)),
            ("out/../in/file", Ok(5)),
            ("in/../out/file", refused("outside")),
            ("in/leads-out", refused("outside")),
            ("in-not/file", refused("outside")),
        ] {
            assert_eq!(opened(&at(name), &below), expected, "{name}");
        }
        let beside = Confinement {
            roots: Vec::new(),
            folder: Some(at("leads-in")),
        };
        for (name, expected) in [
            ("in/file", Ok(5)),
            ("in/deep/file", refused("outside")),
            ("in/leads-out", refused("outside")),
            ("out/file", refused("outside")),
        ] {
            assert_eq!(opened(&at(name), &beside), expected, "{name}");
        }
    }
}
