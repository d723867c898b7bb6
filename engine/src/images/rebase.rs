//! An image is put on another backing file: what it shows stays, because it first gets what would show differently.
//!
//! ```text
//!   room for all that may differ? -> what the image holds nothing of: both chains compared -> differences written -> sync
//!     -> header; sync
//! ```
//! Only where there may be too little room both chains are compared twice, first to count what differs.
//! Until the header is written the image reads as before through the old chain, and with its first sector as before through the
//! new one.

use std::pin::Pin;
use std::rc::Rc;

use blockyard_images::pace::Unwatched;
use blockyard_images::qcow2::amend::AmendOptions;
use blockyard_storage::error::errno_text;
use blockyard_storage::{Buffer, ByteRange};
use futures_util::future::try_join;
use futures_util::stream::{FuturesOrdered, StreamExt};

use crate::error::{EngineError, NodeError};
use crate::images::cancelled;
use crate::images::plan::{Moved, Room, TargetForm};
use crate::images::watcher::ImageWatcher;
use crate::limits::{COPY_CHUNK_BYTES, SECTOR_BYTES, STATUS_EXTENTS_MAX};
use crate::node::chain::{Content, chain_status};
use crate::node::zeroes::is_zero;
use crate::node::{AmendStop, Fill, Node};
use crate::reply::RoomView;

/// Pieces in flight; each takes twice its length in memory.
const PIECES_MAX: usize = 8;

/// The new backing file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RebaseSpec {
    /// Name of the node that shows it; `None`: there is none, or it is not to be looked at.
    pub backing: Option<String>,
    /// Its name as the header is to say it; empty: none.
    pub backing_file: String,
    /// Its format.
    pub backing_format: Option<String>,
    /// Whether the image is to show what it shows now. Else only its header changes.
    pub keeps_content: bool,
    /// Whether to find out only what would be written.
    pub dry_run: bool,
    /// Whether to begin although its file system has too little room for what may be needed.
    pub force: bool,
}

/// What the image got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RebaseView {
    /// Bytes of data.
    pub copied_bytes: u64,
    /// Bytes that were made zeroes.
    pub zeroed_bytes: u64,
    /// Whether it is on its new backing file now.
    pub is_done: bool,
    /// What the image takes for it. Nothing unless that was to be found out, or is too much.
    pub room: RoomView,
}

/// How far a rebase goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// To what may differ, which takes no reading.
    Bound,
    /// To what differs.
    Count,
    /// To the end.
    Write,
}

/// Puts the image on `node` on another backing file. Nobody else uses it. It is durable when this returns; after an error the
/// header is the old one, and the image shows what it showed.
///
/// # Errors
/// In the words of qemu-img where it has some.
pub(super) async fn run(
    node: Rc<dyn Node>,
    new: Option<Rc<dyn Node>>,
    spec: RebaseSpec,
    watcher: &ImageWatcher,
) -> Result<RebaseView, EngineError> {
    let mut view = RebaseView::default();
    if spec.keeps_content {
        let rebase = Rebase::new(node.clone(), new, Pass::Write);
        view = rebase.run(None, watcher).await?;
    }
    node.flush()
        .await
        .map_err(|error| failed("flush the image", &error))?;
    if watcher.is_cancelled() {
        return Err(cancelled());
    }
    let options = AmendOptions {
        backing_format: spec
            .backing_format
            .filter(|_| !spec.backing_file.is_empty())
            .map(String::into_bytes),
        backing_name: Some(spec.backing_file.clone().into_bytes()),
        ..AmendOptions::default()
    };
    let amended = node.amend(&options, &Unwatched).await;
    amended.map_err(|stop| {
        let reason = match stop {
            AmendStop::Cancelled => "Operation canceled".to_owned(),
            AmendStop::Failed(error) => errno_text(error.errno()),
            AmendStop::Refused(text) => text,
        };
        let name = &spec.backing_file;
        EngineError::generic(format!(
            "Could not change the backing file to '{name}': {reason}"
        ))
    })?;
    view.is_done = true;
    Ok(view)
}

/// Finds out what [`run`] would write, and what room that takes at most; [`Pass::Bound`]: no more than that.
///
/// # Errors
/// As of [`run`].
pub(crate) async fn plan(
    node: Rc<dyn Node>,
    new: Option<Rc<dyn Node>>,
    form: TargetForm,
    pass: Pass,
    watcher: &ImageWatcher,
) -> Result<Moved, EngineError> {
    let mut room = Room::new(&node, form);
    let rebase = Rebase::new(node.clone(), new, pass);
    let view = rebase.run(Some(&mut room), watcher).await?;
    Ok(Moved {
        copy_bytes: view.copied_bytes,
        zero_bytes: view.zeroed_bytes,
        room: room.finish(),
    })
}

struct Rebase {
    image: Rc<dyn Node>,
    old: Option<Rc<dyn Node>>,
    new: Option<Rc<dyn Node>>,
    /// What the image takes in as a whole, in bytes.
    unit_bytes: u64,
    pass: Pass,
}

type Piece<'a> = Pin<Box<dyn Future<Output = Result<Vec<Run>, EngineError>> + 'a>>;

impl Rebase {
    fn new(image: Rc<dyn Node>, new: Option<Rc<dyn Node>>, pass: Pass) -> Self {
        let cluster_bytes = image.facts().cluster_size_bytes.map(u64::from);
        Self {
            old: image.backing(),
            image,
            new,
            unit_bytes: cluster_bytes.unwrap_or(SECTOR_BYTES).max(SECTOR_BYTES),
            pass,
        }
    }

    async fn run(
        &self,
        mut room: Option<&mut Room<'_>>,
        watcher: &ImageWatcher,
    ) -> Result<RebaseView, EngineError> {
        let length_bytes = self.image.facts().length_bytes;
        let mut view = RebaseView::default();
        // In the order of the disk, in which room is counted.
        let mut in_flight = FuturesOrdered::<Piece<'_>>::new();
        let mut rest = ByteRange::new(0, length_bytes);
        while !rest.is_empty() {
            let held = self.image.status(rest, STATUS_EXTENTS_MAX).await;
            let extents = held.map_err(|error| failed("read the image's metadata", &error))?;
            let mut known_to = rest.offset();
            for extent in extents {
                known_to = extent.range.end();
                if extent.allocated {
                    continue;
                }
                let mut gap = extent.range.intersection(&rest);
                while !gap.is_empty() {
                    if watcher.is_cancelled() {
                        return Err(cancelled());
                    }
                    watcher.set_progress(gap.offset(), length_bytes);
                    let (front, may_differ) = self.front(gap).await?;
                    gap = ByteRange::between(front.end(), gap.end());
                    if !may_differ {
                        continue;
                    }
                    while in_flight.len() >= PIECES_MAX
                        && let Some(done) = in_flight.next().await
                    {
                        view.add(done?, room.as_deref_mut()).await;
                    }
                    in_flight.push_back(Box::pin(self.carry_over(front)));
                }
            }
            if known_to <= rest.offset() {
                return Err(EngineError::generic("Internal error: no answer (bug)"));
            }
            rest = ByteRange::between(known_to, rest.end());
        }
        while let Some(done) = in_flight.next().await {
            view.add(done?, room.as_deref_mut()).await;
        }
        Ok(view)
    }

    /// The front of what the image holds nothing of, in whole units, and whether old and new may differ there.
    async fn front(&self, gap: ByteRange) -> Result<(ByteRange, bool), EngineError> {
        let mut zero_to = gap.end();
        let mut are_zero = true;
        for chain in [&self.old, &self.new].into_iter().flatten() {
            // Only the first is needed.
            let told = chain_status(chain, None, gap, 1).await;
            let told = told.map_err(|error| failed("look at a backing file", &error))?;
            match told.first() {
                Some(first) if first.content == Content::Zero => {
                    zero_to = zero_to.min(first.range.end());
                }
                _ => are_zero = false,
            }
        }
        if are_zero {
            // What is not all zeroes begins with the unit that it is in.
            let whole_to = zero_to - zero_to % self.unit_bytes;
            let to = if zero_to == gap.end() {
                zero_to
            } else {
                whole_to
            };
            if to > gap.offset() {
                return Ok((ByteRange::between(gap.offset(), to), false));
            }
        }
        let piece_bytes = COPY_CHUNK_BYTES.max(self.unit_bytes);
        let to = (gap.offset() / piece_bytes)
            .saturating_add(1)
            .saturating_mul(piece_bytes);
        Ok((ByteRange::between(gap.offset(), to.min(gap.end())), true))
    }

    /// Lets the image hold what differs in one piece. What that is, in ascending order.
    async fn carry_over(&self, piece: ByteRange) -> Result<Vec<Run>, EngineError> {
        if self.pass == Pass::Bound {
            let (range, zero) = (piece, false);
            return Ok(vec![Run { range, zero }]);
        }
        let both = try_join(read(&self.old, piece), read(&self.new, piece));
        let (old, new) = both
            .await
            .map_err(|error| failed("read a backing file", &error))?;
        let runs = differences(
            old.as_slice(),
            new.as_slice(),
            piece.offset(),
            self.unit_bytes,
        );
        if self.pass != Pass::Write {
            return Ok(runs);
        }
        // Zeroes first: what is data may need the rest of a unit as it is.
        let (zeroes, data): (Vec<&Run>, Vec<&Run>) = runs.iter().partition(|run| run.zero);
        for run in zeroes.into_iter().chain(data) {
            let bytes = run.range.length();
            let from = run.range.offset() - piece.offset();
            let done = match run.zero {
                true => self.image.fill(run.range, Fill::Zeroes, None).await,
                false => {
                    self.write(run.range, part(old.as_slice(), from, bytes))
                        .await
                }
            };
            done.map_err(|error| failed("write to the image", &error))?;
        }
        Ok(runs)
    }

    async fn write(&self, range: ByteRange, bytes: &[u8]) -> Result<(), NodeError> {
        let mut buffer = Buffer::zeroed(bytes.len());
        buffer.as_mut_slice().copy_from_slice(bytes);
        self.image.write(range.offset(), buffer).await.outcome
    }
}

impl RebaseView {
    async fn add(&mut self, runs: Vec<Run>, mut room: Option<&mut Room<'_>>) {
        for Run { range, zero } in runs {
            let sum = match zero {
                true => &mut self.zeroed_bytes,
                false => &mut self.copied_bytes,
            };
            *sum = sum.saturating_add(range.length());
            match (&mut room, zero) {
                (Some(room), true) => room.zeroed(range).await,
                (Some(room), false) => room.written(range).await,
                (None, _) => {}
            }
        }
    }
}

/// A run of units that the image has to hold itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    range: ByteRange,
    /// All of it reads as zeroes.
    zero: bool,
}

/// Where the two differ, in whole units of the disk.
fn differences(old: &[u8], new: &[u8], offset: u64, unit_bytes: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut rest = ByteRange::new(offset, old.len() as u64);
    while !rest.is_empty() {
        let unit_end = (rest.offset() / unit_bytes)
            .saturating_add(1)
            .saturating_mul(unit_bytes);
        let (unit, after) = rest.split_at(unit_end.saturating_sub(rest.offset()));
        rest = after;
        let from = unit.offset() - offset;
        let (was, is) = (
            part(old, from, unit.length()),
            part(new, from, unit.length()),
        );
        if was == is {
            continue;
        }
        let zero = is_zero(was);
        match runs.last_mut() {
            Some(last) if last.zero == zero && last.range.end() == unit.offset() => {
                last.range = ByteRange::between(last.range.offset(), unit.end());
            }
            _ => runs.push(Run { range: unit, zero }),
        }
    }
    runs
}

fn part(bytes: &[u8], from: u64, length: u64) -> &[u8] {
    let from = usize::try_from(from).unwrap_or(usize::MAX);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    bytes
        .get(from..from.saturating_add(length))
        .unwrap_or_default()
}

/// Reads a piece of a disk; what is behind its end, and where there is none, reads as zeroes.
async fn read(node: &Option<Rc<dyn Node>>, piece: ByteRange) -> Result<Buffer, NodeError> {
    let length = usize::try_from(piece.length()).unwrap_or(usize::MAX);
    let mut whole = Buffer::zeroed(length);
    let Some(node) = node else { return Ok(whole) };
    let inside = piece.clamp_end(node.facts().length_bytes);
    if inside.is_empty() {
        return Ok(whole);
    }
    if inside == piece {
        let read = node.read(piece.offset(), whole).await;
        return read.outcome.map(|()| read.buffer);
    }
    let shorter = usize::try_from(inside.length()).unwrap_or(usize::MAX);
    let read = node.read(inside.offset(), Buffer::zeroed(shorter)).await;
    read.outcome?;
    if let Some(front) = whole.as_mut_slice().get_mut(..shorter) {
        front.copy_from_slice(read.buffer.as_slice());
    }
    Ok(whole)
}

fn failed(what: &str, error: &NodeError) -> EngineError {
    EngineError::generic(format!("Could not {what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_whole_units_of_the_disk_and_zeroes_are_told_apart() {
        let old = [0, 0, 1, 0, 0, 0, 0, 5, 5, 0, 0];
        let new = [0, 0, 1, 0, 0, 7, 0, 5, 0, 0, 1];
        // Units of four bytes, the first piece begins inside of one.
        let runs = differences(&old, &new, 2, 4);
        let run = |offset, length, zero| Run {
            range: ByteRange::new(offset, length),
            zero,
        };
        // The last one is zeroes that were shorter than a unit.
        assert_eq!(runs, [run(4, 8, false), run(12, 1, true)]);
    }

    #[test]
    fn equal_bytes_need_nothing() {
        assert_eq!(differences(&[3; 9], &[3; 9], 7, 4), []);
        assert_eq!(differences(&[], &[], 7, 4), []);
    }
}
