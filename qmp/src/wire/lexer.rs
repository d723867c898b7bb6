//! Bytes to tokens, as they come in. Accepts what QEMU's lexer accepts and resynchronises where it does.

/// Longest token in bytes.
const TOKEN_BYTES_MAX: usize = 64 << 20;

/// What a token is; its bytes are [`Lexer::bytes`].
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

/// The lexer; keeps the bytes of all tokens since the last [`forget`](Lexer::forget), one behind the other.
#[derive(Debug)]
pub struct Lexer {
    state: State,
    text: Vec<u8>,
    /// Where the token begins that is being read, or was handed out last.
    begin: usize,
    /// The token was handed out.
    complete: bool,
}

impl Default for Lexer {
    fn default() -> Self {
        Self {
            state: State::Start,
            text: Vec::new(),
            begin: 0,
            complete: false,
        }
    }
}

impl Lexer {
    /// Bytes of the token that [`next`](Self::next) returned last; of punctuation: none.
    pub fn bytes(&self) -> &[u8] {
        &self.text[self.begin..]
    }

    /// Bytes of all tokens since the last [`forget`](Self::forget).
    pub fn text(&self) -> &[u8] {
        &self.text
    }

    /// Forgets the tokens that were handed out, and gives room for more than `kept_max` bytes back.
    pub fn forget(&mut self, kept_max: usize) {
        self.text.clear();
        self.text.shrink_to(kept_max);
        self.begin = 0;
    }

    /// Takes bytes from the front of `input` until a token is complete; `None`: all were taken and more are needed.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Token> {
        if self.complete {
            self.begin = self.text.len();
            self.complete = false;
        }
        while let Some((&byte, rest)) = input.split_first() {
            let taken = self.step(byte);
            if !matches!(taken, Taken::Before(_)) {
                *input = rest;
            }
            if let Taken::Token(token) | Taken::Before(token) = taken {
                self.complete = true;
                return Some(token);
            }
            match self.state {
                State::Text(quote, false) => self.take_while(input, |byte| {
                    byte >= 0x20 && byte != quote && byte != b'\\' && byte < 0xfe
                }),
                State::Word => self.take_while(input, |byte| byte.is_ascii_lowercase()),
                State::Digits => self.take_while(input, |byte| byte.is_ascii_digit()),
                _ => {}
            }
            if self.bytes().len() > TOKEN_BYTES_MAX {
                self.state = State::Start;
                self.complete = true;
                return Some(Token::TooLong);
            }
        }
        None
    }

    /// Takes a run of bytes that do not change the state at once.
    fn take_while(&mut self, input: &mut &[u8], plain: impl Fn(u8) -> bool) {
        let length = input.iter().take_while(|byte| plain(**byte)).count();
        let (text, rest) = input.split_at(length);
        self.text.extend_from_slice(text);
        *input = rest;
    }

    fn step(&mut self, byte: u8) -> Taken {
        use State::*;
        if self.state == Recovery {
            let resets = matches!(byte, b'{' | b'}' | b'[' | b']' | b':' | b',' | 0xfe..)
                || (byte < 0x20 && byte != b'\t');
            if !resets {
                return Taken::Byte;
            }
            // It is looked at again, and may be stray itself.
            self.state = Start;
        }
        let next = match (self.state, byte) {
            (Start, b' ' | b'\t' | b'\r' | b'\n') => return Taken::Byte,
            (Start, b'{' | b'}' | b'[' | b']' | b':' | b',') => {
                return Taken::Token(Token::Punctuation(byte));
            }
            (Start, b'"' | b'\'') => Some(Text(byte, false)),
            (Start, b'-') => Some(Minus),
            (Start | Minus, b'0') => Some(Zero),
            (Start | Minus, b'1'..=b'9') => Some(Digits),
            (Start | Word, b'a'..=b'z') => Some(Word),
            (Text(quote, false), byte) if byte == quote => {
                self.text.push(byte);
                self.state = Start;
                return Taken::Token(Token::Text);
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
            self.text.push(byte);
            self.state = next;
            return Taken::Byte;
        }
        match self.state {
            Word => self.complete(Token::Word),
            // A zero may not be followed by more digits; everything else ends a number.
            Zero if byte.is_ascii_digit() => self.stray(byte),
            Zero | Digits | Fraction | ExponentDigits => self.complete(Token::Number),
            _ => self.stray(byte),
        }
    }

    fn complete(&mut self, token: Token) -> Taken {
        self.state = State::Start;
        Taken::Before(token)
    }

    fn stray(&mut self, byte: u8) -> Taken {
        self.text.push(byte);
        self.state = State::Recovery;
        Taken::Token(Token::Stray)
    }
}

enum Taken {
    /// The byte is part of an unfinished token, or nothing.
    Byte,
    /// The byte completes a token.
    Token(Token),
    /// A token ended before this byte.
    Before(Token),
}
