//! The commands for people and scripts: what they are asked, how they show progress, how they end.

pub(crate) mod bench;
pub(crate) mod chain;
pub(crate) mod check;
pub(crate) mod command;
pub(crate) mod copy;
pub mod display;
pub(crate) mod embedded;
pub mod exit;
pub(crate) mod images;
mod node_files;
pub mod rate;
mod room;

use std::ffi::OsString;

use clap::{Parser, Subcommand};

use crate::control::jobs::JobsArguments;
use crate::control::qmp::QmpArguments;
use crate::daemon::options::HELP;
use crate::terminal::bench::BenchArguments;
use crate::terminal::chain::arguments::{CommitArguments, StreamArguments};
use crate::terminal::chain::rebase::RebaseArguments;
use crate::terminal::chain::show::ChainArguments;
use crate::terminal::check::arguments::CheckArguments;
use crate::terminal::copy::arguments::{BackupArguments, MirrorArguments};
use crate::terminal::exit::{Exit, after_help, after_help_with};
use crate::terminal::images::bitmap::BitmapArguments;
use crate::terminal::images::compare::{self, CompareArguments};
use crate::terminal::images::create::CreateArguments;
use crate::terminal::images::info::InfoArguments;
use crate::terminal::images::map::MapArguments;
use crate::terminal::images::measure::MeasureArguments;
use crate::terminal::images::resize::ResizeArguments;
use crate::terminal::images::snapshot::SnapshotArguments;
use crate::terminal::images::verify::{self, VerifyArguments};
use crate::tour::guide::TourArguments;

/// What `--version` prints behind the program's name.
pub const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    ", compatible with qemu-storage-daemon 10.0"
);

const EXAMPLES: &str = "  \
  blockyard tour
  blockyard backup disk.raw backup.raw
  blockyard mirror --verify disk.raw /mnt/other/disk.raw
  blockyard create -f qcow2 image.qcow2 20G
  blockyard info image.qcow2
  blockyard check image.qcow2
  blockyard bench --directory /mnt/disk
  blockyard daemon --help
  blockyard qmp qmp.sock query-version
  blockyard jobs qmp.sock --watch";

const BACKUP_EXAMPLES: &str = "  \
  blockyard backup disk.raw backup.raw
  blockyard backup --verify --speed 100M disk.raw /mnt/backup/disk.raw
  blockyard backup --force /dev/vg/snapshot backup.raw
  blockyard backup --manifest backup.manifest disk.raw backup.raw
  blockyard backup -f qcow2 -O qcow2 --compress disk.qcow2 full.qcow2
  blockyard backup --incremental since-full --onto full.qcow2 disk.qcow2 tuesday.qcow2
  blockyard backup --json disk.raw backup.raw";

const CHECK_EXAMPLES: &str = "  \
  blockyard check image.qcow2
  blockyard check --repair leaks image.qcow2
  blockyard check --repair all --json /dev/vg/image";

const INFO_EXAMPLES: &str = "  \
  blockyard info image.qcow2
  blockyard info -f qcow2 --backing-chain --output json overlay.qcow2";

const CREATE_EXAMPLES: &str = "  \
  blockyard create disk.raw 20G
  blockyard create -f qcow2 -o cluster_size=2M,preallocation=falloc image.qcow2 20G
  blockyard create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  blockyard create -f qcow2 -o help";

const RESIZE_EXAMPLES: &str = "  \
  blockyard resize disk.raw +10G
  blockyard resize -f qcow2 --shrink image.qcow2 5G";

const SNAPSHOT_EXAMPLES: &str = "  \
  blockyard snapshot -c before-upgrade image.qcow2
  blockyard snapshot -l image.qcow2
  blockyard snapshot -a before-upgrade image.qcow2
  blockyard snapshot -d before-upgrade image.qcow2
  blockyard snapshot --overlay new.qcow2 image.qcow2
  blockyard snapshot --dry-run -d before-upgrade image.qcow2";

const BITMAP_EXAMPLES: &str = "  \
  blockyard bitmap add image.qcow2 since-monday
  blockyard bitmap list image.qcow2
  blockyard bitmap merge image.qcow2 since-monday since-tuesday
  blockyard bitmap dump --json image.qcow2 since-monday
  blockyard bitmap remove image.qcow2 since-monday";

const MAP_EXAMPLES: &str = "  \
  blockyard map disk.raw
  blockyard map -f qcow2 --output json image.qcow2";

const MEASURE_EXAMPLES: &str = "  \
  blockyard measure -O qcow2 --size 20G
  blockyard measure -O qcow2 -o cluster_size=2M disk.raw";

const COMPARE_EXAMPLES: &str = "  \
  blockyard compare -F qcow2 disk.raw copy.qcow2
  blockyard compare --strict -f raw -F raw disk.raw copy.raw";

const VERIFY_EXAMPLES: &str = "  \
  blockyard verify backup.raw backup.manifest
  blockyard verify -f qcow2 --json image.qcow2 image.manifest";

const CHAIN_EXAMPLES: &str = "  \
  blockyard chain overlay.qcow2
  blockyard chain --json overlay.qcow2";

const COMMIT_EXAMPLES: &str = "  \
  blockyard commit --dry-run overlay.qcow2
  blockyard commit overlay.qcow2
  blockyard commit --top middle.qcow2 --base base.qcow2 overlay.qcow2";

const STREAM_EXAMPLES: &str = "  \
  blockyard stream overlay.qcow2
  blockyard stream --base base.qcow2 --rate 100M overlay.qcow2";

const REBASE_EXAMPLES: &str = "  \
  blockyard rebase -b new-base.qcow2 -F qcow2 overlay.qcow2
  blockyard rebase --dry-run -b '' overlay.qcow2
  blockyard rebase --unsafe -b moved/base.qcow2 -F qcow2 overlay.qcow2";

const BENCH_EXAMPLES: &str = "  \
  blockyard bench --directory /mnt/disk --size 4G --rounds 5
  blockyard bench --job mirror --cache writeback
  blockyard bench --json disk.raw /mnt/backup/scratch.raw";

const MIRROR_EXAMPLES: &str = "  \
  blockyard mirror disk.raw /mnt/new/disk.raw
  blockyard mirror --force disk.raw /dev/vg/disk";

/// Commands whose exit codes are those of qemu-img: some say more than failure with 2, so that all end with 1 after a wrong
/// command line.
const IMAGE_COMMANDS: [&str; 11] = [
    "bitmap", "chain", "check", "compare", "create", "info", "map", "measure", "rebase", "resize",
    "snapshot",
];

/// Runs backup, mirror and other block jobs on disk images
#[derive(Debug, Parser)]
#[command(name = "blockyard", version = VERSION, after_help = after_help(EXAMPLES))]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// The end of `--help` of a command on an image.
fn image_help(examples: &str) -> String {
    let codes = [
        (Exit::Success.code(), Exit::Success.meaning()),
        (
            Exit::Failed.code(),
            "failed or refused, or a wrong command line; a message says why",
        ),
        (Exit::Cancelled.code(), Exit::Cancelled.meaning()),
    ];
    after_help_with(examples, &codes)
}

/// One command and its arguments.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// See every kind of job at work on sample images, and each result verified
    ///
    /// Makes a sample image in a new folder, starts a daemon there, runs every kind of job on it over QMP, compares each
    /// result with its source byte by byte, and ends the daemon. The folder stays, with the sample image and all QMP
    /// messages in it, for what is suggested at the end.
    Tour(TourArguments),
    /// Copy an image or block device to keep the copy
    ///
    /// Copies SRC to DST, which becomes the same byte for byte, holes included, and is durable at the end. SRC must not be in
    /// use by somebody who writes to it. `backup` and `mirror` make the same copy; where DST held something and becomes
    /// zeroes, `backup` keeps the room on DST and `mirror` gives it back. Use `backup` for a copy to keep.
    ///
    /// The disk in a qcow2 image is copied, or to one, if you say so (-f, -O). With --incremental only what has changed since the
    /// backup before is, by a bitmap that SRC keeps; `blockyard bitmap` makes and shows bitmaps.
    #[command(after_help = after_help(BACKUP_EXAMPLES))]
    Backup(BackupArguments),
    /// Copy an image or block device to use the copy in its place
    ///
    /// Copies SRC to DST, which becomes the same byte for byte, holes included, and is durable at the end. SRC must not be in
    /// use by somebody who writes to it. `mirror` and `backup` make the same copy; where DST held something and becomes
    /// zeroes, `mirror` gives the room on DST back and `backup` keeps it. Use `mirror` to move a disk; it completes as soon
    /// as both sides are equal, because here nobody writes to SRC meanwhile.
    #[command(after_help = after_help(MIRROR_EXAMPLES))]
    Mirror(MirrorArguments),
    /// Show the images of a chain, and what moving data between them would come to
    ///
    /// Prints IMAGE and each image below it as the headers name them, with length and room taken, and between them how much a
    /// commit into the one below would copy and take, and a stream of all into IMAGE. Only tables are read. A file that is
    /// missing or a chain that leads to itself is told, and the exit code is 1. Nobody may be writing to the images.
    #[command(after_help = image_help(CHAIN_EXAMPLES))]
    Chain(ChainArguments),
    /// Move what overlays hold down into an image below them
    ///
    /// BASE gets what the images above it hold, down from OVERLAY (or TOP), so that it shows what that does. OVERLAY shows the same
    /// at every moment, also after a power cut. Nothing is emptied or removed: OVERLAY and the images between can be deleted
    /// afterwards. With --top, TOP and the images between it and BASE are taken in, and the image above TOP is put on BASE, which
    /// changes its header.
    ///
    /// Other images that are on BASE, or on an image between, show something else afterwards. They cannot be found from here:
    /// commit only if there are none. BASE gets longer if it is shorter. None of the images may be in use.
    #[command(after_help = after_help(COMMIT_EXAMPLES))]
    Commit(CommitArguments),
    /// Move what images below hold up into an overlay
    ///
    /// OVERLAY gets what the images below it hold, down to BASE, which stays below it, or all of it. It shows the same at every
    /// moment, also after a power cut. The other images stay as they are, and OVERLAY does not need them any more. None of the
    /// images may be in use.
    #[command(after_help = after_help(STREAM_EXAMPLES))]
    Stream(StreamArguments),
    /// Put an image on another backing file
    ///
    /// FILE shows the same afterwards: what it does not hold itself is compared through the old and the new backing file, and
    /// what differs is copied into it before its header changes. Messages and exit codes are those of qemu-img rebase. None of the
    /// images may be in use by somebody who writes to them.
    #[command(after_help = image_help(REBASE_EXAMPLES))]
    Rebase(RebaseArguments),
    /// Check a qcow2 image, and repair it
    ///
    /// Reads all metadata of FILE and tells what is wrong with it, in the words, figures and exit codes of qemu-img check.
    /// Findings go to standard error, figures to standard output. FILE must not be in use by somebody who writes to it. Its
    /// backing and data files are not looked at.
    ///
    /// With --repair, what is found is put right, in an order that survives a crash at any time, and the image is checked
    /// again. Make a copy of an image that is corrupt before you repair it. Leaked clusters are kept as long as a damaged entry
    /// may have led to them.
    ///
    /// Takes one byte of memory for each cluster of FILE, for example 128 MiB for 8 TiB with clusters of 64 KiB, and at most 20
    /// MiB more (with --repair, 60 MiB); two or eight bytes where clusters have more than 255 or 65535 references.
    #[command(after_help = after_help_with(CHECK_EXAMPLES, &check::EXIT_CODES))]
    Check(CheckArguments),
    /// Make a new image
    ///
    /// Makes a raw or qcow2 image whose disk reads as zeroes, or as that of BACKING. Nothing that exists is overwritten without
    /// --force. The image is whole and durable when this ends; when it fails or is cancelled, a FILE that was new is removed.
    #[command(after_help = image_help(CREATE_EXAMPLES))]
    Create(CreateArguments),
    /// Show what an image says of itself
    ///
    /// Prints format, length, room taken and what the header of a qcow2 image says, in the form of qemu-img info (dates are in
    /// UTC). Only metadata is read, and what the image names is not opened without --backing-chain, so that any file can be looked
    /// at, whoever wrote it. FILE must not be in use by somebody who writes to it.
    #[command(after_help = image_help(INFO_EXAMPLES))]
    Info(InfoArguments),
    /// Give the disk in an image another length
    ///
    /// What is added reads as zeroes. The change is durable when this ends. FILE must not be in use. Partitions and file systems
    /// on the disk stay as they are: make them shorter before the disk, and longer after it.
    #[command(after_help = image_help(RESIZE_EXAMPLES))]
    Resize(ResizeArguments),
    /// List, make, apply or delete internal snapshots of a qcow2 image, or make an external one
    ///
    /// A snapshot in the image keeps what the disk holds now; what is written later takes new room. The image is the old one or
    /// the new one whenever the power goes, sound and without leaks. Output and messages are those of qemu-img snapshot (dates
    /// are in UTC). FILE must not be in use. It takes the time of a check twice, and memory as a check does.
    ///
    /// With --overlay, FILE stays as it is, and NEW is made on it: as long, in its format's usual form, naming FILE as it is found
    /// from NEW's folder. From then on NEW is to be used. It takes no time, and nothing that exists is overwritten.
    ///
    /// What the file system may have too little room for is refused; --dry-run tells how much that is.
    #[command(after_help = image_help(SNAPSHOT_EXAMPLES))]
    Snapshot(SnapshotArguments),
    /// List, add, change or remove the dirty bitmaps of a qcow2 image
    ///
    /// A bitmap says which parts of the disk have changed since it was added or cleared; incremental backups go by it. Whoever uses the
    /// image keeps those up that record. Messages are those of qemu-img bitmap. If it is interrupted, all bitmaps of the image may be
    /// inconsistent, as with qemu-img, and good for nothing but to be removed. FILE must not be in use by somebody who writes to it.
    #[command(after_help = image_help(BITMAP_EXAMPLES))]
    Bitmap(BitmapArguments),
    /// Show where the bytes of a disk are kept
    ///
    /// Prints each run of the disk that is kept in one way, in the form of qemu-img map: with --output json all of them, with
    /// the layer of the chain that decides (depth), whether it holds the run (present), as zeroes, data or compressed, and the
    /// offset in its file; for people only what holds data, with the file. FILE must not be in use by somebody who writes to it.
    #[command(after_help = image_help(MAP_EXAMPLES))]
    Map(MapArguments),
    /// Find out how much room an image will need
    ///
    /// Prints how many bytes a new image needs that holds what FILE holds, or nothing yet of a disk of SIZE, and how many once
    /// all of it has been written, in the form of qemu-img measure.
    #[command(after_help = image_help(MEASURE_EXAMPLES))]
    Measure(MeasureArguments),
    /// Compare the disks in two images
    ///
    /// Reads both until they differ, and says so in the words and with the exit codes of qemu-img compare. Where both hold
    /// zeroes nothing is read. If one is longer than the other, what is behind the end of the shorter one counts as zeroes.
    #[command(after_help = after_help_with(COMPARE_EXAMPLES, &compare::EXIT_CODES))]
    Compare(CompareArguments),
    /// Hold an image against a checksum manifest
    ///
    /// Reads the disk in TARGET and names the parts that are not what MANIFEST says, in extents of 64 KiB. What the manifest tells of as
    /// zeroes and the file system knows to be a hole is not read. A manifest that was changed or cut off judges nothing. What is
    /// behind the end that the manifest knows is not looked at. With --cache none, what the medium holds is read, not what the
    /// page cache does. TARGET must not be in use by somebody who writes to it.
    #[command(after_help = after_help_with(VERIFY_EXAMPLES, &verify::EXIT_CODES))]
    Verify(VerifyArguments),
    /// Measure how fast this machine copies
    ///
    /// Copies a file of SIZE made for it in DIR, or SRC to DST, several times, each from the start of a job until the copy is
    /// durable, and prints time, throughput, processor time, how long requests took and memory of each, and medians (of the
    /// slowest request and of memory, the worst). Through the page cache, SRC is likely to be in it. Where a file system lets
    /// files share their blocks, nothing may be copied at all.
    #[command(after_help = after_help(BENCH_EXAMPLES))]
    Bench(BenchArguments),
    /// Serve QMP; takes the options of qemu-storage-daemon
    #[command(disable_help_flag = true, override_help = HELP)]
    Daemon {
        /// The daemon's own options.
        // They act in order, so they are read by hand.
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        options: Vec<OsString>,
    },
    /// Speak QMP with a running daemon, Blockyard's or QEMU's
    ///
    /// With a COMMAND, carries it out and prints what it returns. Without one, reads commands line by line from standard
    /// input: a command with its arguments, or a QMP message in JSON. On a terminal, events are shown as they come.
    Qmp(QmpArguments),
    /// Show the jobs of a running daemon, or give one of them an order
    ///
    /// Without an order, prints a table of all jobs. With --watch, shows their progress until all of them have ended, and
    /// fails if one of them did.
    Jobs(JobsArguments),
}

/// Reads the command line, the program's name first.
///
/// # Errors
/// How to exit when there is nothing to run: help, the version or what is wrong has been printed.
pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, Exit> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let is_image_command = |name: &OsString| IMAGE_COMMANDS.iter().any(|command| name == command);
    let usage = match arguments.get(1).is_some_and(is_image_command) {
        true => Exit::Failed,
        false => Exit::Usage,
    };
    let parsed = Arguments::try_parse_from(arguments);
    parsed.map(|arguments| arguments.command).map_err(|error| {
        // There is nowhere left to complain when this cannot be printed.
        let _ = error.print();
        match error.use_stderr() {
            true => usage,
            false => Exit::Success,
        }
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
