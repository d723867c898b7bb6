//! What a status request is about, and the extents that answer it.
//!
//! Spec: NBD, "Request types", `NBD_CMD_BLOCK_STATUS`; "Structured reply types", `NBD_REPLY_TYPE_BLOCK_STATUS` and
//! `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`.

use crate::constants::{STATUS_EXTENTS_MAX, command_flags};
use crate::handshake::{MetaContext, Mode, Session};
use crate::transmission::request::{Refusal, Request};
use crate::wire::{Fields, Put};

/// A part of the disk and what a context says of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// How long it is; more than 0.
    pub length_bytes: u64,
    /// What the context says.
    pub status: u32,
}

/// What a status request is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StatusQuery {
    /// How many bytes of the disk.
    pub length_bytes: u64,
    /// Which contexts are answered for; at least one.
    pub contexts: Vec<MetaContext>,
}

impl StatusQuery {
    /// Reads the payload of a status request that [`Request::check`] has let pass; empty: all contexts that were agreed on.
    ///
    /// # Errors
    /// What the client is told instead.
    pub fn parse(request: &Request, payload: &[u8], session: &Session) -> Result<Self, Refusal> {
        if !request.has_status_payload() {
            return Ok(Self {
                length_bytes: request.length_bytes,
                contexts: session.contexts.clone(),
            });
        }
        let query = Self::named(payload, session)
            .ok_or_else(|| Refusal::invalid("CMD_BLOCK_STATUS payload not valid"))?;
        request.check_range(query.length_bytes, session)?;
        if query.length_bytes == 0 {
            return Err(Refusal::invalid("need non-zero length"));
        }
        Ok(query)
    }

    /// The contexts that a payload names, each of them once.
    fn named(payload: &[u8], session: &Session) -> Option<Self> {
        let mut fields = Fields::new(payload);
        let length_bytes = fields.u64()?;
        let mut contexts: Vec<MetaContext> = Vec::new();
        while !fields.rest().is_empty() {
            let id = fields.u32()?;
            let found = session.contexts.iter().find(|context| context.id == id)?;
            if contexts.contains(found) {
                return None;
            }
            contexts.push(found.clone());
        }
        (!contexts.is_empty()).then_some(Self {
            length_bytes,
            contexts,
        })
    }
}

/// The extents of one context, gathered for a reply: bounded, and as the request and its mode want them.
#[derive(Debug)]
pub struct StatusExtents {
    mode: Mode,
    /// How far the extents may go; those behind are not asked for.
    left_bytes: u64,
    count_max: usize,
    extents: Vec<Extent>,
}

impl StatusExtents {
    /// Nothing yet, of `length_bytes` at most.
    pub fn new(mode: Mode, request: &Request, length_bytes: u64) -> Self {
        let one = request.has(command_flags::REQ_ONE);
        Self {
            mode,
            left_bytes: length_bytes,
            count_max: if one { 1 } else { STATUS_EXTENTS_MAX },
            extents: Vec::new(),
        }
    }

    /// Takes the next extent, as far as the request goes, and joins it with the one before if they are alike. Whether
    /// further ones are of use.
    pub fn add(&mut self, extent: Extent) -> bool {
        let length_bytes = extent.length_bytes.min(self.left_bytes);
        let longest = match self.mode {
            Mode::Extended => u64::MAX,
            // Aligned to whatever a block may be.
            Mode::Simple | Mode::Structured => u64::from(u32::MAX) & !0xffff,
        };
        let mut rest = length_bytes;
        if let Some(last) = self.extents.last_mut()
            && last.status == extent.status
        {
            let joined = rest.min(longest.saturating_sub(last.length_bytes));
            last.length_bytes += joined;
            rest -= joined;
        }
        while rest > 0 && self.extents.len() < self.count_max {
            let length_bytes = rest.min(longest);
            self.extents.push(Extent {
                length_bytes,
                status: extent.status,
            });
            rest -= length_bytes;
        }
        self.left_bytes -= length_bytes - rest;
        rest == 0 && self.left_bytes > 0
    }

    /// What has been gathered.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// How many bytes further extents may have.
    pub fn left_bytes(&self) -> u64 {
        self.left_bytes
    }

    /// The payload of a chunk.
    pub(crate) fn put(&self, context: u32, out: &mut Vec<u8>) {
        out.put_u32(context);
        if self.mode == Mode::Extended {
            out.put_u32(u32::try_from(self.extents.len()).unwrap_or(u32::MAX));
        }
        for extent in &self.extents {
            if self.mode == Mode::Extended {
                out.put_u64(extent.length_bytes);
                out.put_u64(u64::from(extent.status));
            } else {
                out.put_u32(u32::try_from(extent.length_bytes).unwrap_or(u32::MAX));
                out.put_u32(extent.status);
            }
        }
    }

    /// Bytes that [`Self::put`] makes.
    pub(crate) fn payload_bytes(&self) -> u64 {
        let count = u64::try_from(self.extents.len()).unwrap_or(u64::MAX);
        match self.mode {
            Mode::Extended => 8 + 16 * count,
            Mode::Simple | Mode::Structured => 4 + 8 * count,
        }
    }
}
