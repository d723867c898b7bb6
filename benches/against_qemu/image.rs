//! Images, made and judged by QEMU's own tools.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use rustix::fs::{Advice, fadvise};
use serde_json::{Value, json};

use crate::Failure;
use crate::load::Sequence;
use crate::options::Contestant;
use crate::process::{run, run_with_input};

/// Cluster of the images that are made here, in bytes: the default.
pub(crate) const CLUSTER_BYTES: u64 = 64 << 10;

/// A format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Raw data.
    Raw,
    /// qcow2 version 3 with clusters of 64 KiB.
    Qcow2,
}

impl Format {
    /// Its name, as both QEMU and blockyard know it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// An image in a file.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// Where.
    pub(crate) path: PathBuf,
    /// As what it is opened.
    pub(crate) format: Format,
}

/// Bytes of an image: offset and length.
pub(crate) type Piece = (u64, u64);

/// An image from end to end in runs of one to 32 clusters, in mixed order: what a disk looks like that a guest has filled
/// file by file.
pub(crate) fn runs_in_mixed_order(size_bytes: u64) -> Vec<Piece> {
    let mut order = Sequence::new(11);
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < size_bytes {
        let length = (1 + order.below(32) as u64) * CLUSTER_BYTES;
        let length = length.min(size_bytes - at);
        pieces.push((at, length));
        at += length;
    }
    mix(pieces, &mut order)
}

/// Pieces of 1 MiB at equal distances, in mixed order.
pub(crate) fn spread_in_mixed_order(size_bytes: u64, pieces: u64) -> Vec<Piece> {
    let pieces = (0..pieces)
        .map(|index| (size_bytes / pieces * index, 1 << 20))
        .collect();
    mix(pieces, &mut Sequence::new(11))
}

fn mix(mut pieces: Vec<Piece>, order: &mut Sequence) -> Vec<Piece> {
    for last in (1..pieces.len()).rev() {
        pieces.swap(last, order.below(last + 1));
    }
    pieces
}

impl Image {
    /// Makes (or replaces) an empty image of this length with these options of its format.
    ///
    /// # Errors
    /// What qemu-img says.
    pub(crate) fn create(&self, size_bytes: u64, options: &[&str]) -> Result<(), Failure> {
        if self.path.exists() {
            fs::remove_file(&self.path).map_err(|error| Failure::at(&self.path, &error))?;
        }
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", self.format.name()]);
        for option in options {
            command.args(["-o", option]);
        }
        run(command.arg(&self.path).arg(size_bytes.to_string())).map(|_| ())
    }

    /// Makes it an image with the content of `content`, whose clusters lie in the file in the order of `pieces`: they are
    /// written in that order, then over again with their content. What no piece names has to be zeroes.
    ///
    /// # Errors
    /// What QEMU's tools say; also if the result is not the same or not sound.
    pub(crate) fn create_in_order(
        &self,
        size_bytes: u64,
        content: &Image,
        pieces: &[Piece],
    ) -> Result<(), Failure> {
        self.create(size_bytes, &[])?;
        let mut script = String::new();
        for (offset, length) in pieces {
            let _ = writeln!(script, "write -q -P 85 {offset} {length}");
        }
        let mut allocate = Command::new("qemu-io");
        allocate
            .args(["-n", "-f", self.format.name()])
            .arg(&self.path);
        run_with_input(&mut allocate, &script)?;
        let mut fill = Command::new("qemu-img");
        fill.args([
            "convert",
            "-n",
            "--target-is-zero",
            "-f",
            content.format.name(),
        ])
        .args(["-O", self.format.name()]);
        run(fill.arg(&content.path).arg(&self.path))?;
        self.require_equal(content)?;
        self.require_sound()
    }

    /// Fails unless every byte is as in the other one.
    ///
    /// # Errors
    /// As qemu-img words them.
    pub(crate) fn require_equal(&self, other: &Image) -> Result<(), Failure> {
        let mut command = Command::new("qemu-img");
        command.args([
            "compare",
            "-f",
            other.format.name(),
            "-F",
            self.format.name(),
        ]);
        let compared = run(command.arg(&other.path).arg(&self.path));
        compared
            .map(|_| ())
            .map_err(|error| error.about(&format!("{} differs", self.path.display())))
    }

    /// Fails if anything is wrong with its metadata, leaks included.
    ///
    /// # Errors
    /// As qemu-img words them.
    pub(crate) fn require_sound(&self) -> Result<(), Failure> {
        if self.format == Format::Raw {
            return Ok(());
        }
        let mut command = Command::new("qemu-img");
        command.args(["check", "-q", "-f", self.format.name()]);
        run(command.arg(&self.path)).map(|_| ())
    }

    /// Makes it durable and takes its pages out of the page cache: direct I/O has to look there, and finds what making and
    /// comparing it have left.
    ///
    /// # Errors
    /// Those of its file.
    pub(crate) fn leave_page_cache(&self) -> Result<(), Failure> {
        let failure = |error: std::io::Error| Failure::at(&self.path, &error);
        let file = fs::File::open(&self.path).map_err(failure)?;
        file.sync_all().map_err(failure)?;
        fadvise(&file, 0, None, Advice::DontNeed).map_err(|error| failure(error.into()))
    }

    /// The `blockdev-add` arguments that open it.
    pub(crate) fn node(
        &self,
        name: &str,
        contestant: &Contestant,
        direct: bool,
        read_only: bool,
    ) -> Value {
        let mut file =
            json!({"driver": "file", "filename": self.path, "cache": {"direct": direct}});
        if let Some(aio) = &contestant.aio {
            file["aio"] = json!(aio);
        }
        json!({"driver": self.format.name(), "node-name": name, "read-only": read_only,
            "cache": {"direct": direct}, "file": file})
    }
}
