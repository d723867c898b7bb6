//! The oracle: one script on qemu-storage-daemon and on ours, and the two outcomes compared.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::client::Client;
use crate::daemon::Process;
use crate::script::{Ground, Outcome, run};
use crate::tools;

/// Runs a script on both daemons, each in a fresh folder that `prepare` fills, and compares.
pub(crate) fn compare(script: &str, prepare: impl Fn(&Path)) {
    if !tools::have_oracle() {
        return;
    }
    let theirs = on(Command::new("qemu-storage-daemon"), script, &prepare);
    let mut command = Command::new(tools::blockyard());
    command.arg("daemon");
    let ours = on(command, script, &prepare);
    let mut differences = String::new();
    for ((command, theirs), (_, ours)) in theirs.replies.iter().zip(&ours.replies) {
        if ours != theirs {
            differences += &format!("{command}\n  theirs {theirs}\n  ours   {ours}\n");
        }
    }
    let jobs: BTreeSet<&String> = theirs.events.keys().chain(ours.events.keys()).collect();
    for job in jobs {
        let (theirs, ours) = (theirs.events.get(job), ours.events.get(job));
        if ours != theirs {
            differences += &format!("events of {job}\n  theirs {theirs:?}\n  ours   {ours:?}\n");
        }
    }
    assert!(differences.is_empty(), "\n{differences}");
}

fn on(mut daemon: Command, script: &str, prepare: impl Fn(&Path)) -> Outcome {
    let folder = tempfile::tempdir().expect("a folder");
    prepare(folder.path());
    let mut process = Process::start(
        daemon
            .args(["--chardev", "stdio,id=c", "--monitor", "c"])
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped()),
    );
    let input = process.child().stdout.take().expect("piped");
    let output = process.child().stdin.take().expect("piped");
    let program = daemon.get_program().to_string_lossy().into_owned();
    let ground = Ground {
        program: &program,
        folder: folder.path(),
        pid: process.id(),
    };
    let outcome = run(script, &mut Client::over(input, output), &ground);
    let status = process.wait();
    assert!(status.success(), "{status}");
    outcome
}

/// A file of `length` bytes with a pattern that never repeats within a cluster.
pub(crate) fn data_file(path: &Path, length: u64) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(usize::try_from(length).expect("small"));
    while (bytes.len() as u64) < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(usize::try_from(length).expect("small"));
    std::fs::write(path, bytes).expect("written");
}

/// A file of `length` bytes that is one hole.
pub(crate) fn hole_file(path: &Path, length: u64) {
    let file = std::fs::File::create(path).expect("created");
    file.set_len(length).expect("sized");
}
