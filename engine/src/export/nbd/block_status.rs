//! Answers to the question what is where: holes and zeroes, and which layer of the chain holds what.

use blockyard_nbd::NbdError;
use blockyard_nbd::constants::{allocation, dirty_bitmap};
use blockyard_nbd::handshake::ContextKind;
use blockyard_nbd::handshake::{FIRST_BITMAP_ID, Mode};
use blockyard_nbd::transmission::{Extent, Reply, Request, StatusExtents, StatusQuery};
use blockyard_storage::ByteRange;

use super::connection::{Connection, Slot};
use super::memory::{Loan, give_way};
use crate::limits::{CLIENT_OWN_BYTES, STATUS_EXTENTS_MAX};
use crate::node::chain::{ChainExtent, Content};

/// Bytes of one reply at most. A client that wants to know more asks again from where the reply ends.
const REPLY_BYTES_MAX: usize = CLIENT_OWN_BYTES;

/// Bytes of a reply for each context, besides its extents.
const CONTEXT_BYTES: usize = 40;

impl Connection {
    /// Answers a status request that has passed its check.
    pub(super) async fn block_status(&self, request: &Request, payload: &[u8], slot: Slot) {
        let query = match StatusQuery::parse(request, payload, &self.session) {
            Ok(query) => query,
            Err(refusal) => return self.refuse(request, &refusal, slot),
        };
        // Taken before anything is found out, so that requests which wait for memory hold none.
        let loan = self.memory.take(REPLY_BYTES_MAX).await;
        let extents_max = extents_max(self.mode(), query.contexts.len());
        let mut answers: Vec<Answer> = query
            .contexts
            .iter()
            .map(|context| {
                let extents = StatusExtents::new(self.mode(), request, query.length_bytes);
                Answer::new(context.id, &context.kind, extents, extents_max)
            })
            .collect();
        let end = request.offset + query.length_bytes;
        for answer in &mut answers {
            if matches!(answer.kind, ContextKind::DirtyBitmap(_))
                && !self.tell_changes(ByteRange::between(request.offset, end), answer)
            {
                let text = "can't get block status";
                return self.answer(request, Err(NbdError::Io.errno()), text, slot);
            }
        }
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
            if self.channel.peer_has_ended() {
                // It may be all of a long disk for nobody. Whoever still listens asks again.
                break;
            }
            give_way().await;
        }
        let mut head = Vec::new();
        let reply = Reply::to(request, self.mode());
        let count = answers.len();
        for (number, answer) in answers.iter().enumerate() {
            let is_last = number + 1 == count;
            reply.status(answer.id, &answer.extents, is_last, &mut head);
        }
        let Loan { mut buffer, share } = loan;
        match buffer.as_mut_slice().get_mut(..head.len()) {
            Some(room) => {
                room.copy_from_slice(&head);
                buffer.set_length(head.len());
                let loan = Loan { buffer, share };
                self.outbox.push(Vec::new(), Some(loan), Some(slot));
            }
            // One extent for each of very many contexts.
            None => self.outbox.push(head, None, Some(slot)),
        }
    }

    /// Adds what a bitmap says of `range`; `false`: the bitmap is lost, which is a bug.
    fn tell_changes(&self, range: ByteRange, answer: &mut Answer<'_>) -> bool {
        // Two nodes may have one of the same name, so it goes by the number.
        let place = answer.id.checked_sub(FIRST_BITMAP_ID);
        let place = place.and_then(|place| usize::try_from(place).ok());
        let Some(bitmap) = place.and_then(|place| self.export.bitmaps.get(place)) else {
            return false;
        };
        let told = bitmap.look(|map| {
            let mut rest = range;
            while answer.wants_more && !rest.is_empty() {
                let run = map.run_in(rest).map(|run| run.intersection(&rest));
                let run = run.unwrap_or(ByteRange::new(rest.end(), 0));
                answer.put(run.offset() - rest.offset(), 0);
                answer.put(run.length(), dirty_bitmap::DIRTY);
                rest = ByteRange::between(run.end(), rest.end());
            }
        });
        answer.wants_more = false;
        told.is_some()
    }
}

/// What one context has to say.
struct Answer<'a> {
    id: u32,
    kind: &'a ContextKind,
    extents: StatusExtents,
    extents_max: usize,
    wants_more: bool,
}

impl<'a> Answer<'a> {
    fn new(id: u32, kind: &'a ContextKind, extents: StatusExtents, extents_max: usize) -> Self {
        Self {
            id,
            kind,
            extents,
            extents_max,
            wants_more: true,
        }
    }

    fn add(&mut self, extent: &ChainExtent) {
        if let Some(status) = status_of(self.kind, extent) {
            self.put(extent.range.length(), status);
        }
    }

    fn put(&mut self, length_bytes: u64, status: u32) {
        if !self.wants_more || length_bytes == 0 {
            return;
        }
        let more = self.extents.add(Extent {
            length_bytes,
            status,
        });
        self.wants_more = more && self.extents.extents().len() < self.extents_max;
    }
}

/// How many extents of each context have room in a reply.
fn extents_max(mode: Mode, contexts: usize) -> usize {
    let extent_bytes = match mode {
        Mode::Simple | Mode::Structured => 8,
        Mode::Extended => 16,
    };
    let each_bytes = (REPLY_BYTES_MAX / contexts.max(1)).saturating_sub(CONTEXT_BYTES);
    (each_bytes / extent_bytes).max(1)
}

/// What a context says of a part of a chain; `None`: nothing.
fn status_of(kind: &ContextKind, extent: &ChainExtent) -> Option<u32> {
    Some(match kind {
        ContextKind::Allocation => match extent.content {
            Content::Data => 0,
            Content::Zero | Content::Unallocated => allocation::HOLE | allocation::ZERO,
        },
        ContextKind::AllocationDepth => match extent.content {
            Content::Data | Content::Zero => u32::try_from(extent.depth + 1).unwrap_or(u32::MAX),
            Content::Unallocated => 0,
        },
        ContextKind::DirtyBitmap(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_of_so_many_contexts_has_room_for_so_many_extents() {
        for (mode, contexts, expected) in [
            (Mode::Structured, 1, 8187),
            (Mode::Extended, 1, 4093),
            (Mode::Extended, 2, 2045),
            (Mode::Structured, 100_000, 1),
        ] {
            let most = extents_max(mode, contexts);
            assert_eq!(most, expected, "{mode:?}, {contexts}");
        }
    }

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
            assert_eq!(told, (Some(expected.0), Some(expected.1)));
        }
    }
}
