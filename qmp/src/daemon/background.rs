//! Going to the background: the program starts itself a second time, and the first one leaves when the second is ready.
//!
//! Starting anew instead of forking keeps this free of unsafe code and of threads that a fork would lose.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::process::{Command, ExitCode, Stdio};

use rustix::fs::Mode;

/// Set for the second process.
const MARK: &str = "BLOCKYARD_IN_BACKGROUND";
/// What the second process says when it is ready.
const READY: &[u8] = b"ready\n";

/// Whether this is the second process.
pub fn is_background() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Starts the second process and waits until it is ready or has failed; its messages have been printed by then.
///
/// # Errors
/// When it cannot be started at all.
pub fn start(arguments: &[OsString]) -> io::Result<ExitCode> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(arguments)
        .env(MARK, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = Vec::new();
    if let Some(output) = child.stdout.take() {
        // More than this it never says.
        output.take(READY.len() as u64).read_to_end(&mut said)?;
    }
    if said == READY {
        return Ok(ExitCode::SUCCESS);
    }
    let status = child.wait()?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.filter(|code| *code != 0).unwrap_or(1)))
}

/// In the second process: leaves the terminal, before anything else is done.
///
/// # Errors
/// The kernel's.
pub fn leave_terminal() -> io::Result<()> {
    rustix::process::setsid()?;
    Ok(())
}

/// In the second process: tells the first that everything is set up, and lets go of what it shares with it. Paths from
/// now on start at `/`.
///
/// # Errors
/// The kernel's.
pub fn tell_ready() -> io::Result<()> {
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    rustix::process::chdir("/")?;
    rustix::process::umask(Mode::from_raw_mode(0o027));
    let mut output = io::stdout();
    output.write_all(READY)?;
    output.flush()?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}
