//! A folder for one test and the program run in it; copies that are still running, images in use, small devices.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::daemon::Process;
use crate::tools;

pub(crate) const MIB: u64 = 1 << 20;

/// A folder of its own for each test, and the program run in it.
pub(crate) struct Place {
    pub(crate) folder: TempDir,
}

impl Place {
    /// One with a tiny file system in its folder `tiny`, and QEMU's tools; none where that cannot be had.
    pub(crate) fn beside_tiny() -> Option<(Self, Tiny)> {
        if !tools::have_oracle() || !can_mount() {
            return None;
        }
        let place = Self::new();
        let tiny = Tiny::mount(place.path("tiny"))?;
        Some((place, tiny))
    }

    pub(crate) fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a folder"),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(tools::blockyard());
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("it runs")
    }

    /// Runs it; it must end well.
    pub(crate) fn succeed(&self, arguments: &[&str]) -> Output {
        let output = self.run(arguments);
        assert_eq!(code(&output), 0, "{arguments:?}: {}", complaint(&output));
        output
    }

    /// Runs it; it must fail and say `words`.
    pub(crate) fn fail(&self, arguments: &[&str], words: &str) {
        let output = self.run(arguments);
        assert_eq!(code(&output), 1, "{arguments:?}: {}", complaint(&output));
        assert!(
            complaint(&output).contains(words),
            "{arguments:?}: {}",
            complaint(&output)
        );
    }

    /// A file of bytes that repeat nowhere near, and are not zero.
    pub(crate) fn data(&self, name: &str, length_bytes: u64) -> Vec<u8> {
        let bytes: Vec<u8> = (0..length_bytes).map(|at| (at % 251) as u8 + 1).collect();
        fs::write(self.path(name), &bytes).expect("written");
        bytes
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).expect("readable")
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).expect("a folder");
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into()).collect();
        names.sort();
        names
    }
}

pub(crate) fn code(output: &Output) -> i32 {
    output.status.code().expect("it ended by itself")
}

pub(crate) fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub(crate) fn events(output: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(output).expect("UTF-8");
    let lines = text.lines().map(serde_json::from_str);
    lines.map(|line| line.expect("a JSON line")).collect()
}

/// A copy that is still running, and has copied something.
pub(crate) struct Running {
    process: Process,
    output: BufReader<ChildStdout>,
}

impl Running {
    pub(crate) fn start(place: &Place, arguments: &[&str]) -> Self {
        let mut running = Self::spawn(place, arguments);
        loop {
            let mut line = String::new();
            let read = running.output.read_line(&mut line).expect("readable");
            assert_ne!(read, 0, "it has ended");
            let event: Value = serde_json::from_str(&line).expect("a JSON line");
            assert_eq!(event["event"], "progress", "{event}");
            if event["current-bytes"].as_u64() > Some(0) {
                return running;
            }
        }
    }

    fn spawn(place: &Place, arguments: &[&str]) -> Self {
        let mut command = place.command(arguments);
        command.args(["--json", "--speed", "8M"]);
        let mut process = Process::start(command.stdout(Stdio::piped()).stderr(Stdio::null()));
        let output = process.child().stdout.take().expect("piped");
        Self {
            process,
            output: BufReader::new(output),
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).expect("a pid"));
        kill_process(pid.expect("a pid"), signal).expect("sent");
    }

    /// Waits for its end: the exit code and the last event.
    pub(crate) fn end(mut self) -> (i32, Value) {
        let mut rest = Vec::new();
        self.output.read_to_end(&mut rest).expect("readable");
        let last = events(&rest).pop().expect("a last event");
        (
            self.process.wait().code().expect("it ended by itself"),
            last,
        )
    }
}

/// qemu-io with an image open for writing, until it is dropped.
pub(crate) struct Writer {
    _process: Process,
}

impl Writer {
    pub(crate) fn open(path: &Path) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]).arg(path);
        let mut process = Process::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let input = process.child().stdin.as_mut().expect("piped");
        input.write_all(b"length\n").expect("written");
        // Its answer means that it has opened the image.
        let mut answer = [0; 1];
        let output = process.child().stdout.as_mut().expect("piped");
        output.read_exact(&mut answer).expect("an answer");
        Self { _process: process }
    }
}

/// Whether this process can mount and set up loop devices; else the test has to return.
pub(crate) fn can_mount() -> bool {
    let tools = tools::have("losetup", "mount") && tools::have("mount", "mount");
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: only root can mount and set up loop devices");
    }
    tools && root
}

/// Runs a tool; `None` if this machine does not allow what it does.
pub(crate) fn tool(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.expect("it runs");
    if !output.status.success() {
        eprintln!("SKIPPED: {program}: {}", complaint(&output));
        return None;
    }
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A loop device over a file, until it is dropped.
pub(crate) struct Loop {
    pub(crate) path: String,
}

impl Loop {
    pub(crate) fn over(path: &Path) -> Option<Self> {
        let path = tool(
            "losetup",
            &["--find", "--show", path.to_str().expect("UTF-8")],
        )?;
        Some(Self { path })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .args(["--detach", &self.path])
            .status();
    }
}

/// A tmpfs of 4 MiB, until it is dropped.
pub(crate) struct Tiny {
    pub(crate) path: PathBuf,
}

impl Tiny {
    pub(crate) fn mount(path: PathBuf) -> Option<Self> {
        fs::create_dir(&path).expect("made");
        let shown = path.to_str().expect("UTF-8");
        tool("mount", &["-t", "tmpfs", "-o", "size=4m", "none", shown])?;
        Some(Self { path })
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.path).status();
    }
}
