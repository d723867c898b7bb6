//! Whatever is mounted, attached or started is undone: at the end, after an error, and on SIGINT or SIGTERM.
//!
//! A guard undoes its thing when dropped. All things also stand in one list, so that a signal can undo them in reverse
//! order before the process ends.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A thing that must not outlive the bench.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Undo {
    /// A file system mounted here.
    Mounted(PathBuf),
    /// An attached loop device.
    Attached(String),
    /// A directory made here.
    Directory(PathBuf),
    /// A process started here.
    Process(u32),
}

static LIST: Mutex<Vec<Undo>> = Mutex::new(Vec::new());

fn list() -> MutexGuard<'static, Vec<Undo>> {
    LIST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Undoes one thing when dropped.
#[derive(Debug)]
pub(crate) struct Guard(Undo);

impl Guard {
    /// Takes charge of a thing that exists from now on.
    pub(crate) fn new(undo: Undo) -> Guard {
        list().push(undo.clone());
        Guard(undo)
    }

    /// Gives the thing up without undoing it: its owner has done so.
    pub(crate) fn disarm(&self) -> bool {
        let mut list = list();
        let place = list.iter().rposition(|entry| *entry == self.0);
        place.is_some_and(|place| {
            list.remove(place);
            true
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.disarm() {
            undo(&self.0);
        }
    }
}

/// Undoes everything that is left, newest first. The list stays locked, so that nothing new is added afterwards.
pub(crate) fn undo_all_for_good() {
    let mut list = list();
    while let Some(entry) = list.pop() {
        undo(&entry);
    }
    std::mem::forget(list);
}

fn undo(entry: &Undo) {
    match entry {
        Undo::Process(pid) => quietly(Command::new("kill").args(["-9", &pid.to_string()])),
        // Lazily if it is still busy: the loop device below goes with its last user.
        Undo::Mounted(path) => {
            if !succeeds(Command::new("umount").arg(path)) {
                quietly(Command::new("umount").arg("--lazy").arg(path));
            }
        }
        Undo::Attached(device) => quietly(Command::new("losetup").args(["--detach", device])),
        Undo::Directory(path) => {
            let _ = std::fs::remove_dir_all(path);
        }
    }
}

fn quietly(command: &mut Command) {
    succeeds(command);
}

fn succeeds(command: &mut Command) -> bool {
    command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
