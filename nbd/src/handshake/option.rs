//! Options and their replies: heads, and the payloads that have parts.
//!
//! Spec: NBD, "Fixed newstyle negotiation", "Option types".

use crate::constants::{
    OPTION_MAGIC, OPTION_REPLY_MAGIC, STRING_BYTES_MAX, option_name, option_reply,
};
use crate::errors::Violation;
use crate::wire::{Fields, Put};

/// Bytes of the head of an option.
pub const OPTION_HEAD_BYTES: usize = 16;
/// Bytes of the head of a reply to an option.
pub const OPTION_REPLY_HEAD_BYTES: usize = 20;

/// The head of an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OptionHead {
    /// See [`crate::constants::option`].
    pub option: u32,
    /// Bytes that follow.
    pub payload_bytes: u32,
}

impl OptionHead {
    /// Reads [`OPTION_HEAD_BYTES`].
    ///
    /// # Errors
    /// What begins differently is no option.
    pub fn parse(head: &[u8]) -> Result<Self, Violation> {
        let mut fields = Fields::new(head);
        let parsed = (|| {
            Some((
                fields.u64()?,
                Self {
                    option: fields.u32()?,
                    payload_bytes: fields.u32()?,
                },
            ))
        })();
        match parsed {
            Some((OPTION_MAGIC, head)) => Ok(head),
            _ => Err(Violation::new("Bad magic received")),
        }
    }
}

/// The head of a reply to an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OptionReplyHead {
    /// The option that it answers.
    pub option: u32,
    /// See [`crate::constants::option_reply`].
    pub kind: u32,
    /// Bytes that follow.
    pub payload_bytes: u32,
}

impl OptionReplyHead {
    /// Reads [`OPTION_REPLY_HEAD_BYTES`].
    ///
    /// # Errors
    /// What begins differently is no reply.
    pub fn parse(head: &[u8]) -> Result<Self, Violation> {
        let mut fields = Fields::new(head);
        let parsed = (|| {
            Some((
                fields.u64()?,
                Self {
                    option: fields.u32()?,
                    kind: fields.u32()?,
                    payload_bytes: fields.u32()?,
                },
            ))
        })();
        match parsed {
            Some((OPTION_REPLY_MAGIC, head)) => Ok(head),
            _ => Err(Violation::new("Unexpected option reply magic")),
        }
    }
}

/// Puts an option behind what is to be sent.
pub fn put_option(out: &mut Vec<u8>, option: u32, payload: &[u8]) {
    out.put_u64(OPTION_MAGIC);
    out.put_u32(option);
    out.put_counted(payload);
}

/// Puts a reply to an option behind what is to be sent.
pub fn put_option_reply(out: &mut Vec<u8>, option: u32, kind: u32, payload: &[u8]) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_counted(payload);
}

/// An option that gets an error for an answer; the handshake goes on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OptionFault {
    /// See [`option_reply`].
    pub kind: u32,
    /// For people, in QEMU's words.
    pub text: String,
}

impl OptionFault {
    pub(crate) fn new(kind: u32, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
        }
    }

    fn inconsistent(option: u32) -> Self {
        Self::new(
            option_reply::ERR_INVALID,
            format!("Inconsistent lengths in option {}", option_name(option)),
        )
    }

    pub(crate) fn unexpected_length(option: u32) -> Self {
        Self::new(
            option_reply::ERR_INVALID,
            format!("option '{}' has unexpected length", option_name(option)),
        )
    }

    fn nul(option: u32) -> Self {
        Self::new(
            option_reply::ERR_INVALID,
            format!("Unexpected embedded NUL in option {}", option_name(option)),
        )
    }
}

/// Takes a string of at most 4096 bytes without NUL.
fn string<'a>(fields: &mut Fields<'a>, option: u32) -> Result<&'a [u8], OptionFault> {
    let length = fields
        .u32()
        .ok_or_else(|| OptionFault::inconsistent(option))?;
    let bytes = usize::try_from(length).unwrap_or(usize::MAX);
    if bytes > STRING_BYTES_MAX {
        let text = format!("Invalid name length: {length}");
        return Err(OptionFault::new(option_reply::ERR_INVALID, text));
    }
    let string = fields
        .bytes(bytes)
        .ok_or_else(|| OptionFault::inconsistent(option))?;
    if string.contains(&0) {
        return Err(OptionFault::nul(option));
    }
    Ok(string)
}

/// Payload of INFO and GO.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportQuery<'a> {
    /// The export, as any bytes.
    pub name: &'a [u8],
    /// What the client wants to know, see [`crate::constants::info`].
    pub infos: Vec<u16>,
}

impl<'a> ExportQuery<'a> {
    /// Reads the payload of `option`.
    ///
    /// # Errors
    /// What the client is told if its lengths contradict each other.
    pub fn parse(option: u32, payload: &'a [u8]) -> Result<Self, OptionFault> {
        let mut fields = Fields::new(payload);
        let name = string(&mut fields, option)?;
        let count = fields
            .u16()
            .ok_or_else(|| OptionFault::inconsistent(option))?;
        let mut infos = Vec::new();
        for _ in 0..count {
            let info = fields.u16();
            infos.push(info.ok_or_else(|| OptionFault::inconsistent(option))?);
        }
        if !fields.rest().is_empty() {
            return Err(OptionFault::unexpected_length(option));
        }
        Ok(Self { name, infos })
    }

    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        payload.put_counted(self.name);
        payload.put_u16(u16::try_from(self.infos.len()).unwrap_or(u16::MAX));
        for info in self.infos.iter().take(usize::from(u16::MAX)) {
            payload.put_u16(*info);
        }
        payload
    }
}

/// Payload of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ContextQuery<'a> {
    /// The export, as any bytes.
    pub name: &'a [u8],
    /// Names or beginnings of names of contexts; those longer than any name are left out. `None` if the client has given
    /// none.
    pub queries: Option<Vec<&'a [u8]>>,
}

impl<'a> ContextQuery<'a> {
    /// Reads the payload of `option`.
    ///
    /// # Errors
    /// What the client is told if its lengths contradict each other.
    pub fn parse(option: u32, payload: &'a [u8]) -> Result<Self, OptionFault> {
        let inconsistent = || OptionFault::inconsistent(option);
        let mut fields = Fields::new(payload);
        let name = string(&mut fields, option)?;
        let count = fields.u32().ok_or_else(inconsistent)?;
        let mut queries = Vec::new();
        for _ in 0..count {
            let query = fields.counted().ok_or_else(inconsistent)?;
            if query.contains(&0) {
                return Err(OptionFault::nul(option));
            }
            if query.len() <= STRING_BYTES_MAX {
                queries.push(query);
            }
        }
        if !fields.rest().is_empty() {
            return Err(OptionFault::unexpected_length(option));
        }
        Ok(Self {
            name,
            queries: (count > 0).then_some(queries),
        })
    }

    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let queries = self.queries.as_deref().unwrap_or_default();
        let mut payload = Vec::new();
        payload.put_counted(self.name);
        payload.put_u32(u32::try_from(queries.len()).unwrap_or(u32::MAX));
        for query in queries {
            payload.put_counted(query);
        }
        payload
    }
}

/// A name from a client as it may be quoted: as QEMU cuts it, so that no message grows with what it quotes.
pub(crate) fn quoted(name: &[u8]) -> String {
    const QUOTED_BYTES_MAX: usize = 80;
    match name.split_at_checked(QUOTED_BYTES_MAX) {
        Some((beginning, _)) => format!("{}...", String::from_utf8_lossy(beginning)),
        None => String::from_utf8_lossy(name).into_owned(),
    }
}
