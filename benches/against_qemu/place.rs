//! Where the measured files lie: file systems in memory that behave the same in every run, or a directory on a disk.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Failure;
use crate::cleanup::{Guard, Undo};

/// Random-looking data is written in pieces of this many bytes.
const PIECE_BYTES: usize = 1 << 20;

/// A directory for the files of one scenario. Gone with everything in it when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    directory: PathBuf,
    description: String,
    // Dropped in this order: what lies on top first.
    _guards: Vec<Guard>,
}

impl Place {
    /// A new directory below an existing one.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub(crate) fn directory(below: &Path, description: &str) -> Result<Place, Failure> {
        let directory = below.join(format!("against-qemu-{}", std::process::id()));
        fs::create_dir_all(&directory).map_err(|error| Failure::at(&directory, &error))?;
        let guard = Guard::new(Undo::Directory(directory.clone()));
        Ok(Place {
            directory,
            description: description.to_owned(),
            _guards: vec![guard],
        })
    }

    /// A tmpfs of its own.
    ///
    /// # Errors
    /// Not root, or no such size.
    pub(crate) fn tmpfs(size_bytes: u64) -> Result<Place, Failure> {
        let below = Place::directory(&std::env::temp_dir(), "")?;
        let directory = below.directory.clone();
        let size = format!("size={size_bytes}");
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "blockyard-bench"])
            .arg(&directory))?;
        let mut guards = vec![Guard::new(Undo::Mounted(directory.clone()))];
        guards.extend(below._guards);
        Ok(Place {
            directory,
            description: "tmpfs, every page written before".to_owned(),
            _guards: guards,
        })
    }

    /// A file system made by `mkfs` on a loop device with direct I/O over a tmpfs file whose pages are all written.
    ///
    /// # Errors
    /// Not root, a tool is missing, or the loop device does no direct I/O.
    pub(crate) fn loop_over_tmpfs(mkfs: &[&str], size_bytes: u64) -> Result<Place, Failure> {
        let below = Place::tmpfs(size_bytes + (64 << 20))?;
        let image = below.directory.join("disk");
        fill_with_data(&image, size_bytes, 0)?;
        let attach = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on"])
            .arg(&image)
            .output()
            .map_err(|error| Failure::new(format!("losetup: {error}")))?;
        if !attach.status.success() {
            return Err(Failure::new(format!(
                "losetup: {}",
                String::from_utf8_lossy(&attach.stderr).trim()
            )));
        }
        let device = String::from_utf8_lossy(&attach.stdout).trim().to_owned();
        let mut guards = vec![Guard::new(Undo::Attached(device.clone()))];
        require_direct_io(&device)?;
        let (program, arguments) = mkfs.split_first().ok_or_else(|| Failure::new("no mkfs"))?;
        run(Command::new(program).args(arguments).arg(&device))?;
        let directory = below.directory.join("mounted");
        fs::create_dir(&directory).map_err(|error| Failure::at(&directory, &error))?;
        run(Command::new("mount").arg(&device).arg(&directory))?;
        guards.insert(0, Guard::new(Undo::Mounted(directory.clone())));
        guards.extend(below._guards);
        let description =
            format!("{program} on a loop device with direct I/O over a written tmpfs file");
        Ok(Place {
            directory,
            description,
            _guards: guards,
        })
    }

    /// What it is, for the output.
    pub(crate) fn description(&self) -> &str {
        &self.description
    }

    /// A path in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

fn require_direct_io(device: &str) -> Result<(), Failure> {
    let name = device.trim_start_matches("/dev/");
    let path = PathBuf::from(format!("/sys/block/{name}/loop/dio"));
    match fs::read_to_string(&path) {
        Ok(text) if text.trim() == "1" => Ok(()),
        Ok(_) => Err(Failure::new(format!(
            "{device} does no direct I/O to its tmpfs file; Linux 6.6 or later does"
        ))),
        Err(error) => Err(Failure::at(&path, &error)),
    }
}

/// Runs a program to its end; its error output is the error.
pub(crate) fn run(command: &mut Command) -> Result<(), Failure> {
    let output = command
        .output()
        .map_err(|error| Failure::new(format!("{command:?}: {error}")))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(Failure::new(format!(
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ))),
    }
}

/// Writes a whole file with data that has no zero blocks and no two equal ones; another seed gives other data.
pub(crate) fn fill_with_data(path: &Path, size_bytes: u64, seed: u64) -> Result<(), Failure> {
    let mut file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(false)
        .open(path)
        .map_err(|error| Failure::at(path, &error))?;
    let mut noise = Noise::new(seed);
    let mut left = size_bytes;
    while left > 0 {
        let piece = noise.piece();
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
        file.write_all(&piece[..length])
            .map_err(|error| Failure::at(path, &error))?;
        left -= length as u64;
    }
    file.sync_all().map_err(|error| Failure::at(path, &error))
}

/// Makes a sparse file with `pieces` pieces of 1 MiB of data at equal distances.
pub(crate) fn fill_sparsely(path: &Path, size_bytes: u64, pieces: u64) -> Result<(), Failure> {
    let failure = |error: std::io::Error| Failure::at(path, &error);
    let mut file = File::create(path).map_err(failure)?;
    file.set_len(size_bytes).map_err(failure)?;
    let mut noise = Noise::new(7);
    for index in 0..pieces {
        file.seek(SeekFrom::Start(size_bytes / pieces * index))
            .map_err(failure)?;
        file.write_all(noise.piece()).map_err(failure)?;
    }
    file.sync_all().map_err(failure)
}

/// Makes (or replaces) an empty file of this length.
pub(crate) fn make_sparse(path: &Path, size_bytes: u64) -> Result<(), Failure> {
    let failure = |error: std::io::Error| Failure::at(path, &error);
    if path.exists() {
        fs::remove_file(path).map_err(failure)?;
    }
    let file = File::create(path).map_err(failure)?;
    file.set_len(size_bytes).map_err(failure)?;
    file.sync_all().map_err(failure)
}

/// Room a file takes on its file system.
pub(crate) fn allocated_bytes(path: &Path) -> Result<u64, Failure> {
    fs::metadata(path)
        .map(|facts| facts.blocks() * 512)
        .map_err(|error| Failure::at(path, &error))
}

/// Cheap pseudo-random data: one filled piece, of which every use changes one word per 512 bytes.
struct Noise {
    piece: Vec<u8>,
    state: u64,
}

impl Noise {
    fn new(seed: u64) -> Noise {
        let mut noise = Noise {
            piece: vec![0; PIECE_BYTES],
            state: seed ^ 0x9E37_79B9_7F4A_7C15,
        };
        for at in (0..PIECE_BYTES).step_by(8) {
            let word = noise.next() | 1;
            noise.piece[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        noise
    }

    /// xorshift64*: good enough to be no pattern.
    fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn piece(&mut self) -> &[u8] {
        for at in (0..PIECE_BYTES).step_by(512) {
            let word = self.next() | 1;
            self.piece[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        &self.piece
    }
}
