//! [`Fields`]: reads the members of a checked object. What is not there, or was not checked, reads as absent.

use serde_json::{Map, Value};

/// The members of an object that has passed [`check`](crate::schema::check).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fields {
    members: Map<String, Value>,
}

impl Fields {
    /// The members of a checked object.
    pub const fn new(members: Map<String, Value>) -> Self {
        Self { members }
    }

    /// Whether a member is there.
    pub fn has(&self, name: &str) -> bool {
        self.members.contains_key(name)
    }

    /// Whether a member is `null`.
    pub fn is_null(&self, name: &str) -> bool {
        self.members.get(name).is_some_and(Value::is_null)
    }

    /// A string.
    pub fn text(&mut self, name: &str) -> Option<String> {
        match self.members.remove(name) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    /// A string that the schema requires.
    pub fn required_text(&mut self, name: &str) -> String {
        self.text(name).unwrap_or_default()
    }

    /// A boolean.
    pub fn flag(&self, name: &str) -> Option<bool> {
        self.members.get(name).and_then(Value::as_bool)
    }

    /// A signed integer.
    pub fn int(&self, name: &str) -> Option<i64> {
        self.members.get(name).and_then(Value::as_i64)
    }

    /// An unsigned integer.
    pub fn unsigned(&self, name: &str) -> Option<u64> {
        self.members.get(name).and_then(Value::as_u64)
    }

    /// A word, as the value that stands beside it in `words`.
    pub fn word<T: Copy>(&self, name: &str, words: &[(&str, T)]) -> Option<T> {
        let text = self.members.get(name)?.as_str()?;
        let (_, value) = words.iter().find(|(word, _)| *word == text)?;
        Some(*value)
    }

    /// Any value.
    pub fn any(&mut self, name: &str) -> Value {
        self.members.remove(name).unwrap_or_default()
    }

    /// An object.
    pub fn object(&mut self, name: &str) -> Option<Fields> {
        match self.members.remove(name) {
            Some(Value::Object(members)) => Some(Fields { members }),
            _ => None,
        }
    }

    /// A list of objects; empty where there is none.
    pub fn objects(&mut self, name: &str) -> Vec<Fields> {
        let Some(Value::Array(elements)) = self.members.remove(name) else {
            return Vec::new();
        };
        let object = |element| match element {
            Value::Object(members) => Some(Fields { members }),
            _ => None,
        };
        elements.into_iter().filter_map(object).collect()
    }

    /// A list of words, each as the value that stands beside it in `words`; empty where there is none.
    pub fn word_list<T: Copy>(&self, name: &str, words: &[(&str, T)]) -> Vec<T> {
        let elements = self.members.get(name).and_then(Value::as_array);
        let value = |text: &str| {
            words
                .iter()
                .find(|(word, _)| *word == text)
                .map(|(_, value)| *value)
        };
        elements
            .into_iter()
            .flatten()
            .filter_map(|element| element.as_str().and_then(value))
            .collect()
    }

    /// A list of names, or objects in their place; empty where there is none.
    pub fn names_or_objects(&mut self, name: &str) -> Vec<Result<String, Fields>> {
        let Some(Value::Array(elements)) = self.members.remove(name) else {
            return Vec::new();
        };
        let read = |element| match element {
            Value::String(text) => Some(Ok(text)),
            Value::Object(members) => Some(Err(Fields { members })),
            _ => None,
        };
        elements.into_iter().filter_map(read).collect()
    }

    /// A name or an object in its place.
    pub fn name_or_object(&mut self, name: &str) -> Result<String, Fields> {
        match self.members.remove(name) {
            Some(Value::String(text)) => Ok(text),
            Some(Value::Object(members)) => Err(Fields { members }),
            _ => Err(Fields::default()),
        }
    }
}
