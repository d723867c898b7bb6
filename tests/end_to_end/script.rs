//! Scripts that run on both daemons, and what is left of their transcripts when everything is normalised that may differ.
//!
//! A script is lines: `{...}` is a command, sent after the reply to the one before; `wait JOB STATUS` waits until that
//! status has been reported as often as it was waited for; `#` begins a comment.
//!
//! Normalised: times, versions, how far an unfinished job has got, order between a reply and events that are not raised by its command, order between
//! events of different jobs, and the pause/resume pairs that drains add.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::client::Client;

/// What a script came to, for comparison.
#[derive(Debug, PartialEq)]
pub(crate) struct Outcome {
    /// Commands with their replies, in order.
    pub(crate) replies: Vec<(String, Value)>,
    /// Events by job.
    pub(crate) events: BTreeMap<String, Vec<String>>,
}

enum Entry {
    /// A command was sent; separates what a client did from what a drain did.
    Sent,
    Event(Value),
}

/// Runs a script over a connection whose greeting has not been read yet. Ends with `quit`.
pub(crate) fn run(script: &str, client: &mut Client) -> Outcome {
    client.negotiate();
    let mut replies = Vec::new();
    let mut log = Vec::new();
    let mut waited: BTreeMap<String, usize> = BTreeMap::new();
    for line in script.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(what) = line.strip_prefix("wait ") {
            let times = waited.entry(what.to_owned()).or_default();
            *times += 1;
            wait(client, &mut log, what, *times);
        } else {
            log.push(Entry::Sent);
            client.send(format!("{line}\n").as_bytes());
            let reply = without_progress(reply(client, &mut log));
            replies.push((line.to_owned(), reply));
        }
    }
    log.push(Entry::Sent);
    client.send(b"{\"execute\": \"quit\"}");
    replies.push(("quit".to_owned(), reply(client, &mut log)));
    Outcome {
        replies,
        events: by_job(&log),
    }
}

fn reply(client: &mut Client, log: &mut Vec<Entry>) -> Value {
    loop {
        let message = client.message().expect("a reply, not the end");
        if message.get("event").is_none() {
            return message;
        }
        log.push(Entry::Event(message));
    }
}

fn wait(client: &mut Client, log: &mut Vec<Entry>, what: &str, times: usize) {
    let Some((job, status)) = what.split_once(' ') else {
        panic!("wait what? {what}")
    };
    let wanted = json!({"id": job, "status": status});
    let seen = |entry: &&Entry| {
        matches!(entry, Entry::Event(event)
            if event["event"] == "JOB_STATUS_CHANGE" && event["data"] == wanted)
    };
    while log.iter().filter(seen).count() < times {
        let message = client
            .message()
            .unwrap_or_else(|| panic!("the end instead of {what}"));
        log.push(Entry::Event(message));
    }
}

fn by_job(log: &[Entry]) -> BTreeMap<String, Vec<String>> {
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
            for (done, all) in [("offset", "len"), ("current-progress", "total-progress")] {
                if let (Some(part), Some(whole)) = (members.get(done), members.get(all)) {
                    let word = if part == whole { "all" } else { "part" };
                    members[done] = json!(word);
                }
            }
            members
                .into_iter()
                .map(|(key, member)| (key, without_progress(member)))
                .collect()
        }
        Value::Array(elements) => elements.into_iter().map(without_progress).collect(),
        other => other,
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
