//! Commands of the protocol itself, and `quit`.

use blockyard_engine::request::Request;
use serde_json::json;

use crate::commands::{Action, Command, call, names, whole_schema};
use crate::schema::images::BLOCK_INFO;
use crate::schema::protocol::{CAPABILITIES, COMMAND_INFO, SCHEMA_INFO, VERSION_INFO};
use crate::schema::{EMPTY, Type};
use crate::wire::output::Constant;

pub(super) static COMMANDS: &[Command] = &[
    Command::act("qmp_capabilities", &CAPABILITIES, |arguments| {
        let oob = !arguments.word_list("enable", &[("oob", ())]).is_empty();
        Ok(Action::Negotiate { oob })
    }),
    Command::new("query-version", &EMPTY, Type::Object(&VERSION_INFO), |_| {
        Ok(Action::Answer(&VERSION))
    }),
    Command::new(
        "query-commands",
        &EMPTY,
        Type::List(&Type::Object(&COMMAND_INFO)),
        |_| {
            static NAMES: Constant =
                Constant::new(|| names().map(|name| json!({"name": name})).collect());
            Ok(Action::Answer(&NAMES))
        },
    ),
    Command::new(
        "query-qmp-schema",
        &EMPTY,
        Type::List(&Type::Object(&SCHEMA_INFO)),
        |_| {
            static SCHEMA: Constant = Constant::new(whole_schema);
            Ok(Action::Answer(&SCHEMA))
        },
    ),
    Command::new(
        "query-block",
        &EMPTY,
        Type::List(&Type::Object(&BLOCK_INFO)),
        |_| {
            static NONE: Constant = Constant::new(|| json!([]));
            Ok(Action::Answer(&NONE))
        },
    ),
    Command::act("quit", &EMPTY, |_| call(Request::Quit)),
];

/// The version by which clients choose their commands, and whose it really is.
pub static VERSION: Constant = Constant::new(|| {
    json!({
        "qemu": {"major": 10, "minor": 0, "micro": 2},
        "package": concat!("blockyard ", env!("CARGO_PKG_VERSION")),
    })
});
