//! QEMU's image locks: which bytes of a file say what its user does and what it does not share.
//!
//! Byte 100 + i says "I use permission i", byte 200 + i "I do not share permission i". All locks are shared; a conflict is
//! found by asking whether somebody else holds the opposite byte.

use std::io;

use blockyard_ring::{HostFile, ofd_lock};

use crate::error::{EngineError, ErrorKind};
use crate::graph::permissions::{ALL, Permissions, name_of};

const USED: u64 = 100;
const UNSHARED: u64 = 200;

/// What one open file has locked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct HeldLocks {
    pub(super) used: Permissions,
    pub(super) unshared: Permissions,
}

impl HeldLocks {
    /// These and others.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            used: self.used.union(other.used),
            unshared: self.unshared.union(other.unshared),
        }
    }

    /// What is in these and not in `held`.
    fn beyond(self, held: Self) -> Self {
        Self {
            used: self.used.intersection(held.used.complement()),
            unshared: self.unshared.intersection(held.unshared.complement()),
        }
    }
}

/// Changes the locks of `file` from `held` to `wanted`: new ones first, then the test, then the rest goes. Giving up locks
/// cannot fail: what stays was tested when it was taken, and somebody who is just trying, and about to be refused, is not
/// in the way.
///
/// # Errors
/// When somebody else is in the way; the text is QEMU's, with the holder's process where the kernel tells. Nothing has
/// changed then.
pub(super) fn change(
    file: &HostFile,
    held: HeldLocks,
    wanted: HeldLocks,
) -> Result<(), EngineError> {
    let more = wanted.beyond(held);
    let taken = set(file, held, wanted).and_then(|()| conflict(file, more));
    let outcome = match taken {
        Ok(None) => Ok(()),
        Ok(Some(conflict)) => Err(conflict),
        Err(error) => Err(EngineError::generic(format!(
            "Failed to lock the file: {error}"
        ))),
    };
    let (from, to) = if outcome.is_ok() {
        (held, wanted)
    } else {
        (wanted, held)
    };
    release(file, from, to);
    outcome
}

fn bytes(locks: HeldLocks) -> impl Iterator<Item = u64> {
    ALL.into_iter().flat_map(move |one| {
        let used = locks.used.has(one).then_some(USED + one as u64);
        let unshared = locks.unshared.has(one).then_some(UNSHARED + one as u64);
        used.into_iter().chain(unshared)
    })
}

fn set(file: &HostFile, held: HeldLocks, wanted: HeldLocks) -> io::Result<()> {
    let have: Vec<_> = bytes(held).collect();
    for byte in bytes(wanted).filter(|byte| !have.contains(byte)) {
        ofd_lock::lock_shared(file.descriptor(), byte)?;
    }
    Ok(())
}

fn conflict(file: &HostFile, wanted: HeldLocks) -> io::Result<Option<EngineError>> {
    for (permissions, opposite, words) in [
        (wanted.used, UNSHARED, ""),
        (wanted.unshared, USED, "shared "),
    ] {
        for one in permissions.list() {
            let byte = opposite + one as u64;
            if let Some(holder) = ofd_lock::other_holder(file.descriptor(), byte)? {
                let name = name_of(one);
                let by = holder
                    .pid
                    .map_or_else(String::new, |pid| format!(" (held by process {pid})"));
                return Ok(Some(EngineError {
                    kind: match holder.pid {
                        Some(_) => ErrorKind::Generic,
                        None => ErrorKind::LockOfNobody,
                    },
                    text: format!("Failed to get {words}\"{name}\" lock{by}"),
                }));
            }
        }
    }
    Ok(None)
}

fn release(file: &HostFile, from: HeldLocks, to: HeldLocks) {
    let keep: Vec<_> = bytes(to).collect();
    for byte in bytes(from).filter(|byte| !keep.contains(byte)) {
        if let Err(error) = ofd_lock::unlock(file.descriptor(), byte) {
            tracing::warn!(%error, byte, "an image lock could not be given back");
        }
    }
}

#[cfg(test)]
mod tests {
    use blockyard_ring::OpenMode;

    use super::*;
    use crate::request::Permission;

    #[test]
    fn giving_up_a_lock_succeeds_while_somebody_else_tries() {
        let folder = tempfile::tempdir().expect("a folder");
        let mode = OpenMode {
            write: true,
            create: true,
            ..OpenMode::default()
        };
        let open = || HostFile::open(&folder.path().join("image"), mode).expect("opened");
        let (ours, other) = (open(), open());
        let none = HeldLocks::default();
        let reads = HeldLocks {
            used: Permissions::of(&[Permission::ConsistentRead]),
            unshared: Permissions::of(&[Permission::Write]),
        };
        let writes = HeldLocks {
            used: reads.used.with(Permission::Write),
            ..reads
        };
        change(&ours, none, writes).expect("nobody is there");
        // The other's first step, before it looks.
        set(&other, none, writes).expect("shared");
        change(&ours, writes, reads).expect("less than before");
        let refused = change(&ours, reads, writes);
        refused.expect_err("more than before is tested");
    }
}
