//! Checks a value against its type, in QEMU's order and words, before anything is done with it.
//!
//! The checked value is built of what is accepted only, and it is plain: strings of key=value options have become booleans and numbers, and numbers fit their type.

use serde_json::{Map, Value};

use crate::error::QmpError;
use crate::schema::{Member, Object, Type, Words};
use crate::size;
use crate::wire::document::{Json, Members, number};

/// Levels of nested objects and lists. Bounds the recursion here and in whatever reads the checked value.
const DEPTH_MAX: usize = 128;

/// Where values come from, which decides how scalars are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spelling {
    /// JSON has types.
    Json,
    /// In key=value options every scalar is a string.
    KeyValue,
}

/// Checks the members of an object.
///
/// # Errors
/// The first member that is missing, of a wrong type or out of range; else a surplus one.
pub fn check(
    object: &Object,
    members: Members<'_>,
    spelling: Spelling,
) -> Result<Map<String, Value>, QmpError> {
    let root = Place {
        parent: None,
        step: Step::Root,
        depth: 0,
    };
    check_object(object, members, spelling, &root)
}

enum Step<'a> {
    Root,
    Member(&'a str),
    Element(usize),
}

/// Where a value stands; a name is only made of it when there is an error to tell.
struct Place<'a> {
    parent: Option<&'a Place<'a>>,
    step: Step<'a>,
    depth: usize,
}

impl<'a> Place<'a> {
    fn below(&'a self, step: Step<'a>) -> Place<'a> {
        Place {
            parent: Some(self),
            step,
            depth: self.depth + 1,
        }
    }

    /// `a.b[0].c`
    fn path(&self) -> String {
        let above = self.parent.map(Place::path).unwrap_or_default();
        match self.step {
            Step::Root => above,
            Step::Element(index) => format!("{above}[{index}]"),
            Step::Member(name) if above.is_empty() => name.to_owned(),
            Step::Member(name) => format!("{above}.{name}"),
        }
    }

    /// The last component, which some texts use instead of the whole.
    fn name(&self) -> &str {
        match self.step {
            Step::Member(name) => name,
            Step::Root | Step::Element(_) => "null",
        }
    }

    fn wrong_type(&self, expected: &str) -> QmpError {
        let path = self.path();
        QmpError::generic(format!(
            "Invalid parameter type for '{path}', expected: {expected}"
        ))
    }

    fn expects(&self, what: &str) -> QmpError {
        QmpError::generic(format!("Parameter '{}' expects {what}", self.path()))
    }
}

fn check_object(
    object: &Object,
    members: Members<'_>,
    spelling: Spelling,
    place: &Place<'_>,
) -> Result<Map<String, Value>, QmpError> {
    if place.depth > DEPTH_MAX {
        let text = format!("Parameters are nested more than {DEPTH_MAX} levels deep");
        return Err(QmpError::generic(text));
    }
    let mut checked = Map::new();
    check_members(object.members, members, &mut checked, spelling, place)?;
    if let Some(union) = &object.union {
        let tag = checked.get(union.tag).and_then(Value::as_str);
        let branch = union.branches.iter().find(|(case, _)| Some(*case) == tag);
        if let Some((_, branch)) = branch {
            check_members(branch.members, members, &mut checked, spelling, place)?;
        }
    }
    if checked.len() == members.len() {
        return Ok(checked);
    }
    match members.keys().find(|name| !checked.contains_key(*name)) {
        None => Ok(checked),
        Some(name) => {
            let path = place.below(Step::Member(name)).path();
            Err(QmpError::generic(format!(
                "Parameter '{path}' is unexpected"
            )))
        }
    }
}

fn check_members(
    wanted: &[Member],
    members: Members<'_>,
    checked: &mut Map<String, Value>,
    spelling: Spelling,
    place: &Place<'_>,
) -> Result<(), QmpError> {
    for member in wanted {
        let here = place.below(Step::Member(member.name));
        match members.find(member.name) {
            Some(value) => {
                let value = check_value(&member.kind, value, spelling, &here)?;
                checked.insert(member.name.to_owned(), value);
            }
            None if member.optional => {}
            None => {
                let path = here.path();
                return Err(QmpError::generic(format!("Parameter '{path}' is missing")));
            }
        }
    }
    Ok(())
}

fn check_value(
    kind: &Type,
    value: Json<'_>,
    spelling: Spelling,
    place: &Place<'_>,
) -> Result<Value, QmpError> {
    match (kind, value) {
        (Type::Any, value) => Ok(Value::from(value)),
        (Type::Text, Json::Text(text)) => Ok(Value::from(text)),
        (Type::Text, _) => Err(place.wrong_type("string")),
        (Type::Null, Json::Null) => Ok(Value::Null),
        (Type::Null, _) => Err(place.wrong_type("null")),
        (Type::Bool, Json::Bool(flag)) => Ok(Value::Bool(flag)),
        (Type::Bool, Json::Text(text)) if spelling == Spelling::KeyValue => match text {
            "on" | "yes" | "true" | "y" => Ok(Value::Bool(true)),
            "off" | "no" | "false" | "n" => Ok(Value::Bool(false)),
            _ => Err(place.expects("'on' or 'off'")),
        },
        (Type::Bool, _) => Err(place.wrong_type("boolean")),
        (
            Type::Int | Type::Int32 | Type::Uint16 | Type::Uint32 | Type::Uint64 | Type::Size,
            value,
        ) => check_number(kind, value, spelling, place),
        (Type::Word(words), Json::Text(text)) => check_word(words, text, place),
        (Type::Word(_), _) => Err(place.wrong_type("string")),
        (Type::Object(object), Json::Object(members)) => {
            check_object(object, members, spelling, place).map(Value::Object)
        }
        (Type::Object(_), _) => Err(place.wrong_type("object")),
        (Type::Alternate(alternate), value) => {
            let fitting = alternate.kinds.iter().find(|kind| fits(kind, value));
            match fitting {
                Some(kind) => check_value(kind, value, spelling, place),
                // QEMU has only the last component here.
                None => Err(QmpError::generic(format!(
                    "Invalid parameter type for '{}', expected: {}",
                    place.name(),
                    alternate.name
                ))),
            }
        }
        (Type::List(kind), Json::List(elements)) => elements
            .iter()
            .enumerate()
            .map(|(index, element)| {
                check_value(kind, element, spelling, &place.below(Step::Element(index)))
            })
            .collect(),
        (Type::List(_), _) => Err(place.wrong_type("array")),
    }
}

fn fits(kind: &Type, value: Json<'_>) -> bool {
    matches!(
        (kind, value),
        (Type::Text | Type::Word(_), Json::Text(_))
            | (Type::Object(_), Json::Object(_))
            | (Type::Null, Json::Null)
            | (Type::Bool, Json::Bool(_))
    )
}

fn check_word(words: &Words, text: &str, place: &Place<'_>) -> Result<Value, QmpError> {
    if words.words.contains(&text) {
        return Ok(Value::from(text));
    }
    let name = place.name();
    Err(QmpError::generic(format!(
        "Parameter '{name}' does not accept value '{text}'"
    )))
}

fn check_number(
    kind: &Type,
    value: Json<'_>,
    spelling: Spelling,
    place: &Place<'_>,
) -> Result<Value, QmpError> {
    let signed = matches!(kind, Type::Int | Type::Int32);
    let number = match value {
        Json::Number(digits) => number(digits).and_then(|number| match signed {
            true => number.as_i64().map(i128::from),
            false => number
                .as_u64()
                .or_else(|| number.as_i64().map(i64::cast_unsigned))
                .map(i128::from),
        }),
        Json::Text(text) if spelling == Spelling::KeyValue => {
            let parsed = match kind {
                Type::Size => size::parse(text).map(i128::from),
                _ => parse_integer(text, signed),
            };
            let Some(parsed) = parsed else {
                return Err(match kind {
                    Type::Size => size_fault(text, place),
                    _ => place.expects("integer"),
                });
            };
            Some(parsed)
        }
        _ => None,
    };
    match (kind, number) {
        (Type::Int | Type::Int32, None) => Err(place.wrong_type("integer")),
        (_, None) => Err(place.expects("uint64")),
        (Type::Int32, Some(number)) if i32::try_from(number).is_err() => Err(QmpError::generic(
            format!("Parameter '{}' expects int32_t", place.name()),
        )),
        (Type::Uint16, Some(number)) if u16::try_from(number).is_err() => Err(QmpError::generic(
            format!("Parameter '{}' expects uint16_t", place.name()),
        )),
        (Type::Uint32, Some(number)) if u32::try_from(number).is_err() => Err(QmpError::generic(
            format!("Parameter '{}' expects uint32_t", place.name()),
        )),
        (_, Some(number)) => Ok(match (i64::try_from(number), u64::try_from(number)) {
            (Ok(number), _) => Value::from(number),
            (_, Ok(number)) => Value::from(number),
            _ => return Err(place.expects("integer")),
        }),
    }
}

/// Decimal, hexadecimal behind `0x`, octal behind `0`; an unsigned one may be negative and wraps.
fn parse_integer(text: &str, signed: bool) -> Option<i128> {
    let text = text.trim_start();
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    // `from_str_radix` would take a second sign.
    if !digits.starts_with(|first: char| first.is_ascii_hexdigit()) {
        return None;
    }
    let lower = digits.to_ascii_lowercase();
    let number = match lower.strip_prefix("0x") {
        Some(hex) if hex.starts_with(|first: char| first.is_ascii_hexdigit()) => {
            u64::from_str_radix(hex, 16).ok()?
        }
        Some(_) => return None,
        None if digits.len() > 1 && digits.starts_with('0') => {
            u64::from_str_radix(digits, 8).ok()?
        }
        None => digits.parse().ok()?,
    };
    let number = if negative {
        -i128::from(number)
    } else {
        i128::from(number)
    };
    if signed {
        i64::try_from(number).ok().map(i128::from)
    } else if number < 0 {
        i64::try_from(number)
            .ok()
            .map(|number| i128::from(number.cast_unsigned()))
    } else {
        Some(number)
    }
}

fn size_fault(text: &str, place: &Place<'_>) -> QmpError {
    let name = place.path();
    let reason = if text.starts_with('-') {
        " (it is negative)"
    } else {
        ""
    };
    QmpError::generic(format!(
        "Parameter '{name}' expects a size{reason}: a number of bytes, or one followed by k, M, G, T, P or E"
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema::{Alternate, optional, required};
    use crate::wire::document::Document;

    static KINDS: Words = Words::of(&["a", "b"]);
    static INNER: Object = Object::of(&[required("n", Type::Uint32)]);
    static REFERENCE: Alternate = Alternate {
        name: "Reference",
        kinds: &[Type::Object(&INNER), Type::Text],
    };
    static OUTER: Object = Object::union(
        &[
            required("kind", Type::Word(&KINDS)),
            optional("flag", Type::Bool),
            optional("size", Type::Size),
            optional("list", Type::List(&Type::Object(&INNER))),
            optional("node", Type::Alternate(&REFERENCE)),
        ],
        "kind",
        &[("b", &INNER)],
    );

    fn outcome(value: Value, spelling: Spelling) -> Result<Value, String> {
        let document = Document::from(&value);
        let Json::Object(members) = document.root() else {
            panic!("an object")
        };
        check(&OUTER, members, spelling)
            .map(Value::Object)
            .map_err(|error| error.text)
    }

    #[test]
    fn texts_are_those_of_the_reference() {
        for (value, text) in [
            (json!({}), "Parameter 'kind' is missing"),
            (
                json!({"kind": 1}),
                "Invalid parameter type for 'kind', expected: string",
            ),
            (
                json!({"kind": "c"}),
                "Parameter 'kind' does not accept value 'c'",
            ),
            (json!({"kind": "b"}), "Parameter 'n' is missing"),
            (json!({"kind": "a", "n": 1}), "Parameter 'n' is unexpected"),
            (
                json!({"x": 1, "kind": "b", "n": 1, "y": 2}),
                "Parameter 'x' is unexpected",
            ),
            (
                json!({"kind": "b", "n": "x"}),
                "Parameter 'n' expects uint64",
            ),
            (
                json!({"kind": "b", "n": 1_u64 << 32}),
                "Parameter 'n' expects uint32_t",
            ),
            (
                json!({"kind": "a", "list": {}}),
                "Invalid parameter type for 'list', expected: array",
            ),
            (
                json!({"kind": "a", "list": [{"n": 1}, {}]}),
                "Parameter 'list[1].n' is missing",
            ),
            (
                json!({"kind": "a", "node": 1}),
                "Invalid parameter type for 'node', expected: Reference",
            ),
            (
                json!({"kind": "a", "node": {"n": 1, "m": 1}}),
                "Parameter 'node.m' is unexpected",
            ),
            (
                json!({"kind": "a", "flag": "on"}),
                "Invalid parameter type for 'flag', expected: boolean",
            ),
        ] {
            assert_eq!(
                outcome(value.clone(), Spelling::Json),
                Err(text.to_owned()),
                "{value}"
            );
        }
    }

    #[test]
    fn options_get_their_types() {
        let value = json!({"kind": "b", "flag": "y", "size": "1.5k", "n": "0x10"});
        assert_eq!(
            outcome(value, Spelling::KeyValue),
            Ok(json!({"kind": "b", "flag": true, "size": 1536, "n": 16}))
        );
        let value = json!({"kind": "a", "flag": "maybe"});
        assert_eq!(
            outcome(value, Spelling::KeyValue),
            Err("Parameter 'flag' expects 'on' or 'off'".to_owned())
        );
    }

    #[test]
    fn integers_of_any_form() {
        for (text, signed, number) in [
            ("10", true, Some(10)),
            ("010", true, Some(8)),
            ("0x1F", true, Some(31)),
            ("-5", true, Some(-5)),
            ("-1", false, Some(i128::from(u64::MAX))),
            ("8M", true, None),
            ("--1", true, None),
            ("", true, None),
            ("0x", true, None),
            ("9223372036854775808", true, None),
        ] {
            assert_eq!(parse_integer(text, signed), number, "{text}");
        }
    }
}
