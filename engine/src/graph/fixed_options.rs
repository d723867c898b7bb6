//! Options of a node that stay what they were when it was opened. Pure.

use crate::error::EngineError;
use crate::graph::reconfiguring::{cannot_change, cannot_reset};
use crate::request::{BlkdebugSpec, DriverSpec, FileSpec, NbdSpec, NullSpec};

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

fn check_nbd(before: &NbdSpec, now: &NbdSpec) -> Result<(), EngineError> {
    let listed = |changed: bool, name| match changed {
        true => Err(cannot_change(name)),
        false => Ok(()),
    };
    listed(before.server != now.server, "server")?;
    fixed("export", before.export.as_ref(), now.export.as_ref())?;
    let bitmap = |spec: &NbdSpec| spec.x_dirty_bitmap.clone();
    fixed("x-dirty-bitmap", bitmap(before), bitmap(now))?;
    listed(
        before.reconnect_delay_seconds != now.reconnect_delay_seconds,
        "reconnect-delay",
    )?;
    listed(
        before.open_timeout_seconds != now.open_timeout_seconds,
        "open-timeout",
    )?;
    fixed("x-connections", before.connections, now.connections)
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
}
