//! `query-qmp-schema`: prints the types that commands and events use.
//!
//! Types have no names there, only numbers that mean something inside one answer; integers of every width are `int`.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::schema::{Alternate, Member, Object, Type, Words};

/// A command, as far as its types go.
pub struct CommandShape {
    /// Its name.
    pub name: &'static str,
    /// Its arguments.
    pub arguments: &'static Object,
    /// What it returns.
    pub returns: Type,
    /// Features that clients may test for.
    pub features: &'static [&'static str],
}

/// The whole schema.
pub fn schema(
    commands: impl Iterator<Item = CommandShape>,
    events: impl Iterator<Item = (&'static str, &'static Object)>,
) -> Value {
    let mut printer = Printer::default();
    for command in commands {
        let mut entry = json!({
            "name": command.name,
            "meta-type": "command",
            "arg-type": printer.object(command.arguments),
            "ret-type": printer.kind(&command.returns),
        });
        add_features(&mut entry, command.features);
        printer.entries.push(entry);
    }
    for (name, data) in events {
        let data = printer.object(data);
        printer
            .entries
            .push(json!({"name": name, "meta-type": "event", "arg-type": data}));
    }
    Value::Array(printer.entries)
}

#[derive(Default)]
struct Printer {
    entries: Vec<Value>,
    /// Address of a type, which is its identity, to its number.
    numbers: HashMap<usize, String>,
    /// Builtins and arrays that have been printed.
    printed: Vec<String>,
}

impl Printer {
    /// The name of a type, printing it when it comes up for the first time.
    fn kind(&mut self, kind: &Type) -> String {
        match kind {
            Type::Text => self.builtin("str", "string"),
            Type::Bool => self.builtin("bool", "boolean"),
            Type::Int | Type::Int32 | Type::Uint16 | Type::Uint32 | Type::Uint64 | Type::Size => {
                self.builtin("int", "int")
            }
            Type::Null => self.builtin("null", "null"),
            Type::Any => self.builtin("any", "value"),
            Type::Word(words) => self.words(words),
            Type::Object(object) => self.object(object),
            Type::Alternate(alternate) => self.alternate(alternate),
            Type::List(element) => {
                let element = self.kind(element);
                let name = format!("[{element}]");
                if !self.printed.contains(&name) {
                    self.printed.push(name.clone());
                    self.entries.push(json!({
                        "name": name, "meta-type": "array", "element-type": element,
                    }));
                }
                name
            }
        }
    }

    fn builtin(&mut self, name: &str, json_type: &str) -> String {
        if !self.printed.iter().any(|printed| printed == name) {
            self.printed.push(name.to_owned());
            self.entries.push(json!({
                "name": name, "meta-type": "builtin", "json-type": json_type,
            }));
        }
        name.to_owned()
    }

    /// The number of the type at an address; `Err`: it is new and has to be printed under this number.
    fn number<T>(&mut self, of: &'static T) -> Result<String, String> {
        let address = std::ptr::from_ref(of).addr();
        if let Some(number) = self.numbers.get(&address) {
            return Ok(number.clone());
        }
        let number = self.numbers.len().to_string();
        self.numbers.insert(address, number.clone());
        Err(number)
    }

    fn words(&mut self, words: &'static Words) -> String {
        let name = match self.number(words) {
            Ok(known) => return known,
            Err(new) => new,
        };
        let members: Vec<Value> = words
            .words
            .iter()
            .map(|word| json!({"name": word}))
            .collect();
        self.entries.push(json!({
            "name": name, "meta-type": "enum", "members": members, "values": words.words,
        }));
        name
    }

    fn alternate(&mut self, alternate: &'static Alternate) -> String {
        let name = match self.number(alternate) {
            Ok(known) => return known,
            Err(new) => new,
        };
        let members: Vec<Value> = alternate
            .kinds
            .iter()
            .map(|kind| json!({"type": self.kind(kind)}))
            .collect();
        self.entries
            .push(json!({"name": name, "meta-type": "alternate", "members": members}));
        name
    }

    fn object(&mut self, object: &'static Object) -> String {
        let name = match self.number(object) {
            Ok(known) => return known,
            Err(new) => new,
        };
        let members: Vec<Value> = object
            .members
            .iter()
            .map(|member| self.member(member))
            .collect();
        let mut entry = json!({"name": name, "meta-type": "object", "members": members});
        if let Some(union) = &object.union {
            entry["tag"] = json!(union.tag);
            entry["variants"] = self.variants(object, union.tag, union.branches);
        }
        add_features(&mut entry, object.features);
        self.entries.push(entry);
        name
    }

    /// A case for every value of the tag, also for those that bring nothing.
    fn variants(
        &mut self,
        object: &'static Object,
        tag: &str,
        branches: &'static [(&'static str, &'static Object)],
    ) -> Value {
        let tag = object.members.iter().find(|member| member.name == tag);
        let Some(Type::Word(words)) = tag.map(|member| &member.kind) else {
            return json!([]);
        };
        let case = |word: &&'static str| {
            let branch = branches.iter().find(|(case, _)| case == word);
            let brings = branch.map_or(&crate::schema::EMPTY, |(_, brings)| *brings);
            json!({"case": word, "type": self.object(brings)})
        };
        words.words.iter().map(case).collect()
    }

    fn member(&mut self, member: &'static Member) -> Value {
        let mut value = json!({"name": member.name, "type": self.kind(&member.kind)});
        if member.optional {
            value["default"] = Value::Null;
        }
        add_features(&mut value, member.features);
        value
    }
}

fn add_features(entry: &mut Value, features: &[&str]) {
    if !features.is_empty() {
        entry["features"] = json!(features);
    }
}
