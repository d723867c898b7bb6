//! [`Session`]: what one connection has negotiated, and the checks between a message and a command. No I/O.

use blockyard_engine::request::Request;
use serde_json::{Map, Value, json};

use crate::commands::{self, Action};
use crate::error::QmpError;
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
    id: Option<Value>,
    content: Result<Execute, QmpError>,
}

#[derive(Debug)]
struct Execute {
    command: String,
    out_of_band: bool,
    arguments: Map<String, Value>,
}

/// What to do about a message.
#[derive(Debug)]
pub enum Step {
    /// Send this.
    Reply(Value),
    /// Carry this out, then reply with the id.
    Call {
        /// For the engine.
        request: Box<Request>,
        /// Echoed in the reply.
        id: Option<Value>,
    },
}

/// What every connection begins with.
pub fn greeting() -> Value {
    json!({"QMP": {"version": commands::version(), "capabilities": ["oob"]}})
}

/// A reply that carries a result.
pub fn success(result: Value, id: Option<Value>) -> Value {
    with_id(json!({"return": result}), id)
}

/// A reply that carries an error.
pub fn failure(error: &QmpError, id: Option<Value>) -> Value {
    with_id(json!({"error": error.value()}), id)
}

fn with_id(mut reply: Value, id: Option<Value>) -> Value {
    if let Some(id) = id {
        reply["id"] = id;
    }
    reply
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
    pub fn receive(&self, read: Result<Value, ReadError>) -> Message {
        match read {
            Err(error) => Message {
                id: None,
                content: Err(QmpError::generic(error.0)),
            },
            Ok(Value::Object(mut members)) => Message {
                id: members.remove("id"),
                content: self.form(members),
            },
            Ok(_) => Message {
                id: None,
                content: Err(QmpError::generic("QMP input must be a JSON object")),
            },
        }
    }

    fn form(&self, members: Map<String, Value>) -> Result<Execute, QmpError> {
        let mut execute = None;
        let mut out_of_band = None;
        let mut arguments = Map::new();
        for (name, value) in members {
            match name.as_str() {
                "execute" | "exec-oob" if name == "execute" || self.oob => {
                    let Value::String(command) = value else {
                        let text = format!("QMP input member '{name}' must be a string");
                        return Err(QmpError::generic(text));
                    };
                    let into = if name == "execute" {
                        &mut execute
                    } else {
                        &mut out_of_band
                    };
                    *into = Some(command);
                }
                "arguments" => match value {
                    Value::Object(members) => arguments = members,
                    _ => {
                        let text = "QMP input member 'arguments' must be an object";
                        return Err(QmpError::generic(text));
                    }
                },
                _ => {
                    let text = format!("QMP input member '{name}' is unexpected");
                    return Err(QmpError::generic(text));
                }
            }
        }
        match (execute, out_of_band) {
            (Some(_), Some(_)) => {
                let text = "QMP input member 'execute' clashes with 'exec-oob'";
                Err(QmpError::generic(text))
            }
            (None, None) => Err(QmpError::generic("QMP input lacks member 'execute'")),
            (Some(command), None) => Ok(Execute {
                command,
                out_of_band: false,
                arguments,
            }),
            (None, Some(command)) => Ok(Execute {
                command,
                out_of_band: true,
                arguments,
            }),
        }
    }

    /// Takes a message whose turn it is.
    pub fn take(&mut self, message: Message) -> Step {
        let id = message.id;
        match message.content.and_then(|execute| self.execute(execute)) {
            Ok(Action::Call(request)) => Step::Call { request, id },
            Ok(Action::Answer(result)) => Step::Reply(success(result, id)),
            Ok(Action::Negotiate { oob }) => {
                self.negotiated = true;
                self.oob = oob;
                Step::Reply(success(json!({}), id))
            }
            Err(error) => Step::Reply(failure(&error, id)),
        }
    }

    fn execute(&self, execute: Execute) -> Result<Action, QmpError> {
        let command = execute.command;
        let negotiates = command == "qmp_capabilities";
        if !self.negotiated && !negotiates {
            let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
            return Err(QmpError::command_not_found(text));
        }
        if execute.out_of_band && commands::exists(&command) {
            let text = format!("The command {command} does not support OOB");
            return Err(QmpError::generic(text));
        }
        let action = commands::read(&command, execute.arguments)?;
        if self.negotiated && negotiates {
            let text = "Capabilities negotiation is already complete, command ignored";
            return Err(QmpError::command_not_found(text));
        }
        Ok(action)
    }
}

impl Message {
    /// Whether it is answered before commands that came earlier.
    pub fn overtakes(&self) -> bool {
        matches!(&self.content, Ok(execute) if execute.out_of_band)
    }

    /// Whether nothing behind it will be read, if it is carried out.
    pub fn is_quit(&self) -> bool {
        matches!(&self.content, Ok(execute) if execute.command == "quit")
    }
}
