//! `blockyard tour`, as a stranger runs it: without a terminal, to its end, interrupted, and on to what it suggests.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, test_kill_process};

use crate::client::DEADLINE;
use crate::daemon::wait_until;
use crate::tools::{self, ended, run, run_command};

/// Names of what is in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut names: Vec<String> = entries
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    names
}

fn process(id: &str) -> Pid {
    Pid::from_raw(id.trim().parse().expect("a number")).expect("a process id")
}

#[test]
fn everything_is_shown_verified_and_goes_on_from_there() {
    let above = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(tools::blockyard());
    command.arg("tour").env("TMPDIR", above.path());
    let tour = run_command(command, "");
    assert_eq!(tour.code, Some(0), "{}{}", tour.output, tour.errors);
    for expected in [
        "blockdev-create  128.0 MiB",
        "blockdev-backup  128.0 MiB",
        "qcow2            128.0 MiB",
        "blockdev-mirror  128.0 MiB",
        "check finds nothing",
        "paused at ",
        "128.0 MiB equal",
        "refused, as it should be: GenericError: Source and target image have different sizes",
    ] {
        assert!(
            tour.output.contains(expected),
            "{expected}: {}",
            tour.output
        );
    }
    let id = tour
        .output
        .lines()
        .find_map(|line| line.strip_prefix("Daemon "));
    let id = id.and_then(|rest| rest.split(' ').next()).expect("an id");
    assert!(
        test_kill_process(process(id)).is_err(),
        "the daemon still runs"
    );
    let folder = above.path().join(&names(above.path())[0]);
    assert_eq!(names(&folder), ["daemon.log", "disk.raw", "transcript.txt"]);
    let transcript = std::fs::read_to_string(folder.join("transcript.txt")).expect("written");
    for expected in [
        "<- {\"QMP\":",
        "-> {\"execute\":\"job-pause\"",
        "\"event\": \"BLOCK_JOB_READY\"",
        "-> {\"execute\":\"quit\"",
    ] {
        assert!(transcript.contains(expected), "{expected}");
    }

    let (_, next) = tour.output.split_once("Next, ").expect("suggestions");
    let commands: Vec<&str> = next
        .lines()
        .skip(1)
        .filter(|line| line.starts_with("  "))
        .collect();
    let script = commands.join("\n").replace("speed=10000000", "speed=0");
    assert!(script.contains("jobs qmp.sock --watch"), "{script}");
    let mut shell = Command::new("sh");
    shell.args(["-e", "-c", &script]);
    let suggested = run_command(shell, "");
    assert_eq!(suggested.code, Some(0), "{script}\n{}", suggested.errors);
    assert_eq!(names(above.path()), Vec::<String>::new(), "{script}");
}

#[test]
fn a_given_folder_is_used_and_must_be_free() {
    let above = tempfile::tempdir().expect("a folder");
    let deep = format!("a b/{}", "long".repeat(30));
    let tour = run(above.path(), &["tour", "--keep", "--directory", &deep], "");
    assert_eq!(tour.code, Some(0), "{}{}", tour.output, tour.errors);
    let kept = names(&above.path().join(&deep));
    for image in ["backup.raw", "disk.raw", "mirror.raw", "new.raw"] {
        assert!(kept.iter().any(|name| name == image), "{kept:?}");
    }
    let again = run(above.path(), &["tour", "--directory", &deep], "");
    assert_eq!(again.code, Some(1));
    assert!(
        again.errors.contains("this folder is not empty"),
        "{}",
        again.errors
    );
    assert_eq!(names(&above.path().join(&deep)), kept);
    let file = format!("{deep}/disk.raw");
    let on_file = run(above.path(), &["tour", "--directory", &file], "");
    assert_eq!(on_file.code, Some(1));
    let expected = format!("blockyard: cannot use '{file}': File exists\n");
    assert_eq!(on_file.errors, expected);
}

/// A tour whose daemon runs, and that daemon.
fn on_the_way(folder: &Path) -> (Child, Pid) {
    let child = Command::new(tools::blockyard())
        .args([
            OsStr::new("tour"),
            OsStr::new("--directory"),
            folder.as_os_str(),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let pidfile: PathBuf = folder.join("daemon.pid");
    wait_until(&pidfile);
    let id = std::fs::read_to_string(pidfile).expect("written");
    (child, process(&id))
}

/// Waits for the end of a process that is not our child.
fn wait_for_end(descriptor: &rustix::fd::OwnedFd) {
    let timeout = Timespec {
        tv_sec: i64::try_from(DEADLINE.as_secs()).expect("seconds"),
        tv_nsec: 0,
    };
    let mut polled = [PollFd::new(descriptor, PollFlags::IN)];
    assert_eq!(
        poll(&mut polled, Some(&timeout)),
        Ok(1),
        "the daemon still runs"
    );
}

#[test]
fn whatever_ends_the_tour_ends_its_daemon() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::KILL] {
        let folder = tempfile::tempdir().expect("a folder");
        let (child, daemon) = on_the_way(folder.path());
        let daemon = pidfd_open(daemon, PidfdFlags::empty()).expect("it runs");
        let tour = Pid::from_raw(i32::try_from(child.id()).expect("small")).expect("a process");
        kill_process(tour, signal).expect("signalled");
        let ended = ended(child);
        if signal == Signal::KILL {
            assert_eq!(ended.code, None);
        } else {
            assert_eq!(ended.code, Some(130), "{}", ended.errors);
            assert!(
                ended.errors.contains("cancelled; the daemon has ended"),
                "{}",
                ended.errors
            );
        }
        wait_for_end(&daemon);
        assert!(
            folder.path().join("disk.raw").exists(),
            "a tour that failed keeps its folder"
        );
    }
}
