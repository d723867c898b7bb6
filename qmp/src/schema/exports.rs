//! Types of exports and of the NBD server.

use crate::schema::bitmaps::BITMAP_OR_NAME;
use crate::schema::{Object, Type, Words, optional, required};

/// `SocketAddressType`.
static ADDRESS_TYPE: Words = Words::of(&["inet", "unix", "vsock", "fd"]);
static INET: Object = Object::of(&[
    required("host", Type::Text),
    required("port", Type::Text),
    optional("numeric", Type::Bool),
    optional("to", Type::Uint16),
    optional("ipv4", Type::Bool),
    optional("ipv6", Type::Bool),
    optional("keep-alive", Type::Bool),
    optional("mptcp", Type::Bool),
]);
static UNIX: Object = Object::of(&[
    required("path", Type::Text),
    optional("abstract", Type::Bool),
    optional("tight", Type::Bool),
]);
static VSOCK: Object = Object::of(&[required("cid", Type::Text), required("port", Type::Text)]);
static FD: Object = Object::of(&[required("str", Type::Text)]);

/// `SocketAddress`.
pub static ADDRESS: Object = Object::union(
    &[required("type", Type::Word(&ADDRESS_TYPE))],
    "type",
    &[
        ("inet", &INET),
        ("unix", &UNIX),
        ("vsock", &VSOCK),
        ("fd", &FD),
    ],
);

static WRAPPED_INET: Object = Object::of(&[required("data", Type::Object(&INET))]);
static WRAPPED_UNIX: Object = Object::of(&[required("data", Type::Object(&UNIX))]);
static WRAPPED_VSOCK: Object = Object::of(&[required("data", Type::Object(&VSOCK))]);
static WRAPPED_FD: Object = Object::of(&[required("data", Type::Object(&FD))]);

/// `SocketAddressLegacy`.
static WRAPPED_ADDRESS: Object = Object::union(
    &[required("type", Type::Word(&ADDRESS_TYPE))],
    "type",
    &[
        ("inet", &WRAPPED_INET),
        ("unix", &WRAPPED_UNIX),
        ("vsock", &WRAPPED_VSOCK),
        ("fd", &WRAPPED_FD),
    ],
);

/// Arguments of `nbd-server-start`.
pub static NBD_SERVER_START: Object = Object::of(&[
    optional("handshake-max-seconds", Type::Uint32),
    optional("tls-creds", Type::Text),
    optional("tls-authz", Type::Text),
    optional("max-connections", Type::Uint32),
    required("addr", Type::Object(&WRAPPED_ADDRESS)),
]);

/// `NbdServerOptions`, as the option takes them.
pub static NBD_SERVER_OPTIONS: Object = Object::of(&[
    optional("handshake-max-seconds", Type::Uint32),
    optional("tls-creds", Type::Text),
    optional("tls-authz", Type::Text),
    optional("max-connections", Type::Uint32),
    required("addr", Type::Object(&ADDRESS)),
]);

static EXPORT_TYPE: Words = Words::of(&["nbd"]);
static NBD_EXPORT: Object = Object::of(&[
    optional("name", Type::Text),
    optional("description", Type::Text),
    optional("bitmaps", Type::List(&Type::Alternate(&BITMAP_OR_NAME))),
    optional("allocation-depth", Type::Bool),
]);

/// `BlockExportOptions`.
pub static EXPORT_OPTIONS: Object = Object::union(
    &[
        required("type", Type::Word(&EXPORT_TYPE)),
        required("id", Type::Text),
        optional("fixed-iothread", Type::Bool),
        optional("iothread", Type::Text),
        required("node-name", Type::Text),
        optional("writable", Type::Bool),
        optional("writethrough", Type::Bool),
        optional("allow-inactive", Type::Bool),
    ],
    "type",
    &[("nbd", &NBD_EXPORT)],
);

static REMOVE_MODE: Words = Words::of(&["safe", "hard"]);

/// Arguments of `block-export-del`.
pub static EXPORT_DEL: Object = Object::of(&[
    required("id", Type::Text),
    optional("mode", Type::Word(&REMOVE_MODE)),
]);

/// `NbdServerAddOptions`.
pub static NBD_SERVER_ADD: Object = Object::of(&[
    optional("name", Type::Text),
    optional("description", Type::Text),
    required("device", Type::Text),
    optional("writable", Type::Bool),
    optional("bitmap", Type::Text),
]);

/// Arguments of `nbd-server-remove`.
pub static NBD_SERVER_REMOVE: Object = Object::of(&[
    required("name", Type::Text),
    optional("mode", Type::Word(&REMOVE_MODE)),
]);

/// `BlockExportInfo`.
pub static EXPORT_INFO: Object = Object::of(&[
    required("id", Type::Text),
    required("type", Type::Word(&EXPORT_TYPE)),
    required("node-name", Type::Text),
    required("shutting-down", Type::Bool),
]);

/// Data of `BLOCK_EXPORT_DELETED`.
pub static EXPORT_DELETED: Object = Object::of(&[required("id", Type::Text)]);
