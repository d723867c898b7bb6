//! The protocol's own types: version, commands, the schema of the schema, and the events.

use crate::schema::exports::EXPORT_DELETED;
use crate::schema::jobs::{
    BLOCK_JOB_ENDED, BLOCK_JOB_ERROR, BLOCK_JOB_FAILED, BLOCK_JOB_PENDING, JOB_STATUS_CHANGE,
};
use crate::schema::nodes::IMAGE_CORRUPTED;
use crate::schema::{EventType, Object, Type, Words, optional, required};

static CAPABILITY: Words = Words::of(&["oob"]);

/// Arguments of `qmp_capabilities`.
pub static CAPABILITIES: Object =
    Object::of(&[optional("enable", Type::List(&Type::Word(&CAPABILITY)))]);

static VERSION_TRIPLE: Object = Object::of(&[
    required("major", Type::Int),
    required("minor", Type::Int),
    required("micro", Type::Int),
]);

/// `VersionInfo`.
pub static VERSION_INFO: Object = Object::of(&[
    required("qemu", Type::Object(&VERSION_TRIPLE)),
    required("package", Type::Text),
]);

/// `CommandInfo`.
pub static COMMAND_INFO: Object = Object::of(&[required("name", Type::Text)]);

static META_TYPE: Words = Words::of(&[
    "builtin",
    "enum",
    "array",
    "object",
    "alternate",
    "command",
    "event",
]);
static JSON_TYPE: Words = Words::of(&[
    "string", "number", "int", "boolean", "null", "object", "array", "value",
]);

static BUILTIN: Object = Object::of(&[required("json-type", Type::Word(&JSON_TYPE))]);
static ENUM_MEMBER: Object = Object::of(&[
    required("name", Type::Text),
    optional("features", Type::List(&Type::Text)),
]);
static ENUM: Object = Object::of(&[
    required("members", Type::List(&Type::Object(&ENUM_MEMBER))),
    required("values", Type::List(&Type::Text)).deprecated(),
]);
static ARRAY: Object = Object::of(&[required("element-type", Type::Text)]);
static OBJECT_MEMBER: Object = Object::of(&[
    required("name", Type::Text),
    required("type", Type::Text),
    optional("default", Type::Any),
    optional("features", Type::List(&Type::Text)),
]);
static OBJECT_VARIANT: Object =
    Object::of(&[required("case", Type::Text), required("type", Type::Text)]);
static OBJECT: Object = Object::of(&[
    required("members", Type::List(&Type::Object(&OBJECT_MEMBER))),
    optional("tag", Type::Text),
    optional("variants", Type::List(&Type::Object(&OBJECT_VARIANT))),
]);
static ALTERNATE_MEMBER: Object = Object::of(&[required("type", Type::Text)]);
static ALTERNATE: Object = Object::of(&[required(
    "members",
    Type::List(&Type::Object(&ALTERNATE_MEMBER)),
)]);
static COMMAND: Object = Object::of(&[
    required("arg-type", Type::Text),
    required("ret-type", Type::Text),
    optional("allow-oob", Type::Bool),
]);
static EVENT: Object = Object::of(&[required("arg-type", Type::Text)]);

/// `SchemaInfo`.
pub static SCHEMA_INFO: Object = Object::union(
    &[
        required("name", Type::Text),
        required("meta-type", Type::Word(&META_TYPE)),
        optional("features", Type::List(&Type::Text)),
    ],
    "meta-type",
    &[
        ("builtin", &BUILTIN),
        ("enum", &ENUM),
        ("array", &ARRAY),
        ("object", &OBJECT),
        ("alternate", &ALTERNATE),
        ("command", &COMMAND),
        ("event", &EVENT),
    ],
);

/// Every event that is ever sent.
pub static EVENTS: &[EventType] = &[
    EventType {
        name: "JOB_STATUS_CHANGE",
        data: &JOB_STATUS_CHANGE,
    },
    EventType {
        name: "BLOCK_JOB_COMPLETED",
        data: &BLOCK_JOB_FAILED,
    },
    EventType {
        name: "BLOCK_JOB_CANCELLED",
        data: &BLOCK_JOB_ENDED,
    },
    EventType {
        name: "BLOCK_JOB_ERROR",
        data: &BLOCK_JOB_ERROR,
    },
    EventType {
        name: "BLOCK_JOB_READY",
        data: &BLOCK_JOB_ENDED,
    },
    EventType {
        name: "BLOCK_JOB_PENDING",
        data: &BLOCK_JOB_PENDING,
    },
    EventType {
        name: "BLOCK_IMAGE_CORRUPTED",
        data: &IMAGE_CORRUPTED,
    },
    EventType {
        name: "BLOCK_EXPORT_DELETED",
        data: &EXPORT_DELETED,
    },
];
