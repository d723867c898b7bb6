//! Commands of objects and their properties.

use blockyard_engine::error::EngineError;
use blockyard_engine::reply::Counted;
use blockyard_engine::request::{
    EventLoopSpec, GivenValue, LimitsChange, NewLimits, ObjectKind, ObjectSpec, Request,
};
use serde_json::{Value, json};

use crate::commands::{Command, call};
use crate::error::QmpError;
use crate::schema::Type;
use crate::schema::check::{Spelling, check};
use crate::schema::fields::Fields;
use crate::schema::objects::{GET, LIMITS, LIST, OBJECT, OBJECT_BY_ID, PROPERTY_INFO, SET};
use crate::wire::document::{Document, Json};

pub(super) static COMMANDS: &[Command] = &[
    Command::act("object-add", &OBJECT, |a| {
        call(Request::ObjectAdd(object_spec(a)?))
    }),
    Command::act("object-del", &OBJECT_BY_ID, |mut a| {
        call(Request::ObjectDel {
            id: a.required_text("id"),
        })
    }),
    Command::new(
        "qom-list",
        &LIST,
        Type::List(&Type::Object(&PROPERTY_INFO)),
        |mut a| {
            call(Request::ListProperties {
                path: a.required_text("path"),
            })
        },
    ),
    Command::new("qom-get", &GET, Type::Any, |mut a| {
        call(Request::Property {
            path: a.required_text("path"),
            name: a.required_text("property"),
        })
    }),
    Command::act("qom-set", &SET, |mut a| {
        let name = a.required_text("property");
        call(Request::SetProperty {
            path: a.required_text("path"),
            value: given(&name, &a.any("value")),
            name,
        })
    }),
];

/// Reads a checked object description.
///
/// # Errors
/// When a number is outside what an event loop could be tuned to.
pub fn object_spec(mut fields: Fields) -> Result<ObjectSpec, QmpError> {
    let id = fields.required_text("id");
    let kind = match fields.required_text("qom-type").as_str() {
        "throttle-group" => {
            let limits = fields.object("limits").unwrap_or_default();
            ObjectKind::ThrottleGroup(Box::new(NewLimits {
                limits: limits_change(&limits, ""),
                properties: limits_change(&fields, "x-"),
            }))
        }
        _ => {
            let tuning = EventLoopSpec::new(|name| fields.int(name));
            ObjectKind::Iothread(tuning.map_err(|error| QmpError::generic(error.text))?)
        }
    };
    Ok(ObjectSpec { id, kind })
}

/// What is said of limits, in members whose names begin so.
fn limits_change(fields: &Fields, prefix: &str) -> LimitsChange {
    let mut change = LimitsChange {
        request_bytes: fields.int(&format!("{prefix}iops-size")),
        ..LimitsChange::default()
    };
    for (counted, rate) in Counted::ALL.into_iter().zip(&mut change.rates) {
        let name = format!("{prefix}{}", counted.name());
        rate.average = fields.int(&name);
        rate.burst = fields.int(&format!("{name}-max"));
        rate.burst_seconds = fields.int(&format!("{name}-max-length"));
    }
    change
}

/// A value for a property, as what it might be wanted as.
fn given(property: &str, value: &Value) -> GivenValue {
    let not_a = |kind: &str| {
        EngineError::generic(format!(
            "Invalid parameter type for '{property}', expected: {kind}"
        ))
    };
    let limits = || {
        let document = Document::from(&json!({"limits": value}));
        let Json::Object(members) = document.root() else {
            return Err(QmpError::generic("JSON object expected"));
        };
        let checked = check(&LIMITS, members, Spelling::Json)?;
        let limits = Fields::new(checked).object("limits").unwrap_or_default();
        Ok(Box::new(limits_change(&limits, "")))
    };
    GivenValue {
        int: value.as_i64().ok_or_else(|| not_a("integer")),
        limits: limits().map_err(|error| EngineError::generic(error.text)),
    }
}
