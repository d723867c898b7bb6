//! Arguments that do not fit, made from our own schema: for every command and every argument a missing, a surplus, a
//! mistyped, a misspelt and an oversized one. Both daemons must refuse them in the same words, or both accept them.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Map, Value, json};

use crate::daemon::Daemon;
use crate::oracle::{compare, data_file};
use crate::schema::{NEWER_MEMBERS, OUR_COMMANDS, OUR_MEMBERS, OUR_MIRRORS_MEMBERS};

/// Nested objects are followed so far.
const DEPTH_MAX: usize = 4;

/// What a name of an existing thing could be; the rest is made up.
const FILENAME: &str = "s.raw";

struct Schema(BTreeMap<String, Value>);

impl Schema {
    fn of(list: &Value) -> Self {
        let entries = list.as_array().expect("a list").iter();
        let named = entries.map(|entry| {
            let name = entry["name"].as_str().expect("a name");
            (name.to_owned(), entry.clone())
        });
        Self(named.collect())
    }

    fn entry(&self, name: &Value) -> &Value {
        &self.0[name.as_str().expect("a name")]
    }

    /// The members of an object type; those of a union with the branch for `tag`.
    fn members(&self, object: &Value, tag: Option<&str>) -> Vec<Value> {
        let mut members = object["members"].as_array().expect("members").clone();
        let variants = object.get("variants").and_then(Value::as_array);
        let branch = variants
            .into_iter()
            .flatten()
            .find(|variant| Some(variant["case"].as_str().unwrap_or("")) == tag);
        if let Some(branch) = branch {
            members.extend(self.members(self.entry(&branch["type"]), None));
        }
        members
    }

    /// A value that fits, as small as possible, for the branch `tag` of a union.
    fn fitting(&self, kind: &Value, name: &str, tag: Option<&str>) -> Value {
        let entry = self.entry(kind);
        match entry["meta-type"].as_str().expect("a kind") {
            "builtin" => match entry["json-type"].as_str().expect("a type") {
                "int" => json!(4096),
                "boolean" => json!(false),
                "null" => Value::Null,
                _ if name == "filename" => json!(FILENAME),
                _ => json!("nobody"),
            },
            "enum" => entry["members"][0]["name"].clone(),
            "array" => json!([]),
            "alternate" => json!("nobody"),
            _ => {
                let mut object = Map::new();
                for member in self.members(entry, tag) {
                    let name = member["name"].as_str().expect("a name");
                    let is_tag = entry.get("tag").and_then(Value::as_str) == Some(name);
                    let value = match tag {
                        Some(tag) if is_tag => json!(tag),
                        _ if member.get("default").is_some() => continue,
                        _ => self.fitting(&member["type"], name, None),
                    };
                    object.insert(name.to_owned(), value);
                }
                Value::Object(object)
            }
        }
    }

    /// Values that do not fit a type, and some at its edges.
    fn misfits(&self, kind: &Value, depth: usize) -> Vec<Value> {
        let entry = self.entry(kind);
        let mut values = vec![
            Value::Null,
            json!(true),
            json!("text"),
            json!(""),
            json!([1]),
            json!({"x": 1}),
            json!(1.5),
            json!(-1),
        ];
        match entry["meta-type"].as_str().expect("a kind") {
            "builtin" => values.extend([json!(u64::MAX), json!(1_u64 << 32), json!(1e30)]),
            "enum" => values.push(json!("nope")),
            "array" => {
                let elements = self.misfits(&entry["element-type"], depth + 1);
                values.extend(elements.into_iter().map(|element| json!([element])));
            }
            "object" if depth < DEPTH_MAX => {
                values.extend(self.mutations(entry, None, depth + 1));
            }
            _ => {}
        }
        values
    }

    /// Objects that do not fit, each in one place.
    fn mutations(&self, object: &Value, tag: Option<&str>, depth: usize) -> Vec<Value> {
        let good = self.fitting(&object["name"], "", tag);
        let mut all = Vec::new();
        let mut surplus = good.clone();
        surplus["surplus"] = json!(1);
        all.push(surplus);
        let members = || self.members(object, tag).into_iter();
        let is_mirror = members().any(|member| member["name"] == "copy-mode");
        for member in members() {
            let name = member["name"].as_str().expect("a name");
            // To the oracle they are surplus, whatever they are.
            let is_mirrors = is_mirror && OUR_MIRRORS_MEMBERS.contains(&name);
            if is_mirrors || OUR_MEMBERS.contains(&name) || NEWER_MEMBERS.contains(&name) {
                continue;
            }
            if member.get("default").is_none() {
                let mut missing = good.clone();
                missing.as_object_mut().expect("an object").remove(name);
                all.push(missing);
            }
            for value in self.misfits(&member["type"], depth) {
                let mut wrong = good.clone();
                wrong[name] = value;
                all.push(wrong);
            }
        }
        all
    }
}

/// What would crash the oracle, or leave the two in different states, is not asked.
fn is_fair(command: &str, arguments: &Value) -> bool {
    let text = arguments.to_string();
    match command {
        // These end the conversation or print what differs by design.
        "quit" | "query-version" | "query-commands" | "query-qmp-schema" => arguments
            .as_object()
            .is_some_and(|members| !members.is_empty()),
        // The oracle aborts on negative sizes of null nodes, and hangs when it closes a slow one.
        "blockdev-add" => {
            !(text.contains("null-")
                && (text.contains("\"size\":-") || text.contains("latency-ns")))
        }
        // Whether the id or the tuning is looked at first is not the matter here, and two types of credentials are refused here,
        // so that only the oracle would have them from then on.
        "object-add" => !["4294967296", "tls-creds-anon", "tls-creds-psk"]
            .iter()
            .any(|unfair| text.contains(unfair)),
        _ => true,
    }
}

#[test]
fn arguments_that_do_not_fit() {
    let daemon = Daemon::start();
    let schema = Schema::of(&daemon.client().run("query-qmp-schema", json!({})));
    daemon.quit();
    let mut script = String::new();
    let mut count = 0;
    for (name, entry) in &schema.0 {
        if entry["meta-type"] != "command" || OUR_COMMANDS.contains(&name.as_str()) {
            continue;
        }
        let object = schema.entry(&entry["arg-type"]);
        let variants = object.get("variants").and_then(Value::as_array);
        let mut tags: Vec<Option<&str>> = vec![None];
        tags.extend(
            variants
                .into_iter()
                .flatten()
                .filter(|variant| variant["case"] != "blkdebug")
                .map(|variant| variant["case"].as_str()),
        );
        for tag in tags {
            for arguments in schema.mutations(object, tag, 0) {
                if is_fair(name, &arguments) {
                    count += 1;
                    let request = json!({"execute": name, "arguments": arguments});
                    writeln!(script, "{request}").expect("written");
                }
            }
        }
    }
    assert!(count > 1000, "only {count} requests were made");
    compare(&script, |folder| {
        data_file(&folder.join(FILENAME), 4096);
    });
}
