//! Bytes to tokens, as they come in. Accepts what QEMU's lexer accepts and resynchronises where it does.

/// Longest token in bytes.
const TOKEN_BYTES_MAX: usize = 64 << 20;

/// One token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Token {
    /// `{ } [ ] : ,`
    Punctuation(u8),
    /// A string, still with its quotes and escapes.
    Text(Vec<u8>),
    /// A number as it stands.
    Number(Vec<u8>),
    /// A run of lower-case letters.
    Word(Vec<u8>),
    /// What cannot be the start of anything: the bytes so far, the offending one last.
    Stray(Vec<u8>),
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

/// The lexer; keeps a token that is not finished yet.
#[derive(Debug)]
pub struct Lexer {
    state: State,
    token: Vec<u8>,
}

impl Default for Lexer {
    fn default() -> Self {
        Self {
            state: State::Start,
            token: Vec::new(),
        }
    }
}

impl Lexer {
    /// Takes bytes from the front of `input` until a token is complete; `None`: all were taken and more are needed.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Token> {
        while let Some((&byte, rest)) = input.split_first() {
            match self.step(byte) {
                Taken::Byte => *input = rest,
                Taken::Token(token) => {
                    *input = rest;
                    return Some(token);
                }
                Taken::Before(token) => return Some(token),
            }
            if let State::Text(quote, false) = self.state {
                self.take_plain(input, quote);
            }
            if self.token.len() > TOKEN_BYTES_MAX {
                self.token.clear();
                self.state = State::Start;
                return Some(Token::TooLong);
            }
        }
        None
    }

    /// Takes the plain part of a string at once.
    fn take_plain(&mut self, input: &mut &[u8], quote: u8) {
        let plain = |byte: &u8| *byte >= 0x20 && *byte != quote && *byte != b'\\' && *byte < 0xfe;
        let length = input.iter().take_while(|byte| plain(byte)).count();
        let (text, rest) = input.split_at(length);
        self.token.extend_from_slice(text);
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
                self.token.push(byte);
                self.state = Start;
                return Taken::Token(Token::Text(std::mem::take(&mut self.token)));
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
            self.token.push(byte);
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

    fn complete(&mut self, make: fn(Vec<u8>) -> Token) -> Taken {
        self.state = State::Start;
        Taken::Before(make(std::mem::take(&mut self.token)))
    }

    fn stray(&mut self, byte: u8) -> Taken {
        let mut token = std::mem::take(&mut self.token);
        token.push(byte);
        self.state = State::Recovery;
        Taken::Token(Token::Stray(token))
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
