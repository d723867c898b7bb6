//! Tokens to values: one message at a time, with QEMU's error texts and limits.

use serde_json::{Map, Number, Value};

use crate::wire::lexer::{Lexer, Token};

/// Open brackets at once.
const NESTING_MAX: usize = 1024;
/// Tokens of one message.
const TOKENS_MAX: usize = 2 << 20;
/// Bytes of the tokens of one message.
const BYTES_MAX: usize = 64 << 20;

/// Where tokens end is kept in 32 bits.
const _: () = assert!(2 * BYTES_MAX < u32::MAX as usize);

/// Room for tokens and for bytes that stays reserved between messages.
const KEPT_MAX: usize = 16 << 10;

/// A message that is not one, in QEMU's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ReadError(pub String);

impl ReadError {
    fn parse(detail: impl std::fmt::Display) -> Self {
        Self(format!("JSON parse error, {detail}"))
    }
}

/// A streaming reader of messages.
#[derive(Debug, Default)]
pub struct Reader {
    lexer: Lexer,
    /// Each token of the message, and where its bytes end in the lexer's text; they begin where the one before it
    /// ended. Half the room of a `usize`, and a message of small members is mostly tokens.
    tokens: Vec<(Token, u32)>,
    braces: usize,
    brackets: usize,
    punctuation: usize,
}

impl Reader {
    /// The next message or error from the front of `input`; `None`: all was taken and more is needed.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value, ReadError>> {
        loop {
            let token = self.lexer.next(input)?;
            match token {
                Token::Stray => {
                    // Its text ends at the first NUL, as everywhere in C.
                    let bytes = self.lexer.bytes();
                    let shown = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
                    let text = String::from_utf8_lossy(shown);
                    let error = ReadError::parse(format!("stray '{text}'"));
                    self.reset();
                    return Some(Err(error));
                }
                Token::TooLong => {
                    self.reset();
                    return Some(Err(ReadError("JSON token size limit exceeded".to_owned())));
                }
                Token::Punctuation(b'{') => self.braces += 1,
                Token::Punctuation(b'[') => self.brackets += 1,
                Token::Punctuation(b'}') if self.braces == 0 => return Some(self.unbalanced()),
                Token::Punctuation(b'}') => self.braces -= 1,
                Token::Punctuation(b']') if self.brackets == 0 => return Some(self.unbalanced()),
                Token::Punctuation(b']') => self.brackets -= 1,
                Token::Punctuation(_) | Token::Text | Token::Number | Token::Word => {}
            }
            self.punctuation += usize::from(matches!(token, Token::Punctuation(_)));
            let end = u32::try_from(self.lexer.text().len()).unwrap_or(u32::MAX);
            self.tokens.push((token, end));
            if let Some(limit) = self.exceeded() {
                self.reset();
                return Some(Err(ReadError(format!("JSON {limit} limit exceeded"))));
            }
            if self.braces == 0 && self.brackets == 0 {
                let value = self.parse();
                self.reset();
                return Some(value);
            }
        }
    }

    fn unbalanced(&mut self) -> Result<Value, ReadError> {
        let value = match self.tokens.is_empty() {
            true => Ok(Value::Null),
            false => self.parse(),
        };
        self.reset();
        value.and(Err(ReadError::parse("expecting value")))
    }

    fn parse(&self) -> Result<Value, ReadError> {
        let mut parser = Parser {
            tokens: self.tokens.iter().peekable(),
            text: self.lexer.text(),
            taken: 0,
        };
        parser.value()
    }

    fn exceeded(&self) -> Option<&'static str> {
        if self.braces + self.brackets > NESTING_MAX {
            Some("nesting depth")
        } else if self.lexer.text().len() + self.punctuation > BYTES_MAX {
            Some("token size")
        } else if self.tokens.len() > TOKENS_MAX {
            Some("token count")
        } else {
            None
        }
    }

    fn reset(&mut self) {
        // What one long message needed is not kept for ever.
        self.tokens.clear();
        self.tokens.shrink_to(KEPT_MAX);
        self.lexer.forget(KEPT_MAX);
        (self.braces, self.brackets, self.punctuation) = (0, 0, 0);
    }
}

/// Reads one value from a whole text, as options on a command line are.
///
/// # Errors
/// In QEMU's words.
pub fn read_text(text: &str) -> Result<Value, ReadError> {
    let mut reader = Reader::default();
    let with_end = format!("{text}\n");
    let mut input = with_end.as_bytes();
    let first = reader.next(&mut input);
    if first.is_some() && reader.next(&mut input).is_some() {
        return Err(ReadError("Expecting at most one JSON value".to_owned()));
    }
    first.unwrap_or_else(|| Err(ReadError::parse("premature EOI")))
}

struct Parser<'a> {
    tokens: std::iter::Peekable<std::slice::Iter<'a, (Token, u32)>>,
    text: &'a [u8],
    /// Bytes of `text` that belong to tokens taken so far.
    taken: usize,
}

impl<'a> Parser<'a> {
    fn next(&mut self) -> Option<(Token, &'a [u8])> {
        let &(token, end) = self.tokens.next()?;
        let end = usize::try_from(end).unwrap_or(usize::MAX);
        let bytes = &self.text[self.taken..end];
        self.taken = end;
        Some((token, bytes))
    }

    fn next_punctuation(&mut self) -> Option<u8> {
        match self.next()? {
            (Token::Punctuation(byte), _) => Some(byte),
            _ => None,
        }
    }

    /// Takes the next token if it is this one.
    fn next_if(&mut self, byte: u8) -> bool {
        let wanted = Token::Punctuation(byte);
        self.tokens.next_if(|(token, _)| *token == wanted).is_some()
    }

    /// Nesting was bounded before, so this recursion is too.
    fn value(&mut self) -> Result<Value, ReadError> {
        match self.next() {
            Some((Token::Punctuation(b'{'), _)) => self.object(),
            Some((Token::Punctuation(b'['), _)) => self.list(),
            Some((Token::Text, bytes)) => Ok(Value::String(unescape(bytes)?)),
            Some((Token::Number, bytes)) => Ok(number(bytes)),
            Some((Token::Word, b"true")) => Ok(Value::Bool(true)),
            Some((Token::Word, b"false")) => Ok(Value::Bool(false)),
            Some((Token::Word, b"null")) => Ok(Value::Null),
            Some((Token::Word, other)) => {
                let word = String::from_utf8_lossy(other);
                Err(ReadError::parse(format!("invalid keyword '{word}'")))
            }
            _ => Err(ReadError::parse("expecting value")),
        }
    }

    fn object(&mut self) -> Result<Value, ReadError> {
        if self.next_if(b'}') {
            return Ok(Value::Object(Map::new()));
        }
        // Most objects have a few members; growing step by step would hash each of them again.
        let mut members = Map::with_capacity(4);
        loop {
            let key = match self.value()? {
                Value::String(key) => key,
                _ => return Err(ReadError::parse("key is not a string in object")),
            };
            if self.next_punctuation() != Some(b':') {
                return Err(ReadError::parse("missing : in object pair"));
            }
            let value = self.value()?;
            if members.insert(key, value).is_some() {
                return Err(ReadError::parse("duplicate key"));
            }
            match self.next_punctuation() {
                Some(b',') => {}
                Some(b'}') => return Ok(Value::Object(members)),
                _ => return Err(ReadError::parse("expected separator in dict")),
            }
        }
    }

    fn list(&mut self) -> Result<Value, ReadError> {
        let mut elements = Vec::new();
        if self.next_if(b']') {
            return Ok(Value::Array(elements));
        }
        loop {
            elements.push(self.value()?);
            match self.next_punctuation() {
                Some(b',') => {}
                Some(b']') => return Ok(Value::Array(elements)),
                _ => return Err(ReadError::parse("expected separator in list")),
            }
        }
    }
}

fn number(bytes: &[u8]) -> Value {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(number) = text.parse::<i64>() {
        return Value::Number(number.into());
    }
    if let Ok(number) = text.parse::<u64>() {
        return Value::Number(number.into());
    }
    let double = text
        .parse::<f64>()
        .unwrap_or(f64::MAX)
        .clamp(f64::MIN, f64::MAX);
    Number::from_f64(double).map_or(Value::Null, Value::Number)
}

/// The content of a string token.
fn unescape(token: &[u8]) -> Result<String, ReadError> {
    let inner = &token[1..token.len() - 1];
    let invalid = || ReadError::parse("invalid UTF-8 sequence in string");
    let inner = std::str::from_utf8(inner).map_err(|_| invalid())?;
    if !inner.contains('\\') {
        check_characters(inner)?;
        return Ok(inner.to_owned());
    }
    let mut text = String::with_capacity(inner.len());
    let mut rest = inner;
    while let Some(place) = rest.find('\\') {
        text.push_str(&rest[..place]);
        rest = &rest[place + 1..];
        let mut characters = rest.chars();
        let plain = match characters.next() {
            Some(same @ ('"' | '\'' | '\\' | '/')) => Some(same),
            Some('b') => Some('\u{8}'),
            Some('f') => Some('\u{c}'),
            Some('n') => Some('\n'),
            Some('r') => Some('\r'),
            Some('t') => Some('\t'),
            Some('u') => None,
            _ => return Err(ReadError::parse("invalid escape sequence in string")),
        };
        match plain {
            Some(character) => {
                text.push(character);
                rest = characters.as_str();
            }
            None => {
                let (character, after) = unicode(rest, char::from(token[0]))?;
                text.push(character);
                rest = after;
            }
        }
    }
    text.push_str(rest);
    check_characters(&text)?;
    Ok(text)
}

/// A `uXXXX` sequence, or a pair of them, at the front of `rest`; errors also show the quote behind it.
fn unicode(rest: &str, quote: char) -> Result<(char, &str), ReadError> {
    let unit = |text: &str| {
        let digits = text.strip_prefix('u').and_then(|text| text.get(..4))?;
        digits
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit())
            .then_some(())?;
        u32::from_str_radix(digits, 16).ok()
    };
    let bad = |length: usize| {
        let shown: String = rest.chars().chain([quote]).take(length).collect();
        ReadError::parse(format!("\\{shown} is not a valid Unicode character"))
    };
    let first = unit(rest).ok_or_else(|| bad(5))?;
    if !(0xd800..0xdc00).contains(&first) {
        let character = char::from_u32(first).filter(|c| !is_noncharacter(*c));
        return Ok((character.ok_or_else(|| bad(5))?, &rest[5..]));
    }
    let after = &rest[5..];
    let second = after.strip_prefix('\\').and_then(unit);
    match second {
        Some(second) if (0xdc00..0xe000).contains(&second) => {
            let code = 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
            let character = char::from_u32(code).filter(|c| !is_noncharacter(*c));
            Ok((character.ok_or_else(|| bad(11))?, &after[6..]))
        }
        _ => Err(bad(5)),
    }
}

fn is_noncharacter(character: char) -> bool {
    let code = u32::from(character);
    (0xfdd0..=0xfdef).contains(&code) || code & 0xfffe == 0xfffe
}

fn check_characters(text: &str) -> Result<(), ReadError> {
    if !text.is_ascii() && text.chars().any(is_noncharacter) {
        return Err(ReadError::parse("invalid UTF-8 sequence in string"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn all(input: &[u8]) -> Vec<Result<Value, String>> {
        let mut reader = Reader::default();
        let mut rest = input;
        std::iter::from_fn(|| reader.next(&mut rest))
            .map(|one| one.map_err(|e| e.0))
            .collect()
    }

    fn errors(input: &[u8]) -> Vec<String> {
        all(input)
            .into_iter()
            .filter_map(Result::err)
            .map(|text| text.trim_start_matches("JSON parse error, ").to_owned())
            .collect()
    }

    #[test]
    fn texts_of_the_reference() {
        for (input, expected) in [
            (&b"{\"execute\":}\n"[..], "expecting value"),
            (b"{\"execute\" \"x\"}\n", "missing : in object pair"),
            (b"{\"execute\":\"a\" \"b\"}\n", "expected separator in dict"),
            (b"{\"a\":1,\"a\":2}\n", "duplicate key"),
            (b"{1:2}\n", "key is not a string in object"),
            (b"[1,]\n", "expecting value"),
            (b"nul\n", "invalid keyword 'nul'"),
            (b"01\n", "stray '01'"),
            (b"{\"a\":\"\\x\"}\n", "invalid escape sequence in string"),
            (
                b"{\"a\":\"\\ud800\"}\n",
                "\\ud800 is not a valid Unicode character",
            ),
            (b"{bad}\n", "invalid keyword 'bad'"),
        ] {
            assert_eq!(
                errors(input),
                [expected],
                "{}",
                String::from_utf8_lossy(input)
            );
        }
        assert_eq!(
            errors(b"{\"execute\":\"a\tb\"}\n"),
            ["stray '\"a\t'", "expecting value"]
        );
    }

    #[test]
    fn goes_on_after_junk() {
        let input = b"{\"execute\":\"query-ver\xff{\"execute\":\"query-jobs\"}\n";
        let read = all(input);
        assert_eq!(read.len(), 2);
        assert_eq!(read[1], Ok(json!({"execute": "query-jobs"})));
        assert_eq!(
            all(b"-\n01\n{}"),
            [
                Err("JSON parse error, stray '-\n'".to_owned()),
                Ok(json!({}))
            ]
        );
    }

    #[test]
    fn extensions_and_numbers() {
        assert_eq!(all(b"{'a':'it\\'s'}"), [Ok(json!({"a": "it's"}))]);
        let read = all(b"[1e3,-5,18446744073709551615,9223372036854775807,1.5]");
        assert_eq!(read, [Ok(json!([1000.0, -5, u64::MAX, i64::MAX, 1.5]))]);
        assert_eq!(all(br#"["\ud83d\ude00"]"#), [Ok(json!(["\u{1f600}"]))]);
    }

    #[test]
    fn nesting_is_bounded() {
        let deep = |levels: usize| [vec![b'['; levels], vec![b']'; levels]].concat();
        assert!(all(&deep(1024))[0].is_ok());
        assert_eq!(
            all(&deep(1025))[0],
            Err("JSON nesting depth limit exceeded".to_owned())
        );
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_split_anywhere_read_the_same(
            bytes in proptest::collection::vec(proptest::sample::select(
                b"{}[]:,\"'\\ \n\tab0129.-eu\xff\x01".to_vec()), 0..80),
            split in 0_usize..80,
        ) {
            let (first, second) = bytes.split_at(split.min(bytes.len()));
            let mut reader = Reader::default();
            let mut read = Vec::new();
            for mut part in [first, second] {
                while let Some(one) = reader.next(&mut part) {
                    read.push(one.map_err(|error| error.0));
                }
            }
            proptest::prop_assert_eq!(read, all(&bytes));
        }
    }
}
