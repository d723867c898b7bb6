//! [`Pidfile`]: the file that holds the process id, locked for as long as the process lives.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, fcntl_lock};

use crate::error::reason;

/// A pid file; removed when this is dropped.
#[derive(Debug)]
pub struct Pidfile {
    path: PathBuf,
    /// Holds the lock.
    _file: File,
}

impl Pidfile {
    /// Writes the id of this process. The file is complete before it appears under a name that was free, and a file whose
    /// process is gone is taken over.
    ///
    /// # Errors
    /// A text for the user: the file cannot be made, or another process holds it.
    pub fn create(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        loop {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)
                .map_err(|error| told(&format!("Could not create '{shown}'"), &error))?;
            fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)
                .map_err(|error| told("Cannot lock pid file", &error.into()))?;
            // Whoever held it before may have removed it between our open and our lock.
            if !is_same(&file, path) {
                continue;
            }
            let written = file
                .set_len(0)
                .and_then(|()| writeln!(file, "{}", std::process::id()));
            written.map_err(|error| told("Failed to write pid file", &error))?;
            return Ok(Self {
                path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
                _file: file,
            });
        }
    }
}

fn told(what: &str, error: &io::Error) -> String {
    format!("cannot create PID file: {what}: {}", reason(error))
}

fn is_same(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "a pid file stays behind");
        }
    }
}
