//! [`Scratch`]: the tour's folder, and the image in it that everything begins with.

use std::fs::{DirBuilder, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::error::reason;
use crate::terminal::copy::ends::shown;

/// Length of the sample image in bytes.
pub const IMAGE_BYTES: u64 = 128 << 20;
/// The image is this piece again and again: data, zeroes that were written, and a hole for the rest.
const PIECE_BYTES: u64 = 8 << 20;
const DATA_BYTES: u64 = 3 << 20;
const ZERO_BYTES: u64 = 1 << 20;
/// Bytes of one write.
const WRITE_BYTES: usize = 1 << 20;

/// The sample image's name.
pub const IMAGE: &str = "disk.raw";

/// A folder for one tour.
#[derive(Debug)]
pub struct Scratch {
    folder: PathBuf,
}

impl Scratch {
    /// Takes `folder`, which must be empty or not there yet; `None`: a new one among the system's temporary files. Others
    /// cannot look into a new folder.
    ///
    /// # Errors
    /// A text for the user.
    pub fn create(folder: Option<&Path>) -> Result<Self, String> {
        match folder {
            Some(folder) => Self::given(folder),
            None => Self::temporary(),
        }
    }

    fn given(folder: &Path) -> Result<Self, String> {
        let told = |error: io::Error| cannot_use(folder, &error);
        private(true).create(folder).map_err(told)?;
        let mut entries = std::fs::read_dir(folder).map_err(told)?;
        if entries.next().is_some() {
            let shown = folder.display();
            return Err(format!(
                "{shown}: this folder is not empty; the tour needs one of its own"
            ));
        }
        let folder = std::path::absolute(folder).map_err(told)?;
        Ok(Self { folder })
    }

    fn temporary() -> Result<Self, String> {
        let above = std::env::temp_dir();
        let mut number = std::process::id();
        loop {
            let folder = above.join(format!("blockyard-tour-{number}"));
            match private(false).create(&folder) {
                Ok(()) => return Ok(Self { folder }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    number = number.wrapping_add(1);
                }
                Err(error) => return Err(cannot_use(&folder, &error)),
            }
        }
    }

    /// Where it is, an absolute path.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Writes the sample image, until it is on the medium.
    ///
    /// # Errors
    /// The kernel's.
    pub fn write_image(&self) -> io::Result<()> {
        let mut file = File::create_new(self.path(IMAGE))?;
        file.set_len(IMAGE_BYTES)?;
        let zeroes = vec![0; WRITE_BYTES];
        let mut noise = Noise::default();
        let mut bytes = vec![0; WRITE_BYTES];
        for piece in (0..IMAGE_BYTES).step_by(PIECE_BYTES as usize) {
            file.seek(SeekFrom::Start(piece))?;
            for _ in 0..DATA_BYTES / WRITE_BYTES as u64 {
                noise.fill(&mut bytes);
                file.write_all(&bytes)?;
            }
            for _ in 0..ZERO_BYTES / WRITE_BYTES as u64 {
                file.write_all(&zeroes)?;
            }
        }
        file.sync_all()
    }
}

fn cannot_use(folder: &Path, error: &io::Error) -> String {
    format!("cannot use {}: {}", shown(folder), reason(error))
}

fn private(with_parents: bool) -> DirBuilder {
    let mut builder = DirBuilder::new();
    builder.mode(0o700).recursive(with_parents);
    builder
}

/// Bytes in which no two places are alike (xorshift, George Marsaglia, 2003).
struct Noise(u64);

impl Default for Noise {
    fn default() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }
}

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_le_bytes());
        }
    }
}
