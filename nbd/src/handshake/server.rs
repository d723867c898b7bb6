//! A server's side of the handshake.
//!
//! ```text
//! receive(bytes) -> how many of them were taken      step(exports) -> what to do now
//! ```
//! Whoever drives it sends [`ServerHandshake::output`], gives it what comes in, and asks for the next step. It takes no byte of
//! what comes behind the option that it works on, so that what is left belongs to TLS or to the transmission.
//!
//! Spec: NBD, "Handshake phase"; texts and order are QEMU's.

use crate::constants::{
    GREETING_MAGIC, OPTION_BYTES_MAX, OPTION_BYTES_READ_MAX, OPTION_MAGIC, STRING_BYTES_MAX,
    handshake_flags, info, option, option_name, option_reply,
};
use crate::handshake::info::{Info, context_entry, list_entry};
use crate::handshake::option::{
    ContextQuery, ExportQuery, OPTION_HEAD_BYTES, OptionFault, OptionHead, put_option_reply, quoted,
};
use crate::handshake::{ContextKind, ExportDirectory, ExportFacts, MetaContext, Mode, Session};
use crate::wire::{Fields, Put};

/// What a server demands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Security {
    /// No TLS.
    Plain,
    /// Nothing before TLS.
    TlsRequired,
}

/// What to do once the output has been sent.
#[derive(Debug)]
pub enum Step {
    /// Give it more bytes.
    More,
    /// Both sides speak TLS from the next byte on; then comes [`ServerHandshake::tls_started`].
    StartTls,
    /// The handshake is over.
    Transmit(Box<Session>),
    /// The connection has to be closed.
    Close,
}

/// A handshake under way.
#[derive(Debug)]
pub struct ServerHandshake {
    security: Security,
    encrypted: bool,
    awaited: Awaited,
    message: Vec<u8>,
    output: Vec<u8>,
    fixed_newstyle: bool,
    no_zeroes: bool,
    mode: Mode,
    chosen: Option<Chosen>,
}

/// What comes next from the client.
#[derive(Debug)]
enum Awaited {
    Flags,
    OptionHead,
    Payload {
        option: u32,
        bytes: usize,
    },
    /// Read, forgotten, and answered.
    Dropped {
        option: u32,
        bytes: usize,
        answer: DroppedAnswer,
    },
    Nothing,
}

#[derive(Debug)]
enum DroppedAnswer {
    Fault(OptionFault),
    /// Acknowledged, and the connection closed.
    Farewell,
}

/// Contexts that the client has chosen, and for which export.
#[derive(Debug)]
struct Chosen {
    export_name: String,
    contexts: Vec<MetaContext>,
}

impl ServerHandshake {
    /// A new connection. The greeting is in its output already.
    pub fn new(security: Security) -> Self {
        let mut output = Vec::new();
        output.put_u64(GREETING_MAGIC);
        output.put_u64(OPTION_MAGIC);
        output.put_u16(handshake_flags::FIXED_NEWSTYLE | handshake_flags::NO_ZEROES);
        Self {
            security,
            encrypted: false,
            awaited: Awaited::Flags,
            message: Vec::new(),
            output,
            fixed_newstyle: false,
            no_zeroes: false,
            mode: Mode::Simple,
            chosen: None,
        }
    }

    /// What is to be sent before anything else happens; it is handed out once.
    pub fn output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Takes bytes from the client, as far as they belong to what is awaited, and tells how many. What was not taken is
    /// given again after [`Self::step`].
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        if let Awaited::Dropped { bytes: left, .. } = &mut self.awaited {
            let taken = bytes.len().min(*left);
            *left -= taken;
            return taken;
        }
        let missing = self.awaited_bytes().saturating_sub(self.message.len());
        let taken = missing.min(bytes.len());
        self.message.extend(bytes.iter().take(taken));
        taken
    }

    /// Goes on as far as the bytes allow. Output may have come up, whatever the step.
    pub fn step(&mut self, exports: &dyn ExportDirectory) -> Step {
        while self.message.len() >= self.awaited_bytes() {
            let message = std::mem::take(&mut self.message);
            let step = match std::mem::replace(&mut self.awaited, Awaited::OptionHead) {
                Awaited::Flags => self.client_flags(&message),
                Awaited::OptionHead => self.option_head(&message),
                Awaited::Payload { option, .. } => self.answer(option, &message, exports),
                Awaited::Dropped { option, answer, .. } => self.answer_dropped(option, answer),
                Awaited::Nothing => Some(Step::Close),
            };
            if let Some(step) = step {
                if matches!(step, Step::Close | Step::Transmit(_)) {
                    self.awaited = Awaited::Nothing;
                }
                return step;
            }
        }
        Step::More
    }

    /// The connection is encrypted: what had been agreed on before is forgotten.
    ///
    /// `unread`: what came from the client behind STARTTLS and before TLS. There must not be any: somebody on the way may
    /// have put it there.
    pub fn tls_started(&mut self, unread: &[u8]) -> Step {
        if !unread.is_empty() || !self.message.is_empty() {
            self.awaited = Awaited::Nothing;
            return Step::Close;
        }
        self.encrypted = true;
        self.mode = Mode::Simple;
        self.chosen = None;
        Step::More
    }

    /// How long what is awaited is in bytes, as far as it is kept.
    fn awaited_bytes(&self) -> usize {
        match &self.awaited {
            Awaited::Flags => 4,
            Awaited::OptionHead => OPTION_HEAD_BYTES,
            Awaited::Payload { bytes, .. } | Awaited::Dropped { bytes, .. } => *bytes,
            Awaited::Nothing => 0,
        }
    }

    fn client_flags(&mut self, message: &[u8]) -> Option<Step> {
        let known = handshake_flags::CLIENT_FIXED_NEWSTYLE | handshake_flags::CLIENT_NO_ZEROES;
        let flags = Fields::new(message).u32()?;
        self.fixed_newstyle = flags & handshake_flags::CLIENT_FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & handshake_flags::CLIENT_NO_ZEROES != 0;
        (flags & !known != 0).then_some(Step::Close)
    }

    /// Decides what becomes of an option before its payload is there. `None`: go on.
    fn option_head(&mut self, message: &[u8]) -> Option<Step> {
        let Ok(OptionHead {
            option,
            payload_bytes,
        }) = OptionHead::parse(message)
        else {
            return Some(Step::Close);
        };
        if payload_bytes > OPTION_BYTES_READ_MAX {
            return Some(Step::Close);
        }
        let bytes = usize::try_from(payload_bytes).unwrap_or(usize::MAX);
        let wants_tls = self.security == Security::TlsRequired && !self.encrypted;
        if option == option::EXPORT_NAME {
            // There is no way to say what is wrong with it. Headers of 64 bits were not meant to begin like this.
            if wants_tls || self.mode == Mode::Extended || bytes > STRING_BYTES_MAX {
                return Some(Step::Close);
            }
            self.awaited = Awaited::Payload { option, bytes };
            return None;
        }
        // Spec: NBD, "Newstyle negotiation": such a client knows no other option.
        if !self.fixed_newstyle {
            return Some(Step::Close);
        }
        if wants_tls && option != option::STARTTLS {
            let text = format!("Option {option:#x} not permitted before TLS");
            if option == option::ABORT {
                self.refuse(option, option_reply::ERR_TLS_REQD, &text);
                return Some(Step::Close);
            }
            self.drop_payload(option, bytes, option_reply::ERR_TLS_REQD, text);
            return None;
        }
        self.awaited = match option {
            option::ABORT => Awaited::Dropped {
                option,
                bytes,
                answer: DroppedAnswer::Farewell,
            },
            option::LIST
            | option::STARTTLS
            | option::STRUCTURED_REPLY
            | option::EXTENDED_HEADERS
                if bytes > 0 =>
            {
                Awaited::Dropped {
                    option,
                    bytes,
                    answer: DroppedAnswer::Fault(OptionFault::unexpected_length(option)),
                }
            }
            option::LIST
            | option::STARTTLS
            | option::STRUCTURED_REPLY
            | option::EXTENDED_HEADERS => Awaited::Payload { option, bytes: 0 },
            option::INFO | option::GO | option::LIST_META_CONTEXT | option::SET_META_CONTEXT
                if bytes <= OPTION_BYTES_MAX =>
            {
                Awaited::Payload { option, bytes }
            }
            option::INFO | option::GO | option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                if option == option::SET_META_CONTEXT {
                    self.chosen = None;
                }
                let text = format!("option '{}' is too long", option_name(option));
                self.drop_payload(option, bytes, option_reply::ERR_TOO_BIG, text);
                return None;
            }
            unknown => {
                let text = format!("Unsupported option {unknown} ({})", option_name(unknown));
                self.drop_payload(option, bytes, option_reply::ERR_UNSUP, text);
                return None;
            }
        };
        None
    }

    fn drop_payload(&mut self, option: u32, bytes: usize, kind: u32, text: String) {
        let answer = DroppedAnswer::Fault(OptionFault::new(kind, text));
        self.awaited = Awaited::Dropped {
            option,
            bytes,
            answer,
        };
    }

    fn answer_dropped(&mut self, option: u32, answer: DroppedAnswer) -> Option<Step> {
        match answer {
            DroppedAnswer::Farewell => {
                self.acknowledge(option);
                Some(Step::Close)
            }
            DroppedAnswer::Fault(fault) => {
                self.refuse(option, fault.kind, &fault.text);
                None
            }
        }
    }

    /// Answers an option whose payload is there. `None`: wait for the next one.
    fn answer(
        &mut self,
        option: u32,
        payload: &[u8],
        exports: &dyn ExportDirectory,
    ) -> Option<Step> {
        let answered = match option {
            option::EXPORT_NAME => return Some(self.export_name(payload, exports)),
            option::LIST => {
                for (name, description) in exports.list() {
                    let entry = list_entry(&name, description.as_deref());
                    put_option_reply(&mut self.output, option, option_reply::SERVER, &entry);
                }
                Ok(None)
            }
            option::STARTTLS => self.start_tls(),
            option::INFO | option::GO => self.info(option, payload, exports),
            option::STRUCTURED_REPLY => self.structured_reply(),
            option::EXTENDED_HEADERS => self.extended_headers(),
            _ => self.contexts(option, payload, exports).map(|()| None),
        };
        match answered {
            Ok(step) => {
                self.acknowledge(option);
                step
            }
            Err(fault) => {
                self.refuse(option, fault.kind, &fault.text);
                None
            }
        }
    }

    fn start_tls(&self) -> Result<Option<Step>, OptionFault> {
        match (self.security, self.encrypted) {
            (Security::Plain, _) => Err(OptionFault::new(
                option_reply::ERR_POLICY,
                "TLS not configured",
            )),
            (Security::TlsRequired, true) => Err(OptionFault::new(
                option_reply::ERR_INVALID,
                "TLS already enabled",
            )),
            (Security::TlsRequired, false) => Ok(Some(Step::StartTls)),
        }
    }

    fn structured_reply(&mut self) -> Result<Option<Step>, OptionFault> {
        match self.mode {
            Mode::Simple => {
                self.mode = Mode::Structured;
                Ok(None)
            }
            Mode::Structured => Err(OptionFault::new(
                option_reply::ERR_INVALID,
                "structured reply already negotiated",
            )),
            Mode::Extended => Err(OptionFault::new(
                option_reply::ERR_EXT_HEADER_REQD,
                "extended headers already negotiated",
            )),
        }
    }

    fn extended_headers(&mut self) -> Result<Option<Step>, OptionFault> {
        if self.mode == Mode::Extended {
            return Err(OptionFault::new(
                option_reply::ERR_INVALID,
                "extended headers already negotiated",
            ));
        }
        self.mode = Mode::Extended;
        Ok(None)
    }

    fn export_name(&mut self, name: &[u8], exports: &dyn ExportDirectory) -> Step {
        let found = std::str::from_utf8(name)
            .ok()
            .and_then(|name| Some((name, exports.find(name)?)));
        let Some((name, facts)) = found else {
            return Step::Close;
        };
        let session = self.session(name, facts);
        self.output.put_u64(session.facts.length_bytes);
        self.output.put_u16(session.flags);
        if !self.no_zeroes {
            self.output.extend_from_slice(&[0; 124]);
        }
        Step::Transmit(Box::new(session))
    }

    /// Spec: NBD, "Option types", `NBD_OPT_INFO` and `NBD_OPT_GO`.
    fn info(
        &mut self,
        option: u32,
        payload: &[u8],
        exports: &dyn ExportDirectory,
    ) -> Result<Option<Step>, OptionFault> {
        let query = ExportQuery::parse(option, payload)?;
        let (name, facts) = find(query.name, exports)?;
        let asked = |kind: u16| query.infos.contains(&kind);
        let session = self.session(name, facts);
        // Status requests of any kind become possible once contexts are chosen, which an INFO may come before.
        let status_payload = option == option::INFO || !session.contexts.is_empty();
        let flags = session
            .facts
            .transmission_flags(session.mode, status_payload);
        let mut sizes = session.facts.block_sizes;
        let aligned = sizes.minimum > 1;
        if option == option::GO && !asked(info::BLOCK_SIZE) {
            sizes.minimum = 1;
        }
        let name = asked(info::NAME).then(|| Info::Name(name.as_bytes().to_vec()));
        let description = session.facts.description.as_ref();
        let description = description.map(|text| Info::Description(text.as_bytes().to_vec()));
        let export = Info::Export {
            length_bytes: session.facts.length_bytes,
            flags,
        };
        let always = [Info::BlockSizes(sizes), export];
        for piece in name.into_iter().chain(description).chain(always) {
            put_option_reply(
                &mut self.output,
                option,
                option_reply::INFO,
                &piece.encode(),
            );
        }
        if option == option::INFO {
            if aligned && !asked(info::BLOCK_SIZE) {
                return Err(OptionFault::new(
                    option_reply::ERR_BLOCK_SIZE_REQD,
                    "request NBD_INFO_BLOCK_SIZE to use this export",
                ));
            }
            return Ok(None);
        }
        Ok(Some(Step::Transmit(Box::new(session))))
    }

    /// Spec: NBD, "Option types", `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
    fn contexts(
        &mut self,
        option: u32,
        payload: &[u8],
        exports: &dyn ExportDirectory,
    ) -> Result<(), OptionFault> {
        let set = option == option::SET_META_CONTEXT;
        if set {
            // Whatever comes of this, what was chosen before is over.
            self.chosen = None;
            if self.mode == Mode::Simple {
                let text = format!(
                    "request option '{}' when structured reply is not negotiated",
                    option_name(option)
                );
                return Err(OptionFault::new(option_reply::ERR_INVALID, text));
            }
        }
        let query = ContextQuery::parse(option, payload)?;
        let (name, facts) = find(query.name, exports)?;
        let mut contexts = facts.contexts();
        match (&query.queries, set) {
            (Some(queries), _) => {
                contexts.retain(|context| {
                    let name = context.kind.name();
                    let wildcard = (!set).then_some(&context.kind);
                    queries.iter().any(|query| matches(query, &name, wildcard))
                });
            }
            (None, true) => contexts.clear(),
            (None, false) => {}
        }
        for context in &contexts {
            let id = if set { context.id } else { 0 };
            let entry = context_entry(id, &context.kind.name());
            put_option_reply(&mut self.output, option, option_reply::META_CONTEXT, &entry);
        }
        if set {
            self.chosen = Some(Chosen {
                export_name: name.to_owned(),
                contexts,
            });
        }
        Ok(())
    }

    /// What would be agreed on if the transmission began now.
    fn session(&self, name: &str, facts: ExportFacts) -> Session {
        // Another export of that name may have come meanwhile: only what it has too is kept.
        let offered = facts.contexts();
        let contexts = match &self.chosen {
            Some(chosen) if chosen.export_name == name => {
                let mut contexts = chosen.contexts.clone();
                contexts.retain(|context| offered.contains(context));
                contexts
            }
            _ => Vec::new(),
        };
        Session {
            export_name: name.to_owned(),
            flags: facts.transmission_flags(self.mode, !contexts.is_empty()),
            facts,
            mode: self.mode,
            contexts,
        }
    }

    fn acknowledge(&mut self, option: u32) {
        put_option_reply(&mut self.output, option, option_reply::ACK, &[]);
    }

    fn refuse(&mut self, option: u32, kind: u32, text: &str) {
        put_option_reply(&mut self.output, option, kind, text.as_bytes());
    }
}

/// The export that a client names.
fn find<'a>(
    name: &'a [u8],
    exports: &dyn ExportDirectory,
) -> Result<(&'a str, ExportFacts), OptionFault> {
    std::str::from_utf8(name)
        .ok()
        .and_then(|name| Some((name, exports.find(name)?)))
        .ok_or_else(|| {
            let text = format!("export '{}' not present", quoted(name));
            OptionFault::new(option_reply::ERR_UNKNOWN, text)
        })
}

/// A query means this context: by its name, or where a list is asked for (`wildcard`) by what its name begins with.
///
/// Spec: NBD, "Metadata querying", "The `base:` metadata namespace"; QEMU's `qemu:` likewise.
fn matches(query: &[u8], name: &str, wildcard: Option<&ContextKind>) -> bool {
    let beginnings: &[&[u8]] = match wildcard {
        None => &[],
        Some(ContextKind::Allocation) => &[b"base:"],
        Some(ContextKind::AllocationDepth) => &[b"qemu:"],
        Some(ContextKind::DirtyBitmap(_)) => &[b"qemu:", b"qemu:dirty-bitmap:"],
    };
    query == name.as_bytes() || beginnings.contains(&query)
}
