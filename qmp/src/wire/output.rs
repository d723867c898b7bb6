//! Values to bytes in QEMU's form: ASCII only, `", "` and `": "`, its order of members, CR LF behind every line.

use std::fmt::Write;

use serde_json::{Map, Value};

/// One message as a line, or pretty over several.
pub fn render(value: &Value, pretty: bool) -> Vec<u8> {
    let mut text = String::new();
    write_value(&mut text, value, pretty, 0);
    if pretty {
        text = text.replace('\n', "\r\n");
    }
    text.push_str("\r\n");
    text.into_bytes()
}

fn write_value(text: &mut String, value: &Value, pretty: bool, depth: usize) {
    match value {
        Value::Null => text.push_str("null"),
        Value::Bool(flag) => text.push_str(if *flag { "true" } else { "false" }),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (None, None, Some(double)) => write_double(text, double),
            _ => {
                let _ = write!(text, "{number}");
            }
        },
        Value::String(string) => write_string(text, string),
        Value::Array(elements) => {
            text.push('[');
            for (index, element) in elements.iter().enumerate() {
                separate(text, index, pretty, depth + 1);
                write_value(text, element, pretty, depth + 1);
            }
            close(text, ']', pretty, depth);
        }
        Value::Object(members) => {
            text.push('{');
            for (index, (key, member)) in in_order(members).into_iter().enumerate() {
                separate(text, index, pretty, depth + 1);
                write_string(text, key);
                text.push_str(": ");
                write_value(text, member, pretty, depth + 1);
            }
            close(text, '}', pretty, depth);
        }
    }
}

fn separate(text: &mut String, index: usize, pretty: bool, depth: usize) {
    if index > 0 {
        text.push_str(if pretty { "," } else { ", " });
    }
    if pretty {
        text.push('\n');
        text.push_str(&"    ".repeat(depth));
    }
}

fn close(text: &mut String, bracket: char, pretty: bool, depth: usize) {
    if pretty {
        text.push('\n');
        text.push_str(&"    ".repeat(depth));
    }
    text.push(bracket);
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

fn write_string(text: &mut String, string: &str) {
    text.push('"');
    for character in string.chars() {
        match character {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            ' '..='~' => text.push(character),
            _ => {
                let mut units = [0; 2];
                for unit in character.encode_utf16(&mut units) {
                    let _ = write!(text, "\\u{unit:04X}");
                }
            }
        }
    }
    text.push('"');
}

/// The order in which QEMU's hash table gives members out.
fn in_order(members: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let mut list: Vec<_> = members.iter().rev().collect();
    list.sort_by_key(|(key, _)| bucket(key));
    list
}

fn bucket(key: &str) -> u32 {
    let length = u32::try_from(key.len()).unwrap_or(u32::MAX);
    let mut hash = 0x238f_13af_u32.wrapping_mul(length);
    for (index, byte) in key.bytes().enumerate() {
        hash = hash.wrapping_add(u32::from(byte) << (5 * index % 24));
    }
    hash.wrapping_mul(1_103_515_243).wrapping_add(12345) % 512
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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
}
