//! [`FileName`]: how queries show what a node stands on: a plain name where that says it all, else its options.
//!
//! Options of what is below are shared, not copied: a chain of n layers takes room for n of them.

use std::fmt::{self, Write};
use std::rc::Rc;

use crate::graph::image_names::protocol;
use crate::request::{BlkdebugSpec, NbdSpec, NullSpec};
use crate::sockets::Address;

/// One option as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Shown {
    Text(String),
    Number(i128),
    Flag(bool),
    Null,
    Members(Rc<Members>),
}

type Members = Vec<(String, Shown)>;

/// Longest name in bytes; one that is longer ends in dots.
const SHOWN_BYTES_MAX: usize = 4095;

/// What a node stands on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FileName {
    /// A name that can stand for all the options.
    plain: Option<String>,
    /// It is a file, a device or the like, not something that is in one.
    is_protocol: bool,
    options: Rc<Members>,
}

/// Which backing a name has to tell of.
pub(super) enum ShownBacking<'a> {
    /// None: it is what the image names.
    AsNamed,
    /// Another one.
    Other(&'a FileName),
    /// That there is none although the image names one.
    Nothing,
}

impl FileName {
    /// Of a host file.
    pub(super) fn of_file(driver: &str, filename: String) -> Self {
        let mut options = driver_only(driver);
        push(&mut options, "filename", Shown::Text(filename.clone()));
        Self {
            plain: Some(filename),
            is_protocol: true,
            options: Rc::new(options),
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
            is_protocol: true,
            options: Rc::new(options),
        }
    }

    /// Of a disk of another host.
    pub(super) fn of_nbd(spec: &NbdSpec) -> Self {
        let mut options = driver_only("nbd");
        let text = |text: &str| Shown::Text(text.to_owned());
        let export = spec.export.as_deref();
        let (kind, plain) = match &spec.server {
            Address::Path(path) | Address::Abstract { name: path, .. } => {
                push(&mut options, "server.path", text(path));
                let named = export.map(|export| format!("/{export}"));
                let named = named.unwrap_or_default();
                ("unix", format!("nbd+unix://{named}?socket={path}"))
            }
            Address::Host { host, port, .. } => {
                push(&mut options, "server.host", text(host));
                push(&mut options, "server.port", text(port));
                let named = export.map(|export| format!("/{export}"));
                let named = named.unwrap_or_default();
                ("inet", format!("nbd://{host}:{port}{named}"))
            }
            Address::Descriptor(number) => {
                push(&mut options, "server.str", text(&number.to_string()));
                ("fd", String::new())
            }
        };
        push(&mut options, "server.type", text(kind));
        push_some(&mut options, "export", export.map(text));
        push_some(
            &mut options,
            "tls-creds",
            spec.tls_creds.as_deref().map(text),
        );
        push_some(
            &mut options,
            "tls-hostname",
            spec.tls_hostname.as_deref().map(text),
        );
        Self {
            plain: (!plain.is_empty()).then_some(plain),
            is_protocol: true,
            options: Rc::new(options),
        }
    }

    /// Of a raw node; a window is an option that the plain name would lose.
    pub(super) fn of_raw(child: &FileName, offset: Option<u64>, size: Option<u64>) -> Self {
        let mut options = driver_only("raw");
        push_some(&mut options, "offset", offset.map(number));
        push_some(&mut options, "size", size.map(number));
        let says_it_all = options.len() == 1;
        push(&mut options, "file", child.shown());
        Self::of_format(child, options, says_it_all)
    }

    /// Of a qcow2 image.
    pub(super) fn of_qcow2(
        file: &FileName,
        data_file: Option<&FileName>,
        backing: &ShownBacking<'_>,
    ) -> Self {
        let mut options = driver_only("qcow2");
        push(&mut options, "file", file.shown());
        push_some(&mut options, "data-file", data_file.map(FileName::shown));
        match backing {
            ShownBacking::AsNamed => {}
            ShownBacking::Other(backing) => push(&mut options, "backing", backing.shown()),
            ShownBacking::Nothing => push(&mut options, "backing", Shown::Null),
        }
        let says_it_all = matches!(backing, ShownBacking::AsNamed);
        Self::of_format(file, options, says_it_all)
    }

    /// Of what is in a file: the file's name if opening that again would come to the same.
    fn of_format(file: &FileName, options: Members, says_it_all: bool) -> Self {
        let plain = file.plain.as_ref();
        let plain = plain.filter(|_| says_it_all && file.is_protocol);
        Self {
            plain: plain.cloned(),
            is_protocol: false,
            options: Rc::new(options),
        }
    }

    /// Whether it is a file, a device or the like, not something that is in one.
    pub(super) fn is_protocol(&self) -> bool {
        self.is_protocol
    }

    fn shown(&self) -> Shown {
        Shown::Members(self.options.clone())
    }

    /// The host file that it is or is in, if there is one.
    pub(super) fn file(&self) -> Option<&str> {
        let mut members = &self.options;
        loop {
            let named = |wanted: &str| members.iter().find(|(name, _)| name == wanted);
            match (named("filename"), named("file")) {
                (Some((_, Shown::Text(file))), _) => return Some(file),
                (_, Some((_, Shown::Members(below)))) => members = below,
                _ => return None,
            }
        }
    }

    /// The folder part of the name, with the slash, of what is a file under a plain name.
    pub(super) fn folder(&self) -> Option<&str> {
        let plain = self.plain.as_deref().filter(|_| self.is_protocol)?;
        Some(plain.rfind('/').map_or("", |slash| &plain[..=slash]))
    }

    /// What the header of an image in `folder` has to call it, so that it is found from there: files have relative names where they
    /// are below it, else, where the client has given one that starts here, whole ones. Everything else is what is shown.
    pub(super) fn seen_from(&self, folder: &str) -> String {
        let shown = self.to_string();
        let is_path = self.plain.is_some() && protocol(shown.as_bytes()).is_none();
        if !is_path || folder.is_empty() || shown.starts_with('/') {
            return shown;
        }
        match shown.strip_prefix(folder) {
            Some(name) if protocol(name.as_bytes()).is_some() => format!("./{name}"),
            Some(name) => name.to_owned(),
            None => match std::path::absolute(&shown) {
                Ok(path) => path.to_string_lossy().into_owned(),
                Err(_) => shown,
            },
        }
    }

    /// Of a filter that copies what is read. Where it stops is not shown.
    pub(super) fn of_copy_on_read(child: &FileName) -> Self {
        let mut options = driver_only("copy-on-read");
        push(&mut options, "file", child.shown());
        Self {
            plain: None,
            is_protocol: false,
            options: Rc::new(options),
        }
    }

    /// Of a filter with limits.
    pub(super) fn of_throttle(child: &FileName, group: &str) -> Self {
        let mut options = driver_only("throttle");
        push(
            &mut options,
            "throttle-group",
            Shown::Text(group.to_owned()),
        );
        push(&mut options, "file", child.shown());
        Self {
            plain: None,
            is_protocol: false,
            options: Rc::new(options),
        }
    }

    /// Of a fault filter: its plain name can tell of a file of rules and of nothing else.
    pub(super) fn of_blkdebug(child: &FileName, spec: &BlkdebugSpec) -> Self {
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
        let plain = child.plain.as_ref();
        let plain = plain
            .filter(|_| options.len() == telling)
            .map(|below| format!("blkdebug:{}:{below}", config.unwrap_or_default()));
        push(&mut options, "image", child.shown());
        Self {
            plain,
            is_protocol: true,
            options: Rc::new(options),
        }
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(plain) = &self.plain {
            return f.write_str(plain);
        }
        let mut text = Bounded(String::from("json:"));
        // Fails where it gets too long.
        let _ = write_members(&mut text, &self.options);
        if text.0.len() > SHOWN_BYTES_MAX {
            // All of it is ASCII.
            text.0.truncate(SHOWN_BYTES_MAX - 3);
            text.0.push_str("...");
        }
        f.write_str(&text.0)
    }
}

/// A text that is not written further once it is too long.
struct Bounded(String);

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.0.len() > SHOWN_BYTES_MAX {
            return Err(fmt::Error);
        }
        self.0.push_str(text);
        Ok(())
    }
}

fn write_members(f: &mut Bounded, members: &Members) -> fmt::Result {
    f.write_str("{")?;
    for (index, (name, value)) in members.iter().enumerate() {
        let separator = if index == 0 { "" } else { ", " };
        write!(f, "{separator}{}: ", quoted(name))?;
        match value {
            Shown::Text(text) => f.write_str(&quoted(text))?,
            Shown::Number(number) => write!(f, "{number}")?,
            Shown::Flag(flag) => write!(f, "{flag}")?,
            Shown::Null => f.write_str("null")?,
            Shown::Members(members) => write_members(f, members)?,
        }
    }
    f.write_str("}")
}

/// A text between quotes, escaped as in JSON; all of it is ASCII.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            '\u{8}' => quoted.push_str("\\b"),
            '\u{c}' => quoted.push_str("\\f"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            ' '..='~' => quoted.push(character),
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    quoted += &format!("\\u{unit:04X}");
                }
            }
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
        let raw = FileName::of_raw(&file, None, None);
        assert_eq!(raw.to_string(), "a \"b\"\n\\");
        let window = FileName::of_raw(&raw, Some(512), Some(u64::MAX));
        assert_eq!(
            window.to_string(),
            r#"json:{"driver": "raw", "offset": 512, "size": 18446744073709551615, "file": {"driver": "raw", "file": {"driver": "file", "filename": "a \"b\"\n\\"}}}"#
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
            FileName::of_raw(&null, None, None).to_string(),
            r#"json:{"driver": "raw", "file": {"driver": "null-co", "read-zeroes": false}}"#
        );
        let raw_on_raw = FileName::of_raw(&raw, None, None);
        assert!(raw_on_raw.to_string().starts_with("json:{"));
    }

    #[test]
    fn names_of_images_tell_of_a_backing_that_is_not_their_own() {
        let file = |name: &str| FileName::of_file("file", name.to_owned());
        let image =
            |name: &str, backing: &ShownBacking<'_>| FileName::of_qcow2(&file(name), None, backing);
        let base = image("base", &ShownBacking::AsNamed);
        assert_eq!(base.to_string(), "base");
        let alone = image("top", &ShownBacking::Nothing);
        assert_eq!(
            alone.to_string(),
            r#"json:{"driver": "qcow2", "file": {"driver": "file", "filename": "top"}, "backing": null}"#
        );
        let top = image("top", &ShownBacking::Other(&base));
        assert_eq!(top.file(), Some("top"));
        assert_eq!(
            top.to_string(),
            r#"json:{"driver": "qcow2", "file": {"driver": "file", "filename": "top"}, "backing": {"driver": "qcow2", "file": {"driver": "file", "filename": "base"}}}"#
        );
        // What is in an image, or in raw data, has no plain name.
        let nested = FileName::of_qcow2(&base, None, &ShownBacking::AsNamed);
        assert!(nested.to_string().starts_with("json:{"));
        let outside = FileName::of_qcow2(&file("a"), Some(&file("d")), &ShownBacking::AsNamed);
        assert_eq!(outside.to_string(), "a");
        assert_eq!(
            FileName::of_qcow2(&file("a"), Some(&file("d")), &ShownBacking::Nothing).to_string(),
            r#"json:{"driver": "qcow2", "file": {"driver": "file", "filename": "a"}, "data-file": {"driver": "file", "filename": "d"}, "backing": null}"#
        );
    }

    #[test]
    fn a_long_chain_has_a_name_of_bounded_length() {
        let mut name = FileName::of_file("file", "0".to_owned());
        for layer in 0..1000 {
            let file = FileName::of_file("file", layer.to_string());
            name = FileName::of_qcow2(&file, None, &ShownBacking::Other(&name));
        }
        let shown = name.to_string();
        assert_eq!(shown.len(), SHOWN_BYTES_MAX);
        assert!(shown.ends_with("..."));
    }

    #[test]
    fn texts_are_escaped_as_elsewhere() {
        let window = FileName::of_raw(
            &FileName::of_file("file", "a\tb\n\u{1}\u{e9}\"\u{7f}x\u{1f600}".to_owned()),
            Some(1),
            None,
        );
        assert_eq!(
            window.to_string(),
            r#"json:{"driver": "raw", "offset": 1, "file": {"driver": "file", "filename": "a\tb\n\u0001\u00E9\"\u007Fx\uD83D\uDE00"}}"#
        );
    }

    #[test]
    fn headers_name_files_as_they_are_seen_from_there() {
        let file = |name: &str| FileName::of_file("file", name.to_owned());
        for (folder, name, expected) in [
            ("", "base", "base"),
            ("", "sub/base", "sub/base"),
            ("sub/", "sub/base", "base"),
            ("sub/", "sub/12:30", "./12:30"),
            ("sub/", "sub/../base", "../base"),
            ("/a/", "/a/base", "/a/base"),
            ("sub/", "nbd://host/export", "nbd://host/export"),
        ] {
            assert_eq!(file(name).seen_from(folder), expected, "{folder} {name}");
        }
        let elsewhere = file("subway/base").seen_from("sub/");
        assert!(elsewhere.starts_with('/') && elsewhere.ends_with("/subway/base"));
        let window = FileName::of_raw(&file("sub/base"), Some(512), None);
        assert_eq!(window.seen_from("sub/"), window.to_string());
    }

    #[test]
    fn folders_are_those_of_files() {
        for (name, folder) in [
            ("a", ""),
            ("/a", "/"),
            ("b/a", "b/"),
            ("/c/../b/a", "/c/../b/"),
        ] {
            let file = FileName::of_file("file", name.to_owned());
            assert_eq!(file.folder(), Some(folder), "{name}");
        }
        let null = FileName::of_null("null-co", &NullSpec::default());
        assert_eq!(FileName::of_raw(&null, Some(1), None).folder(), None);
    }
}
