//! key=value options: `k=v,a.b=c`, `,,` for a comma, the first key may be left out. A text that begins with `{` is JSON.

use serde_json::{Map, Value};

use crate::error::QmpError;
use crate::schema::Object;
use crate::schema::check::{Spelling, check};
use crate::schema::fields::Fields;
use crate::wire::document::{Document, Json};
use crate::wire::reader::read_text;

/// Deepest nesting of dotted keys.
const DEPTH_MAX: usize = 64;
/// Longest component of a dotted key in bytes.
const KEY_BYTES_MAX: usize = 127;

/// Reads and checks an option.
///
/// # Errors
/// In QEMU's words: what is not key=value, or does not fit `object`.
pub fn read(text: &str, implied_key: Option<&str>, object: &Object) -> Result<Fields, QmpError> {
    let (document, spelling) = if text.starts_with('{') {
        let document = read_text(text).map_err(|error| QmpError::generic(error.0))?;
        (document, Spelling::Json)
    } else {
        let members = Value::Object(split(text, implied_key)?);
        (Document::from(&members), Spelling::KeyValue)
    };
    match document.root() {
        Json::Object(members) => check(object, members, spelling).map(Fields::new),
        _ => Err(QmpError::generic("JSON object expected")),
    }
}

/// Splits an option into nested members, whose scalars are all strings.
///
/// # Errors
/// In QEMU's words.
pub fn split(text: &str, implied_key: Option<&str>) -> Result<Map<String, Value>, QmpError> {
    let mut pairs = Vec::new();
    for (index, part) in parts(text).into_iter().enumerate() {
        pairs.push(match implied_key {
            Some(key) if index == 0 && !part.contains('=') => (key.to_owned(), part),
            _ => pair(&part)?,
        });
    }
    nest(pairs)
}

/// Splits `key=value`.
///
/// # Errors
/// In QEMU's words: there is no `=`.
pub fn pair(part: &str) -> Result<(String, String), QmpError> {
    match part.split_once('=') {
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => {
            let text = format!("Expected '=' after parameter '{part}'");
            Err(QmpError::generic(text))
        }
    }
}

/// Makes nested members of dotted keys, and lists where all keys are numbers. The last of equal keys counts.
///
/// # Errors
/// In QEMU's words.
pub fn nest(pairs: Vec<(String, String)>) -> Result<Map<String, Value>, QmpError> {
    let mut members = Map::new();
    for (key, value) in pairs {
        insert(&mut members, &key, value)?;
    }
    for (key, value) in &mut members {
        number_lists(value, key)?;
    }
    Ok(members)
}

/// Parts between single commas; doubled commas stand for one.
pub fn parts(text: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character != ',' {
            part.push(character);
        } else if characters.next_if_eq(&',').is_some() {
            part.push(',');
        } else {
            parts.push(std::mem::take(&mut part));
        }
    }
    if !part.is_empty() {
        parts.push(part);
    }
    parts
}

fn insert(members: &mut Map<String, Value>, key: &str, value: String) -> Result<(), QmpError> {
    let steps: Vec<&str> = key.split('.').collect();
    let bad = |(place, step): (usize, &&str)| {
        let is_index = place > 0 && step.bytes().all(|byte| byte.is_ascii_digit());
        step.is_empty() || step.len() > KEY_BYTES_MAX || !(is_index || is_name(step))
    };
    if steps.iter().enumerate().any(bad) || steps.len() > DEPTH_MAX {
        return Err(QmpError::generic(format!("Invalid parameter '{key}'")));
    }
    let Some((last, above)) = steps.split_last() else {
        return Ok(());
    };
    let mut here = members;
    let mut path = String::new();
    let inconsistent =
        |path: &str| QmpError::generic(format!("Parameters '{path}.*' used inconsistently"));
    for step in above {
        path = if path.is_empty() {
            (*step).to_owned()
        } else {
            format!("{path}.{step}")
        };
        let entry = here
            .entry(*step)
            .or_insert_with(|| Value::Object(Map::new()));
        here = entry.as_object_mut().ok_or_else(|| inconsistent(&path))?;
    }
    match here.get_mut(*last) {
        Some(Value::Object(_)) => Err(inconsistent(key)),
        _ => {
            here.insert((*last).to_owned(), Value::String(value));
            Ok(())
        }
    }
}

/// Whether a text is a letter followed by letters, digits, `-` and `_`.
fn is_name(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

/// Turns objects whose keys are all numbers into lists.
fn number_lists(value: &mut Value, path: &str) -> Result<(), QmpError> {
    let Value::Object(members) = value else {
        return Ok(());
    };
    for (key, member) in members.iter_mut() {
        number_lists(member, &format!("{path}.{key}"))?;
    }
    let numbers: Vec<Option<usize>> = members.keys().map(|key| key.parse().ok()).collect();
    if numbers.iter().all(Option::is_none) {
        return Ok(());
    }
    if numbers.iter().any(Option::is_none) {
        let text = format!("Parameters '{path}.*' used inconsistently");
        return Err(QmpError::generic(text));
    }
    let mut elements = Vec::new();
    for index in 0..numbers.len() {
        match members.remove(&index.to_string()) {
            Some(element) => elements.push(element),
            None => {
                return Err(QmpError::generic(format!(
                    "Parameter '{path}.{index}' missing"
                )));
            }
        }
    }
    *value = Value::Array(elements);
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_nest_and_commas_double() {
        assert_eq!(
            split(
                "file,file.filename=a,,b,rules.0.event=x,rules.1.event=y,last=1,last=2",
                Some("driver")
            )
            .map(Value::Object),
            Ok(json!({
                "driver": "file",
                "file": {"filename": "a,b"},
                "rules": [{"event": "x"}, {"event": "y"}],
                "last": "2",
            }))
        );
    }

    #[test]
    fn faults_are_told() {
        for (text, expected) in [
            ("a=1,b", "Expected '=' after parameter 'b'"),
            ("a..b=1", "Invalid parameter 'a..b'"),
            ("a=1,a.b=2", "Parameters 'a.*' used inconsistently"),
            ("a.b=1,a=2", "Parameters 'a.*' used inconsistently"),
            ("a.0=1,a.b=2", "Parameters 'a.*' used inconsistently"),
            ("a.0=1,a.2=2", "Parameter 'a.1' missing"),
        ] {
            assert_eq!(
                split(text, None).expect_err("refused").text,
                expected,
                "{text}"
            );
        }
        let unfinished = read("{\"a\":", None, &crate::schema::EMPTY);
        assert_eq!(
            unfinished.expect_err("refused").text,
            "JSON parse error, premature EOI"
        );
    }
}
