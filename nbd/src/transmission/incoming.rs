//! Replies as a client sees them: heads out of the stream, held against the request that they answer. Nothing is believed.
//!
//! Spec: NBD, "Simple reply message", "Structured reply chunk message", "Extended reply chunk message".

use crate::constants::{
    EXTENDED_REPLY_MAGIC, PAYLOAD_BYTES_MAX, SIMPLE_REPLY_MAGIC, STATUS_EXTENTS_MAX,
    STRING_BYTES_MAX, STRUCTURED_REPLY_MAGIC, chunk_flags, chunk_type,
};
use crate::errors::{NbdError, Violation};
use crate::handshake::Mode;
use crate::transmission::block_status::Extent;
use crate::transmission::request::{Command, Request};
use crate::wire::Fields;

/// Bytes that a head has at most, with the texts of errors: a buffer of this length always holds a whole one.
pub const HEAD_BYTES_MAX: usize = 32 + ERROR_BYTES_MAX;
/// Payload of an error.
const ERROR_BYTES_MAX: usize = STRING_BYTES_MAX + 14;
/// Separate pieces of one read that a client keeps in mind.
const PIECES_MAX: usize = 4096;

/// A reply, or a chunk of one, without the data or extents that follow.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Incoming {
    /// The whole reply; data follows a read that has not failed.
    Simple {
        /// Which request.
        cookie: u64,
        /// Why it failed.
        error: Option<NbdError>,
    },
    /// A part of a reply.
    Chunk {
        /// Which request.
        cookie: u64,
        /// There are no further chunks.
        last: bool,
        /// What it holds.
        content: Content,
    },
}

/// What a chunk holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// Nothing.
    None,
    /// Data, which follows.
    Data {
        /// Where on the disk.
        offset: u64,
        /// How many bytes follow.
        length_bytes: u32,
    },
    /// Zeroes.
    Hole {
        /// Where on the disk.
        offset: u64,
        /// How many.
        length_bytes: u32,
    },
    /// Extents, which follow.
    Status {
        /// Id of their context.
        context: u32,
        /// Bytes that follow.
        payload_bytes: u32,
        /// They have 64 bits.
        wide: bool,
    },
    /// The request has failed.
    Error(Failure),
}

/// Why a request failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The error.
    pub error: NbdError,
    /// What the server says, may be empty.
    pub text: String,
}

impl Incoming {
    /// Reads the head that `bytes` begin with, and tells how long it is; `None`: it is not whole yet.
    ///
    /// # Errors
    /// It makes no sense, and nothing behind it does.
    pub fn parse(mode: Mode, bytes: &[u8]) -> Result<Option<(Self, usize)>, Violation> {
        let mut fields = Fields::new(bytes);
        let Some(magic) = fields.u32() else {
            return Ok(None);
        };
        let parsed = match (magic, mode) {
            (SIMPLE_REPLY_MAGIC, Mode::Simple | Mode::Structured) => Ok(simple(&mut fields)),
            (STRUCTURED_REPLY_MAGIC, Mode::Structured) => chunk(&mut fields, false),
            (EXTENDED_REPLY_MAGIC, Mode::Extended) => chunk(&mut fields, true),
            _ => Err(Violation::new(format!("invalid magic (got {magic:#x})"))),
        }?;
        let taken = bytes.len() - fields.rest().len();
        Ok(parsed.map(|incoming| (incoming, taken)))
    }

    /// Which request it answers.
    pub fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. } | Self::Chunk { cookie, .. } => *cookie,
        }
    }
}

fn simple(fields: &mut Fields<'_>) -> Option<Incoming> {
    let number = fields.u32()?;
    let cookie = fields.u64()?;
    let error = (number != 0).then(|| NbdError::from_number(number));
    Some(Incoming::Simple { cookie, error })
}

fn chunk(fields: &mut Fields<'_>, extended: bool) -> Result<Option<Incoming>, Violation> {
    let head = (|| {
        let (flags, kind, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
        let payload_bytes = if extended {
            // Where the request began: known.
            fields.u64()?;
            fields.u64()?
        } else {
            u64::from(fields.u32()?)
        };
        Some((flags, kind, cookie, payload_bytes))
    })();
    let Some((flags, kind, cookie, payload_bytes)) = head else {
        return Ok(None);
    };
    let last = flags & chunk_flags::DONE != 0;
    let content = content(fields, kind, payload_bytes)?;
    if content == Some(Content::None) && !last {
        return Err(Violation::new("a chunk without content is not the last"));
    }
    Ok(content.map(|content| Incoming::Chunk {
        cookie,
        last,
        content,
    }))
}

/// What a chunk with this payload holds. `None`: too little of it is there.
fn content(
    fields: &mut Fields<'_>,
    kind: u16,
    payload_bytes: u64,
) -> Result<Option<Content>, Violation> {
    let unfit = || Violation::new(format!("chunk {kind:#x} cannot have {payload_bytes} bytes"));
    match kind {
        chunk_type::NONE if payload_bytes == 0 => Ok(Some(Content::None)),
        chunk_type::OFFSET_DATA => {
            let length = payload_bytes.checked_sub(8);
            let length =
                length.filter(|length| (1..=u64::from(PAYLOAD_BYTES_MAX)).contains(length));
            let length_bytes = length.and_then(|length| u32::try_from(length).ok());
            let length_bytes = length_bytes.ok_or_else(unfit)?;
            Ok(fields.u64().map(|offset| Content::Data {
                offset,
                length_bytes,
            }))
        }
        chunk_type::OFFSET_HOLE if payload_bytes == 12 => {
            match (|| Some((fields.u64()?, fields.u32()?)))() {
                Some((_, 0)) => Err(Violation::new("a hole has no length")),
                Some((offset, length_bytes)) => Ok(Some(Content::Hole {
                    offset,
                    length_bytes,
                })),
                None => Ok(None),
            }
        }
        chunk_type::BLOCK_STATUS => {
            let payload = payload_bytes.checked_sub(4).filter(|bytes| bytes % 8 == 0);
            let payload_bytes = payload.and_then(|bytes| extents_fit(bytes, 8));
            let payload_bytes = payload_bytes.ok_or_else(unfit)?;
            Ok(fields.u32().map(|context| Content::Status {
                context,
                payload_bytes,
                wide: false,
            }))
        }
        chunk_type::BLOCK_STATUS_EXT => {
            let payload = payload_bytes.checked_sub(8).filter(|bytes| bytes % 16 == 0);
            let payload_bytes = payload.and_then(|bytes| extents_fit(bytes, 16));
            let payload_bytes = payload_bytes.ok_or_else(unfit)?;
            match (|| Some((fields.u32()?, fields.u32()?)))() {
                Some((context, count)) if count == payload_bytes / 16 => {
                    Ok(Some(Content::Status {
                        context,
                        payload_bytes,
                        wide: true,
                    }))
                }
                Some(_) => Err(unfit()),
                None => Ok(None),
            }
        }
        kind if kind & chunk_type::ERROR_BIT != 0 => error(fields, payload_bytes, unfit),
        _ => Err(unfit()),
    }
}

/// Between one extent and as many as anybody sends.
fn extents_fit(payload_bytes: u64, extent_bytes: u64) -> Option<u32> {
    let most = u64::try_from(STATUS_EXTENTS_MAX)
        .ok()?
        .checked_mul(extent_bytes)?;
    let fits = (extent_bytes..=most).contains(&payload_bytes);
    fits.then(|| u32::try_from(payload_bytes).ok()).flatten()
}

/// Every kind of error begins with its number and text; what follows is of no use here.
fn error(
    fields: &mut Fields<'_>,
    payload_bytes: u64,
    unfit: impl Fn() -> Violation,
) -> Result<Option<Content>, Violation> {
    let length = usize::try_from(payload_bytes).unwrap_or(usize::MAX);
    if !(6..=ERROR_BYTES_MAX).contains(&length) {
        return Err(unfit());
    }
    let Some(payload) = fields.bytes(length) else {
        return Ok(None);
    };
    let mut fields = Fields::new(payload);
    let parsed = (|| {
        let number = fields.u32()?;
        let text_bytes = fields.u16()?;
        Some((number, fields.bytes(usize::from(text_bytes))?))
    })();
    match parsed {
        Some((0, _)) => Err(Violation::new("a chunk tells of an error and of none")),
        Some((number, text)) => Ok(Some(Content::Error(Failure {
            error: NbdError::from_number(number),
            text: String::from_utf8_lossy(text).into_owned(),
        }))),
        None => Err(unfit()),
    }
}

/// Reads the whole extents that `bytes` begin with, and tells how many bytes those are.
///
/// # Errors
/// One has no length.
pub fn parse_extents(wide: bool, bytes: &[u8]) -> Result<(Vec<Extent>, usize), Violation> {
    let mut extents = Vec::new();
    let mut taken = 0;
    let mut fields = Fields::new(bytes);
    while let Some((length_bytes, status)) = extent(wide, &mut fields) {
        if length_bytes == 0 {
            return Err(Violation::new("an extent has no length"));
        }
        extents.push(Extent {
            length_bytes,
            status,
        });
        taken = bytes.len() - fields.rest().len();
    }
    Ok((extents, taken))
}

fn extent(wide: bool, fields: &mut Fields<'_>) -> Option<(u64, u32)> {
    if !wide {
        return Some((u64::from(fields.u32()?), fields.u32()?));
    }
    let length_bytes = fields.u64()?;
    // Spec: NBD, "Metadata querying": flags that are not known are passed over, so are those above 32 bits.
    let _above = fields.u32()?;
    Some((length_bytes, fields.u32()?))
}

/// A request whose reply is awaited.
#[derive(Clone, Debug)]
pub struct Awaited {
    request: Request,
    /// Id of the context that was agreed on.
    context: Option<u32>,
    /// What a read has got: ranges from the request's start, in order, none touching the next.
    covered: Vec<(u64, u64)>,
    has_status: bool,
    failure: Option<Failure>,
}

/// What follows a head, or is meant by it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Follows {
    /// Nothing.
    Nothing,
    /// Data for this part of the request's buffer.
    Data {
        /// From this byte.
        from: usize,
        /// So many bytes.
        length: usize,
    },
    /// Nothing; this part of the request's buffer reads as zeroes.
    Zeroes {
        /// From this byte.
        from: usize,
        /// So many bytes.
        length: usize,
    },
    /// Extents.
    Extents {
        /// So many bytes.
        payload_bytes: u32,
        /// For [`parse_extents`].
        wide: bool,
    },
}

impl Awaited {
    /// `request` has been sent; `context`: what was agreed on.
    pub fn new(request: Request, context: Option<u32>) -> Self {
        Self {
            request,
            context,
            covered: Vec::new(),
            has_status: false,
            failure: None,
        }
    }

    /// The request.
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// Takes a head that has its cookie. Tells what follows, and whether the reply ends with that.
    ///
    /// # Errors
    /// It is no answer to this request, or not all of one: nothing that the server says can be trusted.
    pub fn accept(&mut self, incoming: Incoming, mode: Mode) -> Result<(Follows, bool), Violation> {
        let (follows, last) = match incoming {
            Incoming::Simple { error, .. } => (self.accept_simple(error, mode)?, true),
            Incoming::Chunk { last, content, .. } => (self.accept_content(content)?, last),
        };
        if last && self.failure.is_none() {
            self.check_whole()?;
        }
        Ok((follows, last))
    }

    /// How the request ended, once its reply has.
    ///
    /// # Errors
    /// The server's.
    pub fn outcome(&self) -> Result<(), Failure> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    fn accept_simple(&mut self, error: Option<NbdError>, mode: Mode) -> Result<Follows, Violation> {
        let carries = matches!(self.request.command, Command::Read | Command::BlockStatus);
        if carries && mode != Mode::Simple {
            return Err(Violation::new(
                "Protocol error: simple reply when structured reply chunk was expected",
            ));
        }
        self.failure = error.map(|error| Failure {
            error,
            text: String::new(),
        });
        if self.request.command != Command::Read || self.failure.is_some() {
            return Ok(Follows::Nothing);
        }
        let (from, length) = self.cover(self.request.offset, self.request.length_bytes)?;
        Ok(Follows::Data { from, length })
    }

    fn accept_content(&mut self, content: Content) -> Result<Follows, Violation> {
        match content {
            Content::None => Ok(Follows::Nothing),
            Content::Error(failure) => {
                self.failure.get_or_insert(failure);
                Ok(Follows::Nothing)
            }
            Content::Data {
                offset,
                length_bytes,
            } => {
                let (from, length) = self.cover(offset, u64::from(length_bytes))?;
                Ok(Follows::Data { from, length })
            }
            Content::Hole {
                offset,
                length_bytes,
            } => {
                let (from, length) = self.cover(offset, u64::from(length_bytes))?;
                Ok(Follows::Zeroes { from, length })
            }
            Content::Status {
                context,
                payload_bytes,
                wide,
            } => {
                let asked = self.request.command == Command::BlockStatus;
                if !asked || Some(context) != self.context || self.has_status {
                    return Err(Violation::new(format!(
                        "Protocol error: status of context {context}, which nobody has asked for"
                    )));
                }
                self.has_status = true;
                Ok(Follows::Extents {
                    payload_bytes,
                    wide,
                })
            }
        }
    }

    /// Takes a piece of what a read gets: within the request, and nothing twice.
    fn cover(&mut self, offset: u64, length_bytes: u64) -> Result<(usize, usize), Violation> {
        let beyond =
            || Violation::new("Protocol error: server sent chunk exceeding requested region");
        if self.request.command != Command::Read {
            return Err(Violation::new(
                "Protocol error: data that nobody has asked for",
            ));
        }
        let start = offset.checked_sub(self.request.offset).ok_or_else(beyond)?;
        let end = start.checked_add(length_bytes).ok_or_else(beyond)?;
        if end > self.request.length_bytes {
            return Err(beyond());
        }
        // Where it belongs among the pieces.
        let index = self
            .covered
            .partition_point(|(_, piece_end)| *piece_end < start);
        let mut merged = (start, end);
        let mut touching = 0;
        for (piece_start, piece_end) in self.covered.iter().skip(index) {
            if *piece_start > end {
                break;
            }
            if *piece_start < end && *piece_end > start {
                return Err(Violation::new(
                    "Protocol error: server sent the same data twice",
                ));
            }
            merged = (merged.0.min(*piece_start), merged.1.max(*piece_end));
            touching += 1;
        }
        self.covered
            .splice(index..index + touching, std::iter::once(merged));
        if self.covered.len() > PIECES_MAX {
            return Err(Violation::new(
                "Protocol error: data comes in too many pieces",
            ));
        }
        let from = usize::try_from(start).map_err(|_| beyond())?;
        let length = usize::try_from(length_bytes).map_err(|_| beyond())?;
        Ok((from, length))
    }

    fn check_whole(&self) -> Result<(), Violation> {
        let whole = match self.request.command {
            Command::Read if self.request.length_bytes > 0 => {
                self.covered == [(0, self.request.length_bytes)]
            }
            Command::BlockStatus => self.has_status,
            _ => true,
        };
        if whole {
            return Ok(());
        }
        Err(Violation::new(format!(
            "Protocol error: incomplete reply to {}",
            self.request.command.name()
        )))
    }
}
