//! What becomes of each request: pieces of at most one slot, read, written or zeroed through the root, and the reply.

use std::cell::Cell;
use std::rc::Rc;

use blockyard_nbd::NbdError;
use blockyard_nbd::constants::command_flags as flags;
use blockyard_nbd::handshake::Mode;
use blockyard_nbd::transmission::{Command, Reply, Request};
use blockyard_storage::buffer::BUFFER_SLOT_BYTES;
use blockyard_storage::{ByteRange, ZeroMode};
use futures_util::StreamExt;
use futures_util::stream::iter;

use super::connection::{Connection, Slot};
use super::memory::Loan;
use crate::limits::CLIENT_OWN_BYTES;
use crate::node::zeroes::is_zero;

/// Pieces of one read that are under way at once.
const PIECES_MAX: usize = 4;

/// Zeroes and discards in one step.
const ZERO_STEP_BYTES: u64 = 1 << 30;

const READING: &str = "reading from file failed";
const WRITING: &str = "writing to file failed";

/// A write whose pieces are on their way. Whoever lets go of it last answers.
pub(super) struct Writing {
    connection: Rc<Connection>,
    request: Request,
    slot: Slot,
    failed: Cell<Option<i32>>,
}

impl Connection {
    /// Carries out what has no payload, and answers.
    pub(super) async fn carry_out(self: Rc<Self>, request: Request, slot: Slot) {
        match request.command {
            Command::Read => self.read(&request, slot).await,
            Command::Cache => {
                let outcome = self.cache(&request).await;
                self.answer(&request, outcome, "caching data failed", slot);
            }
            Command::Flush => {
                let outcome = self.flush().await;
                self.answer(&request, outcome, "flush failed", slot);
            }
            Command::WriteZeroes => {
                let mode = ZeroMode {
                    may_unmap: !request.has(flags::NO_HOLE),
                    no_fallback: request.has(flags::FAST_ZERO),
                };
                let mut outcome = Ok(());
                for range in pieces(&request, ZERO_STEP_BYTES) {
                    outcome = outcome.and(self.root.zero(range, mode).await.map_err(errno));
                    if outcome.is_err() {
                        break;
                    }
                }
                let outcome = self.flushed(&request, outcome).await;
                self.answer(&request, outcome, WRITING, slot);
            }
            Command::Trim => {
                let mut outcome = Ok(());
                for range in pieces(&request, ZERO_STEP_BYTES) {
                    outcome = outcome.and(self.root.discard(range).await.map_err(errno));
                    if outcome.is_err() {
                        break;
                    }
                }
                let outcome = self.flushed(&request, outcome).await;
                self.answer(&request, outcome, "discard failed", slot);
            }
            // These come another way, or are refused.
            Command::Write | Command::BlockStatus | Command::Disconnect | Command::Unknown(_) => {
                self.answer(&request, Err(NbdError::Invalid.errno()), "invalid", slot);
            }
        }
    }

    async fn read(&self, request: &Request, slot: Slot) {
        let reply = Reply::to(request, self.mode());
        let mut head = Vec::new();
        if request.length_bytes == 0 {
            match self.mode() {
                Mode::Simple => reply.done(&mut head),
                Mode::Structured | Mode::Extended => reply.end(&mut head),
            }
            return self.outbox.push(head, None, Some(slot));
        }
        let length = usize::try_from(request.length_bytes).unwrap_or(usize::MAX);
        if length <= BUFFER_SLOT_BYTES {
            let loan = self.memory.take(length).await;
            if loan.buffer.len() == length {
                return self.read_into(request, loan, slot).await;
            }
        }
        // Each piece is a chunk of its own, and goes as soon as it is there. Memory is taken piece by piece and given back when
        // it is sent, so that requests cannot wait for each other.
        let each = &reply;
        let outcomes = iter(pieces(request, BUFFER_SLOT_BYTES as u64)).map(|range| async move {
            let mut rest = range;
            while !rest.is_empty() && !self.outbox.is_broken() {
                let (loan, outcome) = self.read_some(rest).await;
                outcome?;
                let at = rest.offset();
                rest = rest.split_at(loan.buffer.len() as u64).1;
                self.push_piece(each, at, loan, None);
            }
            Ok(())
        });
        let mut outcomes = outcomes.buffer_unordered(PIECES_MAX);
        let mut outcome = Ok(());
        while let Some(ended) = outcomes.next().await {
            outcome = outcome.and(ended);
            if outcome.is_err() || self.outbox.is_broken() {
                break;
            }
        }
        drop(outcomes);
        match outcome {
            Ok(()) => {
                reply.end(&mut head);
                self.outbox.push(head, None, Some(slot));
            }
            Err(errno) => self.answer(request, Err(errno), READING, slot),
        }
    }

    /// Reads all that is asked for into a buffer that is just as long, and answers.
    pub(super) async fn read_into(&self, request: &Request, loan: Loan, slot: Slot) {
        let Loan { buffer, share } = loan;
        let read = self.root.read(request.offset, buffer).await;
        let buffer = read.buffer;
        match read.outcome {
            Ok(()) => {
                let reply = Reply::to(request, self.mode());
                self.push_piece(&reply, request.offset, Loan { buffer, share }, Some(slot));
            }
            Err(error) => self.answer(request, Err(errno(error)), READING, slot),
        }
    }

    /// Whether a read can only be answered in one piece, for which the connection's own buffer is too short.
    pub(super) fn reads_in_one(&self, request: &Request) -> bool {
        let in_one = self.mode() == Mode::Simple || request.has(flags::DF);
        in_one && request.length_bytes > CLIENT_OWN_BYTES as u64
    }

    /// Carries out such a read while no other request is: its data follows the head piece by piece. `false`: the connection is of
    /// no use any more.
    pub(super) async fn read_alone(&self, request: &Request, slot: Slot) -> bool {
        let reply = Reply::to(request, self.mode());
        // Bounded by the largest payload.
        let length = u32::try_from(request.length_bytes).unwrap_or(u32::MAX);
        let (mut head, mut failed) = (Vec::new(), None);
        reply.data(request.offset, length, false, &mut head);
        let mut rest = ByteRange::new(request.offset, request.length_bytes);
        while !rest.is_empty() {
            let loan = match failed {
                None => {
                    let (mut loan, outcome) = self.read_some(rest).await;
                    match outcome {
                        Ok(()) => {}
                        Err(errno) if rest.offset() == request.offset => {
                            drop(loan);
                            self.answer(request, Err(errno), READING, slot);
                            return true;
                        }
                        // Nothing but the end can tell of a failure once a simple reply has begun.
                        Err(_) if self.mode() == Mode::Simple => return false,
                        Err(errno) => {
                            failed = Some((rest.offset(), errno));
                            loan.buffer.as_mut_slice().fill(0);
                        }
                    }
                    loan
                }
                // Something has to stand for the rest.
                Some(_) => {
                    let mut loan = self.memory.take(length_of(rest)).await;
                    loan.buffer.as_mut_slice().fill(0);
                    loan
                }
            };
            rest = rest.split_at(loan.buffer.len() as u64).1;
            self.outbox
                .push(std::mem::take(&mut head), Some(loan), None);
            if self.outbox.is_broken() {
                return false;
            }
        }
        let mut tail = Vec::new();
        match failed {
            Some((offset, errno)) => {
                let error = NbdError::from_errno(errno);
                reply.error_at(error, READING, offset, true, &mut tail);
            }
            None if self.mode() != Mode::Simple => reply.end(&mut tail),
            None => {}
        }
        self.outbox.push(tail, None, Some(slot));
        true
    }

    /// Reads the first bytes of `range`, as many as there is memory for.
    async fn read_some(&self, range: ByteRange) -> (Loan, Result<(), i32>) {
        let Loan { buffer, share } = self.memory.take(length_of(range)).await;
        let read = self.root.read(range.offset(), buffer).await;
        let buffer = read.buffer;
        (Loan { buffer, share }, read.outcome.map_err(errno))
    }

    /// Sends what a piece holds. Zeroes are said, where that is possible.
    fn push_piece(&self, reply: &Reply, offset: u64, loan: Loan, slot: Option<Slot>) {
        let length = u32::try_from(loan.buffer.len()).unwrap_or(u32::MAX);
        let (mut head, is_last) = (Vec::new(), slot.is_some());
        if self.mode() != Mode::Simple && is_zero(loan.buffer.as_slice()) {
            reply.hole(offset, length, is_last, &mut head);
            drop(loan);
            return self.outbox.push(head, None, slot);
        }
        reply.data(offset, length, is_last, &mut head);
        self.outbox.push(head, Some(loan), slot);
    }

    /// Reads, so that what is below may keep it.
    async fn cache(&self, request: &Request) -> Result<(), i32> {
        let mut rest = ByteRange::new(request.offset, request.length_bytes);
        while !rest.is_empty() {
            let (loan, outcome) = self.read_some(rest).await;
            outcome?;
            rest = rest.split_at(loan.buffer.len() as u64).1;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), i32> {
        self.root.flush().await.map_err(errno)
    }

    /// Makes a change durable, if the client or the export wants it.
    async fn flushed(&self, request: &Request, outcome: Result<(), i32>) -> Result<(), i32> {
        outcome?;
        match self.writethrough || request.has(flags::FUA) {
            true => self.flush().await,
            false => Ok(()),
        }
    }

    pub(super) fn answer(
        &self,
        request: &Request,
        outcome: Result<(), i32>,
        text: &str,
        slot: Slot,
    ) {
        let mut head = Vec::new();
        let reply = Reply::to(request, self.mode());
        match outcome {
            Ok(()) => reply.done(&mut head),
            Err(errno) => reply.error(NbdError::from_errno(errno), text, &mut head),
        }
        self.outbox.push(head, None, Some(slot));
    }
}

impl Writing {
    /// Nothing has been written yet.
    pub(super) fn new(connection: Rc<Connection>, request: Request, slot: Slot) -> Self {
        Self {
            connection,
            request,
            slot,
            failed: Cell::new(None),
        }
    }

    /// Something of it has not been written.
    pub(super) fn fail(&self, errno: i32) {
        self.failed.set(self.failed.get().or(Some(errno)));
    }

    /// Writes one piece.
    pub(super) async fn piece(self: Rc<Self>, offset: u64, loan: Loan) {
        let Loan { buffer, share } = loan;
        let written = self.connection.root.write(offset, buffer).await;
        drop((written.buffer, share));
        if let Err(error) = written.outcome {
            self.fail(errno(error));
        }
        self.finish().await;
    }

    /// Answers, if nothing else is on its way.
    pub(super) async fn finish(self: Rc<Self>) {
        let Some(writing) = Rc::into_inner(self) else {
            return;
        };
        let outcome = writing.failed.get().map_or(Ok(()), Err);
        let (connection, request) = (writing.connection, writing.request);
        let outcome = connection.flushed(&request, outcome).await;
        connection.answer(&request, outcome, WRITING, writing.slot);
    }
}

/// What a request is about, in pieces of at most `longest` bytes.
fn pieces(request: &Request, longest: u64) -> impl Iterator<Item = ByteRange> + use<> {
    let end = request.offset.saturating_add(request.length_bytes);
    let mut at = request.offset;
    std::iter::from_fn(move || {
        let piece = ByteRange::between(at, end.min(at.saturating_add(longest)));
        at = piece.end();
        (!piece.is_empty()).then_some(piece)
    })
}

/// How long a range is, or the longest buffer.
fn length_of(range: ByteRange) -> usize {
    usize::try_from(range.length()).unwrap_or(usize::MAX)
}

fn errno(error: crate::error::NodeError) -> i32 {
    error.errno()
}
