//! The file of rules that `blkdebug` takes as its `config`: sections with lines of the form `name = "value"`.
//!
//! ```text
//! [inject-error]
//! event = "pwritev"
//! errno = "28"
//! ```

use crate::error::EngineError;
use crate::graph::names::is_identifier;
use crate::request::{BLKDEBUG_EVENTS, BlkdebugIo, InjectError, SetState};

/// What a file of rules says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct FaultConfig {
    pub(super) inject_error: Vec<InjectError>,
    pub(super) set_state: Vec<SetState>,
}

/// A section as it is being read.
enum Section {
    Fault { rule: InjectError, kind: String },
    Change(SetState),
}

/// Reads the text of a file of rules.
///
/// # Errors
/// In QEMU's words, except that all blanks are equal.
pub(super) fn parse(text: &str) -> Result<FaultConfig, EngineError> {
    let mut sections: Vec<Section> = Vec::new();
    let mut ids: Vec<(&str, &str)> = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(header) = line.strip_prefix('[') {
            let header = header.split(']').next().unwrap_or_default();
            sections.push(section(header, &mut ids)?);
            continue;
        }
        let section = sections
            .last_mut()
            .ok_or_else(|| EngineError::generic("no group defined"))?;
        let (name, value) = assignment(line)?;
        section.set(name, value)?;
    }
    let mut config = FaultConfig::default();
    for section in sections {
        match section {
            Section::Fault { mut rule, kind } => {
                check_event(&rule.event)?;
                rule.iotype = io_type(&kind)?;
                config.inject_error.push(rule);
            }
            Section::Change(change) => {
                check_event(&change.event)?;
                config.set_state.push(change);
            }
        }
    }
    Ok(config)
}

fn section<'a>(header: &'a str, ids: &mut Vec<(&'a str, &'a str)>) -> Result<Section, EngineError> {
    let (group, id) = match header.split_once(" \"") {
        Some((group, id)) => (group, Some(id.trim_end_matches('"'))),
        None => (header, None),
    };
    let section = match group {
        "inject-error" => Section::Fault {
            rule: InjectError::default(),
            kind: String::new(),
        },
        "set-state" => Section::Change(SetState::default()),
        other => {
            let text = format!("There is no option group '{other}'");
            return Err(EngineError::generic(text));
        }
    };
    if let Some(id) = id {
        if !is_identifier(id) {
            return Err(EngineError::generic("Parameter 'id' expects an identifier"));
        }
        if ids.contains(&(group, id)) {
            let text = format!("Duplicate ID '{id}' for {group}");
            return Err(EngineError::generic(text));
        }
        ids.push((group, id));
    }
    Ok(section)
}

/// Splits `name = "value"`.
fn assignment(line: &str) -> Result<(&str, &str), EngineError> {
    let parts = line.split_once('=').and_then(|(name, value)| {
        let value = value.trim_start().strip_prefix('"')?;
        Some((name.trim_end(), value.split('"').next().unwrap_or_default()))
    });
    parts.ok_or_else(|| invalid(line.split_whitespace().next().unwrap_or_default()))
}

fn invalid(name: &str) -> EngineError {
    EngineError::generic(format!("Invalid parameter '{name}'"))
}

impl Section {
    fn set(&mut self, name: &str, value: &str) -> Result<(), EngineError> {
        match self {
            Section::Fault { rule, kind } => match name {
                "event" => value.clone_into(&mut rule.event),
                "iotype" => value.clone_into(kind),
                "state" => rule.state = Some(number(name, value)?),
                "errno" => rule.errno = Some(number(name, value)?),
                "sector" => rule.sector = Some(number(name, value)?),
                "once" => rule.once = Some(flag(name, value)?),
                "immediately" => rule.immediately = Some(flag(name, value)?),
                _ => return Err(invalid(name)),
            },
            Section::Change(change) => match name {
                "event" => value.clone_into(&mut change.event),
                "state" => change.state = Some(number(name, value)?),
                "new_state" => change.new_state = number(name, value)?,
                _ => return Err(invalid(name)),
            },
        }
        Ok(())
    }
}

fn check_event(name: &str) -> Result<(), EngineError> {
    if name.is_empty() {
        return Err(EngineError::generic("Missing event name for rule"));
    }
    if BLKDEBUG_EVENTS.contains(&name) {
        return Ok(());
    }
    Err(EngineError::generic(format!(
        "invalid parameter value: {name}"
    )))
}

fn io_type(name: &str) -> Result<Option<BlkdebugIo>, EngineError> {
    if name.is_empty() {
        return Ok(None);
    }
    let found = BlkdebugIo::ALL.into_iter().find(|io| io.name() == name);
    let unknown = || EngineError::generic(format!("invalid parameter value: {name}"));
    found.map(Some).ok_or_else(unknown)
}

/// A whole number, also in hexadecimal or octal; negative ones wrap, so that -1 can say "any".
fn number(name: &str, value: &str) -> Result<i64, EngineError> {
    let (negative, digits) = match value.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, value.strip_prefix('+').unwrap_or(value)),
    };
    let (digits, radix) = match digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (digits, 8),
        None => (digits, 10),
    };
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        let text = format!("Parameter '{name}' expects a number");
        return Err(EngineError::generic(text));
    }
    let too_large = || {
        EngineError::generic(format!(
            "Value '{value}' is too large for parameter '{name}'"
        ))
    };
    let size = u64::from_str_radix(digits, radix).map_err(|_| too_large())?;
    let wrapped = if negative { size.wrapping_neg() } else { size };
    Ok(wrapped.cast_signed())
}

fn flag(name: &str, value: &str) -> Result<bool, EngineError> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(EngineError::generic(format!(
            "Parameter '{name}' expects 'on' or 'off'"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_of_both_kinds() {
        let text = "\n# comment\n[inject-error \"first\"]\r\n  event = \"l2_load\"\r\nerrno=\"0x1c\"\n\
                    iotype = \"block-status\" rest\nsector = \"-1\"\nonce = \"on\"\nimmediately = \"n\"\n\
                    errno = \"034\"\n[set-state]\nevent = \"none\"\nstate = \"1\"\nnew_state = \"2\"\n\
                    [inject-error]rest\nevent = \"cor_write\"\nerrno = \"5";
        let expected = FaultConfig {
            inject_error: vec![
                InjectError {
                    event: "l2_load".to_owned(),
                    state: None,
                    iotype: Some(BlkdebugIo::BlockStatus),
                    errno: Some(28),
                    sector: Some(-1),
                    once: Some(true),
                    immediately: Some(false),
                },
                InjectError {
                    event: "cor_write".to_owned(),
                    errno: Some(5),
                    ..InjectError::default()
                },
            ],
            set_state: vec![SetState {
                event: "none".to_owned(),
                state: Some(1),
                new_state: 2,
            }],
        };
        assert_eq!(parse(text), Ok(expected));
        assert_eq!(parse(""), Ok(FaultConfig::default()));
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (text, told) in [
            ("event = \"none\"", "no group defined"),
            ("[foo]\nevent = \"none\"", "There is no option group 'foo'"),
            ("[]", "There is no option group ''"),
            ("[inject-error]", "Missing event name for rule"),
            (
                "[set-state]\nnew_state = \"2\"",
                "Missing event name for rule",
            ),
            ("[inject-error]\nevent", "Invalid parameter 'event'"),
            ("[inject-error]\nevent = none", "Invalid parameter 'event'"),
            ("[inject-error]\nfoo = \"1\"", "Invalid parameter 'foo'"),
            ("[set-state]\nerrno = \"1\"", "Invalid parameter 'errno'"),
            (
                "[inject-error]\nevent = \"foo\"",
                "invalid parameter value: foo",
            ),
            (
                "[inject-error]\nevent = \"none\"\niotype = \"bar\"",
                "invalid parameter value: bar",
            ),
            (
                "[inject-error]\nerrno = \"x\"",
                "Parameter 'errno' expects a number",
            ),
            (
                "[inject-error]\nsector = \"18446744073709551616\"",
                "Value '18446744073709551616' is too large for parameter 'sector'",
            ),
            (
                "[inject-error]\nonce = \"1\"",
                "Parameter 'once' expects 'on' or 'off'",
            ),
            (
                "[inject-error \"1\"]",
                "Parameter 'id' expects an identifier",
            ),
            (
                "[set-state \"a\"]\n[set-state \"a\"]",
                "Duplicate ID 'a' for set-state",
            ),
        ] {
            let error = parse(text).expect_err("refused");
            assert_eq!(error.text, told, "{text}");
        }
    }
}
