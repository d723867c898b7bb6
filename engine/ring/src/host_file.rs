//! [`HostFile`]: an open file or device of the host, opened so that nothing can block, and what is known of it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use rustix::fs::{
    Advice, AtFlags, FileType, Mode, OFlags, StatxFlags, fadvise, fcntl_getfl, fcntl_setfl,
    fdatasync, fstat, fstatvfs, open, statx,
};

use crate::data_run::DataRun;
use crate::file_calls::is_write_protected;

/// How to open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenMode {
    /// For writing too.
    pub write: bool,
    /// Past the page cache.
    pub direct: bool,
    /// Make it if it is missing, mode 0644 less the umask.
    pub create: bool,
}

/// What an open file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// Anything else: FIFOs, sockets, character devices.
    Other,
}

/// An open file of the host. Clones share the descriptor, and with it the image locks, the length,
/// the memory of a failed flush and where it is known to hold data.
#[derive(Clone, Debug)]
pub struct HostFile {
    file: Arc<OwnedFd>,
    length_bytes: Arc<AtomicU64>,
    kind: FileKind,
    identity: (u64, u64),
    direct: bool,
    write: bool,
    request_alignment: u32,
    /// The errno of the flush that failed; 0: none did.
    failed_sync: Arc<AtomicI32>,
    data_run: Arc<DataRun>,
}

impl HostFile {
    /// Opens `path`. Never blocks on a FIFO or a device without a medium.
    ///
    /// # Errors
    /// What open(2) says; `EINVAL` also for direct I/O on a file system without it.
    pub fn open(path: &Path, mode: OpenMode) -> io::Result<Self> {
        let mut flags = OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        flags |= if mode.write {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        if mode.direct {
            flags |= OFlags::DIRECT;
        }
        if mode.create {
            flags |= OFlags::CREATE;
        }
        let file = open(path, flags, Mode::from_raw_mode(0o644))?;
        // It was for opening only: where a file system cannot promise not to block, io_uring would answer EAGAIN for ever.
        fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
        Self::from_fd(file, mode)
    }

    /// Opens the very same file once more, in another way: by its descriptor, so that it does not matter what its name has
    /// become. Image locks stay with this one; all else that clones share is shared. May block.
    ///
    /// # Errors
    /// What open(2) says: permissions are looked at anew. `ENOENT` also where /proc is not mounted, `ESTALE` if what is
    /// there is another file.
    pub fn reopened(&self, mode: OpenMode) -> io::Result<Self> {
        let name = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let mode = OpenMode {
            create: false,
            ..mode
        };
        let again = Self::open(Path::new(&name), mode)?;
        if (again.identity, again.kind) != (self.identity, self.kind) {
            return Err(rustix::io::Errno::STALE.into());
        }
        Ok(Self {
            length_bytes: Arc::clone(&self.length_bytes),
            failed_sync: Arc::clone(&self.failed_sync),
            data_run: Arc::clone(&self.data_run),
            ..again
        })
    }

    /// Takes an open descriptor over.
    ///
    /// # Errors
    /// What fstat(2) says, or for a device lseek(2).
    pub fn from_fd(file: OwnedFd, mode: OpenMode) -> io::Result<Self> {
        let stat = fstat(&file)?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => FileKind::Regular,
            FileType::BlockDevice => FileKind::BlockDevice,
            FileType::Directory => FileKind::Directory,
            _ => FileKind::Other,
        };
        let length = match kind {
            FileKind::BlockDevice => device_length(&file)?,
            _ => u64::try_from(stat.st_size).unwrap_or(0),
        };
        let mut opened = Self {
            file: Arc::new(file),
            length_bytes: Arc::new(AtomicU64::new(length)),
            kind,
            identity: (stat.st_dev, stat.st_ino),
            direct: mode.direct,
            write: mode.write,
            request_alignment: 1,
            failed_sync: Arc::default(),
            data_run: Arc::default(),
        };
        if mode.direct && matches!(kind, FileKind::Regular | FileKind::BlockDevice) {
            let told = opened.told_alignment();
            opened.request_alignment = told.unwrap_or_else(|| opened.probe_alignment());
        }
        Ok(opened)
    }

    /// The smallest transfer that direct I/O takes, where kernel (6.1) and file system tell.
    fn told_alignment(&self) -> Option<u32> {
        let facts = statx(&*self.file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
        let told = StatxFlags::from_bits_retain(facts.stx_mask).contains(StatxFlags::DIOALIGN);
        let alignment = facts.stx_dio_offset_align;
        (told && alignment.is_power_of_two()).then_some(alignment)
    }

    /// The smallest transfer that direct I/O takes, tried out. Reads of holes may pass with less than writes need, so
    /// this is only for where nobody tells.
    fn probe_alignment(&self) -> u32 {
        let mut buffer = blockyard_storage::Buffer::zeroed(4096);
        for alignment in [512_u32, 1024, 2048, 4096] {
            buffer.set_length(alignment as usize);
            // A read at the second block: at offset 0 every alignment looks right.
            if rustix::io::pread(&*self.file, buffer.as_mut_slice(), u64::from(alignment)).is_ok() {
                return alignment;
            }
        }
        4096
    }

    /// What it is.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// Past the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Open for writing.
    pub fn is_writable(&self) -> bool {
        self.write
    }

    /// A block device that refuses writes, however it was opened.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn is_write_protected(&self) -> io::Result<bool> {
        Ok(self.kind == FileKind::BlockDevice && is_write_protected(&self.file)?)
    }

    /// Transfers must be multiples of this.
    pub fn request_alignment(&self) -> u32 {
        self.request_alignment
    }

    /// Length in bytes: that at opening, and what this open file has made of it since, on whatever reactor. What others do
    /// to the file does not show, until the file is [`taken_over`](Self::taken_over).
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes.load(Ordering::Acquire)
    }

    /// Looks at a file that somebody else may have changed, maybe on another host: nothing of it is in the page cache any more.
    /// Returns how long it is now in bytes, which [`taken_over`](Self::taken_over) wants to hear. Nobody may be changing the file
    /// meanwhile. May block.
    ///
    /// # Errors
    /// What the kernel says, also of bytes written before that cannot be made durable.
    pub fn look_anew(&self) -> io::Result<u64> {
        // Network file systems ask their server when a file is opened. Where that is not possible, what is open has to do.
        let again = self.reopened(OpenMode::default());
        let file = match &again {
            Ok(again) => &again.file,
            Err(_) => &self.file,
        };
        let length = match self.kind {
            FileKind::BlockDevice => device_length(file)?,
            _ => u64::try_from(fstat(&**file)?.st_size).unwrap_or(0),
        };
        if !self.direct && self.kind != FileKind::Other {
            // Pages that are not written back yet would stay.
            if let Err(error) = fdatasync(&*self.file) {
                self.remember_failed_sync(error.raw_os_error());
                return Err(error.into());
            }
            fadvise(&*self.file, 0, None, Advice::DontNeed)?;
        }
        Ok(length)
    }

    /// A file that somebody else has changed has this length, and is changed through this open file only from now on.
    pub fn taken_over(&self, length_bytes: u64) {
        self.data_run.forget();
        self.resized_to(length_bytes);
    }

    /// A write has reached `end`.
    pub(crate) fn grown_to(&self, end: u64) {
        self.length_bytes.fetch_max(end, Ordering::AcqRel);
    }

    /// The file was given this length.
    pub(crate) fn resized_to(&self, length_bytes: u64) {
        self.length_bytes.store(length_bytes, Ordering::Release);
    }

    /// Room taken on the host in bytes now.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(u64::try_from(fstat(&*self.file)?.st_blocks).unwrap_or(0) * 512)
    }

    /// Bytes that its file system has free for everybody.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn free_bytes(&self) -> io::Result<u64> {
        let system = fstatvfs(&*self.file)?;
        Ok(system.f_bavail.saturating_mul(system.f_frsize))
    }

    /// Device and inode: which file it is, whatever its name.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Its path as the kernel knows it now; empty if it cannot be told.
    pub fn path(&self) -> Vec<u8> {
        let link = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let path = std::fs::read_link(link).unwrap_or_default();
        path.into_os_string().into_encoded_bytes()
    }

    /// The errno of the flush that failed on this open file, if one did: nothing written through it can be trusted to
    /// be durable any more, whoever uses it next.
    pub fn failed_sync(&self) -> Option<i32> {
        Some(self.failed_sync.load(Ordering::Acquire)).filter(|errno| *errno != 0)
    }

    /// Remembers that a flush failed. The first errno stays.
    pub(crate) fn remember_failed_sync(&self, errno: i32) {
        let _ = self
            .failed_sync
            .compare_exchange(0, errno, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Where it is known to hold data.
    pub(crate) fn data_run(&self) -> &Arc<DataRun> {
        &self.data_run
    }

    /// The descriptor.
    pub fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.file
    }
}

/// Length of a block device in bytes.
fn device_length(device: &OwnedFd) -> io::Result<u64> {
    Ok(rustix::fs::seek(device, rustix::fs::SeekFrom::End(0))?)
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
