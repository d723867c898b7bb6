//! What the copy scenarios copy: a place with a source in it, and a target that is in the same state before every run.

use std::process::Command;

use crate::Failure;
use crate::data;
use crate::image::{Format, Image, runs_in_mixed_order, spread_in_mixed_order};
use crate::options::{JobKind, Options, Scenario};
use crate::place::Place;
use crate::process::run;

/// ext4 that has done all its work on the disk before the first file is made.
pub(crate) const EXT4: [&str; 6] = [
    "mkfs.ext4",
    "-q",
    "-F",
    "-E",
    "nodiscard,lazy_itable_init=0,lazy_journal_init=0",
    "-m0",
];

/// Length of the image of `huge` in bytes.
const HUGE_BYTES: u64 = 8 << 40;

/// Pieces of 1 MiB of data in it.
const HUGE_PIECES: u64 = 1024;

/// One place with a source in it.
pub(crate) struct Case {
    /// Which set-up.
    pub(crate) scenario: Scenario,
    /// Where.
    pub(crate) place: Place,
    /// What is copied.
    pub(crate) source: Image,
    /// Its length.
    pub(crate) size_bytes: u64,
    /// How much a copy is said to move.
    pub(crate) counted_bytes: u64,
    /// Whether the page cache is bypassed.
    pub(crate) direct: bool,
}

/// What a job copies to, and how.
pub(crate) struct Target {
    /// Where to.
    pub(crate) image: Image,
    state: State,
    /// Whether zeroes may become holes (`discard=unmap`).
    pub(crate) unmap: bool,
    /// Whether the job compresses.
    pub(crate) compress: bool,
}

/// How a target is before each run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Raw, written over its whole length.
    Written,
    /// Raw and empty, in a new file.
    NewRaw,
    /// qcow2, in a new file, with these options.
    NewQcow2(&'static [&'static str]),
}

/// Makes place and source.
///
/// # Errors
/// Not root, no room, or what QEMU's tools say.
pub(crate) fn prepare(options: &Options, scenario: Scenario) -> Result<Case, Failure> {
    let size_bytes = match scenario {
        Scenario::Sparse => 8 << 30,
        Scenario::Huge => HUGE_BYTES,
        Scenario::Zlib | Scenario::Zstd => options.size_mib << 17,
        _ => options.size_mib << 20,
    };
    let place = make_place(options, scenario, size_bytes)?;
    let raw = Image {
        path: place.path("source.img"),
        format: Format::Raw,
    };
    match scenario {
        Scenario::Sparse => data::fill_sparsely(&raw.path, size_bytes, 64)?,
        Scenario::Huge => data::fill_sparsely(&raw.path, size_bytes, HUGE_PIECES)?,
        Scenario::Zlib | Scenario::Zstd => data::fill_with_mixture(&raw.path, size_bytes, 1)?,
        _ => data::fill_with_noise(&raw.path, size_bytes, 1)?,
    }
    let pieces = match scenario {
        Scenario::Qcow2 | Scenario::Zlib | Scenario::Zstd => Some(runs_in_mixed_order(size_bytes)),
        Scenario::Huge => Some(spread_in_mixed_order(size_bytes, HUGE_PIECES)),
        _ => None,
    };
    let source = match pieces {
        None => raw,
        Some(pieces) => {
            let source = Image {
                path: place.path("source.qcow2"),
                format: Format::Qcow2,
            };
            source.create_in_order(size_bytes, &raw, &pieces)?;
            // Its room is for the targets.
            std::fs::remove_file(&raw.path).map_err(|error| Failure::at(&raw.path, &error))?;
            source
        }
    };
    Ok(Case {
        scenario,
        place,
        source,
        size_bytes,
        counted_bytes: match scenario {
            Scenario::Huge => HUGE_PIECES << 20,
            _ => size_bytes,
        },
        direct: scenario != Scenario::Cache,
    })
}

fn make_place(options: &Options, scenario: Scenario, size_bytes: u64) -> Result<Place, Failure> {
    let room_bytes = 2 * size_bytes + (512 << 20);
    match scenario {
        Scenario::Disk => Place::directory(&options.disk, "a directory on a real disk"),
        Scenario::Cache => Place::tmpfs(room_bytes),
        // QEMU's backup reserves room for holes too.
        Scenario::Sparse => Place::loop_over_tmpfs(&EXT4, size_bytes + (1 << 30)),
        // The data twice, and the tables by which QEMU's backup says of every hole that it is zeroes.
        Scenario::Huge => Place::loop_over_tmpfs(&EXT4, 4 << 30),
        Scenario::Xfs => Place::loop_over_tmpfs(
            &["mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=1"],
            room_bytes,
        ),
        // It needs room of its own: metadata twice, and old extents until a transaction ends.
        Scenario::Btrfs => Place::loop_over_tmpfs(
            &["mkfs.btrfs", "-q", "-f", "-K"],
            room_bytes + size_bytes + (1 << 30),
        ),
        _ => Place::loop_over_tmpfs(&EXT4, room_bytes),
    }
}

impl Case {
    /// The jobs of this scenario among those asked for.
    pub(crate) fn jobs(&self, options: &Options) -> Vec<JobKind> {
        let compressed = matches!(self.scenario, Scenario::Zlib | Scenario::Zstd);
        let possible = |job: &JobKind| *job == JobKind::Backup || !compressed;
        options.jobs.iter().copied().filter(possible).collect()
    }

    /// What this job copies to.
    pub(crate) fn target(&self, job: JobKind) -> Target {
        let (state, unmap) = match (self.scenario, job) {
            (Scenario::Zlib, _) => (State::NewQcow2(&["compression_type=zlib"]), false),
            (Scenario::Zstd, _) => (State::NewQcow2(&["compression_type=zstd"]), false),
            (Scenario::Qcow2 | Scenario::Huge, JobKind::Backup) => (State::NewQcow2(&[]), false),
            // Without it QEMU reserves 8 TiB.
            (Scenario::Huge, _) => (State::NewRaw, true),
            (Scenario::Sparse | Scenario::Xfs | Scenario::Btrfs, _) => (State::NewRaw, false),
            _ => (State::Written, false),
        };
        let (name, format) = match state {
            State::NewQcow2(_) => ("target.qcow2", Format::Qcow2),
            _ => ("target.img", Format::Raw),
        };
        Target {
            image: Image {
                path: self.place.path(name),
                format,
            },
            state,
            unmap,
            compress: matches!(self.scenario, Scenario::Zlib | Scenario::Zstd),
        }
    }

    /// Whether the copy loop is a limit of this scenario: where formats are read, or holes or shared extents left out of
    /// the copy, it is none.
    pub(crate) fn is_limited(&self) -> bool {
        matches!(
            self.scenario,
            Scenario::Ram | Scenario::Disk | Scenario::Cache
        )
    }

    /// What is copied to what, for the output.
    pub(crate) fn what(&self, target: &Target) -> String {
        let source = match self.scenario {
            Scenario::Sparse => "sparse raw, 64 x 1 MiB of noise",
            Scenario::Qcow2 => "qcow2, noise in runs of 64 KiB to 2 MiB in mixed order",
            Scenario::Zlib | Scenario::Zstd => {
                "qcow2, text, records and noise (3:3:2 blocks of 4 KiB) in runs of 64 KiB to 2 MiB in mixed order"
            }
            Scenario::Huge => {
                "qcow2 of 8 TiB, 1024 x 1 MiB of noise at equal distances in mixed order"
            }
            _ => "raw, noise",
        };
        let target_is = match target.state {
            State::Written => "raw, written before",
            State::NewRaw if target.unmap => "raw, new, discard=unmap",
            State::NewRaw => "raw, new",
            State::NewQcow2(_) if self.scenario == Scenario::Zlib => {
                "qcow2, new, compressed with zlib"
            }
            State::NewQcow2(_) if self.scenario == Scenario::Zstd => {
                "qcow2, new, compressed with zstd"
            }
            State::NewQcow2(_) => "qcow2, new",
        };
        format!("{source} -> {target_is}")
    }

    /// Brings the target to the same state before every run: one that holds other data, so that the comparison after it
    /// proves something.
    ///
    /// # Errors
    /// No room, or what qemu-img says.
    pub(crate) fn make_ready(&self, target: &Target) -> Result<(), Failure> {
        match target.state {
            State::Written => data::fill_with_noise(&target.image.path, self.size_bytes, 2)?,
            State::NewRaw => data::make_sparse(&target.image.path, self.size_bytes)?,
            State::NewQcow2(options) => target.image.create(self.size_bytes, options)?,
        }
        if self.direct {
            self.source.leave_page_cache()?;
            target.image.leave_page_cache()?;
        }
        run(Command::new("sync")
            .arg("--file-system")
            .arg(&target.image.path))
        .map(|_| ())
    }
}
