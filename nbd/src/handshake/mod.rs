//! From the first byte to the transmission: what a server offers, what a client asks for, what both have agreed on.
//!
//! Spec: NBD, "Handshake phase".

pub mod client;
#[cfg(test)]
mod client_tests;
pub mod info;
pub mod option;
pub mod server;

#[cfg(test)]
mod server_tests;

use crate::constants::{PAYLOAD_BYTES_MAX, transmission_flags as flags};

/// How requests and replies look from now on; each has what those before have.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Mode {
    /// A reply is one head, and the data where it read.
    #[default]
    Simple,
    /// Replies come in chunks that say what they are.
    Structured,
    /// The same with lengths of 64 bits.
    Extended,
}

/// What a client has to keep to, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockSizes {
    /// Offset and length of each request are multiples of it: a power of two, at most 65536.
    pub minimum: u32,
    /// Smaller requests cost more than they need.
    pub preferred: u32,
    /// Longest data of a request; `u32::MAX` for no limit.
    pub maximum: u32,
}

impl BlockSizes {
    /// What QEMU tells of a node with this alignment and this longest transfer (0: none), both in bytes.
    pub fn of_node(request_alignment: u32, transfer_max: u32) -> Self {
        let minimum = request_alignment.max(1);
        let maximum = match transfer_max {
            0 => PAYLOAD_BYTES_MAX,
            limit => limit.min(PAYLOAD_BYTES_MAX),
        };
        Self {
            minimum,
            preferred: minimum.max(4096),
            maximum,
        }
    }
}

/// What a server knows about one of its exports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportFacts {
    /// Length of the disk in bytes, as it is sent.
    pub length_bytes: u64,
    /// Clients may write.
    pub writable: bool,
    /// Several connections at once see the same: [`flags::CAN_MULTI_CONN`].
    pub multi_conn: bool,
    /// For people; at most 4096 bytes.
    pub description: Option<String>,
    /// Limits of requests.
    pub block_sizes: BlockSizes,
    /// The context `qemu:allocation-depth` is there.
    pub allocation_depth: bool,
    /// Names of the bitmaps shown as `qemu:dirty-bitmap:NAME`.
    pub dirty_bitmaps: Vec<String>,
}

impl ExportFacts {
    /// The flags sent to a client. `status_payload`: status requests may name their contexts.
    pub fn transmission_flags(&self, mode: Mode, status_payload: bool) -> u16 {
        let when = |condition: bool, flag: u16| if condition { flag } else { 0 };
        let written = flags::SEND_TRIM | flags::SEND_WRITE_ZEROES | flags::SEND_FAST_ZERO;
        flags::HAS_FLAGS
            | flags::SEND_FLUSH
            | flags::SEND_FUA
            | flags::SEND_CACHE
            | when(!self.writable, flags::READ_ONLY)
            | when(self.writable, written)
            | when(self.multi_conn, flags::CAN_MULTI_CONN)
            | when(mode >= Mode::Structured, flags::SEND_DF)
            | when(
                mode == Mode::Extended && status_payload,
                flags::BLOCK_STATUS_PAYLOAD,
            )
    }

    /// Every context there is, in QEMU's order and with QEMU's ids.
    pub fn contexts(&self) -> Vec<MetaContext> {
        let depth = self.allocation_depth.then_some(MetaContext {
            id: 1,
            kind: ContextKind::AllocationDepth,
        });
        let bitmaps = (FIRST_BITMAP_ID..)
            .zip(&self.dirty_bitmaps)
            .map(|(id, name)| MetaContext {
                id,
                kind: ContextKind::DirtyBitmap(name.clone()),
            });
        let allocation = MetaContext {
            id: 0,
            kind: ContextKind::Allocation,
        };
        std::iter::once(allocation)
            .chain(depth)
            .chain(bitmaps)
            .collect()
    }
}

/// What replies call the first bitmap of an export; those that follow have the next numbers.
pub const FIRST_BITMAP_ID: u32 = 2;

/// Something that a status request can be about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MetaContext {
    /// What replies call it.
    pub id: u32,
    /// What it is.
    pub kind: ContextKind,
}

/// What a context tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ContextKind {
    /// `base:allocation`: holes and zeroes, see [`crate::constants::allocation`].
    Allocation,
    /// `qemu:allocation-depth`: which layer of the chain has it, 0 for none.
    AllocationDepth,
    /// `qemu:dirty-bitmap:NAME`: 1 where the bitmap of this name is dirty.
    DirtyBitmap(String),
}

impl ContextKind {
    /// The name on the wire.
    pub fn name(&self) -> String {
        match self {
            Self::Allocation => "base:allocation".to_owned(),
            Self::AllocationDepth => "qemu:allocation-depth".to_owned(),
            Self::DirtyBitmap(name) => format!("qemu:dirty-bitmap:{name}"),
        }
    }
}

/// What a server has to offer while clients ask. Answers are taken at once, without waiting for anything.
pub trait ExportDirectory {
    /// Names and descriptions of all exports, in the order in which clients see them.
    fn list(&self) -> Vec<(String, Option<String>)>;

    /// The export of this name.
    fn find(&self, name: &str) -> Option<ExportFacts>;
}

/// What a server and its client have agreed on: how the transmission goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Session {
    /// The export.
    pub export_name: String,
    /// What the client was told of it. It may be gone or have another length by now.
    pub facts: ExportFacts,
    /// What the client was told of what it may send.
    pub flags: u16,
    /// How replies look.
    pub mode: Mode,
    /// What status requests are answered with; none: they are refused.
    pub contexts: Vec<MetaContext>,
}
