//! Commands of objects and their properties.

use blockyard_engine::error::EngineError;
use blockyard_engine::reply::Counted;
use blockyard_engine::request::{
    Authorization, Endpoint, EventLoopSpec, Format, GivenValue, LimitsChange, NewLimits,
    ObjectKind, ObjectSpec, Request, Rule, X509Spec,
};
use serde_json::{Value, json};

use crate::commands::{Command, call};
use crate::error::QmpError;
use crate::schema::check::{Spelling, check};
use crate::schema::fields::Fields;
use crate::schema::objects::{GET, LIMITS, LIST, OBJECT, OBJECT_BY_ID, PROPERTY_INFO, RULES, SET};
use crate::schema::{Object, Type};
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
        "tls-creds-x509" => ObjectKind::X509(Box::new(X509Spec {
            dir: fields.text("dir"),
            endpoint: fields
                .word("endpoint", &[("server", Endpoint::Server)])
                .unwrap_or_default(),
            verify_peer: fields.flag("verify-peer").unwrap_or(true),
            sanity_check: fields.flag("sanity-check").unwrap_or(true),
            priority: fields.text("priority"),
            password_id: fields.text("passwordid"),
        })),
        "tls-creds-anon" => ObjectKind::OtherCredentials("tls-creds-anon"),
        "tls-creds-psk" => ObjectKind::OtherCredentials("tls-creds-psk"),
        "authz-simple" => ObjectKind::Authorization(Authorization::Simple {
            identity: fields.required_text("identity"),
        }),
        "authz-list" => ObjectKind::Authorization(Authorization::List {
            allows_others: fields.word("policy", POLICIES).unwrap_or(false),
            rules: rules(&mut fields),
        }),
        _ => {
            let tuning = EventLoopSpec::new(|name| fields.int(name));
            ObjectKind::Iothread(tuning.map_err(|error| QmpError::generic(error.text))?)
        }
    };
    Ok(ObjectSpec { id, kind })
}

const POLICIES: &[(&str, bool)] = &[("allow", true), ("deny", false)];

/// Who may come in.
fn rules(fields: &mut Fields) -> Vec<Rule> {
    let rules = fields.objects("rules").into_iter();
    rules
        .map(|mut rule| Rule {
            allows: rule.word("policy", POLICIES).unwrap_or(false),
            format: rule.word(
                "format",
                &[("exact", Format::Exact), ("glob", Format::Glob)],
            ),
            matches: rule.required_text("match"),
        })
        .collect()
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
    let checked = |name: &str, object: &Object| {
        let document = Document::from(&json!({name: value}));
        let checked = match document.root() {
            Json::Object(members) => check(object, members, Spelling::Json).map(Fields::new),
            _ => Err(QmpError::generic("JSON object expected")),
        };
        checked.map_err(|error| EngineError::generic(error.text))
    };
    GivenValue {
        int: value.as_i64().ok_or_else(|| not_a("integer")),
        text: match value {
            Value::String(text) => Ok(text.clone()),
            _ => Err(not_a("string")),
        },
        limits: checked("limits", &LIMITS).map(|mut fields| {
            let limits = fields.object("limits").unwrap_or_default();
            Box::new(limits_change(&limits, ""))
        }),
        rules: checked("rules", &RULES).map(|mut fields| rules(&mut fields)),
    }
}
