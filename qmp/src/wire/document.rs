//! [`Document`]: one JSON value as it was sent, read but not built: a text and a list of entries.
//!
//! Building a tree of values takes a hash table for each object and a block of memory for each string, most of which is
//! thrown away by the checks that follow. A document takes two blocks however much is in it, and [`Json`] walks over it.

use serde_json::{Number, Value};

/// Bytes that the text of a command may take before it grows.
const TEXT_ROOM_BYTES: usize = 128;
/// Values and keys that a command may have before it grows.
const ENTRIES_ROOM: usize = 16;

/// A value and everything in it.
#[derive(Clone, Debug, Default)]
pub struct Document {
    /// The contents of all strings and the digits of all numbers.
    text: String,
    /// An entry for each value, followed by those of what is in it; a member's key stands before its value.
    entries: Vec<Entry>,
}

/// A value. Numbers in it take half the room of `usize`, which matters for a message of small members.
#[derive(Clone, Copy, Debug)]
enum Entry {
    Null,
    Bool(bool),
    Number(Span),
    Text(Span),
    List(Extent),
    Object(Extent),
}

/// Bytes of the text.
#[derive(Clone, Copy, Debug)]
struct Span {
    begin: u32,
    end: u32,
}

impl Span {
    fn len(self) -> usize {
        long(self.end.saturating_sub(self.begin))
    }
}

/// What is in a list or an object.
#[derive(Clone, Copy, Debug)]
struct Extent {
    /// Elements or members.
    length: u32,
    /// The entry behind the last one in it, so that it can be passed over.
    end: u32,
}

/// A value of a document.
#[derive(Clone, Copy, Debug)]
pub enum Json<'a> {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A number as it was written; [`number`] reads it.
    Number(&'a str),
    /// What stands in a string.
    Text(&'a str),
    /// `[...]`
    List(Elements<'a>),
    /// `{...}`
    Object(Members<'a>),
}

/// The elements of a list.
#[derive(Clone, Copy, Debug)]
pub struct Elements<'a>(Inside<'a>);

/// The members of an object, in their order. No two have the same key.
#[derive(Clone, Copy, Debug)]
pub struct Members<'a>(Inside<'a>);

/// What is in a list or an object.
#[derive(Clone, Copy, Debug)]
struct Inside<'a> {
    document: &'a Document,
    first: usize,
    length: usize,
}

impl Document {
    /// A document that holds nothing yet and reads as `null`.
    pub const fn new() -> Self {
        Self {
            text: String::new(),
            entries: Vec::new(),
        }
    }

    /// The value.
    pub fn root(&self) -> Json<'_> {
        self.value(0)
    }

    fn value(&self, place: usize) -> Json<'_> {
        let inside = |extent: Extent| Inside {
            document: self,
            first: place + 1,
            length: long(extent.length),
        };
        match self.entries.get(place) {
            None | Some(Entry::Null) => Json::Null,
            Some(Entry::Bool(flag)) => Json::Bool(*flag),
            Some(Entry::Number(span)) => Json::Number(self.text(*span)),
            Some(Entry::Text(span)) => Json::Text(self.text(*span)),
            Some(Entry::List(extent)) => Json::List(Elements(inside(*extent))),
            Some(Entry::Object(extent)) => Json::Object(Members(inside(*extent))),
        }
    }

    fn key(&self, place: usize) -> &str {
        match self.entries.get(place) {
            Some(Entry::Text(span)) => self.text(*span),
            _ => "",
        }
    }

    fn is_key(&self, place: usize, name: &str) -> bool {
        match self.entries.get(place) {
            Some(Entry::Text(span)) => span.len() == name.len() && self.text(*span) == name,
            _ => false,
        }
    }

    fn text(&self, span: Span) -> &str {
        let bytes = long(span.begin)..long(span.end);
        self.text.get(bytes).unwrap_or_default()
    }

    /// The entry behind the value at `place` and all that is in it.
    fn behind(&self, place: usize) -> usize {
        match self.entries.get(place) {
            Some(Entry::List(extent) | Entry::Object(extent)) => long(extent.end),
            _ => place + 1,
        }
    }
}

/// How it is made: value after value, each behind the one before it or in the list or object opened last.
impl Document {
    /// Makes room for a command of common size.
    pub(super) fn make_room(&mut self) {
        self.text.reserve(TEXT_ROOM_BYTES);
        self.entries.reserve(ENTRIES_ROOM);
    }

    /// Takes everything out, and keeps no more than that room.
    pub(super) fn clear(&mut self) {
        self.text.clear();
        self.text.shrink_to(TEXT_ROOM_BYTES);
        self.entries.clear();
        self.entries.shrink_to(ENTRIES_ROOM);
    }

    /// Whether nothing has been added.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds `null`.
    pub(super) fn add_null(&mut self) {
        self.entries.push(Entry::Null);
    }

    /// Adds a boolean.
    pub(super) fn add_bool(&mut self, flag: bool) {
        self.entries.push(Entry::Bool(flag));
    }

    /// Adds a number as it is written.
    pub(super) fn add_number(&mut self, digits: &str) {
        let begin = self.text.len();
        self.text.push_str(digits);
        let span = self.span_from(begin);
        self.entries.push(Entry::Number(span));
    }

    /// Adds a string or a key.
    fn add_text(&mut self, text: &str) {
        let begin = self.text.len();
        self.text.push_str(text);
        let span = self.span_from(begin);
        self.entries.push(Entry::Text(span));
    }

    /// Adds a string or a key: what `append` appends.
    ///
    /// # Errors
    /// Those of `append`; then nothing is added that could be walked over.
    pub(super) fn add_text_by<E>(
        &mut self,
        append: impl FnOnce(&mut String) -> Result<(), E>,
    ) -> Result<(), E> {
        let begin = self.text.len();
        append(&mut self.text)?;
        let span = self.span_from(begin);
        self.entries.push(Entry::Text(span));
        Ok(())
    }

    fn span_from(&self, begin: usize) -> Span {
        Span {
            begin: short(begin),
            end: short(self.text.len()),
        }
    }

    /// Begins a list; returns its place.
    pub(super) fn open_list(&mut self) -> usize {
        self.open(Entry::List)
    }

    /// Begins an object; returns its place.
    pub(super) fn open_object(&mut self) -> usize {
        self.open(Entry::Object)
    }

    fn open(&mut self, entry: impl Fn(Extent) -> Entry) -> usize {
        let place = self.entries.len();
        let empty = Extent {
            length: 0,
            end: short(place + 1),
        };
        self.entries.push(entry(empty));
        place
    }

    /// Ends the list or object at `place`, which has this many elements or members.
    pub(super) fn close(&mut self, place: usize, length: usize) {
        let end = short(self.entries.len());
        if let Some(Entry::List(extent) | Entry::Object(extent)) = self.entries.get_mut(place) {
            *extent = Extent {
                length: short(length),
                end,
            };
        }
    }

    /// The first members, this many, of an object that is still open.
    pub(super) fn open_members(&self, place: usize, length: usize) -> Members<'_> {
        Members(Inside {
            document: self,
            first: place + 1,
            length,
        })
    }

    fn add_value(&mut self, value: &Value) {
        match value {
            Value::Null => self.add_null(),
            Value::Bool(flag) => self.add_bool(*flag),
            Value::Number(number) => self.add_number(&number.to_string()),
            Value::String(text) => self.add_text(text),
            Value::Array(elements) => {
                let place = self.open_list();
                elements.iter().for_each(|element| self.add_value(element));
                self.close(place, elements.len());
            }
            Value::Object(members) => {
                let place = self.open_object();
                for (key, member) in members {
                    self.add_text(key);
                    self.add_value(member);
                }
                self.close(place, members.len());
            }
        }
    }

    fn add_json(&mut self, json: Json<'_>) {
        match json {
            Json::Null => self.add_null(),
            Json::Bool(flag) => self.add_bool(flag),
            Json::Number(digits) => self.add_number(digits),
            Json::Text(text) => self.add_text(text),
            Json::List(elements) => {
                let place = self.open_list();
                elements.iter().for_each(|element| self.add_json(element));
                self.close(place, elements.iter().len());
            }
            Json::Object(members) => {
                let place = self.open_object();
                for (key, member) in members.iter() {
                    self.add_text(key);
                    self.add_json(member);
                }
                self.close(place, members.len());
            }
        }
    }
}

/// The reader's limits are far below where this would matter; a value beyond would read as absent.
fn short(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn long(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

impl From<&Value> for Document {
    /// For values that do not come from the wire.
    fn from(value: &Value) -> Self {
        let mut document = Self::new();
        document.add_value(value);
        document
    }
}

impl From<Json<'_>> for Document {
    /// A part of a document, by itself.
    fn from(json: Json<'_>) -> Self {
        let mut document = Self::new();
        document.add_json(json);
        document
    }
}

impl From<Json<'_>> for Value {
    /// Builds the whole tree. Nesting was bounded when it was read, so this recursion is too.
    fn from(json: Json<'_>) -> Self {
        match json {
            Json::Null => Self::Null,
            Json::Bool(flag) => Self::Bool(flag),
            Json::Number(digits) => number(digits).map_or(Self::Null, Self::Number),
            Json::Text(text) => Self::String(text.to_owned()),
            Json::List(elements) => elements.iter().map(Self::from).collect(),
            Json::Object(members) => members
                .iter()
                .map(|(key, member)| (key.to_owned(), Self::from(member)))
                .collect(),
        }
    }
}

/// Reads a number: an integer of 64 bits if it fits one, signed or unsigned, else a double.
pub fn number(digits: &str) -> Option<Number> {
    if let Ok(number) = digits.parse::<i64>() {
        return Some(number.into());
    }
    if let Ok(number) = digits.parse::<u64>() {
        return Some(number.into());
    }
    let double = digits
        .parse::<f64>()
        .unwrap_or(f64::MAX)
        .clamp(f64::MIN, f64::MAX);
    Number::from_f64(double)
}

impl<'a> Elements<'a> {
    /// The elements in their order.
    pub fn iter(self) -> impl ExactSizeIterator<Item = Json<'a>> {
        let Inside {
            document,
            mut first,
            length,
        } = self.0;
        (0..length).map(move |_| {
            let place = first;
            first = document.behind(place);
            document.value(place)
        })
    }
}

impl<'a> Members<'a> {
    /// No members.
    pub fn none() -> Self {
        static EMPTY: Document = Document::new();
        Self(Inside {
            document: &EMPTY,
            first: 0,
            length: 0,
        })
    }

    /// How many there are.
    pub fn len(self) -> usize {
        self.0.length
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.0.length == 0
    }

    /// Keys and values in their order.
    pub fn iter(self) -> impl ExactSizeIterator<Item = (&'a str, Json<'a>)> {
        let document = self.0.document;
        self.places()
            .map(move |place| (document.key(place), document.value(place + 1)))
    }

    /// The keys in their order.
    pub fn keys(self) -> impl ExactSizeIterator<Item = &'a str> {
        let document = self.0.document;
        self.places().map(|place| document.key(place))
    }

    /// The value of a member. Takes time for all that stand before it.
    pub fn find(self, name: &str) -> Option<Json<'a>> {
        let document = self.0.document;
        let place = self.places().find(|place| document.is_key(*place, name))?;
        Some(document.value(place + 1))
    }

    /// Where the keys stand.
    fn places(self) -> impl ExactSizeIterator<Item = usize> {
        let Inside {
            document,
            mut first,
            length,
        } = self.0;
        (0..length).map(move |_| {
            let place = first;
            first = document.behind(place + 1);
            place
        })
    }
}
