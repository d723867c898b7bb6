//! The commands for people and scripts: what they are asked, how they show progress, how they end.

pub(crate) mod bench;
pub(crate) mod check;
pub(crate) mod copy;
pub mod display;
pub(crate) mod embedded;
pub mod exit;
pub mod rate;

use std::ffi::OsString;

use clap::{Parser, Subcommand};

use crate::control::jobs::JobsArguments;
use crate::control::qmp::QmpArguments;
use crate::daemon::options::HELP;
use crate::terminal::bench::BenchArguments;
use crate::terminal::check::arguments::CheckArguments;
use crate::terminal::copy::arguments::CopyArguments;
use crate::terminal::exit::{Exit, after_help, after_help_with};
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
  blockyard check image.qcow2
  blockyard bench --directory /mnt/disk
  blockyard daemon --help
  blockyard qmp qmp.sock query-version
  blockyard jobs qmp.sock --watch";

const BACKUP_EXAMPLES: &str = "  \
  blockyard backup disk.raw backup.raw
  blockyard backup --verify --speed 100M disk.raw /mnt/backup/disk.raw
  blockyard backup --force /dev/vg/snapshot backup.raw
  blockyard backup --json disk.raw backup.raw";

const CHECK_EXAMPLES: &str = "  \
  blockyard check image.qcow2
  blockyard check --repair leaks image.qcow2
  blockyard check --repair all --json /dev/vg/image";

const BENCH_EXAMPLES: &str = "  \
  blockyard bench --directory /mnt/disk --size 4G --rounds 5
  blockyard bench --job mirror --cache writeback
  blockyard bench --json disk.raw /mnt/backup/scratch.raw";

const MIRROR_EXAMPLES: &str = "  \
  blockyard mirror disk.raw /mnt/new/disk.raw
  blockyard mirror --force disk.raw /dev/vg/disk";

/// Runs backup, mirror and other block jobs on disk images
#[derive(Debug, Parser)]
#[command(name = "blockyard", version = VERSION, after_help = after_help(EXAMPLES))]
struct Arguments {
    #[command(subcommand)]
    command: Command,
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
    #[command(after_help = after_help(BACKUP_EXAMPLES))]
    Backup(CopyArguments),
    /// Copy an image or block device to use the copy in its place
    ///
    /// Copies SRC to DST, which becomes the same byte for byte, holes included, and is durable at the end. SRC must not be in
    /// use by somebody who writes to it. `mirror` and `backup` make the same copy; where DST held something and becomes
    /// zeroes, `mirror` gives the room on DST back and `backup` keeps it. Use `mirror` to move a disk; it completes as soon
    /// as both sides are equal, because here nobody writes to SRC meanwhile.
    #[command(after_help = after_help(MIRROR_EXAMPLES))]
    Mirror(CopyArguments),
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
    // With `check`, 2 says that an image is corrupt, as with `qemu-img check`.
    let usage = match arguments.get(1) {
        Some(command) if command == "check" => Exit::Failed,
        _ => Exit::Usage,
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
