//! Commands as people type them: `COMMAND key=value ...`, or JSON.

use serde_json::{Map, Value};

use crate::keyval;

/// A command to be sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Its name.
    pub command: String,
    /// Its arguments.
    pub arguments: Map<String, Value>,
}

impl Call {
    /// Reads a command and its arguments: `key=value` with dotted keys, or one JSON object; or a whole QMP message as
    /// `command`, whose `id` is left out.
    ///
    /// A value that is JSON (a number, `true`, `false`, `null`, `"..."`, `[...]`, `{...}`) is taken as that, every other
    /// one as the string it is.
    ///
    /// # Errors
    /// A text for the user: what cannot be read.
    pub fn parse(command: &str, arguments: &[String]) -> Result<Self, String> {
        if command.starts_with('{') {
            return match arguments {
                [] => Self::from_message(command),
                _ => {
                    Err("a QMP message brings its own arguments; nothing can follow it".to_owned())
                }
            };
        }
        let arguments = match arguments {
            [json] if json.starts_with('{') => object(json)?,
            _ => {
                let pairs: Result<Vec<_>, _> =
                    arguments.iter().map(|part| keyval::pair(part)).collect();
                let mut members = pairs.and_then(keyval::nest).map_err(|error| error.text)?;
                for (key, value) in &mut members {
                    read_scalars(value, key)?;
                }
                members
            }
        };
        Ok(Self {
            command: command.to_owned(),
            arguments,
        })
    }

    /// Reads a line of a script: words as a shell splits them, or a QMP message. `None`: there is nothing on it, or a
    /// remark.
    ///
    /// # Errors
    /// A text for the user: what cannot be read.
    pub fn parse_line(line: &str) -> Result<Option<Self>, String> {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            return Ok(None);
        }
        if line.starts_with('{') {
            return Self::from_message(line).map(Some);
        }
        let words = words(line)?;
        match words.split_first() {
            Some((command, arguments)) => Self::parse(command, arguments).map(Some),
            None => Ok(None),
        }
    }

    fn from_message(text: &str) -> Result<Self, String> {
        let mut members = object(text)?;
        members.remove("id");
        let Some(Value::String(command)) = members.remove("execute") else {
            return Err("a QMP message needs \"execute\" with a string".to_owned());
        };
        let arguments = match members.remove("arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err("\"arguments\" of a QMP message is an object".to_owned()),
        };
        match members.keys().next() {
            Some(member) => Err(format!(
                "\"{member}\" has no place in a QMP message; there are \"execute\" and \"arguments\""
            )),
            None => Ok(Self { command, arguments }),
        }
    }
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text)
        .map_err(|error| format!("this is not a JSON object: {error}: {text}"))
}

/// Gives the strings of key=value the types that they look like.
fn read_scalars(value: &mut Value, path: &str) -> Result<(), String> {
    match value {
        Value::String(text) => {
            if let Some(read) = scalar(text, path)? {
                *value = read;
            }
            Ok(())
        }
        Value::Object(members) => members
            .iter_mut()
            .try_for_each(|(key, member)| read_scalars(member, &format!("{path}.{key}"))),
        Value::Array(elements) => elements
            .iter_mut()
            .enumerate()
            .try_for_each(|(index, element)| read_scalars(element, &format!("{path}.{index}"))),
        _ => Ok(()),
    }
}

/// `None`: it is a string as it stands.
fn scalar(text: &str, path: &str) -> Result<Option<Value>, String> {
    match serde_json::from_str(text) {
        Ok(value) => Ok(Some(value)),
        Err(error) if text.starts_with(['{', '[', '"']) => Err(format!(
            "'{path}' begins like JSON and is none: {error}; for a string that begins like this, quote it: '{path}={}'",
            Value::String(text.to_owned())
        )),
        Err(_) => Ok(None),
    }
}

/// Splits a line at spaces outside of quotes. Single quotes keep everything as it is and are taken away; double quotes keep
/// spaces and, after `=`, stay, since they make a JSON string; brackets and braces keep spaces too.
fn words(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut begun = false;
    let mut depth = 0_usize;
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            '\'' => {
                begun = true;
                loop {
                    match characters.next() {
                        Some('\'') => break,
                        Some(inside) => word.push(inside),
                        None => return Err("a single quote is not closed".to_owned()),
                    }
                }
            }
            '"' => {
                begun = true;
                word.push('"');
                let mut escaped = false;
                loop {
                    let Some(inside) = characters.next() else {
                        return Err("a double quote is not closed".to_owned());
                    };
                    word.push(inside);
                    match inside {
                        _ if escaped => escaped = false,
                        '\\' => escaped = true,
                        '"' => break,
                        _ => {}
                    }
                }
            }
            space if space.is_whitespace() && depth == 0 => {
                if begun {
                    words.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            other => {
                begun = true;
                match other {
                    '{' | '[' => depth += 1,
                    '}' | ']' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                word.push(other);
            }
        }
    }
    if begun {
        words.push(word);
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parsed(words: &[&str]) -> Result<Value, String> {
        let arguments: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        Call::parse("c", &arguments).map(|call| Value::Object(call.arguments))
    }

    #[test]
    fn values_are_what_they_look_like() {
        for (word, expected) in [
            ("a=8", json!(8)),
            ("a=-1.5", json!(-1.5)),
            ("a=18446744073709551615", json!(u64::MAX)),
            ("a=true", json!(true)),
            ("a=null", json!(null)),
            ("a=True", json!("True")),
            ("a=", json!("")),
            ("a=1G", json!("1G")),
            ("a=10.0.0.1", json!("10.0.0.1")),
            ("a=1 2", json!("1 2")),
            ("a=b=c", json!("b=c")),
            ("a=\"8\"", json!("8")),
            ("a=\"{\"", json!("{")),
            ("a=[1, \"x\"]", json!([1, "x"])),
            ("a={\"0\": 1}", json!({"0": 1})),
        ] {
            assert_eq!(parsed(&[word]), Ok(json!({"a": expected})), "{word}");
        }
    }

    #[test]
    fn dotted_keys_nest_and_number() {
        assert_eq!(
            parsed(&[
                "driver=raw",
                "file.driver=file",
                "file.size=5",
                "l.0=1",
                "l.1=x"
            ]),
            Ok(json!({"driver": "raw", "file": {"driver": "file", "size": 5}, "l": [1, "x"]}))
        );
        assert_eq!(parsed(&["{\"a.b\": [1]}"]), Ok(json!({"a.b": [1]})));
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for (words, expected) in [
            (&["a"][..], "Expected '=' after parameter 'a'"),
            (&["a=1", "a.b=2"], "Parameters 'a.*' used inconsistently"),
            (
                &["a={\"b\":1}", "a.c=2"],
                "Parameters 'a.*' used inconsistently",
            ),
            (&["a..b=1"], "Invalid parameter 'a..b'"),
            (&["a.b=[x"], "'a.b' begins like JSON"),
            (&["{\"a\":"], "this is not a JSON object"),
            (&["{}", "a=1"], "Expected '=' after parameter '{}'"),
        ] {
            let error = parsed(words).expect_err("refused");
            assert!(error.starts_with(expected), "{words:?}: {error}");
        }
    }

    #[test]
    fn lines_split_as_in_a_shell() {
        let call = |line: &str| {
            let call = Call::parse_line(line).map(|call| call.expect("a command"));
            call.map(|call| (call.command, Value::Object(call.arguments)))
        };
        assert_eq!(
            call("  blockdev-add  filename='a b' o={\"x\": [1, 2]} n=\"c d\" "),
            Ok((
                "blockdev-add".to_owned(),
                json!({"filename": "a b", "o": {"x": [1, 2]}, "n": "c d"})
            ))
        );
        assert_eq!(
            call("{\"execute\": \"x\", \"arguments\": {\"a\": 1}, \"id\": 7}"),
            Ok(("x".to_owned(), json!({"a": 1})))
        );
        assert_eq!(Call::parse_line("  # a remark"), Ok(None));
        assert_eq!(Call::parse_line(""), Ok(None));
        for (line, expected) in [
            ("x a='b", "a single quote is not closed"),
            ("x a=\"b", "a double quote is not closed"),
            ("{}", "a QMP message needs \"execute\" with a string"),
            (
                "{\"execute\": \"x\", \"arguments\": 1}",
                "\"arguments\" of a QMP message is an object",
            ),
            (
                "{\"exec-oob\": \"x\", \"execute\": \"x\"}",
                "\"exec-oob\" has no place in a QMP message; there are \"execute\" and \"arguments\"",
            ),
        ] {
            assert_eq!(call(line).expect_err("refused"), expected, "{line}");
        }
    }
}
