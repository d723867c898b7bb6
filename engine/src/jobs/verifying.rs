//! [`Verification`]: reads back what a copier has written, and compares it with what was read from the source.
//!
//! The target has been flushed before. What the page cache holds of a raw target is let go first, so that the file system has to
//! ask the medium again; of other targets, what was in memory may be what is compared.

use std::num::NonZeroU64;
use std::rc::Rc;

use blockyard_storage::{ByteRange, LocalFuture};
use futures_util::stream::{FuturesUnordered, StreamExt};
use rustix::fs::{Advice, fadvise};

use crate::error::{JobError, NodeError};
use crate::job::context::JobContext;
use crate::job::work::Stop;
use crate::limits::STATUS_EXTENTS_MAX;
use crate::manifest::unverified::Expected;
use crate::manifest::{EXTENT_BYTES, Recorder};
use crate::node::Node;
use crate::node::chain::{Content, chain_status};
use crate::node::mirror_top::Tracker;
use crate::node::turns::Doing;
use crate::node::zeroes::is_zero;

/// Parts that are read back at once.
const WINDOW: usize = 8;

/// Differences that are told; after more it ends.
const TOLD_MAX: usize = 8;

/// Bytes of what should be zeroes and is not known to be that are read at once.
const ZEROES_READ_BYTES: u64 = 1 << 20;

/// Runs of extents that differ, in the order of the disk.
#[derive(Debug, Default)]
struct Differences(Vec<ByteRange>);

impl Differences {
    fn add(&mut self, range: ByteRange) {
        self.0.push(range);
        self.0.sort_by_key(ByteRange::offset);
        self.0.dedup_by(|next, run| {
            let follows = next.offset() <= run.end();
            if follows {
                *run = ByteRange::between(run.offset(), run.end().max(next.end()));
            }
            follows
        });
    }

    /// What is told of them.
    fn error(&self, target: String) -> Option<JobError> {
        let first = self.0.first()?;
        let told: Vec<String> = self
            .0
            .iter()
            .take(TOLD_MAX)
            .map(|run| format!("{} bytes at {}", run.length(), run.offset()))
            .collect();
        let more = match self.0.len() > TOLD_MAX {
            true => " and more",
            false => "",
        };
        let text = "The target does not hold what was read from the source";
        Some(JobError {
            node: Some(target),
            range: Some(*first),
            ..JobError::text(format!("{text}: {}{more}", told.join(", ")))
        })
    }
}

/// One pass over what was not read back yet.
pub(super) struct Verification<'a> {
    pub(super) recorder: &'a Recorder,
    pub(super) target: &'a Rc<dyn Node>,
    /// Who knows what is written meanwhile.
    pub(super) tracker: Option<&'a Tracker>,
    pub(super) cx: &'a JobContext,
    /// Writers wait: neither a pause nor a limit is waited for.
    pub(super) holds_writers: bool,
}

impl Verification<'_> {
    /// Reads everything back; `false`: it stopped before, as writers wait. When it returns nothing is in flight.
    ///
    /// # Errors
    /// [`Stop::Cancelled`] after a forced cancel; what differs, or cannot be read.
    pub(super) async fn run(&self) -> Result<bool, Stop> {
        let (mut from, mut differences) = (0, Differences::default());
        let mut failed = None;
        let mut window = FuturesUnordered::new();
        loop {
            let stopping = |failed: &Option<NodeError>, differences: &Differences| {
                failed.is_some() || differences.0.len() > TOLD_MAX || self.cx.must_stop()
            };
            while window.len() < WINDOW && !stopping(&failed, &differences) {
                let Some(range) = self.next_from(from) else {
                    break;
                };
                self.pace(range).await;
                from = range.end();
                self.cx.progress().increase_remaining(range.length());
                window.push(self.check(range));
            }
            match window.next().await {
                Some((range, outcome)) => {
                    self.cx.progress().done(range.length());
                    match outcome {
                        Ok(found) => found.into_iter().for_each(|run| differences.add(run)),
                        Err(error) => failed = failed.or(Some(error)),
                    }
                }
                None => {
                    if let Some(error) = differences.error(self.target.name()) {
                        return Err(Stop::Failed(error));
                    }
                    if let Some(error) = failed {
                        return Err(Stop::Failed(JobError::from(error)));
                    }
                    // A pause may have come and gone.
                    if !self.cx.must_stop() && self.next_from(from).is_none() {
                        return Ok(true);
                    }
                    if self.cx.must_stop() && self.holds_writers {
                        return Ok(false);
                    }
                    self.cx.checkpoint().await?;
                }
            }
        }
    }

    fn next_from(&self, from: u64) -> Option<ByteRange> {
        self.recorder.unverified()?.borrow().next_from(from)
    }

    /// Keeps to the job's limit.
    async fn pace(&self, range: ByteRange) {
        while !self.holds_writers
            && !self.cx.must_stop()
            && let Some(moment) = self.cx.held_until()
        {
            self.cx.rest_until(moment).await;
        }
        if range.length() <= ZEROES_READ_BYTES {
            self.cx.charge(range.length());
        }
    }

    /// What of `range` differs. It is not looked at again, but for what will be copied again.
    fn check(
        &self,
        range: ByteRange,
    ) -> LocalFuture<'_, (ByteRange, Result<Vec<ByteRange>, NodeError>)> {
        Box::pin(async move { (range, self.differing(range).await) })
    }

    async fn differing(&self, range: ByteRange) -> Result<Vec<ByteRange>, NodeError> {
        // Nobody writes to the target there meanwhile.
        let turn = self.tracker.map(|tracker| tracker.turn(range, Doing::Copy));
        if let Some(turn) = &turn {
            turn.come().await;
        }
        let mut differing = Vec::new();
        let Some(unverified) = self.recorder.unverified() else {
            return Ok(differing);
        };
        let expected = unverified.borrow().expected(range);
        let mut run: (ByteRange, Vec<u32>) = Default::default();
        for (part, what) in expected {
            if self.tracker.is_some_and(|tracker| tracker.is_dirty(part)) {
                continue;
            }
            match what {
                Expected::Zeroes => differing.extend(self.not_zero(part).await?),
                Expected::Data(crc32) if run.0.end() == part.offset() && !run.1.is_empty() => {
                    run.0 = ByteRange::between(run.0.offset(), part.end());
                    run.1.push(crc32);
                }
                Expected::Data(crc32) => {
                    let (whole, sums) = std::mem::replace(&mut run, (part, vec![crc32]));
                    differing.extend(self.not_equal(whole, sums).await?);
                }
            }
        }
        let (whole, sums) = run;
        differing.extend(self.not_equal(whole, sums).await?);
        unverified.borrow_mut().forget(range);
        Ok(differing)
    }

    /// Extents of `run` whose checksums are others.
    async fn not_equal(&self, run: ByteRange, sums: Vec<u32>) -> Result<Vec<ByteRange>, NodeError> {
        if sums.is_empty() {
            return Ok(Vec::new());
        }
        let buffer = self.read(run).await?;
        let extents = buffer.as_slice().chunks(EXTENT_BYTES as usize);
        let found = extents.map(crc32fast::hash);
        let places = run.pieces(EXTENT_BYTES).zip(found.zip(sums));
        let differing = places.filter(|(_, (found, sum))| found != sum);
        Ok(differing.map(|(extent, _)| extent).collect())
    }

    /// Extents of `range` that hold something.
    async fn not_zero(&self, range: ByteRange) -> Result<Vec<ByteRange>, NodeError> {
        let (mut rest, mut differing) = (range, Vec::new());
        while !rest.is_empty() {
            let asked = chain_status(self.target, None, rest, STATUS_EXTENTS_MAX).await;
            let mut covered = rest.offset();
            for extent in asked.unwrap_or_default() {
                if extent.content == Content::Data {
                    self.look_for_data(extent.range, &mut differing).await?;
                }
                covered = extent.range.end();
            }
            if covered <= rest.offset() {
                let (piece, _) = rest.split_at(ZEROES_READ_BYTES);
                self.look_for_data(piece, &mut differing).await?;
                covered = piece.end();
            }
            rest = ByteRange::between(covered, rest.end());
        }
        Ok(differing)
    }

    async fn look_for_data(
        &self,
        range: ByteRange,
        differing: &mut Vec<ByteRange>,
    ) -> Result<(), NodeError> {
        for piece in range.pieces(ZEROES_READ_BYTES) {
            let buffer = self.read(piece).await?;
            let mut at = piece.offset();
            for part in buffer.as_slice().chunks(EXTENT_BYTES as usize) {
                let extent = ByteRange::new(at, part.len() as u64);
                at = extent.end();
                if !is_zero(part) && differing.len() <= TOLD_MAX {
                    // The whole extent is what differs.
                    let whole = extent.align_outward(EXTENT_BYTES);
                    differing.push(whole.clamp_end(self.target.facts().length_bytes));
                }
            }
        }
        Ok(())
    }

    async fn read(&self, range: ByteRange) -> Result<blockyard_storage::Buffer, NodeError> {
        if let Some((file, offset)) = self.target.host_extent(range)
            && let Some(length) = NonZeroU64::new(range.length())
        {
            // It is advice only.
            let _ = fadvise(&*file, offset, Some(length), Advice::DontNeed);
        }
        let length = usize::try_from(range.length()).unwrap_or(usize::MAX);
        let buffer = self.cx.pool().take(length).await;
        let read = self.target.read(range.offset(), buffer).await;
        read.outcome.map(|()| read.buffer)
    }
}
