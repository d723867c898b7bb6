//! [`Authorization`]: who may come in, by the name in his certificate.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A list of who may come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authorization {
    /// Nobody but one.
    Simple {
        /// His name.
        identity: String,
    },
    /// Whom the first rule that fits lets in.
    List {
        /// The rules, in their order.
        rules: Vec<Rule>,
        /// Whether whom no rule fits may come in.
        allows_others: bool,
    },
}

/// Whom to let in, or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// His name, or a pattern of it.
    pub matches: String,
    /// Whether he may come in.
    pub allows: bool,
    /// How the name is compared; `None`: exactly, as nothing was said.
    pub format: Option<Format>,
}

/// How a name is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Byte by byte.
    Exact,
    /// `*` stands for any characters, `?` for any one.
    Glob,
}

impl Authorization {
    /// Whether whoever has this name may come in.
    pub fn allows(&self, name: &str) -> bool {
        match self {
            Authorization::Simple { identity } => identity == name,
            Authorization::List {
                rules,
                allows_others,
            } => {
                let fitting = rules.iter().find(|rule| rule.fits(name));
                fitting.map_or(*allows_others, |rule| rule.allows)
            }
        }
    }
}

/// All lists by their ids, for those who let others in, on whatever thread they are.
#[derive(Clone, Debug, Default)]
pub struct Authorizations {
    by_id: Arc<Mutex<HashMap<String, Authorization>>>,
}

impl Authorizations {
    /// Whether the list with an id lets somebody in. Where there is none, nobody may.
    pub fn allow(&self, id: &str, name: &str) -> bool {
        let lists = self.by_id.lock().unwrap_or_else(PoisonError::into_inner);
        lists.get(id).is_some_and(|list| list.allows(name))
    }

    /// Lets a list be what it is from now on; `None`: it is not there any more.
    pub(crate) fn set(&self, id: &str, list: Option<&Authorization>) {
        let mut lists = self.by_id.lock().unwrap_or_else(PoisonError::into_inner);
        match list {
            Some(list) => lists.insert(id.to_owned(), list.clone()),
            None => lists.remove(id),
        };
    }
}

impl Rule {
    fn fits(&self, name: &str) -> bool {
        match self.format {
            None | Some(Format::Exact) => self.matches == name,
            Some(Format::Glob) => fits(&self.matches, name),
        }
    }
}

/// Whether a pattern fits all of a text. Takes no longer than their lengths multiplied.
fn fits(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    let (mut at, mut place) = (0, 0);
    // Where the last star was, and how much of the text it stands for so far.
    let mut star: Option<(usize, usize)> = None;
    while place < text.len() {
        match pattern.get(at) {
            Some('*') => {
                star = Some((at, place));
                at += 1;
            }
            Some(wanted) if *wanted == '?' || Some(wanted) == text.get(place) => {
                at += 1;
                place += 1;
            }
            _ => match star {
                Some((star_at, taken)) => {
                    star = Some((star_at, taken + 1));
                    at = star_at + 1;
                    place = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(at).all(|rest| *rest == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_as_a_whole() {
        for (pattern, text, expected) in [
            ("", "", true),
            ("*", "", true),
            ("*", "any", true),
            ("a*c", "abbbc", true),
            ("a*c", "abbbd", false),
            ("a*b*c", "a-b-b-c", true),
            ("*CN=b?b", "O=x,CN=bob", true),
            ("*CN=b?b", "CN=bobo", false),
            ("?", "", false),
            ("abc", "abcd", false),
            ("*a", "bbb", false),
            ("ä*", "äü", true),
        ] {
            assert_eq!(fits(pattern, text), expected, "{pattern} {text}");
        }
        // A pattern that would take for ever, tried in all ways.
        let pattern = "*a".repeat(200);
        assert!(!fits(&pattern, &"a".repeat(199)));
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rule = |matches: &str, allows, format| Rule {
            matches: matches.to_owned(),
            allows,
            format,
        };
        let list = |allows_others| Authorization::List {
            rules: vec![
                rule("CN=eve", false, None),
                rule("CN=*", true, Some(Format::Glob)),
                rule("O=*", true, Some(Format::Exact)),
            ],
            allows_others,
        };
        for (name, expected) in [("CN=eve", false), ("CN=bob", true), ("O=*", true)] {
            assert_eq!(list(false).allows(name), expected, "{name}");
        }
        assert!(!list(false).allows("O=x"));
        assert!(list(true).allows("O=x"));
        let identity = "CN=bob".to_owned();
        let simple = Authorization::Simple { identity };
        assert!(simple.allows("CN=bob") && !simple.allows("CN=bobo"));
        let all = Authorizations::default();
        assert!(!all.allow("list", "CN=bob"), "there is none");
        all.set("list", Some(&simple));
        assert!(all.clone().allow("list", "CN=bob") && !all.allow("list", "CN=eve"));
        all.set("list", None);
        assert!(!all.allow("list", "CN=bob"));
    }
}
