//! The two files of a copy: looked at before anything is done, made or refused, brought to their length, removed again.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use blockyard_engine::limits::SECTOR_BYTES;
use rustix::fs::{SeekFrom, seek, statvfs};

use crate::error::reason;

/// Beginnings that say what a file is, where they stand, and its name.
const MAGICS: [(u64, &[u8], &str); 10] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc (VHD)"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
];

/// Which file it is, whatever its name: device and inode, or for a block device its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identity {
    File(u64, u64),
    Device(u64),
}

impl Identity {
    fn of(facts: &fs::Metadata) -> Self {
        if facts.file_type().is_block_device() {
            Identity::Device(facts.rdev())
        } else {
            Identity::File(facts.dev(), facts.ino())
        }
    }
}

/// Where a file is, or is going to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileSystem {
    /// Which one.
    pub(crate) id: u64,
    /// What it has free for everybody, in bytes.
    pub(crate) free_bytes: u64,
}

impl FileSystem {
    /// That of the folder that a path is in; `None` if it does not tell.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let folder = folder_of(path);
        let facts = statvfs(folder).ok()?;
        Some(Self {
            id: fs::metadata(folder).ok()?.dev(),
            free_bytes: facts.f_bavail.saturating_mul(facts.f_frsize),
        })
    }
}

/// The side that is read.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    pub(crate) is_device: bool,
    /// Of the file or device.
    pub(crate) length_bytes: u64,
    /// Of the disk in it: the same, as long as nobody says that it is an image.
    pub(crate) disk_bytes: u64,
    identity: Identity,
    changed: Option<SystemTime>,
    mode: u32,
}

impl Source {
    /// Opens it for reading.
    ///
    /// # Errors
    /// For the user: what is in the way.
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        let cannot = |error: io::Error| format!("cannot read {}: {}", shown(path), reason(&error));
        // Opening a FIFO or a tape would wait or act: look first.
        let facts = fs::metadata(path).map_err(cannot)?;
        let is_device = kind_of(path, &facts)?;
        let file = File::open(path).map_err(cannot)?;
        let facts = file.metadata().map_err(cannot)?;
        if kind_of(path, &facts)? != is_device {
            return Err(format!("{} has just been replaced", shown(path)));
        }
        let length_bytes = length_of(&file, &facts).map_err(cannot)?;
        Ok(Self {
            path: path.to_owned(),
            length_bytes,
            disk_bytes: length_bytes,
            is_device,
            identity: Identity::of(&facts),
            changed: facts.modified().ok(),
            mode: facts.mode(),
            file,
        })
    }

    /// Whether these facts are of the same file.
    pub(crate) fn is_file_of(&self, facts: &fs::Metadata) -> bool {
        Identity::of(facts) == self.identity
    }

    /// Length as a node.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.disk_bytes.next_multiple_of(SECTOR_BYTES)
    }

    /// Whether it goes by that name, too.
    pub(crate) fn is_at(&self, path: &Path) -> bool {
        let facts = fs::metadata(path);
        facts.is_ok_and(|facts| Identity::of(&facts) == self.identity)
    }

    /// Who may not read the disk may not read its copy.
    fn mode_of_copy(&self) -> u32 {
        match self.is_device {
            true => 0o600,
            false => self.mode & 0o666 | 0o200,
        }
    }

    /// The format whose images begin like this one, if it is not raw.
    ///
    /// # Errors
    /// For the user, when it cannot be read.
    pub(crate) fn looks_like(&self) -> Result<Option<&'static str>, String> {
        for (offset, magic, name) in &MAGICS {
            let mut found = vec![0; magic.len()];
            match self.file.read_exact_at(&mut found, *offset) {
                Ok(()) if found == *magic => return Ok(Some(name)),
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                Err(error) => {
                    return Err(format!(
                        "cannot read {}: {}",
                        shown(&self.path),
                        reason(&error)
                    ));
                }
            }
        }
        Ok(None)
    }

    /// Whether somebody wrote to it since it was opened.
    ///
    /// # Errors
    /// For the user, when its length is another one: what was copied is not what was asked for then.
    pub(crate) fn was_modified(&self) -> Result<bool, String> {
        if self.is_device {
            return Ok(false);
        }
        let facts = self
            .file
            .metadata()
            .map_err(|error| format!("cannot read {}: {}", shown(&self.path), reason(&error)))?;
        if facts.len() != self.length_bytes {
            return Err(format!(
                "{} changed its length from {} to {} bytes while it was copied",
                shown(&self.path),
                self.length_bytes,
                facts.len()
            ));
        }
        Ok(facts.modified().ok() != self.changed)
    }
}

/// The side that is written.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    pub(crate) is_device: bool,
    /// This process made it, so this process may remove it.
    pub(crate) is_new: bool,
    /// Length of a device.
    pub(crate) device_bytes: u64,
    identity: Identity,
    /// Length and time of the last change when it was opened.
    before: (u64, Option<SystemTime>),
}

impl Target {
    /// Makes the file, or opens what is there if it may be overwritten. Nothing that was there has changed. With a source, it
    /// is another file that has room for it, and a new one may be read by nobody who may not read the source.
    ///
    /// # Errors
    /// For the user: what is in the way, and what to do about it.
    pub(crate) fn claim(path: &Path, force: bool, source: Option<&Source>) -> Result<Self, String> {
        match fs::metadata(path) {
            Ok(facts) => Self::take(path, &facts, force, source),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Self::make(path, source.map_or(0o644, Source::mode_of_copy))
            }
            Err(error) => Err(format!("cannot open {}: {}", shown(path), reason(&error))),
        }
    }

    fn take(
        path: &Path,
        facts: &fs::Metadata,
        force: bool,
        source: Option<&Source>,
    ) -> Result<Self, String> {
        let is_device = kind_of(path, facts)?;
        if let Some(source) = source
            && Identity::of(facts) == source.identity
        {
            return Err(format!(
                "{} and {} are the same {}",
                shown(&source.path),
                shown(path),
                if is_device { "device" } else { "file" }
            ));
        }
        if !force {
            let what = if is_device {
                "is a block device"
            } else {
                "exists already"
            };
            return Err(format!(
                "{} {what}; --force overwrites it, its content is lost then",
                shown(path)
            ));
        }
        let cannot = |error: io::Error| format!("cannot write {}: {}", shown(path), reason(&error));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(cannot)?;
        let found = file.metadata().map_err(cannot)?;
        if Identity::of(&found) != Identity::of(facts) {
            return Err(format!("{} has just been replaced", shown(path)));
        }
        let device_bytes = if is_device {
            length_of(&file, &found).map_err(cannot)?
        } else {
            0
        };
        if let Some(source) = source
            && is_device
            && device_bytes < source.size_bytes()
        {
            return Err(format!(
                "{} has {device_bytes} bytes, too few for the {} of {}",
                shown(path),
                source.size_bytes(),
                shown(&source.path)
            ));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            is_device,
            is_new: false,
            device_bytes,
            identity: Identity::of(&found),
            before: (found.len(), found.modified().ok()),
        })
    }

    /// Whether these facts are of the same file.
    pub(crate) fn is_file_of(&self, facts: &fs::Metadata) -> bool {
        Identity::of(facts) == self.identity
    }

    /// Whether it goes by that name, too.
    pub(crate) fn is_at(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|facts| self.is_file_of(&facts))
    }

    /// Nobody else's file is ever taken for a new one, whenever it appears.
    fn make(path: &Path, mode: u32) -> Result<Self, String> {
        let cannot = |error: io::Error| {
            if error.kind() == io::ErrorKind::AlreadyExists && path.is_symlink() {
                return format!("{} is a symbolic link that leads nowhere", shown(path));
            }
            let folder = folder_of(path);
            if error.kind() == io::ErrorKind::NotFound && !folder.exists() {
                return format!(
                    "cannot create {}: the folder {} does not exist",
                    shown(path),
                    shown(folder)
                );
            }
            format!("cannot create {}: {}", shown(path), reason(&error))
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(path)
            .map_err(cannot)?;
        let facts = file.metadata().map_err(cannot)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            is_device: false,
            is_new: true,
            device_bytes: 0,
            identity: Identity::of(&facts),
            before: (facts.len(), facts.modified().ok()),
        })
    }

    /// Gives a file its length to the byte, which nodes cannot. File and name are durable when this returns.
    ///
    /// # Errors
    /// For the user: what is in the way; also when the name belongs to another file by now.
    pub(crate) fn finish(&self, length_bytes: u64) -> Result<(), String> {
        self.make_durable(Some(length_bytes))
    }

    /// File and name are durable when this returns, the file with that length, if one is given.
    ///
    /// # Errors
    /// As [`finish`](Self::finish).
    pub(crate) fn make_durable(&self, length_bytes: Option<u64>) -> Result<(), String> {
        if self.is_device {
            return Ok(());
        }
        let cut = || -> io::Result<()> {
            if let Some(length_bytes) = length_bytes
                && self.file.metadata()?.len() != length_bytes
            {
                self.file.set_len(length_bytes)?;
            }
            self.file.sync_all()?;
            File::open(folder_of(&self.path))?.sync_all()
        };
        let named = fs::metadata(&self.path).ok();
        if named.is_none_or(|facts| Identity::of(&facts) != self.identity) {
            return Err(format!(
                "{} was replaced while it was written",
                shown(&self.path)
            ));
        }
        cut().map_err(|error| format!("cannot finish {}: {}", shown(&self.path), reason(&error)))
    }

    /// Room that a file takes.
    pub(crate) fn allocated_bytes(&self) -> Option<u64> {
        let facts = self.file.metadata().ok()?;
        (!self.is_device).then(|| facts.blocks() * 512)
    }

    /// Whether the file is no longer what it was when it was opened. A device does not tell.
    pub(crate) fn has_changed(&self) -> bool {
        let now = self.file.metadata().ok();
        now.map(|facts| (facts.len(), facts.modified().ok())) != Some(self.before)
    }

    /// Removes the file if this process made it and it still has its name. Returns whether it did.
    ///
    /// # Errors
    /// For the user: what is in the way.
    pub(crate) fn remove(&self) -> Result<bool, String> {
        let is_still_there = || {
            let facts = fs::symlink_metadata(&self.path).ok();
            facts.is_some_and(|facts| Identity::of(&facts) == self.identity)
        };
        if !self.is_new || !is_still_there() {
            return Ok(false);
        }
        fs::remove_file(&self.path)
            .map(|()| true)
            .map_err(|error| format!("cannot remove {}: {}", shown(&self.path), reason(&error)))
    }
}

/// Whether it is a block device; an error if it is no regular file either.
fn kind_of(path: &Path, facts: &fs::Metadata) -> Result<bool, String> {
    let kind = facts.file_type();
    if kind.is_block_device() {
        Ok(true)
    } else if kind.is_file() {
        Ok(false)
    } else if kind.is_dir() {
        Err(format!("{} is a directory; name a file", shown(path)))
    } else {
        Err(format!(
            "{} is neither a regular file nor a block device",
            shown(path)
        ))
    }
}

fn length_of(file: &File, facts: &fs::Metadata) -> io::Result<u64> {
    if facts.file_type().is_block_device() {
        Ok(seek(file, SeekFrom::End(0))?)
    } else {
        Ok(facts.len())
    }
}

/// The folder that a name is in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// That a file cannot be used, and why; which file that is is said once.
pub(crate) fn cannot_use(path: &Path, reason: &str) -> String {
    let path = shown(path);
    match reason.starts_with(&format!("Could not open {path}: ")) {
        true => reason.to_owned(),
        false => format!("cannot use {path}: {reason}"),
    }
}

/// A path as messages show it.
pub(crate) fn shown(path: &Path) -> String {
    format!("'{}'", path.display())
}
