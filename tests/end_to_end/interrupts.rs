//! Commands without a daemon that a signal ends early say what they leave.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::client::DEADLINE;
use crate::images::run;
use crate::made_chains::{assert_shows, backing, keep};
use crate::place::Place;
use crate::tools::{self, have_oracle};

#[test]
fn a_rebase_says_how_to_go_on() {
    if !have_oracle() {
        return;
    }
    let place = Place::new();
    let folder = place.folder.path();
    let qemu_img = |arguments: &[&str]| run(folder, "qemu-img", arguments);
    qemu_img(&["create", "-q", "-f", "qcow2", "base", "64M"]);
    let write = ["-f", "qcow2", "-c", "write -P 1 0 64M", "base"];
    run(folder, "qemu-io", &write);
    let made = [
        "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top",
    ];
    qemu_img(&made);
    keep(folder, "top", "kept");
    let (code, told) = rebase_and_interrupt(&place, "top");
    assert_eq!(code, Some(130), "{told}");
    let state = "'top' is on its old backing file and shows what it did";
    assert!(told.contains(state), "{told}");
    assert_eq!(backing(folder, "top").0, "base");
    assert_shows(folder, "top", "kept", "a part of a rebase");
    place.succeed(&["rebase", "-b", "", "top"]);
    assert_eq!(backing(folder, "top").0, Value::Null);
    assert_shows(folder, "top", "kept", "the rest");
}

/// Puts an image on no backing file, which is interrupted once it has the image open. How that ended.
fn rebase_and_interrupt(place: &Place, image: &str) -> (Option<i32>, String) {
    let mut command = Command::new(tools::blockyard());
    command.args(["rebase", "-b", "", image]);
    command.current_dir(place.folder.path());
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let child = command.stderr(Stdio::piped()).spawn().expect("it starts");
    let pid = i32::try_from(child.id()).expect("a pid");
    let file = place.path(image).canonicalize().expect("there");
    let descriptors = PathBuf::from(format!("/proc/{pid}/fd"));
    let until = Instant::now() + DEADLINE;
    loop {
        assert!(Instant::now() < until, "it is not opened");
        let open = std::fs::read_dir(&descriptors)
            .into_iter()
            .flatten()
            .flatten();
        let mut open = open.filter_map(|one| one.path().read_link().ok());
        if open.any(|other| other == file) {
            break;
        }
    }
    let pid = Pid::from_raw(pid).expect("a pid");
    kill_process(pid, Signal::INT).expect("it runs");
    let ended = tools::ended(child);
    (ended.code, ended.errors)
}
