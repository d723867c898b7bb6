//! [`FileName`]: how queries show what a node stands on: a plain name where that says it all, else its options.

use std::fmt;

use crate::request::{BlkdebugSpec, NullSpec};

/// One option as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Shown {
    Text(String),
    Number(i128),
    Flag(bool),
    Members(Members),
}

type Members = Vec<(String, Shown)>;

/// What a node stands on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FileName {
    /// A name that can stand for all the options.
    plain: Option<String>,
    options: Members,
}

impl FileName {
    /// Of a host file.
    pub(super) fn of_file(driver: &str, filename: String) -> Self {
        let mut options = driver_only(driver);
        push(&mut options, "filename", Shown::Text(filename.clone()));
        Self {
            plain: Some(filename),
            options,
        }
    }

    /// Of a node that keeps nothing.
    pub(super) fn of_null(driver: &str, spec: &NullSpec) -> Self {
        let mut options = driver_only(driver);
        push_some(&mut options, "size", spec.size.map(number));
        push_some(
            &mut options,
            "read-zeroes",
            spec.read_zeroes.map(Shown::Flag),
        );
        Self {
            plain: (options.len() == 1).then(|| format!("{driver}://")),
            options,
        }
    }

    /// Of a raw node; a window is an option that the plain name would lose.
    pub(super) fn of_raw(child: FileName, offset: Option<u64>, size: Option<u64>) -> Self {
        let mut options = driver_only("raw");
        push_some(&mut options, "offset", offset.map(number));
        push_some(&mut options, "size", size.map(number));
        let plain = child.plain.filter(|_| options.len() == 1);
        push(&mut options, "file", Shown::Members(child.options));
        Self { plain, options }
    }

    /// Of a fault filter: its plain name can tell of a file of rules and of nothing else.
    pub(super) fn of_blkdebug(child: FileName, spec: &BlkdebugSpec) -> Self {
        let mut options = driver_only("blkdebug");
        let config = spec.config.as_ref().map(|path| path.display().to_string());
        push_some(&mut options, "config", config.clone().map(Shown::Text));
        let telling = options.len();
        push_some(&mut options, "align", spec.align.map(number));
        for (name, limit) in [
            ("max-transfer", spec.max_transfer),
            ("opt-write-zero", spec.opt_write_zero),
            ("max-write-zero", spec.max_write_zero),
            ("opt-discard", spec.opt_discard),
            ("max-discard", spec.max_discard),
        ] {
            push_some(&mut options, name, limit.map(number));
        }
        for (index, rule) in spec.inject_error.iter().enumerate() {
            let mut member = |name: &str, value| {
                push_some(&mut options, &format!("inject-error.{index}.{name}"), value);
            };
            let kind = rule.iotype.map(|kind| Shown::Text(kind.name().to_owned()));
            member("event", Some(Shown::Text(rule.event.clone())));
            member("state", rule.state.map(number));
            member("iotype", kind);
            member("errno", rule.errno.map(number));
            member("sector", rule.sector.map(number));
            member("once", rule.once.map(Shown::Flag));
            member("immediately", rule.immediately.map(Shown::Flag));
        }
        for (index, rule) in spec.set_state.iter().enumerate() {
            let mut member = |name: &str, value| {
                push_some(&mut options, &format!("set-state.{index}.{name}"), value);
            };
            member("event", Some(Shown::Text(rule.event.clone())));
            member("state", rule.state.map(number));
            member("new_state", Some(number(rule.new_state)));
        }
        let plain = child
            .plain
            .filter(|_| options.len() == telling)
            .map(|below| format!("blkdebug:{}:{below}", config.unwrap_or_default()));
        push(&mut options, "image", Shown::Members(child.options));
        Self { plain, options }
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.plain {
            Some(plain) => f.write_str(plain),
            None => {
                f.write_str("json:")?;
                write_members(f, &self.options)
            }
        }
    }
}

fn write_members(f: &mut fmt::Formatter<'_>, members: &Members) -> fmt::Result {
    f.write_str("{")?;
    for (index, (name, value)) in members.iter().enumerate() {
        let separator = if index == 0 { "" } else { ", " };
        write!(f, "{separator}{}: ", quoted(name))?;
        match value {
            Shown::Text(text) => f.write_str(&quoted(text))?,
            Shown::Number(number) => write!(f, "{number}")?,
            Shown::Flag(flag) => write!(f, "{flag}")?,
            Shown::Members(members) => write_members(f, members)?,
        }
    }
    f.write_str("}")
}

/// A text between quotes, escaped as in JSON.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            '\u{0}'..='\u{1f}' => quoted += &format!("\\u{:04X}", u32::from(character)),
            _ => quoted.push(character),
        }
    }
    quoted.push('"');
    quoted
}

fn driver_only(driver: &str) -> Members {
    vec![("driver".to_owned(), Shown::Text(driver.to_owned()))]
}

fn number(value: impl Into<i128>) -> Shown {
    Shown::Number(value.into())
}

fn push(options: &mut Members, name: &str, value: Shown) {
    options.push((name.to_owned(), value));
}

fn push_some(options: &mut Members, name: &str, value: Option<Shown>) {
    if let Some(value) = value {
        push(options, name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_names_and_options() {
        let file = FileName::of_file("file", "a \"b\"\n\\".to_owned());
        assert_eq!(file.to_string(), "a \"b\"\n\\");
        let raw = FileName::of_raw(file.clone(), None, None);
        assert_eq!(raw.to_string(), "a \"b\"\n\\");
        let window = FileName::of_raw(raw, Some(512), Some(u64::MAX));
        assert_eq!(
            window.to_string(),
            r#"json:{"driver": "raw", "offset": 512, "size": 18446744073709551615, "file": {"driver": "raw", "file": {"driver": "file", "filename": "a \"b\"\u000A\\"}}}"#
        );
        let null = NullSpec::default();
        assert_eq!(
            FileName::of_null("null-aio", &null).to_string(),
            "null-aio://"
        );
        let null = NullSpec {
            read_zeroes: Some(false),
            ..null
        };
        let null = FileName::of_null("null-co", &null);
        assert_eq!(
            FileName::of_raw(null, None, None).to_string(),
            r#"json:{"driver": "raw", "file": {"driver": "null-co", "read-zeroes": false}}"#
        );
    }
}
