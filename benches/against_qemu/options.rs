//! What the bench can be asked for, and what is measured when it is asked for nothing.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Runs the same jobs and the same QMP traffic on qemu-storage-daemon and on blockyard, interleaved, and prints
/// medians and ratios.
#[derive(Debug, Parser)]
#[command(name = "against_qemu")]
pub(crate) struct Options {
    /// What to measure; everything if left out.
    #[arg(long, value_delimiter = ',', value_enum)]
    pub(crate) scenarios: Vec<Scenario>,
    /// Which jobs the copy scenarios run.
    #[arg(long, value_delimiter = ',', value_enum, default_values = ["backup", "mirror"])]
    pub(crate) jobs: Vec<JobKind>,
    /// Who takes part. `limit` is a plain io_uring copy loop.
    #[arg(long, value_delimiter = ',', value_enum, default_values = ["qemu", "blockyard", "limit"])]
    pub(crate) sides: Vec<Side>,
    /// Runs of each side, taken in turn; the median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) rounds: u32,
    /// Size of the copied file in MiB, where the scenario does not say otherwise.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(16..=65536))]
    pub(crate) size_mib: u64,
    /// How long each QMP scenario loads a daemon, in seconds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub(crate) seconds: u64,
    /// The `aio` option of both daemons' file nodes (threads, native or io_uring); their default if left out. QEMU takes
    /// part once with each that is named, as none is its best everywhere; blockyard does the same for all.
    #[arg(long, value_delimiter = ',')]
    pub(crate) aio: Vec<String>,
    /// Requests of each run of the scenarios that drive a node.
    #[arg(long, default_value_t = 500_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000_000))]
    pub(crate) requests: u32,
    /// Chunk of the copy loop in KiB.
    #[arg(long, default_value_t = 1024)]
    pub(crate) chunk_kib: u32,
    /// Chunks in flight in the copy loop.
    #[arg(long, default_value_t = 16)]
    pub(crate) depth: u32,
    /// Connections to the server of `far-nbd`, on blockyard's side; its default if left out.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) connections: Option<u32>,
    /// Directory on a real disk for the disk scenario.
    #[arg(long, default_value = env!("CARGO_TARGET_TMPDIR"))]
    pub(crate) disk: PathBuf,
    /// Program to measure as blockyard.
    #[arg(long, default_value = env!("CARGO_BIN_EXE_blockyard"))]
    pub(crate) blockyard: PathBuf,
    /// Program to measure as QEMU.
    #[arg(long, default_value = "qemu-storage-daemon")]
    pub(crate) qemu: PathBuf,
    /// One JSON object per result instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    pub(crate) bench: bool,
}

impl Options {
    /// The scenarios to run, in the order of the list.
    pub(crate) fn chosen(&self) -> Vec<Scenario> {
        match self.scenarios.is_empty() {
            true => Scenario::value_variants().to_vec(),
            false => self.scenarios.clone(),
        }
    }

    /// Who takes part in a round, in this order.
    pub(crate) fn contestants(&self) -> Vec<Contestant> {
        let with = |side, aio: Option<&String>| Contestant {
            side,
            aio: aio.cloned(),
        };
        let of_side = |&side: &Side| match side {
            Side::Qemu if !self.aio.is_empty() => {
                self.aio.iter().map(|aio| with(side, Some(aio))).collect()
            }
            Side::Limit => vec![with(side, None)],
            _ => vec![with(side, self.aio.first())],
        };
        self.sides.iter().flat_map(of_side).collect()
    }
}

/// One set-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// ext4 on a loop device with direct I/O over a written tmpfs file; direct I/O.
    Ram,
    /// A directory on a real disk; direct I/O.
    Disk,
    /// Written tmpfs files through the page cache.
    Cache,
    /// 8 GiB with 64 MiB of data spread over it, new sparse target; ext4 as in `ram`, direct I/O.
    Sparse,
    /// XFS with reflink on a loop device over a written tmpfs file, new target.
    Xfs,
    /// btrfs, else as `xfs`.
    Btrfs,
    /// qcow2 written in runs in mixed order: backup to a new qcow2 image, mirror to a written raw file; as in `ram`.
    Qcow2,
    /// The same image with data that compresses, an eighth of the size: compressed backup to a new image.
    Zlib,
    /// The same with zstd.
    Zstd,
    /// qcow2 of 8 TiB with 1 GiB of data spread over it: opening, backup to qcow2, mirror to raw; as in `ram`.
    Huge,
    /// Base full of noise, every other cluster overwritten in an overlay: commit below an empty top, stream, active commit; as in
    /// `ram`.
    Chain,
    /// The same with every other run of 64 KiB to 2 MiB overwritten.
    ChainRuns,
    /// As `chain`, in a directory on a real disk.
    ChainDisk,
    /// A base that answers after 10 ms, then 1 ms: commit into it, stream from it, 256 MiB; the rest as in `ram`.
    Far,
    /// NBD servers that answer after 10 ms, then 1 ms: commit, stream, backup, mirror, 256 MiB; the rest as in `ram`.
    FarNbd,
    /// 4 KiB at a time in mixed order, 32 in flight, on a node: `qemu-img bench` and the engine alone; raw, as in `ram`.
    RawNode,
    /// The same on qcow2: reads, writes in place, and writes to an empty image.
    Qcow2Node,
    /// An export of a raw disk over NBD on a UNIX socket: fio and nbdcopy; as in `ram`.
    ExportRaw,
    /// The same on qcow2.
    ExportQcow2,
    /// An export whose client writes while the disk is mirrored: how long a write takes; raw and qcow2, as in `ram`.
    BesideMirror,
    /// Backup of the quarter of a qcow2 disk that has changed, scattered and in one piece, onto an overlay; as in `ram`.
    Incremental,
    /// Backup of 8,695 changed clusters of a sparse disk of 800 GiB, qcow2 and raw: the first byte, all of it; as in `ram`.
    SparseIncremental,
    /// 4 KiB random writes to an export, 32 at once, without a bitmap and with ones of several kinds; as in `ram`.
    Marking,
    /// 50 QMP clients while 16 paced jobs run: delay of replies.
    Clients,
    /// The same while the 16 jobs run as fast as they can.
    ClientsFlatOut,
    /// Malformed input from four clients: worst gap between answers of another one.
    Malformed,
    /// 1,000 connections.
    Connections,
    /// Random verbs on random jobs from four clients: worst gap between answers of another one.
    Storm,
    /// Damaged images by the hundred, and such as claim much: delay of answers to another client, and memory.
    Hostile,
    /// How fast QMP input is taken.
    Input,
}

impl Scenario {
    /// The name as the command line spells it.
    pub(crate) fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// A kind of job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum JobKind {
    /// `blockdev-backup`, sync=full.
    Backup,
    /// `blockdev-mirror`, sync=full, completed once ready.
    Mirror,
    /// `block-commit` below the top.
    #[value(skip)]
    Commit,
    /// `block-stream` of the whole chain.
    #[value(skip)]
    Stream,
    /// `block-commit` of the top, completed once ready.
    #[value(skip)]
    ActiveCommit,
    /// `blockdev-backup`, sync=bitmap.
    #[value(skip)]
    Incremental,
}

impl JobKind {
    /// The name as the command line spells it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            JobKind::Backup => "backup",
            JobKind::Mirror => "mirror",
            JobKind::Commit => "commit",
            JobKind::Stream => "stream",
            JobKind::ActiveCommit => "active commit",
            JobKind::Incremental => "incremental backup",
        }
    }
}

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Side {
    /// qemu-storage-daemon.
    Qemu,
    /// This project's daemon.
    Blockyard,
    /// A plain io_uring copy loop.
    Limit,
}

impl Side {
    /// The name as the tables show it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Side::Qemu => "qemu",
            Side::Blockyard => "blockyard",
            Side::Limit => "copy loop",
        }
    }
}

/// One side with one way to reach its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Contestant {
    /// Who.
    pub(crate) side: Side,
    /// The `aio` option of its file nodes; its default if there is none.
    pub(crate) aio: Option<String>,
}

impl Contestant {
    /// The name as the tables show it.
    pub(crate) fn name(&self) -> String {
        match (self.side, &self.aio) {
            (Side::Qemu, Some(aio)) => format!("qemu {aio}"),
            (side, _) => side.name().to_owned(),
        }
    }
}
