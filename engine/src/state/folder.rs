//! [`Folder`]: the files of a state directory: written whole, read, taken away.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};

use crate::error::EngineError;
use crate::state::lane::Pulse;
use crate::state::record::{decode, encode};
use crate::state::{LEFT_SUFFIX, MARKS_SUFFIX, RecordKind};

/// The file that says that a daemon uses the directory.
const LOCK_NAME: &str = "lock";
/// A record that is being written.
const NEW_NAME: &str = ".new";
/// Longest record in bytes: the bits of all bitmaps of an image.
const RECORD_BYTES_MAX: u64 = 8 << 30;
/// How long bitmaps are kept for an image that a crash has left and nobody has opened since, from the next start of a daemon on.
const LEFT_MAX: Duration = Duration::from_secs(180 * 24 * 3600);
/// What is read or written before that counts as progress.
const PIECE_BYTES: usize = 1 << 20;
/// What is written before it is synced, so that no sync takes as long as a whole record.
const UNSYNCED_BYTES_MAX: usize = 16 << 20;

/// The directory, on the thread that works there.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    /// Its lock ends with it.
    _lock: File,
}

pub(super) fn failed(path: &Path, what: &str, error: io::Error) -> EngineError {
    let shown = path.display();
    EngineError::generic(format!("State directory '{shown}': {what}: {error}"))
}

impl Folder {
    /// Takes a directory for this process alone; it is made if it is not there.
    ///
    /// # Errors
    /// Another daemon uses it; what the file system says.
    pub(super) fn open(path: &Path, now: SystemTime) -> Result<Self, EngineError> {
        let folders = [path.to_owned()].into_iter();
        let kinds = RecordKind::ALL.map(|kind| path.join(kind.folder()));
        for folder in folders.chain(kinds) {
            let made = DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&folder);
            made.map_err(|error| failed(path, "it cannot be made", error))?;
        }
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join(LOCK_NAME))
            .map_err(|error| failed(path, "it cannot be locked", error))?;
        flock(lock.as_fd(), FlockOperation::NonBlockingLockExclusive).map_err(
            |errno| match errno {
                rustix::io::Errno::WOULDBLOCK => EngineError::generic(format!(
                    "State directory '{}' is in use by another daemon",
                    path.display()
                )),
                errno => failed(path, "it cannot be locked", errno.into()),
            },
        )?;
        // The new folders have to be there after a crash, too.
        sync_folder(path).map_err(|error| failed(path, "it cannot be synced", error))?;
        let folder = Self {
            path: path.to_owned(),
            _lock: lock,
        };
        let tidied = RecordKind::ALL
            .iter()
            .try_for_each(|kind| folder.tidy(*kind));
        tidied.map_err(|error| failed(path, "it cannot be read", error))?;
        if let Err(error) = folder.expire(now) {
            // It costs room, no more.
            tracing::warn!(%error, "what nobody asks for stays in the state directory");
        }
        Ok(folder)
    }

    /// Takes away what a crash has left half done.
    fn tidy(&self, kind: RecordKind) -> io::Result<()> {
        for entry in fs::read_dir(self.path.join(kind.folder()))? {
            let Ok(name) = entry?.file_name().into_string() else {
                continue;
            };
            let suffixes = [MARKS_SUFFIX, LEFT_SUFFIX].iter();
            let record = suffixes
                .filter_map(|suffix| name.strip_suffix(suffix))
                .next();
            let is_alone = record.map(|record| self.place(kind, record).try_exists());
            if name == NEW_NAME || matches!(is_alone.transpose()?, Some(false)) {
                fs::remove_file(self.place(kind, &name))?;
            }
        }
        Ok(())
    }

    /// Notes which bitmaps wait for their images, and takes those away that have been noted long ago. Their images may be gone, or on a
    /// disk that is not here: nobody can tell.
    fn expire(&self, now: SystemTime) -> io::Result<()> {
        let kind = RecordKind::Bitmaps;
        let (mut count, mut bytes): (u64, u64) = (0, 0);
        for entry in fs::read_dir(self.path.join(kind.folder()))? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            if [MARKS_SUFFIX, LEFT_SUFFIX]
                .iter()
                .any(|suffix| name.ends_with(suffix))
            {
                continue;
            }
            let left = format!("{name}{LEFT_SUFFIX}");
            let since = match fs::metadata(self.place(kind, &left)) {
                Ok(noted) => noted.modified()?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    File::create(self.place(kind, &left))?.set_modified(now)?;
                    now
                }
                Err(error) => return Err(error),
            };
            if now.duration_since(since).unwrap_or_default() < LEFT_MAX {
                count += 1;
                bytes = bytes.saturating_add(entry.metadata()?.len());
                continue;
            }
            tracing::warn!(
                name,
                "bitmaps of an image that nobody has opened for long are forgotten"
            );
            for name in [name.clone(), format!("{name}{MARKS_SUFFIX}"), left] {
                self.remove(kind, &name)?;
            }
        }
        if count > 0 {
            tracing::info!(
                count,
                bytes,
                "bitmaps in the state directory wait for their images"
            );
        }
        Ok(())
    }

    fn place(&self, kind: RecordKind, name: &str) -> PathBuf {
        self.path.join(kind.folder()).join(name)
    }

    /// Writes a record with a field of bits behind it; the file is what further bits go to.
    pub(super) fn write(
        &self,
        (kind, name): (RecordKind, &str),
        bytes: &[u8],
        field: Option<&[u8]>,
        pulse: &Pulse,
    ) -> io::Result<File> {
        let new = self.place(kind, NEW_NAME);
        let file = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .open(&new)?;
        let written = write_whole(&file, bytes, field, pulse).and_then(|()| {
            fs::rename(&new, self.place(kind, name))?;
            sync_folder(&self.path.join(kind.folder()))
        });
        if written.is_err() {
            // A full disk is not to be filled by what nobody reads.
            let _ = fs::remove_file(&new);
        }
        written.map(|()| file)
    }

    /// Record and field of this name; `None`: there is none.
    pub(super) fn read(
        &self,
        (kind, name): (RecordKind, &str),
        pulse: &Pulse,
    ) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
        let file = match File::open(self.place(kind, name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if file.metadata()?.len() > RECORD_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too long"));
        }
        let mut bytes = Vec::new();
        while (&file).take(PIECE_BYTES as u64).read_to_end(&mut bytes)? > 0 {
            pulse.beat();
        }
        decode(bytes).map(Some)
    }

    /// Takes a record away, if it is there.
    pub(super) fn remove(&self, kind: RecordKind, name: &str) -> io::Result<()> {
        match fs::remove_file(self.place(kind, name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => sync_folder(&self.path.join(kind.folder())),
        }
    }
}

fn write_whole(
    mut file: &File,
    bytes: &[u8],
    field: Option<&[u8]>,
    pulse: &Pulse,
) -> io::Result<()> {
    let mut unsynced_bytes = 0;
    for piece in encode(bytes, field)
        .iter()
        .flat_map(|part| part.chunks(PIECE_BYTES))
    {
        file.write_all(piece)?;
        unsynced_bytes += piece.len();
        if unsynced_bytes >= UNSYNCED_BYTES_MAX {
            file.sync_data()?;
            unsynced_bytes = 0;
        }
        pulse.beat();
    }
    file.sync_all()?;
    pulse.beat();
    Ok(())
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
