//! What a server tells of an export in reply to INFO and GO, and of contexts and names in a list.
//!
//! Spec: NBD, "Option reply types".

use crate::constants::info;
use crate::errors::Violation;
use crate::handshake::BlockSizes;
use crate::wire::{Fields, Put};

/// One piece of information.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Info {
    /// Length in bytes and [`crate::constants::transmission_flags`].
    Export {
        /// Length of the disk.
        length_bytes: u64,
        /// What may be sent.
        flags: u16,
    },
    /// The name.
    Name(Vec<u8>),
    /// The description.
    Description(Vec<u8>),
    /// Limits of requests.
    BlockSizes(BlockSizes),
    /// Something else, by its number.
    Other(u16),
}

impl Info {
    /// The payload of a reply.
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        match self {
            Self::Export {
                length_bytes,
                flags,
            } => {
                payload.put_u16(info::EXPORT);
                payload.put_u64(*length_bytes);
                payload.put_u16(*flags);
            }
            Self::Name(name) => {
                payload.put_u16(info::NAME);
                payload.extend_from_slice(name);
            }
            Self::Description(description) => {
                payload.put_u16(info::DESCRIPTION);
                payload.extend_from_slice(description);
            }
            Self::BlockSizes(sizes) => {
                payload.put_u16(info::BLOCK_SIZE);
                payload.put_u32(sizes.minimum);
                payload.put_u32(sizes.preferred);
                payload.put_u32(sizes.maximum);
            }
            Self::Other(kind) => payload.put_u16(*kind),
        }
        payload
    }

    /// Reads the payload of a reply.
    ///
    /// # Errors
    /// It has not the length of its kind.
    pub fn parse(payload: &[u8]) -> Result<Self, Violation> {
        let mut fields = Fields::new(payload);
        let parsed = (|| {
            let kind = fields.u16()?;
            let parsed = match kind {
                info::EXPORT => Self::Export {
                    length_bytes: fields.u64()?,
                    flags: fields.u16()?,
                },
                info::BLOCK_SIZE => Self::BlockSizes(BlockSizes {
                    minimum: fields.u32()?,
                    preferred: fields.u32()?,
                    maximum: fields.u32()?,
                }),
                info::NAME => return Some(Self::Name(fields.rest().to_vec())),
                info::DESCRIPTION => return Some(Self::Description(fields.rest().to_vec())),
                other => return Some(Self::Other(other)),
            };
            fields.rest().is_empty().then_some(parsed)
        })();
        parsed.ok_or_else(|| Violation::new("invalid length of information about the export"))
    }
}

/// The payload of an entry of the list of exports. QEMU puts the description behind the name.
pub fn list_entry(name: &str, description: Option<&str>) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.put_counted(name.as_bytes());
    payload.extend_from_slice(description.unwrap_or_default().as_bytes());
    payload
}

/// Name and description out of an entry of the list of exports.
///
/// # Errors
/// The name goes beyond the entry.
pub fn parse_list_entry(payload: &[u8]) -> Result<(Vec<u8>, Vec<u8>), Violation> {
    let mut fields = Fields::new(payload);
    match fields.counted() {
        Some(name) => Ok((name.to_vec(), fields.rest().to_vec())),
        None => Err(Violation::new("incorrect option name length")),
    }
}

/// The payload of a context in a reply.
pub fn context_entry(id: u32, name: &str) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.put_u32(id);
    payload.extend_from_slice(name.as_bytes());
    payload
}

/// Id and name out of a context in a reply.
///
/// # Errors
/// It is too short for an id.
pub fn parse_context_entry(payload: &[u8]) -> Result<(u32, Vec<u8>), Violation> {
    let mut fields = Fields::new(payload);
    match fields.u32() {
        Some(id) => Ok((id, fields.rest().to_vec())),
        None => Err(Violation::new("Failed to read context id: too short")),
    }
}
