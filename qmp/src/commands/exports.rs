//! Commands of exports and of the NBD server.

use blockyard_engine::request::{
    BitmapRef, ExportDeletion, ExportRequest, ExportSpec, LegacyExportSpec, NbdExportSpec,
    NbdServerSpec, Request,
};
use blockyard_engine::sockets::Address;

use crate::commands::bitmaps::bitmap_name;
use crate::commands::{Action, Command, call};
use crate::error::QmpError;
use crate::schema::exports::{
    EXPORT_DEL, EXPORT_INFO, EXPORT_OPTIONS, NBD_SERVER_ADD, NBD_SERVER_REMOVE, NBD_SERVER_START,
};
use crate::schema::fields::Fields;
use crate::schema::{EMPTY, Type};

pub(super) static COMMANDS: &[Command] = &[
    Command::act("nbd-server-start", &NBD_SERVER_START, |a| {
        export(ExportRequest::ServerStart(nbd_server_spec(
            a,
            Asker::Client,
        )?))
    }),
    Command::act("nbd-server-stop", &EMPTY, |_| {
        export(ExportRequest::ServerStop)
    }),
    Command::act("nbd-server-add", &NBD_SERVER_ADD, |mut a| {
        export(ExportRequest::AddLegacy(LegacyExportSpec {
            device: a.required_text("device"),
            name: a.text("name"),
            description: a.text("description"),
            writable: a.flag("writable").unwrap_or(false),
            bitmap: a.text("bitmap"),
        }))
    })
    .with_features(&["deprecated"]),
    Command::act("nbd-server-remove", &NBD_SERVER_REMOVE, |mut a| {
        export(ExportRequest::Del {
            how: deletion(&a),
            id: a.required_text("name"),
        })
    })
    .with_features(&["deprecated"]),
    Command::act("block-export-add", &EXPORT_OPTIONS, |a| {
        export(ExportRequest::Add(export_spec(a)))
    }),
    Command::act("block-export-del", &EXPORT_DEL, |mut a| {
        export(ExportRequest::Del {
            how: deletion(&a),
            id: a.required_text("id"),
        })
    }),
    Command::new(
        "query-block-exports",
        &EMPTY,
        Type::List(&Type::Object(&EXPORT_INFO)),
        |_| export(ExportRequest::Query),
    ),
];

/// Seconds that a client may take to choose an export.
const HANDSHAKE_SECONDS: u32 = 10;

/// Connections at once.
const CONNECTIONS: u32 = 100;

/// Who names an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// A client, who cannot know of descriptors.
    Client,
    /// The command line.
    CommandLine,
}

/// Reads a checked description of the NBD server.
///
/// # Errors
/// In QEMU's words: an address that cannot be listened at here.
pub fn nbd_server_spec(mut fields: Fields, asker: Asker) -> Result<NbdServerSpec, QmpError> {
    let number = |fields: &Fields, name| {
        let number = fields.unsigned(name);
        number.and_then(|number| u32::try_from(number).ok())
    };
    let handshake = number(&fields, "handshake-max-seconds");
    let connections = number(&fields, "max-connections");
    Ok(NbdServerSpec {
        address: address(fields.object("addr").unwrap_or_default(), asker)?,
        handshake_seconds_max: handshake.unwrap_or(HANDSHAKE_SECONDS),
        tls_creds: fields.text("tls-creds"),
        tls_authz: fields.text("tls-authz"),
        connections_max: connections.unwrap_or(CONNECTIONS),
    })
}

/// Reads a checked description of an export.
pub fn export_spec(mut fields: Fields) -> ExportSpec {
    let bitmaps = fields.names_or_objects("bitmaps").into_iter();
    let bitmaps = bitmaps.map(|bitmap| match bitmap {
        Ok(name) => BitmapRef::InChain(name),
        Err(mut fields) => BitmapRef::OfNode(bitmap_name(&mut fields)),
    });
    ExportSpec {
        nbd: NbdExportSpec {
            bitmaps: bitmaps.collect(),
            name: fields.text("name"),
            description: fields.text("description"),
            allocation_depth: fields.flag("allocation-depth").unwrap_or(false),
        },
        id: fields.required_text("id"),
        node_name: fields.required_text("node-name"),
        writable: fields.flag("writable").unwrap_or(false),
        writethrough: fields.flag("writethrough").unwrap_or(false),
        allow_inactive: fields.flag("allow-inactive").unwrap_or(false),
        iothread: fields.text("iothread"),
        fixed_iothread: fields.flag("fixed-iothread").unwrap_or(false),
    }
}

fn export(request: ExportRequest) -> Result<Action, QmpError> {
    call(Request::Export(request))
}

fn deletion(fields: &Fields) -> ExportDeletion {
    let modes = [
        ("safe", ExportDeletion::Safe),
        ("hard", ExportDeletion::Hard),
    ];
    fields.word("mode", &modes).unwrap_or_default()
}

/// Reads a socket's address, in a `data` or not.
///
/// # Errors
/// In QEMU's words: one that cannot be had here.
pub(super) fn address(mut fields: Fields, asker: Asker) -> Result<Address, QmpError> {
    let kind = fields.required_text("type");
    let mut fields = fields.object("data").unwrap_or(fields);
    match kind.as_str() {
        "unix" if fields.flag("abstract").unwrap_or(false) => Ok(Address::Abstract {
            name: fields.required_text("path"),
            tight: fields.flag("tight").unwrap_or(true),
        }),
        "unix" => Ok(Address::Path(fields.required_text("path"))),
        "inet" => inet(fields),
        "fd" => {
            let text = fields.required_text("str");
            match (asker, text.parse()) {
                (Asker::CommandLine, Ok(number)) => Ok(Address::Descriptor(number)),
                (Asker::CommandLine, Err(_)) => Err(QmpError::generic(format!(
                    "Unable to parse FD number {text}"
                ))),
                (Asker::Client, _) => {
                    let text = "only QEMU supports file descriptor passing";
                    Err(QmpError::generic(text))
                }
            }
        }
        _ => {
            let text = format!("Socket addresses of type '{kind}' are not supported");
            Err(QmpError::generic(text))
        }
    }
}

fn inet(mut fields: Fields) -> Result<Address, QmpError> {
    if fields.flag("mptcp").unwrap_or(false) {
        return Err(QmpError::generic("MPTCP is not supported"));
    }
    let (ipv4, ipv6) = (fields.flag("ipv4"), fields.flag("ipv6"));
    let (host, port) = (fields.required_text("host"), fields.required_text("port"));
    let is_number = host.is_empty() || host.parse::<std::net::IpAddr>().is_ok();
    if fields.flag("numeric").unwrap_or(false) && !is_number {
        let text =
            format!("address resolution failed for {host}:{port}: Name or service not known");
        return Err(QmpError::generic(text));
    }
    let port_last = fields.unsigned("to");
    Ok(Address::Host {
        host,
        port,
        port_last: port_last.and_then(|port| u16::try_from(port).ok()),
        // Naming one family excludes the other, unless that is named too.
        ipv4: ipv4.unwrap_or(ipv6 != Some(true)),
        ipv6: ipv6.unwrap_or(ipv4 != Some(true)),
    })
}
