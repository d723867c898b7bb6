//! Programs that run to their end: what they said, what they cost. None outlives the bench.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use crate::Failure;
use crate::cleanup::{Guard, Undo};

/// What a program that succeeded has left.
#[derive(Debug)]
pub(crate) struct Ended {
    /// What it wrote to its standard output.
    pub(crate) output: String,
    /// User and system time of all its threads from its start to its end, in seconds; the kernel's resolution is 10 ms.
    pub(crate) cpu_seconds: f64,
}

/// Runs a program to its end; its error output is the error.
///
/// # Errors
/// It cannot be started, or does not succeed.
pub(crate) fn run(command: &mut Command) -> Result<Ended, Failure> {
    let name = format!("{command:?}");
    let failure = |error: std::io::Error| Failure::new(format!("{name}: {error}"));
    let errors = tempfile::tempfile().map_err(failure)?;
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(errors.try_clone().map_err(failure)?)
        .spawn()
        .map_err(failure)?;
    let guard = Guard::new(Undo::Process(child.id()));
    let mut output = String::new();
    if let Some(stdout) = &mut child.stdout {
        stdout.read_to_string(&mut output).map_err(failure)?;
    }
    // It is not taken from the table of processes yet, so that its number is still its own and its times can be read.
    let cpu_seconds = await_end(&child).and_then(|()| cpu_seconds(child.id()));
    guard.disarm();
    let status = child.wait().map_err(failure)?;
    match status.success() {
        true => Ok(Ended {
            output,
            cpu_seconds: cpu_seconds?,
        }),
        false => Err(Failure::new(format!("{name}: {status}: {}", said(errors)))),
    }
}

/// The same with this text as its standard input.
///
/// # Errors
/// As [`run`].
pub(crate) fn run_with_input(command: &mut Command, input: &str) -> Result<Ended, Failure> {
    let failure = |error: std::io::Error| Failure::new(format!("scratch: {error}"));
    let mut file = tempfile::tempfile().map_err(failure)?;
    file.write_all(input.as_bytes()).map_err(failure)?;
    file.seek(SeekFrom::Start(0)).map_err(failure)?;
    run(command.stdin(file))
}

/// User and system time of all threads of a process so far, in seconds; the kernel's resolution is 10 ms.
///
/// # Errors
/// There is no such process.
pub(crate) fn cpu_seconds(process: u32) -> Result<f64, Failure> {
    let path = PathBuf::from(format!("/proc/{process}/stat"));
    let text = fs::read_to_string(&path).map_err(|error| Failure::at(&path, &error))?;
    // The name in parentheses may hold anything; utime and stime are fields 14 and 15, the state is field 3.
    let after_name = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<u64> = after_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse().ok())
        .collect();
    match fields[..] {
        [user, system] => Ok((user + system) as f64 / ticks_per_second()),
        _ => Err(Failure::new(format!(
            "{}: cannot read '{text}'",
            path.display()
        ))),
    }
}

fn await_end(child: &Child) -> Result<(), Failure> {
    let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let id = id.ok_or_else(|| Failure::new("no such process"))?;
    waitid(
        WaitId::Pid(id),
        WaitIdOptions::EXITED | WaitIdOptions::NOWAIT,
    )
    .map(|_| ())
    .map_err(|error| Failure::new(format!("waiting for a program: {error}")))
}

fn said(mut errors: fs::File) -> String {
    let mut text = Vec::new();
    let read = errors
        .seek(SeekFrom::Start(0))
        .and_then(|_| errors.read_to_end(&mut text));
    match read {
        Ok(_) => String::from_utf8_lossy(&text).trim().to_owned(),
        Err(error) => format!("its error output cannot be read: {error}"),
    }
}

/// USER_HZ is part of the kernel's interface: 100 on every architecture Linux runs such daemons on.
fn ticks_per_second() -> f64 {
    100.0
}
