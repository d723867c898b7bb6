//! Bytes to documents: one message at a time, with QEMU's error texts and limits.

use crate::wire::document::Document;
use crate::wire::grammar::Grammar;
use crate::wire::lexer::{Lexer, Token};

/// Open brackets at once.
const NESTING_MAX: isize = 1024;
/// Tokens of one message.
const TOKENS_MAX: usize = 2 << 20;
/// Bytes of the tokens of one message.
const BYTES_MAX: usize = 64 << 20;

/// A document keeps places in 32 bits.
const _: () = assert!(BYTES_MAX + TOKENS_MAX < u32::MAX as usize);

/// A message that is not one, in QEMU's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ReadError(pub String);

impl ReadError {
    pub(super) fn parse(detail: impl std::fmt::Display) -> Self {
        Self(format!("JSON parse error, {detail}"))
    }
}

/// A streaming reader of messages.
#[derive(Debug, Default)]
pub struct Reader {
    lexer: Lexer,
    grammar: Grammar,
    size: Size,
}

/// How much there is of a message.
#[derive(Debug, Default)]
struct Size {
    tokens: usize,
    bytes: usize,
    /// Opening ones less closing ones; where they stand is the grammar's business.
    braces: isize,
    brackets: isize,
}

impl Reader {
    /// The next message or error from the front of `input`; `None`: all was taken and more is needed.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Document, ReadError>> {
        loop {
            let (token, bytes) = self.lexer.next(input)?;
            let counted = match token {
                Token::Stray => Err(stray(bytes)),
                Token::TooLong => Err(exceeded("token size")),
                _ => self.size.count(token, bytes),
            };
            if let Err(refused) = counted {
                self.reset();
                return Some(Err(refused));
            }
            self.grammar.take(token, bytes);
            if self.size.is_whole() {
                return Some(self.finish("expecting value"));
            }
        }
    }

    /// The message or error that the end of all input makes of what has begun, if anything has.
    fn end(&mut self) -> Option<Result<Document, ReadError>> {
        let mut last = self.lexer.end_of_token();
        self.next(&mut last)
            .or_else(|| (self.size.tokens > 0).then(|| self.finish("premature EOI")))
    }

    fn finish(&mut self, unfinished: &str) -> Result<Document, ReadError> {
        let document = self.grammar.finish();
        self.reset();
        document.unwrap_or_else(|| Err(ReadError::parse(unfinished)))
    }

    fn reset(&mut self) {
        self.grammar.reset();
        self.size = Size::default();
    }
}

impl Size {
    fn count(&mut self, token: Token, bytes: &[u8]) -> Result<(), ReadError> {
        self.tokens += 1;
        self.bytes += bytes.len();
        match token {
            Token::Punctuation(b'{') => self.braces += 1,
            Token::Punctuation(b'}') => self.braces -= 1,
            Token::Punctuation(b'[') => self.brackets += 1,
            Token::Punctuation(b']') => self.brackets -= 1,
            _ => {}
        }
        if self.braces + self.brackets > NESTING_MAX {
            Err(exceeded("nesting depth"))
        } else if self.bytes > BYTES_MAX {
            Err(exceeded("token size"))
        } else if self.tokens > TOKENS_MAX {
            Err(exceeded("token count"))
        } else {
            Ok(())
        }
    }

    /// Whether everything that was opened is closed, or more than that.
    fn is_whole(&self) -> bool {
        let (braces, brackets) = (self.braces, self.brackets);
        braces < 0 || brackets < 0 || (braces == 0 && brackets == 0)
    }
}

fn exceeded(limit: &str) -> ReadError {
    ReadError(format!("JSON {limit} limit exceeded"))
}

fn stray(bytes: &[u8]) -> ReadError {
    // Its text ends at the first NUL, as everywhere in C.
    let shown = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    ReadError::parse(format!("stray '{}'", String::from_utf8_lossy(shown)))
}

/// Reads one value from a whole text, as options on a command line are.
///
/// # Errors
/// In QEMU's words.
pub fn read_text(text: &str) -> Result<Document, ReadError> {
    let mut reader = Reader::default();
    let mut rest = text.as_bytes();
    let first = reader.next(&mut rest).or_else(|| reader.end());
    let document = first.unwrap_or_else(|| Err(ReadError::parse("premature EOI")))?;
    if reader.next(&mut rest).or_else(|| reader.end()).is_some() {
        return Err(ReadError("Expecting at most one JSON value".to_owned()));
    }
    Ok(document)
}
#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn outcome(read: Result<Document, ReadError>) -> Result<Value, String> {
        read.map(|document| Value::from(document.root()))
            .map_err(|error| error.0)
    }

    fn all(input: &[u8]) -> Vec<Result<Value, String>> {
        let mut reader = Reader::default();
        let mut rest = input;
        std::iter::from_fn(|| reader.next(&mut rest))
            .map(outcome)
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
    fn whole_texts_end_as_those_of_the_reference() {
        for (text, expected) in [
            ("{\"a\": 1} \n", ""),
            ("{bad", "JSON parse error, invalid keyword 'bad'"),
            ("{\"a\":1,\"a\":2", "JSON parse error, duplicate key"),
            ("{\"a", "JSON parse error, stray '\"a'"),
            ("{", "JSON parse error, premature EOI"),
            ("{\"a\":[1}", "JSON parse error, expected separator in list"),
            ("{\"a\" 1} tr", "JSON parse error, missing : in object pair"),
            ("{\"a\":1} x", "Expecting at most one JSON value"),
            ("{\"a\":1}}", "Expecting at most one JSON value"),
            ("{\"a\":1} {", "Expecting at most one JSON value"),
        ] {
            let error = read_text(text).map_or_else(|error| error.0, |_| String::new());
            assert_eq!(error, expected, "{text}");
        }
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
                    read.push(outcome(one));
                }
            }
            proptest::prop_assert_eq!(read, all(&bytes));
        }
    }
}
