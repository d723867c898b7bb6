//! Requests: their heads, and which of them are refused before anything is done.
//!
//! Spec: NBD, "Request message", "Extended request message", "Request types"; texts and order of the checks are QEMU's.

use crate::constants::{
    EXTENDED_REQUEST_MAGIC, PAYLOAD_BYTES_MAX, REQUEST_MAGIC, command_flags as flags,
};
use crate::errors::{NbdError, Violation};
use crate::handshake::{Mode, Session};
use crate::wire::{Fields, Put};

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Command {
    /// Data.
    Read,
    /// Here is data.
    Write,
    /// The client leaves; there is no reply.
    Disconnect,
    /// What was answered is to be safe.
    Flush,
    /// Data that is not needed any more.
    Trim,
    /// Data that will be read soon.
    Cache,
    /// Zeroes.
    WriteZeroes,
    /// What is where.
    BlockStatus,
    /// Something else, by its number.
    Unknown(u16),
}

const KNOWN: [Command; 8] = [
    Command::Read,
    Command::Write,
    Command::Disconnect,
    Command::Flush,
    Command::Trim,
    Command::Cache,
    Command::WriteZeroes,
    Command::BlockStatus,
];

impl Command {
    /// The command of a number.
    pub fn of_number(number: u16) -> Self {
        KNOWN
            .into_iter()
            .find(|command| command.number() == number)
            .unwrap_or(Self::Unknown(number))
    }

    /// The number on the wire.
    pub const fn number(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Unknown(number) => number,
        }
    }

    /// Name in QEMU's messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Disconnect => "disconnect",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::Cache => "cache",
            Self::WriteZeroes => "write zeroes",
            Self::BlockStatus => "block status",
            Self::Unknown(_) => "<unknown>",
        }
    }

    /// It changes what the disk holds.
    pub const fn changes_data(self) -> bool {
        matches!(self, Self::Write | Self::Trim | Self::WriteZeroes)
    }
}

/// A request, without the payload that may follow its head.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// What the reply is known by.
    pub cookie: u64,
    /// What is asked for.
    pub command: Command,
    /// See [`flags`].
    pub flags: u16,
    /// First byte of the disk that it is about.
    pub offset: u64,
    /// How many bytes of the disk it is about. Where a status request has a payload, that says it: see
    /// [`super::StatusQuery`].
    pub length_bytes: u64,
    /// Bytes that follow the head.
    pub payload_bytes: u64,
}

/// A request that is not carried out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// What the client is told.
    pub error: NbdError,
    /// For people.
    pub text: String,
    /// Its payload is longer than anybody would read: after the answer the connection has to be closed. Otherwise the
    /// payload is read and dropped.
    pub closes: bool,
}

impl Refusal {
    fn new(error: NbdError, text: impl Into<String>) -> Self {
        Self {
            error,
            text: text.into(),
            closes: false,
        }
    }

    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::new(NbdError::Invalid, text)
    }
}

impl Request {
    /// Bytes of a request's head.
    pub const fn head_bytes(mode: Mode) -> usize {
        match mode {
            Mode::Simple | Mode::Structured => 28,
            Mode::Extended => 32,
        }
    }

    /// Reads the head that `bytes` begin with; `None`: it is not whole yet.
    ///
    /// # Errors
    /// What begins differently is no request, and nothing behind it can be understood.
    pub fn parse(mode: Mode, bytes: &[u8]) -> Result<Option<Self>, Violation> {
        let expected = match mode {
            Mode::Simple | Mode::Structured => REQUEST_MAGIC,
            Mode::Extended => EXTENDED_REQUEST_MAGIC,
        };
        let mut fields = Fields::new(bytes);
        match fields.u32() {
            Some(magic) if magic != expected => {
                return Err(Violation::new(format!(
                    "invalid magic (got {magic:#x}, expected {expected:#x})"
                )));
            }
            _ => {}
        }
        let parsed = (|| {
            let flags = fields.u16()?;
            let command = Command::of_number(fields.u16()?);
            let cookie = fields.u64()?;
            let offset = fields.u64()?;
            let length_bytes = match mode {
                Mode::Simple | Mode::Structured => u64::from(fields.u32()?),
                Mode::Extended => fields.u64()?,
            };
            Some((flags, command, cookie, offset, length_bytes))
        })();
        Ok(
            parsed.map(|(flags, command, cookie, offset, length_bytes)| {
                let counted = mode == Mode::Extended && flags & flags::PAYLOAD_LEN != 0;
                let has_payload = command == Command::Write || counted;
                Self {
                    cookie,
                    command,
                    flags,
                    offset,
                    length_bytes,
                    payload_bytes: if has_payload { length_bytes } else { 0 },
                }
            }),
        )
    }

    /// Puts the head behind what is to be sent. A write gets the flag that extended headers want; a payload has to be
    /// as long as `payload_bytes` says. Without extended headers, a length above 32 bits cannot be said and is cut.
    pub fn put_head(&self, mode: Mode, out: &mut Vec<u8>) {
        let counted = mode == Mode::Extended && self.payload_bytes > 0;
        let payload_flag = if counted { flags::PAYLOAD_LEN } else { 0 };
        out.put_u32(match mode {
            Mode::Simple | Mode::Structured => REQUEST_MAGIC,
            Mode::Extended => EXTENDED_REQUEST_MAGIC,
        });
        out.put_u16(self.flags | payload_flag);
        out.put_u16(self.command.number());
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
        if mode == Mode::Extended {
            out.put_u64(if counted {
                self.payload_bytes
            } else {
                self.length_bytes
            });
        } else {
            out.put_u32(u32::try_from(self.length_bytes).unwrap_or(u32::MAX));
        }
    }

    /// The request has a flag of [`flags`].
    pub const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Its payload tells which contexts it is about.
    pub fn has_status_payload(&self) -> bool {
        self.command == Command::BlockStatus && self.payload_bytes > 0
    }

    /// Looks whether a server may carry it out. `Disconnect` is never refused.
    ///
    /// # Errors
    /// What the client is told instead.
    pub fn check(&self, session: &Session) -> Result<(), Refusal> {
        let length = self.length_bytes;
        if self.command == Command::Disconnect {
            return Ok(());
        }
        let carries_data = matches!(
            self.command,
            Command::Read | Command::Write | Command::Cache
        );
        let longest = length.max(self.payload_bytes);
        if (carries_data || self.payload_bytes > 0) && longest > u64::from(PAYLOAD_BYTES_MAX) {
            return Err(Refusal {
                closes: self.payload_bytes > u64::from(PAYLOAD_BYTES_MAX),
                ..Refusal::invalid(format!(
                    "len ({longest}) is larger than max len ({PAYLOAD_BYTES_MAX})"
                ))
            });
        }
        if self.command.changes_data() && !session.facts.writable {
            return Err(Refusal::new(NbdError::NotPermitted, "Export is read-only"));
        }
        let known_flags = self.known_flags(session);
        if !self.has_status_payload() {
            self.check_range(self.length_bytes, session)?;
        }
        if self.flags & !known_flags != 0 {
            return Err(Refusal::invalid(format!(
                "unsupported flags for command {} (got {:#x})",
                self.command.name(),
                self.flags
            )));
        }
        match self.command {
            Command::Unknown(number) => Err(Refusal::invalid(format!(
                "invalid request type ({number}) received"
            ))),
            Command::BlockStatus if length == 0 => Err(Refusal::invalid("need non-zero length")),
            Command::BlockStatus if session.contexts.is_empty() => {
                Err(Refusal::invalid("CMD_BLOCK_STATUS not negotiated"))
            }
            Command::BlockStatus if self.payload_bytes > longest_status_payload(session) => {
                Err(Refusal::invalid("CMD_BLOCK_STATUS payload not valid"))
            }
            _ => Ok(()),
        }
    }

    /// Spec: NBD, "Error values": writes beyond the end have no room, everything else makes no sense there.
    pub(crate) fn check_range(&self, length_bytes: u64, session: &Session) -> Result<(), Refusal> {
        let size = session.facts.length_bytes;
        let end = self.offset.checked_add(length_bytes);
        if end.is_some_and(|end| end <= size) {
            return Ok(());
        }
        let error = match self.command {
            Command::Write | Command::WriteZeroes => NbdError::NoSpace,
            _ => NbdError::Invalid,
        };
        let text = format!(
            "operation past EOF; From: {}, Len: {length_bytes}, Size: {size}",
            self.offset
        );
        Err(Refusal::new(error, text))
    }

    /// FUA is let pass everywhere, as in QEMU.
    fn known_flags(&self, session: &Session) -> u16 {
        let payload = match session.mode {
            Mode::Extended => flags::PAYLOAD_LEN,
            Mode::Simple | Mode::Structured => 0,
        };
        let own = match self.command {
            Command::Read if session.mode >= Mode::Structured => flags::DF,
            Command::Write => payload,
            Command::WriteZeroes => flags::NO_HOLE | flags::FAST_ZERO,
            Command::BlockStatus => flags::REQ_ONE | payload,
            _ => 0,
        };
        flags::FUA | own
    }
}

/// A status request names each context once at most.
fn longest_status_payload(session: &Session) -> u64 {
    let contexts = u64::try_from(session.contexts.len()).unwrap_or(u64::MAX);
    contexts.saturating_mul(4).saturating_add(8)
}
