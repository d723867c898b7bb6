//! [`Transcript`]: a file with every message of a connection, for reading afterwards.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

/// Every message as a line: seconds since the start, `->` to the daemon or `<-` from it, the message.
#[derive(Debug)]
pub struct Transcript {
    file: File,
    started: Instant,
    /// The first line that could not be written; nothing is written after it.
    failed: Option<io::Error>,
}

impl Transcript {
    /// Begins a new file.
    ///
    /// # Errors
    /// The kernel's; also when there is such a file.
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self {
            file: File::create_new(path)?,
            started: Instant::now(),
            failed: None,
        })
    }

    /// Writes a remark.
    pub fn remark(&mut self, text: &str) {
        self.write(&format!("# {text}\n"));
    }

    /// Everything that was written is complete.
    ///
    /// # Errors
    /// The first that kept it from being so.
    pub fn finish(self) -> io::Result<()> {
        self.failed.map_or(Ok(()), Err)
    }

    pub(super) fn sent(&mut self, message: &str) {
        self.message("->", message);
    }

    pub(super) fn received(&mut self, message: &str) {
        self.message("<-", message);
    }

    fn message(&mut self, direction: &str, message: &str) {
        let seconds = self.started.elapsed().as_secs_f64();
        self.write(&format!(
            "{seconds:10.6} {direction} {}\n",
            message.trim_end()
        ));
    }

    fn write(&mut self, line: &str) {
        if self.failed.is_none() {
            self.failed = self.file.write_all(line.as_bytes()).err();
        }
    }
}
