//! Where the measured files lie: file systems in memory that behave the same in every run, or a directory on a disk.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Failure;
use crate::cleanup::{Guard, Undo};
use crate::data::fill_with_noise;
use crate::process::run;

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
        fill_with_noise(&image, size_bytes, 0)?;
        let attached = run(Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on"])
            .arg(&image))?;
        let device = attached.output.trim().to_owned();
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

/// Room a file takes on its file system.
pub(crate) fn allocated_bytes(path: &Path) -> Result<u64, Failure> {
    fs::metadata(path)
        .map(|facts| facts.blocks() * 512)
        .map_err(|error| Failure::at(path, &error))
}
