//! [`ManifestFile`]: a new manifest under a name of its own until it is whole and durable; then it takes its name in one step.

use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use blockyard_ring::{HostFile, OpenMode};
use blockyard_storage::Storage;
use blockyard_storage::error::{EINVAL, EIO, errno_text};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::data::HostFiles;
use crate::error::JobError;

/// Tells files of one process apart.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// A manifest that is being made.
pub(crate) struct ManifestFile {
    files: Rc<dyn HostFiles>,
    path: PathBuf,
    replaces: bool,
    temporary: Option<PathBuf>,
    is_published: bool,
    output: Rc<dyn Storage>,
    scratch: Rc<dyn Storage>,
}

impl ManifestFile {
    /// Begins a manifest that will be at `path`, where nothing may be yet unless it `replaces` that.
    ///
    /// # Errors
    /// What is in the way; nothing is left behind.
    pub(crate) async fn create(
        path: &Path,
        replaces: bool,
        files: Rc<dyn HostFiles>,
    ) -> Result<Self, JobError> {
        let wanted = path.to_owned();
        let made = blocking(&*files, move || {
            if !replaces && wanted.symlink_metadata().is_ok() {
                return Err(cannot(&wanted, "File exists"));
            }
            let (scratch_path, scratch) = make_beside(&wanted)?;
            // Nobody has to find it.
            std::fs::remove_file(&scratch_path).map_err(|error| cannot_io(&wanted, &error))?;
            let (temporary, output) = make_beside(&wanted)?;
            Ok((scratch, temporary, output))
        });
        let (scratch, temporary, output) = made.await?;
        Ok(Self {
            output: files.storage(&output, false),
            scratch: files.storage(&scratch, false),
            files,
            path: path.to_owned(),
            replaces,
            temporary: Some(temporary),
            is_published: false,
        })
    }

    /// Where its text goes to.
    pub(crate) fn output(&self) -> &dyn Storage {
        &*self.output
    }

    /// A file that is gone with this.
    pub(crate) fn scratch(&self) -> Rc<dyn Storage> {
        Rc::clone(&self.scratch)
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// It is not.
    pub(crate) async fn sync(&self) -> Result<(), JobError> {
        let synced = self.output.sync().await;
        synced.map_err(|error| cannot(&self.path, &errno_text(error.errno)))
    }

    /// Gives it its name. It is there for good afterwards.
    ///
    /// # Errors
    /// It is not, or perhaps not for good.
    pub(crate) async fn publish(&mut self) -> Result<(), JobError> {
        let Some(temporary) = self.temporary.clone() else {
            return Err(cannot(&self.path, "it is gone (bug)"));
        };
        let (path, replaces) = (self.path.clone(), self.replaces);
        let named = blocking(&*self.files, move || rename(&temporary, &path, replaces)).await;
        named?;
        self.temporary = None;
        self.is_published = true;
        let path = self.path.clone();
        let synced = move || {
            let folder = folder_of(&path);
            let synced = std::fs::File::open(folder).and_then(|folder| folder.sync_all());
            synced.map_err(|error| cannot_io(&path, &error))
        };
        blocking(&*self.files, synced).await
    }

    /// The job has come to nothing: neither has this.
    pub(crate) fn remove(&mut self) {
        let path = match self.is_published {
            true => Some(self.path.clone()),
            false => self.temporary.take(),
        };
        self.is_published = false;
        if let Some(path) = path
            && let Err(error) = std::fs::remove_file(&path)
        {
            tracing::warn!(%error, path = %path.display(), "a manifest of no use could not be removed");
        }
    }
}

impl Drop for ManifestFile {
    fn drop(&mut self) {
        if self.temporary.is_some() {
            self.remove();
        }
    }
}

/// A manifest that is there, for reading.
///
/// # Errors
/// It cannot be opened.
pub(crate) async fn open_earlier(
    path: &Path,
    files: Rc<dyn HostFiles>,
) -> Result<Rc<dyn Storage>, JobError> {
    let path = path.to_owned();
    let opened = blocking(&*files, move || {
        HostFile::open(&path, OpenMode::default()).map_err(|error| {
            let errno = error.raw_os_error();
            let reason = errno.map_or_else(|| error.to_string(), errno_text);
            let text = format!("Could not open manifest '{}': {reason}", path.display());
            JobError {
                errno,
                ..JobError::text(text)
            }
        })
    });
    let opened = opened.await?;
    Ok(files.storage(&opened, true))
}

/// A new file in the folder of `path`.
fn make_beside(path: &Path) -> Result<(PathBuf, HostFile), JobError> {
    let Some(name) = path.file_name() else {
        return Err(cannot(path, "it names no file"));
    };
    let mut beside = std::ffi::OsString::from(".");
    beside.push(name);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    beside.push(format!(".{}-{number}.partial", std::process::id()));
    let beside = folder_of(path).join(beside);
    let made = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&beside);
    made.map_err(|error| cannot_io(path, &error))?;
    let mode = OpenMode {
        write: true,
        ..OpenMode::default()
    };
    let opened = HostFile::open(&beside, mode);
    match opened {
        Ok(file) => Ok((beside, file)),
        Err(error) => {
            let _ = std::fs::remove_file(&beside);
            Err(cannot_io(path, &error))
        }
    }
}

fn rename(temporary: &Path, path: &Path, replaces: bool) -> Result<(), JobError> {
    let renamed = match replaces {
        true => std::fs::rename(temporary, path),
        false => renameat_with(CWD, temporary, CWD, path, RenameFlags::NOREPLACE)
            .map_err(io::Error::from)
            .or_else(|error| match error.raw_os_error() {
                // This file system has no such way; a link is never made over something either.
                Some(EINVAL) => std::fs::hard_link(temporary, path)
                    .and_then(|()| std::fs::remove_file(temporary)),
                _ => Err(error),
            }),
    };
    renamed.map_err(|error| cannot_io(path, &error))
}

fn folder_of(path: &Path) -> &Path {
    let folder = path.parent();
    let folder = folder.filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

fn cannot_io(path: &Path, error: &io::Error) -> JobError {
    let errno = error.raw_os_error();
    JobError {
        errno,
        ..cannot(path, &errno.map_or_else(|| error.to_string(), errno_text))
    }
}

fn cannot(path: &Path, reason: &str) -> JobError {
    JobError::text(format!(
        "Could not write manifest '{}': {reason}",
        path.display()
    ))
}

/// Carries out a call that may block.
async fn blocking<T: Send + 'static>(
    files: &dyn HostFiles,
    call: impl FnOnce() -> Result<T, JobError> + Send + 'static,
) -> Result<T, JobError> {
    let cell = Arc::new(Mutex::new(None));
    let answer = cell.clone();
    files
        .blocking(Box::new(move || {
            let value = call();
            *answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
        }))
        .await;
    let value = cell.lock().unwrap_or_else(PoisonError::into_inner).take();
    value.unwrap_or_else(|| Err(JobError::errno(EIO)))
}
