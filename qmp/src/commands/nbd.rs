//! Options of disks of other hosts, read from what the schema has checked.

use blockyard_engine::request::NbdSpec;

use crate::commands::exports::{Asker, address};
use crate::error::QmpError;
use crate::schema::fields::Fields;

/// Reads the options of an `nbd` node.
///
/// # Errors
/// In QEMU's words: an address that cannot be had here.
pub(super) fn nbd(mut fields: Fields) -> Result<NbdSpec, QmpError> {
    // The schema holds these to 32 bits.
    let number = |fields: &Fields, name: &str| {
        let number = fields.unsigned(name);
        number.and_then(|number| u32::try_from(number).ok())
    };
    Ok(NbdSpec {
        server: address(fields.object("server").unwrap_or_default(), Asker::Client)?,
        export: fields.text("export"),
        tls_creds: fields.text("tls-creds"),
        tls_hostname: fields.text("tls-hostname"),
        x_dirty_bitmap: fields.text("x-dirty-bitmap"),
        reconnect_delay_seconds: number(&fields, "reconnect-delay"),
        open_timeout_seconds: number(&fields, "open-timeout"),
        connections: number(&fields, "x-connections"),
    })
}
