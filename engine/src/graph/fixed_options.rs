//! Options of a node that stay what they were when it was opened. Pure.

use crate::error::EngineError;
use crate::graph::reconfiguring::{cannot_change, cannot_reset};
use crate::request::{BlkdebugSpec, DriverSpec, FileSpec, NbdSpec, NullSpec};
use crate::sockets::Address;

/// That a description says of these options what the one said that the node was opened with.
///
/// # Errors
/// In QEMU's words.
pub(super) fn check_fixed(before: &DriverSpec, now: &DriverSpec) -> Result<(), EngineError> {
    match (before, now) {
        (DriverSpec::File(before), DriverSpec::File(now))
        | (DriverSpec::HostDevice(before), DriverSpec::HostDevice(now)) => check_file(before, now),
        (DriverSpec::NullCo(before), DriverSpec::NullCo(now))
        | (DriverSpec::NullAio(before), DriverSpec::NullAio(now)) => check_null(before, now),
        (DriverSpec::Blkdebug(before), DriverSpec::Blkdebug(now)) => check_blkdebug(before, now),
        (DriverSpec::Nbd(before), DriverSpec::Nbd(now)) => check_nbd(before, now),
        _ => Ok(()),
    }
}

/// That a description of another driver says all that was said of the node and that a driver of such a node cannot do without. What is
/// missing is told of before the driver is.
///
/// # Errors
/// In QEMU's words.
pub(super) fn check_dropped(before: &DriverSpec, now: &DriverSpec) -> Result<(), EngineError> {
    if matches!(before, DriverSpec::Raw { .. }) {
        // A window may go at any time.
        return Ok(());
    }
    let now = said_of(now);
    let mut said = said_of(before).into_iter();
    match said.find(|name| !now.contains(name)) {
        Some(name) => Err(cannot_reset(name)),
        None => Ok(()),
    }
}

/// Options of a driver, but for its children, that a description names.
fn said_of(spec: &DriverSpec) -> Vec<&'static str> {
    let options = match spec {
        DriverSpec::File(spec) | DriverSpec::HostDevice(spec) => vec![
            ("filename", true),
            ("aio", spec.aio.is_some()),
            ("locking", spec.locking.is_some()),
        ],
        DriverSpec::NullCo(spec) | DriverSpec::NullAio(spec) => vec![
            ("size", spec.size.is_some()),
            ("latency-ns", spec.latency_ns.is_some()),
            ("read-zeroes", spec.read_zeroes.is_some()),
        ],
        DriverSpec::Raw { offset, size, .. } => {
            vec![("offset", offset.is_some()), ("size", size.is_some())]
        }
        DriverSpec::Blkdebug(spec) => vec![
            ("config", spec.config.is_some()),
            ("align", spec.align.is_some()),
            ("max-transfer", spec.max_transfer.is_some()),
            ("opt-write-zero", spec.opt_write_zero.is_some()),
            ("max-write-zero", spec.max_write_zero.is_some()),
            ("opt-discard", spec.opt_discard.is_some()),
            ("max-discard", spec.max_discard.is_some()),
        ],
        DriverSpec::Nbd(spec) => nbd_options(spec)
            .into_iter()
            .map(|(name, value)| (name, value.is_some()))
            .collect(),
        _ => Vec::new(),
    };
    let said = options.into_iter().filter(|(_, is_said)| *is_said);
    said.map(|(name, _)| name).collect()
}

/// What is left out is told before what is another, as everything stays what it was.
fn check_nbd(before: &NbdSpec, now: &NbdSpec) -> Result<(), EngineError> {
    let (before, now) = (nbd_options(before), nbd_options(now));
    for (name, value) in &before {
        if value.is_some() && said(&now, name).is_none() {
            return Err(cannot_reset(name));
        }
    }
    for (name, value) in &now {
        if said(&before, name) != value.as_ref() {
            return Err(cannot_change(name));
        }
    }
    Ok(())
}

fn said<'a>(options: &'a [(&'static str, Option<String>)], name: &str) -> Option<&'a String> {
    let found = options.iter().find(|(other, _)| *other == name);
    found.and_then(|(_, value)| value.as_ref())
}

/// All that a client can say of a server and how it is used.
fn nbd_options(spec: &NbdSpec) -> Vec<(&'static str, Option<String>)> {
    let yes = |is_said: bool| is_said.then(String::new);
    let mut options = match &spec.server {
        Address::Path(path) => vec![
            ("server.type", Some("unix".to_owned())),
            ("server.path", Some(path.clone())),
        ],
        Address::Abstract { name, tight } => vec![
            ("server.type", Some("unix".to_owned())),
            ("server.path", Some(name.clone())),
            ("server.abstract", yes(true)),
            ("server.tight", yes(*tight)),
        ],
        Address::Host {
            host,
            port,
            ipv4,
            ipv6,
            ..
        } => vec![
            ("server.type", Some("inet".to_owned())),
            ("server.host", Some(host.clone())),
            ("server.port", Some(port.clone())),
            ("server.ipv4", Some(ipv4.to_string())),
            ("server.ipv6", Some(ipv6.to_string())),
        ],
        Address::Descriptor(number) => vec![
            ("server.type", Some("fd".to_owned())),
            ("server.str", Some(number.to_string())),
        ],
    };
    let seconds = |option: Option<u32>| option.map(|seconds| seconds.to_string());
    options.extend([
        ("export", spec.export.clone()),
        ("tls-creds", spec.tls_creds.clone()),
        ("tls-hostname", spec.tls_hostname.clone()),
        ("x-dirty-bitmap", spec.x_dirty_bitmap.clone()),
        ("reconnect-delay", seconds(spec.reconnect_delay_seconds)),
        ("open-timeout", seconds(spec.open_timeout_seconds)),
        ("x-connections", seconds(spec.connections)),
    ]);
    options
}

fn check_file(before: &FileSpec, now: &FileSpec) -> Result<(), EngineError> {
    fixed("filename", Some(&before.filename), Some(&now.filename))?;
    fixed("aio", before.aio, now.aio)?;
    fixed("locking", before.locking, now.locking)
}

fn check_null(before: &NullSpec, now: &NullSpec) -> Result<(), EngineError> {
    fixed("size", before.size, now.size)?;
    fixed("latency-ns", before.latency_ns, now.latency_ns)?;
    fixed("read-zeroes", before.read_zeroes, now.read_zeroes)
}

fn check_blkdebug(before: &BlkdebugSpec, now: &BlkdebugSpec) -> Result<(), EngineError> {
    fixed("config", before.config.as_ref(), now.config.as_ref())?;
    fixed("align", before.align, now.align)?;
    fixed("max-transfer", before.max_transfer, now.max_transfer)?;
    fixed("opt-write-zero", before.opt_write_zero, now.opt_write_zero)?;
    fixed("max-write-zero", before.max_write_zero, now.max_write_zero)?;
    fixed("opt-discard", before.opt_discard, now.opt_discard)?;
    fixed("max-discard", before.max_discard, now.max_discard)?;
    let listed = |changed: bool, name| match changed {
        true => Err(cannot_change(name)),
        false => Ok(()),
    };
    listed(before.inject_error != now.inject_error, "inject-error")?;
    listed(before.set_state != now.set_state, "set-state")?;
    listed(
        before.take_child_perms != now.take_child_perms,
        "take-child-perms",
    )?;
    listed(
        before.unshare_child_perms != now.unshare_child_perms,
        "unshare-child-perms",
    )
}

fn fixed<T: PartialEq>(name: &str, before: Option<T>, now: Option<T>) -> Result<(), EngineError> {
    match (before, now) {
        (before, now) if before == now => Ok(()),
        (Some(_), None) => Err(cannot_reset(name)),
        _ => Err(cannot_change(name)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::request::{Aio, OnOffAuto};

    fn text(before: &DriverSpec, now: &DriverSpec) -> Option<String> {
        check_fixed(before, now).err().map(|error| error.text)
    }

    #[test]
    fn options_stay_what_they_were() {
        let file = FileSpec {
            filename: PathBuf::from("/a"),
            aio: Some(Aio::Threads),
            ..FileSpec::default()
        };
        let before = DriverSpec::File(file.clone());
        assert_eq!(text(&before, &before), None);
        let with = |change: fn(&mut FileSpec)| {
            let mut file = file.clone();
            change(&mut file);
            text(&before, &DriverSpec::File(file))
        };
        let changed = |option| Some(format!("Cannot change the option '{option}'"));
        assert_eq!(
            with(|file| file.filename = PathBuf::from("/b")),
            changed("filename")
        );
        assert_eq!(with(|file| file.aio = Some(Aio::IoUring)), changed("aio"));
        assert_eq!(
            with(|file| file.locking = Some(OnOffAuto::Off)),
            changed("locking")
        );
        let reset = "Option 'aio' cannot be reset to its default value".to_owned();
        assert_eq!(with(|file| file.aio = None), Some(reset));
    }

    #[test]
    fn all_that_is_said_of_a_server_stays() {
        let nbd = NbdSpec {
            server: Address::Path("/s".to_owned()),
            export: Some("e".to_owned()),
            tls_creds: None,
            tls_hostname: None,
            x_dirty_bitmap: None,
            reconnect_delay_seconds: Some(0),
            open_timeout_seconds: None,
            connections: None,
        };
        let before = DriverSpec::Nbd(Box::new(nbd.clone()));
        assert_eq!(text(&before, &before), None);
        let changed = |option| Some(format!("Cannot change the option '{option}'"));
        let reset = |option| {
            Some(format!(
                "Option '{option}' cannot be reset to its default value"
            ))
        };
        type Change = fn(&mut NbdSpec);
        let cases: [(Change, Option<String>); 8] = [
            (
                |nbd| nbd.server = Address::Path("/t".to_owned()),
                changed("server.path"),
            ),
            (
                |nbd| {
                    nbd.server = Address::Host {
                        host: "h".to_owned(),
                        port: "1".to_owned(),
                        port_last: None,
                        ipv4: true,
                        ipv6: true,
                    };
                },
                reset("server.path"),
            ),
            (|nbd| nbd.export = None, reset("export")),
            (|nbd| nbd.export = Some(String::new()), changed("export")),
            (
                |nbd| nbd.reconnect_delay_seconds = None,
                reset("reconnect-delay"),
            ),
            (
                |nbd| nbd.open_timeout_seconds = Some(0),
                changed("open-timeout"),
            ),
            (
                |nbd| nbd.tls_creds = Some("t".to_owned()),
                changed("tls-creds"),
            ),
            (
                |nbd| nbd.tls_hostname = Some("t".to_owned()),
                changed("tls-hostname"),
            ),
        ];
        for (change, expected) in cases {
            let mut nbd = nbd.clone();
            change(&mut nbd);
            assert_eq!(text(&before, &DriverSpec::Nbd(Box::new(nbd))), expected);
        }
    }
}
