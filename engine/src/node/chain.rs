//! [`chain_status`]: what a node holds through the layers of its backing chain: data, zeroes, or nothing above the layer
//! where the question ends.
//!
//! A layer that is shorter than those above it ends in zeroes: whatever is below it is not seen there.

use std::collections::VecDeque;
use std::rc::Rc;

use blockyard_storage::ByteRange;

use crate::error::NodeError;
use crate::node::turns::Turn;
use crate::node::{Node, StatusExtent};

/// What a run of bytes is, seen from the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// There may be data.
    Data,
    /// Reads as zeroes for certain.
    Zero,
    /// None of the layers that were asked holds it.
    Unallocated,
}

/// A run of bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainExtent {
    /// Which bytes.
    pub range: ByteRange,
    /// What they are.
    pub content: Content,
    /// The layer that decides, counted from the top, which is 0. Filters do not count.
    pub depth: usize,
}

/// Extents that one question looks at, before neighbours are merged: a fragmented disk whose clusters are all alike is no reason to
/// keep everybody waiting until all of it has been looked at.
const LOOKS_MAX: usize = 1024;

/// What kind of content `range` of `top` has in its first `layers_max` layers (`None`: in all of them, and then nothing is
/// unallocated). Where [turns](Node::turn_to_look) are taken nobody changes it meanwhile. Ascending from the first byte of `range`,
/// neighbours of one kind and layer merged; covers at least that byte and may stop early after `extents_max` extents, or after
/// [`LOOKS_MAX`] looks.
///
/// # Errors
/// When a layer cannot tell of the first byte.
pub async fn chain_status(
    top: &Rc<dyn Node>,
    layers_max: Option<usize>,
    range: ByteRange,
    extents_max: usize,
) -> Result<Vec<ChainExtent>, NodeError> {
    let _turns = turns(top, range).await;
    let mut layers = vec![Layer::of(top.clone())];
    while layers_max.is_none_or(|layers_max| layers.len() < layers_max)
        && let Some(below) = layers.last().and_then(|layer| layer.node.backing())
    {
        layers.push(Layer::of(below));
    }
    let beyond = match layers_max {
        Some(_) => Content::Unallocated,
        None => Content::Zero,
    };
    let (mut rest, mut found) = (range, Vec::<ChainExtent>::new());
    for _ in 0..LOOKS_MAX {
        if rest.is_empty() {
            break;
        }
        let question = Question {
            rest,
            beyond,
            extents_max,
        };
        let extent = match first_extent(&mut layers, question).await {
            Ok(extent) => extent,
            Err(error) if found.is_empty() => return Err(error),
            Err(_) => break,
        };
        rest = ByteRange::between(extent.range.end(), rest.end());
        let full = found.len() >= extents_max.max(1);
        match found.last_mut() {
            Some(last) if (last.content, last.depth) == (extent.content, extent.depth) => {
                last.range = ByteRange::between(last.range.offset(), extent.range.end());
            }
            _ if full => break,
            _ => found.push(extent),
        }
    }
    Ok(found)
}

/// The turns of somebody who looks at all layers. Each has come before the next one is taken, as those of others have who go
/// downwards.
async fn turns(top: &Rc<dyn Node>, range: ByteRange) -> Vec<Turn> {
    let mut turns = Vec::new();
    let mut next = Some(Rc::clone(top));
    while let Some(node) = next {
        if let Some(turn) = node.turn_to_look(range) {
            turn.come().await;
            turns.push(turn);
        }
        next = node.shown().or_else(|| node.backing());
    }
    turns
}

/// What is asked of each layer.
#[derive(Clone, Copy)]
struct Question {
    /// All that is not known yet.
    rest: ByteRange,
    /// What none of the layers holds.
    beyond: Content,
    /// Most extents of one answer.
    extents_max: usize,
}

/// How much more a layer is asked for than the last time, as a factor: in a chain of many layers of small extents, each of them
/// is asked a few times, and tells little that nobody wants to know.
const MORE_EACH_TIME: u64 = 4;

/// One layer, and what it has told of the bytes ahead.
struct Layer {
    node: Rc<dyn Node>,
    length_bytes: u64,
    known: VecDeque<StatusExtent>,
    /// What it is asked for next, at least, in bytes.
    ahead_bytes: u64,
}

impl Layer {
    fn of(node: Rc<dyn Node>) -> Self {
        let length_bytes = node.facts().length_bytes;
        Self {
            node,
            length_bytes,
            known: VecDeque::new(),
            ahead_bytes: 0,
        }
    }

    /// What this layer holds at the first byte of `range`, and how far at most within it. Ranges come in ascending order.
    async fn first(
        &mut self,
        range: ByteRange,
        question: Question,
    ) -> Result<StatusExtent, NodeError> {
        while let Some(extent) = self.known.front()
            && extent.range.end() <= range.offset()
        {
            self.known.pop_front();
        }
        if self.known.is_empty() {
            let end = question.rest.end().min(self.length_bytes);
            let ahead = ByteRange::between(range.offset(), end);
            let (asked, _) = ahead.split_at(self.ahead_bytes.max(range.length()));
            self.ahead_bytes = asked.length().saturating_mul(MORE_EACH_TIME);
            let told = self.node.status(asked, question.extents_max).await?;
            self.known = told.into();
        }
        let covers =
            |extent: &&StatusExtent| extent.range.contains(&ByteRange::new(range.offset(), 1));
        // A node that says nothing has told of no hole.
        let extent = self.known.front().filter(covers).copied();
        let extent = extent.unwrap_or(StatusExtent {
            range,
            zero: false,
            allocated: true,
        });
        Ok(StatusExtent {
            range: extent.range.intersection(&range),
            ..extent
        })
    }
}

/// What the first byte of `rest` is, and all behind it of which the same is known.
async fn first_extent(layers: &mut [Layer], question: Question) -> Result<ChainExtent, NodeError> {
    let mut bound = question.rest;
    let deepest = layers.len().saturating_sub(1);
    for (depth, layer) in layers.iter_mut().enumerate() {
        let inside = bound.clamp_end(layer.length_bytes);
        if inside.is_empty() {
            return Ok(ChainExtent {
                range: bound,
                content: Content::Zero,
                depth,
            });
        }
        let extent = layer.first(inside, question).await?;
        bound = extent.range;
        if extent.allocated {
            let content = match extent.zero {
                true => Content::Zero,
                false => Content::Data,
            };
            return Ok(ChainExtent {
                range: bound,
                content,
                depth,
            });
        }
    }
    Ok(ChainExtent {
        range: bound,
        content: question.beyond,
        depth: deepest,
    })
}

#[cfg(test)]
#[path = "chain_tests.rs"]
pub(crate) mod tests;
