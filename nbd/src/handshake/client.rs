//! A client's side of the handshake: driven as [`super::server::ServerHandshake`] is, against servers that may say anything.
//!
//! It asks for the most and takes what it gets: extended headers, else structured replies; GO, else EXPORT_NAME; also servers
//! that know no options at all.
//!
//! Spec: NBD, "Handshake phase"; texts that clients of QEMU know are QEMU's.

use crate::constants::{
    GREETING_MAGIC, OLDSTYLE_MAGIC, OPTION_MAGIC, OPTION_REPLIES_MAX, OPTION_REPLY_BYTES_MAX,
    handshake_flags, info, option, option_name, option_reply, transmission_flags,
};
use crate::errors::Violation;
use crate::handshake::info::{Info, parse_context_entry};
use crate::handshake::option::{
    ContextQuery, ExportQuery, OPTION_REPLY_HEAD_BYTES, OptionReplyHead, put_option,
};
use crate::handshake::{BlockSizes, Mode};
use crate::wire::{Fields, Put};

/// What a client wants.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wishes {
    /// The export; empty: the server's own choice.
    pub export_name: String,
    /// The context that status requests are to be answered with.
    pub context: String,
    /// Nothing before TLS.
    pub tls: bool,
    /// The most that is asked for.
    pub mode_max: Mode,
}

/// What a server has agreed to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Agreement {
    /// How replies look.
    pub mode: Mode,
    /// Length of the disk in bytes, as the server says.
    pub length_bytes: u64,
    /// What may be sent: [`transmission_flags`].
    pub flags: u16,
    /// Limits of requests, if the server has told of any. They make sense.
    pub block_sizes: Option<BlockSizes>,
    /// Id of the context that was wished for; `None`: there are no status requests.
    pub context: Option<u32>,
}

/// The handshake has come to nothing: the connection has to be closed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The server does not want to.
    #[error("{text}")]
    Refused {
        /// In QEMU's words.
        text: String,
        /// What the server says.
        reason: String,
    },
    /// The server breaks the protocol.
    #[error(transparent)]
    Violation(#[from] Violation),
}

/// What to do once the output has been sent.
#[derive(Debug)]
pub enum Step {
    /// Give it more bytes.
    More,
    /// Both sides speak TLS from the next byte on; then comes [`ClientHandshake::tls_started`].
    StartTls,
    /// The handshake is over.
    Transmit(Box<Agreement>),
}

/// A handshake under way.
#[derive(Debug)]
pub struct ClientHandshake {
    wishes: Wishes,
    awaited: Awaited,
    message: Vec<u8>,
    output: Vec<u8>,
    no_zeroes: bool,
    asked: Asked,
    /// Replies to what was asked for.
    replies: usize,
    mode: Mode,
    context: Option<u32>,
    export: Option<(u64, u16)>,
    block_sizes: Option<BlockSizes>,
}

/// What comes next from the server.
#[derive(Clone, Copy, Debug)]
enum Awaited {
    Greeting,
    Flags,
    Oldstyle,
    ReplyHead,
    Reply(OptionReplyHead),
    ExportNameReply,
    Nothing,
}

/// The options that are sent, in this order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Asked {
    StartTls,
    ExtendedHeaders,
    StructuredReply,
    Context,
    Go,
    ExportName,
}

impl Asked {
    const fn option(self) -> u32 {
        match self {
            Self::StartTls => option::STARTTLS,
            Self::ExtendedHeaders => option::EXTENDED_HEADERS,
            Self::StructuredReply => option::STRUCTURED_REPLY,
            Self::Context => option::SET_META_CONTEXT,
            Self::Go => option::GO,
            Self::ExportName => option::EXPORT_NAME,
        }
    }
}

impl ClientHandshake {
    /// A new connection: the server speaks first.
    pub fn new(wishes: Wishes) -> Self {
        Self {
            wishes,
            awaited: Awaited::Greeting,
            message: Vec::new(),
            output: Vec::new(),
            no_zeroes: false,
            asked: Asked::StartTls,
            replies: 0,
            mode: Mode::Simple,
            context: None,
            export: None,
            block_sizes: None,
        }
    }

    /// What is to be sent before anything else happens; it is handed out once.
    pub fn output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Takes bytes from the server, as far as they belong to what is awaited, and tells how many. What was not taken is given
    /// again after [`Self::step`].
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let missing = self.awaited_bytes().saturating_sub(self.message.len());
        let taken = missing.min(bytes.len());
        self.message.extend(bytes.iter().take(taken));
        taken
    }

    /// Goes on as far as the bytes allow. Output may have come up, whatever the step.
    ///
    /// # Errors
    /// The connection has to be closed.
    pub fn step(&mut self) -> Result<Step, HandshakeError> {
        while self.message.len() >= self.awaited_bytes() {
            let message = std::mem::take(&mut self.message);
            let step = match self.awaited {
                Awaited::Greeting => self.greeting(&message)?,
                Awaited::Flags => self.server_flags(&message)?,
                Awaited::Oldstyle => self.oldstyle(&message)?,
                Awaited::ReplyHead => self.reply_head(&message)?,
                Awaited::Reply(head) => self.reply(head, &message)?,
                Awaited::ExportNameReply => self.export_name_reply(&message)?,
                Awaited::Nothing => return Err(Violation::new("The handshake is over").into()),
            };
            if let Some(step) = step {
                return Ok(step);
            }
        }
        Ok(Step::More)
    }

    /// The connection is encrypted. `unread`: what came from the server in the clear behind its answer to STARTTLS; somebody
    /// on the way may have put it there.
    ///
    /// # Errors
    /// There was any.
    pub fn tls_started(&mut self, unread: &[u8]) -> Result<(), HandshakeError> {
        if !unread.is_empty() || !self.message.is_empty() {
            return Err(Violation::new("Unencrypted data behind the beginning of TLS").into());
        }
        self.ask_for_mode(self.wishes.mode_max);
        Ok(())
    }

    fn awaited_bytes(&self) -> usize {
        match self.awaited {
            Awaited::Greeting => 16,
            Awaited::Flags => 2,
            Awaited::Oldstyle => 8 + 4 + 124,
            Awaited::ReplyHead => OPTION_REPLY_HEAD_BYTES,
            Awaited::Reply(head) => usize::try_from(head.payload_bytes).unwrap_or(usize::MAX),
            Awaited::ExportNameReply if self.no_zeroes => 10,
            Awaited::ExportNameReply => 10 + 124,
            Awaited::Nothing => 0,
        }
    }

    fn greeting(&mut self, message: &[u8]) -> Result<Option<Step>, HandshakeError> {
        let mut fields = Fields::new(message);
        if fields.u64() != Some(GREETING_MAGIC) {
            return Err(Violation::new("Bad initial magic received").into());
        }
        self.awaited = match fields.u64() {
            Some(OPTION_MAGIC) => Awaited::Flags,
            Some(OLDSTYLE_MAGIC) if self.wishes.tls => {
                return Err(refused("Server does not support STARTTLS"));
            }
            Some(OLDSTYLE_MAGIC) if !self.wishes.export_name.is_empty() => {
                return Err(refused("Server does not support non-empty export names"));
            }
            Some(OLDSTYLE_MAGIC) => Awaited::Oldstyle,
            _ => return Err(Violation::new("Bad server magic received").into()),
        };
        Ok(None)
    }

    fn oldstyle(&mut self, message: &[u8]) -> Result<Option<Step>, HandshakeError> {
        let mut fields = Fields::new(message);
        let export = (|| Some((fields.u64()?, fields.u32()?)))();
        let export = export.and_then(|(length, flags)| Some((length, u16::try_from(flags).ok()?)));
        match export {
            Some(export) => self.transmit(export),
            None => Err(Violation::new("Unexpected export flags").into()),
        }
    }

    fn server_flags(&mut self, message: &[u8]) -> Result<Option<Step>, HandshakeError> {
        let flags = Fields::new(message).u16().unwrap_or(0);
        let fixed = flags & handshake_flags::FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & handshake_flags::NO_ZEROES != 0;
        let mut answer = 0;
        if fixed {
            answer |= handshake_flags::CLIENT_FIXED_NEWSTYLE;
        }
        if self.no_zeroes {
            answer |= handshake_flags::CLIENT_NO_ZEROES;
        }
        self.output.put_u32(answer);
        match (fixed, self.wishes.tls) {
            (true, true) => self.ask(Asked::StartTls),
            (true, false) => self.ask_for_mode(self.wishes.mode_max),
            (false, true) => return Err(refused("Server does not support STARTTLS")),
            (false, false) => self.ask(Asked::ExportName),
        }
        Ok(None)
    }

    /// Asks for the first that is not above `mode`, or goes on without.
    fn ask_for_mode(&mut self, mode: Mode) {
        self.ask(match mode {
            Mode::Extended => Asked::ExtendedHeaders,
            Mode::Structured => Asked::StructuredReply,
            Mode::Simple => Asked::Go,
        });
    }

    fn ask(&mut self, asked: Asked) {
        let name = self.wishes.export_name.as_bytes();
        let payload = match asked {
            Asked::Context => ContextQuery {
                name,
                queries: Some(vec![self.wishes.context.as_bytes()]),
            }
            .encode(),
            Asked::Go => ExportQuery {
                name,
                infos: vec![info::BLOCK_SIZE],
            }
            .encode(),
            Asked::ExportName => name.to_vec(),
            _ => Vec::new(),
        };
        put_option(&mut self.output, asked.option(), &payload);
        self.asked = asked;
        self.replies = 0;
        self.awaited = match asked {
            Asked::ExportName => Awaited::ExportNameReply,
            _ => Awaited::ReplyHead,
        };
    }

    fn reply_head(&mut self, message: &[u8]) -> Result<Option<Step>, HandshakeError> {
        let head = OptionReplyHead::parse(message)?;
        self.replies += 1;
        let bytes = usize::try_from(head.payload_bytes).unwrap_or(usize::MAX);
        if head.option != self.asked.option() {
            let text = format!(
                "Unexpected option type {} ({}), expected {} ({})",
                head.option,
                option_name(head.option),
                self.asked.option(),
                option_name(self.asked.option())
            );
            return Err(Violation::new(text).into());
        }
        if bytes > OPTION_REPLY_BYTES_MAX || self.replies > OPTION_REPLIES_MAX {
            let text = format!(
                "server's reply to option {} ({}) is too long",
                head.option,
                option_name(head.option)
            );
            return Err(Violation::new(text).into());
        }
        self.awaited = Awaited::Reply(head);
        Ok(None)
    }

    fn reply(
        &mut self,
        head: OptionReplyHead,
        payload: &[u8],
    ) -> Result<Option<Step>, HandshakeError> {
        self.awaited = Awaited::ReplyHead;
        if head.kind & option_reply::ERROR_BIT != 0 {
            return self.error(head.kind, payload);
        }
        match (self.asked, head.kind) {
            (_, option_reply::ACK) if !payload.is_empty() => {
                Err(Violation::new("Acknowledgement of an option has unexpected data").into())
            }
            (_, option_reply::ACK) => self.acknowledged(),
            (Asked::Context, option_reply::META_CONTEXT) => self.context(payload),
            (Asked::Go, option_reply::INFO) => self.info(payload),
            _ => Err(Violation::new(format!("unexpected reply type {:#x}", head.kind)).into()),
        }
    }

    fn acknowledged(&mut self) -> Result<Option<Step>, HandshakeError> {
        match self.asked {
            Asked::StartTls => {
                self.awaited = Awaited::ReplyHead;
                return Ok(Some(Step::StartTls));
            }
            Asked::ExtendedHeaders => {
                self.mode = Mode::Extended;
                self.ask(Asked::Context);
            }
            Asked::StructuredReply => {
                self.mode = Mode::Structured;
                self.ask(Asked::Context);
            }
            Asked::Context => self.ask(Asked::Go),
            Asked::Go => {
                return match self.export {
                    Some(export) => self.transmit(export),
                    None => Err(Violation::new("broken server omitted NBD_INFO_EXPORT").into()),
                };
            }
            // It is not answered like that.
            Asked::ExportName => {}
        }
        Ok(None)
    }

    /// An option was answered with an error. What is not vital is done without.
    fn error(&mut self, kind: u32, payload: &[u8]) -> Result<Option<Step>, HandshakeError> {
        let reason = String::from_utf8_lossy(payload).into_owned();
        let option = self.asked.option();
        let named = format!("{option} ({})", option_name(option));
        let text = match (self.asked, kind) {
            (Asked::ExtendedHeaders, _) => {
                self.ask(Asked::StructuredReply);
                return Ok(None);
            }
            (Asked::StructuredReply | Asked::Context, _) => {
                self.context = None;
                self.ask(Asked::Go);
                return Ok(None);
            }
            (Asked::Go, option_reply::ERR_UNSUP) if self.mode < Mode::Extended => {
                self.ask(Asked::ExportName);
                return Ok(None);
            }
            (_, option_reply::ERR_UNKNOWN) => "Requested export not available".to_owned(),
            (_, option_reply::ERR_UNSUP) => format!("Unsupported option {named}"),
            (_, option_reply::ERR_POLICY) => format!("Denied by server for option {named}"),
            (_, option_reply::ERR_INVALID) => format!("Invalid parameters for option {named}"),
            (_, option_reply::ERR_PLATFORM) => {
                format!("Server lacks support for option {named}")
            }
            (_, option_reply::ERR_SHUTDOWN) => {
                format!("Server shutting down before option {named}")
            }
            (_, option_reply::ERR_BLOCK_SIZE_REQD) => {
                format!("Server requires INFO_BLOCK_SIZE for option {named}")
            }
            (_, option_reply::ERR_TLS_REQD) => {
                format!("TLS negotiation required before option {named}")
            }
            _ => format!("Unknown error code when asking for option {named}"),
        };
        Err(HandshakeError::Refused { text, reason })
    }

    fn context(&mut self, payload: &[u8]) -> Result<Option<Step>, HandshakeError> {
        let (id, name) = parse_context_entry(payload)?;
        if name != self.wishes.context.as_bytes() {
            let text = format!(
                "Failed to negotiate query '{}', server answered with different context '{}'",
                self.wishes.context,
                crate::handshake::option::quoted(&name)
            );
            return Err(Violation::new(text).into());
        }
        if self.context.replace(id).is_some() {
            return Err(Violation::new("Server answered with one context twice").into());
        }
        Ok(None)
    }

    fn info(&mut self, payload: &[u8]) -> Result<Option<Step>, HandshakeError> {
        match Info::parse(payload)? {
            Info::Export {
                length_bytes,
                flags,
            } => self.export = Some((length_bytes, flags)),
            Info::BlockSizes(sizes) => self.block_sizes = Some(checked(sizes)?),
            Info::Name(_) | Info::Description(_) | Info::Other(_) => {}
        }
        Ok(None)
    }

    fn export_name_reply(&mut self, message: &[u8]) -> Result<Option<Step>, HandshakeError> {
        let mut fields = Fields::new(message);
        match (|| Some((fields.u64()?, fields.u16()?)))() {
            Some(export) => self.transmit(export),
            None => Err(Violation::new("Failed to read export length").into()),
        }
    }

    fn transmit(&mut self, export: (u64, u16)) -> Result<Option<Step>, HandshakeError> {
        let (length_bytes, flags) = export;
        if i64::try_from(length_bytes).is_err() {
            return Err(refused("The export is longer than any disk can be"));
        }
        self.awaited = Awaited::Nothing;
        let known = flags & transmission_flags::HAS_FLAGS != 0;
        Ok(Some(Step::Transmit(Box::new(Agreement {
            mode: self.mode,
            length_bytes,
            flags: if known { flags } else { 0 },
            block_sizes: self.block_sizes,
            context: self.context,
        }))))
    }
}

fn refused(text: &str) -> HandshakeError {
    HandshakeError::Refused {
        text: text.to_owned(),
        reason: String::new(),
    }
}

/// Spec: NBD, "Block size constraints".
fn checked(sizes: BlockSizes) -> Result<BlockSizes, Violation> {
    const MINIMUM_MAX: u32 = 64 << 10;
    let BlockSizes {
        minimum,
        preferred,
        maximum,
    } = sizes;
    if !minimum.is_power_of_two() || minimum > MINIMUM_MAX {
        return Err(Violation::new(format!(
            "server minimum block size {minimum} is not a power of two up to {MINIMUM_MAX}"
        )));
    }
    if preferred < minimum {
        return Err(Violation::new(format!(
            "server preferred block size {preferred} is not valid"
        )));
    }
    // The largest number says that there is no limit.
    if maximum < minimum || (maximum != u32::MAX && !maximum.is_multiple_of(minimum)) {
        return Err(Violation::new(format!(
            "server maximum block size {maximum} is not valid"
        )));
    }
    Ok(sizes)
}
