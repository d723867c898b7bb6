//! Programs that tests need: found, or skipped aloud; with CI=true their absence is a failure.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;

use crate::client::DEADLINE;

/// What a finished program has left.
pub(crate) struct Ended {
    /// Its exit code; a signal has none.
    pub(crate) code: Option<i32>,
    /// What it printed to standard output.
    pub(crate) output: String,
    /// What it printed to standard error.
    pub(crate) errors: String,
}

/// Runs our program in a folder with this standard input, with the deadline of everything.
pub(crate) fn run(folder: &Path, arguments: &[&str], input: &str) -> Ended {
    let mut command = Command::new(blockyard());
    command.args(arguments).current_dir(folder);
    run_command(command, input)
}

/// The same with any program.
pub(crate) fn run_command(mut command: Command, input: &str) -> Ended {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut standard_input = child.stdin.take().expect("piped");
    let input = input.to_owned();
    // It may end without having read everything.
    std::thread::spawn(move || standard_input.write_all(input.as_bytes()));
    ended(child)
}

/// Waits for the end of a program whose output is piped.
pub(crate) fn ended(child: Child) -> Ended {
    let (sender, outcome) = channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    let outcome = outcome.recv_timeout(DEADLINE).expect("it ends in time");
    let outcome = outcome.expect("waited");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ended {
        code: outcome.status.code(),
        output: text(&outcome.stdout),
        errors: text(&outcome.stderr),
    }
}

/// Our program where all that it says is compared: it warns of nothing, such as a machine without io_uring.
pub(crate) fn without_warnings() -> Command {
    let mut command = Command::new(blockyard());
    command.env("RUST_LOG", "error");
    command
}

/// Where the built program is.
pub(crate) fn blockyard() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_blockyard"))
}

/// Whether a program that a Debian package brings can be run; else the test has to return.
pub(crate) fn have(program: &str, package: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        missing(&format!(
            "{program} is missing: install the package {package}"
        ));
    }
    found
}

/// Whether qemu-storage-daemon is there in the version whose texts are compared.
pub(crate) fn have_oracle() -> bool {
    let version = Command::new("qemu-storage-daemon")
        .arg("--version")
        .output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    match version {
        Ok(version) if version.contains("version 10.0") => true,
        _ => {
            missing(
                "qemu-storage-daemon 10.0 is missing: install the package qemu-utils of that version",
            );
            false
        }
    }
}

/// A Python that can import `qemu.qmp`; `None`: the test has to return. `tests/run` makes one and names it here.
pub(crate) fn python_with_qmp() -> Option<PathBuf> {
    const VARIABLE: &str = "BLOCKYARD_TEST_PYTHON";
    let python = std::env::var_os(VARIABLE).map_or_else(|| PathBuf::from("python3"), PathBuf::from);
    let found = Command::new(&python)
        .args(["-c", "import qemu.qmp"])
        .output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    missing(&format!(
        "Python's package qemu.qmp is missing: run ./tests/run, or install it with pip (package \
         python3-venv) and set {VARIABLE}"
    ));
    None
}

/// How many seeds a test with random content tries: `BLOCKYARD_SEEDS`, or as many as an ordinary run has time for.
pub(crate) fn seeds(ordinary: u64) -> u64 {
    let asked = std::env::var("BLOCKYARD_SEEDS").ok();
    asked
        .and_then(|seeds| seeds.parse().ok())
        .unwrap_or(ordinary)
}

/// Says aloud that a test is skipped; with CI=true that is a failure.
pub(crate) fn missing(what: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{what}");
    eprintln!("SKIPPED: {what}");
}
