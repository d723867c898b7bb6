//! The commands: name, types, and how checked arguments become a request. Dispatch, `query-commands` and
//! `query-qmp-schema` read the same table.

mod bitmaps;
mod checkpoints;
mod exports;
mod jobs;
mod nbd;
mod nodes;
mod objects;
mod protocol;
mod qcow2;
mod transaction;

use blockyard_engine::request::Request;
use serde_json::Value;

use crate::error::QmpError;
use crate::schema::check::{Spelling, check};
use crate::schema::fields::Fields;
use crate::schema::introspect::{CommandShape, schema};
use crate::schema::protocol::EVENTS;
use crate::schema::{EMPTY, Object, Type};
use crate::wire::document::Members;
use crate::wire::output::Constant;

pub use exports::{Asker, export_spec, nbd_server_spec};
pub use nodes::{node_options_in_image, node_spec};
pub use objects::object_spec;
pub use protocol::VERSION;

/// What a command comes to.
#[derive(Debug)]
pub enum Action {
    /// The engine's business.
    Call(Box<Request>),
    /// Known here.
    Answer(&'static Constant),
    /// Ends the negotiation.
    Negotiate {
        /// Whether commands may overtake.
        oob: bool,
    },
}

/// One command.
struct Command {
    name: &'static str,
    arguments: &'static Object,
    returns: Type,
    read: fn(Fields) -> Result<Action, QmpError>,
    features: &'static [&'static str],
}

impl Command {
    const fn new(
        name: &'static str,
        arguments: &'static Object,
        returns: Type,
        read: fn(Fields) -> Result<Action, QmpError>,
    ) -> Self {
        Self {
            name,
            arguments,
            returns,
            read,
            features: &[],
        }
    }

    /// A command without a result.
    const fn act(
        name: &'static str,
        arguments: &'static Object,
        read: fn(Fields) -> Result<Action, QmpError>,
    ) -> Self {
        Self::new(name, arguments, Type::Object(&EMPTY), read)
    }

    const fn unstable(self) -> Self {
        self.with_features(&["unstable"])
    }

    const fn with_features(mut self, features: &'static [&'static str]) -> Self {
        self.features = features;
        self
    }
}

fn table() -> impl Iterator<Item = &'static Command> {
    let tables = [
        protocol::COMMANDS,
        jobs::COMMANDS,
        nodes::COMMANDS,
        bitmaps::COMMANDS,
        checkpoints::COMMANDS,
        objects::COMMANDS,
        exports::COMMANDS,
        transaction::COMMANDS,
    ];
    tables.into_iter().flatten()
}

/// Whether there is such a command.
pub fn exists(name: &str) -> bool {
    table().any(|command| command.name == name)
}

/// Names of all commands.
pub fn names() -> impl Iterator<Item = &'static str> {
    table().map(|command| command.name)
}

/// Checks and reads a command.
///
/// # Errors
/// In QEMU's words: an unknown command, or arguments that do not fit.
pub fn read(name: &str, arguments: Members<'_>) -> Result<Action, QmpError> {
    let Some(command) = table().find(|command| command.name == name) else {
        return Err(not_found(name));
    };
    let checked = check(command.arguments, arguments, Spelling::Json)?;
    (command.read)(Fields::new(checked))
}

/// The error for a command that does not exist.
pub fn not_found(name: &str) -> QmpError {
    QmpError::command_not_found(format!("The command {name} has not been found"))
}

/// What `query-qmp-schema` returns.
fn whole_schema() -> Value {
    let commands = table().map(|command| CommandShape {
        name: command.name,
        arguments: command.arguments,
        returns: command.returns,
        features: command.features,
    });
    let events = EVENTS.iter().map(|event| (event.name, event.data));
    schema(commands, events)
}

fn call(request: Request) -> Result<Action, QmpError> {
    Ok(Action::Call(Box::new(request)))
}
