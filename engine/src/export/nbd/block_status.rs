//! Answers to the question what is where: holes and zeroes, and which layer of the chain holds what.

use blockyard_nbd::NbdError;
use blockyard_nbd::constants::allocation;
use blockyard_nbd::handshake::ContextKind;
use blockyard_nbd::transmission::{Extent, Reply, Request, StatusExtents, StatusQuery};
use blockyard_storage::ByteRange;

use super::connection::{Connection, Slot};
use super::memory::give_way;
use crate::limits::STATUS_EXTENTS_MAX;
use crate::node::chain::{ChainExtent, Content};

/// Extents of one reply at most. A client that wants to know more asks again from where the reply ends.
const REPLY_EXTENTS_MAX: usize = 8192;

impl Connection {
    /// Answers a status request that has passed its check.
    pub(super) async fn block_status(&self, request: &Request, payload: &[u8], slot: Slot) {
        let query = match StatusQuery::parse(request, payload, &self.session) {
            Ok(query) => query,
            Err(refusal) => return self.refuse(request, &refusal, slot),
        };
        let mut answers: Vec<Answer> = query
            .contexts
            .iter()
            .map(|context| Answer {
                id: context.id,
                kind: &context.kind,
                extents: StatusExtents::new(self.mode(), request, query.length_bytes),
                wants_more: true,
            })
            .collect();
        let end = request.offset + query.length_bytes;
        let mut rest = ByteRange::between(request.offset, end);
        while !rest.is_empty() && answers.iter().any(|answer| answer.wants_more) {
            let found = match self.root.layers(rest, STATUS_EXTENTS_MAX).await {
                Ok(found) if !found.is_empty() => found,
                // What has been found out is an answer, if it is one for everybody.
                _ if rest.offset() > request.offset => break,
                outcome => {
                    let errno = outcome.err().map_or(NbdError::Io.errno(), |e| e.errno());
                    return self.answer(request, Err(errno), "can't get block status", slot);
                }
            };
            for extent in &found {
                for answer in &mut answers {
                    answer.add(extent);
                }
            }
            let known = found.last().map_or(end, |last| last.range.end());
            rest = ByteRange::between(known, end);
            give_way().await;
        }
        let mut head = Vec::new();
        let reply = Reply::to(request, self.mode());
        let count = answers.len();
        for (number, answer) in answers.iter().enumerate() {
            let is_last = number + 1 == count;
            reply.status(answer.id, &answer.extents, is_last, &mut head);
        }
        self.outbox.push(head, None, Some(slot));
    }
}

/// What one context has to say.
struct Answer<'a> {
    id: u32,
    kind: &'a ContextKind,
    extents: StatusExtents,
    wants_more: bool,
}

impl Answer<'_> {
    fn add(&mut self, extent: &ChainExtent) {
        if !self.wants_more {
            return;
        }
        let status = status_of(self.kind, extent);
        let length_bytes = extent.range.length();
        let more = self.extents.add(Extent {
            length_bytes,
            status,
        });
        self.wants_more = more && self.extents.extents().len() < REPLY_EXTENTS_MAX;
    }
}

fn status_of(kind: &ContextKind, extent: &ChainExtent) -> u32 {
    match kind {
        ContextKind::Allocation => match extent.content {
            Content::Data => 0,
            Content::Zero | Content::Unallocated => allocation::HOLE | allocation::ZERO,
        },
        ContextKind::AllocationDepth => match extent.content {
            Content::Data | Content::Zero => u32::try_from(extent.depth + 1).unwrap_or(u32::MAX),
            Content::Unallocated => 0,
        },
        // No export shows one yet.
        ContextKind::DirtyBitmap(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_context_says_its_own() {
        let extent = |content, depth| ChainExtent {
            range: ByteRange::new(0, 512),
            content,
            depth,
        };
        for (content, depth, expected) in [
            (Content::Data, 0, (0, 1)),
            (Content::Data, 3, (0, 4)),
            (Content::Zero, 1, (3, 2)),
            (Content::Unallocated, 2, (3, 0)),
        ] {
            let extent = extent(content, depth);
            let told = (
                status_of(&ContextKind::Allocation, &extent),
                status_of(&ContextKind::AllocationDepth, &extent),
            );
            assert_eq!(told, expected);
        }
    }
}
