//! A disk held against a checksum manifest: many pieces at once, and nothing read where zeroes are told of and known to be.
//!
//! The manifest is read twice: first as a whole, so that no disk is judged by one that is damaged.

use std::cell::RefCell;
use std::rc::Rc;

use blockyard_storage::error::errno_text;
use blockyard_storage::{Buffer, ByteRange};
use futures_util::stream::{FuturesOrdered, StreamExt};

use crate::data::CpuPool;
use crate::error::{EngineError, NodeError};
use crate::images::cancelled;
use crate::images::watcher::{ImageEvent, ImageWatcher};
use crate::limits::{COPY_CHUNK_BYTES, STATUS_EXTENTS_MAX};
use crate::manifest::EXTENT_BYTES;
use crate::manifest::lines::Lines;
use crate::manifest::sums::ExtentSum;
use crate::manifest::text::{Record, digest_of};
use crate::node::Node;
use crate::node::chain::{Content, chain_status};
use crate::node::zeroes::is_zero;

/// Pieces that are compared at once; each takes [`COPY_CHUNK_BYTES`].
const PIECES_MAX: usize = 8;

/// Zeroes of one line that are looked at before progress is told.
const ZEROES_BYTES: u64 = 64 << 30;

/// How a disk is verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifySpec {
    /// Name of the node with the manifest.
    pub manifest: String,
}

/// What a verification came to. What differs has been told as it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyView {
    /// Length of the disk that the manifest tells of, in bytes.
    pub manifest_bytes: u64,
    /// Length of the disk, in bytes. What is behind the end of the other one is not looked at.
    pub disk_bytes: u64,
    /// Bytes that have been told to differ, in whole extents, with what is missing at the end of a shorter disk.
    pub differing_bytes: u64,
}

/// Holds the disk on `node` against the manifest on `manifest`.
///
/// # Errors
/// When the manifest is none, or damaged; when something cannot be read; when it was cancelled.
pub(super) async fn run(
    node: Rc<dyn Node>,
    manifest: Rc<dyn Node>,
    cpu: CpuPool,
    watcher: &ImageWatcher,
) -> Result<VerifyView, EngineError> {
    let mut whole = Lines::of(Rc::clone(&manifest));
    while let Some(record) = whole.next().await? {
        let _ = record;
        check_cancelled(watcher)?;
    }
    let manifest_bytes = whole.length_bytes();
    whole.finish()?;

    let disk_bytes = node.facts().length_bytes;
    let mut verification = Verification {
        node: &node,
        cpu,
        watcher,
        total_bytes: manifest_bytes,
        done_bytes: 0,
        in_flight: FuturesOrdered::new(),
        told: ByteRange::default(),
        differing_bytes: 0,
    };
    let mut lines = Lines::of(manifest);
    while let Some(record) = lines.next().await? {
        check_cancelled(watcher)?;
        verification.take(record, disk_bytes).await?;
    }
    lines.finish()?;
    verification.finish().await?;
    let differing_bytes = verification.differing_bytes;
    Ok(VerifyView {
        manifest_bytes,
        disk_bytes,
        differing_bytes,
    })
}

pub(super) fn check_cancelled(watcher: &ImageWatcher) -> Result<(), EngineError> {
    match watcher.is_cancelled() {
        true => Err(cancelled()),
        false => Ok(()),
    }
}

/// What of a piece differs.
type Found = Result<(u64, Vec<ByteRange>), EngineError>;
type Piece<'a> = std::pin::Pin<Box<dyn Future<Output = Found> + 'a>>;

struct Verification<'a> {
    node: &'a Rc<dyn Node>,
    cpu: CpuPool,
    watcher: &'a ImageWatcher,
    total_bytes: u64,
    done_bytes: u64,
    /// In the order of the disk, so that differences are told in that.
    in_flight: FuturesOrdered<Piece<'a>>,
    /// A run of extents that differ, which may go on.
    told: ByteRange,
    differing_bytes: u64,
}

impl<'a> Verification<'a> {
    /// Begins with what a line says; waits where much is in flight.
    async fn take(&mut self, record: Record, disk_bytes: u64) -> Result<(), EngineError> {
        let range = record.range();
        // An extent that the end of the disk cuts is missing as a whole.
        let there = match range.end() <= disk_bytes {
            true => range,
            false => range.clamp_end(disk_bytes - disk_bytes % EXTENT_BYTES),
        };
        let node = self.node;
        match record {
            Record::Zero(_) => {
                for piece in there.pieces(ZEROES_BYTES) {
                    self.push(Box::pin(not_zero(node, piece))).await?;
                    check_cancelled(self.watcher)?;
                }
            }
            Record::Data(data) if !there.is_empty() => {
                let digest = (there == range).then_some(data.digest);
                let cpu = self.cpu.clone();
                self.push(Box::pin(differing(node, there, data.crc32, digest, cpu)))
                    .await?;
            }
            Record::Data(_) => {}
        }
        let missing = ByteRange::between(there.end().max(range.offset()), range.end());
        if !missing.is_empty() {
            let lost = std::future::ready(Ok((missing.end(), vec![missing])));
            self.push(Box::pin(lost)).await?;
        }
        Ok(())
    }

    async fn push(&mut self, piece: Piece<'a>) -> Result<(), EngineError> {
        self.in_flight.push_back(piece);
        if self.in_flight.len() >= PIECES_MAX {
            self.end_one().await?;
        }
        Ok(())
    }

    async fn end_one(&mut self) -> Result<bool, EngineError> {
        let Some(ended) = self.in_flight.next().await else {
            return Ok(false);
        };
        let (end, found) = ended?;
        for run in found {
            self.differing_bytes += run.length();
            if !self.told.is_empty() && self.told.end() == run.offset() {
                self.told = ByteRange::between(self.told.offset(), run.end());
            } else {
                self.tell().await;
                self.told = run;
            }
        }
        self.done_bytes = self.done_bytes.max(end);
        self.watcher.set_progress(self.done_bytes, self.total_bytes);
        Ok(true)
    }

    /// Tells of a run that goes no further.
    async fn tell(&mut self) {
        let run = std::mem::take(&mut self.told);
        if !run.is_empty() {
            self.watcher.tell(ImageEvent::Differs(run)).await;
        }
    }

    async fn finish(&mut self) -> Result<(), EngineError> {
        while self.end_one().await? {
            check_cancelled(self.watcher)?;
        }
        self.tell().await;
        Ok(())
    }
}

/// Extents that are not what their line says. The digest is that of all of them, if they are all of the line.
async fn differing(
    node: &Rc<dyn Node>,
    range: ByteRange,
    crc32: Vec<u32>,
    digest: Option<[u8; 32]>,
    cpu: CpuPool,
) -> Found {
    // Where all of it is known to be zeroes none of it is what it was.
    if is_known_zero(node, range).await {
        return Ok((range.end(), vec![range]));
    }
    let buffer = read(node, range).await?;
    let work = cpu.run(move |_| {
        let extents = buffer.as_slice().chunks(EXTENT_BYTES as usize);
        extents.map(|extent| ExtentSum::of(extent, true)).collect()
    });
    let sums: Vec<ExtentSum> = work
        .await
        .ok_or_else(|| EngineError::generic("Internal error: no checksums (bug)"))?;
    let places = range.pieces(EXTENT_BYTES).zip(sums.iter().zip(&crc32));
    let found: Vec<ByteRange> = places
        .filter(|(_, (sum, crc32))| sum.crc32 != **crc32)
        .map(|(extent, _)| extent)
        .collect();
    match found.is_empty() && digest.is_some_and(|digest| digest_of(&sums) != digest) {
        // Nobody can tell which of them it is.
        true => Ok((range.end(), vec![range])),
        false => Ok((range.end(), found)),
    }
}

/// Whether all of a range is zeroes, without reading.
pub(super) async fn is_known_zero(node: &Rc<dyn Node>, range: ByteRange) -> bool {
    let told = chain_status(node, None, range, 1).await.unwrap_or_default();
    told.first()
        .is_some_and(|extent| extent.content != Content::Data && extent.range.contains(&range))
}

/// Extents of a range that are not all zeroes.
async fn not_zero(node: &Rc<dyn Node>, range: ByteRange) -> Found {
    let (mut rest, found) = (range, RefCell::new(Vec::new()));
    while !rest.is_empty() {
        let told = chain_status(node, None, rest, STATUS_EXTENTS_MAX).await;
        let told = told.map_err(|error| unreadable("find out what is there", rest, &error))?;
        let mut covered = rest.offset();
        for extent in told {
            if extent.content == Content::Data {
                look_for_data(node, extent.range, range, &found).await?;
            }
            covered = extent.range.end();
        }
        if covered <= rest.offset() {
            let (piece, _) = rest.split_at(COPY_CHUNK_BYTES);
            look_for_data(node, piece, range, &found).await?;
            covered = piece.end();
        }
        rest = ByteRange::between(covered, rest.end());
    }
    Ok((range.end(), found.into_inner()))
}

/// Adds the extents of `part` that hold something, once.
async fn look_for_data(
    node: &Rc<dyn Node>,
    part: ByteRange,
    within: ByteRange,
    found: &RefCell<Vec<ByteRange>>,
) -> Result<(), EngineError> {
    // What a file system calls data may begin and end within an extent.
    let whole = part.align_outward(EXTENT_BYTES).intersection(&within);
    for piece in whole.pieces(COPY_CHUNK_BYTES) {
        let buffer = read(node, piece).await?;
        let extents = piece.pieces(EXTENT_BYTES);
        let parts = buffer.as_slice().chunks(EXTENT_BYTES as usize);
        let mut found = found.borrow_mut();
        for (extent, _) in extents.zip(parts).filter(|(_, bytes)| !is_zero(bytes)) {
            match found.last_mut() {
                Some(run) if extent.end() <= run.end() => {}
                Some(run) if extent.offset() == run.end() => {
                    *run = ByteRange::between(run.offset(), extent.end());
                }
                _ => found.push(extent),
            }
        }
    }
    Ok(())
}

/// The bytes of a range.
pub(super) async fn read(node: &Rc<dyn Node>, range: ByteRange) -> Result<Buffer, EngineError> {
    // No longer than COPY_CHUNK_BYTES.
    let buffer = Buffer::zeroed(usize::try_from(range.length()).unwrap_or(usize::MAX));
    let read = node.read(range.offset(), buffer).await;
    match read.outcome {
        Ok(()) => Ok(read.buffer),
        Err(error) => Err(unreadable("read", range, &error)),
    }
}

fn unreadable(what: &str, range: ByteRange, error: &NodeError) -> EngineError {
    EngineError::generic(format!(
        "Could not {what} at offset {}: {}",
        range.offset(),
        errno_text(error.errno())
    ))
}

#[cfg(test)]
#[path = "verify_tests.rs"]
pub(crate) mod tests;
