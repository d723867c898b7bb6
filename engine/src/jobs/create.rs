//! `blockdev-create` for `file`: a host file of a given length, its room reserved as asked, with real progress.
//!
//! A file that this job made is removed again when the job fails or is cancelled; one that was there before stays.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use blockyard_ring::{HostFile, OpenMode, file_attributes, ofd_lock};
use blockyard_storage::error::errno_text;
use blockyard_storage::{ByteRange, LocalFuture, Preallocation, Storage};

use crate::data::{DataContext, HostFiles};
use crate::error::JobError;
use crate::job::context::JobContext;
use crate::job::work::{Stop, Work};
use crate::request::CreatePreallocation;

/// Bytes of room reserved at once: pause and cancel wait for that long, and writing takes longer than asking.
pub(crate) const fn piece_bytes(preallocation: CreatePreallocation) -> u64 {
    match preallocation {
        CreatePreallocation::Full => 8 << 20,
        CreatePreallocation::Off | CreatePreallocation::Metadata | CreatePreallocation::Falloc => {
            64 << 20
        }
    }
}

/// Hint for the file system's extents if the client does not say, in bytes.
const EXTENT_SIZE_HINT_BYTES: u64 = 1 << 20;

/// What to make.
#[derive(Clone, Debug)]
pub(crate) struct CreateFileOptions {
    /// Path on the host.
    pub(crate) filename: PathBuf,
    /// Length in bytes.
    pub(crate) size_bytes: u64,
    /// How room is reserved.
    pub(crate) preallocation: CreatePreallocation,
    /// Switch copy-on-write of the file system off for it.
    pub(crate) nocow: bool,
    /// Hint for the file system's extents in bytes; `None`: 1 MiB, 0: leave.
    pub(crate) extent_size_hint: Option<u64>,
    /// Room reserved at once in bytes, a power of two: as often the job can be paused and cancelled.
    pub(crate) piece_bytes: u64,
}

/// The work of creating a file.
pub(crate) struct CreateFile {
    options: CreateFileOptions,
    files: Rc<dyn HostFiles>,
    made: Option<MadeFile>,
}

/// A file that was not there before a job or a command made it.
#[derive(Debug)]
pub(crate) struct MadeFile {
    path: PathBuf,
    /// As it was made. Open, so that no other file can have its number.
    file: std::fs::File,
}

impl MadeFile {
    /// Makes a file that is empty; `None`: there is something already.
    fn make(path: &Path) -> std::io::Result<Option<Self>> {
        let mut options = std::fs::OpenOptions::new();
        match options.write(true).create_new(true).open(path) {
            Ok(file) => Ok(Some(Self {
                path: path.to_owned(),
                file,
            })),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes it, whatever is in it by now, unless its name leads to something else meanwhile. May wait for the disk.
    pub(crate) fn remove(self) {
        let identity = |facts: &std::fs::Metadata| (facts.dev(), facts.ino());
        let is_there = || -> std::io::Result<bool> {
            let (ours, named) = (
                self.file.metadata()?,
                std::fs::symlink_metadata(&self.path)?,
            );
            Ok(identity(&ours) == identity(&named))
        };
        let removed = match is_there() {
            Ok(true) => std::fs::remove_file(&self.path),
            Ok(false) => return,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            let path = self.path.display();
            tracing::warn!(%error, %path, "a half-made file could not be removed");
        }
    }
}

/// An opened, locked and emptied file.
struct Opened {
    file: HostFile,
    made: Option<MadeFile>,
}

impl CreateFile {
    /// Creates a file on the thread of `context`.
    pub(crate) fn new(options: CreateFileOptions, context: &DataContext) -> Self {
        Self {
            options,
            files: context.files().clone(),
            made: None,
        }
    }

    /// The file, if it was not there before, for who has more to do with it: nothing removes it any more but its owner.
    pub(crate) fn take_made(&mut self) -> Option<MadeFile> {
        self.made.take()
    }

    async fn create(&mut self, cx: &JobContext) -> Result<(), Stop> {
        // Whatever goes wrong before the room is known counts as one step.
        cx.progress().set_remaining(1);
        let how = checked(self.options.preallocation).map_err(Stop::Failed)?;
        let hint = self
            .options
            .extent_size_hint
            .unwrap_or(EXTENT_SIZE_HINT_BYTES);
        let Ok(hint) = u32::try_from(hint) else {
            let text = "Extent size hint is too large";
            return Err(Stop::Failed(JobError::text(text)));
        };
        let reserves = how != Preallocation::Off && self.options.size_bytes > 0;
        cx.progress()
            .set_remaining(if reserves { self.options.size_bytes } else { 1 });
        cx.checkpoint().await?;
        let opened = self.open(hint).await.map_err(Stop::Failed)?;
        self.made = opened.made;
        let storage = self.files.storage(&opened.file, false);
        let resized = storage.resize(self.options.size_bytes).await;
        resized.map_err(|error| {
            failed(
                format!("Could not resize file: {}", errno_text(error.errno)),
                error.errno,
            )
        })?;
        if reserves {
            self.reserve(cx, &*storage, how).await?;
        }
        let synced = storage.sync().await;
        synced.map_err(|error| failed(errno_text(error.errno), error.errno))?;
        self.sync_folder().await.map_err(Stop::Failed)?;
        if !reserves {
            cx.progress().done(1);
        }
        Ok(())
    }

    async fn reserve(
        &self,
        cx: &JobContext,
        storage: &dyn Storage,
        how: Preallocation,
    ) -> Result<(), Stop> {
        let all = ByteRange::new(0, self.options.size_bytes);
        for piece in all.pieces(self.options.piece_bytes) {
            cx.checkpoint().await?;
            let reserved = storage.preallocate(piece, how).await;
            reserved.map_err(|error| {
                let text = format!("Could not preallocate {piece}: {}", errno_text(error.errno));
                failed(text, error.errno)
            })?;
            cx.progress().done(piece.length());
        }
        cx.checkpoint().await
    }

    /// Opens or makes the file, locks it against other users and empties it.
    async fn open(&self, hint_bytes: u32) -> Result<Opened, JobError> {
        let (path, nocow) = (self.options.filename.clone(), self.options.nocow);
        self.blocking(move || {
            let opened = open_empty(&path)?;
            advise(&opened.file, nocow, hint_bytes);
            Ok(opened)
        })
        .await
    }

    /// A new name is durable once its folder is.
    async fn sync_folder(&self) -> Result<(), JobError> {
        if self.made.is_none() {
            return Ok(());
        }
        let path = self.options.filename.clone();
        self.blocking(move || {
            let folder = path
                .parent()
                .filter(|folder| !folder.as_os_str().is_empty());
            let synced = std::fs::File::open(folder.unwrap_or(Path::new(".")))
                .and_then(|folder| folder.sync_all());
            synced.map_err(|error| JobError::errno(error.raw_os_error().unwrap_or(5)))
        })
        .await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> Result<T, JobError> + Send + 'static,
    ) -> Result<T, JobError> {
        let cell = Arc::new(Mutex::new(None));
        let answer = cell.clone();
        self.files
            .blocking(Box::new(move || {
                let value = call();
                *answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
            }))
            .await;
        let value = cell.lock().unwrap_or_else(PoisonError::into_inner).take();
        value.unwrap_or_else(|| Err(JobError::text("Internal error: a call was lost (bug)")))
    }

    /// Removes what this job made, and only that.
    async fn remove(&mut self) {
        let Some(made) = self.made.take() else {
            return;
        };
        let removed = self.blocking(move || {
            made.remove();
            Ok(())
        });
        if let Err(error) = removed.await {
            tracing::warn!(reason = error.text, "a half-made file stays");
        }
    }
}

impl Work for CreateFile {
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> LocalFuture<'a, Result<(), Stop>> {
        Box::pin(async move {
            let outcome = self.create(cx).await;
            if outcome.is_err() {
                self.remove().await;
                count_failed_step(cx);
            }
            outcome
        })
    }
}

/// The preallocation of raw data; there is no metadata that could be.
pub(super) fn checked(preallocation: CreatePreallocation) -> Result<Preallocation, JobError> {
    match preallocation {
        CreatePreallocation::Off => Ok(Preallocation::Off),
        CreatePreallocation::Falloc => Ok(Preallocation::Falloc),
        CreatePreallocation::Full => Ok(Preallocation::Full),
        CreatePreallocation::Metadata => {
            let text = "Unsupported preallocation mode: metadata";
            Err(JobError::text(text))
        }
    }
}

/// Work of a single step has made it, well or not.
pub(super) fn count_failed_step(cx: &JobContext) {
    let progress = cx.progress();
    if progress.total_bytes() == 1 {
        progress.done(1 - progress.current_bytes());
    }
}

fn failed(text: String, errno: i32) -> Stop {
    Stop::Failed(JobError {
        errno: Some(errno),
        ..JobError::text(text)
    })
}

/// Tells the file system how the empty file will be used. Not every one listens, and no file is worse for that.
fn advise(file: &HostFile, nocow: bool, hint_bytes: u32) {
    let file = file.descriptor();
    if nocow && let Err(errno) = file_attributes::avoid_copy_on_write(file) {
        tracing::debug!(reason = errno_text(errno), "copy-on-write stays on");
    }
    if hint_bytes > 0
        && let Err(errno) = file_attributes::set_extent_size_hint(file, hint_bytes)
    {
        tracing::debug!(reason = errno_text(errno), "no hint for extents");
    }
}

/// Bytes that say "I write and resize" (taken) and "nobody else may resize" (not shared) to QEMU and to us.
const CREATION_LOCKS: [u64; 3] = [101, 103, 203];

/// Opens or makes, locks and empties; a failure leaves nothing behind that was not there.
fn open_empty(path: &Path) -> Result<Opened, JobError> {
    let made = MadeFile::make(path).map_err(|error| not_created(path, &error))?;
    match try_open_empty(path) {
        Ok(file) => Ok(Opened { file, made }),
        Err(error) => {
            if let Some(made) = made {
                made.remove();
            }
            Err(error)
        }
    }
}

fn not_created(path: &Path, error: &std::io::Error) -> JobError {
    let reason = error
        .raw_os_error()
        .map_or_else(|| error.to_string(), errno_text);
    JobError {
        errno: error.raw_os_error(),
        ..JobError::text(format!("Could not create '{}': {reason}", path.display()))
    }
}

fn try_open_empty(path: &Path) -> Result<HostFile, JobError> {
    let text = |error: &std::io::Error| not_created(path, error);
    let mode = OpenMode {
        write: true,
        ..OpenMode::default()
    };
    let file = HostFile::open(path, mode).map_err(|error| text(&error))?;
    let descriptor = file.descriptor();
    let lock_error = |name: &str| JobError::text(format!("Failed to get \"{name}\" lock"));
    for byte in CREATION_LOCKS {
        ofd_lock::lock_shared(descriptor, byte).map_err(|error| text(&error))?;
    }
    // Who does not share writing or resizing with us?
    for (byte, name) in [(201, "write"), (203, "resize")] {
        if ofd_lock::other_holder(descriptor, byte)
            .map_err(|error| text(&error))?
            .is_some()
        {
            return Err(lock_error(name));
        }
    }
    if ofd_lock::other_holder(descriptor, 103)
        .map_err(|error| text(&error))?
        .is_some()
    {
        return Err(JobError::text("Failed to get shared \"resize\" lock"));
    }
    let emptied = blockyard_ring::file_calls::resize(descriptor, 0);
    emptied.map_err(|errno| JobError {
        errno: Some(errno),
        ..JobError::text(format!(
            "Could not create '{}': {}",
            path.display(),
            errno_text(errno)
        ))
    })?;
    Ok(file)
}
