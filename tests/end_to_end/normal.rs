//! What is left of transcripts when everything is normalised that may differ.
//!
//! Normalised: times, versions, how far an unfinished job has got, the unit of a creation's progress, order between a
//! reply and events that are not raised by its command, order between events of different jobs, the pause/resume pairs
//! that drains add, names that a daemon makes up, numbers in the graph, the order of options in a name, room on the file system, and the process that our
//! lock errors name.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// One thing that happened.
pub(crate) enum Entry {
    /// A command was sent; separates what a client did from what a drain did.
    Sent,
    /// An event came.
    Event(Value),
}

/// A reply, ready for comparison.
pub(crate) fn reply(mut value: Value) -> Value {
    if let Some(graph) = value
        .get_mut("return")
        .filter(|value| value.get("edges").is_some())
    {
        *graph = without_numbers(graph);
    }
    without_progress(value)
}

/// A text without what differs between two runs.
pub(crate) fn text(text: &str) -> String {
    let mut rest = text;
    let mut kept = String::new();
    while let Some(place) = rest.find("#block") {
        let (before, name) = rest.split_at(place + "#block".len());
        kept += before;
        rest = name.trim_start_matches(|c: char| c.is_ascii_digit());
    }
    kept += rest;
    while let Some(start) = kept.find(" (held by process ") {
        let end = kept[start..].find(')').expect("closed");
        kept.replace_range(start..=start + end, "");
    }
    kept
}

/// Events by job, without drains.
pub(crate) fn by_job(log: &[Entry]) -> BTreeMap<String, Vec<String>> {
    let mut events: BTreeMap<String, Vec<String>> = BTreeMap::new();
    // A mark per command keeps a client's own pauses from looking like a drain's.
    const MARK: &str = "|";
    for entry in log {
        match entry {
            Entry::Sent => events
                .values_mut()
                .for_each(|list| list.push(MARK.to_owned())),
            Entry::Event(event) => {
                let data = &event["data"];
                let job = data["id"]
                    .as_str()
                    .or(data["device"].as_str())
                    .unwrap_or("");
                let text = match event["event"].as_str() {
                    Some("JOB_STATUS_CHANGE") => data["status"].as_str().unwrap_or("").to_owned(),
                    _ => {
                        let mut shown = without_progress(event.clone());
                        if let Some(members) = shown.as_object_mut() {
                            members.remove("timestamp");
                        }
                        sorted(&shown)
                    }
                };
                let list = events.entry(job.to_owned()).or_default();
                let pair = matches!(
                    (list.last().map(String::as_str), text.as_str()),
                    (Some("paused"), "running") | (Some("standby"), "ready")
                );
                if pair {
                    list.pop();
                } else {
                    list.push(text);
                }
            }
        }
    }
    for list in events.values_mut() {
        list.retain(|text| text != MARK);
    }
    events
}

/// Progress is only compared as all or not all.
fn without_progress(value: Value) -> Value {
    match value {
        Value::Object(mut members) => {
            // Whether a job at work sleeps for a moment.
            if members.get("status") == Some(&json!("running")) {
                members.remove("busy");
            }
            // What a filter tracks for itself has no name.
            let is_filter = members.get("drv").is_some_and(|driver| {
                ["copy-before-write", "mirror_top"].contains(&driver.as_str().unwrap_or_default())
            });
            if let Some(Value::Array(bitmaps)) = members.get_mut("dirty-bitmaps") {
                bitmaps.retain(|bitmap| bitmap.get("name").is_some() || !is_filter);
                if bitmaps.is_empty() {
                    members.remove("dirty-bitmaps");
                }
            }
            // Ours alone: what the chain has become.
            members.remove("x-chain");
            // Bytes here, one step there.
            let is_create = members.get("type") == Some(&json!("create"));
            // How much a file system gave for it.
            if let Some(size) = members.get_mut("actual-size") {
                *size = json!("some");
            }
            for (done, all) in [("offset", "len"), ("current-progress", "total-progress")] {
                if let (Some(part), Some(whole)) = (members.get(done), members.get(all)) {
                    let word = if part == whole { "all" } else { "part" };
                    members[done] = json!(word);
                    if is_create {
                        members.remove(all);
                    }
                }
            }
            members
                .into_iter()
                .map(|(key, member)| (key, without_progress(member)))
                .collect()
        }
        Value::Array(mut elements) => {
            hide_lengths_of_images(&mut elements);
            elements.into_iter().map(without_progress).collect()
        }
        // Options have no order.
        Value::String(string) => match string.strip_prefix("json:") {
            Some(options) => serde_json::from_str(options).expect("options as JSON"),
            None => json!(text(&string)),
        },
        other => other,
    }
}

/// How far the file of an image that is written reaches: room may be reserved ahead.
fn hide_lengths_of_images(nodes: &mut [Value]) {
    let is_of = |node: &Value, driver: &str| node.get("drv") == Some(&json!(driver));
    let images = nodes.iter().filter(|node| is_of(node, "qcow2"));
    let file_of = |node: &Value| {
        let file = node.get("file")?;
        // An image that is opened otherwise than its header says is shown with its options.
        let options = file.as_str().and_then(|file| file.strip_prefix("json:"));
        let options = options.and_then(|options| serde_json::from_str::<Value>(options).ok());
        match options {
            Some(options) => options.pointer("/file/filename").cloned(),
            None => Some(file.clone()),
        }
    };
    let files: Vec<Value> = images.filter_map(file_of).collect();
    let is_file = |node: &&mut Value| {
        let file = node.get("file");
        is_of(node, "file") && file.is_some_and(|file| files.contains(file))
    };
    for node in nodes.iter_mut().filter(is_file) {
        if let Some(length) = node.pointer_mut("/image/virtual-size") {
            *length = json!("some");
        }
    }
}

fn sorted(value: &Value) -> String {
    fn sort(value: &Value) -> Value {
        match value {
            Value::Object(members) => {
                let ordered: BTreeMap<_, _> =
                    members.iter().map(|(k, v)| (k.clone(), sort(v))).collect();
                json!(ordered)
            }
            other => other.clone(),
        }
    }
    sort(value).to_string()
}

/// A graph whose edges tell their ends by name, in an order that does not depend on the daemon.
fn without_numbers(graph: &Value) -> Value {
    let name = |number: &Value| {
        let nodes = graph["nodes"].as_array().expect("nodes");
        let node = nodes.iter().find(|node| node["id"] == *number);
        let node = node.unwrap_or_else(|| panic!("no node {number}"));
        text(&format!("{} {}", node["type"], node["name"]))
    };
    let list = |permissions: &Value| -> Vec<String> {
        let list = permissions.as_array().expect("permissions");
        let mut words: Vec<_> = list.iter().map(ToString::to_string).collect();
        words.sort();
        words
    };
    let edges = graph["edges"]
        .as_array()
        .expect("edges")
        .iter()
        .map(|edge| {
            format!(
                "{} -{}-> {} takes {:?} shares {:?}",
                name(&edge["parent"]),
                edge["name"],
                name(&edge["child"]),
                list(&edge["perm"]),
                list(&edge["shared-perm"])
            )
        });
    let mut edges: Vec<String> = edges.collect();
    edges.sort();
    let mut nodes: Vec<String> = graph["nodes"]
        .as_array()
        .expect("nodes")
        .iter()
        .map(|node| name(&node["id"]))
        .collect();
    nodes.sort();
    json!({"nodes": nodes, "edges": edges})
}
