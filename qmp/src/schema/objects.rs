//! Types of objects and their properties.

use crate::schema::{Object, Type, Words, optional, required};

static OBJECT_TYPE: Words = Words::of(&[
    "authz-list",
    "authz-simple",
    "iothread",
    "throttle-group",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
]);

static POLICY: Words = Words::of(&["deny", "allow"]);
static FORMAT: Words = Words::of(&["exact", "glob"]);
static RULE: Object = Object::of(&[
    required("match", Type::Text),
    required("policy", Type::Word(&POLICY)),
    optional("format", Type::Word(&FORMAT)),
]);
static AUTHZ_LIST: Object = Object::of(&[
    optional("policy", Type::Word(&POLICY)),
    optional("rules", Type::List(&Type::Object(&RULE))),
]);
static AUTHZ_SIMPLE: Object = Object::of(&[required("identity", Type::Text)]);

static ENDPOINT: Words = Words::of(&["client", "server"]);
static TLS_CREDS: Object = Object::of(&[
    optional("verify-peer", Type::Bool),
    optional("dir", Type::Text),
    optional("endpoint", Type::Word(&ENDPOINT)),
    optional("priority", Type::Text),
]);
static TLS_CREDS_PSK: Object = Object::of(&[
    optional("verify-peer", Type::Bool),
    optional("dir", Type::Text),
    optional("endpoint", Type::Word(&ENDPOINT)),
    optional("priority", Type::Text),
    optional("username", Type::Text),
]);
static TLS_CREDS_X509: Object = Object::of(&[
    optional("verify-peer", Type::Bool),
    optional("dir", Type::Text),
    optional("endpoint", Type::Word(&ENDPOINT)),
    optional("priority", Type::Text),
    optional("sanity-check", Type::Bool),
    optional("passwordid", Type::Text),
]);

static IOTHREAD: Object = Object::of(&[
    optional("aio-max-batch", Type::Int),
    optional("thread-pool-min", Type::Int),
    optional("thread-pool-max", Type::Int),
    optional("poll-max-ns", Type::Int),
    optional("poll-grow", Type::Int),
    optional("poll-shrink", Type::Int),
]);

/// `ThrottleLimits`.
pub static THROTTLE_LIMITS: Object = Object::of(&[
    optional("iops-total", Type::Int),
    optional("iops-total-max", Type::Int),
    optional("iops-total-max-length", Type::Int),
    optional("iops-read", Type::Int),
    optional("iops-read-max", Type::Int),
    optional("iops-read-max-length", Type::Int),
    optional("iops-write", Type::Int),
    optional("iops-write-max", Type::Int),
    optional("iops-write-max-length", Type::Int),
    optional("bps-total", Type::Int),
    optional("bps-total-max", Type::Int),
    optional("bps-total-max-length", Type::Int),
    optional("bps-read", Type::Int),
    optional("bps-read-max", Type::Int),
    optional("bps-read-max-length", Type::Int),
    optional("bps-write", Type::Int),
    optional("bps-write-max", Type::Int),
    optional("bps-write-max-length", Type::Int),
    optional("iops-size", Type::Int),
]);
static THROTTLE_GROUP: Object = Object::of(&[
    optional("limits", Type::Object(&THROTTLE_LIMITS)),
    optional("x-iops-total", Type::Int).unstable(),
    optional("x-iops-total-max", Type::Int).unstable(),
    optional("x-iops-total-max-length", Type::Int).unstable(),
    optional("x-iops-read", Type::Int).unstable(),
    optional("x-iops-read-max", Type::Int).unstable(),
    optional("x-iops-read-max-length", Type::Int).unstable(),
    optional("x-iops-write", Type::Int).unstable(),
    optional("x-iops-write-max", Type::Int).unstable(),
    optional("x-iops-write-max-length", Type::Int).unstable(),
    optional("x-bps-total", Type::Int).unstable(),
    optional("x-bps-total-max", Type::Int).unstable(),
    optional("x-bps-total-max-length", Type::Int).unstable(),
    optional("x-bps-read", Type::Int).unstable(),
    optional("x-bps-read-max", Type::Int).unstable(),
    optional("x-bps-read-max-length", Type::Int).unstable(),
    optional("x-bps-write", Type::Int).unstable(),
    optional("x-bps-write-max", Type::Int).unstable(),
    optional("x-bps-write-max-length", Type::Int).unstable(),
    optional("x-iops-size", Type::Int).unstable(),
]);

/// `ObjectOptions`.
pub static OBJECT: Object = Object::union(
    &[
        required("qom-type", Type::Word(&OBJECT_TYPE)),
        required("id", Type::Text),
    ],
    "qom-type",
    &[
        ("authz-list", &AUTHZ_LIST),
        ("authz-simple", &AUTHZ_SIMPLE),
        ("iothread", &IOTHREAD),
        ("tls-creds-anon", &TLS_CREDS),
        ("tls-creds-psk", &TLS_CREDS_PSK),
        ("tls-creds-x509", &TLS_CREDS_X509),
        ("throttle-group", &THROTTLE_GROUP),
    ],
);
/// Arguments of `object-del`.
pub static OBJECT_BY_ID: Object = Object::of(&[required("id", Type::Text)]);

/// Arguments of `qom-list`.
pub static LIST: Object = Object::of(&[required("path", Type::Text)]);
/// `ObjectPropertyInfo`.
pub static PROPERTY_INFO: Object = Object::of(&[
    required("name", Type::Text),
    required("type", Type::Text),
    optional("description", Type::Text),
    optional("default-value", Type::Any),
]);
/// Arguments of `qom-get`.
pub static GET: Object = Object::of(&[
    required("path", Type::Text),
    required("property", Type::Text),
]);
/// Arguments of `qom-set`.
pub static SET: Object = Object::of(&[
    required("path", Type::Text),
    required("property", Type::Text),
    required("value", Type::Any),
]);
/// The property `rules` by itself.
pub static RULES: Object = Object::of(&[required("rules", Type::List(&Type::Object(&RULE)))]);
/// The property `limits` by itself.
pub static LIMITS: Object = Object::of(&[required("limits", Type::Object(&THROTTLE_LIMITS))]);
