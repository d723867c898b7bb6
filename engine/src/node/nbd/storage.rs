//! [`NbdStorage`]: a disk of another host as a storage. Requests whose connection broke are sent again on the next one, as long
//! as the client of the node wants to wait.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blockyard_nbd::Mode;
use blockyard_nbd::constants::{
    PAYLOAD_BYTES_MAX, allocation, command_flags, transmission_flags as flags,
};
use blockyard_nbd::transmission::{Command, Extent as NbdExtent, Request};
use blockyard_storage::error::{EINVAL, EIO, ENOSPC, EOPNOTSUPP};
use blockyard_storage::{
    Buffer, ByteRange, Extent, LocalFuture, Operation, Preallocation, Storage, StorageError,
    StorageFacts, Transfer, ZeroMode,
};

use crate::data::DataContext;
use crate::node::nbd::Remote;
use crate::node::nbd::lane::{Lane, Surroundings};
use crate::node::nbd::link::{Ended, Outcome};

/// What zeroes are written from where the server cannot make them.
const ZEROES_BYTES: u64 = 1 << 20;
/// Longest range that one request without data is about: with headers of 32 bits as long as one with data, as in QEMU.
const LONG_BYTES_MAX: u64 = 1 << 30;
/// Requests on one connection before another one is opened, where there may be several.
const DEPTH_BEFORE_NEXT: usize = 2;

/// A disk of another host.
pub struct NbdStorage {
    remote: Arc<Remote>,
    lanes: Vec<Rc<Lane>>,
    around: Surroundings,
    facts: StorageFacts,
}

impl NbdStorage {
    /// The disk of `remote` on this thread.
    pub fn new(remote: Arc<Remote>, context: &DataContext) -> Self {
        let around = Surroundings {
            files: Rc::clone(context.files()),
            clock: Rc::clone(context.clock()),
            spawner: context.spawner().clone(),
        };
        let agreement = remote.agreement();
        let sizes = agreement.block_sizes;
        let minimum = sizes.map_or(1, |sizes| sizes.minimum);
        let maximum = sizes.map_or(PAYLOAD_BYTES_MAX, |sizes| sizes.maximum);
        let facts = StorageFacts {
            length_bytes: agreement.length_bytes,
            request_alignment: minimum,
            transfer_max_bytes: maximum.min(PAYLOAD_BYTES_MAX) & !(minimum - 1),
            read_only: agreement.flags & flags::READ_ONLY != 0,
            discards: agreement.flags & flags::SEND_TRIM != 0,
            fixed_length: true,
        };
        let lanes = (0..remote.connections_max())
            .map(|index| Lane::new(Arc::clone(&remote), index, around.clone()));
        Self {
            lanes: lanes.collect(),
            remote,
            around,
            facts,
        }
    }

    fn can(&self, flag: u16) -> bool {
        self.remote.agreement().flags & flag != 0
    }

    /// Where the next request goes: the connection with the fewest, and another one where all have several.
    fn lane(&self) -> Option<&Rc<Lane>> {
        let open = self
            .lanes
            .iter()
            .filter_map(|lane| Some((lane.depth()?, lane)));
        let least = open.min_by_key(|(depth, _)| *depth);
        if least.is_none_or(|(depth, _)| depth >= DEPTH_BEFORE_NEXT)
            && let Some(next) = self.lanes.iter().find(|lane| lane.depth().is_none())
        {
            if least.is_none() || next.has_connection() {
                return Some(next);
            }
            next.connect_in_background();
        }
        least.map(|(_, lane)| lane).or(self.lanes.first())
    }

    /// Carries out a request, on as many connections as it takes.
    async fn call(&self, request: Request, buffer: Option<Buffer>) -> (Ended, Result<(), i32>) {
        let mut buffer = buffer;
        let mut give_up_at = None;
        loop {
            let now = self.around.clock.now();
            let delay = self.remote.reconnect_delay();
            let lane = self.lane();
            // Whoever finds no connection waits as long as this outage may last; whoever lost one after the other, once.
            let link = match lane.and_then(|lane| lane.ready()) {
                Some(link) => Some(link),
                None => {
                    let until = self.remote.outage_until(now);
                    let until = until.min(*give_up_at.get_or_insert(until));
                    match lane {
                        Some(lane) => lane.ready_until(until).await,
                        None => None,
                    }
                }
            };
            if link.is_some() {
                self.remote.connected();
            }
            let Some(link) = link else {
                let ended = Ended {
                    buffer,
                    extents: Vec::new(),
                    outcome: Outcome::Broken,
                };
                return (ended, Err(EIO));
            };
            let mut ended = link.call(request, buffer.take()).await;
            match &ended.outcome {
                Outcome::Answered(outcome) => {
                    let outcome = outcome.as_ref().map_err(|failure| {
                        let (command, error) = (request.command.name(), failure.error);
                        tracing::debug!(command, ?error, text = failure.text, "refused");
                        failure.error.errno()
                    });
                    let outcome = outcome.copied();
                    return (ended, outcome);
                }
                Outcome::Broken => {
                    self.remote.connection_lost();
                    buffer = ended.buffer.take();
                    let until = *give_up_at.get_or_insert(self.around.clock.now().after(delay));
                    if delay == Duration::ZERO || self.around.clock.now() >= until {
                        // The next request finds a new connection as soon as there is one.
                        if let Some(lane) = lane {
                            lane.connect_in_background();
                        }
                        let ended = Ended { buffer, ..ended };
                        return (ended, Err(EIO));
                    }
                }
            }
        }
    }

    /// A request that says nothing but whether it went well.
    async fn command(&self, command: Command, flags: u16, range: ByteRange) -> Result<(), i32> {
        let request = request(command, flags, range);
        self.call(request, None).await.1
    }

    /// One transfer, no longer than the server takes.
    async fn transfer(
        &self,
        command: Command,
        offset: u64,
        buffer: Buffer,
    ) -> (Buffer, Result<(), i32>) {
        let length = buffer.len();
        if length == 0 {
            // Spec: NBD, "Request types": nobody knows what a server makes of such a request.
            return (buffer, Ok(()));
        }
        let range = ByteRange::new(offset, length as u64);
        let mut request = request(command, 0, range);
        if command == Command::Write {
            request.payload_bytes = range.length();
        }
        let (ended, outcome) = self.call(request, Some(buffer)).await;
        // It always comes back.
        let buffer = ended.buffer.unwrap_or_else(|| Buffer::zeroed(length));
        (buffer, outcome)
    }

    /// A transfer in as many parts as the server wants, one after the other.
    async fn transfer_in_parts(
        &self,
        command: Command,
        offset: u64,
        buffer: Buffer,
    ) -> (Buffer, Result<(), i32>) {
        let part_bytes = usize::try_from(self.facts.transfer_max_bytes.max(1)).unwrap_or(1);
        if buffer.len() <= part_bytes {
            return self.transfer(command, offset, buffer).await;
        }
        let mut done: Option<Buffer> = None;
        let mut rest = buffer;
        let mut at = offset;
        loop {
            let behind = rest.split_off(part_bytes);
            let length = rest.len() as u64;
            let (part, outcome) = self.transfer(command, at, rest).await;
            let mut whole = match done.take() {
                Some(mut done) => {
                    done.join(part);
                    done
                }
                None => part,
            };
            at += length;
            if outcome.is_err() || behind.is_empty() {
                whole.join(behind);
                return (whole, outcome);
            }
            done = Some(whole);
            rest = behind;
        }
    }

    /// How many of so many bytes from `offset` the disk has.
    fn held(&self, offset: u64, length: usize) -> usize {
        let held = self.facts.length_bytes.saturating_sub(offset);
        usize::try_from(held).unwrap_or(usize::MAX).min(length)
    }

    async fn read_held(&self, offset: u64, mut into: Buffer) -> (Buffer, Result<(), i32>) {
        let held = self.held(offset, into.len());
        if held == into.len() {
            return self.transfer_in_parts(Command::Read, offset, into).await;
        }
        let mut behind = into.split_off(held);
        behind.as_mut_slice().fill(0);
        let (mut into, outcome) = match held {
            0 => (into, Ok(())),
            _ => self.transfer_in_parts(Command::Read, offset, into).await,
        };
        into.join(behind);
        (into, outcome)
    }

    async fn write_held(&self, offset: u64, mut from: Buffer) -> (Buffer, Result<(), i32>) {
        if let Err(errno) = self.check_writable() {
            return (from, Err(errno));
        }
        let held = self.held(offset, from.len());
        let behind = from.split_off(held);
        // Nodes are whole sectors, disks need not be: what lies between reads as zeroes and stays that.
        self.remote.writes();
        let (mut from, outcome) = if behind.as_slice().iter().any(|byte| *byte != 0) {
            (from, Err(ENOSPC))
        } else if held == 0 {
            (from, Ok(()))
        } else {
            self.transfer_in_parts(Command::Write, offset, from).await
        };
        from.join(behind);
        if outcome.is_ok() {
            self.remote.wrote();
        }
        (from, outcome)
    }

    /// # Errors
    /// What was written last may be lost, so nothing more is taken.
    fn check_writable(&self) -> Result<(), i32> {
        match self.remote.flush_errno() {
            Some(errno) => Err(errno),
            None => Ok(()),
        }
    }

    /// `range` in parts for requests without data.
    fn parts(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> {
        let longest = match self.remote.agreement().mode {
            Mode::Extended => LONG_BYTES_MAX,
            Mode::Simple | Mode::Structured => u64::from(self.facts.transfer_max_bytes.max(1)),
        };
        let end = range.end().min(self.facts.length_bytes);
        let mut at = range.offset().min(end);
        std::iter::from_fn(move || {
            let next = ByteRange::between(at, end.min(at.saturating_add(longest)));
            at = next.end();
            (!next.is_empty()).then_some(next)
        })
    }

    async fn zero_held(&self, range: ByteRange, mode: ZeroMode) -> Result<(), i32> {
        self.check_writable()?;
        let fast_known = !mode.no_fallback || self.can(flags::SEND_FAST_ZERO);
        if self.can(flags::SEND_WRITE_ZEROES) && fast_known {
            let mut how = 0;
            if !mode.may_unmap {
                how |= command_flags::NO_HOLE;
            }
            if mode.no_fallback {
                how |= command_flags::FAST_ZERO;
            }
            for part in self.parts(range) {
                self.remote.writes();
                self.command(Command::WriteZeroes, how, part).await?;
                self.remote.wrote();
            }
            return Ok(());
        }
        if mode.no_fallback {
            return Err(EOPNOTSUPP);
        }
        let mut buffer = None;
        for part in self.parts(range) {
            let mut at = part.offset();
            while at < part.end() {
                let length = (part.end() - at).min(ZEROES_BYTES);
                let length_bytes = usize::try_from(length).unwrap_or(0);
                let mut zeroes = match buffer.take() {
                    Some(buffer) => buffer,
                    None => Buffer::zeroed(length_bytes),
                };
                zeroes.set_length(length_bytes);
                let (back, outcome) = self.write_held(at, zeroes).await;
                outcome?;
                buffer = Some(back);
                at += length;
            }
        }
        Ok(())
    }

    async fn discard_held(&self, range: ByteRange) -> Result<(), i32> {
        self.check_writable()?;
        if !self.can(flags::SEND_TRIM) {
            return Ok(());
        }
        for part in self.parts(range) {
            self.remote.writes();
            match self.command(Command::Trim, 0, part).await {
                Err(EOPNOTSUPP) => return Ok(()),
                outcome => outcome?,
            }
            self.remote.wrote();
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), i32> {
        self.check_writable()?;
        if !self.can(flags::SEND_FLUSH) {
            return Ok(());
        }
        // What is safe already needs no server, which may be gone by now, or be another one.
        let Some(changes) = self.remote.flushing() else {
            return Ok(());
        };
        let unflushed = self.remote.is_unflushed();
        let flushed = self.command(Command::Flush, 0, ByteRange::new(0, 0)).await;
        match flushed {
            // Nothing was to be made safe, so nothing is lost.
            Err(errno) if !unflushed => Err(errno),
            Err(errno) => {
                self.remote.flush_failed(errno);
                Err(errno)
            }
            // The connection may have broken and with it what was not safe.
            Ok(()) => {
                self.check_writable()?;
                self.remote.flushed(changes);
                Ok(())
            }
        }
    }

    async fn status(&self, range: ByteRange, extents_max: usize) -> Result<Vec<Extent>, i32> {
        let all_of_it = |data| {
            let extent = Extent { range, data };
            Ok(vec![extent])
        };
        let part = range
            .clamp_end(self.facts.length_bytes)
            .split_at(LONG_BYTES_MAX)
            .0;
        if part.is_empty() {
            return all_of_it(false);
        }
        if self.remote.agreement().context.is_none() {
            return all_of_it(true);
        }
        // What is no name of allocation tells nothing about zeroes.
        let tells_zeroes = self.remote.target().wishes.context == "base:allocation";
        let request = request(Command::BlockStatus, 0, part);
        let (ended, outcome) = self.call(request, None).await;
        match outcome {
            Ok(()) => {}
            Err(EINVAL | EOPNOTSUPP) => return all_of_it(true),
            Err(errno) => return Err(errno),
        }
        let mut found: Vec<Extent> = Vec::new();
        let mut at = part.offset();
        for NbdExtent {
            length_bytes,
            status,
        } in ended.extents
        {
            // The last one may go on behind what was asked for.
            let end = at.saturating_add(length_bytes).min(part.end());
            let data = !tells_zeroes || status & allocation::ZERO == 0;
            if end == at {
                break;
            }
            let full = found.len() >= extents_max.max(1);
            match found.last_mut() {
                Some(last) if last.data == data => {
                    last.range = ByteRange::between(last.range.offset(), end);
                }
                _ if full => break,
                _ => found.push(Extent {
                    range: ByteRange::between(at, end),
                    data,
                }),
            }
            at = end;
        }
        if found.is_empty() {
            return all_of_it(true);
        }
        Ok(found)
    }
}

fn request(command: Command, flags: u16, range: ByteRange) -> Request {
    Request {
        cookie: 0,
        command,
        flags,
        offset: range.offset(),
        length_bytes: range.length(),
        payload_bytes: 0,
    }
}

impl Storage for NbdStorage {
    fn facts(&self) -> StorageFacts {
        self.facts
    }

    fn read(&self, offset: u64, into: Buffer) -> LocalFuture<'_, Transfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, into.len() as u64);
            let (buffer, outcome) = self.read_held(offset, into).await;
            let outcome = outcome.map_err(|errno| StorageError::new(Operation::Read, range, errno));
            Transfer { buffer, outcome }
        })
    }

    fn write(&self, offset: u64, from: Buffer) -> LocalFuture<'_, Transfer> {
        Box::pin(async move {
            let range = ByteRange::new(offset, from.len() as u64);
            let (buffer, outcome) = self.write_held(offset, from).await;
            let outcome =
                outcome.map_err(|errno| StorageError::new(Operation::Write, range, errno));
            Transfer { buffer, outcome }
        })
    }

    fn zero(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let zeroed = self.zero_held(range, mode).await;
            zeroed.map_err(|errno| StorageError::new(Operation::Zero, range, errno))
        })
    }

    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let discarded = self.discard_held(range).await;
            discarded.map_err(|errno| StorageError::new(Operation::Discard, range, errno))
        })
    }

    fn allocation(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> LocalFuture<'_, Result<Vec<Extent>, StorageError>> {
        Box::pin(async move {
            let told = self.status(range, extents_max).await;
            told.map_err(|errno| StorageError::new(Operation::Allocation, range, errno))
        })
    }

    fn resize(&self, length_bytes: u64) -> LocalFuture<'_, Result<(), StorageError>> {
        let range = ByteRange::new(0, length_bytes);
        let refused = StorageError::new(Operation::Resize, range, EOPNOTSUPP);
        let same = length_bytes == self.facts.length_bytes;
        Box::pin(std::future::ready(if same { Ok(()) } else { Err(refused) }))
    }

    fn preallocate(
        &self,
        range: ByteRange,
        how: Preallocation,
    ) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            if how == Preallocation::Off && range.end() <= self.facts.length_bytes {
                return Ok(());
            }
            let operation = Operation::Preallocate;
            Err(StorageError::new(operation, range, EOPNOTSUPP))
        })
    }

    fn sync(&self) -> LocalFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let flushed = self.flush().await;
            flushed.map_err(|errno| StorageError::whole(Operation::Sync, errno))
        })
    }
}
