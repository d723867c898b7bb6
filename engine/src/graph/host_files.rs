//! Opening host files: on threads of their own, with a deadline, and with a look before if it was an image that named one.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use blockyard_ring::confined::{Confinement, Refusal, open_confined};
use blockyard_ring::{FileKind, HostFile, OpenMode};
use blockyard_storage::error::errno_text;

use crate::error::EngineError;
use crate::graph::Graph;
use crate::graph::add::Leaf;
use crate::graph::filenames::FileName;
use crate::graph::image_locks::HeldLocks;
use crate::graph::image_names::no_data_file;
use crate::graph::options::Resolved;
use crate::node::build::NodePlan;
use crate::node::file_node::FileOptions;
use crate::request::{Aio, FileSpec, NamedBy, OnOffAuto};

/// How long opening a file may take: longer, and something is stuck.
pub(super) const OPEN_WAIT: Duration = Duration::from_secs(30);

impl Graph {
    /// Opens a file where that may block, and looks at it before if it was not a client who named it.
    async fn open_host_file(&self, spec: &FileSpec, mode: OpenMode) -> Result<HostFile, Refusal> {
        let path = spec.filename.clone();
        let confinement = match &spec.named_by {
            NamedBy::Client => None,
            NamedBy::Image { folder } => Some(Confinement {
                roots: self.policy.roots.clone(),
                folder: folder.clone(),
            }),
        };
        in_background(move || Ok(open_named(&path, mode, confinement.as_ref()))).await?
    }

    /// Opens a file, or a device if `device` says so.
    pub(super) async fn open_file(
        &self,
        driver: &'static str,
        spec: FileSpec,
        resolved: Resolved,
        device: bool,
    ) -> Result<Leaf, EngineError> {
        if spec.aio == Some(Aio::Native) && !resolved.cache_direct {
            return Err(EngineError::generic(
                "aio=native was specified, but it requires cache.direct=on, which was not \
                 specified.",
            ));
        }
        let mode = OpenMode {
            write: !resolved.read_only,
            direct: resolved.cache_direct,
            create: false,
        };
        let mut read_only = resolved.read_only;
        let shown = spec.filename.display().to_string();
        let opened = self.open_host_file(&spec, mode).await;
        let file = match opened {
            Err(Refusal::Failed(error))
                if mode.write && resolved.auto_read_only && is_refused(&error) =>
            {
                read_only = true;
                let mode = OpenMode {
                    write: false,
                    ..mode
                };
                self.open_host_file(&spec, mode).await
            }
            other => other,
        };
        let could_not_open =
            |reason: &str| EngineError::generic(format!("Could not open '{shown}': {reason}"));
        let wrong_kind = || {
            EngineError::generic(match device {
                false => format!("'file' driver requires '{shown}' to be a regular file"),
                true => format!(
                    "'host_device' driver requires '{shown}' to be either a character or block \
                     device"
                ),
            })
        };
        let beside_image = matches!(&spec.named_by, NamedBy::Image { folder: Some(_) });
        let file = file.map_err(|refusal| match refusal {
            Refusal::Kernel | Refusal::Outside(_) if beside_image => {
                no_data_file(Some(spec.filename.as_os_str().as_bytes()))
            }
            Refusal::Failed(error) => could_not_open(&match error.raw_os_error() {
                Some(errno) => errno_text(errno),
                None => error.to_string(),
            }),
            Refusal::Kind(_) => wrong_kind(),
            Refusal::Kernel => {
                could_not_open("an image names it, and it belongs to a process or the kernel")
            }
            Refusal::Outside(place) => could_not_open(&format!(
                "an image names it, and '{}' is outside of where such files may be",
                place.display()
            )),
        })?;
        let fits = match file.kind() {
            FileKind::Regular => !device,
            FileKind::BlockDevice => device,
            FileKind::Directory | FileKind::Other => false,
        };
        if !fits {
            return Err(wrong_kind());
        }
        if !read_only && file.is_write_protected().unwrap_or(false) {
            if !resolved.auto_read_only {
                let text = "The device is not writable: Permission denied";
                return Err(EngineError::generic(text));
            }
            read_only = true;
        }
        let locks = spec.locking != Some(OnOffAuto::Off);
        let options = FileOptions {
            read_only,
            discard: resolved.discard,
            detect_zeroes: resolved.detect_zeroes,
            no_flush: resolved.cache_no_flush,
        };
        Ok(Leaf {
            read_only,
            exclusive: spec.exclusive,
            locked: locks.then(|| (file.clone(), HeldLocks::default())),
            filename: FileName::of_file(driver, shown),
            plan: NodePlan::File { file, options },
        })
    }
}

/// Opens a file, within a confinement if there is one. May block.
///
/// # Errors
/// Says why; without a confinement it is always what the kernel says.
pub(super) fn open_named(
    path: &Path,
    mode: OpenMode,
    confinement: Option<&Confinement>,
) -> Result<HostFile, Refusal> {
    match confinement {
        None => Ok(HostFile::open(path, mode)?),
        Some(confinement) => open_confined(path, mode, confinement),
    }
}

/// Runs a call on a thread of its own: a file system that does not answer holds up only this request, and not for ever.
pub(super) async fn in_background<T: Send + 'static>(
    call: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let calling = tokio::task::spawn_blocking(call);
    match tokio::time::timeout(OPEN_WAIT, calling).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => Err(io::Error::other("opening failed (bug)")),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Whether a file may just not be written.
pub(super) fn is_refused(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
    )
}
