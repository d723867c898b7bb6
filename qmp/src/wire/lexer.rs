//! Bytes to tokens, as they come in. Accepts what QEMU's lexer accepts and resynchronises where it does.

/// Longest token in bytes.
const TOKEN_BYTES_MAX: usize = 64 << 20;
/// Room for a token in pieces that stays reserved.
const KEPT_MAX: usize = 16 << 10;
/// Bytes of a string that are looked at together.
const BLOCK_BYTES: usize = 32;

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// `{ } [ ] : ,`
    Punctuation(u8),
    /// A string, still with its quotes and escapes.
    Text,
    /// A number as it stands.
    Number,
    /// A run of lower-case letters.
    Word,
    /// What cannot be the start of anything: the bytes so far, the offending one last.
    Stray,
    /// A token longer than allowed.
    TooLong,
}

/// Where the lexer is inside a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Start,
    /// In a string with this quote; the flag: behind a backslash.
    Text(u8, bool),
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
    Word,
    /// Skipping after an error.
    Recovery,
}

/// The lexer. A token is handed out where it stands in the input, unless that came in pieces.
#[derive(Debug)]
pub struct Lexer {
    state: State,
    /// The bytes so far of a token that began in an earlier piece.
    begun: Vec<u8>,
    /// What stands there was handed out.
    complete: bool,
}

impl Default for Lexer {
    fn default() -> Self {
        Self {
            state: State::Start,
            begun: Vec::new(),
            complete: false,
        }
    }
}

impl Lexer {
    /// Takes bytes from the front of `input` until a token is complete, and returns it with all its bytes; `None`: all
    /// were taken and more are needed.
    pub fn next<'t, 'i: 't>(&'t mut self, input: &mut &'i [u8]) -> Option<(Token, &'t [u8])> {
        if self.complete {
            self.begun.clear();
            self.begun.shrink_to(KEPT_MAX);
            self.complete = false;
        }
        let text = *input;
        let (mut begin, mut end) = (0, 0);
        let token = loop {
            let Some(byte) = text.get(end) else {
                self.begun.extend_from_slice(&text[begin..]);
                *input = &[];
                return None;
            };
            match self.step(*byte) {
                Taken::Nothing => {
                    end += 1;
                    begin = end;
                    continue;
                }
                Taken::Before(token) => break token,
                Taken::Last(token) => {
                    end += 1;
                    break token;
                }
                Taken::Byte => end += 1,
            }
            let room = (TOKEN_BYTES_MAX + 1).saturating_sub(self.begun.len() + end - begin);
            let rest = &text[end..];
            end += self.plain(&rest[..rest.len().min(room)]);
            if self.begun.len() + end - begin > TOKEN_BYTES_MAX {
                self.state = State::Start;
                break Token::TooLong;
            }
        };
        let bytes = &text[begin..end];
        *input = &text[end..];
        if self.begun.is_empty() {
            return Some((token, bytes));
        }
        self.begun.extend_from_slice(bytes);
        self.complete = true;
        Some((token, &self.begun))
    }

    /// Bytes that end a token which has begun as the end of all input does, and add nothing to it.
    pub fn end_of_token(&self) -> &'static [u8] {
        use State::*;
        match self.state {
            Start | Recovery => b"",
            Word | Zero | Digits | Fraction | ExponentDigits => b"\n",
            Text(..) | Minus | Point | Exponent | ExponentSign => b"\0",
        }
    }

    /// How many bytes at the front change nothing.
    fn plain(&self, bytes: &[u8]) -> usize {
        match self.state {
            State::Text(quote, false) => plain_text(bytes, quote),
            State::Word => count_while(bytes, u8::is_ascii_lowercase),
            State::Digits => count_while(bytes, u8::is_ascii_digit),
            _ => 0,
        }
    }

    fn step(&mut self, byte: u8) -> Taken {
        use State::*;
        if self.state == Recovery {
            let resets = matches!(byte, b'{' | b'}' | b'[' | b']' | b':' | b',' | 0xfe..)
                || (byte < 0x20 && byte != b'\t');
            if !resets {
                return Taken::Nothing;
            }
            // It is looked at again, and may be stray itself.
            self.state = Start;
        }
        let next = match (self.state, byte) {
            (Start, b' ' | b'\t' | b'\r' | b'\n') => return Taken::Nothing,
            (Start, b'{' | b'}' | b'[' | b']' | b':' | b',') => {
                return Taken::Last(Token::Punctuation(byte));
            }
            (Start, b'"' | b'\'') => Some(Text(byte, false)),
            (Start, b'-') => Some(Minus),
            (Start | Minus, b'0') => Some(Zero),
            (Start | Minus, b'1'..=b'9') => Some(Digits),
            (Start | Word, b'a'..=b'z') => Some(Word),
            (Text(quote, false), byte) if byte == quote => {
                self.state = Start;
                return Taken::Last(Token::Text);
            }
            (Text(quote, false), b'\\') => Some(Text(quote, true)),
            (Text(quote, _), 0x20..0xfe) => Some(Text(quote, false)),
            (Digits, b'0'..=b'9') => Some(Digits),
            (Zero | Digits, b'.') => Some(Point),
            (Digits | Fraction, b'e' | b'E') => Some(Exponent),
            (Point | Fraction, b'0'..=b'9') => Some(Fraction),
            (Exponent, b'+' | b'-') => Some(ExponentSign),
            (Exponent | ExponentSign | ExponentDigits, b'0'..=b'9') => Some(ExponentDigits),
            _ => None,
        };
        if let Some(next) = next {
            self.state = next;
            return Taken::Byte;
        }
        match self.state {
            Word => self.complete(Token::Word),
            // A zero may not be followed by more digits; everything else ends a number.
            Zero if byte.is_ascii_digit() => self.stray(),
            Zero | Digits | Fraction | ExponentDigits => self.complete(Token::Number),
            _ => self.stray(),
        }
    }

    fn complete(&mut self, token: Token) -> Taken {
        self.state = State::Start;
        Taken::Before(token)
    }

    fn stray(&mut self) -> Taken {
        self.state = State::Recovery;
        Taken::Last(Token::Stray)
    }
}

/// What became of a byte.
enum Taken {
    /// It belongs to no token.
    Nothing,
    /// It is part of an unfinished token.
    Byte,
    /// It completes a token.
    Last(Token),
    /// A token ended before it.
    Before(Token),
}

/// How many bytes stand before one that ends a string or begins an escape.
fn plain_text(bytes: &[u8], quote: u8) -> usize {
    let first = &bytes[..bytes.len().min(BLOCK_BYTES)];
    match count_while(first, is_plain_in(quote)) {
        BLOCK_BYTES => BLOCK_BYTES + long_plain_text(&bytes[BLOCK_BYTES..], quote),
        length => length,
    }
}

/// The same, a block at a time, which is one comparison each for the processor. Not for short strings, nor where those
/// are read: getting ready takes as long as they do.
#[inline(never)]
fn long_plain_text(bytes: &[u8], quote: u8) -> usize {
    let is_plain = is_plain_in(quote);
    let blocks = bytes.chunks_exact(BLOCK_BYTES).take_while(|block| {
        block
            .iter()
            .fold(true, |plain, byte| plain & is_plain(byte))
    });
    let length = BLOCK_BYTES * blocks.count();
    length + count_while(&bytes[length..], is_plain)
}

fn is_plain_in(quote: u8) -> impl Fn(&u8) -> bool {
    move |byte| (*byte >= 0x20) & (*byte < 0xfe) & (*byte != quote) & (*byte != b'\\')
}

fn count_while(bytes: &[u8], is_plain: impl Fn(&u8) -> bool) -> usize {
    bytes.iter().take_while(|byte| is_plain(byte)).count()
}
