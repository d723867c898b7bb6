//! Values to bytes in QEMU's form: ASCII only, `", "` and `": "`, its order of members, CR LF behind every line.

use std::cmp::Reverse;
use std::fmt::Write;
use std::sync::OnceLock;

use serde_json::{Number, Value};

use crate::wire::document::{Json, number};

/// Room for a message of common size.
const COMMON_BYTES: usize = 256;
/// Members of an object that are put in order on the stack.
const FEW_MEMBERS: usize = 8;

/// What a reply tells.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// The command's result.
    Return(&'a Value),
    /// A result that is always the same.
    Constant(&'a Constant),
    /// Why there is none.
    Error {
        /// The class of the error.
        class: &'a str,
        /// Its text.
        desc: &'a str,
    },
}

/// A result that is always the same and is written once only: everybody asks for some of them, again and again.
#[derive(Debug)]
pub struct Constant {
    make: fn() -> Value,
    /// As it stands in a reply, plain and pretty.
    forms: [OnceLock<String>; 2],
}

impl Constant {
    /// The result that `make` makes.
    pub const fn new(make: fn() -> Value) -> Self {
        Self {
            make,
            forms: [const { OnceLock::new() }; 2],
        }
    }

    /// The result.
    pub fn value(&self) -> Value {
        (self.make)()
    }

    /// How it is written at the depth of a result, which is the same in all replies.
    fn form(&self, pretty: bool, depth: usize) -> &str {
        self.forms[usize::from(pretty)].get_or_init(|| {
            let mut writer = Writer::new(pretty);
            writer.value(&self.value(), depth);
            writer.text
        })
    }
}

/// One message as a line, or pretty over several.
pub fn render(value: &Value, pretty: bool) -> Vec<u8> {
    let mut writer = Writer::new(pretty);
    writer.value(value, 0);
    writer.finish()
}

/// A reply, as [`render`] would render it, with the id of its command.
pub fn render_reply(outcome: Outcome<'_>, id: Option<Json<'_>>, pretty: bool) -> Vec<u8> {
    let mut writer = Writer::new(pretty);
    let outcome = match outcome {
        Outcome::Return(value) => ("return", Part::Value(value)),
        Outcome::Constant(constant) => ("return", Part::Constant(constant)),
        Outcome::Error { class, desc } => ("error", Part::Error { class, desc }),
    };
    let id = id.map(|id| ("id", Part::Json(id)));
    let members = [outcome].into_iter().chain(id);
    writer.object(members, 0, |writer, part, depth| match part {
        Part::Value(value) => writer.value(value, depth),
        Part::Constant(constant) => {
            let form = constant.form(writer.pretty, depth);
            writer.text.push_str(form);
        }
        Part::Json(json) => writer.json(json, depth),
        Part::Error { class, desc } => {
            let members = [("class", class), ("desc", desc)].into_iter();
            writer.object(members, depth, |writer, text, _| writer.string(text));
        }
    });
    writer.finish()
}

/// The value of a member of a reply.
#[derive(Clone, Copy)]
enum Part<'a> {
    Value(&'a Value),
    Constant(&'a Constant),
    Json(Json<'a>),
    Error { class: &'a str, desc: &'a str },
}

struct Writer {
    text: String,
    pretty: bool,
}

impl Writer {
    fn new(pretty: bool) -> Self {
        Self {
            text: String::with_capacity(COMMON_BYTES),
            pretty,
        }
    }

    fn finish(self) -> Vec<u8> {
        let mut text = self.text;
        if self.pretty {
            text = text.replace('\n', "\r\n");
        }
        text.push_str("\r\n");
        text.into_bytes()
    }

    fn value(&mut self, value: &Value, depth: usize) {
        match value {
            Value::Null => self.text.push_str("null"),
            Value::Bool(flag) => self.bool(*flag),
            Value::Number(number) => self.number(number),
            Value::String(string) => self.string(string),
            Value::Array(elements) => self.list(elements.iter(), depth, Self::value),
            Value::Object(members) => {
                let members = members.iter().map(|(key, member)| (key.as_str(), member));
                self.object(members, depth, Self::value);
            }
        }
    }

    /// Nesting was bounded when it was read, so this recursion is too.
    fn json(&mut self, json: Json<'_>, depth: usize) {
        match json {
            Json::Null => self.text.push_str("null"),
            Json::Bool(flag) => self.bool(flag),
            Json::Number(digits) => match number(digits) {
                Some(number) => self.number(&number),
                None => self.text.push_str("null"),
            },
            Json::Text(string) => self.string(string),
            Json::List(elements) => self.list(elements.iter(), depth, Self::json),
            Json::Object(members) => self.object(members.iter(), depth, Self::json),
        }
    }

    fn bool(&mut self, flag: bool) {
        self.text.push_str(if flag { "true" } else { "false" });
    }

    fn number(&mut self, number: &Number) {
        match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (None, None, Some(double)) => write_double(&mut self.text, double),
            _ => {
                let _ = write!(self.text, "{number}");
            }
        }
    }

    fn list<T>(
        &mut self,
        elements: impl Iterator<Item = T>,
        depth: usize,
        write: impl Fn(&mut Self, T, usize),
    ) {
        self.text.push('[');
        for (index, element) in elements.enumerate() {
            self.separate(index, depth + 1);
            write(self, element, depth + 1);
        }
        self.close(']', depth);
    }

    /// Members in the order in which QEMU's hash table gives them out: by bucket, and later ones first in each.
    fn object<'a, T: Copy>(
        &mut self,
        members: impl Iterator<Item = (&'a str, T)>,
        depth: usize,
        write: impl Fn(&mut Self, T, usize),
    ) {
        let mut members = members
            .enumerate()
            .map(|(index, (key, member))| ((bucket(key), Reverse(index)), key, member));
        self.text.push('{');
        if let Some(first) = members.next() {
            // Most objects are small enough to need no memory for their order.
            let mut few = [first; FEW_MEMBERS];
            let places = few.iter_mut().skip(1);
            let count = places
                .zip(&mut members)
                .map(|(place, member)| *place = member)
                .count();
            let mut many = Vec::new();
            let list = match members.next() {
                None => &mut few[..=count],
                Some(next) => {
                    many.extend(few.into_iter().chain([next]).chain(members));
                    &mut many[..]
                }
            };
            list.sort_unstable_by_key(|(order, ..)| *order);
            for (index, (_, key, member)) in list.iter().enumerate() {
                self.separate(index, depth + 1);
                self.string(key);
                self.text.push_str(": ");
                write(self, *member, depth + 1);
            }
        }
        self.close('}', depth);
    }

    fn separate(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.text.push_str(if self.pretty { "," } else { ", " });
        }
        self.line(depth);
    }

    fn close(&mut self, bracket: char, depth: usize) {
        self.line(depth);
        self.text.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if self.pretty {
            self.text.push('\n');
            (0..depth).for_each(|_| self.text.push_str("    "));
        }
    }

    fn string(&mut self, string: &str) {
        self.text.push('"');
        let mut rest = string;
        while let Some(place) = rest.bytes().position(|byte| !is_plain(byte)) {
            let (plain, special) = rest.split_at(place);
            self.text.push_str(plain);
            let mut characters = special.chars();
            if let Some(character) = characters.next() {
                write_escaped(&mut self.text, character);
            }
            rest = characters.as_str();
        }
        self.text.push_str(rest);
        self.text.push('"');
    }
}

fn is_plain(byte: u8) -> bool {
    matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\'
}

fn write_escaped(text: &mut String, character: char) {
    match character {
        '"' => text.push_str("\\\""),
        '\\' => text.push_str("\\\\"),
        '\u{8}' => text.push_str("\\b"),
        '\u{c}' => text.push_str("\\f"),
        '\n' => text.push_str("\\n"),
        '\r' => text.push_str("\\r"),
        '\t' => text.push_str("\\t"),
        _ => {
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                let _ = write!(text, "\\u{unit:04X}");
            }
        }
    }
}

/// Seventeen significant digits, trailing zeroes cut, no forced point.
fn write_double(text: &mut String, double: f64) {
    if double == double.trunc() && double.abs() < 1e17 {
        let _ = write!(text, "{double:.0}");
        return;
    }
    let exponent = double.abs().log10().floor() as i32;
    if (-5..17).contains(&exponent) {
        let digits = usize::try_from(16 - exponent).unwrap_or(0);
        let shown = format!("{double:.digits$}");
        text.push_str(shown.trim_end_matches('0').trim_end_matches('.'));
    } else {
        let shown = format!("{double:.16e}");
        let (mantissa, exponent) = shown.split_once('e').unwrap_or((&shown, "0"));
        let mantissa = mantissa.trim_end_matches('0').trim_end_matches('.');
        let exponent: i32 = exponent.parse().unwrap_or(0);
        let sign = if exponent < 0 { '-' } else { '+' };
        let _ = write!(text, "{mantissa}e{sign}{:02}", exponent.abs());
    }
}

/// The bucket of QEMU's hash table in which a member is.
pub fn bucket(key: &str) -> u32 {
    let length = u32::try_from(key.len()).unwrap_or(u32::MAX);
    let mut hash = 0x238f_13af_u32.wrapping_mul(length);
    let mut shift = 0;
    for byte in key.bytes() {
        hash = hash.wrapping_add(u32::from(byte) << shift);
        shift = (shift + 5) % 24;
    }
    hash.wrapping_mul(1_103_515_243).wrapping_add(12345) % 512
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use crate::wire::document::Document;

    use super::*;

    fn line(value: &Value) -> String {
        String::from_utf8(render(value, false)).expect("ASCII")
    }

    #[test]
    fn order_of_members_is_that_of_the_reference() {
        let job = json!({
            "id": "c", "type": "create", "status": "concluded", "current-progress": 1,
            "total-progress": 1, "error": "x"
        });
        assert_eq!(
            line(&job),
            "{\"current-progress\": 1, \"status\": \"concluded\", \"total-progress\": 1, \
             \"type\": \"create\", \"id\": \"c\", \"error\": \"x\"}\r\n"
        );
        assert_eq!(
            line(&json!({"id": 1, "return": {}})),
            "{\"return\": {}, \"id\": 1}\r\n"
        );
    }

    #[test]
    fn strings_and_numbers() {
        assert_eq!(
            line(&json!("a\"\\/'\u{1}\u{e9}\u{1f600}\n")),
            "\"a\\\"\\\\/'\\u0001\\u00E9\\uD83D\\uDE00\\n\"\r\n"
        );
        assert_eq!(
            line(&json!([1e3, 1.10, u64::MAX, -5])),
            "[1000, 1.1000000000000001, 18446744073709551615, -5]\r\n"
        );
    }

    #[test]
    fn pretty_form() {
        let text = String::from_utf8(render(&json!({"return": {}}), true)).expect("ASCII");
        assert_eq!(text, "{\r\n    \"return\": {\r\n    }\r\n}\r\n");
    }

    #[test]
    fn replies_are_written_as_values_are() {
        static CONSTANT: Constant = Constant::new(|| json!({"b": [1, {}], "a": {"c": "d"}}));
        let document = Document::from(&json!({"z": [1.5, null], "y": "x"}));
        for pretty in [false, true] {
            let reply = render_reply(
                Outcome::Return(&CONSTANT.value()),
                Some(document.root()),
                pretty,
            );
            let whole = json!({"return": CONSTANT.value(), "id": Value::from(document.root())});
            assert_eq!(reply, render(&whole, pretty));
            // Twice, as it is written once only.
            for _ in 0..2 {
                let constant = Outcome::Constant(&CONSTANT);
                assert_eq!(render_reply(constant, Some(document.root()), pretty), reply);
            }
            let error = Outcome::Error {
                class: "c",
                desc: "d",
            };
            let whole = json!({"error": {"class": "c", "desc": "d"}});
            assert_eq!(render_reply(error, None, pretty), render(&whole, pretty));
        }
    }

    #[test]
    fn many_members_have_the_order_of_few() {
        let member = |number: usize| (format!("member-{number}"), json!(number));
        let all: Map<String, Value> = (0..40).map(member).collect();
        let text = line(&Value::Object(all.clone()));
        let mut list: Vec<&String> = all.keys().rev().collect();
        list.sort_by_key(|key| bucket(key));
        let places = list.iter().map(|key| text.find(&format!("\"{key}\"")));
        assert!(places.clone().all(|place| place.is_some()) && places.is_sorted());
    }
}
