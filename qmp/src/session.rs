//! [`Session`]: what one connection has negotiated, and the checks between a message and a command. No I/O.

use std::cmp::Reverse;

use blockyard_engine::request::Request;
use serde_json::{Value, json};

use crate::commands::{self, Action};
use crate::error::QmpError;
use crate::wire::document::{Document, Json, Members};
use crate::wire::output::{Constant, Outcome, bucket, render_reply};
use crate::wire::reader::ReadError;

/// State of one connection.
#[derive(Debug, Default)]
pub struct Session {
    negotiated: bool,
    oob: bool,
}

/// A message that is a command in form.
#[derive(Debug)]
pub struct Message {
    /// Echoed in the reply.
    id: Option<Document>,
    content: Result<Execute, QmpError>,
}

/// A message in form: its members are of the types that they have to be.
#[derive(Debug)]
struct Execute {
    message: Document,
    out_of_band: bool,
}

/// What to do about a message.
#[derive(Debug)]
pub enum Step {
    /// Send this.
    Reply(Answer),
    /// Carry this out, then reply with the id.
    Call {
        /// For the engine.
        request: Box<Request>,
        /// Echoed in the reply.
        id: Option<Document>,
    },
}

/// A reply to be sent.
#[derive(Debug)]
pub struct Answer {
    /// The value of `return`, or the error.
    pub outcome: Result<Returned, QmpError>,
    /// As in the message.
    pub id: Option<Document>,
}

/// The value of `return`.
#[derive(Debug)]
pub enum Returned {
    /// Made for this reply.
    Value(Value),
    /// The same for everybody.
    Constant(&'static Constant),
}

impl Answer {
    /// The bytes to send.
    pub fn render(&self, pretty: bool) -> Vec<u8> {
        let outcome = match &self.outcome {
            Ok(Returned::Value(value)) => Outcome::Return(value),
            Ok(Returned::Constant(constant)) => Outcome::Constant(constant),
            Err(error) => Outcome::Error {
                class: error.class,
                desc: &error.text,
            },
        };
        render_reply(outcome, self.id.as_ref().map(Document::root), pretty)
    }
}

/// What every connection begins with.
pub fn greeting() -> Value {
    json!({"QMP": {"version": commands::VERSION.value(), "capabilities": ["oob"]}})
}

impl Session {
    /// Whether commands have been negotiated; events are only sent from then on.
    pub fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// Whether further commands are read while one runs.
    pub fn reads_ahead(&self) -> bool {
        self.oob
    }

    /// Checks the form of a message. Those for which [`Message::overtakes`] are taken at once, others in turn.
    pub fn receive(&self, read: Result<Document, ReadError>) -> Message {
        let refused = |error| Message {
            id: None,
            content: Err(error),
        };
        let message = match read {
            Ok(message) => message,
            Err(error) => return refused(QmpError::generic(error.0)),
        };
        let Json::Object(members) = message.root() else {
            return refused(QmpError::generic("QMP input must be a JSON object"));
        };
        let id = members.find("id").map(Document::from);
        let content = self.form(members).map(|out_of_band| Execute {
            message,
            out_of_band,
        });
        Message { id, content }
    }

    /// Whether the command of a message in form is out of band.
    fn form(&self, members: Members<'_>) -> Result<bool, QmpError> {
        // Of several faults the one is told that QEMU comes across first.
        let faulty = members
            .iter()
            .enumerate()
            .filter(|(_, (name, value))| self.fault(name, *value, members).is_some())
            .min_by_key(|(index, (name, _))| (bucket(name), Reverse(*index)));
        if let Some((_, (name, value))) = faulty {
            let fault = self.fault(name, value, members).unwrap_or_default();
            return Err(QmpError::generic(format!(
                "QMP input member '{name}' {fault}"
            )));
        }
        let is_there = |name| members.find(name).is_some();
        if is_there("execute") {
            Ok(false)
        } else if is_there("exec-oob") {
            Ok(true)
        } else {
            Err(QmpError::generic("QMP input lacks member 'execute'"))
        }
    }

    /// What is wrong about a member.
    fn fault(&self, name: &str, value: Json<'_>, all: Members<'_>) -> Option<&'static str> {
        match (name, value) {
            ("id", _) | ("arguments", Json::Object(_)) => None,
            ("arguments", _) => Some("must be an object"),
            ("exec-oob", _) if !self.oob => Some("is unexpected"),
            ("execute", Json::Text(_)) if self.oob && all.find("exec-oob").is_some() => {
                Some("clashes with 'exec-oob'")
            }
            ("execute" | "exec-oob", Json::Text(_)) => None,
            ("execute" | "exec-oob", _) => Some("must be a string"),
            _ => Some("is unexpected"),
        }
    }

    /// Takes a message whose turn it is.
    pub fn take(&mut self, message: Message) -> Step {
        let id = message.id;
        let outcome = match message.content.and_then(|execute| self.execute(&execute)) {
            Ok(Action::Call(request)) => return Step::Call { request, id },
            Ok(Action::Answer(result)) => Ok(Returned::Constant(result)),
            Ok(Action::Negotiate { oob }) => {
                self.negotiated = true;
                self.oob = oob;
                Ok(Returned::Value(json!({})))
            }
            Err(error) => Err(error),
        };
        Step::Reply(Answer { outcome, id })
    }

    fn execute(&self, execute: &Execute) -> Result<Action, QmpError> {
        let command = execute.command();
        let negotiates = command == "qmp_capabilities";
        if !self.negotiated && !negotiates {
            let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
            return Err(QmpError::command_not_found(text));
        }
        if execute.out_of_band && commands::exists(command) {
            let text = format!("The command {command} does not support OOB");
            return Err(QmpError::generic(text));
        }
        let action = commands::read(command, execute.arguments())?;
        if self.negotiated && negotiates {
            let text = "Capabilities negotiation is already complete, command ignored";
            return Err(QmpError::command_not_found(text));
        }
        Ok(action)
    }
}

impl Execute {
    fn member(&self, name: &str) -> Option<Json<'_>> {
        match self.message.root() {
            Json::Object(members) => members.find(name),
            _ => None,
        }
    }

    fn command(&self) -> &str {
        let name = if self.out_of_band {
            "exec-oob"
        } else {
            "execute"
        };
        match self.member(name) {
            Some(Json::Text(command)) => command,
            _ => "",
        }
    }

    fn arguments(&self) -> Members<'_> {
        match self.member("arguments") {
            Some(Json::Object(arguments)) => arguments,
            _ => Members::none(),
        }
    }
}

impl Message {
    /// Whether it is answered before commands that came earlier.
    pub fn overtakes(&self) -> bool {
        matches!(&self.content, Ok(execute) if execute.out_of_band)
    }

    /// Whether nothing behind it will be read, if it is carried out.
    pub fn is_quit(&self) -> bool {
        matches!(&self.content, Ok(execute) if execute.command() == "quit")
    }
}

#[cfg(test)]
mod tests {
    use crate::wire::reader::read_text;

    use super::*;

    fn answer(session: &mut Session, text: &str) -> String {
        let message = session.receive(read_text(text));
        match session.take(message) {
            Step::Reply(answer) => String::from_utf8(answer.render(false)).expect("ASCII"),
            Step::Call { .. } => panic!("not for the engine: {text}"),
        }
    }

    fn negotiated() -> Session {
        let mut session = Session::default();
        let text = r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#;
        assert_eq!(answer(&mut session, text), "{\"return\": {}}\r\n");
        session
    }

    #[test]
    fn of_several_faults_the_one_is_told_that_the_reference_tells() {
        let mut session = negotiated();
        for (text, fault) in [
            (r#"{"foo":1,"execute":2}"#, "'execute' must be a string"),
            (r#"{"foo":1,"bar":2}"#, "'bar' is unexpected"),
            (
                r#"{"arguments":1,"execute":2}"#,
                "'execute' must be a string",
            ),
            (r#"{"arguments":1,"zoo":2}"#, "'zoo' is unexpected"),
            (
                r#"{"execute":"a","exec-oob":"b"}"#,
                "'execute' clashes with 'exec-oob'",
            ),
        ] {
            let expected = format!(
                "{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"QMP input member {fault}\"}}}}\r\n"
            );
            assert_eq!(answer(&mut session, text), expected, "{text}");
        }
    }

    #[test]
    fn an_id_of_any_type_comes_back() {
        let mut session = negotiated();
        for id in ["null", "-1", "\"a\\\"b\"", "[1, {\"k\": []}]", "{\"a\": 1}"] {
            let text = format!("{{\"execute\":\"query-block\",\"id\":{id}}}");
            let expected = format!("{{\"return\": [], \"id\": {id}}}\r\n");
            assert_eq!(answer(&mut session, &text), expected);
            let text = format!("{{\"execute\":\"none\",\"id\":{id}}}");
            let expected = format!("{{\"id\": {id}, \"error\": ");
            assert!(answer(&mut session, &text).starts_with(&expected));
        }
    }
}
