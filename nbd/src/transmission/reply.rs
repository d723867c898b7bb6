//! Replies: their heads, put together by a server.
//!
//! Spec: NBD, "Simple reply message", "Structured reply chunk message", "Extended reply chunk message".

use crate::constants::{
    EXTENDED_REPLY_MAGIC, SIMPLE_REPLY_MAGIC, STRING_BYTES_MAX, STRUCTURED_REPLY_MAGIC,
    chunk_flags, chunk_type,
};
use crate::errors::NbdError;
use crate::handshake::Mode;
use crate::transmission::block_status::StatusExtents;
use crate::transmission::request::Request;
use crate::wire::Put;

/// The reply to one request. Each method puts bytes behind what is to be sent; where data belongs to them, it is sent right
/// behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reply {
    mode: Mode,
    cookie: u64,
    /// Where the request begins; repeated in extended headers.
    offset: u64,
}

impl Reply {
    /// To this request.
    pub fn to(request: &Request, mode: Mode) -> Self {
        Self {
            mode,
            cookie: request.cookie,
            offset: request.offset,
        }
    }

    /// The request has been carried out and there is nothing more to say. Also the end of a reply in chunks, if the chunk
    /// before was not the last.
    ///
    /// After chunks use [`Self::end`], as a simple reply does not end those.
    pub fn done(&self, out: &mut Vec<u8>) {
        match self.mode {
            Mode::Simple | Mode::Structured => self.simple(0, out),
            Mode::Extended => self.end(out),
        }
    }

    /// The last chunk, without content.
    pub fn end(&self, out: &mut Vec<u8>) {
        self.chunk(chunk_type::NONE, true, 0, out);
    }

    /// The request has failed; this ends the reply. Without structured replies nobody sees the text.
    ///
    /// Must not come behind a head of [`Self::data`] whose data has not been sent, nor behind any in [`Mode::Simple`].
    pub fn error(&self, error: NbdError, text: &str, out: &mut Vec<u8>) {
        if self.mode == Mode::Simple {
            return self.simple(error.number(), out);
        }
        let (length, text) = message(text);
        self.chunk(chunk_type::ERROR, true, 6 + u64::from(length), out);
        out.put_u32(error.number());
        out.put_u16(length);
        out.extend_from_slice(text);
    }

    /// The request has failed at `offset`; needs structured replies.
    pub fn error_at(
        &self,
        error: NbdError,
        text: &str,
        offset: u64,
        last: bool,
        out: &mut Vec<u8>,
    ) {
        let (length, text) = message(text);
        self.chunk(chunk_type::ERROR_OFFSET, last, 14 + u64::from(length), out);
        out.put_u32(error.number());
        out.put_u16(length);
        out.extend_from_slice(text);
        out.put_u64(offset);
    }

    /// Head of data that a read has found at `offset`: `length_bytes` of it follow. In [`Mode::Simple`] it is the only one, and
    /// all of the data.
    pub fn data(&self, offset: u64, length_bytes: u32, last: bool, out: &mut Vec<u8>) {
        if self.mode == Mode::Simple {
            return self.simple(0, out);
        }
        let payload_bytes = 8 + u64::from(length_bytes);
        self.chunk(chunk_type::OFFSET_DATA, last, payload_bytes, out);
        out.put_u64(offset);
    }

    /// A read has found `length_bytes` of zeroes at `offset`; needs structured replies.
    pub fn hole(&self, offset: u64, length_bytes: u32, last: bool, out: &mut Vec<u8>) {
        self.chunk(chunk_type::OFFSET_HOLE, last, 12, out);
        out.put_u64(offset);
        out.put_u32(length_bytes);
    }

    /// What one context says; needs structured replies.
    pub fn status(&self, context: u32, extents: &StatusExtents, last: bool, out: &mut Vec<u8>) {
        let kind = match self.mode {
            Mode::Simple | Mode::Structured => chunk_type::BLOCK_STATUS,
            Mode::Extended => chunk_type::BLOCK_STATUS_EXT,
        };
        self.chunk(kind, last, extents.payload_bytes(), out);
        extents.put(context, out);
    }

    fn simple(&self, error: u32, out: &mut Vec<u8>) {
        out.put_u32(SIMPLE_REPLY_MAGIC);
        out.put_u32(error);
        out.put_u64(self.cookie);
    }

    fn chunk(&self, kind: u16, last: bool, payload_bytes: u64, out: &mut Vec<u8>) {
        let extended = self.mode == Mode::Extended;
        out.put_u32(if extended {
            EXTENDED_REPLY_MAGIC
        } else {
            STRUCTURED_REPLY_MAGIC
        });
        out.put_u16(if last { chunk_flags::DONE } else { 0 });
        out.put_u16(kind);
        out.put_u64(self.cookie);
        if extended {
            out.put_u64(self.offset);
            out.put_u64(payload_bytes);
        } else {
            // Data is at most 32 MiB, texts and extents are less.
            out.put_u32(u32::try_from(payload_bytes).unwrap_or(u32::MAX));
        }
    }
}

/// A message that is no longer than the protocol allows, cut between characters.
fn message(text: &str) -> (u16, &[u8]) {
    let mut end = text.len().min(STRING_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let bytes = text.as_bytes().get(..end).unwrap_or_default();
    (u16::try_from(bytes.len()).unwrap_or(0), bytes)
}
