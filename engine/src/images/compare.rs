//! Two disks compared byte by byte, whatever their formats: many pieces at once, and nothing read where both hold zeroes.

use std::rc::Rc;

use blockyard_storage::error::errno_text;
use blockyard_storage::{Buffer, ByteRange};
use futures_util::future::join;
use futures_util::stream::{FuturesOrdered, StreamExt};

use crate::error::{EngineError, NodeError};
use crate::images::cancelled;
use crate::images::watcher::ImageWatcher;
use crate::limits::{COPY_CHUNK_BYTES, SECTOR_BYTES, STATUS_EXTENTS_MAX};
use crate::node::Node;
use crate::node::chain::{Content, chain_status};

/// Pieces that are compared at once; each takes [`COPY_CHUNK_BYTES`] on both sides.
const PIECES_MAX: usize = 8;

/// How two disks are compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompareSpec {
    /// Name of the node with the other disk.
    pub other: String,
    /// They must be equally long and hold data, zeroes and nothing in the same places, too.
    pub strict: bool,
}

/// What a comparison came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompareView {
    /// Their lengths in bytes; what is behind the end of the shorter one counts as zeroes.
    pub lengths_bytes: [u64; 2],
    /// What is different; `None`: nothing.
    pub difference: Option<Difference>,
}

/// A difference of two disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// Strictly: their lengths.
    Length,
    /// Strictly: from here on one holds something else than the other does.
    Allocation {
        /// Offset in bytes.
        offset: u64,
    },
    /// The content of the sector that begins here.
    Content {
        /// Offset in bytes.
        offset: u64,
    },
    /// One of them cannot tell what it holds, or cannot be read.
    Unreadable {
        /// Whether it is the first one.
        first: bool,
        /// Whether it was read; else asked.
        reading: bool,
        /// Offset in bytes.
        offset: u64,
        /// Why, in the system's words.
        reason: String,
    },
}

/// Compares the disk on a node with another one.
///
/// # Errors
/// When it was cancelled.
pub(super) async fn run(
    node: Rc<dyn Node>,
    other: Rc<dyn Node>,
    strict: bool,
    watcher: &ImageWatcher,
) -> Result<CompareView, EngineError> {
    let sides = [node, other];
    let [one, two] = [0, 1].map(|side: usize| length_of(&sides, side));
    let view = |difference| CompareView {
        lengths_bytes: [one, two],
        difference,
    };
    if strict && one != two {
        return Ok(view(Some(Difference::Length)));
    }
    let (common, longer) = (one.min(two), one.max(two));
    let mut comparison = Comparison {
        sides: &sides,
        strict,
        watcher,
        total_bytes: longer,
        known: [Vec::new(), Vec::new()],
        in_flight: FuturesOrdered::new(),
    };
    let both = ByteRange::new(0, common);
    let mut difference = comparison.run(both, None).await?;
    if difference.is_none() && longer > common {
        let rest = ByteRange::between(common, longer);
        difference = comparison.run(rest, Some(usize::from(two > one))).await?;
    }
    Ok(view(difference))
}

fn length_of(sides: &[Rc<dyn Node>; 2], side: usize) -> u64 {
    sides.get(side).map_or(0, |node| node.facts().length_bytes)
}

type Piece<'a> = std::pin::Pin<Box<dyn Future<Output = (u64, Option<Difference>)> + 'a>>;

struct Comparison<'a> {
    sides: &'a [Rc<dyn Node>; 2],
    strict: bool,
    watcher: &'a ImageWatcher,
    total_bytes: u64,
    /// What each side has told of the bytes ahead, the last first.
    known: [Vec<(ByteRange, Content)>; 2],
    /// In the order of the disk, so that the first difference is found first.
    in_flight: FuturesOrdered<Piece<'a>>,
}

impl<'a> Comparison<'a> {
    /// Compares a range of both sides, or of one side with zeroes.
    async fn run(
        &mut self,
        range: ByteRange,
        only: Option<usize>,
    ) -> Result<Option<Difference>, EngineError> {
        let mut rest = range;
        loop {
            if self.watcher.is_cancelled() {
                self.in_flight.clear();
                return Err(cancelled());
            }
            let mut ended = None;
            if !rest.is_empty() && self.in_flight.len() < PIECES_MAX {
                match self.next_step(rest, only).await {
                    Ok((covered, work)) => {
                        rest = ByteRange::between(covered.end(), rest.end());
                        if let Some(work) = work {
                            self.in_flight.push_back(work);
                        } else if self.in_flight.is_empty() {
                            self.watcher.set_progress(covered.end(), self.total_bytes);
                        }
                        continue;
                    }
                    Err(difference) => ended = Some(difference),
                }
            }
            // What comes before a difference may hold an earlier one.
            while let Some((end, found)) = self.in_flight.next().await {
                self.watcher.set_progress(end, self.total_bytes);
                if found.is_some() {
                    self.in_flight.clear();
                    return Ok(found);
                }
                if ended.is_none() && !rest.is_empty() {
                    break;
                }
            }
            if ended.is_some() || (rest.is_empty() && self.in_flight.is_empty()) {
                return Ok(ended);
            }
        }
    }

    /// What is to be done with the front of `rest`, and how far that reaches.
    async fn next_step(
        &mut self,
        rest: ByteRange,
        only: Option<usize>,
    ) -> Result<(ByteRange, Option<Piece<'a>>), Difference> {
        let mut covered = rest;
        let mut contents = [Content::Zero; 2];
        for (side, content) in contents.iter_mut().enumerate() {
            if only.is_some_and(|only| only != side) {
                continue;
            }
            let (range, found) = self.content(side, rest).await?;
            covered = covered.intersection(&range);
            *content = found;
        }
        let [one, two] = contents;
        if self.strict && one != two {
            let offset = covered.offset();
            return Err(Difference::Allocation { offset });
        }
        let is_data = contents.map(|content| content == Content::Data);
        if !is_data.contains(&true) {
            return Ok((covered, None));
        }
        let (piece, _) = covered.split_at(COPY_CHUNK_BYTES);
        let work = compare_piece(self.sides, is_data, piece);
        Ok((piece, Some(Box::pin(work))))
    }

    /// What the front of `rest` holds on one side.
    async fn content(
        &mut self,
        side: usize,
        rest: ByteRange,
    ) -> Result<(ByteRange, Content), Difference> {
        let (Some(node), Some(known)) = (self.sides.get(side), self.known.get_mut(side)) else {
            return Ok((rest, Content::Data));
        };
        while known
            .last()
            .is_some_and(|(range, _)| range.end() <= rest.offset())
        {
            known.pop();
        }
        if known.is_empty() {
            // All layers there are, so that it shows what none of them holds.
            let asked = chain_status(node, Some(usize::MAX), rest, STATUS_EXTENTS_MAX).await;
            let extents = asked.map_err(|error| unreadable(side, false, rest.offset(), &error))?;
            let kinds = extents
                .iter()
                .rev()
                .map(|extent| (extent.range, extent.content));
            known.extend(kinds);
        }
        let (range, content) = known.last().copied().unwrap_or((rest, Content::Data));
        Ok((range.intersection(&rest), content))
    }
}

/// Compares a piece; a side without data there is zeroes.
async fn compare_piece(
    sides: &[Rc<dyn Node>; 2],
    is_data: [bool; 2],
    piece: ByteRange,
) -> (u64, Option<Difference>) {
    let read = async |side: usize| -> Result<Option<Buffer>, Difference> {
        let has_data = is_data.get(side).copied().unwrap_or(false);
        let Some(node) = sides.get(side).filter(|_| has_data) else {
            return Ok(None);
        };
        // No longer than COPY_CHUNK_BYTES.
        let buffer = Buffer::zeroed(usize::try_from(piece.length()).unwrap_or(usize::MAX));
        let read = node.read(piece.offset(), buffer).await;
        match read.outcome {
            Ok(()) => Ok(Some(read.buffer)),
            Err(error) => Err(unreadable(side, true, piece.offset(), &error)),
        }
    };
    let found = match join(read(0), read(1)).await {
        (Err(difference), _) | (_, Err(difference)) => Some(difference),
        (Ok(Some(one)), Ok(Some(two))) => first_sector(one.as_slice(), two.as_slice()),
        (Ok(Some(one)), Ok(None)) | (Ok(None), Ok(Some(one))) => {
            let zeroes = Buffer::zeroed(one.len());
            first_sector(one.as_slice(), zeroes.as_slice())
        }
        (Ok(None), Ok(None)) => None,
    };
    let found = found.map(|difference| match difference {
        Difference::Content { offset } => Difference::Content {
            offset: piece.offset() + offset,
        },
        other => other,
    });
    (piece.end(), found)
}

/// The first sector that differs, in bytes from the front.
fn first_sector(one: &[u8], two: &[u8]) -> Option<Difference> {
    if one == two {
        return None;
    }
    let same = one.iter().zip(two).take_while(|(one, two)| one == two);
    let offset = same.count() as u64;
    Some(Difference::Content {
        offset: offset - offset % SECTOR_BYTES,
    })
}

fn unreadable(side: usize, reading: bool, offset: u64, error: &NodeError) -> Difference {
    Difference::Unreadable {
        first: side == 0,
        reading,
        offset,
        reason: errno_text(error.errno()),
    }
}
