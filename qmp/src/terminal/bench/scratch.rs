//! Files to measure with, in a folder that goes with them.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// Bytes written at once.
const PIECE_BYTES: usize = 1 << 20;

/// A folder of our own, removed with all that is in it when this is dropped.
#[derive(Debug)]
pub(super) struct Scratch {
    folder: TempDir,
}

impl Scratch {
    /// Makes one in `folder`.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn new(folder: &Path) -> io::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix(".blockyard-bench-")
            .tempdir_in(folder)?;
        Ok(Self { folder })
    }

    /// Path of a file in it.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file that neither compresses nor has holes, and has it on the medium. `go_on` hears how far it is, and says
    /// whether to go on. Returns whether it came to the end.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn fill(
        &self,
        name: &str,
        length_bytes: u64,
        mut go_on: impl FnMut(u64) -> bool,
    ) -> io::Result<bool> {
        let mut file = File::create_new(self.path(name))?;
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut piece = vec![0; PIECE_BYTES];
        let mut done_bytes = 0;
        while done_bytes < length_bytes {
            if !go_on(done_bytes) {
                return Ok(false);
            }
            for word in piece.chunks_exact_mut(8) {
                // Marsaglia's xorshift.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
            let left = length_bytes - done_bytes;
            let part = usize::try_from(left).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
            file.write_all(&piece[..part])?;
            done_bytes += part as u64;
        }
        file.sync_all()?;
        Ok(true)
    }

    /// Removes it.
    ///
    /// # Errors
    /// What the kernel says; something may be left then.
    pub(super) fn remove(self) -> io::Result<()> {
        self.folder.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_no_zeroes_and_goes_with_the_folder() {
        let around = tempfile::tempdir().expect("a folder");
        let scratch = Scratch::new(around.path()).expect("made");
        let length = (1 << 20) + 5;
        assert!(scratch.fill("source", length, |_| true).expect("written"));
        let bytes = std::fs::read(scratch.path("source")).expect("readable");
        assert_eq!(bytes.len() as u64, length);
        let zeroes = bytes.iter().filter(|byte| **byte == 0).count();
        assert!(zeroes < bytes.len() / 200, "{zeroes} of {length}");
        assert!(!scratch.fill("other", length, |_| false).expect("stopped"));
        scratch.remove().expect("removed");
        assert_eq!(
            std::fs::read_dir(around.path()).expect("a folder").count(),
            0
        );
    }
}
