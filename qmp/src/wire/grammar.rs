//! Tokens to a document, one by one: what may follow what, and the first fault in the words and order of QEMU.

use std::hash::{BuildHasher, RandomState};

use crate::wire::document::{Document, Members};
use crate::wire::lexer::Token;
use crate::wire::reader::ReadError;
use crate::wire::strings::unescape;

/// Members of an object up to which each key is compared with each other.
const FEW_MEMBERS: usize = 16;

/// Reads the tokens of one message.
#[derive(Debug, Default)]
pub struct Grammar {
    document: Document,
    open: Vec<Open>,
    /// What was wrong first; what comes behind it is not looked at.
    fault: Option<ReadError>,
}

/// A list or an object whose end has not come.
#[derive(Debug)]
struct Open {
    /// Its place in the document.
    place: usize,
    /// Elements or members that are complete.
    length: usize,
    expected: Expected,
}

/// What comes next in a list or an object. While a value in it is open, that value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// An element, or the end of an empty list.
    FirstElement,
    Element,
    /// A comma or the end of the list.
    ListSeparator,
    /// A key, or the end of an empty object.
    FirstKey,
    Key,
    Colon,
    Member,
    /// A comma or the end of the object.
    ObjectSeparator,
}

impl Grammar {
    /// Takes the next token of the message.
    pub fn take(&mut self, token: Token, bytes: &[u8]) {
        if self.fault.is_some() {
            return;
        }
        if let Err(fault) = self.step(token, bytes) {
            self.fault = Some(self.earlier_fault().unwrap_or(fault));
            self.document.clear();
        }
    }

    /// Gives out what has been read, or the first fault in it; `None`: neither is there yet.
    pub fn finish(&mut self) -> Option<Result<Document, ReadError>> {
        if let Some(fault) = self.fault.take().or_else(|| self.earlier_fault()) {
            return Some(Err(fault));
        }
        let complete = self.open.is_empty() && !self.document.is_empty();
        complete.then(|| Ok(std::mem::take(&mut self.document)))
    }

    /// Begins a new message.
    pub fn reset(&mut self) {
        self.document.clear();
        self.open.clear();
        self.fault = None;
    }

    fn step(&mut self, token: Token, bytes: &[u8]) -> Result<(), ReadError> {
        use Expected::*;
        let Some(open) = self.open.last_mut() else {
            self.document.make_room();
            return self.value(token, bytes);
        };
        open.expected = match (open.expected, token) {
            (FirstElement | ListSeparator, Token::Punctuation(b']')) => return self.close(),
            (FirstKey | ObjectSeparator, Token::Punctuation(b'}')) => return self.close(),
            (ListSeparator, Token::Punctuation(b',')) => Element,
            (ListSeparator, _) => return Err(ReadError::parse("expected separator in list")),
            (ObjectSeparator, Token::Punctuation(b',')) => Key,
            (ObjectSeparator, _) => return Err(ReadError::parse("expected separator in dict")),
            (Colon, Token::Punctuation(b':')) => Member,
            (Colon, _) => return Err(ReadError::parse("missing : in object pair")),
            _ => return self.value(token, bytes),
        };
        Ok(())
    }

    fn value(&mut self, token: Token, bytes: &[u8]) -> Result<(), ReadError> {
        let document = &mut self.document;
        match (token, bytes) {
            (Token::Punctuation(b'{'), _) => {
                let place = document.open_object();
                self.open(place, Expected::FirstKey);
                return Ok(());
            }
            (Token::Punctuation(b'['), _) => {
                let place = document.open_list();
                self.open(place, Expected::FirstElement);
                return Ok(());
            }
            (Token::Text, _) => document.add_text_by(|text| unescape(bytes, text))?,
            (Token::Number, _) => document.add_number(&String::from_utf8_lossy(bytes)),
            (Token::Word, b"true") => document.add_bool(true),
            (Token::Word, b"false") => document.add_bool(false),
            (Token::Word, b"null") => document.add_null(),
            (Token::Word, _) => {
                let word = String::from_utf8_lossy(bytes);
                return Err(ReadError::parse(format!("invalid keyword '{word}'")));
            }
            _ => return Err(ReadError::parse("expecting value")),
        }
        self.completed(token == Token::Text)
    }

    fn open(&mut self, place: usize, expected: Expected) {
        self.open.push(Open {
            place,
            length: 0,
            expected,
        });
    }

    fn close(&mut self) -> Result<(), ReadError> {
        let Some(open) = self.open.pop() else {
            return Ok(());
        };
        self.document.close(open.place, open.length);
        if self.has_duplicate(&open) {
            return Err(duplicate_key());
        }
        self.completed(false)
    }

    /// A value is complete; goes on with what it is in.
    fn completed(&mut self, is_text: bool) -> Result<(), ReadError> {
        use Expected::*;
        let Some(open) = self.open.last_mut() else {
            return Ok(());
        };
        open.expected = match open.expected {
            FirstKey | Key if is_text => Colon,
            FirstKey | Key => return Err(ReadError::parse("key is not a string in object")),
            Member => {
                open.length += 1;
                ObjectSeparator
            }
            _ => {
                open.length += 1;
                ListSeparator
            }
        };
        Ok(())
    }

    /// The fault of members that are complete, in objects that are not: a key that was there before, which is looked for
    /// at the end of an object otherwise.
    fn earlier_fault(&self) -> Option<ReadError> {
        let duplicate = self.open.iter().any(|open| self.has_duplicate(open));
        duplicate.then(duplicate_key)
    }

    fn has_duplicate(&self, open: &Open) -> bool {
        use Expected::*;
        match open.expected {
            FirstElement | Element | ListSeparator => false,
            FirstKey | Key | Colon | Member | ObjectSeparator => {
                has_duplicate(self.document.open_members(open.place, open.length))
            }
        }
    }
}

fn duplicate_key() -> ReadError {
    ReadError::parse("duplicate key")
}

/// Whether two members have the same key. Time grows with `n log n` and is the same for keys of every choice.
fn has_duplicate(members: Members<'_>) -> bool {
    if members.len() <= FEW_MEMBERS {
        let mut few = [""; FEW_MEMBERS];
        return members.keys().enumerate().any(|(index, key)| {
            let (before, rest) = few.split_at_mut(index);
            if let Some(place) = rest.first_mut() {
                *place = key;
            }
            before.contains(&key)
        });
    }
    // Most comparisons need no more than the hash, which decides nothing by itself.
    let state = RandomState::new();
    let mut keys: Vec<(u64, &str)> = members
        .keys()
        .map(|key| (state.hash_one(key), key))
        .collect();
    keys.sort_unstable();
    keys.windows(2).any(|pair| pair[0] == pair[1])
}
