//! The numbers of the protocol, and the limits that hold here.

/// Begins a server's greeting.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Begins an option; second half of the greeting. Spec: NBD, "Fixed newstyle negotiation".
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Begins the reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Second half of the greeting of a server that knows no options (oldstyle).
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Begins a request. Spec: NBD, "Request message".
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins a request with extended headers. Spec: NBD, "Extended request message".
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Begins a simple reply. Spec: NBD, "Simple reply message".
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Begins a chunk of a structured reply. Spec: NBD, "Structured reply chunk message".
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Begins a chunk of a reply with extended headers. Spec: NBD, "Extended reply chunk message".
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Longest name, description, query and message in bytes. Spec: NBD, "Conventions".
pub const STRING_BYTES_MAX: usize = 4096;
/// Longest payload of an option that is kept in memory; the longest one that can be meant is that of GO with 65535 infos.
pub const OPTION_BYTES_MAX: usize = 256 << 10;
/// Longest payload of an option that is read at all (and dropped), as in QEMU.
pub const OPTION_BYTES_READ_MAX: u32 = 32 << 20;
/// Longest reply to an option that a client takes.
pub const OPTION_REPLY_BYTES_MAX: usize = 64 << 10;
/// Most replies to one option that a client takes: entries of a list, infos, contexts.
pub const OPTION_REPLIES_MAX: usize = 10_000;
/// Longest data of a request or of a reply, as in QEMU.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Most extents in one reply to a status request, as in QEMU.
pub const STATUS_EXTENTS_MAX: usize = 131_072;
/// Most contexts that a status request may name.
pub const STATUS_QUERIES_MAX: usize = 4096;

/// Flags of the greeting and of its answer. Spec: NBD, "Handshake phase", "Flag fields".
pub mod handshake_flags {
    /// The server answers every option.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The server can leave out the zeroes behind its answer to EXPORT_NAME.
    pub const NO_ZEROES: u16 = 1 << 1;
    /// The client knows that options are answered.
    pub const CLIENT_FIXED_NEWSTYLE: u32 = 1 << 0;
    /// The client wants no zeroes.
    pub const CLIENT_NO_ZEROES: u32 = 1 << 1;
}

/// Flags of an export. Spec: NBD, "Transmission flags".
pub mod transmission_flags {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is known.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The flag FUA is known.
    pub const SEND_FUA: u16 = 1 << 3;
    /// Seeks cost time.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// TRIM is known.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is known.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The flag DF is known.
    pub const SEND_DF: u16 = 1 << 7;
    /// What one connection has flushed all connections see and have safe.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// Defined by an experimental extension.
    pub const SEND_RESIZE: u16 = 1 << 9;
    /// CACHE is known.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The flag FAST_ZERO is known.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// A status request may name its contexts.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Flags of a request. Spec: NBD, "Command flags".
pub mod command_flags {
    /// What was written is safe before the reply.
    pub const FUA: u16 = 1 << 0;
    /// Zeroes take room.
    pub const NO_HOLE: u16 = 1 << 1;
    /// The data comes in one piece.
    pub const DF: u16 = 1 << 2;
    /// One extent for each context, within the range.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fails rather than writes zeroes as data.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// With extended headers: the length is that of a payload.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Flags of a chunk of a reply.
pub mod chunk_flags {
    /// The last chunk of its reply.
    pub const DONE: u16 = 1 << 0;
}

/// Types of chunks. Spec: NBD, "Structured reply types".
pub mod chunk_type {
    /// No content: the end of a reply.
    pub const NONE: u16 = 0;
    /// Data, behind its offset.
    pub const OFFSET_DATA: u16 = 1;
    /// An offset and how many zeroes follow it.
    pub const OFFSET_HOLE: u16 = 2;
    /// The id of a context and extents of 32 bits.
    pub const BLOCK_STATUS: u16 = 5;
    /// The same with 64 bits, for extended headers.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// This bit makes it an error.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// The request failed.
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// The request failed at this offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// Options. Spec: NBD, "Option types".
pub mod option {
    /// Ends the handshake without a reply in case of an error.
    pub const EXPORT_NAME: u32 = 1;
    /// The client leaves.
    pub const ABORT: u32 = 2;
    /// Names of the exports.
    pub const LIST: u32 = 3;
    /// TLS from here on.
    pub const STARTTLS: u32 = 5;
    /// What an export is.
    pub const INFO: u32 = 6;
    /// The same, and on to the transmission.
    pub const GO: u32 = 7;
    /// Replies come in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which contexts there are.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Which contexts the client wants.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Headers with 64 bits.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options. Spec: NBD, "Option reply types".
pub mod option_reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An entry of a list.
    pub const SERVER: u32 = 2;
    /// See [`super::info`].
    pub const INFO: u32 = 3;
    /// A context.
    pub const META_CONTEXT: u32 = 4;
    /// This bit makes it an error.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// The option is not allowed.
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    /// The option makes no sense.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// The option is not possible on this machine.
    pub const ERR_PLATFORM: u32 = ERROR_BIT | 4;
    /// Not before TLS.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT | 5;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
    /// The server is about to end.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT | 7;
    /// Block sizes have to be asked for.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT | 8;
    /// More than the server wants to handle.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT | 9;
    /// Extended headers have been agreed on.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT | 10;
}

/// Kinds of information about an export. Spec: NBD, "Option reply types", `NBD_REP_INFO`.
pub mod info {
    /// Length and flags.
    pub const EXPORT: u16 = 0;
    /// The name.
    pub const NAME: u16 = 1;
    /// The description.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest, preferred and largest request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Flags of `qemu:dirty-bitmap:NAME`.
pub mod dirty_bitmap {
    /// Something has changed here.
    pub const DIRTY: u32 = 1 << 0;
}

/// Flags of `base:allocation`. Spec: NBD, "The `base:` metadata namespace".
pub mod allocation {
    /// Writing here takes room, as far as is known.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// Name of an option in QEMU's messages.
pub fn option_name(option: u32) -> &'static str {
    match option {
        option::EXPORT_NAME => "export name",
        option::ABORT => "abort",
        option::LIST => "list",
        option::STARTTLS => "starttls",
        option::INFO => "info",
        option::GO => "go",
        option::STRUCTURED_REPLY => "structured reply",
        option::LIST_META_CONTEXT => "list meta context",
        option::SET_META_CONTEXT => "set meta context",
        option::EXTENDED_HEADERS => "extended headers",
        _ => "<unknown>",
    }
}
